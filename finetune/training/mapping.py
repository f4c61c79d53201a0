"""The map of a fine-tuning: its test clips by what the head of the first seed's model reads of them."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load, save

from affekt.data.accounting import all_gather_json
from affekt.data.files import write_text
from affekt.data.loader import eval_loader
from affekt.finetune.features import by_streams
from affekt.finetune.finetuned import Finetuned
from affekt.finetune.gather import gathered
from affekt.finetune.report.map import embedding_map, evenly
from affekt.finetune.training.clips import Part
from affekt.finetune.training.fit import Run
from affekt.pretrain.feed import together


def write_maps(run: Run, open_model: Callable[[], Finetuned], paths: dict[str, Path]) -> None:
    """Draw the map of each judged corpus (`paths` by name) that has none of as many clips yet, by the model of the
    first seed. Every rank calls it and computes a share; rank 0 says which are missing, and writes."""
    parts = [part for part in run.clips.parts if part.name in paths]
    missing = [part.name for part in parts if read_map(paths[part.name], run.settings.map_clips) is None]
    missing = all_gather_json(missing)[0] if run.ranks > 1 else missing
    model = together(open_model) if missing else None
    for part in parts:
        if part.name in missing:
            write_map(run, model, part, paths[part.name])


def read_map(path: Path, map_clips: int) -> list[dict] | None:
    """The points of a map of at most so many clips, [] for none of any; None where it is not there."""
    if not map_clips:
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found["points"] if found["map_clips"] == map_clips else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def write_map(run: Run, model: Finetuned, part: Part, path: Path) -> None:
    """Points of `Results.map` as JSON, of at most `map_clips` test clips. Of clips with other streams than most nothing
    is drawn: their features are others."""
    groups = by_streams(part.index, part.test, model.streams)
    streams, places = max(groups, key=lambda group: len(group[1]))
    clips = evenly([part.test[place] for place in places], run.settings.map_clips)
    features = clip_features(run, model, part, clips, streams)
    together(lambda: draw(run, part, clips, features, path) if run.rank == 0 else None)


def draw(run: Run, part: Part, clips: list[int], features: np.ndarray, path: Path) -> None:
    rows, label = [part.index.samples.row(p) for p in clips], part.targets.label[clips]
    drawn = np.flatnonzero(np.isfinite(features).all(1))  # and none that cannot be read
    points = embedding_map(
        features[drawn],
        [rows[i]["id"] for i in drawn],
        [part.targets.classes[label[i]] if part.targets.classes and label[i] >= 0 else "" for i in drawn],
        [str(rows[i]["meta"].get("speaker") or "") for i in drawn],
    )
    told = {"map_clips": run.settings.map_clips, "points": [point.model_dump() for point in points]}
    write_text(path, json.dumps(told))


@torch.inference_mode()
def clip_features(run: Run, model: Finetuned, part: Part, clips: list[int], streams: str) -> np.ndarray:
    """(N, F) float64: means over the views that the clips are tested by; NaN where a clip has none. On all ranks."""
    train, views = run.settings.train, np.zeros(len(clips))
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
        or_none=True,
    )

    def read() -> np.ndarray:
        sums = np.zeros((len(clips), 0))
        for batch in loader:
            if batch.ids:
                found = model.features(batch).double().cpu().numpy()
                sums = sums if sums.shape[1] else np.zeros((len(clips), found.shape[1]))
                np.add.at(sums, batch.clip.numpy(), found)
                np.add.at(views, batch.clip.numpy(), 1)
            run.watchdog.beat(0, "map")
        return sums

    shares = [{"sums": together(read), "views": views}]
    if run.ranks > 1:
        shares = [load(share) for share in gathered(save(shares[0]))]
    sums, views = [share["sums"] for share in shares if share["sums"].shape[1]], sum(share["views"] for share in shares)
    with np.errstate(invalid="ignore"):
        return sum(sums) / views[:, None] if sums else np.full((len(clips), 1), np.nan)
