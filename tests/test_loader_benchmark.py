"""What `python -m benchmarks.loader` measures."""

import mmap
import os
import subprocess
import sys

import pytest

from benchmarks.loader import resident

MIB = 2**20
CHILD = """
import mmap, sys
own = bytearray(b"x" * 2**20) * 20
block = mmap.mmap(int(sys.argv[1]), 0)
block[:] = b"y" * len(block)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="Linux tells what is shared")
def test_memory_is_that_of_trainer_and_worker_and_what_they_share():
    """A leak in any of the three shows, and once."""
    before, own = resident(), mmap.mmap(-1, 40 * MIB)  # new pages: what was freed before would not show
    for start in range(0, len(own), MIB):
        own[start : start + MIB] = b"x" * MIB
    assert 35 * MIB < resident() - before < 50 * MIB
    descriptor = os.memfd_create("block")
    os.ftruncate(descriptor, 80 * MIB)
    block = mmap.mmap(descriptor, 80 * MIB)
    command = [sys.executable, "-c", CHILD, str(descriptor)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "pass_fds": [descriptor]}
    with subprocess.Popen(command, **pipes) as child:
        assert child.stdout.readline() == b"ready\n"
        assert bytes(block[:: len(block) // 20_000])[-1:] == b"y"  # mapped here too
        assert 135 * MIB < resident() - before < 175 * MIB
        child.stdin.close()
    os.close(descriptor)
    assert len(own) == 40 * MIB
