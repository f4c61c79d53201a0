"""How processes start, find each other and keep time: one or several, CPU or GPU."""

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.distributed as dist

from affekt.data.accounting import all_gather_json
from affekt.data.errors import SettingsError
from affekt.data.machine import keep_freed_memory
from affekt.pretrain.rendezvous import join_group

Precision = Literal["auto", "fp32", "bf16", "fp16"]
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}  # over float32 weights
EXACT_MATMUL = 1e-6  # relative error of a float32 product; bf16 inputs would give 1e-3


def start_processes(watchdog_s: float | None = None) -> tuple[int, int, torch.device]:
    """Join the process group that the launcher announced, or a group of one: (rank, world_size, device).

    Ranks come from RANK, LOCAL_RANK and WORLD_SIZE (torchrun, deepspeed). Listens on the loopback interface alone
    unless MASTER_ADDR leads elsewhere. `watchdog_s` is the silence after which a watchdog, if any, ends a run.
    """
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # for who asks; a group of one has no store
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        keep_freed_memory()
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        import deepspeed

        # On a CPU DeepSpeed would compile an op for shared-memory reductions at the first start: half a minute and a
        # C++ compiler, for a reduction that gloo does as well.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        backend = "nccl" if device.type == "cuda" else "gloo"
        join_group(backend, watchdog_s)
        deepspeed.init_distributed(dist_backend=backend, verbose=False)
    return dist.get_rank(), dist.get_world_size(), device


def resolve_precision(precision: Precision, device: torch.device) -> str:
    """`auto` is bf16 on a GPU and fp32 on a CPU."""
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" else "fp32"


def choose_matmul_precision() -> str:
    """Let a CPU choose the quicker library for float32 products where that costs no accuracy: `medium` or `highest`.

    On AMD machines torch's switch `medium` selects oneDNN, twice as quick and as exact; where the machine multiplies
    bf16 in hardware (AMX) the same switch rounds to bf16. One product against float64 tells them apart.
    """
    if torch.cuda.is_available():
        return torch.get_float32_matmul_precision()
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    torch.set_float32_matmul_precision("medium")
    if ((a @ b - exact).abs().max() / exact.abs().max()).item() >= EXACT_MATMUL:
        torch.set_float32_matmul_precision("highest")
    return torch.get_float32_matmul_precision()


def digest(*values: object) -> str:
    """Stands for values that ranks, or a run and its checkpoint, have to have in common."""
    return hashlib.sha256("\n".join(map(str, values)).encode()).hexdigest()[:16]


def agree(value: str, what: str) -> None:
    """Raise SettingsError unless all ranks hold the same `value` (a hash of settings and data)."""
    values = all_gather_json(value)
    if len(set(values)) > 1:
        raise SettingsError(f"the ranks disagree on {what}: {values}; start them with the same settings and data")


class Stopwatch:
    """Steps and seconds since the last lap, and how many of the seconds were spent waiting for data."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.steps, self.waited = 0, 0.0

    def wait_for(self, iterator):
        """The next item, its waiting time counted, as the beginning of a step."""
        before = time.perf_counter()
        item = next(iterator)
        self.waited += time.perf_counter() - before
        self.steps += 1
        return item

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside, such as writing a checkpoint, is no time of the steps."""
        before = time.perf_counter()
        yield
        self.started += time.perf_counter() - before

    def lap(self) -> tuple[int, float, float]:
        """(steps, seconds, seconds of waiting) since the last lap."""
        now = time.perf_counter()
        steps, seconds, waited = self.steps, now - self.started, self.waited
        self.started, self.steps, self.waited = now, 0, 0.0
        return steps, seconds, waited
