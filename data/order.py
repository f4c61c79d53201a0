"""Which clips a step sees, and the random numbers of each clip: pure functions of seed, epoch and id.

Rank, worker count and position in the run decide nothing here, so any of them may change between two runs. Numbers come
from Philox's raw stream, which numpy keeps the same for ever; what `numpy.random.Generator` makes of it may change.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

import numpy as np

from affekt.data.errors import SettingsError


def sample_order(
    shard_of_sample: np.ndarray, seed: int, epoch: int, block_shards: int = 16, corpus: str = ""
) -> np.ndarray:
    """The order (N,) int64 of all samples in an epoch, given the shard (N,) each lies in.

    Shards are permuted, then samples are shuffled within blocks of `block_shards` of them: reading stays local.
    """
    shards, inverse = np.unique(np.asarray(shard_of_sample), return_inverse=True)
    key = (seed, epoch, corpus) if corpus else (seed, epoch)
    place = np.empty(len(shards), np.int64)
    place[np.argsort(raw(len(shards), *key, "shards"), kind="stable")] = np.arange(len(shards))
    return np.lexsort((raw(len(inverse), *key, "samples"), place[inverse] // block_shards))


def clip_key(seed: int, epoch: int, clip: str) -> int:
    """The int64 key of one clip in one epoch, from which everything random about its view may be drawn."""
    return int.from_bytes(_digest(seed, epoch, clip)[:8], "little", signed=True)


def speaker_number(corpus: str, speaker: object) -> int:
    """An int64 of at least 0 that stands for a speaker of a corpus; -1 where none is named."""
    return -1 if speaker in (None, "") else int.from_bytes(_digest("speaker", corpus, str(speaker))[:8], "little") >> 1


def raw(count: int, *key: int | str) -> np.ndarray:
    """`count` random uint64 that depend on nothing but the key."""
    return np.random.Philox(key=int.from_bytes(_digest(*key)[:16], "little")).random_raw(count)


def uniform(count: int, *key: int | str) -> np.ndarray:
    """`count` float64 in [0, 1) that depend on nothing but the key."""
    return (raw(count, *key) >> np.uint64(11)) * 2.0**-53


def _digest(*key: int | str) -> bytes:
    return hashlib.blake2b("\0".join(map(str, key)).encode(), digest_size=16).digest()


def shares(weights: Sequence[float], total: int) -> list[int]:
    """`total` divided by weights, to whole numbers: what is left over goes to the largest remainders."""
    exact = [Fraction(weight) for weight in weights]  # no rounding that another machine could do otherwise
    quotas = [weight * total / sum(exact) for weight in exact]
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(counts)), key=lambda i: counts[i] - quotas[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def interleaved(counts: Sequence[int]) -> np.ndarray:
    """Which of the parts stands at each of sum(counts) places, int64, every part spread as evenly as can be."""
    part = np.repeat(np.arange(len(counts)), counts)
    time = np.concatenate([(np.arange(count) + 0.5) / max(count, 1) for count in counts])
    return part[np.lexsort((part, time))]


@dataclass(frozen=True, eq=False)
class Source:
    """A corpus as the order sees it: the shard (N,) each of its clips lies in, which may be used, its share, its name.

    The name keeps the random numbers of several corpora apart; a corpus alone goes without.
    """

    shard_of_sample: np.ndarray
    positions: Sequence[int] | np.ndarray
    weight: float | None = None
    name: str = ""


class Pick(NamedTuple):
    """A clip: the number of its corpus, how often all clips of that corpus were met before, its position there."""

    corpus: int
    turn: int
    position: int


class _Epoch(NamedTuple):
    corpus: np.ndarray  # (E,) of every slot; likewise the turn and the position
    turn: np.ndarray
    position: np.ndarray

    def pick(self, slot: int) -> Pick:
        return Pick(int(self.corpus[slot]), int(self.turn[slot]), int(self.position[slot]))


class Plan:
    """The clips of every step of a run: step -> epoch and slots; (epoch, slot) -> a clip of one of the sources.

    One source, by default: an epoch is all its clips in a new order. The tail that does not fill a batch is dropped;
    which clips that meets changes with the epoch.

    Several sources, or `epoch_clips`: an epoch has `epoch_clips` slots (all clips, by default), cut to whole batches.
    Each source has its share of them to the clip, spread evenly, so that a batch holds it too, up to rounding. A
    source takes its clips in turns, all of them once in a new order, then again, across the ends of epochs: at any
    moment of a run a clip was planned as often as any other of its source, or once more. Weights are relative; where no
    source states one, the numbers of clips are, so that each clip comes once an epoch.

    `batch` counts clips over all ranks. Raises SettingsError when an epoch does not fill one, or a source's share of it
    is not one clip.
    """

    def __init__(self, sources: Sequence[Source], batch: int, seed: int, epoch_clips: int | None = None):
        self.sources, self.batch, self.seed = sources, batch, seed
        self.turns: dict[int, dict[int, np.ndarray]] = {}  # source -> turn -> order, see `_turn_order`
        self.positions = [np.unique(np.asarray(source.positions, np.int64)) for source in sources]
        clips = [len(positions) for positions in self.positions]
        length = epoch_clips or sum(clips)
        if length < batch:
            raise SettingsError(f"{length} clips do not fill a global batch of {batch}; lower it")
        self.steps_per_epoch, tail = divmod(length, batch)
        self.continues = len(sources) > 1 or epoch_clips is not None
        self.epoch_clips = length - tail if self.continues else length
        self.dropped_per_epoch = 0 if self.continues else tail
        stated = [source.weight for source in sources if source.weight is not None]
        if stated and len(stated) < len(sources):
            raise SettingsError("some corpora of a mixture state a weight and others do not; state all or none")
        self.shares = shares(stated or clips, self.epoch_clips)
        for source, share, count in zip(sources, self.shares, clips, strict=True):
            if not share or not count:
                raise SettingsError(
                    f"{source.name}: {count} clips and weight {source.weight} give it none of the {self.epoch_clips} "
                    "clips of an epoch; raise data.epoch_clips or its weight, or leave it out"
                )

    def slots(self, step: int, rank: int = 0, world_size: int = 1) -> tuple[int, range]:
        """The epoch of a step, and the slots of its order that the rank takes: a slice of the global batch."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        share = self.batch // world_size
        first = batch * self.batch + rank * share
        return epoch, range(first, first + share)

    def shards(self, step: int, rank: int = 0, world_size: int = 1) -> list[int]:
        """The shards in which the clips planned for a rank's share of a step lie, repetitions included."""
        epoch, slots = self.slots(step, rank, world_size)
        picks = map(_epoch_order(self, epoch).pick, slots)
        return [int(self.sources[pick.corpus].shard_of_sample[pick.position]) for pick in picks]

    def candidates(self, epoch: int, slot: int) -> Iterator[Pick]:
        """The clip planned for a slot, then those of its source that take its place, in turn, should it be unreadable.

        These start at the same slot of the next batch: a step seldom meets the same clip twice, and no rank has to
        know what another one skipped.
        """
        order = _epoch_order(self, epoch)
        planned = order.pick(slot)
        yield planned
        tried = {planned.position}
        mine = np.flatnonzero(order.corpus == planned.corpus)
        begin = np.searchsorted(mine, (slot + self.batch) % len(order.corpus))
        picks = map(order.pick, np.roll(mine, -begin))
        # A small share of an epoch may be all unreadable where the source is not: then its other clips, in their order.
        others = (
            Pick(planned.corpus, planned.turn, int(position))
            for turn in (planned.turn, planned.turn + 1)
            for position in _turn_order(self, planned.corpus, turn)
        )
        for pick in chain(picks, others):
            if pick.position not in tried:
                tried.add(pick.position)
                yield pick


@lru_cache(maxsize=2)  # the epoch in work, and the one that prefetching may have begun
def _epoch_order(plan: Plan, epoch: int) -> _Epoch:
    if not plan.continues:
        position = _turn_order(plan, 0, epoch)
        return _Epoch(*(np.broadcast_to(np.int64(x), len(position)) for x in (0, epoch)), position)
    corpus = interleaved(plan.shares)
    turn, position = np.empty_like(corpus), np.empty_like(corpus)
    for number, share in enumerate(plan.shares):
        count, first = len(plan.positions[number]), epoch * share
        turns = range(first // count, (first + share - 1) // count + 1)
        taken = [_turn_order(plan, number, t)[max(0, first - t * count) : first + share - t * count] for t in turns]
        mine = corpus == number
        turn[mine], position[mine] = (first + np.arange(share)) // count, np.concatenate(taken)
    return _Epoch(corpus, turn, position)


def _turn_order(plan: Plan, number: int, turn: int) -> np.ndarray:
    """Positions of the clips of a source that may be used, in the order of one turn. The plan keeps two turns of each:
    an epoch shorter than a source takes the same turn up again."""
    kept = plan.turns.setdefault(number, {})
    if turn not in kept:
        while len(kept) > 1:
            del kept[next(iter(kept))]
        kept[turn] = _shuffled(plan, number, turn)
    return kept[turn]


def _shuffled(plan: Plan, number: int, turn: int) -> np.ndarray:
    source = plan.sources[number]
    allowed = np.zeros(len(source.shard_of_sample), bool)
    allowed[plan.positions[number]] = True
    order = sample_order(source.shard_of_sample, plan.seed, turn, corpus=source.name)
    return order[allowed[order]]
