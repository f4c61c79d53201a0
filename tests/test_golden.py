"""Parity with the published HiCMAE code on a small reference model (weights, inputs and outputs stored in one file)."""

import argparse
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from affekt.data.transforms import Inputs
from affekt.finetune.classifier import published_classifier
from affekt.pretrain.export import start_from
from affekt.pretrain.hicmae import HiCMAE
from affekt.pretrain.hicmae_settings import HiCMAESettings
from affekt.pretrain.masks import Mask
from affekt.pretrain.objectives import contrastive_loss
from affekt.pretrain.patches import gather_tokens, patchify_audio, patchify_video, standardise_audio, video_target
from affekt.pretrain.published import our_name, our_tensor
from affekt.pretrain.registry import create_model

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason="../shared/golden is not here")


@pytest.fixture(scope="module")
def golden():
    torch.set_float32_matmul_precision("highest")
    tensors = load_file(GOLDEN / "hicmae_reference.safetensors")
    config = json.loads((GOLDEN / "hicmae_reference.json").read_text())
    c = config["config"]
    model = HiCMAE(
        HiCMAESettings(
            embed_dim=c["embed_dim"],
            num_heads=c["num_heads"],
            depth=c["depth"],
            fusion_depth=c["fusion_depth"],
            decoder_embed_dim=c["decoder_embed_dim"],
            decoder_num_heads=c["decoder_num_heads"],
            taps=tuple(tap + 1 for tap in c["taps_0based"]),
            img_size=c["img_size"],
            num_frames=c["num_frames"],
            mel_frames=c["audio_frames"],
            mel_bins=c["mel_bins"],
        )
    )
    weights = {
        our_name(k.removeprefix("pretrain/")): our_tensor(v) for k, v in tensors.items() if k.startswith("pretrain/")
    }
    model.load_state_dict(weights, strict=True)
    return model, tensors, config["losses"]


def inputs_of(tensors) -> tuple[Inputs, Mask, Mask]:
    video, audio = tensors["in/video"], tensors["in/audio"]
    present = torch.ones(len(video), dtype=torch.bool)
    frames = torch.full((len(video),), audio.shape[2])
    inputs = Inputs(video=video, audio=audio, has_video=present, has_audio=present, audio_frames=frames)
    masks = (Mask.from_hidden(tensors[f"in/mask_{stream}"].bool()) for stream in ("video", "audio"))
    return inputs, *masks


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def test_golden_outputs_and_losses(golden):
    model, tensors, losses = golden
    inputs, mask_video, mask_audio = inputs_of(tensors)
    with torch.no_grad():
        predictions, taps = model.reconstruct(inputs, mask_video, mask_audio)
        parts = model(inputs, mask_video, mask_audio)
    assert error(predictions["video"], tensors["out/pred_video"]) < 2e-6
    assert error(predictions["audio"], tensors["out/pred_audio"]) < 2e-6
    paired = torch.ones(len(inputs.video), dtype=torch.bool)
    for number, (video, audio) in enumerate(zip(taps["video"], taps["audio"], strict=True)):
        loss = contrastive_loss(video.mean(1), audio.mean(1), paired, 0.07)
        assert loss.item() == pytest.approx(losses["contrastive_per_tap"][number], rel=2e-6)
        video, audio = (torch.nn.functional.normalize(tap.mean(1), dim=-1) for tap in (video, audio))
        assert error(video @ audio.T / 0.07, tensors[f"out/logits_per_video.{number}"]) < 2e-6
    assert parts["loss_video"].item() == pytest.approx(losses["video_frame_diff"], rel=2e-6)
    assert parts["loss_audio"].item() == pytest.approx(losses["audio"], rel=2e-6)
    assert parts["loss_contrast"].item() == pytest.approx(sum(losses["contrastive_per_tap"]), rel=2e-6)
    assert parts["loss"].item() == pytest.approx(losses["total_lambda_0.0025"], rel=2e-6)


def test_golden_targets(golden):
    _, tensors, _ = golden
    inputs, mask_video, mask_audio = inputs_of(tensors)
    hidden = gather_tokens(patchify_video(inputs.video, 2, 16), mask_video.ids_mask)
    assert error(video_target(hidden, 2, frame_difference=True), tensors["out/target_video"]) < 1e-6
    assert error(video_target(hidden, 2, frame_difference=False), tensors["out/target_video_no_frame_diff"]) < 1e-6
    audio = gather_tokens(patchify_audio(inputs.audio, 16), mask_audio.ids_mask)
    assert error(standardise_audio(audio)[0], tensors["out/target_audio"]) < 1e-6


def test_golden_gradients(golden):
    model, tensors, _ = golden
    model.zero_grad()
    model(*inputs_of(tensors))["loss"].backward()
    stored = {name: value for name, value in tensors.items() if name.startswith("grad/")}
    assert len(stored) == 5
    for name, value in stored.items():
        gradient = model.get_parameter(our_name(name.removeprefix("grad/"))).grad
        assert error(gradient, our_tensor(value)) < 2e-6, name


def test_golden_finetuning_logits(golden, tmp_path):
    """A fine-tuning file of the authors: hierarchical feature fusion, one head over both streams."""
    model, tensors, _ = golden
    inputs, *_ = inputs_of(tensors)
    told = {k.removeprefix("finetune/"): v for k, v in tensors.items() if k.startswith("finetune/")}
    assert len(told) == 6
    told |= {k.removeprefix("pretrain/"): v for k, v in tensors.items() if k.startswith("pretrain/encoder")}
    told = {k: v for k, v in told.items() if not k.startswith("encoder_to_decoder")}
    torch.save({"module": told}, tmp_path / "finetuned.pth")
    names = ("num_heads", "taps", "img_size", "num_frames", "mel_frames", "mel_bins")
    classifier = published_classifier(
        tmp_path / "finetuned.pth", **{name: getattr(model.settings, name) for name in names}
    )
    with torch.no_grad():
        logits = classifier(inputs)
    assert error(logits, tensors["out/finetune_logits"]) < 2e-6


def listing(title: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes under a title of the facts file, whose lines may stand for several blocks: `i = 0..9`."""
    text = (GOLDEN.parent / "spec" / "hicmae_checkpoint.md").read_text().split(f"## {title}")[1].split("```")[1]
    shapes = {}
    for name, shape, first, last in re.findall(r"^(\S+) +\[(.*?)\](?: +i = (\d+)\.\.(\d+))?$", text, re.MULTILINE):
        for i in range(int(first or 0), int(last or 0) + 1):
            shapes[name.replace("{i}", str(i))] = tuple(map(int, shape.split(",")))
    return shapes


def test_golden_names_of_the_published_base_files(tmp_path, capsys):
    """Every tensor of both kinds of file, under its name and in its shape, finds a place that no other one has."""
    generator = torch.Generator().manual_seed(0)
    pretrained, finetuned = listing("Pre-training model"), listing("Fine-tuning model")
    assert (len(pretrained), len(finetuned)) == (540, 370)
    for name, shapes in (("pretrained", pretrained), ("finetuned", finetuned)):
        weights = {tensor: torch.randn(shape, generator=generator) for tensor, shape in shapes.items()}
        torch.save({"model": weights, "epoch": 99, "args": argparse.Namespace(lr=3e-4)}, tmp_path / f"{name}.pth")
    model = create_model("hicmae_base")
    start_from(model, tmp_path / "pretrained.pth")
    classifier = published_classifier(tmp_path / "finetuned.pth")
    assert not capsys.readouterr().err  # nothing new and nothing left out
    for module, count in ((model, 99_609_344), (classifier, 80_792_602)):
        assert sum(parameter.numel() for parameter in module.parameters()) == count
        deviations = torch.stack([p.std() for p in module.parameters() if p.numel() > 1000])
        assert ((deviations - 1).abs() < 0.2).all()  # what stands there came from the file
