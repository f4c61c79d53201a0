"""What a network in training says about the clips of a corpus, all ranks together, and the score it is chosen by."""

from typing import Any

import numpy as np
import torch.distributed as dist

from affekt.data.accounting import all_gather_json
from affekt.data.errors import DataError
from affekt.finetune.judge import Judge, judge_clips
from affekt.finetune.predictions import Predictions
from affekt.finetune.training.clips import Part
from affekt.pretrain.feed import together

META = ("speaker", "session", "sex", "age", "domain", "sentence")


def judge_part(
    judge: Judge, part: Part, positions: list[int], kind: str, how: dict[str, Any], about: dict[str, Any]
) -> Predictions:
    """Predictions for clips of a corpus; every rank judges a share, and all get the whole table, each clip once, in the
    order of `positions`, bit by bit that of one process. `how` are arguments of `judge_clips`. Raises DataError where
    not one clip could be judged."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    share = {"kind": kind, "rank": rank, "world_size": ranks}
    judged = together(lambda: judge_clips(judge, part.index, positions, **share, **how))
    said = {
        "positions": judged.positions,
        "logits": None if judged.logits is None else judged.logits.tolist(),
        "values": None if judged.values is None else judged.values.tolist(),
        "unread": judged.unread,
    }
    everyone = all_gather_json(said) if ranks > 1 else [said]
    order = {position: place for place, position in enumerate(positions)}
    found = [p for one in everyone for p in one["positions"]]
    if not found:
        causes = [cause for one in everyone for cause in one["unread"].values()]
        raise DataError(f"{part.name}: not one of {len(positions)} clips could be judged; the first: {causes[0]}")
    rows = sorted(range(len(found)), key=lambda row: order[found[row]])

    def joined(name: str) -> np.ndarray | None:
        blocks = [row for one in everyone for row in one[name] or []]
        return np.array(blocks)[rows] if blocks else None

    found = [found[row] for row in rows]
    samples = [part.index.samples.row(p) for p in found]
    seen = {sample["id"] for sample in samples}
    unread = {clip: cause for one in everyone for clip, cause in one["unread"].items() if clip not in seen}
    targets = part.targets
    return Predictions(
        ids=[sample["id"] for sample in samples],
        classes=targets.classes,
        dimensions=list(targets.dimensions),
        kind=kind,
        logits=joined("logits"),
        values=joined("values"),
        label=targets.label[found] if targets.classes else None,
        shares=targets.shares[found] if np.isfinite(targets.shares[found]).any() else None,
        ratings=targets.ratings[found] if targets.dimensions else None,
        meta={name: [str(sample["meta"].get(name) or "") for sample in samples] for name in META},
        about={**about, "unread": unread},
    )
