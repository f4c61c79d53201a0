"""Contenders from experiment files: a fine-tuning, the probes of a frozen encoder, and baselines by name."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from affekt.data.errors import SettingsError
from affekt.data.files import hash_file
from affekt.data.labels import LabelSettings
from affekt.data.manifest import safe_id
from affekt.data.settings import apply_overrides, read_yaml
from affekt.data.shards import ShardIndex
from affekt.finetune.contenders import Classic, Contender, Majority, Outcome, Part, Report
from affekt.finetune.frozen import Probe
from affekt.finetune.predictions import Predictions
from affekt.finetune.probes.classic import TITLES
from affekt.finetune.probes.settings import ProbeSettings
from affekt.finetune.protocols import Protocol
from affekt.finetune.training.loop import finetune
from affekt.finetune.training.network import seen_before, streams_of
from affekt.finetune.training.outcome import corpus_folder, prediction_file
from affekt.finetune.training.settings import FREE, CorpusSettings, FinetuneSettings

NOT_JUDGED = "lacks every stream that the model knows"
FEWEST = 100  # resamples that the settings allow
PARTS = "the protocol says which clips are for what"
INSTEAD = {
    **dict.fromkeys(("out", "output"), "use --out"),
    "bootstrap": "use --bootstrap",
    "train.choose_on": "use --selected",
    "map_clips": "no map could hold the encoders of several folds",
    **dict.fromkeys(("test", "dev", "data.test", "data.dev", "data.train", "group", "data.group"), PARTS),
}
# What a fold states for itself, and what no prediction depends on.
OF_THE_FOLD = {"out", "title", "seeds", "bootstrap", *(key for key in FREE if "." not in key)}


def enter(
    configs: Sequence[str], overrides: Sequence[str], baselines: Sequence[str], cache: Path
) -> tuple[list[Contender], str | None]:
    """The contenders of some experiment files and baselines, and the shards of the first file that names some.

    `overrides`, as `train.epochs=2`, hold for every file. Raises SettingsError for a file that is none of
    `affekt finetune` or `affekt probe`, for an unknown baseline, and for a setting that an evaluation overrides.
    """
    for key in (word.partition("=")[0] for word in overrides):
        option = next((option for name, option in INSTEAD.items() if key == name or key.startswith(f"{name}.")), None)
        if option:
            raise SettingsError(f"{key}: without effect on an evaluation; {option}")
    contenders: list[Contender] = []
    shards: list[str] = []
    for config in configs:
        values = apply_overrides(read_yaml(config), list(overrides))
        name = safe_id(Path(config).stem)
        if is_fine_tuning(values):
            settings = FinetuneSettings.parse(values, config)
            contenders.append(FineTuning(name, settings))
            shards += [settings.data.parts[0].shards]
        elif "encoder" in values and "test" in values:
            if any(word.partition("=")[0].split(".")[0] == "train" for word in overrides):
                raise SettingsError(f"train: without effect on the probe {config} in an evaluation; {PARTS}")
            settings = ProbeSettings.parse(values, config)
            for features in ("pretrained", "random"):
                label = name if features == "pretrained" else f"{name}_random"
                contenders += [Probe(f"{label}_{s}", settings, s, features, cache) for s in settings.streams]
            shards += [str(settings.shards)]
        else:
            raise SettingsError(f"{config}: neither of `affekt finetune` nor of `affekt probe`")
    if not configs and overrides:
        raise SettingsError(f"{overrides[0]}: changes a setting of a CONFIG, and there is none")
    for name in baselines:
        if name != "majority" and name not in TITLES:
            raise SettingsError(f"--baselines {name}: known are majority, {', '.join(TITLES)}")
        contenders.append(Majority() if name == "majority" else Classic(name, cache))
    if not contenders:
        raise SettingsError("nothing to evaluate: name a CONFIG or --baselines")
    return contenders, shards[0] if shards else None


def is_fine_tuning(values: dict[str, Any]) -> bool:
    """Whether a file is one of `affekt finetune`: it says which clips are to be scored."""
    data = values.get("data")
    corpora = [data, *(data.get("mixture") or [])] if isinstance(data, dict) else []
    return any("test" in corpus for corpus in corpora if isinstance(corpus, dict))


@dataclass
class FineTuning:
    """An experiment of `affekt finetune`, trained anew for every fold and seed; its own parts and folder give way."""

    name: str
    settings: FinetuneSettings

    def __post_init__(self) -> None:
        settings = self.settings
        self.title, self.seeds, self.transductive = settings.title, settings.seeds, settings.transductive
        self.kind = "scratch" if settings.scratch or settings.model else "finetuned"
        self.streams = streams_of(settings)

    def identity(self) -> dict[str, Any]:
        values = {key: value for key, value in self.settings.model_dump(mode="json").items() if key not in OF_THE_FOLD}
        return {"finetune": values, "weights": self.weights, "learned_from": self.learned_from}

    def pretraining(self) -> dict[str, Any] | None:
        return seen_before(self.settings)

    def check(self, rules: Protocol, index: ShardIndex) -> None:
        check_labels(self.settings.data.parts[judged_corpus(self.settings, index)].labels, rules, self.name)

    @cached_property
    def learned_from(self) -> list[str]:
        """Fingerprints of the corpora of a mixture, whose clips may change under the same path."""
        return [ShardIndex.open(corpus.shards).fingerprint for corpus in self.settings.data.mixture]

    @cached_property
    def weights(self) -> str | None:
        """The hash of the file that training starts from."""
        if not self.settings.encoder:
            return None
        encoder = Path(self.settings.encoder)
        return hash_file(encoder / "model.safetensors" if encoder.is_dir() else encoder)

    def judge(self, part: Part, seed: int, folder: Path, progress: Report | None = None) -> Outcome:
        settings = fold_settings(self.settings, part, seed, folder)
        finetune(settings, progress)
        judged = next(corpus for corpus in settings.data.parts if corpus.test is not None)
        results = corpus_folder(settings, judged)
        place = {part.index.samples.row(p)["id"]: p for p in part.fold.dev + part.fold.test}
        test = Predictions.read(prediction_file(results, seed, "test"))
        outcome = Outcome(retold(test, part, place, "test"), chosen={"epoch": test.about["epoch"]})
        if part.selected == "dev":
            outcome.dev = retold(Predictions.read(prediction_file(results, seed, "dev")), part, place, "dev")
        judged, ids = set(test.ids), [part.index.samples.row(p)["id"] for p in part.fold.test]
        outcome.unread = {clip: test.about["unread"].get(clip, NOT_JUDGED) for clip in ids if clip not in judged}
        return outcome


def fold_settings(settings: FinetuneSettings, part: Part, seed: int, folder: Path) -> FinetuneSettings:
    """The experiment on the clips of one fold, in a folder of its own, with the protocol's classes."""
    rules, row = part.rules, part.index.samples.row
    fold = {side: {"id": [row(p)["id"] for p in getattr(part.fold, side)]} for side in ("train", "dev", "test")}
    corpora, at = list(settings.data.parts), judged_corpus(settings, part.index)
    labels = fold_labels(corpora[at].labels, part)
    mine = {"shards": str(part.index.root), "labels": labels, "group": rules.group, **fold}
    values = settings.model_dump()
    if settings.data.mixture:
        others = [c.model_copy(update={"test": None, "dev": None}) for c in corpora]
        others[at] = CorpusSettings.parse({**corpora[at].model_dump(), **mine}, "evaluate")
        values["data"]["mixture"] = [corpus.model_dump() for corpus in others]
    else:
        values["data"] |= mine
    values["train"]["choose_on"] = part.selected
    mine = {"out": str(folder), "seeds": (seed,), "bootstrap": FEWEST, "map_clips": 0}  # shown nowhere
    return FinetuneSettings.parse({**values, **mine}, "evaluate")


def judged_corpus(settings: FinetuneSettings, index: ShardIndex) -> int:
    """Which of the experiment's corpora is the one whose folds are judged. Raises SettingsError where none of several
    is."""
    corpora = [Path(corpus.shards).resolve() for corpus in settings.data.parts]
    if len(corpora) == 1:
        return 0
    if corpora.count(Path(str(index.root)).resolve()) != 1:
        raise SettingsError(f"data.mixture: one of its corpora must be {index.root}, the one that is judged")
    return corpora.index(Path(str(index.root)).resolve())


def check_labels(labels: LabelSettings, rules: Protocol, name: str) -> None:
    """Raises SettingsError where an experiment names classes otherwise than the protocol by which it is evaluated."""
    if rules.dimensions:
        return
    if labels.rule == "label" and "field" in labels.model_fields_set and labels.field != rules.label:
        raise SettingsError(f"{name}, labels.field: {labels.field}; but {rules.name} judges {rules.label}")
    stated = {rules.class_of(word) for word in labels.classes}
    if stated and stated != set(rules.classes):
        raise SettingsError(
            f"{name}, labels.classes: {', '.join(labels.classes)}; but {rules.name} judges {', '.join(rules.classes)}"
        )
    for word, other in labels.map.items():
        if rules.class_of(word) != rules.class_of(other):
            counts = rules.class_of(word) or "none of its classes"
            raise SettingsError(f"{name}, labels.map: {word} is {other}; but for {rules.name} it is {counts}")


def fold_labels(labels: LabelSettings, part: Part) -> dict[str, Any]:
    """The experiment's rule, with the protocol's classes for the corpus's words."""
    rules, values = part.rules, labels.model_dump()
    if rules.dimensions:
        missing = [name for name in rules.dimensions if name not in labels.dimensions]
        if missing:
            raise SettingsError(
                f"labels.dimensions: {rules.name} measures {', '.join(rules.dimensions)}; say the range of "
                f"{missing[0]}, as `{missing[0]}: [1, 5]`"
            )
        return values
    if labels.rule is None:
        raise SettingsError(f"labels.rule is null, and {rules.name} measures classes; choose label or a rule of votes")
    words = set()
    for p in sorted(part.fold.train + part.fold.dev + part.fold.test):
        meta = part.index.samples.row(p)["meta"]
        words |= {str(meta[rules.label])} if labels.rule == "label" else set(meta.get(labels.condition) or {})
    named = {word: rules.class_of(word) for word in sorted(words)}
    values["map"] = {word: name for word, name in named.items() if name}
    return values | {"field": rules.label, "classes": tuple(part.classes)}


def retold(table: Predictions, part: Part, place: dict[str, int], side: str) -> Predictions:
    """What was said, in the order of the protocol's classes, beside what the protocol knows of the clips."""
    rules = part.rules
    names, wanted = (table.dimensions, list(rules.dimensions)) if rules.dimensions else (table.classes, part.classes)
    said = table.values if rules.dimensions else table.logits
    columns = [names.index(name) for name in wanted]
    retold = part.table([place[clip] for clip in table.ids], said[:, columns].astype(np.float64), side)
    if not rules.dimensions and table.shares is not None:
        retold = replace(retold, shares=table.shares[:, columns], kind=table.kind)
    return retold
