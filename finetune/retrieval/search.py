"""Search by inner product: faiss finds candidates, and what is given back is their exact order, ties by position."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from affekt.data.errors import SettingsError

Kind = Literal["flat", "ivf", "hnsw"]
SPARE = 16  # candidates beyond k: room for those that are left out, and to see whether a tie is cut in two
MOST_SPARE = 64  # of an exact search, which looks at rows again where that is too few
WANTED_RECALL, TUNING_K = 0.95, 10


@dataclass
class Search:
    """The k best of `vectors` float32 (N, D) for queries, by inner product (cosine, where all are of unit length).

    Scores are computed in float64; of vectors that score the same, the one that stands first is the better one. Without
    `approximate`, a trained faiss index over the same rows, the answer is exactly that of comparing everything.
    `groups` (N,) are numbers of what belongs together, as clips of one file do; a query may leave out one of them.
    """

    vectors: np.ndarray
    groups: np.ndarray | None = None
    approximate: Any = None
    _flat: Any = field(default=None, repr=False)

    def __post_init__(self):
        self.vectors = np.ascontiguousarray(self.vectors, np.float32)
        if self.vectors.ndim != 2 or not np.isfinite(self.vectors).all():
            raise SettingsError(f"vectors to search {self.vectors.shape}: rows of finite numbers are needed")

    def __call__(self, queries: np.ndarray, k: int, own: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Queries (Q, D) -> scores float64 and positions int64, both (Q, min(k, N)), best first.

        `own` (Q,): the group that a query leaves out, -1 for none. Where fewer than k remain (or an approximate index
        finds fewer), the rest is -inf and -1. Raises SettingsError for k below 1 and queries of another width.
        """
        queries = np.ascontiguousarray(queries, np.float32)
        count = len(self.vectors)
        if k < 1 or queries.ndim != 2 or queries.shape[1] != self.vectors.shape[1] or not np.isfinite(queries).all():
            raise SettingsError(
                f"queries {queries.shape}, k {k}: finite rows of {self.vectors.shape[1]} numbers and k >= 1 are needed"
            )
        k = min(k, count)
        scores, positions = np.full((len(queries), k), -np.inf), np.full((len(queries), k), -1)
        if not len(queries) or not count:
            return scores, positions
        ask = min(count, k + SPARE + self._spare(own))
        found, candidates = self._candidates().search(queries, ask)
        # Farther than this no float32 product of the lengths at hand is from the exact one.
        margins = np.linalg.norm(queries, axis=1) * self._longest * self.vectors.shape[1] * 2.0**-24
        for row, query in enumerate(queries):
            group = -1 if own is None else own[row]
            best, where = self._ordered(query, candidates[row], group, k)
            beyond = found[row, -1] + margins[row]  # nothing that is no candidate scores better
            if self.approximate is None and ask < count and (len(best) < k or beyond >= best[-1]):
                best, where = self._ordered(query, self._all_that_may(query, group, k, margins[row]), group, k)
            scores[row, : len(best)], positions[row, : len(where)] = best, where
        return scores, positions

    @property
    def _longest(self) -> float:
        return math.sqrt(float(np.einsum("nd,nd->n", self.vectors, self.vectors).max()))

    def _spare(self, own: np.ndarray | None) -> int:
        if own is None or self.groups is None:
            return 0
        sizes = np.bincount(self.groups[self.groups >= 0], minlength=1)
        most = int(sizes[own[(own >= 0) & (own < len(sizes))]].max(initial=0))
        return most if self.approximate is not None else min(most, MOST_SPARE)

    def _candidates(self) -> Any:
        if self.approximate is not None:
            return self.approximate
        if self._flat is None:
            self._flat = build("flat", self.vectors)
        return self._flat

    def _ordered(self, query: np.ndarray, where: np.ndarray, group: int, k: int) -> tuple[np.ndarray, np.ndarray]:
        where = np.sort(where[where >= 0])
        if group >= 0 and self.groups is not None:
            where = where[self.groups[where] != group]
        scores = dots(self.vectors[where], query)
        order = np.argsort(-scores, kind="stable")[:k]
        return scores[order], where[order]

    def _all_that_may(self, query: np.ndarray, group: int, k: int, margin: float) -> np.ndarray:
        """Positions of all vectors that may be among the k best, however many are tied."""
        scores = self.vectors @ query
        if group >= 0 and self.groups is not None:
            scores[self.groups == group] = -np.inf
        least = np.partition(scores, len(scores) - k)[len(scores) - k]
        return np.flatnonzero(scores >= least - 2 * margin)


def dots(rows: np.ndarray, query: np.ndarray) -> np.ndarray:
    """(n, D), (D,) -> float64 (n,), the same number for the same row wherever it stands: no BLAS, whose blocks end
    somewhere."""
    return np.einsum("nd,d->n", rows.astype(np.float64), query.astype(np.float64))


def build(kind: Kind, vectors: np.ndarray) -> Any:
    """A faiss index over float32 (N, D) by inner product: `flat` compares everything, `ivf` (inverted file, about
    4 sqrt(N) cells; Jégou et al. 2011) and `hnsw` (a graph with 32 links; Malkov & Yashunin 2018) look at a part."""
    import faiss  # only here, and after torch: it brings another OpenMP

    count, width = vectors.shape
    if kind == "flat":
        index = faiss.IndexFlatIP(width)
    elif kind == "ivf":
        cells = max(1, min(int(4 * math.sqrt(count)), count // 39))  # 39 vectors a cell is the least faiss trains on
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, cells, faiss.METRIC_INNER_PRODUCT)
        index.cp.seed = 0
        index.train(vectors)
    elif kind == "hnsw":
        index = faiss.IndexHNSWFlat(width, 32, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = 80
    else:
        raise SettingsError(f"kind of index `{kind}`; choose flat, ivf or hnsw")
    index.add(vectors)
    return index


def effort(kind: Kind, index: Any, value: int | None = None) -> int:
    """How much of an approximate index is looked at: cells of `ivf`, length of the list of `hnsw`. Sets it first."""
    if kind == "ivf":
        index.nprobe = value or index.nprobe
        return int(index.nprobe)
    index.hnsw.efSearch = value or index.hnsw.efSearch
    return int(index.hnsw.efSearch)


def tune(kind: Kind, search: Search, queries: np.ndarray) -> dict[str, float]:
    """Raise the effort of `search.approximate` by doubling until `queries` (Q, D) find 95 % of their 10 best, or all
    would be looked at: `{"effort", "recall", "queries", "k"}`, the recall against an exact search of the same vectors.
    """
    exact = Search(search.vectors)
    k = min(TUNING_K, len(search.vectors))
    wanted = exact(queries, k)[1]
    most = search.approximate.nlist if kind == "ivf" else len(search.vectors)
    value = 1 if kind == "ivf" else 16
    while True:
        effort(kind, search.approximate, min(value, most))
        recall = recall_against(wanted, search(queries, k)[1])
        if recall >= WANTED_RECALL or value >= most:
            return {"effort": min(value, most), "recall": recall, "queries": len(queries), "k": k}
        value *= 2


def recall_against(exact: np.ndarray, found: np.ndarray) -> float:
    """Share of the exact answers (Q, k) that were found, in whatever order."""
    return float(np.mean([len(np.intersect1d(a, b)) / len(a) for a, b in zip(exact, found, strict=True)]))


def write_index(index: Any, path: Path) -> None:
    import faiss

    faiss.write_index(index, str(path))


def read_index(path: Path) -> Any:
    """An index file as faiss reads it, which trusts what stands in it: for files whose checksum is known alone."""
    import faiss

    return faiss.read_index(str(path))
