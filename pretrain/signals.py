"""Being asked to leave: SIGTERM, SIGUSR1 (SLURM's warning before the end of the time) and Ctrl-C save and stop."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from affekt.pretrain.log import say

STOPPED, INTERRUPTED = 143, 130  # exit codes: 128 + SIGTERM, for SIGUSR1 too, and 128 + SIGINT
GRACE_SECONDS = 1.0


class Stopped(SystemExit):
    """Raised in the main thread where a run can be left; its code is the exit code of the process."""


class Leave:
    """Hears the signals while it is entered, on the main thread (elsewhere Python allows no handlers).

    Before `begin`, when there is nothing to save yet, and inside of `at_once`, a signal raises Stopped. Otherwise it is
    kept, and the next `at_once` raises. A second Ctrl-C interrupts whatever goes on.
    """

    def __init__(self) -> None:
        self.heard: signal.Signals | None = None
        self.begun, self._raises = False, True
        self._group = None

    def __enter__(self) -> "Leave":
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *_exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def begin(self) -> None:
        """From now on there is something to save: a signal waits for a place where all ranks can leave together."""
        self.begun, self._raises = True, False

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """For waiting in, as for data: whatever it is, it is not wanted any more when a signal comes."""
        before, self._raises = self._raises, True
        try:
            self._stop_if_heard()
            yield
        finally:
            self._raises = before

    def soon(self) -> bool:
        """Whether a signal was heard, or is within a moment: a batch system tells all processes of a job, and a loader
        worker that dies of it may be noticed first."""
        try:
            with self.at_once():
                threading.Event().wait(GRACE_SECONDS)
        except Stopped:
            pass
        return self.heard is not None

    def agreed(self) -> bool:
        """Whether any rank was asked to leave. All of them ask, at the same place in the same step.

        They tell each other on the hosts: a GPU is not waited for.
        """
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return self.heard is not None
        if self._group is None:
            self._group = dist.new_group(backend="gloo")
        anyone = torch.tensor([self.heard or 0], dtype=torch.int32)
        dist.all_reduce(anyone, dist.ReduceOp.MAX, group=self._group)
        if anyone.item() and self.heard is None:
            self.heard = signal.Signals(anyone.item())
        return self.heard is not None

    def stopped(self, how_far: str, again: str = "`--resume auto`") -> Stopped:
        """To be raised when all is saved; `again` is what goes on from there."""
        say(f"stopped by {self.heard.name} {how_far}; {again} goes on from there")
        return Stopped(INTERRUPTED if self.heard == signal.SIGINT else STOPPED)

    def _hear(self, number: int, _frame: object) -> None:
        again, self.heard = self.heard == signal.SIGINT == number, signal.Signals(number)
        if again:
            raise KeyboardInterrupt
        if self._raises:
            self._stop_if_heard()

    def _stop_if_heard(self) -> None:
        if self.heard:
            self._raises = False  # once is enough: what cleans up must not be interrupted by the next signal
            raise Stopped(INTERRUPTED if self.heard == signal.SIGINT else STOPPED)
