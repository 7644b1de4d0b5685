"""Tests of train_gpt.py: `pytest`, in under five minutes on two cores, without a network.

Most call the command in this process, as `train_gpt.main([...])`; what concerns whole processes
(signals, kills, terminals, environments) runs `python train_gpt.py`.
"""

import builtins
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
from array import array
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import train_gpt
from train_gpt import *

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
ENVIRONMENT = {
    "HTTPS_PROXY": "http://127.0.0.1:9",  # a closed port, so that nothing reaches a network
    "HTTP_PROXY": "http://127.0.0.1:9",
    "NO_PROXY": "127.0.0.1",
    "OMP_NUM_THREADS": "1",
}
needs_posix = pytest.mark.skipif(os.name != "posix", reason="no POSIX signals, pipes or limits")
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux' limits and /proc")
needs_mkl = pytest.mark.skipif(
    not torch.backends.mkl.is_available(), reason="the figures were only seen in builds with MKL"
)


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """Each test runs in a folder of its own, offline, with text.txt there."""
    monkeypatch.chdir(tmp_path)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    torch.set_num_threads(1)  # as in the processes that tests start; faster, too, for tiny models
    Path("text.txt").write_bytes(TEXT.encode())
    return tmp_path


def words(*arguments):
    """The words of a command line: strings are split, paths are not."""
    return [w for a in arguments for w in ([str(a)] if isinstance(a, Path) else a.split())]


def command(*arguments, out="out"):
    """Train in this process, which must succeed; return the content of losses.json."""
    assert train_gpt.main(words(SIZES, *arguments, "--out-dir", out)) == 0
    return json.loads(Path(out, "losses.json").read_text())


def refused(capsys, *arguments):
    """Run the command in this process, which must refuse it with one line; return that line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        train_gpt.main(words(*arguments))
    lines = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("train_gpt: "), lines
    return lines[0]


def start(*arguments, **options):
    """Start Python with these arguments; its output is text."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    text = {"encoding": "utf-8", "errors": "replace"}
    return subprocess.Popen([sys.executable, *words(*arguments)], **{**pipes, **text, **options})


def finish(process):
    """Return (exit status, stdout, stderr) of a started process."""
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, out, err


def output_until(process, pattern):
    """Return the process's output up to a line that matches pattern."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if re.match(pattern, line):
            return "".join(lines)
    pytest.fail(f"no line {pattern}: {process.stderr.read()}")


def wait_for(condition):
    """Wait until condition() is true."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it didn't happen within a minute"
        time.sleep(0.01)


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
    same_names = ours.keys() == theirs.keys()
    return (
        same_names
        and all(torch.equal(ours[name], theirs[name]) for name in ours)
        and Path(folder, "losses.json").read_bytes() == Path(other, "losses.json").read_bytes()
        and rows(folder) == rows(other)
    )


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
    x = torch.randn(3, 5, 32)
    assert MultiHeadAttention(32, 64, 16, 0.0, num_heads=4)(x).shape == (3, 5, 64)
    assert TransformerBlock({**GPT_CONFIG_124M, **TINY})(x).shape == (3, 5, 32)
    model = tiny_model()
    assert model(torch.zeros(3, 5, dtype=torch.int64)).shape == (3, 5, 97)
    assert model.tok_emb.weight.shape == model.out_head.weight.shape == (97, 32)
    assert model.pos_emb.weight.shape == (16, 32)


def test_loss_begins_as_a_uniform_guess_has_it_and_falls(capsys):
    losses = command("--data text.txt --lr 0.01 --max-steps 40")
    assert losses["initial"] == pytest.approx([math.log(50257)] * 2, abs=0.5)
    assert losses["final"][0] < losses["train_losses"][1] - 1 < losses["initial"][0] - 1
    assert f"Final validation loss: {losses['final'][1]:.6f}" in capsys.readouterr().out


# ----------------------------------------------------------------------------- published figures
@pytest.fixture
def all_cores(workplace):
    """All cores, and the faster float32 products where they are float32, as in the command."""
    torch.set_num_threads(os.cpu_count())
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    factors = torch.full((512, 768), 1 + 2**-20)
    if not torch.equal(F.linear(factors, torch.eye(768)), factors):
        torch.set_float32_matmul_precision(before)
    yield
    torch.set_float32_matmul_precision(before)


def test_loss_of_the_untrained_124m_model_is_the_published_one(all_cores):
    torch.manual_seed(123)
    model, ids = GPTModel(GPT_CONFIG_124M).eval(), made_up_ids(513)
    with torch.no_grad():
        loss = calc_loss_batch(ids[:512].view(2, 256), ids[1:].view(2, 256), model, "cpu").item()
    assert loss == pytest.approx(10.991942405700684, abs=5e-4)


def test_greedy_sample_of_the_untrained_124m_model_is_the_published_one(all_cores):
    torch.manual_seed(123)
    model = GPTModel({**GPT_CONFIG_124M, "context_length": 1024}).eval()
    ids = generate_text_simple(model, torch.tensor([[15496, 11, 314, 716]]), 10, 1024)
    assert ids[0, 4:].tolist() == [
        27018, 24086, 47843, 30961, 42348, 7267, 49706, 43231, 47062, 34657
    ]  # fmt: skip


@needs_mkl
def test_ten_steps_of_a_tiny_model_have_the_published_losses():
    model, ids = tiny_model(vocab_size=50257), made_up_ids(65)
    batch = ids[:64].view(4, 16), ids[1:].view(4, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    steps = train(
        model, [batch], [], optimizer, "cpu", 10, 100, 1, "", TOKENIZER, progress=Progress(step=0)
    )
    assert list(steps) == pytest.approx(
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


@needs_mkl
def test_published_run_begins_with_the_published_losses(chapter, all_cores, capsys):
    """Written as in the book: text, loaders, model, losses, training; by the chapter alone."""
    path = SCRIPT.with_name("the-verdict.txt")
    if not path.exists():
        pytest.skip("the-verdict.txt is not beside the script: train there once with a network")
    text = path.read_text(encoding="utf-8")
    assert len(text) == 20479
    assert chapter.text_to_token_ids(text, TOKENIZER).shape == (1, 5145)
    cut = int(0.9 * len(text))
    train_loader, val_loader = (
        chapter.create_dataloader_v1(part, 2, 256, 256, shuffle=is_train, drop_last=is_train)
        for part, is_train in ((text[:cut], True), (text[cut:], False))
    )
    assert (len(train_loader), len(val_loader)) == (9, 1)

    torch.manual_seed(123)
    model = chapter.GPTModel(chapter.GPT_CONFIG_124M)
    assert sum(p.numel() for p in model.parameters()) == 162419712
    state = torch.get_rng_state()
    initial = chapter.evaluate_model(model, train_loader, val_loader, "cpu", eval_iter=None)
    assert initial == pytest.approx((10.987583, 10.981106), abs=5e-4)

    torch.set_rng_state(state)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0004, weight_decay=0.1)
    progress = chapter.Progress()
    for _ in chapter.train(
        model, train_loader, val_loader, optimizer, "cpu", num_epochs=10, eval_freq=5, eval_iter=5,
        start_context="Every effort moves you", tokenizer=TOKENIZER, progress=progress,
    ):  # fmt: skip
        if progress.step == 5:
            break
    assert [entry[2] for entry in progress.history] == [512, 3072]
    assert [entry[3] for entry in progress.history] == pytest.approx([9.781002, 8.110534], abs=5e-4)
    assert [entry[4] for entry in progress.history] == pytest.approx([9.932810, 8.338573], abs=5e-4)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
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
    local = {"__qualname__", "__module__", "__name__", *vars(chapter.Progress)}
    assert used - vars(chapter).keys() - vars(builtins).keys() - local == set()


def test_command_trains_exactly_as_the_chapter_alone_does(chapter, capsys):
    """Its loader, made for ranks and for resuming, draws what the book's DataLoader draws."""
    by_command = command("--data text.txt --batch-size 4 --epochs 2 --eval-freq 3")
    printed = results(capsys.readouterr().out)
    cut = int(0.9 * len(TEXT))
    train_loader, val_loader = (
        chapter.create_dataloader_v1(part, 4, 8, 8, shuffle=is_train, drop_last=is_train)
        for part, is_train in ((TEXT[:cut], True), (TEXT[cut:], False))
    )
    torch.manual_seed(123)
    sizes = {"emb_dim": 16, "n_layers": 2, "n_heads": 2, "context_length": 8}
    model = chapter.GPTModel({**chapter.GPT_CONFIG_124M, **sizes})
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=0.1, fused=True)
    losses = chapter.train_model_simple(
        model, train_loader, val_loader, optimizer, "cpu", num_epochs=2, eval_freq=3, eval_iter=5,
        start_context="Every effort moves you", tokenizer=TOKENIZER,
    )  # fmt: skip
    assert losses == tuple(by_command[n] for n in ("train_losses", "val_losses", "tokens_seen"))
    saved = weights("out/model.pt")
    assert all(torch.equal(saved[name], w) for name, w in model.state_dict().items())
    assert results(capsys.readouterr().out) == printed[:-2]


def test_importing_loads_neither_matplotlib_nor_requests():
    code = "import train_gpt, sys; sys.exit({'matplotlib', 'requests'} & sys.modules.keys() != set())"
    assert subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent).returncode == 0


def test_tokenizer_is_gpt2s():
    assert TOKENIZER.n_vocab == 50257
    assert TOKENIZER.encode("Every effort moves you") == [6109, 3626, 6100, 345]
    assert text_to_token_ids("Hello<|endoftext|>", TOKENIZER).tolist() == [[15496, 50256]]
    assert token_ids_to_text(text_to_token_ids(TEXT, TOKENIZER), TOKENIZER) == TEXT
    assert token_ids_to_text(torch.tensor([[15496, 50300]]), TOKENIZER) == "Hello"


def test_targets_are_inputs_shifted_by_one():
    dataset, ids = GPTDatasetV1(TEXT, TOKENIZER, max_length=8, stride=3), torch.tensor(IDS)
    assert len(dataset) == len(range(0, len(ids) - 8, 3))
    for number, (x, y) in enumerate(dataset[i] for i in range(len(dataset))):
        assert x.dtype == y.dtype == torch.int64
        assert torch.equal(x, ids[3 * number :][:8]) and torch.equal(y, ids[3 * number + 1 :][:8])


def test_loader_has_the_published_signature_and_batches():
    parameters = inspect.signature(create_dataloader_v1).parameters
    names = "txt batch_size max_length stride shuffle drop_last num_workers"
    assert list(parameters) == names.split()
    assert [p.default for p in parameters.values()][1:] == [4, 256, 128, True, True, 0]
    loader = create_dataloader_v1(TEXT, 4, 8, 8, shuffle=False, drop_last=False)
    batches = [x for x, _ in loader]
    assert len(batches) == len(loader) and batches[0].shape == (4, 8)
    flat = torch.cat(batches).flatten()
    assert torch.equal(flat, torch.tensor(IDS)[: len(flat)])


@pytest.mark.parametrize("qkv_bias", [False, True])
def test_a_later_token_never_changes_an_earlier_logit(qkv_bias):
    model, ids = tiny_model(qkv_bias=qkv_bias).eval(), torch.arange(16)[None]
    for position in range(1, 16):
        changed = ids.clone()
        changed[0, position] = 96
        before, after = model(ids), model(changed)
        assert torch.equal(before[:, :position], after[:, :position])
        assert not torch.allclose(before[:, position:], after[:, position:])


def test_input_beyond_the_context_and_indivisible_heads_are_value_errors():
    with pytest.raises(ValueError, match="17.*16"):
        tiny_model()(torch.zeros(1, 17, dtype=torch.int64))
    with pytest.raises(ValueError, match="30.*4"):
        MultiHeadAttention(30, 30, 16, 0.0, num_heads=4)


def test_books_weights_load_and_compute_the_same():
    """Its attention has three projections and a mask, its norms and feed-forward other names."""
    model, ids = tiny_model(qkv_bias=True).eval(), torch.arange(16)[None]
    names = {".qkv.": ".W_query.", ".ff.": ".ff.layers."}
    norms = {"weight": "scale", "bias": "shift"}
    published = {"trf_blocks.0.att.mask": torch.ones(16, 16)}
    for name, weight in model.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if "norm" in name:
            name = re.sub("weight|bias", lambda kind: norms[kind[0]], name)
        parts = zip(("query", "key", "value"), weight.chunk(3)) if "W_query" in name else [("", 0)]
        for part, share in parts:
            published[name.replace("query", part)] = share if part else weight
    other = tiny_model(seed=7, qkv_bias=True).eval()
    assert not torch.equal(other(ids), model(ids))
    other.load_state_dict(published)
    assert torch.equal(other(ids), model(ids))


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_has_no_dropout_and_leaves_mode_and_gradients_as_they_were(training):
    model = tiny_model(drop_rate=0.5).train(training)
    batch = made_up_ids(16).view(2, 8) % 97
    calc_loss_batch(batch, batch, model, "cpu").backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    losses = [evaluate_model(model, [(batch, batch)], [], "cpu", 1) for _ in range(2)]
    assert losses[0][0] == losses[1][0] and math.isnan(losses[0][1])
    assert model.training == training
    assert all(torch.equal(p.grad, old) for p, old in zip(model.parameters(), gradients))
    assert calc_loss_batch(batch, batch, model, "cpu").requires_grad


def test_loss_is_the_mean_over_tokens():
    model = tiny_model().eval()
    ids = [made_up_ids(n)[n // 2 :].view(1, -1) % 97 for n in (6, 10, 32)]
    batches = [(x, x.flip(1)) for x in ids]  # of 3, 5 and 16 tokens
    nats = torch.cat([-model(x).log_softmax(-1)[0, range(len(y[0])), y[0]] for x, y in batches])
    loss = calc_loss_loader(batches, model, "cpu")
    assert loss == pytest.approx(nats.mean().item(), abs=1e-6)
    assert calc_loss_loader(batches, model, "cpu", 2) == pytest.approx(nats[:8].mean().item())
    assert math.isnan(calc_loss_loader([], model, "cpu"))


def test_plot_has_two_axes_and_is_saved_in_the_current_folder(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    from matplotlib import pyplot

    plot_losses([0.5, 1.5, 3.5], [10, 30, 70], [3.0, 2.0, 1.0], [3.5, 2.5, 3.0])
    below, above = pyplot.gcf().axes
    try:
        solid, dashed, lowest = below.lines
        assert (solid.get_linestyle(), dashed.get_linestyle()) == ("-", "-.")
        assert solid.get_ydata().tolist() == [3.0, 2.0, 1.0]
        assert (lowest.get_xdata(), lowest.get_ydata()) == ([1.5], [2.5])
        assert (below.get_xlabel(), above.get_xlabel()) == ("Epochs", "Tokens seen")
        assert "nats" in below.get_ylabel()
        assert all(tick == int(tick) for tick in below.get_xticks())
    finally:
        pyplot.close("all")
    assert Path("loss-plot.pdf").read_bytes().startswith(b"%PDF")


def test_plot_of_one_evaluation_shows_a_point():
    from matplotlib.image import imread

    pictures = []
    for number, loss in enumerate((2.0, math.nan)):
        plot_losses([1], [8], [loss], [math.nan], paths=[f"{number}.png"], show=False)
        pictures.append(imread(f"{number}.png")[:, :, :3])
    blue = [((p[:, :, 2] - p[:, :, 0]) > 0.5).sum() for p in pictures]
    assert blue[0] > blue[1]  # more than the legend's line


# ------------------------------------------------------------------------------------ the generator
def trained(batches, optimizer=None, seed=123, **options):
    """Train a model without dropout for an epoch; return (its weights, the steps' losses)."""
    model = tiny_model(seed, drop_rate=0.0)
    optimizer = (optimizer or torch.optim.SGD)(model.parameters(), lr=0.5)
    steps = train(
        model, batches, [], optimizer, "cpu", 1, 100, 1, "", TOKENIZER, progress=Progress(step=0),
        **options,
    )  # fmt: skip
    losses = list(steps)
    return torch.cat([p.detach().flatten() for p in model.parameters()]), losses


@pytest.mark.parametrize("windows", [8, 10, 7])
def test_accumulated_gradients_are_those_of_one_larger_batch(windows):
    """10 windows leave a last group of one batch, 7 also a last batch of one window."""
    ids = made_up_ids(8 * windows + 1) % 97
    small, large = (
        list(create_dataloader_v1(ids, size, 8, 8, shuffle=False, drop_last=False))
        for size in (2, 4)
    )
    (ours, losses), (theirs, expected) = trained(small, grad_accum_steps=2), trained(large)
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert losses == pytest.approx(expected, abs=1e-6)


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
    (ours, losses), (theirs, _) = trained(rows, grad_accum_steps=4), trained([(inputs, targets)])
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert losses == pytest.approx([expected.item()], abs=1e-6)


def test_batch_without_any_target_changes_no_weight():
    nothing = torch.full((2, 8), -100)
    batch = torch.ones(2, 8).long(), nothing
    unchanged, losses = trained([batch], torch.optim.AdamW)
    before = torch.cat([p.detach().flatten() for p in tiny_model(drop_rate=0.0).parameters()])
    assert torch.equal(unchanged, before) and losses == [0]


def test_generator_takes_rates_and_bounds_and_counts():
    batches = [(made_up_ids(16).view(2, 8) % 97,) * 2] * 5
    model, progress, rates = tiny_model(), Progress(), []
    optimizers = [torch.optim.SGD([p], lr=9.0) for p in model.parameters()]
    for _ in train(
        model, batches, batches[:1], optimizers, "cpu", 2, 3, 1, "", TOKENIZER, progress=progress,
        learning_rate=lambda step: step / 10, grad_accum_steps=2, grad_clip=1e-9,
    ):  # fmt: skip
        rates.append({group["lr"] for o in optimizers for group in o.param_groups})
        assert progress.grad_norm > 0.1  # before clipping
    assert rates == [{step / 10} for step in range(6)]
    assert (progress.epoch, progress.batch, progress.step) == (2, 0, 5)
    assert progress.tokens_seen == 10 * 16
    assert [entry[:3] for entry in progress.history] == [(0, 0.4, 32), (3, 1.4, 112)]
    for parameter, before in zip(model.parameters(), tiny_model().parameters()):
        assert torch.allclose(parameter, before, atol=1e-7)


def test_run_stopped_after_any_step_and_gone_on_with_in_a_new_process_is_the_same_run(capsys):
    """15 batches are 4 steps of an epoch, the last one of 3 batches."""
    run = "--data text.txt --epochs 2 --batch-size 8 --grad-accum-steps 4 --eval-freq 2"
    command(run, "--max-steps 8", out="whole")
    whole, stops, firsts = results(capsys.readouterr().out), range(1, 8), []
    for stop in stops:
        command(run, f"--max-steps {stop}", out=f"{stop}")
        firsts.append(results(capsys.readouterr().out))
    resume = "--resume --max-steps 8 --out-dir"
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


class OwnBlock(TransformerBlock):
    def forward(self, x):
        return super().forward(x.flip(-1))


class OwnModel(GPTModel):
    def forward(self, in_idx):
        return super().forward(in_idx).roll(1, dims=-1)


class CachingModel(GPTModel):
    def forward(self, in_idx, caches=None):
        return super().forward(in_idx, caches).roll(1, dims=-1)


def own_blocks(model):
    for number, block in enumerate(model.trf_blocks):
        model.trf_blocks[number] = OwnBlock({**GPT_CONFIG_124M, **TINY})
        model.trf_blocks[number].load_state_dict(block.state_dict())


CHANGES = {
    "hook on a block": lambda m: m.trf_blocks[0].register_forward_hook(lambda *a: -a[2]),
    "hook before a block": lambda m: m.trf_blocks[1].register_forward_pre_hook(
        lambda block, inputs: (inputs[0].flip(-1), *inputs[1:])
    ),
    "subclass of block": own_blocks,
    "subclass of model": lambda m: setattr(m, "__class__", OwnModel),
    "subclass with a cache": lambda m: setattr(m, "__class__", CachingModel),
}


@pytest.mark.parametrize("change", CHANGES)
def test_sampling_follows_hooks_and_subclasses(change):
    model, ids = tiny_model(), made_up_ids(4)[None] % 97
    plain = greedy(model.eval(), ids, 16, 16)
    CHANGES[change](model)
    expected = greedy(model.eval(), ids, 16, 16)
    assert torch.equal(generate(model, ids, 16, 16), expected)
    assert not torch.equal(expected, plain)


def test_sampling_works_with_any_module_that_returns_logits():
    class Successor(nn.Module):
        def forward(self, ids):
            return F.one_hot((ids + 1) % 10, 10).float()

    ids = generate_text_simple(Successor(), torch.tensor([[7], [3]]), 4, 2)
    assert ids.tolist() == [[7, 8, 9, 0, 1], [3, 4, 5, 6, 7]]
    ids = generate(Successor(), torch.tensor([[7], [3]]), 9, 2, eos_id=9)
    assert ids.tolist() == [[7, 8, 9, 9, 9, 9], [3, 4, 5, 6, 7, 8]]  # the first row waits


def test_draws_repeat_with_a_generator_and_come_from_the_likeliest():
    model, ids = tiny_model().eval(), torch.tensor([[5]]).repeat(200, 1)
    drawn = [
        generate(model, ids, 1, 16, 10.0, 3, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert set(drawn[0][:, 1].tolist()) == set(model(ids[:1])[0, -1].topk(3).indices.tolist())


def test_sample_is_printed_on_one_line_and_leaves_the_training_mode(capsys):
    model = tiny_model(vocab_size=50257, drop_rate=0.5).train()
    for _ in range(2):
        generate_and_print_sample(model, TOKENIZER, "cpu", "Every\neffort")
    first, second = capsys.readouterr().out.splitlines()
    assert first == second and first.startswith("Every effort")
    assert model.training
