"""`affekt recall`: one experiment of retrieval, from shards and an export to `results.json`."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from affekt.data.errors import SettingsError
from affekt.data.files import refuse_other_kind, write_text
from affekt.data.shards import ShardIndex
from affekt.data.split import assert_disjoint, assert_no_shared_source, group_of, where
from affekt.finetune.features import weights_hash
from affekt.finetune.probes.results import versions
from affekt.finetune.retrieval.recall import Found, evaluate
from affekt.finetune.retrieval.settings import RetrievalSettings
from affekt.finetune.retrieval.tables import HEAD, NOTE, cells, describe, differences
from affekt.finetune.schema import Results, Table
from affekt.finetune.splits import check_unseen, licences
from affekt.pretrain.device import device_of
from affekt.pretrain.encoder import Encoder
from affekt.pretrain.export import load_encoder, random_encoder
from affekt.pretrain.seen import read_seen


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
    device_of(settings.device)  # said before features are computed, as what follows
    groups = [group_of(index, p, settings.group) for p in base]
    refuse_other_kind(settings.output, "results of `affekt recall`")
    settings.output.mkdir(parents=True, exist_ok=True)
    encoder = load_encoder(settings.encoder)
    encoders = [("pretrained", lambda: encoder)]
    if dev and fit and encoder.streams == "both":
        encoders.append(("statistics", lambda: encoder))
    encoders += [("random", lambda seed=seed: random_encoder(settings.encoder, seed)) for seed in settings.random_seeds]
    total = len(encoders) * settings.windows * (len(base) + len(dev) + len(fit))
    heard = _counter(progress, total)
    parts = (base, dev, fit)
    found = [(name, measured(make(), name == "statistics", index, parts, settings, heard)) for name, make in encoders]
    if progress:
        progress(total, total)  # clips that are short have fewer windows
    systems, rows = [], []
    for name, kind in dict.fromkeys((name, kind) for name, kinds in found for kind in kinds):
        ours = [kinds[kind] for other, kinds in found if other == name]
        system, lines = describe(name, kind, ours, groups, settings)
        systems.append(system)
        rows += lines
    kinds = found[0][1]
    unread = next(iter(kinds["contrast"].values())).unread
    chance = kinds.get("chosen", kinds["contrast"])
    rows += [
        ["Chance", task, "", str(len(f.ranks.first)), str(f.items), *cells(f.chance)] for task, f in chance.items()
    ]
    save_spaces(settings.output, kinds, weights_hash(encoder))
    results = Results(
        command="recall",
        title=settings.title,
        task="single",
        label=settings.label or "",
        main_score=f"{next(iter(chance))}_recall_1",
        protocol={"base": settings.base, "first": settings.first, "dev": settings.dev, "fit": settings.fit},
        clips={"base": len(base), "dev": len(dev), "fit": len(fit), "unread": unread},
        systems=systems,
        differences=differences(found, groups, settings.bootstrap, settings.seed, settings.group),
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
            known = {key: sorted({str(row["meta"].get(key)) for row in index.samples.rows()}) for key in selector}
            there = "; ".join(f"{key} is {', '.join(values[:12])}" for key, values in known.items())
            raise SettingsError(
                f"{index.root}: no clip left for `{name}`: {selector or 'say which, as {split: [val]}'}"
                + (f"; in these shards {there}" if there else "")
            )
        taken |= set(found)
        parts.append(found)
    for i, one in enumerate(parts):
        for other in parts[i + 1 :]:
            assert_disjoint(index, one, other, settings.group)
            assert_no_shared_source(index, one, other)
    return tuple(parts)


def measured(
    encoder: Encoder,
    plain: bool,
    index: ShardIndex,
    parts: tuple[list[int], list[int], list[int]],
    settings: RetrievalSettings,
    heard: Callable[[int], None] | None,
) -> dict[str, dict[str, Found]]:
    names = ("label", "apart", "windows", "batch_size", "workers")
    how = {name: getattr(settings, name) for name in names}
    base, dev, fit = parts
    encoder = encoder.to(device_of(settings.device))
    return evaluate(encoder, index, base, dev=dev, fit=fit, plain=plain, **how, on_batch=heard)


def save_spaces(folder: Path, kinds: dict[str, dict[str, Found]], weights: str) -> None:
    """For `affekt index --space`: what was chosen, or the space of the contrast where nothing was."""
    for task, found in kinds.get("chosen", kinds["contrast"]).items():
        replace(found.space, weights=weights).save(folder / f"space-{task}.safetensors")


def _counter(progress: Callable[[int, int], None] | None, total: int) -> Callable[[int], None] | None:
    done = 0

    def heard(count: int) -> None:
        nonlocal done
        done += count
        progress(min(done, total), total)

    return heard if progress else None
