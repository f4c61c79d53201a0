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
        torch.empty(1, device=device).item()  # which `meta` has not
    except (RuntimeError, AssertionError, NotImplementedError):
        there = torch.cuda.device_count() or "no"
        raise SettingsError(
            f"device {name}: not there, or nothing to compute on; cpu is, and {there} CUDA devices"
        ) from None
    return device
