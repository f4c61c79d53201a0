"""Depths of the weights as published, frozen stages and groups of the optimiser, for encoders of any depth."""

import pytest
import torch

from affekt.data.errors import SettingsError
from affekt.finetune.classifier import Classifier
from affekt.finetune.training.layers import freeze, layer_ids, parameter_groups
from affekt.pretrain.export import create_encoder
from affekt.pretrain.registry import model_settings

SMALL = {"embed_dim": 48, "depth": 2, "taps": (1, 2), "decoder_embed_dim": 32, "img_size": 32, "mel_frames": 64}


def make_classifier(name="hicmae_nano", streams="both", **changes):
    return Classifier(create_encoder(model_settings(name, streams=streams, **changes), 4, {}), 5)


def test_published_depths_of_the_base_size():
    with torch.device("meta"):
        model = make_classifier("hicmae_base")
    ids = layer_ids(model, 10, 2)
    assert set(ids.values()) == set(range(14)) and set(ids) == {name for name, _ in model.named_parameters()}
    expected = {
        "encoder.encoder_video.patch_embed.weight": 0,
        "encoder.encoder_audio.patch_embed.bias": 0,
        "encoder.encoder_video.blocks.0.norm1.weight": 1,
        "encoder.encoder_audio.blocks.9.mlp.fc2.bias": 10,
        "encoder.encoder_fusion.blocks_video.0.cross_attn.q.weight": 11,
        "encoder.encoder_fusion.blocks_audio.1.attn.q_bias": 12,
        "encoder.encoder_video.norm.weight": 13,
        "encoder.encoder_fusion.norm_audio.bias": 13,
        "layer_weights_audio": 13,
        "heads.both.linear.weight": 13,
    }
    assert {name: ids[name] for name in expected} == expected
    groups = parameter_groups(model, ids, 0.75, 0.05)
    assert sum(len(group["params"]) for group in groups) == len(ids)
    scales = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        decay = 0.0 if parameter.ndim == 1 else 0.05
        assert scales[id(parameter)] == (0.75 ** (13 - ids[name]), decay), name


@pytest.mark.parametrize("streams", ["video", "audio"])
def test_an_encoder_of_one_stream_has_no_gap(streams):
    model = make_classifier(streams=streams, **SMALL)
    s = model.encoder.settings
    fusion = s.fusion_depth if streams == "both" else 0
    assert set(layer_ids(model, s.depth, fusion).values()) == {0, 1, 2, 3}


def test_frozen_stages_get_no_gradient_and_no_group():
    model = make_classifier(**SMALL)
    ids = layer_ids(model, 2, 1)
    freeze(model, ids, 2)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, depth in ids.items() if depth < 2}
    assert any("patch_embed" in name for name in frozen) and any("blocks.0." in name for name in frozen)
    assert not any(".blocks.1." in name for name in frozen)
    grouped = sum(len(group["params"]) for group in parameter_groups(model, ids, 0.5, 0.0))
    assert grouped == len(ids) - len(frozen)
    freeze(model, ids, "encoder")
    assert all(p.requires_grad == (not name.startswith("encoder.")) for name, p in model.named_parameters())
    with pytest.raises(SettingsError, match="9 frozen stages: this encoder has 4"):
        freeze(model, ids, 9)
