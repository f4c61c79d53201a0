"""What the training engine costs: `python -m benchmarks.engine --size base`.

In one process, in turns: a step of the bare loop (forward, backward, norm, fused AdamW) and of the engine at stage 0
with the guard; then a save, up to where training goes on, and a copy of the same tensors in memory. Then 50 steps at
every ZeRO stage by one and by two processes, beside plain PyTorch: the largest difference of a loss.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from affekt.pretrain.engine import start_processes
from affekt.pretrain.guard import Guard, GuardSettings
from affekt.pretrain.optim import OptimSettings, clip_gradients, create_optimizer, lr_at
from affekt.pretrain.registry import create_model
from affekt.pretrain.saver import Saver
from affekt.pretrain.zero import Engine
from benchmarks.faults.rig import MODEL, Rig
from benchmarks.report import print_figures
from benchmarks.step import synthetic

STEPS, BATCH = 50, 4  # of a trace
STAGES = (None, 0, 1, 2, 3)  # None is plain PyTorch
RECIPE = OptimSettings(base_lr=0.096, clip_grad=1.0)  # 1.5e-3 at 4 clips, as launch/grid.yaml at its 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["base", "small", "tiny", "nano"], default="base")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    _, _, device = start_processes()
    table = Table("what", "seconds", "of", "seconds", "ratio", title=f"{arguments.size}, {arguments.batch} clips")
    with tempfile.TemporaryDirectory() as folder:
        engine = overhead(arguments, device, table)
        save = waiting(engine, Path(folder) / "checkpoints", arguments.rounds, table)
        figures = {f"overhead_{arguments.size}": table_ratio(table, 0), f"save_wait_{arguments.size}": save}
        Console().print(table)
        traces = largest_differences(Rig(Path(folder) / "rig"))
    table = Table("processes", *(f"ZeRO {stage}" for stage in STAGES[1:]), title=f"largest difference, {STEPS} steps")
    for ranks, found in traces.items():
        table.add_row(str(ranks), *(f"{x:.1e}" for x in found.values()))
        figures |= {f"trace_zero{stage}_world{ranks}": x for stage, x in found.items()}
    Console().print(table)
    print_figures("engine", figures)


def table_ratio(table: Table, row: int) -> float:
    return float(list(table.columns[4].cells)[row])


class Bare:
    """The step that the engine is compared with."""

    def __init__(self, size: str, device: torch.device):
        torch.manual_seed(0)
        self.model = create_model(f"hicmae_{size}").to(device).train()
        self.optimizer = create_optimizer(self.model, RECIPE)

    def step(self, inputs, masks) -> None:
        self.model(inputs, *masks)["loss"].backward()
        clip_gradients(self.model, RECIPE.clip_grad)
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-4
        self.optimizer.step()
        self.optimizer.zero_grad()


def overhead(arguments: argparse.Namespace, device: torch.device, table: Table) -> Engine:
    """The engine's step over the bare one; the engine, for what comes next."""
    bare, ours = Bare(arguments.size, device), Bare(arguments.size, device)
    engine = Engine(ours.model, ours.optimizer, arguments.batch, "fp32", clip=RECIPE.clip_grad)
    inputs, masks = synthetic(bare.model.settings, torch.arange(arguments.batch), device)
    guard = Guard(GuardSettings(), device)

    def engine_step() -> None:
        loss = engine(inputs, *masks)["loss"]
        engine.backward(loss)
        engine.step(1e-4, partial(guard.judge, 0, loss))
        guard.look()

    compare(table, arguments.rounds, "step of the engine", engine_step, "bare", lambda: bare.step(inputs, masks))
    return engine


def waiting(engine: Engine, folder: Path, rounds: int, table: Table) -> float:
    """How long a save keeps training waiting, over a copy of the same tensors in memory."""
    tensors = list(engine.numbers().values())
    copies = [torch.empty_like(x) for x in tensors]
    with Saver(folder, keep_last=1) as saver:

        def save() -> None:
            saver.save(1, engine.numbers(), engine.state(), {})

        return compare(
            table, rounds, "save", save, "copy", lambda: torch._foreach_copy_(copies, tensors), between=saver.wait
        )


def compare(
    table: Table,
    rounds: int,
    name: str,
    first: Callable[[], object],
    other: str,
    second: Callable[[], object],
    between: Callable[[], object] = lambda: None,
) -> float:
    """Both in turns, the first to begin in every second round; the ratio of their medians. `between` is not timed."""
    seconds: dict[str, list[float]] = {name: [], other: []}
    for number in range(rounds + 1):
        pair = [(name, first), (other, second)]
        for what, call in pair if number % 2 else reversed(pair):
            before = time.perf_counter()
            call()
            seconds[what].append(time.perf_counter() - before)
            between()
    a, b = (median(values[1:]) for values in seconds.values())  # without the first, which warms up
    table.add_row(name, f"{a:.4g}", other, f"{b:.4g}", f"{a / b:.4f}")
    return a / b


def largest_differences(rig: Rig, worlds: tuple[int, ...] = (1, 2), steps: int = STEPS) -> dict[int, dict[int, float]]:
    """{processes: {stage: the largest relative difference of a loss from plain PyTorch's}}."""
    found: dict[int, dict[int, float]] = {}
    for ranks in worlds:
        traces = {}
        for stage in STAGES:
            file = rig.new("trace")
            job = rig.call(trace, stage, steps, file, ranks=ranks)
            job.wait()
            if any(job.codes):
                raise RuntimeError(job.told)
            traces[stage] = json.loads(file.read_text())
        plain = traces.pop(None)
        found[ranks] = {
            stage: max(abs(a - b) / b for a, b in zip(losses, plain, strict=True)) for stage, losses in traces.items()
        }
    return found


def trace(stage: int | None, steps: int, file: Path) -> None:
    """Write the losses of so many steps; the work of one process."""
    torch.set_num_threads(1)
    rank, world_size, device = start_processes()
    torch.manual_seed(0)
    model = create_model("hicmae_nano", **{k: v for k, v in MODEL.items() if k != "name"}, mask_ratio_video=0.5)
    model = model.to(device).train()
    optimizer, share = create_optimizer(model, RECIPE), BATCH // world_size
    inputs, masks = synthetic(model.settings, rank * share + torch.arange(share), device)
    engine = None if stage is None else Engine(model, optimizer, share, "fp32", stage=stage, clip=RECIPE.clip_grad)
    losses = []
    for step in range(steps):
        lr = lr_at(step, steps, RECIPE, BATCH)
        loss = (engine or model)(inputs, *masks)["loss"]
        if engine:
            engine.backward(loss)
            engine.step(lr)
        else:
            plain_step(model, optimizer, loss, lr)
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / world_size)
    if rank == 0:
        file.write_text(json.dumps(losses))
    if engine:
        engine.close()


def plain_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor, lr: float) -> None:
    optimizer.zero_grad()
    loss.backward()
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()
    torch.nn.utils.clip_grad_norm_(model.parameters(), RECIPE.clip_grad)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()


if __name__ == "__main__":
    main()
