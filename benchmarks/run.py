"""A pre-training run of some minutes, with all that belongs to one: `python -m benchmarks.run grid --minutes 8`.

Starts `affekt pretrain` with the experiment and the settings given, in bf16 and compiled on a GPU, asks it to leave by
SIGTERM when the time is over (or lets it come to its last step), and reads its own log: medians of clips per second,
MFU and the share of waiting for data after the first logged step, the last loss and the last online probe. On an H200:

    affekt prepare ../shared/data/manifest.csv shards/grid --where data_set=GRID
    python -m benchmarks.run grid model.name=hicmae_base train.global_batch=128 data.workers=14 train.steps=20000 \\
        train.probe.shards=shards/grid train.probe.test='{split: [val]}' train.probe.group=id
"""

import argparse
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from affekt.pretrain.log import read_metrics
from affekt.pretrain.signals import STOPPED
from benchmarks.report import print_figures

GRACE_SECONDS = 120  # after the signal: a save, and a GPU's compilation before the first step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="an experiment or a file of settings")
    parser.add_argument("settings", nargs="*", help="key=value")
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark_run"))
    arguments = parser.parse_args()
    gpu = ["train.precision=bf16", "train.compile=true"] if torch.cuda.is_available() else []
    overrides = [f"out={arguments.out}", *gpu, *arguments.settings]
    code, seconds = train([arguments.config, *overrides], arguments.minutes * 60)
    if code not in (0, STOPPED):
        print(f"affekt pretrain ended with exit code {code}", file=sys.stderr)
        return code
    rows = read_metrics(arguments.out / "metrics.jsonl")
    figures = {"minutes": round(seconds / 60, 2), "steps": rows[-1]["step"], **figures_of(rows)}
    table = Table("", "", title=f"{arguments.config}: {arguments.out}")
    for name, value in figures.items():
        table.add_row(name, f"{value:.4g}")
    Console().print(table)
    print_figures("run", figures)
    return 0


def train(arguments: list[str], seconds: float) -> tuple[int, float]:
    """The exit code of `affekt pretrain`, and how long it took."""
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "affekt", "pretrain", *arguments])
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return process.returncode, time.monotonic() - started


def figures_of(rows: list[dict]) -> dict[str, float]:
    """Medians over the logged steps but the first, and the last values."""
    steps = [row for row in rows if "clips_per_s" in row]
    probes = [row for row in rows if "probe/seconds" in row]
    figures = {}
    for name in ("clips_per_s", "mfu", "data_wait", "memory_gib"):
        values = [row[name] for row in steps[1:] or steps if name in row]
        figures |= {name: median(values)} if values else {}
    for name in ("loss", "loss_video", "loss_audio", "loss_contrast"):
        figures |= {name: steps[-1][name]} if name in steps[-1] else {}
    found = probes[-1] if probes else {}
    return figures | {name: value for name, value in found.items() if name.startswith("probe/")}


if __name__ == "__main__":
    sys.exit(main())
