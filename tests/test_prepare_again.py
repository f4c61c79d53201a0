"""An interrupted, repeated, disturbed or misdirected `prepare`: nothing finished is lost, the bytes stay the same."""

import contextlib
import errno
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from affekt.data.errors import DataError, SettingsError
from affekt.data.inspect.corpus import inspect
from affekt.data.prepare import PrepareSettings, prepare
from affekt.data.shards import ShardIndex


def write_voice(path, seconds=0.6):
    seed = int.from_bytes(hashlib.sha256(path.name.encode()).digest()[:4])
    soundfile.write(path, np.random.default_rng(seed).normal(0, 0.1, round(seconds * 16_000)), 16_000)
    return path


@pytest.fixture(scope="module")
def voices(tmp_path_factory):
    """Ten small files; `test_prepare` does the same with pictures."""
    folder = tmp_path_factory.mktemp("voices")
    for number in range(10):
        write_voice(folder / f"voice{number}.wav")
    return folder


@pytest.fixture(scope="module")
def straight(voices, tmp_path_factory):
    """The shards of an undisturbed run with one process."""
    out = tmp_path_factory.mktemp("straight") / "out"
    prepare(voices, out, settings(clips_per_shard=3), workers=1)
    return out


def settings(**values):
    return PrepareSettings(**{"face": "center", "size": 32, **values})


def digests(folder):
    """sha256 by name of the files that must not depend on how they were made."""
    files = [path for path in folder.iterdir() if path.is_file() and path.name != "summary.json"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def children():
    """Workers that this process has started and that are still there; other tests leave a forkserver of their own."""
    started = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [pid for pid in started if b"affekt.data.media.workers" in Path(f"/proc/{pid}/cmdline").read_bytes()]


SCRIPT = """
import sys, time
from affekt.data.prepare import PrepareSettings, prepare
def report(done, total):
    print(done, flush=True)
    if done == int(sys.argv[3]):
        time.sleep(60)
prepare(sys.argv[1], sys.argv[2], PrepareSettings(face="center", size=32, clips_per_shard=3), 2, report)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_goes_on_to_the_same_bytes(voices, straight, tmp_path, how):
    out = tmp_path / "out"
    for stop_at in (2, 7):
        finished = len(list(out.glob("shard-*.tar")))
        run = start(voices, out, stop_at)
        assert int(next(run.stdout)) == 3 * finished  # finished shards are not made again
        while int(next(run.stdout)) != stop_at:
            pass
        workers = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        run.send_signal(how)
        _, errors = run.communicate(timeout=20)
        assert run.returncode == -how, errors
        assert workers and gone(workers), "workers outlive the run"
        assert len(list(out.glob("shard-*.tar"))) == stop_at // 3 and not (out / "index.safetensors").exists()
        if how == signal.SIGINT:
            assert not list(out.rglob("*.partial"))
    summary = prepare(voices, out, settings(clips_per_shard=3), workers=1)
    assert digests(out) == digests(straight)
    undisturbed = json.loads((straight / "summary.json").read_text())
    speed = {"seconds": 0, "clips_per_s": 0}
    assert summary | speed == undisturbed | speed


def test_killed_at_a_random_moment(voices, straight, tmp_path):
    seed = int(os.environ.get("AFFEKT_TEST_SEED", random.SystemRandom().randrange(10**6)))
    print(f"AFFEKT_TEST_SEED={seed}")
    rng = random.Random(seed)
    for _ in range(2):
        run = start(voices, tmp_path / "out", stop_at=-1)
        next(run.stdout)
        time.sleep(rng.uniform(0, 0.8))  # from the first clip to the removal of the notes
        run.send_signal(rng.choice([signal.SIGINT, signal.SIGKILL]))
        run.communicate(timeout=20)
    prepare(voices, tmp_path / "out", settings(clips_per_shard=3), workers=1)
    assert digests(tmp_path / "out") == digests(straight)


def start(source, out, stop_at):
    command = [sys.executable, "-c", SCRIPT, source, out, str(stop_at)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def gone(processes, seconds=5.0):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not any(Path(f"/proc/{process}").exists() for process in processes):
            return True
        time.sleep(0.05)
    return False


def test_a_finished_folder_is_left_as_it_is(voices, straight, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in straight.iterdir()}
    calls = []
    summary = prepare(voices, straight, settings(clips_per_shard=3), 1, lambda done, total: calls.append((done, total)))
    assert {path: path.stat().st_mtime_ns for path in straight.iterdir()} == before
    assert calls == [(10, 10)] and summary["prepared"] == 10


def test_other_settings_or_another_source_are_refused_and_replaced_on_demand(voices, tmp_path):
    out = tmp_path / "out"
    few = tmp_path / "few"
    few.mkdir()
    for number in range(2):
        (few / f"voice{number}.wav").write_bytes((voices / f"voice{number}.wav").read_bytes())
    prepare(few, out, settings(), workers=1)
    with pytest.raises(SettingsError, match=r"quality: 90 then, 80 now\s+size: 32 then, 48 now\s.*--overwrite"):
        prepare(few, out, settings(quality=80, size=48), workers=1)
    prepare(few, out, settings(timeout_s=33, memory_mib=5000, recycle=7), workers=1)  # how, not what
    with pytest.raises(SettingsError, match="2 clips then, 10 now"):
        prepare(voices, out, settings(), workers=1)
    (few / "voice0.wav").write_bytes((voices / "voice7.wav").read_bytes() + b"\0")
    with pytest.raises(SettingsError, match="as many clips, but other ids, files, file sizes or columns"):
        prepare(few, out, settings(), workers=1)
    prepare(voices, out, settings(size=48, clips_per_shard=4), workers=2, overwrite=True)
    index = ShardIndex.open(out)
    assert len(index.samples) == 10 and index.header["size"] == 48
    assert sorted(path.name for path in out.glob("shard-*")) == [f"shard-00000{k}.tar" for k in range(3)]


def test_a_finished_folder_that_was_damaged_is_made_again_on_demand(voices, straight, tmp_path):
    """Its shards or its index; the same command alone changes nothing, because a copy may be better."""
    for victim in ("shard-000001.tar", "index.safetensors"):
        out = Path(shutil.copytree(straight, tmp_path / victim))
        os.truncate(out / victim, 700)
        before = digests(out)
        with pytest.raises(DataError, match=f"{victim}: .*; --overwrite makes all of it again"):
            prepare(voices, out, settings(clips_per_shard=3), workers=1)
        assert digests(out) == before
        prepare(voices, out, settings(clips_per_shard=3), workers=1, overwrite=True)
        assert digests(out) == digests(straight)


def test_a_folder_may_look_like_a_url_and_a_url_is_no_folder(voices, straight, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare(voices, "voices:v2", settings(clips_per_shard=3), workers=1)
    assert digests(Path("voices:v2")) == digests(straight)
    for url in ("http://127.0.0.1/out", Path("s3://bucket/out")):
        with pytest.raises(SettingsError, match="are written into a folder of this machine"):
            prepare(voices, url, settings(), workers=1)
        with pytest.raises(SettingsError, match="are inspected in a folder of this machine"):
            inspect(url)
    assert [path.name for path in tmp_path.iterdir()] == ["voices:v2"]


def test_a_folder_of_other_things_is_never_touched(voices, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(SettingsError, match=r"holds other files \(thesis.tex\)"):
            prepare(voices, tmp_path, settings(), workers=1, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(SettingsError, match="cannot be used as a folder"):
        prepare(voices, tmp_path / "thesis.tex", settings(), workers=1)


def test_a_second_prepare_on_the_same_folder_is_refused(voices, tmp_path):
    def again(done, total):
        with pytest.raises(SettingsError, match="another `prepare` works in this folder"):
            prepare(voices, tmp_path / "out", settings(), workers=1)
        seen.append(done)

    seen = []
    prepare(voices, tmp_path / "out", settings(), 1, again)
    assert len(seen) == 11


def test_a_file_size_limit_is_a_full_disk_to_us(voices, straight, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    biggest = max(path.stat().st_size for path in straight.glob("shard-*.tar"))
    two = tmp_path / "two"
    two.mkdir()
    for voice in sorted(voices.iterdir()):
        (two / voice.name).write_bytes(voice.read_bytes())
    write_voice(two / "voice3x.wav", seconds=6)  # the second shard gets too big
    resource.setrlimit(resource.RLIMIT_FSIZE, (biggest + 4096, limits[1]))
    try:
        with pytest.raises(DataError, match=r"shard-000001\.tar: cannot be written.*same command again"):
            prepare(two, tmp_path / "out", settings(clips_per_shard=3), workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (tmp_path / "out").glob("shard-*.tar")] == ["shard-000000.tar"]
    assert not list((tmp_path / "out").rglob("*.partial"))
    first = digests(tmp_path / "out")["shard-000000.tar"]
    assert first == digests(straight)["shard-000000.tar"]
    assert prepare(two, tmp_path / "out", settings(clips_per_shard=3), workers=1)["prepared"] == 11
    assert digests(tmp_path / "out")["shard-000000.tar"] == first


@pytest.mark.parametrize(
    "victim", ["shard-000002.tar", "shard-000001.jsonl", "000001.json", "quarantine.jsonl", "index.safetensors"]
)
def test_a_full_disk_at_any_file_leaves_what_is_finished(voices, straight, tmp_path, monkeypatch, victim):
    sync, out = os.fsync, tmp_path / "out"

    def full(descriptor):
        if f".{victim}.partial" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DataError, match=f"{victim}: cannot be written: No space left on device"):
            prepare(voices, out, settings(clips_per_shard=3), workers=2)
    assert not list(out.rglob("*.partial")) and not (out / "index.safetensors").exists() and not children()
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*.tar")}
    prepare(voices, out, settings(clips_per_shard=3), workers=2)
    assert digests(out) == digests(straight)
    noted = 1 if victim == "shard-000001.jsonl" or victim == "000001.json" else len(kept)
    for name in sorted(kept)[:noted]:
        assert (out / name).stat().st_mtime_ns == kept[name]  # not written again


def test_a_damaged_remainder_of_an_unfinished_run_is_made_again(voices, straight, tmp_path):
    out = tmp_path / "out"
    with contextlib.suppress(KeyboardInterrupt):
        prepare(voices, out, settings(clips_per_shard=3), 1, interrupt_at(8))
    (out / "shard-000001.tar").write_bytes(b"short")
    prepare(voices, out, settings(clips_per_shard=3), workers=1)
    assert digests(out) == digests(straight)


def interrupt_at(clip):
    def report(done, total):
        if done == clip:
            raise KeyboardInterrupt

    return report
