"""Who may write into the folder of a run, and where a run goes on."""

import fcntl
import os
import socket
from pathlib import Path
from typing import IO

from affekt.data.errors import CheckpointError, SettingsError
from affekt.data.files import refuse_other_kind
from affekt.pretrain.checkpoint import complete_checkpoints, find_checkpoint, remove_partials


def open_run(run: Path, resume: str | None) -> Path | None:
    """The checkpoint to start from. Never starts silently at step 0 in a folder that holds a run, and never leaves
    later checkpoints beside those of the resumed run: the next `--resume` would take them for its own."""
    if resume:
        checkpoint = find_checkpoint(run / "checkpoints", resume)
        others = complete_checkpoints(run / "checkpoints")
        if checkpoint and others and others[-1].resolve() != checkpoint.resolve():
            raise CheckpointError(
                f"{run}: holds {others[-1].name}, which {checkpoint} would not go on from; "
                "choose another folder (out=...), or remove the checkpoints that are not wanted"
            )
        return checkpoint
    if (run / "checkpoints").is_dir() and any((run / "checkpoints").iterdir()):
        raise CheckpointError(
            f"{run}: holds a run already; go on with --resume auto, or choose another folder (out=...)"
        )
    return None


def claim_run(run: Path) -> IO[str]:
    """Make the folder and hold it against a second trainer for as long as the returned file is open; remove what saves
    that were killed left in it. The system lets go of the lock of a process that ends, however it ends.

    Raises SettingsError when another process trains there, named by its number and its machine, or another command has
    written into it."""
    refuse_other_kind(run, "a run of `affekt pretrain`")
    run.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(run)
    remove_partials(run / "checkpoints")
    return lock


def lock_folder(run: Path) -> IO[str]:
    """Hold a folder for as long as the returned file is open. Raises SettingsError as `claim_run`."""
    lock = open(run / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 (it stays open until training ends)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read(200).strip() or "which has not yet told its number"
        lock.close()
        raise SettingsError(
            f"{run}: another process trains in this folder ({holder}); choose another one (out=...)"
        ) from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    lock.flush()
    return lock
