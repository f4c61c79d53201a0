"""The top of a results page: who scores what, with intervals and baselines; which differences hold; folds and seeds."""

from collections.abc import Sequence
from html import escape

import numpy as np

from affekt.data.page import card, table
from affekt.finetune.report.dots import Dot, dot_plot
from affekt.finetune.report.words import (
    BASELINES,
    STREAM_NAMES,
    cell,
    figure,
    key,
    models,
    p_value,
    per_cent,
    scale,
    score_name,
    signed,
    system_colours,
    system_title,
    titles,
)
from affekt.finetune.schema import Results, System

COLUMNS = 4  # scores of the summary table; every other one is in the table that opens below it
SENSES = {"audio": "sound alone", "video": "picture alone", "both": "picture and sound together"}


def chance(results: Results) -> float | None:
    """What guessing is expected to score, where that is known without the clips."""
    return 1 / len(results.classes) if results.main_score == "uar" and results.classes else None


def lead(results: Results) -> str:
    """One sentence: the first model in the order of the results, of both streams where there is one. No test score
    chooses it."""
    chosen = [s for s in results.systems if s.selected != "test"]
    if not chosen:
        return ""
    first = min(models(chosen), key=lambda s: s.streams != "both")
    score = results.main_score
    if score not in first.scores:
        return ""
    reached = first.scores[score]
    unit = "\u00a0%" if scale(score) == 100 else ""
    text = (
        f"{escape(first.title)}: <strong>{score_name(score)} {figure(score, reached.value)}{unit}</strong> (95 %"
        f" interval {figure(score, reached.low)} to {figure(score, reached.high)}) from {SENSES[first.streams]}, on"
        f" {first.clips:,} clips{' that nothing was chosen on' if first.selected == 'dev' else ''}"
    )
    guess = chance(results)
    text += f"; guessing would reach {figure(score, guess)}{unit}." if guess else "."
    against = next((d for d in results.differences if d.of == first.name and d.score == score), None)
    if against:
        e, other = against.estimate, escape(titles(results).get(against.minus, against.minus))
        verdict = "above" if e.low > 0 else "below" if e.high < 0 else "not clearly apart from"
        text += f" That is {verdict} {other}: {signed(score, e)}, p {_relation(against.p)}."
    return f'<p class="lead">{text}</p>'


def _relation(p: float) -> str:
    return "&lt; 0.001" if p < 0.001 else f"= {p:.3f}"


def summary(results: Results) -> str:
    """Systems that were not chosen on test clips, as far as they tell."""
    systems = [s for s in results.systems if s.selected != "test"]
    return _chart(results, systems) + _scores(results, systems) if systems else ""


def chosen_on_test(results: Results) -> str:
    """Systems whose epoch or settings were chosen on the test clips: kept apart, and named so."""
    systems = [s for s in results.systems if s.selected == "test"]
    if not systems:
        return ""
    note = (
        "<p><strong>Not to be compared with the numbers above.</strong> The epoch of these was chosen by the very clips"
        " that score it, as some published results are. They say how far that choice flatters, and nothing about new"
        " clips.</p>"
    )
    return note + _scores(results, systems)


def _chart(results: Results, systems: Sequence[System]) -> str:
    score, colours = results.main_score, system_colours(results)
    groups: dict[str, list[Dot]] = {}
    for system in systems:
        if score in system.scores:
            e, factor = system.scores[score], scale(score)
            name = key(colours[system.name], system.kind in BASELINES) + system_title(system)
            dot = Dot(
                name,
                factor * e.value,
                colours[system.name],
                figure(score, e.value),
                factor * e.low,
                factor * e.high,
                system.kind in BASELINES,
            )
            groups.setdefault(STREAM_NAMES[system.streams], []).append(dot)
    if not groups:
        return ""
    level = chance(results)
    ends = (0.0, 100.0) if scale(score) == 100 else None
    label = f"{score_name(score)} of {len(systems)} systems with 95 % intervals; the table below has the figures"
    chart = dot_plot(groups, label=label, level=None if level is None else 100 * level, ends=ends)
    dotted = " Dotted: chance." if level is not None else ""
    caption = f"{score_name(score)}{per_cent(score)}. Bars: {_intervals(systems, score)}.{dotted} Hollow: baselines."
    return f'<figure class="card wide">{chart}<figcaption>{caption}</figcaption></figure>'


def _intervals(systems: Sequence[System], score: str) -> str:
    """How the intervals came about; where systems differ, each way with its numbers."""
    ways: dict[str, set[int]] = {}
    for system in systems:
        if score in system.scores:
            ways.setdefault(system.scores[score].unit, set()).add(system.scores[score].clusters)
    told = [f"{' or '.join(f'{n:,}' for n in sorted(counts))} {escape(unit)}" for unit, counts in ways.items()]
    return f"95 % intervals from resampling {'; '.join(told)}"


def _scores(results: Results, systems: Sequence[System]) -> str:
    names = list(dict.fromkeys(name for s in systems for name in s.scores))
    names = _first(results.main_score, names)
    shown = _score_table(results, systems, names[:COLUMNS])
    if len(names) <= COLUMNS:
        return card(shown)
    rest = "".join(_score_table(results, systems, names[i : i + COLUMNS]) for i in range(COLUMNS, len(names), COLUMNS))
    return card(shown, f"<details><summary>{len(names) - COLUMNS} more scores</summary>{rest}</details>")


def _score_table(results: Results, systems: Sequence[System], names: Sequence[str]) -> str:
    colours = system_colours(results)
    rows = []
    for stream in dict.fromkeys(s.streams for s in systems):
        for place, system in enumerate(s for s in systems if s.streams == stream):
            first = f"<strong>{STREAM_NAMES[stream]}</strong>" if place == 0 else ""
            named = key(colours[system.name], system.kind in BASELINES) + system_title(system)
            cells = [cell(name, system.scores.get(name)) for name in names]
            seeds = str(len(system.seeds)) if system.seeds else ""
            rows.append([first, named, *cells, f"{system.clips:,}", seeds])
    return table(["Stream", "System", *map(score_name, names), "Clips", "Seeds"], rows, numbers=2, kind="scores")


def differences(results: Results) -> str:
    """Paired differences as dots around zero and as a table, with p of each alone and Holm's for all of them."""
    found = results.differences
    if not found:
        return ""
    names, colours = titles(results), system_colours(results)
    groups: dict[str, list[Dot]] = {}
    for d in found:
        e, factor = d.estimate, scale(d.score)
        named = f"{escape(names.get(d.of, d.of))} <span class='soft'>minus {escape(names.get(d.minus, d.minus))}</span>"
        colour = colours.get(d.of, "var(--soft)")
        dot = Dot(named, factor * e.value, colour, f"p {_relation(d.p)}", factor * e.low, factor * e.high)
        groups.setdefault(f"{score_name(d.score)}{', points' if scale(d.score) == 100 else ''}", []).append(dot)
    charts = [
        card(dot_plot({"": dots}, label=f"Differences in {name} with 95 % intervals", level=0.0), title=name)
        for name, dots in groups.items()
    ]
    head = ["Of", "Minus", "Score", "Difference", "p", *(["p (Holm)"] if len(found) > 1 else []), "Clips"]
    rows = [
        [
            escape(names.get(d.of, d.of)),
            escape(names.get(d.minus, d.minus)),
            score_name(d.score),
            signed(d.score, d.estimate, unit=False),
            p_value(d.p),
            *([p_value(adjusted)] if len(found) > 1 else []),
            f"{d.clips:,}",
        ]
        for d, adjusted in zip(found, holm([d.p for d in found]))
    ]
    note = (
        '<p class="soft">Paired on the clips that both systems judged, resampled together; p is two-sided. An'
        " interval that holds zero leaves open which of the two is better.</p>"
    )
    return (
        note + "".join(charts) + f'<details class="figures"><summary>Figures</summary>{table(head, rows, 3)}</details>'
    )


def holm(p: Sequence[float]) -> list[float]:
    """p values adjusted for their number by Holm's step-down procedure (1979): never below what they were."""
    order = np.argsort(p, kind="stable")
    steps = np.minimum(np.maximum.accumulate((len(p) - np.arange(len(p))) * np.asarray(p)[order]), 1)
    adjusted = np.empty(len(p))
    adjusted[order] = steps
    return adjusted.tolist()


def folds_and_seeds(results: Results) -> str:
    """Per system its folds and its seeds, in a part that opens."""
    parts = [(system_title(s), _folds(results, s) + _seeds(s)) for s in results.systems]
    return "".join(f"<details><summary>{title}</summary>{inner}</details>" for title, inner in parts if inner)


def _folds(results: Results, system: System) -> str:
    if not system.by_fold:
        return ""
    names = _first(results.main_score, [name for fold in system.by_fold for name in fold.scores])[:COLUMNS]
    rows = []
    for fold in system.by_fold:
        chosen = ", ".join(f"{name} {value}" for name, value in fold.chosen.items())
        cells = [figure(n, fold.scores[n]) if n in fold.scores else "" for n in names]
        rows.append([escape(fold.name), escape(chosen), f"{fold.clips:,}", *cells])
    for word, function in (("Mean", np.mean), ("Deviation", lambda v: np.std(v, ddof=1))):
        if len(system.by_fold) > 1:
            columns = [[fold.scores[n] for fold in system.by_fold if n in fold.scores] for n in names]
            cells = [figure(n, float(function(c))) if len(c) > 1 else "" for n, c in zip(names, columns)]
            rows.append([f"<i>{word} over folds</i>", "", "", *cells])
    by = {"dev": " on development clips", "test": " on test clips", "unknown": ""}[system.selected]
    head = ["Fold", f"Chosen{by}", "Clips"]
    return table([*head, *map(score_name, names)], rows, numbers=2)


def _seeds(system: System) -> str:
    if len(system.by_seed) < 2:
        return ""
    names = list(dict.fromkeys(name for scores in system.by_seed for name in scores))[:COLUMNS]
    seeds = system.seeds if len(system.seeds) == len(system.by_seed) else range(len(system.by_seed))
    rows = [
        [str(seed), *(figure(n, scores[n]) if n in scores else "" for n in names)]
        for seed, scores in zip(seeds, system.by_seed)
    ]
    return table(["Seed", *map(score_name, names)], rows, numbers=1)


def _first(name: str, names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys([n for n in names if n == name] + list(names)))
