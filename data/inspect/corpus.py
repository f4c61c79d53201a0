"""`affekt inspect`: what is in a folder of shards and what is wrong with it, as one dictionary."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from affekt import __version__
from affekt.data.errors import DataError, SettingsError
from affekt.data.inspect import copies, look
from affekt.data.inspect.look import Look
from affekt.data.inspect.sync import av_offset
from affekt.data.inspect.traces import PICTURE_ROW, SOUND_ROW, TraceFile, picture_changes, sound_changes
from affekt.data.machine import available_cores, run_in_processes
from affekt.data.order import raw
from affekt.data.prepare_folder import QUARANTINE
from affekt.data.remote import refuse_url
from affekt.data.samples import Sample
from affekt.data.shards import ShardIndex

CLIPS_PER_JOB = 16
LISTED = 50  # ids and messages of one kind in the report; damage is listed in full
NO_SPLIT = "(none)"

DEFINITIONS = {
    "silent": f"no tenth of a second reaches {look.SILENT_DB:.0f} dB of full scale",
    "clipped": f"over {look.CLIPPED_SHARE:.1%} of the samples lie in runs of {look.CLIPPED_RUN} or more at "
    f"{look.FULL_SCALE:.0%} of full scale or above",
    "faceless": "no face was found (flag `no_face`): the sound stands alone, or the centre of the picture in its place "
    "(`face_fallback`)",
    "same_source": "made from the same file; parts of one long recording are such too",
    "same_picture": "the stored pictures are the same bytes",
    "same_sound": "the stored sounds are the same bytes; silent ones are left out",
    "near_picture": f"what moves correlates by {copies.SAME_PICTURE} or more; below a second, the perceptual hashes "
    f"differ in {copies.SAME_HASH} bits of {copies.HASH_BITS} or less",
    "near_sound": f"what swells and fades in 16 bands correlates by {copies.SAME_SOUND} or more",
}


def inspect(
    folder: str | Path,
    *,
    label: str = "label",
    split: str = "split",
    verify: bool = False,
    sample: int | None = None,
    seed: int = 0,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Look at every clip of a folder of shards. `label` and `split` name fields of the metadata.

    With `sample` no more than so many clips, drawn from all, are decoded; what the index says is counted of all still.
    `verify` also compares the checksums of every member and of every shard's file. The result holds plain values, the
    same for the same shards and seed whatever the number of workers; `problems` says what should not be used as it is:
    damage, and speakers or recordings that stand on several sides of the split. Raises DataError when the index cannot
    be opened, SettingsError for a label that no clip has.
    """
    refuse_url(folder, "shards are inspected in a folder of this machine; copy them here first")
    index = ShardIndex.open(folder)
    samples = index.samples
    known = sorted({key for sample in samples for key in sample.meta})
    if label not in known and label != "label":
        raise SettingsError(f"{folder}: no clip has the metadata `{label}`; known here: {', '.join(known)}")
    workers = workers or available_cores()
    pictures, sounds, hashes = TraceFile(PICTURE_ROW), TraceFile(SOUND_ROW), {}
    looks: list[Look] = [Look(clip) for clip in range(len(samples))]
    chosen = _draw(len(samples), sample, seed)
    jobs = [
        (index.root, index.fingerprint, chosen[at : at + CLIPS_PER_JOB], verify)
        for at in range(0, len(chosen), CLIPS_PER_JOB)
    ]
    done, report = 0, progress or (lambda done, total: None)
    report(0, len(chosen))
    for _, some in run_in_processes(look.look_at, jobs, workers, look.start):
        for found in some:
            looks[found.clip] = found
            if found.picture is not None and found.picture.ndim == 1:
                hashes[found.clip] = found.picture.astype("float32")
            elif found.picture is not None:
                pictures.add(found.clip, found.picture)
            if found.sound is not None and not found.silent:
                sounds.add(found.clip, found.sound)
            found.picture = found.sound = None  # from here on they lie in the file
        done += len(some)
        report(done, len(chosen))
    with threadpool_limits(1):  # many small products, which threads only slow down
        duplicates = _duplicates(samples, looks, split, pictures, sounds, hashes)
        offset = av_offset(pictures, sounds, seed)
    apart = [{"id": samples[clip].id, "ms": ms} for clip, ms in offset["apart"]]
    offset["apart"] = {"clips": len(apart), "examples": apart[:LISTED]}
    result = {
        "affekt": __version__,
        "shards": _shards(index),
        "definitions": DEFINITIONS,
        "label": label,
        "split": split,
        **_totals(samples),
        "looked_at": len(chosen),
        "splits": _splits(samples, looks, label, split),
        "sound": _sound(samples, looks),
        "faces": _faces(samples),
        "speakers": _speakers(samples, split),
        "duplicates": duplicates,
        "av_offset": offset,
        "quarantine": _quarantine(index.root),
        "damage": _damage(index, looks, verify, workers),
    }
    return result | {"problems": find_problems(result)}


def _draw(count: int, sample: int | None, seed: int) -> list[int]:
    """Positions to look at: all, or `sample` of them, in order; a larger sample holds those of a smaller one."""
    if sample is None or sample >= count:
        return list(range(count))
    return sorted(np.argsort(raw(count, seed, "inspect"))[:sample].tolist())


def find_problems(result: dict[str, Any]) -> list[str]:
    """What must not stay as it is, a sentence each."""
    problems = []
    damage, split = result["damage"], result["split"]
    if damage["clips"]:
        problems.append(_count(len({row["id"] for row in damage["clips"]}), "damaged clip"))
    if damage["shards"]:
        problems.append(_count(len(damage["shards"]), "damaged shard file"))
    across = result["speakers"]["across_splits"]
    if across:
        names = ", ".join(row["speaker"] for row in across[:5])
        problems.append(f"{_count(len(across), 'speaker')} on several sides of `{split}` ({names})")
    for kind, found in result["duplicates"].items():
        if found["across_splits"]:
            what = f"group{'s' * (found['across_splits'] != 1)} of {kind.replace('_', ' ')}"
            problems.append(f"{found['across_splits']} {what} on several sides of `{split}`")
    return problems


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def check(result: dict[str, Any], folder: str | Path) -> None:
    """Raises DataError when `inspect` found problems."""
    if result["problems"]:
        raise DataError(
            f"{folder}: {'; '.join(result['problems'])}. Copy or prepare damaged shards again; give every speaker and "
            f"recording one `{result['split']}`"
        )


def _shards(index: ShardIndex) -> dict[str, Any]:
    shards = index.header["shards"]
    facts = {key: index.header.get(key) for key in ("size", "fps", "sample_rate", "picture")}
    return {
        "fingerprint": index.fingerprint,
        "count": len(shards),
        "bytes": sum(shard["bytes"] for shard in shards),
        **facts,
    }


def _totals(samples: Sequence[Sample]) -> dict[str, Any]:
    durations = sorted(sample.duration for sample in samples)
    streams = {"both": (True, True), "picture_only": (True, False), "sound_only": (False, True)}
    return {
        "clips": len(samples),
        "hours": _hours(samples),
        "duration_s": {
            "least": durations[0],
            "median": durations[len(durations) // 2],
            "most": durations[-1],
        },
        "streams": {
            name: {"clips": len(some), "hours": _hours(some)}
            for name, kinds in streams.items()
            for some in [[s for s in samples if (s.has_video, s.has_audio) == kinds]]
        },
        "flags": dict(sorted(Counter(flag for sample in samples for flag in sample.flags).items())),
    }


def _splits(samples: Sequence[Sample], looks: Sequence[Look], label: str, split: str) -> dict[str, Any]:
    parts: dict[str, list[int]] = {}
    for clip, sample in enumerate(samples):
        parts.setdefault(str(sample.meta.get(split) or NO_SPLIT), []).append(clip)
    return {
        name: _split([samples[c] for c in parts[name]], [looks[c] for c in parts[name]], label)
        for name in sorted(parts)
    }


def _split(samples: list[Sample], looks: list[Look], label: str) -> dict[str, Any]:
    labels = Counter(str(sample.meta[label]) for sample in samples if sample.meta.get(label) not in (None, ""))
    votes: Counter[str] = Counter()
    for sample in samples:
        votes.update(sample.meta.get("votes") or {})
    return {
        "clips": len(samples),
        "hours": _hours(samples),
        "with_picture": sum(sample.has_video for sample in samples),
        "with_sound": sum(sample.has_audio for sample in samples),
        "speakers": len({str(sample.meta["speaker"]) for sample in samples if sample.meta.get("speaker")}),
        "without_speaker": sum(not sample.meta.get("speaker") for sample in samples),
        "labels": dict(sorted(labels.items())),
        "without_label": len(samples) - labels.total(),
        "votes": dict(sorted(votes.items())),
        "silent": sum(found.silent for found in looks),
        "clipped": sum(found.clipped for found in looks),
        "faceless": sum("no_face" in sample.flags for sample in samples),
    }


def _sound(samples: Sequence[Sample], looks: Sequence[Look]) -> dict[str, Any]:
    kinds = {"silent": [found.clip for found in looks if found.silent]}
    kinds["clipped"] = [found.clip for found in looks if found.clipped]
    levels = sorted(found.loudest_db for found in looks if found.loudest_db is not None)
    marks = {"least": 0, "median": len(levels) // 2, "most": len(levels) - 1}
    return {
        **{name: {"clips": len(some), "ids": [samples[c].id for c in some[:LISTED]]} for name, some in kinds.items()},
        "loudest_db": {name: levels[place] for name, place in marks.items()} if levels else None,
    }


def _faces(samples: Sequence[Sample]) -> dict[str, Any]:
    without = [sample.id for sample in samples if "no_face" in sample.flags]
    shown = [sample for sample in samples if sample.has_video or "no_face" in sample.flags]
    share = round(len(without) / len(shown), 4) if shown else None
    return {"with_picture": len(shown), "faceless": len(without), "share": share, "ids": without[:LISTED]}


def _speakers(samples: Sequence[Sample], split: str) -> dict[str, Any]:
    sides: dict[str, set[str]] = {}
    for sample in samples:
        if sample.meta.get("speaker"):
            sides.setdefault(str(sample.meta["speaker"]), set()).update(
                [str(sample.meta[split])] if sample.meta.get(split) else []
            )
    across = [{"speaker": name, "splits": sorted(sides[name])} for name in sorted(sides) if len(sides[name]) > 1]
    return {
        "count": len(sides),
        "without": sum(not sample.meta.get("speaker") for sample in samples),
        "across_splits": across,
    }


def _duplicates(
    samples: Sequence[Sample],
    looks: Sequence[Look],
    split: str,
    pictures: TraceFile,
    sounds: TraceFile,
    hashes: dict[int, Any],
) -> dict[str, Any]:
    def member(sample: Sample, *kinds: str) -> str:
        return next((sample.members[kind][2] for kind in kinds if kind in sample.members), "")

    near_picture = copies.find_copies(pictures, picture_changes, copies.SAME_PICTURE, between=False)
    found = {
        "same_source": copies.same((c, s.source_sha256) for c, s in enumerate(samples)),
        "same_picture": copies.same((c, member(s, "mjpeg", "mp4")) for c, s in enumerate(samples)),
        "same_sound": copies.same((c, "" if looks[c].silent else member(s, "flac")) for c, s in enumerate(samples)),
        "near_picture": near_picture + copies.find_same_pictures(hashes),
        "near_sound": copies.find_copies(sounds, sound_changes, copies.SAME_SOUND, between=True),
    }
    return {kind: copies.describe(pairs, samples, split) for kind, pairs in found.items()}


def _quarantine(folder: Path) -> dict[str, Any]:
    """What `affekt prepare` left out; `known` is false where its list is not beside the shards."""
    try:
        with (folder / QUARANTINE).open(encoding="utf-8") as file:
            rows = [json.loads(line) for line in file if line.strip()]
        causes = Counter(row["cause"] for row in rows)
    except (OSError, ValueError, KeyError, TypeError):
        return {"known": False, "clips": 0, "causes": {}, "examples": []}
    examples = [{key: row.get(key) for key in ("id", "cause", "message")} for row in rows[:LISTED]]
    return {"known": True, "clips": len(rows), "causes": dict(causes.most_common()), "examples": examples}


def _damage(index: ShardIndex, looks: Sequence[Look], verify: bool, workers: int) -> dict[str, Any]:
    clips = [
        {"id": sample.id, "shard": index.shard_name(sample), "cause": cause, "message": message}
        for sample, found in zip(index.samples, looks)
        for cause, message in found.damage
    ]
    shards = []
    if verify:
        jobs = [(index.root / shard["name"], shard) for shard in index.header["shards"]]
        wrong = dict(run_in_processes(look.check_shard, jobs, workers, look.start))
        shards = [wrong[number] for number in sorted(wrong) if wrong[number]]
    return {"verified": verify, "clips": clips, "shards": shards}


def _hours(samples: Sequence[Sample]) -> float:
    return round(sum(sample.duration for sample in samples) / 3600, 4)
