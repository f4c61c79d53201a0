"""Self-distillation beside its twin by hand; what it learns from the complete view sends no gradient back."""

import pytest
import torch

from affekt.data.order import clip_key
from affekt.data.transforms import Inputs
from affekt.finetune.classifier import Classifier
from affekt.finetune.training.distilling import Distilling, divergence, feature_distance
from affekt.finetune.training.streams import incomplete_view
from affekt.pretrain.export import create_encoder
from affekt.pretrain.registry import model_settings

SMALL = {"embed_dim": 24, "depth": 2, "taps": (1, 2), "decoder_embed_dim": 16, "img_size": 32, "mel_frames": 64}


def make_inputs():
    generator = torch.Generator().manual_seed(1)
    video, audio = (torch.randn(4, *shape, generator=generator) for shape in ((3, 8, 32, 32), (1, 64, 128)))
    has_video, has_audio = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
    return Inputs(video, audio, has_video, has_audio, torch.full((4,), 64))


def test_the_terms_by_hand():
    torch.manual_seed(0)
    model = Classifier(create_encoder(model_settings("hicmae_nano", **SMALL), 4, {}), 5).eval()
    inputs, keys = make_inputs(), [clip_key(0, 0, f"clip{i}") for i in range(4)]
    known = torch.tensor([True, True, True, False]).expand(4, 4)

    def loss(outputs):
        there = outputs.isfinite().all(1)
        return {"loss": torch.where(there, outputs.square().sum(1), 0.0).sum()}

    settings = Distilling(task=0.5, features=2.0, answers=3.0)
    found = settings.losses(model, loss, inputs, keys, classes=4, known=known)
    view, *hidden = incomplete_view(inputs, keys, 2)
    assert all(part.any() for part in hidden)
    whole, partly = model(inputs), model(view)
    torch.testing.assert_close(found["loss_incomplete"], loss(partly)["loss"])
    cosines = []
    for stream, rows in (("video", (0, 1)), ("audio", (0, 2))):
        for row in rows:
            z, z_m = (model.features(x)[stream][row].flatten() for x in (inputs, view))
            cosines.append(1 - z @ z_m / (z.norm() * z_m.norm()))
    torch.testing.assert_close(found["loss_features"], torch.stack(cosines).mean())
    answers = []
    for row in range(3):  # the fourth has no stream, and no answer
        p, q = (x[row, :3].softmax(0) for x in (whole, partly))
        gap = (whole[row, 4] - partly[row, 4]).abs()
        smooth = gap.square() / 2 if gap < 1 else gap - 0.5
        answers.append((p * (p / q).log()).sum() + smooth)
    torch.testing.assert_close(found["loss_answers"], torch.stack(answers).mean())
    total = loss(whole)["loss"] + 0.5 * loss(partly)["loss"] + 2 * found["loss_features"] + 3 * found["loss_answers"]
    torch.testing.assert_close(found["loss"], total)
    found["loss"].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert set(Distilling(answers=1.0).losses(model, loss, inputs, keys, classes=4, known=known)) == {
        "loss",
        "loss_answers",
    }


def test_the_complete_view_is_the_teacher():
    features = torch.randn(6, 2, 4, requires_grad=True)
    inputs = make_inputs()
    three = Inputs(None, None, inputs.has_video[:3], inputs.has_audio[:3], inputs.audio_frames[:3])
    feature_distance({"video": features}, 3, three).backward()
    assert not features.grad[:3].any() and features.grad[3:5].any() and not features.grad[5].any()
    whole, partly = (torch.randn(3, 5, requires_grad=True) for _ in range(2))
    divergence(whole, partly, 4, torch.ones(3, 4, dtype=torch.bool), multi=False).backward()
    assert whole.grad is None and partly.grad.abs().min() > 0


def test_answers_of_several_classes():
    whole, partly = torch.randn(2, 3), torch.randn(2, 3)
    known = torch.tensor([[True, True, False], [True, True, True]])
    slow = []
    for row in range(2):
        p, q = (x[row].double().sigmoid() for x in (whole, partly))
        both = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        slow.append(both[known[row]].sum())
    found = divergence(whole, partly, 3, known, multi=True)
    torch.testing.assert_close(found, torch.stack(slow).mean().float())
    assert divergence(whole, whole, 3, known, multi=True).abs() < 1e-6
    assert divergence(whole, whole, 3, known, multi=False) == pytest.approx(0, abs=1e-6)
