"""From predictions on the disk to `results.json` and `results.csv`: all seeds of a corpus are one system."""

import csv
import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from affekt.data.files import write_text
from affekt.finetune.metrics.confusion import SCORES, confusion_matrix
from affekt.finetune.metrics.intervals import bootstrap_interval
from affekt.finetune.predictions import Predictions
from affekt.finetune.probes.results import versions
from affekt.finetune.schema import Estimate, Results, System
from affekt.finetune.training.clips import Clips, Part
from affekt.finetune.training.settings import FinetuneSettings


def write_results(settings: FinetuneSettings, clips: Clips, seen_by_test: dict[str, Any]) -> Results:
    """Score the test predictions of every judged corpus and write its results; those of the first are returned."""
    found = []
    for part in (part for part in clips.parts if part.judged):
        folder = corpus_folder(settings, part)
        tables = [Predictions.read(prediction_file(folder, seed, "test")) for seed in settings.seeds]
        files = [str(prediction_file(folder, seed, "test").relative_to(folder)) for seed in settings.seeds]
        results = Results(
            title=settings.title,
            task=settings.task,
            label=corpus_label(settings, part),
            classes=part.targets.classes,
            dimensions=list(part.targets.dimensions),
            main_score="uar",
            clips={"parts": {side: len(getattr(part, side)) for side in ("train", "dev", "test")}},
            systems=[describe(settings, part, tables, files)],
            pretraining=seen_by_test.get(part.name, {}),
            licences=licences(part),
            settings=settings.model_dump(mode="json"),
            versions=versions(),
        )
        results.write(folder / "results.json")
        write_text(folder / "results.csv", as_csv(results))
        found.append(results)
    return found[0]


def describe(settings: FinetuneSettings, part: Part, tables: list[Predictions], files: list[str]) -> System:
    """All seeds of a corpus: scores are means over them, with the interval of the mean."""
    first = tables[0]
    classes = len(part.targets.classes)
    labels = [table.label for table in tables]
    guesses = np.stack([table.logits.argmax(1) for table in tables])
    groups = first.meta["speaker"] if all(first.meta["speaker"]) else None
    how = {"n": settings.bootstrap, "num_classes": classes}
    estimates = {}
    for name, score in SCORES.items():
        interval = bootstrap_interval(score, labels[0], guesses, groups, **how)
        estimates[name] = Estimate(**interval.as_dict())
    matrices = [confusion_matrix(labels[0], row, classes) for row in guesses]
    return System(
        name=first.about["name"],
        title=settings.title,
        kind=first.about["name"],
        streams=first.about["streams"],
        transductive=settings.transductive,
        seeds=list(settings.seeds),
        clips=len(first),
        scores=estimates,
        by_seed=[{name: float(score(matrix)) for name, score in SCORES.items()} for matrix in matrices],
        confusion=sum(matrices).tolist(),
        predictions=files,
    )


def as_csv(results: Results) -> str:
    """One line per system and score."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["system", "streams", "score", "value", "low", "high", "unit", "clusters", "clips", "selected"])
    for system in results.systems:
        for name, e in system.scores.items():
            row = [system.name, system.streams, name, e.value, e.low, e.high, e.unit, e.clusters, system.clips]
            writer.writerow([*row, system.selected])
    return text.getvalue()


def licences(part: Part) -> list[str]:
    rows = map(part.index.samples.row, part.train + part.dev + part.test)
    return sorted(Counter(str(row["meta"]["licence"]) for row in rows if row["meta"].get("licence")))


def corpus_label(settings: FinetuneSettings, part: Part) -> str:
    labels = next(corpus.labels for corpus in settings.data.parts if corpus.name == part.name)
    return labels.field if labels.rule == "label" else labels.condition if labels.rule else ", ".join(labels.dimensions)


def corpus_folder(settings: FinetuneSettings, part: Part) -> Path:
    """Where the results of a judged corpus are: of one alone in `out`, of several in folders by their names."""
    judged = sum(corpus.test is not None for corpus in settings.data.parts)
    return Path(settings.out) if judged == 1 else Path(settings.out) / part.name


def prediction_file(folder: Path, seed: int, side: str) -> Path:
    return folder / "predictions" / f"seed-{seed}-{side}.safetensors"
