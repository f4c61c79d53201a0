"""How far a model's confidence can be trusted: reliability diagrams, calibration scores, risk over coverage."""

from collections.abc import Sequence
from html import escape

from affekt.data.charts import Line, line_chart
from affekt.data.page import card, grid, table
from affekt.finetune.report.words import figure, models, score_name, system_colours, titles
from affekt.finetune.schema import Bin, Calibration, Results

SIDE, LEFT, BOTTOM, TOP = 250, 50, 34, 10
DRAWN = 6  # diagrams; the table has every model
BANDS = 3  # of intervals that lie over each other and can still be told apart
FEWEST = 0.05  # of the clips: the risk of fewer is a matter of single clips


def calibration(results: Results) -> str:
    """Per model a reliability diagram after scaling, with what it was before where that is known, and the scores."""
    found = [s for s in models(results.systems) if s.calibration]
    if not found:
        return ""
    names, colours = titles(results), system_colours(results)
    cards = []
    for s in [s for s in found if s.calibration.bins][:DRAWN]:
        series = {"after": s.calibration.bins, "before": s.calibration.bins_before}
        diagram = reliability(series, colours[s.name], "share that is right")
        cards.append(card(diagram, title=names[s.name]))
    rows = [row for s in found for row in _rows(names[s.name], s.calibration)]
    scores = list(dict.fromkeys(score for s in found for score in (*s.calibration.before, *s.calibration.after)))
    head = ["System", "Scaling", *map(score_name, scores)]
    cells = [
        [name, when, *(figure(n, values[n], 3) if n in values else "" for n in scores)] for name, when, values in rows
    ]
    note = (
        '<p class="soft">Points: clips of like confidence, as large as there are many; on the diagonal confidence is'
        " the share that is right. Filled: after scaling by temperatures from development clips; hollow: before.</p>"
    )
    return note + grid(cards) + card(table(head, cells, numbers=2))


def _rows(name: str, c: Calibration) -> list[tuple[str, str, dict[str, float]]]:
    shown = ", ".join(f"{t:.2f}" for t in c.temperatures[:6]) + (" …" if len(c.temperatures) > 6 else "")
    rows = [(f"<strong>{escape(name)}</strong>", "before", c.before)]
    return [*rows, ("", f"after, temperature {shown}" if shown else "after", c.after)]


def votes(results: Results) -> str:
    """Confidence against the share of raters who chose the same class: people disagree, and so may a model."""
    found = [s for s in models(results.systems) if s.calibration and (s.calibration.vote_bins or s.calibration.votes)]
    if not found:
        return ""
    names, colours = titles(results), system_colours(results)
    cards = [
        card(reliability({"after": s.calibration.vote_bins}, colours[s.name], "share of raters"), title=names[s.name])
        for s in found[:DRAWN]
        if s.calibration.vote_bins
    ]
    scores = list(dict.fromkeys(n for s in found for n in s.calibration.votes))
    rows = [
        [
            escape(names[s.name]),
            *(figure(n, s.calibration.votes[n], 3) if n in s.calibration.votes else "" for n in scores),
        ]
        for s in found
    ]
    note = '<p class="soft">The same against the share of raters who chose the class that the model answers.</p>'
    return note + grid(cards) + (card(table(["System", *map(score_name, scores)], rows, numbers=1)) if scores else "")


def reliability(series: dict[str, Sequence[Bin]], colour: str, y_name: str) -> str:
    """Share over confidence for bins of clips; the areas of the points are their clips. `before` is hollow."""

    def x(value: float) -> float:
        return LEFT + value * (SIDE - LEFT - 10)

    def y(value: float) -> float:
        return SIDE - BOTTOM - value * (SIDE - BOTTOM - TOP)

    parts = []
    for tick in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{SIDE - 10}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
        parts.append(f'<text x="{x(tick):.1f}" y="{SIDE - BOTTOM + 16}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<line class="chance" x1="{x(0)}" y1="{y(0)}" x2="{x(1)}" y2="{y(1)}"/>')
    for when, bins in reversed(series.items()):
        largest = max((b.clips for b in bins), default=1)
        points = " ".join(f"{x(b.confidence):.1f},{y(b.share):.1f}" for b in bins)
        dash = ";stroke-dasharray:3 3;stroke-width:1.25" if when == "before" else ""
        parts.append(f'<polyline class="line" points="{points}" style="stroke:{colour}{dash}"/>')
        fill = f"fill:var(--card);stroke:{colour};stroke-width:1.5" if when == "before" else f"fill:{colour}"
        for b in bins:
            title = f"{b.clips:,} clips: confidence {b.confidence:.2f}, {y_name} {b.share:.2f}, {when} scaling"
            radius = 2 + 4 * (b.clips / largest) ** 0.5
            parts.append(
                f'<circle cx="{x(b.confidence):.1f}" cy="{y(b.share):.1f}" r="{radius:.1f}" style="{fill}">'
                f"<title>{title}</title></circle>"
            )
    parts.append(f'<text x="{(LEFT + SIDE - 10) / 2}" y="{SIDE - 2}" text-anchor="middle">confidence</text>')
    label = f"{y_name} over confidence: " + "; ".join(
        f"{when} " + ", ".join(f"{b.confidence:.2f} {b.share:.2f}" for b in bins)
        for when, bins in series.items()
        if bins
    )
    axis = f'<text class="y" transform="translate(11 {SIDE / 2 - 10}) rotate(-90)" text-anchor="middle">{y_name}</text>'
    inner = "".join(parts) + axis
    return f'<svg class="square" viewBox="0 0 {SIDE} {SIDE + 2}" role="img" aria-label="{escape(label)}">{inner}</svg>'


def risk_coverage(results: Results) -> str:
    """The share of wrong answers among the clips that a model is surest of, over how many are kept."""
    found = [s for s in models(results.systems) if s.risk_coverage and max(s.risk_coverage.x, default=0) > FEWEST]
    if not found:
        return ""
    names, colours = titles(results), system_colours(results)
    few = len(found) <= BANDS
    lines = []
    for s in found:
        c = s.risk_coverage
        kept = [i for i, x in enumerate(c.x) if x >= FEWEST]
        x, y, low, high = ([100 * values[i] for i in kept] if values else [] for values in (c.x, c.y, c.low, c.high))
        lines.append(Line(names[s.name], x, y, colours[s.name], low if few else None, high if few else None))
    chart = line_chart(
        lines, x_name="percent of clips kept, the surest first", zero=True, names=True, label="Risk over coverage"
    )
    places = [0.25, 0.5, 0.75, 1.0]
    rows = [
        [escape(names[s.name]), *(_risk_at(s.risk_coverage.x, s.risk_coverage.y, p) for p in places)] for s in found
    ]
    head = ["Wrong among the surest", *(f"{100 * p:.0f} %" for p in places)]
    note = '<p class="soft">Percent of answers that are wrong when only the surest are given.</p>'
    return note + grid([card(chart), card(table(head, rows, numbers=1))], "two")


def _risk_at(x: Sequence[float], y: Sequence[float], place: float) -> str:
    """At the coverage that is nearest."""
    nearest = min(range(len(x)), key=lambda i: abs(x[i] - place))
    return f"{100 * y[nearest]:.1f}"
