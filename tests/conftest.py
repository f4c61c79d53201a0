"""What all tests share: the switch for slow tests and the reasons why one is skipped."""

import hashlib
import io
import signal
import subprocess
import threading
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
# Files that take longest come first, so that no process is left alone with one of them at the end.
LONG = ("test_faults", "test_launch", "test_watching", "test_health", "test_zero", "test_pretrain", "test_objectives")
LONG += ("test_demo", "test_finetune", "test_probe", "test_varied_finetune", "test_experiments")


def pytest_addoption(parser):
    parser.addoption("--run-slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config):
    """Where tests run in the background of a shell, SIGINT is ignored, and so it would be in every process they start
    and interrupt."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--run-slow"):
            item.add_marker(pytest.mark.skip(reason="slow; run with --run-slow"))
        if item.get_closest_marker("gpu") and not _cuda():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; there is none here"))
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def repository_files() -> Callable[..., list[Path]]:
    """`repository_files(".py", ...)`: files that git tracks or would add, all of them without a suffix given;
    `tracked=True` leaves out what is not added yet."""

    def listed(*options: str) -> list[Path]:
        command = ["git", "ls-files", "-z", *options]
        try:
            names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("not a git checkout, so what belongs to the repository is unknown")
        return sorted(ROOT / name for name in names if name and (ROOT / name).is_file())

    def files(*suffixes: str, tracked: bool = False) -> list[Path]:
        paths = listed("--cached") if tracked else listed("--cached", "--others", "--exclude-standard")
        return [path for path in paths if not suffixes or path.suffix in suffixes]

    return files


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real clips; tests that need it are skipped where it is absent."""
    folder = ROOT.parent / "shared" / "data"
    if not (folder / "manifest.csv").is_file():
        pytest.skip("the real clips (../shared/data beside the checkout) are not here")
    return folder


@pytest.fixture(scope="session")
def encode_clip() -> Callable[..., tuple[dict[str, Any], dict[str, bytes]]]:
    """`encode_clip(id, frames, waveform, **meta)`: a record and its members, as `ShardWriter` takes them.

    frames uint8 (T, H, W, 3) at 25 fps or None, waveform float (S,) at 16 kHz or None.
    """
    import simplejpeg
    import soundfile

    def encode(name, frames=None, waveform=None, quality=90, **meta):
        members, sizes = {}, []
        if frames is not None:
            pictures = [simplejpeg.encode_jpeg(np.ascontiguousarray(frame), quality=quality) for frame in frames]
            members["mjpeg"], sizes = b"".join(pictures), [len(picture) for picture in pictures]
        if waveform is not None:
            file = io.BytesIO()
            soundfile.write(file, np.asarray(waveform, np.float32), 16000, format="FLAC", subtype="PCM_16")
            members["flac"] = file.getvalue()
        samples = 0 if waveform is None else len(waveform)
        record = {
            "id": name,
            "frames": len(sizes),
            "samples": samples,
            "duration": len(sizes) / 25 if sizes else samples / 16000,
            "flags": [],
            "source_sha256": hashlib.sha256(name.encode()).hexdigest(),
            "frame_sizes": sizes,
            "meta": meta,
        }
        return record, members

    return encode


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory, encode_clip) -> Callable[..., Any]:
    """`tiny_shards(n, streams="both", speakers=4, seconds=3.0, size=64, shards=2)`: an opened index of n small clips.

    A bar moves across the picture and a tone sounds; its label decides the speed of one and the pitch of the other.
    `streams` is what the clips have: `both`, `video`, `audio`, or `mixed` for each of these in turn.
    """
    from affekt.data.shard_writer import ShardWriter

    kinds = {"both": ["both"], "video": ["video"], "audio": ["audio"], "mixed": ["both", "video", "audio"]}
    labels = ("neutral", "happy", "sad", "angry", "fearful", "disgust")
    numbers = count()

    def clip(i, kind, speakers, seconds, size):
        label, speaker = i % len(labels), i // len(labels) % speakers
        time = np.arange(round(seconds * 25))
        place = (time * (1 + label) + 7 * speaker) % size
        frames = np.full((len(time), size, size, 3), (60 + 20 * speaker, 90, 120), np.uint8)
        for frame, x in zip(frames, place):
            frame[:, max(0, x - 3) : x + 4] = 250
        tone = 0.3 * np.sin(2 * np.pi * (150 + 60 * label + 11 * speaker) * np.arange(round(seconds * 16000)) / 16000)
        split = ("train", "train", "dev", "test")[speaker % 4]
        meta = {"speaker": f"s{speaker}", "label": labels[label], "split": split, "licence": "CC0"}
        video, audio = frames if kind != "audio" else None, tone if kind != "video" else None
        return encode_clip(f"clip{i:04d}", video, audio, **meta)

    def build(n, streams="both", speakers=4, seconds=3.0, size=64, shards=2):
        writer = ShardWriter(tmp_path_factory.mktemp(f"tiny{next(numbers)}"))
        for shard, part in enumerate(np.array_split(np.arange(n), shards)):
            kind = kinds[streams]
            writer.write_shard(shard, [clip(i, kind[i % len(kind)], speakers, seconds, size) for i in part.tolist()])
        return writer.finish({"size": size, "fps": 25, "sample_rate": 16000, "picture": "mjpeg", "prepare": {}})

    return build


@pytest.fixture(scope="session")
def tone_shards(encode_clip) -> Callable[..., Path]:
    """`tone_shards(folder, label_of, people=6, takes=4)`: shards of sound alone, half a second of a tone for each
    speaker and take; `label_of(speaker, take)` gives what sounds, angry or sad, and what the label says."""
    from affekt.data.shard_writer import ShardWriter

    tones = {"angry": 2500, "sad": 300}
    votes = {"angry": {"anger": 3, "sadness": 1}, "sad": {"sad": 4}}

    def write(folder: Path, label_of: Callable, people: int = 6, takes: int = 4) -> Path:
        rng, clips = np.random.default_rng(0), []
        for speaker in range(people):
            for take in range(takes):
                sound, label = label_of(speaker, take)
                wave = np.sin(2 * np.pi * tones[sound] * np.arange(8000) / 16000)
                wave = 0.1 * wave + 0.01 * rng.standard_normal(8000)
                meta = {
                    "speaker": f"s{speaker}",
                    "label": label,
                    "sex": "FM"[speaker % 2],
                    "votes": votes.get(label, {label: 4}),
                }
                clips.append(encode_clip(f"s{speaker}_{take}", None, wave, **meta))
        writer = ShardWriter(folder)
        writer.write_shard(0, clips)
        writer.finish({"size": 32, "fps": 25, "sample_rate": 16000, "picture": "mjpeg", "prepare": {}})
        return folder

    return write


@pytest.fixture(scope="session")
def shards_of_tones(tone_shards, tmp_path_factory) -> Path:
    """Six speakers who are angry and sad in turn, and sound so."""
    return tone_shards(tmp_path_factory.mktemp("tones"), lambda speaker, take: (["angry", "sad"][take % 2],) * 2)
