"""What is varied of the sound: each fast path beside its slow twin, and every draw from the clip's own key."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from affekt.data.order import clip_key
from affekt.data.transforms import Inputs, log_mel, normalise_mel, pad_frames
from affekt.finetune.training.sound import PADDING, Sound, coloured, spans, stretch_time, warp_mel, with_noise

ALL = Sound(stretch=0.2, mel_warp=0.1, frequency_masks=2, frequency_width=6, time_masks=2, time_width=8)


def keys_of(count, epoch=0):
    return [clip_key(0, epoch, f"clip{i}") for i in range(count)]


def random_mel(rows=5, frames=(48, 48, 30, 7, 0), bins=32, length=48):
    frames = torch.tensor(frames)
    mel = torch.randn(rows, 1, length, bins, generator=torch.Generator().manual_seed(1))
    return torch.where((torch.arange(length) < frames[:, None])[:, None, :, None], mel, PADDING), frames


def inputs_of(mel, frames):
    return Inputs(None, mel, torch.zeros(len(mel), dtype=torch.bool), frames > 0, frames)


def test_padding_is_what_padded_frames_become():
    mel = pad_frames(torch.ones(1, 3, 4), torch.tensor([3]), 5)
    assert torch.equal(normalise_mel(mel)[0, 3:], torch.full((2, 4), PADDING))


def test_stretched_time_is_linear_between_frames():
    mel, frames = random_mel()
    tempo = torch.tensor([1.0, 1.25, 0.7, 1.1, 0.9])
    fast, new = stretch_time(mel, frames, tempo)
    for row in range(5):
        sound = mel[row, 0, : frames[row]].double().numpy()
        count = min(48, int((len(sound) - 1) / tempo[row].item()) + 1) if len(sound) else 0
        assert new[row] == count
        for band in range(32 if count else 0):
            at = np.arange(count) * tempo[row].item()
            slow = np.interp(at, np.arange(len(sound)), sound[:, band])
            assert np.abs(fast[row, 0, :count, band].numpy() - slow).max() < 1e-4
        assert (fast[row, 0, count:] == PADDING).all()
    assert torch.equal(fast[0], mel[0])


def test_a_warp_moves_a_tone_as_a_vocal_tract_would():
    """The peak of a tone at f stands at f / factor below the knee; nothing moves at factor 1, or beyond the ends."""
    time = torch.arange(41200) / 16000
    tones = torch.stack([torch.sin(2 * math.pi * hertz * time) for hertz in (900.0, 1500.0, 3000.0)])
    factor = 1.15
    moved = torch.stack([torch.sin(2 * math.pi * hertz / factor * time) for hertz in (900.0, 1500.0, 3000.0)])
    mel, expected = (log_mel(sound).mean(1).argmax(1) for sound in (tones, moved))
    warped = warp_mel(log_mel(tones)[:, None], torch.full((3,), factor))[:, 0].mean(1).argmax(1)
    assert (warped - expected).abs().max() <= 1 and (mel - expected).abs().min() >= 3
    mel, _ = random_mel()
    torch.testing.assert_close(warp_mel(mel, torch.ones(5)), mel, atol=1e-4, rtol=0)
    ends = warp_mel(mel, torch.tensor([0.9, 1.1, 0.8, 1.2, 1.05]))
    torch.testing.assert_close(ends.amax((1, 2, 3)) <= mel.amax((1, 2, 3)) + 1e-4, torch.ones(5, dtype=torch.bool))


def test_a_warped_axis_is_monotone_and_keeps_its_ends():
    ramp = torch.arange(128.0).expand(9, 1, 2, 128).contiguous()  # reads as the bin that it was read from
    at = warp_mel(ramp, torch.linspace(0.8, 1.2, 9))[:, 0, 0]
    assert (at.diff(dim=1) >= 0).all() and at[:, -1].min() > 124 and at[:, 0].max() < 2
    assert (at[0, 40] < 36) and (at[-1, 40] > 44) and torch.allclose(at[4], ramp[4, 0, 0], atol=1e-3)


def test_spans_are_where_their_numbers_say():
    u = torch.rand(300, 2, 2, generator=torch.Generator().manual_seed(2))
    length = torch.randint(0, 48, (300,), generator=torch.Generator().manual_seed(3))
    fast = spans(u, 9, length, 48, dim=2)[:, 0, :, 0]
    for row in range(300):
        slow, n = torch.zeros(48, dtype=torch.bool), int(length[row])
        for wide, place in u[row].tolist():
            wide = int(wide * (min(9, n // 2) + 1))
            start = int(place * (n - wide + 1))
            slow[start : start + wide] = True
        assert torch.equal(fast[row], slow) and not fast[row, n:].any()
    assert spans(u, 9, length, 48, dim=3).shape == (300, 1, 1, 48)


@pytest.mark.parametrize("exponent", [0.0, 1.0])
def test_noise_has_its_colour_and_its_ratio(exponent):
    generator = torch.Generator().manual_seed(4)
    noise = coloured(torch.randn(64000, generator=generator), exponent)
    power = torch.fft.rfft(noise).abs().square()
    low, high = power[1000:2000].mean(), power[8000:16000].mean()  # an octave apart three times, 8 : 1 if pink
    assert 0.8 * 8**exponent < low / high < 1.25 * 8**exponent
    sound = torch.sin(torch.arange(64000) * 0.3) * (torch.arange(64000) < 40000)
    noisy = with_noise(sound, noise, torch.tensor(40000), 12.0)
    ratio = sound.square().sum() / (noisy - sound).square().sum()
    assert abs(10 * math.log10(ratio) - 12) < 1e-2 and not noisy[40000:].any()
    assert not with_noise(torch.zeros(64000), noise, torch.tensor(64000), 12.0).any()


def test_noise_meets_its_share_of_the_views():
    audio, valid = torch.randn(400, 800, generator=torch.Generator().manual_seed(5)), torch.full((400,), 700)
    audio[:, 700:] = 0
    noisy = Sound(noise=0.25).waveform(audio, valid, keys_of(400))
    changed = (noisy != audio).any(1)
    assert 70 < changed.sum() < 130 and not noisy[:, 700:].any()
    assert Sound().waveform(audio, valid, keys_of(400)) is audio
    again = Sound(noise=0.25).waveform(audio[7:9], valid[7:9], keys_of(400)[7:9])
    assert torch.equal(again, noisy[7:9])


@pytest.mark.parametrize("name", ["stretch", "mel_warp", "frequency_masks", "time_masks"])
def test_each_part_has_an_effect_of_its_own_and_leaves_padding(name):
    mel, frames = random_mel()
    alone = Sound(**{name: getattr(ALL, name)}, frequency_width=6, time_width=8)
    varied = alone.log_mel(inputs_of(mel, frames), keys_of(5))
    assert not torch.equal(varied.audio[:3], mel[:3]) and torch.equal(varied.audio[4], mel[4])
    for row in range(5):
        assert (varied.audio[row, :, varied.audio_frames[row] :] == PADDING).all()
    whole = ALL.log_mel(inputs_of(mel, frames), keys_of(5))
    part = ALL.log_mel(inputs_of(mel[1:3], frames[1:3]), keys_of(5)[1:3])
    assert torch.equal(whole.audio[1:3], part.audio) and torch.equal(whole.audio_frames[1:3], part.audio_frames)
    assert not torch.equal(ALL.log_mel(inputs_of(mel, frames), keys_of(5, epoch=1)).audio, whole.audio)


def test_nothing_is_varied_by_default_or_without_sound():
    mel, frames = random_mel()
    inputs = inputs_of(mel, frames)
    assert Sound().log_mel(inputs, keys_of(5)).audio is mel
    silent = replace(inputs, audio=None)
    assert ALL.log_mel(silent, keys_of(5)) is silent
    with pytest.raises(ValueError, match="lowest ratio comes first"):
        Sound(noise_snr_db=(30.0, 5.0))
