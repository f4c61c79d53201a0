"""From the tokens of a layer to one vector per view, by a fixed menu of poolings."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from affekt.data.errors import SettingsError

# `segments_K` and `cells_K` for any K are two more: means over K equal stretches of the time that holds something, and
# means over all of it in K bands of the spectrum or in K times K parts of the picture.
POOLINGS = ("mean", "mean_std", "rows_mean_std")
SEGMENTS, CELLS = (re.compile(rf"{name}_([1-9]\d?)") for name in ("segments", "cells"))
# Bands of rows for `rows_mean_std`: eight of the spectrum, four of the face (brow, eyes, nose, mouth in a face crop).
BANDS = {"audio": 8, "video": 4}


def check_poolings(poolings: Sequence[str]) -> None:
    """SettingsError for a pooling that is not on the menu."""
    for pooling in poolings:
        if pooling not in POOLINGS and not SEGMENTS.fullmatch(pooling) and not CELLS.fullmatch(pooling):
            known = f"{', '.join(POOLINGS)}, segments_1 to segments_99, cells_1 to cells_99"
            raise SettingsError(f"pooling {pooling!r} is not one of {known}")


def pool(
    tokens: Tensor,
    grid: tuple[int, int, int],
    bands: int,
    valid: Tensor | None = None,
    poolings: Sequence[str] = POOLINGS,
) -> dict[str, Tensor]:
    """Pool tokens `(B, N, D)` that lie on a grid (time, rows, columns) by every pooling asked for.

    `mean` (B, D); `mean_std` (B, 2 D) over all tokens; `rows_mean_std` (B, bands * 2 * D): columns averaged, rows
    joined to at most `bands` bands, then mean and deviation over time; `segments_K` (B, K * D): means over K equal
    stretches of time; `cells_K` (B, cells * D): means over time in at most K bands of rows times K of columns. `valid`
    (B, time) bool leaves padding, which comes last, out.
    """
    x = tokens.float().unflatten(1, grid)  # (B, T, R, C, D)
    valid = x.new_ones(x.shape[:2]) if valid is None else valid.to(x)
    share = (valid / valid.sum(1, keepdim=True))[:, :, None, None]  # (B, T, 1, 1), sums to 1 over time
    steps = x.mean((2, 3))  # (B, T, D)
    mean = (steps * share[..., 0]).sum(1)
    pooled = {"mean": mean}
    if "mean_std" in poolings:
        std = ((x.flatten(2, 3) - mean[:, None, None]).square().mean(2) * share[..., 0]).sum(1).sqrt()
        pooled["mean_std"] = torch.cat([mean, std], 1)
    if "rows_mean_std" in poolings:
        rows = torch.stack([band.mean((2, 3)) for band in x.tensor_split(min(bands, grid[1]), dim=2)], dim=2)
        rows_mean = (rows * share).sum(1)
        rows_std = ((rows - rows_mean[:, None]).square() * share).sum(1).sqrt()
        pooled["rows_mean_std"] = torch.cat([rows_mean, rows_std], 2).flatten(1)
    for pooling in filter(CELLS.fullmatch, poolings):
        most = int(pooling.removeprefix("cells_"))
        cells = means_of_cells(x, min(most, grid[1]), min(most, grid[2])).flatten(2, 3)
        pooled[pooling] = (cells * share).sum(1).flatten(1)
    for pooling in filter(SEGMENTS.fullmatch, poolings):
        shares = segment_shares(valid.sum(1), grid[0], int(pooling.removeprefix("segments_")))
        pooled[pooling] = torch.einsum("bkt,btd->bkd", shares, steps).flatten(1)
    return {pooling: pooled[pooling] for pooling in poolings}


def means_of_cells(x: Tensor, rows: int, columns: int) -> Tensor:
    """(B, T, R, C, D) -> (B, T, rows, columns, D): means of neighbours, in parts as equal as can be."""
    x = torch.stack([part.mean(2) for part in x.tensor_split(rows, dim=2)], dim=2)
    return torch.stack([part.mean(3) for part in x.tensor_split(columns, dim=3)], dim=3)


def segment_shares(valid: Tensor, time: int, segments: int) -> Tensor:
    """Shares `(B, K, T)`, summing to 1 over T, of the first `valid` (B,) steps in K equal stretches of them; a step on
    a border counts on both sides by how much of it lies there, so that fewer steps than stretches will do."""
    step = torch.arange(time, device=valid.device)
    border = torch.arange(segments + 1, device=valid.device) * valid[:, None] / segments  # (B, K + 1)
    start, end = border[:, :-1, None], border[:, 1:, None]
    overlap = (torch.minimum(end, step + 1) - torch.maximum(start, step)).clamp(min=0)
    return overlap / overlap.sum(2, keepdim=True)
