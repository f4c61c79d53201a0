"""`affekt runs` and `affekt compare`: what runs there are, how they do, and what they do differently."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from affekt.arguments import AsJson
from affekt.data.errors import SettingsError

STATE_COLOURS = {"running": "green", "finished": "default", "failed": "red"}


def runs(
    folder: Annotated[Path, typer.Argument(help="Runs at or below this folder.")] = Path("runs"),
    report: Annotated[bool, typer.Option("--report", help="Write report.html into each, finished or not.")] = False,
    as_json: AsJson = False,
) -> None:
    """List pre-training runs: state, model, steps, last loss, last online probe, rate, and when they last wrote."""
    from affekt.pretrain.report import write_run_report
    from affekt.pretrain.runs import describe, find_runs

    found = find_runs(folder)
    if not found and report:
        raise SettingsError(f"{folder}: no run in it or below it to report on")
    pages = [str(write_run_report(run)) for run in found] if report else []
    described = [describe(run) for run in found]
    if as_json:
        print(json.dumps({"folder": str(folder), "runs": described, "reports": pages}, ensure_ascii=False))
        return
    if not found:
        print(f"{folder}: no runs")
    else:
        Console().print(runs_table(described, folder))
    for one in described:
        if one["reason"]:
            Console().print(f"{one['run']}: {one['state']}, {one['reason']}", markup=False, highlight=False)
    for path in pages:
        print(f"report: {path}")


def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs.", show_default=False)],
    html: Annotated[Path | None, typer.Option(help="Also write a page with all curves to this file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Put runs side by side: the settings that differ, their last values and, with --html or --json, their curves."""
    from affekt.pretrain.report import write_comparison
    from affekt.pretrain.runs import compare as side_by_side
    from affekt.pretrain.runs import short_names

    folders = list({folder.resolve(): folder for folder in folders}.values())  # one named twice stands there once
    found, names = side_by_side(folders), short_names(folders)
    if html:
        html.parent.mkdir(parents=True, exist_ok=True)
        write_comparison(html, folders)
    if as_json:
        print(json.dumps({**found, "page": str(html) if html else None}, ensure_ascii=False))
        return
    facts = {
        "state": [one["state"] for one in found["runs"]],
        "step": [_steps(one) for one in found["runs"]],
    }
    numbers = {name: [_figure(value) for value in values] for name, values in found["values"].items()}
    settings = {key: [str(value) for value in values] for key, values in found["settings"].items()}
    table = Table("")
    for name in names:
        table.add_column(_plain(name))
    for rows in (facts, settings, numbers):
        for key, values in rows.items():
            table.add_row(*map(_plain, (key, *values)))
        table.add_section()
    Console().print(table)
    if html:
        print(f"page: {html}")


def runs_table(described: list[dict[str, Any]], folder: Path) -> Table:
    table = Table("run", "state", "model")
    for column in ("step", "loss", "probe", "clips/s", "last wrote"):
        table.add_column(column, justify="right")
    for one in described:
        path = Path(one["run"])
        name = str(path.relative_to(folder)) if path != folder else path.resolve().name
        state = Text(one["state"], style=STATE_COLOURS.get(one["state"], "yellow"))
        probe = "" if one["probe"] is None else f"{one['probe']:.1%}"
        rate = "" if one["clips_per_s"] is None else f"{one['clips_per_s']:.0f}"
        figures = (_steps(one), _figure(one["loss"]), probe, rate, _age(one["age_s"]))
        table.add_row(_plain(name), state, _plain(str(one["model"] or "")), *figures)
    return table


def _plain(text: str) -> Text:
    return Text(text)  # a name is no markup


def _steps(one: dict[str, Any]) -> str:
    return f"{one['step']}/{one['steps']}" if one["steps"] else str(one["step"])


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
