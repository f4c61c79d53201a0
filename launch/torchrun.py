"""torchrun that leaves with the exit code of the process that failed first, in place of 1 for every failure.

`python -m affekt.launch.torchrun` takes the arguments of torchrun. A process that a signal ended counts as lost: 5.
"""

import sys

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import get_args_parser, run

from affekt.launch.lines import LOST

# SIGUSR1 is what batch systems send before the time is over; torchrun alone would die of it and leave its processes.
SIGNALS = "--signals_to_handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


def main(arguments: list[str]) -> int:
    """Run and return the exit code."""
    try:
        run(get_args_parser().parse_args([SIGNALS, *arguments]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        how = f"ended by {failure.signal_name()}" if failure.exitcode < 0 else f"left with exit code {failure.exitcode}"
        print(f"process {rank} {how}", file=sys.stderr)
        return LOST if failure.exitcode < 0 else failure.exitcode
    except SignalException as stop:
        return 128 + int(stop.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
