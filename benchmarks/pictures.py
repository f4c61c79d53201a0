"""How to keep pictures in shards: `python -m benchmarks.pictures MANIFEST_OR_FOLDER --clips 24`.

The same face crops as JPEG pictures in one member, as H.264 with groups of 1 to 50 pictures read by decord, and raw:
bytes for an hour of video at 25 pictures a second, quality against the crop before encoding, and how many windows of 16
pictures, four apart, a core reads in a second of its own time. H.264's rate factor is the largest that is as good as
JPEG, and its colours are at full resolution, so that bytes are compared at equal quality. Reads are checked to be
exact: picture k of a window is picture k of the whole clip decoded in turn.
"""

import argparse
import io
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import av
import decord
import numpy as np
import simplejpeg
from rich.console import Console
from rich.table import Table

from affekt.data.manifest import read_source
from affekt.data.media.clip import PrepareSettings, encode_jpeg, prepare_clip
from benchmarks.report import print_figures

GROUPS = (1, 8, 12, 25, 50)
PICTURES, STRIDE, FPS = 16, 4, 25


class Member(NamedTuple):
    """One clip's pictures: `read(numbers)` gives (T, size, size, 3) uint8."""

    bytes: int
    read: Callable[[np.ndarray], np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a manifest, or a folder of videos")
    parser.add_argument("--where", default="", help="only clips whose path contains this")
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    crops = list(itertools.islice(face_crops(arguments), arguments.clips))
    if not crops:
        raise SystemExit(f"{arguments.source}: not one video of at least {PICTURES * STRIDE} pictures with a face")
    kinds = {"JPEG, quality 90": [jpeg(frames, 90) for frames in crops]}
    wanted = quality(kinds["JPEG, quality 90"], crops)
    factors = {}
    for group in GROUPS:
        factors[group] = rate_factor(crops, group, wanted)
        kinds[f"H.264, group of {group}, crf {factors[group]}"] = [h264(f, group, factors[group]) for f in crops]
    kinds["raw"] = [Member(frames.nbytes, frames.__getitem__) for frames in crops]
    speeds = windows_per_second(kinds, crops, arguments.rounds)

    hours = sum(map(len, crops)) / FPS / 3600
    table = Table(title=f"{len(crops)} clips, {arguments.size} pixels, {sum(map(len, crops))} pictures")
    for column in ("Pictures as", "GB per hour", "PSNR, dB", "windows/s per core", "exact"):
        table.add_column(column, justify="left" if column == "Pictures as" else "right")
    rows = {}
    for name, members in kinds.items():
        size = sum(member.bytes for member in members)
        rows[name] = size, quality(members, crops), speeds[name]
        exact = all(is_exact(member, len(frames)) for member, frames in zip(members, crops, strict=True))
        table.add_row(name, f"{size / hours / 1e9:.2f}", f"{rows[name][1]:.1f}", f"{speeds[name]:.0f}", str(exact))
    Console(width=max(Console().width, 100)).print(table)
    names = list(kinds)
    by_group = dict(zip(GROUPS, names[1:-1], strict=True))
    figures = {
        "bytes_ratio": round(rows[names[0]][0] / rows[by_group[8]][0], 3),
        "psnr_db": round(wanted, 2),
        "psnr_h264_db": round(rows[by_group[8]][1], 2),
        "speed_ratio_to_h264": round(speeds[names[0]] / speeds[by_group[8]], 2),
        "gb_per_hour": round(rows[names[0]][0] / hours / 1e9, 3),
        "clips": len(crops),
        "size": arguments.size,
    }
    print_figures("pictures", figures)


def face_crops(arguments: argparse.Namespace):
    """(T, size, size, 3) uint8 of every clip that has a face and is long enough, as `affekt prepare` cuts it."""
    settings = PrepareSettings(size=arguments.size)
    for clip in read_source(arguments.source):
        if clip.video is None or arguments.where not in str(clip.video):
            continue
        try:
            frames = prepare_clip(clip, settings).frames
        except Exception as error:
            print(f"left out: {error}")
            continue
        if frames is not None and len(frames) >= (PICTURES - 1) * STRIDE + 1:
            yield frames


def bytes_and_quality(crops: list[np.ndarray]) -> dict[str, float]:
    """`bytes_ratio` of the default member to H.264 in groups of 8 that is as good, and the quality of both."""
    default = [jpeg(frames, PrepareSettings().quality) for frames in crops]
    psnr = quality(default, crops)
    other = [h264(frames, 8, rate_factor(crops, 8, psnr)) for frames in crops]
    size, other_size = (sum(member.bytes for member in members) for members in (default, other))
    figures = {"bytes_ratio": round(size / other_size, 3), "psnr_db": round(psnr, 2)}
    return {**figures, "psnr_h264_db": round(quality(other, crops), 2)}


def jpeg(frames: np.ndarray, quality: int) -> Member:
    parts = [encode_jpeg(frame, quality) for frame in frames]
    return Member(sum(map(len, parts)), lambda numbers: np.stack([simplejpeg.decode_jpeg(parts[i]) for i in numbers]))


def h264(frames: np.ndarray, group: int, factor: int) -> Member:
    """Read as `affekt.data.decode` reads it."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv444p"  # with colours at half the resolution 39 dB are the end, whatever the bytes
        stream.options = {"crf": str(factor), "g": str(group), "bf": "0", "threads": "1", "preset": "medium"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    content = file.getvalue()

    def read(numbers: np.ndarray) -> np.ndarray:
        reader = decord.VideoReader(io.BytesIO(content), num_threads=1)
        height, width = frames.shape[1:3]
        rows = [reader[int(i)].asnumpy().reshape(height, -1) for i in numbers]
        return np.stack([row[:, : 3 * width].reshape(height, width, 3) for row in rows])

    return Member(len(content), read)


def rate_factor(crops: list[np.ndarray], group: int, least_db: float) -> int:
    """The largest rate factor, by bisection, with which all clips together are at least this good."""
    low, high = 0, 51
    while low < high:
        middle = (low + high + 1) // 2
        if quality([h264(frames, group, middle) for frames in crops[:4]], crops[:4]) >= least_db:
            low = middle
        else:
            high = middle - 1
    return low


def quality(members: list[Member], crops: list[np.ndarray]) -> float:
    """PSNR in dB of all pictures together, over the three colours."""
    error = count = 0
    for member, frames in zip(members, crops, strict=True):
        difference = member.read(np.arange(len(frames))).astype(np.int32) - frames
        error, count = error + int((difference**2).sum()), count + difference.size
    return float(10 * np.log10(255**2 * count / error)) if error else float("inf")


def is_exact(member: Member, count: int) -> bool:
    whole = member.read(np.arange(count))
    numbers = np.arange(PICTURES) * STRIDE + (count - 1 - (PICTURES - 1) * STRIDE)
    return all(np.array_equal(member.read(numbers[k:]), whole[numbers[k:]]) for k in (0, 7, 15))


def windows_per_second(kinds: dict[str, list[Member]], crops: list[np.ndarray], rounds: int) -> dict[str, float]:
    """Medians over rounds in which all kinds take turns, in this process's own time, decoding on one thread."""
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    rng = np.random.default_rng(0)
    for _ in range(rounds):
        starts = [rng.integers(len(frames) - (PICTURES - 1) * STRIDE) for frames in crops]
        for name, members in kinds.items():
            begin = time.process_time()
            for member, start in zip(members, starts, strict=True):
                member.read(start + np.arange(PICTURES) * STRIDE)
            seconds[name].append(time.process_time() - begin)
    return {name: len(crops) / median(values) for name, values in seconds.items()}


if __name__ == "__main__":
    main()
