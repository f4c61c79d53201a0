"""Batches made ahead of their use, by worker processes that answer for themselves."""

import multiprocessing
import signal
import time
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset

from affekt.data.batch import Batch
from affekt.data.errors import AffektError, DataError
from affekt.data.handover import POSSIBLE, Blocks, Sent, Taken
from affekt.data.machine import check_shared_memory, end_with_parent, keep_freed_memory
from affekt.data.mixture import places
from affekt.data.remote import FetchAhead

LOOK_SECONDS = 5
LOOK_BATCHES = 512  # how far fetching ahead looks for shards; few shards would let it look to the end of the run
WAIT_SECONDS = 600  # for one batch: a worker that hangs, as on a dead network disk, is an error and no endless wait


class _Handed(Dataset):
    """The same batches in the worker's own blocks."""

    def __init__(self, batches: Dataset):
        self.batches, self.blocks = batches, Blocks()

    def __getitem__(self, number: int) -> Sent | AffektError:
        batch = self.batches[number]
        return self.blocks.send(batch) if isinstance(batch, Batch) else batch


def load_ahead(batches: Dataset, numbers: range, workers: int) -> Iterator[Batch]:
    """As `load`; shards behind a url are fetched in the order of the batches, by a thread of this process."""
    remote = places(batches.indices)
    if not any(remote):
        yield from load(batches, numbers, workers)
        return

    def upcoming(done: int) -> Iterator[int]:
        for number in numbers[done : done + LOOK_BATCHES]:
            yield from batches.shards(number)

    with FetchAhead(remote, upcoming) as ahead:
        for batch in load(batches, numbers, workers):
            ahead.step += 1  # it counts batches from the first of `numbers`
            yield batch


def load(batches: Dataset, numbers: range, workers: int) -> Iterator[Batch]:
    """The batches of these numbers in turn, each made as a whole by one worker."""
    loader = DataLoader(
        _Handed(batches) if workers and POSSIBLE else batches,
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        multiprocessing_context=_worker_context() if workers else None,
        worker_init_fn=_start_worker,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # of its own, or it would draw from the model's
        timeout=LOOK_SECONDS if workers else 0,  # it looks after its workers at a timeout alone
    )
    items, taken, last = iter(loader), Taken(), time.monotonic()
    while True:
        try:
            taken.give_back()
            item = next(items)
            if isinstance(item, Sent):
                item = item.open(taken)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:
            # torch says RuntimeError; a worker that goes while its batch is being handed over is a broken connection.
            if workers and "timed out" in str(error):
                if time.monotonic() - last < WAIT_SECONDS:
                    continue
                raise DataError(
                    f"no batch came within {WAIT_SECONDS} s: a loader worker hangs, or the disk under the shards does"
                ) from error
            if not workers or (isinstance(error, RuntimeError) and "exited unexpectedly" not in str(error)):
                raise
            raise DataError(f"a loader worker died ({error}); if it ran out of memory, use fewer workers") from error
        if isinstance(item, AffektError):
            raise item
        yield item
        item, last = None, time.monotonic()  # what is held here would not be given back


def _worker_context() -> multiprocessing.context.BaseContext:
    """Workers are forked from a small process without threads: forking this one could copy a lock that torch holds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["affekt.data.loader"])  # with all that decodes
    check_shared_memory(context)
    return context


def _start_worker(_number: int) -> None:
    """Ctrl-C is for the parent to answer: it ends its workers. (torch limits each worker to one thread by itself.)

    Torch's own watch over the parent does not work here: the server that forked this worker would never go.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    keep_freed_memory()  # of the batch before, for the next one
