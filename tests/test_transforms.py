"""Pixels and sound to inputs: each fast path beside its slow and obvious twin."""

import json
import math
import random

import pytest
import torch
from torch.nn import functional as F

import affekt.data.torch_extensions  # noqa: F401 (lets torchaudio import beside a CPU build of torch)
from affekt.data.batch import Batch
from affekt.data.transforms import (
    Preprocess,
    crop_resize,
    log_mel,
    normalise_mel,
    normalise_picture,
    pad_frames,
    resize_matrix,
)
from affekt.data.transforms import _crop_resize_matrices as by_matrices

WHOLE = (0.0, 0.0, 1.0, 1.0)


def kaldi(waveform, mel_bins=128, window_ms=25.0):
    """The published recipe, one waveform at a time."""
    import torchaudio

    beyond = round((window_ms - 25) * 8)  # to stand around the same moments as windows of 25 ms
    return torchaudio.compliance.kaldi.fbank(
        F.pad((waveform - waveform.double().mean().float())[None], (beyond, beyond)),
        htk_compat=True,
        sample_frequency=16000,
        use_energy=False,
        window_type="hanning",
        num_mel_bins=mel_bins,
        dither=0.0,
        frame_shift=10,
        frame_length=window_ms,
    )


def waveforms(samples=41200):
    generator = torch.Generator().manual_seed(1)
    time = torch.arange(samples) / 16000
    noise = torch.randn(samples, generator=generator)
    tone = torch.sin(2 * torch.pi * 220 * time)
    rows = [0.1 * noise, 0.5 * tone, 1e-4 * tone + 0.3, 0.2 * tone * (time % 0.5) + 0.003 * noise, torch.zeros(samples)]
    return torch.stack(rows)


@pytest.mark.parametrize("mel_bins", [128, 64, 23])
def test_log_mel_is_kaldis(mel_bins):
    sound = waveforms()
    mel = log_mel(sound, mel_bins)
    assert mel.shape == (5, 256, mel_bins) and mel.isfinite().all()
    for row, waveform in zip(mel, sound):
        assert (row - kaldi(waveform, mel_bins)).abs().max() <= 1e-5  # measured: 0, bit for bit


@pytest.mark.parametrize("samples", [400, 559, 560, 16000])
def test_log_mel_of_any_length(samples):
    mel = log_mel(waveforms(samples))
    assert mel.shape[1] == (samples - 400) // 160 + 1
    assert (mel[0] - kaldi(waveforms(samples)[0])).abs().max() <= 1e-5


@pytest.mark.parametrize("window_ms", [32, 50, 64])
def test_longer_windows_are_kaldis_at_the_same_moments(window_ms):
    sound = waveforms()
    mel = log_mel(sound, 128, window_ms=window_ms)
    assert mel.shape == log_mel(sound).shape
    fft_size = 512 if window_ms == 32 else 1024
    level = math.log(25 / window_ms * 512 / fft_size)  # of noise, which is to stay what it is in 25 ms
    for row, waveform in zip(mel, sound):
        theirs = kaldi(waveform, 128, window_ms)
        heard = theirs > max(theirs.max() - 12, -14)  # below, what floors the logarithm differs
        assert ((row - theirs - level).abs() * heard).max() <= 1e-3
    noise = 0.1 * torch.randn(1, 160000, generator=torch.Generator().manual_seed(2))
    long, short = (log_mel(noise, 32, window_ms=w)[0, 5:-5].exp().mean(0).log() for w in (window_ms, 25))
    assert (long - short).abs().max() < 0.15


def test_long_windows_tell_the_harmonics_of_a_deep_voice_apart():
    time = torch.arange(16000) / 16000
    voice = sum(torch.cos(2 * math.pi * 110 * k * time) for k in range(1, 20))[None] * 0.02
    low, high = (1127 * math.log(1 + hertz / 700) for hertz in (20, 8000))
    peak, valley, next_peak = (
        round((1127 * math.log(1 + hertz / 700) - low) / ((high - low) / 129) - 1) for hertz in (330, 385, 440)
    )
    depth = {}
    for window_ms in (25, 64):
        nepers = log_mel(voice, 128, window_ms=window_ms)[0, 40]
        depth[window_ms] = ((nepers[peak] + nepers[next_peak]) / 2 - nepers[valley]).item() * 10 / math.log(10)
    print(depth)
    assert depth[64] > 40 > 12 > depth[25]  # dB


def test_sound_too_short_for_one_frame():
    assert log_mel(torch.ones(2, 399)).shape == (2, 0, 128)


def test_padding_changes_nothing_of_the_sound():
    sound = waveforms()[:2]
    valid = torch.tensor([41200, 20000])
    padded = torch.where(torch.arange(41200) < valid[:, None], sound, 0.0)
    mel = log_mel(padded, 128, valid)
    frames = (20000 - 400) // 160 + 1
    assert torch.equal(mel[0], log_mel(sound[:1])[0])
    assert torch.equal(mel[1, :frames], log_mel(sound[1:, :20000])[0])


def test_pad_frames():
    mel = torch.ones(3, 5, 2)
    assert pad_frames(mel, torch.tensor([5, 3, 0]), 8).sum((1, 2)).tolist() == [10, 6, 0]
    assert pad_frames(mel, torch.tensor([5, 3, 0]), 4).shape == (3, 4, 2)


def random_video(batch=4, time=3, size=40):
    generator = torch.Generator().manual_seed(2)
    coarse = torch.randint(0, 256, (batch * time, 3, 10, 10), generator=generator).float()
    smooth = F.interpolate(coarse, (size, size), mode="bicubic") + 9 * torch.randn(1, generator=generator)
    return smooth.clamp(0, 255).round().byte().view(batch, time, 3, size, size).permute(0, 1, 3, 4, 2).contiguous()


def slow_crop_resize(clip, box, out):
    """Cut, resize as torch does it in float32, mirror."""
    size = clip.shape[1]
    x0, y0, x1, y1 = (round(v * size) for v in box)
    cut = clip[:, y0:y1, min(x0, x1) : max(x0, x1)].permute(0, 3, 1, 2).float()
    cut = F.interpolate(cut, (out, out), mode="bilinear", antialias=True)
    return (cut.flip(-1) if x0 > x1 else cut).transpose(0, 1)


@pytest.mark.parametrize("out", [16, 24, 40, 64])
def test_crop_and_resize(out):
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    video = random_video()
    for _ in range(5):
        boxes = [WHOLE]
        for _ in range(3):
            w, h = rng.randrange(10, 41), rng.randrange(10, 41)
            x, y = rng.randrange(41 - w), rng.randrange(41 - h)
            x0, x1 = rng.sample([x, x + w], 2)
            boxes.append((x0 / 40, y / 40, x1 / 40, (y + h) / 40))
        expected = torch.stack([slow_crop_resize(clip, box, out) for clip, box in zip(video, boxes)])
        box = torch.tensor(boxes)
        assert (by_matrices(video, box, out) - expected).abs().max() < 2e-3  # of 255
        pixels = crop_resize(video, box, out)
        assert pixels.dtype == torch.uint8 and pixels.shape == (4, 3, 3, out, out)
        assert (pixels.float() - expected).abs().max() <= 1.1  # rounded to whole values, by integer weights
        # Rounded once along each axis: the sum of two uniform errors of half a pixel value is 1/3 away on average.
        assert (pixels.float() - expected).abs().mean() < 0.36


def test_a_whole_picture_of_the_right_size_is_left_alone():
    video = random_video()
    box = torch.tensor([WHOLE] * 4)
    assert torch.equal(crop_resize(video, box, 40), video.permute(0, 4, 1, 2, 3))
    assert torch.equal(by_matrices(video, box, 40), video.permute(0, 4, 1, 2, 3).float())


def test_resize_matrices_average():
    weights = resize_matrix(torch.tensor([0.0, 0.9]), torch.tensor([1.0, 0.1]), 40, 16)
    assert weights.shape == (2, 16, 40) and torch.allclose(weights.sum(2), torch.ones(2, 16))
    assert (weights[1, :, :4] == 0).all() and (weights[1, :, 36:] == 0).all()
    assert weights[1, 0].argmax() > weights[1, -1].argmax()  # mirrored


@pytest.mark.gpu
def test_on_a_gpu_as_on_a_cpu():
    video, box = random_video(), torch.tensor([WHOLE, (0.25, 0.0, 1.0, 0.75), (0.9, 0.1, 0.1, 0.9), WHOLE])
    expected = torch.stack([slow_crop_resize(clip, b, 24) for clip, b in zip(video, box.tolist())])
    assert (crop_resize(video.cuda(), box.cuda(), 24).cpu() - expected).abs().max() < 2e-3
    sound = waveforms()[:1]
    assert (log_mel(sound.cuda()).cpu() - log_mel(sound)).abs().max() < 1e-2
    preprocess = Preprocess(img_size=24)
    batch = Batch(["a"] * 4, video, sound.expand(4, -1), *[torch.ones(4, dtype=torch.bool)] * 2,
                  torch.full((4,), 41200), box, torch.arange(4))  # fmt: skip
    here, there = preprocess(batch), preprocess(batch.to("cuda"))
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.equal(preprocess(batch.to("cuda")).video, there.video)
    assert (there.video.cpu() - here.video).abs().max() < 0.025 and there.audio.device.type == "cuda"


def batch_of_three():
    """With both streams, with sound that ends early, and without sound."""
    video = random_video(3, 2)
    sound = torch.zeros(3, 41200)
    valid = torch.tensor([41200, 8000, 0])
    sound[0], sound[1, :8000] = waveforms()[3], waveforms()[0, :8000]
    yes = torch.tensor([True, True, True])
    return Batch(["a", "b", "c"], video, sound, yes, valid > 0, valid, torch.tensor([WHOLE] * 3), torch.arange(3))


def test_preprocess():
    batch = batch_of_three()
    inputs = Preprocess(img_size=32)(batch)
    assert inputs.video.shape == (3, 3, 2, 32, 32) and inputs.audio.shape == (3, 1, 256, 128)
    assert inputs.audio_frames.tolist() == batch.audio_frames(256).tolist() == [256, 48, 0]
    assert torch.equal(inputs.has_audio, batch.has_audio) and torch.equal(inputs.has_video, batch.has_video)
    expected = (kaldi(batch.audio[1, :8000]) - (-4.2677393)) / (2 * 4.5689974)
    assert torch.allclose(inputs.audio[1, 0, :48], expected, atol=1e-5)
    zero = 4.2677393 / (2 * 4.5689974)
    assert torch.allclose(inputs.audio[1, 0, 48:], torch.tensor(zero)) and torch.allclose(
        inputs.audio[2], torch.tensor(zero)
    )
    resized = F.interpolate(batch.video[0].permute(0, 3, 1, 2), (32, 32), mode="bilinear", antialias=True)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (resized.permute(1, 0, 2, 3) / 255 - mean.view(3, 1, 1, 1)) / std.view(3, 1, 1, 1)
    assert torch.allclose(inputs.video[0], expected, atol=1e-5)


def test_preprocess_of_one_stream():
    batch = batch_of_three()
    batch.video = None
    inputs = Preprocess(img_size=32, mel_bins=64, mel_frames=100)(batch)
    assert inputs.video is None and inputs.audio.shape == (3, 1, 100, 64)
    assert inputs.audio_frames.tolist() == [100, 48, 0]
    batch = batch_of_three()
    batch.audio = None
    assert Preprocess(img_size=32)(batch).audio is None


def test_the_sound_is_varied_before_its_log_mel():
    batch, preprocess = batch_of_three(), Preprocess(img_size=32)
    plain = preprocess(batch).audio
    batch.gain = torch.tensor([1.5, 0.5, 1.0])
    louder = preprocess(batch).audio
    loud = plain[0] > 0  # bins that the floor of the logarithm does not hold up
    more = torch.tensor(2 * math.log(1.5) / (2 * 4.5689974))
    assert torch.allclose(louder[0][loud] - plain[0][loud], more, atol=1e-4)
    assert torch.equal(louder[1, :, 48:], plain[1, :, 48:]) and torch.equal(louder[2], plain[2])
    batch.roll = torch.tensor([0, 160, 0])
    batch.audio[1, :8000] = batch.audio[1, :8000].roll(-160)  # turned back, so that nothing has changed in the end
    assert torch.equal(preprocess(batch).audio, louder)


def test_half_precision_around_it_changes_nothing():
    batch, preprocess = batch_of_three(), Preprocess(img_size=32)
    plain = preprocess(batch)
    with torch.autocast("cpu", torch.bfloat16):
        inside = preprocess(batch)
    assert torch.equal(plain.video, inside.video) and torch.equal(plain.audio, inside.audio)


def test_settings_travel():
    settings = Preprocess(img_size=32, mel_bins=64).to_dict()
    assert json.loads(json.dumps(settings)) == settings
    assert settings["img_size"] == 32 and settings["mel_bins"] == 64
    assert Preprocess(img_size=32).to_dict() != Preprocess(img_size=40).to_dict()


def test_normalising_undoes():
    assert normalise_mel(torch.tensor(-4.2677393)) == 0
    picture = torch.tensor([124, 116, 104], dtype=torch.uint8).view(1, 3, 1, 1, 1)
    assert normalise_picture(picture).abs().max() < 0.01
