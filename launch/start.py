"""Starts a line and answers for all processes under it: signals go to every one, and its exit code comes back."""

import contextlib
import os
import signal
import subprocess

from affekt.launch.lines import LOST, Line

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)


def start(line: Line) -> int:
    """Run the line to its end. Returns the exit code of the process that failed first, 5 where a signal ended it, and
    128 + N after signal N to this process, which is passed on to all processes of the line."""
    received: list[int] = []
    # A session of its own, so that Ctrl-C comes to the processes once and from here: DeepSpeed's launcher would die of
    # it before those that it started.
    process = subprocess.Popen(line.words, env=os.environ | line.environment, start_new_session=True)

    def forward(number: int, _: object) -> None:
        received.append(number)
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.killpg(process.pid, number)

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received and code:
        return 128 + received[0]
    # DeepSpeed's launcher leaves with the negative number of the signal that ended a process; exit codes are bytes.
    return LOST if code < 0 or code > 256 - signal.NSIG else code
