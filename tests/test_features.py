"""Pooling against its obvious version; frozen features of real shards under a real encoder, cached and masked."""

import copy
import io
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import simplejpeg
import soundfile
import torch

from affekt.data.errors import DataError, SettingsError
from affekt.data.shard_writer import ShardWriter
from affekt.data.shards import ShardIndex
from affekt.finetune import feature_store as store
from affekt.finetune import features as features_module
from affekt.finetune.features import check_tokens, extract, stream_of, weights_hash
from affekt.finetune.pooling import check_poolings, pool, segment_shares
from affekt.finetune.probes.baselines import majority, mel_statistics, pixel_statistics, statistics
from affekt.pretrain.export import create_encoder
from affekt.pretrain.hicmae_settings import HiCMAESettings

TINY = HiCMAESettings(
    embed_dim=16,
    num_heads=2,
    depth=2,
    fusion_depth=1,
    decoder_embed_dim=16,
    decoder_num_heads=2,
    taps=(1, 2),
    img_size=32,
    num_frames=4,
    mel_frames=64,
)


def record_of(name, rng, *, video=True, audio=True, seconds=1.2):
    frames = rng.integers(0, 256, (int(25 * seconds), 32, 32, 3), dtype=np.uint8)
    jpegs = [simplejpeg.encode_jpeg(frame) for frame in frames] if video else []
    sound = io.BytesIO()
    samples = int(16000 * seconds)
    soundfile.write(sound, 0.1 * rng.standard_normal(samples).astype(np.float32), 16000, format="FLAC")
    members = ({"mjpeg": b"".join(jpegs)} if video else {}) | ({"flac": sound.getvalue()} if audio else {})
    record = {
        "id": name,
        "frames": len(jpegs),
        "samples": samples if audio else 0,
        "duration": seconds,
        "flags": [],
        "source_sha256": f"{name:0>64}",
        "frame_sizes": [len(jpeg) for jpeg in jpegs],
        "meta": {},
    }
    return record, members


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    rng = np.random.default_rng(0)
    writer = ShardWriter(tmp_path_factory.mktemp("shards"))
    clips = [record_of(f"both{i}", rng) for i in range(3)]
    clips += [record_of("silent", rng, audio=False), record_of("unseen", rng, video=False)]
    clips += [record_of("short", rng, seconds=0.4)]
    writer.write_shard(0, clips)
    return writer.finish({"size": 32, "fps": 25, "sample_rate": 16000, "picture": "mjpeg", "prepare": {}})


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return create_encoder(TINY, 4, {})


def test_pooling_equals_a_loop():
    tokens = torch.randn(3, 5 * 4 * 6, 7)
    valid = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()
    pooled = pool(tokens, (5, 4, 6), 2, valid)
    for clip in range(3):
        x = tokens[clip].reshape(5, 4, 6, 7)[valid[clip]].numpy()  # (steps, rows, columns, D)
        flat = x.reshape(-1, 7)
        np.testing.assert_allclose(pooled["mean"][clip], flat.mean(0), atol=1e-5)
        np.testing.assert_allclose(pooled["mean_std"][clip], [*flat.mean(0), *flat.std(0)], atol=1e-5)
        expected = []
        for rows in (x[:, :2], x[:, 2:]):
            band = rows.mean((1, 2))
            expected += [*band.mean(0), *band.std(0)]
        np.testing.assert_allclose(pooled["rows_mean_std"][clip], expected, atol=1e-5)


def test_every_layer_and_pooling_of_every_clip_that_has_the_stream(index, encoder):
    table = extract(encoder, index, range(6), windows=2, batch_size=2)
    poolings = {"mean": 16, "mean_std": 32, "rows_mean_std": None}
    expected = {f"{layer}/{p}" for layer in ("audio_1", "audio_2", "video_1", "video_2") for p in poolings}
    expected |= {f"fusion_{stream}/{p}" for stream in ("audio", "video") for p in poolings}
    assert set(table.blocks) == expected
    assert table.has["audio"].tolist() == [True, True, True, False, True, True]
    assert table.has["video"].tolist() == [True, True, True, True, False, True]
    assert table.has["both"].tolist() == [True, True, True, False, False, True]
    assert table.blocks["audio_1/rows_mean_std"].shape == (5, 8 * 2 * 16)
    assert table.blocks["video_1/rows_mean_std"].shape == (5, 2 * 2 * 16)  # the picture has two rows of patches
    assert table.blocks["fusion_video/mean_std"].shape == (4, 32)
    assert not table.unread
    with pytest.raises(AssertionError, match="silent"):
        table.take("audio_1/mean", np.array([0, 3]))


def test_rows_are_means_over_windows_whatever_the_batches(index, encoder):
    one = extract(encoder, index, range(6), windows=2, batch_size=2)
    other = extract(encoder, index, [5, 2, 0, 4], windows=2, batch_size=16)
    for name in one.blocks:
        has = [clip for clip in (5, 2, 0, 4) if one.has[stream_of(name)][clip]]
        np.testing.assert_allclose(other.blocks[name], one.take(name, np.array(has)), atol=2e-5, err_msg=name)


def test_padding_is_left_out_of_the_pooling(index, encoder):
    """The short clip has 38 of 64 log-mel frames: three of four steps of tokens hold sound, the last one is padding."""
    from affekt.data.loader import eval_loader

    batch = next(iter(eval_loader(index, encoder.window, indices=[5], windows_per_clip=1, batch_size=1, workers=0)))
    inputs = encoder.preprocess(batch)
    tokens = encoder.layers(inputs, "both")["audio_2"][0].detach().reshape(4, 8, 16)
    table = extract(encoder, index, [5], windows=1)
    np.testing.assert_allclose(table.blocks["audio_2/mean"][0], tokens[:3].mean((0, 1)), atol=1e-5)
    assert not np.allclose(table.blocks["audio_2/mean"][0], tokens.mean((0, 1)), atol=1e-3)


def test_cache_is_reused_only_for_the_same_weights_clips_and_windows(index, encoder, tmp_path, monkeypatch):
    first = extract(encoder, index, range(6), windows=1, cache=tmp_path)
    assert [path.name for path in tmp_path.rglob("*.safetensors")] == ["part-00000.safetensors"]
    calls = []
    real = features_module.average_views
    monkeypatch.setattr(features_module, "average_views", lambda *a, **k: calls.append(1) or real(*a, **k))
    again = extract(encoder, index, range(6), windows=1, cache=tmp_path)
    assert not calls
    assert again.ids == first.ids and all((again.has[s] == first.has[s]).all() for s in first.has)
    assert all((again.blocks[name] == first.blocks[name]).all() for name in first.blocks)
    torch.manual_seed(1)
    other = create_encoder(TINY, 4, {})
    assert weights_hash(other) != weights_hash(encoder)
    extract(other, index, range(6), windows=1, cache=tmp_path)
    extract(encoder, index, range(5), windows=1, cache=tmp_path)
    extract(encoder, index, range(6), windows=2, cache=tmp_path)
    extract(encoder, index, range(6), windows=1, cache=tmp_path, poolings=("mean",))
    extract(encoder, index, range(6), windows=1, cache=tmp_path, tokens=("audio_2",))
    assert len(calls) == 5
    extract(encoder, other_shards(index), range(6), windows=1, cache=tmp_path)
    assert len(calls) == 6 and len(list(tmp_path.iterdir())) == 7


def other_shards(index):
    return ShardIndex(index.root, index.header, index.samples, "a" * 64)


def test_damaged_cache_is_computed_again(index, encoder, tmp_path):
    first = extract(encoder, index, range(3), windows=1, cache=tmp_path)
    (path,) = tmp_path.rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    again = extract(encoder, index, range(3), windows=1, cache=tmp_path)
    np.testing.assert_array_equal(again.blocks["audio_1/mean"], first.blocks["audio_1/mean"])


def test_features_that_are_not_finite_are_refused(index):
    torch.manual_seed(0)
    broken = create_encoder(TINY, 4, {})
    with torch.no_grad():
        next(p for name, p in broken.named_parameters() if "encoder_audio" in name).fill_(float("nan"))
    with pytest.raises(DataError, match="both0"):
        extract(broken, index, range(6), windows=1)


def test_segments_are_means_over_equal_stretches_of_what_is_real():
    tokens = torch.randn(2, 6 * 2, 5)
    valid = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]).bool()
    pooled = pool(tokens, (6, 2, 1), 2, valid, ("segments_2", "segments_3", "segments_6", "segments_1", "mean"))
    steps = tokens.reshape(2, 6, 2, 5).mean(2)
    torch.testing.assert_close(pooled["segments_2"][0], torch.cat([steps[0, :3].mean(0), steps[0, 3:].mean(0)]))
    torch.testing.assert_close(pooled["segments_3"][1], steps[1, :3].flatten())
    half = (steps[1, 0] + 0.5 * steps[1, 1]) / 1.5  # the border of two stretches of three steps halves the second
    torch.testing.assert_close(pooled["segments_2"][1][:5], half)
    torch.testing.assert_close(pooled["segments_6"][1][:10], steps[1, :1].expand(2, 5).flatten())  # more than steps
    torch.testing.assert_close(pooled["segments_1"], pooled["mean"])
    rng = np.random.default_rng(0)
    shares = segment_shares(torch.tensor(rng.integers(1, 9, 20)), 8, 5)
    torch.testing.assert_close(shares.sum(2), torch.ones(20, 5))
    with pytest.raises(SettingsError, match="segments_1 to"):
        check_poolings(("mean", "segments_0"))


def test_cells_are_means_of_places():
    tokens, valid = torch.randn(2, 3 * 5 * 7, 4), torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    pooled = pool(tokens, (3, 5, 7), 2, valid, ("cells_2", "cells_6", "cells_1", "mean"))
    assert {name: x.shape[1] for name, x in pooled.items()} == {"cells_2": 16, "cells_6": 120, "cells_1": 4, "mean": 4}
    torch.testing.assert_close(pooled["cells_1"], pooled["mean"])
    grid = tokens.reshape(2, 3, 5, 7, 4)
    for clip, length in ((0, 3), (1, 1)):
        x = grid[clip, :length].mean(0)
        parts = [x[:3, :4], x[:3, 4:], x[3:, :4], x[3:, 4:]]  # rows 3 + 2, columns 4 + 3
        expected = torch.stack([part.flatten(0, 1).mean(0) for part in parts])
        torch.testing.assert_close(pooled["cells_2"][clip], expected.flatten())
        rows = pooled["cells_6"][clip].view(5, 6, 4)  # no more rows than there are; columns 2 + 1 + 1 + 1 + 1 + 1
        torch.testing.assert_close(rows[:, 1:], x[:, 2:])
        torch.testing.assert_close(rows[:, 0], x[:, :2].mean(1))
    with pytest.raises(SettingsError, match="cells_1 to"):
        check_poolings(("mean", "cells_0"))


def test_tokens_are_kept_as_they_are_and_pool_to_the_mean(index, encoder, tmp_path):
    table = extract(encoder, index, range(6), windows=2, cache=tmp_path, tokens=("audio_2", "video_2"))
    tokens, real = table.blocks["audio_2/tokens"], table.blocks["audio_2/real"]
    assert tokens.dtype == np.float16 and tokens.shape == (5, 2 * 4 * 8, 16) and real.dtype == np.bool_
    assert isinstance(tokens, np.memmap), "read from the disk as it is needed"
    assert real.sum(1).tolist() == [64, 64, 64, 64, 24]  # the short clip has one view, three of four steps hold sound
    means = (tokens.astype(np.float32) * real[..., None]).sum(1) / real.sum(1, keepdims=True)
    full = np.array([0, 1, 2, 3, 4])
    np.testing.assert_allclose(means[full], table.blocks["audio_2/mean"][full], atol=3e-3)
    assert not tokens[4, 32:].any() and not real[4, 32:].any()
    assert table.take("video_2/tokens", np.array([3, 5])).shape == (2, 2 * 2 * 4, 16)
    gib = check_tokens(encoder, index, range(6), 2, ("audio_2", "video_2", "fusion_audio"), 1)
    assert gib == pytest.approx(2 * 2 * 16 * (5 * 32 + 5 * 8 + 4 * 32) / 2**30)
    with pytest.raises(SettingsError, match=r"tokens of audio_2 for 6 clips take 0.00 GiB, more than the limit"):
        extract(encoder, index, range(6), windows=2, tokens=("audio_2",), token_limit=1e-6)


def test_ranks_share_the_work_and_give_the_bytes_of_one(index, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "PART", 2)
    how = {"windows": 2, "batch_size": 2, "tokens": ("audio_1",)}
    alone = extract(encoder, index, range(6), **how, cache=tmp_path / "one")
    calls = []
    real = features_module.average_views
    monkeypatch.setattr(features_module, "average_views", lambda *a, **k: calls.append(a[2]) or real(*a, **k))
    threads = ThreadPoolExecutor(2)
    jobs = [
        threads.submit(extract, encoder, index, range(6), **how, cache=tmp_path / "two", rank=r, world_size=2)
        for r in (0, 1)
    ]
    shared = [job.result() for job in jobs]
    assert {tuple(call) for call in calls} == {(0, 1), (2, 3), (4, 5)}
    memory = extract(encoder, index, range(6), **how)
    for table in (*shared, memory):
        assert set(table.blocks) == set(alone.blocks) and table.ids == alone.ids and table.unread == alone.unread
        assert all((table.has[stream] == alone.has[stream]).all() for stream in alone.has)
        for name in alone.blocks:
            np.testing.assert_array_equal(table.blocks[name], alone.blocks[name], err_msg=name)
    one, two = ([p.read_bytes() for p in sorted((tmp_path / f).rglob("part-*"))] for f in ("one", "two"))
    assert one == two and len(one) == 3
    opened = copy.deepcopy(alone.blocks)  # as it is sent to another process: places in files, not their content
    assert all(isinstance(place, tuple) for places in alone.blocks.__getstate__().values() for place in places)
    assert all((opened[name] == alone.blocks[name]).all() for name in alone.blocks)
    np.testing.assert_array_equal(
        alone.take("audio_1/mean", np.array([5, 0, 2])), alone.blocks["audio_1/mean"][[4, 0, 2]]
    )


def test_turns_start_apart_and_leave_nothing_out():
    for parts, world in ((1, 1), (7, 3), (2, 4)):
        orders = [list(store.turns(parts, rank, world)) for rank in range(world)]
        assert all(sorted(order) == list(range(parts)) for order in orders)
    assert [next(store.turns(7, rank, 3)) for rank in range(3)] == [0, 1, 2]


KILLED = """
import sys, time
from pathlib import Path
import numpy as np
from affekt.finetune import feature_store as store

store.PART = 10

def compute(places):
    with open(sys.argv[2], "a") as log:
        log.write(f"{places[0]}\\n")
    time.sleep(0.02)
    return {"has/audio": np.ones(len(places), bool), "audio_1/mean": np.outer(places, np.ones(9)).astype("f4")}, {}

rank, world_size = int(sys.argv[3]), int(sys.argv[4])
identity = {"format": store.FORMAT, "made_by": "x"}
store.compute_parts(Path(sys.argv[1]), identity, 200, compute, rank=rank, world_size=world_size)
"""


def test_killed_extraction_goes_on_where_it_stopped(tmp_path, monkeypatch):
    seed = random.SystemRandom().randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    log, folder = tmp_path / "log", tmp_path / "features"
    command = [sys.executable, "-c", KILLED, str(folder), str(log)]
    for _ in range(3):
        before = len(log.read_text().split()) if log.exists() else 0
        process = subprocess.Popen([*command, "0", "1"])
        while process.poll() is None and not (log.exists() and len(log.read_text().split()) > before):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.15))
        process.kill()
        process.wait()
    assert len(list(folder.glob("part-*"))) < 20
    both = [subprocess.Popen([*command, rank, "2"]) for rank in ("0", "1")]  # it ends as two processes
    assert [process.wait() for process in both] == [0, 0]
    computed = [int(line) for line in log.read_text().split()]
    assert set(computed) == set(range(0, 200, 10))
    assert len(computed) <= 20 + 3 + 1, "a kill costs one part at most, two processes at the end may make one twice"
    identity = {"format": store.FORMAT, "made_by": "x"}
    for number, path in enumerate(sorted(folder.glob("part-*"))):
        arrays, _ = store.read_part(path, identity)
        np.testing.assert_array_equal(arrays["audio_1/mean"][:, 0], range(10 * number, 10 * number + 10))
    assert store.read_part(path, identity | {"made_by": "y"}) is None


def test_statistics_of_sound_leave_padding_out():
    sound = torch.randn(1, 400 + 63 * 160) * 0.1
    half = sound.clone()
    half[:, 400 + 31 * 160 :] = 0
    full = mel_statistics(half[:, : 400 + 31 * 160], torch.tensor([400 + 31 * 160]))
    padded = mel_statistics(half, torch.tensor([400 + 31 * 160]))
    assert padded["audio_statistics/level"].shape == (1, 256)
    assert padded["audio_statistics/level_change"].shape == (1, 512)
    for name in full:
        torch.testing.assert_close(padded[name], full[name], atol=0.05, rtol=0)


def test_statistics_of_pictures():
    video = torch.zeros(1, 4, 32, 32, 3, dtype=torch.uint8)
    video[:, ::2, :8, :8] = 255  # one cell of the 4 x 4 grid blinks
    grid = pixel_statistics(video)["video_statistics/grid4"].reshape(3, 3, 4, 4)  # mean, deviation, difference
    torch.testing.assert_close(grid[:, 0, 0, 0], torch.tensor([0.5, 0.5, 1.0]))
    assert grid[:, :, 1:].abs().sum() == 0


def test_statistics_table_matches_what_clips_have(index, encoder):
    table = statistics(index, range(6), encoder.window, windows=2)
    assert table.has["both"].tolist() == [True, True, True, False, False, True]
    assert {name.split("/")[0] for name in table.blocks} == {"audio_statistics", "video_statistics"}
    assert majority(np.array([2, 1, 1, 2, 0]), 4) == 1
