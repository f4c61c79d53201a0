"""Random numbers of the views of a batch, each from its own key: rank, worker, batch and resume change nothing."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from affekt.data.order import uniform


def uniforms(keys: Sequence[int], count: int, name: str) -> np.ndarray:
    """(B, count) float64 in [0, 1): of each of B keys (`Batch.keys`), and of what they are drawn for."""
    return np.stack([uniform(count, key, name) for key in keys]) if len(keys) else np.empty((0, count))


def normals(key: int, name: str, *shape: int, device: torch.device) -> Tensor:
    """Standard normal float32 of a key, drawn on the device: other devices draw other numbers."""
    seed = int(uniform(1, key, name)[0] * 2**53)
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device)


def column(values: np.ndarray, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """What was drawn on the host, on the device; through pinned memory, so that the host need not wait."""
    tensor = torch.as_tensor(values).to(dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
