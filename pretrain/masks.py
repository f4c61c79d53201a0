"""Which tokens are hidden: fixed counts, drawn from each clip's own key, so rank, worker and batch do not matter."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Mask:
    """`ids_keep` (B, K) and `ids_mask` (B, M), int64, ascending, K + M = N; `hidden` (B, N) bool, True = hidden.

    `valid_keep` (B, K) bool is False where a visible token is padding; None when none is, as in all but the shortest
    clips, so that attention needs no mask.
    """

    ids_keep: Tensor
    ids_mask: Tensor
    valid_keep: Tensor | None = None

    @property
    def hidden(self) -> Tensor:
        shape = (len(self.ids_keep), self.ids_keep.shape[1] + self.ids_mask.shape[1])
        return torch.zeros(shape, dtype=torch.bool, device=self.ids_mask.device).scatter_(1, self.ids_mask, True)

    @classmethod
    def from_hidden(cls, hidden: Tensor) -> "Mask":
        """From a bool (B, N) mask whose rows all hide the same number of tokens."""
        order = hidden.to(torch.int8).argsort(dim=1, stable=True)
        keep = int((~hidden[0]).sum())
        return cls(order[:, :keep], order[:, keep:])

    def to(self, device: torch.device | str) -> "Mask":
        """The same mask on a device; the copy to a GPU goes through pinned memory, so that the host need not wait."""
        device = torch.device(device)

        def move(ids: Tensor | None) -> Tensor | None:
            if ids is None or ids.device == device:
                return ids
            return (ids.pin_memory() if device.type == "cuda" else ids).to(device, non_blocking=True)

        return Mask(move(self.ids_keep), move(self.ids_mask), move(self.valid_keep))


def tube_mask(keys: Tensor, grid: tuple[int, int, int], ratio: float) -> Mask:
    """The same spatial tokens hidden at every time step; `int(ratio * h * w)` of them (VideoMAE section 3.2)."""
    t, h, w = grid
    order = torch.from_numpy(_noise(keys, h * w, stream=0).argsort(1))
    keep = h * w - int(ratio * h * w)
    steps = torch.arange(t)[None, :, None] * (h * w)
    ids_keep, ids_mask = ((steps + part.sort(1)[0][:, None]).flatten(1) for part in (order[:, :keep], order[:, keep:]))
    return Mask(ids_keep, ids_mask)


def random_mask(keys: Tensor, num_tokens: int, ratio: float, valid: Tensor | None = None) -> Mask:
    """`int(ratio * num_tokens)` tokens hidden at random. Tokens with `valid` (B, N) False (padding) are hidden first;
    where less than a share `1 - ratio` of the window is real, some are visible, and `valid_keep` tells them apart.

    A row without one valid token, a clip that lacks the stream, counts as full: an empty softmax would spread NaN.
    """
    noise = _noise(keys, num_tokens, stream=1)
    if valid is not None:
        valid = valid.cpu() | ~valid.cpu().any(1, keepdim=True)
        noise = noise + ~valid.numpy()
    order = torch.from_numpy(noise.argsort(1))
    keep = num_tokens - int(ratio * num_tokens)
    ids_keep, ids_mask = order[:, :keep].sort(1)[0], order[:, keep:].sort(1)[0]
    valid_keep = None if valid is None else valid.gather(1, ids_keep)
    return Mask(ids_keep, ids_mask, None if valid_keep is None or bool(valid_keep.all()) else valid_keep)


def _noise(keys: Tensor, count: int, stream: int) -> np.ndarray:
    keys = keys.tolist()  # one wait for the device, not one a clip
    rows = [np.random.Generator(np.random.Philox(key=[key % 2**64, stream])).random(count) for key in keys]
    return np.stack(rows)
