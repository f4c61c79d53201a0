"""ZeRO and precision: the same losses as plain PyTorch, and checkpoints that fit each other."""

import pytest

from affekt.data.errors import SettingsError
from affekt.pretrain.settings import PretrainSettings
from benchmarks.engine import largest_differences
from benchmarks.faults import rows_resume, rows_world, sick
from benchmarks.faults.rig import MODEL, Rig, metrics


@pytest.fixture(scope="module")
def rig(tmp_path_factory) -> Rig:
    return Rig(tmp_path_factory.mktemp("zero"), seed=0)


def test_every_stage_trains_as_plain_pytorch(rig):
    found = largest_differences(rig, worlds=(2,), steps=8)[2]
    assert set(found) == {0, 1, 2, 3} and max(found.values()) <= 1e-5, found


def test_what_lies_in_the_memory_of_the_host_trains_the_same(rig):
    out = rig.new()
    rig.finish(out, "train.zero_stage=3", "train.offload=parameters", ranks=2)
    for ours, plain in zip(metrics(out), metrics(rig.straight(ranks=2)), strict=True):
        assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-5)


def test_one_checkpoint_goes_through_every_stage_and_exports_to_the_same_bytes(rig):
    passed, cases, _ = rows_world.every_stage(rig, 4)
    assert passed == cases == 4


def test_a_run_goes_on_with_other_processes_and_stages(rig):
    [(same_clips, difference)] = rows_world.other_worlds(rig, 1, steps=9)
    assert same_clips and difference <= 1e-5


def test_a_run_in_fp16_goes_on_with_its_loss_scale(rig):
    settings = ("train.precision=fp16", "train.zero_stage=1")
    out = rig.new()
    rows_resume.stop_after(rig, out, 2, *settings)
    rig.finish(out, *settings)
    assert metrics(out) == metrics(rig.straight(*settings))


@pytest.mark.parametrize("stage", [1, 3])
def test_what_is_not_finite_is_skipped_in_parts_and_at_every_stage(rig, stage):
    out = rig.new()
    settings = ("train.steps=4", f"train.zero_stage={stage}", "train.accumulate=2")
    job = rig.call(sick.poisoned, {1: "gradient inf", 2: "loss nan"}, 1, str(out), str(rig.config), *settings, ranks=2)
    job.wait()
    assert job.codes == [0, 0], job.told
    assert [row["step"] for row in metrics(out) if row.get("skipped")] == [2, 3]


@pytest.mark.parametrize(
    ("train", "told"),
    [
        ({"offload": "optimizer"}, "train.offload=optimizer needs train.zero_stage=1"),
        ({"offload": "parameters", "zero_stage": 2}, "needs train.zero_stage=3"),
        ({"keep_every": 3, "checkpoint_every": 2}, "no multiple"),
        ({"zero_stage": 4}, "train.zero_stage"),
    ],
)
def test_settings_that_cannot_work_are_told(train, told):
    given = {"out": "run", "model": MODEL, "data": {"shards": "x"}, "train": {"steps": 1, **train}}
    with pytest.raises(SettingsError, match=told):
        PretrainSettings.parse(given)
