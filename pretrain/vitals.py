"""How well the machine is used: memory, and which share of its peak the arithmetic of the model reaches."""

import os
from pathlib import Path

import torch

from affekt.pretrain.flops import peak_flops, training_flops
from affekt.pretrain.hicmae_settings import HiCMAESettings


class Vitals:
    """Of the device of one rank; `note` says what its figures are relative to."""

    def __init__(self, settings: HiCMAESettings, device: torch.device, precision: str, world_size: int):
        self.device = device
        peak, source = peak_flops(device, precision)
        self.flops = training_flops(settings)
        self.peak = peak and peak * world_size  # every rank's device is taken to be like this one
        known = f"{peak / 1e12:.3g} TFLOP/s, {source}" if peak else f"not given: {source}"
        self.note = f"{self.flops / 1e9:.2f} GFLOP per clip; MFU is {'the share of ' if peak else ''}{known}"

    def read(self, clips_per_s: float) -> dict[str, float]:
        """`memory_gib`: what the process has in memory, on a GPU the most that was allocated there; `mfu`: model FLOPs
        utilisation in 0..1 at this rate over all ranks, where the peak is known."""
        values = {"memory_gib": self._memory() / 2**30}
        return values | ({"mfu": clips_per_s * self.flops / self.peak} if self.peak else {})

    def _memory(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")
