"""Predictions of all ranks on every rank, so that a score is one number over all clips and no mean over ranks."""

import json
from collections.abc import Sequence
from dataclasses import fields

import numpy as np
import torch
import torch.distributed as dist
from safetensors.numpy import load, save

from affekt.data.errors import SettingsError
from affekt.finetune.predictions import ARRAYS, Predictions, pooled

TEXTS = "texts"


def gather_predictions(local: Predictions, ids: Sequence[str] | None = None) -> Predictions:
    """The clips of all ranks in the order of `ids`, or sorted by id; the same table, bit by bit, on every rank.

    Every rank calls it, also one without clips; a single process may. A clip that several ranks have judged, as where
    a sampler pads, counts once, with the answer of the lowest. Raises SettingsError, on every rank, where a clip of
    `ids` was judged by none, or one was that is not among them.
    """
    parts = [local] if _ranks() == 1 else [_unpacked(data) for data in gathered(_packed(local))]
    seen: set[str] = set()
    once = []
    for part in parts:
        once.append(part.take(np.array([clip not in seen for clip in part.ids], bool)))
        seen |= set(part.ids)
    filled = [part for part in once if len(part)]
    if not filled:
        raise SettingsError(f"none of {len(parts)} ranks has judged a clip; there is nothing to gather")
    table = pooled(filled)
    order = sorted(table.ids) if ids is None else list(ids)
    strange = set(order) ^ seen
    if strange:
        raise SettingsError(
            f"{len(set(order) - seen)} of {len(order)} clips were judged by no rank, {len(seen - set(order))} were "
            f"that should not be, first {min(strange)}"
        )
    place = {clip: row for row, clip in enumerate(table.ids)}
    return table.take([place[clip] for clip in order])


def _ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _packed(table: Predictions) -> bytes:
    """safetensors with the texts as bytes of JSON: what another rank sends is never unpickled."""
    texts = {f.name: getattr(table, f.name) for f in fields(table) if f.name not in ARRAYS}
    arrays = {name: np.ascontiguousarray(getattr(table, name)) for name in ARRAYS if getattr(table, name) is not None}
    return save({**arrays, TEXTS: np.frombuffer(json.dumps(texts).encode(), np.uint8)})


def _unpacked(data: bytes) -> Predictions:
    arrays = load(data)
    return Predictions(**json.loads(arrays.pop(TEXTS).tobytes()), **arrays)


def gathered(data: bytes) -> list[bytes]:
    """The bytes of every rank, on every rank; sent as long as the longest, since a collective needs one shape."""
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    own = torch.tensor([len(data)], device=device)
    sizes = [torch.empty_like(own) for _ in range(_ranks())]
    dist.all_gather(sizes, own)
    padded = torch.zeros(int(max(sizes)), dtype=torch.uint8, device=device)
    padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return [part[: int(size)].cpu().numpy().tobytes() for part, size in zip(parts, sizes)]
