"""Folds that a corpus gives as lists: a clip's fold is the number of the list that tests on it."""

from collections.abc import Iterable

from affekt.data.errors import SettingsError


def held_out(entries: Iterable[tuple[str, int, str, str, str]]) -> dict[str, tuple[int | None, str]]:
    """`(where, fold, part, clip, label)` of all lists -> `{clip: (fold, label)}`; part is `train` or `test`.

    None where no list tests on a clip. Raises SettingsError where two lists test on a clip or disagree on its label.
    """
    found: dict[str, tuple[int | None, str]] = {}
    for where, fold, part, clip, label in entries:
        before, word = found.get(clip, (None, label))
        if word != label:
            raise SettingsError(f"{where}: {clip} is {label!r} here and {word!r} in another fold's list")
        if part == "test" and before not in (None, fold):
            raise SettingsError(f"{where}: {clip} is tested in fold {before} too")
        found[clip] = (fold if part == "test" else before, label)
    return found
