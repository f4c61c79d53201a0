"""`results.json` of every evaluation: what stands in it, checked as it is written and as it is read.

The same major version reads. `affekt.finetune.schema.Results.model_json_schema()` is its JSON schema. NaN is no value.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from affekt.data.errors import DataError
from affekt.data.files import check_version, write_text

FORMAT, VERSION = "affekt-results", "1.1"
Command = Literal["probe", "finetune", "evaluate", "evaluate --predictions", "recall", "stress"]
Selected = Literal["dev", "test", "unknown"]


class Part(BaseModel):
    """Base of all parts; a minor version may add keys, so unknown ones are read over."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, protected_namespaces=())


class Estimate(Part):
    """A score with its 95 % interval, what was resampled for it and how many of those there were."""

    value: float
    low: float
    high: float
    unit: str
    clusters: int


class Fold(Part):
    """One fold of a protocol: its scores without intervals, and what development clips chose."""

    name: str
    clips: int
    scores: dict[str, float]
    chosen: dict[str, Any] = {}


class Speaker(Part):
    """The main score of one speaker's clips."""

    name: str
    clips: int
    score: float
    sex: str = ""


class Bin(Part):
    """Clips of like confidence: their mean confidence, and the share that is right (or of the raters who agree)."""

    confidence: float
    share: float
    clips: int


class Calibration(Part):
    """Confidence against being right, before and after scaling by temperatures fitted on development clips.

    `temperatures` has one number per seed and fold; where sets of classes are said, one per class, their geometric
    mean. `before` and `after` have ece, classwise_ece, brier, nll; `bins` are those after, `bins_before` those before.
    `votes` has the same against the share of raters who chose the class, where there are votes.
    """

    temperatures: list[float]
    before: dict[str, float]
    after: dict[str, float]
    bins: list[Bin]
    bins_before: list[Bin] = []
    votes: dict[str, float] = {}
    vote_bins: list[Bin] = []


class Curve(Part):
    """A score over something: depth, noise, how much of the clip was seen. `low` and `high` may be empty."""

    name: str
    x: list[float]
    y: list[float]
    low: list[float] = []
    high: list[float] = []


class Mistake(Part):
    """A clip that was judged wrongly, the most confident ones first."""

    id: str
    truth: str
    prediction: str
    confidence: float
    speaker: str = ""


class System(Part):
    """One row of the summary table: a model, a baseline or the human raters, on the clips of all test folds.

    `scores` are pooled over folds; with several seeds they are means over them. `confusion` rows are the truth, summed
    over seeds. `selected` says on which clips its epoch, layers and penalties were chosen: numbers of `test` are never
    shown under the name of numbers of `dev`; `unknown` is what a table of another program does not tell.
    """

    name: str
    title: str
    kind: Literal["finetuned", "scratch", "probe", "random", "statistics", "majority", "raters", "other"]
    streams: Literal["audio", "video", "both"]
    selected: Selected = "dev"
    transductive: bool = False
    seeds: list[int] = []
    clips: int
    scores: dict[str, Estimate]
    by_seed: list[dict[str, float]] = []
    by_fold: list[Fold] = []
    confusion: list[list[int]] = []
    speakers: list[Speaker] = []
    calibration: Calibration | None = None
    risk_coverage: Curve | None = Field(None, description="x: share of clips kept, y: share of those that is wrong")
    mistakes: list[Mistake] = []
    predictions: list[str] = Field([], description="files beside results.json, one per seed and fold")


class Difference(Part):
    """`of` minus `minus` on the clips that both have judged, by a paired bootstrap; `p` is two-sided."""

    of: str
    minus: str
    score: str
    clips: int
    estimate: Estimate
    p: float


class Layers(Part):
    """Probe scores over the depth of one stream; `control` of random labels per speaker, `selectivity` the gap."""

    system: str
    stream: str
    score: str
    curves: list[Curve]
    weights: Curve | None = None
    best: str = ""


class Stress(Part):
    """One kind of damage: the score at each level. `area` is AUILC where levels run over shares of 0 to 1."""

    name: str
    title: str
    unit: str
    system: str
    score: str
    levels: list[float]
    scores: list[Estimate]
    unchanged: list[float] = Field([], description="share of clips whose answer stays within 0.05, or in its class")
    area: float | None = None
    note: str = ""


class Group(Part):
    """The clips of one group of people."""

    name: str
    clips: int
    speakers: int
    scores: dict[str, float]


class Fairness(Part):
    """A score by groups of people; `threshold` is what a random model of these sizes stays below 95 % of the time."""

    system: str
    attribute: str
    score: str
    groups: list[Group]
    gap: float
    threshold: float
    passes: bool
    note: str = ""


class Conflict(Part):
    """Clips whose voice and face say different things by the raters. Accuracy by subset, with counts."""

    system: str
    subsets: dict[str, int]
    accuracy: dict[str, Estimate]
    bias_index: Estimate
    conflict_gap: Estimate
    audio_follow: Estimate
    note: str = ""


class Point(Part):
    """A clip on the map of embeddings."""

    id: str
    x: float
    y: float
    label: str
    speaker: str


class Table(Part):
    """A table that one protocol alone needs, such as scores across corpora."""

    title: str
    head: list[str]
    rows: list[list[str]]
    note: str = ""


class Results(Part):
    """The whole file. `command` is that of affekt which wrote it; files before 1.1 do not tell."""

    format: Literal["affekt-results"] = FORMAT
    version: str = VERSION
    command: Command | None = None
    title: str
    task: Literal["single", "soft", "multi", "dimensions", "joint"]
    label: str
    classes: list[str] = []
    dimensions: list[str] = []
    main_score: str
    protocol: dict[str, Any] = {}
    clips: dict[str, Any] = {}
    systems: Annotated[list[System], Field(min_length=1)]
    differences: list[Difference] = []
    layers: list[Layers] = []
    stress: list[Stress] = []
    fairness: list[Fairness] = []
    conflict: list[Conflict] = []
    map: list[Point] = []
    tables: list[Table] = []
    pretraining: dict[str, Any] = {}
    licences: list[str] = []
    settings: dict[str, Any] = {}
    versions: dict[str, str] = {}
    seconds: dict[str, float] = {}

    def write(self, path: str | Path) -> Path:
        """Write JSON in one step; NaN and infinity are refused: no score may be one."""
        text = json.dumps(self.model_dump(mode="json"), indent=1, allow_nan=False, ensure_ascii=False)
        write_text(Path(path), text + "\n")
        return Path(path)

    @classmethod
    def read(cls, path: str | Path) -> "Results":
        """Raises DataError for a file that is missing, damaged or of another major version."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            check_version(values, FORMAT, VERSION, Path(path))
            return cls.model_validate(values)
        except (OSError, ValueError, ValidationError) as error:
            raise DataError(f"{path}: no results can be read: {error}") from None
