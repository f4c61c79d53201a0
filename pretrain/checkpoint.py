"""Checkpoints: a folder built under a temporary name, hashed and committed by one rename; then pointer, then purge.

`step-00001200/` holds `model.safetensors`, `optimizer.safetensors`, `state.json` and `manifest.json` with the format
version and a SHA-256 of each file. Nothing in it is ever unpickled. The same major version reads; another one is
refused with both versions named.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from affekt.data.errors import CheckpointError, DataError
from affekt.data.files import check_version, flush, hash_file, write_text

FORMAT, VERSION = "affekt-checkpoint", "1.0"


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], keep_last: int
) -> Path:
    """Write `folder/step-XXXXXXXX` and point `folder/latest` at it; keep the newest `keep_last`. Rank 0 calls it.

    Raises CheckpointError when the disk refuses; checkpoints that stood before stay as they were.
    """
    final = folder / f"step-{step:08d}"
    partial = folder / f".partial-{final.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".partial-*"):
            shutil.rmtree(leftover)
        partial.mkdir()
        save_file(
            {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}, partial / "model.safetensors"
        )
        save_file(_optimizer_tensors(model, optimizer), partial / "optimizer.safetensors")
        (partial / "state.json").write_text(json.dumps({"step": step, **state}, indent=1), encoding="utf-8")
        files = {path.name: hash_file(path) for path in sorted(partial.iterdir())}
        manifest = {"format": FORMAT, "version": VERSION, "step": step, "files": files}
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for path in (*partial.iterdir(), partial):
            flush(path)
        if final.exists():  # the same step once more, after a resume from an older checkpoint
            os.replace(final, folder / f".partial-old-{final.name}")
        os.replace(partial, final)
        shutil.rmtree(folder / f".partial-old-{final.name}", ignore_errors=True)
        flush(folder)
        write_text(folder / "latest", final.name)
    except (OSError, DataError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"{final}: cannot be written: {error}; older checkpoints are untouched") from error
    for old in complete_checkpoints(folder)[:-keep_last]:
        shutil.rmtree(old)
    return final


def find_checkpoint(folder: Path, resume: str) -> Path | None:
    """The checkpoint that `resume` names: `auto` (the newest, None when there is none), `latest`, or a path."""
    if resume not in ("auto", "latest"):
        path = Path(resume)
        if not (path / "manifest.json").is_file():
            raise CheckpointError(f"{path}: not a checkpoint folder (no manifest.json); see {folder}")
        return path
    found = complete_checkpoints(folder)
    pointer = folder / "latest"
    if found:
        if not pointer.is_file() or pointer.read_text(encoding="utf-8").strip() != found[-1].name:
            print(
                f"note: {pointer} does not name the newest complete checkpoint; using {found[-1].name}", file=sys.stderr
            )
        return found[-1]
    if resume == "latest" or (folder.is_dir() and any(folder.glob("step-*"))):
        raise CheckpointError(f"{folder}: no complete checkpoint to resume from; start anew in another folder")
    return None


def complete_checkpoints(folder: Path) -> list[Path]:
    """All committed checkpoints, oldest first."""
    return sorted(path.parent for path in folder.glob("step-*/manifest.json"))


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Verify every file's hash, then read: (state, model tensors, optimizer tensors)."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        check_version(manifest, FORMAT, VERSION, path, CheckpointError)
        for name, digest in manifest["files"].items():
            if hash_file(path / name) != digest:
                raise CheckpointError(f"{path / name}: damaged (its hash differs from the manifest); use another step")
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        return state, load_file(path / "model.safetensors"), load_file(path / "optimizer.safetensors")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path}: not a readable checkpoint: {error}") from error


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Put saved moments back by parameter name; a parameter without any starts afresh. Raises CheckpointError when
    some of a parameter's moments are missing or have another shape."""
    for name, parameter in model.named_parameters():
        saved = {key: tensors.get(f"{name}:{key}") for key in ("exp_avg", "exp_avg_sq", "step")}
        if all(value is None for value in saved.values()):
            continue  # saved before its first gradient
        if any(value is None for value in saved.values()) or saved["exp_avg"].shape != parameter.shape:
            raise CheckpointError(f"the optimiser state of `{name}` is missing or has another shape")
        optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in saved.items()}


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}:{key}": value.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
