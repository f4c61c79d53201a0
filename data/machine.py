"""What this process may use of the machine, and work spread over processes."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import Any

from affekt.data.errors import DataError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def available_cores() -> int:
    """Cores this process may run on, which a batch system or container often limits below what the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, for the next step of the same shapes; for a trainer on a CPU.

    glibc returns large blocks to the kernel when they are freed, and every step would get its activations back page by
    page: a third of the time of a base step on two cores. It holds for all that the process does from then on: its
    memory stays at the peak, and above it where blocks of many sizes leave gaps. Elsewhere than on glibc nothing
    happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)  # no block of its own mapping, which only unmapping frees
        mallopt(M_TRIM_THRESHOLD, -1)  # never shrink the heap


def run_in_processes(
    function: Callable[..., Any], jobs: Sequence[tuple], workers: int, start: Callable[[], object]
) -> Iterator[tuple[int, Any]]:
    """Call `function(*job)` for every job, each process running `start()` first: (number of the job, what it returned),
    as they end. Raises what a job raises, and DataError when a process is killed.
    """
    # Spawned, not forked: the caller may hold threads and a CUDA context.
    pool = ProcessPoolExecutor(min(workers, len(jobs)), multiprocessing.get_context("spawn"), _start, (start,))
    try:
        # Ctrl-C reaches the whole process group. Workers inherit the blocked signal, so only the parent hears it and
        # stops them in order.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            futures = {pool.submit(function, *job): number for number, job in enumerate(jobs)}
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for future in as_completed(futures):
            yield futures.pop(future), future.result()  # and forget it: results may be large, and many
    except BrokenProcessPool:
        raise DataError(
            "a worker was killed, perhaps for want of memory; repeat the command with fewer workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def check_shared_memory(context: multiprocessing.context.BaseContext) -> None:
    """Raise DataError where the semaphores that workers need find no room: torch fails then with half an iterator."""
    try:
        context.Lock()
    except OSError as error:
        raise DataError(
            f"workers of the loader cannot start: {error.strerror}; is /dev/shm full? Make room there (a container "
            "wants --shm-size), or set the number of workers to 0"
        ) from error


def end_with_parent() -> None:
    """Make this process end when its parent does, however that ends: a killed parent leaves no orphans."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _start(start: Callable[[], object]) -> None:
    end_with_parent()
    start()
