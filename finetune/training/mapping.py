"""The map of a fine-tuning: its test clips by what the head of the first seed's model reads of them."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load, save

from affekt.data.files import write_text
from affekt.data.loader import eval_loader
from affekt.finetune.features import by_streams
from affekt.finetune.finetuned import Finetuned
from affekt.finetune.gather import gathered
from affekt.finetune.report.map import embedding_map, evenly
from affekt.finetune.training.clips import Part
from affekt.finetune.training.fit import Run


def write_map(run: Run, model: Finetuned, part: Part, path: Path) -> None:
    """Points of `Results.map` as JSON, of at most `map_clips` test clips; every rank computes a share, rank 0 writes.
    Of clips with other streams than most nothing is drawn: their features are others."""
    groups = by_streams(part.index, part.test, model.streams)
    streams, places = max(groups, key=lambda group: len(group[1]))
    clips = evenly([part.test[place] for place in places], run.settings.map_clips)
    features = clip_features(run, model, part, clips, streams)
    if run.rank:
        return
    rows, label = [part.index.samples.row(p) for p in clips], part.targets.label[clips]
    drawn = np.flatnonzero(np.isfinite(features).all(1))  # and none that cannot be read
    points = embedding_map(
        features[drawn],
        [rows[i]["id"] for i in drawn],
        [part.targets.classes[label[i]] if part.targets.classes and label[i] >= 0 else "" for i in drawn],
        [str(rows[i]["meta"].get("speaker") or "") for i in drawn],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps([point.model_dump() for point in points]))


@torch.inference_mode()
def clip_features(run: Run, model: Finetuned, part: Part, clips: list[int], streams: str) -> np.ndarray:
    """(N, F) float64: means over the views that the clips are tested by; NaN where a clip has none. On all ranks."""
    train, sums, views = run.settings.train, None, np.zeros(len(clips))
    loader = eval_loader(
        part.index,
        model.window,
        indices=clips,
        windows_per_clip=train.windows,
        speech=train.speech,
        batch_size=train.eval_batch,
        workers=run.settings.data.workers,
        streams=streams,
        rank=run.rank,
        world_size=run.ranks,
    )
    for batch in loader:
        if batch.ids:
            read = model.features(batch).double().cpu().numpy()
            sums = np.zeros((len(clips), read.shape[1])) if sums is None else sums
            np.add.at(sums, batch.clip.numpy(), read)
            np.add.at(views, batch.clip.numpy(), 1)
        run.watchdog.beat(0, "map")
    shares = [{"views": views} | ({} if sums is None else {"sums": sums})]
    if run.ranks > 1:
        shares = [load(share) for share in gathered(save(shares[0]))]
    total, views = sum(share["sums"] for share in shares if "sums" in share), sum(share["views"] for share in shares)
    with np.errstate(invalid="ignore"):
        return total / views[:, None]
