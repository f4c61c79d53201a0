"""`affekt prepare`: a source of clips into a folder of shards with an index, a quarantine list and a summary.

Clips that are too long become equal parts, each a clip of its own, so that no source holds up others or fills the
memory; how long they are is measured first, and each length is kept as soon as it is known. The clips are then taken in
blocks of `clips_per_shard`; the usable ones of a block make one shard. A block is done when its note is on the disk,
written after its shard; an interrupted run goes on with the first block without a note. Outcomes are taken in the order
of the source, so the shards do not depend on the number of processes.
"""

import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from affekt.data.errors import DataError, SettingsError
from affekt.data.machine import available_cores
from affekt.data.manifest import Clip, describe, list_media, read_source
from affekt.data.media.clip import PreparedClip, PrepareSettings, encode_clip, prepare_clip
from affekt.data.media.container import is_still
from affekt.data.media.face import find_detectors
from affekt.data.media.segments import cut
from affekt.data.media.workers import Failure, MediaPool, Result, prepare_clip_safely
from affekt.data.prepare_folder import PrepareFolder
from affekt.data.remote import refuse_url
from affekt.data.shard_writer import ShardWriter

__all__ = ["PrepareSettings", "PreparedClip", "encode_clip", "prepare", "prepare_clip", "prepare_clip_safely"]

Report = Callable[[int, int], None]  # of what is done, and of how much

PROCESS_SETTINGS = {"timeout_s", "memory_mib", "recycle"}  # how it is made; may change from run to run


def prepare(
    source: str | Path,
    out: str | Path,
    settings: PrepareSettings | None = None,
    workers: int | None = None,
    progress: Report | None = None,
    overwrite: bool = False,
    where: dict[str, list[str]] | None = None,
    measuring: Report | None = None,
) -> dict[str, Any]:
    """Prepare every clip of `source` (see `read_source`) into `out`; returns what `summary.json` holds.

    `where` maps columns of the manifest to allowed values, compared as text; clips must match all of them.
    The same call goes on where an earlier one was interrupted. `measuring(done, total)` counts the sources whose length
    is looked up first, `progress(done, total)` then counts clips. Raises SettingsError for a bad source, or an `out`
    that was begun with other settings or another source, which `overwrite` replaces; DataError for a full disk, or when
    not one clip is usable. An interrupt leaves what is finished.
    """
    refuse_url(out, "shards are written into a folder of this machine; upload it when it is complete")
    settings = settings or PrepareSettings()
    find_detectors(settings.face)
    clips = matching(read_source(source), where or {}, source)
    base = Path(source) if Path(source).is_dir() else Path(source).parent
    kept_settings = settings.model_dump(mode="json", exclude=PROCESS_SETTINGS)
    with PrepareFolder(out, kept_settings, describe(clips, base), overwrite) as folder:
        report, measuring = progress or _silent, measuring or _silent
        if folder.complete:
            summary = folder.read_summary()
            report(summary["clips"], summary["clips"])
            return summary
        started, resumed = time.monotonic(), len(folder.notes)
        with contextlib.closing(MediaPool(settings, workers or available_cores())) as pool:
            lengths = {} if settings.long_clips == "cut" else _measure(folder, clips, settings, pool, measuring)
            parts, unknown = _cut_long(clips, lengths, settings)
            blocks = [
                parts[at : at + settings.clips_per_shard] for at in range(0, len(parts), settings.clips_per_shard)
            ]
            _prepare_blocks(folder, blocks, unknown, pool, report)
        notes = folder.notes
        new = sum(len(block) for block in blocks[resumed:])
        others = list_media(source)[1] if Path(source).is_dir() else 0
        counts = {"sources": len(clips), "clips": len(parts)}
        summary = counts | _summary(notes, others, new, time.monotonic() - started)
        folder.write_results([row for note in notes for row in note["quarantine"]], summary)
        if not summary["prepared"]:
            causes = ", ".join(f"{count} {cause}" for cause, count in summary["quarantined"].items())
            raise DataError(f"{folder.path}: none of {len(parts)} clips can be used ({causes}); see quarantine.jsonl")
        header = {key: kept_settings[key] for key in ("size", "fps", "sample_rate", "picture")}
        ShardWriter(folder.path).finish(header | {"prepare": kept_settings})
        folder.remove_notes()
        return summary


def matching(clips: list[Clip], where: dict[str, list[str]], source: str | Path) -> list[Clip]:
    """The clips whose metadata has one of the allowed values in every column. SettingsError when none has."""
    found = [c for c in clips if all(str(c.meta.get(column, "")) in values for column, values in where.items())]
    for column in where:
        if not any(column in clip.meta for clip in clips):
            there = ", ".join(sorted({name for clip in clips for name in clip.meta})) or "none"
            raise SettingsError(f"{source}: --where {column}: no clip has such a column; there are: {there}")
    if not found:
        known = {column: sorted({str(clip.meta.get(column, "")) for clip in clips})[:10] for column in where}
        raise SettingsError(f"{source}: none of {len(clips)} clips has {where}; values there are: {known}")
    return found


def _measure(
    folder: PrepareFolder, clips: list[Clip], settings: PrepareSettings, pool: MediaPool, report: Report
) -> dict[str, dict[str, Any]]:
    """The lengths of all clips that may be too long, by id. They are kept in the folder one by one, so that a pass over
    many sources that was interrupted goes on from there."""
    longest, lengths = settings.max_duration, folder.read_lengths()
    unsure = [c for c in clips if not is_still(c.video) and not (c.end and c.end - (c.start or 0) <= longest)]
    open_ones = [clip for clip in unsure if clip.id not in lengths]
    known = len(lengths)
    if not open_ones:
        return lengths
    report(known, len(unsure))
    for done, (clip, outcome) in enumerate(zip(open_ones, pool.run(open_ones, "measure"), strict=True), known + 1):
        if isinstance(outcome, Failure):
            lengths[clip.id] = {"cause": outcome.cause, "message": f"its length is not known: {outcome.message}"}
        else:
            ((lengths[clip.id], _),) = outcome
        folder.add_length(clip.id, lengths[clip.id])
        report(done, len(unsure))
    return lengths


def _cut_long(
    clips: list[Clip], lengths: dict[str, dict[str, Any]], settings: PrepareSettings
) -> tuple[list[Clip], dict[str, Failure]]:
    """Every clip, or its parts, and by id why clips could not be measured: prepared nevertheless, the first
    `max_duration` seconds of such a one would pass for the whole."""
    parts, unknown = [], {}
    for clip in clips:
        length = lengths.get(clip.id, {})
        if "begin" in length:
            parts += cut(clip, length["begin"], length["end"], settings.max_duration, settings.fps)
            continue
        parts.append(clip)
        if length:
            unknown[clip.id] = Failure(**length)
    return parts, unknown


def _prepare_blocks(
    folder: PrepareFolder, blocks: list[list[Clip]], unknown: dict[str, Failure], pool: MediaPool, report: Report
) -> None:
    """Write the shards and notes of all blocks that have none yet; clips of `unknown` length go to quarantine."""
    total = sum(len(block) for block in blocks)
    open_blocks = blocks[len(folder.notes) :]
    done = total - sum(len(block) for block in open_blocks)
    report(done, total)
    writer = ShardWriter(folder.path)
    outcomes = pool.run([clip for block in open_blocks for clip in block if clip.id not in unknown])
    for block in open_blocks:
        results: list[Result] = []
        note: dict[str, Any] = {"clips": len(block), "shard": None, "quarantine": [], "kept": []}
        for clip in block:
            outcome = unknown.get(clip.id) or next(outcomes)
            if isinstance(outcome, Failure):
                note["quarantine"].append(_quarantined(clip, outcome))
            else:
                results += outcome
                note["kept"] += [_facts(record) for record, _ in outcome]
            done += 1
            if done < total:
                report(done, total)
        if results:
            note["shard"] = folder.next_shard
            writer.write_shard(folder.next_shard, results)
        folder.add_note(note)
    report(total, total)


def _silent(done: int, total: int) -> None:
    """The report of work that nobody follows."""


def _quarantined(clip: Clip, failure: Failure) -> dict[str, Any]:
    paths = [str(path) for path in (clip.video, clip.audio) if path is not None]
    return {"id": clip.id, "path": " ".join(paths), "line": clip.line, **dataclasses.asdict(failure)}


def _facts(record: dict[str, Any]) -> dict[str, Any]:
    facts = {key: record[key] for key in ("frames", "samples", "duration", "flags", "face_rate")}
    return facts | {"offset": record["source"].get("offset")}


def _summary(notes: list[dict[str, Any]], others: int, new: int, seconds: float) -> dict[str, Any]:
    """Counts over all blocks; the speed is that of the clips of this run. `prepared` and what is quarantined are all
    clips together; `other_people` have come out of clips beside their main person."""
    kept = [facts for note in notes for facts in note["kept"]]
    causes = Counter(row["cause"] for note in notes for row in note["quarantine"])
    durations = sorted(facts["duration"] for facts in kept)
    rates = [facts["face_rate"] for facts in kept if facts["face_rate"] is not None]
    offsets = [abs(facts["offset"]) for facts in kept if facts["offset"] is not None]
    flags = Counter(flag for facts in kept for flag in facts["flags"])
    share = len(kept) or 1
    return {
        "prepared": len(kept) - flags["other_person"],
        "other_people": flags["other_person"],
        "quarantined": dict(sorted(causes.items())),
        "flags": dict(sorted(flags.items())),
        "shards": sum(note["shard"] is not None for note in notes),
        "hours": round(sum(durations) / 3600, 4),
        "duration_s": {"least": durations[0], "median": _middle(durations), "most": durations[-1]} if kept else None,
        "share_without_sound": round(sum(not facts["samples"] for facts in kept) / share, 4),
        "share_without_picture": round(sum(not facts["frames"] for facts in kept) / share, 4),
        "face_rate": round(sum(rates) / len(rates), 4) if rates else None,
        "largest_offset_s": max(offsets, default=None),
        "other_files": others,
        "seconds": round(seconds, 2),
        "clips_per_s": round(new / seconds, 2) if new else None,
    }


def _middle(values: Sequence[float]) -> float:
    return values[len(values) // 2]
