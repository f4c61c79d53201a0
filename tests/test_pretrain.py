"""Pre-training as real processes: it learns, a kill -9 costs nothing, two ranks are one, mistakes are told."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from affekt.data.errors import SettingsError
from affekt.data.shard_writer import ShardWriter
from affekt.pretrain.checkpoint import read_checkpoint
from affekt.pretrain.export import export, load_encoder
from affekt.pretrain.log import TIMINGS
from affekt.pretrain.mixture import open_corpora
from affekt.pretrain.settings import PretrainSettings
from benchmarks.faults import child
from benchmarks.faults.rig import Rig

SMALL = {
    "name": "hicmae_nano",
    "embed_dim": 48,
    "depth": 2,
    "taps": [1, 2],
    "decoder_embed_dim": 32,
    "img_size": 32,
    "mask_ratio_video": 0.5,
    "contrast_weight": 0.1,
    "drop_path": 0.1,
}


@pytest.fixture
def config(tmp_path, tiny_shards) -> Path:
    settings = {
        "out": str(tmp_path / "run"),
        "model": SMALL,
        "data": {"shards": str(tiny_shards(24).root), "frame_stride": 8, "workers": 0},
        "optim": {"base_lr": 0.05, "clip_grad": 1.0},
        "train": {
            "steps": 12,
            "global_batch": 8,
            "log_every": 1,
            "checkpoint_every": 4,
            "picture_every": 100,
            "threads": 1,
        },
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def start(config: Path, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "affekt", "pretrain", str(config), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """`run(config, *arguments, ranks=1, expect=0)` trains in processes forked from one that has imported torch, and
    gives back what they told."""
    rig = Rig(tmp_path_factory.mktemp("rig"))

    def run(config: Path, *arguments: str, ranks: int = 1, expect: int = 0) -> str:
        job = rig.call(child.pretrain, str(config), *arguments, ranks=ranks)
        assert job.wait() and job.codes == [expect] * ranks, job.told
        return job.told

    return run


def metrics(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Weights and moments of the last step."""
    _, weights, moments = read_checkpoint(folder / "checkpoints" / "step-00000012")
    return weights | moments


def test_a_killed_run_resumed_is_the_straight_run_bit_by_bit(tmp_path, config, run):
    run(config, f"out={tmp_path / 'straight'}")
    process = start(config)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000004"
    deadline = time.monotonic() + 200
    while not checkpoint.is_dir():
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    message = run(config, expect=3)
    assert "--resume auto" in message  # never silently from step 0
    message = run(config, "optim.base_lr=0.1", "--resume", "auto", expect=1)
    assert "optim.base_lr: 0.05 -> 0.1" in message
    run(config, "--resume", "auto")

    straight, resumed = metrics(tmp_path / "straight"), metrics(tmp_path / "run")
    assert resumed == straight
    assert [row["step"] for row in straight] == list(range(1, 13))
    assert straight[-1]["loss"] < straight[0]["loss"]
    expected = weights(tmp_path / "straight")
    for name, value in weights(tmp_path / "run").items():
        assert torch.equal(value, expected[name]), name
    for name in ("settings.yaml", "pretrain_data.json", "summary.json", "pictures/step-00000012.png"):
        assert (tmp_path / "run" / name).stat().st_size > 0
    accounting, other = (
        json.loads((tmp_path / r / "summary.json").read_text())["accounting"] for r in ("run", "straight")
    )
    assert accounting["used"] == accounting["planned"] == 12 * 8
    assert accounting["ledger"] == other["ledger"]


def test_two_gloo_ranks_train_as_one_process_and_so_do_they_in_parts(tmp_path, config, run):
    common = ["train.steps=4", "model.drop_path=0", "model.contrast_center=true"]
    others = {"two": (2, 1, 0), "parts of stage 3": (2, 2, 3)}  # ranks, parts, ZeRO stage
    run(config, f"out={tmp_path / 'one'}", *common)
    one = metrics(tmp_path / "one")
    accounting = json.loads((tmp_path / "one" / "summary.json").read_text())["accounting"]
    assert accounting["used"] == 4 * 8
    for name, (ranks, parts, stage) in others.items():
        more = [f"out={tmp_path / name}", f"train.accumulate={parts}", f"train.zero_stage={stage}"]
        run(config, *more, *common, ranks=ranks)
        other = metrics(tmp_path / name)
        assert len(one) == len(other) == 4
        for a, b in zip(one, other, strict=True):
            for key in ("loss", "loss_video", "loss_audio", "loss_contrast", "grad_norm"):
                assert b[key] == pytest.approx(a[key], rel=1e-4), (name, a["step"], key)
        assert json.loads((tmp_path / name / "summary.json").read_text())["accounting"] == accounting


def test_held_out_speakers_are_never_seen(config, run):
    message = run(config, "data.held_out={split: [test]}", expect=1)
    assert "stand on both sides" in message and "`id`" in message


def test_what_is_made_from_a_held_out_file_is_never_seen(tmp_path, encode_clip):
    """Another id and another speaker do not hide that two clips were cut from one recording."""

    def shards(folder, sources):
        writer, clips = ShardWriter(folder), []
        for number, source in enumerate(sources):
            split = "test" if number < 4 else "train"
            record, members = encode_clip(f"clip{number}", None, np.zeros(16000), speaker=f"s{number}", split=split)
            clips.append(({**record, "source_sha256": source}, members))
        writer.write_shard(0, clips)
        writer.finish({"size": 64, "fps": 25, "sample_rate": 16000, "picture": "mjpeg", "prepare": {}})

    def learned_from(folder, sources):
        shards(folder, sources)
        data = {"shards": str(folder), "include": {"split": ["train"]}, "held_out": {"split": ["test"]}}
        model = {**SMALL, "streams": "audio"}
        given = {"out": "run", "model": model, "data": data, "train": {"steps": 1}}
        return open_corpora(PretrainSettings.parse(given))[0].positions

    sources = [f"{number:064d}" for number in range(24)]
    assert list(learned_from(tmp_path / "a", sources)) == list(range(4, 24))
    sources[7] = sources[2]
    with pytest.raises(SettingsError, match=r"clip7 and clip2.*same"):
        learned_from(tmp_path / "b", sources)


def test_mistakes_are_told(tmp_path, config, run):
    assert "did you mean `mask_ratio_video`" in run(config, "model.mask_ratio_vidoe=0.9", expect=1)
    assert "set one of train.steps and train.epochs" in run(config, "train.epochs=3", expect=1)
    assert "train.global_batch" in run(config, "train.global_batch=none", expect=1)
    assert "names no clip" in run(config, "data.held_out={split: [tset]}", expect=1)
    assert "nowhere" in run(config, f"data.shards={tmp_path / 'nowhere'}", expect=2)
    assert "add --resume" in run(config, "--allow-change", "optim.base_lr", expect=1)
    told = run(config, "--allow-change", "optim.base_rl", "--resume", "auto", expect=1)
    assert "did you mean `optim.base_lr`" in told
    assert not (tmp_path / "run").exists()


def test_clips_that_lack_a_stream_train_beside_whole_ones(tmp_path, config, tiny_shards, run):
    shards = tiny_shards(24, streams="mixed").root
    run(config, f"data.shards={shards}", "train.steps=3", "train.precision=bf16")
    rows = metrics(tmp_path / "run")
    assert all(0 < row[name] < 20 for row in rows for name in ("loss", "loss_video", "loss_audio", "loss_contrast"))
    seen = json.loads((tmp_path / "run" / "pretrain_data.json").read_text())
    assert len(seen["ids"]) == 24


def test_a_run_starts_from_exported_weights_and_knows_what_they_saw(tmp_path, config, tiny_shards, run):
    run(config, "data.include={split: [train]}", "train.steps=2", "train.checkpoint_every=2")
    export(tmp_path / "run", tmp_path / "export")
    start_from = [f"pretrained={tmp_path / 'export'}", "optim.base_lr=1e-9", "optim.min_lr=0", "train.steps=1"]
    told = run(config, f"out={tmp_path / 'second'}", "data.include={split: [dev, test]}", *start_from)
    assert "tensors are new: decoder_audio, decoder_video" in told
    first, second = (read_checkpoint(next((tmp_path / n).glob("checkpoints/step-*")))[1] for n in ("run", "second"))
    for name in ("encoder_video.norm.weight", "encoder_fusion.blocks_audio.0.attn.qkv.weight"):
        torch.testing.assert_close(second[name], first[name], rtol=0, atol=1e-6)
    assert len(json.loads((tmp_path / "second" / "pretrain_data.json").read_text())["ids"]) == 24


def start_rank(config: Path, rank: int, port: int, *arguments: str, cwd: Path) -> subprocess.Popen:
    """One of two processes, as a batch system starts them, each with an exit code of its own."""
    place = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    environment = {**os.environ, **place, "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "affekt", "pretrain", str(config), *arguments]
    return subprocess.Popen(command, cwd=cwd, env=environment, stderr=subprocess.PIPE, text=True)


def test_ranks_stop_together_when_the_data_of_one_are_unreadable(tmp_path, config, tiny_shards):
    """As on a node whose copy of the shards is broken: every clip of rank 1 is bad, those of rank 0 are good."""
    shards = tiny_shards(24).root
    broken = Path(shutil.copytree(shards, tmp_path / "broken"))
    for path in broken.glob("*.tar"):
        path.write_bytes(bytes(path.stat().st_size))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    settings = ["data.shards=here", "train.steps=400", "train.log_every=400", "train.checkpoint_every=400"]
    ranks = []
    for rank, folder in enumerate((shards, broken)):  # the same settings on both, each with a disk of its own
        place = tmp_path / f"node{rank}"
        place.mkdir()
        (place / "here").symlink_to(folder)
        ranks.append(start_rank(config, rank, port, *settings, cwd=place))
    told = [process.communicate(timeout=120)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [2, 2], told
    for text in told:
        assert "process 1: clip" in text and "checksum 21" in text and text.count("/shard-00000") >= 5
        assert "Traceback" not in text and "step 400" not in text


def test_a_mixture_with_repeats_is_trained_exported_and_accounted(tmp_path, config, tiny_shards, run):
    faces, voices = tiny_shards(20).root, tiny_shards(6, streams="audio").root
    parts = [f"{{shards: {faces}, weight: 3, name: faces}}", f"{{shards: {voices}, weight: 1, name: voices}}"]
    mixture = [f"data.mixture=[{', '.join(parts)}]", "data.shards=null", "data.epoch_clips=16", "data.repeats=2"]
    told = run(config, *mixture, "train.steps=null", "train.epochs=1", "train.checkpoint_every=2")
    assert "an epoch of 16 clips: faces 75.0% (12 of 20 clips), voices 25.0% (4 of 6 clips)" in told
    assert "4 steps of 8 views of 4 clips" in told and "step 4: 16 clips planned = 16 used + 0 skipped" in told
    rows = metrics(tmp_path / "run")
    assert [row["epoch"] for row in rows] == [0.25, 0.5, 0.75, 1.0] and all(row["loss"] > 0 for row in rows)
    seen = json.loads((tmp_path / "run" / "pretrain_data.json").read_text())
    assert len(seen["ids"]) == 26 and set(seen["fingerprint"]) == {"faces", "voices"}
    export(tmp_path / "run", tmp_path / "export")


def test_gradients_are_clipped_by_the_loop_alone():
    """DeepSpeed's own default would clip them to a norm of 1, asked or not."""
    code = """
import torch
from affekt.pretrain.engine import start_processes
from affekt.pretrain.zero import Engine
start_processes()
model = torch.nn.Linear(1, 1, bias=False)
before = model.weight.item()
engine = Engine(model, torch.optim.SGD(model.parameters(), lr=0, fused=True), 1, "fp32")
engine.backward(engine(torch.full((1, 1), 100.0)).sum())
engine.step(0.01)
print("moved by", before - model.weight.item())
assert not engine.deepspeed.tput_timer.config.enabled  # it would wait for a GPU twice a step
engine.backward(engine(torch.full((1, 1), float("inf"))).sum())
assert not engine.step(0.01)[0].isfinite() and model.weight.isfinite().all()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert float(done.stdout.split("moved by")[-1]) == pytest.approx(0.01 * 100, rel=1e-4), done.stderr


def test_sound_alone(tmp_path, config, tiny_shards, run):
    shards = tiny_shards(16, streams="audio").root
    told = {"step", "loss", "loss_audio", "loss_functionals", "grad_norm", "lr", "epoch"}
    run(config, f"data.shards={shards}", "model.streams=audio", "model.functionals_weight=1", "train.steps=3")
    assert set(metrics(tmp_path / "run")[0]) == told
    encoder = load_encoder(export(tmp_path / "run", tmp_path / "export"))  # which leaves decoder and head behind
    assert {name.partition(".")[0] for name in encoder.state_dict()} == {"encoder_audio"}
    assert not any("video" in name for name in read_checkpoint(next(tmp_path.glob("run/checkpoints/step-*")))[1])
