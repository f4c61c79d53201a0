"""Heartbeats of all ranks in a folder that they share, and a thread in each that ends it when one of them is lost."""

import contextlib
import faulthandler
import json
import os
import platform
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from affekt.data.errors import AffektError, LostRankError
from affekt.data.files import replace_text

LOOK_SECONDS = 0.5  # between two looks of up to LOOKERS ranks; of more in proportion, for each reads the files of all
LOOKERS = 8
GONE_SECONDS = 5.0  # what a rank that is there is given to notice by itself that another one left, and to say why
SPARE_SECONDS = 60.0  # beyond the limit: then this process is so stuck that not even the watching thread runs
BROKEN = ("connection closed by peer", "connection reset", "broken pipe", "connection refused", "socket", "nccl")


class Watchdog:
    """While it is entered and started, `folder` holds `rank-R.json` of every rank: process, step, phase, time.

    When no rank has gone on for `limit` seconds, or the process of one is gone, all ranks write the stacks of their
    threads into `folder/stacks-rank-R.txt` and to stderr, name the one that was silent, and end with exit code 5. With
    a limit of None nobody watches, and `beat` does nothing.
    """

    def __init__(self, folder: Path, rank: int, world_size: int, limit: float | None):
        self.folder, self.rank, self.world_size, self.limit = folder, rank, world_size, limit
        self._own = {"rank": rank, "pid": os.getpid(), "host": platform.node(), "process": _this_process()}
        self._own |= {"step": 0, "phase": "start", "beats": 0, "left": None}
        self._pause = LOOK_SECONDS * max(1.0, world_size / LOOKERS)
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()
        self._seen: dict[int, tuple[int, float]] = {}  # rank -> its beats, and when they last became more
        self._gone: dict[int, float] = {}  # rank -> since when it is known to be gone

    def beat(self, step: int, phase: str) -> None:
        """The main thread begins `phase` of a step."""
        self._own |= {"step": step, "phase": phase, "beats": self._own["beats"] + 1}

    def start(self) -> None:
        """All ranks call it, when the folder of the run is there and theirs."""
        if self.limit is not None and self._thread is None:
            if self.rank == 0:
                self._clear()
            if self.world_size > 1:
                dist.barrier()
            self._write()
            self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
            self._thread.start()

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        """Say how this rank left. Raises LostRankError for an error that comes of another rank's loss."""
        if isinstance(error, RuntimeError | OSError) and not isinstance(error, AffektError) and self.world_size > 1:
            told = self._who_left(str(error))
            if told:
                self._close(f"{told} ({self.rank} left for that reason)")
                raise LostRankError(f"{told}; start all processes again with --resume auto") from error
        self._close("done" if error is None else f"{type(error).__name__}: {error}")

    def _clear(self) -> None:
        """Forget what an earlier run left here."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in (*self.folder.glob("rank-*.json"), self._alarm):
            path.unlink(missing_ok=True)

    def _close(self, left: str) -> None:
        self._closed.set()
        if self._thread:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()
            self._own["left"] = left
            self._write()

    def _watch(self) -> None:
        while not self._closed.wait(self._pause):
            faulthandler.dump_traceback_later(self.limit + SPARE_SECONDS, exit=True, file=sys.__stderr__)
            self._write()
            told = self._look()
            if told:
                self._end(told)

    def _write(self) -> None:
        with contextlib.suppress(OSError):  # a full disk is no reason to stop
            replace_text(self._file(self.rank), json.dumps({**self._own, "time": time.time()}))

    def _look(self) -> str:
        """Why all must end, if they must."""
        alarm = _read(self._alarm)
        if alarm:
            return str(alarm["told"])
        now, ranks = time.monotonic(), self._ranks()
        for rank, known in ranks.items():
            if known["beats"] != self._seen.get(rank, (-1, 0.0))[0]:
                self._seen[rank] = known["beats"], now
            gone = rank != self.rank and known["left"] != "done" and (known["left"] or _is_gone(known["process"]))
            if gone and now - self._gone.setdefault(rank, now) > GONE_SECONDS:
                return _about_gone(known)
        if ranks and now - max(when for _, when in self._seen.values()) > self.limit:
            return self._about_silence(ranks)
        return ""

    def _about_silence(self, ranks: dict[int, dict[str, Any]]) -> str:
        first = min(known["beats"] for known in ranks.values())
        silent = [known for known in ranks.values() if known["beats"] == first]
        who = ", ".join(_place(known) for known in silent)
        others = "; all stand there" if len(silent) == len(ranks) else ", and the others wait for it"
        missing = [str(rank) for rank in range(self.world_size) if rank not in ranks]
        unknown = f"; never heard of rank {', '.join(missing)}" if missing else ""
        return f"nothing went on for {self.limit:g} s (train.watchdog_s): {who}{others}{unknown}"

    def _end(self, told: str) -> None:
        """Tell all ranks, write the stacks of this one and end it, whatever the main thread hangs in."""
        alarm = _read(self._alarm)
        if not alarm:
            own = self.folder / f".alarm-{self.rank}"
            with contextlib.suppress(OSError):
                replace_text(own, json.dumps({"told": told, "rank": self.rank, "time": time.time()}))
                os.link(own, self._alarm)  # the first one stands
            own.unlink(missing_ok=True)
        told = str((_read(self._alarm) or {"told": told})["told"])
        print(
            f"affekt: rank {self.rank}: {told}; all processes end, see {self.folder}", file=sys.__stderr__, flush=True
        )
        with contextlib.suppress(OSError), open(self.folder / f"stacks-rank-{self.rank}.txt", "w") as file:
            file.write(f"{told}\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
        for known in self._ranks().values():  # one that was stopped can then say where it stood
            if known["rank"] != self.rank and _is_here(known["process"]) and not _is_gone(known["process"]):
                with contextlib.suppress(OSError):
                    os.kill(known["pid"], signal.SIGCONT)
        if not alarm:
            time.sleep(3 * self._pause)  # or the others would notice that this one left, before they look here
        os._exit(LostRankError.exit_code)

    def _who_left(self, text: str) -> str:
        """Which rank this error comes of, if any; it may take a moment until that is known."""
        broken = any(word in text.lower() for word in BROKEN)
        for _ in range(round(GONE_SECONDS / LOOK_SECONDS)):
            if self._thread and (alarm := _read(self._alarm)):
                self._end(str(alarm["told"]))
            for known in self._ranks().values() if self._thread else ():
                if known["rank"] != self.rank and (known["left"] or _is_gone(known["process"])):
                    return _about_gone(known)
            if not (broken and self._thread):
                break
            time.sleep(LOOK_SECONDS)
        return f"the connection to another process is lost: {text.splitlines()[0]}" if broken else ""

    def _ranks(self) -> dict[int, dict[str, Any]]:
        found = {rank: _read(self._file(rank)) for rank in range(self.world_size)}
        return {rank: known for rank, known in found.items() if known}

    def _file(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.json"

    @property
    def _alarm(self) -> Path:
        return self.folder / "alarm.json"


def _place(known: dict[str, Any]) -> str:
    process = f"process {known['pid']} on {known['host']}"
    return f"rank {known['rank']} ({process}) in `{known['phase']}` of step {known['step']}"


def _about_gone(known: dict[str, Any]) -> str:
    if known["left"]:
        return f"rank {known['rank']} left: {known['left']}"
    return f"{_place(known)} is gone, killed from outside or for want of memory"


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _this_process() -> list[str]:
    """[machine, process]: what another rank can look up. The machine is none where Linux's /proc is missing; a
    container has a name of its own for the same process, hence the name space."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return [f"{boot} {os.readlink('/proc/self/ns/pid')}", _start_of(os.getpid())]
    except OSError:
        return ["", ""]


def _start_of(pid: int) -> str:
    """`pid start-time` of a living process, so that another one with its number is not taken for it; else empty."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else f"{pid} {fields[19]}"


def _is_here(process: list[str]) -> bool:
    return bool(process[0]) and process[0] == _this_process()[0]


def _is_gone(process: list[str]) -> bool:
    """Whether a process of this machine has ended; of others nothing is known."""
    return _is_here(process) and _start_of(int(process[1].split()[0])) != process[1]
