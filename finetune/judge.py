"""Asking a model about clips: several views of each, the same ones every time, averaged per clip."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from affekt.data.batch import Batch, Streams
from affekt.data.decode import Window
from affekt.data.errors import DataError
from affekt.data.loader import eval_loader
from affekt.data.shards import ShardIndex
from affekt.finetune.features import by_streams
from affekt.finetune.predictions import Kind

SMALLEST = 1e-12  # of a mean probability, so that its logarithm is finite


class Judge(Protocol):
    """Anything that can be asked about clips: a fine-tuned model, a frozen encoder with a probe behind it."""

    window: Window
    streams: Streams

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """`logits` (B, K) and `values` (B, D), either or both; NaN in rows that lack every stream it could use."""


@dataclass
class Judged:
    """What was said about M clips, in the order of `ids`; `unread` has the cause for each clip that is not among them:
    it could not be decoded, or lacks every stream that the model knows."""

    ids: list[str]
    positions: list[int]
    logits: np.ndarray | None
    values: np.ndarray | None
    unread: dict[str, str]


@torch.inference_mode()
def judge_clips(
    judge: Judge,
    index: ShardIndex,
    positions: Sequence[int],
    *,
    kind: Kind = "single",
    windows: int = 2,
    speech: bool = False,
    batch_size: int = 16,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    alter: Callable[[Batch], Batch] | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Judged:
    """Views at `windows` evenly spaced places of each clip (fewer where it is so short that they would be the same),
    with `speech` of those around its sound (`data.decode.possible_starts`).

    Probabilities are averaged over the views of a clip, as published (HiCMAE: softmax), and given back as logits, their
    logarithms (log-odds for `multi`); `values` are averaged as they are. Nothing is random. `alter` changes a batch of
    views before the model meets it: to spoil it, or to take a stream away. Of several ranks each judges its share of
    the same batches (`eval_loader`), so that nothing depends on their number; `unread` then has what others judge too.

    Raises DataError where a model answers NaN for some clips and not for others with the same streams.
    """
    sums: dict[str, dict[int, np.ndarray]] = {}
    views = np.zeros(len(positions), int)
    unread: dict[str, str] = {}
    heard: dict[str, dict[tuple[bool, bool], tuple[bool, str]]] = {}
    for available, places in by_streams(index, positions, judge.streams):
        loader = eval_loader(
            index,
            judge.window,
            indices=[positions[p] for p in places],
            windows_per_clip=windows,
            speech=speech,
            batch_size=batch_size,
            workers=workers,
            streams=available,
            or_none=True,
            rank=rank,
            world_size=world_size,
        )
        for batch in loader:
            unread.update(batch.skipped)
            if not batch.ids:
                continue
            rows = [places[i] for i in batch.clip.tolist()]
            asked = alter(batch) if alter else batch
            for name, said in judge(asked).items():
                said = said.double().cpu()
                _refuse_gaps(asked, said, heard.setdefault(name, {}))
                if name == "logits":
                    said = said.sigmoid() if kind == "multi" else said.softmax(1)
                block = sums.setdefault(name, {})
                for place, value in zip(rows, said.numpy()):
                    block[place] = block[place] + value if place in block else value
            np.add.at(views, rows, 1)
            if on_batch:
                on_batch(len(rows))
    lacking = [place for block in sums.values() for place, value in block.items() if np.isnan(value).any()]
    unread |= {index.samples[positions[place]].id: "no stream that the model knows" for place in lacking}
    seen = [p for p in np.flatnonzero(views).tolist() if p not in set(lacking)]
    ids = [index.samples[positions[p]].id for p in seen]
    for place, position in enumerate(positions):
        if not views[place]:
            unread.setdefault(index.samples[position].id, "no stream that the model knows")
    means = {name: np.stack([block[p] / views[p] for p in seen]) for name, block in sums.items() if seen}
    if "logits" in means:
        p = means["logits"].clip(SMALLEST, 1)
        means["logits"] = np.log(p) - np.log((1 - means["logits"]).clip(SMALLEST, 1)) if kind == "multi" else np.log(p)
    return Judged(ids, [int(positions[p]) for p in seen], means.get("logits"), means.get("values"), unread)


def _refuse_gaps(batch: Batch, said: Tensor, heard: dict[tuple[bool, bool], tuple[bool, str]]) -> None:
    """NaN says that the model has no use for the streams of a clip, and then it has none for any clip with just these.
    NaN for some of them is a fault of the model, and a score without them would be over the easier rest."""
    for clip, *streams, gap in zip(batch.ids, batch.has_video.tolist(), batch.has_audio.tolist(), said.isnan().any(1)):
        before, other = heard.setdefault(tuple(streams), (bool(gap), clip))
        if before != bool(gap):
            bad, good = (clip, other) if gap else (other, clip)
            raise DataError(
                f"clip {bad}: the model answers NaN, though not for {good}, which has the same streams; no score may "
                "leave such clips out: look for weights or inputs that are not finite"
            )
