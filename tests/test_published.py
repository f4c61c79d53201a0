"""The authors' files: every name finds its place, what does not fit is told, and nothing in a file is ever run."""

import argparse
import json
import os
from pathlib import Path

import pytest
import torch

import affekt
from affekt.cli import run
from affekt.data.errors import CheckpointError, SettingsError
from affekt.finetune.classifier import create_classifier, published_classifier
from affekt.pretrain.export import load_encoder, published_encoder, start_from
from affekt.pretrain.published import PREFIXES, our_name, read_published
from affekt.pretrain.registry import create_model

SMALL = {"embed_dim": 64, "num_heads": 1, "depth": 10, "decoder_embed_dim": 64, "decoder_num_heads": 1}


def their_name(name: str) -> str:
    for theirs, ours in PREFIXES:
        if name.startswith(ours):
            name = theirs + name[len(ours) :]
            break
    return name.replace("decoder_pred", "head").replace("patch_embed.", "patch_embed.proj.")


def their_tensor(name: str, value: torch.Tensor) -> torch.Tensor:
    if name.endswith("encoder_video.patch_embed.weight"):
        return value.unflatten(1, (2, 16, 16, 3)).permute(0, 4, 1, 2, 3).clone()
    return value.unflatten(1, (1, 16, 16)).clone() if name.endswith("encoder_audio.patch_embed.weight") else value


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create_model("hicmae_base", **SMALL)


@pytest.fixture
def write(model, tmp_path):
    """`write(name, key="model", drop=..., **extra tensors)`: a file as the authors' training writes it."""

    def write_file(name="pretrained.pth", key="model", drop=" ", **extra):
        weights = {their_name(n): their_tensor(n, v) for n, v in model.state_dict().items() if not n.startswith(drop)}
        arguments = argparse.Namespace(model="pretrain_hicmae", lr=3e-4, opt_betas=[0.9, 0.95], output_dir="/somewhere")
        content = {key: weights | extra, "optimizer": {"state": {}}, "epoch": 99, "scaler": {}, "args": arguments}
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return write_file


def classifier_tensors(depth=10, width=256, classes=6):
    layers = {f"{stream}_layer_weights": torch.rand(depth) for stream in ("video", "audio")}
    norm = {"fc_norm.weight": torch.rand(width), "fc_norm.bias": torch.rand(width)}
    return layers | norm | {"head.weight": torch.randn(classes, width), "head.bias": torch.randn(classes)}


def test_names_of_the_authors_and_ours_are_one_to_one(model):
    theirs = [their_name(name) for name in model.state_dict()]
    assert len(set(theirs)) == len(theirs) and [our_name(name) for name in theirs] == list(model.state_dict())
    for name in ("decoder.head.weight", "encoder_to_decoder_audio.weight", "encoder_fusion.blocks_audio.1.attn.q_bias"):
        assert name in theirs
    assert "mask_token" in theirs and "mask_token_audio" in theirs and "encoder.patch_embed.proj.weight" in theirs


def test_a_pretraining_file_is_read_whole(model, write, capsys):
    published = read_published(write())
    assert (published.settings.depth, published.settings.fusion_depth) == (10, 2) and not published.classifier
    again = create_model("hicmae_base", **SMALL)
    seen = start_from(again, published.path)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    assert seen["data_sets"] == ["VoxCeleb2"] and "VoxCeleb2" in seen["licences"][0]
    assert not capsys.readouterr().err  # nothing new, nothing left out
    published_encoder(published)
    assert "tensors are left out: decoder_audio, decoder_video" in capsys.readouterr().err


def test_a_finetuning_file_gives_encoder_and_classifier(model, write, capsys):
    told = classifier_tensors()
    path = write("finetuned.pth", key="module", drop="decoder_", **told)
    published = read_published(path)
    classifier = published_classifier(path)
    assert not capsys.readouterr().err
    encoder = published_encoder(published)
    told_left = "6 tensors are left out: fc_norm, head, layer_weights_audio, layer_weights_video"
    assert told_left in capsys.readouterr().err
    assert all(torch.equal(v, encoder.state_dict()[name]) for name, v in classifier.encoder.state_dict().items())
    assert torch.equal(classifier.heads["both"].linear.weight, told["head.weight"])
    assert torch.equal(classifier.heads["both"].norm.bias, told["fc_norm.bias"])
    assert torch.equal(classifier.layer_weights_audio, told["audio_layer_weights"])
    start_from(create_model("hicmae_base", **SMALL), path)
    assert "tensors are new: decoder_audio, decoder_video" in capsys.readouterr().err
    with pytest.raises(SettingsError, match="no classifier"):
        published_classifier(write())
    fresh = create_classifier(path, outputs=4)
    assert set(fresh.heads) == {"both", "video", "audio"} and fresh.heads["audio"].linear.weight.shape == (4, 128)
    assert torch.equal(fresh.encoder.encoder_video.norm.bias, encoder.state_dict()["encoder_video.norm.bias"])
    assert torch.equal(fresh.layer_weights_video, torch.full((10,), 0.1))


def test_load_and_export_take_a_published_file(model, write, tmp_path, capsys):
    path = write()
    weights = model.state_dict()
    loaded = affekt.load(path).encoder.state_dict()
    assert (
        all(torch.equal(value, weights[name]) for name, value in loaded.items()) and "encoder_video.norm.bias" in loaded
    )
    assert run(["export", str(path), str(tmp_path / "export"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["export"] == str(tmp_path / "export")
    encoder = load_encoder(tmp_path / "export")
    assert encoder.window.frame_stride == 4 and encoder.settings.img_size == 160
    assert all(torch.equal(value, weights[name]) for name, value in encoder.state_dict().items())
    card = (tmp_path / "export" / "README.md").read_text()
    assert "VoxCeleb2" in card
    again = create_model("hicmae_base", **SMALL)
    start_from(again, tmp_path / "export")
    assert torch.equal(again.encoder_fusion.norm_audio.weight, model.encoder_fusion.norm_audio.weight)


def test_what_does_not_fit_is_an_error_that_names_it(write, tmp_path):
    with pytest.raises(CheckpointError, match=r"unexpected encoder_video\.surprise"):
        affekt.load(write(**{"encoder.surprise": torch.zeros(3)}))
    with pytest.raises(CheckpointError, match=r"missing encoder_fusion\.norm_audio"):
        affekt.load(write(drop="encoder_fusion.norm_audio"))
    wider = create_model("hicmae_base", **SMALL | {"embed_dim": 128, "num_heads": 2})
    with pytest.raises(CheckpointError, match=r"encoder_audio.*is \(64.*the model's is \(128"):
        start_from(wider, write())
    with pytest.raises(CheckpointError, match="1 attention heads, the model 2"):
        run(["export", str(write()), str(tmp_path / "export")])
        start_from(create_model("hicmae_base", **SMALL | {"num_heads": 2}), tmp_path / "export")
    with pytest.raises(CheckpointError, match=r"without layer_weights_audio"):
        told = classifier_tensors()
        del told["audio_layer_weights"]
        read_published(write(drop="decoder_", **told))
    with pytest.raises(CheckpointError, match=r"values that are no tensors: encoder\.number"):
        affekt.load(write(**{"encoder.number": 3}))


class Hostile:
    def __reduce__(self):
        return os.mkdir, (str(Path(os.environ["AFFEKT_TEST_FOLDER"]) / "was_run"),)


class Harmless:
    pass


def test_a_hostile_file_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("AFFEKT_TEST_FOLDER", str(tmp_path))
    for number, payload in enumerate((Hostile(), Harmless(), {"args": argparse.Namespace(deep=[Hostile()])})):
        path = tmp_path / f"{number}.pth"
        torch.save({"model": {}, "extra": payload}, path)
        with pytest.raises(CheckpointError, match=r"refused.*nothing in it was run") as caught:
            affekt.load(path)
        assert str(path) in str(caught.value)
        torch.save({"model": {}, "extra": payload}, path, _use_new_zipfile_serialization=False)
        with pytest.raises(CheckpointError, match="refused"):
            affekt.load(path)
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize(
    "content, told",
    [
        (b"", "not readable"),
        (b"no checkpoint at all", "refused|not readable"),
        ({"weights": {}}, "no weights under `model` or `module`"),
        ([1, 2], "no weights under"),
        ({"model": {"a": torch.zeros(1)}}, "no tensor 'encoder_video.norm.weight'"),
    ],
)
def test_other_files_are_told_apart(tmp_path, content, told):
    path = tmp_path / "other.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(CheckpointError, match=told):
        affekt.load(path)
    with pytest.raises(CheckpointError):
        affekt.load(tmp_path / "absent.pth")
