"""A batch in parts or on several processes has the losses and gradients of the whole; wrong gathers are found."""

import pytest
import torch

from benchmarks.faults.rig import Rig
from benchmarks.faults.rows_maths import found, largest, mutants, parts, worlds


@pytest.fixture(scope="module")
def rig(tmp_path_factory) -> Rig:
    seed = torch.seed() % 2**31
    print(f"seed {seed}")
    return Rig(tmp_path_factory.mktemp("parts"), seed=seed)


@pytest.mark.parametrize("row, rounds", [(worlds, 1), (mutants, 2), (parts, 2)])
def test_row(rig, row, rounds):
    passed, cases, notes = row(rig, rounds)
    assert passed == cases == rounds, notes


def test_local_negatives_are_those_of_the_ranks_own_batch_in_parts_too(rig):
    tensors = found(rig, 2, 3, (1, 4), torch.float64, negatives="local")
    one, four = ({k[2:]: v for k, v in tensors.items() if k.startswith(f"{count}/")} for count in (1, 4))
    assert largest(one, four) <= 1e-6
    everyone = found(rig, 2, 3, (1,), torch.float64)
    assert largest({k[2:]: v for k, v in everyone.items()}, one) > 1e-3
