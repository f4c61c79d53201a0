"""The order of clips and their random numbers are functions of seed, epoch and id, and of nothing else."""

import random
import subprocess
import sys
from itertools import islice

import numpy as np
import pytest
from scipy.stats import kstest

from affekt.data.errors import SettingsError
from affekt.data.order import Plan, Source, clip_key, raw, sample_order, uniform


def shards_of(sizes):
    return np.repeat(np.arange(len(sizes)), sizes)


def alone(shards, positions, batch, seed):
    return Plan([Source(shards, positions)], batch, seed)


def planned(plan, epoch, slots):
    return [next(plan.candidates(epoch, slot)).position for slot in slots]


def test_every_sample_once():
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(300):
        shards = shards_of([rng.choice([0, 1, 2, 37, 100]) for _ in range(rng.randrange(1, 12))])
        order = sample_order(shards, rng.randrange(100), rng.randrange(100), block_shards=rng.choice([1, 2, 5, 16]))
        assert order.dtype == np.int64
        assert sorted(order) == list(range(len(shards)))


def test_seed_and_epoch_decide():
    shards = shards_of([10] * 20)
    assert (sample_order(shards, 1, 2) == sample_order(shards, 1, 2)).all()
    assert (sample_order(shards, 1, 2) != sample_order(shards, 1, 3)).any()
    assert (sample_order(shards, 1, 2) != sample_order(shards, 2, 2)).any()


def test_the_numbers_are_those_of_every_machine_and_release():
    """Written down once: a change here breaks the resume of every run."""
    assert raw(2, 7, 3, "clip").tolist() == RAW
    assert clip_key(7, 3, "clip") == KEY
    assert sample_order(shards_of([2, 3, 1]), 7, 3, block_shards=2).tolist() == ORDER


def test_another_process_with_another_hash_seed_agrees():
    code = "from affekt.data.order import *; print(sample_order([0, 0, 1, 1, 2], 5, 6).tolist(), clip_key(1, 2, 'x'))"
    here = f"{sample_order([0, 0, 1, 1, 2], 5, 6).tolist()} {clip_key(1, 2, 'x')}"
    for hash_seed in ("1", "2"):
        done = subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": hash_seed}, capture_output=True)
        assert done.stdout.decode().strip() == here


def test_reading_stays_within_a_block_of_shards():
    shards = shards_of([10] * 20)
    read = shards[sample_order(shards, 0, 0, block_shards=4)]
    blocks = [set(read[i : i + 40]) for i in range(0, 200, 40)]
    assert [len(block) for block in blocks] == [4] * 5
    assert set().union(*blocks) == set(range(20))
    assert len(set(read[:10])) > 1  # mixed within the block


def test_samples_and_shards_are_spread_evenly():
    """Over many epochs each of 12 samples in 4 shards comes first about equally often."""
    shards = shards_of([3] * 4)
    first = np.bincount([sample_order(shards, 0, epoch, block_shards=2)[0] for epoch in range(2400)], minlength=12)
    assert (abs(first - 200) < 5 * np.sqrt(200)).all()


def test_uniform_numbers_are_uniform_and_keyed():
    values = np.concatenate([uniform(10, 0, 0, f"clip{i}") for i in range(500)])
    assert kstest(values, "uniform").pvalue > 1e-4
    assert len({clip_key(s, e, f"c{i}") for s in range(5) for e in range(5) for i in range(40)}) == 1000
    assert uniform(1, 1, 12, "a") != uniform(1, 11, 2, "a")  # the parts of a key do not run together


def test_exactly_once_for_any_world_and_workers():
    """Every allowed clip at most once per epoch, all but the named tail, whoever makes which of the batches."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    tried = 0
    while tried < 2000:
        size, world, share = rng.randrange(1, 501), rng.choice([1, 2, 3, 4, 8]), rng.choice([1, 4, 7])
        shards = np.sort([rng.randrange(7) for _ in range(size)])
        allowed = [i for i in range(size) if rng.random() < 0.8]
        if len(allowed) < world * share:
            continue
        tried += 1
        workers, epoch = rng.choice([0, 1, 3]), rng.randrange(5)
        plans = [alone(shards, allowed, world * share, seed) for _ in range(max(1, workers))]  # each has its own
        steps = range(epoch * plans[0].steps_per_epoch, (epoch + 1) * plans[0].steps_per_epoch)
        seen = []
        for number, step in enumerate(steps):
            plan = plans[number % len(plans)]
            for rank in range(world):
                found, slots = plan.slots(step, rank, world)
                assert found == epoch and len(slots) == share
                seen += planned(plan, epoch, slots)
        assert len(set(seen)) == len(seen) and set(seen) <= set(allowed)
        assert len(seen) + plan.dropped_per_epoch == len(allowed) and plan.dropped_per_epoch < world * share


def test_the_global_batch_does_not_depend_on_the_world():
    plan = alone(shards_of([30, 41, 5]), range(76), 12, seed=3)

    def batches(world):
        slots = [[s for r in range(world) for s in plan.slots(step, r, world)[1]] for step in range(20)]
        return [planned(plan, step // 6, batch) for step, batch in enumerate(slots)]

    assert plan.steps_per_epoch == 6
    assert batches(1) == batches(2) == batches(3) == batches(12)


def test_what_takes_the_place_of_a_clip():
    plan = alone(shards_of([20]), range(20), 5, seed=0)
    order = planned(plan, 2, range(20))
    candidates = [pick.position for pick in plan.candidates(2, 3)]
    assert sorted(candidates) == list(range(20))  # all of them, each once
    assert candidates[:3] == [order[3], order[8], order[9]]
    whole = alone(shards_of([5]), range(5), 5, seed=0)
    assert sorted(pick.position for pick in islice(whole.candidates(0, 4), 5)) == list(range(5))


def test_too_few_clips():
    with pytest.raises(SettingsError, match="3 clips do not fill a global batch of 4"):
        alone(shards_of([9]), [1, 2, 3], 4, seed=0)


def test_a_large_corpus_is_ordered_quickly():
    order = sample_order(shards_of([1000] * 1000), 0, 0)
    assert len(order) == 1_000_000 and len(set(order[:1000] // 1000)) <= 16


RAW = [3426599160363772610, 3180805278407021219]
KEY = -1849352298148798422
ORDER = [1, 0, 2, 4, 3, 5]


def test_a_source_with_a_small_share_has_all_its_clips_to_take_a_place():
    small, large = np.zeros(50, int), np.ones(50, int)
    plan = Plan([Source(small, np.arange(50), 1.0, "a"), Source(large, np.arange(50), 99.0, "b")], 10, 0, 100)
    assert plan.shares == [1, 99]
    slot = next(slot for slot in range(100) if next(plan.candidates(0, slot)).corpus == 0)
    for epoch in (0, 49, 50):  # the last turn's end, too
        slots = [slot for slot in range(100) if next(plan.candidates(epoch, slot)).corpus == 0]
        found = list(plan.candidates(epoch, slots[0]))
        assert sorted(pick.position for pick in found) == list(range(50)) and {pick.corpus for pick in found} == {0}
    assert slot == slots[0]


def test_a_plan_keeps_two_turns_of_each_source():
    plan = Plan([Source(np.zeros(6, int), np.arange(6))], 2, 0)
    for step in range(60):
        epoch, slots = plan.slots(step)
        next(plan.candidates(epoch, slots[0]))
    assert {number: len(turns) for number, turns in plan.turns.items()} == {0: 2}
