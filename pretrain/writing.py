"""Writing the files of a checkpoint: tensors copied aside at once, then bytes, hashed on their way to the disk."""

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from affekt.data.errors import DataError
from affekt.data.files import flush

CHUNK = 1 << 20  # bytes between two looks at the hash
ATTEMPTS = 3  # of what the disk refuses; a full one may have room again a moment later
PAUSE = 0.2  # seconds before the second attempt; each next one waits four times as long
TYPES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}
OnFailure = Literal["continue", "stop"]

Result = TypeVar("Result")


def point(name: str, count: int = 0) -> None:
    """A named moment of a save, which does nothing. Fault tests put a function of their own in its place that kills
    the process there; `count` is how many bytes of the file are written."""


class Snapshot:
    """A copy of tensors in host memory that is used again for every save, laid out as a safetensors file."""

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._views: list[Tensor] = []
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self.header = b""

    def take(self, tensors: dict[str, Tensor]) -> None:
        """Copy. What happens to the tensors afterwards does not reach the copy. The same dictionary given again holds
        the same tensors, with other numbers in them."""
        if tensors is not self._tensors:
            self._lay_out(tensors)
            self._tensors = tensors
        torch._foreach_copy_(self._views, list(tensors.values()), non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def _lay_out(self, tensors: dict[str, Tensor]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, x in tensors.items():
            begin, end = end, end + x.numel() * x.element_size()
            header[name] = {"dtype": TYPES[x.dtype], "shape": list(x.shape), "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self.header = len(text).to_bytes(8, "little") + text
        if len(self._bytes) != end:
            self._bytes = torch.zeros(end, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        places = ((*header[name]["data_offsets"], x) for name, x in tensors.items())
        self._views = [self._bytes[begin:end].view(x.dtype).view(x.shape) for begin, end, x in places]

    @property
    def parts(self) -> list[memoryview]:
        """The bytes of the file."""
        return [memoryview(self.header), memoryview(self._bytes.numpy())]


def write_files(folder: Path, files: dict[str, list[memoryview]]) -> dict[str, dict[str, Any]]:
    """Write files into `folder`, which is made, and wait until they are on the disk: `{name: {"bytes", "sha256"}}`."""
    point("before-write")
    folder.mkdir(parents=True, exist_ok=True)
    written = {name: _write(folder / name, parts) for name, parts in files.items()}
    flush(folder)
    point("after-fsync")
    return written


def _write(path: Path, parts: list[memoryview]) -> dict[str, Any]:
    digest, count = hashlib.sha256(), 0
    with open(path, "wb", buffering=0) as file:
        for part in parts:
            for start in range(0, len(part), CHUNK):
                left = part[start : start + CHUNK]
                digest.update(left)
                while left:
                    written = file.write(left)
                    left, count = left[written:], count + written
                point("while-writing", count)
        point("before-fsync", count)
        os.fsync(file.fileno())
    if path.stat().st_size != count:
        raise OSError(f"{path}: {count} bytes were written and {path.stat().st_size} are there")
    return {"bytes": count, "sha256": digest.hexdigest()}


def persistently(function: Callable[[], Result]) -> Result:
    """What the function returns, tried ATTEMPTS times while the disk refuses; the last refusal is raised."""
    for attempt in range(ATTEMPTS - 1):
        try:
            return function()
        except (OSError, DataError):
            time.sleep(PAUSE * 4**attempt)
    return function()
