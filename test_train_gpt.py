# ruff: noqa: F403, F405; the names are those that readers of the book import with *
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
import signal
import subprocess
import sys
import threading
import time
import types
from array import array
from concurrent.futures import ThreadPoolExecutor
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
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
ENVIRONMENT = dict.fromkeys(["HTTPS_PROXY", "HTTP_PROXY"], "http://127.0.0.1:9")  # a closed port
ENVIRONMENT |= {"NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1"}
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
    same_losses = (
        Path(folder, "losses.json").read_bytes() == Path(other, "losses.json").read_bytes()
    )
    same_weights = all(torch.equal(ours[name], weight) for name, weight in theirs.items())
    return same_weights and same_losses and rows(folder) == rows(other)


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
def fast_products():
    """Faster float32 products where they are float32: those of the command."""
    before, factors = torch.get_float32_matmul_precision(), torch.full((512, 768), 1 + 2**-20)
    torch.set_float32_matmul_precision("medium")
    if not torch.equal(F.linear(factors, torch.eye(768)), factors):
        torch.set_float32_matmul_precision(before)
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def all_cores(workplace, fast_products):
    torch.set_num_threads(os.cpu_count())


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
    local = {"__qualname__", "__module__", "__name__", *vars(chapter.Progress)}
    assert used - vars(chapter).keys() - vars(builtins).keys() - local == set()


def test_command_trains_exactly_as_the_chapter_alone_does(chapter, fast_products, capsys):
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
    defaults = inspect.signature(create_dataloader_v1).parameters.values()
    names = "txt batch_size=4 max_length=256 stride=128 shuffle=True drop_last=True num_workers=0"
    assert " ".join(map(str, defaults)) == names
    loader = create_dataloader_v1(TEXT, 4, 8, 8, shuffle=False, drop_last=False)
    flat = torch.cat([x for x, _ in loader]).flatten()
    assert len(flat) == len(IDS) // 8 * 8 and torch.equal(flat, torch.tensor(IDS)[: len(flat)])


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
    book = (
        model,
        batches,
        [],
        optimizer(model.parameters(), lr=0.5),
        "cpu",
        1,
        100,
        1,
        "",
        TOKENIZER,
    )
    losses = list(train(*book, progress=Progress(step=0), **options))
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


# ---------------------------------------------------------------------------------- the first run
@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """The command in an empty folder without a network: (folder, status, stdout, stderr)."""
    folder = tmp_path_factory.mktemp("first-run")
    options = "--batch-size 8 --epochs 1 --eval-iter 10 --lr 0.01"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        return folder, *finish(start(SCRIPT, SIZES, options, cwd=folder))


FIRST_RUN = r"""
Device: cpu, float32; model: [\d,]+ parameters
Text: .+
Characters: 20479$
Tokens: \d+$
Batches of \(8, 8\): \d+ for training, \d+ for validation
Training loss: 1[01]\.\d+
Validation loss: 1[01]\.\d+
Ep 1 \(Step 000000\): Train loss \d+\.\d{3}, Val loss \d+\.\d{3}$
Ep 1 \(Step 000005\): Train loss \d+\.\d{3}, Val loss \d+\.\d{3}$
Every effort moves you
Final training loss: \d
Final validation loss: \d
Trained: 80 steps
Training speed: [\d,]+ tokens/s
Peak memory: [\d,]+ MB
Files in out: model.pt .*best.pt .*checkpoint.pt .*losses.json .*steps.csv .*loss-plot.p
To sample from it: .*--sample
To export it: .*--export-hf
To train on: .*--resume
"""


def test_first_run_without_a_network_trains_on_pythons_documentation(first_run):
    folder, status, out, err = first_run
    assert status == 0
    assert len(err.splitlines()) == 1 and "the-verdict.txt" in err
    lines = iter(out.splitlines())
    for pattern in FIRST_RUN.strip().split("\n"):
        assert any(re.match(pattern, line) for line in lines), f"no {pattern} in its place: {out}"
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", out + err)  # the status line is for terminals
    assert sorted(path.name for path in folder.iterdir()) == ["out"]


def test_first_run_lowers_the_loss_and_writes_down_what_it_printed(first_run):
    losses = json.loads((first_run[0] / "out" / "losses.json").read_text())
    line = r"Ep (\d+) \(Step (\d+)\): Train loss ([\d.]+), Val loss ([\d.]+)"
    figures = [map(float, figures) for figures in re.findall(line, first_run[2])]
    epochs, steps, train_losses, val_losses = zip(*figures)
    assert losses["config"]["emb_dim"] == 16 and losses["settings"]["lr"] == 0.01
    assert losses["steps"] == list(steps)
    assert losses["train_losses"] == pytest.approx(train_losses, abs=6e-4)
    assert losses["val_losses"] == pytest.approx(val_losses, abs=6e-4)
    assert losses["tokens_seen"] == [(step + 1) * 64 for step in steps]
    assert [math.ceil(epoch) for epoch in losses["epochs"]] == list(epochs)
    assert train_losses[-1] < train_losses[0] - 1
    header, *table = rows(first_run[0] / "out")
    assert header == "step,tokens,loss,learning_rate,grad_norm"
    table = [row.split(",") for row in table]
    assert [int(row[0]) for row in table] == list(range(len(table)))
    assert [int(row[1]) for row in table] == [64 * (n + 1) for n in range(len(table))]
    assert float(table[0][2]) > float(table[-1][2]) + 1 and {row[3] for row in table} == {"0.01"}
    assert f"Trained: {len(table)} steps, {64 * len(table):,} tokens" in first_run[2]


def test_first_run_saves_a_model_that_loads_and_pictures_that_open(first_run):
    from matplotlib.image import imread

    content = torch.load(first_run[0] / "out" / "model.pt", weights_only=True)
    GPTModel(content["config"]).load_state_dict(content["model"])
    assert (first_run[0] / "out" / "loss-plot.pdf").read_bytes().startswith(b"%PDF")
    height, width, _ = imread(first_run[0] / "out" / "loss-plot.png").shape
    assert 300 < height < width < 4000


def test_sample_command_that_it_printed_continues_the_text(first_run, monkeypatch, capsys):
    monkeypatch.chdir(first_run[0])
    typed = re.search("To sample from it: (.*)", first_run[2])[1]
    assert shlex.split(typed)[:2] == [sys.executable, str(SCRIPT)]
    options = words("--device cpu --temperature 1 --top-k 40 --max-new-tokens 30 --seed")
    samples = []
    for seed in ("1", "1", "2"):
        assert train_gpt.main([*shlex.split(typed)[2:], *options, seed]) == 0
        printed = capsys.readouterr()
        assert "model.pt" in printed.err  # which model it took
        samples.append(printed.out)
    assert samples[0] == samples[1] != samples[2]
    assert samples[0].startswith("Every effort moves you") and len(samples[0]) > 60
    assert train_gpt.main(["--sample", "-hello", "--checkpoint", "out/best.pt"]) == 0
    assert capsys.readouterr().out.startswith("-hello")


def test_evaluation_is_one_figure_for_any_batch_size(first_run, monkeypatch, capsys):
    monkeypatch.chdir(first_run[0])
    final = [float(x) for x in re.findall(r"Final \w+ loss: ([\d.]+)", first_run[2])]
    for size in (1, 2, 3, 7, 999):
        assert train_gpt.main(words(f"--eval-only --device cpu --batch-size {size}")) == 0
        out = capsys.readouterr().out
        losses = [float(x) for x in re.findall(r"loss: ([\d.]+)", out)]
        assert losses == pytest.approx(final, abs=1e-5)
        perplexities = [float(x) for x in re.findall(r"perplexity: ([\d.]+)", out)]
        assert perplexities == pytest.approx([math.exp(loss) for loss in losses], rel=1e-4)


def test_evaluation_takes_the_runs_own_text_or_says_that_it_is_gone(capsys):
    Path("own.txt").write_bytes(TEXT[:1500].encode())
    final = command("--data own.txt --train-ratio 0.7 --max-steps 2")["final"]
    capsys.readouterr()
    assert train_gpt.main(words("--eval-only --device cpu")) == 0
    out = capsys.readouterr().out
    assert [float(x) for x in re.findall(r"loss: ([\d.]+)", out)] == pytest.approx(final, abs=1e-5)
    assert "own.txt" in out
    assert train_gpt.main(words("--eval-only --device cpu --data text.txt")) == 0
    assert "text.txt" in capsys.readouterr().out
    for change in (lambda: Path("own.txt").write_bytes(b"Other. " * 99), Path("own.txt").unlink):
        change()
        line = refused(capsys, "--eval-only --device cpu --checkpoint out/model.pt")
        assert "own.txt" in line and "--data" in line


def test_best_model_is_never_worse_than_the_last_by_the_measure_of_the_end(capsys):
    """Each evaluation looks at one batch of validation data, the last one at all of them."""
    final = command("--data text.txt --lr 0.03 --epochs 4 --eval-freq 7 --eval-iter 1")["final"]
    capsys.readouterr()
    assert train_gpt.main(words("--eval-only --device cpu --checkpoint out/best.pt")) == 0
    best = float(re.search(r"Validation loss: ([\d.]+)", capsys.readouterr().out)[1])
    assert best < final[1] - 0.005  # it got worse, or this shows nothing


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
    shown, steps = b"", set()
    try:
        while chunk := os.read(ours, 9999):
            shown += chunk
            steps = set(re.findall(rb"\rstep (\d+)", shown))
            if len(steps) == 3:
                process.send_signal(signal.SIGTERM)
    except OSError:  # the process has ended
        os.close(ours)
    assert process.wait(60) == 143
    assert b"\x1b" not in shown and b"step -" not in shown
    final = []  # what is left on the screen
    for line in shown.decode().replace("\r\n", "\n").split("\n"):
        screen = ""
        for part in line.split("\r"):
            screen = part + screen[len(part) :]
        final.append(screen.rstrip())
    assert any(
        re.fullmatch(r"Ep 1 \(Step 000000\): Train loss [\d.]+, Val loss [\d.]+", x) for x in final
    )
    assert not [x for x in final if re.match("step|starting|encoding|building|measuring|saving", x)]


# ------------------------------------------------------------------------------------------- texts
def token_ids(*data, to="ids.bin"):
    """The ids that --write-tokens writes."""
    Path(to).unlink(missing_ok=True)
    assert train_gpt.main(["--data", *map(str, data), "--write-tokens", to]) == 0
    return array("H", Path(to).read_bytes()).tolist()


PARTS = [
    "word", "Word", "a", "é", "e\u0301", "文字", "かな", "𝒳", "ß", "0", "123", "²", "٣", "👩‍👧", "🙂",
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
            Path(f"{name}.txt").write_bytes(text.encode())
        whole = "<|endoftext|>".join(texts).replace("\r\n", "\n").replace("\r", "\n")
        expected = TOKENIZER.encode(whole, allowed_special="all")
        assert token_ids(*(f"{name}.txt" for name in range(len(texts)))) == expected, texts


@pytest.fixture
def books(workplace):
    """A folder with three texts, and with what is no text; return the ids of the texts."""
    files = {"1.txt": TEXT, "2.TXT": "Second: " + TEXT, "deep/3.txt": "Third: " + TEXT}
    others = ["notes.md", ".hidden.txt", ".ipynb_checkpoints/1.txt", "deep/.git/x.txt"]
    for name, text in {**files, **dict.fromkeys(others, "Other. " * 99)}.items():
        path = workplace / "books" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return TOKENIZER.encode("<|endoftext|>".join(files.values()), allowed_special="all")


def test_folders_and_token_files_train_alike_and_say_what_they_took(books, capsys):
    header = array("i", [20240520, 1, len(books), *[0] * 253]).tobytes()
    Path("raw.bin").write_bytes(array("H", books).tobytes())
    Path("llmc.bin").write_bytes(header + array("H", books).tobytes())
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
    monkeypatch.setenv("HOME", str(Path.cwd()))
    monkeypatch.setenv("USERPROFILE", str(Path.cwd()))
    Path("bom.txt").write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
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


def test_separate_validation_data_leaves_all_of_the_text_to_training(capsys):
    Path("val.txt").write_bytes(TEXT[:1000].encode())
    command("--data text.txt --val-data val.txt --max-steps 1")
    windows, val_windows = ((len(TOKENIZER.encode(t)) - 1) // 8 for t in (TEXT, TEXT[:1000]))
    expected = f"{windows // 2} for training, {math.ceil(val_windows / 2)} for validation"
    assert expected in capsys.readouterr().out


def test_windows_never_straddle_two_sources(monkeypatch):
    """Each source counts up from a thousand of its own."""
    for number, length in enumerate((30, 15, 7, 44), start=1):
        ids = range(1000 * number, 1000 * number + length)
        Path(f"{number}.bin").write_bytes(array("H", ids).tobytes())
    seen, plain = [], train_gpt.calc_loss_batch

    def calc_loss_batch(inputs, targets, *more):
        seen.extend(torch.cat([inputs, targets[:, -1:]], dim=1).tolist())
        return plain(inputs, targets, *more)

    monkeypatch.setattr(train_gpt, "calc_loss_batch", calc_loss_batch)
    command("--data 1.bin 2.bin 3.bin --val-data 4.bin --batch-size 1 --epochs 1")
    assert all(window == list(range(window[0], window[0] + 9)) for window in seen)
    starts = {1000, 1008, 1016, 2000} | {4000 + 8 * n for n in range(5)}
    assert {window[0] for window in seen} == starts


@pytest.mark.parametrize("name, word", [("text.txt", "SHA-256"), ("absent", "404")])
def test_other_answer_than_the_verdict_is_not_taken_for_it(name, word, monkeypatch, capsys):
    with ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(
            train_gpt, "VERDICT_URL", f"http://127.0.0.1:{server.server_port}/{name}"
        )
        command("--max-steps 1")
        server.shutdown()
    printed = capsys.readouterr()
    assert word in printed.err and "Characters: 20479\n" in printed.out
    assert not Path("the-verdict.txt").exists()


# ----------------------------------------------------------------------------------------- mistakes
@pytest.fixture
def bad_files(workplace):
    """Files that the table of mistakes names."""
    uint32, uint16, header = array("I", IDS), array("H", IDS), [20240520, 1, 999, *[0] * 253]
    files = {
        "empty.txt": b"", "latin.txt": "naïve ".encode("latin-1") * 99, "short.txt": b"Hi",
        "mark.txt": TEXT.encode("utf-16"), "nomark.txt": TEXT.encode("utf-16-le"),
        "gz.txt": gzip.compress(TEXT.encode()), "copy.txt": TEXT.encode(),
        "npy.bin": b"\x93NUMPY" + uint16.tobytes(), "parquet.txt": b"PAR1" + bytes(range(256)),
        "uint32.bin": uint32.tobytes(), "text.bin": TEXT.encode(), "odd.bin": b"\0\0\0",
        "beyond.bin": b"\xff\xff" * 999, "empty.bin": b"", "cut.bin": array("i", header).tobytes() + bytes(99 * 2),
        "short.bin": b"\0\0" * 5, "file": b"taken", "junk.pt": b"junk" * 99,
        "hollow/README": b"no text", "held/best.pt": b"of an earlier run", "held/.lock": b"",
    }  # fmt: skip
    for name, content in files.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(content)


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
start-context: --start-context=
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
empty: --data empty.txt | --write-tokens x.bin --data empty.txt
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
CASES = [(case.strip(), line.split(": ", 1)[0]) for line in MISTAKES.strip().split("\n")
         for case in line.split(": ", 1)[1].split("|")]  # fmt: skip


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


# ------------------------------------------------------------------------------ folders, checkpoints
HALF = "--data text.txt --batch-size 8 --grad-accum-steps 4 --eval-freq 3 --epochs 9"


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A folder with text.txt, with half/ of 6 steps of training and whole/ of all 12."""
    folder = tmp_path_factory.mktemp("both")
    (folder / "text.txt").write_bytes(TEXT.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        command(HALF, "--max-steps 6", out="half")
        command(HALF, "--max-steps 12", out="whole")
    return folder


@pytest.fixture
def resumable(both, workplace):
    """A copy of half/."""
    for path in (both / "half").iterdir():
        (workplace / "half").mkdir(exist_ok=True)
        (workplace / "half" / path.name).write_bytes(path.read_bytes())
    return both / "whole"


def test_folder_that_another_run_uses_is_refused(capsys):
    process = start(SCRIPT, SIZES, "--data text.txt --epochs 9999")
    output_until(process, "Ep 1")
    for more in ("", "--overwrite", "--resume"):
        assert "another run" in refused(capsys, SIZES, "--data text.txt", more)
    process.terminate()
    assert finish(process)[0] == 143
    assert "--resume" in refused(capsys, SIZES, "--data text.txt")


def test_overwriting_replaces_the_runs_files_alone_and_only_by_a_run_that_trains(resumable, capsys):
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


def test_resuming_begins_a_run_where_there_is_none_and_else_goes_on(resumable, capsys):
    command(HALF, "--max-steps 12 --resume")
    assert "beginning" in capsys.readouterr().out and same_run("out", resumable)
    Path("moved").mkdir()  # as a symbolic link, on a larger disk; the text at another place
    Path("half/checkpoint.pt").rename("moved/checkpoint.pt")
    Path("half/checkpoint.pt").symlink_to(Path("moved/checkpoint.pt").resolve())
    before = Path("moved/checkpoint.pt").read_bytes()
    Path("text.txt").rename("elsewhere.txt")
    command("--resume --max-steps 12 --data elsewhere.txt", out="half")
    assert Path("half/checkpoint.pt").is_symlink()
    assert Path("moved/checkpoint.pt").read_bytes() != before
    assert torch.equal(weights("half/model.pt")["out_head.weight"],
                       weights(resumable / "model.pt")["out_head.weight"])  # fmt: skip


def test_resuming_with_other_data_or_settings_is_refused(resumable, capsys):
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
    """Unpickled, it makes a folder."""

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
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_bad_checkpoint_is_refused_and_runs_no_code(damage, resumable, capsys):
    path = Path("half/checkpoint.pt")
    bad = DAMAGES[damage](path.read_bytes(), torch.load(path, weights_only=True))
    path.write_bytes(bad) if isinstance(bad, bytes) else torch.save(bad, path)
    before = contents(".")
    for mode in ("--sample Hi --checkpoint half/checkpoint.pt", "--resume --out-dir half"):
        assert "checkpoint.pt" in refused(capsys, mode)
    assert contents(".") == before


@pytest.mark.parametrize("part", ["settings", "progress", "optimizer", "random"])
def test_checkpoint_that_lacks_what_resuming_needs_is_refused(part, resumable, capsys):
    path = Path("half/checkpoint.pt")
    torch.save({**torch.load(path, weights_only=True), part: None}, path)
    assert "checkpoint.pt" in refused(capsys, "--resume --max-steps 12 --out-dir half")


@needs_linux
@pytest.mark.parametrize("megabytes, missing", [(1, "model.pt, best.pt, checkpoint.pt"),
                                                (9, "checkpoint.pt")])  # fmt: skip
def test_full_disk_leaves_old_files_whole_and_the_last_line_says_what_is_missing(
    megabytes, missing, resumable, capsys
):
    """A limit on the size of files makes writing fail as a full disk does."""
    import resource

    before, limits = contents("half"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (megabytes << 20, limits[1]))
    try:
        with pytest.raises(SystemExit) as exit:
            train_gpt.main(words("--resume --max-steps 12 --checkpoint-every 2 --out-dir half"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    printed, after = capsys.readouterr(), contents("half")
    assert exit.value.code == 2 and "(Step 000009)" in printed.out
    *warned, last = printed.err.splitlines()
    assert missing in last and ("model.pt" in last) == (megabytes == 1) and len(warned) >= 2
    kept = [path for path in before if path.name in missing]
    assert all(after[path] == before[path] for path in kept)
    assert {path.name for path in after} == {path.name for path in before} | {"model.pt"}


# --------------------------------------------------------------------------------- interrupted
@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(out-dir, results) of a run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "text.txt").write_bytes(TEXT.encode())
    status, out, err = finish(start(SCRIPT, SIZES, LONG, cwd=folder))
    assert (status, err) == (0, "")
    return folder / "out", results(out)


WAYS = {  # what happens, one after the other, and the exit status
    "SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129, "SIGUSR1": 138, "SIGXCPU": 152,
    "SIGTERM SIGTERM": 143, "close": 0, "close SIGINT": 130, "/dev/full": 0,
}  # fmt: skip


@needs_posix
@pytest.mark.parametrize("way", WAYS)
def test_run_disturbed_in_any_way_saves_all_and_goes_on_exactly(way, undisturbed, capsys):
    """ "close" is what `| head` does, "close SIGINT" is Ctrl-C under `| tee`."""
    lost = way.startswith(("close", "/dev"))
    with open(way if way == "/dev/full" else os.devnull, "w") as full:
        process = start(SCRIPT, SIZES, LONG, **{"stdout": full} if way == "/dev/full" else {})
    before = "" if way == "/dev/full" else output_until(process, r"Ep 1 \(Step 000004\)")
    for event in way.split():
        if event == "close":
            process.stdout.close()
            process.stdout = None
        elif event != "/dev/full":
            process.send_signal(getattr(signal, event))
            time.sleep(0.05)
    status, out, err = finish(process)
    assert status == WAYS[way] and "Traceback" not in err
    assert err.count("output is lost") == lost
    if status:
        assert not Path("out/model.pt").exists() and Path("out/loss-plot.pdf").exists()
        typed = re.findall("to go on: (.*)", out or "") or [shlex.join(
            [sys.executable, *words(SCRIPT, SIZES, LONG, "--resume")])]  # fmt: skip
        assert shlex.split(typed[0])[:2] == [sys.executable, str(SCRIPT)]
        capsys.readouterr()
        assert train_gpt.main(shlex.split(typed[0])[2:]) == 0
        rest = capsys.readouterr().out
        assert lost or results(before + out + rest) == undisturbed[1]
    assert same_run("out", undisturbed[0])


@needs_posix
@pytest.mark.parametrize("stage", ["reading", "encoding", "measuring"])
def test_signal_before_training_ends_at_once_and_leaves_nothing(stage):
    os.mkfifo("pipe")
    Path("large.txt").write_bytes((TEXT * 50).encode())
    Path("huge.txt").write_bytes((TEXT * 5000).encode())
    before = set(Path().rglob("*"))
    if stage == "reading":
        process = start(SCRIPT, SIZES, "--data pipe --max-steps 1")
        writer = open("pipe", "wb")  # noqa: SIM115; waits for the reader, whom it keeps waiting
    elif stage == "encoding":
        process = start(SCRIPT, "--data huge.txt --write-tokens ids.bin")
        while process.poll() is None and set(Path().rglob("*")) == before:
            time.sleep(0.01)
    else:
        process = start(SCRIPT, SIZES, "--data large.txt --eval-iter 9999")
        output_until(process, "Batches")
    process.terminate()
    status, _, err = finish(process)
    if stage == "reading":
        writer.close()
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
    ids, plain, calls = array("H", IDS).tobytes(), getattr(train_gpt, moment), []
    Path("ids.bin").write_bytes(ids)
    command(run, out="whole")

    def cut_and_call(*arguments, **options):
        calls.append(0)
        if len(calls) == 2:
            os.truncate("ids.bin", 100)
        return plain(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(train_gpt, moment, cut_and_call)
        assert "ids.bin" in refused(capsys, SIZES, run)
    Path("ids.bin").write_bytes(ids)
    command(run, "--resume")
    assert same_run("out", "whole")


# ------------------------------------------------------------------------------------ surroundings
def surroundings():
    """What a run must leave as it was."""
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    settings = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    files = os.listdir("/proc/self/fd") if sys.platform == "linux" else []
    return handlers, settings, sys.stdout, sys.stderr, len(files), torch.get_rng_state().tolist()


def test_run_in_a_process_can_be_repeated_and_leaves_no_trace_there():
    run = "--data text.txt --max-steps 6 --eval-freq 2"
    command(run, out="one")  # what is loaded once is loaded
    before = surroundings()
    command(run, "--deterministic", out="two")
    command(run, out="three")
    assert surroundings() == before
    assert same_run("three", "one")
    assert command(run, "--seed 7")["val_losses"] != command(run, out="four")["val_losses"]


def test_run_needs_neither_the_main_thread_nor_a_console(monkeypatch):
    run = "--data text.txt --max-steps 2"
    command(run, out="plain")
    thread = threading.Thread(target=command, args=[run], kwargs={"out": "thread"})
    thread.start()
    thread.join()
    written = io.StringIO()
    for name, stream in (("none", None), ("string", written)):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            command(run, out=name)
    assert "Ep 1 (Step 000000)" in written.getvalue()
    assert all(same_run(name, "plain") for name in ("thread", "none", "string"))


def test_run_does_not_depend_on_its_environment(monkeypatch):
    run = "--data text.txt --max-steps 6"
    command(run, out="plain")
    changes = {"MPLBACKEND": "absent", "RANK": "0", "PYTHONWARNINGS": "error", "LC_ALL": "C"}
    for name, value in (changes | {"PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HOME", raising=False)
    assert finish(start(SCRIPT, SIZES, run))[::2] == (0, "")
    assert same_run("out", "plain") and Path("out/loss-plot.png").exists()


def test_run_needs_no_docstrings(monkeypatch):
    """Compiled as by python -OO, which would first compile all of torch anew."""
    stripped = types.ModuleType("stripped")
    monkeypatch.setitem(sys.modules, "stripped", stripped)
    code = compile(SCRIPT.read_text(encoding="utf-8"), str(SCRIPT), "exec", optimize=2)
    exec(code, vars(stripped))
    run = "--data text.txt --max-steps 3"
    command(run, out="plain")
    assert stripped.GPTModel.__doc__ is None
    assert stripped.main(words(SIZES, run)) == 0 and same_run("out", "plain")


def test_without_matplotlib_there_is_a_warning_and_no_plot(monkeypatch, capsys):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    command("--data text.txt --max-steps 1")
    printed = capsys.readouterr()
    assert len(printed.err.splitlines()) == 1 and "matplotlib" in printed.err
    assert not Path("out/loss-plot.png").exists()
