"""The runs there are: found below a folder, described in a line each, and compared."""

import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from affekt.data.errors import SettingsError
from affekt.pretrain.log import ENDED, STARTED, read_json, read_metrics

MARK, FINETUNE = "metrics.jsonl", "finetune.json"
PROBE_ORDER = ("probe/linear_both", "probe/linear_audio", "probe/linear_video")
COMPARED = (
    "loss",
    "loss_video",
    "loss_audio",
    "loss_contrast",
    "loss_functionals",
    "loss_edges",
    "grad_norm",
    "lr",
    "clips_per_s",
    "data_wait",
    "mfu",
)


def find_runs(folder: Path) -> list[Path]:
    """Folders of pre-training runs at or below `folder`, by name; what lies inside of a run is not looked into.

    Raises SettingsError where there is no such folder.
    """
    if not folder.is_dir():
        raise SettingsError(f"{folder}: no such folder; name one with runs in it")
    found = []
    for path, names, files in os.walk(folder):
        if MARK in files:
            names.clear()
            if FINETUNE not in files:  # its rows are of several fits
                found.append(Path(path))
        names[:] = sorted(name for name in names if not name.startswith("."))
    return sorted(found)


def state_of(run: Path) -> tuple[str, str]:
    """`finished`, `failed`, `running` or `interrupted` (or another state that the run's summary names), and what to
    say of it: the error, or nothing."""
    summary = read_json(run / ENDED)
    if "state" in summary:
        reason = f"exit code {summary['exit_code']}: {summary['reason']}" if "exit_code" in summary else ""
        return str(summary["state"]), reason
    return ("running", "") if is_held(run) else ("interrupted", "")


def is_held(run: Path) -> bool:
    """Whether a process of this machine, or of another on the same disk, trains in the folder."""
    try:
        with open(run / ".lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no lock, or no locks on this disk
        return False
    return False


def describe(run: Path) -> dict[str, Any]:
    """One line about a run: state and reason, model, step of steps, the last loss, probe, rate, and seconds since it
    last wrote (None where there is no such thing)."""
    started, settings, rows = read_json(run / STARTED), read_settings(run), read_metrics(run / MARK)
    state, reason = state_of(run)
    steps = started.get("steps") or _nested(settings, "train", "steps")
    probe = next((row for row in reversed(rows) if any(name in row for name in PROBE_ORDER)), {})
    return {
        "run": str(run),
        "state": state,
        "reason": reason,
        "model": _nested(settings, "model", "name"),
        "step": rows[-1]["step"] if rows else 0,
        "steps": steps,
        "loss": _last(rows, "loss"),
        "probe": next((probe[name] for name in PROBE_ORDER if name in probe), None),
        "probe_step": probe.get("step"),
        "clips_per_s": _last(rows, "clips_per_s"),
        "age_s": round(max(0.0, time.time() - (run / MARK).stat().st_mtime), 1),
        "time_s": rows[-1]["time_s"] if rows else 0.0,
    }


def compare(runs: Sequence[Path]) -> dict[str, Any]:
    """`{"runs": [what describe says], "settings": {key: [a value per run]}, "values": {name: [last per run]},
    "curves": {name: [{"step", "value"} per run]}}`; of the settings those that differ.

    Raises SettingsError for a folder that holds no run.
    """
    for run in runs:
        if not (run / MARK).is_file():
            raise SettingsError(
                f"{run}: not the folder of a run (no {MARK}); `affekt runs FOLDER` lists those there are"
            )
    rows = [read_metrics(run / MARK) for run in runs]
    names = [*COMPARED, *sorted({key for part in rows for row in part for key in row if key.startswith("probe/")})]
    names = [name for name in names if any(name in row for part in rows for row in part)]
    return {
        "runs": [describe(run) for run in runs],
        "settings": different_settings([read_settings(run) for run in runs]),
        "values": {name: [_last(part, name) for part in rows] for name in names},
        "curves": {name: [_curve(part, name) for part in rows] for name in names},
    }


def different_settings(settings: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """`{"train.steps": [100, 200]}`: a value per run (None where a run has no such key), of keys that differ."""
    flat = [dict(_flat(values)) for values in settings]
    keys = dict.fromkeys(key for values in flat for key in values)
    rows = {key: [values.get(key) for values in flat] for key in keys}
    return {key: values for key, values in rows.items() if any(value != values[0] for value in values)}


def short_names(runs: Sequence[Path]) -> list[str]:
    """What tells the runs apart: their paths without the folders that all share."""
    parts = [run.resolve().parts for run in runs]
    shared = 0
    while len(parts) > 1 and all(len(p) > shared + 1 for p in parts) and len({p[shared] for p in parts}) == 1:
        shared += 1
    return ["/".join(p[shared:]) if len(parts) > 1 else p[-1] for p in parts]


def read_settings(run: Path) -> dict[str, Any]:
    """The resolved settings beside a run as they stand there, also those of another version."""
    try:
        values = yaml.safe_load((run / "settings.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def _curve(rows: list[dict[str, Any]], name: str) -> dict[str, list[float]]:
    found = [(row["step"], row[name]) for row in rows if name in row]
    return {"step": [step for step, _ in found], "value": [value for _, value in found]}


def _last(rows: list[dict[str, Any]], name: str) -> float | None:
    return next((row[name] for row in reversed(rows) if name in row), None)


def _nested(values: dict[str, Any], *keys: str) -> Any:
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    return values


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
