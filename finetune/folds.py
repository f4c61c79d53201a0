"""How clips are dealt into folds: by whole speakers or sessions, by a column of the manifest, or as fixed parts.

Whatever the rule, three parts leave here that share no speaker (or session, or clip) and no source file: to train on,
to choose on, to score. The part to choose on is always there and never a part of the test clips.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from affekt.data.errors import SettingsError
from affekt.data.shards import ShardIndex
from affekt.data.split import assert_disjoint, assert_no_shared_source, group_fraction, group_of

Group = Literal["speaker", "session", "id"]
Next = Literal["next"]
TRAIN, DEV, TEST = "train", "dev", "test"


@dataclass(frozen=True)
class Fold:
    """Positions of the clips in an index, ascending: to train on, to choose on, to score once."""

    name: str
    train: list[int]
    dev: list[int]
    test: list[int]


@dataclass(frozen=True)
class Ranges:
    """A fold for each range of the number that a speaker's or session's name ends in: `cremad_1036` is 1036.

    `ranges[i]` are the lowest and highest number that fold i + 1 tests on. `dev` is `next` (what the next fold tests
    on, after the last the first) or the share of the training groups that is held out.
    """

    by: Group
    ranges: tuple[tuple[int, int], ...]
    dev: float | Next = "next"

    def deal(self, index: ShardIndex, positions: Sequence[int]) -> dict[int, str]:
        def fold_of(name: str) -> str:
            number = trailing_number(name)
            found = [i for i, (low, high) in enumerate(self.ranges, 1) if number is not None and low <= number <= high]
            if not found:
                raise SettingsError(
                    f"{index.root}: {self.by} {name!r} lies in no fold; their numbers go from {self.ranges[0][0]} to "
                    f"{self.ranges[-1][1]}. Is this the right protocol, or should these clips be left out?"
                )
            return str(found[0])

        return {p: fold_of(group_of(index, p, self.by)) for p in positions}


@dataclass(frozen=True)
class Leave:
    """Leave one group out, or, with `k`, one of k sets of whole groups of about as many clips each.

    `together` is how many of the next groups are held out to choose on: one speaker alone has one sex.
    """

    by: Group
    k: int | None = None
    together: int = 1
    dev: float | Next = "next"

    def deal(self, index: ShardIndex, positions: Sequence[int]) -> dict[int, str]:
        names = {p: group_of(index, p, self.by) for p in positions}
        sizes = Counter(names.values())
        if self.k is None:
            return names
        if not 2 <= self.k <= len(sizes):
            raise SettingsError(f"{index.root}: {self.k} folds of {len(sizes)} values of `{self.by}`; choose 2 or more")
        folds: list[Counter] = [Counter() for _ in range(self.k)]
        for name in sorted(sizes, key=lambda name: (-sizes[name], natural(name))):  # the largest first, then what fits
            min(folds, key=Counter.total)[name] = sizes[name]
        number = {name: str(i) for i, fold in enumerate(folds, 1) for name in fold}
        return {p: number[name] for p, name in names.items()}


@dataclass(frozen=True)
class Column:
    """Folds that the corpus gives: a clip is tested in the fold that its manifest column names."""

    field: str = "fold"
    dev: float | Next = 0.1

    def deal(self, index: ShardIndex, positions: Sequence[int]) -> dict[int, str]:
        return {p: group_of(index, p, self.field) for p in positions}


@dataclass(frozen=True)
class Fixed:
    """One fold with parts by the values of a column, or by the numbers that they end in (16 is also `ravdess_16`).

    A clip of none of the parts is left out. Without `dev` a share of the training groups is held out to choose on.
    """

    field: str = "split"
    train: tuple[str | int, ...] = (TRAIN,)
    dev_values: tuple[str | int, ...] = (DEV, "val", "valid")
    test: tuple[str | int, ...] = (TEST,)
    dev: float = 0.2

    def deal(self, index: ShardIndex, positions: Sequence[int]) -> dict[int, str]:
        sides = {TRAIN: self.train, DEV: self.dev_values, TEST: self.test}
        dealt = {}
        for p in positions:
            value = group_of(index, p, self.field)
            number = trailing_number(value)
            part = next((part for part, allowed in sides.items() if value in allowed or number in allowed), None)
            if part:
                dealt[p] = part
        for part in (TRAIN, TEST):
            if part not in dealt.values():
                found = ", ".join(sorted({group_of(index, p, self.field) for p in positions}, key=natural)[:12])
                raise SettingsError(
                    f"{index.root}: no clip of the {part} part, whose `{self.field}` is one of "
                    f"{', '.join(map(str, sides[part]))}; found: {found}"
                )
        return dealt


Split = Ranges | Leave | Column | Fixed


def deal(index: ShardIndex, positions: Sequence[int], split: Split, group: Group, *, own: bool = False) -> list[Fold]:
    """The folds of the clips at `positions`, checked: no group (`id`: no clip) and no source file on two sides.

    `own` says that the corpus has these folds itself, so a manifest column `fold` must hold the same ones. Raises
    SettingsError for a clip without what it takes, a group on two sides, and parts that stay empty.
    """
    dealt = split.deal(index, positions)
    if isinstance(split, Fixed):
        sides = {part: [p for p, name in dealt.items() if name == part] for part in (TRAIN, DEV, TEST)}
        if not sides[DEV]:
            sides[TRAIN], sides[DEV] = group_fraction(index, sides[TRAIN], group, split.dev)
        folds = [Fold("fixed", *(sorted(sides[part]) for part in (TRAIN, DEV, TEST)))]
    else:
        if own:
            _agree_with_column(index, dealt)
        names = sorted(set(dealt.values()), key=natural)
        if len(names) < 2 or (len(names) < 3 and split.dev == "next"):
            raise SettingsError(
                f"{index.root}: {len(names)} fold(s) ({', '.join(names)}) of {len(dealt)} clips; a test and a training "
                "side need two, and choosing on the next fold needs a third"
            )
        _refuse_torn(index, dealt, group)
        folds = [_one_out(index, dealt, names, name, split, group) for name in names]
    for fold in folds:
        check(index, fold, group)
    return folds


def check(index: ShardIndex, fold: Fold, group: Group) -> None:
    """Raises SettingsError where a part is empty, or two of them share a group or a source file."""
    for part in (TRAIN, DEV, TEST):
        if not getattr(fold, part):
            raise SettingsError(f"{index.root}: fold {fold.name} has no {part} clips")
    for a, b in ((fold.train, fold.dev), (fold.train, fold.test), (fold.dev, fold.test)):
        assert_disjoint(index, a, b, group)
        assert_disjoint(index, a, b, "id")
        assert_no_shared_source(index, a, b)


def _one_out(index, dealt: dict[int, str], names: list[str], name: str, split: Split, group: Group) -> Fold:
    test = [p for p, fold in dealt.items() if fold == name]
    rest = [p for p, fold in dealt.items() if fold != name]
    if split.dev == "next":
        after = names.index(name) + 1
        many = min(getattr(split, "together", 1), len(names) - 2)
        chosen = {names[(after + i) % len(names)] for i in range(many)}
        train, dev = ([p for p in rest if (dealt[p] in chosen) is side] for side in (False, True))
    else:
        train, dev = group_fraction(index, rest, group, split.dev)
    return Fold(name, sorted(train), sorted(dev), sorted(test))


def _refuse_torn(index: ShardIndex, dealt: dict[int, str], group: Group) -> None:
    """SettingsError for a speaker or session with clips in two folds: then no fold is what it says."""
    if group == "id":
        return
    found: dict[str, dict[str, int]] = {}
    for p, fold in dealt.items():
        found.setdefault(group_of(index, p, group), {}).setdefault(fold, p)
    torn = {name: folds for name, folds in found.items() if len(folds) > 1}
    for name, folds in sorted(torn.items())[:1]:
        where = " and ".join(f"{index.samples.row(p)['id']} in fold {fold}" for fold, p in sorted(folds.items())[:2])
        raise SettingsError(
            f"{index.root}: {len(torn)} value(s) of `{group}` have clips in several folds: {name} has {where}; a "
            f"{group} belongs to one fold"
        )


def _agree_with_column(index: ShardIndex, dealt: dict[int, str]) -> None:
    """SettingsError where the manifest's column `fold` parts the clips otherwise than the protocol does."""
    columns = {p: str(index.samples.row(p)["meta"].get("fold", "")) for p in dealt}
    if not all(columns.values()):
        return
    ours: dict[str, tuple[str, int]] = {}
    theirs: dict[str, tuple[str, int]] = {}
    for p, fold in dealt.items():
        for table, key, value in ((ours, fold, columns[p]), (theirs, columns[p], fold)):
            before, first = table.setdefault(key, (value, p))
            if before != value:
                one, other = (index.samples.row(q)["id"] for q in (first, p))
                raise SettingsError(
                    f"{index.root}: the manifest's column `fold` does not hold the folds of this protocol: {one} and "
                    f"{other} are in {'one fold' if table is ours else 'two folds'} here and not there; correct the "
                    "column or remove it"
                )


def trailing_number(name: str) -> int | None:
    """`cremad_1036` -> 1036, `Ses05` -> 5; None where a name ends in no number."""
    found = re.search(r"\d+$", name)
    return int(found[0]) if found else None


def natural(name: str) -> list[tuple[int, int | str]]:
    """The order of people: 9 before 10."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name) if part]
