"""Which steps are taken: none with a loss or gradient that is not finite, none with a loss far above those before it.

The optimiser is told on the device, by a flag that torch's fused AdamW reads in its kernel: a step that is not taken
leaves weights, moments and step counts as they were, and the host waits for nothing. What happened it learns at the
steps of `look`, which on a GPU are those where it waits for the losses anyhow. A skipped step changes nothing, so it
does not matter that more of them may have followed until then.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor

from affekt.data.errors import HealthError
from affekt.data.settings import Settings

SMALLEST_MAD = 0.01  # of the median: where the losses hardly vary, a spike is still no less than `mads` percent
SOUND, SPIKE, NOT_FINITE, OVERFLOW = 0, 1, 2, 3
WHY = {SPIKE: "spike", NOT_FINITE: "not finite"}


class GuardSettings(Settings):
    """What is done about steps that would spoil the model."""

    mads: float | None = Field(
        10.0, gt=0, description="skip a step whose loss is so many MAD above the median of the last ones; null: none"
    )
    window: int = Field(100, ge=4, description="how many losses these are; the guard begins with half of them")
    max_skips: int = Field(
        5, ge=0, description="in a row; after more, spikes roll back and what is not finite stops with exit code 4"
    )
    rollbacks: int = Field(
        1, ge=0, description="times the weights go back to a checkpoint, past the steps since; then exit code 4"
    )


class GoBack(Exception):
    """The weights go back to a checkpoint; training goes on at `step`, and the steps between are left out."""

    def __init__(self, checkpoint: Path, step: int, actions: list[dict[str, Any]], accounting: dict[str, Any]):
        super().__init__(f"step {step}: the loss stays above its limit; back to the weights of {checkpoint.name}")
        self.checkpoint, self.step, self.actions, self.accounting = checkpoint, step, actions, accounting

    def onwards(self, state: dict[str, Any]) -> dict[str, Any]:
        """What replaces values of the checkpoint's state, to go on from."""
        action = {"step": self.step, "action": "rollback", "to": state["step"], "why": WHY[SPIKE]}
        guard = {**state["guard"], "row": [], "actions": [*self.actions, action]}
        return {"step": self.step, "accounting": self.accounting, "guard": guard}


class Guard:
    """Judges every step, and keeps the `actions` that were taken: they are in each checkpoint and in the summary."""

    def __init__(self, settings: GuardSettings, device: torch.device, saved: dict[str, Any] | None = None):
        self.settings = settings
        saved = saved or {"losses": [], "row": [], "actions": []}
        self.actions: list[dict[str, Any]] = list(saved["actions"])
        self._row: list[dict[str, Any]] = list(saved["row"])  # the skips since the last sound step
        losses = saved["losses"][-settings.window :]
        padding = [float("nan")] * (settings.window - len(losses))
        self._losses = torch.tensor(padding + losses, dtype=torch.float32, device=device)
        self._pending: list[tuple[int, Tensor]] = []

    def judge(self, step: int, loss: Tensor, grad_norm: Tensor, scaled: bool = False) -> Tensor:
        """A scalar on the device, the same on all ranks: 1.0 where this step must not be taken, else 0.0. Where the
        loss was `scaled` up, for fp16, that gradients overflow is no illness, but how the scale is found."""
        own = loss.detach().float()
        grad_norm = grad_norm.detach().float().to(own.device)
        sums = torch.stack([own, 0 * grad_norm])  # 0, or NaN for a norm that is not finite
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(sums)
            sums = sums / dist.get_world_size()
        mean, broken = sums.unbind()
        verdict, limit = mean.new_zeros(()), mean.new_full((), float("inf"))
        if self.settings.mads is not None:
            median = median_of_known(self._losses)
            mad = torch.maximum(median_of_known((self._losses - median).abs()), SMALLEST_MAD * median.abs())
            enough = self._losses.isfinite().sum() >= self.settings.window // 2
            limit = torch.where(enough, median + self.settings.mads * mad, limit)
            verdict = torch.where(mean > limit, SPIKE, verdict)
        verdict = torch.where(broken.isfinite(), verdict, OVERFLOW if scaled else NOT_FINITE)
        verdict = torch.where(mean.isfinite(), verdict, NOT_FINITE)
        bad = verdict > SOUND
        self._losses = torch.where(bad, self._losses, torch.cat([self._losses[1:], mean.view(1)]))
        self._pending.append((step, torch.stack([verdict, mean, grad_norm, limit, own])))
        return bad.float()

    def look(self) -> list[dict[str, Any]]:
        """What was skipped since the last look, which waits for the device; all ranks look at the same steps."""
        if not self._pending:
            return []
        rows = torch.stack([row for _, row in self._pending]).tolist()
        skipped = []
        for (step, _), (verdict, mean, norm, limit, own) in zip(self._pending, rows, strict=True):
            if verdict == SOUND:
                self._row = []
            if verdict in (SOUND, OVERFLOW):
                continue
            figures = {"loss": mean, "grad_norm": norm, "limit": limit}
            action = {"step": step, "action": "skip", "why": WHY[int(verdict)], **finite_or_text(figures)}
            self.actions.append(action)
            self._row.append(action)
            skipped.append({**action, "own_loss": finite_or_text({"loss": own})["loss"]})
        self._pending = []
        return skipped

    def must_go_back(self) -> bool:
        """Whether too many skips in a row ask for a checkpoint. Raises HealthError when none can help."""
        if len(self._row) <= self.settings.max_skips:
            return False
        last = self._row[-1]
        told = (
            f"steps {self._row[0]['step']} to {last['step']}: {len(self._row)} skipped in a row, the last with loss "
            f"{last['loss']} (limit {last['limit']}) and gradient norm {last['grad_norm']}"
        )
        if all(action["why"] == WHY[NOT_FINITE] for action in self._row):
            raise HealthError(
                f"{told}: not finite; look at a batch with `affekt pretrain --replay`, lower optim.base_lr or set "
                "optim.clip_grad"
            )
        if sum(action["action"] == "rollback" for action in self.actions) >= self.settings.rollbacks:
            raise HealthError(
                f"{told}, and train.guard.rollbacks={self.settings.rollbacks} leaves no way back; lower "
                "optim.base_lr, set optim.clip_grad, or look at a batch with `affekt pretrain --replay`"
            )
        return True

    def last_good(self, checkpoints: Sequence[Path]) -> Path:
        """The newest checkpoint from which a step went well before the spikes, and that no rollback undid."""
        first = self._row[0]["step"]
        undone = [range(a["to"] + 1, a["step"]) for a in self.actions if a["action"] == "rollback"]
        for path in reversed(checkpoints):
            step = int(path.name.removeprefix("step-"))
            if step < first and not any(step in steps for steps in undone):
                return path
        raise HealthError(
            f"the loss left its range at step {first}, and no checkpoint from before is left to go back to; lower "
            "optim.base_lr, or save more often (train.checkpoint_every)"
        )

    def to_dict(self) -> dict[str, Any]:
        """For a checkpoint; to be asked for after a look."""
        losses = [loss for loss in self._losses.tolist() if loss == loss]
        return {"losses": losses, "row": self._row, "actions": self.actions}


def median_of_known(x: Tensor) -> Tensor:
    """As `x.nanmedian()` of a vector, which on a GPU makes the host wait for where the numbers end."""
    known = (~x.isnan()).sum()
    return x.sort().values.gather(0, ((known - 1) // 2).clamp(min=0).view(1)).squeeze(0)  # NaN come last


def finite_or_text(values: dict[str, float]) -> dict[str, Any]:
    """JSON has no NaN: what is not finite as a text."""
    return {key: value if abs(value) < float("inf") else str(value) for key, value in values.items()}
