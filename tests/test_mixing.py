"""Mixup and CutMix: both streams and the label get the same share of the same partner, whatever the batch."""

import numpy as np
import pytest
import torch
from scipy.stats import beta, kstest

from affekt.data.errors import SettingsError
from affekt.data.order import clip_key
from affekt.data.transforms import Inputs
from affekt.finetune.training.mixing import Mixing, mix
from affekt.finetune.training.streams import StreamDropout, drop_streams, incomplete_view

FRAMES, BINS, SIDE = 40, 8, 12


def keys_of(count, epoch=0):
    return [clip_key(0, epoch, f"clip{i}") for i in range(count)]


def constant_inputs(rows, has_video=None, has_audio=None, frames=None):
    """Every pixel and every mel bin of row i is i; the padding of the log-mel is -7."""
    frames = torch.full((rows,), FRAMES) if frames is None else frames
    value = torch.arange(rows, dtype=torch.float32).view(-1, 1, 1, 1)
    audio = value.expand(rows, 1, FRAMES, BINS).clone()
    audio[(torch.arange(FRAMES) >= frames[:, None])[:, None]] = -7.0
    everywhere = torch.ones(rows, dtype=torch.bool)
    has_video, has_audio = (everywhere if has is None else has for has in (has_video, has_audio))
    return Inputs(value[..., None].expand(rows, 3, 4, SIDE, SIDE).clone(), audio, has_video, has_audio, frames)


def rows_of(inputs, rows):
    parts = (inputs.video, inputs.audio, inputs.has_video, inputs.has_audio, inputs.audio_frames)
    return Inputs(*(part[rows] for part in parts))


def share_of_partner(values, row, partner):
    """Of constant rows: how much of the values is the partner's."""
    return ((values.double().mean() - row) / (partner - row)).item()


@pytest.mark.parametrize("settings", [Mixing(mixup=0.8), Mixing(cutmix=1.0), Mixing(mixup=0.8, cutmix=1.0)])
def test_both_streams_and_the_label_get_the_same_share(settings):
    inputs = constant_inputs(64)
    mixed, how = mix(inputs, keys_of(64), settings)
    assert how.partner.tolist() == [i ^ 1 for i in range(64)]
    assert torch.equal(how.share[::2], how.share[1::2]) and len(how.share.unique()) >= 8
    targets = how.targets(torch.eye(64))
    for row in range(64):
        partner, real = row ^ 1, int(inputs.audio_frames[row])
        of_picture = share_of_partner(mixed.video[row], row, partner)
        of_sound = share_of_partner(mixed.audio[row, :, :real], row, partner)
        of_label = targets[row, partner].item()
        assert abs(of_picture - of_label) <= 0.25 / FRAMES + 1e-4
        assert abs(of_sound - of_label) <= 0.25 / FRAMES + 1e-4
        assert abs(targets[row].sum().item() - 1) < 1e-6


def test_the_twin_by_hand_of_every_row():
    """CutMix pastes a box of all frames and one stretch of time; Mixup adds the same share everywhere."""
    generator = torch.Generator().manual_seed(3)
    shape = constant_inputs(16)
    video, audio = (torch.randn(x.shape, generator=generator) for x in (shape.video, shape.audio))
    inputs = Inputs(video, audio, shape.has_video, shape.has_audio, shape.audio_frames)
    mixed, how = mix(inputs, keys_of(16), Mixing(mixup=1.0, cutmix=1.0))
    kinds = set()
    for row in range(16):
        partner, share = row ^ 1, how.share[row]
        changed = (mixed.video[row] != video[row]).all(0)  # (T, H, W)
        times = (mixed.audio[row, 0] != audio[row, 0]).all(-1)
        if times.all() and changed.all():
            kinds.add("mixup")
            torch.testing.assert_close(mixed.video[row], share * video[row] + (1 - share) * video[partner])
            torch.testing.assert_close(mixed.audio[row], share * audio[row] + (1 - share) * audio[partner])
            continue
        kinds.add("cutmix")
        assert (changed == changed[0]).all()
        rows, columns, stretch = (np.flatnonzero(x) for x in (changed[0].any(1), changed[0].any(0), times))
        assert changed[0].sum() == len(rows) * len(columns)
        for run in (rows, columns, stretch):
            assert len(run) == 0 or (np.diff(run) == 1).all()
        torch.testing.assert_close(mixed.video[row], torch.where(changed, video[partner], video[row]))
        torch.testing.assert_close(mixed.audio[row], torch.where(times[:, None], audio[partner], audio[row]))
    assert kinds == {"mixup", "cutmix"}


def test_shares_are_beta_distributed_and_switched():
    keys = keys_of(3000)
    _, how = mix(constant_inputs(3000), keys, Mixing(mixup=0.8))
    assert kstest(how.share[::2].numpy(), beta(0.8, 0.8).cdf).pvalue > 1e-4
    _, how = mix(constant_inputs(3000), keys, Mixing(mixup=0.8, share=0.3))
    assert 0.25 < (how.share < 1).float().mean() < 0.35
    mixed, how = mix(constant_inputs(3000), keys, Mixing(mixup=5.0, cutmix=5.0, switch=0.2))
    boxes = [row for row in range(3000) if len(mixed.video[row].unique()) == 2]
    assert 500 < len(boxes) < 700


def test_rank_part_and_batch_decide_nothing():
    settings, keys = Mixing(mixup=0.8, cutmix=1.0), keys_of(8)
    inputs = constant_inputs(8)
    whole, how = mix(inputs, keys, settings)
    for rows in (slice(0, 4), slice(4, 6), slice(6, 8)):
        part, of_part = mix(rows_of(inputs, rows), keys[rows], settings)
        assert torch.equal(part.video, whole.video[rows]) and torch.equal(part.audio, whole.audio[rows])
        assert torch.equal(of_part.share, how.share[rows])
    other, _ = mix(inputs, keys_of(8, epoch=1), settings)
    assert not torch.equal(other.audio, whole.audio)
    with pytest.raises(SettingsError, match=r"7 clips .* cannot be mixed in pairs"):
        mix(rows_of(inputs, slice(0, 7)), keys[:7], settings)


def test_views_of_one_clip_are_mixed_with_another_clip():
    _, how = mix(constant_inputs(8), keys_of(8), Mixing(mixup=0.8), repeats=2)
    assert how.partner.tolist() == [2, 3, 0, 1, 6, 7, 4, 5]


def test_pairs_that_do_not_match_stay_as_they_are():
    has_video = torch.tensor([True, False, False, False, True, True, True, True])
    has_audio = torch.tensor([True, True, True, True, False, False, True, True])
    inputs = constant_inputs(8, has_video, has_audio)
    groups = torch.tensor([0, 0, 0, 0, 0, 0, 0, 1])
    mixed, how = mix(inputs, keys_of(8), Mixing(mixup=0.8, cutmix=1.0), groups=groups)
    assert (how.share < 1).tolist() == [False, False, True, True, True, True, False, False]
    for row in (0, 1, 6, 7):
        assert torch.equal(mixed.video[row], inputs.video[row]) and torch.equal(mixed.audio[row], inputs.audio[row])
    for row in (2, 3):  # sound alone: its share is the label's
        assert abs(share_of_partner(mixed.audio[row], row, row ^ 1) - (1 - how.share[row].item())) < 1e-5
    targets = torch.tensor([[float("nan")], [0.2]]).repeat(4, 1)
    assert how.targets(targets)[:2].isnan().tolist() == [[True], [False]]  # not mixed, so none of the partner's
    assert how.targets(targets)[2:4].isnan().all()


@pytest.mark.parametrize("settings", [Mixing(mixup=0.8), Mixing(cutmix=1.0)])
def test_short_sounds_keep_their_length_and_their_share(settings):
    frames = torch.tensor([40, 13, 25, 25, 9, 40, 1, 40])
    inputs = constant_inputs(8, has_video=torch.zeros(8, dtype=torch.bool), frames=frames)
    mixed, how = mix(inputs, keys_of(8, epoch=5), settings)
    assert torch.equal(mixed.audio_frames, frames)
    for row in range(8):
        real = int(frames[row])
        assert (mixed.audio[row, :, real:] == -7).all() and (mixed.audio[row, :, :real] >= 0).all()
        of_sound = share_of_partner(mixed.audio[row, :, :real], row, row ^ 1)
        assert abs(of_sound - (1 - how.share[row].item())) < 1e-5


def test_dropping_streams_never_takes_both():
    rows = 3000
    has_video, has_audio = torch.arange(rows) % 3 != 1, torch.arange(rows) % 3 != 2
    inputs = constant_inputs(rows, has_video, has_audio)
    dropped = drop_streams(inputs, keys_of(rows), StreamDropout(video=0.3, audio=0.5))
    assert (dropped.has_video | dropped.has_audio).all()
    both = has_video & has_audio
    assert torch.equal(dropped.has_video[~both], has_video[~both])
    assert torch.equal(dropped.has_audio[~both], has_audio[~both])
    for has, share in ((dropped.has_video, 0.7), (dropped.has_audio, 0.5)):
        assert abs(has[both].float().mean().item() - share) < 0.06
    few = drop_streams(rows_of(inputs, slice(5, 9)), keys_of(rows)[5:9], StreamDropout(video=0.3, audio=0.5))
    assert torch.equal(few.has_audio, dropped.has_audio[5:9]) and torch.equal(few.has_video, dropped.has_video[5:9])
    with pytest.raises(ValueError, match="hide more than all"):
        StreamDropout(video=0.6, audio=0.6)


def test_an_incomplete_view_hides_moments_at_a_rate_of_its_own():
    inputs = constant_inputs(2000, frames=torch.full((2000,), 33))
    view, of_video, of_audio = incomplete_view(inputs, keys_of(2000), tubelet=2)
    assert of_video.shape == (2000, 4) and torch.equal(of_video[:, ::2], of_video[:, 1::2])
    assert not of_audio[:, 33:].any() and torch.equal(view.audio[:, :, 33:], inputs.audio[:, :, 33:])
    seen = inputs.video.masked_fill(of_video[:, None, :, None, None], 0.0)
    assert torch.equal(view.video, seen)
    assert torch.equal(view.audio, inputs.audio.masked_fill(of_audio[:, None, :, None], 0.0))
    assert 0.45 < of_video.float().mean() < 0.55 and 0.45 < of_audio[:, :32].float().mean() < 0.55
    both = of_video[:, 0] & of_video[:, 2]  # with a rate r of each clip: E[r^2] = 1/3, and not 1/4
    assert 0.29 < both.float().mean() < 0.38
