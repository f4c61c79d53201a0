"""Disposable processes for media: each has a memory limit and a deadline per clip, and may hang, crash or be killed.

Decoders in native code do all of that on damaged files, and no exception handler sees it. Parent and worker exchange
JSON and plain bytes over pipes, never pickles: what comes back from a process that has read hostile bytes is only data.
"""

import contextlib
import ctypes
import dataclasses
import json
import os
import resource
import selectors
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from affekt.data.errors import DataError, SettingsError
from affekt.data.manifest import Clip, clip_of_file
from affekt.data.media.clip import PreparedClip, PrepareSettings, encode_clip, prepare_clip, prepare_people
from affekt.data.media.container import MediaError
from affekt.data.media.face import find_detectors
from affekt.data.media.segments import measure

START_SECONDS = 120  # for a fresh process to import what it needs, on a busy machine
LENGTH = struct.Struct(">Q")


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why a clip was not prepared."""

    cause: str
    message: str


Result = tuple[dict[str, Any], dict[str, bytes]]  # record and members of a prepared clip
Task = Literal["encode", "raw", "measure"]  # what to do with each clip, see `_TASKS`


def prepare_clip_safely(clip: Clip | str | Path, settings: PrepareSettings | None = None) -> PreparedClip:
    """`prepare_clip` in a process of its own that is killed at the deadline; says on stderr where a file was too long.
    Raises MediaError with a cause."""
    settings = settings or PrepareSettings()
    clip = clip if isinstance(clip, Clip) else clip_of_file(clip)
    with contextlib.closing(MediaPool(settings, 1)) as pool:
        (outcome,) = pool.run([clip], "raw")
    if isinstance(outcome, Failure):
        raise MediaError(outcome.cause, outcome.message)
    ((record, members),) = outcome
    if "cut" in record["flags"]:
        print(f"note: {clip.id}: of its length the first {settings.max_duration:g} s are taken", file=sys.stderr)
    frames = waveform = None
    if "frames" in members:
        shape = (record["frames"], settings.size, settings.size, 3)
        frames = np.frombuffer(members["frames"], np.uint8).reshape(shape).copy()
    if "waveform" in members:
        waveform = np.frombuffer(members["waveform"], np.float32).copy()
    return PreparedClip(frames, waveform, record)


# --- parent --------------------------------------------------------------------------------------------------------


class MediaPool:
    """Up to `workers` processes, which live until `close`. A clip whose process dies is tried once more in a fresh one,
    so that only its own fault can send it to quarantine."""

    def __init__(self, settings: PrepareSettings, workers: int):
        self.settings, self.size = settings, workers
        self.selector = selectors.DefaultSelector()
        self.workers: list[_Worker] = []
        self.failed_starts = 0

    def run(self, clips: Sequence[Clip], task: Task = "encode") -> Iterator[list[Result] | Failure]:
        """One outcome per clip, in the order of `clips`. Raises DataError where processes do not even start.

        `encode`: a result of record and encoded members, and one for each further person with `people=all`; `raw`: the
        same without encoding, for the main person; `measure`: a record of `begin` and `end`, see
        `affekt.data.media.segments.measure`. Take all outcomes, or close the pool.
        """
        ready: dict[int, list[Result] | Failure] = {}
        ahead = 8 * self.size  # results that may wait for a slow clip before them
        waiting = list(range(len(clips)))[::-1]
        retried: set[int] = set()
        for position in range(len(clips)):
            while position not in ready:
                self.resize(min(self.size, len(waiting) + self.busy))
                for worker in self.idle:
                    if waiting and waiting[-1] < position + ahead:
                        index = waiting.pop()
                        worker.send_clip(index, clips[index], task)
                for index, outcome in self.wait():
                    if outcome.__class__ is Failure and outcome.cause == "crash" and index not in retried:
                        retried.add(index)
                        waiting.append(index)
                    else:
                        ready[index] = outcome
            paused = time.monotonic()
            yield ready.pop(position)
            self.postpone(time.monotonic() - paused)  # while nobody listens, no clip can be late

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
        self.workers.clear()
        self.selector.close()

    @property
    def idle(self) -> list["_Worker"]:
        return [worker for worker in self.workers if worker.ready and worker.index is None]

    @property
    def busy(self) -> int:
        return sum(worker.index is not None for worker in self.workers)

    def resize(self, count: int) -> None:
        while len(self.workers) < max(count, 1):
            worker = _Worker(self.settings)
            self.workers.append(worker)
            self.selector.register(worker.process.stdout, selectors.EVENT_READ, worker)

    def postpone(self, seconds: float) -> None:
        for worker in self.workers:
            worker.deadline += seconds

    def wait(self) -> list[tuple[int, list[Result] | Failure]]:
        """Outcomes that have arrived, of processes that ended or ran out of time too; waits for the next event."""
        until = min(worker.deadline for worker in self.workers)
        outcomes = []
        for key, _ in self.selector.select(min(max(until - time.monotonic(), 0), START_SECONDS)):
            worker = key.data
            for message, blobs in worker.receive():
                if worker.index is None:
                    self._started(worker, message)
                else:
                    outcomes.append((worker.index, _outcome(message, blobs)))
                    worker.finish_clip()
            if worker.ended:
                outcomes += self._dispose(worker, Failure("crash", f"the process that read it {worker.death()}"))
            elif worker.index is None and worker.count >= self.settings.recycle:
                self._dispose(worker, None)
        for worker in list(self.workers):
            if worker.deadline < time.monotonic():
                late = f"not done after timeout_s={self.settings.timeout_s:g}; its process was killed"
                outcomes += self._dispose(worker, Failure("timeout", late))
        return outcomes

    def _started(self, worker: "_Worker", message: dict[str, Any]) -> None:
        if "error" in message:
            raise SettingsError(message["error"])
        worker.ready, worker.deadline = True, float("inf")
        self.failed_starts = 0

    def _dispose(self, worker: "_Worker", failure: Failure | None) -> list[tuple[int, list[Result] | Failure]]:
        self.selector.unregister(worker.process.stdout)
        self.workers.remove(worker)
        worker.kill()
        if worker.index is not None and failure:
            return [(worker.index, failure)]
        if not worker.ready:
            self.failed_starts += 1
            if self.failed_starts >= 3:
                hint = f"is memory_mib={self.settings.memory_mib} too small?"
                raise DataError(f"processes for reading media do not start ({worker.death()}); {hint}\n{worker.told}")
        return []


class _Worker:
    def __init__(self, settings: PrepareSettings):
        self.settings = settings
        self.index: int | None = None  # of the clip it works on
        self.ready, self.ended, self.count, self.told = False, False, 0, ""
        self.deadline = time.monotonic() + START_SECONDS
        self._buffer = bytearray()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed in kill)
        one_thread = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", "from affekt.data.media.workers import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,  # Ctrl-C is the parent's to handle
            env=os.environ | one_thread,
        )
        os.set_blocking(self.process.stdout.fileno(), False)
        self._send({"settings": settings.model_dump(mode="json"), "sys_path": sys.path})

    def send_clip(self, index: int, clip: Clip, task: Task) -> None:
        self.index, self.deadline = index, time.monotonic() + self.settings.timeout_s
        self.count += task != "measure"  # which takes a thousandth of the time that a new process does
        values = dataclasses.asdict(clip)
        values |= {key: str(values[key]) for key in ("video", "audio") if values[key] is not None}
        self._send({"task": task, "clip": values})

    def finish_clip(self) -> None:
        self.index, self.deadline = None, float("inf")

    def receive(self) -> Iterator[tuple[dict[str, Any], list[bytes]]]:
        """Whole messages among what the pipe holds now; sets `ended` at its end."""
        while True:
            try:
                data = os.read(self.process.stdout.fileno(), 1 << 20)
            except BlockingIOError:
                break
            if not data:
                self.ended = True
                break
            self._buffer += data
        while (found := _unpack(self._buffer)) is not None:
            message, blobs, size = found
            del self._buffer[:size]
            yield message, blobs

    def death(self) -> str:
        code = self.process.wait()
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"left with exit code {code}"

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        if not self._errors.closed:
            self._errors.seek(0)
            self.told = self._errors.read()[-2000:].decode(errors="replace")
            self._errors.close()

    def _send(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):  # a process that ended is noticed by the end of its output
            self.process.stdin.write(_pack(message))
            self.process.stdin.flush()


def _outcome(message: dict[str, Any], blobs: list[bytes]) -> list[Result] | Failure:
    if "cause" in message:
        return Failure(message["cause"], message["message"])
    rest = iter(blobs)
    return [(record, {name: next(rest) for name in names}) for record, names in message["results"]]


def _pack(message: dict[str, Any], blobs: Sequence[bytes] = ()) -> bytes:
    head = json.dumps({"message": message, "sizes": [len(blob) for blob in blobs]}).encode()
    return b"".join([LENGTH.pack(len(head)), head, *blobs])


def _unpack(buffer: bytes | bytearray) -> tuple[dict[str, Any], list[bytes], int] | None:
    """(message, blobs, bytes used), or None while it is not whole."""
    if len(buffer) < LENGTH.size:
        return None
    at = LENGTH.size + LENGTH.unpack_from(buffer)[0]
    if len(buffer) < at:
        return None
    head = json.loads(buffer[LENGTH.size : at])
    if len(buffer) < at + sum(head["sizes"]):
        return None
    blobs = []
    for size in head["sizes"]:
        blobs.append(bytes(buffer[at : at + size]))
        at += size
    return head["message"], blobs, at


# --- worker --------------------------------------------------------------------------------------------------------


def serve() -> None:
    """The worker's life: settings, then clip after clip from standard input until it ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not reach the pipe
    source = sys.stdin.buffer
    first = _read(source)
    assert first is not None, "the parent has gone"
    sys.path[:] = first["sys_path"]
    settings = PrepareSettings.parse(first["settings"])
    _limit(settings.memory_mib * 2**20)
    try:
        find_detectors(settings.face)
    except SettingsError as error:
        _answer(answers, {"error": str(error)})
        return
    _answer(answers, {"ready": True})
    while (job := _read(source)) is not None:
        values = job["clip"]
        paths = {key: Path(values[key]) for key in ("video", "audio") if values[key] is not None}
        _answer(answers, *_work(Clip(**values | paths), settings, job["task"]))


def _encoded(clip: Clip, settings: PrepareSettings) -> list[Result]:
    return [encode_clip(prepared, settings) for prepared in prepare_people(clip, settings)]


def _raw(clip: Clip, settings: PrepareSettings) -> list[Result]:
    prepared = prepare_clip(clip, settings)
    arrays = {"frames": prepared.frames, "waveform": prepared.waveform}
    return [(prepared.record, {name: array.tobytes() for name, array in arrays.items() if array is not None})]


def _measured(clip: Clip, settings: PrepareSettings) -> list[Result]:
    begin, end = measure(clip, settings.limits, settings.fps)
    return [({"begin": begin, "end": end}, {})]


_TASKS = {"encode": _encoded, "raw": _raw, "measure": _measured}


def _work(clip: Clip, settings: PrepareSettings, task: Task) -> tuple[dict[str, Any], list[bytes]]:
    try:
        results = _TASKS[task](clip, settings)
        heads = [[record, list(members)] for record, members in results]
        return {"results": heads}, [blob for _, members in results for blob in members.values()]
    except MediaError as error:
        return {"cause": error.cause, "message": str(error)}, []
    except MemoryError:
        limit = f"more memory than memory_mib={settings.memory_mib} allows"
        return {"cause": "memory", "message": f"{clip.video or clip.audio}: needs {limit}"}, []
    except Exception as error:  # whatever else a decoder or a foreign detector raises costs this clip only
        return {"cause": "error", "message": f"{clip.video or clip.audio}: {type(error).__name__}: {error}"}, []


def _limit(memory: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":  # a parent that was killed takes its workers along, hanging ones too
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _read(source) -> dict[str, Any] | None:
    head = source.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    return json.loads(source.read(LENGTH.unpack(head)[0]))["message"]


def _answer(answers, message: dict[str, Any], blobs: Sequence[bytes] = ()) -> None:
    answers.write(_pack(message, blobs))
    answers.flush()
