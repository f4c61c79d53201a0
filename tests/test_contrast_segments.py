"""The contrast over parts of the time: each part is pooled by itself, and a shift in time is told from none."""

import os

import pytest
import torch
from torch.nn.functional import normalize

from affekt.data.errors import SettingsError
from affekt.data.transforms import Inputs
from affekt.pretrain.encoder import Encoder
from affekt.pretrain.masks import random_mask, tube_mask
from affekt.pretrain.patches import segment_means
from affekt.pretrain.registry import create_model, model_settings

SMALL = {"embed_dim": 24, "num_heads": 2, "img_size": 32, "num_frames": 8, "mel_frames": 64, "decoder_num_heads": 2}


def slow_means(x, ids, per_step, steps, segments, valid):
    out = torch.zeros(len(x), segments, x.shape[2])
    for row in range(len(x)):
        for segment in range(segments):
            mine = [
                x[row, n]
                for n in range(x.shape[1])
                if valid[row, n] and int(ids[row, n]) // per_step // (steps // segments) == segment
            ]
            if mine:
                out[row, segment] = torch.stack(mine).mean(0)
    return out


def test_segments_are_the_means_of_their_tokens():
    seed = int.from_bytes(os.urandom(4))
    print(f"seed {seed}")
    torch.manual_seed(seed)
    keys = torch.randint(2**31, (5,))
    mask = random_mask(keys, 8 * 3, 0.7)
    x, valid = torch.randn(5, mask.ids_keep.shape[1], 7), torch.rand(5, mask.ids_keep.shape[1]) > 0.3
    found = segment_means(x, mask.ids_keep, 3, 8, 4, valid)
    torch.testing.assert_close(found, slow_means(x, mask.ids_keep, 3, 8, 4, valid))
    everything = torch.arange(24).expand(5, 24)
    x = torch.randn(5, 24, 7)
    every = torch.ones(5, 24, dtype=torch.bool)
    torch.testing.assert_close(segment_means(x, None, 3, 8, 2), slow_means(x, everything, 3, 8, 2, every))


@pytest.mark.parametrize("projector", [0, 10])
def test_the_model_compares_part_with_part(projector):
    torch.manual_seed(0)
    extra = {"contrast_segments": 4, "projector_dim": projector, "contrast_weight": 1.0, **SMALL}
    model = create_model("hicmae_nano", **extra)
    s, keys = model.settings, torch.arange(3)
    yes = torch.ones(3, dtype=torch.bool)
    inputs = Inputs(torch.randn(3, 3, 8, 32, 32), torch.randn(3, 1, 64, 128), yes, yes, torch.full((3,), 64))
    masks = tube_mask(keys, s.grid_video, 0.5), random_mask(keys, 32, 0.5)
    taps, _ = model.encode(inputs, *masks)
    features = model.features(taps, *masks)
    assert features.shape == (3, 2, len(s.taps), 4 * (projector or 24))
    losses = model(inputs, *masks)
    losses["loss"].backward()
    video, audio = normalize(features[:, 0, 0], dim=1), normalize(features[:, 1, 0], dim=1)
    logits = audio @ video.T / s.temperature
    by_hand = -(logits.log_softmax(1).diagonal().mean() + logits.T.log_softmax(1).diagonal().mean()) / 2
    alone = create_model("hicmae_nano", **{**extra, "taps": s.taps[:1]})
    alone.load_state_dict({k: v for k, v in model.state_dict().items() if k in alone.state_dict()}, strict=False)
    assert alone.settings.taps == s.taps[:1]
    torch.testing.assert_close(alone(inputs, *masks)["loss_contrast"], by_hand)
    shifted = features[:, 0, 0].unflatten(1, (4, -1)).roll(1, 1).flatten(1)  # the same parts at other times
    assert not torch.allclose(normalize(shifted, dim=1) @ audio.T, video @ audio.T, atol=1e-3)


def test_an_encoder_gives_what_was_compared():
    settings = model_settings("hicmae_nano", contrast_segments=4, **SMALL)
    model = create_model("hicmae_nano", contrast_segments=4, **SMALL).eval()
    encoder = Encoder(settings, None, lambda inputs: inputs, {}, model).eval()
    yes = torch.ones(2, dtype=torch.bool)
    inputs = Inputs(torch.randn(2, 3, 8, 32, 32), torch.randn(2, 1, 64, 128), yes, yes, torch.full((2,), 64))
    found = encoder.contrast_features(inputs)
    tokens = encoder.layers(inputs)[f"audio_{settings.taps[0]}"]  # 4 steps of 8 bands
    torch.testing.assert_close(found["audio_taps"][:, 0].view(2, 4, 24), tokens.view(2, 4, 8, 24).mean(2))
    assert found["video_taps"].shape == (2, len(settings.taps), 4 * 24)


def test_segments_hold_whole_tokens():
    with pytest.raises(SettingsError, match="contrast_segments 3"):
        model_settings("hicmae_nano", contrast_segments=3)
