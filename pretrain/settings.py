"""The settings of one pre-training run: one YAML file, one frozen object."""

import difflib
from typing import Any

from pydantic import Field, model_validator

from affekt.data.errors import SettingsError
from affekt.data.loader import Augment
from affekt.data.settings import Settings
from affekt.pretrain.boards import Wandb
from affekt.pretrain.engine import Precision
from affekt.pretrain.guard import GuardSettings
from affekt.pretrain.hicmae_settings import HiCMAESettings
from affekt.pretrain.online import OnlineProbeSettings
from affekt.pretrain.optim import OptimSettings
from affekt.pretrain.registry import with_size
from affekt.pretrain.writing import OnFailure
from affekt.pretrain.zero import Offload


class CorpusSettings(Settings):
    """One corpus of a mixture. What it leaves out of `include`, `held_out` and `group` it has from `data`."""

    shards: str = Field(min_length=1, description="folder written by `affekt prepare`, or its url")
    weight: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="share of every epoch, relative; all or none state one"
    )
    name: str = Field(min_length=1, description="goes before the ids of its clips; default: last part of shards")
    include: dict[str, list[str]] = Field({})
    held_out: dict[str, list[str]] = Field({})
    group: str | None = "speaker"


class DataSettings(Settings):
    """Which clips are learned from, and how a training view is cut from one."""

    shards: str | None = Field(None, description="folder written by `affekt prepare`, or its url; or else mixture")
    mixture: tuple[CorpusSettings, ...] = Field((), description="several, e.g. [{shards: a, weight: 0.7}, ...]")
    include: dict[str, list[str]] = Field({}, description="metadata field -> allowed values, e.g. {split: [train]}")
    held_out: dict[str, list[str]] = Field({}, description="clips that must not be seen: by id, source file and group")
    group: str | None = Field(
        "speaker", description="no group of a held-out clip may be seen; null checks the clips alone"
    )
    epoch_clips: int | None = Field(
        None, ge=1, description="clips of an epoch, each going on where the last one ended; null: as many as there are"
    )
    repeats: int = Field(
        1, ge=1, description="views in a batch of each decoded clip, of one window, crop and gain and mask of their own"
    )
    skip_budget: float = Field(0.01, ge=0, le=1, description="share of clips that may be unreadable; above it: exit 2")
    frame_stride: int = Field(4, ge=1, description="video frames between two sampled ones, at 25 fps")
    augment: Augment = Augment()
    workers: int = Field(2, ge=0)

    @property
    def parts(self) -> tuple[CorpusSettings, ...]:
        """The corpora; one alone needs no name and no weight."""
        if len(self.mixture) > 1:
            return self.mixture
        alone = self.mixture[0] if self.mixture else self
        values = {field: getattr(alone, field) for field in ("shards", "include", "held_out", "group")}
        return (CorpusSettings.model_construct(**values, weight=None, name=""),)

    @model_validator(mode="before")
    @classmethod
    def _fill_in_corpora(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("mixture"), list | tuple):
            return values
        common = {field: values[field] for field in ("include", "held_out", "group") if field in values}
        mixture = [
            {**common, "name": str(part.get("shards", "")).rstrip("/").rpartition("/")[2], **part}
            if isinstance(part, dict)
            else part
            for part in values["mixture"]
        ]
        return {**values, "mixture": mixture}

    @model_validator(mode="after")
    def _check(self) -> "DataSettings":
        if bool(self.shards) == bool(self.mixture):
            raise ValueError("set one of data.shards and data.mixture; shards=null makes room for a mixture")
        if len(self.mixture) == 1 and self.mixture[0].weight is not None:
            raise ValueError("a mixture of one corpus has no use for a weight; leave it out")
        for field in ("include", "held_out", "group"):
            value = getattr(self, field)
            stated = self.mixture and value != type(self).model_fields[field].default
            if stated and not any(getattr(part, field) == value for part in self.mixture):
                raise ValueError(f"data.{field} has no effect: every corpus of data.mixture states its own")
        names = [part.name for part in self.mixture]
        if len(set(names)) < len(names):
            raise ValueError(f"the corpora of data.mixture need different names; they are {names}: state `name`")
        if len({part.weight is None for part in self.mixture}) > 1:
            raise ValueError("some corpora of data.mixture state a weight and others do not; state all or none")
        return self


class TrainSettings(Settings):
    """Length, batch and bookkeeping of a run."""

    steps: int | None = Field(None, ge=1)
    epochs: float | None = Field(None, gt=0)
    global_batch: int = Field(160, ge=1, description="clips, or views of them, per step over all ranks")
    accumulate: int = Field(1, ge=1, description="parts that a rank takes its batch in; negatives stay those of all")
    precision: Precision = Field("auto", description="fp32, bf16, fp16 with a loss scale; auto: bf16 on a GPU")
    zero_stage: int = Field(
        0, ge=0, le=3, description="over the ranks are spread: 1 the optimiser, 2 also gradients, 3 also weights"
    )
    offload: Offload = Field(
        "none", description="to the host's memory: optimizer (from stage 1 on), or parameters as well (stage 3)"
    )
    seed: int = Field(0, ge=0, lt=2**63)
    activation_checkpointing: bool = Field(False, description="compute activations again instead of keeping them")
    compile: bool | None = Field(None, description="torch.compile of the model; null: on a GPU")
    threads: int | None = Field(None, ge=1, description="CPU threads of the model; null leaves torch's choice")
    log_every: int = Field(10, ge=1)
    checkpoint_every: int = Field(500, ge=1)
    picture_every: int = Field(500, ge=1)
    guard: GuardSettings = GuardSettings()
    watchdog_s: float | None = Field(
        900.0, gt=0, description="seconds without progress on any rank until all end with exit code 5; null: no watch"
    )
    replicas_every: int = Field(
        50, ge=0, description="steps after which the ranks compare their weights bit by bit; 0: never"
    )
    keep_last: int = Field(2, ge=1, description="checkpoints; older ones are removed")
    keep_every: int | None = Field(None, ge=1, description="keep also those of every n-th step")
    on_failed_save: OnFailure = Field("continue", description="or stop; an older checkpoint stays in both cases")
    probe: OnlineProbeSettings = Field(OnlineProbeSettings(), description="of labelled clips, while the run goes on")
    wandb: Wandb | None = Field(None, description="offline (in the run's folder) or online; null: not at all")

    @model_validator(mode="after")
    def _check(self) -> "TrainSettings":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("set one of train.steps and train.epochs")
        least = {"none": 0, "optimizer": 1, "parameters": 3}[self.offload]
        if self.zero_stage < least:
            raise ValueError(f"train.offload={self.offload} needs train.zero_stage={least}; it is {self.zero_stage}")
        if self.keep_every and self.keep_every % self.checkpoint_every:
            raise ValueError(
                f"train.keep_every {self.keep_every} is no multiple of train.checkpoint_every {self.checkpoint_every}"
            )
        return self


class PretrainSettings(Settings):
    """Everything that `affekt pretrain CONFIG` reads. `model.name` names a size; other keys replace its values."""

    out: str = Field(description="the run folder")
    pretrained: str | None = Field(None, description="weights to start from: an export folder or a HiCMAE .pth file")
    model: HiCMAESettings
    data: DataSettings
    optim: OptimSettings = OptimSettings()
    train: TrainSettings

    @model_validator(mode="after")
    def _check(self) -> "PretrainSettings":
        model = self.model
        if self.data.augment.roll and model.streams == "both" and model.contrast_weight:
            raise ValueError(
                "data.augment.roll moves the sound against the picture, which model.contrast_weight pulls together; "
                "turn one of them off"
            )
        repeats, batch = self.data.repeats, self.train.global_batch
        if 1 < repeats <= batch < 2 * repeats and model.streams == "both" and model.contrast_weight:
            raise ValueError(
                f"data.repeats {repeats} leaves one clip in a batch of {batch}, which has no negatives; lower it, or "
                "set model.contrast_weight=0"
            )
        if self.optim.min_lr > self.optim.base_lr:
            raise ValueError(f"optim.min_lr {self.optim.min_lr} is above optim.base_lr {self.optim.base_lr}")
        return self

    @model_validator(mode="before")
    @classmethod
    def _fill_in_size(cls, values: Any) -> Any:
        return with_size(values)

    def changes_from(self, old: "PretrainSettings") -> dict[str, tuple[Any, Any]]:
        """`{key: (old, new)}` of every setting that decides the result; folders, logging and workers do not."""
        free = ("out", "data.shards", "data.workers", "train.log_every", "train.picture_every", "train.threads")
        free += ("train.wandb",)
        free += ("train.checkpoint_every", "train.keep_last", "train.activation_checkpointing", "train.compile")
        free += ("train.watchdog_s", "train.replicas_every")
        free += ("train.accumulate", "train.zero_stage", "train.offload", "train.keep_every", "train.on_failed_save")
        free += ("data.skip_budget", *(f"data.mixture.{part.name}.shards" for part in self.data.mixture))
        changes = changes_between(old.model_dump(mode="json"), self.model_dump(mode="json"), free)
        return {key: pair for key, pair in changes.items() if not key.startswith("train.probe.")}

    def check_keys(self, keys: tuple[str, ...]) -> None:
        """Raise SettingsError for a key that is no setting, naming the nearest one."""
        known = _flat(self.model_dump(mode="json"))
        for key in keys:
            if key not in known and not any(name.startswith(f"{key}.") for name in known):
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean `{near[0]}`?" if near else "see --print-config"
                raise SettingsError(f"--allow-change {key}: not a setting; {hint}")


def changes_between(old: dict[str, Any], new: dict[str, Any], free: tuple[str, ...]) -> dict[str, tuple[Any, Any]]:
    """`{key: (old, new)}` of nested settings that differ, but for the keys in `free`."""
    before, after = _flat(old), _flat(new)
    return {
        key: (before.get(key), after.get(key))
        for key in sorted(before | after)
        if before.get(key) != after.get(key) and key not in free
    }


def refuse_changes(changes: dict[str, tuple[Any, Any]], allowed: tuple[str, ...]) -> None:
    """Raise SettingsError that lists old and new values, unless every change is allowed by name."""
    inside = tuple(f"{key}." for key in allowed)  # a whole section may be allowed, as `optim`
    changes = {key: pair for key, pair in changes.items() if key not in allowed and not key.startswith(inside)}
    if changes:
        lines = [f"  {key}: {old!r} -> {new!r}" for key, (old, new) in changes.items()]
        raise SettingsError(
            "the run was started with other settings:\n" + "\n".join(lines) + "\n"
            "restore them, allow each by name (--allow-change KEY), or start in another folder (out=...)"
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"data.workers": 2, ...}`; the corpora of a mixture by their names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if key == "mixture" and value:
            value = {part["name"]: part for part in value}
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
