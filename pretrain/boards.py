"""Where curves are looked at from outside: TensorBoard always, Weights & Biases for who asks for it."""

import secrets
from pathlib import Path
from typing import Any, Literal

from torch.utils.tensorboard import SummaryWriter

from affekt.data.errors import SettingsError

Wandb = Literal["offline", "online"]


class Boards:
    """Scalars by name and step. Nothing leaves the machine unless `wandb` is "online"; "offline" keeps the same in the
    folder `wandb` of the run, which `wandb sync` can send later.

    Raises SettingsError when wandb is asked for and not installed.
    """

    def __init__(self, run: Path, start_step: int, wandb: Wandb | None, settings: dict[str, Any]):
        self.tensorboard = SummaryWriter(str(run / "tensorboard"), purge_step=start_step or None)
        self.wandb = _start_wandb(run, wandb, settings) if wandb else None

    def add(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.tensorboard.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(values, step=step)

    def close(self, exit_code: int = 0) -> None:
        self.tensorboard.close()
        if self.wandb:
            self.wandb.finish(exit_code=exit_code)


def require_wandb() -> None:
    """SettingsError unless the package is there: to be asked before anything is written."""
    try:
        import wandb  # noqa: F401
    except ImportError as error:
        raise SettingsError(f"train.wandb: {error}; pip install 'affekt[wandb]', or leave it out") from None


def _start_wandb(run: Path, mode: Wandb, settings: dict[str, Any]):
    import wandb

    identity = run / "wandb" / "id"  # the same after a resume, so that the curves go on
    identity.parent.mkdir(exist_ok=True)
    if not identity.is_file():
        identity.write_text(secrets.token_hex(8), encoding="utf-8")
    return wandb.init(
        project="affekt",
        name=run.name,
        id=identity.read_text(encoding="utf-8"),
        dir=str(run),
        mode=mode,
        resume="allow",
        config=settings,
    )
