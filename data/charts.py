"""Line charts as inline SVG, which follow the page's colours."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

WIDTH, HEIGHT = 420, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 14, 30


@dataclass(frozen=True)
class Line:
    """One line of a chart; `colour` is a CSS colour, `low` and `high` an optional band around `y`. `dashed` is for what
    a line is held against."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    dashed: bool = False


def line_chart(
    lines: Sequence[Line],
    *,
    x_name: str,
    chance: float | None = None,
    zero: bool = False,
    names: bool = False,
    dots: bool = False,
    label: str = "",
) -> str:
    """Lines on a common scale as SVG, names in the colours of their lines above. Values that are not finite are left
    out; `zero` starts the scale at 0, `chance` draws a dotted level, `names` gives its name to one line alone too.
    `dots` marks every point, for few that were measured one by one. `label` says what it shows to who cannot see it."""
    values = [v for line in lines for series in (line.y, line.low or (), line.high or ()) for v in series]
    values = [v for v in [*values, *([] if chance is None else [chance])] if math.isfinite(v)]
    xs = [x for line in lines for x in line.x]
    if not values or len(set(xs)) < 2:
        return '<p class="soft">Too few points to draw.</p>'
    lowest, highest = 0.0 if zero else min(values), max(values)
    if highest - lowest < 1e-9 * max(abs(lowest), abs(highest), 1e-9):  # all the same, which needs a scale too
        highest = lowest + (max(0.1 * abs(lowest), 1e-9) if lowest else 1.0)
    ticks = nice_ticks(lowest, highest)
    low, high = ticks[0], ticks[-1]
    x_low, x_high = (0 if 0 < min(xs) < 0.1 * max(xs) else min(xs)), max(xs)  # a run is shown from its beginning

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def points(x: Sequence[float], y: Sequence[float]) -> str:
        return " ".join("{:.1f},{:.1f}".format(*place(a, b)) for a, b in zip(x, y) if math.isfinite(b))

    parts = []
    for tick in ticks:
        _, y = place(x_low, tick)
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick_name(tick, max(abs(low), abs(high)))}</text>'
        )
    whole = all(x == int(x) for x in xs)
    for x in x_ticks(x_low, x_high) if whole else nice_ticks(x_low, x_high):
        if x_low <= x <= x_high:
            name = minus(f"{x:,.0f}" if whole else f"{x:g}")
            across, _ = place(x, low)
            parts.append(f'<text x="{across:.1f}" y="{HEIGHT - 11}" text-anchor="middle">{name}</text>')
    if chance is not None:
        (x1, y), (x2, _) = place(x_low, chance), place(x_high, chance)
        parts.append(f'<line class="chance" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{x2:.1f}" y="{y - 5:.1f}" text-anchor="end">chance</text>')
    for line in lines:
        if line.low and line.high:
            around = points(line.x, line.low) + " " + points(line.x[::-1], line.high[::-1])
            parts.append(f'<polygon class="band" points="{around}" style="fill:{line.colour}"/>')
        dash = ";stroke-dasharray:5 4" if line.dashed else ""
        parts.append(f'<polyline class="line" points="{points(line.x, line.y)}" style="stroke:{line.colour}{dash}"/>')
        for at in points(line.x, line.y).split() if dots else ():
            x, y = at.split(",")
            parts.append(f'<circle class="at" cx="{x}" cy="{y}" r="3.5" style="fill:{line.colour}"/>')
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT + 6}" text-anchor="middle">{escape(x_name)}</text>'
    )
    legend = "".join(
        f'<span style="color:{line.colour};margin-right:16px;font-weight:600">{escape(line.name)}</span>'
        for line in lines
    )
    legend = f'<div style="font-size:14px;margin-bottom:6px">{legend}</div>' if names or len(lines) > 1 else ""
    label = escape(label or f"{', '.join(line.name for line in lines if line.name)} over {x_name}".removeprefix(" "))
    return f'{legend}<svg viewBox="0 0 {WIDTH} {HEIGHT + 10}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round values at even steps of 1, 2 or 5 times a power of ten that enclose `low` to `high`."""
    span = max(high - low, 1e-12 + 1e-3 * abs(high))
    step = _step(span / about)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(k * step, 12) for k in range(first, max(last, first + 1) + 1)]


def tick_name(tick: float, largest: float) -> str:
    """`0.25`, `20`; on a scale that stays below 0.01 as `2.5e-4`, which is as wide at every tick."""
    if not tick or abs(largest) >= 0.01:
        return f"{tick:.6g}"
    digits, power = f"{tick:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(power)}"


def minus(figure: str) -> str:
    """The figure with a minus sign as wide as its plus."""
    return figure.replace("-", "\u2212")


def _step(least: float) -> float:
    power = 10 ** math.floor(math.log10(least))
    return next(s * power for s in (1, 2, 5, 10) if s * power >= least * (1 - 1e-9))


def x_ticks(low: float, high: float) -> list[float]:
    """Whole-number positions within `low` to `high`."""
    return [tick for tick in nice_ticks(low, high) if low <= tick <= high and tick == int(tick)]


def smooth(values: Sequence[float], width: int) -> list[float]:
    """Running mean over up to `width` values around each, shorter at the ends."""
    half = width // 2
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return [
        float(
            (sums[min(i + half + 1, len(values))] - sums[max(i - half, 0)])
            / (min(i + half + 1, len(values)) - max(i - half, 0))
        )
        for i in range(len(values))
    ]
