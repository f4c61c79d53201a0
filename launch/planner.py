"""What a run will take on a machine: memory by part, the largest batch, clips per second, and what holds it up.

Pure arithmetic on numbers that the caller took from the model; sizes are bytes, times seconds.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from affekt.launch.machines import LAUNCH_COMPILED, LAUNCH_SECONDS, Machine, share_of_peak

FLOAT32 = 4  # weights, gradients and moments are float32 in every precision
# DeepSpeed's default, in elements: at stage 0 all gradients up to so many are copied into one block before they are
# summed, stages 1 to 3 hold one block of exactly this size.
BUCKET = 500_000_000
# Of a core of an Intel Xeon, for a clip of 16 frames of 160 px and 2.6 s of sound: pictures, sound, the rest
# [measured: benchmarks.loader].
DECODE_PICTURES, DECODE_SOUND, DECODE_REST = 1.9e-3, 0.85e-3, 0.95e-3
PIXELS_DECODED = 16 * 160 * 160
# A machine of 8 H200 reads 5.5 GB/s at 24,800 such clips per second, of which sound at a byte a sample is 41 kB
# [computed].
READ_PER_PIXEL, READ_SOUND = (5.5e9 / 24_800 - 41_200) / PIXELS_DECODED, 41_200
# Shares of a step's arithmetic beside which the network works: the backward pass, where stage 3 alone sums gradients,
# and the decoders' forward pass, half of that of the model; features are gathered then, and their gradients later.
BACKWARD, DECODERS = 2 / 3, 1 / 6


@dataclass(frozen=True)
class Job:
    """One run, in numbers. `step_memory(batch)` gives (inputs, activations, most at once, the contrast excepted)."""

    parameters: int
    flops: int  # of forward and backward pass, a clip
    kernels: int  # of a step
    embed_dim: int
    taps: int
    pixels: int  # of the frames of a view; 0 without pictures
    sound: bool
    global_batch: int
    repeats: int
    precision: str
    compiled: bool
    stage: int
    offload: str
    accumulate: int
    total_clips: float | None  # in the whole run, None where unknown
    step_memory: Callable[[int], tuple[float, float, float]]


def memory_by_part(job: Job, gpus: int, clips: int, stage: int | None = None) -> dict[str, float]:
    """Bytes on each of `gpus` devices with `clips` at a time; `total` is the most at once, `host` beside it. On one
    device at stage 0 it is the step's own; elsewhere a bound, with what DeepSpeed holds by its defaults."""
    stage = job.stage if stage is None else stage
    spread, whole = 1 / gpus, job.parameters * FLOAT32
    inputs, activations, peak = job.step_memory(clips)
    work = max(0.0, peak - inputs - activations)
    parts = {"weights": whole, "gradients": min(whole, work), "optimizer": 2 * whole}
    parts |= {"inputs": inputs, "activations": activations, "work": max(0.0, work - whole), "buffers": 0.0}
    if stage == 0 and gpus > 1:
        parts["gradients"], parts["buffers"] = max(parts["gradients"], whole), min(whole, BUCKET * FLOAT32)
    if stage >= 1:  # a float32 copy of the part of the weights whose moments are here
        parts |= {"optimizer": 3 * whole * spread, "buffers": BUCKET * FLOAT32, "gradients": whole}
    if stage >= 2:
        parts["gradients"] = whole * spread
    if stage == 3:  # up to 1e9 parameters stay gathered: all of a model of this kind
        parts |= {"weights": whole * spread, "gathered weights": whole}
    parts["contrast"] = _contrast(job, gpus, clips)
    host = 0.0
    if job.offload != "none" and stage:
        host, parts["optimizer"] = parts["optimizer"], 0.0
    if job.offload == "parameters" and stage == 3:
        host, parts["weights"] = host + parts["weights"], 0.0
    return {**parts, "total": sum(parts.values()), "host": host}


def largest_batch(job: Job, machine: Machine, gpus: int, stage: int | None = None) -> int:
    """The most clips that a device takes at a time; 0 where not even one fits."""

    def fits(clips: int) -> bool:
        return memory_by_part(job, gpus, clips, stage)["total"] <= machine.usable

    low, high = 0, 1
    while high < 2**20 and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def at_scale(job: Job, machine: Machine, gpus: int, share: float | None = None) -> dict:
    """Speed and limits on `gpus` devices, with the global batch of the run."""
    machines, here = math.ceil(gpus / machine.gpus), min(gpus, machine.gpus)
    largest = largest_batch(job, machine, gpus)
    row = {"gpus": gpus, "machines": machines, "largest_batch": largest, "problem": _problem(job, gpus, largest)}
    clips = job.global_batch / gpus / job.accumulate
    row |= {"clips_per_gpu": clips, "accumulate": job.accumulate}
    seconds = step_seconds(job, machine, gpus, clips, share)
    step = sum(seconds.values())
    rates = {"the step": job.global_batch / step}
    need = decode_seconds(job) / job.repeats
    rates["loader cores"] = machines * machine.cores / need
    rates["reading"] = machines * machine.disk / (read_bytes(job) / job.repeats)
    slowest = min(rates, key=rates.get)
    rate = rates[slowest]
    alone = step_seconds(job, machine, 1, clips, share)
    limit = max(seconds, key=seconds.get) if slowest == "the step" else slowest
    return row | {
        "seconds": seconds,
        "step_seconds": step,
        "clips_per_s": rate,
        "clips_per_s_of_the_step": rates["the step"],
        "efficiency": rate / (gpus * clips * job.accumulate / sum(alone.values())),
        "bottleneck": limit,
        "loader_cores_per_machine": rates["the step"] * need / machines,
        "read_bytes_per_s_per_machine": rates["the step"] * read_bytes(job) / job.repeats / machines,
        "gradient_bytes_per_gpu": gradient_bytes(job, gpus),
        "days": job.total_clips / rate / 86400 if job.total_clips else None,
        "gpus_per_machine": here,
    }


def step_seconds(job: Job, machine: Machine, gpus: int, clips: float, share: float | None = None) -> dict[str, float]:
    """Where the time of a step goes. Arithmetic and the launching of kernels go on side by side, so of these two only
    the longer one counts."""
    rate = machine.tflops[job.precision] * 1e12 * (share or share_of_peak(machine, job.precision, job.embed_dim))
    arithmetic = job.flops * clips * job.accumulate / rate
    launching = job.kernels * job.accumulate * LAUNCH_SECONDS * (LAUNCH_COMPILED if job.compiled else 1)
    seconds = {"arithmetic": arithmetic, "launching kernels": 0.0}
    if not machine.on_cpu and launching > arithmetic:
        seconds = {"arithmetic": 0.0, "launching kernels": launching}
    if not machine.on_cpu:  # a CPU's share has it: it was measured with the optimiser
        spread = gpus if job.stage else 1
        seconds["optimizer"] = 7 * FLOAT32 * job.parameters / spread / machine.memory_rate  # 4 read, 3 written
    network = traffic_seconds(machine, gpus, gradient_bytes(job, gpus))
    if job.stage == 3:
        network = max(0.0, network - BACKWARD * arithmetic)
    wire = 1 if job.precision == "fp32" else 1 / 2  # features travel in the precision of the step
    features = wire * _feature_bytes(job, clips * job.accumulate) * (gpus - 1)
    gather = traffic_seconds(machine, gpus, features)
    seconds["network"] = network + sum(max(0.0, gather - times * DECODERS * arithmetic) for times in (1, 2))
    return seconds


def gradient_bytes(job: Job, gpus: int) -> float:
    """What each device sends for gradients and weights of one step: a ring sends all of them twice, less one part;
    stage 3 gathers weights for both passes and sums gradients once."""
    return (3 if job.stage == 3 else 2) * (gpus - 1) / gpus * job.parameters * FLOAT32


def traffic_seconds(machine: Machine, gpus: int, bytes_per_gpu: float) -> float:
    """Inside of machines every device has a link; between them a ring leaves each machine once."""
    inside = bytes_per_gpu / machine.link if machine.gpus > 1 and gpus > 1 else 0.0
    return max(inside, bytes_per_gpu / machine.network if gpus > machine.gpus else 0.0)


def decode_seconds(job: Job) -> float:
    """Of one core, for one view."""
    return DECODE_PICTURES * job.pixels / PIXELS_DECODED + DECODE_SOUND * job.sound + DECODE_REST


def read_bytes(job: Job) -> float:
    return READ_PER_PIXEL * job.pixels + READ_SOUND * job.sound


def _feature_bytes(job: Job, clips: float) -> float:
    """Pooled features of both streams at all taps, in float32."""
    return 2 * job.taps * clips * job.embed_dim * FLOAT32


def _contrast(job: Job, gpus: int, clips: int) -> float:
    """Features of all ranks, as gathered and normalised, and a rank's rows of logits: masked, softmax, gradient. On one
    device the activations hold it already."""
    if gpus == 1:
        return 0.0
    logits = 2 * job.taps * clips * clips * gpus * FLOAT32
    return 2 * _feature_bytes(job, clips) * gpus + 3 * logits


def _problem(job: Job, gpus: int, largest: int) -> str | None:
    per_gpu, left = divmod(job.global_batch, gpus * job.accumulate)
    if left or per_gpu % job.repeats or not per_gpu:
        parts = f"{gpus} devices" + (f" x {job.accumulate} parts" if job.accumulate > 1 else "")
        parts += f" x {job.repeats} views of a clip" if job.repeats > 1 else ""
        return f"train.global_batch {job.global_batch} cannot be divided by {parts}"
    if per_gpu > largest:
        return f"{per_gpu} clips at a time do not fit; {largest} do"
    return None
