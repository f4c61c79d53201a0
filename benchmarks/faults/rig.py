"""Small training runs as processes that can be killed, and what two finished runs have to have in common."""

import io
import json
import multiprocessing
import os
import random
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from affekt.pretrain.log import TIMINGS
from benchmarks.faults import child
from benchmarks.faults.child import Fault

MODEL = {"name": "hicmae_nano", "embed_dim": 48, "depth": 2, "taps": [1, 2], "decoder_embed_dim": 32, "img_size": 32}
CLIPS, BATCH = 24, 8  # three steps are an epoch
STEPS, SAVE_EVERY = 8, 2
DEADLINE = 300  # seconds, for a machine that does much else
GRACE = 10  # seconds that a rank has to end by itself after another was killed


class Rig:
    """A folder with shards and settings for runs of STEPS that save every SAVE_EVERY. `straight(ranks=...)` is the run
    that nothing happens to; the others are compared with it. `preload` are more modules to start with."""

    def __init__(self, folder: Path, seed: int = 0, preload: tuple[str, ...] = ()):
        self.folder, self.rng = folder, random.Random(seed)
        folder.mkdir(parents=True, exist_ok=True)
        self.config = folder / "config.yaml"
        if not (folder / "shards" / "index.safetensors").exists():
            _make_shards(folder / "shards")
        train = {"steps": STEPS, "global_batch": BATCH, "checkpoint_every": SAVE_EVERY, "log_every": 1}
        settings = {
            "out": "run",
            "model": {**MODEL, "mask_ratio_video": 0.5, "drop_path": 0.1, "contrast_weight": 0.1},
            "data": {"shards": str(folder / "shards"), "frame_stride": 8, "workers": 0},
            "optim": {"base_lr": 0.05, "clip_grad": 1.0},
            "train": {**train, "picture_every": 1000, "precision": "fp32", "threads": 1},
        }
        self.config.write_text(yaml.safe_dump(settings))
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["affekt.pretrain.loop", "affekt.cli", "deepspeed", *preload])
        self._number = 0

    def new(self, name: str = "run") -> Path:
        """A folder that is not there yet."""
        self._number += 1
        return self.folder / f"{name}-{os.getpid()}-{self._number}"

    def start(self, out: Path, *settings: str, ranks: int = 1, fault: Fault | None = None, at: int = 0) -> "Job":
        """`affekt pretrain`; rank 0 has the fault, whose victim is the rank `at`."""
        return self.call(child.pretrain, str(self.config), f"out={out}", *settings, ranks=ranks, fault=fault, at=at)

    def call(self, function: Callable, *arguments: Any, ranks: int = 1, fault: Fault | None = None, at: int = 0):
        return Job(self._context, self.new("log"), function, arguments, ranks, fault, at)

    def finish(self, out: Path, *settings: str, ranks: int = 1) -> "Job":
        """Train to the end; anything but exit code 0 is an error."""
        job = self.start(out, *settings, "--resume", "auto", ranks=ranks)
        job.wait()
        if any(job.codes):
            raise RuntimeError(f"a run that should finish ended with {job.codes}:\n{job.told}")
        return job

    def straight(self, *settings: str, ranks: int = 1) -> Path:
        out = self.folder / f"straight-{ranks}-{'-'.join(settings).replace('/', '_')}"
        if not (out / "summary.json").exists():
            started = time.monotonic()
            self.finish(out, *settings, ranks=ranks)
            (out / "seconds").write_text(str(time.monotonic() - started))
        return out


class Job:
    """The processes of one run."""

    def __init__(self, context: Any, log: Path, function: Callable, arguments: tuple, ranks: int, fault, at: int):
        self.log, self.started, port = log, time.monotonic(), str(_free_port())
        self.processes = []
        for rank in reversed(range(ranks)):  # rank 0 comes last, so that its fault knows the number of its victim
            place = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
            own = fault if rank == 0 else None
            if own and at:
                own.victim = self.processes[ranks - 1 - at].pid
            work = (function, arguments, {**place, "MASTER_PORT": port} if ranks > 1 else {}, log, own)
            self.processes.append(context.Process(target=child.run, args=work))
            self.processes[-1].start()

    def wait(self, seconds: float = DEADLINE) -> bool:
        """Until all processes have ended, True, or `seconds` are over. When one was killed, the others get GRACE."""
        end = time.monotonic() + seconds
        while any(process.is_alive() for process in self.processes):
            if any((process.exitcode or 0) < 0 for process in self.processes):
                for process in self.processes:
                    process.join(GRACE)
                self.kill()
            elif time.monotonic() > end:
                return False
            time.sleep(0.01)
        return True

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    @property
    def codes(self) -> list[int | None]:
        """Exit codes from rank 0 on."""
        return [process.exitcode for process in reversed(self.processes)]

    @property
    def told(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def differences(run: Path, straight: Path) -> list[str]:
    """In what a run that was disturbed differs from the straight one; empty where it is the same, bit by bit."""
    from affekt.pretrain.checkpoint import complete_checkpoints, read_checkpoint

    found = []
    last, expected = (complete_checkpoints(folder / "checkpoints")[-1] for folder in (run, straight))
    if last.name != expected.name:
        return [f"it ended with {last.name}, not {expected.name}"]
    for kind, ours, theirs in zip(("weight", "moment"), read_checkpoint(last)[1:], read_checkpoint(expected)[1:]):
        found += [f"{kind} {name}" for name in ours if not torch.equal(ours[name], theirs[name])]
        found += sorted(ours.keys() ^ theirs.keys())
    found += [f"row {a} is not {b}" for a, b in zip(metrics(run), metrics(straight)) if a != b]
    if len(metrics(run)) != len(metrics(straight)):
        found.append("metrics.jsonl has other steps")
    if ledger(run) != ledger(straight):
        found.append("ledger")
    return found + [f"left behind: {path.name}" for path in (run / "checkpoints").glob(".*")]


def metrics(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows]


def ledger(run: Path) -> str:
    return json.loads((run / "summary.json").read_text())["accounting"]["ledger"]


def loadable(run: Path) -> list[Path]:
    """The complete checkpoints, each of which must be readable: CheckpointError otherwise."""
    from affekt.pretrain.checkpoint import complete_checkpoints, read_checkpoint

    found = complete_checkpoints(run / "checkpoints")
    for path in found:
        read_checkpoint(path)
    return found


def _make_shards(folder: Path) -> None:
    import simplejpeg
    import soundfile

    from affekt.data.shard_writer import ShardWriter

    rng, clips = np.random.default_rng(0), []
    for number in range(CLIPS):
        pictures = [simplejpeg.encode_jpeg(frame) for frame in rng.integers(0, 255, (75, 32, 32, 3), dtype=np.uint8)]
        sound = io.BytesIO()
        soundfile.write(sound, rng.normal(0, 0.1, 48000).astype(np.float32), 16000, format="FLAC", subtype="PCM_16")
        record = {"id": f"clip{number}", "frames": 75, "samples": 48000, "duration": 3.0, "flags": []}
        record |= {"source_sha256": f"{number:064d}", "frame_sizes": list(map(len, pictures))}
        record["meta"] = {"speaker": f"s{number % 4}", "split": "train"}
        clips.append((record, {"mjpeg": b"".join(pictures), "flac": sound.getvalue()}))
    writer = ShardWriter(folder)
    for shard, part in enumerate((clips[: CLIPS // 2], clips[CLIPS // 2 :])):
        writer.write_shard(shard, part)
    writer.finish({"size": 32, "fps": 25, "sample_rate": 16000, "picture": "mjpeg", "prepare": {}})


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
