"""Two processes with a thread each beside one with two: `python -m benchmarks.scaling`.

The same global batch at ZeRO stage 0 over gloo, with the contrast across both processes, the guard and the clipping of
a run. The two ways take turns, process by process; what counts is the median over rounds of the clips per second, each
measured over some steps after two that warm up.
"""

import argparse
import json
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from affekt.pretrain.engine import choose_matmul_precision, start_processes
from affekt.pretrain.guard import Guard, GuardSettings
from affekt.pretrain.optim import OptimSettings, create_optimizer
from affekt.pretrain.registry import create_model
from affekt.pretrain.zero import Engine
from benchmarks.faults.rig import Rig
from benchmarks.report import print_figures
from benchmarks.step import synthetic

WAYS = {"one": (1, 2), "two": (2, 1)}  # processes, threads of each
STEPS = {"nano": 12, "tiny": 3}
WARM = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    table = Table(
        "model", "one process, 2 threads", "two, 1 thread", "ratio", title=f"clips/s, {arguments.batch} clips"
    )
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        rig = Rig(Path(folder))
        for size in arguments.sizes:
            speeds: dict[str, list[float]] = {way: [] for way in WAYS}
            for number in range(arguments.rounds):
                for way in list(WAYS) if number % 2 else reversed(WAYS):
                    speeds[way].append(clips_per_second(rig, size, arguments.batch, *WAYS[way]))
            one, two = (median(speeds[way]) for way in ("one", "two"))
            table.add_row(size, f"{one:.2f}", f"{two:.2f}", f"{two / one:.3f}")
            figures[f"two_over_one_{size}"] = round(two / one, 3)
    Console().print(table)
    print_figures("scaling", figures | {"rounds": arguments.rounds})


def clips_per_second(rig: Rig, size: str, batch: int, ranks: int, threads: int) -> float:
    file = rig.new("speed")
    job = rig.call(measure, size, batch, threads, file, ranks=ranks)
    job.wait()
    if any(job.codes):
        raise RuntimeError(job.told)
    return json.loads(file.read_text())


def measure(size: str, batch: int, threads: int, file: Path) -> None:
    """Write the clips per second of some steps; the work of one process."""
    torch.set_num_threads(threads)
    rank, world_size, device = start_processes()
    choose_matmul_precision()
    torch.manual_seed(0)
    model = create_model(f"hicmae_{size}").to(device).train()
    share = batch // world_size
    inputs, masks = synthetic(model.settings, rank * share + torch.arange(share), device)
    recipe = OptimSettings(clip_grad=1.0)
    engine = Engine(model, create_optimizer(model, recipe), share, "fp32", clip=recipe.clip_grad)
    guard = Guard(GuardSettings(), device)
    for step in range(WARM + STEPS[size]):
        if step == WARM:
            dist.barrier()
            started = time.perf_counter()
        loss = engine(inputs, *masks)["loss"]
        engine.backward(loss)
        engine.step(1e-4, partial(guard.judge, step, loss))
        guard.look()
    dist.barrier()
    if rank == 0:
        file.write_text(json.dumps(STEPS[size] * batch / (time.perf_counter() - started)))
    engine.close()


if __name__ == "__main__":
    main()
