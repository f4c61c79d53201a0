"""What happens inside of a process of rows_health and rows_lost: parts of affekt are replaced, then it runs."""

import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from benchmarks.faults.child import pretrain

KINDS = ("input nan", "input inf", "loss nan", "loss inf", "gradient nan", "gradient inf")


def poisoned(steps: dict[int, str], rank: int, out: str, *arguments: str) -> int:
    """`affekt pretrain` whose `rank` meets a number that is not finite at these steps, each of a kind of KINDS. Writes
    to `out`-moved-RANK.json at which steps weights, moments or step counts changed by a single bit."""
    from affekt.pretrain.hicmae import HiCMAE
    from affekt.pretrain.zero import Engine

    steps = steps if _rank() == rank else {}
    step = on_forward(lambda step, model, inputs: _poison(steps.get(step, ""), model, inputs))
    whole, moved = Engine.step, []
    forward = HiCMAE.forward

    def spoilt(self, inputs, *rest, **only):
        losses = forward(self, inputs, *rest, **only)
        kind = steps.get(step(), "") if self.training else ""
        if kind.startswith("loss") and not only:
            losses["loss"] = losses["loss"] + float(kind.split()[1])
        return losses

    def watched(self, *given):
        before = _bits(self)
        result = whole(self, *given)
        if _bits(self) != before:
            moved.append(step())
            Path(f"{out}-moved-{_rank()}.json").write_text(json.dumps(moved))
        return result

    HiCMAE.forward, Engine.step = spoilt, watched
    return pretrain(*arguments, f"out={out}")


def _poison(kind: str, model, inputs) -> None:
    if kind.startswith("input"):
        inputs.audio.view(-1)[:1000] = float(kind.split()[1])
    elif kind.startswith("gradient"):
        weight = next(p for p in model.parameters() if p.requires_grad and p.ndim == 2)
        handle = weight.register_hook(lambda gradient: (handle.remove(), gradient * float(kind.split()[1]))[1])


def _bits(engine) -> list[int]:
    from affekt.pretrain.replicas import bit_sum, replicated

    moments = engine.optimizer.state  # none before the first step
    return [int(bit_sum(x)) for _, x in replicated(engine.deepspeed.module, engine.optimizer)] if moments else []


def on_forward(act: Callable[[int, torch.nn.Module, object], None]) -> Callable[[], int]:
    """Call `act(step, model, inputs)` before every training step's forward pass; returns a function that tells the
    step."""
    from affekt.pretrain import loop
    from affekt.pretrain.hicmae import HiCMAE

    at = [0]
    forward, seed_of = HiCMAE.forward, loop._step_seed

    def seeded(seed, step, *place):
        at[0] = step
        return seed_of(seed, step, *place)

    def acting(self, inputs, *rest, **only):  # `only_features`, where a batch comes in parts
        if self.training and not only:
            act(at[0], self, inputs)
        return forward(self, inputs, *rest, **only)

    loop._step_seed, HiCMAE.forward = seeded, acting
    return lambda: at[0]


def spiking(cases: Iterable[tuple[str, str, list[int]]], *arguments: str) -> int:
    """Several runs one after the other: (folder, kind, steps). `rate` makes the learning rate of these steps 300 times
    as high; `batch` the loss ten times; `left out` never learns from them, with all else as it is and no guard."""
    from affekt.pretrain import loop
    from affekt.pretrain.guard import Guard
    from affekt.pretrain.hicmae import HiCMAE

    kind, steps, codes = "", [], {}
    at = on_forward(lambda *_: None)
    rate, judge, forward = loop.lr_at, Guard.judge, HiCMAE.forward

    def spiky(self, inputs, *rest, **only):
        losses = forward(self, inputs, *rest, **only)
        if kind == "batch" and self.training and at() in steps and not only:
            losses["loss"] = 10 * losses["loss"]
        return losses

    HiCMAE.forward = spiky
    loop.lr_at = lambda step, *rest: rate(step, *rest) * (300 if kind == "rate" and step in steps else 1)
    Guard.judge = lambda self, step, loss, norm, scaled: (
        torch.tensor(float(step in steps)) if kind == "left out" else judge(self, step, loss, norm, scaled)
    )
    for folder, kind, steps in cases:  # noqa: B007 (the functions above see them)
        codes[folder] = pretrain(*arguments, f"out={folder}")
        Path(f"{folder}-code").write_text(str(codes[folder]))
    return 0


def stalled(rank: int, step: int, *arguments: str) -> int:
    """`affekt pretrain` in which one rank stands still in a step."""
    on_forward(lambda now, *_: time.sleep(1000) if now == step and _rank() == rank else None)
    return pretrain(*arguments)


def flipping(rank: int, step: int, *arguments: str) -> int:
    """`affekt pretrain` in which a bit of one rank's weights flips before a step."""

    def flip(now, model, _inputs):
        if now == step and _rank() == rank:
            next(model.parameters()).data.view(-1).view(torch.int32)[7] ^= 1 << 3

    on_forward(flip)
    return pretrain(*arguments)


def flipped_places(config: str, places: int, seed: int, out: str) -> int:
    """Flip one bit of rank 1 at random places, each turned back again; writes on every rank how many were found and
    named by `check_replicas`, and whether it is silent when nothing differs."""
    import random

    from affekt.data.errors import HealthError
    from affekt.pretrain.engine import start_processes
    from affekt.pretrain.hicmae import HiCMAE
    from affekt.pretrain.optim import create_optimizer
    from affekt.pretrain.replicas import BITS, check_replicas, replicated
    from affekt.pretrain.settings import PretrainSettings

    rank, _, _ = start_processes()
    settings, rng, found = PretrainSettings.read(config), random.Random(seed), 0
    torch.manual_seed(0)
    model = HiCMAE(settings.model)
    optimizer = create_optimizer(model, settings.optim)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    check_replicas(0, model, optimizer)
    tensors = list(replicated(model, optimizer))
    for _ in range(places):
        name, tensor = rng.choice(tensors)
        width = 8 * tensor.element_size()
        place, bit = rng.randrange(tensor.numel()), rng.randrange(width)
        mask = (1 << bit) - (1 << width if bit == width - 1 else 0)  # the highest bit is the sign
        bits = tensor.detach().view(-1).view(BITS[tensor.element_size()])
        bits[place] ^= mask if rank == 1 else 0
        try:
            check_replicas(0, model, optimizer)
        except HealthError as error:
            found += f"  {name}: " in str(error)
        bits[place] ^= mask if rank == 1 else 0
    check_replicas(0, model, optimizer)
    Path(f"{out}-{rank}").write_text(str(found))
    return 0


def listening(out: str, *arguments: str) -> int:
    """`affekt pretrain` that writes, at its fifth step, the addresses at which this process listens."""

    def look(step, *_):
        if step == 5:
            own = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
            rows = [
                line.split() for kind in ("tcp", "tcp6") for line in Path(f"/proc/net/{kind}").read_text().split("\n")
            ]
            found = [row[1] for row in rows if len(row) > 9 and row[3] == "0A" and f"socket:[{row[9]}]" in own]
            Path(f"{out}-listens-{_rank()}.json").write_text(json.dumps(found))

    on_forward(look)
    return pretrain(*arguments, f"out={out}")


def _rank() -> int:
    return int(os.environ["RANK"])
