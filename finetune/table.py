"""From the predictions of an evaluation to its results: scores pooled over folds, a row for each fold, differences."""

import csv
import io
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from affekt.data.files import refuse_other_kind, write_text
from affekt.finetune.ceiling import describe_raters
from affekt.finetune.evaluate import (
    SETTINGS,
    EvaluateSettings,
    Judged,
    Plan,
    Progress,
    plan_evaluation,
    pool_folds,
    run_folds,
)
from affekt.finetune.predictions import Predictions
from affekt.finetune.probes.results import versions
from affekt.finetune.schema import Difference, Estimate, Results, System
from affekt.finetune.scores import cluster_of, compare, describe_system, task_of
from affekt.finetune.splits import licences

KIND = "results of `affekt evaluate`"
SHOWN = {
    "label": ("uar", "war", "macro_f1", "weighted_f1", "present_macro_f1", "masked_uar"),
    "ratings": ("ccc", "pcc", "rmse", "mae"),
}


def evaluate(
    settings: EvaluateSettings, contenders: Sequence[Any], progress: Progress | None = None, title: str = ""
) -> Results:
    """Run what is left to run and write `results.json`, `results.csv`, `folds.csv` and `report.html` into
    `settings.output`. Scores are computed once, from the clips of all test folds together; intervals resample speakers.

    Raises what `plan_evaluation` and `run_folds` raise; nothing that was finished is lost.
    """
    started = time.perf_counter()
    plan = plan_evaluation(settings)
    output = settings.output
    if not (output / SETTINGS).exists():
        refuse_other_kind(output, KIND)
    judged = run_folds(plan, contenders, settings, progress)
    results = to_results(plan, judged, settings)
    results.seconds["all"] = round(time.perf_counter() - started, 2)
    write_results(output, results, plan.index)
    return results


def to_results(plan: Plan, judged: Sequence[Judged], settings: EvaluateSettings) -> Results:
    """The whole table: a system for each contender, and the first one minus each of the others. What is said of
    pre-training is of the first contender that had any."""
    tables = {one.contender.name: [pool_folds(tests, plan.rules) for tests in one.tests] for one in judged}
    first = next(iter(tables.values()))[0]
    how = {"bootstrap": settings.bootstrap, "seed": settings.seed, "cluster": cluster_of(first)}
    rules = plan.rules
    return Results(
        command="evaluate",
        title=settings.title or rules.title,
        task=task_of(first),
        label=", ".join(rules.dimensions) or rules.label,
        classes=plan.classes,
        dimensions=list(rules.dimensions),
        main_score=rules.main_score,
        protocol=describe_protocol(plan, settings),
        clips={
            "labelled": len(plan.positions),
            "left_out": plan.left_out,
            "unread": {one.contender.name: one.unread for one in judged if one.unread},
        },
        systems=[describe(one, tables[one.contender.name], settings, how) for one in judged]
        + raters_row(plan, judged[0].contender.streams, first, settings, how),
        differences=differences(list(tables.values()), rules.main_score, how),
        pretraining=next((one.overlap for one in judged if one.overlap), {}),
        licences=sorted({*licences(plan.index, plan.positions), *behind_weights(judged)}),
        settings=json.loads(settings.model_dump_json()),
        versions=versions(),
    )


def describe(judged: Judged, tables: list[Predictions], settings: EvaluateSettings, how: dict[str, Any]) -> System:
    """The row of a contender, whose name says on which clips all was chosen."""
    one = judged.contender
    row = describe_system(
        system_name(one.name, settings.selected),
        f"{one.title} ({settings.selected}-selected)",
        one.kind,
        tables,
        [dev for seed in judged.devs for dev in seed],
        **how,
        streams=one.streams,
        seeds=list(one.seeds),
        transductive=one.transductive,
    )
    chosen = {test.about["fold"]: test.about["chosen"] for test in judged.tests[0]}
    folds = [fold.model_copy(update={"chosen": chosen.get(fold.name, {})}) for fold in row.by_fold]
    return row.model_copy(update={"by_fold": folds, "predictions": judged.files})


def raters_row(
    plan: Plan, streams: str, table: Predictions, settings: EvaluateSettings, how: dict[str, Any]
) -> list[System]:
    """One rater against the others, where clips carry the votes of two or more: of those who met what the first
    contender meets. Nothing at all without votes."""
    if plan.rules.dimensions or plan.rules.pool_tokens:
        return []
    metas = {row["id"]: row["meta"] for row in map(plan.index.samples.row, plan.positions)}
    condition = {"audio": "votes_voice", "video": "votes_face"}.get(streams, "votes")
    if not any(meta.get(condition) for meta in metas.values()):
        condition = "votes"
    counts = np.zeros((len(table), len(plan.classes)))
    for row, clip in enumerate(table.ids):
        for word, count in (metas[clip].get(condition) or {}).items():
            name = plan.rules.class_of(word)
            if name in plan.classes:
                counts[row, plan.classes.index(name)] += count
    if not (counts.sum(1) > 1).any():
        return []
    title = f"One rater against the others ({condition})"
    return [describe_raters(table, counts, title=title, **how).model_copy(update={"selected": settings.selected})]


def system_name(name: str, selected: str) -> str:
    """`finetuned` -> `finetuned:dev-selected`; nothing is claimed where it is unknown."""
    return name if selected == "unknown" else f"{name}:{selected}-selected"


def differences(tables: list[list[Predictions]], main: str, how: dict[str, Any]) -> list[Difference]:
    """The first run minus each of the others, paired on the clips that both have judged."""
    found = []
    for other in tables[1:]:
        difference = compare(tables[0], other, main, **how)
        names = [system_name(t[0].about["name"], t[0].about["selected"]) for t in (tables[0], other)]
        found.append(difference.model_copy(update={"of": names[0], "minus": names[1]}))
    return found


def describe_protocol(plan: Plan, settings: EvaluateSettings) -> dict[str, Any]:
    rules = plan.rules
    return {
        "name": rules.name,
        "title": rules.title,
        "source": rules.source,
        "apart": "clips" if rules.group == "id" else f"{rules.group}s",
        "selected": f"{settings.selected}-selected",
        "folds": [
            {"name": fold.name, "train": len(fold.train), "dev": len(fold.dev), "test": len(fold.test)}
            for fold in plan.folds
        ],
        "published": {"clips": rules.clips, "test_clips": list(rules.tested)},
        "notes": plan.notes,
    }


def behind_weights(judged: Sequence[Judged]) -> set[str]:
    """Licences of the clips that the contenders' weights had seen before."""
    return {name for one in judged for name in (one.contender.pretraining() or {}).get("licences", ())}


def folds_csv(results: Results) -> str:
    """A line for each system, fold and score; the column of a score's values says on which clips all was chosen."""
    text = io.StringIO()
    write = csv.writer(text, lineterminator="\n").writerow
    columns = sorted({system.selected for system in results.systems})
    write(["system", "fold", "clips", "score", *(f"{selected}_selected" for selected in columns)])
    for system in results.systems:
        for fold in system.by_fold:
            for name, value in fold.scores.items():
                cells = [repr(value) if selected == system.selected else "" for selected in columns]
                write([system.name, fold.name, fold.clips, name, *cells])
    return text.getvalue()


def write_results(output: Path, results: Results, index=None) -> None:
    """Write the tables, each whole or not at all, and the page; `results.json` last: where it stands all stands."""
    from affekt.finetune.report.results import write_results_report
    from affekt.finetune.report.rows import results_csv

    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "results.csv", results_csv(results))
    write_text(output / "folds.csv", folds_csv(results))
    write_results_report(output / "report.html", results, index)
    results.write(output / "results.json")


def show(results: Results, console: Console) -> None:
    """Print a row for each system: main scores in percent (errors as they are) with the interval of the main one."""
    main = results.main_score
    there = {name for system in results.systems for name in system.scores}
    wanted = (SHOWN["label"] if results.classes else ()) + (SHOWN["ratings"] if results.dimensions else ())
    names = [name for name in wanted if name != main and name in there]
    for selected in sorted({system.selected for system in results.systems}):
        rows = [system for system in results.systems if system.selected == selected]
        estimate = rows[0].scores[main]
        table = Table(title=f"{results.title}: {selected}-selected, 95 % over {estimate.clusters} {estimate.unit}")
        table.add_column("System")
        for name in (main, *names):
            table.add_column(name.upper(), justify="right")
        table.add_column("Clips", justify="right")
        for row in rows:
            others = [figure(name, row.scores[name]) if name in row.scores else "" for name in names]
            title = row.title.removesuffix(f" ({selected}-selected)") + (" (transductive)" if row.transductive else "")
            table.add_row(title, figure(main, row.scores[main], True), *others, str(row.clips))
        console.print(table)
    for d in results.differences:
        e = d.estimate
        told = f"{100 * e.value:+.1f} [{100 * e.low:+.1f}, {100 * e.high:+.1f}], p = {d.p:.3g}"
        console.print(f"{d.of} minus {d.minus}: {main} {told} on {d.clips} clips", highlight=False)
    for note in results.protocol.get("notes", []):
        console.print(f"note: {note}", highlight=False)


def figure(name: str, estimate: Estimate, interval: bool = False) -> str:
    scale, digits = (1, 3) if name in ("rmse", "mae") else (100, 1)
    value, low, high = (f"{scale * x:.{digits}f}" for x in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low}, {high}]" if interval else value
