"""Losses and gradients that must not depend on how many processes or parts share a batch, and wrong gathers."""

import torch
from safetensors.torch import load_file

from benchmarks.faults import whole
from benchmarks.faults.rig import Rig

PARTS = (1, 2, 4)
WITHIN = {torch.float64: 1e-6, torch.float32: 1e-5}  # of the largest number of a tensor


def worlds(rig: Rig, rounds: int) -> tuple[int, int, str]:
    """F3: losses and gradients of 2 and 4 processes are those of one, in both precisions."""
    passed, worst = 0, 0.0
    for number in range(rounds):
        dtype = list(WITHIN)[number % 2]
        seed = rig.rng.randrange(10**6)
        one, *others = (found(rig, ranks, seed, (1,), dtype) for ranks in (1, 2, 4))
        apart = max(largest(one, other) for other in others)
        passed, worst = passed + (apart <= WITHIN[dtype]), max(worst, apart / WITHIN[dtype])
    return passed, rounds, f"at most {worst:.2g} of what is allowed"


def mutants(rig: Rig, rounds: int) -> tuple[int, int, str]:
    """F4: a gather without gradient, and one scaled, do not pass for the right one."""
    passed, nearest = 0, float("inf")
    for number in range(rounds):
        seed, mutant = rig.rng.randrange(10**6), list(whole.MUTANTS)[number % 2]
        one = found(rig, 1, seed, (1,), torch.float64)
        apart = largest(one, found(rig, 2, seed, (1,), torch.float64, mutant=mutant))
        passed, nearest = passed + (apart > 1e-3), min(nearest, apart)
    return passed, rounds, f"apart by {nearest:.2g} at least"


def parts(rig: Rig, rounds: int) -> tuple[int, int, str]:
    """F6: a batch in 2 and 4 parts has the losses and gradients of the whole, on one process and on two."""
    passed, worst = 0, 0.0
    for number in range(rounds):
        seed, ranks = rig.rng.randrange(10**6), 1 + number % 2
        tensors = found(rig, ranks, seed, PARTS, torch.float64)
        split = {count: {k[2:]: v for k, v in tensors.items() if k.startswith(f"{count}/")} for count in PARTS}
        apart = max(largest(split[1], split[count]) for count in PARTS[1:])
        passed, worst = passed + (apart <= 1e-5), max(worst, apart)
    return passed, rounds, f"apart by {worst:.1e} at most"


def found(rig: Rig, ranks: int, seed: int, counts: tuple[int, ...], dtype: torch.dtype, **options: str) -> dict:
    """What `whole.losses_and_gradients` wrote. Raises RuntimeError with what the processes said."""
    out = rig.new("whole")
    values = (options.get("negatives", "global"), options.get("mutant", ""))
    job = rig.call(whole.losses_and_gradients, str(out), seed, counts, dtype, *values, ranks=ranks)
    job.wait()
    if any(job.codes):
        raise RuntimeError(job.told)
    return load_file(out)


def largest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of two sets of tensors with the same names, relative to each tensor's largest number, or
    to a thousandth of the largest of all: some gradients are nothing but rounding."""
    assert one.keys() == other.keys() and {"loss_video", "loss_audio", "loss_contrast"} <= {
        name.rpartition("/")[2] for name in one
    }
    least = 1e-3 * max(x.abs().max().item() for x in one.values())
    return max(((other[name] - x).abs().max() / x.abs().max().clamp(min=least)).item() for name, x in one.items())


ROWS = {
    "F3": ("losses and gradients of 1, 2 and 4 processes", worlds, 10),
    "F4": ("gathers without gradient, and scaled", mutants, 2),
    "F6": ("a batch in parts and whole, with the contrast", parts, 10),
}
