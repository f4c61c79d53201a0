"""Reconstruction pictures: a decoder that is right shows the target itself, in the colours of the clip."""

import numpy as np
import pytest
import torch

from affekt.data.transforms import Inputs, normalise_picture
from affekt.pretrain.hicmae import patches_audio, patches_video
from affekt.pretrain.masks import random_mask, tube_mask
from affekt.pretrain.patches import gather_tokens, standardise_audio, video_target
from affekt.pretrain.pictures import HIDDEN_GREY, audio_images, reconstruction_picture, video_images
from affekt.pretrain.registry import create_model

SMALL = {"embed_dim": 48, "depth": 2, "taps": (1, 2), "decoder_embed_dim": 32, "img_size": 32, "mel_frames": 64}


def make(frame_difference=True, has_video=(True, True)):
    torch.manual_seed(0)
    model = create_model("hicmae_nano", **SMALL, frame_difference=frame_difference)
    s, keys = model.settings, torch.arange(2)
    pixels = torch.randint(0, 256, (2, 3, s.num_frames, 32, 32), dtype=torch.uint8)
    mel = torch.randn(2, 1, s.mel_frames, s.mel_bins)
    frames = torch.full((2,), s.mel_frames)
    inputs = Inputs(normalise_picture(pixels), mel, torch.tensor(has_video), torch.ones(2, dtype=torch.bool), frames)
    mask_audio = random_mask(keys, s.grid_audio[0] * s.grid_audio[1], 0.75)
    return model, pixels, inputs, tube_mask(keys, s.grid_video, 0.75), mask_audio


@pytest.mark.parametrize("frame_difference", [True, False])
def test_the_right_prediction_shows_the_pixels_themselves(frame_difference):
    model, pixels, inputs, mask, _ = make(frame_difference)
    hidden = gather_tokens(patches_video(inputs, model.settings), mask.ids_mask)
    prediction = video_target(hidden, model.settings.tubelet_size, frame_difference)
    images = video_images(model, inputs, prediction, mask, clip=1)
    first = pixels[1, :, 0].permute(1, 2, 0).numpy() / 255
    np.testing.assert_allclose(images["target"][0], first, atol=1e-5)
    np.testing.assert_allclose(images["output"], images["target"], atol=1e-4)
    grey = np.isclose(images["input"][0], HIDDEN_GREY).all(-1)
    assert grey.mean() == 0.75
    np.testing.assert_allclose(images["input"][0][~grey], first[~grey], atol=1e-5)


def test_the_right_prediction_shows_the_spectrogram_itself():
    model, _, inputs, _, mask = make()
    prediction, *_ = standardise_audio(gather_tokens(patches_audio(inputs, model.settings), mask.ids_mask))
    images = audio_images(model, inputs, prediction, mask, clip=1)
    np.testing.assert_allclose(images["target"], inputs.audio[1, 0].numpy(), atol=1e-6)
    np.testing.assert_allclose(images["output"], images["target"], atol=1e-4)
    assert not np.allclose(images["input"], images["target"], atol=0.1)


def test_a_picture_is_written_and_the_model_stays_in_training(tmp_path):
    model, _, inputs, mask_video, mask_audio = make(has_video=(False, True))
    reconstruction_picture(tmp_path / "pictures" / "step.png", model.train(), inputs, mask_video, mask_audio)
    assert (tmp_path / "pictures" / "step.png").read_bytes().startswith(b"\x89PNG") and model.training
