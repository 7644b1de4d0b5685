# ruff: noqa: F403, F405
"""Tests of train_gpt.py: `pytest -q`, in about two minutes on two cores, without a network."""

import csv
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
import threading
import time
from array import array
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiktoken
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import train_gpt
from train_gpt import *

resource = pytest.importorskip("resource", reason="no POSIX signals, pipes and limits here")
train_gpt.vocabulary()
SCRIPT = Path(train_gpt.__file__).resolve()
TOKENIZER, END = tiktoken.get_encoding("gpt2"), "<|endoftext|>"
SENTENCES = ["The cat sat,\n", "on the mat. ", "Every effort moves you! ", "don't\n\n", "Naïve 文"]
TEXT = "".join(random.Random(0).choices(SENTENCES, k=240))
IDS = TOKENIZER.encode(TEXT)
SIZES = "--emb-dim 16 --n-layers 2 --n-heads 2 --context-length 8 --device cpu"
TINY = {"vocab_size": 97, "context_length": 16, "emb_dim": 32, "n_heads": 4, "n_layers": 2}
KILLS = int(os.environ.get("KILLS", "3"))
# With dropout, groups of batches that don't come out even, and another rate at each step.
LONG = (
    f"--data text.txt --epochs {max(2, KILLS // 2)} --batch-size 4 --grad-accum-steps 4 "
    "--eval-freq 4 --warmup-steps 3 --min-lr 1e-5 --grad-clip 1 --checkpoint-every 3"
)
os.environ |= dict.fromkeys(["HTTPS_PROXY", "HTTP_PROXY"], "http://127.0.0.1:9")  # a closed port
os.environ |= {"NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
needs_mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="seen only with MKL")


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """Each test runs in a folder of its own, offline, with text.txt there."""
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)  # as in the processes that tests start; faster, too, for tiny models
    write("text.txt", TEXT)


def write(name, content):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(content.encode() if isinstance(content, str) else bytes(content))


def words(*arguments):
    """The words of a command line: strings are split, paths are not."""
    return [w for a in arguments for w in ([str(a)] if isinstance(a, Path) else shlex.split(a))]


def succeed(*arguments):
    assert train_gpt.main(words(*arguments)) == 0


def command(*arguments, out="out"):
    """Train a tiny model, which must succeed; return the content of losses.json."""
    succeed(SIZES, *arguments, "--out-dir", out)
    return read_losses(out)


def refused(capsys, *arguments):
    """Run the command in this process, which must end in one line, status 2; return that line."""
    capsys.readouterr()
    try:
        status = train_gpt.main(words(*arguments))
    except SystemExit as exit:  # argparse's
        status = exit.code
    *notes, line = capsys.readouterr().err.splitlines() or [""]
    assert status == 2 and line.startswith("train_gpt: ") and len(line) <= 200, (status, line)
    assert all("train_gpt: warning: " in note for note in notes), notes
    return line


def start(*arguments, **options):
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    return subprocess.Popen([sys.executable, *words(*arguments)], **options)


def finish(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def wait_for(pattern, process):
    assert any(re.match(pattern, line) for line in process.stdout), process.stderr.read()


def loss_printed(capsys, *arguments, name="Loss"):
    """The figure that `evaluate` prints."""
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
    """The rows of steps.csv without the seconds."""
    rows = csv.DictReader(Path(folder, "steps.csv").read_text().splitlines())
    return [{k: float(v) for k, v in row.items() if k != "seconds"} for row in rows]


def assert_close(ours, theirs, within):
    assert ours.keys() == theirs.keys()
    furthest = max((ours[name] - theirs[name]).abs().max().item() for name in ours)
    assert furthest <= within, furthest


def assert_same_run(folder, other):
    """Weights bit for bit, losses, steps."""
    for path in Path(other).glob("[mb]*.pt"):  # model, best
        assert_close(weights(Path(folder, path.name)), weights(path), 0)
    ours, theirs = (read_losses(name) | {"settings": None} for name in (folder, other))
    assert ours == theirs and steps_of(folder) == steps_of(other)


def contents(folder="."):
    """All files and what they hold, but .lock."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file() and path.name != ".lock"]
    return {path: path.read_bytes() for path in paths}


def act_at(moment, call, action, patch):
    """Have the call'th call of a function of train_gpt begin with an action."""
    plain, calls = getattr(train_gpt, moment), itertools.count(1)

    def act_and_call(*arguments, **options):
        if next(calls) == call:
            action()
        return plain(*arguments, **options)

    patch.setattr(train_gpt, moment, act_and_call)


def stopped_at(moment, call, number, *arguments):
    """The status of a command that gets a signal at a moment."""
    with pytest.MonkeyPatch.context() as patch:
        act_at(moment, call, lambda: os.kill(os.getpid(), number), patch)
        return train_gpt.main(words(*arguments))


class Code:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def tiny_model(seed=123, **changes):
    torch.manual_seed(seed)
    return GPTModel({**GPT_CONFIG_124M, **TINY, **changes})


def made_up_ids(count):
    i = torch.arange(count)
    return (7919 * i * i + 104729 * i) % 50257


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
    train_gpt.choose_device(SimpleNamespace(device="cpu", dtype="float32"))


def test_loss_and_greedy_sample_of_the_untrained_124m_model_are_the_published_ones():
    use_all_cores()
    ids = made_up_ids(513)
    torch.manual_seed(123)
    model = GPTModel(GPT_CONFIG_124M).eval()
    with torch.no_grad():
        loss = calc_loss_batch(ids[:512].view(2, 256), ids[1:].view(2, 256), model, "cpu").item()
    assert loss == pytest.approx(10.991942405700684, abs=5e-4)
    torch.manual_seed(123)
    model = GPTModel({**GPT_CONFIG_124M, "context_length": 1024}).eval()
    ids = generate_text_simple(model, torch.tensor([[15496, 11, 314, 716]]), 10, 1024)
    expected = 27018, 24086, 47843, 30961, 42348, 7267, 49706, 43231, 47062, 34657
    assert ids[0, 4:].tolist() == [*expected]


@needs_mkl
def test_ten_steps_of_a_tiny_model_have_the_published_losses():
    model, ids = tiny_model(vocab_size=50257), made_up_ids(65)
    batch = ids[:64].view(4, 16), ids[1:].view(4, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    assert list(train(model, [batch], [optimizer], "cpu", 10)) == pytest.approx(
        [11.114697, 11.017437, 10.960505, 10.843269, 10.819546,
         10.748576, 10.702586, 10.629090, 10.599867, 10.503622], abs=5e-4
    )  # fmt: skip


@pytest.fixture(scope="module")
def chapter(tmp_path_factory):
    """The file cut off at the ruler "messages", as a module of its own."""
    folder = tmp_path_factory.mktemp("chapter")
    upper = re.split(r"(?m)^# -* messages", SCRIPT.read_text(encoding="utf-8"))[0]
    (folder / "chapter.py").write_text(upper, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield importlib.import_module("chapter")


def loaders(text, chapter, batch_size, context):
    cut = int(0.9 * len(text))
    for part, trains in ((text[:cut], True), (text[cut:], False)):
        options = {"shuffle": trains, "drop_last": trains}
        yield chapter.create_dataloader_v1(part, batch_size, context, context, **options)


@needs_mkl
def test_published_run_begins_with_the_published_losses(chapter):
    use_all_cores()
    path = SCRIPT.with_name("the-verdict.txt")
    if not path.exists():
        pytest.skip(f"needs {path}: online, `python train_gpt.py` there gets it")
    train_loader, val_loader = loaders(path.read_text(encoding="utf-8"), chapter, 2, 256)
    torch.manual_seed(123)
    model, progress, losses = chapter.GPTModel(chapter.GPT_CONFIG_124M), chapter.Progress(), []
    state = torch.get_rng_state()
    losses += chapter.evaluate_model(model, train_loader, val_loader, "cpu", eval_iter=None)
    torch.set_rng_state(state)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0004, weight_decay=0.1)
    steps = chapter.train(model, train_loader, [optimizer], "cpu", 10, progress=progress)
    for _ in itertools.islice(steps, 6):
        if progress.step % 5 == 0:
            losses += chapter.evaluate_model(model, train_loader, val_loader, "cpu", 5)
    published = 10.987583, 10.981106, 9.781002, 9.932810, 8.110534, 8.338574
    assert losses == pytest.approx([*published], abs=5e-4) and progress.tokens_seen == 3072


# ---------------------------------------------------------------------------- the chapter, cut off
def test_command_trains_exactly_as_the_chapter_alone_does(chapter, capsys):
    run = "--data text.txt --batch-size 4 --epochs 2 --eval-freq 3 --eval-iter 99"
    by_command, printed = command(run, "--checkpoint-every 9"), capsys.readouterr().out
    train_loader, val_loader = loaders(TEXT, chapter, 4, 8)
    torch.manual_seed(123)
    sizes = {"emb_dim": 16, "n_layers": 2, "n_heads": 2, "context_length": 8}
    model = chapter.GPTModel({**chapter.GPT_CONFIG_124M, **sizes})
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=0.1, fused=True)
    book = model, train_loader, val_loader, optimizer, "cpu", 2, 3, 99, "Every effort moves you"
    losses = chapter.train_model_simple(*book, TOKENIZER)
    assert losses == tuple(by_command[n] for n in ("train_losses", "val_losses", "tokens_seen"))
    assert_close(weights("out/model.pt"), model.state_dict(), 0)
    assert 100 < len(book := capsys.readouterr().out) and book in printed


# ------------------------------------------------------------------------------------ the generator
def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def trained(batches, epochs=1, **options):
    """Train a model without dropout; return (its weights, the steps' losses)."""
    model = tiny_model(drop_rate=0.0)
    sgd = torch.optim.SGD(model.parameters(), 0.5)
    losses = list(train(model, batches, [sgd], "cpu", epochs, **options))
    return flat(model), losses


def batches_of(count, rows=2):
    ids = made_up_ids(count * rows * 8 + 1) % 97
    return [*zip(ids[:-1].view(count, rows, 8), ids[1:].clone().view(count, rows, 8))]


def test_run_stopped_after_any_step_and_gone_on_with_is_the_same_run():
    run = f"{SIZES} --data text.txt --epochs 2 --batch-size 8 --grad-accum-steps 6 --eval-freq 2"
    succeed(run)
    for stop in range(1, 6):
        folder = Path(f"stopped-{stop}")
        assert stopped_at("update_weights", stop, signal.SIGTERM, run, "--out-dir", folder) == 143
        assert len(steps_of(folder)) == stop
        succeed("--resume --out-dir", folder)
        assert_same_run(folder, "out")


def test_rest_of_an_epoch_is_trained_and_no_more():
    batches, model, progress = batches_of(9), tiny_model(drop_rate=0.0), Progress()
    sgd = [torch.optim.SGD(model.parameters(), 0.5)]
    first = [*itertools.islice(train(model, batches, sgd, "cpu", 1, progress=progress), 5)]
    assert progress.epoch == 0 and progress.batch == 5 and progress.tokens_seen == 5 * 16
    progress = Progress(batch=5, step=4)
    rest = [*itertools.islice(train(model, batches[5:], sgd, "cpu", 1, progress=progress), 9)]
    assert len(rest) == 4 and (progress.epoch, progress.batch, progress.step) == (1, 0, 8)
    whole, losses = trained(batches)
    assert first + rest == losses and torch.equal(flat(model), whole)


def test_loader_without_a_length_trains_its_epochs():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return zip(*(torch.cat(part) for part in zip(*batches_of(5))))

    _, losses = trained(torch.utils.data.DataLoader(Stream(), batch_size=2), epochs=2)
    assert losses == trained(batches_of(5), epochs=2)[1] and len(losses) == 10


def test_accumulated_batches_are_one_larger_batch_and_clipping_shortens_its_gradient():
    parts, whole, progress = batches_of(3), batches_of(1, rows=6), Progress()
    (ours, losses), (theirs, expected) = trained(parts, grad_accum_steps=4), trained(whole)
    assert torch.allclose(ours, theirs, atol=1e-6) and len(losses) == 1
    assert losses == pytest.approx(expected, abs=1e-6)
    before = flat(tiny_model())
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
    ((inputs, targets),), gradients, losses = batches_of(1, rows=4), [], []
    captured = torch.compile(calc_loss_batch, fullgraph=True, backend="aot_eager")
    for loss_of in (calc_loss_batch, captured):
        model = tiny_model(drop_rate=0.0)
        with torch.autocast("cpu", torch.bfloat16, enabled=reduced):
            loss = loss_of(inputs, targets, model, "cpu")
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert_close(*gradients, 1e-3 if reduced else 1e-6)


# ----------------------------------------------------------------------------------------- sampling
@torch.no_grad()
def greedy(model, ids, new_tokens, context_size):
    for _ in range(new_tokens):
        logits = model(ids[:, -context_size:])[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids


@pytest.mark.parametrize("rows", [1, 3])
def test_cached_sampling_equals_recomputing(rows):
    seen, model = [], tiny_model(seed=rows).eval()
    model.tok_emb.register_forward_hook(lambda module, inputs, _: seen.append(inputs[0].shape[1]))
    for context, length in itertools.product((16, 9), (1, 5, 15, 16, 20)):
        ids = made_up_ids(rows * length).view(rows, length) % 97
        expected = greedy(model, ids, 24, context)
        seen.clear()
        assert torch.equal(generate_text_simple(model, ids, 24, context), expected)
        assert seen.count(1) == max(0, context - length) + (length == 1)  # by the cache
        assert torch.equal(generate(model, ids, 24, context, temperature=1.5, top_k=1), expected)


class Negated(GPTModel):
    def forward(self, in_idx):  # and takes no cache
        return -super().forward(in_idx)


def test_subclasses_are_sampled_without_a_cache_and_a_cache_refuses_several_tokens():
    model, ids, cache = tiny_model().eval(), made_up_ids(17)[None] % 97, KVCache(16)
    model(ids[:, :6], cache)
    with pytest.raises(ValueError, match="one by one"):
        model(ids[:, 6:8], cache)
    with pytest.raises(ValueError, match="17 tokens"):
        model(ids)
    model.__class__, plain = Negated, greedy(model, ids[:, :4], 16, 16)
    expected = greedy(model, ids[:, :4], 16, 16)
    assert torch.equal(generate(model, ids[:, :4], 16, 16), expected)
    assert not torch.equal(expected, plain)


def test_state_dict_of_the_books_model_loads():
    ours, loaded = tiny_model(qkv_bias=True), tiny_model(qkv_bias=True)
    book = {f"trf_blocks.{n}.att.mask": torch.ones(16, 16).triu(1) for n in (0, 1)}
    for name, weight in ours.state_dict().items():
        weight += torch.randn_like(weight)
        name = name.replace("ff.", "ff.layers.")
        if "norm" in name:
            name = name.replace("weight", "scale").replace("bias", "shift")
        parts = zip(("query", "key", "value"), weight.chunk(3)) if "qkv" in name else [("", weight)]
        book |= {name.replace("qkv", f"W_{part}"): own for part, own in parts}
    loaded.load_state_dict(book)
    assert_close(loaded.state_dict(), ours.state_dict(), 0)


# ----------------------------------------------------------------------------------- texts, tokens
def token_ids(*data):
    Path("ids.bin").unlink(missing_ok=True)
    succeed("tokenize ids.bin --data", *data)
    return array("H", Path("ids.bin").read_bytes()).tolist()


PARTS = [
    "word", "Word", "a", "é", "e\u0301", "文字", "かな", "𝒳", "ß", "0", "123", "²", "٣", "🙂",
    " ", "   ", " \n", "\n", "\n\n\n", "\r\n", "\r", "\t", "\xa0", "\u2028", "\u3000", "\x85",
    "...", ",", "!?", ")(", "。", "'", "'s", "'ll", "’re", "1,000.50", "\u200b", "don't", "I'm,",
    "<|endoftext|>", "<|endof", "text|>", "\x1c",
]  # fmt: skip


def test_tokens_in_pieces_are_those_of_the_whole_text(monkeypatch):
    draw, pattern = random.Random(0), train_gpt.PIECE.pattern
    names = [f"{n}.txt" for n in range(15)]
    assert "262144" in pattern
    for size in range(1, 21):
        monkeypatch.setattr(train_gpt, "PIECE", re.compile(pattern.replace("262144", str(size))))
        texts = ["".join(draw.choices(PARTS, k=draw.randint(1, 40))) for _ in names]
        [write(name, text) for name, text in zip(names, texts)]
        whole = END.join(texts).replace("\r\n", "\n").replace("\r", "\n")
        assert token_ids(*names) == TOKENIZER.encode(whole, allowed_special="all"), texts


def test_folders_token_files_pipes_and_byte_order_marks():
    write("mark.txt", b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode())
    assert token_ids("mark.txt") == IDS
    texts = {"books/1.txt": TEXT, "books/deep/3.txt": "Third: " + TEXT}
    others = ["books/notes.md", "books/.hidden.txt", "books/deep/.git/x.txt"]
    [write(name, text) for name, text in {**texts, **dict.fromkeys(others, "Other. ")}.items()]
    assert token_ids("books") == TOKENIZER.encode(END.join(texts.values()), allowed_special="all")
    os.mkfifo("pipe")
    threading.Thread(target=Path("pipe").write_bytes, args=[TEXT.encode()], daemon=True).start()
    data = "books", "ids.bin", "pipe", "text.txt"
    runs = [command(f"--data {name} --max-steps 3", out=f"out-{name}") for name in data]
    for name in ("initial", "train_losses", "val_losses", "final"):
        assert runs[0][name] == runs[1][name] != runs[2][name] == runs[3][name]
    process = start(SCRIPT, "tokenize piped.bin --data -", stdin=subprocess.PIPE)
    process.stdin.write(TEXT)
    assert finish(process)[::2] == (0, "")
    assert array("H", Path("piped.bin").read_bytes()).tolist() == IDS


@pytest.mark.parametrize("separate", [False, True])
def test_short_texts_are_joined_and_none_is_lost(separate, monkeypatch):
    texts = [TEXT, *(f"Poem {n} is {n * n} words short" for n in range(30))]
    [write(f"poem{n:02}.txt", text) for n, text in enumerate(texts)]
    names, plain = [f"poem{n:02}.txt" for n in range(31)], GPTModel.forward
    seen = {True: [], False: []}  # windows trained on, others

    def note_and_compute(model, ids, cache=None):
        seen[model.training].extend(map(tuple, ids.tolist()))
        return plain(model, ids, cache)

    monkeypatch.setattr(GPTModel, "forward", note_and_compute)
    run = "--epochs 1 --batch-size 4 --eval-freq 99 --eval-iter 99 --context-length 32 --data"
    command(run, "text.txt --val-data" if separate else "", *names)
    ends = [int(0.9 * len(text)) for text in texts]
    parts = [text[:end] for text, end in zip(texts, ends)], [t[e:] for t, e in zip(texts, ends)]
    parts = ([TEXT], texts) if separate else parts
    train_ids, val_ids = (TOKENIZER.encode(END.join(part), allowed_special="all") for part in parts)
    windows = {tuple(train_ids[i : i + 32]) for i in range(0, len(train_ids) - 32, 32)}
    assert {*seen[True]} <= windows and len(windows - {*seen[True]}) < 4
    starts = range(0, len(val_ids) - 32, 32)
    assert {tuple(val_ids[i : i + 32]) for i in starts} <= {*seen[False]}
    assert len(train_ids) - steps_of("out")[-1]["tokens"] <= 4 * 32


def test_order_of_the_data_hardly_moves_the_validation_loss():
    write("prose.txt", TEXT * 4)
    write("code.txt", "".join(f"x{n} = {n * n}; " for n in range(500)))
    command("--data prose.txt --max-steps 99 --lr 0.01 --eval-freq 99", out="first")
    texts, finals = [Path(name).read_text() for name in ("prose.txt", "code.txt")], []
    prose, code = (mean_loss(train_gpt.load_model("first/model.pt")[1], text) for text in texts)
    for data in ("prose.txt code.txt", "code.txt prose.txt"):
        run = f"--data {data} --lr 1e-30 --max-steps 1 --init-from first/model.pt --device cpu"
        succeed(run, "--eval-iter 50 --overwrite")
        finals.append(read_losses("out")["final"][1])
    assert code > prose + 1 and finals[0] == pytest.approx(finals[1], abs=(code - prose) / 10)


def test_evaluate_counts_each_target_once_whatever_the_batch_size(capsys):
    write("own.txt", TEXT[:1500])
    losses = command("--data own.txt --train-ratio 0.7 --max-steps 90 --batch-size 1 --lr 1e-30")
    assert losses["initial"] == pytest.approx(losses["final"], abs=1e-6)  # 50 of 58 windows
    write("few.txt", "Every effort moves")  # shorter than a window
    model, sizes = train_gpt.load_model("out/model.pt")[1], ("", "--batch-size 1")
    for name in ("text.txt", "few.txt"):
        found = [loss_printed(capsys, "--data", name, size) for size in sizes]
        assert found == pytest.approx([mean_loss(model, Path(name).read_text())] * 2, abs=2e-6)
    for name, part in (("Training loss", TEXT[:1050]), ("Validation loss", TEXT[1050:1500])):
        assert loss_printed(capsys, name=name) == pytest.approx(mean_loss(model, part), abs=2e-6)
    write("own.txt", "Other. " * 99)
    assert "own.txt" in refused(capsys, "evaluate --device cpu")


def test_token_files_of_characters_and_too_short_ones_are_warned_of(capsys):
    write("letters.bin", array("H", [*range(256)] * 9))
    write("short.bin", array("H", IDS[:6]))
    command("--data letters.bin short.bin --max-steps 2")
    err = capsys.readouterr().err
    assert len(steps_of("out")) == 2 and re.search("warning: short.bin.* too short", err), err
    assert re.search("warning: letters.bin .*255", err), err


def test_signal_while_encoding_ends_at_once_and_leaves_no_file():
    write("huge.txt", TEXT * 9000)
    process, before = start(SCRIPT, "tokenize ids.bin --data huge.txt"), contents().keys()
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
    ("--model gpt3", "gpt2-small"), ("--epoch 3", "--epoch"), ("stray", "stray"),
    ("sample", "TEXT"), ("sample Hi --epochs 3", "--epochs"),
    ("sample Hi --top-k 3", "--temperature"), ("sample Hi --checkpoint absent.pt", "absent.pt"),
    ("evaluate --checkpoint junk.pt", "junk.pt"), ("export hollow", "hollow"),
    ("tokenize text.txt --data text.txt", "exists"), ("--resume --overwrite", "contradicts"),
    ("--min-lr 1", "--lr"), ("--warmup-steps 9", "--warmup-steps"), ("--fsdp", "torchrun"),
    ("--device tpu", "--device"), ("--n-heads 3", "--n-heads"), ("--batch-size 9999", "windows"),
    ("--data absent.txt", "absent.txt"), ("--data hollow", "hollow"), ("--data empty.txt", "empty"),
    ("--data latin.txt", "UTF-8"), ("--data nul.txt", "NUL"), ("--data odd.bin", "3 bytes"),
    ("--data uint32.bin", "uint16"), ("--data beyond.bin", "50256"),
    ("--val-data ./text.txt", "twice"), ("--out-dir junk.pt", "junk.pt"),
    ("--out-dir held", "--overwrite"),
]  # fmt: skip


@pytest.mark.parametrize("arguments, word", MISTAKES)
def test_mistake_ends_in_one_line_and_nothing_is_written(arguments, word, capsys):
    [write(name, content) for name, content in BAD_FILES.items()]
    before, trains = contents(), arguments.split()[0] not in train_gpt.COMMANDS
    run = f"{SIZES} --data text.txt --max-steps 9" if trains else ""
    line = refused(capsys, *([run, arguments] if trains else [arguments]))
    assert word in line and contents() == before, line
    in_flags = "error: " in line or arguments in ("--resume --overwrite", "--min-lr 1", "--fsdp")
    assert not (in_flags and Path("out").exists())


# --------------------------------------------------------------------- folders, interrupted runs
@pytest.fixture(scope="module")
def long_runs(tmp_path_factory):
    """A folder with text.txt, whole/, and half/, which a signal stopped after 6 steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("long"))
        write("text.txt", TEXT)
        command(LONG, out="whole")
        run = SIZES, LONG, "--out-dir half"
        assert stopped_at("update_weights", 6, signal.SIGTERM, *run) == 143
        return Path.cwd()


@pytest.fixture
def whole(long_runs, workplace):
    shutil.copytree(long_runs / "half", "half")
    return long_runs / "whole"


def test_folder_of_a_live_run_is_refused_and_a_stale_lock_is_none(capsys, monkeypatch):
    def run_again():
        for more in ("--overwrite", "--resume"):
            assert "another run" in refused(capsys, SIZES, "--data text.txt --max-steps 1", more)

    write("out/.lock", "")
    act_at("measure", 2, run_again, monkeypatch)
    command("--data text.txt --max-steps 3")
    assert len(steps_of("out")) == 3


def test_overwriting_replaces_the_runs_files_alone_and_only_by_a_run_that_trains(whole, capsys):
    write("half/notes.md", "mine")
    before = contents()
    refused(capsys, SIZES, "--data absent.txt --out-dir half --overwrite")
    assert contents() == before
    run = "--data text.txt --max-steps 2 --train-ratio 1"  # so there is no best.pt
    assert {*command(run, "--overwrite", out="half")["val_losses"]} == {None}  # JSON has no nan
    command(run, out="new")
    assert_same_run("half", "new")
    assert not Path("half/best.pt").exists() and Path("half/notes.md").read_text() == "mine"


def test_resuming_takes_the_text_from_elsewhere_but_no_other_text_or_settings(whole, capsys):
    before = contents("half")
    write("other.txt", TEXT.replace("cat", "cow"))
    for word, value in (("--lr", "0.01"), ("--n-layers", "3"), ("--data", "other.txt")):
        line = refused(capsys, "--resume --out-dir half", word, value)
        assert word.strip("-") in line, line
    assert contents("half") == before
    Path("text.txt").rename("elsewhere.txt")
    succeed("--resume --data elsewhere.txt --out-dir half")
    assert_same_run("half", whole)


def test_bad_checkpoint_is_refused_and_runs_no_code(whole, capsys):
    path = Path("half/checkpoint.pt")
    good, content = path.read_bytes(), torch.load(path, weights_only=True)
    alone, other = {k: content[k] for k in ("config", "model")}, {"state_dict": content["model"]}
    for bad in (good[:999999], pickle.dumps(Code()), content | {"more": Code()}, alone, other):
        path.write_bytes(bad) if isinstance(bad, bytes) else torch.save(bad, path)
        before = contents()
        assert "checkpoint.pt" in refused(capsys, "--resume --out-dir half")
        assert contents() == before and not Path("ran").exists()


@pytest.mark.parametrize("megabytes, missing", [(1, ["model.pt", "checkpoint.pt"]), (9, [])])
def test_full_disk_warns_while_training_and_ends_it_at_last(megabytes, missing, whole, capsys):
    before, limits = contents("half"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (megabytes << 20, limits[1]))
    try:
        assert "make room" in refused(capsys, "--resume --out-dir half")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    after, missing = contents("half"), {*missing, "checkpoint.pt"}
    for name in ("model.pt", "checkpoint.pt"):  # whole ones of before
        assert (after[Path("half", name)] == before[Path("half", name)]) == (name in missing)
    assert after.keys() == before.keys()
    succeed("--resume --out-dir half")
    assert_same_run("half", whole)


def test_kill_9_at_random_moments_loses_nothing(long_runs):
    """The environment variable KILLS sets how many; the run gets longer with it."""
    moments, killed = random.Random(1), 0
    for _ in range(KILLS):
        process = start(SCRIPT, SIZES, LONG, "--resume")
        wait_for("Resuming|Ep 1", process)
        time.sleep(moments.uniform(0, 0.3))
        process.kill()
        killed += finish(process)[0] == -signal.SIGKILL
    assert killed >= min(2, KILLS)  # a very fast machine is done before
    command(LONG, "--resume")
    assert_same_run("out", long_runs / "whole")


MOMENTS = "evaluate_model INT 3, save TERM 3, note_random USR1 9, generate_and_print_sample HUP 1"


@pytest.mark.parametrize("case", MOMENTS.split(", "))
def test_signal_lets_the_run_save_and_print_what_goes_on(case, whole, capsys):
    moment, name, call = case.split()
    number = getattr(signal, "SIG" + name)
    run = SIZES, LONG, "--out-dir 'a b'"
    assert stopped_at(moment, int(call), number, *run) == 128 + number
    assert len(steps_of("a b")) < len(steps_of(whole)) and weights("a b/model.pt")
    python, script, *typed = shlex.split(re.search("To go on: (.*)", capsys.readouterr().out)[1])
    assert (python, script) == ("python", "train_gpt.py") and train_gpt.main(typed) == 0
    assert_same_run("a b", whole)


def test_first_run_needs_no_network_and_no_reader_of_its_lines():
    """Without flags for the data, and as under `| head`: stdout is closed after some lines."""
    process = start(SCRIPT, SIZES, "--batch-size 8 --max-steps 61 --eval-freq 20 --lr 0.01")
    wait_for("Batches of", process)
    process.stdout.close()
    process.stdout = None
    status, _, err = finish(process)
    assert status == 0 and len(err.splitlines()) == 1 and "the-verdict.txt" in err
    table = steps_of("out")
    assert [(row["step"], row["tokens"]) for row in table] == [(n, 64 * n + 64) for n in range(61)]
    assert table[-1]["loss"] < table[0]["loss"] - 1 and read_losses("out")["final"]


# -------------------------------------------------------------------------------------- the picture
@pytest.mark.parametrize("flags", ["--epochs 2", "--train-ratio 1 --max-steps 9"])
def test_picture_has_both_curves_units_and_the_lowest_loss(flags, monkeypatch):
    figure, pictures = importlib.import_module("matplotlib.figure"), []
    plain, whole = figure.Figure.savefig, "epochs" in flags

    def keep(picture, *arguments, **options):
        pictures.append(picture)
        plain(picture, *arguments, **options)

    monkeypatch.setattr(figure.Figure, "savefig", keep)
    losses = command("--data text.txt --batch-size 8 --lr 0.01", flags)
    axes, tokens_axes = pictures[0].axes
    lines = {line.get_label(): [*line.get_ydata()] for line in axes.lines}
    x = [0, *losses["epochs"], 2] if whole else [0, *(n + 1 for n in losses["steps"]), 9]
    assert [*axes.lines[0].get_xdata()] == pytest.approx(x)
    assert axes.get_xlabel() == ("Epochs" if whole else "Steps")
    assert axes.get_ylabel() == "Loss (nats per token)" and "text.txt" in axes.get_title()
    assert tokens_axes.get_xlabel() == "Tokens seen" and len(lines) == (3 if whole else 1)
    assert [*tokens_axes.lines[0].get_xdata()[1:-1]] == losses["tokens_seen"]
    for part, name in enumerate(("train", "val")[: 2 if whole else 1]):
        curve = [losses["initial"][part], *losses[f"{name}_losses"], losses["final"][part]]
        assert lines[("Training loss", "Validation loss")[part]] == curve
    assert not whole or lines[f"Lowest validation: {min(curve):.3f}"] == [min(curve)]


# --------------------------------------------------------------------------------- weights, in, out
def gpt2(dtype=torch.float32, shard_size="50GB", tied=False):
    """A model of transformers in the folder theirs; no bias is 0, no LayerNorm 1."""
    transformers = pytest.importorskip("transformers", reason="transformers isn't installed")
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    sizes = {"n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    torch.manual_seed(5)
    config = {"tie_word_embeddings": tied, **drops, **sizes}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config)).eval()
    for weight in model.parameters():
        weight.data += 0.3 * torch.randn_like(weight)
    model.to(dtype).save_pretrained("theirs", max_shard_size=shard_size)
    return model.float()


def test_exported_model_is_the_same_in_transformers(capsys):
    transformers, sizes = importlib.import_module("transformers"), TINY | {"vocab_size": 50257}
    model, ids = tiny_model(vocab_size=50257).eval(), torch.tensor(IDS[:64]).view(4, 16)
    torch.save({"config": GPT_CONFIG_124M | sizes, "model": model.state_dict()}, "ours.pt")
    write("mine/notes", "kept")
    assert "mine" in refused(capsys, "export mine --checkpoint ours.pt")
    succeed("export exported --checkpoint ours.pt")
    open_it = transformers.AutoModelForCausalLM.from_pretrained
    theirs, notes = open_it("exported", output_loading_info=True)
    assert not any(notes.values()) and theirs.config.resid_pdrop == 0.1, notes
    torch.testing.assert_close(theirs(ids).logits, model(ids), atol=1e-5, rtol=0)
    greedy = theirs.generate(ids[:1, :6], max_new_tokens=10, do_sample=False)
    assert torch.equal(greedy, generate_text_simple(model, ids[:1, :6], 10, 16))
    tokenizer = transformers.AutoTokenizer.from_pretrained("exported")
    ids = TOKENIZER.encode(text := f"{TEXT}{END} 12,5\n\n\n x", allowed_special={END})
    assert tokenizer(text)["input_ids"] == ids and tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == theirs.generation_config.eos_token_id == 50256
    assert tokenizer.model_max_length == 16 and Path("exported/generation_config.json").exists()


VARIANTS = "plain", "tied", "shards", "bfloat16", "float16", "bare", "buffers"


@pytest.mark.parametrize("variant", VARIANTS)
def test_gpt2_folder_has_the_loss_that_transformers_gives(variant, capsys):
    dtype = getattr(torch, variant) if "float16" in variant else torch.float32
    size = "2MB" if variant == "shards" else "50GB"
    path, model = Path("theirs/model.safetensors"), gpt2(dtype, size, variant == "tied")
    if variant in ("bare", "buffers"):
        state = {k.removeprefix("transformer."): weight for k, weight in load_file(path).items()}
        if variant == "buffers":  # and without a prefix, too
            state["h.0.attn.bias"] = torch.ones(1, 1, 16, 16).tril().byte()
            state["h.0.attn.masked_bias"] = torch.tensor(-1e4)
        path.unlink()
        write_it = torch.save if variant == "bare" else save_file
        write_it(state, "theirs/pytorch_model.bin" if variant == "bare" else path)
    assert path.exists() == (variant not in ("bare", "shards"))
    with torch.no_grad():
        expected = mean_loss(lambda ids: model(ids).logits, TEXT, 16)
    loss = loss_printed(capsys, "--data text.txt --checkpoint theirs")
    assert loss == pytest.approx(expected, abs=2e-5)


UNLIKE = {
    "activation_function": "relu", "n_inner": 32, "layer_norm_epsilon": 1e-6, "attn_pdrop": 0.9,
    "scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True, "vocab_size": 1000,
    "transformer.h.1.ln_2.bias": None, "transformer.h.0.attn.c_attn.weight": "transposed",
    "model.safetensors": "cut", "pytorch_model.bin": "code", "config.json": "cut",
}  # fmt: skip


def test_what_the_model_cannot_compute_or_read_is_refused_by_name(capsys):
    gpt2()
    for name, value in UNLIKE.items():
        folder = Path(shutil.copytree("theirs", f"un-{name}"))
        path, config = folder / "model.safetensors", folder / "config.json"
        state = load_file(path)
        if name in state:
            weight = state.pop(name)
            save_file(state | ({name: weight.T.contiguous()} if value else {}), path)
        elif value == "code":
            path.unlink()
            torch.save({"x": Code()}, folder / name)
        elif value == "cut":
            (folder / name).write_bytes((folder / name).read_bytes()[:-9])
        else:
            config.write_text(json.dumps(json.loads(config.read_text()) | {name: value}))
        before = contents()
        line = refused(capsys, "--device cpu --data text.txt --init-from", folder)
        assert name in line and contents() == before, line  # and no code has run


def test_training_goes_on_from_weights_and_resumes_without_their_file(capsys):
    model, run = gpt2(), "--init-from theirs --data text.txt --device cpu --max-steps"
    for size in ("--emb-dim 32", "--context-length 17"):
        assert "sizes of its own" in refused(capsys, run, "4", size)
    succeed(run, "4 --context-length 8 --drop-rate 0.2 --out-dir whole")
    assert torch.load("whole/model.pt", weights_only=True)["config"]["context_length"] == 8
    succeed(run, "4 --train-ratio 1 --eval-iter 99 --lr 1e-3 --out-dir other")
    with torch.no_grad():
        expected = mean_loss(lambda ids: model(ids).logits, TEXT, 16)
    assert read_losses("other")["initial"][0] == pytest.approx(expected, abs=0.05)
    assert read_losses("other")["final"][0] < expected - 0.05
    run += " 4 --context-length 8 --drop-rate 0.2"
    assert stopped_at("update_weights", 2, signal.SIGTERM, run) == 143
    Path("theirs").rename("elsewhere")
    succeed("--resume")
    assert_same_run("out", "whole")


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
    assert_close(ours, {name: p.grad for name, p in theirs.named_parameters()}, 1e-6)


# ----------------------------------------------------------------------------------------- learning
def test_rate_warms_up_falls_to_its_minimum_and_stays_there_when_the_run_is_lengthened():
    command("--data text.txt --max-steps 12 --lr 1e-3 --warmup-steps 4 --min-lr 1e-4")
    succeed("--resume --max-steps 16")
    cosine = [1e-4 + 4.5e-4 * (1 + math.cos(math.pi * n / 7)) for n in range(8)]
    expected = [2.5e-4, 5e-4, 7.5e-4, 1e-3, *cosine, *[1e-4] * 4]
    assert [row["learning_rate"] for row in steps_of("out")] == pytest.approx(expected)


def test_muon_trains_the_matrices_of_the_blocks_alone():
    losses = command("--data text.txt --batch-size 4 --optimizer muon --lr 0.01 --max-steps 8")
    assert losses["final"][0] < losses["initial"][0] - 0.5
    states = torch.load("out/checkpoint.pt", weights_only=True)["optimizer"]["state"]
    by_muon = {name for name, state in states.items() if "momentum_buffer" in state}
    assert by_muon == {
        n for n, w in weights("out/model.pt").items() if "blocks" in n and w.dim() > 1
    }


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_reduced_precision_trains_like_float32(dtype):
    for name in ("float32", dtype):
        command("--data text.txt --max-steps 6 --drop-rate 0 --lr 0.02 --dtype", name, out=name)
    ours, theirs = ([row["loss"] for row in steps_of(name)] for name in (dtype, "float32"))
    assert ours == pytest.approx(theirs, abs=0.05) and ours != theirs
    assert {w.dtype for w in weights(f"{dtype}/model.pt").values()} == {torch.float32}


# -------------------------------------------------------------------------------------------- ranks
EACH = f"""
import os, pathlib, sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import torch.distributed as dist, train_gpt
pathlib.Path("pid-" + os.environ["RANK"]).write_text(str(os.getpid()))
dist.init_process_group("gloo")
status = max(train_gpt.main(line.split()) for line in sys.argv[1:])
dist.destroy_process_group()
sys.exit(status)
"""
# Uneven groups of batches and ragged ends of both parts: 5 batches of 4, and 4 + 4 + 1.
RANKED = f"{SIZES} --data train.bin --val-data val.bin --eval-iter 99 --eval-freq 10 --epochs 7"
CLIPPED = "--lr 3e-3 --warmup-steps 5 --min-lr 1e-4 --grad-clip 0.5 --grad-accum-steps 2"
DROPS = f"{RANKED} {CLIPPED} --batch-size 2 --fsdp --checkpoint-every 2"


def start_ranks(*lines):
    """Start two processes that do these command lines; each leaves its id in a file, pid-0 or 1."""
    write("each.py", EACH)
    launch = "-m torch.distributed.run --standalone --nproc-per-node 2 each.py"
    return start(launch, *map(shlex.quote, lines))


@pytest.fixture(scope="module")
def ranked(tmp_path_factory):
    """A folder with runs of one process and of two; status, stdout and stderr of the two."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("ranked"))
        for name, windows in (("train", 22), ("val", 9)):
            write(f"{name}.bin", array("H", (made_up_ids(8 * windows + 4) % 1000).tolist()))
        exact, muon = f"{RANKED} {CLIPPED} --drop-rate 0", "--optimizer muon --max-steps 9"
        process = start_ranks(
            f"{exact} --batch-size 2 --out-dir two",
            f"{exact} --batch-size 2 --out-dir sharded --fsdp",
            f"{exact} --batch-size 2 --out-dir muon-sharded --fsdp {muon}",
            f"{DROPS} --out-dir whole",
            "evaluate --device cpu --data val.bin --out-dir two",
            f"{RANKED} --batch-size 2 --lr 1e24 --checkpoint-every 1 --out-dir broken",
        )
        succeed(exact, "--batch-size 4 --out-dir one")
        succeed(exact, "--batch-size 4 --out-dir muon-one", muon)
        return Path.cwd(), *finish(process)


def test_one_process_and_two_follow_one_curve_and_say_each_thing_once(ranked, monkeypatch, capsys):
    folder, status, out, err = ranked
    monkeypatch.chdir(folder)
    assert status != 0 and err.count("train_gpt:") == err.count("lower") == 1, err
    assert out.count("Ep 1 (Step 000000)") == 5 and not Path("broken/model.pt").exists()
    assert all(w.isfinite().all() for w in weights("broken/checkpoint.pt").values())
    one, parts = read_losses("one"), ("tokens_seen", "train_losses", "val_losses", "final")
    for name in ("two", "sharded"):
        for part in parts:
            assert read_losses(name)[part] == pytest.approx(one[part], abs=1e-5), part
        assert_close(weights(f"{name}/model.pt"), weights("one/model.pt"), 1e-5)
        for row, expected in zip(steps_of(name), steps_of("one"), strict=True):
            assert row == pytest.approx(expected, abs=1e-5, rel=1e-4)  # sums of 10^6 squares
    assert len(steps_of("one")) == 21 and one["final"][0] < one["initial"][0] - 0.5
    ours, theirs = (read_losses(f"muon-{name}")["final"] for name in ("sharded", "one"))
    assert ours == pytest.approx(theirs, abs=1e-3) and ours[0] < one["initial"][0] - 0.1
    (loss,) = re.findall(r"(?m)^Loss: ([\d.]+)", out)
    expected = loss_printed(capsys, "--data val.bin --out-dir two")
    assert float(loss) == pytest.approx(expected, abs=1.5e-6)


def test_one_rank_killed_ends_all_and_the_run_goes_on_bit_for_bit(ranked, monkeypatch, capsys):
    monkeypatch.chdir(ranked[0])
    process, path = start_ranks(f"{DROPS} --out-dir out"), Path("out/steps.csv")
    while process.poll() is None and not (path.exists() and path.read_text().count("\n") > 4):
        time.sleep(0.01)
    os.kill(int(Path("pid-1").read_text()), signal.SIGKILL)
    assert finish(process)[0] != 0 and not Path("out/model.pt").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int(Path("pid-0").read_text()), 0)
    assert "2 processes" in refused(capsys, "--resume --no-fsdp --device cpu")
    status, out, err = finish(start_ranks("--resume"))
    assert status == 0 and "Resuming after step" in out, err
    states = torch.load("out/checkpoint.pt", weights_only=True)["random"]
    assert not torch.equal(states[0]["cpu"], states[1]["cpu"])  # each draws masks of its own
    assert_same_run("out", "whole")


# ------------------------------------------------------------------------------------------- README
def test_commands_of_the_readme_are_accepted():
    text, seen = SCRIPT.with_name("README.md").read_text(encoding="utf-8"), 0
    blocks = "\n".join(re.findall(r"(?ms)^```bash\n(.*?)^```", text)).replace("\\\n", " ")
    for typed in re.findall(r"(?m)(?:python|^torchrun .*) train_gpt\.py(.*?)(?:[|&>].*)?$", blocks):
        typed, seen = shlex.split(typed, comments=True), seen + 1
        name = typed.pop(0) if typed and typed[0] in train_gpt.COMMANDS else "train"
        train_gpt.parse(name, typed)
    assert seen > 5
