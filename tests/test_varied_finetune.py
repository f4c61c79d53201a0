"""Every option of what is varied in a fine-tuning changes what comes out of it; two runs of one set come out alike."""

import json
import subprocess
import sys

import numpy as np
import pytest

from affekt.data.errors import SettingsError
from affekt.data.shard_writer import ShardWriter
from affekt.finetune.training.settings import FinetuneSettings

SMALL = {"name": "hicmae_nano", "embed_dim": 24, "num_heads": 3, "depth": 2, "taps": [1, 2], "decoder_embed_dim": 16}
SMALL |= {"img_size": 32, "num_frames": 4, "mel_frames": 64}
MANY = ["varied.mixing.mixup=0.8", "varied.sound.noise=1", "varied.sound.stretch=0.2", "varied.erasing.share=0.5"]
MANY += ["varied.streams.audio=0.5", "data.balance=true", "ema=0.9", "adapting.lora_rank=2", "distilling.features=1"]
MANY += ["train.steps=3", "train.checkpoint_every=1", "data.workers=1"]
# What changes the weights that a fit ends with.
FITS = {
    "base": [],
    "mixup": ["varied.mixing.mixup=0.8"],
    "cutmix": ["varied.mixing.cutmix=1.0"],
    "sound": ["varied.sound.noise=1", "varied.sound.stretch=0.2", "varied.sound.time_masks=2"],
    "erasing": ["varied.erasing.share=1"],
    "streams": ["varied.streams.video=0.4", "varied.streams.audio=0.4"],
    "rand_augment": ["data.augment.rand_augment=rand-m9-n4-mstd0.5-inc1"],
    "crop_area": ["data.augment.crop_area=[0.1, 0.9]"],
    "windows": ["data.augment.windows=speech"],
    "balance": ["data.balance=true"],
    "freeze": ["freeze=2"],
    "freeze at stage 2": ["freeze=2", "train.zero_stage=2"],
    "ema": ["ema=0.9"],
    "distilling": ["distilling.task=1", "distilling.answers=5"],
}
# What is saved and judged.
WHOLE = {
    "plain": [],
    "judged windows": ["train.speech=true"],
    "small parts": ["adapting.lora_rank=2", "adapting.lora_targets=[fc1]", "adapting.adapter_width=4"],
    "many": MANY,
    "many resumed": MANY,
}
SCRIPT = """
import hashlib, json, sys
from contextlib import suppress
from pathlib import Path
from unittest.mock import patch
from affekt.data.shards import ShardIndex
from affekt.finetune.finetuned import load_finetuned
from affekt.finetune.judge import judge_clips
from affekt.finetune.predictions import Predictions
from affekt.finetune.training import loop
from affekt.finetune.training.ema import Ema
from affekt.finetune.training.fit import fit
from affekt.finetune.training.settings import FinetuneSettings

class Fitted(Exception):
    pass

def fit_alone(run, seed):
    raise Fitted(fit(run, seed, refit_to=None))

update = Ema.update
def killed(ema, step):
    update(ema, step)
    if step == 2:
        raise ZeroDivisionError

folder, base, fits, whole = Path(sys.argv[1]), *map(json.loads, sys.argv[2:])
(folder / "base.yaml").write_text(json.dumps(base))
for name, overrides in fits.items():
    settings = FinetuneSettings.read(folder / "base.yaml", [f"out={folder / name.replace(' ', '-')}", *overrides])
    try:
        with patch.object(loop, "finetune_seed", fit_alone):
            loop.finetune(settings)
    except Fitted as fitted:
        weights = fitted.args[0].network.state_dict()
        digest = hashlib.sha256(b"".join(w.numpy().tobytes() for w in weights.values())).hexdigest()
        print("said", json.dumps([name, digest, sum(w.double().abs().sum().item() for w in weights.values())]))
for name, overrides in whole.items():
    out = folder / name.replace(" ", "-")
    settings = FinetuneSettings.read(folder / "base.yaml", [f"out={out}", *overrides])
    if name == "many resumed":
        with patch.object(Ema, "update", killed), suppress(ZeroDivisionError):
            loop.finetune(settings)
        assert list(out.glob("**/checkpoints/step-*")) and not list(out.glob("**/seed-0-test.safetensors"))
    loop.finetune(settings)
    (file,) = out.glob("**/seed-0-test.safetensors")
    (model,) = out.glob("**/model")
    said = Predictions.read(file)
    index = ShardIndex.open(settings.data.shards)
    place = [row["id"] for row in index.samples.rows()]
    how = {"windows": 1, "speech": settings.train.speech}
    model = load_finetuned(model)
    model.temperatures = []
    again = judge_clips(model, index, [place.index(i) for i in said.ids], **how)
    print("said", json.dumps([name, said.logits.tolist(), abs(said.logits - again.logits).max()]))
"""


def settings_of(shards, **changes):
    data = {"shards": str(shards), "test": {"speaker": ["s3"]}, "dev": {"speaker": ["s2"]}, "workers": 0}
    train = {"steps": 2, "global_batch": 8, "choose": "last", "windows": 1, "eval_batch": 32}
    optim = {"base_lr": 0.1, "warmup_share": 0, "layer_decay": 1}
    return {"out": "run", "model": SMALL, "data": data, "train": train, "optim": optim, "bootstrap": 100, **changes}


@pytest.fixture
def shards(tmp_path, encode_clip):
    """Clips of two seconds with a tone in the middle and a bar that moves; of the first of three classes most."""
    writer, clips, rng = ShardWriter(tmp_path / "shards"), [], np.random.default_rng(0)
    for i in range(36):
        kind, speaker = (0, 0, 1, 2)[i % 4], f"s{i // 4 % 4}"
        sound = rng.normal(0, 0.003, 32000)
        sound[12000:22000] += 0.3 * np.sin(np.arange(10000) * (0.05 + 0.05 * kind))
        frames = np.full((50, 32, 32, 3), 60 + 20 * kind, np.uint8)
        for t, frame in enumerate(frames):
            frame[:, (t + i) % 30 : (t + i) % 30 + 2] = 250
        clips.append(encode_clip(f"clip{i:02d}", frames, sound, speaker=speaker, label="abc"[kind]))
    writer.write_shard(0, clips)
    return writer.finish({"size": 32, "fps": 25, "sample_rate": 16000, "picture": "mjpeg", "prepare": {}}).root


def test_each_option_has_an_effect_and_what_is_saved_says_the_same(shards, tmp_path):
    given = [json.dumps(x) for x in (settings_of(shards), FITS, WHOLE)]
    done = subprocess.run([sys.executable, "-c", SCRIPT, tmp_path, *given], capture_output=True, text=True, timeout=900)
    lines = [line.removeprefix("said ") for line in done.stdout.splitlines() if line.startswith("said ")]
    said = {name: rest for name, *rest in map(json.loads, lines)}
    assert list(said) == [*FITS, *WHOLE], done.stdout[-2000:] + done.stderr[-3000:]
    assert said.pop("freeze at stage 2")[1] == pytest.approx(said["freeze"][1], rel=1e-5)
    assert said.pop("many resumed")[0] == said["many"][0]
    assert all(said[name][1] < 1e-4 for name in WHOLE if name in said)
    outcomes = {name: json.dumps(rest[0]) for name, rest in said.items()}
    assert len(set(outcomes.values())) == len(outcomes), sorted(outcomes, key=outcomes.get)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"varied": {"mixing": {"share": 0.5}}}, "neither mixup nor cutmix is on"),
        ({"varied": {"streams": {"video": 0.7, "audio": 0.6}}}, "hide more than all"),
        ({"freeze": 1, "adapting": {"lora_rank": 2}}, "the whole encoder is frozen anyhow"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes, told):
    with pytest.raises(SettingsError, match=told):
        FinetuneSettings.parse(settings_of("somewhere", **changes))


def test_ratings_take_mixup_alone_and_no_balance():
    labels = {"rule": None, "dimensions": {"valence": [1, 5]}}
    for changes, told in (({"varied": {"mixing": {"cutmix": 1.0}}}, "use mixup alone"), ({}, "of one class a clip")):
        values = settings_of("somewhere", **changes)
        values["data"] |= {"labels": labels, "balance": not changes}
        with pytest.raises(SettingsError, match=told):
            FinetuneSettings.parse(values)


@pytest.mark.parametrize(
    ("streams", "override", "told"),
    [
        ("audio", "varied.erasing.share=0.5", "varied.erasing"),
        ("audio", "data.augment.rand_augment=rand-m7", "data.augment.rand_augment"),
        ("audio", "varied.streams.audio=0.5", "varied.streams"),
        ("video", "varied.sound.stretch=0.1", "varied.sound"),
    ],
)
def test_what_is_varied_of_a_stream_that_is_not_used_is_refused(tmp_path, streams, override, told):
    (tmp_path / "c.yaml").write_text(json.dumps(settings_of("somewhere")))
    settings = FinetuneSettings.read(tmp_path / "c.yaml", [override])
    settings.varied.check("both", settings.data.augment)
    with pytest.raises(SettingsError, match=f"{told}: of no effect where the streams used are {streams}"):
        settings.varied.check(streams, settings.data.augment)
