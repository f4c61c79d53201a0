"""The loader beside the plain way: `python -m benchmarks.loader`.

Both give the same kind of batch, windows of 16 pictures of 160 pixels four apart and 2.575 s of sound, through one
worker process of torch's DataLoader: ours from shards as uint8 and waveform (crop, normalisation and log-mel are the
device's), the plain way from mp4 and wav files with decord, PIL and Kaldi's filter bank, collated as float32. They take
turns; medians of clips per second of the worker's and our own processor time are compared, so that a busy machine does
not matter. Then: how long a step waits for data, the memory over many clips, and an index of a million clips.
"""

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import decord
import numpy as np
import soundfile
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset

from affekt.data import torch_extensions  # noqa: F401  (before torchaudio)

# isort: split
from torchaudio.compliance.kaldi import fbank

from affekt.data.decode import Window, decode_frames, decode_sound
from affekt.data.loader import Augment, train_loader
from affekt.data.media.clip import encode_mp4
from affekt.data.samples import write_samples
from affekt.data.shards import ShardIndex
from affekt.data.transforms import MEL_MEAN, MEL_STD, PICTURE_MEAN, PICTURE_STD, Preprocess
from benchmarks.pictures import bytes_and_quality, face_crops
from benchmarks.report import print_figures

WINDOW = Window()
BATCH, SIZE = 16, 160
WARM = 4  # batches before time is taken: the start of the worker, and what it has fetched ahead
CROPS = 12  # clips on which bytes and quality of the pictures are compared
MILLION, PER_SHARD = 1_000_000, 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shards", type=Path, help=f"prepared with --size {SIZE}; made from `affekt synth` when not given"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark_loader"), help="what is made is kept here")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=24, help="of ours per round; the plain way takes a fourth")
    parser.add_argument("--clips", type=int, default=20_000, help="over which memory is watched")
    parser.add_argument("--films", type=Path, help="manifest to compare bytes of pictures on; default: the made corpus")
    arguments = parser.parse_args()
    index = ShardIndex.open(arguments.shards or make_shards(arguments.out))
    plain = write_plain(index, arguments.out / "plain")

    ours, theirs = [], []
    for number in range(arguments.rounds):
        count, fewer = arguments.batches, max(2, arguments.batches // 4)
        ours.append(clips_per_second(our_batches(index, count + 2 * WARM, number), count))
        theirs.append(clips_per_second(plain_batches(plain, fewer + 2 * WARM, number), fewer))
    waits = waiting(index, 1.5 * BATCH / median(ours))
    first, last = memory(index, arguments.clips)
    opening, private = open_million()
    films = arguments.films or arguments.out / "corpus" / "manifest.csv"
    pictures = argparse.Namespace(source=films, where="", size=SIZE)
    stored = bytes_and_quality(list(itertools.islice(face_crops(pictures), CROPS))) if films.is_file() else {}

    table = Table(title="Clips per second of one core, medians")
    for column in ("", "Clips/s", "rounds"):
        table.add_column(column, justify="right" if column else "left")
    for name, speeds in (("shards, uint8 and waveform", ours), ("mp4, PIL, float32", theirs)):
        table.add_row(name, f"{median(speeds):.1f}", ", ".join(f"{speed:.1f}" for speed in speeds))
    console = Console(width=max(Console().width, 100))
    console.print(table)
    print_figures(
        "loader",
        {
            "clips_per_s_per_core": round(median(ours), 1),
            "ratio_to_plain": round(median(ours) / median(theirs), 2),
            "plain_clips_per_s_per_core": round(median(theirs), 2),
            "device_ms_per_clip_on_cpu": round(preprocess_ms(index), 2),
            "data_wait_share": round(waits, 4),
            "rss_growth_percent": round(100 * (last / first - 1), 2),
            "rss_mib": round(last / 2**20, 1),
            "index_open_s_1m": round(opening, 3),
            "index_private_mib_1m": round(private, 1),
            **stored,
            "clips": len(index.samples),
            "rounds": arguments.rounds,
        },
    )


def make_shards(out: Path) -> Path:
    """160 clips of the embedded corpus, prepared at the size of the published models."""
    if not (out / "shards" / "summary.json").is_file():
        for command in (
            ["synth", out / "corpus", "--clips", 160, "--speakers", 8],
            ["prepare", out / "corpus" / "manifest.csv", out / "shards", "--size", SIZE],
        ):
            subprocess.run([sys.executable, "-m", "affekt", *map(str, command)], check=True, stdout=subprocess.DEVNULL)
    return out / "shards"


def write_plain(index: ShardIndex, folder: Path) -> list[Path]:
    """The same pictures and sounds as one mp4 and one wav file a clip."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for sample in index.samples:
        if not (sample.has_video and sample.has_audio) or sample.duration < WINDOW.duration:
            continue
        path = folder / f"{sample.id}.mp4"
        if not path.with_suffix(".wav").is_file():
            path.write_bytes(encode_mp4(decode_frames(index, sample, np.arange(sample.frames)), WINDOW.fps, 90))
            sound = decode_sound(index, sample, 0, sample.samples)
            soundfile.write(path.with_suffix(".wav"), sound, WINDOW.sample_rate, subtype="PCM_16")
        paths.append(path)
    return paths


class PlainClips(Dataset):
    """A clip as the published code loads it: every picture of the window through PIL, all numbers as float32."""

    def __init__(self, paths: list[Path], order: list[int]):
        self.paths, self.order = paths, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        path, rng = self.paths[self.order[number]], random.Random(number)
        reader = decord.VideoReader(str(path), num_threads=1)
        first = rng.randrange(max(1, len(reader) - round(WINDOW.duration * WINDOW.fps)))
        numbers = np.minimum(first + np.arange(WINDOW.num_frames) * WINDOW.frame_stride, len(reader) - 1)
        side = rng.choice((160, 140, 120, 105))
        x, y = (rng.randrange(SIZE - side + 1) for _ in range(2))
        mean, std = torch.tensor(PICTURE_MEAN)[:, None, None], torch.tensor(PICTURE_STD)[:, None, None]
        pictures = []
        for frame in reader.get_batch(numbers).asnumpy():
            picture = Image.fromarray(frame).crop((x, y, x + side, y + side)).resize((SIZE, SIZE), Image.BILINEAR)
            pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
            pictures.append((pixels - mean) / std)
        sound, rate = soundfile.read(path.with_suffix(".wav"), dtype="float32")
        start = round(first / WINDOW.fps * rate)
        sound = torch.from_numpy(sound[start : start + WINDOW.audio_samples])[None]
        settings = {"htk_compat": True, "use_energy": False, "window_type": "hanning", "num_mel_bins": 128}
        mel = fbank(sound - sound.mean(), sample_frequency=rate, dither=0.0, frame_shift=10, **settings)
        mel = torch.nn.functional.pad(mel, (0, 0, 0, WINDOW.mel_frames - len(mel)))
        return torch.stack(pictures, 1), (mel - MEL_MEAN) / (2 * MEL_STD)


def our_batches(index: ShardIndex, count: int, seed: int) -> Iterator[object]:
    options = {"global_batch": BATCH, "seed": seed, "total_steps": count, "augment": Augment(), "workers": 1}
    return iter(train_loader(index, WINDOW, **options))


def plain_batches(paths: list[Path], count: int, seed: int) -> Iterator[object]:
    order = random.Random(seed).choices(range(len(paths)), k=count * BATCH)
    return iter(DataLoader(PlainClips(paths, order), BATCH, num_workers=1, multiprocessing_context="forkserver"))


def clips_per_second(batches: Iterator[object], count: int) -> float:
    """Of processor time, ours and that of the worker, over `count` batches; it is as far ahead before as after them."""
    for _ in range(WARM):
        next(batches)
    before = processor_seconds()
    for _ in range(count):
        next(batches)
    return count * BATCH / (processor_seconds() - before)


def processor_seconds() -> float:
    """User and system time of this process and of all that descend from it, which are alive."""
    ticks = sum(int(fields[11]) + int(fields[12]) for fields in family().values())
    return ticks / os.sysconf("SC_CLK_TCK")


def family() -> dict[int, list[str]]:
    """This process, first, and those that descend from it: what /proc/PID/stat says after the name."""
    stats = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stats[int(entry.name)] = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it ended in the meantime
    found = [os.getpid()]
    for pid in found:
        found += [child for child, fields in stats.items() if int(fields[1]) == pid]
    return {pid: stats[pid] for pid in found}


def waiting(index: ShardIndex, step_seconds: float) -> float:
    """The share of time that a step of this length, half as long again as a worker needs for its batch, waits."""
    batches = our_batches(index, 40, 0)
    for _ in range(WARM):
        next(batches)
    waited, begin = 0.0, time.perf_counter()
    for _ in range(36):
        before = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - before
        time.sleep(step_seconds)
    return waited / (time.perf_counter() - begin)


def memory(index: ShardIndex, clips: int) -> tuple[float, float]:
    """Bytes in use after a tenth of the clips and after all of them, by worker and trainer together."""
    batches = our_batches(index, clips // BATCH, 1)
    tenth = 0.0
    for number, _ in enumerate(batches, 1):
        if number == clips // BATCH // 10:
            tenth = resident()
        if number == clips // BATCH - WARM:
            last = resident()
    return tenth, last


def resident() -> float:
    """Bytes of this process and of all that descend from it, what they share counted once; no mapped files, which the
    kernel gives up when it needs room."""
    total = 0
    for pid in family():
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total += sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon", "Pss_Shmem")))
    return total * 1024


def preprocess_ms(index: ShardIndex) -> float:
    """What is left to the device, in milliseconds of a clip on this CPU."""
    batch, preprocess = next(our_batches(index, 1, 0)), Preprocess(SIZE)
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        preprocess(batch)
        seconds.append(time.perf_counter() - begin)
    return 1000 * median(seconds) / BATCH


OPEN = """
import json, sys, time
import affekt.data.loader
from affekt.data.shards import ShardIndex

def own():
    return sum(int(line.split()[1]) for line in open("/proc/self/smaps_rollup") if line.startswith("Private_Dirty"))

before, begin = own(), time.perf_counter()
index = ShardIndex.open(sys.argv[1], check=sys.argv[2] == "first")
index.samples[len(index.samples) // 2]
print(json.dumps([time.perf_counter() - begin, (own() - before) / 1024]))
"""


def open_million() -> tuple[float, float]:
    """Seconds to open and check an index of a million clips of 75 pictures, and MiB that a worker adds to do it."""
    shards = -(-MILLION // PER_SHARD)
    digest = "ab" * 32
    row = {"members": {name: (at, 1, "ab" * 16) for at, name in enumerate(("mjpeg", "flac", "json"))}, "frames": 75}
    row |= {"samples": 48_000, "duration": 3.0, "flags": [], "frame_sizes": [3000] * 75, "source_sha256": digest}
    meta = {"label": "happy", "split": "train", "data_set": "a corpus", "licence": "CC BY 4.0"}

    def rows(shard: int) -> list[dict]:
        numbers = range(shard * PER_SHARD, min(MILLION, (shard + 1) * PER_SHARD))
        people = ({**meta, "speaker": f"s{number % 6000}"} for number in numbers)
        return [{**row, "id": f"clip{n:08d}", "shard": shard, "meta": m} for n, m in zip(numbers, people, strict=True)]

    with tempfile.TemporaryDirectory() as folder:
        entries = []
        for shard in range(shards):
            name = f"shard-{shard:06d}.tar"
            (Path(folder) / name).write_bytes(bytes(3))
            count = min(MILLION, (shard + 1) * PER_SHARD) - shard * PER_SHARD
            entries.append({"name": name, "bytes": 3, "samples": count, "sha256": digest})
        write_samples(Path(folder) / "index.safetensors", {"shards": entries}, map(rows, range(shards)))
        measured = {}
        for process in ("first", "worker"):
            command = [sys.executable, "-c", OPEN, folder, process]
            measured[process] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return measured["first"][0], measured["worker"][1]


if __name__ == "__main__":
    main()
