"""How many clips were used and skipped: exact over ranks and resumes, and a budget that stops a run."""

import os
import random
import socket
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch

from affekt.data.accounting import Accounting
from affekt.data.batch import Batch
from affekt.data.errors import DataError
from affekt.data.order import Plan, Source


def batch_of(used, skipped, repeats=1):
    empty = torch.zeros(0)
    return Batch([f"c{i}" for i in range(used)], None, None, *[empty] * 5, skipped=skipped, repeats=repeats)


def test_accounting_and_its_budget():
    accounting = Accounting()
    for step in range(10):
        accounting.add(batch_of(99, [("x", "checksum: shard-000001.tar: clip x")]), step)
    assert (accounting.planned, accounting.used, accounting.causes) == (1000, 990, {"checksum": 10})
    assert str(accounting) == "1000 clips planned = 990 used + 10 skipped, checksum 10"
    accounting.check(0.01)  # 1.0 % is within the budget
    for i in range(30):
        accounting.add(batch_of(0, [(f"y{i}", f"decode: shard-000002.tar: clip y{i % 6}")]))
    with pytest.raises(DataError) as error:
        accounting.check(0.01)
    assert error.value.exit_code == 2
    lines = str(error.value).splitlines()
    assert lines[0].startswith("40 of 1030 clips (3.9%)") and "decode 30, checksum 10" in lines[0]
    assert len(lines) == 6 and lines[1] == "  10 times checksum: shard-000001.tar: clip x"
    accounting.check(0.05)


@pytest.mark.parametrize(("rate", "stops"), [(0, False), (0.005, False), (0.05, True), (1.0, True)])
def test_the_budget_stops_within_a_thousand_clips_or_not_at_all(rate, stops):
    accounting, owed, stopped_at = Accounting(), 0.0, None
    for step in range(500):
        owed += 10 * rate
        bad, owed = int(owed), owed - int(owed)
        accounting.add(batch_of(10 - bad, [("x", "decode: x")] * bad), step)
        try:
            accounting.check(0.01)
        except DataError:
            stopped_at = accounting.planned
            break
    assert (stopped_at is not None and stopped_at <= 1000) == stops


def test_few_bad_clips_of_a_small_set_are_no_reason_to_stop():
    accounting = Accounting()
    accounting.add(batch_of(5, [(f"x{i}", "decode: x") for i in range(10)]))
    accounting.check(0.01)
    accounting.add(batch_of(0, [("x", "decode: x")]))
    accounting.check(0.011)
    for budget in (0.01, 0.0):
        with pytest.raises(DataError):
            accounting.check(budget)


def test_a_finished_run_is_judged_by_what_it_planned():
    accounting = Accounting()
    accounting.add(batch_of(9, [("x", "decode: x")]))
    accounting.check(0.01)
    accounting.check(0.1, finished=True)
    with pytest.raises(DataError, match=r"^training is complete and its checkpoints are kept, but 1 of 10 clips"):
        accounting.check(0.01, finished=True)


def test_views_of_a_clip_count_once_and_blank_rows_as_padded():
    accounting, blank = Accounting(), batch_of(6, [], repeats=3)
    blank.ids = [""] * 6
    accounting.add(batch_of(6, [("x", "read: x")], repeats=3))
    accounting.add(blank)
    assert (accounting.planned, accounting.used, accounting.padded) == (5, 2, 2)
    assert str(accounting) == "5 clips planned = 2 used + 1 skipped, read 1 + 2 padded"


def test_the_ledger_tells_where_each_clip_stood():
    def ledger(*batches):
        accounting = Accounting()
        for step, rank, ids in batches:
            batch = batch_of(0, [])
            batch.ids = ids
            accounting.add(batch, step, rank)
        return accounting.ledger

    straight = ledger((0, 0, ["a", "b", "c", "d"]), (1, 0, ["e", "f", "g", "h"]))
    parts = [(0, 0, ["a", "b"]), (0, 1, ["c", "d"]), (1, 0, ["e", "f"]), (1, 1, ["g", "h"])]
    assert sum(ledger(part) for part in parts) % 2**64 == straight == ledger(*reversed(parts))
    for other in (
        [(0, 0, ["b", "a", "c", "d"]), (1, 0, ["e", "f", "g", "h"])],
        [(1, 0, ["a", "b", "c", "d"]), (0, 0, ["e", "f", "g", "h"])],
        [(0, 0, ["a", "b", "c", "d"]), (1, 0, ["e", "f", "g"])],
    ):
        assert ledger(*other) != straight


def test_the_ledger_of_a_run_in_pieces_is_that_of_the_straight_run():
    """Two processes, then one, then four, cut at random steps."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(20):
        plan = Plan([Source(np.repeat(np.arange(5), 11), range(55))], 8, rng.randrange(99))

        def count(accounting, steps, world, rank, plan=plan):
            for step in steps:
                epoch, slots = plan.slots(step, rank, world)
                batch = batch_of(0, [])
                batch.ids = [f"clip{next(plan.candidates(epoch, slot)).position}" for slot in slots]
                accounting.add(batch, step, rank)
            return accounting

        straight = count(Accounting(), range(60), 1, 0).to_dict()
        cuts, pieces = [0, *sorted(rng.sample(range(1, 60), 2)), 60], Accounting()
        for world, (start, end) in zip((2, 1, 4), pairwise(cuts), strict=True):
            ranks = [count(Accounting(), range(start, end), world, rank) for rank in range(world)]
            pieces = Accounting.from_dict(pieces.summed_over_ranks().to_dict())  # each rank has its own in a run
            for rank in ranks:
                pieces.used, pieces.ledger = pieces.used + rank.used, (pieces.ledger + rank.ledger) % 2**64
        assert pieces.summed_over_ranks().to_dict() == straight


def test_accounting_goes_on_after_a_resume():
    accounting = Accounting()
    accounting.add(batch_of(8, [("x", "read: x")]))
    summed = accounting.summed_over_ranks()
    again = Accounting.from_dict(summed.to_dict())
    assert again.summed_over_ranks().to_dict() == summed.to_dict()
    again.add(batch_of(4, [("x", "read: x"), ("y", "decode: y")]), 1)
    accounting.add(batch_of(4, [("x", "read: x"), ("y", "decode: y")]), 1)
    found = again.summed_over_ranks().to_dict()
    assert found == accounting.to_dict()
    assert found | {"ledger": ""} == {
        "planned": 15,
        "used": 12,
        "padded": 0,
        "causes": {"read": 2, "decode": 1},
        "skipped": {"read: x": 2, "decode: y": 1},
        "ledger": "",
    }


RANK = """
import sys
import torch, torch.distributed as dist
from affekt.data.accounting import Accounting
from affekt.data.batch import Batch
rank, port = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
a = Accounting.from_dict({"used": 100, "skipped": {"read: old": 2}})
z = torch.zeros(0)
bad = [("x", "decode: " + "x" * 50)] * 12 if rank else []
a.add(Batch(["c"] * (5 + rank), None, None, z, z, z, z, z, skipped=bad), 0, rank)
s = a.summed_over_ranks()
print(s.planned, s.used, s.causes, s.ledger)
try:
    a.check(0.013)  # 12 bad ones on one rank alone would be within it, with the 2 from before the resume they are not
except Exception as error:
    print(type(error).__name__)
a.check(0.014)
dist.destroy_process_group()
"""


def test_accounting_is_summed_over_ranks():
    """Two processes that count different things get the same sum, resumed or not, and both stop over budget, though
    the bad clips are all on one of them."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    command, environment = [sys.executable, "-c", RANK], {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([*command, r, port], stdout=subprocess.PIPE, text=True, env=environment) for r in "01"]
    output = [rank.communicate(timeout=90)[0].splitlines() for rank in ranks]
    assert output[0] == output[1] and [rank.returncode for rank in ranks] == [0, 0]
    assert output[0][0].startswith("125 111 {'decode': 12, 'read': 2} ") and output[0][1:] == ["DataError"]
