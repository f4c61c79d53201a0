"""Online probes: at intervals, what the encoders know of labelled clips, and whether their embeddings collapse.

The clips are read once and kept; the encoders look at them with nothing hidden and learn nothing from them. A run with
probes ends bit by bit like the one without: nothing is drawn from a generator, and every module is left in its mode.
"""

import time
from collections import Counter
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from pydantic import Field, model_validator
from torch import Tensor, nn

from affekt.data.batch import Batch
from affekt.data.decode import Window
from affekt.data.errors import DataError, SettingsError
from affekt.data.loader import eval_loader
from affekt.data.mixture import Corpus, check_together, example
from affekt.data.order import raw
from affekt.data.settings import Settings
from affekt.data.shards import ShardIndex
from affekt.data.split import assert_disjoint, group_fraction, group_of, labelled_clips, where
from affekt.data.transforms import Preprocess
from affekt.pretrain.encoder import Encoder
from affekt.pretrain.engine import AUTOCAST
from affekt.pretrain.flops import encoding_flops, training_flops
from affekt.pretrain.hicmae import HiCMAE
from affekt.pretrain.hicmae_settings import HiCMAESettings
from affekt.pretrain.meters import (
    alignment,
    balanced_accuracy,
    effective_rank,
    modality_gap,
    neighbour_predict,
    recall_at,
    ridge_predict,
    uniformity,
)

# Between two probes training does this many times their arithmetic. Where steps are so quick that starting kernels
# costs more than running them, as on a GPU, the number of steps decides.
TIMES_THE_WORK, LEAST_STEPS = 100, 1000


class OnlineProbeSettings(Settings):
    """Labelled clips to look at during pre-training. Without `shards` there are no probes."""

    shards: str | None = Field(None, description="labelled shards, folder or url; null: no online probes")
    label: str = Field("label", description="metadata field to tell apart")
    test: dict[str, list[str]] = Field({}, description="clips to score, e.g. {split: [test]}; empty: half the groups")
    train: dict[str, list[str]] = Field({}, description="clips to fit on; empty: all that `test` leaves")
    group: str = Field("speaker", description="what may not stand on both sides; id keeps only the clips apart")
    clips: int = Field(256, ge=4, description="at most so many, half on either side, drawn evenly over the labels")
    every: int | None = Field(None, ge=1, description="steps; null: as often as takes about 1 % of the time")

    @model_validator(mode="after")
    def _check(self) -> "OnlineProbeSettings":
        idle = [name for name in self.model_fields_set - {"shards"} if getattr(self, name) != self._default(name)]
        if self.shards is None and idle:
            raise ValueError(f"{', '.join(sorted(idle))}: without effect, for no `shards` are named to look at")
        return self

    @classmethod
    def _default(cls, name: str) -> object:
        return cls.model_fields[name].default


class OnlineProbe:
    """The clips of one rank, and `measure` for all ranks to call at the same steps."""

    def __init__(
        self,
        settings: OnlineProbeSettings,
        model: HiCMAE,
        corpora: list[Corpus],
        window: Window,
        preprocess: Preprocess,
        precision: str,
        global_batch: int,
    ):
        """Reads the clips. Raises SettingsError where they cannot be split or told apart or were prepared otherwise
        than those of training, DataError where one cannot be read."""
        s = model.settings
        index = ShardIndex.open(settings.shards)
        if index.fingerprint not in {corpus.index.fingerprint for corpus in corpora}:
            trained = Corpus(example(corpora), (), name="those to learn from")
            check_together([trained, Corpus(index, (), name="those of the probe")])
        fit, score = split(index, settings, s.streams)
        self.settings = settings
        self.ids = [index.samples[p].id for p in fit + score]
        self.groups = [group_of(index, p, settings.group) for p in fit]
        names = [str(index.samples[p].meta[settings.label]) for p in fit + score]
        self.classes = sorted(set(names))
        self.labels = np.array([self.classes.index(name) for name in names])
        self.fit, self.score = np.arange(len(fit)), np.arange(len(fit), len(names))
        self.every = settings.every or default_interval(s, len(names), global_batch)
        self.encoder = Encoder(s, window, preprocess, {}, model)
        self.precision = precision
        self.device = next(model.parameters()).device
        rank, world_size = dist.get_rank(), dist.get_world_size()
        # Every rank has as many: an engine that shares out the weights needs all ranks in every layer.
        self.per_rank = -(-len(names) // world_size)
        mine = [(fit + score)[n % len(names)] for n in range(rank * self.per_rank, (rank + 1) * self.per_rank)]
        self.batches = read(index, window, mine, s.streams, 16 if self.device.type == "cpu" else 64)

    def due(self, step: int, total_steps: int) -> bool:
        return step % self.every == 0 or step == total_steps

    def notes(self, seen: dict[str, Any]) -> list[str]:
        """What to know of the probe at the start of a run that trains on the clips of `seen`."""
        lines = [
            f"online probe of `{self.settings.label}` every {self.every} steps: {len(self.classes)} classes, "
            f"{len(self.fit)} clips to fit on, {len(self.score)} of other {self.settings.group}s to score"
        ]
        met = len(set(seen["ids"]) & {self.ids[n] for n in self.score})
        if met:
            lines.append(f"online probe: {met} of the clips to score are also trained on, without their labels")
        return lines

    def measure(self) -> dict[str, float]:
        """Scores by name, `probe/linear_both` and so on, the same on every rank but for their seconds; empty when an
        embedding is not finite, of which training itself will speak."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # what is still under way is no time of the probe
        started = time.perf_counter()
        embeddings = {stream: x.cpu().numpy() for stream, x in self.embed().items()}
        if not all(np.isfinite(x).all() for x in embeddings.values()):
            return {}
        values = {f"probe/{name}": value for name, value in self.scores(embeddings).items()}
        return values | {"probe/seconds": time.perf_counter() - started}

    @torch.no_grad()
    def embed(self) -> dict[str, Tensor]:
        """L2-normalised embeddings (n, D) by stream, of the clips of all ranks."""
        half = AUTOCAST.get(self.precision)
        parts: dict[str, list[Tensor]] = {}
        with untouched(self.encoder, self.device), torch.autocast(self.device.type, half, enabled=half is not None):
            for batch in self.batches:
                for stream, x in self.encoder.embed(batch.to(self.device)).items():
                    parts.setdefault(stream, []).append(x.float())
        return {stream: gathered(torch.cat(x))[: len(self.labels)] for stream, x in parts.items()}

    def scores(self, embeddings: dict[str, np.ndarray]) -> dict[str, float]:
        """Linear probe and neighbours on the clips to score, fitted on the others; retrieval among the clips to score;
        geometry of all of them."""
        fit, score = self.fit, self.score
        values = {"chance": 1 / len(self.classes), "clips_fit": len(fit), "clips_score": len(score)}
        for stream, x in embeddings.items():
            linear = ridge_predict(x[fit], self.labels[fit], self.groups, x[score])
            nearest = neighbour_predict(x[fit], self.labels[fit], x[score])
            values[f"linear_{stream}"] = balanced_accuracy(self.labels[score], linear)
            values[f"knn_{stream}"] = balanced_accuracy(self.labels[score], nearest)
            if stream != "both":
                values[f"rank_{stream}"] = effective_rank(x)
                values[f"uniformity_{stream}"] = uniformity(x)
        if len(embeddings) == 3:
            video, audio = embeddings["video"], embeddings["audio"]
            for name, one, other in (("video_to_audio", video, audio), ("audio_to_video", audio, video)):
                values |= {f"{name}_{k}": share for k, share in recall_at(one[score], other[score]).items()}
            values |= {"alignment": alignment(video, audio), "gap": modality_gap(video, audio)}
        return values


def split(index: ShardIndex, settings: OnlineProbeSettings, streams: str) -> tuple[list[int], list[int]]:
    """Positions of the clips to fit on and to score, of those that have a label and every stream of the model.

    Raises SettingsError when a side is empty, a group stands on both, or a class to score cannot be learnt.
    """
    field = settings.group
    clips = labelled_clips(index, settings.label, field)
    wanted = ("video", "audio") if streams == "both" else (streams,)
    clips = [p for p in clips if all(getattr(index.samples, f"has_{stream}")[p] for stream in wanted)]
    if settings.test:
        held = set(where(index, settings.test))
        rest, score = [p for p in clips if p not in held], [p for p in clips if p in held]
    else:
        rest, score = group_fraction(index, clips, field, 0.5)
    fit = [p for p in rest if p in set(where(index, settings.train))] if settings.train else rest
    for side, name, said in ((fit, "fit on", settings.train), (score, "score", settings.test)):
        if not side:
            raise SettingsError(
                f"{index.root}: no clips to {name} ({said or 'all others'}) among the {len(clips)} with the label "
                f"`{settings.label}` and {' and '.join(wanted)}; see train.probe in --print-config"
            )
    assert_disjoint(index, fit, score, field)
    fit, score = (draw(index, side, settings.label, settings.clips // 2) for side in (fit, score))
    known, asked = ({str(index.samples[p].meta[settings.label]) for p in side} for side in (fit, score))
    if asked - known or len(known) < 2:
        raise SettingsError(
            f"{index.root}: a probe of `{settings.label}` has {', '.join(sorted(known))} to fit on and "
            f"{', '.join(sorted(asked))} to score; two classes at least, and each to score among those to fit on"
        )
    return fit, score


def draw(index: ShardIndex, positions: list[int], label: str, most: int) -> list[int]:
    """At most so many of the clips, always the same, evenly over the labels, in the order of the index."""
    order = np.argsort(raw(len(positions), 0, "online probe"), kind="stable")
    seen: Counter[str] = Counter()
    turns = {}
    for position in (positions[n] for n in order):
        name = str(index.samples[position].meta[label])
        turns[position] = seen[name]
        seen[name] += 1
    return sorted(sorted(turns, key=turns.get)[:most])


def read(index: ShardIndex, window: Window, positions: list[int], streams: str, batch_size: int) -> list[Batch]:
    """The middle views of clips, in batches that stay in memory."""
    with torch.random.fork_rng(devices=[]):  # torch's loader draws a seed that nothing here needs
        loader = eval_loader(index, window, indices=positions, batch_size=batch_size, streams=streams)
        batches = list(loader)
    skipped = [text for batch in batches for _, text in batch.skipped]
    if skipped:
        raise DataError(f"{len(skipped)} clips of the online probe cannot be read, first {skipped[0]}")
    return batches


def default_interval(settings: HiCMAESettings, clips: int, global_batch: int) -> int:
    """Steps between two probes, rounded up to two digits, so that they take about 1 % of the time, or less."""
    steps = TIMES_THE_WORK * clips * encoding_flops(settings) / (global_batch * training_flops(settings))
    unit = 10 ** max(len(str(round(steps))) - 2, 0)
    return max(-(-round(steps) // unit) * unit, LEAST_STEPS)


@contextmanager
def untouched(module: nn.Module, device: torch.device):
    """Evaluation inside; outside, every module's mode and the random generators are as they were."""
    modes = {part: part.training for part in module.modules()}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        module.eval()
        try:
            yield
        finally:
            for part, training in modes.items():
                part.training = training


def gathered(x: Tensor) -> Tensor:
    """(n, D) of each rank -> (ranks x n, D) on every rank."""
    if dist.get_world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)
