"""The speed of a pre-training step: `python -m benchmarks.step --size base --dtype fp32 --batch 8`.

Our step, the step of the plain twin (`benchmarks.plain_hicmae`) and matrix products take turns in one process, and
medians are compared, so that what else the machine does meets all of them. With one thread on a CPU the process's own
time counts, so a busy machine does not matter; with several it is the clock on the wall. On a CUDA device the command
also prints the operators that take longest, what share of 790 TFLOP/s is reached and where the host waits for the
device. Of several `--batch` sizes, the one with the most clips per second is compared. FLOPs are 2 x MAC.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from affekt.data.machine import keep_freed_memory
from affekt.data.transforms import Inputs
from affekt.pretrain.engine import choose_matmul_precision
from affekt.pretrain.hicmae import HiCMAE
from affekt.pretrain.hicmae_settings import HiCMAESettings
from affekt.pretrain.masks import Mask, random_mask, tube_mask
from affekt.pretrain.optim import OptimSettings, clip_gradients, create_optimizer
from affekt.pretrain.registry import create_model
from benchmarks.plain_hicmae import PlainHiCMAE, plain_optimizer, plain_step
from benchmarks.report import print_figures

# Forward and backward of the published method, GFLOP per clip: the numerator of every share. It is fixed, so that work
# left out counts as speed.
PUBLISHED_GFLOP = {"base": 89.5, "small": 35.9, "tiny": 18.2}
PEAK_TFLOPS = 790  # what large bf16 products reach on one H200
LEARNING_RATE = 1e-4  # any small one: the weights should move, and stay finite
SAME_LOSS = 1e-5  # relative
SAMPLE_SECONDS = 0.2  # the least that one sample lasts: shorter ones measure the clock and the launch of kernels
STEPS_ALONE = 3  # in the child process; the optimiser's state is there after the first


def main() -> None:
    arguments = parse_arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if device.type == "cpu":
        keep_freed_memory()  # as the trainer does
    if arguments.only_ours:
        print(json.dumps(measure_alone(arguments, device)))
        return
    # First of all: a child process starts with the peak memory that its parent had by then (Linux's ru_maxrss).
    alone = run_alone(arguments)
    batch = max(alone, key=lambda batch: batch / alone[batch]["seconds"])
    figures = compare(arguments, batch, device) | {"peak_gib": round(alone[batch]["peak_gib"], 3)}
    print_figures("step", figures)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["base", "small", "tiny", "nano"], default="base")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of our step; the twin's is fp32")
    parser.add_argument("--batch", type=positive, nargs="+", default=[8], metavar="CLIPS")
    parser.add_argument("--threads", type=positive, help="default: torch's own choice")
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--compile", action="store_true", help="torch.compile our forward pass, losses and gradients")
    parser.add_argument("--profile", action="store_true", help="print the slowest operators; always done on CUDA")
    parser.add_argument("--only-ours", action="store_true", help="our step alone: its peak memory as a line of JSON")
    return parser.parse_args()


def positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is no number from 1 on")
    return int(text)


class OurStep:
    """Forward, losses, backward, gradient norm, optimiser and zero_grad, as `affekt.pretrain.loop` has them, without
    the DeepSpeed engine around them.

    bf16 is autocast over fp32 weights. Inputs and masks are on the device already.
    """

    def __init__(self, size: str, dtype: str, batch: int, device: torch.device, compiled: bool):
        torch.manual_seed(0)
        self.model = create_model(f"hicmae_{size}").to(device).train()
        self.forward = torch.compile(self.model, dynamic=False) if compiled else self.model
        self.optimizer = create_optimizer(self.model, OptimSettings())
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE
        self.inputs, self.masks = synthetic(self.model.settings, torch.arange(batch), device)
        self.autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=dtype == "bf16")

    def __call__(self) -> None:
        with self.autocast():
            losses = self.forward(self.inputs, *self.masks)
        losses["loss"].backward()
        clip_gradients(self.model, 0.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def synthetic(s: HiCMAESettings, keys: Tensor, device: torch.device) -> tuple[Inputs, list[Mask]]:
    """Noise in the shape of clips with both streams, and their masks, drawn from `keys` (B,)."""
    generator, batch = torch.Generator().manual_seed(0), len(keys)
    video = torch.randn(batch, 3, s.num_frames, s.img_size, s.img_size, generator=generator).to(device)
    audio = torch.randn(batch, 1, s.mel_frames, s.mel_bins, generator=generator).to(device)
    present = torch.ones(batch, dtype=torch.bool, device=device)
    inputs = Inputs(video, audio, present, present, torch.full((batch,), s.mel_frames, device=device))
    masks = (
        tube_mask(keys, s.grid_video, s.mask_ratio_video),
        random_mask(keys, math.prod(s.grid_audio), s.mask_ratio_audio),
    )
    return inputs, [mask.to(device) for mask in masks]


def measure_alone(arguments: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Seconds of a step and the peak memory of a process that does nothing else, in GiB: resident memory with the
    libraries on a CPU, torch's allocations on CUDA."""
    choose_matmul_precision()
    step = OurStep(arguments.size, arguments.dtype, *arguments.batch, device, arguments.compile)
    timed(step)
    seconds = median(timed(step) for _ in range(STEPS_ALONE - 1))
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"seconds": seconds, "peak_gib": peak / 2**30}


def run_alone(arguments: argparse.Namespace) -> dict[int, dict[str, float]]:
    """`measure_alone` for every batch size, each in a process of its own; those that fail are left out."""
    table = Table("Clips", "Clips per second", "Peak memory, GiB", title=f"Our step alone, {arguments.size}")
    command = [sys.executable, "-m", "benchmarks.step", "--only-ours", "--size", arguments.size]
    command += ["--dtype", arguments.dtype, *["--compile"] * arguments.compile]
    command += ["--threads", str(arguments.threads)] if arguments.threads else []
    results = {}
    for batch in arguments.batch:
        child = subprocess.run([*command, "--batch", str(batch)], capture_output=True, text=True)
        if child.returncode:
            print(f"a batch of {batch} failed: {(child.stderr.strip().splitlines() or ['no message'])[-1]}")
            continue
        results[batch] = result = json.loads(child.stdout.splitlines()[-1])
        table.add_row(str(batch), f"{batch / result['seconds']:.2f}", f"{result['peak_gib']:.2f}")
    if not results:
        raise SystemExit("no batch size could be run; try a smaller --batch")
    Console().print(table)
    return results


def timed(call: Callable[[], object], repeat: int = 1) -> float:
    """Seconds per call."""
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    clock = time.process_time if alone else time.perf_counter
    start = clock()
    for _ in range(repeat):
        call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (clock() - start) / repeat


@dataclass
class Contender:
    """Something to time: `gflop` of work a call, in `mode` (dtype, torch's precision of float32 products)."""

    name: str
    mode: tuple[str, str]
    gflop: float
    call: Callable[[], object]
    repeat: int = 1
    samples: list[float] = field(default_factory=list)  # seconds per call

    def sample(self) -> None:
        torch.set_float32_matmul_precision(self.mode[1])
        self.samples.append(timed(self.call, self.repeat))

    def warm_up(self) -> None:
        """Two calls, the second of which says how many make a sample long enough."""
        self.sample()
        self.sample()
        self.repeat = max(1, math.ceil(SAMPLE_SECONDS / max(self.samples[-1], 1e-6)))
        self.samples.clear()

    @property
    def seconds(self) -> float:
        return median(self.samples)

    @property
    def speed(self) -> float:
        """GFLOP/s."""
        return self.gflop / self.seconds


def compare(arguments: argparse.Namespace, batch: int, device: torch.device) -> dict[str, object]:
    """Let our step, the twin's and the products take turns; print the table and return the figures."""
    mode, twin_mode = (arguments.dtype, choose_matmul_precision()), ("fp32", "highest")
    step = OurStep(arguments.size, arguments.dtype, batch, device, arguments.compile)
    forward_gflop = count_forward_gflop(step.model, device)
    counted = PUBLISHED_GFLOP.get(arguments.size, 3 * forward_gflop)
    twin, twin_inputs = plain_twin(step)
    check_losses(step, twin, twin_inputs)
    twin_step = partial(plain_step, twin, plain_optimizer(twin, LEARNING_RATE), *twin_inputs)
    ours = Contender("our step", mode, batch * counted, step)
    plain = Contender("the plain twin's step", twin_mode, batch * counted, twin_step)
    products = [gemm for m in sorted({mode, twin_mode}) for gemm in gemms(step.model.settings, batch, m, device)]
    take_turns([ours, plain, *products], arguments.rounds)

    rates = {m: max(gemm.speed for gemm in products if gemm.mode == m) for m in (mode, twin_mode)}
    ratio = plain.seconds / ours.seconds
    Console().print(speeds([ours, plain, *products], rates, f"{arguments.size}, {batch} clips"))
    print(
        f"A step counts {counted:.1f} GFLOP per clip; our forward pass executes {forward_gflop:.2f}.\n"
        f"{batch / ours.seconds:.2f} clips per second, {ratio:.2f} times the plain twin in fp32."
    )
    torch.set_float32_matmul_precision(mode[1])
    on_cuda = device.type == "cuda"
    if on_cuda or arguments.profile:
        print(slowest_operators(step, device))
    return {
        "gemm_share": round(ours.speed / rates[mode], 4),
        "twin_gemm_share": round(plain.speed / rates[twin_mode], 4),
        "ratio_to_twin_fp32": round(ratio, 3),
        "clips_per_s": round(batch / ours.seconds, 3),
        "gflop_forward": round(forward_gflop, 3),
        "mfu_790": round(ours.speed / 1000 / PEAK_TFLOPS, 4) if on_cuda else None,
        "host_syncs": count_host_syncs(step) if on_cuda else None,
        "step_ms": round(1000 * ours.seconds, 2),
        "twin_step_ms": round(1000 * plain.seconds, 2),
        "gemm_gflop_per_s": round(rates[mode], 1),
        "twin_gemm_gflop_per_s": round(rates[twin_mode], 1),
        "gflop_counted": round(counted, 3),
        "size": arguments.size,
        "dtype": arguments.dtype,
        "matmul_precision": mode[1],
        "batch": batch,
        "threads": torch.get_num_threads(),
        "rounds": arguments.rounds,
        "compiled": arguments.compile,
    }


def take_turns(contenders: list[Contender], rounds: int) -> None:
    for contender in contenders:
        contender.warm_up()
    for _ in range(rounds):
        for contender in contenders:
            contender.sample()


def speeds(contenders: list[Contender], rates: dict[tuple[str, str], float], title: str) -> Table:
    """Medians, and shares of the quickest product in the same mode."""
    table = Table("", "Mode", title=title)
    for column in ("ms", "GFLOP/s", "Share"):
        table.add_column(column, justify="right")
    for c in contenders:
        numbers = f"{1000 * c.seconds:.2f}", f"{c.speed:.1f}", f"{c.speed / rates[c.mode]:.1%}"
        table.add_row(c.name, " ".join(c.mode), *numbers)
    return table


def count_forward_gflop(model: HiCMAE, device: torch.device) -> float:
    """GFLOP that our forward pass executes per clip, 2 x MAC."""
    inputs, masks = synthetic(model.settings, torch.arange(1), device)
    # Torch's counter knows no fused attention on the CPU and would count nothing for it.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(inputs, *masks)
    return counter.get_total_flops() / 1e9


def plain_twin(step: OurStep) -> tuple[PlainHiCMAE, tuple[Tensor, ...]]:
    """The twin with our weights, and its inputs from ours."""
    twin = PlainHiCMAE(step.model.settings).to(step.inputs.video.device)
    twin.load_ours(step.model.state_dict())
    return twin, (step.inputs.video, step.inputs.audio, *(mask.hidden for mask in step.masks))


def check_losses(step: OurStep, twin: PlainHiCMAE, twin_inputs: tuple[Tensor, ...]) -> None:
    """Stop the command unless both compute the same losses in fp32."""
    torch.set_float32_matmul_precision("highest")
    with torch.no_grad():
        ours, theirs = step.model(step.inputs, *step.masks), twin(*twin_inputs)
    for name, value in theirs.items():
        if not math.isclose(ours[name].item(), value.item(), rel_tol=SAME_LOSS):
            raise SystemExit(
                f"{name}: ours {ours[name].item():.8g}, the twin's {value.item():.8g}: not the same method"
            )


def gemms(s: HiCMAESettings, batch: int, mode: tuple[str, str], device: torch.device) -> list[Contender]:
    """A large cube, and both layers of the MLPs over the video's tokens, in encoder and fusion and in the decoder. The
    audio's products are smaller, and so are those of attention."""
    tokens, side = math.prod(s.grid_video), math.prod(s.grid_video[1:])
    visible = tokens - s.grid_video[0] * int(s.mask_ratio_video * side)
    shapes = [(4096, 4096, 4096)]  # rows, inputs, outputs
    for rows, dim in ((batch * visible, s.embed_dim), (batch * tokens, s.decoder_embed_dim)):
        shapes += [(rows, dim, 4 * dim), (rows, 4 * dim, dim)]
    like = {"device": device, "dtype": torch.bfloat16 if mode[0] == "bf16" else torch.float32}
    return [
        Contender(
            f"product {m} x {k} x {n}",
            mode,
            2 * m * k * n / 1e9,
            partial(F.linear, torch.randn(m, k, **like), torch.randn(n, k, **like)),
        )
        for m, k, n in shapes
    ]


def slowest_operators(step: OurStep, device: torch.device) -> str:
    """Torch's table of operators by the time of their own kernels, over three steps."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(3):
            step()
    by = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return profile.key_averages().table(sort_by=by, row_limit=20, max_name_column_width=60)


def count_host_syncs(step: OurStep) -> int:
    """How often one steady step makes the host wait for the device; prints from where."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = [f"{w.filename}:{w.lineno}" for w in caught if "called a synchronizing CUDA operation" in str(w.message)]
    for place in places:
        print(f"the host waits at {place}")
    return len(places)


if __name__ == "__main__":
    main()
