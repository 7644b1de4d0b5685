"""Tests of train_gpt.py: `pytest`, in under five minutes on two cores, without a network.

Most call the command in this process, as `train_gpt.main([...])`; what concerns whole processes
(start-up, signals, kills, several ranks) runs `python train_gpt.py`.
"""

import inspect
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
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import train_gpt
from train_gpt import *

SCRIPT = Path(train_gpt.__file__)
TOKENIZER = train_gpt.get_tokenizer()
SENTENCES = ["The cat sat,\n", "on the mat. ", "Every effort moves you! ", "don't\n\n", "Naïve 文"]
TEXT = "".join(random.Random(0).choices(SENTENCES, k=240))
SIZES = "--emb-dim 16 --n-layers 2 --n-heads 2 --context-length 8 --device cpu"
TINY = {"vocab_size": 97, "context_length": 16, "emb_dim": 32, "n_heads": 4, "n_layers": 2}
ENVIRONMENT = {
    "HTTPS_PROXY": "http://127.0.0.1:9",  # a closed port, so that nothing reaches a network
    "HTTP_PROXY": "http://127.0.0.1:9",
    "NO_PROXY": "127.0.0.1",
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",  # signals are sent after certain lines
    "MPLBACKEND": "Agg",
}
needs_posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no POSIX signals")
needs_gloo = pytest.mark.skipif(sys.platform == "win32", reason="torchrun needs libuv on Windows")
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


@pytest.fixture
def all_cores(workplace):
    """All cores, and products computed as the command computes them."""
    torch.set_num_threads(os.cpu_count())
    train_gpt.choose_precision(torch.device("cpu"), "float32")


def words(*arguments):
    """The words of a command line: strings are split, paths are not."""
    return [w for a in arguments for w in ([str(a)] if isinstance(a, Path) else a.split())]


def start(*arguments, **options):
    """Start Python with these arguments; its output is text."""
    return subprocess.Popen(
        [sys.executable, *words(*arguments)],
        env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        **options,
    )


def finish(process):
    """Return (exit status, stdout, stderr) of a started process."""
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, out, err


def refused(capsys, *arguments):
    """Run the command in this process, which it must refuse with one line; return that line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        train_gpt.main(words(SIZES, *arguments))
    lines = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2
    assert len(lines) == 1 and "Traceback" not in lines[0], lines
    return lines[0]


def train(*arguments, out="out"):
    """Train in this process; return the content of losses.json."""
    assert train_gpt.main(words(SIZES, *arguments, "--out-dir", out)) == 0
    return read_losses(out)


def read_losses(folder):
    return json.loads(Path(folder, "losses.json").read_text())


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def assert_same_run(folder, other):
    """Final weights bit for bit, losses byte for byte."""
    ours, theirs = weights(Path(folder, "model.pt")), weights(Path(other, "model.pt"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert Path(folder, "losses.json").read_bytes() == Path(other, "losses.json").read_bytes()


def contents(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def tiny_model(seed=123, **changes):
    torch.manual_seed(seed)
    return GPTModel({**GPT_CONFIG_124M, **TINY, **changes})


def made_up_ids(count):
    """The token ids of the synthetic golden figures."""
    i = torch.arange(count)
    return (7919 * i * i + 104729 * i) % 50257


# -------------------------------------------------------------------------------- golden figures


def test_loss_of_the_untrained_124m_model_is_the_published_one(all_cores):
    torch.manual_seed(123)
    model = GPTModel(GPT_CONFIG_124M).eval()
    ids = made_up_ids(513)
    with torch.no_grad():
        loss = calc_loss_batch(ids[:512].view(2, 256), ids[1:].view(2, 256), model, "cpu").item()
    assert loss == pytest.approx(10.991942405700684, abs=5e-4)
    assert loss == pytest.approx(math.log(50257), abs=0.3)  # that of a uniform guess


def test_greedy_sample_of_the_untrained_124m_model_is_the_published_one(all_cores):
    torch.manual_seed(123)
    model = GPTModel({**GPT_CONFIG_124M, "context_length": 1024}).eval()
    ids = generate_text_simple(model, torch.tensor([[15496, 11, 314, 716]]), 10, 1024)
    assert ids[0, 4:].tolist() == [
        27018, 24086, 47843, 30961, 42348, 7267, 49706, 43231, 47062, 34657
    ]  # fmt: skip


@needs_mkl
def test_ten_steps_of_a_tiny_model_have_the_published_losses():
    model = tiny_model(vocab_size=50257)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    ids, losses = made_up_ids(65), []
    for _ in range(10):
        loss = calc_loss_batch(ids[:64].view(4, 16), ids[1:].view(4, 16), model, "cpu")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    expected = [
        11.114697, 11.017437, 10.960505, 10.843269, 10.819546,
        10.748576, 10.702586, 10.629090, 10.599867, 10.503622,
    ]  # fmt: skip
    assert losses == pytest.approx(expected, abs=5e-4)


@pytest.fixture(scope="module")
def verdict(tmp_path_factory):
    """The text of the published run: beside the script, else downloaded, else the tests skip."""
    path = SCRIPT.with_name("the-verdict.txt")
    if not path.exists():
        path = tmp_path_factory.mktemp("verdict") / "the-verdict.txt"
        try:
            train_gpt.download(train_gpt.VERDICT_URL, path, train_gpt.VERDICT_SHA256)
        except OSError as error:
            pytest.skip(f"the-verdict.txt is not beside the script, nor can it be fetched: {error}")
    return path.read_text(encoding="utf-8")


@needs_mkl
def test_published_run_begins_with_the_published_losses(verdict, all_cores, capsys):
    """Written as in the book: text, loaders, model, initial losses, training."""
    assert len(verdict) == 20479
    assert text_to_token_ids(verdict, TOKENIZER).shape == (1, 5145)
    cut = int(0.9 * len(verdict))
    train_loader, val_loader = (
        create_dataloader_v1(part, 2, 256, 256, shuffle=is_train, drop_last=is_train)
        for part, is_train in ((verdict[:cut], True), (verdict[cut:], False))
    )
    assert (len(train_loader), len(val_loader)) == (9, 1)

    torch.manual_seed(123)
    model = GPTModel(GPT_CONFIG_124M)
    assert sum(p.numel() for p in model.parameters()) == 162419712
    state = torch.get_rng_state()
    initial = evaluate_model(model, train_loader, val_loader, "cpu", eval_iter=None)
    assert initial == pytest.approx((10.987583, 10.981106), abs=5e-4)

    torch.set_rng_state(state)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0004, weight_decay=0.1)
    train_losses, val_losses, tokens_seen = train_model_simple(
        model,
        train_loader,
        val_loader,
        optimizer,
        "cpu",
        num_epochs=10,
        eval_freq=5,
        eval_iter=5,
        start_context="Every effort moves you",
        tokenizer=TOKENIZER,
        max_steps=6,
    )
    assert train_losses == pytest.approx([9.781002, 8.110534], abs=5e-4)
    assert val_losses == pytest.approx([9.932810, 8.338573], abs=5e-4)
    assert tokens_seen == [512, 3072]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Ep 1 (Step 000000): Train loss 9.781, Val loss 9.933"


# ------------------------------------------------------------------------------------ the pieces


def test_importing_defines_the_public_names_and_loads_neither_matplotlib_nor_requests():
    code = (
        "from train_gpt import *; import sys; "
        "print(GPT_CONFIG_124M, GPTDatasetV1, create_dataloader_v1, MultiHeadAttention, "
        "TransformerBlock, GPTModel, text_to_token_ids, token_ids_to_text, generate_text_simple, "
        "generate, calc_loss_batch, calc_loss_loader, evaluate_model, generate_and_print_sample, "
        "train_model_simple, plot_losses); "
        "sys.exit('matplotlib' in sys.modules or 'requests' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent, check=True)


def test_sizes_of_gpt2():
    presets = train_gpt.GPT2_CONFIGS
    sizes = [(c["emb_dim"], c["n_layers"], c["n_heads"]) for c in presets.values()]
    assert list(presets) == ["gpt2-small", "gpt2-medium", "gpt2-large", "gpt2-xl"]
    assert sizes == [(768, 12, 12), (1024, 24, 16), (1280, 36, 20), (1600, 48, 25)]
    assert presets["gpt2-small"] == GPT_CONFIG_124M
    assert list(GPT_CONFIG_124M.values()) == [50257, 256, 768, 12, 12, 0.1, False]


def test_tokenizer_is_gpt2s():
    assert TOKENIZER.n_vocab == 50257
    assert TOKENIZER.encode("Every effort moves you") == [6109, 3626, 6100, 345]
    assert text_to_token_ids("Hello<|endoftext|>", TOKENIZER).tolist() == [[15496, 50256]]
    assert token_ids_to_text(text_to_token_ids(TEXT, TOKENIZER), TOKENIZER) == TEXT


def test_dataset_windows_are_views_and_targets_are_inputs_shifted_by_one():
    dataset = GPTDatasetV1(TEXT, TOKENIZER, max_length=8, stride=3)
    ids = torch.tensor(TOKENIZER.encode(TEXT))
    storages = set()
    for number, (x, y) in enumerate(dataset[i] for i in range(len(dataset))):
        assert x.dtype == y.dtype == torch.int64
        assert torch.equal(x, ids[3 * number :][:8]) and torch.equal(y, ids[3 * number + 1 :][:8])
        storages |= {x.untyped_storage().data_ptr(), y.untyped_storage().data_ptr()}
    assert len(dataset) == len(range(0, len(ids) - 8, 3))
    assert len(storages) == 1


def test_loader_has_the_published_signature_and_batches():
    parameters = inspect.signature(create_dataloader_v1).parameters
    defaults = [p.default for p in parameters.values() if p.kind != p.KEYWORD_ONLY]
    names = "txt batch_size max_length stride shuffle drop_last num_workers"
    assert [*parameters][:7] == names.split()
    assert defaults[1:] == [4, 256, 128, True, True, 0]
    loader = create_dataloader_v1(TEXT, 4, 8, 8, shuffle=False, drop_last=False)
    assert isinstance(loader, torch.utils.data.DataLoader)
    batches = [x for x, _ in loader]
    assert len(batches) == len(loader) and batches[0].shape == (4, 8)
    flat = torch.cat(batches).flatten()
    assert torch.equal(flat, torch.tensor(TOKENIZER.encode(TEXT))[: len(flat)])


def test_command_trains_exactly_as_the_functions_do():
    """Its loader, made for ranks and for resuming, draws what the book's DataLoader draws."""
    by_command = train("--data text.txt --batch-size 4 --epochs 2 --eval-freq 3")
    cut = int(0.9 * len(TEXT))
    train_loader, val_loader = (
        create_dataloader_v1(part, 4, 8, 8, shuffle=is_train, drop_last=is_train)
        for part, is_train in ((TEXT[:cut], True), (TEXT[cut:], False))
    )
    torch.manual_seed(123)
    sizes = {"emb_dim": 16, "n_layers": 2, "n_heads": 2, "context_length": 8}
    model = GPTModel({**GPT_CONFIG_124M, **sizes})
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=0.1, fused=True)
    losses = train_model_simple(
        model, train_loader, val_loader, optimizer, "cpu", num_epochs=2, eval_freq=3, eval_iter=5,
        start_context="Every effort moves you", tokenizer=TOKENIZER,
    )  # fmt: skip
    names = "train_losses", "val_losses", "tokens_seen"
    assert losses == tuple(by_command[name] for name in names)


def test_shapes_of_the_modules():
    x = torch.randn(3, 5, 32)
    assert MultiHeadAttention(32, 64, 16, 0.0, num_heads=4)(x).shape == (3, 5, 64)
    assert TransformerBlock({**GPT_CONFIG_124M, **TINY})(x).shape == (3, 5, 32)
    model = tiny_model()
    assert model(torch.zeros(3, 5, dtype=torch.int64)).shape == (3, 5, 97)
    assert model.tok_emb.weight.shape == model.out_head.weight.shape == (97, 32)
    assert model.pos_emb.weight.shape == (16, 32)


@pytest.mark.parametrize("qkv_bias", [False, True])
def test_a_later_token_never_changes_an_earlier_logit(qkv_bias):
    model = tiny_model(qkv_bias=qkv_bias).eval()
    ids = torch.arange(16)[None]
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


def test_loss_is_the_mean_over_tokens_and_batches():
    model = tiny_model().eval()
    batches = [(made_up_ids(n + 8)[n:].view(1, 8) % 97, torch.full((1, 8), n)) for n in range(3)]
    singles = [-model(x).log_softmax(-1)[0, range(8), y[0]].mean().item() for x, y in batches]
    assert calc_loss_loader(batches, model, "cpu") == pytest.approx(sum(singles) / 3, abs=1e-5)
    first = calc_loss_loader(batches, model, "cpu", num_batches=1)
    assert first == pytest.approx(singles[0], abs=1e-5)
    assert math.isnan(calc_loss_loader([], model, "cpu"))


def test_loss_and_gradients_are_those_of_torchs_cross_entropy():
    """Targets of -100 are left out, as later chapters want."""
    model = tiny_model(drop_rate=0.0)
    inputs, targets = made_up_ids(33)[:32].view(4, 8) % 97, made_up_ids(33)[1:].view(4, 8) % 97
    targets[0, 5:] = targets[2, :7] = -100
    expected = nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    expected_gradients = torch.autograd.grad(expected, model.parameters())
    loss = calc_loss_batch(inputs, targets, model, "cpu")
    gradients = torch.autograd.grad(loss, model.parameters())
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_has_no_dropout_and_leaves_mode_and_gradients_as_they_were(training):
    model = tiny_model(drop_rate=0.5).train(training)
    batch = made_up_ids(16).view(2, 8) % 97
    calc_loss_batch(batch, batch, model, "cpu").backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    losses = [evaluate_model(model, [(batch, batch)], [], "cpu", 1) for _ in range(2)]
    assert losses[0][0] == losses[1][0] and math.isnan(losses[0][1])
    assert model.training == training
    assert all(
        torch.equal(p.grad, old) for p, old in zip(model.parameters(), gradients, strict=True)
    )
    assert calc_loss_batch(batch, batch, model, "cpu").requires_grad


def test_float32_products_keep_their_precision():
    """On a CPU with AMX, too, where the faster kernels would round the factors to bfloat16."""
    train_gpt.choose_precision(torch.device("cpu"), "float32")
    torch.manual_seed(0)
    x, w = torch.randn(512, 768), torch.randn(3072, 768)
    exact = nn.functional.linear(x.double(), w.double())
    assert (nn.functional.linear(x, w) - exact).abs().max() < 1e-3  # rounded, it is 0.3


def test_bfloat16_autocast_is_close_to_float32():
    model = tiny_model().eval()
    batch = made_up_ids(64).view(4, 16) % 97
    exact = calc_loss_batch(batch, batch, model, "cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = calc_loss_batch(batch, batch, model, "cpu")
    assert rounded.dtype == torch.float32
    assert 0 < abs(rounded.item() - exact.item()) < 0.02


@pytest.mark.parametrize("windows", [8, 10, 7])
def test_accumulated_gradients_are_those_of_one_larger_batch(windows):
    """10 windows leave a last partial group of one batch, 7 also a last batch of one window."""
    trained = []
    for batch_size, steps in ((2, 2), (4, 1)):
        model = tiny_model(drop_rate=0.0)
        ids = made_up_ids(8 * windows + 1) % 97
        loader = create_dataloader_v1(ids, batch_size, 8, 8, shuffle=False, drop_last=False)
        train_model_simple(
            model,
            loader,
            val_loader=[],
            optimizer=torch.optim.SGD(model.parameters(), lr=0.5),
            device="cpu",
            num_epochs=1,
            eval_freq=100,
            eval_iter=1,
            start_context="",
            tokenizer=TOKENIZER,
            grad_accum_steps=steps,
            sample_freq=100,
        )
        trained.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert torch.allclose(*trained, atol=1e-6)


def test_plot_has_two_axes_and_is_saved_in_the_current_folder():
    from matplotlib import pyplot

    plot_losses([0.5, 1.5, 3.5], [10, 30, 70], [3.0, 2.0, 1.0], [3.5, 3.0, 2.5])
    below, above = pyplot.gcf().axes
    try:
        solid, dashed = below.lines
        assert (solid.get_linestyle(), dashed.get_linestyle()) == ("-", "-.")
        assert solid.get_ydata().tolist() == [3.0, 2.0, 1.0]
        assert (below.get_xlabel(), above.get_xlabel()) == ("Epochs", "Tokens seen")
        assert all(tick == int(tick) for tick in below.get_xticks())
    finally:
        pyplot.close("all")
    assert Path("loss-plot.pdf").read_bytes().startswith(b"%PDF")


# -------------------------------------------------------------------------------------- sampling


def greedy(model, ids, new_tokens, context_size):
    """Greedy sampling as the book writes it: all is computed again for each token."""
    for _ in range(new_tokens):
        with torch.no_grad():
            logits = model(ids[:, -context_size:])[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("length, context_size", [(1, 16), (5, 16), (16, 16), (20, 16), (5, 9)])
def test_cached_sampling_equals_recomputing_across_the_context_boundary(rows, length, context_size):
    model = tiny_model(seed=rows).eval()
    ids = made_up_ids(rows * length).view(rows, length) % 97
    expected = greedy(model, ids, 24, context_size)
    assert torch.equal(generate(model, ids, 24, context_size), expected)
    assert torch.equal(generate_text_simple(model, ids, 24, context_size), expected)
    assert torch.equal(generate(model, ids, 24, context_size, 1.5, top_k=1), expected)


def test_a_seeded_generator_repeats_its_draws():
    model, ids = tiny_model().eval(), torch.tensor([[1], [2]])
    samples = [
        generate(model, ids, 20, 16, 1.0, generator=torch.Generator().manual_seed(seed)).tolist()
        for seed in (1, 1, 2)
    ]
    assert samples[0] == samples[1] != samples[2]


def test_top_k_draws_from_the_likeliest_only():
    model, ids = tiny_model().eval(), torch.tensor([[5]]).repeat(200, 1)
    torch.manual_seed(0)
    drawn = generate(model, ids, 1, 16, temperature=10.0, top_k=3)[:, 1]
    assert set(drawn.tolist()) == set(model(ids[:1])[0, -1].topk(3).indices.tolist())


def test_sampling_ends_with_the_end_token():
    model, ids = tiny_model().eval(), torch.tensor([[1, 2, 3]])
    everything = generate(model, ids, 10, 16)[0].tolist()
    end = everything[3 + 4]
    shortened = generate(model, ids, 10, 16, eos_id=end)[0].tolist()
    assert shortened == everything[: everything.index(end, 3)]


def test_greedy_sampling_works_with_any_module_that_returns_logits():
    class Successor(nn.Module):
        def forward(self, ids):
            return nn.functional.one_hot((ids + 1) % 10, 10).float()

    ids = generate_text_simple(Successor(), torch.tensor([[7], [3]]), 4, 2)
    assert ids.tolist() == [[7, 8, 9, 0, 1], [3, 4, 5, 6, 7]]


def test_sample_is_printed_on_one_line_and_leaves_the_training_mode(capsys):
    model = tiny_model(vocab_size=50257, drop_rate=0.5).train()
    for _ in range(2):
        generate_and_print_sample(model, TOKENIZER, "cpu", "Every\neffort")
    first, second = capsys.readouterr().out.split("\n")[:2]
    assert first == second and first.startswith("Every effort")
    assert model.training


# ---------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """The command in an empty folder without a network: (folder, status, stdout, stderr)."""
    folder = tmp_path_factory.mktemp("first-run")
    sizes = "--emb-dim 32 --n-layers 2 --n-heads 4 --context-length 16 --device cpu"
    options = "--stride 64 --batch-size 8 --epochs 2 --lr 0.01"
    return folder, *finish(start(SCRIPT, sizes, options, cwd=folder))


def test_first_run_without_a_network_trains_on_pythons_documentation(first_run):
    folder, status, out, err = first_run
    assert status == 0
    assert len(err.splitlines()) == 1 and "the-verdict.txt" in err
    assert "Characters: 20479\n" in out
    assert not (folder / "the-verdict.txt").exists()


FIRST_RUN = r"""
Device: cpu.*float32.*parameters
Text: .+
Characters: 20479$
Tokens: \d+$
Batches.*8.*16
Training loss: 1[01]\.\d+
Validation loss: 1[01]\.\d+
Ep 1 \(Step 000000\): Train loss \d+\.\d{3}, Val loss \d+\.\d{3}$
Ep 1 \(Step 000005\): Train loss \d+\.\d{3}, Val loss \d+\.\d{3}$
Every effort moves you
Ep 2 \(
Every effort moves you
Final training loss: \d
Final validation loss: \d
.*[\d,]+ tokens/s
.*loss-plot\.pdf
"""


def test_first_run_prints_its_lines_in_order(first_run):
    out = first_run[2]
    lines = iter(out.splitlines())
    for pattern in FIRST_RUN.strip().split("\n"):
        assert any(re.match(pattern, line) for line in lines), f"no {pattern} in its place: {out}"
    assert out.count("Every effort moves you") == 2
    assert "\r" not in out and "\x1b" not in out  # the status line is for terminals


def test_first_run_lowers_the_loss_and_writes_down_what_it_printed(first_run):
    losses = read_losses(first_run[0] / "out")
    line = r"Ep (\d+) \(Step (\d+)\): Train loss ([\d.]+), Val loss ([\d.]+)"
    epochs, steps, train_losses, val_losses = zip(
        *(map(float, figures) for figures in re.findall(line, first_run[2])), strict=True
    )
    assert losses["config"]["emb_dim"] == 32 and losses["settings"]["lr"] == 0.01
    assert losses["steps"] == list(steps)
    assert losses["train_losses"] == pytest.approx(train_losses, abs=6e-4)
    assert losses["val_losses"] == pytest.approx(val_losses, abs=6e-4)
    assert losses["tokens_seen"] == [(step + 1) * 8 * 16 for step in steps]
    assert [math.ceil(epoch) for epoch in losses["epochs"]] == list(epochs)
    assert train_losses[-1] < train_losses[0] - 1


def test_first_run_saves_a_model_that_loads_and_pictures_that_open(first_run):
    from matplotlib.image import imread

    out = first_run[0] / "out"
    content = torch.load(out / "model.pt", weights_only=True)
    GPTModel(content["config"]).load_state_dict(content["model"])
    assert (out / "loss-plot.pdf").read_bytes().startswith(b"%PDF")
    height, width, _ = imread(out / "loss-plot.png").shape
    assert 300 < height < width < 4000


def test_sample_continues_the_prompt_and_repeats_with_its_seed(first_run, capsys):
    model = words("--device cpu --checkpoint", first_run[0] / "out" / "best.pt")
    options = words("--temperature 1 --top-k 40 --num-samples 2 --max-new-tokens 30")
    samples = []
    for seed in ("1", "1", "2"):
        assert train_gpt.main(["--sample", "The cat", *model, *options, "--seed", seed]) == 0
        samples.append(capsys.readouterr().out)
    assert samples[0] == samples[1] != samples[2]
    assert samples[0].startswith("The cat") and samples[0].count("\nThe cat") == 1


def test_sample_prints_on_an_output_that_lacks_its_characters(first_run, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")  # on Windows it lacks many, too
    model = first_run[0] / "out" / "best.pt"
    process = start(SCRIPT, "--device cpu --temperature 9 --sample Déjà --checkpoint", model)
    status, out, err = finish(process)
    assert (status, err) == (0, "")
    assert out.startswith("D")


def test_eval_only_prints_the_final_losses_and_their_perplexities(first_run, capsys):
    out = first_run[0] / "out"
    options = "--stride 64 --batch-size 8 --device cpu --eval-only --checkpoint"
    data = out / "python-topics.txt"
    assert train_gpt.main(words(options, out / "model.pt", "--data", data)) == 0
    printed = capsys.readouterr().out
    for name in ("raining", "alidation"):
        loss = float(re.search(rf"{name} loss: ([\d.]+)", printed)[1])
        perplexity = float(re.search(rf"{name} perplexity: ([\d.]+)", printed)[1])
        final = float(re.search(rf"Final .{name} loss: ([\d.]+)", first_run[2])[1])
        assert loss == pytest.approx(final, abs=1e-3)
        assert perplexity == pytest.approx(math.exp(loss), rel=1e-3)


def test_same_command_twice_gives_the_same_run_and_another_seed_another(capsys):
    command, printed = "--data text.txt --max-steps 6 --eval-freq 2", []
    for name in ("one", "two"):
        train(command, out=name)
        printed.append(evaluations_and_samples(capsys.readouterr().out))
    assert_same_run("one", "two")
    assert printed[0] == printed[1] and len(printed[0]) == 4
    other = train(command, "--seed 7", out="three")
    assert other["train_losses"] != read_losses("one")["train_losses"]


def test_learning_rate_warms_up_and_follows_half_a_cosine(capsys):
    options = "--grad-clip 0.5 --betas 0.9 0.95 --decay-matrices-only --log-freq 1 --max-steps 12"
    schedule = "--lr-schedule cosine --warmup-steps 2 --lr 1e-3 --min-lr 1e-4"
    train("--data text.txt", options, schedule)
    rates = [float(lr) for lr in re.findall(r"lr ([\d.e-]+)", capsys.readouterr().out)]
    assert rates[:3] == [5e-4, 1e-3, 1e-3]
    assert rates[7] == 5.5e-4  # half-way down
    assert all(rate > later for rate, later in itertools.pairwise(rates[2:]))
    assert len(rates) == 12 and 1e-4 < rates[-1] < 1.3e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_reduced_precision_trains_like_float32(dtype):
    command = "--data text.txt --max-steps 6 --drop-rate 0"
    exact = train(command, out="exact")
    rounded = train(command, "--dtype", dtype, out="rounded")
    assert rounded["val_losses"] == pytest.approx(exact["val_losses"], abs=0.05)
    assert {w.dtype for w in weights("rounded/model.pt").values()} == {torch.float32}


# ------------------------------------------------------------------------------------------ data

SPACES = ["\n\n\n", "\r\n", "\r", " ", "   ", " \n", "\t", "\xa0", "\u2028", "\u3000", "\x85"]
LETTERS = [
    "word",
    "Word",
    "a",
    "é",
    "e\u0301",
    "文字",
    "かな",
    "𝒳",
    "ß",
    "0",
    "123",
    "²",
    "٣",
    "👩‍👧",
]
MARKS = [
    "...",
    ",",
    "!?",
    ")(",
    "。",
    "'",
    "'s",
    "'ll",
    "’re",
    "1,000.50",
    "\u200b",
    "\ufeff",
    "\0",
]
SPECIAL = ["<|endoftext|>", "<|endof", "text|>", "don't", "I'm,", "\x1c"]
ANYTHING = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
HOSTILE = st.lists(st.sampled_from(SPACES + LETTERS + MARKS + SPECIAL) | ANYTHING, max_size=40)


@given(
    texts=st.lists(HOSTILE.map("".join).filter(bool), min_size=1, max_size=2),
    piece_characters=st.integers(1, 12),
    ratio=st.floats(0, 1),
)
@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_tokens_in_pieces_are_those_of_whole_texts(workplace, texts, piece_characters, ratio):
    """One text is cut by characters first, each half encoded whole; documents are joined."""
    files = [workplace / f"{number}.txt" for number in range(len(texts))]
    for file, text in zip(files, texts, strict=True):
        file.write_bytes(text.encode())
    texts = [file.read_text(encoding="utf-8") for file in files]
    cut = int(ratio * len(texts[0]))
    first, second, *whole = (
        TOKENIZER.encode(text, allowed_special="all")
        for text in (texts[0][:cut], texts[0][cut:], *texts)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "PIECE_CHARACTERS", piece_characters)
        corpus = train_gpt.load_corpus([*map(str, files)], None, ratio, workplace, TOKENIZER)
    ids, val_ids = (torch.cat(part).tolist() for part in (corpus.train, corpus.val))
    if len(texts) == 1:
        assert (ids, val_ids) == (first, second)
        assert (corpus.characters, corpus.tokens) == (len(texts[0]), len(whole[0]))
    else:
        assert ids + val_ids == whole[0] + [50256] + whole[1]


def test_files_folders_patterns_and_token_files_train_alike(capsys):
    documents = [TEXT, "Second: " + TEXT, "Third: " + TEXT]
    names = ["books/1.txt", "books/2.txt", "books/deep/3.txt"]
    Path("books/deep").mkdir(parents=True)
    for name, document in zip(names, documents, strict=True):
        Path(name).write_bytes(document.encode())
    ids = TOKENIZER.encode("<|endoftext|>".join(documents), allowed_special="all")
    raw = b"".join(number.to_bytes(2, "little") for number in ids)
    header = b"".join(n.to_bytes(4, "little") for n in (20240520, 1, len(ids), *[0] * 253))
    Path("raw.bin").write_bytes(raw)
    Path("llmc.bin").write_bytes(header + raw)
    runs = []
    twice = "books books/2.txt"  # which is read once
    for sources in (" ".join(names), twice, "books/**/*.txt", "raw.bin", "llmc.bin"):
        runs.append(train("--data", sources, "--max-steps 6", out=f"out{len(runs)}"))
        assert f"Tokens: {len(ids)}\n" in capsys.readouterr().out
    assert all(run["train_losses"] == runs[0]["train_losses"] for run in runs)
    assert all(run["val_losses"] == runs[0]["val_losses"] for run in runs)


def test_separate_validation_data_leaves_all_of_the_text_to_training(capsys):
    Path("val.txt").write_bytes(TEXT[:1000].encode())
    train("--data text.txt --val-data val.txt --max-steps 1")
    windows, val_windows = ((len(TOKENIZER.encode(t)) - 1) // 8 for t in (TEXT, TEXT[:1000]))
    expected = f"{windows // 2} for training, {math.ceil(val_windows / 2)} for validation"
    assert expected in capsys.readouterr().out


def test_token_file_is_found_again_until_the_text_changes(capsys):
    command = "--data text.txt --max-steps 1"
    train(command)
    (tokens,) = Path("out").glob("*.bin")
    written = tokens.stat().st_mtime_ns
    train(command)
    assert tokens.stat().st_mtime_ns == written
    assert capsys.readouterr().out.count(f"Characters: {len(TEXT)}\n") == 2
    Path("text.txt").write_bytes((TEXT + " More").encode())
    train(command)
    assert tokens.stat().st_mtime_ns != written
    assert f"Characters: {len(TEXT) + 5}\n" in capsys.readouterr().out


@pytest.mark.parametrize("damaged", ["", "[]", "{", '{"key": 1}'])
def test_damaged_notes_on_the_token_file_are_made_again(damaged):
    train("--data text.txt --max-steps 1")
    (notes,) = set(Path("out").glob("*.json")) - {Path("out/losses.json")}
    good = notes.read_text()
    notes.write_text(damaged)
    train("--data text.txt --max-steps 1")
    assert notes.read_text() == good


def test_failed_tokenization_leaves_no_token_file(capsys, monkeypatch):
    monkeypatch.setattr(train_gpt, "PIECE_CHARACTERS", 100)
    Path("text.txt").write_bytes(TEXT.encode() + b"\xff")
    assert "UTF-8" in refused(capsys, "--data text.txt")
    assert contents("out") == {}


@needs_posix
def test_killed_tokenization_leaves_no_token_file():
    Path("large.txt").write_bytes((TEXT * 2000).encode())
    process = start(SCRIPT, SIZES, "--data large.txt --max-steps 1")
    while process.poll() is None and not any(contents("out").values()):
        time.sleep(0.01)
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL
    assert contents("out") and not any(path.suffix == ".bin" for path in contents("out"))


class Server(BaseHTTPRequestHandler):
    """Answers as the path says; with the text otherwise."""

    def do_GET(self):
        status = int(self.path[1:]) if self.path[1:].isdigit() else 200
        body = {"/empty": b"", "/bytes": b"\xff\xfe\x00"}.get(self.path, TEXT.encode())
        self.send_response(302 if self.path == "/circle" else status)
        self.send_header("Location", "/circle")
        self.send_header("Content-Length", str(len(body) * (2 if self.path == "/half" else 1)))
        self.end_headers()
        if self.path in ("/stall", "/trickle"):
            body = body[:99]
            for _ in range(30 * (self.path == "/trickle")):
                self.wfile.write(b"x")
                time.sleep(0.1)
            time.sleep(2 * (self.path == "/stall"))
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


FAILURES = ["404", "500", "half", "stall", "trickle", "circle", "empty", "bytes"]


@pytest.mark.parametrize("path", FAILURES)
def test_failing_download_is_refused_and_leaves_nothing(server, path, capsys, monkeypatch):
    monkeypatch.setattr(train_gpt, "DOWNLOAD_TIMEOUT_S", 1)
    assert path in refused(capsys, f"--data {server}/{path}")
    assert contents("out") == {}


def test_refused_connection_is_refused_and_leaves_nothing(capsys):
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))  # but doesn't listen
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}/text.txt"
        assert url in refused(capsys, "--data", url)
    assert contents("out") == {}


def test_downloaded_text_trains_like_the_file(server):
    loaded = train(f"--data {server}/text.txt --max-steps 3", out="loaded")
    assert loaded["val_losses"] == train("--data text.txt --max-steps 3")["val_losses"]


def test_other_bytes_than_the_verdicts_are_not_taken_for_it(server, monkeypatch, capsys):
    monkeypatch.setattr(train_gpt, "VERDICT_URL", f"{server}/the-verdict.txt")
    train("--max-steps 1")
    printed = capsys.readouterr()
    assert "SHA-256" in printed.err and "Characters: 20479\n" in printed.out
    assert not Path("the-verdict.txt").exists()


# ------------------------------------------------------------------------------------- bad input


@pytest.fixture
def bad_files(workplace):
    """Files that the table of bad input names."""
    cut = b"".join(number.to_bytes(4, "little") for number in (20240520, 1, 999, *[0] * 253))
    files = {"empty.txt": b"", "latin.txt": "naïve ".encode("latin-1") * 99, "short.txt": b"Hi"}
    files |= {"odd.bin": b"\0\0\0", "beyond.bin": b"\xff\xff" * 999, "empty.bin": b""}
    files |= {"cut.bin": cut, "short.bin": b"\0\0" * 5, "file": b"taken", "junk.pt": b"junk" * 99}
    files |= {"out/losses.json": b"of an earlier run", "hollow/README": b"no text"}
    for name, content in files.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(content)


BAD_INPUT = """
    --epochs 0 | --epochs -1 | --epochs x | --epochs 1.5 | --epochs | --max-steps 0
    --batch-size 0 | --batch-size 9999 | --grad-accum-steps 0 | --stride 0 | --context-length 0
    --context-length 99999 | --emb-dim 0 | --n-heads 0 | --n-heads 3 | --n-layers 0
    --drop-rate 1 | --drop-rate -0.1 | --drop-rate nan | --train-ratio 0 | --train-ratio 1.1
    --train-ratio nan | --train-ratio 0.001 | --lr 0 | --lr -1 | --lr inf | --lr nan
    --lr-schedule linear | --warmup-steps -1 | --min-lr -1 | --betas 0.9 | --betas 0.9 1
    --weight-decay -1 | --weight-decay nan | --grad-clip 0 | --seed -1 | --seed 9223372036854775808
    --eval-freq 0 | --eval-iter 0 | --sample-freq 0 | --log-freq 0 | --checkpoint-every 0
    --model gpt3 | --dtype int8 | --device tpu | --device cuda:99 | --device cuda:-1
    --unknown | stray | --epoch 3 | --fsdp | --resume --out-dir out | --checkpoint junk.pt
    --sample Hi | --eval-only | --sample Hi --checkpoint absent.pt | --temperature -1
    --sample Hi --checkpoint junk.pt | --sample Hi --checkpoint hollow | --temperature nan
    --eval-only --checkpoint junk.pt | --resume --out-dir hollow | --top-k 0 | --num-samples 0
    --max-new-tokens 0 | --sizing 0 | --data | --data absent.txt | --data hollow
    --data *.nothing | --data empty.txt | --data latin.txt | --data short.txt
    --data text.txt absent.txt | --data text.txt latin.txt | --data text.txt short.bin
    --data odd.bin | --data beyond.bin | --data empty.bin | --data cut.bin | --data short.bin
    --data http:// | --val-data absent.txt | --val-data latin.txt | --out-dir file
    --out-dir file/below
"""


@pytest.mark.parametrize("case", [c.strip() for c in re.split(r"[|\n]", BAD_INPUT) if c.strip()])
def test_bad_input_is_refused_with_one_line(case, bad_files, capsys):
    before = contents(".")
    line = refused(capsys, "--data text.txt --max-steps 1", case)
    assert contents(".") == before
    assert any(word.lstrip("-") in line for word in case.split()), line  # it names what is wrong


def test_too_short_text_is_refused_with_counts_and_remedies(bad_files, capsys):
    line = refused(capsys, "--data short.txt")
    assert all(word in line for word in ("9", "--context-length", "--train-ratio"))


def test_too_short_validation_part_is_a_warning_and_gives_nan(capsys):
    losses = train("--data text.txt --train-ratio 1 --max-steps 2")
    printed = capsys.readouterr()
    assert "Val loss nan" in printed.out and len(printed.err.splitlines()) == 1
    assert set(losses["val_losses"]) == {None}  # JSON has no nan


def test_empty_start_context_is_refused_before_training(capsys):
    with pytest.raises(SystemExit) as exit:
        train_gpt.main([*words(SIZES, "--data text.txt"), "--start-context", ""])
    printed = capsys.readouterr()
    assert exit.value.code == 2 and len(printed.err.splitlines()) == 1
    assert "Ep 1" not in printed.out


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere memory is promised without end")
def test_model_beyond_memory_is_refused(capsys):
    assert "memory" in refused(capsys, "--data text.txt --emb-dim 20000000")


@needs_posix
def test_folder_that_cannot_be_written_is_refused_before_training(capsys):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    Path("locked").mkdir(mode=0o500)
    assert "locked" in refused(capsys, "--data text.txt --out-dir locked")


# ---------------------------------------------------------------------------- runs that survive

KILLS = int(os.environ.get("KILLS", "3"))
# With dropout, groups of batches that don't come out even, and another rate at each step.
LONG = (
    f"{SIZES} --data text.txt --epochs {KILLS} --batch-size 4 --grad-accum-steps 3 --lr-schedule cosine "
    "--warmup-steps 3 --checkpoint-every 1 --eval-freq 4 --sample-freq 5"
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(out-dir, stdout) of a run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "text.txt").write_bytes(TEXT.encode())
    status, out, err = finish(start(SCRIPT, LONG, cwd=folder))
    assert (status, err) == (0, "")
    return folder / "out", out


def output_until(process, pattern):
    """Return the process's output up to a line that matches pattern."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if re.match(pattern, line):
            return "".join(lines)
    pytest.fail(f"no line {pattern}: {process.stderr.read()}")


def evaluations_and_samples(out):
    return [line for line in out.splitlines() if line.startswith(("Ep ", "Every effort"))]


@needs_posix
@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_stops_the_run_and_the_printed_command_goes_on(number, status, undisturbed):
    process = start(SCRIPT, LONG)
    before = output_until(process, r"Ep 1 \(Step 000004\)")
    assert read_losses("out")["steps"][0] == 0  # written while the run goes on
    time.sleep(random.Random(number).uniform(0, 0.1))
    process.send_signal(number)
    returned, out, err = finish(process)
    assert returned == status and "Traceback" not in err
    assert Path("out/loss-plot.pdf").exists() and not Path("out/model.pt").exists()
    command = re.search(r": (\S.*--resume)$", out.strip())[1]
    status, rest, err = finish(start(*shlex.split(command)[1:]))
    assert (status, err) == (0, "")
    assert_same_run("out", undisturbed[0])
    printed = evaluations_and_samples(before + out + rest)
    assert printed == evaluations_and_samples(undisturbed[1])


@needs_posix
def test_run_whose_reader_ends_saves_and_goes_on_exactly(undisturbed):
    """As with `| tee`, which Ctrl-C ends, or `| head`."""
    process = start(SCRIPT, LONG)
    output_until(process, r"Ep 1 \(Step 000004\)")
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=120) == 130 and len(err.splitlines()) == 1 and "--resume" in err
    assert finish(start(SCRIPT, LONG, "--resume"))[0] == 0
    assert_same_run("out", undisturbed[0])


@needs_posix
def test_kill_9_at_random_moments_loses_nothing(undisturbed):
    """The environment variable KILLS sets how many; the run gets longer with it."""
    moments, killed = random.Random(1), 0
    for _ in range(KILLS):
        resume = "--resume" if Path("out/checkpoint.pt").exists() else ""
        process = start(SCRIPT, LONG, resume)
        output_until(process, "Resuming" if resume else "Ep 1")
        time.sleep(moments.uniform(0, 0.2))
        process.kill()
        killed += finish(process)[0] == -signal.SIGKILL
    assert killed >= 2  # a very fast machine is done before
    status, _, err = finish(start(SCRIPT, LONG, "--resume"))
    assert (status, err) == (0, "")
    assert_same_run("out", undisturbed[0])


SHORT = "--data text.txt --batch-size 16 --grad-accum-steps 2 --eval-freq 3 --epochs 9"


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A folder with text.txt, with half/ of 6 steps of training and whole/ of all 12."""
    folder = tmp_path_factory.mktemp("interrupted")
    (folder / "text.txt").write_bytes(TEXT.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(SHORT, "--max-steps 6", out="half")
        train(SHORT, "--max-steps 12", out="whole")
    return folder


@pytest.mark.parametrize("steps", [1, 4, 6])
def test_run_ended_by_max_steps_and_resumed_is_the_undisturbed_one(steps, interrupted, monkeypatch):
    """7 batches, so 4 steps, make an epoch."""
    monkeypatch.chdir(interrupted)
    name = f"after-{steps}"
    train(SHORT, f"--max-steps {steps}", out=name)
    train("--resume --max-steps 12", out=name)
    assert_same_run(name, "whole")


@pytest.fixture
def resumable(interrupted, workplace):
    """Copies of the text, with its modification time, and of half/."""
    shutil.copy2(interrupted / "text.txt", workplace)
    shutil.copytree(interrupted / "half", workplace / "half")


@pytest.mark.parametrize("flag, old, new", [("--lr", "0.0004", "0.01"), ("--emb-dim", "16", "32")])
def test_resuming_with_another_setting_is_refused_with_both_values(
    flag, old, new, resumable, capsys
):
    before = contents("half")
    line = refused(capsys, "--resume --out-dir half", flag, new)
    assert all(word in line for word in (flag, old, new))
    assert contents("half") == before


def test_resuming_on_changed_or_deleted_data_is_refused(resumable, capsys):
    resume, checkpoint = "--resume --max-steps 12 --out-dir half", Path("half/checkpoint.pt")
    before = checkpoint.read_bytes()
    Path("text.txt").write_bytes(TEXT.replace("cat", "cow").encode())
    assert "changed" in refused(capsys, resume)
    Path("text.txt").unlink()
    assert "text.txt" in refused(capsys, resume)
    assert checkpoint.read_bytes() == before


class Malicious:
    """Unpickled, it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("owned",)


DAMAGES = {
    "cut short": lambda good, content: good[: len(good) // 2],
    "flipped byte": lambda good, content: good[:500000] + bytes([good[500000] ^ 1]) + good[500001:],
    "bare pickle": lambda good, content: pickle.dumps(Malicious()),
    "empty": lambda good, content: b"",
    "text": lambda good, content: b"no checkpoint",
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
    for command in ("--sample Hi --checkpoint", "--eval-only --data text.txt --checkpoint"):
        assert "checkpoint.pt" in refused(capsys, "--out-dir half", command, path)
    refused(capsys, "--resume --max-steps 12 --out-dir half")
    assert contents(".") == before
    assert not Path("owned").exists()


@pytest.mark.parametrize("part", ["settings", "progress", "optimizer", "random"])
def test_checkpoint_that_lacks_what_resuming_needs_is_refused(part, resumable, capsys):
    path = Path("half/checkpoint.pt")
    torch.save({**torch.load(path, weights_only=True), part: None}, path)
    assert "checkpoint.pt" in refused(capsys, "--resume --max-steps 12 --out-dir half")


def test_diverging_run_stops_and_keeps_the_last_good_checkpoint(capsys):
    with pytest.raises(SystemExit) as exit:
        train_gpt.main(words(SIZES, "--data text.txt --lr 1e24 --checkpoint-every 1"))
    line = capsys.readouterr().err.splitlines()[-1]
    assert exit.value.code == 2
    assert all(word in line for word in ("step 1", "1e+24", "--lr"))
    assert all(w.isfinite().all() for w in weights("out/checkpoint.pt").values())
    assert not Path("out/model.pt").exists()


@needs_posix
def test_full_disk_is_a_warning_while_training_and_an_error_at_the_end(resumable):
    """A limit on the size of files makes writing fail as a full disk does."""
    import resource

    def limit_files():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    before = contents("half")
    resume = "--resume --max-steps 12 --checkpoint-every 2 --out-dir half"
    status, out, err = finish(start(SCRIPT, resume, preexec_fn=limit_files))
    warnings = re.findall("^.*warning.*checkpoint.pt.*$", err, re.MULTILINE)
    assert status == 2 and len(warnings) >= 2 and "Traceback" not in err
    assert "(Step 000009)" in out
    after = contents("half")
    kept = [path for path in before if path.suffix == ".pt"]
    assert len(kept) == 3 and all(after[path] == before[path] for path in kept)
    assert not [path for path in after if path.suffix == ".tmp"]


# ----------------------------------------------------------------------------- several processes


def torchrun(*arguments):
    """Run the command in two processes; return (exit status, stdout, stderr)."""
    launch = "-m torch.distributed.run --standalone --nproc-per-node 2"
    return finish(start(launch, SCRIPT, SIZES, *arguments))


@pytest.fixture
def token_files(workplace):
    """Make files of 16 windows to train on and of 8 to validate on; return the flags."""
    ids = [number % 1000 for number in made_up_ids(129).tolist()]
    for name, count in (("train", 129), ("val", 65)):
        raw = b"".join(number.to_bytes(2, "little") for number in ids[:count])
        (workplace / f"{name}.bin").write_bytes(raw)
    return "--data train.bin --val-data val.bin --epochs 3 --eval-freq 2 --eval-iter 99 --lr 0.01"


@needs_gloo
def test_two_processes_train_like_one_with_batches_as_large_as_theirs(token_files):
    one = train(token_files, "--drop-rate 0 --batch-size 4", out="one")
    assert one["train_losses"][-1] < one["train_losses"][0] - 1
    two = {"ddp": "--batch-size 1 --grad-accum-steps 2", "fsdp": "--batch-size 2 --fsdp"}
    for name, options in two.items():
        status, out, err = torchrun(token_files, "--drop-rate 0", options, "--out-dir", name)
        assert status == 0, err
        assert out.count("Ep 1 (Step 000000)") == 1
        losses = read_losses(name)
        assert losses["tokens_seen"] == one["tokens_seen"]
        assert losses["train_losses"] == pytest.approx(one["train_losses"], abs=1e-5)
        assert losses["val_losses"] == pytest.approx(one["val_losses"], abs=1e-5)
        content = torch.load(f"{name}/model.pt", weights_only=True)
        GPTModel(content["config"]).load_state_dict(content["model"])


@needs_gloo
def test_resumed_processes_go_on_bit_for_bit_and_only_as_many(token_files, capsys):
    run = f"{token_files} --batch-size 1 --grad-accum-steps 3"
    assert torchrun(run, "--fsdp --max-steps 7 --out-dir whole")[0] == 0
    assert torchrun(run, "--fsdp --max-steps 4 --out-dir cut")[0] == 0
    states = torch.load("cut/checkpoint.pt", weights_only=True)["random"]
    assert not torch.equal(states[0]["cpu"], states[1]["cpu"])  # each draws masks of its own
    status, _, err = torchrun("--resume --max-steps 7 --out-dir cut")
    assert status == 0, err
    assert_same_run("cut", "whole")
    line = refused(capsys, "--resume --max-steps 9 --out-dir cut")
    assert "2 processes" in line and "--resume-with-other-ranks" in line


@needs_gloo
@needs_posix
def test_processes_whose_out_dirs_are_not_one_folder_are_refused(token_files):
    """As where each node has a disk of its own."""
    command = shlex.join([sys.executable, *words(SCRIPT, SIZES, token_files)])
    script = Path("each.sh")
    script.write_text(f"exec {command} --out-dir out-$RANK")
    launch = "-m torch.distributed.run --standalone --nproc-per-node 2 --no-python sh"
    status, _, err = finish(start(launch, script))
    assert status != 0 and err.count("must be one folder that all processes share") == 1
    assert not Path("out-0").exists() and not Path("out-1").exists()


@needs_gloo
def test_error_of_all_processes_is_shown_once(token_files):
    status, _, err = torchrun(token_files, "--batch-size 9")
    assert status != 0
    assert sum(line.startswith("train_gpt: ") for line in err.splitlines()) == 1
