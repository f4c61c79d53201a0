"""Progress of long work: a bar with rate and time left on a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

SECONDS_BETWEEN_LINES = 10.0


Report = Callable[[int, int], None]


@contextmanager
def progress(label: str, unit: str = "clips", *, quiet: bool = False, lines: bool = True) -> Iterator[Report]:
    """Yields `report(done, total)`, to be called as often as the work likes.

    Everything goes to stderr, so that stdout stays free for results. `quiet` shows nothing; `lines=False` shows nothing
    where there is no terminal, for work that writes lines of its own (above the bar, where there is one).
    """
    if sys.stderr.isatty() and not quiet:
        with _bar(label, unit) as report:
            yield report
    else:
        yield _lines(label, unit) if lines and not quiet else lambda done, total: None


@contextmanager
def _bar(label: str, unit: str) -> Iterator[Report]:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=Console(stderr=True))
    task = bar.add_task(label, total=None, rate="")
    first: tuple[float, int] | None = None

    def report(done: int, total: int) -> None:
        nonlocal first
        if first is None:  # started here and not before: of several processes only the one that reports shows a bar
            first = time.monotonic(), done
            bar.start()
        bar.update(task, completed=done, total=total, rate=_rate(done - first[1], first[0], unit))
        if done >= total:
            bar.stop()  # and not at the end of the context: a terminal holds one bar at a time, and the next may begin

    try:
        yield report
    finally:
        if first:
            bar.stop()


@contextmanager
def training(*, quiet: bool = False) -> Iterator[Callable[[int, int, dict[str, float]], None]]:
    """Yields `show(step, total, row)`: on a terminal a bar with the figures of the last logged step below it, elsewhere
    nothing, because a run writes lines of its own."""
    if quiet or not sys.stderr.isatty():
        yield lambda step, total, row: None
        return
    from affekt.pretrain.log import told

    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]}"),
    )
    task = bar.add_task("pretrain", total=None, left="")
    live = Live(console=Console(stderr=True), refresh_per_second=4)

    def show(step: int, total: int, row: dict[str, float]) -> None:
        if not live.is_started:  # here and not before: of several processes only the one that reports shows anything
            live.start()
        bar.update(task, completed=step, total=total, left=f"{row['time_left_s'] / 60:.1f} min left")
        live.update(Group(bar, Text(told(row))))

    try:
        yield show
    finally:
        if live.is_started:
            live.stop()


def _lines(label: str, unit: str) -> Report:
    first: tuple[float, int] | None = None
    last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal first, last
        now = time.monotonic()
        first = first or (now, done)
        if done < total and now - last < SECONDS_BETWEEN_LINES:
            return
        last = now
        new = done - first[1]  # work found done, after an interruption, says nothing about the rate
        left = f", {(total - done) * (now - first[0]) / new:.0f} s left" if new and done < total else ""
        rate = _rate(new, first[0], unit) if new else "done before"
        print(f"{label}: {done}/{total} {unit}, {rate}{left}", file=sys.stderr, flush=True)

    return report


def _rate(done: int, started: float, unit: str) -> str:
    return f"{done / max(time.monotonic() - started, 1e-9):.1f} {unit}/s"
