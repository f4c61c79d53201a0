"""Scores by groups of people, beside the gap that a model which treats all alike would show by chance."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from scipy.stats import spearmanr

from affekt.data.errors import SettingsError
from affekt.finetune.metrics.catalogue import Score, all_scores
from affekt.finetune.predictions import Predictions
from affekt.finetune.schema import Fairness, Group
from affekt.finetune.scores import main_score, same_clips, task_of

SIMULATIONS = 1000
BINS = 4  # of ratings, where truth is balanced
AGES = (30, 50)
FEW_SPEAKERS, LEAST_SPEAKERS = 10, 4
ROUNDING = 1e-6  # confusions are counted in float32, and weights have fractions
SPEAKER_CLIPS = 10  # of one speaker: fewer say little of them (audEERING's ser-tests)


def describe_fairness(
    predictions: Predictions | Sequence[Predictions],
    attribute: str,
    name: str | None = None,
    *,
    smallest: int = 20,
    seed: int = 0,
) -> Fairness:
    """A score (by default the main one) by groups of `meta[attribute]`; a list has a table per seed, and means count.

    Truth is balanced first: within a class (for ratings within a quarter of their range, for sets of classes within the
    class most voted for) every group weighs as many clips as the smallest has, so that no group is scored on easier
    truth. `gap` is the best group's score minus the worst's. `threshold` is the 95th percentile of the gaps of 1,000
    models that are as good as this one, as much better for some speakers than for others, and blind to groups: to the
    clips of a speaker they answer what the model answered to clips of the same truth by another, drawn from all groups.
    (ser-tests draw answers without regard to the truth; scores of a model at chance scatter otherwise than those of a
    good one. And draws by clip alone take the spread between a few speakers for a gap between their groups.) Between
    speakers themselves the draws are by clip; they are not balanced, their truths seldom overlap.

    Groups of fewer than `smallest` clips, or of one speaker, are listed in `note` and not compared; speakers count from
    10 clips on. Raises SettingsError where fewer than two groups are left.
    """
    tables = same_clips(predictions)
    name = name or main_score(task_of(tables[0]))
    scores = all_scores(tables[0])
    if name not in scores:
        raise SettingsError(f"fairness: no clip has what the score {name} needs; those there are: {', '.join(scores)}")
    one = scores[name]
    tables = [table.take(one.rows(tables[0])) for table in tables]
    people = np.array(tables[0].meta.get("speaker", [""] * len(tables[0])), str)
    member = groups_of(tables[0], attribute)
    by_speaker = attribute == "speaker"
    groups, skipped = _large(member, people, SPEAKER_CLIPS if by_speaker else smallest, by_speaker)
    if len(groups) < 2:
        raise SettingsError(f"fairness by {attribute}: fewer than two groups are large enough ({_listed(skipped)})")
    strata = strata_of(tables[0], one)
    weights = np.stack([(member == group).astype(float) for group in groups])
    weights = weights if by_speaker else balanced(weights, strata)
    measure = partial(_scores, one, tables, weights)
    found = measure()
    gap = float(np.ptp(found))
    rng = np.random.default_rng(seed)
    donors = Donors(strata, weights.any(0), np.full(len(people), "") if by_speaker else people)
    chance = [np.ptp(measure(donors.draw(rng))) for _ in range(SIMULATIONS)]
    threshold = float(np.quantile(chance, 0.95))
    return Fairness(
        system=tables[0].about.get("name", ""),
        attribute=attribute,
        score=name,
        groups=[
            Group(
                name=group,
                clips=int((member == group).sum()),
                speakers=len(set(people[member == group]) - {""}),
                scores={name: float(value)},
            )
            for group, value in zip(groups, found)
        ],
        gap=gap,
        threshold=threshold,
        passes=bool(gap <= threshold + ROUNDING),
        note=_note(tables, one, by_speaker, groups, found, member, people, skipped),
    )


def groups_of(table: Predictions, attribute: str) -> np.ndarray:
    """The group (N,) of every clip; ages in years become three ranges. "" is unknown."""
    values = table.meta.get(attribute, [""] * len(table))
    if attribute == "age":
        values = [_age(value) for value in values]
    return np.array(values, str)


def _age(value: str) -> str:
    try:
        years = float(value)
    except ValueError:
        return value  # a word for it, or nothing
    low, high = AGES
    return f"below {low}" if years < low else f"{low} to {high - 1}" if years < high else f"{high} and above"


def strata_of(table: Predictions, one: Score) -> np.ndarray:
    """Clips of like truth have the same number (N,)."""
    if one.truth == "label":
        return table.label
    if one.truth == "shares":
        return table.shares.argmax(1)
    ratings = table.ratings if one.dimension is None else table.ratings[:, [one.dimension]]
    low, high = ratings.min(0), ratings.max(0)
    bins = np.minimum((ratings - low) / np.maximum(high - low, 1e-12) * BINS, BINS - 1).astype(int)
    return bins @ (BINS ** np.arange(bins.shape[1]))


def balanced(weights: np.ndarray, strata: np.ndarray) -> np.ndarray:
    """Weights (G, N) so that every group has, in each stratum (N,), as much weight as the smallest group has clips.

    Raises SettingsError where the groups have no truth in common.
    """
    found = np.zeros_like(weights)
    for stratum in np.unique(strata):
        here = strata == stratum
        counts = weights[:, here].sum(1)
        if counts.min() > 0:
            found[:, here] = weights[:, here] * (counts.min() / counts)[:, None]
    if not found.any():
        raise SettingsError("fairness: the groups have no class, or range of ratings, in common to be compared on")
    return found


class Donors:
    """Whose answers stand in for whose: to all clips of a speaker those of one speaker drawn for it, with replacement,
    each from a clip of the same stratum; from any clip of the stratum where that speaker has none or nobody is known.
    """

    def __init__(self, strata: np.ndarray, used: np.ndarray, people: np.ndarray):
        """`strata` (N,), `used` bool (N,): the clips that may be drawn, `people` (N,), "" where not known."""
        self.used = np.flatnonzero(used)
        names, self.person = np.unique(people[self.used], return_inverse=True)
        self.unknown = names[self.person] == ""
        self.first = min(int(names[0] == ""), len(names) - 1)  # those nobody knows are together no speaker
        values, self.stratum = np.unique(strata[self.used], return_inverse=True)
        self.order = np.lexsort((self.person, self.stratum))  # cells of a stratum and a person lie together
        cells = np.bincount(self.stratum * len(names) + self.person, minlength=len(values) * len(names))
        self.counts = cells.reshape(len(values), len(names))
        self.starts = (np.cumsum(cells) - cells).reshape(self.counts.shape)
        self.of_clips = np.arange(len(strata))

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """For each clip (N,) the one whose answer it gets; those not used keep their own."""
        people = self.counts.shape[1]
        donor = rng.integers(self.first, people, size=people)[self.person]
        start, count = self.starts[self.stratum, donor], self.counts[self.stratum, donor]
        any_clip = self.unknown | (count == 0)
        start = np.where(any_clip, self.starts[self.stratum, 0], start)
        count = np.where(any_clip, self.counts[self.stratum].sum(1), count)
        found = self.of_clips.copy()
        found[self.used] = self.used[self.order[start + rng.integers(count)]]
        return found


def _scores(one: Score, tables: Sequence[Predictions], weights: np.ndarray, answers: np.ndarray | None = None):
    """Scores (G,), means over seeds; `answers` (N,) are the clips whose answers stand in for those of each."""
    if answers is not None:
        tables = [_answered(table, one, answers) for table in tables]
    return np.mean([one.of(table, weights) for table in tables], axis=0)


def _answered(table: Predictions, one: Score, answers: np.ndarray) -> Predictions:
    """Classes are answered as another clip was; of values its error is taken, for truths of a stratum still differ."""
    if one.truth == "ratings":
        return replace(table, values=table.ratings + (table.values - table.ratings)[answers])
    return replace(table, logits=table.logits[answers])


def _large(member: np.ndarray, people: np.ndarray, smallest: int, by_speaker: bool) -> tuple[list[str], dict[str, str]]:
    """Groups to compare, and why others are not."""
    groups, skipped = [], {}
    for group, clips in sorted(Counter(member.tolist()).items()):
        speakers = len(set(people[member == group]) - {""})
        if not group:
            skipped["unknown"] = f"{clips} clips"
        elif clips < smallest:
            skipped[group] = f"{clips} clips, fewer than {smallest}"
        elif speakers == 1 and not by_speaker:
            skipped[group] = f"{clips} clips of one speaker"
        else:
            groups.append(group)
    return groups, skipped


def _listed(skipped: dict[str, str]) -> str:
    return "; ".join(f"{name}: {why}" for name, why in skipped.items()) or "no clip says it"


def _note(tables, one, by_speaker, groups, found, member, people, skipped) -> str:
    told = []
    if by_speaker:
        worst = np.sort(found)[:: 1 if one.higher else -1][: max(1, len(found) // 10)]
        told.append(
            f"Over {len(found)} speakers: mean {found.mean():.3f}, deviation {found.std(ddof=1):.3f}, "
            f"worst tenth {worst.mean():.3f}."
        )
        if one.truth == "ratings":
            told += _speaker_means(tables, groups, member)
    else:
        fewest = min(len(set(people[member == group]) - {""}) for group in groups)
        if fewest < FEW_SPEAKERS:
            less = f"; of fewer than {LEAST_SPEAKERS} hardly any gap stands out, and that it passes says nothing"
            told.append(
                f"A group has as few as {fewest} speakers, of whom a simulation can say little"
                f"{less if fewest < LEAST_SPEAKERS else ''}."
            )
    if skipped:
        told.append(f"Not compared: {_listed(skipped)}.")
    return " ".join(told)


def _speaker_means(tables: Sequence[Predictions], groups: Sequence[str], member: np.ndarray) -> list[str]:
    """Of each dimension: how far means of speakers are off, and whether they stand in the right order."""
    said, told = np.mean([table.values for table in tables], axis=0), []
    for d, dimension in enumerate(tables[0].dimensions):
        truth, mine = (np.array([x[member == g, d].mean() for g in groups]) for x in (tables[0].ratings, said))
        text = f"Means of speakers in {dimension} are off by {np.abs(truth - mine).mean():.3f}"
        if len(groups) > 2 and np.ptp(truth) > 0 and np.ptp(mine) > 0:
            text += f", Spearman {spearmanr(truth, mine).statistic:.2f}"
        told.append(f"{text}.")
    return told
