"""What a retrieval experiment found, as the parts of results.json."""

from dataclasses import asdict
from functools import partial

import numpy as np

from affekt.finetune.metrics.intervals import as_interval, resampled, two_sided_p
from affekt.finetune.retrieval.ranks import CUTS, Ranks, estimates
from affekt.finetune.retrieval.recall import Found
from affekt.finetune.retrieval.settings import RetrievalSettings
from affekt.finetune.schema import Difference, Estimate, System

TITLES = {
    ("pretrained", "chosen"): "Pre-trained encoder",
    ("pretrained", "contrast"): "Pre-trained encoder, space of the contrast",
    ("statistics", "chosen"): "Plain statistics, aligned",
    ("random", "chosen"): "Random encoder",
    ("random", "contrast"): "Random encoder, space of the contrast",
}
HEAD = ["", "task", "space", "queries", "among", *(f"recall@{k}" for k in CUTS), "median rank", "mAP"]

NOTE = (
    "Recall and mAP in percent. Tied scores count as chance decides them. Left out of a query's list: other clips of "
    "the same source file, and by label the clip itself and, where `apart` says so, its speaker's. `chosen` spaces are "
    "chosen by mAP on the clips of dev. Intervals over the queries; what they are searched among stays the same."
)


def describe(
    name: str, kind: str, found: list[dict[str, Found]], groups: list[str], settings: RetrievalSettings
) -> tuple[System, list[list[str]]]:
    """A row of the summary table and its lines in the table of recalls. Several seeds are joined: their queries are
    resampled together, a clip with all its seeds."""
    title = TITLES[name, kind] + (" (transductive)" if settings.transductive else "")
    scores: dict[str, Estimate] = {}
    lines = []
    for task, first in found[0].items():
        ranks = joined([each[task].ranks for each in found])
        drawn = estimates(ranks, [groups[q] for q in ranks.queries], settings.bootstrap, settings.seed, settings.group)
        scores |= {f"{task}_{score}": value for score, value in drawn.items()}
        spaces = ", ".join(dict.fromkeys(each[task].space.name for each in found))
        lines.append([title, task, spaces, str(len(first.ranks.first)), str(first.items), *_intervals(drawn)])
    by_seed = [
        {f"{task}_{score}": value for task, f in each.items() for score, value in f.ranks.scores().items()}
        for each in found
    ]
    system = System(
        name=f"{name}_{kind}",
        title=title,
        kind=name if name in ("random", "statistics") else "other",
        streams="both"
        if len({f.task.query for f in found[0].values()}) > 1
        else next(iter(found[0].values())).task.query,
        transductive=settings.transductive,
        seeds=list(settings.random_seeds) if name == "random" else [],
        clips=max(len(f.ranks.first) for f in found[0].values()),
        scores=scores,
        by_seed=by_seed,
    )
    return system, lines


def joined(ranks: list[Ranks]) -> Ranks:
    """The queries of several searches in one list."""
    queries, first, precision = (
        np.concatenate([getattr(r, name) for r in ranks]) for name in ("queries", "first", "precision")
    )
    return Ranks(queries, first, precision, {k: np.concatenate([r.hits[k] for r in ranks]) for k in CUTS})


def differences(
    found: list[tuple[str, dict[str, dict[str, Found]]]], groups: list[str], n: int, seed: int, unit: str
) -> list[Difference]:
    """The pre-trained encoder minus random ones (means over their seeds) and minus plain statistics, and its chosen
    space minus that of the contrast: recall@1 and mAP of each task on the queries that both have, in pairs."""
    kinds = {kind for _, kinds in found for kind in kinds}
    best = "chosen" if "chosen" in kinds else "contrast"
    pairs = [("random", best), ("statistics", best), *([("pretrained", "contrast")] if best == "chosen" else [])]
    told = []
    for name, kind in pairs:
        others = [kinds[kind] for other, kinds in found if other == name and kind in kinds]
        for task, ours in found[0][1][best].items() if others else ():
            theirs = [other[task].ranks for other in others]
            shared = np.intersect1d(ours.ranks.queries, theirs[0].queries)
            who = [groups[q] for q in shared]
            for score in ("recall_1", "map"):
                gaps = _of(ours.ranks, score, shared) - np.mean([_of(ranks, score, shared) for ranks in theirs], 0)
                mean = partial(lambda x, weights: weights @ x / weights.sum(1), gaps)
                drawn = resampled({score: mean}, len(shared), who, n, seed)[score]
                interval = asdict(as_interval(gaps.mean(), drawn, len(shared), who, unit))
                interval |= {"unit": "clips"} if unit == "id" else {}
                told.append(
                    Difference(
                        of=f"pretrained_{best}",
                        minus=f"{name}_{kind}",
                        score=f"{task}_{score}",
                        clips=len(shared),
                        estimate=Estimate(**interval),
                        p=two_sided_p(drawn),
                    )
                )
    return told


def _of(ranks: Ranks, score: str, queries: np.ndarray) -> np.ndarray:
    """What each of `queries`, some of those that were asked, adds to a score."""
    return ranks.values()[score][np.searchsorted(ranks.queries, queries)]


def cells(scores: dict[str, float]) -> list[str]:
    shares = [f"{100 * scores[name]:.1f}" for name in (*(f"recall_{k}" for k in CUTS), "map")]
    return [*shares[:-1], f"{scores['median_rank']:g}", shares[-1]]


def _intervals(scores: dict[str, Estimate]) -> list[str]:
    def cell(name: str, factor: float) -> str:
        e = scores[name]
        return f"{factor * e.value:.1f} [{factor * e.low:.1f}, {factor * e.high:.1f}]"

    return [*(cell(f"recall_{k}", 100) for k in CUTS), cell("median_rank", 1), cell("map", 100)]
