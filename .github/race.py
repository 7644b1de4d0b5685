"""Race train_gpt.py's training step against nanoGPT's, Hugging Face's and the published one's.

The same work for each: GPT-2 small at a context of 256, batches of 2 windows of the same random
ids, dropout 0.1, AdamW; 12 training steps, then 20 evaluation batches. Each in a process of its own,
in turn, round after round, so that a drifting machine hits all. Prints, as a Markdown table, the
medians over the rounds. Run from the repository's root, in an environment with its requirements:

    pip install --no-deps llms-from-scratch==1.0.19 tqdm && pip install transformers
    git clone https://github.com/karpathy/nanoGPT /tmp/nanoGPT
    python .github/race.py --nanogpt /tmp/nanoGPT

The published code and train_gpt.py have an output head of its own (162.4 M parameters), nanoGPT and
Hugging Face share it with the token embedding (124.0 M); each is used as its own trainer uses it on
a CPU, except that Hugging Face's model gets the fused AdamW that its Trainer prefers.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

STEPS, WARM_UP, EVALUATIONS, BATCH = 12, 2, 20, (2, 256)
SIDES = {
    "published": "published code",
    "nanogpt": "nanoGPT",
    "huggingface": "Hugging Face GPT-2",
    "train_gpt": "train_gpt.py",
}


def contestant(side, dtype, nanogpt):
    """Return (train(inputs, targets), evaluate(inputs, targets)) of a side."""
    import torch
    import torch.nn.functional as F

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")
    if side == "train_gpt":
        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
        import train_gpt

        train_gpt.keep_freed_memory()
        precision = train_gpt.choose_precision(torch.device("cpu"), dtype)
        model = train_gpt.GPTModel(train_gpt.GPT_CONFIG_124M)
        optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=0.1, fused=True)

        def train(inputs, targets):
            batch = [(inputs, targets)]
            train_gpt.train_step(model, batch, optimizer, "cpu", precision)

        def loss_of(inputs, targets):
            return train_gpt.calc_loss_batch(inputs, targets, model, "cpu")
    else:
        if side == "published":
            from llms_from_scratch.ch04 import GPTModel
            from llms_from_scratch.ch05 import calc_loss_batch

            sizes = {"vocab_size": 50257, "context_length": 256, "emb_dim": 768, "n_heads": 12}
            model = GPTModel({**sizes, "n_layers": 12, "drop_rate": 0.1, "qkv_bias": False})
            optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=0.1)

            def loss_of(inputs, targets):
                return calc_loss_batch(inputs, targets, model, "cpu")
        elif side == "nanogpt":
            sys.path.insert(0, nanogpt)
            from model import GPT, GPTConfig

            model = GPT(GPTConfig(block_size=256, dropout=0.1))
            optimizer = model.configure_optimizers(0.1, 4e-4, (0.9, 0.95), "cpu")

            def loss_of(inputs, targets):
                return model(inputs, targets)[1]
        else:
            from transformers import GPT2Config, GPT2LMHeadModel

            model = GPT2LMHeadModel(GPT2Config(n_positions=256))
            optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=0.1, fused=True)

            def loss_of(inputs, targets):
                logits = model(inputs).logits
                return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

        def train(inputs, targets):
            optimizer.zero_grad()
            with autocast:
                loss = loss_of(inputs, targets)
            loss.backward()
            optimizer.step()

    def evaluate(batches):
        model.eval()
        with torch.no_grad(), autocast:
            return [loss_of(*batch).item() for batch in batches]

    model.train()
    return train, evaluate


def run_side(side, dtype, nanogpt):
    """Do one side's work in this process; print seconds and peak memory as JSON."""
    import resource

    import torch

    start = time.perf_counter()
    torch.manual_seed(123)
    with contextlib.redirect_stdout(sys.stderr):
        train, evaluate = contestant(side, dtype, nanogpt)
        batches = torch.randint(50257, (STEPS, 2, *BATCH)).unbind()
        step_s = []
        for batch in batches:
            began = time.perf_counter()
            train(*batch)
            step_s.append(time.perf_counter() - began)
        began = time.perf_counter()
        evaluate((batches * 2)[:EVALUATIONS])
    now = time.perf_counter()
    figures = {"step_s": statistics.median(step_s[WARM_UP:]), "run_s": now - start}
    figures["evaluation_s"] = (now - began) / EVALUATIONS
    figures["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(figures))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nanogpt", required=True, help="folder of nanoGPT's model.py")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="float32", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        run_side(args.side, args.dtype, args.nanogpt)
        return
    print("| | dtype | run s | step s | tokens/s | evaluation batch s | peak MB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for dtype in ("float32", "bfloat16"):
        rounds = {side: [] for side in SIDES}
        for _ in range(args.rounds):
            for side, figures in rounds.items():
                command = [sys.executable, __file__, "--side", side, "--dtype", dtype]
                command += ["--nanogpt", args.nanogpt]
                output = subprocess.run(
                    command,
                    check=True,
                    stdout=subprocess.PIPE,
                    env={**os.environ, "HF_HUB_OFFLINE": "1"},
                ).stdout
                figures.append(json.loads(output))
        for side, figures in rounds.items():
            one = {name: statistics.median(f[name] for f in figures) for name in figures[0]}
            tokens_per_s = BATCH[0] * BATCH[1] / one["step_s"]
            print(
                f"| {SIDES[side]} | {dtype} | {one['run_s']:.1f} | {one['step_s']:.2f} | {tokens_per_s:.0f} | "
                f"{one['evaluation_s']:.2f} | {one['peak_mb']:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
