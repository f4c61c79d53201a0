"""How a batch goes from a loader's worker to the trainer: through memory that both map and use again.

Torch would put every tensor of every batch into new shared memory, which the kernel hands out and clears page by page,
and open a connection for each: half of a worker's time. Here a worker keeps a few blocks. It copies a batch into one
that is free and sends where it lies; the trainer maps the block, and marks it free when it asks for another batch and
the last tensor of this one is gone. A trainer that keeps its batches only makes the worker take more blocks, which both
let go when it has had no use for them for a while. They have no names, so that nothing is left behind whatever dies,
and do not count against /dev/shm.
"""

import mmap
import os
import sys
import weakref
from dataclasses import dataclass, field, fields
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from affekt.data.batch import Batch
from affekt.data.errors import DataError

POSSIBLE = sys.platform == "linux"  # memfd_create, and opening what another process has open through /proc
START = 64  # bytes before the tensors, of which the first is 1 while the trainer has the block; and what they align to
IDLE = 64  # batches after which a block that none of them needed goes


class Taken:
    """The blocks that the trainer has mapped, each once, and what it still uses of them.

    It looks for what is gone instead of being called when it goes: Python prints what is raised in such a call and goes
    on, and so would the run after a Ctrl-C that came just then.
    """

    def __init__(self) -> None:
        self.blocks: dict[tuple[int, int], tuple[int, mmap.mmap]] = {}  # process, descriptor -> number, block
        self._in_use: list[tuple[weakref.ref[np.ndarray], mmap.mmap]] = []

    def use(self, block: mmap.mmap) -> Tensor:
        """The bytes of a block, which is not given back while a part of them is held."""
        memory = np.frombuffer(block, np.uint8)
        self._in_use.append((weakref.ref(memory), block))
        return torch.from_numpy(memory)  # its parts share a storage, which holds `memory`

    def give_back(self) -> None:
        """Mark the blocks free whose batches are gone. From then on each is the worker's, and not looked at."""
        held = []
        for memory, block in self._in_use:
            if memory() is None:
                block[0] = 0
            else:
                held.append((memory, block))
        self._in_use = held

    def give_back_all(self) -> None:
        """Mark all blocks free, where nothing of theirs will be read any more."""
        for _, block in self._in_use:
            block[0] = 0
        self._in_use = []


class Blocks:
    """The blocks of one worker, as many as were lately away at once."""

    def __init__(self) -> None:
        self._blocks: dict[tuple[int, int], mmap.mmap] = {}  # (file descriptor, number) -> the block
        self._used: dict[tuple[int, int], int] = {}  # in which batch it was last taken
        self._made = self._sent = 0

    def send(self, batch: Batch) -> "Sent":
        """Copy the tensors of a batch into a free block."""
        tensors = {f.name: getattr(batch, f.name) for f in fields(batch)}
        other = {name: value for name, value in tensors.items() if not isinstance(value, Tensor)}
        tensors = {name: value.contiguous() for name, value in tensors.items() if name not in other}
        places, end = {}, START
        for name, tensor in tensors.items():
            places[name] = (end, tensor.dtype, tuple(tensor.shape))
            end += -(-tensor.nbytes // START) * START
        self._sent += 1
        closed = self._close_idle(end)
        key = self._free(end)
        self._used[key] = self._sent
        memory = torch.from_numpy(np.frombuffer(self._blocks[key], np.uint8))
        for name, tensor in tensors.items():
            _part(memory, *places[name]).copy_(tensor)
        memory[0] = 1
        return Sent(os.getpid(), *key, len(memory), places, other, closed)

    def _close_idle(self, size: int) -> list[int]:
        """Let go of the free blocks that are too small or have been out of use; their descriptors."""
        free = [key for key, block in self._blocks.items() if not block[0]]
        idle = [key for key in free if len(self._blocks[key]) < size or self._used[key] < self._sent - IDLE]
        for key in idle:
            del self._blocks[key], self._used[key]
            os.close(key[0])
        return [descriptor for descriptor, _ in idle]

    def _free(self, size: int) -> tuple[int, int]:
        for key, block in self._blocks.items():
            if not block[0]:
                return key
        descriptor = os.memfd_create("affekt-batch")
        os.posix_fallocate(descriptor, 0, size)  # says ENOMEM here, where touching a page would kill
        self._made += 1
        self._blocks[descriptor, self._made] = mmap.mmap(descriptor, size)
        return descriptor, self._made


@dataclass
class Sent:
    """Where the tensors of a batch lie, and what else it holds. Opened once, by one process, while its sender lives."""

    pid: int
    descriptor: int
    number: int  # of the block: a descriptor may come again
    size: int
    places: dict[str, tuple[int, torch.dtype, tuple[int, ...]]]
    other: dict[str, Any]
    closed: list[int] = field(default_factory=list)  # descriptors of blocks that the worker has let go of

    def open(self, taken: Taken) -> Batch:
        """The batch, without a copy. Raises DataError when the worker is gone or files cannot be opened."""
        for descriptor in self.closed:
            taken.blocks.pop((self.pid, descriptor), None)
        number, block = taken.blocks.get((self.pid, self.descriptor), (0, None))
        if number != self.number:
            try:
                block = self._map()
            except (FileNotFoundError, ProcessLookupError):
                raise DataError("a loader worker died before its batch was taken over; use fewer workers") from None
            except OSError as error:
                raise DataError(
                    f"a batch cannot be taken over from its loader worker: {error}; keep fewer batches at once, raise "
                    "the limit of open files (ulimit -n), or load without workers"
                ) from error
            taken.blocks[self.pid, self.descriptor] = self.number, block
        whole = taken.use(block)
        return Batch(**{name: _part(whole, *place) for name, place in self.places.items()}, **self.other)

    def pin_memory(self) -> Batch:
        """The batch in pinned memory, where torch's thread for that puts it; the block is free at once."""
        taken = Taken()
        try:
            return self.open(taken).pin_memory()
        finally:
            taken.give_back_all()

    def _map(self) -> mmap.mmap:
        descriptor = os.open(f"/proc/{self.pid}/fd/{self.descriptor}", os.O_RDWR | os.O_CLOEXEC)
        try:
            return mmap.mmap(descriptor, self.size, mmap.MAP_SHARED | mmap.MAP_POPULATE)
        finally:
            os.close(descriptor)


def _part(memory: Tensor, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    size = prod(shape) * dtype.itemsize
    return memory[start : start + size].view(dtype).view(shape)
