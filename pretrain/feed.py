"""The batches of one rank, and how all ranks stop together when the data of one of them fail."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from affekt.data.accounting import Accounting, all_gather_json, sum_over_ranks
from affekt.data.batch import Batch
from affekt.data.errors import AffektError, DataError
from affekt.data.loader import TrainLoader
from affekt.pretrain.signals import Leave, Stopped

Result = TypeVar("Result")


def together(function: Callable[[], Result]) -> Result:
    """What the function returns on every rank. Where it raises on one of them, as for shards that are missing on one
    machine, all raise: the rank its own error, the others a DataError."""
    if dist.get_world_size() == 1:
        return function()
    result, failure = None, None
    try:
        result = function()
    except AffektError as error:
        failure = error
    texts = all_gather_json(str(failure) if failure else "")
    if failure:
        raise failure
    _raise_any(texts)
    return result


def _raise_any(texts: list[str]) -> None:
    if any(texts):
        raise DataError("\n".join(f"process {rank}: {text}" for rank, text in enumerate(texts) if text))


class Feed:
    """Iterates over a loader and counts. A rank that left alone would keep the others waiting for it in their next sum:
    one without data goes on with blank rows, from which nothing is learned, until the next `check` tells all.

    No checkpoint is written without a check, so none has steps in it that were made with blank rows. A batch counts
    when the next one is asked for, unless it is taken back. Where `leave` hears a signal, waiting for one ends at once.
    """

    def __init__(
        self,
        loader: TrainLoader,
        accounting: Accounting,
        budget: float,
        start_step: int,
        rank: int,
        leave: Leave | None = None,
    ):
        self.accounting, self.budget, self.leave = accounting, budget, leave or Leave()
        self._loader, self._batches, self._step, self._rank = loader, iter(loader), start_step, rank
        self._failure = ""
        self._uncounted: Batch | None = None

    def __next__(self) -> Batch:
        self._count()
        batch = None
        if not self._failure:
            try:
                with self.leave.at_once():
                    batch = next(self._batches)
            except Stopped:
                if not self.leave.begun:
                    raise
            except AffektError as error:
                if self.leave.soon():  # the loader's workers were asked to leave too, and did
                    return self._loader.blank()
                if dist.get_world_size() == 1:
                    raise
                self._failure = str(error)
        self._uncounted = batch or self._loader.blank()
        return self._uncounted

    def take_back(self) -> None:
        """The last batch was not used."""
        self._uncounted = None

    def _count(self) -> None:
        if self._uncounted:
            self.accounting.add(self._uncounted, self._step, self._rank)
            self._step += 1
        self._uncounted = None

    def check(self) -> None:
        """All ranks ask at the same steps. Raises DataError on all of them when the data of one have failed, or when
        more clips than the budget allows could not be used."""
        self._count()
        if sum_over_ranks([bool(self._failure)])[0]:
            _raise_any(all_gather_json(self._failure))
        self.accounting.check(self.budget)
