"""Which steps are taken, what the guard asks for, what replicas and heartbeats tell: without any other process."""

import json
import math
import os
import random
import subprocess
import sys
import time
import weakref

import pytest
import torch

from affekt.data.errors import HealthError
from affekt.pretrain import loop
from affekt.pretrain.guard import GoBack, Guard, GuardSettings, median_of_known
from affekt.pretrain.replicas import bit_sum, differences
from affekt.pretrain.settings import PretrainSettings
from affekt.pretrain.watchdog import Watchdog

CPU = torch.device("cpu")


def guarded(guard: Guard, losses: list[float], start: int = 0) -> list[bool]:
    """Which of these steps are taken."""
    return [not guard.judge(start + n, torch.tensor(loss), torch.tensor(1.0)) for n, loss in enumerate(losses)]


def test_the_limit_is_that_of_the_slow_twin():
    seed = random.randrange(10**6)
    print("seed", seed)
    rng = random.Random(seed)
    guard, kept, window, mads = Guard(GuardSettings(window=10, mads=4), CPU), [], 10, 4
    for step in range(300):
        loss = rng.choice([rng.gauss(3, 0.1), rng.gauss(3, 0.1), rng.gauss(3, 0.1), rng.uniform(2, 9), float("nan")])
        loss = float(torch.tensor(loss))
        past = sorted(kept[-window:])
        limit = math.inf
        if len(past) >= window // 2:
            median = past[(len(past) - 1) // 2]  # the lower one of two, as torch's
            mad = sorted(abs(x - median) for x in past)[(len(past) - 1) // 2]
            limit = median + mads * max(mad, 0.01 * median)
        expected = loss <= limit
        assert guarded(guard, [loss], step) == [expected], (step, loss, limit)
        kept += [loss] if expected else []
    skips = guard.look()
    assert {action["why"] for action in skips} == {"spike", "not finite"}
    assert all(action["loss"] == "nan" for action in skips if action["why"] == "not finite")
    again = Guard(GuardSettings(window=10, mads=4), CPU, json.loads(json.dumps(guard.to_dict(), allow_nan=False)))
    more = [rng.uniform(2, 5) for _ in range(50)]
    assert guarded(again, more) == guarded(guard, more)


@pytest.mark.parametrize("loss, norm", [(float("nan"), 1.0), (1.0, float("nan")), (1.0, float("inf")), (-math.inf, 1)])
def test_a_bad_step_leaves_the_optimiser_alone_and_the_next_one_moves_it(loss, norm):
    model = torch.nn.Linear(5, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    guard, told = Guard(GuardSettings(mads=None), CPU), []
    for step, bad in enumerate([False, True, False]):
        before = [bit_sum(x).item() for x in model.parameters()]
        steps = [float(state["step"]) for state in optimizer.state.values()]
        model(torch.ones(2, 5)).square().sum().backward()
        figures = (loss, norm) if bad else (1.0, 1.0)
        optimizer.found_inf = guard.judge(step, *map(torch.tensor, map(float, figures)))
        optimizer.step()
        told += [action["step"] for action in guard.look()]
        assert ([bit_sum(x).item() for x in model.parameters()] == before) is bad
        assert not bad or [float(state["step"]) for state in optimizer.state.values()] == steps
    assert told == [1]


def test_the_median_of_what_is_known_is_that_of_torch():
    for known in range(12):
        x = torch.full((12,), float("nan"))
        x[torch.randperm(12)[:known]] = torch.randn(known)
        assert torch.equal(median_of_known(x).isnan(), x.nanmedian().isnan())
        assert known == 0 or median_of_known(x) == x.nanmedian()


def test_overflow_of_a_scaled_loss_is_no_illness():
    guard = Guard(GuardSettings(max_skips=0), CPU)
    for step in range(10):
        assert guard.judge(step, torch.tensor(1.0), torch.tensor(float("inf")), scaled=True) == 1.0
    assert guard.look() == [] and not guard.must_go_back()
    guard.judge(10, torch.tensor(float("nan")), torch.tensor(1.0), scaled=True)
    guard.look()
    with pytest.raises(HealthError, match="not finite"):
        guard.must_go_back()


def test_spikes_go_back_past_the_bad_window_and_then_stop(tmp_path):
    settings = GuardSettings(window=4, max_skips=2, rollbacks=1)
    checkpoints = [tmp_path / f"step-{step:08d}" for step in (4, 8, 12)]
    guard = Guard(settings, CPU)
    assert guarded(guard, [3.0] * 12 + [30.0] * 3) == [True] * 12 + [False] * 3
    guard.look()
    assert guard.must_go_back()
    assert guard.last_good(checkpoints) == checkpoints[1]  # from that of step 12 not one step went well
    with pytest.raises(HealthError, match="no checkpoint from before"):
        guard.last_good(checkpoints[2:])
    state = {"step": 8, "guard": {"losses": [3.0] * 4, "row": [], "actions": []}}
    onwards = GoBack(checkpoints[1], 15, guard.actions, {"used": 1}).onwards(state)
    assert onwards["step"] == 15 and [a["action"] for a in onwards["guard"]["actions"]] == ["skip"] * 3 + ["rollback"]

    guard = Guard(settings, CPU, onwards["guard"])
    assert guarded(guard, [3.0, 30.0, 30.0, 30.0], 15) == [True, False, False, False]
    guard.look()
    assert guard.last_good([*checkpoints, tmp_path / "step-00000015"]).name == "step-00000015"
    assert guard.last_good(checkpoints) == checkpoints[1]  # the one of step 12 was undone
    with pytest.raises(HealthError, match="rollbacks=1 leaves no way back"):
        guard.must_go_back()


def test_a_run_that_goes_back_lets_go_of_what_it_had(tmp_path, monkeypatch):
    class Model:
        pass

    left = []

    def train(*_):
        if left:
            return left[0]()
        model = Model()
        left.append(weakref.ref(model))
        raise GoBack(tmp_path, 1, [], {})

    monkeypatch.setattr(loop, "_train", train)
    monkeypatch.setattr(loop, "start_processes", lambda *_: (0, 1, CPU))
    given = {"out": str(tmp_path / "run"), "model": {"name": "hicmae_nano"}, "data": {"shards": "s"}}
    assert loop.pretrain(PretrainSettings.parse({**given, "train": {"steps": 1}})) is None


def test_one_bit_anywhere_changes_a_tensors_sum():
    seed = random.randrange(10**6)
    print("seed", seed)
    rng = random.Random(seed)
    for dtype, bits in ((torch.float32, torch.int32), (torch.bfloat16, torch.int16), (torch.float64, torch.int64)):
        for _ in range(50):
            tensor = torch.randn(rng.randrange(1, 400)).to(dtype)
            before, place, bit = (
                bit_sum(tensor),
                rng.randrange(len(tensor)),
                rng.randrange(8 * tensor.element_size() - 1),
            )
            tensor.view(bits)[place] ^= 1 << bit
            assert bit_sum(tensor) != before, (dtype, place, bit)
    assert bit_sum(torch.tensor([True, False])) == 1


def test_the_majority_tells_which_rank_is_wrong():
    assert differences(("a", "b"), [[1, 2], [1, 2], [1, 2]]) == {}
    assert differences(("a", "b"), [[1, 2], [1, 5], [1, 2]]) == {"b": "rank 1 differs"}
    assert "no majority" in differences(("a",), [[1], [2]])["a"]


def test_a_rank_that_others_wait_for_is_named(tmp_path):
    waiting, silent = Watchdog(tmp_path, 0, 2, 0.2), Watchdog(tmp_path, 1, 2, 0.2)
    waiting.beat(7, "forward")
    waiting.beat(7, "backward")
    silent.beat(7, "forward")
    for watchdog in (waiting, silent):
        watchdog._write()
    assert waiting._look() == ""
    time.sleep(0.3)
    told = waiting._look()
    assert told.startswith("nothing went on for 0.2 s") and f"rank 1 (process {os.getpid()}" in told
    assert "in `forward` of step 7" in told and "rank 0" not in told
    silent.beat(7, "backward")
    silent._write()
    assert waiting._look() == ""  # it goes on


def test_a_process_that_is_gone_is_noticed_and_not_taken_for_another(tmp_path, monkeypatch):
    monkeypatch.setattr("affekt.pretrain.watchdog.GONE_SECONDS", 0.0)
    code = """
import sys
from pathlib import Path
from affekt.pretrain.watchdog import Watchdog
Watchdog(Path(sys.argv[1]), 1, 2, 100)._write()
sys.stdin.read()
"""
    pipes = {"stdin": subprocess.PIPE, "text": True}
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], **pipes)
    watchdog = Watchdog(tmp_path, 0, 2, 100)
    while not (tmp_path / "rank-1.json").exists():
        assert other.poll() is None
        time.sleep(0.01)
    assert watchdog._look() == ""
    other.kill()  # and not waited for: its number is still taken
    while watchdog._look() == "":
        time.sleep(0.01)
    assert "rank 1 (process" in watchdog._look() and "is gone" in watchdog._look()
    other.communicate()
    known = json.loads((tmp_path / "rank-1.json").read_text())
    known["process"][1] = f"{os.getpid()} 1"  # the number was given to another process since
    (tmp_path / "rank-1.json").write_text(json.dumps(known))
    assert "is gone" in watchdog._look()
    known["process"][0] = "another machine"
    (tmp_path / "rank-1.json").write_text(json.dumps(known))
    assert Watchdog(tmp_path, 0, 2, 100)._look() == ""
