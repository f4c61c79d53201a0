"""Saves beside training: a step waits for a copy in memory alone; a thread hashes and writes, all ranks agree, rank 0
commits.

A save goes through two phases, and in each a thread works while training goes on: every rank writes its files, then
rank 0 commits the folder. After every step the ranks ask each other whether all are through: the question of one step
is answered by the next, so nobody waits for it. All communication is done here, on the thread that trains.
"""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from affekt.data.accounting import all_gather_json
from affekt.data.errors import AffektError, CheckpointError
from affekt.pretrain.checkpoint import PARTIAL, STATE, commit, purge
from affekt.pretrain.log import say
from affekt.pretrain.writing import OnFailure, Snapshot, persistently, write_files


def _try(function: Callable[[], Any]) -> tuple[Any, str]:
    """What the function returns, and why it failed, empty where it did not."""
    try:
        return persistently(function), ""
    except Exception as error:  # whatever it is, it must reach the other ranks, and not end this thread alone
        return None, str(error) if isinstance(error, OSError | AffektError) else repr(error)


class Saver:
    """Writes the checkpoints of a run. All ranks call the same methods at the same steps.

    `on_failure` says what a save does that the disk refused ATTEMPTS times: `stop` raises CheckpointError on all ranks,
    `continue` tells it and lets training go on; older checkpoints stay in both.
    """

    def __init__(
        self, folder: Path, keep_last: int, keep_every: int | None = None, on_failure: OnFailure = "stop"
    ) -> None:
        self.folder, self.keep_last, self.keep_every, self.on_failure = folder, keep_last, keep_every, on_failure
        spread = dist.is_initialized()
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if spread else (0, 1)
        self.failure = ""  # of the newest save
        self._snapshot, self._phase, self._vote = Snapshot(), "", None
        # The ranks ask each other on the hosts: NCCL's answer would wait for all that a GPU still has to do.
        self._hosts = dist.new_group(backend="gloo") if self.world_size > 1 else None
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._job: Future = self._thread.submit(lambda: None)  # the thread is there before the first save

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any], about: dict[str, Any]) -> None:
        """Begin to save: this rank's `tensors` by their keys in a checkpoint, rank 0's `state`, and in the manifest
        `about`. When it returns, tensors may change. A save before this one is waited for."""
        self.wait()
        self.failure = ""
        self._final = self.folder / f"step-{step:08d}"
        self._partial = self.folder / f"{PARTIAL}{self._final.name}"
        self._about = {"step": step, "world_size": self.world_size, **about}
        self._snapshot.take(tensors)
        files = {f"rank-{self.rank:05d}.safetensors": self._snapshot.parts}
        if self.rank == 0:
            files[STATE] = [memoryview(json.dumps({"step": step, **state}, indent=1).encode())]
        self._phase, self._job = "write", self._thread.submit(_try, lambda: write_files(self._partial, files))

    def poll(self) -> None:
        """After every step: go on with a save where all ranks are through with their part. Raises CheckpointError."""
        if not self._phase:
            return
        through = self._job.done()
        failed = through and bool(self._job.result()[1])
        if self.world_size > 1:
            if self._vote is None:
                votes = torch.tensor([through, not failed], dtype=torch.int32)
                self._vote = votes, dist.all_reduce(votes, dist.ReduceOp.MIN, group=self._hosts, async_op=True)
                return
            votes, work = self._vote
            work.wait()
            through, good = map(bool, votes.tolist())
            failed, self._vote = not good, None
        if through:
            self._advance(failed)

    def wait(self) -> None:
        """Until nothing is being saved. Raises CheckpointError as `poll`."""
        while self._phase:
            self._job.result()
            self.poll()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """At the end of a run its newest save must have succeeded, whatever `on_failure` says. An AffektError stops all
        ranks at the same step, so what is being saved is brought to its end; after any other nobody can be asked."""
        if kind is None:
            self.wait()
            if self.failure:
                raise CheckpointError(self.failure)
        elif isinstance(error, AffektError):
            try:
                self.wait()
            except CheckpointError as second:
                say(str(second))

    def _advance(self, failed: bool) -> None:
        if failed:
            self._give_up()
        elif self._phase == "write":
            files = {name: file for own in self._from_all(self._job.result()[0]) for name, file in own.items()}
            self._phase = "commit"
            self._job = self._thread.submit(_try, lambda: self._commit(files) if self.rank == 0 else None)
        else:
            self._phase = ""

    def _commit(self, files: dict[str, dict[str, Any]]) -> None:
        commit(self._partial, self._final, self._about, files)
        try:
            purge(self.folder, self.keep_last, self.keep_every)
        except OSError as error:
            say(f"{self.folder}: older checkpoints cannot be removed: {error}; the newest is complete")

    def _give_up(self) -> None:
        reasons = self._from_all(self._job.result()[1])
        told = "; ".join(
            f"rank {rank}: {text}" if len(reasons) > 1 else text for rank, text in enumerate(reasons) if text
        )
        if self.rank == 0:
            shutil.rmtree(self._partial, ignore_errors=True)
        self._phase = ""
        self.failure = f"{self._final}: cannot be written: {told}; older checkpoints are untouched"
        if self.on_failure == "stop":
            raise CheckpointError(self.failure)
        if self.rank == 0:
            say(f"{self.failure}; training goes on")

    def _from_all(self, value: Any) -> list[Any]:
        return all_gather_json(value) if self.world_size > 1 else [value]
