"""ZeRO, accumulation and precision: the same losses as plain PyTorch, and checkpoints that fit each other."""

import pytest
import torch

from affekt.data.batch import Batch
from affekt.data.errors import SettingsError
from affekt.data.transforms import Inputs
from affekt.pretrain.registry import create_model
from affekt.pretrain.settings import PretrainSettings
from benchmarks.engine import largest_differences
from benchmarks.faults import rows_resume, rows_world
from benchmarks.faults.rig import MODEL, Rig, metrics


@pytest.fixture(scope="module")
def rig(tmp_path_factory) -> Rig:
    return Rig(tmp_path_factory.mktemp("zero"), seed=0)


def test_every_stage_trains_as_plain_pytorch(rig):
    found = largest_differences(rig, worlds=(2,), steps=8)[2]
    assert set(found) == {0, 1, 2, 3} and max(found.values()) <= 1e-5, found


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


def test_a_batch_in_parts_is_the_batch(rig):
    """As a run; and, with clips that lack a stream unevenly over the parts, as gradients in float64."""
    plain = ("model.contrast_weight=0", "model.drop_path=0", "train.steps=4", "train.checkpoint_every=4")
    whole, parts = (metrics(rig.straight(*plain, *more)) for more in ((), ("train.accumulate=4", "train.zero_stage=2")))
    for a, b in zip(whole, parts, strict=True):
        assert all(b[name] == pytest.approx(a[name], rel=1e-5) for name in ("loss", "loss_video", "grad_norm"))

    torch.manual_seed(0)
    model = create_model("hicmae_nano", **{k: v for k, v in MODEL.items() if k != "name"}, contrast_weight=0.0).double()
    has_video, has_audio = torch.tensor([1, 0, 0, 1, 1, 1, 1, 1]).bool(), torch.tensor([0, 1, 1, 0, 1, 1, 1, 1]).bool()
    s, valid = model.settings, torch.tensor([0, 41360, 20000, 0, 9000, 41360, 41360, 700])
    batch = Batch(
        list("abcdefgh"),
        None,
        None,
        has_video,
        has_audio,
        valid,
        torch.zeros(8, 4),
        torch.arange(8),
        clip=torch.arange(8),
    )
    video = torch.randn(8, 3, s.num_frames, s.img_size, s.img_size, dtype=torch.float64)
    audio = torch.randn(8, 1, s.mel_frames, s.mel_bins, dtype=torch.float64)

    def gradients(count: int) -> list[torch.Tensor]:
        model.zero_grad()
        pieces = batch.parts(count)
        masks = [model.masks(piece) for piece in pieces]
        tokens = torch.stack([model.tokens(piece, *pair) for piece, pair in zip(pieces, masks)]).mean(0)
        for piece, pair in zip(pieces, masks, strict=True):
            rows, frames = piece.keys, piece.audio_frames(s.mel_frames)
            inputs = Inputs(video[rows], audio[rows], piece.has_video, piece.has_audio, frames, piece.clip)
            (model(inputs, *pair, tokens if count > 1 else None)["loss"] / count).backward()
        return [p.grad.clone() for p in model.parameters()]

    for a, b in zip(gradients(1), gradients(4), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("train", "told"),
    [
        ({"offload": "optimizer"}, "train.offload=optimizer needs train.zero_stage=1"),
        ({"offload": "parameters", "zero_stage": 2}, "needs train.zero_stage=3"),
        ({"accumulate": 2}, "model.contrast_weight=0"),
        ({"keep_every": 3, "checkpoint_every": 2}, "no multiple"),
        ({"zero_stage": 4}, "train.zero_stage"),
    ],
)
def test_settings_that_cannot_work_are_told(train, told):
    given = {"out": "run", "model": MODEL, "data": {"shards": "x"}, "train": {"steps": 1, **train}}
    with pytest.raises(SettingsError, match=told):
        PretrainSettings.parse(given)
