"""Where tensors are computed, by the name a user gives."""

import os

import torch

from affekt.data.errors import SettingsError


def device_of(name: str | torch.device) -> torch.device:
    """`auto` is the GPU of this rank where there is one. Raises SettingsError for one that is not there."""
    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise SettingsError(f"device {name}: there is no such kind; say cpu, cuda or cuda:1") from None
    there = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= there:
        raise SettingsError(f"device {name}: this machine has {there or 'no'} CUDA devices; say cpu or auto")
    return device
