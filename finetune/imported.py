"""Predictions of anybody's model as a table: `id,label,p_happy,p_sad,...`, one line a clip, read into `Predictions`.

Columns: `id`; `p_CLASS` a probability for every class (any positive numbers; each line is divided by its sum), or
`logit_CLASS`; `label` the true class; `value_NAME` and `rating_NAME` what was said and what is true of a dimension;
`speaker`, `session`, `sex`, `age`, `domain`, `fold`, all optional. With several folds or seeds, write a file for each
seed. `multi_CLASS` is a probability of its own for each class, where a clip may have several; its truth are the shares
of votes, `share_CLASS`.
"""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from affekt.data.errors import DataError, SettingsError
from affekt.finetune.contenders import META
from affekt.finetune.predictions import Kind, Predictions

LARGEST = 1e30  # of any number: its square is still finite
SMALLEST = 1e-12  # of a probability, so that its logarithm is finite
LOGITS = {"logit_": "single", "p_": "single", "multi_": "multi"}


def read_table(path: str | Path) -> Predictions:
    """Read a .csv or a .safetensors file of predictions. Raises DataError with the line for what is no number, a label
    that is no class, and a file without predictions."""
    path = Path(path)
    if path.suffix == ".safetensors":
        return Predictions.read(path)
    rows = _rows(path)
    head = list(rows[0])
    prefixes = [prefix for prefix in LOGITS if any(name.startswith(prefix) for name in head)]
    if len(prefixes) > 1:
        raise DataError(f"{path}: has columns {' and '.join(f'{p}CLASS' for p in prefixes)}; keep those of one kind")
    prefix = next(iter(prefixes), None)
    classes = [name.removeprefix(prefix) for name in head if prefix and name.startswith(prefix)]
    dimensions = [name.removeprefix("value_") for name in head if name.startswith("value_")]
    if not classes and not dimensions:
        raise DataError(f"{path}: no column p_CLASS, logit_CLASS, multi_CLASS or value_NAME; found {', '.join(head)}")
    if len(classes) == 1:
        raise DataError(f"{path}: {prefix}{classes[0]} is the only class; it takes two")
    kind: Kind = LOGITS.get(prefix, "single")
    said = numbers(path, rows, [f"{prefix}{name}" for name in classes])
    shares = [f"share_{name}" for name in classes] if any(name.startswith("share_") for name in head) else []
    if not set(shares) <= set(head):
        raise DataError(
            f"{path}: no column {', '.join(sorted(set(shares) - set(head)))}; each class has one, or none has"
        )
    try:
        return Predictions(
            [row["id"] for row in rows],
            classes,
            dimensions,
            kind,
            logits=_logits(path, said, prefix) if classes else None,
            values=numbers(path, rows, [f"value_{name}" for name in dimensions]) if dimensions else None,
            label=_labels(path, rows, classes) if classes and "label" in head else None,
            shares=numbers(path, rows, shares, empty=True) if shares else None,
            ratings=numbers(path, rows, [f"rating_{n}" for n in dimensions], empty=True) if dimensions else None,
            meta={name: [row[name] for row in rows] for name in (*META, "fold") if name in head},
            about={"name": path.stem},
        )
    except SettingsError as error:
        raise DataError(f"{path}: {error}") from None


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: no predictions can be read: {error}") from None
    if not rows or "id" not in rows[0]:
        raise DataError(f"{path}: expected a header with the column `id` and a line for each clip")
    doubled = sorted({str(name) for name in reader.fieldnames if reader.fieldnames.count(name) > 1})
    if doubled:
        raise DataError(f"{path}: the column {doubled[0]} stands there twice")
    for line, row in enumerate(rows, 2):
        if not row["id"]:
            raise DataError(f"{path}, line {line}: no id")
        if None in row or None in row.values():
            raise DataError(f"{path}, line {line}: not as many values as the header has columns")
    return rows


def numbers(path: Path, rows: Sequence[dict[str, str]], columns: Sequence[str], empty: bool = False) -> np.ndarray:
    """float64 (N, columns), finite; `empty` lets cells without text be NaN."""
    table = np.empty((len(rows), len(columns)))
    for line, row in enumerate(rows):
        for column, name in enumerate(columns):
            text = row.get(name, "")
            if empty and not text.strip():
                table[line, column] = np.nan
                continue
            try:
                table[line, column] = float(text)
            except ValueError:
                raise DataError(f"{path}, line {line + 2}: {name} is {text!r}, expected a number") from None
            if not abs(table[line, column]) <= LARGEST:
                raise DataError(f"{path}, line {line + 2}: {name} is {text}, no number that can be scored")
    return table


def _logits(path: Path, said: np.ndarray, prefix: str) -> np.ndarray:
    if prefix == "logit_":
        return said
    total = said.sum(1, keepdims=True)
    wrong = ~((said >= 0).all(1) & (total[:, 0] > 0)) if prefix == "p_" else ~((said >= 0) & (said <= 1)).all(1)
    if wrong.any():
        line = int(np.flatnonzero(wrong)[0])
        raise DataError(f"{path}, line {line + 2}: {prefix}... are {said[line].tolist()}, which are no probabilities")
    if prefix == "p_":
        return np.log(np.clip(said / total, SMALLEST, 1))
    return np.log(np.clip(said, SMALLEST, 1)) - np.log(np.clip(1 - said, SMALLEST, 1))


def _labels(path: Path, rows: Sequence[dict[str, str]], classes: list[str]) -> np.ndarray:
    labels = np.full(len(rows), -1, np.int64)
    for line, row in enumerate(rows):
        if row["label"] in classes:
            labels[line] = classes.index(row["label"])
        elif row["label"]:
            raise DataError(f"{path}, line {line + 2}: the label {row['label']!r} is none of {', '.join(classes)}")
    return labels
