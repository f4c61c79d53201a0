"""What weights have seen: a list beside a run and in its export, so that an evaluation can refuse an overlap."""

import json
from pathlib import Path
from typing import Any

from affekt.data.errors import CheckpointError
from affekt.data.files import check_version
from affekt.data.mixture import Corpus, example, fingerprints

SEEN_FILE = "pretrain_data.json"
FORMAT, VERSION = "affekt-pretrain-data", "1.1"
LISTS = ("ids", "sources", "speakers", "licences", "data_sets")


def seen_data(corpora: list[Corpus]) -> dict[str, Any]:
    """What the weights will have seen, kept beside them so that a later evaluation can refuse an overlap.

    Ids and speakers are those of the corpora, without the names that a mixture gives them: an evaluation knows one
    corpus alone.
    """
    ids, sources, without_speaker = [], set(), 0
    values: dict[str, set[str]] = {"speaker": set(), "session": set(), "licence": set(), "data_set": set()}
    for row in (corpus.index.samples.row(i) for corpus in corpora for i in corpus.positions):  # millions, maybe
        ids.append(row["id"])
        sources.add(row["source_sha256"])
        without_speaker += not row["meta"].get("speaker")
        for field, found in values.items():
            if row["meta"].get(field):
                found.add(str(row["meta"][field]))
    return {
        "ids": sorted(ids),
        "sources": sorted(sources - {""}),
        **{f"{field}s": sorted(found) for field, found in values.items()},
        "without_speaker": without_speaker,
        "fingerprint": fingerprints(corpora),
        "prepare": example(corpora).header["prepare"],
    }


def with_seen_before(seen: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """`seen` with what the run of the checkpoint had seen: data may change on resume, what was learned stays.

    Raises CheckpointError when the run's `pretrain_data.json` is not beside its checkpoints.
    """
    try:
        before = read_seen(checkpoint.resolve().parents[1])
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; nobody could tell what the weights have seen: copy it beside the checkpoints, or begin a new run"
        ) from error
    return merged(seen, before)


def merged(seen: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """`seen` with the clips of `before` on its lists. Clips without a speaker are at least as many as either had."""
    lists = (*LISTS, *(["sessions"] if "sessions" in before and "sessions" in seen else []))
    both = {key: sorted({*before[key], *seen[key]}) for key in lists}
    seen = {key: value for key, value in seen.items() if key != "sessions"}  # half a list would look like all of it
    return seen | both | {"without_speaker": max(x.get("without_speaker", 0) for x in (before, seen))}


def stamped(seen: dict[str, Any]) -> dict[str, Any]:
    """`seen` with the version of its format in front, as it goes into a file."""
    return {**seen, "format": FORMAT, "version": VERSION}


def read_seen(folder: str | Path) -> dict[str, Any]:
    """The list in the folder of a run or of an export. Raises CheckpointError when it is not readable,
    incomplete or of another major version."""
    path = Path(folder) / SEEN_FILE
    try:
        seen = json.loads(path.read_text(encoding="utf-8"))
        check_version(seen, FORMAT, VERSION, path, CheckpointError)
        if not all(isinstance(seen[key], list) for key in LISTS) or not isinstance(seen["prepare"], dict):
            raise TypeError("a list in it is none")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{path}: not readable as the list of the clips of a run: {error!r}") from error
    return seen
