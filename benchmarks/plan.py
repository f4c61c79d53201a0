"""Whether `affekt plan` tells the truth on this machine's CPU: `python -m benchmarks.plan --size nano tiny base`.

For each size a child process makes some real steps. Its peak memory above that of the same Python before the model is
compared with the plan's, its clips per second with what the plan expects from the rate of large products, which is
measured in turns with the steps.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from affekt.data.machine import keep_freed_memory
from affekt.launch.machines import CPU, share_of_peak
from affekt.pretrain.engine import choose_matmul_precision
from affekt.pretrain.footprint import flops_per_clip, parameters_by_part, product_rate, step_memory
from affekt.pretrain.registry import model_settings
from benchmarks.report import print_figures
from benchmarks.step import OurStep, timed

WEIGHTS_AND_MOMENTS = 3 * 4  # bytes of a parameter: itself and AdamW's two moments, in float32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=["nano", "tiny", "small", "base"], default=["nano", "tiny"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child", action="store_true", help="measure in this process, and print a line of JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.child:
        print(json.dumps(measure(arguments.size[0], arguments.batch, arguments.rounds)))
        return
    columns = ("MiB planned", "measured", "planned / measured", "clips/s planned", "measured", "share of products")
    table, figures = Table("Size", *columns), {"batch": arguments.batch, "threads": arguments.threads}
    for size in arguments.size:
        result = compare(size, arguments)
        figures |= {f"{size}_{name}": value for name, value in result.items()}
        table.add_row(size, *(f"{value:.4g}" for value in result.values()))
    Console().print(table)
    print_figures("plan", figures)


def compare(size: str, arguments: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.plan", "--child", "--size", size, "--batch", str(arguments.batch)]
    command += ["--rounds", str(arguments.rounds), "--threads", str(arguments.threads)]
    child = subprocess.run(command, capture_output=True, text=True)
    if child.returncode:
        raise SystemExit(f"{size}: {child.stderr}")
    found, planned = json.loads(child.stdout.splitlines()[-1]), planned_bytes(size, arguments.batch)
    s = model_settings(f"hicmae_{size}")
    reached = found["products"] / flops_per_clip(s)[1]  # clips per second, were a step nothing but large products
    expected, rate = reached * share_of_peak(CPU, "fp32", s.embed_dim), arguments.batch / found["seconds"]
    return {
        "planned_mib": round(planned / 2**20, 1),
        "measured_mib": round(found["bytes"] / 2**20, 1),
        "memory_ratio": round(planned / found["bytes"], 3),
        "planned_clips_per_s": round(expected, 3),
        "measured_clips_per_s": round(rate, 3),
        "share": round(rate / reached, 4),
    }


def planned_bytes(size: str, batch: int) -> int:
    """Of weights, moments and a step, without the Python around them."""
    s = model_settings(f"hicmae_{size}")
    return WEIGHTS_AND_MOMENTS * sum(parameters_by_part(s).values()) + step_memory(s, batch, on_cpu=True).peak


def measure(size: str, batch: int, rounds: int) -> dict[str, float]:
    """Bytes that steps add to the peak of this process, median seconds of one, and FLOP/s of large products."""
    keep_freed_memory()
    choose_matmul_precision()
    OurStep("nano", "fp32", 1, torch.device("cpu"), compiled=False)()  # loads libraries, which are not the model
    before = resident("VmRSS")
    step = OurStep(size, "fp32", batch, torch.device("cpu"), compiled=False)
    for _ in range(3):
        step()
    peak = resident("VmHWM")
    seconds, products = [], []
    for _ in range(rounds):
        seconds.append(timed(step))
        products.append(product_rate("fp32", rounds=1))
    return {"bytes": peak - before, "seconds": median(seconds), "products": median(products)}


def resident(field: str) -> int:
    """Bytes of this process now (VmRSS) or at most so far (VmHWM; ru_maxrss would begin with the parent's)."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024


if __name__ == "__main__":
    main()
