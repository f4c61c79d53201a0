"""Scores over depth and under stress: layer curves beside their control task, and one chart per kind of damage."""

from collections.abc import Sequence
from html import escape

from affekt.data.charts import Line, line_chart, minus
from affekt.data.page import card, grid, table
from affekt.finetune.report.words import (
    STREAM_NAMES,
    cell,
    figure,
    is_share,
    per_cent,
    scale,
    score_name,
    system_colours,
    titles,
)
from affekt.finetune.schema import Curve, Layers, Results, Stress

LAYER_COLOURS = ("var(--c0)", "var(--c1)", "var(--c3)", "var(--c2)", "var(--c4)", "var(--c5)")
HELD_AGAINST = ("control", "random", "selectivity")  # in the name of a curve: drawn with dashes


def layers(results: Results) -> str:
    """Per stream the scores over depth; the control task says what a probe could learn by heart."""
    names, cards = titles(results), []
    for found in results.layers:
        title = f"{STREAM_NAMES.get(found.stream, found.stream)}: {names.get(found.system, found.system)}"
        lines = [_line(curve, found, i) for i, curve in enumerate(found.curves)]
        chart = line_chart(lines, x_name="layer", names=True, dots=True, label=_said(found, title))
        weights = ""
        if found.weights:
            w = found.weights
            weights = "<h3>Learned weights of the layers</h3>" + line_chart(
                [Line("weight", w.x, w.y, "var(--soft)")],
                x_name="layer",
                zero=True,
                dots=True,
                label=f"Weights, {title}",
            )
        best = f"<figcaption>Best: {escape(found.best)}.</figcaption>" if found.best else ""
        cards.append(card(chart, best, weights, _layer_figures(found), title=title))
    note = (
        f'<p class="soft">{" and ".join(dict.fromkeys(score_name(f.score) for f in results.layers))} of a probe on'
        " every layer. The control task has labels drawn at random per speaker, which only memory can solve;"
        " selectivity is what is left of the score above it.</p>"
    )
    return note + grid(cards, "two") if cards else ""


def _line(curve: Curve, found: Layers, position: int) -> Line:
    factor = scale(found.score)
    series = ([factor * v for v in values] for values in (curve.y, curve.low, curve.high))
    y, low, high = series
    dashed = any(word in curve.name.lower() for word in HELD_AGAINST)
    colour = LAYER_COLOURS[position % len(LAYER_COLOURS)]
    return Line(curve.name, curve.x, y, colour, low or None, high or None, dashed)


def _said(found: Layers, title: str) -> str:
    peaks = [
        f"{c.name} highest at layer {c.x[max(range(len(c.y)), key=c.y.__getitem__)]:g}" for c in found.curves if c.y
    ]
    return f"{score_name(found.score)}{per_cent(found.score)} over layers, {title}: {', '.join(peaks)}"


def _layer_figures(found: Layers) -> str:
    depths = sorted({x for curve in found.curves for x in curve.x})
    at = [dict(zip(curve.x, curve.y)) for curve in found.curves]
    rows = [[f"{x:g}", *(figure(found.score, c[x]) if x in c else "" for c in at)] for x in depths]
    return figures(["Layer", *(escape(c.name) for c in found.curves)], rows)


def figures(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: int = 1) -> str:
    """The table beside a chart, which opens."""
    return f'<details class="figures"><summary>Figures</summary>{table(head, rows, numbers)}</details>'


def stress(results: Results) -> str:
    """A summary of all kinds of damage, then a chart of each with a line per system."""
    if not results.stress:
        return ""
    kinds: dict[tuple[str, str], list[Stress]] = {}
    for one in results.stress:
        kinds.setdefault((one.name, one.score), []).append(one)
    cards = [_damage(results, several) for several in kinds.values()]
    note = (
        '<p class="soft">The test clips spoiled in one way at a time, the same way for every system; bands are 95 %'
        " intervals. AUILC is the area under the curve of score over the share that is missing.</p>"
    )
    return note + card(_overview(results)) + grid(cards, "two")


def _overview(results: Results) -> str:
    names, rows = titles(results), []
    names_in_order = [s.name for s in results.stress]
    for s in sorted(results.stress, key=lambda s: names_in_order.index(s.name)):
        least, most = s.scores[0], s.scores[-1]
        rows.append(
            [
                escape(s.title),
                escape(names.get(s.system, s.system)),
                score_name(s.score),
                f"{_level(s, s.levels[0])} to {_level(s, s.levels[-1])}",
                cell(s.score, least),
                cell(s.score, most),
                "" if s.area is None else figure(s.score, s.area),
            ]
        )
    return table(["Damage", "System", "Score", "Levels", "First", "Last", "AUILC"], rows, numbers=4)


def _shares(s: Stress) -> bool:
    """Whether the levels are shares, which are shown in percent."""
    return s.area is not None or (s.unit.lower() in ("share", "rate", "fraction") and max(s.levels) <= 1)


def _level(s: Stress, level: float) -> str:
    return f"{100 * level:g} %" if _shares(s) else minus(f"{level:g} {escape(s.unit)}".strip())


def _damage(results: Results, several: Sequence[Stress]) -> str:
    names, colours, first = titles(results), system_colours(results), several[0]
    factor, across = scale(first.score), 100 if _shares(first) else 1
    lines = []
    for s in several:
        levels = [across * level for level in s.levels]
        y, low, high = ([factor * getattr(e, part) for e in s.scores] for part in ("value", "low", "high"))
        lines.append(Line(names.get(s.system, s.system), levels, y, colours.get(s.system, "var(--soft)"), low, high))
    unit = "%" if _shares(first) else first.unit
    x_name = f"{first.title.lower()}{f', {unit}' if unit else ''}"
    label = f"{score_name(first.score)}{per_cent(first.score)} over {x_name}"
    chart = line_chart(
        lines, x_name=x_name, zero=is_share(first.score), names=len(results.systems) > 1, dots=True, label=label
    )
    if len(first.levels) < 2:
        chart = ""
    notes = "".join(
        f"<figcaption>{escape(text)}</figcaption>" for text in dict.fromkeys(s.note for s in several) if text
    )
    rows = []
    for s in several:
        for i, (level, e) in enumerate(zip(s.levels, s.scores)):
            kept = figure("accuracy", s.unchanged[i]) if i < len(s.unchanged) else ""
            rows.append([escape(names.get(s.system, s.system)), _level(s, level), cell(s.score, e), kept])
    table_ = figures(["System", "Level", score_name(first.score), "Unchanged, %"], rows, numbers=1)
    return card(chart, notes, table_, title=f"{first.title}: {score_name(first.score)}")
