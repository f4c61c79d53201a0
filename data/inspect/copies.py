"""Clips that are copies of each other: the same file, the same bytes, or the same recording encoded anew.

A recording is found again by its moments of strongest change. What happens around each of them is a vector; vectors of
copies are neighbours, found with an inverted file in n^1.5 steps, and every pair found is compared in full.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from affekt.data.inspect.traces import HASH_BITS, RATE, TraceFile
from affekt.data.shards import Sample

# Least correlation of the changes of two clips at their best lag. Measured on 220 synthetic and 260 GRID clips, 60 of
# each a copy without its first 0.44 and last 0.32 s, at 32 kbit/s and x264's crf 32, at 0.4 of the loudness and 1.15 of
# the light: of 57,760 pairs none was taken wrongly; by sound 120 of 120 copies were found, by picture 88. Takes of one
# sentence by one actor reach 0.87 in sound (RAVDESS), and strangers 0.63 in picture.
SAME_SOUND, SAME_PICTURE = 0.90, 0.65
SAME_HASH = 4  # bits of 63 in which the perceptual hashes of pictures without motion may differ
LEAST_S, LEAST_SHARE = 1.0, 0.6  # what two clips must share: seconds, and share of the shorter one
AROUND = 5  # rows on each side of a moment that describe it
APART = 6  # rows by which moments of a clip are apart
DIMENSIONS = 64  # of a vector, after a random projection
NEIGHBOURS, NEAR = 8, 0.5  # neighbours looked at, and the least cosine worth a comparison in full
EXAMPLES = 50  # groups that a report lists


class Pair(NamedTuple):
    """Clips `a` < `b` (positions), their correlation, and by how many seconds `a` runs ahead of `b`."""

    a: int
    b: int
    similarity: float
    lag: float


def find_copies(
    traces: TraceFile, changes: Callable[[np.ndarray], np.ndarray], least: float, between: bool
) -> list[Pair]:
    """Pairs of clips whose `changes` (rows, C) correlate by `least` or more at some lag, `between` rows too.

    Copies may be encoded anew, cut at both ends and of another loudness or light. Not found are: clips below a second,
    mirrored, slowed or re-framed pictures, sound under other sound.
    """
    owners, rows, vectors = [], [], []
    projection: np.ndarray | None = None
    for clip in traces.clips():
        if traces.rows(clip) < LEAST_S * RATE:
            continue
        change = changes(traces[clip])
        moments = _moments(change)
        around = np.stack([change[m - AROUND : m + AROUND + 1].ravel() for m in moments]) if len(moments) else None
        if around is None:
            continue
        if projection is None:
            projection = np.random.default_rng(0).standard_normal((around.shape[1], DIMENSIONS)).astype(np.float32)
        owners += [clip] * len(moments)
        rows += moments.tolist()
        vectors.append(around @ projection)
    if not vectors:
        return []
    owners, rows = np.array(owners), np.array(rows)
    best: dict[tuple[int, int], Pair] = {}
    found = sorted({_ordered(owners, rows, i, j) for i, j in neighbours(np.concatenate(vectors), NEIGHBOURS, NEAR)})
    for a, b, lag in found:
        if a == b or ((a, b) in best and best[a, b].similarity > 0.99):
            continue
        similarity, lag = compare(changes(traces[a]), changes(traces[b]), lag, between)
        if similarity >= least and similarity > best.get((a, b), Pair(a, b, 0.0, 0.0)).similarity:
            best[a, b] = Pair(a, b, round(similarity, 4), lag / RATE)
    return list(best.values())


def find_same_pictures(hashes: dict[int, np.ndarray]) -> list[Pair]:
    """Pairs of clips without motion whose perceptual hashes (63,) of -1 and 1 differ in at most 4 bits."""
    clips = sorted(hashes)
    if len(clips) < 2:
        return []
    least = 1 - 2 * SAME_HASH / HASH_BITS
    found = neighbours(np.stack([hashes[clip] for clip in clips]), NEIGHBOURS, least - 1e-4)
    pairs = {(min(clips[i], clips[j]), max(clips[i], clips[j])) for i, j in found}
    return [Pair(a, b, round(float(hashes[a] @ hashes[b]) / HASH_BITS, 4), 0.0) for a, b in sorted(pairs)]


def neighbours(vectors: np.ndarray, count: int, least: float) -> Iterable[tuple[int, int]]:
    """Pairs of numbers of vectors (N, D) among each other's `count` nearest whose cosine is at least `least`."""
    import faiss  # only here: loading it takes a moment

    vectors = np.ascontiguousarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9))
    vectors = vectors.astype(np.float32)
    cells = 1 + int(np.sqrt(len(vectors)) / 2)
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(vectors.shape[1]), vectors.shape[1], cells, faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid = 1  # few clips need no warning
    index.cp.niter, index.cp.max_points_per_centroid = 10, 64  # cells need not be fine ones
    index.train(vectors)
    index.add(vectors)
    index.nprobe = min(cells, 8)
    block = 4096  # of queries, so that answers take no memory worth speaking of
    for start in range(0, len(vectors), block):
        cosines, others = index.search(vectors[start : start + block], count + 1)
        for query, place in np.argwhere(cosines >= least):
            if others[query, place] != start + query:
                yield start + int(query), int(others[query, place])


def compare(a: np.ndarray, b: np.ndarray, lag: int, between: bool) -> tuple[float, float]:
    """Correlation of changes (rows, C) where row t + lag of `a` meets row t of `b`, and the lag, at the best of lag - 1
    to lag + 1, `between` in steps of half a row; (0, lag) where they share too little.

    Sound may be cut anywhere between two rows. Means of two rows of `a` lie there, and those of `b`, taken twice, lie
    on its rows again: both are smoothed, and the correlation of a copy cut in the middle rises from 0.76 to 0.95.
    Pictures are cut between frames, and smoothing only makes strangers more alike.
    """
    tried = [(_correlation(a, b, shift), float(shift)) for shift in (lag - 1, lag, lag + 1)]
    if between:
        means, blurred = _means(a), _means(_means(b))  # at rows + 1/2 of `a`, at rows + 1 of `b`
        tried += [(_correlation(means, blurred, shift), shift - 0.5) for shift in (lag, lag + 1)]
    best = max(tried)
    return best if best[0] > 0 else (0.0, float(lag))


def _means(x: np.ndarray) -> np.ndarray:
    return (x[:-1] + x[1:]) / 2


def _correlation(a: np.ndarray, b: np.ndarray, shift: int) -> float:
    """Of row t + shift of `a` and row t of `b`, where both are; 0 where they share too few rows."""
    start, end = max(0, shift), min(len(a), len(b) + shift)
    if end - start < max(LEAST_S * RATE, LEAST_SHARE * min(len(a), len(b))) - 2:  # means are up to two rows shorter
        return 0.0
    ours, theirs = a[start:end], b[start - shift : end - shift]
    power = float(np.square(ours).sum()) * float(np.square(theirs).sum())
    return float((ours * theirs).sum()) / power**0.5 if power > 0 else 0.0


def groups(pairs: Iterable[Sequence[int]]) -> list[list[int]]:
    """Clips connected by pairs (a, b, ...), each group and the list of them in ascending order."""
    leader: dict[int, int] = {}

    def find(clip: int) -> int:
        while (above := leader.setdefault(clip, clip)) != clip:
            leader[clip] = clip = leader[above]
        return clip

    for a, b, *_ in pairs:
        leader[find(a)] = find(b)
    members = defaultdict(list)
    for clip in sorted(leader):
        members[find(clip)].append(clip)
    return sorted(members.values())


def same(keys: Iterable[tuple[int, str]]) -> list[tuple[int, int]]:
    """Pairs of clips that share a key; every later clip with the first one. An empty key is none."""
    first: dict[str, int] = {}
    return [(first[key], clip) for clip, key in keys if key and first.setdefault(key, clip) != clip]


def describe(pairs: Sequence[Sequence[int]], samples: Sequence[Sample], field: str) -> dict[str, Any]:
    """Counts of the groups that `pairs` make, those on several sides of the split first among the examples."""
    found = []
    for group in groups(pairs):
        sides = sorted({str(samples[clip].meta[field]) for clip in group if samples[clip].meta.get(field)})
        found.append({"ids": [samples[clip].id for clip in group], "splits": sides})
    across = [group for group in found if len(group["splits"]) > 1]
    return {
        "groups": len(found),
        "clips": sum(len(group["ids"]) for group in found),
        "across_splits": len(across),
        "examples": (across + [group for group in found if len(group["splits"]) < 2])[:EXAMPLES],
    }


def _moments(changes: np.ndarray) -> np.ndarray:
    """Rows of (rows, C) with the most change within `APART` rows; none where nothing changes."""
    size = np.square(changes).sum(1)
    padded = np.pad(size, APART, constant_values=-1)
    largest = np.lib.stride_tricks.sliding_window_view(padded, 2 * APART + 1).max(1)
    moments = np.flatnonzero((size == largest) & (size > 1e-3))
    return moments[(moments >= AROUND) & (moments < len(changes) - AROUND)]


def _ordered(owners: np.ndarray, rows: np.ndarray, i: int, j: int) -> tuple[int, int, int]:
    if owners[i] > owners[j]:
        i, j = j, i
    return int(owners[i]), int(owners[j]), int(rows[i] - rows[j])
