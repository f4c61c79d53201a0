"""From the answers of a probe's heads to `results.json`, which is `schema.Results` with more: `rows` and `trials` have
every choice that was made. The predictions behind each row are written beside it."""

import json
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from affekt.data.shards import ShardIndex
from affekt.finetune.features import FeatureTable
from affekt.finetune.metrics.confusion import confusion_matrix
from affekt.finetune.predictions import Predictions
from affekt.finetune.probes.depth import Depth, nuisance_table
from affekt.finetune.probes.menu import Trial
from affekt.finetune.probes.results import row_name, versions
from affekt.finetune.probes.search import Answered, Row
from affekt.finetune.probes.settings import ProbeSettings
from affekt.finetune.probes.task import Task
from affekt.finetune.report.map import embedding_map, evenly
from affekt.finetune.schema import Curve, Difference, Layers, Results, System, Table
from affekt.finetune.scores import cluster_of, compare, describe_system, score, values
from affekt.finetune.splits import describe_side

KINDS = {"pretrained": "probe", "random": "random", "statistics": "statistics", "majority": "majority"}
SHOWN = {"uar": ("uar", "war", "macro_f1"), "ccc": ("ccc", "pcc", "rmse", "mae")}


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
    how |= {"cluster": cluster_of(said[0][0])}  # also where clips of one speaker stand on both sides
    systems = [
        describe_system_of(row, tables, index, positions, settings, how) for row, tables in zip(rows, said, strict=True)
    ]
    for part in layers:
        weighted = next(
            (r for r in rows if (r.features, r.stream, r.head) == (*part.system.split("_"), "layer_weights")), None
        )
        if weighted:
            (weights,) = weighted.answered[0].weights
            part.weights = Curve(name="weights", x=list(range(1, len(weights) + 1)), y=weights.tolist())
    results = Results(
        command="probe",
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
    described = [describe_row(row, system, settings) for row, system in zip(rows, systems, strict=True)]
    extra = {"rows": described, "chance": chance, "shards": index.fingerprint}
    dumped = results.model_dump(mode="json")
    return dumped | extra | {"tables": [*dumped["tables"], choices_table(described, systems).model_dump()]}


def choices_table(rows: Sequence[dict[str, Any]], systems: Sequence[System]) -> Table:
    """What each row chose on development clips, with both scores, as a table of the results."""
    cells = []
    for row, system in zip(rows, systems, strict=True):
        for choice in row["choices"]:
            blocks = " + ".join(block.replace("_statistics", "") for block in choice["blocks"])
            option = choice["option"]
            option = " at ".join(f"{part:g}" for part in option) if isinstance(option, list | tuple) else str(option)
            cells.append([system.title, blocks, option, f"{choice['dev']:.3f}", f"{choice['test']:.3f}"])
    head = ["System", "Features", "Option", "Score on development clips", "On test clips"]
    return Table(title="Every choice that was made on development clips", head=head, rows=cells)


def map_of(
    rows: Sequence[Row], tables: dict[str, list[FeatureTable]], index: ShardIndex, positions: np.ndarray
) -> list[dict[str, Any]]:
    """Test clips on a plane by the pre-trained features that the first head chose, of both streams where there are."""
    chosen = [row for row in rows if row.features == "pretrained" and row.kind == "chosen"]
    row = next((row for row in chosen if row.stream == "both"), chosen[0])
    task, (table, *_) = row.task, tables["pretrained"]
    clips = np.array(evenly(task.test))
    blocks = [table.take(block, clips) for block in row.answered[0].choice.blocks]
    features = np.concatenate([b.reshape(len(clips), -1, b.shape[-1]).astype(np.float64).mean(1) for b in blocks], 1)
    found = [index.samples.row(p) for p in positions[clips]]
    labels = [task.classes[i] if task.classes else "" for i in (task.labels[clips] if task.classes else clips)]
    speakers = [str(r["meta"].get("speaker") or "") for r in found]
    return [point.model_dump() for point in embedding_map(features, [r["id"] for r in found], labels, speakers)]


def describe_system_of(
    row: Row,
    tables: list[Predictions],
    index: ShardIndex,
    positions: np.ndarray,
    settings: ProbeSettings,
    how: dict[str, Any],
) -> System:
    """A row of the summary, its predictions written beside the results. Of the rows that stand for their features all
    is said, with calibration on the development clips; of the others the scores."""
    about = tables[0].about
    files = [f"predictions/{t.about['name']}_seed{t.about['seed']}.safetensors" for t in tables]
    for table, file in zip(tables, files):
        table.save(settings.output / file)
    named = {"name": about["name"], "title": about["title"], "kind": KINDS[row.features]}
    if is_main(row, settings):
        dev = predictions_of(row, index, positions, settings, part="dev")
        system = describe_system(**named, predictions=tables, dev=dev, **how, transductive=settings.transductive)
        return system.model_copy(update={"predictions": files})
    names = SHOWN[row.task.score_name]
    return System(
        **named,
        streams=row.stream,
        transductive=settings.transductive,
        seeds=list(range(len(tables))),
        clips=len(tables[0]),
        scores=score(tables, names, **how),
        by_seed=[values(table, names) for table in tables],
        confusion=confusion_of(row).tolist(),
        predictions=files,
    )


def predictions_of(
    row: Row, index: ShardIndex, positions: np.ndarray, settings: ProbeSettings, part: Literal["test", "dev"] = "test"
) -> list[Predictions]:
    """One table of the test clips, or of those of all development folds, per encoder and seed of the head."""
    task = row.task
    clips = task.test if part == "test" else np.concatenate(task.folds)
    answers = [a.test if part == "test" else np.repeat(a.dev[None], len(a.test), 0) for a in row.answered]
    rows = [index.samples.row(p) for p in positions[clips]]
    main = is_main(row, settings)
    own = "" if main else "_plain" if row.kind == "plain" else f"_{row.head}"
    named = {"features": row.features, "kind": row.kind, "head": row.head, "main": main, "transductive": False}
    about = {"name": f"{row.features}_{row.stream}{own}", "title": f"{row_name(named)}, {row.stream}", "part": part}
    about |= {"selected": "dev", "streams": row.stream}
    meta = {f: [str(r["meta"].get(f) or "") for r in rows] for f in ("speaker", "session", "sex", "age")}
    known: dict[str, Any] = {"classes": task.classes, "dimensions": task.dimensions}
    known |= {"ratings": task.ratings[clips]} if task.dimensions else {"label": task.labels[clips]}
    said = "values" if task.dimensions else "logits"
    ids = [r["id"] for r in rows]
    return [
        Predictions(ids=ids, meta=meta, about=about | {"seed": seed}, **known | {said: array.astype(np.float64)})
        for seed, array in enumerate(np.concatenate(answers))
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
        labels = task.labels[clips] if task.classes else []
        parts[part] = describe_side(index, positions[clips], task.classes, labels)
    return {
        "label": label,
        "group": group,
        "folds": len(task.folds),
        "labelled": len(positions),
        "parts": parts,
    }
