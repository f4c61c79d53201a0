"""The probes of a frozen encoder, pre-trained or random, as contenders: layer, pooling, head and option are chosen anew
in every fold, from one menu."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from affekt.data.errors import SettingsError
from affekt.data.shards import ShardIndex
from affekt.finetune.contenders import Outcome, Part, Report
from affekt.finetune.features import extract, weights_hash
from affekt.finetune.probes.probe import check_preparation
from affekt.finetune.probes.search import one_thread, search_table
from affekt.finetune.probes.settings import ProbeSettings, Stream
from affekt.finetune.probes.task import Task
from affekt.finetune.protocols import Protocol
from affekt.pretrain.device import device_of
from affekt.pretrain.export import load_encoder, random_encoder
from affekt.pretrain.seen import read_seen

# What decides the features and the menu; the rest is of the clips, of reports and of the machine.
MENU = {"windows", "poolings", "heads", "token_layers", "penalties", "seed"}


@dataclass
class Probe:
    """One stream of one kind of features. For a random encoder the seeds are those of its weights."""

    name: str
    settings: ProbeSettings
    stream: Stream
    features: Literal["pretrained", "random"]
    cache: Path

    def __post_init__(self) -> None:
        random = self.features == "random"
        self.kind = "random" if random else "probe"
        self.title = f"{'Random' if random else 'Pre-trained'} encoder, probe of {self.stream}"
        self.streams, self.transductive = self.stream, self.settings.transductive and not random
        self.seeds = self.settings.random_seeds if random else self.settings.head_seeds
        if "attentive" in self.settings.heads:
            raise SettingsError("heads: attentive reads tokens, which `affekt evaluate` does not keep; leave it out")

    def identity(self) -> dict[str, Any]:
        menu = self.settings.model_dump(mode="json", include=MENU)
        # What was let through as transductive is not to come back from its file unmarked.
        allowed = {"transductive": self.transductive} if self.features == "pretrained" else {}
        return {"probe": self.features, "stream": self.stream, "weights": self.weights, **allowed, **menu}

    def pretraining(self) -> dict[str, Any] | None:
        return read_seen(self.settings.encoder) if self.features == "pretrained" else None

    def check(self, rules: Protocol, index: ShardIndex) -> None:
        stated, label = self.settings.dimensions, self.settings.label
        if stated and set(stated) != set(rules.dimensions):
            judged = ", ".join(rules.dimensions) or f"classes of {rules.label}"
            raise SettingsError(f"{self.name}, dimensions: {', '.join(stated)}; but {rules.name} judges {judged}")
        if not rules.dimensions and label != rules.label:
            raise SettingsError(f"{self.name}, label: {label}; but {rules.name} judges {rules.label}")

    @cached_property
    def weights(self) -> str:
        return weights_hash(load_encoder(self.settings.encoder))

    def judge(self, part: Part, seed: int, folder: Path, progress: Report | None = None) -> Outcome:
        settings, fold = self.settings, part.fold
        if self.features == "pretrained":
            encoder = load_encoder(settings.encoder)
        else:
            encoder = random_encoder(settings.encoder, seed)
        check_preparation(part.index, encoder.prepare, settings.encoder)
        clips = sorted(fold.train + fold.dev + fold.test)
        table = extract(
            encoder.to(device_of(settings.device)),
            part.index,
            clips,
            windows=settings.windows,
            cache=self.cache,
            poolings=settings.poolings,
            batch_size=settings.batch_size,
            workers=settings.workers,
        )
        if not table.has[self.stream].any():
            raise SettingsError(f"{self.title}: the encoder or the clips lack {self.stream}; leave it out of `streams`")
        task = task_of(part, clips).having(table.has[self.stream])
        needed = ("audio", "video", "both") if self.stream == "both" else (self.stream,)
        own = settings.model_copy(update={"streams": (self.stream,), "head_seeds": (seed,)})
        with one_thread():
            found = search_table(table, {stream: task for stream in needed}, own, plain=False)
        answered = max((answered for _, _, answered in found.rows), key=lambda answered: answered.choice.best)
        choice = answered.choice
        said = part.table([clips[i] for i in task.test], answered.test.mean(0).astype(np.float64), "test")
        chosen = {"head": choice.head, "blocks": list(choice.blocks), "option": choice.option, "score": choice.best}
        outcome = Outcome(said, chosen=chosen)
        if part.selected == "dev":
            outcome.dev = part.table([clips[i] for i in task.folds[0]], answered.dev.astype(np.float64), "dev")
        judged, ids = set(said.ids), [table.ids[clips.index(p)] for p in fold.test]
        outcome.unread = {clip: table.unread.get(clip, f"no {self.stream}") for clip in ids if clip not in judged}
        return outcome


def task_of(part: Part, clips: list[int]) -> Task:
    """The fold as places in a feature table of `clips`. What is chosen on is fitted on after the choice, but where it
    is the test clips."""
    place = {p: i for i, p in enumerate(clips)}
    fitting, choose, test = (np.array([place[p] for p in c]) for c in (part.fitting, part.choose, part.fold.test))
    rows = [part.index.samples.row(p) for p in clips]
    truth = part.truth(clips)
    rated = bool(part.rules.dimensions)
    return Task(
        classes=part.classes,
        labels=np.zeros(len(clips), int) if rated else truth,
        groups=[str(row["meta"].get(part.rules.group) or row["id"]) for row in rows],
        fitting=fitting,
        folds=(choose,),
        test=test,
        dimensions=list(part.rules.dimensions),
        ratings=truth if rated else None,
    )
