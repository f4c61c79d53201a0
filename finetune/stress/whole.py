"""A fine-tuned model under stress: from its folder and labelled clips to `results.json` and the report."""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from affekt.data.errors import DataError, SettingsError
from affekt.data.files import refuse_other_kind, write_text
from affekt.data.labels import LabelSettings, Targets, make_targets
from affekt.data.page import card, data_uri
from affekt.data.shards import ShardIndex
from affekt.data.split import where
from affekt.finetune.ceiling import describe_raters
from affekt.finetune.finetuned import Finetuned, load_finetuned
from affekt.finetune.judge import Judged, judge_clips
from affekt.finetune.predictions import Predictions
from affekt.finetune.probes.results import versions
from affekt.finetune.report.results import write_results_report
from affekt.finetune.report.rows import results_csv, stress_csv
from affekt.finetune.schema import Conflict, Results, System
from affekt.finetune.scores import describe_system, main_score, task_of
from affekt.finetune.splits import check_unseen, licences
from affekt.finetune.stress.across import across_corpora
from affekt.finetune.stress.conflict import describe_conflict, said_by_raters, swapped_conflict
from affekt.finetune.stress.fairness import describe_fairness
from affekt.finetune.stress.preview import write_preview
from affekt.finetune.stress.scene import Scene
from affekt.finetune.stress.settings import Clips, StressRun
from affekt.finetune.stress.sweep import run_stress
from affekt.finetune.training.judging import META
from affekt.pretrain.device import device_of
from affekt.pretrain.seen import read_seen


@dataclass
class Tested:
    """Clips to judge and what is known of them, in the classes and dimensions of a model."""

    index: ShardIndex
    positions: list[int]
    labels: LabelSettings
    targets: Targets
    seen: dict[str, Any]  # counts of what the model has seen
    fields: tuple[str, ...] = META  # of the clips, that predictions carry

    def predictions(self, model: Finetuned, judged: Judged, **about: Any) -> Predictions:
        at, targets = judged.positions, self.targets
        metas = [self.index.samples.row(p)["meta"] for p in at]
        shares = targets.shares[at]
        return Predictions(
            ids=judged.ids,
            classes=model.classes,
            dimensions=list(model.dimensions),
            kind=model.kind,
            logits=judged.logits,
            values=judged.values,
            label=targets.label[at] if targets.classes else None,
            shares=shares if targets.classes and np.isfinite(shares).any() else None,
            ratings=targets.ratings[at] if model.dimensions else None,
            meta={name: [str(meta.get(name) or "") for meta in metas] for name in self.fields},
            about={"name": "model", "streams": model.streams, "unread": judged.unread, **about},
        )


def stress(
    folder: Path,
    out: Path,
    settings: StressRun,
    device: torch.device | str = "cpu",
    report: Callable[[int, int], None] | None = None,
) -> Results:
    """Judge clips as they are and spoiled, compare groups of people and conflicts, judge other corpora; write
    `results.json`, `results.csv`, `stress.csv`, `report.html` and `preview.png` to `out`. What was judged is kept in
    `out/predictions`, so that a second call goes on where the first was ended.

    Raises SettingsError for clips that the model has seen, and where there is nothing to judge; CheckpointError and
    DataError for a model and shards that cannot be read.
    """
    began, model, damage = time.monotonic(), load_finetuned(folder, device_of(device)), settings.damage
    seen = read_seen(folder)
    clips = open_clips(settings.data, model, seen, settings.transductive)
    clips.fields = tuple(dict.fromkeys((*META, *settings.fairness)))
    others = {name: open_clips(other, model, seen, settings.transductive) for name, other in settings.across.items()}
    own = Path(settings.data.shards).name
    if own in others:
        raise SettingsError(f"across.{own}: the clips of `data` have this name in the table; choose another one")
    refuse_other_kind(out, "results of `affekt stress`")
    origin = json.loads((folder / "config.json").read_text(encoding="utf-8"))["origin"]
    how = {"kind": model.kind, "windows": damage.windows, "speech": damage.speech, "batch_size": damage.batch}
    how["workers"] = damage.workers
    clean = clips.predictions(model, judge_clips(model, clips.index, clips.positions, **how))
    if not len(clean):
        raise SettingsError(f"{settings.data.shards}: not one of the chosen clips could be judged")
    clean.save(out / "predictions" / "clean.safetensors")
    swept = run_stress(
        model,
        clips.index,
        clips.positions,
        lambda judged: clips.predictions(model, judged),
        damage,
        kind=model.kind,
        folder=out / "predictions" / "stress",
        identity=identity_of(folder, settings.data),
        report=report,
    )
    told: dict[str, str] = {}
    fair = [told_or(told, f"groups by {a}", describe_fairness, clean, a, smallest=settings.smallest_group)
            for a in settings.fairness]  # fmt: skip
    judged = {name: told_or(told, f"across {name}", _judged, other, model, how) for name, other in others.items()}
    corpora = {own: clean, **{name: table for name, table in judged.items() if table is not None and len(table)}}
    across = told_or(told, "across corpora", across_corpora, corpora, damage.bootstrap) if others else None
    system = describe_system(
        "model",
        origin["title"],
        "finetuned",
        clean,
        bootstrap=damage.bootstrap,
        transductive=settings.transductive,
        seeds=[origin["seed"]],
    )
    system.predictions = ["predictions/clean.safetensors"]
    disputed = conflicts(clips, model, clean, settings, how, told)
    raters = told_or(told, "raters", raters_row, clips, clean, damage.bootstrap)
    sheet = write_preview(out / "preview.png", clips.index, clips.positions, model.window, damage)
    results = Results(
        command="stress",
        title=f"{origin['title']}, under stress",
        task=task_of(clean),
        label=clips.labels.told,
        classes=model.classes,
        dimensions=list(model.dimensions),
        main_score=main_score(task_of(clean)),
        protocol={"left_out": told} if told else {},
        clips={"judged": len(clean), "unread": clean.about["unread"]},
        systems=[system, *filter(None, [raters])],
        stress=swept,
        fairness=[one for one in fair if one],
        conflict=disputed,
        tables=[across] if across else [],
        pretraining=clips.seen,
        licences=licences(clips.index, clips.positions, seen),
        settings=settings.model_dump(mode="json"),
        versions=versions(),
        seconds={"all": time.monotonic() - began},
    )
    results.write(out / "results.json")
    write_text(out / "results.csv", results_csv(results))
    write_text(out / "stress.csv", stress_csv(results))
    picture = (
        f'<img class="row" alt="One clip, spoiled in every way" src="{data_uri(sheet.read_bytes(), "image/png")}">'
    )
    write_results_report(out / "report.html", results, clips.index, extras={"How clips were spoiled": card(picture)})
    return results


def open_clips(settings: Clips, model: Finetuned, seen: dict[str, Any], transductive: bool = False) -> Tested:
    """The clips that are chosen and have a target. Raises SettingsError where there are none, or the model has seen
    some of them."""
    index = ShardIndex.open(settings.shards)
    labels = in_terms_of(model, settings.labels)
    targets = make_targets(index.samples.rows(), labels)
    has_audio, has_video = index.samples.has_audio, index.samples.has_video
    has = {"audio": has_audio, "video": has_video, "both": has_audio | has_video}[model.streams]
    if "fraction" in settings.clips:
        raise SettingsError("data.clips: choose by manifest fields, as {split: [test]}; a model is not fitted here")
    positions = [p for p in where(index, settings.clips) if targets.known[p] and has[p]]
    if not positions:
        raise SettingsError(f"{settings.shards}: no clip of {settings.clips or 'all'} has a target and a stream")
    who = {"group": settings.group, "transductive": transductive, "who": "the model"}
    unseen = check_unseen(index, np.array(positions), seen, **who)
    return Tested(index, positions, labels, targets, unseen)


def in_terms_of(model: Finetuned, labels: LabelSettings) -> LabelSettings:
    """The rule with the classes and dimensions of a model; one of several classes at once is held against votes."""
    rule = ("all_inclusive" if model.kind == "multi" else labels.rule or "label") if model.classes else None
    spans = {name: labels.dimensions.get(name, span) for name, span in model.dimensions.items()}
    return labels.model_copy(update={"rule": rule, "classes": tuple(model.classes), "dimensions": spans})


def conflicts(
    clips: Tested, model: Finetuned, clean: Predictions, settings: StressRun, how: dict[str, Any], told: dict[str, str]
) -> list[Conflict]:
    """Those that the raters found (or that were planted), and those that are made by swapping sounds."""
    if not model.classes:
        return []
    found = [told_or(told, "conflict", rated_conflict, clips, clean, settings.damage.bootstrap)]
    if settings.swap and model.streams == "both" and clean.label is not None:
        scene = Scene(clips.index, clips.positions, model.window)

        def judge(alter) -> Predictions:
            return clips.predictions(model, judge_clips(model, clips.index, clips.positions, alter=alter, **how))

        found.append(told_or(told, "swapped", swapped_conflict, scene, clean, judge, settings.damage.bootstrap))
    return [one for one in found if one]


def rated_conflict(clips: Tested, clean: Predictions, bootstrap: int) -> Conflict:
    row = {clips.index.samples.row(p)["id"]: p for p in clips.positions}
    metas = [clips.index.samples.row(row[clip]) for clip in clean.ids]
    named = [[clips.labels.map.get(x, x) for x in said] if said else said for said in said_by_raters(metas)]
    note = "" if named[2] is not None else "Nobody has judged both together: shares of all conflicts."
    return describe_conflict(clean, *named, note=note, bootstrap=bootstrap)


def raters_row(clips: Tested, clean: Predictions, bootstrap: int) -> System:
    """The ceiling by rater agreement, where there are votes."""
    names, mapped = clean.classes, clips.labels.map
    counts = np.zeros((len(clean), len(names)))
    votes = {row["id"]: row["meta"].get(clips.labels.condition) or {} for row in _rows(clips)}
    for number, clip in enumerate(clean.ids):
        for name, count in votes[clip].items():
            if mapped.get(name, name) in names:
                counts[number, names.index(mapped.get(name, name))] += float(count)
    return describe_raters(clean, counts, bootstrap=bootstrap)


def identity_of(folder: Path, clips: Clips) -> str:
    """Stands for the weights, what is said of the model, and what is known of the clips."""
    digest = hashlib.sha256(clips.model_dump_json().encode())
    for name in ("config.json", "preprocess.json", "model.safetensors"):
        with open(folder / name, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def told_or(told: dict[str, str], what: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What the function returns, or None, with the reason in `told`, where these clips do not allow it."""
    try:
        return function(*args, **kwargs)
    except (DataError, SettingsError) as error:
        told[what] = str(error)
        return None


def _judged(clips: Tested, model: Finetuned, how: dict[str, Any]) -> Predictions:
    return clips.predictions(model, judge_clips(model, clips.index, clips.positions, **how))


def _rows(clips: Tested) -> list[dict[str, Any]]:
    return [clips.index.samples.row(p) for p in clips.positions]


def _metas(clips: Tested) -> list[dict[str, Any]]:
    return [row["meta"] for row in _rows(clips)]
