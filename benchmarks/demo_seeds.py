"""The demo over several seeds: `python -m benchmarks.demo_seeds --seeds 0 1 2`.

A seed decides the corpus (speakers, faces, voices, noise), the weights and the order of training; the random encoders
and plain statistics beside it see the same clips and choose from the same menu. About ten minutes a seed on two cores.
Finished seeds are kept, so an interrupted command goes on.
"""

import argparse
import sys
from pathlib import Path
from statistics import mean, stdev

from rich.console import Console
from rich.table import Table

from affekt.cli import CORES
from affekt.demo import demo
from affekt.finetune.probes.results import ROW_NAMES, STREAM_NAMES, find_row
from affekt.progress import progress
from benchmarks.report import print_figures

ROWS = [
    ("pretrained", "chosen"),
    ("random", "chosen"),
    ("statistics", "chosen"),
    ("majority", "chosen"),
    ("pretrained", "plain"),
    ("random", "plain"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/demo_seeds"))
    arguments = parser.parse_args()
    results, seconds = {}, {}
    for seed in arguments.seeds:
        answer = demo(arguments.out / f"seed{seed}", seed, CORES, progress)
        results[seed], seconds[seed] = answer, answer["seconds_by_stage"]
        print(f"seed {seed}: {seconds[seed]}", file=sys.stderr)

    table = Table(title=f"UAR on test speakers, percent, mean over seeds {arguments.seeds} (each seed)")
    table.add_column("Features")
    figures = {}
    for stream in STREAM_NAMES:
        table.add_column(STREAM_NAMES[stream], justify="right")
    for features, kind in ROWS:
        cells = []
        for stream in STREAM_NAMES:
            rows = [find_row(result, features, stream, kind) for result in results.values()]
            scores = [100 * row["test"]["uar"]["value"] for row in rows]
            cells.append(f"{mean(scores):.1f} ({', '.join(f'{score:.1f}' for score in scores)})")
            figures[f"uar_{features}_{kind}_{stream}"] = round(mean(scores), 2)
        table.add_row(f"{ROW_NAMES[features]}{', plain mean' if kind == 'plain' else ''}", *cells)
    Console().print(table)

    gains = [gain(result, ("random", "both")) for result in results.values()]
    figures |= {
        "gain_over_random_both": round(mean(gains), 2),
        "gain_over_random_both_sd": round(stdev(gains), 2) if len(gains) > 1 else 0.0,
        "gain_of_both_over_audio": round(mean(gain(r, ("pretrained", "audio")) for r in results.values()), 2),
        "gain_of_both_over_video": round(mean(gain(r, ("pretrained", "video")) for r in results.values()), 2),
        "seeds": len(results),
        "minutes_of_the_longest": round(max(sum(stages.values()) for stages in seconds.values()) / 60, 2),
    }
    print_figures("demo_seeds", figures)


def gain(results: dict, other: tuple[str, str]) -> float:
    """Points of UAR by which the pre-trained encoder with both streams is above another row."""
    features, stream = other
    ours, theirs = find_row(results, "pretrained", "both"), find_row(results, features, stream)
    return 100 * (ours["test"]["uar"]["value"] - theirs["test"]["uar"]["value"])


if __name__ == "__main__":
    main()
