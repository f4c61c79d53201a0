"""Which clips a step sees, and the random numbers of each clip: pure functions of seed, epoch and id.

Rank, worker count and position in the run decide nothing here, so any of them may change between two runs. Numbers come
from Philox's raw stream, which numpy keeps the same for ever; what `numpy.random.Generator` makes of it may change.
"""

import hashlib
from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from affekt.data.errors import SettingsError


def sample_order(shard_of_sample: np.ndarray, seed: int, epoch: int, block_shards: int = 16) -> np.ndarray:
    """The order (N,) int64 of all samples in an epoch, given the shard (N,) each lies in.

    Shards are permuted, then samples are shuffled within blocks of `block_shards` of them: reading stays local.
    """
    shards, inverse = np.unique(np.asarray(shard_of_sample), return_inverse=True)
    place = np.empty(len(shards), np.int64)
    place[np.argsort(raw(len(shards), seed, epoch, "shards"), kind="stable")] = np.arange(len(shards))
    return np.lexsort((raw(len(inverse), seed, epoch, "samples"), place[inverse] // block_shards))


def clip_key(seed: int, epoch: int, clip: str) -> int:
    """The int64 key of one clip in one epoch, from which everything random about its view may be drawn."""
    return int.from_bytes(_digest(seed, epoch, clip)[:8], "little", signed=True)


def raw(count: int, *key: int | str) -> np.ndarray:
    """`count` random uint64 that depend on nothing but the key."""
    return np.random.Philox(key=int.from_bytes(_digest(*key)[:16], "little")).random_raw(count)


def uniform(count: int, *key: int | str) -> np.ndarray:
    """`count` float64 in [0, 1) that depend on nothing but the key."""
    return (raw(count, *key) >> np.uint64(11)) * 2.0**-53


def _digest(*key: int | str) -> bytes:
    return hashlib.blake2b("\0".join(map(str, key)).encode(), digest_size=16).digest()


class Plan:
    """The clips of every step of a run: step -> epoch and slots; (epoch, slot) -> position of a clip in the index.

    `positions` are the clips that may be used. The tail of an epoch that does not fill a global batch is dropped; which
    clips that meets changes with the epoch. Raises SettingsError when there are fewer clips than a batch holds.
    """

    def __init__(self, shard_of_sample: np.ndarray, positions: np.ndarray, global_batch: int, seed: int):
        self.shard_of_sample = np.asarray(shard_of_sample)
        self.positions = np.unique(np.asarray(positions, np.int64))
        self.global_batch, self.seed = global_batch, seed
        if len(self.positions) < global_batch:
            raise SettingsError(f"{len(self.positions)} clips do not fill a global batch of {global_batch}; lower it")
        self.steps_per_epoch, self.dropped_per_epoch = divmod(len(self.positions), global_batch)

    def slots(self, step: int, rank: int = 0, world_size: int = 1) -> tuple[int, range]:
        """The epoch of a step, and the slots of its order that the rank takes: a slice of the global batch."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        share = self.global_batch // world_size
        first = batch * self.global_batch + rank * share
        return epoch, range(first, first + share)

    def shards(self, step: int, rank: int = 0, world_size: int = 1) -> list[int]:
        """The shards in which the clips planned for a rank's share of a step lie, repetitions included."""
        epoch, slots = self.slots(step, rank, world_size)
        return self.shard_of_sample[_allowed_order(self, epoch)[slots.start : slots.stop]].tolist()

    def candidates(self, epoch: int, slot: int) -> Iterator[int]:
        """The clip planned for a slot, then those that take its place, in turn, should it be unreadable.

        These start at the same slot of the next batch: a step seldom meets the same clip twice, and no rank has to
        know what another one skipped.
        """
        order = _allowed_order(self, epoch)
        yield int(order[slot])
        for ahead in range(len(order)):
            other = (slot + self.global_batch + ahead) % len(order)
            if other != slot:
                yield int(order[other])


@lru_cache(maxsize=2)  # the epoch in work, and the one that prefetching may have begun
def _allowed_order(plan: Plan, epoch: int) -> np.ndarray:
    allowed = np.zeros(len(plan.shard_of_sample), bool)
    allowed[plan.positions] = True
    order = sample_order(plan.shard_of_sample, plan.seed, epoch)
    return order[allowed[order]]
