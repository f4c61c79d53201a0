"""Dots with intervals on one scale, a row each: scores side by side, and differences around zero."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from affekt.data.charts import minus, nice_ticks


@dataclass(frozen=True)
class Dot:
    """One row. `name` and `text` are ready HTML; the value and its bounds are in the units of the scale."""

    name: str
    value: float
    colour: str
    text: str
    low: float | None = None
    high: float | None = None
    hollow: bool = False


def dot_plot(
    groups: dict[str, Sequence[Dot]], *, label: str, level: float | None = None, ends: tuple[float, float] | None = None
) -> str:
    """Rows under the names of their groups. `level` is a dotted line (chance, zero), `ends` what the scale has to
    reach; `label` says what it shows to who cannot see it, and a table with the figures belongs beside it."""
    dots = [dot for rows in groups.values() for dot in rows]
    reach = [v for dot in dots for v in (dot.value, dot.low, dot.high) if v is not None]
    reach += [*(ends or ()), *([] if level is None else [level])]
    apart = 0.0 if max(reach) - min(reach) > 1e-6 else 0.5  # all the same, which needs a scale too
    ticks = nice_ticks(min(reach) - apart, max(reach) + apart)
    low, span = ticks[0], ticks[-1] - ticks[0]

    def place(value: float) -> str:
        return f"{100 * (value - low) / span:.2f}%"

    lines = "".join(f'<div class="tick" style="left:{place(tick)}"></div>' for tick in ticks)
    lines += "" if level is None else f'<div class="chance" style="left:{place(level)}"></div>'
    parts = []
    for name, rows in groups.items():
        parts += [f'<div class="group">{escape(name)}</div>'] if name else []
        parts += [_row(dot, place, lines) for dot in rows]
    axis = "".join(f'<span style="left:{place(tick)}">{minus(f"{tick:g}")}</span>' for tick in ticks)
    parts.append(f'<div class="row"><div></div><div class="axis">{axis}</div><div></div></div>')
    return f'<div class="dots ticked" role="img" aria-label="{escape(label)}">{"".join(parts)}</div>'


def _row(dot: Dot, place: Callable[[float], str], lines: str) -> str:
    bar = ""
    if dot.low is not None and dot.high is not None:
        width = f"calc({place(dot.high)} - {place(dot.low)})"
        bar = f'<div class="bar" style="left:{place(dot.low)};width:{width};background:{dot.colour}"></div>'
    fill = f"background:var(--card);border-color:{dot.colour}" if dot.hollow else f"background:{dot.colour}"
    return (
        f'<div class="row"><div>{dot.name}</div><div class="track">{lines}{bar}'
        f'<div class="dot" style="left:{place(dot.value)};{fill}"></div></div><div class="value">{dot.text}</div></div>'
    )
