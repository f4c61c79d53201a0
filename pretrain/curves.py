"""Curves and pictures of runs as pieces of a page; several runs are drawn into the same charts."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from affekt.data.charts import Line, line_chart, smooth
from affekt.data.page import card, file_uri

MAX_POINTS = 400  # of a line: as many as a chart has room for
RUN_COLOURS = ("both", "statistics", "audio", "video", "random", "majority")


@dataclass(frozen=True)
class Curve:
    """A chart: `lines` is name -> (key in `metrics.jsonl`, colour of the page)."""

    title: str
    lines: dict[str, tuple[str, str]]
    note: str = ""
    zero: bool = False
    smoothed: bool = True
    factor: float = 1.0
    chance: str | None = None  # key of a level to draw


LEARNING = (
    Curve("Reconstruction error", {"Picture": ("loss_video", "video"), "Sound": ("loss_audio", "audio")}),
    Curve("Contrast between picture and sound", {"Contrast": ("loss_contrast", "both")}),
    Curve("Error of the sound's statistics", {"Sound": ("loss_functionals", "audio")}),
    Curve("Error of the picture's edges", {"Picture": ("loss_edges", "video")}),
    Curve("Learning rate", {"Rate": ("lr", "random")}, zero=True, smoothed=False),
    Curve("Clips per second", {"Clips per second": ("clips_per_s", "statistics")}, zero=True),
)
HEALTH = (
    Curve("Loss", {"Loss": ("loss", "both")}),
    Curve("Gradient norm, before clipping", {"Norm": ("grad_norm", "random")}, zero=True, smoothed=False),
    Curve("Waiting for data, % of the time", {"Waiting": ("data_wait", "video")}, zero=True, factor=100),
    Curve("Model FLOPs utilisation, % of peak", {"MFU": ("mfu", "audio")}, zero=True, factor=100),
    Curve("Memory, GiB", {"Memory": ("memory_gib", "random")}, zero=True),
)
_STREAMS = (("Both", "both", "both"), ("Sound", "audio", "audio"), ("Picture", "video", "video"))
_RANKS = ((1, "both"), (5, "audio"), (10, "statistics"))
PROBES = (
    Curve(
        "Linear probe, UAR in %",
        {name: (f"probe/linear_{stream}", colour) for name, stream, colour in _STREAMS},
        factor=100,
        smoothed=False,
        chance="probe/chance",
    ),
    Curve(
        "Nearest neighbours, UAR in %",
        {name: (f"probe/knn_{stream}", colour) for name, stream, colour in _STREAMS},
        factor=100,
        smoothed=False,
        chance="probe/chance",
    ),
    *(
        Curve(
            title,
            {f"R@{k}": (f"probe/{key}_{k}", colour) for k, colour in _RANKS},
            zero=True,
            factor=100,
            smoothed=False,
        )
        for title, key in (
            ("Sound found for a picture, recall in %", "video_to_audio"),
            ("Picture found for a sound, recall in %", "audio_to_video"),
        )
    ),
    Curve(
        "Effective rank",
        {"Sound": ("probe/rank_audio", "audio"), "Picture": ("probe/rank_video", "video")},
        "Directions in use among the embeddings; one that falls to 1 is a collapse.",
        zero=True,
        smoothed=False,
    ),
    Curve(
        "Uniformity",
        {"Sound": ("probe/uniformity_audio", "audio"), "Picture": ("probe/uniformity_video", "video")},
        "0: all clips in one point; about −4: spread evenly over the sphere.",
        smoothed=False,
    ),
    Curve(
        "Alignment and gap of the streams",
        {"Alignment": ("probe/alignment", "both"), "Gap": ("probe/gap", "statistics")},
        "Squared distance of picture and sound of a clip, and distance of the centres of the two streams.",
        zero=True,
        smoothed=False,
    ),
)


def curve_cards(curves: Sequence[Curve], runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Cards with the charts that have at least two points. `runs` is name -> rows of `metrics.jsonl`; with one run each
    line has the colour of what it shows, with several the colour of its run, and each key a chart of its own."""
    cards = []
    for curve in curves:
        if len(runs) == 1:
            charts = {
                curve.title: [(name, *line, rows) for name, line in curve.lines.items() for rows in runs.values()]
            }
        else:
            charts = {
                curve.title if len(curve.lines) == 1 else f"{curve.title}: {name}": [
                    (run, field, RUN_COLOURS[n % len(RUN_COLOURS)], rows) for n, (run, rows) in enumerate(runs.items())
                ]
                for name, (field, _) in curve.lines.items()
            }
        for title, wanted in charts.items():
            drawn = [line for line in (_line(curve, *one) for one in wanted) if line]
            if drawn:
                chance = next((row[curve.chance] for *_, rows in wanted for row in rows if curve.chance in row), None)
                chance = None if chance is None else curve.factor * chance
                chart = line_chart(drawn, x_name="step", chance=chance, zero=curve.zero, names=len(runs) > 1)
                note = f"<figcaption>{escape(curve.note)}</figcaption>" if curve.note else ""
                cards.append(card(chart, note, title=title))
    return cards


def points(rows: Sequence[dict[str, Any]], field: str, most: int = MAX_POINTS) -> tuple[list[int], list[float]]:
    """Steps and values of a key, at most about `most` of them, evenly picked."""
    found = [(row["step"], row[field]) for row in rows if isinstance(row.get(field), int | float)]
    every = max(1, -(-len(found) // most))
    found = found[:-1:every] + found[-1:]
    return [step for step, _ in found], [float(value) for _, value in found]


def picture_cards(run: Path, most: int = 2) -> list[str]:
    """The first and the last reconstruction picture of a run, with `most` above 2 some between, as far as they can be
    read."""
    pictures = sorted((run / "pictures").glob("*.png"))
    last = len(pictures) - 1
    chosen = sorted({round(n * last / (most - 1)) for n in range(most)}) if pictures else []
    shown = [(path, file_uri(path)) for path in (pictures[n] for n in chosen)]
    return [card(f'<img class="picture" alt="" src="{uri}">', title=_step_name(path)) for path, uri in shown if uri]


def _line(curve: Curve, name: str, field: str, colour: str, rows: Sequence[dict[str, Any]]) -> Line | None:
    x, y = points(rows, field, most=10**9)
    if len(x) < 2:
        return None
    y = smooth(y, max(1, len(y) // 40)) if curve.smoothed else y
    every = max(1, -(-len(x) // MAX_POINTS))
    x, y = x[:-1:every] + x[-1:], y[:-1:every] + y[-1:]
    return Line(name, x, [curve.factor * value for value in y], f"var(--{colour})")


def _step_name(path: Path) -> str:
    digits = path.stem.rpartition("-")[2]
    return f"After step {int(digits):,}" if digits.isdigit() else path.stem
