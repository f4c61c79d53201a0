"""The authors' files: every name finds its place, what does not fit is told, and nothing in a file is ever run."""

import argparse
import json
import os
import random
from pathlib import Path

import pytest
import torch

import affekt
from affekt.cli import run
from affekt.data.errors import CheckpointError, SettingsError
from affekt.finetune.classifier import create_classifier, published_classifier
from affekt.pretrain.export import export, load_encoder, published_encoder, start_from
from affekt.pretrain.published import PREFIXES, our_name, read_published
from affekt.pretrain.registry import create_model
from affekt.pretrain.seen import merged

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


def read_back(path):
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


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
    with pytest.raises(CheckpointError, match=r"embed_dim is 64, the model's is 128.*model\.name="):
        start_from(wider, write())
    assert run(["export", str(write()), str(tmp_path / "export")]) == 0
    for change, told in (
        ({"num_heads": 2}, "num_heads is 1, the model's is 2"),
        ({"positions": "factorised"}, "positions is flat"),
        ({"img_size": 96}, "img_size is 160"),
        ({"mel_frames": 128}, "mel_frames is 256"),
    ):
        for source in (write(), tmp_path / "export"):
            with pytest.raises(CheckpointError, match=told):
                start_from(create_model("hicmae_base", **SMALL | change), source)
    for taps in ((7, 10), (1, 4, 7, 10)):
        with pytest.raises(CheckpointError, match=r"10 encoder layers and 4 decoder layers.*taps are"):
            start_from(create_model("hicmae_base", **SMALL, taps=taps), write())
    with pytest.raises(CheckpointError, match="decoder_num_heads is 1, the model's is 2"):
        start_from(create_model("hicmae_base", **SMALL | {"decoder_num_heads": 2}), write())
    with pytest.raises(CheckpointError, match=r"missing layer_weights_audio"):
        told = classifier_tensors()
        del told["audio_layer_weights"]
        read_published(write(drop="decoder_", **told))
    for extra in ("decoder.surprise", "mask_token_foo", "encoder_to_decoder.bias"):
        with pytest.raises(CheckpointError, match="not a whole HiCMAE model"):
            affekt.load(write(**{extra: torch.zeros(64)}))
    for part in ("decoder_video.mask_token", "decoder_audio.blocks.2.attn", "decoder_"):
        with pytest.raises(CheckpointError, match="not a whole HiCMAE model: missing decoder_"):
            affekt.load(write(drop=part))
    with pytest.raises(CheckpointError, match="not a whole HiCMAE model: unexpected decoder_"):
        affekt.load(write(**classifier_tensors()))
    with pytest.raises(CheckpointError, match="leave --checkpoint 5 out"):
        export(write(), tmp_path / "again", "5")


@pytest.mark.parametrize(
    "value",
    [
        3,
        torch.full((64,), float("nan")),
        torch.ones(64, dtype=torch.int8),
        torch.ones(64, dtype=torch.complex64),
        torch.eye(8).to_sparse(),
        torch.empty(64, device="meta"),
    ],
)
def test_only_finite_real_numbers_are_weights(write, value):
    with pytest.raises(CheckpointError, match=r"no tensors of finite real numbers: encoder\.norm\.weight"):
        affekt.load(write(**{"encoder.norm.weight": value}))


def test_weights_of_half_precision_and_of_one_stream(model, write, capsys):
    path = write()
    content = read_back(path)
    content["model"] = {f"module.{name}": value.half() for name, value in content["model"].items()}
    torch.save(content, path)
    audio = create_model("hicmae_base", **SMALL, streams="audio")
    start_from(audio, path)
    half = model.state_dict()["encoder_audio.blocks.3.mlp.fc1.weight"].half().float()
    assert torch.equal(audio.state_dict()["encoder_audio.blocks.3.mlp.fc1.weight"], half)
    assert "left out: decoder_video, encoder_fusion, encoder_video" in capsys.readouterr().err
    start_from(create_model("hicmae_base", **SMALL, projector_dim=16), path)
    assert "are new: projector_audio, projector_video" in capsys.readouterr().err
    content["model"]["mask_token"] = content["model"]["module.mask_token"]
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="a tensor under two names"):
        affekt.load(path)


def test_what_published_weights_have_seen_stays_known(write, tmp_path):
    told = read_published(write("finetuned.pth", drop="decoder_", **classifier_tensors())).seen
    assert told["data_sets"] == ["VoxCeleb2", "labelled clips of a data set that the file does not name"]
    new = {"ids": ["a"], "sources": [], "speakers": ["s"], "licences": [], "data_sets": [], "without_speaker": 3}
    assert merged(new, told)["without_speaker"] == 1_091_581 and merged(new, told)["ids"] == ["a"]


def test_damaged_files_are_told_apart(write):
    """Cut and flipped at random, in both of torch's formats: an error with the path, or weights that are whole."""
    seed = torch.seed() % 2**32
    print(f"seed {seed}")
    rng = random.Random(seed)
    path, refused = write(), 0
    content = read_back(path)
    for legacy in (False, True):
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        whole = path.read_bytes()
        for _ in range(40):
            place = rng.choice((rng.randrange(len(whole)), rng.randrange(2000)))
            cut = rng.random() < 0.5
            path.write_bytes(whole[:place] if cut else whole[:place] + bytes([rng.randrange(256)]) + whole[place + 1 :])
            try:
                read_published(path)
            except CheckpointError as error:
                assert str(path) in str(error)
                refused += 1
    assert refused > 30


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
