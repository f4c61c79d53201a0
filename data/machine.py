"""What this process may use of the machine."""

import os


def available_cores() -> int:
    """Cores this process may run on, which a batch system or container often limits below what the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
