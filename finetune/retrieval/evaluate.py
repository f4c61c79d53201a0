"""`affekt recall`: one experiment of retrieval, from shards and an export to `results.json`."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field

from affekt.data.errors import SettingsError
from affekt.data.files import MARKS, refuse_other_kind, write_text
from affekt.data.settings import Settings
from affekt.data.shards import ShardIndex
from affekt.data.split import assert_disjoint, assert_no_shared_source, where
from affekt.finetune.features import weights_hash
from affekt.finetune.probes.results import versions
from affekt.finetune.probes.splits import check_unseen
from affekt.finetune.retrieval.ranks import CUTS, Ranks, estimates
from affekt.finetune.retrieval.recall import Apart, Found, evaluate
from affekt.finetune.schema import Estimate, Results, System, Table
from affekt.pretrain.encoder import Encoder
from affekt.pretrain.export import load_encoder, random_encoder
from affekt.pretrain.seen import read_seen

Selector = dict[str, list[str | int] | str | int]
TITLES = {
    ("pretrained", "chosen"): "Pre-trained encoder",
    ("pretrained", "contrast"): "Pre-trained encoder, space of the contrast",
    ("random", "chosen"): "Random encoder",
    ("random", "contrast"): "Random encoder, space of the contrast",
}
HEAD = ["", "task", "space", "queries", "among", *(f"recall@{k}" for k in CUTS), "median rank", "mAP"]


class RetrievalSettings(Settings):
    """Which clips to search among, and which clips decide how they are compared.

    Selectors are manifest fields, `{split: [val]}`. `dev` is taken from what `base` leaves, `fit` from what `dev` does.
    """

    shards: str | Path = Field(description="folder written by `affekt prepare`, or its url")
    encoder: Path = Field(description="export folder of the pre-trained encoder")
    output: Path = Field(description="folder for results.json, settings.yaml and the chosen spaces")
    base: Selector = Field(description="clips to search among; each asks for its own other stream, or its label")
    first: int | None = Field(None, ge=2, description="only so many of them, the first by id; null: all")
    dev: Selector = Field({}, description="clips that choose taps, centring and alignment; empty: nothing is chosen")
    fit: Selector = Field({}, description="clips whose means are taken off and whose pairs are aligned; no labels")
    label: str | None = Field(None, description="manifest field to find the same of; null: across streams alone")
    group: str = Field("speaker", description="what may not stand in two of base, dev and fit: speaker or id")
    apart: Apart = Field("speaker", description="by label: no answers of the same speaker, or of the same source only")
    windows: int = Field(4, ge=1, description="evenly spaced windows per clip whose features are averaged")
    random_seeds: tuple[int, ...] = Field((0, 1, 2), description="random encoders to compare with")
    bootstrap: int = Field(2000, ge=100)
    seed: int = Field(0, ge=0, lt=2**31)
    transductive: bool = Field(False, description="allow clips of base in pre-training, and name every result so")
    batch_size: int = Field(16, ge=1)
    workers: int = Field(0, ge=0, description="processes that decode clips")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="cuda where there is one")
    title: str = "What is found"


def recall(settings: RetrievalSettings, progress: Callable[[int, int], None] | None = None) -> Results:
    """Run the experiment and write `results.json`, `settings.yaml` and `space-TASK.safetensors` of each chosen space.

    `progress(done, total)` hears of windows whose features are computed. Raises SettingsError where the parts are not
    disjoint, pre-training has seen clips of `base` or nothing can be searched; DataError and CheckpointError where
    shards or export cannot be used.
    """
    started = time.perf_counter()
    index = ShardIndex.open(settings.shards)
    base, dev, fit = parts_of(index, settings)
    pretraining = read_seen(settings.encoder)
    who = {"group": settings.group, "transductive": settings.transductive}
    seen = check_unseen(index, np.array(base), pretraining, **who)
    refuse_other_kind(settings.output, MARKS["results.json"])
    settings.output.mkdir(parents=True, exist_ok=True)
    encoder = load_encoder(settings.encoder)
    encoders = [("pretrained", lambda: encoder)]
    encoders += [("random", lambda seed=seed: random_encoder(settings.encoder, seed)) for seed in settings.random_seeds]
    total = len(encoders) * settings.windows * (len(base) + len(dev) + len(fit))
    heard = _counter(progress, total)
    found = [(name, measured(make(), index, base, dev, fit, settings, heard)) for name, make in encoders]
    if progress:
        progress(total, total)  # clips that are short have fewer windows
    groups = [_group(index, p, settings.group) for p in base]
    systems, rows = [], []
    for name, kind in dict.fromkeys((name, kind) for name, kinds in found for kind in kinds):
        ours = [kinds[kind] for other, kinds in found if other == name]
        system, lines = describe(name, kind, ours, groups, settings, encoder.streams)
        systems.append(system)
        rows += lines
    kinds = found[0][1]
    chance = kinds.get("chosen", kinds["contrast"])
    rows += [
        ["Chance", task, "", str(len(f.ranks.first)), str(f.items), *_cells(f.chance)] for task, f in chance.items()
    ]
    save_spaces(settings.output, kinds)
    results = Results(
        title=settings.title,
        task="single",
        label=settings.label or "",
        main_score=f"{next(iter(chance))}_recall_1",
        protocol={"base": settings.base, "first": settings.first, "dev": settings.dev, "fit": settings.fit},
        clips={"base": len(base), "dev": len(dev), "fit": len(fit)},
        systems=systems,
        tables=[Table(title="Recall, median rank and mean average precision", head=HEAD, rows=rows, note=NOTE)],
        pretraining=seen,
        licences=licences(index, base + dev + fit, pretraining),
        settings=json.loads(settings.model_dump_json()),
        versions=versions() | {"weights": weights_hash(encoder), "shards": index.fingerprint},
        seconds={"all": round(time.perf_counter() - started, 2)},
    )
    results.write(settings.output / "results.json")
    write_text(settings.output / "settings.yaml", settings.to_yaml())
    return results


NOTE = (
    "Recall and mAP in percent. Tied scores count as chance decides them. Left out of a query's list: other clips of "
    "the same source file, and by label the clip itself and, where `apart` says so, its speaker's. `chosen` spaces are "
    "chosen by mAP on the clips of dev. Intervals over the queries; what they are searched among stays the same."
)


def parts_of(index: ShardIndex, settings: RetrievalSettings) -> tuple[list[int], list[int], list[int]]:
    """Positions of base, dev and fit, each in the order of the ids. Raises SettingsError where one is empty although it
    was named, or a group or a source file stands in two."""
    parts, taken = [], set()
    for name in ("base", "dev", "fit"):
        selector = getattr(settings, name)
        found = [p for p in where(index, selector) if p not in taken] if selector else []
        found = sorted(found, key=lambda p: index.samples.row(p)["id"])
        found = found[: settings.first] if name == "base" else found
        if not found and (selector or name == "base"):
            raise SettingsError(f"{index.root}: no clip left for `{name}`: {selector}")
        taken |= set(found)
        parts.append(found)
    for i, one in enumerate(parts):
        for other in parts[i + 1 :]:
            assert_disjoint(index, one, other, settings.group)
            assert_no_shared_source(index, one, other)
    return tuple(parts)


def measured(
    encoder: Encoder,
    index: ShardIndex,
    base: Sequence[int],
    dev: Sequence[int],
    fit: Sequence[int],
    settings: RetrievalSettings,
    heard: Callable[[int], None] | None,
) -> dict[str, dict[str, Found]]:
    device = settings.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
    names = ("label", "apart", "windows", "batch_size", "workers")
    how = {name: getattr(settings, name) for name in names}
    return evaluate(encoder.to(device), index, base, dev=dev, fit=fit, **how, on_batch=heard)


def describe(
    name: str, kind: str, found: list[dict[str, Found]], groups: list[str], settings: RetrievalSettings, streams: str
) -> tuple[System, list[list[str]]]:
    """A row of the summary table and its lines in the table of recalls. Several seeds are joined: their queries are
    resampled together, a clip with all its seeds."""
    title = TITLES[name, kind] + (" (transductive)" if settings.transductive else "")
    scores: dict[str, Estimate] = {}
    lines = []
    for task, first in found[0].items():
        ranks = joined([each[task].ranks for each in found])
        drawn = estimates(ranks, [groups[q] for q in ranks.queries], settings.bootstrap, settings.seed, settings.group)
        scores |= {f"{task}_{score}": value for score, value in drawn.items()}
        spaces = ", ".join(dict.fromkeys(each[task].space.name for each in found))
        lines.append([title, task, spaces, str(len(first.ranks.first)), str(first.items), *_intervals(drawn)])
    by_seed = [
        {f"{task}_{score}": value for task, f in each.items() for score, value in f.ranks.scores().items()}
        for each in found
    ]
    system = System(
        name=f"{name}_{kind}",
        title=title,
        kind="random" if name == "random" else "other",
        streams=streams,
        transductive=settings.transductive,
        seeds=list(settings.random_seeds) if name == "random" else [],
        clips=max(len(f.ranks.first) for f in found[0].values()),
        scores=scores,
        by_seed=by_seed,
    )
    return system, lines


def joined(ranks: list[Ranks]) -> Ranks:
    """The queries of several searches in one list."""
    queries, first, precision = (
        np.concatenate([getattr(r, name) for r in ranks]) for name in ("queries", "first", "precision")
    )
    return Ranks(queries, first, precision, {k: np.concatenate([r.hits[k] for r in ranks]) for k in CUTS})


def save_spaces(folder: Path, kinds: dict[str, dict[str, Found]]) -> None:
    """For `affekt index --space`: what was chosen, or the space of the contrast where nothing was."""
    for task, found in kinds.get("chosen", kinds["contrast"]).items():
        found.space.save(folder / f"space-{task}.safetensors")


def licences(index: ShardIndex, positions: list[int], pretraining: dict[str, Any]) -> list[str]:
    """Licences of the clips that were searched and of those behind the weights."""
    ours = {str(index.samples.row(p)["meta"].get("licence") or "") for p in positions} - {""}
    return sorted(ours | set(pretraining["licences"]))


def _group(index: ShardIndex, position: int, field: str) -> str:
    row = index.samples.row(position)
    return row["id"] if field == "id" else str(row["meta"][field])


def _cells(scores: dict[str, float]) -> list[str]:
    shares = [f"{100 * scores[name]:.1f}" for name in (*(f"recall_{k}" for k in CUTS), "map")]
    return [*shares[:-1], f"{scores['median_rank']:g}", shares[-1]]


def _intervals(scores: dict[str, Estimate]) -> list[str]:
    def cell(name: str, factor: float) -> str:
        e = scores[name]
        return f"{factor * e.value:.1f} [{factor * e.low:.1f}, {factor * e.high:.1f}]"

    return [*(cell(f"recall_{k}", 100) for k in CUTS), cell("median_rank", 1), cell("map", 100)]


def _counter(progress: Callable[[int, int], None] | None, total: int) -> Callable[[int], None] | None:
    done = 0

    def heard(count: int) -> None:
        nonlocal done
        done += count
        progress(min(done, total), total)

    return heard if progress else None
