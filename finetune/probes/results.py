"""What a probe leaves behind: `results.json` and the predictions behind it, and the table for people.

`results.json` is `schema.Results` with more: `rows` and `trials` have every choice that was made.
"""

import json
import platform
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from affekt.data.files import write_text
from affekt.data.shards import ShardIndex
from affekt.finetune.metrics.confusion import confusion_matrix
from affekt.finetune.predictions import Predictions
from affekt.finetune.probes.depth import Depth, nuisance_table
from affekt.finetune.probes.menu import Trial
from affekt.finetune.probes.search import Answered, Row
from affekt.finetune.probes.settings import ProbeSettings
from affekt.finetune.probes.task import Task
from affekt.finetune.schema import Curve, Difference, Layers, Results, System
from affekt.finetune.scores import compare, score, values

ROW_NAMES = {
    "pretrained": "Pre-trained encoder",
    "random": "Random encoder",
    "statistics": "Plain statistics",
    "majority": "Majority class",
}
HEAD_NAMES = {
    "logistic": "logistic",
    "ridge": "ridge",
    "mlp": "MLP",
    "attentive": "attentive",
    "knn": "kNN",
    "broad": "broad learning",
    "layer_weights": "weighted layers",
}
KINDS = {"pretrained": "probe", "random": "random", "statistics": "statistics", "majority": "majority"}
STREAM_NAMES = {"audio": "Audio", "video": "Video", "both": "Both"}
SHOWN = {"uar": ("uar", "war", "macro_f1"), "ccc": ("ccc", "pcc", "rmse", "mae")}


def row_name(row: dict[str, Any]) -> str:
    """The name of a result row; a transductive one always says so, and another head than the first is named."""
    name = ROW_NAMES[row["features"]]
    if row["kind"] == "plain":
        name += ", plain mean"
    elif not row["main"]:
        name += f", {HEAD_NAMES[row['head']]}"
    return f"{name} (transductive)" if row["transductive"] else name


def find_row(
    results: dict[str, Any], features: str, stream: str, kind: str = "chosen", head: str | None = None
) -> dict[str, Any] | None:
    """The row of a table cell, by default that of the first head; None where it was not computed."""
    wanted = (features, stream, kind)
    rows = (r for r in results["rows"] if (r["features"], r["stream"], r["kind"]) == wanted)
    return next((row for row in rows if head in (None, row["head"])), None)


def main_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the first head, and those without one."""
    return [row for row in results["rows"] if row["main"] or row["kind"] == "plain"]


def show_table(results: dict[str, Any], console: Console) -> None:
    """Print the main score in percent with its interval, one line per kind of features, one column per stream."""
    streams = list(dict.fromkeys(row["stream"] for row in results["rows"]))
    name = results["main_score"]
    interval = results["rows"][0]["test"][name]
    clips = results["clips"]
    title = f"{name.upper()} on test clips, percent, 95 % over {interval['clusters']} {interval['unit']}"
    table = Table(title=title)
    table.add_column("Features")
    for stream in streams:
        table.add_column(STREAM_NAMES[stream], justify="right")
    for features, kind, head in dict.fromkeys((r["features"], r["kind"], r["head"]) for r in results["rows"]):
        cells = [find_row(results, features, stream, kind, head) for stream in streams]
        title = row_name(next(cell for cell in cells if cell))
        table.add_row(title, *(percent(cell["test"][name], 0) if cell else "" for cell in cells))
    console.print(table)
    for stream in streams:
        row = find_row(results, "pretrained", stream)
        counts = row["clips"]
        without = clips["labelled"] - counts["fit"] - counts["test"]
        excluded = f"; {without} clips without it left out" if without else ""
        console.print(
            f"{STREAM_NAMES[stream]}: {counts['fit']} clips to fit, {counts['choose']} of them to choose,"
            f" {counts['test']} to score{excluded}; chosen {' + '.join(row['choices'][0]['blocks'])}",
            highlight=False,
        )
    for part in results["layers"]:
        console.print(told_layers(part), highlight=False)


def told_layers(part: dict[str, Any]) -> str:
    """`pretrained_audio: best layer audio_3, uar 61.0; there: control 80.1, speaker 95.0, ...`, in percent."""
    curves = {curve["name"]: curve["y"] for curve in part["curves"]}
    at = int(np.argmax(curves["main"]))
    there = ", ".join(f"{name} {100 * y[at]:.1f}" for name, y in curves.items() if name != "main")
    return (
        f"{part['system']}: best layer {part['best'].split('/')[0]}, {part['score']} on development clips"
        f" {100 * curves['main'][at]:.1f}" + (f"; there: {there}" if there else "")
    )


def percent(interval: dict[str, Any], digits: int = 1) -> str:
    """`63.2 [55.0, 70.1]` from an interval of shares; `digits` are those of its bounds."""
    low, high = (f"{100 * interval[bound]:.{digits}f}" for bound in ("low", "high"))
    return f"{100 * interval['value']:.1f} [{low}, {high}]"


def majority_row(stream: str, task: Task) -> Row:
    """The most frequent class of the clips for fitting, or their mean rating, as answers like those of a head."""
    targets = task.targets(task.fitting)
    share = targets.values.mean(0)
    said = np.log(np.maximum(share, 1e-6)) if targets.classes else share
    choice = Trial("majority", (), ("none",), (task.score(task.fitting, np.tile(said, (len(task.fitting), 1))),))
    held = sum(map(len, task.folds))
    answered = Answered(choice, np.tile(said, (1, len(task.test), 1)), np.tile(said, (held, 1)))
    return Row("majority", stream, "chosen", "majority", task, [answered])


def describe(
    settings: ProbeSettings,
    index: ShardIndex,
    positions: np.ndarray,
    task: Task,
    rows: Sequence[Row],
    layers: list[Layers],
    depth: Depth | None,
) -> dict[str, Any]:
    """`schema.Results` as a dict, with `rows`; writes one file of predictions per row and seed."""
    main = task.score_name
    said = [predictions_of(row, index, positions, settings) for row in rows]
    how = {"bootstrap": settings.bootstrap, "seed": settings.seed}
    how |= {"cluster": "speaker" if settings.group == "speaker" else None}
    systems, described = [], []
    for row, tables in zip(rows, said):
        names = [name for name in score_names(task)]
        estimates = score(tables, names, **how)
        files = [f"predictions/{t.about['name']}_seed{t.about['seed']}.safetensors" for t in tables]
        for table, file in zip(tables, files):
            table.save(settings.output / file)
        system = System(
            name=tables[0].about["name"],
            title=tables[0].about["title"],
            kind=KINDS[row.features],
            streams=row.stream,
            transductive=settings.transductive,
            seeds=list(range(len(tables))),
            clips=len(tables[0]),
            scores=estimates,
            by_seed=[values(table, names) for table in tables],
            confusion=confusion_of(row).tolist(),
            predictions=files,
        )
        systems.append(system)
        described.append(describe_row(row, system, settings))
    for part in layers:
        weighted = next(
            (r for r in rows if (r.features, r.stream, r.head) == (*part.system.split("_"), "layer_weights")), None
        )
        if weighted:
            (weights,) = weighted.answered[0].weights
            part.weights = Curve(name="weights", x=list(range(1, len(weights) + 1)), y=weights.tolist())
    results = Results(
        title=settings.title,
        task="dimensions" if task.dimensions else "single",
        label=", ".join(task.dimensions) or settings.label,
        classes=task.classes,
        dimensions=task.dimensions,
        main_score=main,
        clips=describe_clips(index, positions, task, label=settings.label, group=settings.group),
        systems=systems,
        differences=differences(said, settings, main, how),
        layers=layers,
        tables=[nuisance_table(layers, depth, main.upper())] if depth and layers else [],
        settings=json.loads(settings.model_dump_json()),
        versions=versions(),
    )
    chance = 0.0 if task.dimensions else 1 / len(task.classes)
    extra = {"rows": described, "chance": chance, "shards": index.fingerprint}
    return results.model_dump(mode="json") | extra


def score_names(task: Task) -> list[str]:
    """The scores of each row."""
    names = list(SHOWN[task.score_name])
    return names + [f"ccc_{dimension}" for dimension in task.dimensions]


def predictions_of(row: Row, index: ShardIndex, positions: np.ndarray, settings: ProbeSettings) -> list[Predictions]:
    """One table of the test clips per encoder and seed of the head."""
    task, test = row.task, row.task.test
    rows = [index.samples.row(p) for p in positions[test]]
    name = f"{row.features}_{row.stream}"
    main = is_main(row, settings)
    if not main or row.kind == "plain":
        name += "_plain" if row.kind == "plain" else f"_{row.head}"
    title = row_name(
        {"features": row.features, "kind": row.kind, "head": row.head, "main": main, "transductive": False}
    )
    known = {"values" if task.dimensions else "logits": None, "label": None if task.dimensions else task.labels[test]}
    known |= {"ratings": task.ratings[test] if task.dimensions else None}
    said = "values" if task.dimensions else "logits"
    return [
        Predictions(
            ids=[r["id"] for r in rows],
            classes=task.classes,
            dimensions=task.dimensions,
            meta={f: [str(r["meta"].get(f) or "") for r in rows] for f in ("speaker", "session", "sex", "age")},
            about={
                "name": name,
                "title": title,
                "seed": seed,
                "part": "test",
                "selected": "dev",
                "streams": row.stream,
            },
            **known | {said: answers.astype(np.float64)},
        )
        for seed, answers in enumerate(row.test)
    ]


def is_main(row: Row, settings: ProbeSettings) -> bool:
    """Whether this is the row that stands for its features: that of the first head, chosen from the menu."""
    first = settings.heads[0]
    if row.features == "statistics":  # which have no tokens and no layers to read
        first = next((head for head in settings.heads if head not in ("attentive", "layer_weights")), first)
    return row.kind == "chosen" and row.head in (first, "majority")


def describe_row(row: Row, system: System, settings: ProbeSettings) -> dict[str, Any]:
    """A row for results.json. With several seeds scores are means over them and the confusion matrix is their sum."""
    return {
        "system": system.name,
        "features": row.features,
        "stream": row.stream,
        "kind": row.kind,
        "head": row.head,
        "main": is_main(row, settings),
        "transductive": settings.transductive,
        "clips": row.task.counts(),
        "choices": [
            {
                "blocks": list(a.choice.blocks),
                "option": a.choice.option,
                "dev": a.choice.best,
                "test": float(np.mean([row.task.score(row.task.test, said) for said in a.test])),
            }
            for a in row.answered
        ],
        "test": {name: estimate.model_dump() for name, estimate in system.scores.items()},
        "confusion": system.confusion,
    }


def confusion_of(row: Row) -> np.ndarray:
    """Summed over seeds; empty of dimensions."""
    if row.task.dimensions:
        return np.zeros((0, 0), int)
    truth = row.task.labels[row.task.test]
    return sum(confusion_matrix(truth, said.argmax(1), len(row.task.classes)) for said in row.test)


def differences(
    said: Sequence[list[Predictions]], settings: ProbeSettings, main: str, how: dict[str, Any]
) -> list[Difference]:
    """Paired differences on the test clips that two rows share: pre-trained against random encoder and plain statistics
    on each stream, both streams against either alone, and the pre-trained encoder's other heads against the first."""
    tables = {parts[0].about["name"]: parts for parts in said}
    pairs = [(f"pretrained_{s}", f"{other}_{s}") for s in settings.streams for other in ("random", "statistics")]
    pairs += [("pretrained_both", f"pretrained_{s}") for s in ("audio", "video")]
    pairs += [(f"pretrained_{s}_{h}", f"pretrained_{s}") for s in settings.streams for h in settings.heads[1:]]
    return [compare(tables[of], tables[minus], main, **how) for of, minus in pairs if of in tables and minus in tables]


def describe_clips(index: ShardIndex, positions: np.ndarray, task: Task, label: str, group: str) -> dict[str, Any]:
    """Counts for the results: clips, groups and classes of each part, and what was left out."""
    parts = {}
    for part, clips in (("fit", task.fitting), ("choose", np.concatenate(task.folds)), ("test", task.test)):
        names = Counter(task.classes[task.labels[c]] for c in clips)
        speakers = {index.samples[positions[c]].meta.get("speaker") for c in clips} - {None}
        parts[part] = {
            "clips": len(clips),
            "classes": {name: names[name] for name in task.classes},
            "speakers": sorted(map(str, speakers)),
            "with_audio": sum(index.samples[positions[c]].has_audio for c in clips),
            "with_video": sum(index.samples[positions[c]].has_video for c in clips),
        }
    return {
        "label": label,
        "group": group,
        "folds": len(task.folds),
        "labelled": len(positions),
        "parts": parts,
    }


def versions() -> dict[str, str]:
    """Versions that the numbers may depend on."""
    names = ("affekt", "torch", "numpy", "scikit-learn", "scipy")
    return {"python": platform.python_version(), "platform": platform.platform(), **{n: version(n) for n in names}}


def write_json(path: Path, value: Any) -> None:
    """Write JSON in one step; NaN and infinity are refused: no score may be one."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
