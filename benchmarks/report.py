"""The last line of every benchmark."""

import json
import os
import platform
import re
import subprocess
from pathlib import Path

import torch


def print_figures(name: str, figures: dict[str, float | str]) -> None:
    """Print one line of JSON with the figures, the commit and the machine."""
    machine = {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
    }
    print(json.dumps({"benchmark": name, "commit": commit(), "machine": machine, "figures": figures}))


def processor() -> str:
    """The name of the processor, with `amx` where it multiplies bf16 matrices in hardware."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return (found[1] if found else platform.machine()) + (" amx" if "amx_bf16" in text else "")


def commit() -> str:
    """The checkout's commit, with `+` where files differ from it; `unknown` outside a checkout."""
    folder = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, check=True)
        changed = subprocess.run(["git", "status", "--porcelain"], cwd=folder, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.decode().strip() + ("+" if changed.stdout.strip() else "")
