"""Whether preparation can be trusted: `python -m benchmarks.prepare --data FOLDER_OF_REAL_CLIPS`.

`faces`: share of all pictures in which the kept box holds a face that a detector finds in that very picture. `speed`:
seconds of media per second of processor time, real clips enlarged to 1280 x 720. `people`: the right one of two heads
side by side, synthetic and real. `sync`: flash against beep whatever the streams begin at. `mutated`: damaged files.
`faults`: decoders that hang, crash, leave or grow. `kills`: runs killed at random moments and repeated.
"""

import argparse
import contextlib
import hashlib
import itertools
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import av
import cv2
import numpy as np
import soundfile
from rich.console import Console
from rich.table import Table

from affekt.data.manifest import Clip, read_source
from affekt.data.media.clip import PrepareSettings, encode_clip, prepare_people
from affekt.data.media.face import LEVELS, Track, face_tracks, find_detectors, haar
from affekt.data.media.lips import choose, lip_agreement
from affekt.data.media.streams import read_media
from affekt.data.media.workers import Failure, MediaPool
from affekt.data.prepare import prepare
from benchmarks import media
from benchmarks.report import print_figures

Figures = dict[str, float | str]
VIDEOS = {"GRID": "grid_s1", "RAVDESS": "ravdess_av", "RAVDESS, grey crops": "ravdess_av_gray"}
OFFSETS = [(p, s) for p in (0, 0.1, 0.436, 0.5, 1.0) for s in (0, 0.1, 0.436, 0.5, 1.0) if 0 in (p, s)]
OFFSETS += [(-0.2, 0), (0, -0.3), (-0.2, -0.3)]  # cut off by an edit list, or moved to zero together


def main() -> None:
    parts: dict[str, Callable[[argparse.Namespace, Path], tuple[Table, Figures]]]
    parts = {
        **{"faults": faults, "faces": faces, "speed": speed, "people": people},
        **{"sync": sync, "mutated": mutated, "kills": kills},
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, help=f"holds the folders {', '.join(VIDEOS.values())}; without it no faces"
    )
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--clips", type=int, default=100, help="real clips per data set, and pairs of heads; 0 for all")
    parser.add_argument("--mutated", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    figures: Figures = {}
    for name, part in parts.items():
        if name in arguments.only and (arguments.data or name not in ("faces", "speed", "people")):
            with tempfile.TemporaryDirectory() as folder:
                table, found = part(arguments, Path(folder))
            Console(width=max(Console().width, 110)).print(table)
            figures |= found
    print_figures("prepare", figures)


def table_of(title: str, *columns: str) -> Table:
    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def videos(folder: Path, count: int) -> list[Path]:
    files = sorted(folder.glob("*.mp4"))
    return files if not count else files[:: max(len(files) // count, 1)][:count]


def faces(arguments: argparse.Namespace, _: Path) -> tuple[Table, Figures]:
    table = table_of("Faces", "videos of", "videos", "with a face", "pictures", "with a face in the box")
    figures: Figures = {}
    for name, folder in VIDEOS.items():
        clips = kept = pictures = good = 0
        for path in videos(arguments.data / folder, arguments.clips):
            found = read_media(path)
            tracks, main_one = tracks_of(found.frames, found.waveform)
            clips, pictures, kept = clips + 1, pictures + len(found.frames), kept + bool(tracks)
            if tracks:
                boxes = tracks[main_one].boxes
                good += sum(shows_face(frame, box) for frame, box in zip(found.frames, boxes, strict=True))
        table.add_row(name, str(clips), f"{kept / clips:.1%}", str(pictures), f"{good / pictures:.2%} (bar 99 %)")
        figures[f"faces_{folder}"] = round(good / pictures, 5)
    return table, figures


def tracks_of(frames: np.ndarray, waveform: np.ndarray | None) -> tuple[list[Track], int]:
    """Faces as `affekt prepare` finds them, and which it keeps."""
    tracks = [track for track in face_tracks(frames, find_detectors("haar")) if track.rate >= 0.25]
    if len(tracks) < 2 or waveform is None:
        return tracks, 0
    return tracks, choose(tracks, [lip_agreement(frames, track, waveform, 25, 16_000) for track in tracks])


def shows_face(frame: np.ndarray, box: np.ndarray) -> bool:
    """Whether one of the detectors finds a face in this picture whose middle lies in the middle half of the box."""
    middle, side = (box[:2] + box[2:]) / 2, box[2] - box[0]
    for level in LEVELS:
        found = haar(frame, *level)
        if any(np.abs((face[:2] + face[2:]) / 2 - middle).max() < side / 4 for face in found):
            return True
    return False


def speed(arguments: argparse.Namespace, folder: Path) -> tuple[Table, Figures]:
    """Clips one after the other in this process, as a worker does it, encoding included."""
    table = table_of("Speed at 1280 x 720", "input", "videos", "media, s", "processor, s", "times real time per core")
    figures: Figures = {}
    settings = PrepareSettings()
    sources = [videos(arguments.data / VIDEOS[name], 8) for name in ("GRID", "RAVDESS")]
    inputs = {"clips": [enlarge([path], folder / path.name) for paths in sources for path in paths]}
    inputs["one of a minute"] = [enlarge(videos(arguments.data / VIDEOS["GRID"], 20), folder / "minute.mp4")]
    for name, paths in inputs.items():
        prepare_people(Clip("warm", paths[0]), settings)
        began, lasts = time.process_time(), 0.0
        for path in paths:
            (clip,) = prepare_people(Clip("a", path), settings)
            encode_clip(clip, settings)
            lasts += clip.record["duration"]
        spent = time.process_time() - began
        table.add_row(name, str(len(paths)), f"{lasts:.0f}", f"{spent:.1f}", f"{lasts / spent:.1f} (bar 4)")
        figures["speed_720p" if name == "clips" else "speed_720p_minute"] = round(lasts / spent, 2)
    return table, figures


def enlarge(paths: list[Path], out: Path, width: int = 1280, height: int = 720) -> Path:
    """Real clips one after the other, 720 pixels high in the middle of a wide picture, H.264 and AAC."""
    read = [read_media(path) for path in paths]
    with av.open(str(out), "w") as container:
        video = container.add_stream("libx264", rate=25, options={"preset": "veryfast", "crf": "20"})
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        audio = container.add_stream("aac", rate=16_000, layout="mono")
        for frame in itertools.chain.from_iterable(one.frames for one in read):
            scale = height / frame.shape[0]
            large = cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)[:height, :width]
            wide = cv2.resize(cv2.GaussianBlur(frame, (0, 0), 5), (width, height))
            left = (width - large.shape[1]) // 2
            wide[:, left : left + large.shape[1]] = large
            container.mux(video.encode(av.VideoFrame.from_ndarray(wide, format="rgb24")))
        container.mux(video.encode(None))
        sound = np.concatenate([one.waveform for one in read])[None]
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(sound), format="fltp", layout="mono")
        frame.sample_rate = 16_000
        container.mux(audio.encode(frame))
        container.mux(audio.encode(None))
    return out


def people(arguments: argparse.Namespace, folder: Path) -> tuple[Table, Figures]:
    table = table_of("Two heads, the sound of one", "heads", "pairs", "both found", "right one chosen")
    figures: Figures = {}
    count = arguments.clips or 100
    pairs = {"synthetic": synthetic_heads(count, arguments.seed, folder)}
    pairs |= {name: [*videos(arguments.data / path, 2 * count)] for name, path in list(VIDEOS.items())[:2]}
    for name, paths in pairs.items():
        rng = random.Random(arguments.seed)
        rng.shuffle(paths)
        twos = list(zip(paths[0::2], paths[1::2]))
        twos = [pair for a, b in twos for pair in ((a, b), (b, a))]  # each head speaks once
        both = right = 0
        for number, (speaks, other) in enumerate(twos):
            found, good = choose_of_two(speaks, other, left=number % 4 < 2)
            both, right = both + found, right + good
        table.add_row(name, str(len(twos)), f"{both / len(twos):.1%}", f"{right / max(both, 1):.1%}")
        figures[f"people_right_{name.lower()}"] = round(right / max(both, 1), 4)
    return table, figures


def synthetic_heads(count: int, seed: int, folder: Path) -> list[Path]:
    from affekt.data.synth.corpus import synthesise

    manifest = synthesise(folder / "heads", 2 * count, 2 * count, seed)
    return [clip.video for clip in read_source(manifest)]


def choose_of_two(speaks: Path, other: Path, left: bool) -> tuple[bool, bool]:
    """Whether both faces were found, and whether the one that speaks was chosen."""
    media_, still = read_media(speaks), read_media(other).frames
    frames = side_by_side(media_.frames, still, left)
    width = frames.shape[2] / 2
    tracks, main_one = tracks_of(frames, media_.waveform)
    is_left = [bool(track.boxes[:, [0, 2]].mean() < width) for track in tracks]
    return len(set(is_left)) == 2, len(set(is_left)) == 2 and is_left[main_one] == left


def side_by_side(frames: np.ndarray, other: np.ndarray, left: bool) -> np.ndarray:
    count = min(len(frames), len(other))
    if other.shape[1:3] != frames.shape[1:3]:
        size = frames.shape[2], frames.shape[1]
        other = np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in other])
    pair = (frames[:count], other[:count]) if left else (other[:count], frames[:count])
    return np.concatenate(pair, axis=2)


def sync(arguments: argparse.Namespace, folder: Path) -> tuple[Table, Figures]:
    table = table_of("Beep after flash, ms", "picture, sound begin at", "mp4", "mov", "mkv", "ts")
    worst = 0.0
    for picture_at, sound_at in OFFSETS:
        row = []
        for kind in ("mp4", "mov", "mkv", "ts"):
            found = read_media(media.write_flash_and_beep(folder / f"a.{kind}", picture_at, sound_at))
            row.append(media.flash_to_beep(found.frames, found.waveform))
        table.add_row(f"{picture_at:g}, {sound_at:g} s", *(f"{1000 * late:+.0f}" for late in row))
        worst = max(worst, *map(abs, row))
    return table, {"flash_to_beep_worst_ms": round(1000 * worst, 1), "flash_to_beep_files": 4 * len(OFFSETS)}


def mutated(arguments: argparse.Namespace, folder: Path) -> tuple[Table, Figures]:
    source = folder / "source"
    source.mkdir()
    media.write_mutated(source, arguments.mutated, arguments.seed)
    settings = PrepareSettings(face="center", size=32, timeout_s=30)
    began = time.monotonic()
    summary = prepare(source, folder / "out", settings)
    causes = Counter(summary["quarantined"])
    accounted = summary["prepared"] + causes.total()
    table = table_of(f"{arguments.mutated} damaged files in {time.monotonic() - began:.0f} s", "outcome", "files")
    for cause, number in [("prepared", summary["prepared"]), *causes.most_common()]:
        table.add_row(cause, str(number))
    figures = {"mutated": arguments.mutated, "mutated_accounted": accounted}
    return table, figures | {"mutated_crashes": causes["crash"], "mutated_hangs": causes["timeout"]}


def faults(arguments: argparse.Namespace, folder: Path) -> tuple[Table, Figures]:
    table = table_of("Decoders that fail", "fault", "clips", "as expected", "worst")
    bombs = [*media.write_bombs(folder).items(), ("damaged", media.write_vast_film(folder / "vast.avi"))]
    with contextlib.closing(MediaPool(PrepareSettings(), 1)) as pool:
        outcomes = list(pool.run([Clip(cause, path) for cause, path in bombs]))
    told = [isinstance(o, Failure) and o.cause == cause for (cause, _), o in zip(bombs, outcomes, strict=True)]
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    table.add_row("announces too much", str(len(bombs)), str(sum(told)), f"{peak:.0f} MiB (bar 1024)")

    settings = PrepareSettings(size=32, face="benchmarks.media:faulty", timeout_s=2)
    hang = media.write_film(folder / "hang.mp4", lambda t: colour(0, 250, 0), media.ticks(0, 0.2))
    late = []
    with contextlib.closing(MediaPool(settings, 1)) as pool:
        list(pool.run([Clip("warm", media.write_film(folder / "good.mp4", lambda t: colour(9, 9, 9), [0, 0.04]))]))
        for number in range(20):
            wait_until_ready(pool)
            began = time.monotonic()
            (outcome,) = pool.run([Clip(str(number), hang)])
            late.append(time.monotonic() - began - 2 if outcome.cause == "timeout" else float("inf"))
    table.add_row("hangs", "20", str(sum(x <= 1 for x in late)), f"{max(late):.2f} s after its deadline (bar 1)")

    reds = [("SEGV", (250, 0, 0)), ("ABRT", (250, 0, 60)), ("KILL", (250, 0, 100)), ("exit", (0, 0, 250))]
    films = [media.write_film(folder / f"{n}.mp4", lambda t, c=c: colour(*c), media.ticks(0, 0.2)) for n, c in reds]
    clips = [Clip(f"{path.stem}{k}", path) for k in range(10) for path in films]
    with contextlib.closing(MediaPool(settings, 2)) as pool:
        crashes = sum(isinstance(o, Failure) and o.cause == "crash" for o in pool.run(clips))
    table.add_row("crashes or leaves", str(len(clips)), str(crashes), "")

    soundfile.write(folder / "a.wav", media.tone(0.3), 16_000)
    sizes = []
    with contextlib.closing(MediaPool(PrepareSettings(), 2)) as pool:
        for _ in pool.run([Clip(f"c{number}", None, folder / "a.wav") for number in range(5000)]):
            sizes.append(resident())
    growth = max(sizes[600:]) / sizes[600] - 1
    table.add_row("5,000 clips through one pool", "5000", str(len(sizes)), f"parent's memory {growth:+.1%} (bar 5 %)")
    figures = {"bombs_refused": sum(told), "bombs_peak_mib": round(peak), "hangs_late_s": round(max(late), 2)}
    return table, figures | {"crashes_noticed": crashes, "leak_share": round(growth, 4)}


def colour(red: int, green: int, blue: int) -> np.ndarray:
    return np.full((48, 64, 3), (red, green, blue), np.uint8)


def wait_until_ready(pool: MediaPool) -> None:
    """A process started anew counts only when a clip is handed to it; here its start is not what is measured."""
    pool.resize(1)
    while not pool.idle:
        pool.wait()


def resident() -> int:
    """Bytes of memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


KILLED = """
import sys
from benchmarks.prepare import KILL_SETTINGS, prepare
prepare(sys.argv[1], sys.argv[2], KILL_SETTINGS, 1)
"""
KILL_SETTINGS = PrepareSettings(face="center", size=32, clips_per_shard=4, max_duration=2)


def kills(arguments: argparse.Namespace, folder: Path) -> tuple[Table, Figures]:
    source = folder / "source"
    source.mkdir()
    for number in range(12):
        film = source / f"film{number:02d}.mp4"
        seconds = 15 if number == 5 else 0.6  # one that is cut into segments
        media.write_film(
            film,
            lambda t, n=number: media.gray(40 + 8 * n + round(5 * t)),
            media.ticks(0, seconds),
            media.tone(seconds),
        )
    began = time.monotonic()
    run(source, folder / "straight").wait()
    lasts, wanted = time.monotonic() - began, digests(folder / "straight")
    rng, same, moments = random.Random(arguments.seed), 0, []
    for number in range(arguments.kills):
        out = folder / f"out{number}"
        moments.append(rng.uniform(0, lasts))
        process = run(source, out)
        time.sleep(moments[-1])
        process.send_signal(signal.SIGKILL)
        process.wait()
        shards = len(list(out.glob("shard-*.tar"))) if out.exists() else 0
        run(source, out).wait()
        same += digests(out) == wanted
        moments[-1] = (moments[-1], shards)
    table = table_of("Killed and repeated", "runs", "identical", "shards finished when killed")
    table.add_row(str(arguments.kills), str(same), " ".join(str(shards) for _, shards in sorted(moments)))
    return table, {"kills": arguments.kills, "kills_identical": same}


def run(source: Path, out: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", KILLED, source, out], start_new_session=True)


def digests(folder: Path) -> dict[str, str]:
    """sha256 by name of the files that must not depend on how they were made."""
    files = [path for path in folder.iterdir() if path.is_file() and path.name != "summary.json"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


if __name__ == "__main__":
    main()
