# ruff: noqa: F403, F405
"""Tests of train_gpt.py: `pytest -q`, in about two minutes on two cores, without a network."""

import contextlib
import csv
import gzip
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

import pytest
import tiktoken
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import train_gpt
from train_gpt import *

torch.set_num_threads(1)  # as in the processes that tests start; faster, too, for tiny models
train_gpt.vocabulary()
STARTED = []  # processes
SCRIPT = Path(train_gpt.__file__).resolve()
TOKENIZER = tiktoken.get_encoding("gpt2")
END = "<|endoftext|>"
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
    assert all(note.startswith("train_gpt: warning: ") for note in notes), notes
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
    for line in process.stdout:
        if re.match(pattern, line):
            return
    pytest.fail(f"no line {pattern}: {process.stderr.read()}")


def results(out):
    return [line for line in out.splitlines() if line.startswith(("Ep ", "Every effort"))]


def figures(kind, out):
    return [float(figure) for figure in re.findall(kind + r": ([\d.]+)", out)]


def loss_printed(capsys, *arguments):
    """The one figure that `evaluate` prints."""
    capsys.readouterr()
    succeed("evaluate --device cpu", *arguments)
    (loss,) = figures("(?m)^Loss", capsys.readouterr().out)
    return loss


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def load(path):
    """The model of a .pt file, ready to be evaluated."""
    content = torch.load(path, weights_only=True)
    model = GPTModel(content["config"]).eval()
    model.load_state_dict(content["model"])
    return model


def read_losses(folder):
    return json.loads(Path(folder, "losses.json").read_text())


def steps_of(folder):
    """The rows of steps.csv without the seconds, numbers by their columns' names."""
    rows = csv.DictReader(Path(folder, "steps.csv").read_text().splitlines())
    return [{k: float(v) for k, v in row.items() if k != "seconds"} for row in rows]


def assert_close(ours, theirs, within):
    assert ours.keys() == theirs.keys()
    furthest = max((ours[name] - theirs[name]).abs().max().item() for name in ours)
    assert furthest <= within, furthest


def assert_same_run(folder, other):
    """Weights bit for bit, losses byte for byte, steps."""
    for path in Path(other).glob("[mb]*.pt"):  # model, best
        assert_close(weights(Path(folder, path.name)), weights(path), 0)
    assert read_losses(folder) == read_losses(other)
    assert steps_of(folder) == steps_of(other)


def contents(folder):
    """All files and folders but .lock; what they hold."""
    paths = [path for path in Path(folder).rglob("*") if path.name != ".lock"]
    return {path: path.is_file() and path.read_bytes() for path in paths}


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
    """Have the call'th call of a function of train_gpt begin with an action."""
    plain, calls = getattr(train_gpt, moment), itertools.count(1)

    def act_and_call(*arguments, **options):
        if next(calls) == call:
            action()
        return plain(*arguments, **options)

    patch.setattr(train_gpt, moment, act_and_call)


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
    book = model, loader, loader, optimizer, "cpu", 3, 5, 5, "The cat", TOKENIZER
    train_losses, val_losses, tokens_seen = train_model_simple(*book)
    assert train_losses[-1] < train_losses[0] - 1 and val_losses[-1] < val_losses[0] - 1


# ----------------------------------------------------------------------------- published figures
@pytest.fixture
def fast(workplace):
    """All cores, and float32 products as the command has them."""
    torch.set_num_threads(os.cpu_count())
    before = torch.get_float32_matmul_precision()
    train_gpt.choose_device(train_gpt.build_parser("train").parse_args(["--device", "cpu"]))
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
def test_published_run_begins_with_the_published_losses(chapter, fast):
    path = SCRIPT.with_name("the-verdict.txt")
    if not path.exists():
        pytest.skip(f"no the-verdict.txt beside the script: cd {SCRIPT.parent} && python {SCRIPT}")
    train_loader, val_loader = loaders(path.read_text(encoding="utf-8"), chapter, 2, 256)
    assert (len(train_loader), len(val_loader)) == (9, 1)
    torch.manual_seed(123)
    model, progress, losses = chapter.GPTModel(chapter.GPT_CONFIG_124M), chapter.Progress(), []
    assert sum(p.numel() for p in model.parameters()) == 162419712
    state = torch.get_rng_state()
    initial = chapter.evaluate_model(model, train_loader, val_loader, "cpu", eval_iter=None)
    assert initial == pytest.approx((10.987583, 10.981106), abs=5e-4)
    torch.set_rng_state(state)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0004, weight_decay=0.1)
    steps = chapter.train(model, train_loader, [optimizer], "cpu", 10, progress=progress)
    for _ in itertools.islice(steps, 6):
        if progress.step % 5 == 0:
            losses.extend(chapter.evaluate_model(model, train_loader, val_loader, "cpu", 5))
    assert losses == pytest.approx([9.781002, 9.932810, 8.110534, 8.338574], abs=5e-4)
    assert (progress.step, progress.tokens_seen) == (5, 3072)


# ------------------------------------------------------------------------ the chapter, cut off
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
    book = model, train_loader, val_loader, optimizer, "cpu", 2, 3, 99, "Every effort moves you"
    losses = chapter.train_model_simple(*book, TOKENIZER)
    assert losses[1:] == tuple(by_command[n] for n in ("val_losses", "tokens_seen"))
    assert_close(weights("out/model.pt"), model.state_dict(), 0)
    assert results(capsys.readouterr().out) == printed


# ------------------------------------------------------------------------------------ the generator
def trained(batches, optimizer=torch.optim.SGD, **options):
    """Train a model without dropout for an epoch; return (its weights, the steps' losses)."""
    model = tiny_model(drop_rate=0.0)
    losses = list(train(model, batches, [optimizer(model.parameters(), 0.5)], "cpu", 1, **options))
    return torch.cat([p.detach().flatten() for p in model.parameters()]), losses


def batches_of(count, rows=2):
    ids = made_up_ids(count * rows * 8 + 1) % 97
    return [*zip(ids[:-1].view(count, rows, 8), ids[1:].view(count, rows, 8))]


@needs_posix
def test_run_stopped_after_any_step_and_gone_on_with_is_the_same_run(monkeypatch):
    """15 batches are 3 steps of an epoch, the last one of 3 batches."""
    command("--data text.txt --epochs 2 --batch-size 8 --grad-accum-steps 6 --eval-freq 2")
    assert len(steps_of("out")) == 6
    for stop in range(1, 6):
        folder = Path(f"stopped-{stop}")
        with monkeypatch.context() as patch:
            act_at("note_random", stop, lambda: os.kill(os.getpid(), signal.SIGTERM), patch)
            run = SIZES, "--data text.txt --epochs 2 --batch-size 8 --grad-accum-steps 6"
            assert train_gpt.main(words(*run, "--eval-freq 2 --out-dir", folder)) == 143
        assert len(steps_of(folder)) == stop
        succeed("--resume --out-dir", folder)
        assert_same_run(folder, "out")


def test_rest_of_an_epoch_is_trained_and_no_more():
    batches = batches_of(9)
    whole, losses = trained(batches)
    model, progress = tiny_model(drop_rate=0.0), Progress()
    sgd = torch.optim.SGD(model.parameters(), 0.5)
    first = [*itertools.islice(train(model, batches, [sgd], "cpu", 1, progress=progress), 5)]
    assert (progress.epoch, progress.batch, progress.step) == (0, 5, 4)
    progress = Progress(batch=5, step=4, tokens_seen=progress.tokens_seen)
    rest = [*train(model, batches[5:], [sgd], "cpu", 1, progress=progress)]
    assert first + rest == losses and len(rest) == 4
    assert (progress.epoch, progress.batch, progress.step) == (1, 0, 8)
    assert progress.tokens_seen == 9 * 16
    assert torch.equal(torch.cat([p.detach().flatten() for p in model.parameters()]), whole)


def test_loader_without_a_length_trains_its_epochs():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return zip(*(torch.cat(part) for part in zip(*batches_of(5))))

    loader, model = torch.utils.data.DataLoader(Stream(), batch_size=2), tiny_model(drop_rate=0.0)
    progress, sgd = Progress(), torch.optim.SGD(model.parameters(), 0.5)
    losses = list(train(model, loader, [sgd], "cpu", 2, progress=progress))
    assert losses[:5] == trained(batches_of(5))[1] and len(losses) == 10
    assert (progress.epoch, progress.batch) == (2, 0)


def test_accumulated_batches_are_one_larger_batch_and_clipping_shortens_its_gradient():
    parts, whole = batches_of(3), batches_of(1, rows=6)
    (ours, losses), (theirs, expected) = trained(parts, grad_accum_steps=4), trained(whole)
    assert torch.allclose(ours, theirs, atol=1e-6) and len(losses) == 1
    assert losses == pytest.approx(expected, abs=1e-6)
    before, progress = trained([])[0], Progress()
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
    gradients = []
    for chosen in (inputs, inputs.clone()):  # what stands behind the last target changes nothing
        chosen[0, 5:] = chosen[3] = 7 if chosen is inputs else 8
        model.zero_grad()
        calc_loss_batch(chosen, targets, model, "cpu").backward()
        gradients.append(model.out_head.weight.grad)
    torch.testing.assert_close(*gradients, atol=1e-7, rtol=1e-5)


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
def greedy(model, ids, new_tokens, context_size):
    """Greedy sampling as the book writes it: all is computed again for each token."""
    for _ in range(new_tokens):
        with torch.no_grad():
            logits = model(ids[:, -context_size:])[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids


@pytest.mark.parametrize("rows", [1, 3])
def test_cached_sampling_equals_recomputing(rows, monkeypatch):
    seen, model = [], tiny_model(seed=rows).eval()
    model.tok_emb.register_forward_hook(lambda module, inputs, _: seen.append(inputs[0].shape[1]))
    for context, length in itertools.product((16, 9), (1, 5, 15, 16, 20)):
        ids = made_up_ids(rows * length).view(rows, length) % 97
        expected = greedy(model, ids, 24, context)
        seen.clear()
        assert torch.equal(generate(model, ids, 24, context), expected)
        assert seen.count(1) == max(0, context - length) + (length == 1)  # by the cache
        assert torch.equal(generate_text_simple(model, ids, 24, context), expected)
        assert torch.equal(generate(model, ids, 24, context, temperature=1.5, top_k=1), expected)


class Negated(GPTModel):
    def forward(self, in_idx):  # and takes no cache
        return -super().forward(in_idx)


def test_subclasses_and_models_with_dropout_are_sampled_without_a_cache():
    model, ids = tiny_model().eval(), made_up_ids(4)[None] % 97
    plain = greedy(model, ids, 16, 16)
    model.__class__ = Negated
    expected = greedy(model, ids, 16, 16)
    assert torch.equal(generate(model, ids, 16, 16), expected)
    assert not torch.equal(expected, plain)
    torch.manual_seed(1)
    by_hand = greedy(tiny_model().train(), ids, 16, 16)
    assert torch.equal(generate(tiny_model().train(), ids, 16, 16), by_hand)


def test_sampling_draws_by_softmax_and_ends_rows_at_eos_id():
    model, ids = tiny_model().eval(), made_up_ids(4)[None] % 97
    with torch.no_grad():
        logits = model(ids)[0, -1] / 0.1
    torch.manual_seed(0)
    drawn = generate(model, ids.repeat(20000, 1), 1, 16, temperature=0.1, top_k=5)[:, -1]
    top = logits.topk(5)
    shares = torch.stack([(drawn == i).float().mean() for i in top.indices])
    torch.testing.assert_close(shares, top.values.softmax(0), atol=0.02, rtol=0)
    one = greedy(model, ids, 16, 16)[0, 4:].tolist()
    cut = one.index(one[7])
    assert generate(model, ids, 16, 16, eos_id=one[7])[0, 4:].tolist() == one[:cut]


def test_cache_takes_a_prompt_then_single_tokens_and_no_more_than_the_context():
    model, cache, ids = tiny_model().eval(), KVCache(16), made_up_ids(17)[None] % 97
    model(ids[:, :6], cache)
    with pytest.raises(ValueError, match="one by one"):
        model(ids[:, 6:8], cache)
    for tokens in (ids, ids[:, :0].new_zeros(1, 18)):
        with pytest.raises(ValueError, match="16"):
            model(tokens)


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
