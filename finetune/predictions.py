"""What a model says about clips, beside what is known of them: the one table that all scores are computed from."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from affekt.data.errors import DataError, SettingsError
from affekt.data.files import check_version

FORMAT, VERSION = "affekt-predictions", "1.0"
Kind = Literal["single", "multi"]
ARRAYS = ("logits", "values", "label", "shares", "ratings")


@dataclass(frozen=True)
class Predictions:
    """N clips, each once. A part that a task does not have is None.

    What the model says: `logits` float64 (N, K) of the classes, where a softmax (`kind="single"`) or a sigmoid per
    class (`"multi"`) makes probabilities; `values` float64 (N, D) of the dimensions. What is known: `label` int64 (N,)
    class index, -1 where there is none; `shares` float64 (N, K) of the raters' votes, NaN rows where nobody voted;
    `ratings` float64 (N, D), NaN where absent. `meta` holds text per clip, "" where unknown: speaker, session, sex,
    age, domain, fold. `about` says who predicted: at least `name`; `seed`, `fold`, `part` (dev or test), `selected`
    (dev or test: on which clips the epoch and all else were chosen), `streams`.
    """

    ids: list[str]
    classes: list[str] = field(default_factory=list)
    dimensions: list[str] = field(default_factory=list)
    kind: Kind = "single"
    logits: np.ndarray | None = None
    values: np.ndarray | None = None
    label: np.ndarray | None = None
    shares: np.ndarray | None = None
    ratings: np.ndarray | None = None
    meta: dict[str, list[str]] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises SettingsError where shapes do not fit, a clip comes twice, or the model said NaN or infinity."""
        twice = [name for name, count in Counter(self.ids).items() if count > 1]
        if twice:
            raise SettingsError(f"{len(twice)} clips are predicted more than once, first {twice[0]}; each counts once")
        n, k, d = len(self.ids), len(self.classes), len(self.dimensions)
        shapes = {"logits": (n, k), "values": (n, d), "label": (n,), "shares": (n, k), "ratings": (n, d)}
        for name, shape in shapes.items():
            array = getattr(self, name)
            if array is not None and array.shape != shape:
                raise SettingsError(f"{name} is {array.shape}; {shape} fits {n} clips, {k} classes, {d} dimensions")
        for name, values in self.meta.items():
            if len(values) != n:
                raise SettingsError(f"meta.{name} has {len(values)} entries for {n} clips")
        for name in ("logits", "values"):
            array = getattr(self, name)
            if array is not None and not np.isfinite(array).all():
                bad = np.flatnonzero(~np.isfinite(array).all(1))
                raise SettingsError(
                    f"{name} are NaN or infinite for {len(bad)} of {n} clips, first {self.ids[bad[0]]}; no score may "
                    "rest on that"
                )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def probabilities(self) -> np.ndarray:
        """(N, K): the softmax of the logits, or their sigmoids."""
        if self.kind == "multi":
            return 1 / (1 + np.exp(-np.clip(self.logits, -700, 700)))
        odds = np.exp(self.logits - self.logits.max(1, keepdims=True))
        return odds / odds.sum(1, keepdims=True)

    def take(self, rows: np.ndarray | Sequence[int]) -> "Predictions":
        """The same table on some clips: places, or bool (N,)."""
        rows = np.asarray(rows, None if len(rows) else np.int64)
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows
        arrays = {name: getattr(self, name)[rows] for name in ARRAYS if getattr(self, name) is not None}
        meta = {name: [values[i] for i in rows] for name, values in self.meta.items()}
        return replace(self, ids=[self.ids[i] for i in rows], meta=meta, **arrays)

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        texts = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ARRAYS}
        metadata = {"affekt": json.dumps({"format": FORMAT, "version": VERSION, **texts}, ensure_ascii=False)}
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in ARRAYS if getattr(self, name) is not None}
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            save_file(arrays, temporary, metadata=metadata)
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path}: cannot be written: {error}; make room and run the command again") from None
        finally:
            temporary.unlink(missing_ok=True)
        return path

    @classmethod
    def read(cls, path: str | Path) -> "Predictions":
        """Raises DataError for a file that is missing, damaged or of another major version."""
        try:
            with safe_open(path, framework="numpy") as file:
                texts = json.loads((file.metadata() or {}).get("affekt", "{}"))
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (OSError, SafetensorError, ValueError) as error:
            raise DataError(f"{path}: no predictions can be read: {error}") from None
        check_version(texts, FORMAT, VERSION, Path(path))
        known = {f.name for f in fields(cls)}
        return cls(**{name: value for name, value in (texts | arrays).items() if name in known})


def pooled(parts: Sequence[Predictions], **about: Any) -> Predictions:
    """The clips of all parts (say the test folds of a protocol) in one table. Raises SettingsError where classes,
    dimensions or kinds differ, or a clip is in two of them."""
    first = parts[0]
    for part in parts[1:]:
        for what in ("classes", "dimensions", "kind"):
            if getattr(part, what) != getattr(first, what):
                raise SettingsError(f"{what} differ: {getattr(first, what)} and {getattr(part, what)}")
    arrays = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in ARRAYS
        if all(getattr(part, name) is not None for part in parts)
    }
    meta = {
        name: [value for part in parts for value in part.meta.get(name, [""] * len(part))]
        for name in dict.fromkeys(name for part in parts for name in part.meta)
    }
    ids = [clip for part in parts for clip in part.ids]
    return replace(first, ids=ids, meta=meta, about={**first.about, **about}, **dict.fromkeys(ARRAYS) | arrays)
