"""Every option of what is varied in a fine-tuning changes what comes out of it; two runs of one set come out alike."""

import json
import subprocess
import sys

import numpy as np
import pytest

from affekt.data.errors import SettingsError
from affekt.finetune.training.settings import FinetuneSettings

SMALL = {"name": "hicmae_nano", "embed_dim": 24, "num_heads": 3, "depth": 2, "taps": [1, 2], "decoder_embed_dim": 16}
SMALL |= {"img_size": 32, "num_frames": 4, "mel_frames": 64}
MANY = ["varied.mixing.mixup=0.8", "varied.sound.noise=1", "varied.sound.stretch=0.2", "varied.erasing.share=0.5"]
MANY += ["varied.streams.audio=0.5", "data.balance=true", "ema=0.9", "adapting.lora_rank=2", "distilling.features=1"]
MANY += ["train.checkpoint_every=1", "data.workers=1"]
OPTIONS = {
    "base": [],
    "again": [],
    "mixup": ["varied.mixing.mixup=0.8"],
    "cutmix": ["varied.mixing.cutmix=1.0"],
    "noise": ["varied.sound.noise=1"],
    "stretch": ["varied.sound.stretch=0.2"],
    "mel_warp": ["varied.sound.mel_warp=0.1"],
    "frequency_masks": ["varied.sound.frequency_masks=2"],
    "time_masks": ["varied.sound.time_masks=2"],
    "erasing": ["varied.erasing.share=1"],
    "no pictures": ["varied.streams.video=0.9"],
    "no sound": ["varied.streams.audio=0.9"],
    "rand_augment": ["data.augment.rand_augment=rand-m9-n4-mstd0.5-inc1"],
    "crop_area": ["data.augment.crop_area=[0.1, 0.9]"],
    "training windows": ["data.augment.windows=speech"],
    "judged windows": ["train.speech=true"],
    "balance": ["data.balance=true"],
    "ema": ["ema=0.9"],
    "freeze": ["freeze=2"],
    "freeze at stage 2": ["freeze=2", "train.zero_stage=2"],
    "lora": ["adapting.lora_rank=2"],
    "adapters": ["adapting.adapter_width=4"],
    "both": ["adapting.lora_rank=2", "adapting.lora_targets=[fc1]", "adapting.adapter_width=4"],
    "incomplete": ["distilling.task=1"],
    "features": ["distilling.features=5"],
    "answers": ["distilling.answers=5"],
    "many": MANY,
    "many resumed": MANY,
}
SCRIPT = """
import json, sys
from contextlib import suppress
from pathlib import Path
from unittest.mock import patch
from affekt.data.decode import Window
from affekt.finetune.finetuned import load_finetuned
from affekt.finetune.predictions import Predictions
from affekt.finetune.judge import judge_clips
from affekt.data.shards import ShardIndex
from affekt.finetune.training.ema import Ema
from affekt.finetune.training.loop import finetune
from affekt.finetune.training.settings import FinetuneSettings
update = Ema.update
def killed(ema, step):
    update(ema, step)
    if step == 2:
        raise ZeroDivisionError
folder, base, options = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
(folder / "base.yaml").write_text(json.dumps(base))
for name, overrides in options.items():
    out = folder / name.replace(" ", "-")
    settings = FinetuneSettings.read(folder / "base.yaml", [f"out={out}", *overrides])
    if name == "many resumed":
        with patch.object(Ema, "update", killed), suppress(ZeroDivisionError):
            finetune(settings)
        assert list(out.glob("**/checkpoints/step-00000001")) and not list(out.glob("**/seed-0-test.safetensors"))
    finetune(settings)
    (file,) = out.glob("**/seed-0-test.safetensors")
    said = Predictions.read(file)
    (model,) = out.glob("**/model")
    index = ShardIndex.open(settings.data.shards)
    place = [row["id"] for row in index.samples.rows()]
    how = {"windows": 1, "speech": settings.train.speech}
    again = judge_clips(load_finetuned(model), index, [place.index(i) for i in said.ids], **how)
    assert abs(again.logits - said.logits).max() < 1e-3, name
    print("said", json.dumps([name, said.logits.tolist()]))
"""


def settings_of(shards, **changes):
    data = {"shards": str(shards), "test": {"speaker": ["s3"]}, "dev": {"speaker": ["s2"]}, "workers": 0}
    train = {"steps": 3, "global_batch": 8, "choose": "last", "windows": 1, "eval_batch": 32}
    optim = {"base_lr": 0.1, "warmup_share": 0, "layer_decay": 1}
    return {"out": "run", "model": SMALL, "data": data, "train": train, "optim": optim, "bootstrap": 100, **changes}


def test_each_option_has_an_effect_and_what_is_saved_says_the_same(tiny_shards, tmp_path):
    index = tiny_shards(48, streams="both", seconds=3.0, size=32, shards=2)
    command = [sys.executable, "-c", SCRIPT, tmp_path, json.dumps(settings_of(index.root)), json.dumps(OPTIONS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    lines = [line.removeprefix("said ") for line in done.stdout.splitlines() if line.startswith("said ")]
    said = dict(map(json.loads, lines))
    assert list(said) == list(OPTIONS), done.stdout[-2000:] + done.stderr[-3000:]
    assert said.pop("again") == said["base"] and said.pop("many resumed") == said["many"]
    assert np.abs(np.subtract(said.pop("freeze at stage 2"), said["freeze"])).max() < 1e-4
    flat = {name: json.dumps(logits) for name, logits in said.items()}
    assert len(set(flat.values())) == len(flat), sorted(flat, key=flat.get)


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
