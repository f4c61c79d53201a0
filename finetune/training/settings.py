"""The settings of a fine-tuning: one YAML file, one frozen object."""

from typing import Any, Literal

from pydantic import Field, model_validator

from affekt.data.batch import Streams
from affekt.data.labels import LabelSettings
from affekt.data.loader import Augment
from affekt.data.settings import Settings
from affekt.finetune.classifier import Missing
from affekt.finetune.splits import Selector
from affekt.finetune.training.adapting import Adapting
from affekt.finetune.training.distilling import Distilling
from affekt.finetune.training.varied import Varied
from affekt.pretrain.engine import Precision
from affekt.pretrain.guard import GuardSettings
from affekt.pretrain.hicmae_settings import HiCMAESettings
from affekt.pretrain.optim import Beta
from affekt.pretrain.registry import with_size

Task = Literal["single", "soft", "multi", "dimensions", "joint"]
# Not what is learned or scored: these may differ when a fine-tuning goes on.
FREE = ("out", "title", "data.workers", "train.threads", "train.log_every", "train.checkpoint_every")
FREE += ("train.watchdog_s", "data.skip_budget", "train.accumulate", "train.zero_stage", "map_clips")


class CorpusSettings(Settings):
    """One corpus: its shards, what is known of its clips, and which of them are for what.

    `test`, `dev` and `train` select by manifest fields, `{split: [test]}`, or by `{fraction: 0.2}` of the groups there
    are; `dev` is taken from what `test` leaves, `train` from what `dev` leaves (null: all of it). A corpus without
    `test` and `dev` is learned from and not judged.
    """

    shards: str = Field(min_length=1, description="folder written by `affekt prepare`, or its url")
    name: str = Field("", description="of the corpus, in results; default: last part of shards")
    labels: LabelSettings = LabelSettings()
    group: str = Field("speaker", description="what may not stand on two sides: speaker, session, id ...")
    test: Selector | None = None
    dev: Selector | None = None
    train: Selector = Field({}, description="all that is left when empty")
    weight: float | None = Field(None, gt=0, description="share of every epoch, relative; all or none state one")

    @model_validator(mode="before")
    @classmethod
    def _fill_in_name(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("name"):
            return values
        return {**values, "name": str(values.get("shards", "")).rstrip("/").rpartition("/")[2]}

    @model_validator(mode="after")
    def _check(self) -> "CorpusSettings":
        if (self.test is None) != (self.dev is None):
            raise ValueError(
                "a corpus that is judged needs both `test` and `dev`: nothing may be chosen on the clips of the test. "
                "One that is only learned from has neither"
            )
        return self


class DataSettings(Settings):
    """Which clips: those of one corpus, stated here, or of several in `mixture`."""

    shards: str | None = Field(None, description="folder written by `affekt prepare`, or its url; or else mixture")
    labels: LabelSettings = LabelSettings()
    group: str = Field("speaker", description="what may not stand on two sides: speaker, session, id ...")
    test: Selector | None = Field(None, description="clips to score once, e.g. {split: [test]} or {fraction: 0.2}")
    dev: Selector | None = Field(None, description="clips to choose the epoch on, taken from what test leaves")
    train: Selector = Field({}, description="clips to learn from; all that is left when empty")
    mixture: tuple[CorpusSettings, ...] = Field((), description="several corpora, each with the settings above")
    temperature: float = Field(
        1.0, ge=1, description="T of the corpora's shares, n^(1/T) of n clips; 1: as many as there are"
    )
    balance: bool = Field(False, description="in every epoch each class as often as any other, its clips in turn")
    skip_budget: float = Field(0.01, ge=0, le=1, description="share of clips that may be unreadable; above it: exit 2")
    augment: Augment = Field(Augment(), description="of training views: crop, flip, gain, roll")
    workers: int = Field(1, ge=0)

    @property
    def parts(self) -> tuple[CorpusSettings, ...]:
        """The corpora, each with a name."""
        own = {field: getattr(self, field) for field in ("shards", "labels", "group", "test", "dev", "train")}
        return self.mixture or (CorpusSettings(**own),)

    @model_validator(mode="after")
    def _check(self) -> "DataSettings":
        if bool(self.shards) == bool(self.mixture):
            raise ValueError("set one of data.shards and data.mixture; shards=null makes room for a mixture")
        stated = [f for f in ("labels", "group", "test", "dev", "train") if f in self.model_fields_set and self.mixture]
        stated = [f for f in stated if getattr(self, f) != type(self).model_fields[f].get_default()]
        if stated:
            raise ValueError(f"data.{stated[0]} has no effect beside data.mixture: every corpus states its own")
        if len({part.name for part in self.parts}) < len(self.parts):
            raise ValueError("the corpora of data.mixture need different names; state `name`")
        if not any(part.test is not None for part in self.parts):
            raise ValueError("data.test and data.dev: say which clips are to be scored, and on which to choose")
        if len({part.weight is None for part in self.parts}) > 1:
            raise ValueError("some corpora of data.mixture state a weight and others do not; state all or none")
        if self.temperature > 1 and (len(self.parts) == 1 or self.parts[0].weight is not None):
            raise ValueError("data.temperature is for several corpora that state no weight")
        if len({part.labels.multi for part in self.parts if part.labels.rule}) > 1:
            raise ValueError("one class a clip and several cannot be learned together; the labels.rule of all agree")
        return self


class HeadSettings(Settings):
    """What judges the encoders' tokens."""

    kind: Literal["layers", "bands", "cells"] = Field(
        "layers",
        description="layers: of every depth, and fused, as published; bands: mean and deviation per band of the "
        "spectrum and of the face; cells: those of the face also from left to right",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="before the linear map; published: 0")
    init_std: float | None = Field(None, gt=0, description="of the linear map's weights; null: torch's, as published")
    missing: Missing = Field("leave_out", description="a head per set of streams, or a learned token for absent ones")


class LossSettings(Settings):
    """What is minimised."""

    smoothing: float = Field(0.0, ge=0, lt=1, description="of class targets, towards 1/K; published: 0.1")
    balance: bool = Field(False, description="weigh classes by their effective number (Chou et al., CAGE)")
    penalty: float = Field(0.0, ge=0, description="weight of probability on classes seldom voted together; 0.1 to 1")
    dimensions: Literal["ccc", "mse", "ccc+mse"] = Field("ccc", description="1 - CCC over the batch; published: mse")
    mse_weight: float = Field(3.0, ge=0, description="of the error beside 1 - CCC, in `ccc+mse`; CAGE: 3")
    dimensions_weight: float = Field(5.0, gt=0, description="of dimensions beside classes; CAGE: 5")


class FinetuneOptim(Settings):
    """AdamW; the defaults are the published fine-tuning."""

    base_lr: float = Field(1e-3, gt=0, description="per 256 clips of the global batch; lr = base_lr * batch / 256")
    min_lr: float = Field(1e-6, ge=0, description="end of the cosine, scaled like base_lr")
    warmup_share: float = Field(0.1, ge=0, lt=1, description="share of all steps with a linear warm-up from 0")
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.05, ge=0, description="not of biases and norms")
    layer_decay: float = Field(0.75, gt=0, le=1, description="factor on the rate of each layer below; 1: none")
    clip_grad: float = Field(0.0, ge=0, description="maximal gradient norm; 0 clips nothing")

    def scaled(self, lr: float, global_batch: int) -> float:
        return lr * global_batch / 256


class TrainSettings(Settings):
    """Length, batch, what is chosen, and bookkeeping."""

    epochs: float | None = Field(None, gt=0)
    steps: int | None = Field(None, ge=1)
    global_batch: int = Field(32, ge=1, description="clips per step over all ranks")
    accumulate: int = Field(1, ge=1, description="parts that a rank takes its batch in")
    precision: Precision = Field("auto", description="fp32, bf16, fp16 with a loss scale; auto: bf16 on a GPU")
    zero_stage: int = Field(0, ge=0, le=2, description="over the ranks are spread: 1 the optimiser, 2 also gradients")
    choose: Literal["best", "last"] = Field("best", description="epoch: best on the development clips, or the last")
    choose_on: Literal["dev", "test"] = Field(
        "dev", description="clips that decide; test: the test clips, as often published, and results are named so"
    )
    choose_by: str | None = Field(None, description="a score of the development clips; null: the task's main one")
    evaluate_every: int = Field(1, ge=1, description="epochs between two looks at the development clips")
    patience: int | None = Field(None, ge=1, description="stop after so many looks without a better score; null: never")
    windows: int = Field(2, ge=1, description="evenly spaced views of each clip that is judged; their mean counts")
    speech: bool = Field(False, description="judge windows around a clip's sound, as data.augment.windows=speech")
    eval_batch: int = Field(32, ge=1, description="views that are judged at once")
    threads: int | None = Field(None, ge=1, description="CPU threads of the model; null leaves torch's choice")
    log_every: int = Field(10, ge=1, description="steps")
    checkpoint_every: int | None = Field(None, ge=1, description="steps; null: after each look at development clips")
    guard: GuardSettings = Field(
        # Late in a fine-tuning most losses are near 0, and a clip that is hard is no illness.
        GuardSettings(mads=None, rollbacks=0),
        description="of steps with a loss or gradient that is not finite",
    )
    watchdog_s: float | None = Field(900.0, gt=0, description="seconds without progress until all ranks end; null: no")

    @model_validator(mode="after")
    def _check(self) -> "TrainSettings":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("set one of train.steps and train.epochs")
        if self.guard.rollbacks:
            raise ValueError("train.guard.rollbacks: a fine-tuning keeps no older checkpoint to go back to; set 0")
        return self


class FinetuneSettings(Settings):
    """Everything that `affekt finetune CONFIG` reads."""

    out: str = Field(min_length=1, description="folder for predictions, scores, report and model")
    title: str = "Fine-tuning"
    encoder: str | None = Field(None, description="an export folder or a HiCMAE .pth file; or else model")
    scratch: bool = Field(False, description="fresh weights in the architecture of `encoder`")
    model: HiCMAESettings | None = Field(None, description="an architecture, with fresh weights; name: hicmae_nano ...")
    frame_stride: int | None = Field(
        None, ge=1, description="video frames between two sampled ones, at 25 fps; null: the encoder's, or 4"
    )
    streams: Streams | None = Field(None, description="both, video or audio; null: those of the encoder")
    drop_path: float = Field(0.0, ge=0, lt=1, description="of the last layer, growing from 0; published: 0.1")
    freeze: int | Literal["encoder"] = Field(
        0, description="depths that stay as they are: 1 the patch embeddings, 2 and the first blocks ...; encoder: all"
    )
    adapting: Adapting = Field(Adapting(), description="few weights in a frozen encoder: LoRA, adapters")
    head: HeadSettings = HeadSettings()
    data: DataSettings
    varied: Varied = Varied()
    distilling: Distilling = Field(Distilling(), description="agreement of views with moments hidden, and without")
    loss: LossSettings = LossSettings()
    optim: FinetuneOptim = FinetuneOptim()
    ema: float = Field(0.0, ge=0, lt=1, description="decay of a running mean of the weights, which is judged; 0: none")
    train: TrainSettings
    seeds: tuple[int, ...] = Field((0,), min_length=1, description="one fine-tuning each")
    refit: bool = Field(False, description="after the choice fit again on train and development clips together")
    transductive: bool = Field(False, description="allow test clips in pre-training, and name every result so")
    bootstrap: int = Field(2000, ge=100, description="resamples of the 95 % intervals")
    map_clips: int = Field(1000, ge=0, le=1500, description="test clips on the report's map; 0: no map")

    @property
    def task(self) -> Task:
        labels = [part.labels for part in self.data.parts]
        rules = {label.rule for label in labels} - {None}
        if not rules:
            return "dimensions"
        if any(label.dimensions for label in labels):
            return "joint"
        return "multi" if "all_inclusive" in rules else "soft" if "soft" in rules else "single"

    @property
    def multi(self) -> bool:
        """Whether a clip may have several classes."""
        return any(part.labels.multi for part in self.data.parts)

    @model_validator(mode="before")
    @classmethod
    def _fill_in_size(cls, values: Any) -> Any:
        return with_size(values)

    @model_validator(mode="after")
    def _check(self) -> "FinetuneSettings":
        if (self.encoder is None) == (self.model is None):
            raise ValueError("set one of encoder (weights to start from) and model (an architecture)")
        if self.model and (self.scratch or self.transductive):
            raise ValueError("scratch and transductive are about the weights of `encoder`; a model has none")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {self.seeds}: all different")
        if self.optim.min_lr > self.optim.base_lr:
            raise ValueError(f"optim.min_lr {self.optim.min_lr} is above optim.base_lr {self.optim.base_lr}")
        if self.train.patience and self.train.choose == "last":
            raise ValueError("train.patience ends on a score that train.choose=last does not look at")
        if self.refit and self.train.choose_on == "test":
            raise ValueError("refit learns the clips that decide; train.choose_on=test makes those the test clips")
        task, loss = self.task, self.loss
        if task == "dimensions" and (loss.smoothing or loss.balance or loss.penalty):
            raise ValueError("loss.smoothing, balance and penalty are of classes; these labels have none")
        if task in ("dimensions", "joint") and self.varied.mixing.cutmix:
            raise ValueError("varied.mixing.cutmix shares labels by area, which ratings do not follow; use mixup alone")
        if task in ("dimensions", "multi") and self.data.balance:
            raise ValueError("data.balance is of one class a clip")
        if self.adapting.on and self.freeze:
            raise ValueError("freeze: with LoRA or adapters the whole encoder is frozen anyhow; leave it out")
        if self.multi and loss.smoothing:
            raise ValueError("loss.smoothing is of one class a clip; see labels.smoothing for several")
        if task in ("dimensions", "joint") and "ccc" in loss.dimensions and self.train.accumulate > 1:
            raise ValueError("a CCC needs all clips of a batch at once: train.accumulate=1, or loss.dimensions=mse")
        return self
