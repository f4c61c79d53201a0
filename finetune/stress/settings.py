"""What a model is put through, and on which clips."""

from itertools import pairwise

from pydantic import Field, model_validator

from affekt.data.labels import LabelSettings
from affekt.data.settings import Settings
from affekt.finetune.splits import Selector
from affekt.finetune.stress.menu import ALTERATIONS
from affekt.finetune.stress.missing import Fill, Generator

RATES = tuple(round(0.1 * i, 1) for i in range(11))


class StressSettings(Settings):
    """The damage. Everything is done by default, which asks the model about 190 times about every clip."""

    alterations: dict[str, tuple[float, ...]] = Field(
        {name: () for name in ALTERATIONS}, description="name: its levels; [] the usual ones"
    )
    missing: tuple[Generator, ...] = Field(
        ("RMFM", "RMFM_same", "RMM", "TMFM", "STMFM", "SMM"), description="generators of missing input"
    )
    fills: tuple[Fill, ...] = Field(("zero", "drop"), description="of what is missing: zero, repeat, drop")
    rates: tuple[float, ...] = Field(RATES, description="shares that are missing; AUILC is over their range")
    early: tuple[float, ...] = Field((0.25, 0.5, 0.75, 1.0), description="shares of a clip, from its beginning")
    scores: tuple[str, ...] = Field((), description="uar, ccc ...; empty: the task's main one")
    windows: int = Field(2, ge=1, description="evenly spaced views of each clip; their mean counts")
    speech: bool = Field(False, description="views around a clip's sound, as train.speech")
    batch: int = Field(16, ge=1, description="views at once")
    workers: int = Field(0, ge=0)
    bootstrap: int = Field(2000, ge=100, description="resamples of the 95 % intervals")

    @model_validator(mode="after")
    def _check(self) -> "StressSettings":
        for name, levels in self.alterations.items():
            if name not in ALTERATIONS:
                raise ValueError(f"alterations: no `{name}`; known: {', '.join(ALTERATIONS)}")
            low, high = ALTERATIONS[name].within
            outside = [level for level in levels if not low <= level <= high or (name == "phone" and level % 1)]
            if outside:
                raise ValueError(f"alterations.{name}: {outside[0]:g} is not within {low:g} and {high:g}")
        for name in ("rates", "early"):
            values = getattr(self, name)
            if any(not 0 <= v <= 1 for v in values) or any(a >= b for a, b in pairwise(values)):
                raise ValueError(f"{name} {values}: shares of 0 to 1, each larger than the one before")
        if self.early and self.early[0] == 0:
            raise ValueError("early: of 0 % of a clip nothing is known; begin above it")
        if self.missing and not self.fills:
            raise ValueError("fills: say what stands where something is missing: zero, repeat, drop")
        if self.missing and len(self.rates) < 2:
            raise ValueError("rates: two or more; AUILC is an area over them")
        return self


class Clips(Settings):
    """Clips to judge, and what is known of them."""

    shards: str = Field(min_length=1, description="folder written by `affekt prepare`, or its url")
    clips: Selector = Field({"split": ["test"]}, description="manifest fields, e.g. {split: [test]}; {}: all")
    labels: LabelSettings = Field(LabelSettings(), description="classes and dimensions are those of the model")
    group: str = Field("speaker", description="what the model may not have learned from: speaker, session, id ...")


class StressRun(Settings):
    """Everything that `affekt stress MODEL SHARDS OUT` reads."""

    data: Clips
    damage: StressSettings = StressSettings()
    fairness: tuple[str, ...] = Field(("sex", "age", "speaker"), description="fields of groups that are compared")
    smallest_group: int = Field(20, ge=2, description="clips; smaller groups are listed and not compared")
    swap: bool = Field(True, description="judge clips with the sound of another of the same speaker: made conflicts")
    across: dict[str, Clips] = Field({}, description="further corpora to judge as they are, by name")
    transductive: bool = Field(False, description="allow clips that the model has seen, and name every result so")
