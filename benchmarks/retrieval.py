"""Exact search beside the GEMM rate of the same run, IVF and HNSW beside it: `python -m benchmarks.retrieval`.

Exact: 10,000 queries in 100,000 vectors of 512 numbers, the 10 best in exact order, and the product of the same
matrices in blocks, in turns, so that what else the machine does meets both; medians of the rounds are compared.
Approximate: 100,000 vectors around 2,000 centres, queries near them (nothing but exact search finds anything among
vectors without any structure), tuned to 95 % of the exact answers by other queries than those that are timed.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from affekt.finetune.retrieval.search import Search, build, recall_against, tune
from benchmarks.report import print_figures

K = 10
BLOCK = 8192  # rows of the base in a product: the result stays small, as in a search
BAR = 0.25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=int, default=100_000, help="vectors to search")
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", nargs="*", default=["ivf", "hnsw"], choices=["ivf", "hnsw"])
    parser.add_argument("--approximate-queries", type=int, default=1000)
    arguments = parser.parse_args()
    figures = exact(arguments)
    for kind in arguments.kinds:
        figures |= approximate(kind, arguments)
    table = Table("", "", title=f"{arguments.queries} queries in {arguments.base} x {arguments.width}, k = {K}")
    for name, value in figures.items():
        table.add_row(name, f"{value:.4g}")
    Console().print(table)
    print_figures("retrieval", figures)


def exact(arguments: argparse.Namespace) -> dict[str, float]:
    """GFLOP/s (2 x MAC) of both, and the share that the search reaches with all that belongs to it."""
    rng = np.random.default_rng(0)
    base, queries = (unit_rows(rng, n, arguments.width) for n in (arguments.base, arguments.queries))
    search = Search(base)
    search(queries[:10], K)  # builds the flat index
    product = blocks_of(torch.from_numpy(base), torch.from_numpy(queries))
    product()
    seconds: dict[str, list[float]] = {"search": [], "gemm": []}
    for _ in range(arguments.rounds):
        seconds["gemm"].append(timed(product))
        seconds["search"].append(timed(lambda: search(queries, K)))
    work = 2 * arguments.base * arguments.queries * arguments.width / 1e9
    rates = {name: work / median(times) for name, times in seconds.items()}
    share = rates["search"] / rates["gemm"]
    return {
        "exact_gflops": rates["search"],
        "gemm_gflops": rates["gemm"],
        "exact_share_of_gemm": share,
        "exact_share_bar": BAR,
        "exact_queries_per_s": arguments.queries / median(seconds["search"]),
        "threads": torch.get_num_threads(),
    }


def approximate(kind: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds to build, effort and recall after tuning, and how many times as fast as exact search it answers."""
    rng = np.random.default_rng(1)
    centres = rng.standard_normal((2000, arguments.width), np.float32)
    base, tuning, queries = (around(centres, rng, n) for n in (arguments.base, 500, arguments.approximate_queries))
    exactly = Search(base)
    exactly(queries[:10], K)
    started = time.perf_counter()
    search = Search(base, approximate=build(kind, base))
    built = time.perf_counter() - started
    tuned = tune(kind, search, tuning)
    wanted, seconds = exactly(queries, K)[1], {"exact": [], kind: []}
    for _ in range(arguments.rounds):
        seconds["exact"].append(timed(lambda: exactly(queries, K)))
        seconds[kind].append(timed(lambda: search(queries, K)))
    return {
        f"{kind}_build_seconds": built,
        f"{kind}_effort": tuned["effort"],
        f"{kind}_recall": recall_against(wanted, search(queries, K)[1]),
        f"{kind}_queries_per_s": len(queries) / median(seconds[kind]),
        f"{kind}_times_exact": median(seconds["exact"]) / median(seconds[kind]),
    }


def blocks_of(base: torch.Tensor, queries: torch.Tensor) -> Callable[[], None]:
    """The product of all vectors with all queries, into a matrix that is used again."""
    room = torch.empty(len(queries), BLOCK)

    def product() -> None:
        for part in base.split(BLOCK):
            torch.mm(queries, part.T, out=room[:, : len(part)] if len(part) == BLOCK else None)

    return product


def unit_rows(rng: np.random.Generator, count: int, width: int) -> np.ndarray:
    x = rng.standard_normal((count, width), np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def around(centres: np.ndarray, rng: np.random.Generator, count: int) -> np.ndarray:
    x = centres[rng.integers(0, len(centres), count)]
    x = x + 0.7 * rng.standard_normal(x.shape, np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def timed(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
