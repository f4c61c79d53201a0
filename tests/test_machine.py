"""What a process does with the machine's memory and its libraries."""

import platform
import subprocess
import sys

import pytest
import torch

from affekt.pretrain import flops
from affekt.pretrain.engine import choose_matmul_precision

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


@pytest.mark.parametrize("rounding, chosen", [(False, "medium"), (True, "highest")])
def test_the_quicker_library_is_chosen_only_where_it_is_exact(monkeypatch, rounding, chosen):
    """A machine whose `medium` rounds to bf16, and one whose does not, whichever of them this one is."""
    before = torch.get_float32_matmul_precision()
    real = torch.Tensor.__matmul__

    def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        with monkeypatch.context() as exact:
            exact.setattr(torch.Tensor, "__matmul__", real)
            if a.dtype == torch.float32 and torch.get_float32_matmul_precision() == "medium":
                a, b = (x.bfloat16().float() if rounding else x for x in (a, b))
                return (a.double() @ b.double()).float()
            return a @ b

    monkeypatch.setattr(torch.Tensor, "__matmul__", matmul)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    try:
        assert choose_matmul_precision() == chosen == torch.get_float32_matmul_precision()
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_chosen_library_is_exact_here():
    before = torch.get_float32_matmul_precision()
    try:
        choose_matmul_precision()
        a, b = torch.randn(300, 400), torch.randn(400, 200)
        exact = a.double() @ b.double()
        assert ((a @ b - exact).abs().max() / exact.abs().max()).item() < 2e-6
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_precision_that_this_cpu_is_slow_in_is_told(monkeypatch):
    rates = {torch.float32: 7e10, torch.bfloat16: 1e9}
    monkeypatch.setattr(flops, "_gemm_rate", lambda dtype, rounds: rates[dtype])
    flops.slow_precision.cache_clear()
    told = flops.slow_precision("bf16", torch.device("cpu"))
    assert "train.precision=bf16" in told and "1 GFLOP/s" in told and "70 in fp32" in told
    assert flops.slow_precision("fp32", torch.device("cpu")) is None
    assert flops.slow_precision("bf16", torch.device("cuda")) is None
    for rate in (1e12, 3e10):  # quicker, or as slow as noise may make it look
        rates[torch.bfloat16] = rate
        flops.slow_precision.cache_clear()
        assert flops.slow_precision("bf16", torch.device("cpu")) is None
