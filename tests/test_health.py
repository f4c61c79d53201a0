"""Faults planted in real runs of two ranks, each row of `benchmarks.faults` in its shortest form; and --replay."""

import json

import pytest
import torch

from affekt.data.errors import SettingsError
from affekt.data.transforms import Preprocess
from affekt.pretrain.replay import replay_step, told
from benchmarks.faults import rows_health, rows_lost, sick
from benchmarks.faults.rig import Rig


@pytest.fixture(scope="module")
def rig(tmp_path_factory) -> Rig:
    return Rig(tmp_path_factory.mktemp("health"))


def passes(row, rig: Rig, rounds: int) -> None:
    passed, cases, notes = row(rig, rounds)
    assert passed == cases, notes


def test_numbers_that_are_not_finite_move_no_rank_and_can_be_replayed(rig, monkeypatch):
    passes(rows_health.not_finite, rig, 6)
    path = next(path for path in sorted(rig.folder.glob("*/health/step-*.json")) if "step-00000005" in path.name)
    dump = json.loads(path.read_text())
    assert dump["step"] == 5 and dump["why"] == "not finite" and [part["rank"] for part in dump["ranks"]] == [0, 1]
    assert dump["ranks"][0]["loss"] > 0 and dump["ranks"][1]["loss"] == "nan"  # which rank it was
    clips = [clip["id"] for part in dump["ranks"] for clip in part["clips"]]

    def spoilt(preprocess, batch):
        inputs = whole(preprocess, batch)
        inputs.audio[5] = float("nan")
        return inputs

    whole = Preprocess.__call__
    monkeypatch.setattr(Preprocess, "__call__", spoilt)
    again = replay_step(path)
    assert [clip["id"] for clip in again["clips"]] == clips
    assert [clip["id"] for clip in again["clips"] if "input audio" in clip["not_finite"]] == [clips[5]]
    assert all(0 < clip["loss"] < 10 for clip in again["clips"] if clip["id"] != clips[5])
    assert not again["ranks"][0]["not_finite"] and "loss" in again["ranks"][1]["not_finite"]
    assert told(again).splitlines()[3].startswith(clips[5])  # the worst comes first
    with pytest.raises(SettingsError, match="has the clip"):
        replay_step(path, ["train.seed=5"])


def test_a_skipped_step_is_written_down_where_nobody_watches(rig):
    out = rig.new()
    settings = (str(out), str(rig.config), "train.steps=3", "train.watchdog_s=null")
    job = rig.call(sick.poisoned, {1: "loss nan"}, 1, *settings, ranks=2)
    job.wait()
    assert job.codes == [0, 0], job.told
    assert json.loads((out / "health" / "step-00000001.json").read_text())["why"] == "not finite"


def test_spikes_go_back_once_and_then_stop(rig):
    passes(rows_health.spikes, rig, 2)


def test_a_flipped_bit_is_found_on_both_ranks(rig):
    passes(rows_health.flipped_bits, rig, 20)


def test_odd_batches(rig):
    torch.manual_seed(0)
    passes(rows_health.odd_batches, rig, 40)


def test_a_killed_rank_ends_the_other(rig):
    passes(rows_lost.killed_ranks, rig, 1)


def test_ranks_leave_together_and_nothing_is_lost(rig):
    passes(rows_lost.asked_to_leave, rig, 1)


def test_a_stopped_rank_is_named_and_both_end(rig, monkeypatch):
    monkeypatch.setattr(rows_lost, "STUCK", 6)
    passes(rows_lost.stuck_ranks, rig, 1)


def test_nobody_listens_outside(rig):
    passes(rows_lost.listeners, rig, 1)
