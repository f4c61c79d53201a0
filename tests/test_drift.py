"""The model gives what it gave: a small golden file of our own, for where the published reference is not at hand.

`python tests/test_drift.py` writes the file anew, after a change that is meant to change numbers.
"""

import json
from pathlib import Path

import pytest
import torch

from affekt.data.transforms import Inputs
from affekt.finetune.classifier import Classifier
from affekt.pretrain.export import create_encoder
from affekt.pretrain.hicmae import HiCMAE
from affekt.pretrain.masks import random_mask, tube_mask
from affekt.pretrain.registry import model_settings

FILE = Path(__file__).with_name("golden_nano.json")
SIZE = {"embed_dim": 48, "depth": 3, "taps": (1, 3), "decoder_embed_dim": 32, "img_size": 48, "mel_frames": 64}


def wave(shape: tuple[int, ...], pace: float) -> torch.Tensor:
    """Numbers in -1..1 that need no generator, so that every machine has the same ones."""
    count = torch.Size(shape).numel()
    return (torch.arange(1, count + 1, dtype=torch.float64) * pace).sin().view(shape).float()


def fill(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for number, (name, parameter) in enumerate(sorted(model.named_parameters())):
            value = wave(tuple(parameter.shape), 0.7 + number / 97)
            if parameter.ndim > 1:
                parameter.copy_(value * 1.7 / parameter.shape[-1] ** 0.5)
            else:  # norms lie around 1, biases around 0
                parameter.copy_(0.2 * value + (1.0 if "norm" in name and name.endswith("weight") else 0.0))


def compute() -> dict[str, list[float]]:
    settings = model_settings("hicmae_nano", **SIZE)
    video, audio = wave((3, 3, 8, 48, 48), 1.1), wave((3, 1, 64, 128), 1.3)
    has_video, has_audio = torch.tensor([True, True, False]), torch.tensor([True, False, True])
    inputs = Inputs(video, audio, has_video, has_audio, torch.tensor([64, 64, 40]))
    keys = torch.tensor([11, 22, 33])
    masks = tube_mask(keys, settings.grid_video, 0.7), random_mask(keys, 32, 0.7)
    model = HiCMAE(settings)
    fill(model)
    predictions, taps = model.reconstruct(inputs, *masks)
    losses = model(inputs, *masks)
    losses["loss"].backward()
    gradients = [p.grad.norm() for _, p in sorted(model.named_parameters()) if p.ndim > 1]
    classifier = Classifier(create_encoder(settings, 4, {}), 6)
    fill(classifier)
    found = {
        "prediction_video": predictions["video"][0, ::9, ::211],
        "prediction_audio": predictions["audio"][2, ::7, ::41],
        "taps": torch.stack([tap.mean(1)[0, ::6] for tap in taps["video"] + taps["audio"]]),
        "losses": torch.stack([losses[name] for name in sorted(losses)]),
        "gradients": torch.stack(gradients)[::5],
        "logits": classifier(inputs),
    }
    return {name: value.detach().flatten().tolist() for name, value in found.items()}


def test_nothing_drifts():
    stored, found = json.loads(FILE.read_text()), compute()
    assert stored.keys() == found.keys()
    for name, values in stored.items():
        largest = max(map(abs, values))
        assert found[name] == pytest.approx(values, rel=1e-4, abs=2e-5 * largest), name


if __name__ == "__main__":
    rounded = {name: [float(f"{value:.7g}") for value in values] for name, values in compute().items()}
    FILE.write_text(json.dumps(rounded) + "\n")
