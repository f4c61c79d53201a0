"""The length of the window is the experiment's: any that fits the patches runs, and others say what would."""

import numpy as np
import pytest
import torch

from affekt.data.augment import Augment
from affekt.data.decode import Window, possible_starts, random_start, window_starts
from affekt.data.errors import SettingsError
from affekt.data.loader import eval_loader, train_loader
from affekt.data.mixture import Corpus
from affekt.data.shard_writer import ShardWriter
from affekt.data.transforms import Preprocess
from affekt.pretrain.hicmae import HiCMAE
from affekt.pretrain.mixture import notes
from affekt.pretrain.settings import PretrainSettings

SMALL = {"name": "hicmae_nano", "embed_dim": 24, "depth": 2, "taps": [1, 2], "decoder_embed_dim": 16, "img_size": 32}


def settings_of(stride=4, **model):
    data = {"shards": "somewhere", "frame_stride": stride}
    given = {"out": "run", "model": {**SMALL, "mask_ratio_video": 0.5, **model}, "data": data, "train": {"steps": 1}}
    return PretrainSettings.parse(given)


@pytest.mark.parametrize(
    ("frames", "stride", "mel", "seconds", "short"),
    [(2, 1, 16, 0.175, False), (8, 4, 112, 1.16, False), (16, 4, 256, 2.575, False), (16, 25, 512, 15.04, True)],
)
def test_windows_of_any_length_run(tiny_shards, frames, stride, mel, seconds, short):
    settings = settings_of(stride, num_frames=frames, mel_frames=mel)
    window = Window(num_frames=frames, frame_stride=stride, mel_frames=mel)
    assert window.duration == pytest.approx(seconds)
    index = tiny_shards(6, streams="mixed", size=32)  # of 3 s
    batch = next(iter(train_loader(index, window, global_batch=4, total_steps=1)))
    assert batch.video.shape[1] == frames and batch.audio.shape[1] == 400 + 160 * (mel - 1)
    model = HiCMAE(settings.model)
    losses = model(Preprocess(img_size=32, mel_frames=mel)(batch), *model.masks(batch))
    losses["loss"].backward()
    assert torch.isfinite(losses["loss"]) and all(p.grad.isfinite().all() for p in model.parameters())
    told = notes([Corpus(index, range(6))], window, [6])
    assert bool(told) == short
    if short:
        assert told[0].startswith(
            "100% of the clips are shorter than the window of 15.04 s (pictures 15.04 s, sound 5.1"
        )
        assert "lower data.frame_stride, model.num_frames or model.mel_frames" in told[0]


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ({"num_frames": 7}, "num_frames 7 is not divisible by tubelet_size 2; use 6 or 8"),
        ({"mel_frames": 250}, "mel_frames 250 is not divisible by patch_size_audio 16; use 240 or 256"),
        ({"stride": 0}, r"data\.frame_stride"),
    ],
)
def test_windows_that_fit_no_patches_say_what_would(model, told):
    with pytest.raises(SettingsError, match=told):
        settings_of(**model)


WINDOW = Window(num_frames=8, frame_stride=4, mel_frames=112)  # 1.16 s


def speech(seconds, begin, end):
    """Soft noise, and a loud voice from `begin` to `end`."""
    sound = np.random.default_rng(0).normal(0, 0.001, round(seconds * 16000)).astype(np.float32)
    sound[round(begin * 16000) : round(end * 16000)] += np.float32(0.3)
    return sound


def test_windows_around_the_speech_are_those_that_hold_most_of_it():
    sound = speech(6, 3.5, 4.3)
    starts = possible_starts(6.0, WINDOW, sound)
    slow = [abs(sound[round(s / 25 * 16000) :][: WINDOW.audio_samples]).sum() for s in range(122)]
    assert starts.tolist() == [s for s in range(122) if slow[s] >= 0.95 * max(slow)]
    assert starts[0] / 25 + 0.04 > 3.1 and starts[-1] / 25 < 3.6 and len(starts) > 5
    assert possible_starts(6.0, WINDOW).tolist() == list(range(122))
    drawn = {random_start(6.0, WINDOW, u, sound) for u in np.linspace(0, 0.999, 200)}
    assert drawn == {start / 25 for start in starts.tolist()}
    assert window_starts(6.0, WINDOW, 2, sound) == [starts[0] / 25, starts[-1] / 25]
    assert window_starts(6.0, WINDOW, 1, sound) == [starts[(len(starts) - 1) // 2] / 25]
    assert len(possible_starts(6.0, WINDOW, np.zeros(96000, np.float32))) == 122  # silence is as good anywhere
    assert possible_starts(0.5, WINDOW, speech(0.5, 0.1, 0.2)).tolist() == [0]


def test_loaders_find_the_speech(tmp_path, encode_clip):
    writer = ShardWriter(tmp_path / "shards")
    clips = [encode_clip(f"clip{i}", None, speech(6, 0.5 + i, 1.2 + i), speaker="s") for i in range(4)]
    clips.append(encode_clip("still", np.zeros((150, 16, 16, 3), np.uint8), None, speaker="s"))
    writer.write_shard(0, clips)
    index = writer.finish({"size": 16, "fps": 25, "sample_rate": 16000, "picture": "mjpeg", "prepare": {}})
    voiced = {windows: [] for windows in ("any", "speech")}
    for windows, shares in voiced.items():
        augment = Augment(gain=False, windows=windows)
        for batch in train_loader(index, WINDOW, global_batch=5, total_steps=8, augment=augment):
            shares += [(abs(x) > 0.2).float().mean().item() for x, has in zip(batch.audio, batch.has_audio) if has]
    whole = 0.7 * 16000 / WINDOW.audio_samples
    assert min(voiced["speech"]) > 0.9 * whole and min(voiced["any"]) == 0
    found = {
        speech: list(eval_loader(index, WINDOW, windows_per_clip=3, batch_size=4, speech=speech))
        for speech in (False, True)
    }
    for batch in found[True]:
        for x, has in zip(batch.audio, batch.has_audio):
            assert not has or (abs(x) > 0.2).float().mean() > 0.9 * whole
    counts = [torch.cat([b.clip for b in batches]).bincount().tolist() for batches in found.values()]
    assert counts == [[3] * 5, [3] * 5]
