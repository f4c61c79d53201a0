"""Statistics of a stretch of sound: each against its obvious slow version, and as what an encoder learns."""

import json
import math

import numpy as np
import pytest
import torch

from affekt.data.errors import CheckpointError, SettingsError
from affekt.data.media.clip import PrepareSettings
from affekt.data.transforms import Inputs, log_mel, normalise_mel, plain_mel
from affekt.pretrain.export import create_encoder, load_encoder, save_encoder, start_from
from affekt.pretrain.functionals import (
    CEPSTRA,
    NUM_DESCRIPTORS,
    NUM_FUNCTIONALS,
    PITCH,
    PROSODY,
    QUANTILES,
    REFERENCE_HZ,
    FunctionalsHead,
    _scales,
    descriptors,
    functionals,
    statistics_over_time,
    steps_seen,
)
from affekt.pretrain.hicmae import HiCMAE
from affekt.pretrain.masks import random_mask, tube_mask
from affekt.pretrain.registry import create_model, model_settings

LEVEL, FLUX, CENTROID, HARMONICITY = CEPSTRA, CEPSTRA + 1, CEPSTRA + 2, PITCH + 1


def voices(*hertz: float, seconds: float = 1.0) -> torch.Tensor:
    """Sawtooth-like sounds (N, S) with a little noise."""
    time = torch.arange(round(16000 * seconds)) / 16000
    noise = torch.randn(len(hertz), len(time), generator=torch.Generator().manual_seed(0))
    tones = [sum(torch.sin(2 * math.pi * f * k * time) / k for k in range(1, int(4000 / f))) for f in hertz]
    return 0.1 * torch.stack(tones) + 0.001 * noise


def slowly(x: np.ndarray) -> np.ndarray:
    """(frames, K) -> (12, K), a column at a time."""
    found = []
    for column in x.T.astype(np.float64):
        mean, deviation = column.mean(), math.sqrt(column.var() + 1e-8)
        z = (column - mean) / deviation
        time = (2 * np.arange(len(column)) + 1) / len(column) - 1
        slope = np.polyfit(time, column, 1)[0] if len(column) > 1 else 0
        ordered = sorted(column)
        quantiles = [ordered[round(q * (len(column) - 1))] for q in QUANTILES]
        widths = [quantiles[3] - quantiles[1], quantiles[4] - quantiles[0]]
        found.append([mean, deviation, np.mean(z**3), np.mean(z**4), slope, *quantiles, *widths])
    return np.array(found).T


def test_statistics_are_those_of_the_frames_that_count():
    seed = torch.seed() % 2**31
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 50, 3, generator=generator) * torch.tensor([0.1, 1.0, 30.0]) + 2
    counted = torch.rand(4, 50, generator=generator) > 0.4
    counted[3] = torch.arange(50) == 7  # one frame alone
    found = statistics_over_time(x, counted)
    for row, mine, which in zip(x, found, counted):
        theirs = torch.tensor(slowly(row[which].numpy())).float()
        torch.testing.assert_close(mine[:2], theirs[:2], rtol=1e-4, atol=1e-4)
        if which.sum() > 1:
            torch.testing.assert_close(mine[2:], theirs[2:], rtol=1e-3, atol=1e-3)


def test_pitch_level_and_spectrum_are_heard():
    hertz = (90.0, 130.0, 180.0, 250.0, 330.0)
    mel = log_mel(voices(*hertz), window_ms=64)
    frames = torch.full((len(hertz),), mel.shape[1])
    x, sounding, _ = descriptors(mel, frames)
    assert sounding[:, 5:-5].all()
    heard = REFERENCE_HZ * x[:, 10:-10, PITCH].median(1).values.exp()
    semitones = 12 * (heard / torch.tensor(hertz)).log2()
    print(heard)
    assert semitones.abs().max() < 1
    noise = 0.1 * torch.randn(1, 16000, generator=torch.Generator().manual_seed(1))
    unvoiced, *_ = descriptors(log_mel(noise, window_ms=64), frames[:1])
    assert x[:, 10:-10, HARMONICITY].mean(1).min() > 2 * unvoiced[:, 10:-10, HARMONICITY].mean()
    assert unvoiced[0, 10:-10, CENTROID].mean() > x[:, 10:-10, CENTROID].mean() + 0.2
    louder, *_ = descriptors(mel + 2 * math.log(2), frames)  # twice the amplitude
    torch.testing.assert_close(louder[..., LEVEL] - x[..., LEVEL], torch.full(x.shape[:2], 2 * math.log(2)))
    others = [i for i in range(x.shape[2]) if i != LEVEL and not CEPSTRA + 3 <= i < PITCH]
    torch.testing.assert_close(louder[..., others], x[..., others], rtol=1e-3, atol=1e-3)
    steady = torch.ones(1, 60, 128)
    assert descriptors(steady, torch.tensor([60]))[0][0, :, FLUX].abs().max() == 0


def test_padding_and_other_clips_change_nothing():
    mel = log_mel(voices(120, 210), window_ms=64)
    frames = torch.tensor([mel.shape[1], 60])
    alone, alone_steps = functionals(mel[1:, :64], frames[1:], 4)
    padded = torch.full((2, 256, 128), 7.0)
    padded[:, : mel.shape[1]] = mel
    padded[1, 60:] = -50.0
    found, steps = functionals(padded, frames, 16)
    assert found.shape == (2, NUM_FUNCTIONALS) and steps.shape == (2, 16, 2 * NUM_DESCRIPTORS)
    torch.testing.assert_close(steps[1:, :4], alone_steps, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1:, :-1], alone[:, :-1], rtol=1e-4, atol=1e-4)  # the last is the share of sound


def test_no_target_is_out_of_bounds():
    mel = torch.randn(5, 64, 128) * 10
    mel[1] = -15.9  # digital silence
    mel[2] = 1e4
    for found in functionals(mel, torch.tensor([64, 64, 64, 0, 1]), 4):
        assert found.isfinite().all() and found.abs().max() <= 4 * PROSODY
    window = functionals(mel, torch.tensor([64, 64, 64, 0, 1]), 4).window[:, :-1].view(5, 2, -1, NUM_DESCRIPTORS)
    assert (window[1, :, :, PITCH] == 0).all()  # nothing voiced, nothing to tell
    steps = functionals(mel, torch.tensor([64, 64, 64, 0, 1]), 4).steps.unflatten(2, (2, NUM_DESCRIPTORS))
    assert (steps[1, ..., PITCH].abs() < 1e-5).all()
    assert (window[4, 1] == 0).all() and (window[3] == 0).all()  # no slope of one frame, nothing of none
    frames = torch.full((5,), 64)
    plain = functionals(mel, frames, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(functionals(mel, frames, 4), plain))


def test_steps_are_means_of_their_frames():
    mel = log_mel(voices(120, 210, 300, seconds=0.66), window_ms=64)[:, :64]
    frames = torch.tensor([64, 64, 40])
    x, _, voiced = descriptors(mel, frames)
    steps = functionals(mel, frames, 4).steps
    scales = _scales(torch.device("cpu"))
    for clip, step in ((0, 0), (1, 3), (2, 1), (2, 2)):
        rows = slice(16 * step, min(16 * step + 16, int(frames[clip])))
        scaled = (x[clip, rows] - scales[0]) / scales[1]
        expected = scaled.mean(0)
        spoken = voiced[clip, rows]
        expected[PITCH] = scaled[spoken, PITCH].mean() if spoken.any() else scaled[0, PITCH]
        expected = expected.clamp(-4, 4) * scales[3]
        torch.testing.assert_close(steps[clip, step, :NUM_DESCRIPTORS], expected, rtol=1e-3, atol=1e-3)


def test_steps_without_a_visible_token_are_known():
    ids = torch.tensor([[0, 1, 9], [31, 16, 17]])
    valid = torch.tensor([[True, True, False], [True, True, True]])
    assert steps_seen(ids, valid, (4, 8)).tolist() == [[True, False, False, False], [False, False, True, True]]
    assert steps_seen(ids, None, (4, 8)).tolist()[0] == [True, True, False, False]


def test_a_head_reads_mean_and_deviation_of_tokens_that_are_there():
    head = FunctionalsHead(6, (3, 4)).double()
    tokens = torch.randn(3, 5, 6, dtype=torch.float64)
    ids = torch.tensor([[0, 3, 5, 9, 11], [8, 2, 1, 0, 3], [4, 5, 6, 7, 8]])
    valid = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]).bool()
    told = head(tokens, ids, valid)
    for row, which, places, window, steps in zip(tokens, valid, ids, told.window, told.steps):
        x = row[which]
        pooled = torch.cat((x.mean(0), (x.var(0, unbiased=False) + 1e-5).sqrt()))
        torch.testing.assert_close(window, head.window(pooled))
        for step in range(3):
            here = x[places[which] // 4 == step]
            mean = here.mean(0) if len(here) else torch.zeros(6, dtype=torch.float64)
            torch.testing.assert_close(steps[step], head.steps(mean))
    everyone = head(tokens, ids, torch.ones(3, 5, dtype=torch.bool))
    torch.testing.assert_close(head(tokens, ids).window, everyone.window)
    told = head(tokens.requires_grad_(), ids, valid)
    (gradient,) = torch.autograd.grad(told.window.sum() + told.steps.sum(), tokens)
    assert gradient.isfinite().all()


def test_statistics_can_be_learned_from_visible_patches():
    """Twelve voices, each told by its pitch and level from half of its patches, better than any constant could; and
    nothing of sounds that are not there counts."""
    torch.manual_seed(0)
    small = {"streams": "audio", "embed_dim": 48, "depth": 2, "taps": (1, 2), "decoder_embed_dim": 32}
    model = create_model("hicmae_nano", **small, mel_frames=96, mask_ratio_audio=0.5, functionals_weight=1.0)
    s = model.settings
    sound = voices(*np.geomspace(90, 400, 12).tolist()) * torch.linspace(0.2, 2, 12)[:, None]
    mel = log_mel(sound, window_ms=64)[:, :96]
    torch.testing.assert_close(plain_mel(normalise_mel(mel)), mel, rtol=1e-4, atol=1e-4)
    there = torch.ones(12, dtype=torch.bool)
    inputs = Inputs(None, normalise_mel(mel)[:, None], ~there, there, torch.full((12,), 96))
    optimizer, seen = torch.optim.AdamW(model.parameters(), 3e-3), []
    for step in range(200):
        keys = torch.arange(12) + 100 * step
        masks = tube_mask(keys, s.grid_video, 0.75), random_mask(keys, math.prod(s.grid_audio), s.mask_ratio_audio)
        losses = model(inputs, *masks)
        torch.testing.assert_close(losses["loss"], losses["loss_audio"] + losses["loss_functionals"])
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        seen.append(losses["loss_functionals"].item())
    target = functionals(plain_mel(inputs.audio[:, 0]), inputs.audio_frames, s.grid_audio[0])
    spread = target.steps - target.steps.mean((0, 1))
    constant = target.window.var(0, unbiased=False).mean() + spread.square().mean()  # the error of a best constant
    print(seen[0], seen[-1], constant)
    assert np.mean(seen[-5:]) < 0.6 * constant.item()
    mute = Inputs(None, inputs.audio, ~there, torch.arange(12) < 4, inputs.audio_frames)
    few = Inputs(None, inputs.audio[:4], ~there[:4], there[:4], inputs.audio_frames[:4])
    masks_of_few = tube_mask(keys[:4], s.grid_video, 0.75), random_mask(keys[:4], math.prod(s.grid_audio), 0.5)
    torch.testing.assert_close(model(mute, *masks)["loss_functionals"], model(few, *masks_of_few)["loss_functionals"])


def test_settings_say_where_they_have_no_effect():
    assert "functionals_weight" in model_settings("hicmae_nano", streams="video", functionals_weight=1).without_effect
    assert "mel_window_ms" in model_settings("hicmae_nano", streams="video", mel_window_ms=64).without_effect
    with pytest.raises(SettingsError, match="mel_bins of 64"):
        model_settings("hicmae_nano", functionals_weight=1, mel_bins=32)
    with pytest.raises(SettingsError, match="mel_window_ms"):
        model_settings("hicmae_nano", mel_window_ms=10)
    plain = HiCMAE(model_settings("hicmae_nano", streams="audio"))
    assert not any(name.startswith("functionals") for name, _ in plain.named_parameters())


def test_an_export_keeps_the_window_and_no_head(tmp_path):
    small = {"streams": "audio", "embed_dim": 48, "depth": 2, "taps": (1, 2), "decoder_embed_dim": 32, "num_heads": 3}
    settings = model_settings("hicmae_nano", **small, functionals_weight=1, mel_window_ms=64)
    prepare = PrepareSettings().model_dump(mode="json")
    seen = {"ids": ["a"], "sources": [], "speakers": [], "licences": [], "data_sets": [], "prepare": prepare}
    torch.manual_seed(0)
    encoder = create_encoder(settings, 4, prepare)
    save_encoder(encoder, tmp_path / "export", {"run": "run", "step": 1}, seen)
    again = load_encoder(tmp_path / "export")
    assert again.preprocess.mel_window_ms == 64
    assert not any("functionals" in name for name in again.state_dict())
    started = HiCMAE(settings)
    assert start_from(started, tmp_path / "export")["ids"] == ["a"]
    theirs, ours = encoder.state_dict(), started.state_dict()
    assert all(torch.equal(ours[name], x) for name, x in theirs.items()) and "functionals.window.weight" in ours
    with pytest.raises(CheckpointError, match=r"mel_window_ms is 64\.0, the model's is 25\.0"):
        start_from(HiCMAE(settings.model_copy(update={"mel_window_ms": 25.0})), tmp_path / "export")
    about = json.loads((tmp_path / "export" / "preprocess.json").read_text())
    del about["transforms"]["mel_window_ms"]  # as exports of 25 ms are
    (tmp_path / "export" / "preprocess.json").write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match="other preprocessing"):
        load_encoder(tmp_path / "export")
