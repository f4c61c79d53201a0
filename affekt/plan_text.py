"""A plan as tables for people."""

from typing import Any

from rich.console import Console
from rich.table import Table

GIB = 2**30


def show(plan: dict[str, Any]) -> None:
    console = Console()
    machine, flops, total = plan["machine"], plan["flops_per_clip"], plan["parameters"]["total"]
    parts = ", ".join(f"{name} {n / 1e6:.1f}" for name, n in plan["parameters"].items() if name != "total")
    rate = machine["tflops"][plan["precision"]]
    console.print(f"{total / 1e6:.1f} M parameters: {parts}")
    console.print(
        f"{flops['forward'] / 1e9:.2f} GFLOP forward, {flops['training'] / 1e9:.2f} forward and backward per clip, "
        f"{flops['training_checkpointed'] / 1e9:.2f} with activation checkpointing"
    )
    console.print(
        f"{machine['name']}: {rate:.3g} TFLOP/s in {plan['precision']} products, of which a step should have "
        f"{plan['share_of_peak']:.0%}; {machine['gpus']} in a machine"
    )
    console.print(_memory(plan))
    console.print(_largest(plan))
    console.print(_scale(plan))
    loader = plan["loader"]
    console.print(
        f"Cores and MB/s are what loading takes in each machine: {1000 * loader['seconds_per_clip']:.1f} ms of a core "
        f"and {loader['bytes_per_clip'] / 1e3:.0f} kB a clip; there are {machine['cores']} and "
        f"{machine['disk'] / 1e6:.0f} MB/s"
    )
    for row in plan["at"]:
        if row["problem"]:
            console.print(f"{row['gpus']} GPUs: {row['problem']}")
    if plan["at"][0]["days"] is None:
        console.print("days: the shards are not here; --clips says how many clips an epoch has")


def _memory(plan: dict[str, Any]) -> Table:
    kept, checkpointed = (plan["activations"][name] / GIB for name in ("kept", "checkpointed"))
    stages, clips = plan["memory_by_stage"], plan["clips_at_a_time"]
    title = f"GiB of a device, {clips} clips at a time (activations {kept:.2f}, checkpointed {checkpointed:.2f})"
    table = Table("Part", *(f"ZeRO {z}" for z in stages), title=title)
    names = list(dict.fromkeys(name for parts in stages.values() for name in parts if name not in ("total", "host")))
    for name in (*names, "total", "host"):
        values = [parts.get(name, 0.0) / GIB for parts in stages.values()]
        if any(values):
            table.add_row(name, *(f"{value:.2f}" for value in values))
    return table


def _largest(plan: dict[str, Any]) -> Table:
    table = Table("Most clips at a time", *(f"ZeRO {z}" for z in plan["memory_by_stage"]))
    for name, by_stage in plan["largest_batch"].items():
        table.add_row(f"activations {name}", *map(str, by_stage.values()))
    return table


def _scale(plan: dict[str, Any]) -> Table:
    table = Table(title=f"A global batch of {plan['global_batch']}, ZeRO {plan['zero_stage']}")
    for column in ("GPUs", "clips", "ms/step", "clips/s", "efficiency", "days", "cores", "MB/s"):
        table.add_column(column, justify="right")
    table.add_column("held up by")
    for row in plan["at"]:
        days = f"{row['days']:.2f}" if row["days"] is not None else "?"
        table.add_row(
            str(row["gpus"]),
            f"{row['clips_per_gpu']:g}",
            f"{1000 * row['step_seconds']:.1f}",
            f"{row['clips_per_s']:.0f}" if row["clips_per_s"] >= 10 else f"{row['clips_per_s']:.2f}",
            f"{row['efficiency']:.0%}",
            days,
            f"{row['loader_cores_per_machine']:.1f}",
            f"{row['read_bytes_per_s_per_machine'] / 1e6:.0f}",
            row["bottleneck"],
        )
    return table
