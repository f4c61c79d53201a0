"""Export and load: the same features in a fresh process, refusals with reasons, embeddings of files and batches."""

import json
import subprocess
import sys

import av
import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

import affekt
from affekt.data.errors import CheckpointError, SettingsError
from affekt.data.loader import eval_loader
from affekt.data.media.clip import PrepareSettings
from affekt.data.media.container import MediaError
from affekt.pretrain.export import create_encoder, load_encoder, random_encoder, save_encoder
from affekt.pretrain.registry import model_settings

SEEN = {"ids": ["a", "b"], "sources": [], "speakers": ["s1"], "licences": ["CC BY-NC-SA 4.0"], "data_sets": []}
SMALL = {"embed_dim": 48, "depth": 2, "taps": (1, 2), "decoder_embed_dim": 32, "img_size": 64}
PREPARE = PrepareSettings(size=64, face="center").model_dump(mode="json")


@pytest.fixture
def exported(tmp_path):
    def write(**overrides):
        torch.manual_seed(3)
        encoder = create_encoder(model_settings("hicmae_nano", **{**SMALL, **overrides}), 8, PREPARE)
        save_encoder(encoder, tmp_path / "export", {"run": "test", "step": 7}, {**SEEN, "prepare": PREPARE})
        return tmp_path / "export"

    return write


def write_clip(path, picture=True, sound=True, seconds=3):
    """A moving bar and a tone as mp4; without a picture the tone alone as FLAC."""
    tone = (9000 * np.sin(np.arange(seconds * 16_000) * 0.2)).astype(np.int16)
    if not picture:
        soundfile.write(path, tone, 16_000)
        return path
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25)
        video.width = video.height = 96
        video.pix_fmt = "yuv420p"
        audio = container.add_stream("aac", rate=16_000, layout="mono") if sound else None
        for k in range(seconds * 25):
            picture = np.full((96, 96, 3), 80, np.uint8)
            picture[:, k % 90 : k % 90 + 6] = 240
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode(None))
        if sound:
            frame = av.AudioFrame.from_ndarray(tone[None], format="s16", layout="mono")
            frame.sample_rate = 16_000
            container.mux(audio.encode(frame))
            container.mux(audio.encode(None))
    return path


def test_a_fresh_process_gives_the_same_embeddings(exported, tiny_shards, tmp_path):
    folder, index = exported(), tiny_shards(4)
    model = affekt.load(folder)
    batch = next(iter(eval_loader(index, model.encoder.window, batch_size=4)))
    here = model.embed(batch)
    assert {name: tuple(x.shape) for name, x in here.items()} == {"video": (4, 48), "audio": (4, 48), "both": (4, 96)}
    for x in here.values():
        torch.testing.assert_close(x.norm(dim=-1), torch.ones(4))
    script = (
        "import sys, affekt; from safetensors.torch import save_file\n"
        "from affekt.data.loader import eval_loader; from affekt.data.shards import ShardIndex\n"
        "model = affekt.load(sys.argv[1]); index = ShardIndex.open(sys.argv[2])\n"
        "save_file(model.embed(next(iter(eval_loader(index, model.encoder.window, batch_size=4)))), sys.argv[3])\n"
        "assert 'deepspeed' not in sys.modules\n"
    )
    out = tmp_path / "there.safetensors"
    subprocess.run([sys.executable, "-c", script, folder, index.root, out], check=True, timeout=200)
    there = load_file(out)
    assert set(there) == set(here)
    for name, x in here.items():
        assert torch.equal(x, there[name]), name


def test_files_with_and_without_a_stream(exported, tmp_path):
    model = affekt.load(exported())
    full = model.embed(write_clip(tmp_path / "full.mp4"))
    mute = model.embed(write_clip(tmp_path / "mute.mp4", sound=False))
    heard = model.embed(write_clip(tmp_path / "heard.flac", picture=False))
    assert {k: tuple(v.shape) for k, v in full.items()} == {"video": (48,), "audio": (48,), "both": (96,)}
    assert set(mute) == {"video"} and set(heard) == {"audio"}
    # what is absent is left out, so the stream that is there comes out as from the whole clip
    assert torch.dot(full["video"], mute["video"]) > 0.999
    assert torch.dot(full["audio"], heard["audio"]) > 0.99
    with pytest.raises(MediaError, match=r"text\.mp4"):
        (tmp_path / "text.mp4").write_text("no film")
        model.embed(tmp_path / "text.mp4")
    with pytest.raises(SettingsError, match="windows is 0"):
        model.embed(tmp_path / "full.mp4", windows=0)


def test_an_audio_encoder_refuses_pictures(exported, tiny_shards):
    model = affekt.load(exported(streams="audio"))
    assert not any("video" in name or "fusion" in name for name in model.encoder.state_dict())
    batch = next(iter(eval_loader(tiny_shards(2), model.encoder.window, batch_size=2, streams="audio")))
    assert set(model.embed(batch)) == {"audio"}
    with pytest.raises(SettingsError, match="trained on audio alone"):
        model.encoder.layers(model.encoder.preprocess(batch), "both")


def test_short_sound_is_not_diluted_by_its_padding(exported, tiny_shards):
    """Padding tokens are neither attended to nor pooled: what they hold changes nothing."""
    encoder = load_encoder(exported())
    batch = next(iter(eval_loader(tiny_shards(2, seconds=1.0), encoder.window, batch_size=2)))
    inputs = encoder.preprocess(batch)
    valid = encoder.valid_audio_tokens(inputs)
    assert valid is not None and 0 < valid.float().mean() < 0.6
    before = encoder.layers(inputs)["audio_2"][valid]
    rows = valid.unflatten(1, encoder.grid_audio).repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None]
    inputs.audio.masked_fill_(~rows, 5.0)
    torch.testing.assert_close(before, encoder.layers(inputs)["audio_2"][valid])


def test_random_encoders_differ_by_seed_alone(exported):
    folder = exported()
    one, again, other = (random_encoder(folder, seed).state_dict() for seed in (1, 1, 2))
    trained = load_encoder(folder).state_dict()
    weight = "encoder_video.blocks.0.attn.qkv.weight"
    assert torch.equal(one[weight], again[weight])
    assert not torch.equal(one[weight], other[weight]) and not torch.equal(one[weight], trained[weight])


def test_what_is_refused_and_why(exported, tmp_path):
    folder = exported()
    assert "CC BY-NC-SA 4.0" in (folder / "README.md").read_text()
    weights, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())

    save_file({k: v for k, v in weights.items() if "norm1" not in k}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="norm1"):
        affekt.load(folder)
    (folder / "model.safetensors").write_bytes(b"\x80\x04 not safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        affekt.load(folder)
    save_file(weights, folder / "model.safetensors")

    (folder / "config.json").write_text(json.dumps({**config, "version": "2.0"}))
    with pytest.raises(CheckpointError, match=r"version 2\.0.*reads 1\.x"):
        affekt.load(folder)
    (folder / "config.json").write_text(json.dumps({**config, "version": "1.7", "new_key": 1}))
    affekt.load(folder)

    (folder / "config.json").write_text(json.dumps({**config, "model": {**config["model"], "new_key": 1}}))
    preprocess = json.loads((folder / "preprocess.json").read_text())
    newer = {part: {**values, "new_key": 1} for part, values in preprocess.items()}
    (folder / "preprocess.json").write_text(json.dumps(newer))
    affekt.load(folder)
    (folder / "preprocess.json").write_text(json.dumps({"window": {}}))
    with pytest.raises(CheckpointError, match="incomplete: KeyError"):
        affekt.load(folder)
    preprocess["transforms"]["mel_mean"] = 0.0
    (folder / "preprocess.json").write_text(json.dumps(preprocess))
    with pytest.raises(CheckpointError, match="other preprocessing"):
        affekt.load(folder)
    with pytest.raises(CheckpointError, match="nowhere: no such file or folder"):
        affekt.load(tmp_path / "nowhere")
