"""Machines that a run may be planned for, and what each constant is taken from.

Marks: [data sheet] of the maker; [measured] by a command in benchmarks/, with its result in benchmarks/README.md;
[computed] from a roofline of this model, never measured; [judged] an estimate, which a measurement should replace.
"""

from dataclasses import dataclass, replace

GIB = 2**30
TERA, GIGA = 1e12, 1e9

# What large matrix products reach of the peak that a data sheet states for 16 bits: 790 of 989 TFLOP/s on an H200, the
# rate that `benchmarks.step` counts shares of. [judged] for the other kinds.
REACHED = 790 / 989
# Share of the GEMM rate that a whole compiled bf16 step of 128 and more clips has on a GPU, by embed_dim: the goals of
# this project for one H200 (20, 28 and 35 %), which count the published FLOPs, 4 to 8 % more than are executed here.
# [computed]: the roofline of the same steps is 31, 40 and 49 %.
SHARE_GPU = {256: 0.185, 384: 0.265, 512: 0.335}
# The same for fp32 on a CPU, at 96 for nano [measured: benchmarks.plan and benchmarks.step].
SHARE_CPU = {96: 0.26, 256: 0.54, 384: 0.63, 512: 0.68}
# Autocast to bf16 on a CPU, of the bf16 GEMM rate, on a processor with AMX [measured: benchmarks.step].
SHARE_CPU_BF16 = {256: 0.14, 384: 0.15, 512: 0.15}
# Host time of one operator of an uncompiled step: a base step of 3,000 operators takes as long as the arithmetic of 64
# clips on an H200, below which it waits for the host. Compiled, a third of it. [computed]
LAUNCH_SECONDS, LAUNCH_COMPILED = 7e-6, 1 / 3
# CUDA's context, cuBLAS's workspaces and what the caching allocator cannot use of the rest. [judged]
RESERVED_GPU, FRAGMENTED_GPU = 1.0 * GIB, 0.05
# A Python with torch and DeepSpeed; gaps between blocks and scratch of kernels. [measured: benchmarks.plan]
RESERVED_CPU, FRAGMENTED_CPU = 0.6 * GIB, 0.1


@dataclass(frozen=True)
class Machine:
    """One kind of machine, of which a run takes as many as its number of GPUs asks for. Rates are per second.

    `tflops` are the rates that large dense products reach, by precision; `memory` is a GPU's, or without GPUs the
    machine's, and `gpus` are its processes then. `link` is what a GPU sends to others of its machine, `network` what a
    machine sends to others, `disk` what a machine reads, in bytes.
    """

    name: str
    gpus: int
    memory: float
    tflops: dict[str, float]
    memory_rate: float
    link: float
    network: float
    cores: int
    disk: float
    on_cpu: bool = False

    @property
    def usable(self) -> float:
        """Bytes of one device, or of a process without one, for weights, optimiser, activations and buffers."""
        if self.on_cpu:
            return (self.memory / self.gpus - RESERVED_CPU) * (1 - FRAGMENTED_CPU)
        return (self.memory - RESERVED_GPU) * (1 - FRAGMENTED_GPU)


def _gpu(name: str, gib: float, half: float, single: float, memory_rate: float, link: float, network: float) -> Machine:
    """Eight of them in a machine with 16 cores for each that reads 5 GB/s [judged]; `half` and `single` are TFLOP/s,
    `memory_rate` TB/s, `link` GB/s in one direction (80 % are reached [judged]), `network` Gbit/s of a machine."""
    tflops = {"bf16": half * REACHED, "fp16": half * REACHED, "fp32": single * REACHED}
    rates = memory_rate * TERA, link * GIGA * 0.8, network * GIGA / 8
    return Machine(name, 8, gib * GIB, tflops, *rates, cores=128, disk=5 * GIGA)


# [data sheet] of the GPU, and of the network of the maker's machine with eight of them (DGX), where there is one; dense
# rates without sparsity, fp32 on CUDA cores, since torch does not use TF32 unless asked to.
KNOWN = {
    machine.name: machine
    for machine in (
        _gpu("h200", 139, 989, 67, 4.8, 450, 3200),
        _gpu("h100", 79, 989, 67, 3.35, 450, 3200),
        _gpu("a100-80", 79, 312, 19.5, 2.04, 300, 1600),
        _gpu("a100-40", 39, 312, 19.5, 1.56, 300, 1600),
        _gpu("l40s", 44, 362, 91.6, 0.864, 32, 200),
        _gpu("rtx4090", 23.5, 165, 82.6, 1.01, 32, 25),
    )
}
# Processes of one machine without GPUs; gloo moves about 1 GB/s between them [judged].
CPU = Machine("cpu", 1, 8 * GIB, {}, 2e10, 1 * GIGA, 1.25 * GIGA, 8, 0.5 * GIGA, on_cpu=True)


def describe(kind: str, **changes: object) -> Machine:
    """A known machine with some values replaced, those that are not None. Raises KeyError for an unknown kind."""
    known = CPU if kind == "cpu" else KNOWN[kind]
    return replace(known, **{name: value for name, value in changes.items() if value is not None})


def share_of_peak(machine: Machine, precision: str, embed_dim: int) -> float:
    """The share of the GEMM rate to expect, between the widths that are known, and in proportion below them."""
    table = SHARE_GPU if not machine.on_cpu else SHARE_CPU if precision == "fp32" else SHARE_CPU_BF16
    widths = [0, *table]
    shares = [0.0, *table.values()]
    for (low, start), (high, end) in zip(zip(widths, shares), list(zip(widths, shares))[1:]):
        if embed_dim <= high:
            return start + (end - start) * (embed_dim - low) / (high - low)
    return shares[-1]
