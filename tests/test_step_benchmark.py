"""The benchmark of a training step: its twin is the same method, the command runs, we execute less."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from affekt.pretrain.registry import create_model, model_settings
from benchmarks.plain_hicmae import PlainHiCMAE
from benchmarks.step import PUBLISHED_GFLOP, count_forward_gflop, synthetic

ROOT = Path(__file__).resolve().parents[1]
NUMBERS = {"gemm_share", "twin_gemm_share", "ratio_to_twin_fp32", "clips_per_s", "peak_gib", "gflop_forward"}
ON_CUDA = {"mfu_790", "host_syncs"}


@pytest.fixture
def seed() -> int:
    """A new one in every run; pytest shows what was printed when a test fails."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    return seed


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def test_the_twin_has_our_losses_and_gradients(seed):
    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(seed)
    model = create_model("hicmae_nano")
    with torch.no_grad():  # fresh biases are zero and fresh norms one: noise shows which of them is left out
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    twin = PlainHiCMAE(model.settings)
    twin.load_ours(model.state_dict())
    inputs, masks = synthetic(model.settings, torch.randint(2**62, (3,)), torch.device("cpu"))

    ours, theirs = model(inputs, *masks), twin(inputs.video, inputs.audio, *(mask.hidden for mask in masks))
    assert set(ours) == set(theirs) == {"loss", "loss_video", "loss_audio", "loss_contrast"}
    for name, value in theirs.items():
        assert ours[name].item() == pytest.approx(value.item(), rel=1e-5), name
    ours["loss"].backward()
    theirs["loss"].backward()
    gradients = {name: parameter.grad for name, parameter in twin.named_parameters()}
    for name, parameter in model.named_parameters():
        error = relative_error(twin.in_our_place(name, parameter.grad), gradients.pop(name))
        assert error < 1e-4, f"{name}: {error:.2g}"
    assert not gradients


def test_the_command_prints_every_figure():
    command = [sys.executable, "-m", "benchmarks.step", "--size", "nano", "--rounds", "2", "--batch", "2"]
    run = subprocess.run([*command, "--threads", "1"], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    answer = json.loads(run.stdout.splitlines()[-1])
    assert answer["benchmark"] == "step"
    figures = answer["figures"]
    assert all(figures[name] > 0 for name in NUMBERS), figures
    for name in ON_CUDA:
        assert isinstance(figures[name], int | float) if torch.cuda.is_available() else figures[name] is None
    assert 0.1 < figures["peak_gib"] < 2  # a Python with torch, and a model of a few MB


@pytest.mark.parametrize("size, limit", [("base", 29.0), ("small", 11.6), ("tiny", 5.8)])
def test_a_forward_pass_executes_less_than_the_published_one(size, limit):
    """GFLOP per clip, 2 x MAC; the published code executes 30.3, 12.3 and 6.3."""
    meta = torch.device("meta")  # shapes alone, nothing is computed
    gflop = count_forward_gflop(create_model(f"hicmae_{size}").to(meta), meta)
    assert 0.8 * limit < gflop <= limit


def test_the_twin_executes_the_work_that_shares_count():
    """Base and small agree as well (89.53 and 35.85 GFLOP), but take longer."""
    twin = PlainHiCMAE(model_settings("hicmae_tiny"))
    inputs, masks = synthetic(twin.settings, torch.arange(1), torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        twin(inputs.video, inputs.audio, *(mask.hidden for mask in masks))["loss"].backward()
    assert counter.get_total_flops() / 1e9 == pytest.approx(PUBLISHED_GFLOP["tiny"], abs=0.05)
