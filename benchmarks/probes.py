"""What online probes cost at their default interval: `python -m benchmarks.probes`.

For each model a short run of `affekt pretrain` on the built-in corpus is probed more often than by default. Its own log
says how long a probe takes and how many clips a second it trains on; the share of the time that probes take at the
default interval follows. A run that lasts one interval or longer spends no more, a shorter one its last probe.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from affekt.pretrain.log import read_metrics
from affekt.pretrain.online import default_interval
from affekt.pretrain.registry import model_settings
from benchmarks.report import print_figures

RUNS = {"nano": (12, 90, 30), "tiny": (8, 9, 3)}  # clips a step, steps, steps between two probes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--clips", type=int, default=256, help="that are probed; 256 is what a run takes by default")
    parser.add_argument("--shards", type=Path, help="labelled ones, with speakers, instead of the built-in corpus")
    parser.add_argument("--out", type=Path, default=Path("runs/probes"))
    arguments = parser.parse_args()
    shards, clips = arguments.shards or make_shards(arguments.out, arguments.clips), arguments.clips
    table = Table(title=f"online probes of {clips} clips")
    for column in ("model", "clips a step", "seconds of a step", "of a probe", "default interval", "share of the time"):
        table.add_column(column, justify="right")
    figures = {}
    for name in arguments.models:
        batch = RUNS[name][0]
        step, probe = measure(arguments.out / name, shards, name, clips)
        every = default_interval(model_settings(f"hicmae_{name}"), clips, batch)
        figures[f"{name}_share"] = round(probe / (probe + every * step), 5)
        table.add_row(name, f"{batch}", f"{step:.2f}", f"{probe:.1f}", f"{every}", f"{figures[f'{name}_share']:.2%}")
    Console().print(table)
    print_figures("probes", figures)


def make_shards(out: Path, clips: int) -> Path:
    """The built-in corpus, prepared; kept for another call."""
    corpus, shards = out / f"corpus{clips}", out / f"shards{clips}"
    if not (shards / "index.safetensors").exists():
        affekt("synth", str(corpus), "--clips", str(clips), "--speakers", "16", "--seed", "0")
        affekt("prepare", str(corpus), str(shards), "--size", "160", "--face", "center")
    return shards


def measure(run: Path, shards: Path, name: str, clips: int) -> tuple[float, float]:
    """Seconds of a step and of a probe, medians over a run without its first logged step and first probe."""
    batch, steps, every = RUNS[name]
    config = run.with_suffix(".yaml")
    settings = {
        "out": str(run),
        "model": {"name": f"hicmae_{name}"},
        "data": {"shards": str(shards), "workers": 0},
        "train": {"steps": steps, "global_batch": batch, "log_every": every, "picture_every": steps},
    }
    settings["train"]["probe"] = {"shards": str(shards), "every": every, "clips": clips}
    run.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(json.dumps(settings), encoding="utf-8")
    shutil.rmtree(run, ignore_errors=True)  # of an earlier call
    affekt("pretrain", str(config))
    rows = read_metrics(run / "metrics.jsonl")
    rates = [row["clips_per_s"] for row in rows if "clips_per_s" in row][1:]
    probes = [row["probe/seconds"] for row in rows if "probe/seconds" in row][1:]
    return batch / median(rates), median(probes)


def affekt(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "affekt", *arguments], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
