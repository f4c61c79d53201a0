"""A disk that is full, that fails, and that loses what was not flushed when the power goes."""

import errno
import itertools
import os
from pathlib import Path
from unittest import mock

import torch

from affekt.data.errors import CheckpointError
from affekt.pretrain import checkpoint, writing
from affekt.pretrain.saver import Saver
from benchmarks.faults.child import Fault
from benchmarks.faults.power import Recorder, after_power_loss
from benchmarks.faults.rig import Rig, differences, loadable


def disk_full(rig: Rig, rounds: int) -> tuple[int, int, str]:
    """A6: from some save on no file may grow. The run stops with exit code 3, at once or at its end, with the older
    checkpoints readable; with room again it goes on as the straight run, and nothing temporary is left."""
    straight, passed = rig.straight(), 0
    for number in range(rounds):
        out, save, policy = rig.new(), rig.rng.randrange(2, 5), ("stop", "continue")[number % 2]
        job = rig.start(out, f"train.on_failed_save={policy}", fault=Fault("before-write", save, full=1))
        job.wait()
        told, kept = job.told.count("cannot be written: "), loadable(out)
        partly = list((out / "checkpoints").glob(".*"))
        rig.finish(out)
        expected = 1 if policy == "stop" else 5 - save  # the last one of a run that went on is the error it ends with
        passed += (
            job.codes == [3]
            and len(kept) == min(2, save - 1)
            and told >= expected
            and not partly
            and not differences(out, straight)
        )
    return passed, rounds, ""


def write_errors(rig: Rig, rounds: int) -> tuple[int, int, str]:
    """A7: writing fails once, twice or always; success means that the bytes can be read back."""
    passed, cases = 0, 0
    for code, times in itertools.product((errno.EIO, errno.ENOSPC, errno.EACCES), (1, 2, 99)):
        out, left = rig.new(), [times]

        def refuse(*_, left=left, code=code) -> None:
            left[0] -= 1
            if left[0] >= 0:
                raise OSError(code, os.strerror(code))

        numbers, shapes = {"weight/x": torch.randn(100)}, {"shapes": {"x": [100]}}
        with Saver(out, keep_last=2) as saver:
            saver.save(1, numbers, shapes, {})
        good = True
        with mock.patch.object(writing, "point", refuse), mock.patch.object(writing, "PAUSE", 0.01):
            try:
                with Saver(out, keep_last=2) as saver:
                    saver.save(2, numbers, shapes, {})
            except CheckpointError as error:
                good = times == 99 and os.strerror(code) in str(error)
            else:
                good = times < 99 and torch.equal(checkpoint.read_checkpoint(out / "step-00000002")[1]["x"],
                                                  numbers["weight/x"])  # fmt: skip
        good &= len(checkpoint.complete_checkpoints(out)) == (1 if times == 99 else 2) and not list(out.glob(".*"))
        passed, cases = passed + good, cases + 1
    return passed, cases, ""


def power_loss(rig: Rig, rounds: int) -> tuple[int, int, str]:
    """A3: what was written, renamed and flushed is recorded over four saves, and cut after every single operation.
    Whatever was not flushed by then is lost, or names and emptied files alone are there. What was complete when the
    power went is still readable."""
    source, passed, cases = rig.new("saves"), 0, 0
    source.mkdir()
    with Recorder(source) as recorder, Saver(source, keep_last=2) as saver:
        for step in range(1, 5):
            saver.save(step, {"weight/x": torch.full((5,), float(step))}, {"shapes": {"x": [5]}}, {})
            saver.wait()
            recorder.mark(step)
    for cut in range(len(recorder.log) + 1):
        promised = max((step for step, at in recorder.marks.items() if at <= cut), default=0)
        for names_first in (False, True):
            left = rig.new("power")
            after_power_loss(recorder.log[:cut], names_first, left)
            passed, cases = passed + _newest_readable(left, promised), cases + 1
    return passed, cases, f"{len(recorder.log)} operations"


def _newest_readable(folder: Path, promised: int) -> bool:
    try:
        found = checkpoint.find_checkpoint(folder, "auto")
        if found is None:
            return promised == 0
        state, weights, _ = checkpoint.read_checkpoint(found)
    except CheckpointError:
        return False
    return state["step"] >= promised and weights["x"].tolist() == [state["step"]] * 5


ROWS = {
    "A3": ("the power goes after any operation of a save", power_loss, 1),
    "A6": ("the disk is full from some save on", disk_full, 10),
    "A7": ("writing fails once, twice, always", write_errors, 9),
}
