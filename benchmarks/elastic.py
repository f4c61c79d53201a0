"""A run that is stopped twice and goes on with other numbers of processes: `python -m benchmarks.elastic --rounds 3`.

Each round trains a small model with 2, then 1, then 4 processes and other numbers of loader workers, stopped at random
steps, and compares it with the straight run of one process: the ledger of which clip stood where, and the loss of every
step. About two minutes a round.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.report import print_figures

SMALL = ["model.embed_dim=48", "model.depth=2", "model.taps=[1, 2]", "model.decoder_embed_dim=32", "model.img_size=32"]
RECIPE = ["model.name=hicmae_nano", *SMALL, "model.mask_ratio_video=0.5", "optim.base_lr=0.05", "optim.clip_grad=1"]
STEPS, BATCH = 50, 8
PIECES = ((2, 0), (1, 2), (4, 1))  # processes, loader workers of each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--out", type=Path, default=Path("runs/elastic"))
    arguments = parser.parse_args()
    config = make_config(arguments.out)
    table = Table(title=f"{STEPS} steps of {BATCH} clips: 2, then 1, then 4 processes against one")
    for column in ("seed", "stopped after", "ledger", "largest difference of a loss", "of the losses"):
        table.add_column(column)
    equal, worst = 0, 0.0
    for number in range(arguments.rounds):
        seed = arguments.seed + number
        straight, pieces = (arguments.out / f"{seed}-{name}" for name in ("straight", "pieces"))
        finish(start(config, straight, seed, 1, 0))
        stops = in_pieces(config, pieces, seed)
        one, two = ledger(straight), ledger(pieces)
        a, b = losses(straight), losses(pieces)
        difference = max(abs(x - y) for x, y in zip(a, b, strict=True))
        equal, worst = equal + (one == two), max(worst, difference)
        table.add_row(str(seed), str(stops), "equal" if one == two else "DIFFERS", f"{difference:.1e}", f"{max(a):.2f}")
    Console().print(table)
    print_figures("elastic", {"rounds": arguments.rounds, "ledgers_equal": equal, "largest_loss_difference": worst})


def make_config(out: Path) -> Path:
    """The built-in corpus, prepared, and a file of settings; kept for another call."""
    corpus, shards, config = out / "corpus", out / "shards", out / "elastic.yaml"
    if not (shards / "index.safetensors").exists():
        affekt("synth", str(corpus), "--clips", "45", "--speakers", "9", "--seed", "0")
        affekt("prepare", str(corpus), str(shards), "--size", "32", "--face", "center", "clips_per_shard=9")
    config.write_text(json.dumps({"out": "run", "data": {"shards": str(shards)}}), encoding="utf-8")
    return config


def affekt(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "affekt", *arguments], check=True, stdout=subprocess.DEVNULL)


def start(config: Path, run: Path, seed: int, processes: int, workers: int) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    train = [f"train.{key}" for key in (f"steps={STEPS}", f"global_batch={BATCH}", f"seed={seed}", "precision=fp32")]
    train += ["train.log_every=1", "train.checkpoint_every=1", "train.picture_every=1000"]
    settings = [*RECIPE, *train, f"out={run}", f"data.workers={workers}", "--resume", "auto"]
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "affekt", "pretrain", str(config), *settings],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


def in_pieces(config: Path, run: Path, seed: int) -> list[int]:
    """Train with each number of processes in turn, all but the last stopped at a random step; these steps."""
    stops, left = [], list(PIECES)
    rng = random.Random(seed)
    while len(left) > 1:
        process = start(config, run, seed, *left.pop(0))
        stop = rng.randrange(stops[-1] + 1 if stops else 1, STEPS - 5 * len(left))
        while (done := newest(run)) < stop:
            if process.poll() is not None:
                raise SystemExit(f"it ended too early:\n{process.stderr.read()}")
            time.sleep(0.05)
        process.terminate()
        process.communicate()
        stops.append(max(done, newest(run)))
    finish(start(config, run, seed, *left[0]))
    return stops


def newest(run: Path) -> int:
    return max((int(path.parent.name[5:]) for path in run.glob("checkpoints/step-*/manifest.json")), default=0)


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(errors)


def ledger(run: Path) -> str:
    return json.loads((run / "summary.json").read_text(encoding="utf-8"))["accounting"]["ledger"]


def losses(run: Path) -> list[float]:
    """Of every step."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return [row["loss"] for row in rows]


if __name__ == "__main__":
    main()
