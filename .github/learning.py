"""Race the optimizers of train_gpt.py: the README's table and .github/learning.png.

    python .github/learning.py

Trains the tiny model three times on 5 MB of Python's own library sources, each run a process of its
own, at equal steps: AdamW as published, AdamW and Muon at their best rates with warm-up, cosine and
clipping. Prints a Markdown table; draws validation loss over tokens and over seconds of training.
"""

import csv
import json
import subprocess
import sys
import sysconfig
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "train_gpt.py"
WORK = Path("learning-out")
STEPS = 400
COMMON = "--model tiny --batch-size 8 --drop-rate 0 --eval-freq 20 --eval-iter 50 --device cpu"
TUNED = "--warmup-steps 40 --grad-clip 1"
RUNS = {
    "AdamW as published, 4e-4": "--lr 4e-4",
    "AdamW, 4e-3": f"{TUNED} --lr 4e-3 --min-lr 4e-4",
    "Muon, 1e-2": f"{TUNED} --optimizer muon --init gpt2 --lr 1e-2 --min-lr 1e-3",
}


def train(number, options):
    """Return (step, tokens, seconds, validation loss) of each evaluation of one run."""
    out = WORK / str(number)
    words = f"--data {WORK / 'library.txt'} --max-steps {STEPS} --out-dir {out} --overwrite"
    command = [sys.executable, SCRIPT, *f"{words} {COMMON} {options}".split()]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    losses = json.loads((out / "losses.json").read_text())
    rows = list(csv.DictReader((out / "steps.csv").open()))
    seconds = [float(rows[step]["seconds"]) for step in losses["steps"]]
    final = losses["final"][1]
    figures = zip(losses["steps"], losses["tokens_seen"], seconds, losses["val_losses"])
    return [*figures, (STEPS - 1, int(rows[-1]["tokens"]), float(rows[-1]["seconds"]), final)]


def main():
    from matplotlib import ticker
    from matplotlib.figure import Figure

    WORK.mkdir(exist_ok=True)
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = "".join(path.read_text(encoding="utf-8", errors="ignore") for path in sources)
    (WORK / "library.txt").write_text(text[:5_000_000], encoding="utf-8")
    results = {name: train(number, options) for number, (name, options) in enumerate(RUNS.items())}
    best_adamw = results["AdamW, 4e-3"][-1][3]
    print("| optimizer, rate | validation loss | seconds | steps to AdamW's best |")
    print("| --- | --- | --- | --- |")
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    by_tokens, by_seconds = figure.subplots(1, 2, sharey=True)
    for name, points in results.items():
        reached = next((str(step + 1) for step, _, _, loss in points if loss <= best_adamw), "")
        print(f"| {name} | {points[-1][3]:.3f} | {points[-1][2]:.0f} | {reached} |")
        _, tokens, seconds, losses = zip(*points)
        by_tokens.plot(tokens, losses, label=name)
        by_seconds.plot(seconds, losses)
    by_tokens.set(xlabel="Tokens seen", ylabel="Validation loss (nats per token)", ylim=(3, 6))
    by_tokens.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    by_seconds.set(xlabel="Seconds of training")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(Path(__file__).with_name("learning.png"), dpi=120)


if __name__ == "__main__":
    main()
