"""Features on disk: a folder per (weights, shards, clips, view policy), in parts that several processes can compute.

A part holds the features of some hundred clips that follow one another. It is there as a whole or not at all, and what
it holds does not depend on who computes it: so a killed extraction goes on where it stopped, and any number of ranks
gives the same bytes.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from affekt.data.errors import DataError

FORMAT = "affekt-features 2"
PART = 256  # clips
DTYPES = {"F32": np.float32, "F16": np.float16, "BOOL": np.bool_}

Arrays = Mapping[str, np.ndarray]


def compute_parts(
    folder: Path,
    identity: Mapping[str, str],
    clips: int,
    compute: Callable[[range], tuple[Arrays, dict[str, str]]],
    *,
    rank: int = 0,
    world_size: int = 1,
    on_part: Callable[[range], None] | None = None,
) -> list[tuple[Arrays, dict[str, str]]]:
    """All parts of the features of `clips` clips, `(arrays, causes by unread clip)` each, memory-mapped.

    What `folder` lacks is made by `compute(places)`. Each of `world_size` processes begins with its own share and then
    helps with what is left of the others', from its end: nobody waits, and who was killed or came late is made up for.
    `on_part` hears of parts that were there already.
    """
    parts = [range(first, min(first + PART, clips)) for first in range(0, clips, PART)]
    for number in turns(len(parts), rank, world_size):
        path = folder / f"part-{number:05d}.safetensors"
        if read_part(path, identity) is not None:
            if on_part:
                on_part(parts[number])
            continue
        write_part(path, identity, *compute(parts[number]))
    found = [read_part(folder / f"part-{number:05d}.safetensors", identity) for number in range(len(parts))]
    for number, part in enumerate(found):
        if part is None:
            raise DataError(f"{folder}: part {number} was taken away while the others were made; run the command again")
    return found


def turns(parts: int, rank: int, world_size: int) -> Iterator[int]:
    """The order in which a rank looks at the parts: its own, then those of the others, which go the other way."""
    yield from range(rank, parts, world_size)
    yield from (number for number in reversed(range(parts)) if number % world_size != rank)


def folder_of(cache: Path, identity: Mapping[str, str]) -> Path:
    """Where the features of this identity lie."""
    return cache / f"features-{hashlib.sha256(json.dumps(dict(identity)).encode()).hexdigest()[:16]}"


def write_part(path: Path, identity: Mapping[str, str], arrays: Arrays, unread: Mapping[str, str]) -> None:
    """Raises DataError where the disk refuses."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        about = {"identity": dict(identity), "unread": dict(unread)}  # in one entry: several have no order of their own
        save_file(dict(arrays), temporary, metadata={"affekt": json.dumps(about)})
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: features cannot be written: {error}; make room and run the command again") from None
    finally:
        temporary.unlink(missing_ok=True)


def read_part(path: Path, identity: Mapping[str, str]) -> tuple[Arrays, dict[str, str]] | None:
    """The arrays of a part, memory-mapped, and its unread clips; None where it is absent, cut short or another's."""
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(size)) if size <= path.stat().st_size else {}
        stored = json.loads(header.pop("__metadata__")["affekt"])
        end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        if stored["identity"] != dict(identity) or 8 + size + end != path.stat().st_size:
            return None
        arrays = {
            name: _mapped(path, 8 + size + tensor["data_offsets"][0], DTYPES[tensor["dtype"]], tensor["shape"])
            for name, tensor in header.items()
        }
        return arrays, stored["unread"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


class Joined(Mapping[str, np.ndarray]):
    """Arrays of all parts by name, joined along the first axis when asked for; those of one part stay on the disk."""

    def __init__(self, parts: Sequence[Arrays]):
        self.parts = {
            name: [part[name] for part in parts if name in part] for name in sorted({n for p in parts for n in p})
        }

    def __getitem__(self, name: str) -> np.ndarray:
        arrays = self.parts[name]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

    def __getstate__(self) -> dict[str, Any]:
        """Another process maps the files again instead of being sent what is in them."""

        def told(array: np.ndarray) -> Any:
            mapped = isinstance(array, np.memmap)
            return (array.filename, array.offset, array.dtype.type, array.shape) if mapped else array

        return {name: [told(array) for array in arrays] for name, arrays in self.parts.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.parts = {
            name: [_mapped(*a) if isinstance(a, tuple) else a for a in arrays] for name, arrays in state.items()
        }

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    def rows(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Some rows of an array, read from the parts they are in and no others."""
        arrays = self.parts[name]
        first = np.cumsum([0] + [len(array) for array in arrays])
        taken = np.empty((len(rows), *arrays[0].shape[1:]), arrays[0].dtype)
        for number, array in enumerate(arrays):
            here = (rows >= first[number]) & (rows < first[number + 1])
            taken[here] = array[rows[here] - first[number]]
        return taken


def _mapped(path: Path, offset: int, dtype: type, shape: Sequence[int]) -> np.ndarray:
    if not math.prod(shape):
        return np.zeros(shape, dtype)
    return np.memmap(path, dtype, "r", offset, tuple(shape))
