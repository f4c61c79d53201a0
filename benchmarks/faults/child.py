"""What happens inside of a process that a fault test starts; it is forked from one that has imported torch already."""

import os
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from affekt.data.machine import end_with_parent

POINTS = (  # of a save, in their order; `pretrain.writing.point` is called with these names
    "before-write",
    "while-writing",
    "before-fsync",
    "after-fsync",
    "before-rename",
    "after-rename",
    "before-pointer",
    "during-purge",
)
SMALL_FILE = 1 << 16  # bytes that the disk still takes when it is full


@dataclass
class Fault:
    """When this process comes to `point` of its save number `save`: kill the process `victim`, itself where that is 0;
    or, with `full`, let no file grow beyond SMALL_FILE from then on, for so many saves."""

    point: str
    save: int
    victim: int = 0
    full: int = 0
    saves: int = 0

    def __call__(self, name: str, count: int = 0) -> None:
        self.saves += name == "before-write"
        if self.full and name == "before-write":  # also called for each new attempt
            self._limit(SMALL_FILE if self.saves >= self.save else resource.RLIM_INFINITY)
        elif not self.full and name == self.point and self.saves >= self.save:
            os.kill(self.victim or os.getpid(), signal.SIGKILL)

    @staticmethod
    def _limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def run(function: Callable[..., Any], arguments: tuple, place: dict[str, str], log: Path, fault: Fault | None) -> None:
    """Call a function as the whole work of this process: its output goes into `log`, what it returns is the exit
    code."""
    os.setsid()
    end_with_parent()
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    os.environ.update(place)
    if fault:
        from affekt.pretrain import checkpoint, writing

        writing.point = checkpoint.point = fault
    code = function(*arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def pretrain(*arguments: str) -> int:
    """`affekt pretrain ...`"""
    from affekt.cli import run as affekt

    return affekt(["pretrain", *arguments])


def finetune(*arguments: str) -> int:
    """`affekt finetune ...`"""
    from affekt.cli import run as affekt

    return affekt(["finetune", *arguments])


def save_again(checkpoint: Path, run_folder: Path, stage: int) -> None:
    """Read a checkpoint at a ZeRO stage, and write it again, without a step between, into the folder of another run."""
    from affekt.pretrain.checkpoint import read_checkpoint
    from affekt.pretrain.engine import start_processes
    from affekt.pretrain.hicmae import HiCMAE
    from affekt.pretrain.optim import create_optimizer
    from affekt.pretrain.saver import Saver
    from affekt.pretrain.settings import PretrainSettings
    from affekt.pretrain.zero import Engine

    start_processes()
    state, weights, moments = read_checkpoint(checkpoint)
    settings = PretrainSettings.parse_saved(state["settings"], str(checkpoint))
    model = HiCMAE(settings.model)
    model.load_state_dict(weights)
    engine = Engine(model, create_optimizer(model, settings.optim), 1, "fp32", stage=stage)
    engine.restore(moments, state)
    with Saver(run_folder / "checkpoints", keep_last=2) as saver:
        saver.save(state["step"], engine.numbers(), {**state, **engine.state()}, {"zero_stage": stage})


def save_forever(folder: Path) -> None:
    """Save small tensors one after the other, of which two are kept, until the process is killed."""
    import torch

    from affekt.pretrain.saver import Saver

    saver = Saver(folder, keep_last=2)
    for step in range(10**6):
        numbers = {"weight/x": torch.full((1000,), float(step))}
        saver.save(step, numbers, {"shapes": {"x": [1000]}}, {"zero_stage": 0})
