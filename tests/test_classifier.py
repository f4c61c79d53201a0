"""The fine-tuning model: single streams at full quality beside both, and what is absent has no influence."""

from dataclasses import replace

import pytest
import torch

from affekt.data.errors import SettingsError
from affekt.data.transforms import Inputs
from affekt.finetune.classifier import Classifier
from affekt.pretrain.export import create_encoder
from affekt.pretrain.registry import model_settings

SMALL = {"embed_dim": 48, "depth": 2, "taps": (1, 2), "decoder_embed_dim": 32, "img_size": 32, "mel_frames": 64}


def make_classifier(streams="both", **options):
    torch.manual_seed(0)
    model = Classifier(create_encoder(model_settings("hicmae_nano", streams=streams, **SMALL), 4, {}), 5, **options)
    for parameter in model.parameters():  # no parameter may hide behind a zero
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, parameter.mean().item(), 0.1)
    return model


def make_inputs(has_video=(True, True, False), has_audio=(True, False, True), frames=(64, 64, 40)):
    s = model_settings("hicmae_nano", **SMALL)
    generator = torch.Generator().manual_seed(1)
    video = torch.randn(len(has_video), 3, s.num_frames, s.img_size, s.img_size, generator=generator)
    audio = torch.randn(len(has_video), 1, s.mel_frames, s.mel_bins, generator=generator)
    return Inputs(video, audio, torch.tensor(has_video), torch.tensor(has_audio), torch.tensor(frames))


def take(inputs, rows):
    parts = (inputs.video, inputs.audio, inputs.has_video, inputs.has_audio, inputs.audio_frames)
    return Inputs(*(part[rows] for part in parts))


def test_published_size():
    model = Classifier(create_encoder(model_settings("hicmae_base"), 4, {}), 6, paths=("both",))
    assert sum(p.numel() for p in model.parameters()) == 80_792_602  # spec: 370 tensors
    assert len(model.state_dict()) == 370


def test_its_weights_can_be_saved_and_loaded():
    model, inputs = make_classifier(missing="token"), make_inputs()
    other = make_classifier(missing="token")
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    assert not torch.equal(other(inputs), model(inputs))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(inputs), model(inputs))
    assert {name for name, _ in model.named_parameters()} == set(model.state_dict())


def test_what_a_clip_lacks_has_no_influence():
    model, inputs = make_classifier(), make_inputs()
    first = model(inputs)
    assert first.shape == (3, 5) and first.isfinite().all()
    video, audio = inputs.video.clone(), inputs.audio.clone()
    video[2], audio[1], audio[2, :, 48:] = 7.0, 7.0, 7.0  # absent, absent, and padding
    torch.testing.assert_close(model(replace(inputs, video=video, audio=audio)), first)


def test_a_clip_in_a_mixed_batch_is_judged_as_alone():
    model, inputs = make_classifier(), make_inputs()
    together = model(inputs)
    for row in range(3):
        torch.testing.assert_close(model(take(inputs, [row]))[0], together[row])


def test_one_stream_goes_through_its_own_head_slowly_written_out():
    model, inputs = make_classifier(), make_inputs()
    tokens = model.encoder.layers(take(inputs, [1]), "both")
    weights = model.layer_weights_video.softmax(0)
    summed = sum(weights[i - 1] * tokens[f"video_{i}"].mean(1) for i in (1, 2))
    head = model.heads["video"]
    slow = head.linear(head.norm(torch.cat((summed, tokens["fusion_video"].mean(1)), 1)))
    torch.testing.assert_close(model(inputs)[1:2], slow)
    unmixed = tokens["video_2"]
    for block in model.encoder.encoder_fusion.blocks_video:
        unmixed = block(unmixed, None)
    torch.testing.assert_close(tokens["fusion_video"], model.encoder.encoder_fusion.norm_video(unmixed))


@pytest.mark.parametrize("missing", ["leave_out", "token"])
def test_every_parameter_gets_a_gradient(missing):
    model = make_classifier(missing=missing)
    model(make_inputs()).square().sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_tokens_stand_in_for_what_is_absent():
    model, inputs = make_classifier(missing="token"), make_inputs()
    before = model(inputs)
    with torch.no_grad():
        model.missing_audio += 1.0
    after = model(inputs)
    assert torch.equal(before[[0, 2]], after[[0, 2]]) and (before[1] - after[1]).abs().max() > 1e-3


def test_a_clip_without_a_path_is_no_number():
    model = make_classifier(paths=("both", "audio"))
    logits = model(make_inputs())
    assert logits[[0, 2]].isfinite().all() and logits[1].isnan().all()


def test_encoders_of_one_stream():
    model = make_classifier("audio", paths=("audio",))
    inputs = make_inputs((False, False, False), (True, True, True))
    logits = model(replace(inputs, video=None))
    assert logits.isfinite().all()
    logits.sum().backward()
    lacking = replace(inputs, has_audio=torch.tensor([True, False, True]))
    assert model(lacking)[:, 0].isnan().tolist() == [False, True, False]
    assert set(make_classifier("audio").heads) == {"audio"}
    with pytest.raises(SettingsError, match=r"paths are .*'both'.*this encoder has audio"):
        make_classifier("audio", paths=("both",))
    with pytest.raises(SettingsError, match="no stream of this encoder"):
        model(replace(inputs, audio=None))


@pytest.mark.parametrize("stream, other", [("audio", "video"), ("video", "audio")])
@pytest.mark.parametrize("missing", ["leave_out", "token"])
def test_a_batch_loaded_without_a_stream_is_judged_as_one_whose_clips_lack_it(missing, stream, other):
    model = make_classifier(missing=missing)
    none = torch.zeros(3, dtype=torch.bool)
    inputs = replace(make_inputs((True,) * 3, (True,) * 3), **{f"has_{other}": none})
    calls = []
    getattr(model.encoder, f"encoder_{other}").register_forward_hook(lambda *_: calls.append(1))
    expected = model(inputs)
    assert len(calls) == 1 and expected.isfinite().all()
    torch.testing.assert_close(model(replace(inputs, **{other: None})), expected)
    torch.testing.assert_close(model(replace(inputs, **{other: None, f"has_{other}": ~none})), expected)
    assert len(calls) == 1  # what is not there costs nothing


def test_options_that_would_do_nothing_are_refused():
    for options in (
        {"missing": "zeros"},
        {"missing": "token", "paths": ("video",)},
        {"paths": ()},
        {"paths": ("text",)},
    ):
        with pytest.raises(SettingsError, match=r"^(missing|paths)"):
            make_classifier(**options)
    with pytest.raises(SettingsError, match="needs an encoder of both"):
        make_classifier("audio", missing="token")
