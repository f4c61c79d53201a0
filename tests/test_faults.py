"""Faults in short: `python -m benchmarks.faults` plants more of them. Real processes, really killed."""

from functools import partial

import pytest

from affekt.pretrain import checkpoint
from benchmarks.faults import rows_crash, rows_damage, rows_disk
from benchmarks.faults.__main__ import known_rows
from benchmarks.faults.child import POINTS
from benchmarks.faults.rig import Rig


@pytest.fixture(scope="module")
def rig(tmp_path_factory) -> Rig:
    return Rig(tmp_path_factory.mktemp("faults"), seed=0)


def held(row, rig: Rig, rounds: int) -> None:
    passed, cases, notes = row(rig, rounds)
    assert passed == cases >= rounds, f"{passed} of {cases}: {notes}"


def test_a_run_killed_at_random_moments_is_the_straight_run(rig):
    held(rows_crash.random_kills, rig, 3)


def test_a_rank_killed_at_any_point_of_a_save_costs_no_checkpoint(rig):
    held(partial(rows_crash.kills_at_points, points=POINTS[1::2]), rig, len(POINTS) // 2)  # the benchmark has all


def test_two_checkpoints_survive_a_kill_while_old_ones_are_removed(rig):
    held(rows_crash.purge_race, rig, 2)


def test_a_second_trainer_is_refused_and_a_killed_one_leaves_no_lock(rig):
    held(rows_crash.two_trainers, rig, 1)


def test_a_full_disk_costs_no_checkpoint(rig):
    held(rows_disk.disk_full, rig, 2)


def test_a_power_cut_after_any_operation_leaves_what_was_promised(rig, monkeypatch):
    held(rows_disk.power_loss, rig, 1)
    monkeypatch.setattr(checkpoint, "flush", lambda path: None)  # the row must see a folder that is not flushed
    passed, cases, _ = rows_disk.power_loss(rig, 1)
    assert passed < cases


@pytest.mark.parametrize("row", [rows_damage.pointer, rows_damage.payloads, rows_damage.safetensors_abuse])
def test_wrong_and_hostile_checkpoints_are_refused(rig, row):
    held(row, rig, 1)


def test_every_row_says_what_it_is_about():
    rows = known_rows()
    assert {"A1", "A16", "B2", "E4", "G3"} <= rows.keys() and list(rows)[:3] == ["A1", "A2", "A3"]
    assert all(about and callable(function) and rounds > 0 for about, function, rounds in rows.values())
