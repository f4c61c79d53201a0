"""How many clips were used and skipped: exact over ranks and resumes, and a budget that stops a run."""

import subprocess
import sys

import pytest
import torch

from affekt.data.accounting import Accounting
from affekt.data.batch import Batch
from affekt.data.errors import DataError


def batch_of(used, skipped):
    empty = torch.zeros(0)
    return Batch([f"c{i}" for i in range(used)], None, None, *[empty] * 5, skipped=skipped)


def test_accounting_and_its_budget():
    accounting = Accounting()
    for _ in range(10):
        accounting.add(batch_of(99, [("x", "checksum: shard-000001.tar: clip x")]))
    assert (accounting.planned, accounting.used, accounting.causes) == (1000, 990, {"checksum": 10})
    accounting.check()  # 1.0 % is within the budget
    for i in range(30):
        accounting.add(batch_of(0, [(f"y{i}", f"decode: shard-000002.tar: clip y{i % 6}")]))
    with pytest.raises(DataError) as error:
        accounting.check()
    assert error.value.exit_code == 2
    lines = str(error.value).splitlines()
    assert lines[0].startswith("40 of 1030 clips (3.9%)") and "decode 30, checksum 10" in lines[0]
    assert len(lines) == 6 and lines[1] == "  10 times checksum: shard-000001.tar: clip x"
    accounting.check(budget=0.05)


def test_few_bad_clips_of_a_small_set_are_no_reason_to_stop():
    accounting = Accounting()
    accounting.add(batch_of(5, [(f"x{i}", "decode: x") for i in range(10)]))
    accounting.check()
    accounting.add(batch_of(0, [("x", "decode: x")]))
    with pytest.raises(DataError):
        accounting.check()


def test_accounting_goes_on_after_a_resume():
    accounting = Accounting()
    accounting.add(batch_of(8, [("x", "read: x")]))
    summed = accounting.summed_over_ranks()
    again = Accounting.from_dict(summed.to_dict())
    assert again.summed_over_ranks().to_dict() == summed.to_dict()
    again.add(batch_of(4, [("x", "read: x"), ("y", "decode: y")]))
    assert again.summed_over_ranks().to_dict() == {
        "planned": 15,
        "used": 12,
        "causes": {"read": 2, "decode": 1},
        "skipped": {"read: x": 2, "decode: y": 1},
    }


def test_accounting_is_summed_over_ranks(tmp_path):
    """Two processes that count different things get the same sum, resumed or not, and both stop over budget."""
    script = f"""
import sys
import torch, torch.distributed as dist
from affekt.data.accounting import Accounting
from affekt.data.batch import Batch
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://{tmp_path}/meet", rank=rank, world_size=2)
a = Accounting.from_dict({{"used": 100, "skipped": {{"read: old": 2}}}})
z = torch.zeros(0)
bad = [("x", "decode: " + "x" * 50)] * 12 if rank else []
a.add(Batch(["c"] * (5 + rank), None, None, z, z, z, z, z, skipped=bad))
s = a.summed_over_ranks()
print(s.planned, s.used, s.causes)
try:
    s.check()
except Exception as error:
    print(type(error).__name__)
dist.destroy_process_group()
"""
    command = [sys.executable, "-c", script]
    ranks = [subprocess.Popen([*command, str(r)], stdout=subprocess.PIPE, text=True) for r in (0, 1)]
    output = [rank.communicate(timeout=90)[0] for rank in ranks]
    assert output[0] == output[1] == "125 111 {'decode': 12, 'read': 2}\nDataError\n"
