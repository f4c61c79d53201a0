"""`affekt plan`: what a run will take on a machine, from the model and the constants of `affekt.launch.machines`."""

import json
import math
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from affekt.arguments import AsJson, Config, Overrides, find_experiment
from affekt.data.errors import SettingsError
from affekt.data.machine import available_cores

GIB, GIGA = 2**30, 1e9
KINDS = "h200, h100, a100-80, a100-40, l40s, rtx4090 or cpu"


def plan(
    config: Config,
    overrides: Overrides = None,
    machine: Annotated[str | None, typer.Option(help=f"Kind of machine: {KINDS}; default: this one.")] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs (or processes on CPUs) of a machine.")] = None,
    memory: Annotated[float | None, typer.Option(help="GiB of a GPU, or of a machine without GPUs.")] = None,
    tflops: Annotated[float | None, typer.Option(help="TFLOP/s that large products reach on a device.")] = None,
    share: Annotated[float | None, typer.Option(help="Share of them that a whole step has, if measured.")] = None,
    memory_rate: Annotated[float | None, typer.Option(help="TB/s of a GPU's memory.")] = None,
    link: Annotated[float | None, typer.Option(help="GB/s from a GPU to the others of its machine.")] = None,
    network: Annotated[float | None, typer.Option(help="Gbit/s from a machine to others.")] = None,
    cores: Annotated[int | None, typer.Option(min=1, help="CPU cores of a machine for loading.")] = None,
    disk: Annotated[float | None, typer.Option(help="MB/s that a machine reads, from disk or a remote store.")] = None,
    zero_stage: Annotated[int | None, typer.Option(min=0, max=3, help="Default: the settings'.")] = None,
    clips: Annotated[int | None, typer.Option(min=1, help="Clips of an epoch; default: counted in the shards.")] = None,
    at: Annotated[list[int] | None, typer.Option(min=1, help="Numbers of GPUs to plan; default: 1, 8, 64.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a run will take: memory by part, the largest batch, clips per second, days, and what holds it up."""
    from affekt.pretrain.settings import PretrainSettings

    settings = PretrainSettings.read(find_experiment(config), overrides or [])
    _check(memory=memory, tflops=tflops, memory_rate=memory_rate, link=link, network=network, disk=disk)
    _check(1.0, share=share)
    changes = {
        "gpus": gpus,
        "memory": memory and memory * GIB,
        "memory_rate": memory_rate and memory_rate * 1e12,
        "link": link and link * GIGA,
        "network": network and network * GIGA / 8,
        "cores": cores,
        "disk": disk and disk * 1e6,
    }
    place = _machine(machine, tflops, changes)
    result = make_plan(settings, place, at or [1, 8, 64], stage=zero_stage, share=share, clips=clips)
    if as_json:
        print(json.dumps(result))
    else:
        from affekt.plan_text import show

        show(result)


def _check(most: float = math.inf, **rates: float | None) -> None:
    for name, value in rates.items():
        if value is not None and not (0 < value <= most and value < math.inf):
            limits = f"above 0 and at most {most:g}" if most < math.inf else "above 0"
            raise SettingsError(f"--{name.replace('_', '-')} {value:g}: give a number {limits}")


def make_plan(
    settings: Any,
    machine: Any,
    at: list[int],
    *,
    stage: int | None = None,
    share: float | None = None,
    clips: int | None = None,
) -> dict[str, Any]:
    """The plan as one object: sizes in bytes, times in seconds, rates per second."""
    from affekt.launch import planner
    from affekt.launch.machines import share_of_peak
    from affekt.pretrain.footprint import flops_per_clip, parameters_by_part

    parameters = parameters_by_part(settings.model)
    keeping = make_job(settings, machine, stage=stage, clips=clips, checkpointing=False)
    saving = make_job(settings, machine, stage=stage, clips=clips, checkpointing=True)
    job = saving if settings.train.activation_checkpointing else keeping
    forward, training = flops_per_clip(settings.model)
    rows = [planner.at_scale(job, machine, gpus, share) for gpus in sorted(set(at))]
    here = machine.gpus
    own = max(1, settings.train.global_batch // here // job.accumulate)
    return {
        "machine": asdict(machine),
        "precision": job.precision,
        "share_of_peak": share or share_of_peak(machine, job.precision, job.embed_dim),
        "zero_stage": job.stage,
        "parameters": {**parameters, "total": sum(parameters.values())},
        "flops_per_clip": {"forward": forward, "training": training, "training_checkpointed": saving.flops},
        "clips_at_a_time": own,
        "activations": {"kept": keeping.step_memory(own)[1], "checkpointed": saving.step_memory(own)[1]},
        "memory_by_stage": {z: planner.memory_by_part(replace(job, stage=z), here, own) for z in range(4)},
        "largest_batch": {
            name: {z: planner.largest_batch(replace(which, stage=z), machine, here) for z in range(4)}
            for name, which in (("kept", keeping), ("checkpointed", saving))
        },
        "loader": {
            "seconds_per_clip": planner.decode_seconds(job) / job.repeats,
            "bytes_per_clip": planner.read_bytes(job) / job.repeats,
        },
        "global_batch": job.global_batch,
        "at": rows,
    }


def make_job(settings: Any, machine: Any, *, stage: int | None, clips: int | None, checkpointing: bool) -> Any:
    """The run in numbers, taken from the model itself."""
    from affekt.launch.planner import Job
    from affekt.pretrain.footprint import encoding_flops_per_clip, flops_per_clip, parameters_by_part

    s, train = settings.model, settings.train
    precision = train.precision if train.precision != "auto" else "fp32" if machine.on_cpu else "bf16"
    if precision not in machine.tflops:
        raise SettingsError(
            f"train.precision {precision}: what products reach on this machine is unknown; add --tflops"
        )
    flops = flops_per_clip(s, checkpointing)[1]
    if train.accumulate > 1 and s.streams == "both" and s.contrast_weight:
        flops += encoding_flops_per_clip(s)
    how = {"bf16": precision != "fp32", "on_cpu": machine.on_cpu, "checkpointing": checkpointing}
    parameters = sum(parameters_by_part(s).values())
    memory = _StepMemory(s, how, 4 * parameters)
    return Job(
        parameters=parameters,
        flops=flops,
        kernels=memory.low.kernels,
        embed_dim=s.embed_dim,
        taps=len(s.taps) if s.streams == "both" else 0,
        pixels=s.num_frames * s.img_size**2 if s.streams != "audio" else 0,
        sound=s.streams != "video",
        global_batch=train.global_batch,
        repeats=settings.data.repeats,
        precision=precision,
        compiled=not machine.on_cpu if train.compile is None else train.compile,
        stage=stage if stage is not None else train.zero_stage,
        offload=train.offload,
        accumulate=train.accumulate,
        total_clips=_total_clips(settings, clips),
        step_memory=memory,
    )


class _StepMemory:
    """The memory of a step as a function of the clips at a time, from the model on the line through 64 and 128 of them:
    only the logits of the contrast are not linear. With few clips the most is alive at the end, when all gradients are.
    """

    def __init__(self, settings: Any, how: dict[str, bool], gradients: int):
        from affekt.pretrain.footprint import step_memory

        self.gradients = gradients
        self.low, self.high = (step_memory(settings, clips, **how) for clips in (64, 128))

    def __call__(self, clips: int) -> tuple[float, float, float]:
        pairs = [(getattr(self.low, name), getattr(self.high, name)) for name in ("inputs", "activations", "peak")]
        inputs, activations, peak = (low + (high - low) * (clips - 64) / 64 for low, high in pairs)
        return inputs, activations, max(peak, inputs + self.gradients)


def _machine(kind: str | None, tflops: float | None, changes: dict[str, Any]) -> Any:
    from affekt.launch.machines import CPU, KNOWN, describe

    if kind is None:
        kind = _kind_here()
    if kind not in (*KNOWN, CPU.name):
        raise SettingsError(
            f"--machine {kind}: not known; known are {KINDS}. Others by --tflops and --memory of a near one"
        )
    if kind == CPU.name:
        here = {"cores": available_cores(), "memory": _memory_here()}
        changes = here | {name: value for name, value in changes.items() if value is not None}
    machine = describe(kind, **changes)
    if tflops is not None:
        return replace(machine, tflops=dict.fromkeys(("fp32", "bf16", "fp16"), tflops))
    if machine.on_cpu:
        from affekt.pretrain.engine import choose_matmul_precision
        from affekt.pretrain.footprint import product_rate

        choose_matmul_precision()
        rates = {name: product_rate(name) / 1e12 / machine.gpus for name in ("fp32", "bf16")}
        return replace(machine, tflops=rates)
    return machine


def _kind_here() -> str:
    import torch

    from affekt.launch.machines import KNOWN

    if not torch.cuda.is_available():
        return "cpu"
    name = torch.cuda.get_device_name().lower()
    memory = torch.cuda.get_device_properties(0).total_memory
    for kind in sorted(KNOWN, key=lambda kind: abs(KNOWN[kind].memory - memory)):
        if kind.partition("-")[0].replace("rtx", "") in name:
            return kind
    raise SettingsError(f"{name}: not known; name a near one by --machine ({KINDS}), with its --tflops and --memory")


def _memory_here() -> float:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _total_clips(settings: Any, clips: int | None) -> float | None:
    """Views of clips in the whole run; None where nothing says how long an epoch is."""
    train, data = settings.train, settings.data
    if train.steps:
        return train.steps * train.global_batch
    clips = clips or data.epoch_clips or _clips_in_shards(settings)
    return train.epochs * clips * data.repeats if clips else None


def _clips_in_shards(settings: Any) -> int | None:
    if not all(Path(part.shards, "index.safetensors").is_file() for part in settings.data.parts):
        return None
    from affekt.pretrain.mixture import open_corpora

    return sum(len(corpus.positions) for corpus in open_corpora(settings))
