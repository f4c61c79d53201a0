"""What a process does with the machine's memory."""

import platform
import subprocess
import sys

import pytest

# Page faults of the last three of six rounds that fill and free what a step of a base model does: 40 MB blocks.
ROUNDS = """
import resource, sys, torch
from affekt.data.machine import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()
for number in range(6):
    if number == 3:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(10 * 2**20) for _ in range(4)]
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> int:
    child = subprocess.run([sys.executable, "-c", ROUNDS, mode], capture_output=True, text=True, check=True)
    return int(child.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is told to keep memory")
def test_freed_memory_is_kept_for_the_next_step():
    # Huge pages, where the system gives them unasked, make the faults of the default few; they are never none.
    assert faults("kept") * 10 < faults("default")
