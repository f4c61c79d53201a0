"""Settings of `affekt probe`."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from affekt.data.settings import Settings
from affekt.finetune.pooling import POOLINGS, check_poolings
from affekt.finetune.probes.heads import HeadName
from affekt.finetune.splits import Selector

Stream = Literal["audio", "video", "both"]


class ProbeSettings(Settings):
    """What to probe, and on which clips.

    `test`, `dev` and `train` select by manifest fields, `{split: [test]}`, or by `{fraction: 0.2}` of the groups there
    are; `dev` is taken from what `test` leaves, `train` from what `dev` leaves. `dev: {folds: 5}` chooses by
    cross-validation over the groups of `train`: steadier with few speakers, at five times the fits.
    """

    shards: str | Path = Field(description="folder written by `affekt prepare`, or its url")
    encoder: Path = Field(description="export folder of the pre-trained encoder")
    output: Path = Field(description="folder for results.json, settings.yaml and report.html")
    label: str = Field("label", description="manifest field to tell apart, where no dimensions are told")
    dimensions: tuple[str, ...] = Field((), description="fields of numbers to tell instead, [valence, arousal]: by CCC")
    group: Literal["speaker", "id"] = Field("speaker", description="what may not stand on two sides of the split")
    test: Selector
    dev: Selector
    train: Selector = Field({}, description="all that is left when empty")
    streams: tuple[Stream, ...] = Field(("audio", "video", "both"), min_length=1)
    windows: int = Field(2, ge=1, description="evenly spaced windows per clip whose features are averaged")
    poolings: tuple[str, ...] = Field(
        POOLINGS, description="of tokens; segments_K and cells_K for any K are two more; with mean"
    )
    heads: tuple[HeadName, ...] = Field(
        ("logistic", "ridge", "knn"), min_length=1, description="the first one's rows are compared and drawn"
    )
    head_seeds: tuple[int, ...] = Field((0,), min_length=1, description="of heads that draw random numbers")
    token_layers: Literal["last", "all"] = Field("last", description="whose tokens the attentive head reads")
    token_limit: float = Field(8.0, gt=0, description="GiB of tokens on the disk, and in memory while they are read")
    penalties: tuple[Annotated[float, Field(gt=0, lt=1e6)], ...] = Field(
        (0.1, 0.03, 0.01, 0.003, 0.001, 0.0001), min_length=1
    )
    depth: bool = Field(True, description="a curve of a ridge's score over the layers")
    control: bool = Field(True, description="beside that curve the score of random labels per speaker, and the gap")
    nuisance: tuple[str, ...] | None = Field(
        None, description="and the scores of other fields; null: those of speaker, sex and sentence that clips have"
    )
    random_seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1, description="random encoders to compare with")
    bootstrap: int = Field(2000, ge=100)
    seed: int = Field(0, ge=0, lt=2**31)
    transductive: bool = Field(False, description="allow test clips in pre-training, and name every result so")
    cache: Path | None = Field(None, description="folder of frozen features; `features` in the output when not set")
    batch_size: int = Field(16, ge=1)
    workers: int = Field(0, ge=0, description="processes that decode clips, and then that fit")
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="cuda, cpu, or cuda where there is one"
    )
    run: Path | None = Field(None, description="pre-training run whose curves and pictures the report shows")
    title: str = "What the features know"

    @model_validator(mode="after")
    def _check(self) -> "ProbeSettings":
        check_poolings(self.poolings)
        if "mean" not in self.poolings:
            raise ValueError(f"poolings {list(self.poolings)}: mean is always among them, for the plain row")
        for name in ("heads", "poolings", "streams", "random_seeds", "head_seeds"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} {list(getattr(self, name))}: each only once")
        if self.dimensions and "logistic" in self.heads:
            raise ValueError(
                f"heads {list(self.heads)}: logistic tells classes, not {', '.join(self.dimensions)}; leave it out"
            )
        if self.nuisance and not self.depth:
            raise ValueError("nuisance is drawn over depth; say depth: true")
        return self
