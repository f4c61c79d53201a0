"""Heads of a fine-tuning: statistics per band against a slow twin, what has no gradient is frozen, files that parse."""

from importlib import resources

import pytest
import torch

from affekt.arguments import find_experiment
from affekt.data.errors import SettingsError
from affekt.data.transforms import Inputs
from affekt.finetune.training.heads import statistics_of_parts
from affekt.finetune.training.network import create_network, set_drop_path
from affekt.finetune.training.settings import FinetuneSettings

MODEL = {"name": "hicmae_nano", "embed_dim": 24, "num_heads": 2, "depth": 2, "taps": [1, 2], "img_size": 32}
MODEL |= {"num_frames": 4, "mel_frames": 64, "decoder_embed_dim": 16}


def settings(**changes):
    data = {"shards": "x", "test": {"split": "test"}, "dev": {"split": "dev"}}
    return FinetuneSettings.parse({"out": "x", "model": MODEL, "data": data, "train": {"epochs": 1}} | changes)


def inputs(batch=4, frames=64):
    torch.manual_seed(0)
    video, audio = torch.randn(batch, 3, 4, 32, 32), torch.randn(batch, 1, 64, 128)
    has = torch.ones(batch, dtype=torch.bool)
    return Inputs(video, audio, has, has, torch.full((batch,), frames))


@pytest.mark.parametrize("columns", [1, 2])
def test_statistics_are_those_of_a_loop_over_bands_and_columns(columns):
    torch.manual_seed(0)
    x, steps = torch.randn(2, 5, 6, 4, 3), torch.tensor([[1.0, 1, 1, 0, 0], [1.0] * 5])
    found = statistics_of_parts(x, steps, (3, columns))
    wide = 4 // columns
    for row, length in enumerate((3, 5)):
        for band in range(3):
            for column in range(columns):
                cell = x[row, :length, 2 * band : 2 * band + 2, wide * column : wide * (column + 1)]
                part, place = cell.flatten(1, 2).mean(1), band * columns + column
                assert torch.allclose(found[row, place], part.mean(0), atol=1e-6)
                deviation = (part.var(0, correction=0) + 1e-5).sqrt()
                assert torch.allclose(found[row, 3 * columns + place], deviation, atol=1e-6)


def test_a_constant_band_has_a_gradient_that_is_a_number():
    x = torch.zeros(1, 4, 2, 2, 3, requires_grad=True)
    statistics_of_parts(x, torch.ones(1, 4), (2, 1)).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["layers", "bands", "cells"])
def test_padding_changes_no_judgement(kind):
    network = create_network(settings(head={"kind": kind}), 5, {}, seed=0).eval()
    some = inputs(frames=32)
    other = Inputs(some.video, some.audio.clone(), some.has_video, some.has_audio, some.audio_frames)
    other.audio[:, :, 32:] = 7.0
    assert torch.equal(network(some), network(other))


@pytest.mark.parametrize("kind", ["layers", "bands", "cells"])
@pytest.mark.parametrize("streams", ["both", "audio", "video"])
def test_every_weight_that_is_trained_gets_a_gradient(kind, streams):
    if (kind, streams) == ("cells", "audio"):
        with pytest.raises(SettingsError, match="sound alone has none"):
            create_network(settings(head={"kind": kind}, streams=streams), 5, {}, seed=0)
        return
    network = create_network(settings(head={"kind": kind}, streams=streams), 5, {}, seed=0)
    whole = inputs()
    batch = Inputs(
        whole.video if streams != "audio" else None,
        whole.audio if streams != "video" else None,
        whole.has_video,
        whole.has_audio,
        whole.audio_frames,
    )
    network(batch).sum().backward()
    idle = [n for n, p in network.named_parameters() if p.requires_grad and p.grad is None]
    frozen = [n for n, p in network.named_parameters() if not p.requires_grad]
    assert not idle and bool(frozen) == (streams != "both")


def test_logits_are_float32_under_autocast_and_the_head_may_start_small():
    network = create_network(settings(head={"kind": "bands", "init_std": 0.001}), 5, {}, seed=0).eval()
    assert network.heads["both"].linear.weight.std() < 0.002 and not network.heads["both"].linear.bias.any()
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(inputs())
    assert logits.dtype == torch.float32 and not torch.equal(logits, logits.bfloat16().float())


def test_a_seed_decides_the_head_and_drop_path_grows_with_depth():
    one, same, other = (create_network(settings(drop_path=0.2), 3, {}, seed=s) for s in (0, 0, 1))
    weights = [n.heads["both"].linear.weight for n in (one, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert [block.drop_path.drop_prob for block in one.encoder.encoder_audio.blocks] == [0.0, 0.2]
    set_drop_path(one.encoder, 0.0)
    assert one.encoder.settings.drop_path == 0 and one.encoder.encoder_video.blocks[1].drop_path.drop_prob == 0


def test_shipped_experiments_parse():
    names = [path.name for path in resources.files("affekt.launch").iterdir() if path.name.endswith("_finetune.yaml")]
    assert {"cremad_finetune.yaml", "mafw_finetune.yaml", "werewolf_finetune.yaml"} <= set(names)
    tasks = {name: FinetuneSettings.read(find_experiment(name)).task for name in names}
    assert tasks["cremad_finetune.yaml"] == "single" and tasks["werewolf_finetune.yaml"] == "dimensions"


def test_settings_come_back_from_their_yaml(tmp_path):
    path = tmp_path / "settings.yaml"
    for name in ("cremad_finetune", "werewolf_finetune"):
        first = FinetuneSettings.read(find_experiment(name))
        path.write_text(first.to_yaml())
        assert FinetuneSettings.read(path) == first
