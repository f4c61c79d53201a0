"""How scores are called and written on pages, and the colour that stands for a system all over one page."""

from collections.abc import Sequence
from html import escape

from affekt.data.charts import minus
from affekt.finetune.schema import Estimate, Results, System

NAMES = {
    "uar": "UAR",
    "war": "WAR",
    "macro_f1": "Macro F1",
    "micro_f1": "Micro F1",
    "weighted_f1": "Weighted F1",
    "map": "mAP",
    "ccc": "CCC",
    "pcc": "PCC",
    "rmse": "RMSE",
    "mae": "MAE",
    "kl": "KL divergence",
    "js": "JS divergence",
    "ece": "ECE",
    "classwise_ece": "Class-wise ECE",
    "nll": "NLL",
    "aurc": "AURC",
    "auilc": "AUILC",
}
SHARES = ("uar", "war", "f1", "top", "map", "accuracy", "recall")  # shown in percent
LOWER_IS_BETTER = ("rmse", "mae", "kl", "js", "chebyshev", "ece", "brier", "nll", "aurc")
STREAM_NAMES = {"audio": "Audio", "video": "Video", "both": "Both"}
BASELINES = ("random", "statistics", "majority", "raters")
FIXED_COLOURS = {kind: f"var(--{kind})" for kind in BASELINES}
COLOURS = 12  # of `--c0` to `--c11`, the colours of things that have no colour of their own


def score_name(score: str) -> str:
    """`uar` is UAR; `ccc_valence` is CCC of valence; what has no name of its own is written without underscores."""
    if score in NAMES:
        return NAMES[score]
    first, _, of = score.partition("_")
    if first in ("ccc", "pcc", "rmse", "mae", "ece") and of:
        return f"{NAMES[first]} {of.replace('_', ' ')}"
    return score.replace("_", " ").capitalize()


def is_share(score: str) -> bool:
    return any(part in SHARES or part.rstrip("0123456789") in SHARES for part in score.split("_"))


def scale(score: str) -> float:
    """What values of this score are multiplied with before they are shown."""
    return 100.0 if is_share(score) else 1.0


def figure(score: str, value: float, digits: int | None = None) -> str:
    """`61.2` for a share of 0.612, in percent; `0.612` for what is no share."""
    digits = (1 if is_share(score) else 3) if digits is None else digits
    return minus(f"{scale(score) * value:.{digits}f}")


def bounds(score: str, estimate: Estimate) -> str:
    digits = 0 if is_share(score) else 2
    return f"[{figure(score, estimate.low, digits)}, {figure(score, estimate.high, digits)}]"


def cell(score: str, estimate: Estimate | None) -> str:
    """A table cell: the value and, smaller, its interval."""
    if estimate is None:
        return ""
    return f"{figure(score, estimate.value)}<small>{bounds(score, estimate)}</small>"


def signed(score: str, estimate: Estimate, unit: bool = True) -> str:
    """A difference, as `+4.2 points [+1.0, +7.9]`."""
    digits, factor = (1, 100) if is_share(score) else (3, 1)
    value, low, high = (f"{factor * v:+.{digits}f}" for v in (estimate.value, estimate.low, estimate.high))
    return minus(f"{value}{' points' if unit and is_share(score) else ''} [{low}, {high}]")


def p_value(p: float) -> str:
    return "&lt; 0.001" if p < 0.001 else f"{p:.3f}"


def per_cent(score: str) -> str:
    """` in percent` after the name of a score that is shown so."""
    return " in percent" if is_share(score) else ""


def category_colour(position: int) -> str:
    """The CSS colour of the category at this place; beyond the palette, hues that lie far from each other."""
    return f"var(--c{position})" if position < COLOURS else f"hsl({137.5 * position % 360:.0f} 55% 52%)"


def system_colours(results: Results) -> dict[str, str]:
    """A colour per system: baselines have their own, the others take those of the palette in turn."""
    others = [system.name for system in results.systems if system.kind not in BASELINES]
    colours = {name: category_colour(position) for position, name in enumerate(others)}
    return {s.name: colours.get(s.name) or FIXED_COLOURS[s.kind] for s in results.systems}


def key(colour: str, hollow: bool = False) -> str:
    """The dot of a legend."""
    if hollow:
        return f'<span class="key plain" style="border-color:{colour}"></span>'
    return f'<span class="key" style="background:{colour}"></span>'


def system_title(system: System) -> str:
    """The title as HTML; a transductive system, or one chosen on test clips, always says so."""
    marks = ["transductive"] if system.transductive else []
    marks += ["chosen on test clips"] if system.selected == "test" else []
    return escape(system.title) + "".join(f' <span class="mark">{mark}</span>' for mark in marks)


def titles(results: Results) -> dict[str, str]:
    """The plain title of each system by name, with its streams where another system of other streams has the same."""
    streams: dict[str, set[str]] = {}
    for s in results.systems:
        streams.setdefault(s.title, set()).add(s.streams)
    named = {
        s.name: [s.title] + [STREAM_NAMES[s.streams].lower()] * (len(streams[s.title]) > 1) for s in results.systems
    }
    tested = {s.name for s in results.systems if s.selected == "test"}
    return {
        name: ", ".join(parts) + (" (chosen on test clips)" if name in tested else "") for name, parts in named.items()
    }


def told(systems: Sequence[System]) -> list[System]:
    """The systems of one kind of choice: all that the test clips did not choose, or else those."""
    return [s for s in systems if s.selected != "test"] or list(systems)


def models(systems: Sequence[System]) -> list[System]:
    """Of `told` those that are no baselines, or all where nothing else is there."""
    systems = told(systems)
    return [s for s in systems if s.kind not in BASELINES] or systems
