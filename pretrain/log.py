"""What a run tells: a line on the terminal, `metrics.jsonl` for programs, boards and `report.html` for eyes."""

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from affekt import __version__
from affekt.data.files import write_text
from affekt.pretrain.boards import Boards
from affekt.pretrain.pieces import parameter_shapes
from affekt.pretrain.settings import PretrainSettings

SHORT = {
    "loss_video": "video",
    "loss_audio": "audio",
    "loss_contrast": "contrast",
    "loss_functionals": "functionals",
    "loss_edges": "edges",
    "grad_norm": "grad",
}
# What differs between two runs that are otherwise equal.
TIMINGS = frozenset({"clips_per_s", "data_wait", "memory_gib", "mfu", "time_s", "time_left_s", "probe/seconds"})
STARTED, ENDED = "run.json", "summary.json"

Progress = Callable[[int, int, dict[str, float]], None]


class RunLog:
    """Written by rank 0. After a resume, rows of steps that will be repeated are dropped from `metrics.jsonl`.

    With `progress(step, total, row)`, which shows a run on a terminal, no line per logged step is printed there.
    """

    def __init__(self, run: Path, start_step: int, settings: PretrainSettings, progress: Progress | None = None):
        run.mkdir(parents=True, exist_ok=True)
        self.run = run
        self.started = time.time()
        self.start_step = start_step
        self.settings = settings
        self.progress = progress
        self.plain = progress is None or not sys.stderr.isatty()
        path = run / "metrics.jsonl"
        kept = [row for row in read_metrics(path) if row["step"] <= start_step]
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self.time_before = kept[-1]["time_s"] if kept else 0.0
        self.file = path.open("a", encoding="utf-8")
        self.boards = Boards(run, start_step, settings.train.wandb, settings.model_dump(mode="json"))

    def start(self, model: nn.Module, world_size: int, device: str, precision: str, total_steps: int) -> None:
        self.total_steps = total_steps
        settings = self.settings
        optim, batch, repeats = settings.optim, settings.train.global_batch, settings.data.repeats
        what = f"{batch} views of {batch // repeats} clips" if repeats > 1 else f"{batch} clips"
        parameters = sum(shape.numel() for shape in parameter_shapes(model).values())
        say(
            f"{settings.model.name}: {parameters / 1e6:.2f} M parameters, {precision} on {world_size} x {device}, "
            f"{total_steps} steps of {what}, learning rate {optim.scaled(optim.base_lr, batch):.3g} "
            f"(= {optim.base_lr:g} x {batch} / 256)" + (f", from step {self.start_step}" if self.start_step else "")
        )
        (self.run / ENDED).unlink(missing_ok=True)  # of the run that goes on: it has not ended now
        started = {
            "format": "affekt-run 1",
            "steps": total_steps,
            "parameters": parameters,
            "precision": precision,
            "world_size": world_size,
            "device": torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or "CPU",
            "host": platform.node(),
            "pid": os.getpid(),
            "started": self.started,
            "versions": versions(),
        }
        write_text(self.run / STARTED, json.dumps(started, indent=1))

    def step(self, step: int, values: dict[str, float]) -> None:
        """A logged step of training."""
        elapsed = time.time() - self.started
        left = elapsed / (step - self.start_step) * (self.total_steps - step)
        row = self._write(step, {**values, "time_left_s": left})
        if self.plain:
            say(f"step {step}/{self.total_steps}  {told(row)}  left {left / 60:.1f} min")
        if self.progress:
            self.progress(step, self.total_steps, row)

    def probe(self, step: int, values: dict[str, float]) -> None:
        """What an online probe found, as a row of its own; nothing when there was nothing finite to look at."""
        if not values:
            say(f"step {step}: no online probe: embeddings are not finite")
            return
        self._write(step, values)
        say(f"step {step}: {told_probe(values)}")

    def close(self) -> None:
        self.file.close()
        self.boards.close()

    def finish(self, accounting: dict[str, Any], actions: list[dict], stopped_at: int | None = None) -> None:
        """`actions` are those of the guard; `stopped_at` is the step at which the run was asked to leave."""
        self.close()
        summary = {
            "format": "affekt-run 1",
            "state": "finished" if stopped_at is None else "stopped",
            "steps": self.total_steps if stopped_at is None else stopped_at,
            "accounting": accounting,
            "guard": actions,
            "time_s": self.time_before + time.time() - self.started,
            "versions": versions(),
        }
        write_text(self.run / ENDED, json.dumps(summary, indent=1))

    def _write(self, step: int, values: dict[str, float]) -> dict[str, float]:
        row = {"step": step, **values, "time_s": self.time_before + time.time() - self.started}
        try:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
            self.boards.add(step, values)
        except OSError as error:  # as for a save: train.on_failed_save says what a full disk may end
            say(f"step {step}: cannot be logged: {error}; training goes on")
        return row


def told(row: dict[str, float]) -> str:
    """The figures of a logged step as a line."""
    parts = [f"{SHORT.get(k, k)} {row[k]:.4f}" for k in ("loss", *SHORT) if k in row]
    parts += [f"skipped {row['skipped']}"] if row.get("skipped") else []
    parts += [f"lr {row['lr']:.2e}", f"{row['clips_per_s']:.0f} clips/s", f"data {row['data_wait']:.0%}"]
    parts += [f"MFU {row['mfu']:.0%}"] if "mfu" in row else []
    parts += [f"{row['memory_gib']:.1f} GiB"] if "memory_gib" in row else []
    return "  ".join(parts)


def told_probe(values: dict[str, float]) -> str:
    """What an online probe found as a line: percent, and the ranks of the embeddings."""
    found = {name.removeprefix("probe/"): value for name, value in values.items()}
    streams = [name for name in ("audio", "video", "both") if f"linear_{name}" in found]

    def listed(key: str, names: Sequence[str | int], form: str, between: str) -> str:
        return between.join(format(found[f"{key}_{name}"], form) for name in names)

    parts = [f"linear probe ({', '.join(streams)}) {listed('linear', streams, '.1%', ', ')}"]
    parts.append(f"neighbours {listed('knn', streams, '.1%', ', ')}")
    if "gap" in found:
        parts.append(f"R@1/5/10 video to audio {listed('video_to_audio', (1, 5, 10), '.0%', '/')}")
        parts.append(f"audio to video {listed('audio_to_video', (1, 5, 10), '.0%', '/')}")
    ranks = [name for name in streams if name != "both"]
    parts.append(f"effective rank ({', '.join(ranks)}) {listed('rank', ranks, '.1f', ', ')}")
    return f"{'; '.join(parts)}; {found['seconds']:.1f} s"


def say(line: str) -> None:
    """A plain line on stderr, so that stdout stays free for results."""
    print(line, file=sys.stderr, flush=True)


def versions() -> dict[str, str]:
    """Of what decides the numbers."""
    return {
        "affekt": __version__,
        "torch": torch.__version__,
        "deepspeed": version("deepspeed"),
        "python": platform.python_version(),
    }


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file, or an empty one when it is absent, half written or none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def read_metrics(path: Path) -> list[dict]:
    """The rows of a `metrics.jsonl`, without a line that a killed process or a full disk left half written, and without
    values that are no numbers, which nobody of us wrote."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else ():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append({"time_s": 0.0, **{key: x for key, x in row.items() if isinstance(x, int | float)}})
    return rows
