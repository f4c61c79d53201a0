"""Charts of the probe's report as HTML, which follow the page's colours."""

from collections.abc import Sequence
from html import escape
from typing import Any

from affekt.finetune.probes.results import STREAM_NAMES, main_rows, percent, row_name


def dot_plot(results: dict[str, Any]) -> str:
    """UAR of the first head's rows with their intervals, one group per stream, and a dotted line at chance."""
    parts = []
    chance = 100 * results["chance"]
    for stream in dict.fromkeys(row["stream"] for row in results["rows"]):
        parts.append(f'<div class="group">{STREAM_NAMES[stream]}</div>')
        for row in (r for r in main_rows(results) if r["stream"] == stream):
            score = row["test"]["uar"]
            value, low, high = (100 * score[key] for key in ("value", "low", "high"))
            colour = f"var(--{row['features']})"
            hollow = "background:var(--card);border-color:" if row["kind"] == "plain" else "background:"
            title = escape(f"{row_name(row)}, {STREAM_NAMES[stream].lower()}: UAR {percent(score)}")
            parts.append(
                f'<div class="row"><div>{key(row)}{escape(row_name(row))}</div><div class="track" title="{title}">'
                f'<div class="chance" style="left:{chance:.2f}%"></div>'
                f'<div class="bar" style="left:{low:.2f}%;width:{high - low:.2f}%;background:{colour}"></div>'
                f'<div class="dot" style="left:{value:.2f}%;{hollow}{colour}"></div></div>'
                f'<div class="value">{value:.1f}</div></div>'
            )
    ticks = "".join(f'<span style="left:{tick}%">{tick}</span>' for tick in range(0, 101, 20))
    axis = f'<div class="row"><div></div><div class="axis">{ticks}</div><div></div></div>'
    return f'<div class="dots">{"".join(parts)}{axis}</div>'


def key(row: dict[str, Any]) -> str:
    """The coloured dot that stands for a row; hollow for the fixed plain pooling."""
    colour = f"var(--{row['features']})"
    if row["kind"] == "plain":
        return f'<span class="key plain" style="border-color:{colour}"></span>'
    return f'<span class="key" style="background:{colour}"></span>'


def confusion(matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> str:
    """A confusion matrix as a table of percent per row (truth), shaded; the counts show on hovering."""
    head = "".join(f"<th><span>{escape(name)}</span></th>" for name in classes)
    lines = []
    for truth, counts in zip(classes, matrix):
        total = sum(counts)
        cells = []
        for predicted, count in zip(classes, counts):
            share = count / total if total else 0
            ink = "color:var(--card);font-weight:600" if share > 0.65 else ""  # on a dark shade the ground's colour
            shade = f"background:color-mix(in srgb, var(--pretrained) {100 * share:.0f}%, var(--wash))"
            title = escape(f"{truth} taken for {predicted}: {count} of {total}")
            cells.append(f'<td style="{shade};{ink}" title="{title}">{f"{100 * share:.0f}" if count else ""}</td>')
        lines.append(f"<tr><th>{escape(truth)}</th>{''.join(cells)}</tr>")
    return (
        f'<div class="scroll"><table class="confusion"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )
