"""What a run tells: a line on the terminal, `metrics.jsonl` for programs, TensorBoard for eyes."""

import json
import platform
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from affekt import __version__
from affekt.data.files import write_text
from affekt.pretrain.pieces import parameter_shapes
from affekt.pretrain.settings import PretrainSettings

SHORT = {"loss_video": "video", "loss_audio": "audio", "loss_contrast": "contrast", "grad_norm": "grad"}


class RunLog:
    """Written by rank 0. After a resume, rows of steps that will be repeated are dropped from `metrics.jsonl`."""

    def __init__(self, run: Path, start_step: int):
        run.mkdir(parents=True, exist_ok=True)
        self.run = run
        self.started = time.time()
        self.start_step = start_step
        path = run / "metrics.jsonl"
        kept = [row for row in read_metrics(path) if row["step"] <= start_step]
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self.time_before = kept[-1]["time_s"] if kept else 0.0
        self.file = path.open("a", encoding="utf-8")
        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=start_step or None)

    def start(
        self,
        settings: PretrainSettings,
        model: nn.Module,
        world_size: int,
        device: str,
        precision: str,
        total_steps: int,
    ) -> None:
        self.total_steps = total_steps
        optim, batch, repeats = settings.optim, settings.train.global_batch, settings.data.repeats
        what = f"{batch} views of {batch // repeats} clips" if repeats > 1 else f"{batch} clips"
        parameters = sum(shape.numel() for shape in parameter_shapes(model).values()) / 1e6
        say(
            f"{settings.model.name}: {parameters:.2f} M parameters, {precision} on {world_size} x {device}, "
            f"{total_steps} steps of {what}, learning rate {optim.scaled(optim.base_lr, batch):.3g} "
            f"(= {optim.base_lr:g} x {batch} / 256)" + (f", from step {self.start_step}" if self.start_step else "")
        )

    def step(self, step: int, values: dict[str, float]) -> None:
        elapsed = time.time() - self.started
        left = elapsed / (step - self.start_step) * (self.total_steps - step)
        row = {"step": step, **values, "time_s": self.time_before + elapsed}
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        parts = "  ".join(f"{SHORT.get(k, k)} {values[k]:.4f}" for k in ("loss", *SHORT) if k in values)
        parts += f"  skipped {values['skipped']}" if values.get("skipped") else ""
        say(
            f"step {step}/{self.total_steps}  {parts}  lr {values['lr']:.2e}  {values['clips_per_s']:.0f} clips/s  "
            f"data {values['data_wait']:.0%}  left {left / 60:.1f} min"
        )

    def close(self) -> None:
        self.file.close()
        self.board.close()

    def finish(self, accounting: dict, actions: list[dict], stopped_at: int | None = None) -> None:
        """`actions` are those of the guard; `stopped_at` is the step at which the run was asked to leave."""
        self.close()
        summary = {
            "format": "affekt-run 1",
            "state": "finished" if stopped_at is None else "stopped",
            "steps": self.total_steps if stopped_at is None else stopped_at,
            "accounting": accounting,
            "guard": actions,
            "time_s": self.time_before + time.time() - self.started,
            "versions": {"affekt": __version__, "torch": torch.__version__, "python": platform.python_version()},
        }
        write_text(self.run / "summary.json", json.dumps(summary, indent=1))


def say(line: str) -> None:
    """A plain line on stderr, so that stdout stays free for results."""
    print(line, file=sys.stderr, flush=True)


def read_metrics(path: Path) -> list[dict]:
    """The rows of a `metrics.jsonl`, without a line that a killed process or a full disk left half written."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "step" in row:
            rows.append({"time_s": 0.0, **row})
    return rows
