# ruff: noqa: F403, F405
"""Tests of train_gpt.py: `pytest`, in under five minutes on two cores, without a network."""

import contextlib
import csv
import gzip
import importlib
import io
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import train_gpt
from train_gpt import *

torch.set_num_threads(1)  # as in the processes that tests start; faster, too, for tiny models
keep_freed_memory()
STARTED = []  # processes
SCRIPT = Path(train_gpt.__file__).resolve()
TOKENIZER = get_tokenizer()
SENTENCES = ["The cat sat,\n", "on the mat. ", "Every effort moves you! ", "don't\n\n", "Naïve 文"]
TEXT = "".join(random.Random(0).choices(SENTENCES, k=240))
IDS = TOKENIZER.encode(TEXT)
SIZES = "--emb-dim 16 --n-layers 2 --n-heads 2 --context-length 8 --device cpu"
TINY = {"vocab_size": 97, "context_length": 16, "emb_dim": 32, "n_heads": 4, "n_layers": 2}
KILLS = int(os.environ.get("KILLS", "3"))
# With dropout, groups of batches that don't come out even, and another rate at each step.
LONG = (
    f"--data text.txt --epochs {max(2, KILLS)} --batch-size 4 --grad-accum-steps 4 --eval-freq 4 "
    "--warmup-steps 3 --min-lr 1e-5 --grad-clip 1 --checkpoint-every 3"
)
os.environ |= dict.fromkeys(["HTTPS_PROXY", "HTTP_PROXY"], "http://127.0.0.1:9")  # a closed port
os.environ |= {"NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
needs_posix = pytest.mark.skipif(os.name != "posix", reason="no POSIX signals, pipes or limits")
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux' limits and /proc")
needs_mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="seen only with MKL")


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """Each test runs in a folder of its own, offline, with text.txt there."""
    monkeypatch.chdir(tmp_path)
    write("text.txt", TEXT)
    yield tmp_path
    while STARTED:
        STARTED.pop().kill()


def write(name, content):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(content.encode() if isinstance(content, str) else bytes(content))


def words(*arguments):
    """The words of a command line: strings are split, paths are not."""
    return [w for a in arguments for w in ([str(a)] if isinstance(a, Path) else a.split())]


def succeed(*arguments):
    assert train_gpt.main(words(*arguments)) == 0


def command(*arguments, out="out"):
    """Train a tiny model, which must succeed; return the content of losses.json."""
    succeed(SIZES, *arguments, "--out-dir", out)
    return read_losses(out)


def refused(capsys, *arguments):
    """Run the command in this process, which must end in one line; return that line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        train_gpt.main(words(*arguments))
    *notes, line = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and line.startswith("train_gpt: ")
    assert all(re.match("train_gpt: (warning: |using )", note) for note in notes), notes
    return line


def start(*arguments, **options):
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8", **options}
    process = subprocess.Popen([sys.executable, *words(*arguments)], **options)
    STARTED.append(process)
    return process


def finish(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def output_until(process, pattern):
    out = ""
    for line in process.stdout:
        out += line
        if re.match(pattern, line):
            return out
    pytest.fail(f"no line {pattern}: {process.stderr.read()}")


def results(out):
    return [line for line in out.splitlines() if line.startswith(("Ep ", "Every effort", "Final"))]


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def steps_of(folder):
    """The rows of steps.csv without the seconds, numbers by their columns' names."""
    rows = csv.DictReader(Path(folder, "steps.csv").read_text().splitlines())
    return [{k: float(v) for k, v in row.items() if v and k != "seconds"} for row in rows]


def figures(kind, out):
    return [float(figure) for figure in re.findall(kind + r": ([\d.]+)", out)]


def assert_close(ours, theirs, within):
    assert ours.keys() == theirs.keys()
    furthest = max((ours[name] - theirs[name]).abs().max().item() for name in ours)
    assert furthest <= within, furthest


def assert_same_run(folder, other):
    """Weights bit for bit, losses byte for byte, steps."""
    for path in Path(other).glob("[mb]*.pt"):  # model, best
        assert_close(weights(Path(folder, path.name)), weights(path), 0)
    assert Path(folder, "losses.json").read_bytes() == Path(other, "losses.json").read_bytes()
    assert steps_of(folder) == steps_of(other)


def contents(folder):
    return {path: path.is_file() and path.read_bytes() for path in Path(folder).rglob("*")}


@contextlib.contextmanager
def disk_for_files_of(size):
    """A limit on the size of files makes writing fail as a full disk does."""
    resource = pytest.importorskip("resource", reason="Windows has no limit for a file's size")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def act_at(moment, call, action, patch):
    plain, calls = getattr(train_gpt, moment), itertools.count(1)

    def act_and_call(*arguments, **options):
        if next(calls) == call:
            action()
        return plain(*arguments, **options)

    patch.setattr(train_gpt, moment, act_and_call)


class Code:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def read_losses(folder):
    return json.loads(Path(folder, "losses.json").read_text())


def tiny_model(seed=123, **changes):
    torch.manual_seed(seed)
    return GPTModel({**GPT_CONFIG_124M, **TINY, **changes})


def made_up_ids(count):
    i = torch.arange(count)
    return (7919 * i * i + 104729 * i) % 50257


# ----------------------------------------------------------------------------- published figures
@pytest.fixture
def fast(workplace):
    """All cores, and float32 products as the command has them."""
    torch.set_num_threads(os.cpu_count())
    before = torch.get_float32_matmul_precision()
    choose_precision(torch.device("cpu"), "float32")
    yield
    torch.set_float32_matmul_precision(before)
    torch.set_num_threads(1)


def test_loss_and_greedy_sample_of_the_untrained_124m_model_are_the_published_ones(fast):
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
    book = model, [batch], [], optimizer, "cpu", 10, 100, 1, "", TOKENIZER
    assert list(train(*book, progress=Progress(step=0))) == pytest.approx(
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
def test_published_run_begins_with_the_published_losses(chapter, fast, capsys):
    path = SCRIPT.with_name("the-verdict.txt")
    if not path.exists():
        pytest.skip("the-verdict.txt is not beside the script: train there once with a network")
    train_loader, val_loader = loaders(path.read_text(encoding="utf-8"), chapter, 2, 256)
    assert (len(train_loader), len(val_loader)) == (9, 1)
    torch.manual_seed(123)
    model = chapter.GPTModel(chapter.GPT_CONFIG_124M)
    assert sum(p.numel() for p in model.parameters()) == 162419712
    state = torch.get_rng_state()
    initial = chapter.evaluate_model(model, train_loader, val_loader, "cpu", eval_iter=None)
    assert initial == pytest.approx((10.987583, 10.981106), abs=5e-4)
    torch.set_rng_state(state)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0004, weight_decay=0.1)
    book = model, train_loader, val_loader, optimizer, "cpu", 10, 5, 5, "Every effort moves you"
    progress = chapter.Progress()
    steps = chapter.train(*book, TOKENIZER, progress=progress)
    while progress.step < 5:
        next(steps)
    printed = "Ep 1 (Step 000000): Train loss 9.781, Val loss 9.933\n"
    printed += "Ep 1 (Step 000005): Train loss 8.111, Val loss 8.339\n"
    assert capsys.readouterr().out == printed
    assert [entry[2] for entry in progress.history] == [512, 3072]


# --------------------------------------------------------------------- the chapter, piece by piece
def test_command_trains_exactly_as_the_chapter_alone_does(chapter, fast, capsys):
    """Its loader draws what the book's DataLoader draws, and saving changes nothing."""
    torch.set_num_threads(1)
    run = "--data text.txt --batch-size 4 --epochs 2 --eval-freq 3 --checkpoint-every 1"
    by_command, printed = command(run), results(capsys.readouterr().out)
    train_loader, val_loader = loaders(TEXT, chapter, 4, 8)
    torch.manual_seed(123)
    sizes = {"emb_dim": 16, "n_layers": 2, "n_heads": 2, "context_length": 8}
    model = chapter.GPTModel({**chapter.GPT_CONFIG_124M, **sizes})
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=0.1, fused=True)
    book = model, train_loader, val_loader, optimizer, "cpu", 2, 3, 5, "Every effort moves you"
    losses = chapter.train_model_simple(*book, TOKENIZER)
    assert losses == tuple(by_command[n] for n in ("train_losses", "val_losses", "tokens_seen"))
    assert_close(weights("out/model.pt"), model.state_dict(), 0)
    assert results(capsys.readouterr().out) == printed[:-2]


# ------------------------------------------------------------------------------------ the generator
def trained(batches, optimizer=torch.optim.SGD, **options):
    """Train a model without dropout for an epoch; return (its weights, the steps' losses)."""
    model = tiny_model(drop_rate=0.0)
    optimizer = optimizer(model.parameters(), lr=0.5)
    book = model, batches, [], optimizer, "cpu", 1, 100, 1, "", TOKENIZER
    losses = list(train(*book, progress=Progress(step=0), **options))
    return torch.cat([p.detach().flatten() for p in model.parameters()]), losses


def test_targets_of_minus_100_count_nowhere():
    inputs, targets = made_up_ids(33)[:32].view(4, 8) % 97, made_up_ids(33)[1:].view(4, 8) % 97
    targets[0, 5:] = targets[2, :7] = targets[3] = -100  # 5, 8, 1 and 0 tokens are left
    model = tiny_model(drop_rate=0.0)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    expected = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    expected_gradients = torch.autograd.grad(expected, model.parameters())
    loss = calc_loss_batch(inputs, targets, model, "cpu")
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    for ours, theirs in zip(torch.autograd.grad(loss, model.parameters()), expected_gradients):
        torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-5)
    rows = list(zip(inputs.split(1), targets.split(1)))
    assert calc_loss_loader(rows, model, "cpu") == pytest.approx(expected.item(), abs=1e-6)
    assert math.isnan(calc_loss_loader(rows[3:], model, "cpu"))
    (ours, losses), (theirs, _) = trained(rows, grad_accum_steps=4), trained([(inputs, targets)])
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert losses == pytest.approx([expected.item()], abs=1e-6)
    unchanged, losses = trained(rows[3:], torch.optim.AdamW)
    assert torch.equal(unchanged, before) and losses == [0]


def test_run_stopped_after_any_step_and_gone_on_with_in_a_new_process_is_the_same_run(capsys):
    """15 batches are 3 steps of an epoch, the last one of 3 batches."""
    run = "--data text.txt --epochs 2 --batch-size 8 --grad-accum-steps 6 --eval-freq 2"
    printed = []
    for stop in range(1, 7):
        command(run, f"--max-steps {stop}", out=f"{stop}")
        printed.append(results(capsys.readouterr().out))
    resume, whole = ["--resume", "--max-steps", "6", "--out-dir"], printed.pop()
    code = f"import sys\nsys.path.append({str(SCRIPT.parent)!r})\nimport train_gpt\n"
    code += f"for stop in '12345': print('Stop'), train_gpt.main({resume} + [stop])"
    write("resume.py", code)
    status, out, err = finish(start("resume.py"))
    assert (status, err) == (0, "")
    for stop, first, out in zip(range(1, 6), printed, out.split("Stop\n")[1:]):
        assert_same_run(f"{stop}", "6")
        rest = results(out)
        assert len(rest) > 2 and rest == whole[-len(rest) :]
        evaluations = [line for line in first + rest if line.startswith("Ep")]
        assert evaluations == [line for line in whole if line.startswith("Ep")]


# ----------------------------------------------------------------------------------------- sampling
def greedy(model, ids, new_tokens, context_size):
    """Greedy sampling as the book writes it: all is computed again for each token."""
    for _ in range(new_tokens):
        with torch.no_grad():
            logits = model(ids[:, -context_size:])[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("context_size", [16, 9])
@pytest.mark.parametrize("length", [1, 5, 15, 16, 20])
def test_cached_sampling_equals_recomputing(rows, context_size, length):
    model = tiny_model(seed=rows).eval()
    ids = made_up_ids(rows * length).view(rows, length) % 97
    expected = greedy(model, ids, 24, context_size)
    assert torch.equal(generate(model, ids, 24, context_size), expected)
    assert torch.equal(generate_text_simple(model, ids, 24, context_size), expected)
    assert torch.equal(generate(model, ids, 24, context_size, 1.5, top_k=1), expected)


class Negated(GPTModel):
    def forward(self, in_idx, **options):  # and hands no caches on
        return -super().forward(in_idx)


def test_sampling_follows_hooks_and_subclasses():
    for hooked in ("trf_blocks.0", "trf_blocks.1.att", "trf_blocks", "tok_emb", "drop_emb", ""):
        model, ids = tiny_model().eval(), made_up_ids(4)[None] % 97
        plain = greedy(model, ids, 16, 16)
        if hooked:
            model.get_submodule(hooked).register_forward_hook(lambda *c: c[2][:, :1] - c[2])
        else:
            model.__class__ = Negated
        expected = greedy(model, ids, 16, 16)
        assert torch.equal(generate(model, ids, 16, 16), expected)
        assert not torch.equal(expected, plain)


# ---------------------------------------------------------------------------------- the first run
@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """The command in an empty folder without a network: (folder, status, stdout, stderr)."""
    folder = tmp_path_factory.mktemp("first-run")
    options = "--batch-size 8 --max-steps 61 --eval-iter 10 --eval-freq 20 --lr 0.01"
    return folder, *finish(start(SCRIPT, SIZES, options, cwd=folder))


FIRST_RUN = r"""
Device: cpu, float32; model: [\d,]+ parameters
Characters: 2\d{4}$
Batches of \(8, 8\): \d+ for training, \d+ for validation
Training loss: 1[01]\.\d+
Ep 1 \(Step 000020\): Train loss \d+\.\d{3}, Val loss \d+\.\d{3}$
Every effort moves you
Final validation loss: \d
Files in out: model.pt .*best.pt .*checkpoint.pt .*losses.json .*steps.csv .*loss-plot.p
To train on: .*--resume
"""


def test_first_run_trains_without_a_network_and_writes_down_what_it_printed(first_run):
    folder, status, out, err = first_run
    lines = iter(out.splitlines())
    assert status == 0 and len(err.splitlines()) == 1 and "the-verdict.txt" in err
    for pattern in FIRST_RUN.strip().split("\n"):
        assert any(re.match(pattern, line) for line in lines), f"no {pattern} in its place: {out}"
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", out + err)  # the status line is for terminals
    assert sorted(path.name for path in folder.iterdir()) == ["out"]
    losses, table = read_losses(folder / "out"), steps_of(folder / "out")
    line = r"Ep (\d+) \(Step (\d+)\): Train loss ([\d.]+), Val loss ([\d.]+)"
    losses["epochs"] = [*map(math.ceil, losses["epochs"])]
    names = "epochs", "steps", "train_losses", "val_losses"
    for name, printed in zip(names, zip(*re.findall(line, out))):
        assert losses[name] == pytest.approx([float(figure) for figure in printed], abs=6e-4)
    assert losses["config"]["emb_dim"] == 16 and losses["settings"]["lr"] == 0.01
    assert [(row["step"], row["tokens"]) for row in table] == [(n, 64 * n + 64) for n in range(61)]
    assert table[-1]["loss"] < table[0]["loss"] - 1 and table[-1]["learning_rate"] == 0.01
    assert (folder / "out/loss-plot.pdf").read_bytes().startswith(b"%PDF")


def test_sample_command_that_it_printed_continues_the_text(first_run, monkeypatch, capsys):
    monkeypatch.chdir(first_run[0])
    python, script, *typed = shlex.split(re.search("To sample from it: (.*)", first_run[2])[1])
    options, samples = words("--temperature 1 --top-k 40 --max-new-tokens 30 --seed"), []
    assert (python, script) == (sys.executable, str(SCRIPT))
    for seed in ("1", "1", "2"):
        assert train_gpt.main([*typed, *options, seed]) == 0
        samples.append(capsys.readouterr().out)
    assert samples[0] == samples[1] != samples[2]
    assert samples[0].startswith("Every effort moves you") and len(samples[0]) > 60


def test_resuming_takes_the_default_text_that_the_run_began_with(first_run, workplace):
    shutil.copytree(first_run[0] / "out", "out")
    write("the-verdict.txt", TEXT)
    succeed("--resume --max-steps 62 --device cpu")


def test_evaluation_is_one_figure_for_any_batch_size_and_of_the_runs_own_text(capsys):
    write("own.txt", TEXT[:1500])
    final = command("--data own.txt --train-ratio 0.7 --max-steps 2 --eval-iter 99")["final"]
    capsys.readouterr()
    for flags in ("", "--batch-size 1", "--batch-size 999", "--data text.txt"):
        succeed("--eval-only --device cpu", flags)
        out = capsys.readouterr().out
        losses = figures("loss", out)
        assert (losses == pytest.approx(final, abs=1e-5)) == ("--data" not in flags)
        assert figures("perplexity", out) == pytest.approx([*map(math.exp, losses)], rel=1e-4)
    for change in (lambda: write("own.txt", "Other. " * 99), Path("own.txt").unlink):
        change()
        line = refused(capsys, "--eval-only --device cpu --checkpoint out/model.pt")
        assert "own.txt" in line and "--data" in line


@needs_posix
def test_terminal_has_a_status_line_that_moves_without_escape_sequences(monkeypatch):
    pty = importlib.import_module("pty")  # not on Windows
    monkeypatch.setenv("TERM", "dumb")
    ours, theirs, shown = *pty.openpty(), b""
    process = start(SCRIPT, SIZES, "--data text.txt --epochs 9999", stdout=theirs, stderr=theirs)
    os.close(theirs)
    with contextlib.suppress(OSError):  # the process has ended
        while chunk := os.read(ours, 9999):
            shown += chunk
            if len({*re.findall(rb"\rstep (\d+)", shown)}) > 2 and b"stopping" not in shown:
                process.terminate()
    os.close(ours)
    assert process.wait(60) == 143 and b"\x1b" not in shown and b"step -" not in shown
    assert re.search(rb"[\r\n]Ep 1 \(Step 0+\): .*, Val loss [\d.]+ *\r?\n", shown)


# ------------------------------------------------------------------------------------------- texts
def token_ids(*data, to="ids.bin"):
    Path(to).unlink(missing_ok=True)
    succeed("--data", *data, "--write-tokens", to)
    return array("H", Path(to).read_bytes()).tolist()


PARTS = [
    "word", "Word", "a", "é", "e\u0301", "文字", "かな", "𝒳", "ß", "0", "123", "²", "٣", "🙂",
    " ", "   ", " \n", "\n", "\n\n\n", "\r\n", "\r", "\t", "\xa0", "\u2028", "\u3000", "\x85",
    "...", ",", "!?", ")(", "。", "'", "'s", "'ll", "’re", "1,000.50", "\u200b", "don't", "I'm,",
    "<|endoftext|>", "<|endof", "text|>", "\x1c",
]  # fmt: skip


def test_tokens_in_pieces_are_those_of_the_whole_text(monkeypatch):
    draw = random.Random(0)
    for size in range(1, 21):
        monkeypatch.setattr(train_gpt, "PIECE_CHARACTERS", size)
        texts = ["".join(draw.choices(PARTS, k=draw.randint(1, 40))) for _ in range(15)]
        [write(f"{name}.txt", text) for name, text in enumerate(texts)]
        whole = "<|endoftext|>".join(texts).replace("\r\n", "\n").replace("\r", "\n")
        expected = TOKENIZER.encode(whole, allowed_special="all")
        assert token_ids(*(f"{name}.txt" for name in range(15))) == expected, texts


@pytest.fixture
def books(workplace):
    """A folder with three texts, and with what is no text; return the ids of the texts."""
    files = {"1.txt": TEXT, "2.TXT": "Second: " + TEXT, "deep/3.txt": "Third: " + TEXT}
    others = ["notes.md", ".hidden.txt", ".ipynb_checkpoints/1.txt", "deep/.git/x.txt"]
    for name, text in {**files, **dict.fromkeys(others, "Other. " * 99)}.items():
        write(f"books/{name}", text)
    return TOKENIZER.encode("<|endoftext|>".join(files.values()), allowed_special="all")


def test_folders_and_token_files_train_alike_and_say_what_they_took(books, capsys):
    header = array("i", [20240520, 1, len(books), *[0] * 253])
    write("raw.bin", array("H", books))
    write("llmc.bin", bytes(header) + bytes(array("H", books)))
    runs, outputs = [], []
    for data in ("books", "raw.bin", "llmc.bin"):
        runs.append(command(f"--data {data} --max-steps 6", out=f"out-{data}"))
        outputs.append(capsys.readouterr().out)
        assert f"Tokens: {len(books)}\n" in outputs[-1]
    for name in ("initial", "train_losses", "val_losses", "final"):
        assert runs[0][name] == runs[1][name] == runs[2][name]
    assert "taken: 3, other files passed over: 4" in outputs[0] and "1 file)" in outputs[1]
    assert f"Characters: {3 * len(TEXT) + 15}\n" in outputs[0]


def test_file_under_many_names_is_read_once_and_its_byte_order_mark_is_no_text(books, monkeypatch):
    Path("link.txt").symlink_to(Path("books/1.txt").resolve())
    Path("folder").symlink_to(Path("books").resolve())
    ids = token_ids("books", Path("books/1.txt").resolve(), "folder --data link.txt ./books")
    assert ids == books
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(Path.cwd()))
    write("bom.txt", "\ufeff" + TEXT)
    assert token_ids("bom.txt") == token_ids("~/text.txt", to="home.bin") == IDS
    succeed(SIZES, "--data ~/text.txt --max-steps 1 --out-dir ~/new")
    assert Path("new/model.pt").exists() and not Path("~").exists()


@needs_posix
def test_pipes_and_standard_input_are_read():
    os.mkfifo("pipe")
    threading.Thread(target=Path("pipe").write_bytes, args=[TEXT.encode()], daemon=True).start()
    piped = command("--data pipe --max-steps 3", out="fifo")
    assert piped["final"] == command("--data text.txt --max-steps 3")["final"]
    process = start(SCRIPT, "--data - --write-tokens ids.bin", stdin=subprocess.PIPE)
    process.stdin.write(TEXT)
    assert finish(process)[::2] == (0, "")
    assert array("H", Path("ids.bin").read_bytes()).tolist() == IDS


# ----------------------------------------------------------------------------------------- mistakes
BAD_FILES = {
    "empty.txt": "", "short.txt": "Hi", "latin.txt": "naïve ".encode("latin-1") * 99,
    "mark.txt": TEXT.encode("utf-16"), "nomark.txt": TEXT.encode("utf-16-le"),
    "gz.txt": gzip.compress(TEXT.encode()), "copy.txt": TEXT, "text.bin": TEXT,
    "blanks.txt": "a" + " " * 10**6 + "b", "letters.bin": array("H", [*TEXT.encode() * 4]),
    "parquet.txt": b"PAR1" * 99, "npy.bin": b"\x93NUMPY" + bytes(array("H", IDS)),
    "uint32.bin": array("I", IDS), "short.bin": bytes(10), "odd.bin": bytes(3), "empty.bin": "",
    "beyond.bin": b"\xff\xff" * 999, "cut.bin": array("i", [20240520, 1, 999, *[0] * 353]),
    "file": "taken", "junk.pt": "junk" * 99, "hollow/README": "no text",
    "held/best.pt": "of an earlier run", "held/.lock": "",
}  # fmt: skip
MISTAKES = """
range: --epochs 0 | --epochs -1 | --max-steps 0 | --batch-size 0 | --grad-accum-steps 0 | --lr nan
range: --context-length 0 | --emb-dim 0 | --n-heads 0 | --n-layers 0 | --drop-rate 1 | --lr 0
range: --drop-rate nan | --train-ratio 0 | --train-ratio 1.1 | --warmup-steps -1 | --min-lr -1
range: --weight-decay -1 | --grad-clip 0 | --seed 9223372036854775808 | --seed -1
range: --eval-freq 0 | --checkpoint-every 0 | --eval-iter 0
range: --sample Hi --temperature -1 | --sample Hi --top-k 0 | --sample Hi --max-new-tokens 0
invalid: --epochs x | --epochs 1.5 | --model gpt3 | --dtype int8
expected: --epochs | --data
mean --epochs?: --epoch 3
mean gpt2-small?: --model gpt2-smal
unrecognized: stray | --stride 4 | --sizing 8
device: --device tpu | --device cuda:99 | --device cuda:-1
divisible: --n-heads 3
torchrun: --fsdp
empty: --start-context= | --data empty.txt | --write-tokens x.bin --data empty.txt
means nothing: --checkpoint junk.pt | --temperature 1 | --top-k 3 | --sample Hi --epochs 3
means nothing: --sample Hi --top-k 3 | --eval-only --lr 1 | --eval-only --train-ratio .5
don't go together: --overwrite --resume | --sample Hi --eval-only | --val-data x --train-ratio .5
don't go together: --sample Hi --out-dir x --checkpoint y | --init gpt2 --init-from x
above --lr: --min-lr 1
steps: --warmup-steps 1
--context-length: --batch-size 9999 | --context-length 99999 --out-dir a/b | --train-ratio 0.001
--train-ratio: --data short.txt | --data short.bin
there is no: --sample Hi | --eval-only | --sample Hi --checkpoint absent.pt
junk.pt: --sample Hi --checkpoint junk.pt | --eval-only --checkpoint junk.pt
hollow: --sample Hi --checkpoint hollow | --data hollow | --export-hf hollow
absent: --data absent.txt | --data text.txt absent.txt | --val-data absent.txt
no file: --data *.nothing | --data http://127.0.0.1/x
blanks: --data blanks.txt
GPT-2's: --data letters.bin
UTF-8: --data latin.txt | --val-data latin.txt | --data text.txt latin.txt
UTF-16: --data mark.txt | --data nomark.txt
gzip: --data gz.txt
NumPy: --data npy.bin
Parquet: --data parquet.txt
uint32: --data uint32.bin
a text: --data text.bin
mix: --data text.txt short.bin
bytes: --data odd.bin | --data empty.bin
65535: --data beyond.bin
announces: --data cut.bin
training data: --val-data text.txt | --val-data ./text.txt
repeats: --val-data copy.txt
exists: --write-tokens text.txt
file: --out-dir file | --out-dir file/below
--overwrite: --out-dir held
"""
MISTAKES += "memory: --emb-dim 20000000" * (sys.platform == "linux")
MEANT = (line.split(": ", 1) for line in MISTAKES.strip().split("\n"))
CASES = [(case.strip(), word) for word, cases in MEANT for case in cases.split("|")]


@pytest.mark.parametrize("case, word", CASES)
def test_mistake_is_refused_with_one_line_and_nothing_is_written(case, word, capsys):
    for name, content in BAD_FILES.items():
        write(name, content)
    trains = not re.match("--(sample|eval-only|export-hf|write-tokens)", case)
    before = contents(".")
    data = "" if re.search("(^| )--data", case) else "--data text.txt"
    line = refused(capsys, f"{SIZES} {data} --max-steps 1" if trains else "", case)
    flag = re.findall("^[a-z]+|--[a-z-]+", case)[-1]
    assert word in line and (flag in line or word != "range"), line
    assert contents(".") == before


# ----------------------------------------------------------------------------- folders, checkpoints
HALF = "--data text.txt --batch-size 8 --grad-accum-steps 4 --eval-freq 3 --epochs 9"
SIX = f"{HALF} --max-steps 6"


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A folder with text.txt, with half/ of 6 steps of training and whole/ of all 12."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("both"))
        write("text.txt", TEXT)
        command(SIX, out="half")
        command(HALF, "--max-steps 12", out="whole")
        return Path.cwd()


@pytest.fixture
def whole(both, workplace):
    shutil.copytree(both / "half", workplace / "half")
    return both / "whole"


@needs_posix
def test_folder_that_another_run_uses_is_refused_until_a_signal_ends_that_run(capsys):
    write("large.txt", TEXT * 2000)
    before = contents(".")
    process = start(SCRIPT, SIZES, "--data large.txt --eval-iter 99999")
    output_until(process, "Batches")  # then it measures for long, and nothing is in the folder
    for more in ("", "--overwrite", "--resume"):
        assert "another run" in refused(capsys, SIZES, "--data text.txt --max-steps 1", more)
    process.terminate()
    status, _, err = finish(process)
    assert status == 143 and len(err.splitlines()) == 1 and contents(".") == before


def test_overwriting_replaces_the_runs_files_alone_and_only_by_a_run_that_trains(whole, capsys):
    write("half/notes.md", "mine")
    before = contents("half")
    for bad in ("--data absent.txt", "--data text.txt --context-length 9999"):
        refused(capsys, SIZES, bad, "--out-dir half --overwrite")
        assert contents("half") == before
    run = "--data text.txt --max-steps 2 --train-ratio 1"  # so there is no best.pt
    losses = command(run, "--overwrite", out="half")
    printed = capsys.readouterr()
    assert "Val loss nan" in printed.out and len(printed.err.splitlines()) == 1
    assert set(losses["val_losses"]) == {None}  # JSON has no nan
    command(run, out="new")
    assert_same_run("half", "new")
    assert not Path("half/best.pt").exists() and Path("half/notes.md").read_text() == "mine"


def test_resuming_begins_a_run_where_there_is_none_and_else_goes_on(whole, capsys):
    command(HALF, "--max-steps 12 --resume")
    assert "beginning" in capsys.readouterr().out
    assert_same_run("out", whole)
    Path("moved").mkdir()  # as a symbolic link, on a larger disk; the text at another place
    Path("half/checkpoint.pt").rename("moved/checkpoint.pt")
    Path("half/checkpoint.pt").symlink_to(Path("moved/checkpoint.pt").resolve())
    Path("text.txt").rename("elsewhere.txt")
    command("--resume --max-steps 12 --data elsewhere.txt", out="half")
    assert Path("half/checkpoint.pt").is_symlink()
    assert torch.load("moved/checkpoint.pt", weights_only=True)["progress"]["step"] == 11
    assert steps_of("half") == steps_of(whole)


def test_resuming_with_other_data_or_settings_is_refused(whole, capsys):
    before, state = contents("half"), Path("text.txt").stat()
    for flag, old, new in (("--lr", "0.0004", "0.01"), ("--emb-dim", "16", "32")):
        line = refused(capsys, "--resume --out-dir half", flag, new)
        assert all(word in line for word in (flag, old, new))
    Path("text.txt").write_bytes(TEXT.replace("cat", "cow").encode())
    os.utime("text.txt", ns=(state.st_atime_ns, state.st_mtime_ns))
    assert "changed" in refused(capsys, "--resume --max-steps 12 --out-dir half")
    Path("text.txt").unlink()
    assert "text.txt" in refused(capsys, "--resume --max-steps 12 --out-dir half")
    assert contents("half") == before


DAMAGES = {
    "cut short": lambda good, content: good[: len(good) // 2],
    "flipped byte": lambda good, content: good[:500000] + bytes([good[500000] ^ 1]) + good[500001:],
    "bare pickle": lambda good, content: pickle.dumps(Code()),
    "malicious": lambda good, content: {**content, "more": Code()},
    "other size": lambda good, content: {**content, "config": {**GPT_CONFIG_124M, "n_layers": 1}},
}
for part in ("settings", "progress", "optimizer", "random"):
    DAMAGES[f"no {part}"] = lambda good, content, part=part: {**content, part: None}


@pytest.mark.parametrize("damage", DAMAGES)
def test_bad_checkpoint_is_refused_and_runs_no_code(damage, whole, capsys):
    path = Path("half/checkpoint.pt")
    bad = DAMAGES[damage](path.read_bytes(), torch.load(path, weights_only=True))
    path.write_bytes(bad) if isinstance(bad, bytes) else torch.save(bad, path)
    before = contents(".")
    assert "checkpoint.pt" in refused(capsys, "--resume --max-steps 12 --out-dir half")
    assert contents(".") == before


@needs_linux
@pytest.mark.parametrize("megabytes, missing", [(1, ["model.pt", "best.pt"]), (9, [])])
def test_full_disk_keeps_old_files_and_says_what_is_missing(megabytes, missing, whole, capsys):
    before = contents("half")
    with disk_for_files_of(megabytes << 20):
        line = refused(capsys, "--resume --max-steps 12 --out-dir half")
    said = re.match("train_gpt: (.*) can't be saved in half; whole: (.*); of before: (.*): ", line)
    after, missing = contents("half"), {*missing, "checkpoint.pt"}
    lost, kept, old = ({*names.split(", ")} for names in said.groups())
    assert lost == old == missing and kept == ({"model.pt", "best.pt"} - missing or {"none"})
    for name in ("model.pt", "best.pt", "checkpoint.pt"):
        assert (after[Path("half", name)] == before[Path("half", name)]) == (name in missing)
    assert after.keys() == before.keys()


# --------------------------------------------------------------------------------- interrupted
WAYS = {"": 0, "SIGTERM": 143, "SIGHUP SIGHUP": 129, "close": 0, "close SIGINT": 130, "full": 0}


def disturb(way, folder):
    """Close is what `| head` does, close and SIGINT is Ctrl-C under `| tee`, full is /dev/full."""
    write(folder / "text.txt", TEXT)
    before = ""
    with open("/dev/full" if way == "full" else os.devnull, "w") as full:
        stdout = full if way == "full" else subprocess.PIPE
        process = start(SCRIPT, SIZES, LONG, cwd=folder, stdout=stdout)
    for event in [] if way == "full" else way.split():
        before = before or output_until(process, r"Ep 1 \(Step 000004\)")
        if event == "close":
            process.stdout.close()
            process.stdout = None
        else:
            process.send_signal(getattr(signal, event))
            time.sleep(0.05)
    return folder, before, *finish(process)


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory):
    folders = [tmp_path_factory.mktemp("way") for way in WAYS]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(WAYS, pool.map(disturb, WAYS, folders)))


@needs_posix
@pytest.mark.parametrize("way", WAYS)
def test_disturbed_run_saves_all_and_goes_on(way, disturbed, monkeypatch, capsys):
    (folder, before, status, out, err), lost = disturbed[way], way.startswith(("close", "full"))
    monkeypatch.chdir(folder)
    assert status == WAYS[way] and "Traceback" not in err and err.count("is lost") == lost
    if status:
        assert weights("out/model.pt") and Path("out/loss-plot.pdf").exists()
        typed = [sys.executable, str(SCRIPT), *words(SIZES, LONG, "--resume")]
        assert lost or shlex.split(re.search("to go on: (.*)", out)[1]) == typed
        assert train_gpt.main(typed[2:]) == 0
        assert lost or results(before + out + capsys.readouterr().out) == results(disturbed[""][3])
    assert_same_run("out", disturbed[""][0] / "out")


MOMENTS = (
    "evaluate_model SIGINT 1, train_step SIGXCPU 7, save SIGUSR1 1, note_random SIGUSR2 9, "
    "generate_and_print_sample SIGHUP 1, save_evaluation SIGQUIT 3, measure SIGTERM 2"
)


@needs_posix
@pytest.mark.parametrize("case", MOMENTS.split(", "))
def test_signal_at_any_moment_lets_the_run_save_and_say_how_to_go_on(case, monkeypatch, capsys):
    moment, name, call = case.split()
    number = getattr(signal, name)
    before = signal.getsignal(number)
    act_at(moment, int(call), lambda: os.kill(os.getpid(), number), monkeypatch)
    assert train_gpt.main(words(SIZES, LONG)) == 128 + number
    assert Path("out/loss-plot.pdf").exists() and signal.getsignal(number) is before
    if moment == "measure":
        assert weights("out/model.pt") and len(read_losses("out")["final"]) == 2
    else:
        assert "to go on:" in capsys.readouterr().out and weights("out/checkpoint.pt")


@needs_posix
def test_signal_while_encoding_ends_at_once_and_leaves_nothing():
    write("huge.txt", TEXT * 5000)
    process, before = start(SCRIPT, "--data huge.txt --write-tokens ids.bin"), contents(".")
    while process.poll() is None and contents(".").keys() == before.keys():
        time.sleep(0.01)
    process.terminate()
    status, _, err = finish(process)
    assert status == 143 and len(err.splitlines()) == 1 and contents(".") == before


@needs_posix
def test_kill_9_at_random_moments_loses_nothing(disturbed):
    """The environment variable KILLS sets how many; the run gets longer with it."""
    moments, killed = random.Random(1), 0
    for _ in range(KILLS):
        process = start(SCRIPT, SIZES, LONG, "--resume")
        output_until(process, "Resuming|Ep 1")
        time.sleep(moments.uniform(0, 0.3))
        process.kill()
        killed += finish(process)[0] == -signal.SIGKILL
    assert killed >= min(2, KILLS)  # a very fast machine is done before
    command(LONG, "--resume")
    assert_same_run("out", disturbed[""][0] / "out")


@pytest.mark.parametrize("moment, call", [("evaluate_model", 2), ("generate_and_print_sample", 1)])
def test_token_file_that_is_changed_while_training_ends_it_saved(moment, call, monkeypatch, capsys):
    run = "--data ids.bin --batch-size 8 --max-steps 20 --eval-freq 4"
    write("ids.bin", array("H", IDS))
    command(run, out="undisturbed")
    other = bytes(2 * len(IDS) * (2 - call))  # of no length or of the same
    act_at(moment, call, lambda: write("ids.bin", other), monkeypatch)
    assert re.search("ids.bin.*saved", refused(capsys, SIZES, run)) and weights("out/checkpoint.pt")
    write("ids.bin", array("H", IDS))
    command(run, "--resume")
    assert_same_run("out", "undisturbed")


# ------------------------------------------------------------------------------------ surroundings
def surroundings():
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    settings = torch.get_float32_matmul_precision(), torch.get_default_dtype()
    return handlers, settings, sys.stdout, sys.stderr, torch.get_rng_state().tolist()


def test_run_leaves_no_trace_and_needs_no_main_thread_and_no_console(both, monkeypatch):
    before, written = surroundings(), io.StringIO()
    command(SIX, "--seed 7", out="other")
    thread = threading.Thread(target=command, args=[SIX], kwargs={"out": "thread"})
    thread.start()
    thread.join()
    for name, stream in (("none", None), ("string", written)):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            patch.setitem(sys.modules, "numpy", None)  # as if it were absent
            command(SIX, out=name)
    for name in ("thread", "none", "string"):
        assert_same_run(name, both / "half")
    assert "Ep 1 (Step 000000)" in written.getvalue() and surroundings() == before
    assert read_losses("other")["val_losses"] != read_losses("none")["val_losses"]


def test_run_does_not_depend_on_its_environment(both, monkeypatch):
    changes = {"MPLBACKEND": "absent", "RANK": "0", "PYTHONWARNINGS": "error", "LC_ALL": "C"}
    for name, value in (changes | {"PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HOME", raising=False)
    assert finish(start(SCRIPT, SIZES, SIX))[::2] == (0, "")
    assert_same_run("out", both / "half")
    assert Path("out/loss-plot.png").exists()


# --------------------------------------------------------------------------------- weights, in, out
OURS = {"context_length": 16, "emb_dim": 16, "n_heads": 2, "n_layers": 2}
FROM = "--init-from theirs --data short.txt --device cpu"
VARIANTS = "new,bare,buffers,tied,float16,padded,bin,saved tied,saved shards,saved bfloat16"
GPT2 = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 50257,
    "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2, "tie_word_embeddings": False,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="transformers isn't installed")


def gpt2_weights(vocab_size=50257):
    """Random weights for GPT2 by Hugging Face's names; no bias is 0, no LayerNorm 1."""
    vectors = {"ln_1": 16, "ln_2": 16, "attn.c_attn": 48, "attn.c_proj": 16, "mlp.c_fc": 64}
    shapes = {"wte.weight": (vocab_size, 16), "wpe.weight": (16, 16)}
    for name, width in [(f"h.{n}.{k}", v) for n in (0, 1) for k, v in vectors.items()]:
        shapes[f"{name}.weight"] = (width,) if "ln" in name else (16, width)
        shapes[f"{name}.bias"] = (width,)
    for h in ("h.0", "h.1"):
        shapes |= {f"{h}.mlp.c_proj.weight": (64, 16), f"{h}.mlp.c_proj.bias": (16,)}
    shapes |= {"ln_f.weight": (16,), "ln_f.bias": (16,)}
    torch.manual_seed(5)
    state = {f"transformer.{n}": 0.3 * torch.randn(shape) for n, shape in shapes.items()}
    state |= {n: 1 + w for n, w in state.items() if re.search(r"ln_.\.weight", n)}
    return state | {"lm_head.weight": 0.3 * torch.randn(vocab_size, 16)}


def write_gpt2(folder, state, form="model.safetensors", **changes):
    Path(folder).mkdir()
    Path(folder, "config.json").write_text(json.dumps(GPT2 | changes))
    (torch.save if form.endswith(".bin") else save_file)(state, Path(folder, form))


def windows_of(text):
    """(inputs, targets) of a text, each window of 16 where the last one ended."""
    ids = torch.tensor(TOKENIZER.encode(text))
    rows = torch.stack([ids[i : i + 17] for i in range(0, len(ids) - 16, 16)])
    return rows[:, :-1], rows[:, 1:]


def losses_of(model):
    """The mean losses of both parts of short.txt, by a model of transformers."""
    with torch.no_grad():
        parts = [(model(x).logits, y) for x, y in map(windows_of, (TEXT[:900], TEXT[900:1000]))]
    return [F.cross_entropy(logits.flatten(0, 1), y.flatten()).item() for logits, y in parts]


@pytest.fixture
def short():
    write("short.txt", TEXT[:1000])
    return [part[:4] for part in windows_of(TEXT[:900])]


@pytest.fixture
def theirs(short):
    """A folder of that name with a GPT-2 as it is written today; return its weights."""
    write_gpt2("theirs", gpt2_weights())
    return gpt2_weights()


@pytest.mark.parametrize("qkv_bias", [False, True])
def test_exported_model_is_the_same_in_transformers(qkv_bias, transformers, short, capsys):
    config = GPT_CONFIG_124M | OURS | {"qkv_bias": qkv_bias, "drop_rate": 0.2}
    model = GPTModel(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    torch.save({"config": config, "model": model.state_dict()}, "ours.pt")
    succeed("--export-hf exported --checkpoint ours.pt")
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs, notes = load("exported", output_loading_info=True)
    assert not any(notes.values()), notes
    assert theirs.config.resid_pdrop == theirs.config.attn_pdrop == 0.2
    capsys.readouterr()
    succeed("--eval-only --data short.txt --device cpu --checkpoint ours.pt")
    assert figures("loss", capsys.readouterr().out) == pytest.approx(losses_of(theirs), abs=2e-5)
    torch.testing.assert_close(theirs(short[0]).logits, model(short[0]), atol=1e-5, rtol=0)
    greedy = theirs.generate(short[0][:1, :6], max_new_tokens=10, do_sample=False)
    assert torch.equal(greedy, generate_text_simple(model, short[0][:1, :6], 10, 16))
    tokenizer = transformers.AutoTokenizer.from_pretrained("exported")
    text = f"{TEXT}{END_OF_TEXT} 12,5\n\n\n x"
    ids = TOKENIZER.encode(text, allowed_special={END_OF_TEXT})
    assert tokenizer(text)["input_ids"] == ids and tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == theirs.generation_config.eos_token_id == 50256


def test_export_takes_no_folder_in_use_and_leaves_none_that_looks_whole(theirs, capsys):
    write("mine/notes", "kept")
    before = contents(".")
    assert "mine" in refused(capsys, "--export-hf mine --checkpoint theirs")
    with disk_for_files_of(3_000_000):
        refused(capsys, "--export-hf exported --checkpoint theirs")
    assert contents(".") == before
    succeed("--export-hf exported --checkpoint theirs")
    assert_close(load_file("exported/model.safetensors"), theirs, 0)


@pytest.mark.parametrize("variant", VARIANTS.split(","))
def test_gpt2_folder_has_the_loss_that_transformers_gives(variant, transformers, short, capsys):
    state = gpt2_weights(50304 if variant == "padded" else 50257)
    changes = {"vocab_size": len(state["lm_head.weight"]), "tie_word_embeddings": "tied" in variant}
    if "tied" in variant:
        state["lm_head.weight"] = state["transformer.wte.weight"]
    if "float16" in variant:
        dtype = getattr(torch, variant.removeprefix("saved "))
        state = {name: weight.to(dtype) for name, weight in state.items()}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2 | changes)).eval()
    model.load_state_dict(state)
    losses = losses_of(model)
    if "saved" in variant:
        size = "2MB" if "shards" in variant else "50GB"
        model.to(state["lm_head.weight"].dtype).save_pretrained("theirs", max_shard_size=size)
        assert len([*Path("theirs").glob("*.safetensors")]) == (3 if "shards" in variant else 1)
    else:
        if variant == "tied":
            del state["lm_head.weight"]
        if variant == "bare":
            state = {name.removeprefix("transformer."): weight for name, weight in state.items()}
        for h in ("transformer.h.0.attn.", "transformer.h.1.attn."):
            if variant in ("buffers", "bin"):
                state[f"{h}bias"] = torch.ones(1, 1, 16, 16).tril().byte()
                state[f"{h}masked_bias"] = torch.tensor(-1e4)
        form = "pytorch_model.bin" if variant == "bin" else "model.safetensors"
        write_gpt2("theirs", state, form, **changes)
    succeed("--eval-only --data short.txt --device cpu --checkpoint theirs")
    assert figures("loss", capsys.readouterr().out) == pytest.approx(losses, abs=2e-5)


UNLIKE = """
activation_function="relu" | n_inner=32 | layer_norm_epsilon=1e-6 | scale_attn_weights=false
scale_attn_by_inverse_layer_idx=true | model_type="llama" | vocab_size=1000 | h.1.ln_2.bias
attn.c_attn.weight | mlp.c_proj.weight | model.safetensors cut | model.safetensors absent
pytorch_model.bin cut | pytorch_model.bin pickled | config.json html | config.json absent
vocab.json html | tokenizer.json html
"""


@pytest.mark.parametrize("case", re.split(r" \| |\n", UNLIKE.strip()))
def test_what_the_model_cannot_compute_or_read_is_refused_by_name(case, capsys):
    (field, _, value), (file, _, damage) = case.partition("="), case.partition(" ")
    state = gpt2_weights(1000 if field == "vocab_size" else 50257)
    for name in [name for name in state if name.endswith(case)]:
        weight = state.pop(name)  # missing, or as nn.Linear has it
        state |= {name: weight.T.contiguous()} if weight.dim() == 2 else {}
    form = file if file == "pytorch_model.bin" else "model.safetensors"
    write_gpt2("theirs", state, form, **({field: json.loads(value)} if value else {}))
    path = Path("theirs", file)
    if damage == "absent":
        path.unlink()
    elif damage:
        torch.save({"x": Code()}, "code.pt")
        path.touch()
        bad = {"cut": path.read_bytes()[:-9], "html": b"<!DOCTYPE html>" * 99}
        path.write_bytes(bad.get(damage) or Path("code.pt").read_bytes())
    word, before = file if damage == "absent" else "" if damage else field, contents(".")
    for use in ("--init-from theirs --data text.txt", "--sample Hi --checkpoint theirs"):
        line = refused(capsys, use, "--device cpu")
        assert word in line and "theirs" in line, line
    assert contents(".") == before  # no out, and no code has run


def test_training_goes_on_from_weights_and_resumes_without_their_file(theirs, capsys):
    succeed("--eval-only --data short.txt --device cpu --checkpoint theirs")
    losses = figures("loss", capsys.readouterr().out)
    succeed(FROM, "--max-steps 4 --out-dir whole")
    succeed(FROM, "--max-steps 2")
    Path("theirs").rename("elsewhere")
    succeed(FROM, "--max-steps 4 --resume")
    assert_same_run("out", "whole")
    assert read_losses("out")["initial"] == pytest.approx(losses, abs=2e-5)
    assert read_losses("out")["final"][0] < losses[0] - 0.05  # it has trained


def test_sizes_come_from_the_weights_but_context_and_dropout_may_be_less(theirs, capsys):
    succeed(FROM, "--context-length 8 --drop-rate 0.2 --max-steps 1 --lr 1e-30")
    model = torch.load("out/model.pt", weights_only=True)
    assert torch.equal(model["model"]["pos_emb.weight"], theirs["transformer.wpe.weight"][:8])
    assert (model["config"]["context_length"], model["config"]["drop_rate"]) == (8, 0.2)
    for size in ("emb-dim 32", "n-layers 3", "n-heads 4", "context-length 17", "model tiny"):
        assert f"--{size.split()[0]}" in refused(capsys, FROM, f"--{size} --out-dir new")
    assert not Path("new").exists()


def test_gradients_of_a_step_are_those_of_transformers(transformers, theirs, short):
    """Seen as what one step of plain gradient descent takes off each weight, by its name there."""
    succeed(FROM, "--max-steps 1 --lr 1e-30")
    content = torch.load("out/model.pt", weights_only=True)
    model = GPTModel(content["config"])
    model.load_state_dict(content["model"])
    sgd = torch.optim.SGD(model.parameters(), lr=1)
    train_model_simple(model, [short], [short], sgd, "cpu", 1, 9, 1, "", TOKENIZER)
    torch.save({"config": content["config"], "model": model.state_dict()}, "after.pt")
    succeed("--export-hf after --checkpoint after.pt")
    after = load_file("after/model.safetensors")
    model = transformers.AutoModelForCausalLM.from_pretrained("theirs").eval()
    F.cross_entropy(model(short[0]).logits.flatten(0, 1), short[1].flatten()).backward()
    ours = {name: weight - after[name] for name, weight in theirs.items()}
    assert max(gradient.abs().max() for gradient in ours.values()) > 0.1
    assert_close(ours, {name: p.grad for name, p in model.named_parameters()}, 1e-6)


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


# ----------------------------------------------------------------------------------------- learning
def test_gpt2s_weights_at_first_and_muon_for_the_matrices_of_the_blocks_alone():
    sizes = "--emb-dim 64 --n-layers 8 --n-heads 2 --context-length 64 --qkv-bias --max-steps 1"
    succeed(sizes, "--data text.txt --device cpu --init gpt2 --lr 1e-30 --optimizer muon")
    states = torch.load("out/checkpoint.pt", weights_only=True)["optimizer"]["state"]
    for name, weight in weights("out/model.pt").items():
        if name.endswith("bias"):
            assert weight.abs().max() < 1e-20, name
        elif "norm" in name:
            assert torch.equal(weight, torch.ones_like(weight)), name
        else:
            adds = name.endswith(("att.out_proj.weight", "ff.2.weight"))  # to the residual stream
            assert weight.std().item() == pytest.approx(0.02 / (4 if adds else 1), rel=0.05), name
        muon = name.startswith("trf_blocks.") and weight.dim() == 2
        assert ("momentum_buffer" in states[name], "exp_avg" in states[name]) == (muon, not muon)


def test_the_rate_warms_up_and_ends_at_its_minimum():
    command("--data text.txt --max-steps 12 --lr 1e-3 --warmup-steps 4 --min-lr 1e-4")
    rates = [row["learning_rate"] for row in steps_of("out")]
    assert rates[:5] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3])
    assert rates[7] + rates[8] == pytest.approx(1.1e-3) and rates[-1] == pytest.approx(1e-4)


def test_resuming_and_recomputing_under_muon_give_the_same_bits(monkeypatch):
    calls, counts, forward = [], [], nn.GELU.forward
    monkeypatch.setattr(nn.GELU, "forward", lambda self, x: calls.append(0) or forward(self, x))
    run = "--data text.txt --batch-size 4 --optimizer muon --init gpt2 --lr 0.01 --max-steps"
    for out, flags in (("kept", "8"), ("cut", "3"), ("cut", "8 --resume"), ("again", "8")):
        calls.clear()
        command(run, flags, "--recompute" if out == "again" else "", out=out)
        counts.append(len(calls))
    assert_same_run("cut", "kept")
    assert_close(weights("again/model.pt"), weights("kept/model.pt"), 0)
    assert steps_of("again") == steps_of("kept")
    assert counts[3] - counts[0] == 16  # two blocks a step once more


def test_reduced_precisions_train_like_float32():
    losses = {}
    for dtype in ("float32", "bfloat16", "float16"):
        command("--data text.txt --max-steps 6 --drop-rate 0 --lr 0.02 --dtype", dtype, out=dtype)
        losses[dtype] = [row["loss"] for row in steps_of(dtype)]
        assert {w.dtype for w in weights(f"{dtype}/model.pt").values()} == {torch.float32}
        assert losses[dtype] == pytest.approx(losses["float32"], abs=0.05)
    assert losses["bfloat16"] != losses["float32"] != losses["float16"]


# -------------------------------------------------------------------------------------------- ranks
def start_ranks(*arguments):
    """Start the command in two processes; each leaves its id in a file, pid-0 or pid-1."""
    script = shlex.join([sys.executable, str(SCRIPT), *words(*arguments)])
    write("each.sh", f"echo $$ >pid-$RANK; exec {script}")
    launch = "-m torch.distributed.run --standalone --nproc-per-node 2 --no-python sh each.sh"
    return start(launch)


def ranks(*arguments):
    status, out, err = finish(start_ranks(*arguments))
    assert status == 0, err
    return out


def send_after(rows, number, process):
    path = Path("out/steps.csv")
    while process.poll() is None and not (path.exists() and path.read_text().count("\n") > rows):
        time.sleep(0.01)
    os.kill(int(Path("pid-1").read_text()), number)
    result = finish(process)
    for name in ("pid-0", "pid-1"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(Path(name).read_text()), 0)
    return result


@pytest.fixture
def ranked(workplace):
    """Flags of a run that has uneven groups of batches, ragged ends of both parts, clipping."""
    for name, windows in (("train", 22), ("val", 9)):  # 5 batches of 4, and 4 + 4 + 1
        write(f"{name}.bin", array("H", (made_up_ids(8 * windows + 4) % 1000).tolist()))
    data = "--data train.bin --val-data val.bin --eval-iter 99 --eval-freq 10 --epochs 7"
    rates = "--lr 3e-3 --warmup-steps 5 --min-lr 1e-4 --grad-clip 0.5 --grad-accum-steps 2"
    return f"{SIZES} {data} {rates} --drop-rate 0"


@needs_posix
def test_one_process_and_two_follow_one_curve(ranked):
    succeed(ranked, "--batch-size 4 --out-dir one")
    ranks(ranked, "--batch-size 2 --out-dir two")
    out = ranks(ranked, "--batch-size 2 --fsdp --out-dir sharded")
    assert out.count("Ep 1 (Step 000000)") == 1
    one = read_losses("one")
    assert len(steps_of("one")) == 21 and one["final"][0] < one["initial"][0] - 0.5
    for other in ("two", "sharded"):
        for part in ("tokens_seen", "train_losses", "val_losses", "initial", "final"):
            assert read_losses(other)[part] == pytest.approx(one[part], abs=1e-5), part
        assert_close(weights(f"{other}/model.pt"), weights("one/model.pt"), 1e-5)
        for row, of_one in zip(steps_of(other), steps_of("one"), strict=True):
            assert row == pytest.approx(of_one, abs=1e-5, rel=1e-4)  # sums of 10^6 squares


@needs_posix
def test_one_rank_killed_or_signalled_ends_all_and_the_run_goes_on_bit_for_bit(ranked, capsys):
    run = f"{ranked} --drop-rate 0.1 --batch-size 2 --fsdp --checkpoint-every 2"
    ranks(run, "--out-dir whole")
    process = start_ranks(run, "--emb-dim 512")
    output_until(process, "Batches of")
    os.kill(int(Path("pid-1").read_text()), signal.SIGTERM)  # while the losses are measured
    assert finish(process)[0] != 0
    status, *_ = send_after(4, signal.SIGKILL, start_ranks(run))
    assert status != 0 and not Path("out/model.pt").exists()
    assert "2 processes" in refused(capsys, "--resume --device cpu")
    status, out, _ = send_after(8, signal.SIGTERM, start_ranks(run, "--resume"))
    assert status != 0 and "Resuming after step" in out and "Stopped after step" in out
    states = torch.load("out/checkpoint.pt", weights_only=True)["random"]
    assert not torch.equal(states[0]["cpu"], states[1]["cpu"])  # each draws masks of its own
    ranks("--resume")
    assert_same_run("out", "whole")


@needs_posix
def test_two_sharded_ranks_under_muon_go_on_from_weights_as_one_does(ranked, theirs):
    run = re.sub("--context-length 8|--epochs 7|--warmup-steps 5", "", ranked)
    run += " --init-from theirs --optimizer muon --max-steps 5"
    succeed(run, "--batch-size 4 --out-dir one")
    ranks(run, "--batch-size 2 --fsdp")
    ours, one = read_losses("out"), read_losses("one")
    assert ours["initial"] == pytest.approx(one["initial"], abs=1e-5)
    assert ours["final"] == pytest.approx(one["final"], abs=1e-3)
    assert ours["final"][0] < ours["initial"][0] - 0.1
    assert_close(weights("out/model.pt"), weights("one/model.pt"), 5e-3)  # bfloat16's rounding


@needs_posix
@pytest.mark.parametrize("flags, word", [("--lr 1e24", "lower --lr"), ("--batch-size 99", "22")])
def test_what_goes_wrong_on_all_ranks_is_said_once(flags, word, ranked):
    run = re.sub("--lr 3e-3 --warmup-steps 5 --min-lr 1e-4 --grad-clip 0.5", "", ranked)
    status, _, err = finish(start_ranks(run, flags, "--checkpoint-every 1"))
    lines = [line for line in err.splitlines() if line.startswith("train_gpt: ")]
    assert status != 0 and len(lines) == 1 and word in lines[0], err
    assert not Path("out/model.pt").exists()
    if "--lr" in flags:  # the last good checkpoint is kept
        assert all(w.isfinite().all() for w in weights("out/checkpoint.pt").values())
