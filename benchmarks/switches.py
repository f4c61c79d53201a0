"""The switches of the objective, one at a time: `python -m benchmarks.switches --seeds 0 1`.

Every row is the demo's recipe with one setting changed, on the demo's corpus of each seed, judged by the demo's probe;
differences are to the recipe itself with the same seed. Runs take turns in `--jobs` processes of one thread, finished
ones are kept, and a repeated command goes on. About seven minutes a run where a core is free.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

from rich.console import Console
from rich.table import Table

from affekt.demo import CLIPS, FACE_SIZE, SECONDS, SPEAKERS
from affekt.finetune.probes.results import STREAM_NAMES, find_row
from benchmarks.report import print_figures

RECIPE = "the recipe"
SWITCHES = {
    RECIPE: [],
    "positions per axis": ["model.positions=factorised"],
    "projection heads": ["model.projector_dim=128"],
    "no contrast": ["model.contrast_weight=0"],
    "contrast x 10": ["model.contrast_weight=0.025"],
    "pixels, no frame difference": ["model.frame_difference=false"],
    "masks 0.9 / 0.8": ["model.mask_ratio_video=0.9", "model.mask_ratio_audio=0.8"],
}

# The folds are 24 speakers on whom layer and penalty were chosen, so high for every row, but steadier than 8 others.
PARTS = {"folds": "folds over the training speakers", "test": "test speakers"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--switches", nargs="+", choices=list(SWITCHES), default=list(SWITCHES), metavar="NAME")
    parser.add_argument("--steps", type=int, help="of pre-training; default: the demo's")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/switches"))
    arguments = parser.parse_args()
    names = list(dict.fromkeys([RECIPE, *arguments.switches]))
    for seed in arguments.seeds:
        make_corpus(arguments.out / f"seed{seed}", seed)
    runs = [(seed, name) for seed in arguments.seeds for name in names]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        results = dict(zip(runs, pool.map(lambda run: train_and_probe(*run, arguments), runs), strict=True))

    figures = {"seeds": len(arguments.seeds)}
    for part, title in PARTS.items():
        table = Table(title=f"UAR, {title}, percent, and differences to it: mean over seeds {arguments.seeds}")
        for column in ("", *STREAM_NAMES.values()):
            table.add_column(column)
        for name in names:
            cells = []
            for stream in STREAM_NAMES:
                scores = [uar(results[seed, name], stream, part) for seed in arguments.seeds]
                if name != RECIPE:
                    recipe = [uar(results[seed, RECIPE], stream, part) for seed in arguments.seeds]
                    scores = [score - before for score, before in zip(scores, recipe, strict=True)]
                sign = "" if name == RECIPE else "+"
                cells.append(f"{mean(scores):{sign}.1f} ({', '.join(f'{score:{sign}.1f}' for score in scores)})")
                figures[f"{part}, {name}, {stream}"] = round(mean(scores), 2)
            table.add_row(name, *cells)
        Console(width=max(Console().width, 120)).print(table)
    print_figures("switches", figures)


def make_corpus(folder: Path, seed: int) -> None:
    """The demo's corpus and shards of a seed."""
    size = [f"--clips={CLIPS}", f"--speakers={SPEAKERS}", f"--seconds={SECONDS}", f"--seed={seed}"]
    if not (folder / "corpus" / "manifest.csv").is_file():
        affekt("synth", folder / "corpus", *size)
    if not (folder / "shards" / "summary.json").is_file():
        affekt("prepare", folder / "corpus" / "manifest.csv", folder / "shards", "--size", FACE_SIZE)


def train_and_probe(seed: int, name: str, arguments: argparse.Namespace) -> dict:
    """The probe's results of one run, made unless they are there."""
    corpus = arguments.out / f"seed{seed}"
    steps = [f"train.steps={arguments.steps}"] if arguments.steps else []
    folder = corpus / "_".join(["run", *SWITCHES[name], *steps]).replace("model.", "").replace("=", "-")
    run, exported, probed = folder / "pretrain", folder / "export", folder / "probe"
    if not (probed / "results.json").is_file():
        settings = [f"out={run}", f"data.shards={corpus / 'shards'}", f"train.seed={seed}", *steps, *SWITCHES[name]]
        affekt("pretrain", "demo", "--resume", "auto", *settings)
        affekt("export", run, exported)
        where = [f"shards={corpus / 'shards'}", f"encoder={exported}", f"run={run}", f"output={probed}"]
        affekt("probe", "demo_probe", *where, f"seed={seed}", "workers=1")
        print(f"done: seed {seed}, {name}", file=sys.stderr)
    return json.loads((probed / "results.json").read_text())


def affekt(*arguments: object) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "affekt", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def uar(results: dict, stream: str, part: str) -> float:
    row = find_row(results, "pretrained", stream)
    return 100 * (row["choices"][0]["dev"] if part == "folds" else row["test"]["uar"]["value"])


if __name__ == "__main__":
    main()
