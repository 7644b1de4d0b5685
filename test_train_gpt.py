# ruff: noqa: F403, F405
"""Tests of train_gpt.py: `pytest -q`, in about two minutes on two cores, without a network."""

import csv
import functools
import importlib
import itertools
import json
import math
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from array import array
from pathlib import Path

import pytest
import tiktoken
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.nn.utils import parameters_to_vector

import train_gpt
from train_gpt import *

resource = pytest.importorskip("resource", reason="no POSIX signals, pipes and limits here")
train_gpt.vocabulary()
SCRIPT = Path(train_gpt.__file__).resolve()
TYPED = shlex.quote(str(SCRIPT))
TOKENIZER, END = tiktoken.get_encoding("gpt2"), "<|endoftext|>"
SENTENCES = ["The cat sat,\n", "on the mat. ", "Every effort moves you! ", "don't\n\n", "Naïve 文"]
TEXT = "".join(random.Random(0).choices(SENTENCES, k=240))
IDS = TOKENIZER.encode(TEXT)
SIZES = "--emb-dim 16 --n-layers 2 --n-heads 2 --context-length 8 --device cpu"
TINY = {"vocab_size": 97, "context_length": 16, "emb_dim": 32, "n_heads": 4, "n_layers": 2}
KILLS = int(os.environ.get("KILLS", "2"))
assert_close = functools.partial(torch.testing.assert_close, rtol=0)
LONG = (
    f"--data text.txt --epochs {max(2, KILLS // 2)} --batch-size 4 --grad-accum-steps 4 "
    "--eval-freq 4 --warmup-steps 3 --min-lr 1e-5 --grad-clip 1 --checkpoint-every 3"
)
MOMENTS = "evaluate_model INT 3, save TERM 3, note_random USR1 9, generate_and_print_sample HUP 1"
os.environ |= dict.fromkeys(["HTTPS_PROXY", "HTTP_PROXY"], "http://127.0.0.1:9")  # a closed port
os.environ |= {"NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
needs_mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="seen only with MKL")


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)  # as in the processes; faster, too, for tiny models
    write("text.txt", TEXT)


def write(name, content):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(content.encode() if isinstance(content, str) else bytes(content))


def status_of(*arguments):
    return train_gpt.main(shlex.split(" ".join(arguments)))


def succeed(*arguments):
    assert status_of(*arguments) == 0


def command(*arguments, out="out"):
    succeed(SIZES, *arguments, "--out-dir", out)
    return read_losses(out)


def refused(capsys, *arguments):
    capsys.readouterr()
    try:
        status = status_of(*arguments)
    except SystemExit as exit:  # argparse's
        status = exit.code
    *notes, line = capsys.readouterr().err.splitlines() or [""]
    assert status == 2 and line.startswith("train_gpt: ") and len(line) <= 160, (status, line)
    assert all("train_gpt: warning: " in note for note in notes), notes
    return line


def start(*arguments, **options):
    options |= dict.fromkeys(("stdout", "stderr"), subprocess.PIPE) | {"encoding": "utf-8"}
    return subprocess.Popen([sys.executable, *shlex.split(" ".join(arguments))], **options)


def finish(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def loss_printed(capsys, *arguments, name="Loss"):
    capsys.readouterr()
    succeed("evaluate --device cpu", *arguments)
    return float(re.search(rf"(?m)^{name}: ([\d.]+)", capsys.readouterr().out)[1])


def mean_loss(logits_of, text, context=8):
    """Each target once, by one window at a time, the last one shorter."""
    ids, total = torch.tensor(TOKENIZER.encode(text, allowed_special="all")), 0.0
    for i in range(0, len(ids) - 1, context):
        inputs, targets = ids[i : i + context + 1][:-1], ids[i + 1 : i + context + 1]
        total += F.cross_entropy(logits_of(inputs[None])[0].double(), targets, reduction="sum")
    return total.item() / (len(ids) - 1)


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def read_losses(folder):
    return json.loads(Path(folder, "losses.json").read_text())


def steps_of(folder):
    rows = csv.DictReader(Path(folder, "steps.csv").read_text().splitlines())
    return [{k: float(v) for k, v in row.items() if k != "seconds"} for row in rows]


def assert_same_run(folder, other):
    for path in Path(other).glob("[mb]*.pt"):  # model, best
        assert_close(weights(Path(folder, path.name)), weights(path), atol=0)
    assert Path(folder, "losses.json").read_bytes() == Path(other, "losses.json").read_bytes()
    assert steps_of(folder) == steps_of(other)


def contents(folder="."):
    return {p: p.read_bytes() for p in Path(folder).rglob("*") if p.is_file() and p.name != ".lock"}


def stopped_at(moment, call, number, *arguments):
    """The status of a command that gets a signal as the call'th call of a function begins."""
    plain, calls = getattr(train_gpt, moment), itertools.count(1)

    def act_and_call(*arguments, **options):
        if next(calls) == call:
            os.kill(os.getpid(), number)
        return plain(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, moment, act_and_call)
        return status_of(*arguments)


class Code:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def tiny_model(seed=123, **changes):
    torch.manual_seed(seed)
    return GPTModel({**GPT_CONFIG_124M, **TINY, **changes})


def made_up_ids(count):
    return (7919 * torch.arange(count) ** 2 + 104729 * torch.arange(count)) % 50257


# ------------------------------------------------------------------- how the file is used, at first
def test_shapes():
    for rows, context in ((4, 16), (1, 1)):
        loader = create_dataloader_v1(TEXT, batch_size=rows, max_length=context, stride=context)
        model = tiny_model(vocab_size=50257, context_length=context).eval()
        inputs, targets = next(iter(loader))
        assert inputs.shape == targets.shape == (rows, context)
        x, block = torch.randn(rows, context, 32), model.trf_blocks[0]
        assert block.att(x).shape == block(x).shape == (rows, context, 32)
        assert model(inputs).shape == (rows, context, 50257)
        assert generate(model, inputs, 5, context_size=context).shape == (rows, context + 5)
    assert len(GPTDatasetV1(torch.arange(9), None, 4, 4)) == 2  # the ninth is a target alone


def test_untrained_model_finds_all_50257_tokens_about_equally_likely():
    loader, model = create_dataloader_v1(TEXT, 8, 16, 16), tiny_model(vocab_size=50257).eval()
    assert calc_loss_loader(loader, model, "cpu") == pytest.approx(math.log(50257), abs=0.3)


def test_losses_fall_on_a_tiny_run():
    loader, model = create_dataloader_v1(TEXT, 8, 16, 16), tiny_model(vocab_size=50257)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    book = model, loader, loader, optimizer, "cpu", 2, 10, 2, "The cat", TOKENIZER
    train_losses, val_losses, tokens_seen = train_model_simple(*book)
    assert train_losses[-1] < train_losses[0] - 1 and val_losses[-1] < val_losses[0] - 1


# ----------------------------------------------------------------------------- published figures
def use_all_cores():
    torch.set_num_threads(os.cpu_count())
    train_gpt.choose_device(train_gpt.parse("train", ["--device", "cpu"]))


@needs_mkl
def test_untrained_124m_model_and_ten_steps_of_a_tiny_one_give_the_published_figures():
    model, ids = tiny_model(vocab_size=50257), made_up_ids(65)
    batch = ids[:64].view(4, 16), ids[1:].view(4, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    assert list(train(model, [batch], [optimizer], "cpu", 10)) == pytest.approx(
        [11.114697, 11.017437, 10.960505, 10.843269, 10.819546,
         10.748576, 10.702586, 10.629090, 10.599867, 10.503622], abs=5e-4
    )  # fmt: skip
    use_all_cores()
    ids = made_up_ids(513)
    torch.manual_seed(123)
    model = GPTModel(GPT_CONFIG_124M).eval()
    with torch.no_grad():
        loss = calc_loss_batch(ids[:512].view(2, 256), ids[1:].view(2, 256), model, "cpu").item()
    assert loss == pytest.approx(10.991942405700684, abs=5e-4)
    torch.manual_seed(123)
    model = GPTModel({**GPT_CONFIG_124M, "context_length": 1024}).eval()
    ids = generate_text_simple(model, torch.tensor([[15496, 11, 314, 716]]), 10, 1024)[0, 4:]
    expected = [27018, 24086, 47843, 30961, 42348, 7267, 49706, 43231, 47062, 34657]
    assert ids.tolist() == expected


def loaders(text, batch_size, context, module=train_gpt):
    cut = int(0.9 * len(text))
    for part, trains in ((text[:cut], True), (text[cut:], False)):
        yield module.create_dataloader_v1(part, batch_size, context, context, trains, trains)


@needs_mkl
def test_published_run_begins_with_the_published_losses():
    use_all_cores()
    path = SCRIPT.with_name("the-verdict.txt")
    if not path.exists():
        pytest.skip(f"needs {path}: online, `python train_gpt.py` there gets it")
    parts = [*loaders(path.read_text(encoding="utf-8"), 2, 256)]
    torch.manual_seed(123)
    model, state = GPTModel(GPT_CONFIG_124M), torch.get_rng_state()
    losses = evaluate_model(model, *parts, "cpu", eval_iter=None)
    torch.set_rng_state(state)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0004, weight_decay=0.1)
    next(train(model, parts[0], [optimizer], "cpu", 10))
    losses += evaluate_model(model, *parts, "cpu", eval_iter=5)
    assert losses == pytest.approx((10.987583, 10.981106, 9.781002, 9.932810), abs=5e-4)


# ----------------------------------------------------------------- the chapter and its generator
def test_command_trains_exactly_as_the_file_cut_off_at_its_ruler_does(monkeypatch, capsys):
    write("chapter.py", re.split(r"(?m)^# -* messages", SCRIPT.read_text(encoding="utf-8"))[0])
    monkeypatch.syspath_prepend(".")
    chapter = importlib.import_module("chapter")
    run = "--data text.txt --batch-size 4 --epochs 2 --eval-freq 3 --eval-iter 4"
    losses, printed = command(run, "--checkpoint-every 9"), capsys.readouterr().out
    parts = loaders(TEXT, 4, 8, chapter)
    torch.manual_seed(123)
    model = chapter.GPTModel(torch.load("out/model.pt", weights_only=True)["config"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=0.1, fused=True)
    book = model, *parts, optimizer, "cpu", 2, 3, 4, "Every effort moves you", TOKENIZER
    expected = chapter.train_model_simple(*book)
    assert expected == tuple(losses[n] for n in ("train_losses", "val_losses", "tokens_seen"))
    assert_close(weights("out/model.pt"), dict(model.state_dict()), atol=0)
    assert 100 < len(book := capsys.readouterr().out) and book in printed


def trained(batches, epochs=1, **options):
    model = tiny_model(drop_rate=0.0)
    sgd = torch.optim.SGD(model.parameters(), 0.5)
    losses = list(train(model, batches, [sgd], "cpu", epochs, **options))
    return parameters_to_vector(model.parameters()), losses


def batches_of(count, rows=2):
    ids = made_up_ids(count * rows * 8 + 1) % 97
    return [*zip(ids[:-1].view(count, rows, 8), ids[1:].clone().view(count, rows, 8))]


def test_rest_of_an_epoch_is_trained_and_an_empty_loader_is_refused():
    batches, model, progress = batches_of(9), tiny_model(drop_rate=0.0), Progress()
    sgd = [torch.optim.SGD(model.parameters(), 0.5)]
    first = [*itertools.islice(train(model, batches, sgd, "cpu", 1, progress=progress), 5)]
    assert progress.epoch == 0 and progress.batch == 5 and progress.tokens_seen == 5 * 16
    progress = Progress(batch=5, step=4)
    rest = [*itertools.islice(train(model, batches[5:], sgd, "cpu", 1, progress=progress), 9)]
    assert len(rest) == 4 and (progress.epoch, progress.batch, progress.step) == (1, 0, 8)
    whole, losses = trained(batches)
    assert first + rest == losses and torch.equal(parameters_to_vector(model.parameters()), whole)
    with pytest.raises(ValueError, match="empty"):
        next(train(model, [], sgd, "cpu", 1))


def test_accumulated_batches_are_one_larger_batch_and_clipping_shortens_its_gradient():
    parts, whole, progress = batches_of(3), batches_of(1, rows=6), Progress()
    (ours, losses), (theirs, expected) = trained(parts, grad_accum_steps=4), trained(whole)
    assert torch.allclose(ours, theirs, atol=1e-6) and len(losses) == 1
    assert losses == pytest.approx(expected, abs=1e-6)
    before = parameters_to_vector(tiny_model().parameters())
    clipped, _ = trained(whole, grad_clip=0.01, progress=progress)
    assert progress.grad_norm == pytest.approx(2 * (theirs - before).norm().item(), rel=1e-4)
    assert 2 * (clipped - before).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_targets_of_minus_100_count_nowhere():
    ((inputs, targets),) = batches_of(1, rows=4)
    targets[0, 5:] = targets[2, :7] = targets[3] = -100  # 5, 8, 1 and 0 tokens are left
    model, counted = tiny_model(drop_rate=0.0), targets != -100
    expected = F.cross_entropy(model(inputs)[counted], targets[counted]).item()
    assert calc_loss_batch(inputs, targets, model, "cpu").item() == pytest.approx(expected)
    rows = list(zip(inputs.split(1), targets.split(1)))
    assert calc_loss_loader(rows, model, "cpu") == pytest.approx(expected, abs=1e-6)
    assert math.isnan(calc_loss_loader(rows[3:], model, "cpu"))


@pytest.mark.parametrize("reduced", [False, True])
def test_loss_is_captured_as_one_graph(reduced):
    ((inputs, targets),), results = batches_of(1, rows=4), []
    captured = torch.compile(calc_loss_batch, fullgraph=True, backend="aot_eager")
    for loss_of in (calc_loss_batch, captured):
        model = tiny_model(drop_rate=0.0)
        with torch.autocast("cpu", torch.bfloat16, enabled=reduced):
            loss = loss_of(inputs, targets, model, "cpu")
        loss.backward()
        results.append({"loss": loss} | {name: p.grad for name, p in model.named_parameters()})
    assert_close(*results, atol=1e-3 if reduced else 1e-6)


# ----------------------------------------------------------------------------------------- sampling
def test_cached_sampling_equals_recomputing():
    model, plain, seen, cache = tiny_model().eval(), tiny_model(drop_rate=0.0), [], KVCache(16)
    model.tok_emb.register_forward_hook(lambda module, inputs, _: seen.append(inputs[0].shape[1]))
    for rows, context, length in itertools.product((1, 3), (16, 9), (1, 5, 15, 16, 20)):
        ids = made_up_ids(rows * length).view(rows, length) % 97
        expected = ids
        for _ in range(24):
            expected = torch.cat([expected, plain(expected[:, -context:])[:, -1:].argmax(-1)], 1)
        assert torch.equal(generate(plain, ids, 24, context), expected)  # being trained, uncached
        seen.clear()
        assert torch.equal(generate_text_simple(model, ids, 24, context), expected)
        assert seen.count(1) == max(0, context - length) + (length == 1)  # by the cache
        assert torch.equal(generate(model, ids, 24, context, temperature=1.5, top_k=1), expected)
    model(ids[:, :6], cache)
    for tokens, message in ((2, "one by one"), (17, "tokens, but the context")):
        with pytest.raises(ValueError, match=message):
            model(ids[:, :tokens], cache if tokens == 2 else None)


# ----------------------------------------------------------------------------------- texts, tokens
def token_ids(*data):
    Path("ids.bin").unlink(missing_ok=True)
    succeed("tokenize ids.bin --data", *data)
    return array("H", Path("ids.bin").read_bytes()).tolist()


PARTS = [
    "word", "Word", "a", "é", "e\u0301", "文字", "ß", "0", "123", "²", "٣", "🙂", " ", "   ", " \n",
    "\n", "\n\n\n", "\r\n", "\r", "\t", "\xa0", "\u2028", "\u3000", "\x85", "...", ",", ")(", "。",
    "'", "'s", "’re", "1,000.50", "\u200b", "don't", "<|endoftext|>", "<|endof", "text|>", "\x1c",
]  # fmt: skip


def test_tokens_in_pieces_are_those_of_the_whole_text(monkeypatch):
    draw, pattern = random.Random(0), train_gpt.PIECE.pattern
    names = [f"{n}.txt" for n in range(15)]
    for size in range(1, 21):
        monkeypatch.setattr(train_gpt, "PIECE", re.compile(pattern.replace("262144", str(size))))
        texts = ["".join(draw.choices(PARTS, k=draw.randint(1, 40))) for _ in names]
        [write(name, text) for name, text in zip(names, texts)]
        whole = END.join(texts).replace("\r\n", "\n").replace("\r", "\n")
        assert token_ids(*names) == TOKENIZER.encode(whole, allowed_special="all"), texts


def test_folders_token_files_pipes_and_byte_order_marks(capsys):
    write("mark.txt", b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode())
    assert token_ids("mark.txt") == IDS
    texts = {"books/1.txt": TEXT, "books/deep/3.txt": "Third: " + TEXT}
    others = dict.fromkeys(["books/notes.md", "books/.hidden.txt", "books/deep/.git/x.txt"], "No")
    [write(*file) for file in (texts | others).items()]
    assert token_ids("books") == TOKENIZER.encode(END.join(texts.values()), allowed_special="all")
    runs = [command("--max-steps 3 --data", n, out=f"of-{n}") for n in ("books", "ids.bin")]
    assert all(runs[0][name] == runs[1][name] for name in ("initial", "val_losses", "final"))
    process = start(TYPED, "tokenize piped.bin --data -", stdin=subprocess.PIPE)
    process.stdin.write(TEXT)
    assert finish(process)[::2] == (0, "")
    assert array("H", Path("piped.bin").read_bytes()).tolist() == IDS
    [write(f"{k}.bin", array("H", v)) for k, v in {"letters": range(256), "short": IDS[:6]}.items()]
    command("--data letters.bin short.bin --max-steps 2")
    err = capsys.readouterr().err
    assert re.search("short.bin.* too short", err) and re.search("letters.bin .*255", err), err


def test_short_texts_are_joined_and_none_is_lost():
    poems = {f"{n}.txt": f"Poem {n} is {n * n} words" for n in range(30)}
    names, texts = [*poems], [*poems.values()]
    [write(*file) for file in poems.items()]
    corpus = train_gpt.load_corpus(["text.txt"], names, 0.9)
    expected = [TOKENIZER.encode(t, allowed_special="all") for t in (TEXT, END.join(texts))]
    assert [ids.tolist() for (ids,) in corpus.parts] == expected
    command("--epochs 1 --batch-size 4 --context-length 32 --data text.txt", *names)
    found = sum(map(len, train_gpt.load_corpus(["text.txt", *names], [], 0.9).parts[0]))
    assert found - steps_of("out")[-1]["tokens"] <= 4 * 32


def test_order_of_the_data_hardly_moves_the_losses():
    spread = train_gpt.spread_batches([(torch.tensor([n]),) * 2 for n in range(100)], 2, 5)
    assert [ids.flatten().tolist() for ids, _ in spread] == [[n, n + 10] for n in range(5, 100, 20)]
    write("code.txt", "".join(f"x{n} = {n * n}; " for n in range(500)))
    command("--data text.txt --max-steps 50 --eval-freq 50 --lr 0.01 --context-length 64", out="a")
    model, finals = train_gpt.load_model("a/model.pt")[1], []
    prose, code = (mean_loss(model, Path(f"{n}.txt").read_text(), 64) for n in ("text", "code"))
    for data in ("text.txt code.txt", "code.txt text.txt"):
        run = f"--data {data} --lr 1e-30 --max-steps 1 --init-from a/model.pt --overwrite"
        succeed(run, "--device cpu")
        finals.append(read_losses("out")["final"])
    assert code > prose + 1 and finals[0] == pytest.approx(finals[1], abs=(code - prose) / 10)


def test_evaluate_counts_each_target_once_whatever_the_batch_size(capsys):
    write("own.txt", TEXT[:1500])
    losses = command("--data own.txt --train-ratio 0.7 --max-steps 5 --batch-size 1 --lr 1e-30")
    assert losses["initial"] == pytest.approx(losses["final"], abs=1e-6)  # 50 of 58 windows
    write("few.txt", "Every effort moves")  # shorter than a window
    model, parts = train_gpt.load_model("out/model.pt")[1], (TEXT[:1050], TEXT[1050:1500])
    for name, size in itertools.product(("text.txt", "few.txt"), ("", "--batch-size 1")):
        expected = mean_loss(model, Path(name).read_text())
        assert loss_printed(capsys, "--data", name, size) == pytest.approx(expected, abs=1e-6)
    for name, part in zip(("Training loss", "Validation loss"), parts):
        assert loss_printed(capsys, name=name) == pytest.approx(mean_loss(model, part), abs=1e-6)


def test_signal_while_encoding_ends_at_once_and_leaves_no_file():
    write("huge.txt", TEXT * 9000)
    process, before = start(TYPED, "tokenize ids.bin --data huge.txt"), contents().keys()
    while process.poll() is None and not Path(".tmp-ids.bin").exists():
        time.sleep(0.01)
    process.terminate()
    assert process.wait(timeout=10) == 143 and contents().keys() == before


# ----------------------------------------------------------------------------------------- mistakes
BAD_FILES = {
    "empty.txt": "", "latin.txt": "naïve ".encode("latin-1") * 99, "nul.txt": TEXT + "\0",
    "uint32.bin": array("I", IDS), "odd.bin": bytes(3), "beyond.bin": b"\xff\xff" * 999,
    "junk.pt": "junk" * 99, "hollow/README": "no text", "held/best.pt": "of an earlier run",
}  # fmt: skip
MISTAKES = [  # arguments, what the message must say
    ("--epochs 0", "--epochs"), ("--lr nan", "--lr"), ("--batch-size 1.5", "invalid"),
    ("--model gpt3", "gpt2-small"), ("sample", "TEXT"), ("sample Hi --top-k 3", "--temperature"),
    ("evaluate --checkpoint junk.pt", "junk.pt"), ("tokenize text.txt --data text.txt", "exists"),
    ("--resume --overwrite", "not both"), ("--min-lr 1", "--lr"), ("--fsdp", "torchrun"),
    ("--warmup-steps 9", "--warmup-steps"), ("--device tpu", "--device"), ("--n-heads 3", "--n-h"),
    ("--batch-size 9999", "too little text"), ("--data hollow", "hollow"), ("--epoch 3", "--epoch"),
    ("--data empty.txt", "empty"), ("--data latin.txt", "UTF-8"), ("--data nul.txt", "NUL"),
    ("--data odd.bin", "3 bytes"), ("--data uint32.bin", "uint16"), ("--data beyond.bin", "50256"),
    ("--val-data ./text.txt", "twice"), ("--out-dir held", "--overwrite"),
]  # fmt: skip


def test_mistakes_end_in_one_line_and_nothing_is_written(capsys):
    [write(*file) for file in BAD_FILES.items()]
    for arguments, word in MISTAKES:
        trains, before = arguments.split()[0] not in train_gpt.COMMANDS, contents()
        line = refused(capsys, f"{SIZES} --data text.txt --max-steps 9" * trains, arguments)
        assert word in line and contents() == before, (arguments, line)


# --------------------------------------------------------------------- folders, interrupted runs
@pytest.fixture
def whole(workplace, tmp_path_factory):
    once = tmp_path_factory.getbasetemp() / "long"
    if not once.exists():
        command(LONG, out=str(once / "whole"))
        run = SIZES, LONG, f"--out-dir {once / 'half'}"
        assert stopped_at("update_weights", 6, signal.SIGTERM, *run) == 143
    shutil.copytree(once / "half", "half")
    return once / "whole"


def test_overwriting_replaces_the_runs_files_alone(whole):
    write("half/notes.md", "mine")
    run = "--data text.txt --max-steps 2 --train-ratio 1"  # so there is no best.pt
    assert {*command(run, "--overwrite", out="half")["val_losses"]} == {None}  # JSON has no nan
    command(run, out="new")
    assert_same_run("half", "new")
    assert not Path("half/best.pt").exists() and Path("half/notes.md").read_text() == "mine"


def test_resuming_takes_the_text_from_elsewhere_but_nothing_other_and_no_code(whole, capsys):
    write("other.txt", TEXT.replace("cat", "cow"))
    before, path = contents("half"), Path("half/checkpoint.pt")
    for typed, word in (("--lr 0.01", "--init-from"), ("--data other.txt", "other data")):
        line = refused(capsys, "--resume --out-dir half", typed)
        assert word in line and contents("half") == before, line
    good, content = path.read_bytes(), torch.load(path, weights_only=True)
    alone = {name: content[name] for name in ("config", "model")}
    for bad in (good[:999999], pickle.dumps(Code()), content | {"more": Code()}, alone):
        path.write_bytes(bad) if isinstance(bad, bytes) else torch.save(bad, path)
        assert "checkpoint.pt" in refused(capsys, "--resume --out-dir half")
        assert contents("half").keys() == before.keys() and not Path("ran").exists()
    path.write_bytes(good)
    Path("text.txt").rename("elsewhere.txt")
    succeed("--resume --data elsewhere.txt --out-dir half --dtype auto")
    assert_same_run("half", whole)


def test_full_disk_warns_while_training_and_ends_it_at_last(whole, capsys):
    before, limits = contents("half"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9 << 20, limits[1]))  # for weights alone
    try:
        assert "make room" in refused(capsys, "--resume --out-dir half")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    path, after = Path("half/checkpoint.pt"), contents("half")
    assert after.keys() == before.keys() and after[path] == before[path]
    succeed("--resume --out-dir half")
    assert_same_run("half", whole)


def test_kill_9_loses_nothing_and_the_folder_of_a_live_run_is_refused(whole, capsys):
    moments, killed = random.Random(1), 0
    write("out/.lock", "")  # a stale one
    for number in range(KILLS):
        process = start(TYPED, SIZES, LONG, "--resume")
        assert any(re.match("Resuming|Ep 1", line) for line in process.stdout)
        if number == 0:
            assert "another run" in refused(capsys, SIZES, LONG, "--resume")
        time.sleep(moments.uniform(0, 0.3))
        process.kill()
        killed += finish(process)[0] == -signal.SIGKILL
    assert killed >= min(2, KILLS)  # a very fast machine is done before
    command(LONG, "--resume")
    assert_same_run("out", whole)


@pytest.mark.parametrize("case", f"{MOMENTS}, update_weights TERM 1".split(", "))
def test_run_stopped_at_any_step_prints_what_goes_on_with_the_same_run(case, whole, capsys):
    moment, name, call = case.split()
    number, run = getattr(signal, "SIG" + name), f"{SIZES} {LONG} --out-dir 'a b'"
    for stops in range(1, 7 if moment == "update_weights" else 2):  # or after each step in turn
        assert stopped_at(moment, int(call), number, run) == 128 + number
        assert moment != "update_weights" or len(steps_of("a b")) == stops
        assert len(steps_of("a b")) < len(steps_of(whole)) and weights("a b/model.pt")
        run = re.search(r"To go on: python \S+(.*)", capsys.readouterr().out)[1]
    succeed(run)
    assert_same_run("a b", whole)


def test_first_run_needs_no_network_and_no_reader_of_its_lines():
    process = start(TYPED, SIZES, "--batch-size 4 --max-steps 31 --eval-freq 20 --lr 0.01")
    assert any("Batches of" in line for line in process.stdout)
    process.stdout.close()  # as under `| head`
    process.stdout = None
    status, _, err = finish(process)
    assert status == 0 and len(err.splitlines()) == 1 and "the-verdict.txt" in err
    assert [row["tokens"] for row in steps_of("out")] == [32 * n + 32 for n in range(31)]


# -------------------------------------------------------------------------------------- the picture
def test_picture_has_both_curves_units_and_the_lowest_loss(monkeypatch):
    figure, pictures = importlib.import_module("matplotlib.figure").Figure, []
    monkeypatch.setattr(figure, "savefig", lambda picture, *_, **__: pictures.append(picture))
    losses = command("--data text.txt --batch-size 8 --lr 0.01 --epochs 2")
    axes, tokens_axes = pictures[0].axes
    lines = {line.get_label(): [*line.get_ydata()] for line in axes.lines}
    assert [*axes.lines[0].get_xdata()] == pytest.approx([0, *losses["epochs"], 2])
    assert [*tokens_axes.lines[0].get_xdata()[1:-1]] == losses["tokens_seen"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("Epochs", "Loss (nats per token)")
    assert tokens_axes.get_xlabel() == "Tokens seen" and "text.txt" in axes.get_title()
    for part, name in enumerate(("train", "val")):
        curve = [losses["initial"][part], *losses[f"{name}_losses"], losses["final"][part]]
        assert lines[("Training loss", "Validation loss")[part]] == curve
    assert lines[f"Lowest validation: {min(curve):.3f}"] == [min(curve)]
    best = losses["steps"].index(torch.load("out/best.pt", weights_only=True)["step"])
    assert losses["val_losses"][best] == min(losses["val_losses"])


# ---------------------------------------------------------------------- weights in and out, learning
def gpt2(variant="saved"):
    transformers = pytest.importorskip("transformers", reason="transformers isn't installed")
    config = {"n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    config |= dict.fromkeys(train_gpt.HF_DROPS, 0) | {"tie_word_embeddings": variant == "tied"}
    torch.manual_seed(5)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config)).eval()
    for weight in model.parameters():
        weight.data += 0.3 * torch.randn_like(weight)
    model.to(torch.float16 if variant == "float16" else torch.float32)
    model.save_pretrained("theirs", max_shard_size="2MB" if variant == "shards" else "50GB")
    return model.float()


def test_exported_model_is_the_same_in_transformers():
    transformers, sizes = importlib.import_module("transformers"), TINY | {"vocab_size": 50257}
    model, ids = tiny_model(vocab_size=50257).eval(), torch.tensor(IDS[:64]).view(4, 16)
    torch.save({"config": GPT_CONFIG_124M | sizes, "model": model.state_dict()}, "ours.pt")
    succeed("export exported --checkpoint ours.pt")
    theirs = transformers.AutoModelForCausalLM.from_pretrained("exported")
    assert_close(theirs(ids).logits, model(ids), atol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained("exported")
    ids = TOKENIZER.encode(text := f"{TEXT}{END} 12,5\n\n\n x", allowed_special={END})
    assert tokenizer(text)["input_ids"] == ids and tokenizer.decode(ids) == text


@pytest.mark.parametrize("variant", ["saved", "tied", "float16", "bin", "shards"])
def test_gpt2_folder_has_the_loss_that_transformers_gives(variant, capsys):
    model, path = gpt2(variant), Path("theirs/model.safetensors")
    if variant == "bin":
        state = {k.removeprefix("transformer."): weight for k, weight in load_file(path).items()}
        torch.save(state, "theirs/pytorch_model.bin")
        path.unlink()
    with torch.no_grad():
        expected = mean_loss(lambda ids: model(ids).logits, TEXT, 16)
    loss = loss_printed(capsys, "--data text.txt --checkpoint theirs")
    assert loss == pytest.approx(expected, abs=2e-5)


def test_what_the_model_cannot_compute_or_read_is_refused_by_name(capsys):
    gpt2()
    config, path = Path("theirs/config.json"), Path("theirs/model.safetensors")
    plain, state = json.loads(config.read_text()), load_file(path)
    fields = {"activation_function": "relu", "n_inner": 32, "vocab_size": 1000}
    missing, misfit = "transformer.h.1.ln_2.bias", "transformer.h.0.attn.c_attn.weight"
    cases = [(name, plain | {name: value}, state) for name, value in fields.items()]
    cases += [(missing, plain, {k: v for k, v in state.items() if k != missing})]
    cases += [(misfit, plain, state | {misfit: torch.ones(48, 16)})]
    for name, own_config, own_state in cases:
        config.write_text(json.dumps(own_config))
        save_file(own_state, path)
        line = refused(capsys, "--device cpu --data text.txt --init-from theirs")
        assert name in line and not Path("out").exists(), line


def test_gradients_of_a_step_are_those_of_transformers():
    theirs, ids = gpt2(), torch.tensor(IDS[:65])
    succeed("--init-from theirs --data text.txt --device cpu --max-steps 1 --lr 1e-30")
    (content, model), batch = train_gpt.load_model("out/model.pt"), ids[:-1].view(4, 16)
    batch = batch, ids[1:].view(4, 16)
    list(train(model, [batch], [torch.optim.SGD(model.parameters(), lr=1)], "cpu", 1))
    torch.save(content | {"model": model.state_dict()}, "after.pt")
    succeed("export after --checkpoint after.pt")
    after = load_file("after/model.safetensors")
    F.cross_entropy(theirs(batch[0]).logits.flatten(0, 1), batch[1].flatten()).backward()
    ours = {name: p.detach() - after[name] for name, p in theirs.named_parameters()}
    assert max(gradient.abs().max() for gradient in ours.values()) > 0.1
    assert_close(ours, {name: p.grad for name, p in theirs.named_parameters()}, atol=1e-6)


def test_rates_muon_for_the_matrices_of_the_blocks_and_bfloat16():
    run = "--data text.txt --batch-size 4 --optimizer muon --max-steps 12"
    losses = command(run, "--lr 1e-2 --warmup-steps 4 --min-lr 1e-3")
    assert losses["final"][0] < losses["initial"][0] - 0.5
    states = torch.load("out/checkpoint.pt", weights_only=True)["optimizer"]["state"]
    by_muon = {name for name, state in states.items() if "momentum_buffer" in state}
    trained = weights("out/model.pt").items()
    assert by_muon == {name for name, w in trained if "blocks" in name and w.dim() > 1}
    succeed("--resume --max-steps 16")
    cosine = [1e-3 + 4.5e-3 * (1 + math.cos(math.pi * n / 7)) for n in range(8)]
    expected = [2.5e-3, 5e-3, 7.5e-3, 1e-2, *cosine, *[1e-3] * 4]
    assert [row["learning_rate"] for row in steps_of("out")] == pytest.approx(expected)
    losses = []
    for name in ("float32", "bfloat16"):
        command("--data text.txt --max-steps 6 --drop-rate 0 --lr 0.02 --dtype", name, out=name)
        losses.append([row["loss"] for row in steps_of(name)])
    assert losses[0] == pytest.approx(losses[1], abs=0.05) and losses[0] != losses[1]


# -------------------------------------------------------------------------------------------- ranks
EACH = f"""
import os, pathlib, sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import torch.distributed as dist, train_gpt
pathlib.Path("pid-" + os.environ["RANK"]).write_text(str(os.getpid()))
dist.init_process_group("gloo")
status = max(train_gpt.main(line.split()) for line in sys.argv[1:])
sys.exit(status)
"""
RANKED = f"{SIZES} --data train.bin --val-data val.bin --eval-iter 99 --eval-freq 5 --epochs 3"
CLIPPED = "--lr 3e-3 --warmup-steps 5 --min-lr 1e-4 --grad-clip 0.5 --grad-accum-steps 2"
EXACT, MUON = f"{RANKED} {CLIPPED} --drop-rate 0", "--optimizer muon --max-steps 9"
DROPS = f"{RANKED} {CLIPPED} --batch-size 2 --fsdp --checkpoint-every 3"


def start_ranks(*lines):
    write("each.py", EACH)
    for name, windows in (("train", 44), ("val", 9)):
        write(f"{name}.bin", array("H", (made_up_ids(8 * windows + 4) % 1000).tolist()))
    launch = "-m torch.distributed.run --standalone --nproc-per-node 2 each.py"
    return start(launch, *map(shlex.quote, lines))


@pytest.fixture(scope="module")
def ranked(tmp_path_factory):
    """Return the folder in which one of two ranks was killed, then all runs made, and the end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("ranks"))
        process, path = start_ranks(f"{DROPS} --out-dir out"), Path("out/steps.csv")
        while process.poll() is None and not (path.exists() and path.read_text().count("\n") > 4):
            time.sleep(0.01)
        os.kill(int(Path("pid-1").read_text()), signal.SIGKILL)
        assert finish(process)[0] != 0 and not Path("out/model.pt").exists()  # all have ended
        process = start_ranks(
            "--resume",
            f"{DROPS} --out-dir whole",
            f"{EXACT} --batch-size 2 --out-dir two",
            f"{EXACT} --batch-size 2 --out-dir sharded --fsdp",
            f"{EXACT} --batch-size 2 --out-dir muon-sharded --fsdp {MUON}",
            "evaluate --device cpu --data val.bin --out-dir two",
            f"{RANKED} --batch-size 2 --lr 1e24 --checkpoint-every 1 --out-dir broken",
        )
        succeed(EXACT, "--batch-size 4 --out-dir one")
        succeed(EXACT, "--batch-size 4 --out-dir muon-one", MUON)
        return Path.cwd(), *finish(process)


def test_one_process_and_two_follow_one_curve_and_say_each_thing_once(ranked, monkeypatch, capsys):
    folder, status, out, err = ranked
    monkeypatch.chdir(folder)
    assert status != 0 and err.count("train_gpt:") == err.count("the loss at step 1") == 1, err
    assert out.count("Ep 1 (Step 000000)") == 5 and not Path("broken/model.pt").exists()
    assert all(w.isfinite().all() for w in weights("broken/checkpoint.pt").values())
    one = read_losses("one")
    for name in ("two", "sharded"):
        for part in ("tokens_seen", "train_losses", "val_losses", "final"):
            assert read_losses(name)[part] == pytest.approx(one[part], abs=1e-5), part
        assert_close(weights(f"{name}/model.pt"), weights("one/model.pt"), atol=1e-5)
        for row, expected in zip(steps_of(name), steps_of("one"), strict=True):
            assert row == pytest.approx(expected, abs=1e-5, rel=1e-4)  # sums of 10^6 squares
    assert len(steps_of("one")) == 18 and one["final"][0] < one["initial"][0] - 0.3
    ours, theirs = (read_losses(f"muon-{name}")["final"] for name in ("sharded", "one"))
    assert ours == pytest.approx(theirs, abs=1e-3) and ours[0] < one["initial"][0] - 0.1
    loss = float(re.search(r"(?m)^Loss: ([\d.]+)", out)[1])
    assert loss == pytest.approx(loss_printed(capsys, "--data val.bin --out-dir two"), abs=1.1e-6)


def test_run_of_which_one_rank_was_killed_goes_on_bit_for_bit(ranked, monkeypatch, capsys):
    monkeypatch.chdir(ranked[0])
    assert "2 processes" in refused(capsys, "--resume --no-fsdp --device cpu")
    assert "Resuming at step" in ranked[2]
    states = torch.load("out/checkpoint.pt", weights_only=True)["random"]
    assert not torch.equal(states[0]["cpu"], states[1]["cpu"])  # each draws masks of its own
    assert_same_run("out", "whole")


# ------------------------------------------------------------------------------------------- README
def test_commands_of_the_readme_are_accepted():
    text = SCRIPT.with_name("README.md").read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"(?ms)^```bash\n(.*?)^```", text)).replace("\\\n", " ")
    lines = re.findall(r"(?m)(?:python|^torchrun .*) train_gpt\.py(.*?)(?:[|&>].*)?$", blocks)
    for typed in (shlex.split(line, comments=True) for line in lines):
        name = typed.pop(0) if typed and typed[0] in train_gpt.COMMANDS else "train"
        train_gpt.parse(name, typed)
    assert len(lines) > 5
