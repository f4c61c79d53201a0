"""The corpora that one run learns from: folders of shards, which of their clips may be seen, and how often."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from affekt.data.decode import Window
from affekt.data.errors import SettingsError
from affekt.data.order import Source
from affekt.data.remote import Place, RemoteFolder
from affekt.data.shards import ShardIndex

# Settings of `affekt prepare` that a window depends on, and those that the pictures in it do.
ALIKE, ALIKE_IN_PICTURE = ("fps", "sample_rate"), ("size", "face")


@dataclass(frozen=True, eq=False)
class Corpus:
    """The clips of one index at `positions`. Among several, `weight` is its share of an epoch (none states one: in
    proportion to the numbers of clips), and `name` keeps its clips apart from others of the same id. `strata` are its
    positions by class, where each class is to come as often as any other."""

    index: ShardIndex
    positions: Sequence[int] | np.ndarray
    weight: float | None = None
    name: str = ""
    strata: Sequence[Sequence[int] | np.ndarray] | None = None

    def name_of(self, clip: str) -> str:
        """What a clip is called in a run: its id, in a mixture with the corpus in front. An id holds no slash."""
        return f"{self.name}/{clip}" if self.name else clip


def check_together(corpora: Sequence[Corpus]) -> None:
    """Raises SettingsError unless each of several corpora has a name of its own and all were prepared alike."""
    names = [corpus.name for corpus in corpora]
    if len(corpora) > 1 and (len(set(names)) < len(names) or not all(names)):
        raise SettingsError(f"the corpora of a mixture need a name each, all different; they are {names}")
    seen: dict[str, ShardIndex] = {}
    for index in (corpus.index for corpus in corpora):
        if index.fingerprint in seen:
            raise SettingsError(
                f"{seen[index.fingerprint].root} and {index.root} are the same shards, and clips would be negatives of "
                "themselves; name them once, with a weight"
            )
        seen[index.fingerprint] = index
    first = example(corpora)
    ours = {**first.header["prepare"], **first.header}
    for index in (corpus.index for corpus in corpora):
        keys = ALIKE + (ALIKE_IN_PICTURE if index.samples.has_video.any() else ())
        theirs = {**index.header["prepare"], **index.header}
        odd = [f"{key} {theirs[key]}, not {ours[key]}" for key in keys if theirs.get(key) != ours.get(key)]
        if odd:
            raise SettingsError(
                f"{index.root}: prepared with {'; '.join(odd)} as {first.root}; prepare the corpora of one run alike"
            )


def example(corpora: Sequence[Corpus]) -> ShardIndex:
    """The index whose preparation stands for all of them: the first one with pictures, if any has some."""
    indices = [corpus.index for corpus in corpora]
    return next((index for index in indices if index.samples.has_video.any()), indices[0])


def check_window(index: ShardIndex, window: Window) -> None:
    """Raises SettingsError when clips of an index were prepared at other rates than a window has."""
    for name in ("fps", "sample_rate"):
        if index.header[name] != getattr(window, name):
            raise SettingsError(
                f"{index.root}: prepared with {name} {index.header[name]}, the model's window has "
                f"{getattr(window, name)}; prepare the clips again with {name}={getattr(window, name)}"
            )


def sources(corpora: Sequence[Corpus]) -> tuple[list[Source], list[int]]:
    """The corpora as the order sees them, their shards numbered on from one to the next, and the number of the corpus
    behind each: strata are sources of their own, which share the weight of their corpus."""
    firsts = np.cumsum([0, *(len(corpus.index.header["shards"]) for corpus in corpora)])
    balanced = any(corpus.strata for corpus in corpora) and all(corpus.weight is None for corpus in corpora)
    found, owners = [], []
    for number, (c, first) in enumerate(zip(corpora, firsts.tolist())):
        weight, shard = len(c.positions) if balanced else c.weight, c.index.samples.shard + first
        parts = [part for part in c.strata if len(part)] if c.strata else [c.positions]
        for stratum, part in enumerate(parts):
            name = f"{c.name}/stratum-{stratum}" if c.strata else c.name
            found.append(Source(shard, part, None if weight is None else weight / len(parts), name))
            owners.append(number)
    return found, owners


def places(indices: Sequence[ShardIndex]) -> list[Place | None]:
    """Where every shard is fetched from, numbered on likewise; None for those in folders."""
    return [
        (index.root, shard) if isinstance(index.root, RemoteFolder) else None
        for index in indices
        for shard in index.header["shards"]
    ]


def fingerprints(corpora: Sequence[Corpus]) -> str | dict[str, str]:
    """What tells the data of a run from others: of a corpus alone its index's fingerprint, of several one by name."""
    named = {corpus.name: corpus.index.fingerprint for corpus in corpora}
    return named if len(corpora) > 1 else corpora[0].index.fingerprint


def changed_corpora(before: str | dict[str, str], corpora: Sequence[Corpus]) -> list[str]:
    """What is not as it was when `before` was their `fingerprints`: shards that are others, names that are gone."""
    now = fingerprints(corpora)
    if isinstance(before, str) or isinstance(now, str):
        return [] if before == now else [str(corpus.index.root) for corpus in corpora]
    changed = [str(corpus.index.root) for corpus in corpora if before.get(corpus.name) != now[corpus.name]]
    return changed + [f"{name} (left out)" for name in before if name not in now]
