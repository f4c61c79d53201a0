"""Embeddings on a plane: where clips lie is computed once, drawn as SVG, and looked at with thumbnails."""

import json
from collections import Counter
from collections.abc import Sequence
from html import escape

import numpy as np
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from affekt.data.errors import SettingsError
from affekt.data.page import card, table
from affekt.data.samples import Sample
from affekt.data.shards import ShardIndex
from affekt.finetune.report.clips import thumbnail
from affekt.finetune.report.words import category_colour
from affekt.finetune.schema import Point

FEW = 30  # clips; below that t-SNE has no neighbourhoods to keep, and two principal components are drawn
COMPONENTS, PERPLEXITY = 50, 30.0
SHOWN, PICTURE_BYTES = 1500, 6_000_000  # of a page
MAPPED = 1000  # clips; beyond that it takes long and shows no more
NEIGHBOURS = 10
WIDTH, HEIGHT, MARGIN = 760, 520, 14
# Six marks, so that labels can be told apart without their colours.
MARKS = (
    "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z", "M-3.6,-3.6h7.2v7.2h-7.2z", "M0,-5L4.6,3.4H-4.6z",
    "M0,-5.2L4.6,0L0,5.2L-4.6,0z", "M0,5L4.6,-3.4H-4.6z", "M-4.6,-1.5h3.1v-3.1h3v3.1h3.1v3h-3.1v3.1h-3v-3.1h-3.1z",
)  # fmt: skip


def evenly(clips: Sequence[int], most: int = MAPPED) -> list[int]:
    """At most so many of the clips, evenly taken in their order."""
    return [clips[i] for i in np.linspace(0, len(clips) - 1, min(len(clips), most)).astype(int)]


def embedding_map(
    features: np.ndarray, ids: Sequence[str], labels: Sequence[str], speakers: Sequence[str], seed: int = 0
) -> list[Point]:
    """Points of N clips for `Results.map` from `features` (N, D): standardised, 50 principal components, then t-SNE
    (van der Maaten and Hinton 2008); with fewer than 30 clips the first two components.

    The same input gives the same points, whatever the number of threads. Takes some seconds for 1,000 clips; draw from
    larger sets first. Raises SettingsError for NaN or infinity and for lengths that differ.
    """
    features = np.asarray(features, np.float64)
    n = len(features)
    if features.ndim != 2 or {len(ids), len(labels), len(speakers)} != {n}:
        sizes = f"{len(ids)} ids, {len(labels)} labels, {len(speakers)} speakers"
        raise SettingsError(f"features are {features.shape} for {sizes}; a map wants one row per clip")
    bad = np.flatnonzero(~np.isfinite(features).all(1))
    if len(bad):
        raise SettingsError(
            f"features of {len(bad)} clips are NaN or infinite, first {ids[bad[0]]}; no map can hold them"
        )
    places = np.zeros((n, 2))
    spread = StandardScaler().fit_transform(features) if n else features
    if spread.any():  # where all clips are the same, they lie in one place
        with threadpool_limits(1):  # sums in another order would move points
            parts = PCA(min(COMPONENTS, *spread.shape), svd_solver="full").fit_transform(spread)
            if n < FEW:
                places[:, : parts.shape[1]] = parts[:, :2]
            else:
                perplexity = min(PERPLEXITY, (n - 1) / 6)
                init = np.zeros((n, 2))
                init[:, : parts.shape[1]] = parts[:, :2]
                init *= 1e-4 / max(init[:, 0].std(), 1e-12)
                places = TSNE(perplexity=perplexity, init=init.astype(np.float32), random_state=seed).fit_transform(
                    parts
                )
    return [
        Point(id=str(i), x=float(x), y=float(y), label=str(label), speaker=str(speaker))
        for i, (x, y), label, speaker in zip(ids, places, labels, speakers)
    ]


def map_section(points: Sequence[Point], index: ShardIndex | None, samples: dict[str, Sample]) -> tuple[str, str]:
    """The section's HTML, and the data of its script as JSON; both empty without points."""
    if len(points) < 2:
        return "", ""
    shown = drawn(points)
    pictures = _pictures(shown, index, samples)
    places = _places(shown)
    labels, speakers = (_by_count(getattr(p, kind) for p in shown) for kind in ("label", "speaker"))
    marks = "".join(
        f'<path class="p" d="{MARKS[labels[p.label] % len(MARKS)]}" transform="translate({x:.1f} {y:.1f})" '
        f'style="--l:{category_colour(labels[p.label])};--s:{category_colour(speakers[p.speaker])}"/>'
        for p, (x, y) in zip(shown, places)
    )
    rows = [
        {"x": round(x, 1), "y": round(y, 1), "id": p.id, "l": labels[p.label], "s": speakers[p.speaker], "src": picture}
        for p, (x, y), picture in zip(shown, places.tolist(), pictures)
    ]
    data = {"points": rows, "labels": list(labels), "speakers": list(speakers)}
    few = f" {len(shown):,} of {len(points):,} clips are drawn." if len(shown) < len(points) else ""
    note = (
        '<p class="soft">Clips whose embeddings are alike lie near each other; the distance of far groups says little.'
        f" Marks stand for labels, colours for what you choose.{few}</p>"
    )
    label = f"Map of {len(shown)} clips; arrow keys go from clip to clip"
    chart = (
        f'<div class="plane"><svg viewBox="0 0 {WIDTH} {HEIGHT}" tabindex="0" role="application" aria-label="{label}">'
        f'{marks}<circle class="here" r="0"/></svg>'
        '<div class="tip" role="status" hidden><img alt="" width="96" height="96"><b></b><span></span></div></div>'
    )
    legends = _legend("label", labels, Counter(p.label for p in shown), marked=True)
    legends += _legend("speaker", speakers, Counter(p.speaker for p in shown), marked=False)
    switch = (
        '<fieldset class="switch"><legend>Colour by</legend>'
        '<label><input type="radio" name="by" value="label" checked>label</label>'
        '<label><input type="radio" name="by" value="speaker" id="by-speaker">speaker</label></fieldset>'
    )
    hint = '<p class="hint soft">Hover, tap, or focus the map and use the arrow keys to see a clip.</p>'
    body = f'<div class="card map"><div class="controls">{switch}{hint}</div>{chart}{legends}</div>'
    return note + body + card(_near(points)), as_json(data)


def drawn(points: Sequence[Point]) -> list[Point]:
    """All points, or as many as a page can bear, evenly taken in their order."""
    if len(points) <= SHOWN:
        return list(points)
    return [points[i] for i in np.linspace(0, len(points) - 1, SHOWN).astype(int)]


def as_json(data: dict) -> str:
    """JSON that may stand inside of a script element, whatever ids and names contain."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return "".join(f"\\u{ord(c):04x}" if c in "<>&\u2028\u2029" else c for c in text)


def _pictures(points: Sequence[Point], index: ShardIndex | None, samples: dict[str, Sample]) -> list[str | None]:
    """A thumbnail per point, until they weigh too much for a page."""
    found, room = [], PICTURE_BYTES
    for point in points:
        sample = samples.get(point.id)
        picture = thumbnail(index, sample) if index is not None and sample and room > 0 else None
        room -= len(picture or "")
        found.append(picture)
    return found


def _places(points: Sequence[Point]) -> np.ndarray:
    """(N, 2) in the drawing, at one scale for both axes and in its middle."""
    at = np.array([[p.x, -p.y] for p in points])
    low, span = at.min(0), np.ptp(at, axis=0)
    room = np.array([WIDTH, HEIGHT]) - 2 * MARGIN
    factor = (room / np.maximum(span, 1e-12)).min() if span.any() else 0.0
    return MARGIN + (room - factor * span) / 2 + factor * (at - low)


def _by_count(names) -> dict[str, int]:
    """Places of names, the most frequent first and then by name."""
    counts = Counter(names)
    return {name: i for i, name in enumerate(sorted(counts, key=lambda name: (-counts[name], name)))}


def _legend(kind: str, names: dict[str, int], counts: Counter, marked: bool) -> str:
    items = []
    for name, i in names.items():
        mark = MARKS[i % len(MARKS)] if marked else MARKS[0]
        swatch = (
            f'<svg viewBox="-6 -6 12 12" aria-hidden="true"><path d="{mark}" style="fill:{category_colour(i)}"/></svg>'
        )
        shown = escape(name) or "<i>unknown</i>"
        items.append(
            f'<label><input type="checkbox" checked data-kind="{kind}" data-i="{i}">{swatch}{shown}'
            f"<small>{counts[name]}</small></label>"
        )
    buttons = f'<button type="button" data-kind="{kind}">none</button>'
    return f'<fieldset class="of-{kind}"><legend>Shown {kind}s</legend>{"".join(items)}{buttons}</fieldset>'


def _near(points: Sequence[Point]) -> str:
    """What the eye should see, as figures: how many of a clip's neighbours on the map share its label and speaker."""
    k = min(NEIGHBOURS, len(points) - 1)
    at = np.array([[p.x, p.y] for p in points])
    near = NearestNeighbors(n_neighbors=k).fit(at).kneighbors(return_distance=False)  # of each point, without itself
    rows = []
    for kind in ("label", "speaker"):
        values = np.unique([getattr(p, kind) for p in points], return_inverse=True)[1]
        share = (values[near] == values[:, None]).mean()
        sizes = np.bincount(values)
        chance = (sizes * (sizes - 1)).sum() / (len(points) * (len(points) - 1))
        rows.append([f"the same {kind}", f"{100 * share:.1f}", f"{100 * chance:.1f}"])
    return table([f"Of the {k} nearest on the map, percent with", "Here", "By chance"], rows, numbers=1)
