"""Which clips belong to which side: selected by metadata, held out by whole groups, and checked to be disjoint."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from affekt.data.errors import SettingsError
from affekt.data.order import raw
from affekt.data.shards import ShardIndex


def labelled_clips(index: ShardIndex, label: str, group: str) -> list[int]:
    """Positions of the clips that have the label; SettingsError when none has, or one of them has no group."""
    rows = list(index.samples.rows())
    labelled = [p for p, row in enumerate(rows) if row["meta"].get(label) not in (None, "")]
    if not labelled:
        fields = sorted({key for row in rows for key in row["meta"]})
        raise SettingsError(f"{index.root}: no clip has the field `{label}`; fields there: {', '.join(fields)}")
    nameless = [rows[p]["id"] for p in labelled if group != "id" and not rows[p]["meta"].get(group)]
    if nameless:
        raise SettingsError(
            f"{len(nameless)} labelled clips have no {group}, first {nameless[0]}: a split by {group} cannot be"
            f" checked; add the column `{group}` to the manifest or say `group: id`"
        )
    return labelled


def where(index: ShardIndex, conditions: dict[str, Sequence[str] | str]) -> list[int]:
    """Positions of the clips whose metadata field has one of the allowed values, for every condition.

    `id` is a field too; values are compared as text. Raises SettingsError for a field that no clip has.
    """
    allowed = {field: {str(v) for v in _listed(values)} for field, values in conditions.items()}
    found: set[str] = set()
    positions = []
    for position, row in enumerate(index.samples.rows() if allowed else [{}] * len(index.samples)):
        values = {field: _value(row, field) for field in allowed}
        found.update(field for field, value in values.items() if value is not None)
        if all(values[field] in accepted for field, accepted in allowed.items()):
            positions.append(position)
    for field in allowed:
        if field not in found:
            known = sorted({"id"}.union(*(row["meta"] for row in index.samples.rows())))
            raise SettingsError(f"{index.root}: no clip has the metadata `{field}`; known here: {', '.join(known)}")
    return positions


def group_fraction(
    index: ShardIndex, positions: Sequence[int], group: str = "speaker", fraction: float = 0.1, seed: int = 0
) -> tuple[list[int], list[int]]:
    """Split positions into (rest, held): whole groups, in an order decided by the seed, until `held` has the fraction.

    Raises SettingsError when a clip has no group or a side would stay empty.
    """
    groups: dict[str, list[int]] = {}
    for position in positions:
        groups.setdefault(group_of(index, position, group), []).append(position)
    names = sorted(groups)
    order = [names[i] for i in np.argsort(raw(len(names), seed, "groups"), kind="stable")]
    held: list[int] = []
    for name in order[:-1]:  # the last group always stays
        if held and len(held) + len(groups[name]) / 2 > fraction * len(positions):
            break
        held += groups[name]
    if not held:
        raise SettingsError(f"{len(names)} value(s) of `{group}` cannot be split into two sides")
    held.sort()
    return [position for position in positions if position not in set(held)], held


def assert_disjoint(index: ShardIndex, a: Sequence[int], b: Sequence[int], field: str) -> None:
    """Raises SettingsError naming what both sides share: no speaker (or id, session...) may stand on two of them."""
    if not a or not b:
        return
    sides = [{group_of(index, position, field) for position in side} for side in (a, b)]
    shared = sorted(sides[0] & sides[1])
    if shared:
        more = f" and {len(shared) - 10} more" if len(shared) > 10 else ""
        raise SettingsError(
            f"{index.root}: {len(shared)} value(s) of `{field}` stand on both sides: {', '.join(shared[:10])}{more}"
        )


def assert_no_shared_source(index: ShardIndex, a: Sequence[int], b: Sequence[int]) -> None:
    """Raises SettingsError when a clip of one side was made from the same file as one of the other."""
    rows = ([index.samples.row(p) for p in side] for side in (a, b))
    ours, theirs = ({row["source_sha256"]: row["id"] for row in side} for side in rows)
    for shared in sorted(ours.keys() & theirs.keys() - {""})[:1]:
        raise SettingsError(
            f"{index.root}: the clips {ours[shared]} and {theirs[shared]} stand on two sides and were made from the "
            "same file; put both on one side"
        )


def group_of(index: ShardIndex, position: int, field: str) -> str:
    """A clip's value of a metadata field, or its `id`. Raises SettingsError when it has none."""
    row = index.samples.row(position)
    value = _value(row, field)
    if value is None:
        raise SettingsError(f"{index.root}: clip {row['id']} has no `{field}`, so sides cannot be kept apart by it")
    return value


def _value(row: dict[str, Any], field: str) -> str | None:
    value = row["id"] if field == "id" else row["meta"].get(field)
    return None if value is None or value == "" else str(value)


def _listed(values: Sequence[str] | str) -> Sequence[str]:
    return [values] if isinstance(values, str | int | float) else values
