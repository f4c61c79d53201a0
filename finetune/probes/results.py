"""What a probe leaves behind, for people: the names of its rows and the table of its scores."""

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from affekt.data.files import write_text

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
PENALISED = ("logistic", "ridge", "broad")
STREAM_NAMES = {"audio": "Audio", "video": "Video", "both": "Both"}


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
    for line in at_the_end(results):
        console.print(line, highlight=False)


def at_the_end(results: dict[str, Any]) -> list[str]:
    """A line for each choice of the pre-trained encoder whose penalty is the first or last of its menu and better than
    its neighbour there: what lies beyond may be better still."""
    tried = {(t["stream"], t["head"], *t["blocks"]): t for t in results["trials"] if t["features"] == "pretrained"}
    lines = []
    for row in results["rows"]:
        if row["features"] != "pretrained" or row["kind"] != "chosen" or row["head"] not in PENALISED:
            continue
        trial = tried[(row["stream"], row["head"], *row["choices"][0]["blocks"])]
        scores, place = trial["dev_scores"], trial["options"].index(row["choices"][0]["option"])
        for end, at, inner in (("strongest", 0, 1), ("weakest", len(scores) - 1, -2)):
            if place == at and len(scores) > 1 and scores[at] > scores[inner]:
                lines.append(
                    f"{row['system']}: the best penalty, {trial['options'][at]:g}, is the {end} of the menu; "
                    "`penalties` that go further may do better"
                )
    return lines


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


def versions() -> dict[str, str]:
    """Versions that the numbers may depend on."""
    names = ("affekt", "torch", "numpy", "scikit-learn", "scipy")
    return {"python": platform.python_version(), "platform": platform.platform(), **{n: version(n) for n in names}}


def write_json(path: Path, value: Any) -> None:
    """Write JSON in one step; NaN and infinity are refused: no score may be one."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
