# ruff: noqa: F403, F405
"""Tests of train_gpt.py: `pytest`, in under five minutes on two cores, without a network.

Most call the command in this process, as `train_gpt.main([...])`; what concerns whole processes
(signals, kills, terminals, environments) runs `python train_gpt.py`.
"""

import builtins
import contextlib
import dis
import gzip
import importlib
import inspect
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
import types
from array import array
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import train_gpt
from train_gpt import *

torch.set_num_threads(1)  # as in the processes that tests start; faster, too, for tiny models
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
    f"--data text.txt --epochs {KILLS + 1} --batch-size 4 --grad-accum-steps 4 --eval-freq 4 "
    "--warmup-steps 3 --min-lr 1e-5 --grad-clip 1 --checkpoint-every 3"
)
ENVIRONMENT = dict.fromkeys(["HTTPS_PROXY", "HTTP_PROXY"], "http://127.0.0.1:9")  # a closed port
ENVIRONMENT |= {"NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1"}
needs_posix = pytest.mark.skipif(os.name != "posix", reason="no POSIX signals, pipes or limits")
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux' limits and /proc")
needs_mkl = pytest.mark.skipif(
    not torch.backends.mkl.is_available(), reason="the figures were only seen in builds with MKL"
)


STARTED = []  # processes


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """Each test runs in a folder of its own, offline, with text.txt there."""
    monkeypatch.chdir(tmp_path)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
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


def command(*arguments, out="out"):
    """Train in this process, which must succeed; return the content of losses.json."""
    assert train_gpt.main(words(SIZES, *arguments, "--out-dir", out)) == 0
    return json.loads(Path(out, "losses.json").read_text())


def refused(capsys, *arguments):
    """Run the command in this process, which must end in one line; return that line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        train_gpt.main(words(*arguments))
    *warnings, line = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and line.startswith("train_gpt: ")
    assert all(line.startswith("train_gpt: warning: ") for line in warnings), warnings
    return line


def start(*arguments, **options):
    """Start Python with these arguments; its output is text."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8", **options}
    environment = {**os.environ, **ENVIRONMENT}
    process = subprocess.Popen([sys.executable, *words(*arguments)], env=environment, **options)
    STARTED.append(process)
    return process


def finish(process):
    """Return (exit status, stdout, stderr) of a started process."""
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def output_until(process, pattern):
    """Return the process's output up to a line that matches pattern."""
    out = ""
    for line in process.stdout:
        out += line
        if re.match(pattern, line):
            return out
    pytest.fail(f"no line {pattern}: {process.stderr.read()}")


def results(out):
    """The lines of an output that tell of losses and samples."""
    return [line for line in out.splitlines() if line.startswith(("Ep ", "Every effort", "Final"))]


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def rows(folder):
    """steps.csv without the seconds."""
    lines = Path(folder, "steps.csv").read_text().splitlines()
    return [line.rpartition(",")[0] for line in lines]


def same_run(folder, other):
    """Final weights bit for bit, losses byte for byte, steps."""
    ours, theirs = weights(Path(folder, "model.pt")), weights(Path(other, "model.pt"))
    same_weights = all(torch.equal(ours[name], weight) for name, weight in theirs.items())
    losses = {Path(run, "losses.json").read_bytes() for run in (folder, other)}
    return same_weights and len(losses) == 1 and rows(folder) == rows(other)


def contents(folder):
    """All that is in a folder."""
    return {path: path.is_file() and path.read_bytes() for path in Path(folder).rglob("*")}


def tiny_model(seed=123, **changes):
    torch.manual_seed(seed)
    return GPTModel({**GPT_CONFIG_124M, **TINY, **changes})


def made_up_ids(count):
    """The token ids of the synthetic golden figures."""
    i = torch.arange(count)
    return (7919 * i * i + 104729 * i) % 50257


# -------------------------------------------------------------------------------------------- smoke
def test_shapes_of_the_modules():
    x, model = torch.randn(3, 5, 32), tiny_model()
    assert MultiHeadAttention(32, 64, 16, 0.0, num_heads=4)(x).shape == (3, 5, 64)
    assert TransformerBlock({**GPT_CONFIG_124M, **TINY})(x).shape == (3, 5, 32)
    assert model(torch.zeros(3, 5, dtype=torch.int64)).shape == (3, 5, 97)


def test_loss_begins_as_a_uniform_guess_has_it_and_falls(capsys):
    losses = command("--data text.txt --lr 0.01 --max-steps 40")
    assert losses["initial"] == pytest.approx([math.log(50257)] * 2, abs=0.5)
    assert losses["final"][0] < losses["train_losses"][1] - 1 < losses["initial"][0] - 1
    assert f"Final validation loss: {losses['final'][1]:.6f}" in capsys.readouterr().out


# ----------------------------------------------------------------------------- published figures
@pytest.fixture
def fast(workplace):
    """All cores, and faster float32 products where they are float32, as the command has them."""
    torch.set_num_threads(os.cpu_count())
    before, factors = torch.get_float32_matmul_precision(), torch.full((512, 768), 1 + 2**-20)
    torch.set_float32_matmul_precision("medium")
    if not torch.equal(F.linear(factors, torch.eye(768)), factors):
        torch.set_float32_matmul_precision(before)
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
    """The loaders to train and to validate, as the book has them."""
    cut = int(0.9 * len(text))
    for part, trains in ((text[:cut], True), (text[cut:], False)):
        options = {"shuffle": trains, "drop_last": trains}
        yield chapter.create_dataloader_v1(part, batch_size, context, context, **options)


@needs_mkl
def test_published_run_begins_with_the_published_losses(chapter, fast, capsys):
    """As in the book: loaders, model, losses, training; by the chapter alone."""
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
    assert [entry[2] for entry in progress.history] == [512, 3072]
    assert capsys.readouterr().out.splitlines() == [
        "Ep 1 (Step 000000): Train loss 9.781, Val loss 9.933",
        "Ep 1 (Step 000005): Train loss 8.111, Val loss 8.339",
    ]


# --------------------------------------------------------------------- the chapter, piece by piece
def globals_used(code):
    """The names that code, and the code in it, looks up outside itself."""
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_NAME", "LOAD_GLOBAL"):
            yield step.argval
    for constant in code.co_consts:
        if inspect.iscode(constant):
            yield from globals_used(constant)


def test_chapter_is_short_and_names_nothing_from_below(chapter):
    source = Path(chapter.__file__).read_text(encoding="utf-8")
    assert 300 < source.count("\n") <= 485
    used = set(globals_used(compile(source, "chapter.py", "exec")))
    known = vars(chapter).keys() | vars(builtins).keys() | vars(chapter.Progress).keys()
    assert used - known <= {"__qualname__"}


def test_command_trains_exactly_as_the_chapter_alone_does(chapter, fast, capsys):
    """Its loader, made for ranks and for resuming, draws what the book's DataLoader draws."""
    torch.set_num_threads(1)
    by_command = command("--data text.txt --batch-size 4 --epochs 2 --eval-freq 3")
    printed = results(capsys.readouterr().out)
    train_loader, val_loader = loaders(TEXT, chapter, 4, 8)
    torch.manual_seed(123)
    sizes = {"emb_dim": 16, "n_layers": 2, "n_heads": 2, "context_length": 8}
    model = chapter.GPTModel({**chapter.GPT_CONFIG_124M, **sizes})
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=0.1, fused=True)
    book = model, train_loader, val_loader, optimizer, "cpu", 2, 3, 5, "Every effort moves you"
    losses = chapter.train_model_simple(*book, TOKENIZER)
    assert losses == tuple(by_command[n] for n in ("train_losses", "val_losses", "tokens_seen"))
    saved = weights("out/model.pt")
    assert all(torch.equal(saved[name], w) for name, w in model.state_dict().items())
    assert results(capsys.readouterr().out) == printed[:-2]


def test_tokenizer_is_gpt2s():
    assert TOKENIZER.encode("Every effort moves you") == [6109, 3626, 6100, 345]
    assert text_to_token_ids("Hello<|endoftext|>", TOKENIZER).tolist() == [[15496, 50256]]
    assert token_ids_to_text(text_to_token_ids(TEXT, TOKENIZER), TOKENIZER) == TEXT
    assert token_ids_to_text(torch.tensor([[15496, 50300]]), TOKENIZER) == "Hello"


@pytest.mark.parametrize("qkv_bias", [False, True])
def test_a_later_token_never_changes_an_earlier_logit(qkv_bias):
    model, ids = tiny_model(qkv_bias=qkv_bias).eval(), torch.arange(16)[None]
    for position in range(1, 16):
        changed = ids.clone()
        changed[0, position] = 96
        before, after = model(ids), model(changed)
        assert torch.equal(before[:, :position], after[:, :position])
        assert not torch.allclose(before[:, position:], after[:, position:])


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_has_no_dropout_and_leaves_mode_and_gradients_as_they_were(training):
    model, batch = tiny_model(drop_rate=0.5).train(training), made_up_ids(16).view(2, 8) % 97
    calc_loss_batch(batch, batch, model, "cpu").backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    losses = [evaluate_model(model, [(batch, batch)], [], "cpu", 1)[0] for _ in range(2)]
    assert losses[0] == losses[1] and model.training == training
    assert all(torch.equal(p.grad, old) for p, old in zip(model.parameters(), gradients))


def test_plot_has_two_axes_and_shows_one_evaluation_too():
    from matplotlib import pyplot

    pyplot.switch_backend("Agg")
    for epochs, train_losses, val_losses in (([0.5, 1.5], [3, 1], [2.5, 3]), ([1], [3], [2.5])):
        plot_losses(epochs, [10] * len(epochs), train_losses, val_losses)
        below, above = pyplot.gcf().axes
        solid, dashed, lowest = below.lines
        assert (solid.get_linestyle(), dashed.get_linestyle()) == ("-", "-.")
        assert solid.get_ydata().tolist() == train_losses
        assert solid.get_marker() == dashed.get_marker() == "o"  # else one point is invisible
        assert (lowest.get_xdata(), lowest.get_ydata()) == (epochs[:1], [2.5])
        assert (below.get_xlabel(), above.get_xlabel()) == ("Epochs", "Tokens seen")
        pyplot.close("all")
    assert Path("loss-plot.pdf").read_bytes().startswith(b"%PDF")


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


def test_batch_without_any_target_changes_no_weight():
    weights, losses = trained(
        [(torch.ones(2, 8).long(), torch.full((2, 8), -100))], torch.optim.AdamW
    )
    before = torch.cat([p.detach().flatten() for p in tiny_model(drop_rate=0.0).parameters()])
    assert torch.equal(weights, before) and losses == [0]


def test_run_stopped_after_any_step_and_gone_on_with_in_a_new_process_is_the_same_run(capsys):
    """15 batches are 3 steps of an epoch, the last one of 3 batches."""
    run = "--data text.txt --epochs 2 --batch-size 8 --grad-accum-steps 6 --eval-freq 2"
    command(run, "--max-steps 6", out="whole")
    whole, stops, firsts = results(capsys.readouterr().out), range(1, 6), []
    for stop in stops:
        command(run, f"--max-steps {stop}", out=f"{stop}")
        firsts.append(results(capsys.readouterr().out))
    resume = "--resume --max-steps 6 --out-dir"
    with ThreadPoolExecutor(2) as pool:
        ended = list(pool.map(lambda stop: finish(start(SCRIPT, f"{resume} {stop}")), stops))
    for stop, first, (status, out, err) in zip(stops, firsts, ended):
        assert (status, err) == (0, "")
        assert same_run(f"{stop}", "whole")
        rest = results(out)
        assert len(rest) > 2 and rest == whole[-len(rest) :]
        evaluations = [line for line in first + rest if line.startswith("Ep")]
        assert evaluations == [line for line in whole if line.startswith("Ep")]


def test_saving_between_two_steps_changes_nothing(capsys):
    run, printed = "--data text.txt --batch-size 8 --epochs 2 --grad-accum-steps 2", []
    for name, saving in (("never", ""), ("always", "--checkpoint-every 1")):
        command(run, saving, out=name)
        printed.append(results(capsys.readouterr().out))
    never, always = weights("never/model.pt"), weights("always/model.pt")
    assert all(torch.equal(never[name], always[name]) for name in never)
    assert printed[0] == printed[1] and rows("never") == rows("always")


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


def test_filled_cache_met_by_several_tokens_is_causal():
    model, ids, caches = tiny_model().eval(), made_up_ids(32).view(2, 16) % 97, []
    with torch.no_grad():
        for start, end in ((0, 4), (4, 9), (9, 10), (10, 16)):
            logits = model(ids[:, start:end], caches)
            torch.testing.assert_close(logits, model(ids[:, :end])[:, -1:], atol=1e-5, rtol=0)


def subclass(part, forward):
    part.__class__ = type("Own", (type(part),), {"forward": forward})


def with_cache(self, in_idx, caches=None):
    return GPTModel.forward(self, in_idx, caches).roll(1, -1)


CHANGES = {
    "hook on a block": lambda m: m.trf_blocks[0].register_forward_hook(lambda *a: -a[2]),
    "subclass of block": lambda m: subclass(
        m.trf_blocks[1], lambda self, x: TransformerBlock.forward(self, x.flip(-1))
    ),
    "subclass of model": lambda m: subclass(m, lambda self, x: with_cache(self, x)),
    "subclass with a cache": lambda m: subclass(m, with_cache),
}


@pytest.mark.parametrize("change", CHANGES)
def test_sampling_follows_hooks_and_subclasses(change):
    model, ids = tiny_model(), made_up_ids(4)[None] % 97
    plain = greedy(model.eval(), ids, 16, 16)
    CHANGES[change](model)
    expected = greedy(model.eval(), ids, 16, 16)
    assert torch.equal(generate(model, ids, 16, 16), expected)
    assert not torch.equal(expected, plain)


def test_sampling_goes_on_until_all_rows_have_drawn_the_end():
    class Successor(nn.Module):
        def forward(self, ids):
            return F.one_hot((ids + 1) % 10, 10).float()

    ids = generate(Successor(), torch.tensor([[7], [3]]), 99, 2, eos_id=9)
    assert ids.tolist() == [[7, 8, 9, 9, 9, 9], [3, 4, 5, 6, 7, 8]]  # the first row waits


def test_draws_repeat_with_a_generator_and_come_from_the_likeliest():
    model, ids = tiny_model().eval(), torch.tensor([[5]]).repeat(200, 1)
    drawn = [
        generate(model, ids, 1, 16, 10.0, 3, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert set(drawn[0][:, 1].tolist()) == set(model(ids[:1])[0, -1].topk(3).indices.tolist())


# ---------------------------------------------------------------------------------- the first run
@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """The command in an empty folder without a network: (folder, status, stdout, stderr)."""
    folder = tmp_path_factory.mktemp("first-run")
    options = "--batch-size 8 --epochs 1 --eval-iter 10 --lr 0.01"
    return folder, *finish(start(SCRIPT, SIZES, options, cwd=folder))


FIRST_RUN = r"""
Device: cpu, float32; model: [\d,]+ parameters
Characters: 20479$
Batches of \(8, 8\): 80 for training, \d+ for validation
Training loss: 1[01]\.\d+
Ep 1 \(Step 000000\): Train loss \d+\.\d{3}, Val loss \d+\.\d{3}$
Ep 1 \(Step 000005\): Train loss \d+\.\d{3}, Val loss \d+\.\d{3}$
Every effort moves you
Final validation loss: \d
Trained: 80 steps, 5,120 tokens
Files in out: model.pt .*best.pt .*checkpoint.pt .*losses.json .*steps.csv .*loss-plot.p
To sample from it: .*--sample
To export it: .*--export-hf
To train on: .*--resume
"""


def test_first_run_without_a_network_trains_on_pythons_documentation(first_run):
    folder, status, out, err = first_run
    lines = iter(out.splitlines())
    assert status == 0 and len(err.splitlines()) == 1 and "the-verdict.txt" in err
    for pattern in FIRST_RUN.strip().split("\n"):
        assert any(re.match(pattern, line) for line in lines), f"no {pattern} in its place: {out}"
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", out + err)  # the status line is for terminals
    assert sorted(path.name for path in folder.iterdir()) == ["out"]


def test_first_run_lowers_the_loss_and_writes_down_what_it_printed(first_run):
    from matplotlib.image import imread

    out = first_run[0] / "out"
    losses = json.loads((out / "losses.json").read_text())
    names = "epochs", "steps", "train_losses", "val_losses"
    line = r"Ep (\d+) \(Step (\d+)\): Train loss ([\d.]+), Val loss ([\d.]+)"
    for name, printed in zip(names, zip(*re.findall(line, first_run[2]))):
        written = map(math.ceil, losses[name]) if name == "epochs" else losses[name]
        assert list(written) == pytest.approx([float(figure) for figure in printed], abs=6e-4)
    assert losses["config"]["emb_dim"] == 16 and losses["settings"]["lr"] == 0.01
    header, *table = (row.split(",") for row in rows(out))
    assert header == ["step", "tokens", "loss", "learning_rate", "grad_norm"]
    assert [row[:2] + row[3:] for row in table] == [
        [str(n), str(64 * n + 64), "0.01", ""] for n in range(80)
    ]
    assert float(table[-1][2]) < float(table[0][2]) - 1
    content = torch.load(out / "model.pt", weights_only=True)
    GPTModel(content["config"]).load_state_dict(content["model"])
    assert (out / "loss-plot.pdf").read_bytes().startswith(b"%PDF")
    height, width, _ = imread(out / "loss-plot.png").shape
    assert 300 < height < width < 4000


def test_sample_command_that_it_printed_continues_the_text(first_run, monkeypatch, capsys):
    monkeypatch.chdir(first_run[0])
    typed = shlex.split(re.search("To sample from it: (.*)", first_run[2])[1])
    options, samples = words("--temperature 1 --top-k 40 --max-new-tokens 30 --seed"), []
    assert typed[:2] == [sys.executable, str(SCRIPT)]
    for seed in ("1", "1", "2"):
        assert train_gpt.main([*typed[2:], *options, seed]) == 0
        printed = capsys.readouterr()
        assert "model.pt" in printed.err  # which model it took
        samples.append(printed.out)
    assert samples[0] == samples[1] != samples[2]
    assert samples[0].startswith("Every effort moves you") and len(samples[0]) > 60
    assert train_gpt.main(["--sample", "-hello", "--checkpoint", "out/best.pt"]) == 0
    assert capsys.readouterr().out.startswith("-hello")


def figures(kind, out):
    return [float(figure) for figure in re.findall(kind + r": ([\d.]+)", out)]


def test_evaluation_is_one_figure_for_any_batch_size(first_run, monkeypatch, capsys):
    monkeypatch.chdir(first_run[0])
    for size in (1, 2, 3, 7, 999):
        assert train_gpt.main(words(f"--eval-only --device cpu --batch-size {size}")) == 0
        out = capsys.readouterr().out
        losses = figures("loss", out)
        assert losses == pytest.approx(figures(r"Final \w+ loss", first_run[2]), abs=1e-5)
        assert figures("perplexity", out) == pytest.approx([*map(math.exp, losses)], rel=1e-4)


def test_evaluation_takes_the_runs_own_text_or_says_that_it_is_gone(capsys):
    write("own.txt", TEXT[:1500])
    final = command("--data own.txt --train-ratio 0.7 --max-steps 2")["final"]
    capsys.readouterr()
    for data, same in (("", True), ("--data text.txt", False)):
        assert train_gpt.main(words("--eval-only --device cpu", data)) == 0
        out = capsys.readouterr().out
        assert (figures("loss", out) == pytest.approx(final, abs=1e-5)) is same
        assert ("own.txt" if same else "text.txt") in out
    for change in (lambda: write("own.txt", "Other. " * 99), Path("own.txt").unlink):
        change()
        line = refused(capsys, "--eval-only --device cpu --checkpoint out/model.pt")
        assert "own.txt" in line and "--data" in line


def test_best_model_is_never_worse_than_the_last_by_the_measure_of_the_end(capsys):
    """Each evaluation looks at one batch of validation data, the last one at all of them."""
    final = command("--data text.txt --lr 0.03 --epochs 4 --eval-freq 7 --eval-iter 1")["final"]
    capsys.readouterr()
    assert train_gpt.main(words("--eval-only --device cpu --checkpoint out/best.pt")) == 0
    assert figures("Validation loss", capsys.readouterr().out)[0] < final[1] - 0.005


def test_long_run_evaluates_about_twenty_times(capsys):
    losses = command("--data text.txt --batch-size 1 --max-steps 300")
    assert 15 <= len(losses["steps"]) <= 25
    assert re.search(rf"every {losses['steps'][1]}\b", capsys.readouterr().out)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_reduced_precision_trains_like_float32(dtype):
    run = "--data text.txt --max-steps 6 --drop-rate 0"
    exact, rounded = command(run, out="exact"), command(run, f"--dtype {dtype}")
    assert rounded["val_losses"] == pytest.approx(exact["val_losses"], abs=0.05)
    assert rounded["val_losses"] != exact["val_losses"]
    assert {w.dtype for w in weights("out/model.pt").values()} == {torch.float32}


@needs_posix
def test_terminal_has_a_status_line_that_moves_without_escape_sequences(monkeypatch):
    import pty

    monkeypatch.setenv("TERM", "dumb")
    ours, theirs = pty.openpty()
    process = start(SCRIPT, SIZES, "--data text.txt --epochs 9999", stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # the process has ended
        while chunk := os.read(ours, 9999):
            shown += chunk
            if len(set(re.findall(rb"\rstep (\d+)", shown))) == 3:
                process.terminate()
    os.close(ours)
    assert process.wait(60) == 143 and b"\x1b" not in shown and b"step -" not in shown
    left = []  # on the screen
    for line in shown.decode().replace("\r\n", "\n").split("\n"):
        left.append("")
        for part in line.split("\r"):
            left[-1] = part + left[-1][len(part) :]
    assert any(
        re.fullmatch(r"Ep 1 \(Step 0+\): Train loss [\d.]+, Val loss [\d.]+ *", x) for x in left
    )
    assert not [x for x in left if re.match("step|starting|encoding|building|measuring|saving", x)]


# ------------------------------------------------------------------------------------------- texts
def token_ids(*data, to="ids.bin"):
    """The ids that --write-tokens writes."""
    Path(to).unlink(missing_ok=True)
    assert train_gpt.main(["--data", *map(str, data), "--write-tokens", to]) == 0
    return array("H", Path(to).read_bytes()).tolist()


PARTS = [
    "word", "Word", "a", "é", "e\u0301", "文字", "かな", "𝒳", "ß", "0", "123", "²", "٣", "🙂",
    " ", "   ", " \n", "\n", "\n\n\n", "\r\n", "\r", "\t", "\xa0", "\u2028", "\u3000", "\x85",
    "...", ",", "!?", ")(", "。", "'", "'s", "'ll", "’re", "1,000.50", "\u200b", "don't", "I'm,",
    "<|endoftext|>", "<|endof", "text|>", "\x1c",
]  # fmt: skip


def test_tokens_in_pieces_are_those_of_the_whole_text(monkeypatch, capsys):
    draw = random.Random(0)
    for number in range(300):
        monkeypatch.setattr(train_gpt, "PIECE_CHARACTERS", 1 + number % 20)
        texts = ["".join(draw.choices(PARTS, k=draw.randint(1, 40))) for _ in range(1 + number % 2)]
        for name, text in enumerate(texts):
            write(f"{name}.txt", text)
        whole = "<|endoftext|>".join(texts).replace("\r\n", "\n").replace("\r", "\n")
        expected = TOKENIZER.encode(whole, allowed_special="all")
        assert token_ids(*(f"{name}.txt" for name in range(len(texts)))) == expected, texts


@pytest.fixture
def books(workplace):
    """A folder with three texts, and with what is no text; return the ids of the texts."""
    files = {"1.txt": TEXT, "2.TXT": "Second: " + TEXT, "deep/3.txt": "Third: " + TEXT}
    others = ["notes.md", ".hidden.txt", ".ipynb_checkpoints/1.txt", "deep/.git/x.txt"]
    for name, text in {**files, **dict.fromkeys(others, "Other. " * 99)}.items():
        write(f"books/{name}", text)
    return TOKENIZER.encode("<|endoftext|>".join(files.values()), allowed_special="all")


def test_folders_and_token_files_train_alike_and_say_what_they_took(books, capsys):
    write("raw.bin", array("H", books))
    write(
        "llmc.bin",
        bytes(array("i", [20240520, 1, len(books), *[0] * 253])) + bytes(array("H", books)),
    )
    runs, outputs = [], []
    for data in ("books", "raw.bin", "llmc.bin"):
        runs.append(command(f"--data {data} --max-steps 6", out=f"out-{data}"))
        outputs.append(capsys.readouterr().out)
        assert f"Tokens: {len(books)}\n" in outputs[-1]
    for name in ("initial", "train_losses", "val_losses", "final"):
        assert runs[0][name] == runs[1][name] == runs[2][name]
    assert "3 files, 4 passed over" in outputs[0] and "1 file)" in outputs[1]
    assert f"Characters: {3 * len(TEXT) + 15}\n" in outputs[0]


def test_file_under_many_names_is_read_once(books, workplace):
    Path("link.txt").symlink_to(workplace / "books" / "1.txt")
    Path("folder").symlink_to(workplace / "books")
    names = ["books", "books/1.txt", workplace / "books/1.txt", "folder", "link.txt", "./books"]
    assert token_ids(*names) == books


def test_byte_order_mark_is_no_text_and_paths_may_start_with_a_tilde(monkeypatch):
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(Path.cwd()))
    write("bom.txt", "\ufeff" + TEXT)
    assert token_ids("bom.txt") == token_ids("~/text.txt", to="home.bin") == IDS
    assert train_gpt.main(words(SIZES, "--data ~/text.txt --max-steps 1 --out-dir ~/new")) == 0
    assert Path("new/model.pt").exists() and not Path("~").exists()


@needs_posix
def test_pipes_and_standard_input_are_read():
    expected = command("--data text.txt --max-steps 3", out="file")
    os.mkfifo("pipe")
    threading.Thread(target=Path("pipe").write_bytes, args=[TEXT.encode()], daemon=True).start()
    piped = command("--data pipe --max-steps 3", out="fifo")
    for name in ("initial", "val_losses", "final"):
        assert piped[name] == expected[name]
    process = start(SCRIPT, "--data - --write-tokens ids.bin", stdin=subprocess.PIPE)
    process.stdin.write(TEXT)
    status, out, err = finish(process)
    assert (status, err) == (0, "")
    assert array("H", Path("ids.bin").read_bytes()).tolist() == IDS


def test_windows_never_straddle_two_sources(monkeypatch):
    """Each source counts up from a thousand of its own."""
    for number, length in enumerate((30, 15, 7, 44), start=1):
        write(f"{number}.bin", array("H", range(1000 * number, 1000 * number + length)))
    seen, plain = [], train_gpt.calc_loss_batch

    def calc_loss_batch(inputs, targets, *more):
        seen.extend(torch.cat([inputs, targets[:, -1:]], dim=1).tolist())
        return plain(inputs, targets, *more)

    monkeypatch.setattr(train_gpt, "calc_loss_batch", calc_loss_batch)
    command("--data 1.bin 2.bin 3.bin --val-data 4.bin --batch-size 1 --epochs 1")
    assert all(window == list(range(window[0], window[0] + 9)) for window in seen)
    assert {window[0] for window in seen} == {1000, 1008, 1016, 2000, *range(4000, 4036, 8)}


# ----------------------------------------------------------------------------------------- mistakes
@pytest.fixture
def bad_files(workplace):
    """Files that the table of mistakes names."""
    files = {
        "empty.txt": "", "short.txt": "Hi", "latin.txt": "naïve ".encode("latin-1") * 99,
        "mark.txt": TEXT.encode("utf-16"), "nomark.txt": TEXT.encode("utf-16-le"),
        "gz.txt": gzip.compress(TEXT.encode()), "copy.txt": TEXT, "text.bin": TEXT,
        "parquet.txt": b"PAR1" * 99, "npy.bin": b"\x93NUMPY" + bytes(array("H", IDS)),
        "uint32.bin": array("I", IDS), "short.bin": bytes(10), "odd.bin": bytes(3), "empty.bin": "",
        "beyond.bin": b"\xff\xff" * 999, "cut.bin": array("i", [20240520, 1, 999, *[0] * 353]),
        "file": "taken", "junk.pt": "junk" * 99, "hollow/README": "no text",
        "held/best.pt": "of an earlier run", "held/.lock": "",
    }  # fmt: skip
    for name, content in files.items():
        write(name, content)


MISTAKES = """
range: --epochs 0 | --epochs -1 | --max-steps 0 | --batch-size 0 | --grad-accum-steps 0 | --lr nan
range: --context-length 0 | --emb-dim 0 | --n-heads 0 | --n-layers 0 | --drop-rate 1 | --lr inf
range: --drop-rate -0.1 | --drop-rate nan | --train-ratio 0 | --train-ratio 1.1 | --lr 0 | --lr -1
range: --train-ratio nan | --warmup-steps -1 | --min-lr -1 | --betas 0.9 1 | --weight-decay -1
range: --weight-decay nan | --grad-clip 0 | --seed -1 | --seed 9223372036854775808 | --eval-iter 0
range: --eval-freq 0 | --log-freq 0 | --checkpoint-every 0 | --sample Hi --temperature nan
range: --sample Hi --temperature -1 | --sample Hi --top-k 0 | --sample Hi --max-new-tokens 0
invalid: --epochs x | --epochs 1.5 | --model gpt3 | --dtype int8
expected: --epochs | --data | --betas 0.9
mean --epochs?: --epoch 3
mean gpt2-small?: --model gpt2-smal
unrecognized: stray | --stride 4 | --sizing 8
device: --device tpu | --device cuda:99 | --device cuda:-1
divisible: --n-heads 3
torchrun: --fsdp
empty: --start-context= | --data empty.txt | --write-tokens x.bin --data empty.txt
means nothing: --checkpoint junk.pt | --temperature 1 | --top-k 3 | --sample Hi --epochs 3
means nothing: --sample Hi --top-k 3 | --eval-only --lr 1 | --export-hf x --data text.txt
don't go together: --overwrite --resume | --sample Hi --eval-only
above --lr: --min-lr 1
steps: --warmup-steps 1
--context-length: --batch-size 9999 | --context-length 99999 | --train-ratio 0.001
--train-ratio: --data short.txt | --data short.bin
there is no: --sample Hi | --eval-only | --sample Hi --checkpoint absent.pt
junk.pt: --sample Hi --checkpoint junk.pt | --eval-only --checkpoint junk.pt
hollow: --sample Hi --checkpoint hollow | --data hollow | --export-hf hollow
absent: --data absent.txt | --data text.txt absent.txt | --val-data absent.txt
no file: --data *.nothing | --data http://127.0.0.1/x
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
MEANT = (line.split(": ", 1) for line in MISTAKES.strip().split("\n"))
CASES = [(case.strip(), word) for word, cases in MEANT for case in cases.split("|")]


@pytest.mark.parametrize("case, word", CASES)
def test_mistake_is_refused_with_one_line_and_nothing_is_written(case, word, bad_files, capsys):
    trains = not re.match("--(sample|eval-only|export-hf|write-tokens)", case)
    before = contents(".")
    line = refused(capsys, f"{SIZES} --data text.txt --max-steps 1" if trains else "", case)
    assert word in line and any(part.strip("-./=") in line for part in case.split()), line
    assert contents(".") == before


def test_too_short_validation_part_is_a_warning_and_gives_nan(capsys):
    losses = command("--data text.txt --train-ratio 1 --max-steps 2")
    printed = capsys.readouterr()
    assert "Val loss nan" in printed.out and len(printed.err.splitlines()) == 1
    assert set(losses["val_losses"]) == {None}  # JSON has no nan


@needs_linux
def test_model_beyond_memory_is_refused(capsys):
    assert "memory" in refused(capsys, SIZES, "--data text.txt --emb-dim 20000000")


def test_diverging_run_stops_and_keeps_the_last_good_checkpoint(capsys):
    assert "--lr" in refused(capsys, SIZES, "--data text.txt --lr 1e24 --checkpoint-every 1")
    assert all(w.isfinite().all() for w in weights("out/checkpoint.pt").values())
    assert not Path("out/model.pt").exists()


# ----------------------------------------------------------------------------- folders, checkpoints
HALF = "--data text.txt --batch-size 8 --grad-accum-steps 4 --eval-freq 3 --epochs 9"


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A folder with text.txt, with half/ of 6 steps of training and whole/ of all 12."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("both"))
        write("text.txt", TEXT)
        command(HALF, "--max-steps 6", out="half")
        command(HALF, "--max-steps 12", out="whole")
        return Path.cwd()


@pytest.fixture
def whole(both, workplace):
    """whole/; with a copy of half/ here."""
    shutil.copytree(both / "half", workplace / "half")
    return both / "whole"


def test_folder_that_another_run_uses_is_refused(capsys):
    write("large.txt", TEXT * 50)
    process = start(SCRIPT, SIZES, "--data large.txt --eval-iter 9999")
    output_until(process, "Batches")  # then it measures for a while, and nothing is in the folder
    for more in ("", "--overwrite", "--resume"):
        assert "another run" in refused(capsys, SIZES, "--data text.txt", more)
    assert process.poll() is None


def test_overwriting_replaces_the_runs_files_alone_and_only_by_a_run_that_trains(whole, capsys):
    Path("half/notes.md").write_text("mine")
    before = contents("half")
    for bad in ("--data absent.txt", "--data text.txt --context-length 9999"):
        refused(capsys, SIZES, bad, "--out-dir half --overwrite")
        assert contents("half") == before
    run = "--data text.txt --max-steps 2 --train-ratio 1"  # so there is no best.pt
    command(run, "--overwrite", out="half")
    command(run, out="new")
    assert same_run("half", "new") and not Path("half/best.pt").exists()
    assert Path("half/notes.md").read_text() == "mine"


def test_resuming_begins_a_run_where_there_is_none_and_else_goes_on(whole, capsys):
    command(HALF, "--max-steps 12 --resume")
    assert "beginning" in capsys.readouterr().out and same_run("out", whole)
    Path("moved").mkdir()  # as a symbolic link, on a larger disk; the text at another place
    Path("half/checkpoint.pt").rename("moved/checkpoint.pt")
    Path("half/checkpoint.pt").symlink_to(Path("moved/checkpoint.pt").resolve())
    before = Path("moved/checkpoint.pt").read_bytes()
    Path("text.txt").rename("elsewhere.txt")
    command("--resume --max-steps 12 --data elsewhere.txt", out="half")
    assert Path("half/checkpoint.pt").is_symlink()
    assert Path("moved/checkpoint.pt").read_bytes() != before
    assert rows("half") == rows(whole)


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


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("owned",)


DAMAGES = {
    "cut short": lambda good, content: good[: len(good) // 2],
    "flipped byte": lambda good, content: good[:500000] + bytes([good[500000] ^ 1]) + good[500001:],
    "bare pickle": lambda good, content: pickle.dumps(Malicious()),
    "empty": lambda good, content: b"",
    "malicious": lambda good, content: {**content, "more": Malicious()},
    "other size": lambda good, content: {**content, "config": {**GPT_CONFIG_124M, "n_layers": 1}},
    "no weights": lambda good, content: {**content, "model": {}},
    "other object": lambda good, content: [1, 2, 3],
    "no settings": lambda good, content: {**content, "settings": None},
    "no progress": lambda good, content: {**content, "progress": None},
    "no optimizer": lambda good, content: {**content, "optimizer": None},
    "no random states": lambda good, content: {**content, "random": None},
}


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
def test_full_disk_leaves_old_files_whole_and_the_last_line_says_what_is_missing(
    megabytes, missing, whole, capsys
):
    """A limit on the size of files makes writing fail as a full disk does."""
    import resource

    before, limits = contents("half"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (megabytes << 20, limits[1]))
    try:
        line = refused(capsys, "--resume --max-steps 12 --out-dir half")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    after = contents("half")
    for name in ("model.pt", "best.pt", "checkpoint.pt"):
        lost = name in [*missing, "checkpoint.pt"]
        assert (name in line) == lost
        assert (after[Path("half", name)] == before[Path("half", name)]) == lost
    assert after.keys() == before.keys()


# --------------------------------------------------------------------------------- interrupted
@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(out-dir, results) of a run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    write(folder / "text.txt", TEXT)
    status, out, err = finish(start(SCRIPT, SIZES, LONG, cwd=folder))
    assert (status, err) == (0, "")
    return folder / "out", results(out)


WAYS = {  # what happens, one after the other, and the exit status
    "SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129, "SIGUSR1": 138, "SIGXCPU": 152,
    "SIGTERM SIGTERM": 143, "close": 0, "close SIGINT": 130, "full": 0,
}  # fmt: skip


@needs_posix
@pytest.mark.parametrize("way", WAYS)
def test_run_disturbed_in_any_way_saves_all_and_goes_on_exactly(way, undisturbed, capsys):
    """Close is what `| head` does, close and SIGINT is Ctrl-C under `| tee`, full is /dev/full."""
    before, lost = "", way.startswith(("close", "full"))
    if way == "full":
        with open("/dev/full", "w") as full:
            process = start(SCRIPT, SIZES, LONG, stdout=full)
    else:
        process = start(SCRIPT, SIZES, LONG)
        before = output_until(process, r"Ep 1 \(Step 000004\)")
    for event in way.split():
        if event == "close":
            process.stdout.close()
            process.stdout = None
        elif event != "full":
            process.send_signal(getattr(signal, event))
            time.sleep(0.05)
    status, out, err = finish(process)
    assert status == WAYS[way] and "Traceback" not in err and err.count("is lost") == lost
    if status:
        assert not Path("out/model.pt").exists() and Path("out/loss-plot.pdf").exists()
        typed = [sys.executable, str(SCRIPT), *words(SIZES, LONG, "--resume")]
        assert lost or shlex.split(re.search("to go on: (.*)", out)[1]) == typed
        capsys.readouterr()
        assert train_gpt.main(typed[2:]) == 0
        assert lost or results(before + out + capsys.readouterr().out) == undisturbed[1]
    assert same_run("out", undisturbed[0])


@needs_posix
@pytest.mark.parametrize("stage", ["reading", "encoding", "measuring"])
def test_signal_before_training_ends_at_once_and_leaves_nothing(stage):
    os.mkfifo("pipe")
    write("large.txt", TEXT * 50)
    write("huge.txt", TEXT * 5000)
    before, writer = set(Path().rglob("*")), contextlib.nullcontext()
    if stage == "reading":
        process = start(SCRIPT, SIZES, "--data pipe --max-steps 1")
        writer = open("pipe", "wb")  # noqa: SIM115
    elif stage == "encoding":
        process = start(SCRIPT, "--data huge.txt --write-tokens ids.bin")
        while process.poll() is None and set(Path().rglob("*")) == before:
            time.sleep(0.01)
    else:
        process = start(SCRIPT, SIZES, "--data large.txt --eval-iter 9999")
        output_until(process, "Batches")
    with writer:
        process.terminate()
        status, _, err = finish(process)
    assert status == 143 and len(err.splitlines()) == 1
    assert set(Path().rglob("*")) == before


@needs_posix
def test_kill_9_at_random_moments_loses_nothing(undisturbed):
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
    assert same_run("out", undisturbed[0])


@pytest.mark.parametrize("moment", ["evaluate_model", "generate_and_print_sample"])
def test_token_file_that_is_cut_while_training_ends_it_saved(moment, monkeypatch, capsys):
    run = "--data ids.bin --batch-size 8 --epochs 3 --eval-freq 4"
    write("ids.bin", array("H", IDS))
    command(run, out="undisturbed")
    plain, calls = getattr(train_gpt, moment), []

    def cut_and_call(*arguments):
        calls.append(0)
        if len(calls) == 2:
            os.truncate("ids.bin", 100)
        return plain(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train_gpt, moment, cut_and_call)
        assert "ids.bin" in refused(capsys, SIZES, run)
    write("ids.bin", array("H", IDS))
    command(run, "--resume")
    assert same_run("out", "undisturbed")


# ------------------------------------------------------------------------------------ surroundings
def surroundings():
    """What a run must leave as it was."""
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    settings = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    return handlers, settings, sys.stdout, sys.stderr, torch.get_rng_state().tolist()


SIX = "--data text.txt --max-steps 6 --eval-freq 2"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The folder of a plain run of six steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("plain"))
        write("text.txt", TEXT)
        command(SIX)
        return Path("out").absolute()


def test_run_in_a_process_can_be_repeated_and_leaves_no_trace_there(plain):
    before = surroundings()
    other = command(SIX, "--deterministic --seed 7", out="other")
    assert command(SIX)["val_losses"] != other["val_losses"]
    assert surroundings() == before and same_run("out", plain)


def test_run_needs_neither_the_main_thread_nor_a_console(plain, monkeypatch):
    thread = threading.Thread(target=command, args=[SIX], kwargs={"out": "thread"})
    thread.start()
    thread.join()
    written = io.StringIO()
    for name, stream in (("none", None), ("string", written)):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            command(SIX, out=name)
    assert "Ep 1 (Step 000000)" in written.getvalue()
    assert all(same_run(name, plain) for name in ("thread", "none", "string"))


def test_run_does_not_depend_on_its_environment(plain, monkeypatch):
    changes = {"MPLBACKEND": "absent", "RANK": "0", "PYTHONWARNINGS": "error", "LC_ALL": "C"}
    for name, value in (changes | {"PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HOME", raising=False)
    assert finish(start(SCRIPT, SIZES, SIX))[::2] == (0, "")
    assert same_run("out", plain) and Path("out/loss-plot.png").exists()


def test_run_needs_no_docstrings(plain, monkeypatch):
    """Compiled as by python -OO, which would first compile all of torch anew."""
    stripped = types.ModuleType("stripped")
    monkeypatch.setitem(sys.modules, "stripped", stripped)
    source = SCRIPT.read_text(encoding="utf-8")
    exec(compile(source, str(SCRIPT), "exec", optimize=2), vars(stripped))
    assert stripped.GPTModel.__doc__ is None
    assert stripped.main(words(SIZES, SIX)) == 0 and same_run("out", plain)


def test_without_matplotlib_there_is_a_warning_and_no_plot(monkeypatch, capsys):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    command("--data text.txt --max-steps 1")
    printed = capsys.readouterr()
    assert len(printed.err.splitlines()) == 1 and "matplotlib" in printed.err
    assert not Path("out/loss-plot.png").exists()
