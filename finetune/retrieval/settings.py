"""The settings of `affekt recall`."""

from pathlib import Path

from pydantic import Field

from affekt.data.settings import Settings
from affekt.finetune.retrieval.recall import Apart

Selector = dict[str, list[str | int] | str | int]


class RetrievalSettings(Settings):
    """Which clips to search among, and which clips decide how they are compared.

    Selectors are manifest fields, `{split: [val]}`. `dev` is taken from what `base` leaves, `fit` from what `dev` does.
    """

    shards: str | Path = Field(description="folder written by `affekt prepare`, or its url")
    encoder: Path = Field(description="export folder of the pre-trained encoder")
    output: Path = Field(description="folder for results.json, settings.yaml and the chosen spaces")
    base: Selector = Field(description="clips to search among; each asks for its own other stream, or its label")
    first: int | None = Field(None, ge=2, description="only so many of them, the first by id; null: all")
    dev: Selector = Field({}, description="clips that choose taps, centring and alignment; empty: nothing is chosen")
    fit: Selector = Field({}, description="clips whose means are taken off and whose pairs are aligned; no labels")
    label: str | None = Field(None, description="manifest field to find the same of; null: across streams alone")
    group: str = Field("speaker", description="what may not stand in two of base, dev and fit: speaker or id")
    apart: Apart = Field("speaker", description="by label: no answers of the same speaker, or of the same source only")
    windows: int = Field(4, ge=1, description="evenly spaced windows per clip whose features are averaged")
    random_seeds: tuple[int, ...] = Field((0, 1, 2), description="random encoders to compare with")
    bootstrap: int = Field(2000, ge=100)
    seed: int = Field(0, ge=0, lt=2**31)
    transductive: bool = Field(False, description="allow clips of base in pre-training, and name every result so")
    batch_size: int = Field(16, ge=1)
    workers: int = Field(0, ge=0, description="processes that decode clips")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="cuda where there is one")
    title: str = "What is found"
