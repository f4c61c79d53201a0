"""The length of the window is the experiment's: any that fits the patches runs, and others say what would."""

import pytest
import torch

from affekt.data.decode import Window
from affekt.data.errors import SettingsError
from affekt.data.loader import train_loader
from affekt.data.mixture import Corpus
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
