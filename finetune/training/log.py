"""What a fine-tuning tells while it goes on: rows of `metrics.jsonl`, and lines on the terminal."""

import json
import time
from collections.abc import Callable
from pathlib import Path

from affekt.data.files import write_text
from affekt.pretrain.log import read_metrics, say


class Log:
    """Of one fit, written by rank 0. Rows name the `seed`, and with `refit` 1 the second fit; what an earlier process
    wrote of steps that are done again is dropped."""

    def __init__(self, path: Path, seed: int, refit: bool, start: int, progress: Callable[[int], None]):
        self.progress = progress
        self.own = {"seed": seed, "refit": int(refit)}
        again = [row for row in read_metrics(path) if not (self._is_own(row) and row["step"] > start)]
        write_text(path, "".join(json.dumps(row) + "\n" for row in again))
        self.started = time.time() - next((row["time_s"] for row in reversed(again) if self._is_own(row)), 0.0)
        self.file = path.open("a", encoding="utf-8")

    def row(self, step: int, values: dict[str, float]) -> None:
        """Means since the last row."""
        row = {"step": step, **self.own, **values, "time_s": time.time() - self.started}
        try:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        except OSError as error:
            say(f"step {step}: cannot be logged: {error}; training goes on")
        self.progress(step)

    def look(self, look: dict[str, float], best: dict[str, float]) -> None:
        """A score of the development clips."""
        self.row(look["step"], {"epoch": look["epoch"], "dev_score": look["score"]})
        mark = ", the best so far" if look is best else f" (best {best['score']:.4f} at epoch {best['epoch']:g})"
        say(f"seed {self.own['seed']} epoch {look['epoch']:g}: development score {look['score']:.4f}{mark}")

    def close(self) -> None:
        self.file.close()

    def _is_own(self, row: dict[str, float]) -> bool:
        return all(row.get(key) == value for key, value in self.own.items())
