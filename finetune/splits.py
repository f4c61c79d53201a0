"""Which clips are learned from, chosen on and scored, and the check that pre-training has not seen the last."""

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from affekt.data.errors import SettingsError
from affekt.data.shards import ShardIndex
from affekt.data.split import assert_disjoint, assert_no_shared_source, group_fraction, group_of, where

# Values of manifest fields, `{split: [test]}`, or `{fraction: 0.2}` of the groups there are.
Selector = dict[str, float | int | str | list[str | int]]


def split_clips(
    index: ShardIndex,
    positions: list[int],
    *,
    test: Selector | None,
    dev: Selector | None,
    train: Selector,
    group: str,
    seed: int,
) -> tuple[list[int], list[int], list[int], list[int]]:
    """Positions to train on, to choose on, to score, and what is left over. `dev` is taken from what `test` leaves,
    `train` from what `dev` leaves: all of it where empty. Where `test` or `dev` is None there is no such part.

    Raises SettingsError where a part that was asked for is empty, or two of them share a group or a source file.
    """
    rest, test_clips = _take(index, positions, test, "test", group, seed) if test is not None else (positions, [])
    rest, dev_clips = _take(index, rest, dev, "dev", group, seed + 1) if dev is not None else (rest, [])
    rest, train_clips = _take(index, rest, train, "train", group, seed + 2) if train else ([], rest)
    assert_disjoint(index, train_clips + dev_clips, test_clips, group)
    assert_disjoint(index, train_clips, dev_clips, group)
    assert_no_shared_source(index, train_clips + dev_clips, test_clips)
    assert_no_shared_source(index, train_clips, dev_clips)
    return train_clips, dev_clips, test_clips, rest


def check_unseen(
    index: ShardIndex,
    test: np.ndarray,
    pretraining: dict[str, Any],
    *,
    group: str,
    transductive: bool,
    who: str = "pre-training",
) -> dict[str, Any]:
    """Compare the test clips (positions) with what pre-training saw: ids, source files and, by `group`, speakers or
    sessions (speakers too where an older export does not list its sessions).

    `pretraining` is the `pretrain_data.json` of an export, or of a model; `who` says of which. Returns the counts for
    the results. Raises SettingsError naming some of what is shared unless `transductive`, and for a clip without group.
    """
    samples = [index.samples[p] for p in test]
    values = {"ids": {s.id for s in samples}, "sources": {s.source_sha256 for s in samples} - {""}}
    if group == "speaker" or (group == "session" and "sessions" not in pretraining):
        named = [p for p, s in zip(test, samples) if group == "speaker" or s.meta.get("speaker")]
        values["speakers"] = {group_of(index, p, "speaker") for p in named}
    elif group == "session":
        values["sessions"] = {group_of(index, p, "session") for p in test}
    shared = {what: sorted(found & set(map(str, pretraining[what]))) for what, found in values.items()}
    if any(shared.values()) and not transductive:
        parts = [f"{len(found)} {what} ({', '.join(found[:3])})" for what, found in shared.items() if found]
        raise SettingsError(
            f"{who} has seen test clips: shared {' and '.join(parts)}. Learn without them, choose other test clips, or "
            "set `transductive: true`, which marks every result"
        )
    nameless = pretraining.get("without_speaker", 0) if group == "speaker" else 0
    if nameless:
        print(
            f"note: {nameless} clips that {who} saw have no known speaker; test speakers may be among them",
            file=sys.stderr,
        )
    return {
        "clips": len(pretraining["ids"]),
        "without_speaker": nameless,
        "speakers": len(set(pretraining["speakers"])),
        "shared_with_test": {what: len(found) for what, found in shared.items()},
    }


def licences(index: ShardIndex, positions: Iterable[int], pretraining: dict[str, Any] | None = None) -> list[str]:
    """Licences of clips and of those that weights had seen before; they bind whoever passes the results on."""
    ours = {str(index.samples.row(p)["meta"].get("licence") or "") for p in positions} - {""}
    return sorted(ours | set((pretraining or {}).get("licences", ())))


def _take(
    index: ShardIndex, positions: list[int], selector: Selector, part: str, group: str, seed: int
) -> tuple[list[int], list[int]]:
    """(what is left of `positions`, what the selector takes)."""
    if set(selector) == {"fraction"}:
        share = selector["fraction"]
        if not isinstance(share, int | float) or not 0 < share < 1:
            raise SettingsError(f"{part}: the fraction is {share!r}; it must lie between 0 and 1")
        rest, taken = group_fraction(index, positions, group, float(selector["fraction"]), seed)
        return rest, taken
    if not selector or "fraction" in selector:
        raise SettingsError(f"{part}: say which clips, `{part}: {{split: [{part}]}}` or `{part}: {{fraction: 0.2}}`")
    allowed = set(where(index, selector))
    taken = [p for p in positions if p in allowed]
    if not taken:
        known = {key: Counter(str(index.samples[p].meta.get(key)) for p in positions) for key in selector}
        found = "; ".join(f"{key}: {', '.join(sorted(values)[:12])}" for key, values in known.items())
        raise SettingsError(f"{part}: no clip left has {selector}; the clips left have {found}")
    return [p for p in positions if p not in allowed], taken


def describe_side(
    index: ShardIndex, positions: Sequence[int], classes: Sequence[str], labels: Sequence[int]
) -> dict[str, Any]:
    """Counts for `results.clips["parts"]`: clips at `positions`, by class (`labels`, -1 for none, may be empty where a
    task has no classes), their speakers, and how many have sound and picture."""
    samples = [index.samples[int(position)] for position in positions]
    names = Counter(classes[label] for label in labels if label >= 0)
    return {
        "clips": len(samples),
        "classes": {name: names[name] for name in classes},
        "speakers": sorted({str(sample.meta["speaker"]) for sample in samples if sample.meta.get("speaker")}),
        "with_audio": sum(sample.has_audio for sample in samples),
        "with_video": sum(sample.has_video for sample in samples),
    }
