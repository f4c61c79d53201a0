"""How scores differ between people: speakers, groups by sex and age, clips whose face and voice differ."""

from html import escape

import numpy as np

from affekt.data.page import card, grid, table
from affekt.finetune.report.dots import Dot, dot_plot
from affekt.finetune.report.sweeps import figures
from affekt.finetune.report.words import (
    bounds,
    category_colour,
    cell,
    figure,
    key,
    models,
    per_cent,
    scale,
    score_name,
    signed,
    system_colours,
    system_title,
    titles,
)
from affekt.finetune.schema import Fairness, Results, Speaker, System

STRIPS = 6
LANES, NEAR, MIDDLE = (0, -1, 1, -2, 2), 1.7, 32  # percent of the width that dots need; pixels from the top


def speakers(results: Results) -> str:
    """One dot per speaker, a strip per system: the spread that a mean hides."""
    shown = [s for s in models(results.systems) if s.speakers][:STRIPS]
    if not shown:
        return ""
    names, score = titles(results), results.main_score
    sexes = sorted({p.sex for s in shown for p in s.speakers})
    colour = {sex: category_colour(i) if sex else "var(--soft)" for i, sex in enumerate(sexes)}
    legend = "".join(f"<span>{key(colour[sex])}{escape(sex) or 'unknown'}</span> " for sex in sexes)
    legend = f'<p class="legend">{legend}</p>' if len(sexes) > 1 else ""
    cards = []
    for s in shown:
        rows = [
            [escape(p.name), escape(p.sex), f"{p.clips:,}", figure(score, p.score)]
            for p in sorted(s.speakers, key=lambda p: p.score)
        ]
        table_ = figures(["Speaker", "Sex", "Clips", score_name(score)], rows, numbers=2)
        said = f"{names[s.name]}: {_spread(score, s.speakers)}"
        cards.append(
            card(
                f"<h3>{system_title(s)}</h3>",
                strip(score, s, colour, said),
                f"<p>{_spread(score, s.speakers)}.</p>",
                table_,
            )
        )
    note = (
        f'<p class="soft">{score_name(score)}{per_cent(score)} of each speaker\'s clips alone; the line is the mean'
        " over speakers. Larger dots have more clips.</p>"
    )
    return note + legend + "".join(cards)


def _spread(score: str, found: list[Speaker]) -> str:
    values = np.sort([p.score for p in found])
    tenth = values[: max(1, len(values) // 10)]
    deviation = f", deviation {figure(score, float(values.std(ddof=1)))}" if len(values) > 1 else ""
    return (
        f"{len(values)} speakers: mean {figure(score, float(values.mean()))}{deviation}, lowest "
        f"{figure(score, float(values[0]))}, worst tenth {figure(score, float(tenth.mean()))}"
    )


def strip(score: str, system: System, colours: dict[str, str], label: str) -> str:
    """Speakers as dots on the scale of the score, in lanes where they would lie on each other."""
    factor = scale(score)
    values = [factor * p.score for p in system.speakers]
    low, high = (0.0, 100.0) if factor == 100 else (min(0.0, *values), max(1.0, *values))

    def place(value: float) -> float:
        return 100 * (value - low) / (high - low)

    ticks = [(place(tick), f"{tick:.3g}") for tick in np.linspace(low, high, 6)]
    parts = [
        f'<i class="tick" style="left:{at:.1f}%"></i><span style="left:{at:.1f}%">{name}</span>' for at, name in ticks
    ]
    parts.append(f'<i class="mean" style="left:{place(float(np.mean(values))):.2f}%"></i>')
    most, taken = max(p.clips for p in system.speakers), []
    for p, value in sorted(zip(system.speakers, values), key=lambda pair: pair[1]):
        size, at = 7 + 6 * (p.clips / most) ** 0.5, place(value)
        free = [n for n in LANES if all(n != lane or at - other > NEAR for other, lane in taken)]
        lane = free[0] if free else 0
        taken.append((at, lane))
        title = escape(f"{p.name}: {figure(score, p.score)}, {p.clips} clips{f', {p.sex}' if p.sex else ''}")
        where = f"left:{at:.2f}%;top:{MIDDLE + 12 * lane}px;width:{size:.1f}px;height:{size:.1f}px"
        parts.append(f'<i class="who" style="{where};background:{colours[p.sex]}" title="{title}"></i>')
    return f'<div class="strip-chart" role="img" aria-label="{escape(label)}">{"".join(parts)}</div>'


def fairness(results: Results) -> str:
    """Gaps between groups beside what a model that treats all alike would show by chance at these sizes."""
    if not results.fairness:
        return ""
    names, rows = titles(results), []
    for f in results.fairness:
        verdict = "within" if f.passes else "<strong>beyond</strong>"
        gap, limit = figure(f.score, f.gap), figure(f.score, f.threshold)
        what = [escape(f.attribute.capitalize()), escape(names.get(f.system, f.system)), score_name(f.score)]
        rows.append([*what, gap, limit, f"{verdict} chance"])
    cards = [_groups(f, names.get(f.system, f.system)) for f in results.fairness]
    note = (
        '<p class="soft">The gap is between the best and the worst group. The threshold is what a random model stays'
        " below 95 times out of 100 with groups of these sizes. A gap within it is no proof of fairness: small groups"
        " hide large ones.</p>"
    )
    head = ["Attribute", "System", "Score", "Gap", "Threshold", "Verdict"]
    return note + card(table(head, rows, numbers=3)) + grid(cards, "two")


def _groups(f: Fairness, system: str) -> str:
    dots = [
        Dot(
            f'{escape(g.name)} <small class="soft">{g.clips:,} clips, {g.speakers} speakers</small>',
            scale(f.score) * g.scores[f.score],
            category_colour(i),
            figure(f.score, g.scores[f.score]),
        )
        for i, g in enumerate(f.groups)
        if f.score in g.scores
    ]
    if not dots:
        return ""
    label = f"{score_name(f.score)} by {f.attribute}"
    chart = dot_plot({"": dots}, label=label, ends=(0.0, 100.0) if scale(f.score) == 100 else None)
    others = list(dict.fromkeys(name for g in f.groups for name in g.scores))
    rows = [
        [
            escape(g.name),
            f"{g.clips:,}",
            str(g.speakers),
            *(figure(n, g.scores[n]) if n in g.scores else "" for n in others),
        ]
        for g in f.groups
    ]
    table_ = figures(["Group", "Clips", "Speakers", *map(score_name, others)], rows)
    caption = f"<figcaption>{escape(f.note)}</figcaption>" if f.note else ""
    return card(chart, caption, table_, title=f"{label}: {system}")


def conflict(results: Results) -> str:
    """Accuracy where face and voice agree and where they do not, and whom the model follows then."""
    if not results.conflict:
        return ""
    names, colours = titles(results), system_colours(results)
    cards = []
    for c in results.conflict:
        colour = colours.get(c.system, "var(--c0)")
        dots = [
            Dot(
                f"{escape(_plain(name))} <small class='soft'>{c.subsets.get(name, 0):,} clips</small>",
                100 * e.value, colour, figure("accuracy", e.value), 100 * e.low, 100 * e.high,
            )
            for name, e in c.accuracy.items()
        ]  # fmt: skip
        chart = dot_plot({"": dots}, label="Accuracy by subset with 95 % intervals", ends=(0.0, 100.0))
        rows = [[escape(_plain(n)), f"{k:,}", cell("accuracy", c.accuracy.get(n))] for n, k in c.subsets.items()]
        table_ = figures(["Subset", "Clips", "Accuracy, %"], rows)
        said = (
            ("Bias index", signed("accuracy", c.bias_index), "accuracy where raters follow the face, minus the voice"),
            (
                "Conflict gap",
                signed("accuracy", c.conflict_gap),
                "accuracy where both agree, minus the mean of those two",
            ),
            (
                "Follows the voice",
                f"{figure('accuracy', c.audio_follow.value)} % {bounds('accuracy', c.audio_follow)}",
                "answers that are the voice's label, in conflicts",
            ),
        )
        said = "".join(f'<li><b>{n}</b> {v} <span class="soft">{what}</span></li>' for n, v, what in said)
        caption = f"<figcaption>{escape(c.note)}</figcaption>" if c.note else ""
        cards.append(card(chart, f"<ul>{said}</ul>", table_, caption, title=names.get(c.system, c.system)))
    note = (
        '<p class="soft">Clips whose voice and face were judged differently by the raters, against clips where'
        " all agree.</p>"
    )
    return note + grid(cards, "one")


def _plain(name: str) -> str:
    return name.replace("_", " ").capitalize()
