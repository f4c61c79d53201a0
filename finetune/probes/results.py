"""What a probe leaves behind: the results as JSON, written whole or not at all, and the table for people."""

import json
import platform
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from affekt.data.files import write_text
from affekt.data.shards import ShardIndex
from affekt.finetune.probes.menu import Task

ROW_NAMES = {
    "pretrained": "Pre-trained encoder",
    "random": "Random encoder",
    "statistics": "Plain statistics",
    "majority": "Majority class",
}
STREAM_NAMES = {"audio": "Audio", "video": "Video", "both": "Both"}


def row_name(row: dict[str, Any]) -> str:
    """The name of a result row; a transductive one always says so."""
    name = ROW_NAMES[row["features"]]
    if row["kind"] == "plain":
        name += ", plain mean"
    return f"{name} (transductive)" if row["transductive"] else name


def find_row(results: dict[str, Any], features: str, stream: str, kind: str = "chosen") -> dict[str, Any] | None:
    """The row of a table cell, None where it was not computed."""
    wanted = (features, stream, kind)
    return next((r for r in results["rows"] if (r["features"], r["stream"], r["kind"]) == wanted), None)


def show_table(results: dict[str, Any], console: Console) -> None:
    """Print UAR in percent with its interval, one line per kind of features, one column per stream."""
    streams = list(dict.fromkeys(row["stream"] for row in results["rows"]))
    first = results["rows"][0]
    interval = first["test"]["uar"]
    clips = results["clips"]
    table = Table(title=f"UAR on test clips, percent, 95 % over {interval['clusters']} {interval['unit']}")
    table.add_column("Features")
    for stream in streams:
        table.add_column(STREAM_NAMES[stream], justify="right")
    for features, kind in dict.fromkeys((row["features"], row["kind"]) for row in results["rows"]):
        cells = [find_row(results, features, stream, kind) for stream in streams]
        name = row_name(next(cell for cell in cells if cell))
        table.add_row(name, *(percent(cell["test"]["uar"], 0) if cell else "" for cell in cells))
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


def percent(interval: dict[str, Any], digits: int = 1) -> str:
    """`63.2 [55.0, 70.1]` from an interval of shares; `digits` are those of its bounds."""
    low, high = (f"{100 * interval[bound]:.{digits}f}" for bound in ("low", "high"))
    return f"{100 * interval['value']:.1f} [{low}, {high}]"


def describe_clips(
    index: ShardIndex, positions: np.ndarray, task: Task, left_out: dict[str, int], label: str, group: str
) -> dict[str, Any]:
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
        "left_out": left_out,
        "parts": parts,
    }


def versions() -> dict[str, str]:
    """Versions that the numbers may depend on."""
    names = ("affekt", "torch", "numpy", "scikit-learn", "scipy")
    return {"python": platform.python_version(), "platform": platform.platform(), **{n: version(n) for n in names}}


def write_json(path: Path, value: Any) -> None:
    """Write JSON in one step; NaN and infinity are refused: no score may be one."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
