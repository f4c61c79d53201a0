"""Checkpoints: a folder built under a temporary name, hashed and committed by one rename; then pointer, then purge.

`step-00001200/` holds a safetensors file of each rank with its pieces of weights and moments (`pretrain.pieces`), in
float32 and by the parameters' names, `state.json` with all that is not a tensor, and `manifest.json` with the format
version, the step, how many ranks wrote, at which ZeRO stage, and size and SHA-256 of each file. It has a SHA-256 of its
own. Nothing in it is ever unpickled. The same major version reads, and so does 1.x; another one is refused with both
versions named.
"""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from affekt.data.errors import CheckpointError
from affekt.data.files import check_version, flush, hash_file, write_text
from affekt.pretrain.writing import point

FORMAT, VERSION = "affekt-checkpoint", "2.0"
PARTIAL = ".partial-"  # a folder of such a name is no checkpoint: on its way in, or on its way out
KINDS = ("weight", "exp_avg", "exp_avg_sq", "step", "ema")  # of tensors; `ema` of fine-tunings alone
STATE, MANIFEST, POINTER = "state.json", "manifest.json", "latest"


def commit(partial: Path, final: Path, about: dict[str, Any], files: dict[str, dict[str, Any]]) -> None:
    """Make the written folder `partial` the checkpoint `final`, and point `latest` at it. Rank 0 calls it when all
    ranks have their files on the disk. Raises OSError; called again it goes on where it failed."""
    if partial.exists():
        for name, file in files.items():
            there = (partial / name).stat().st_size if (partial / name).exists() else None
            if there != file["bytes"]:
                raise OSError(
                    f"{name} has {there} bytes here, not {file['bytes']}: all machines must share this folder"
                )
        manifest = {"format": FORMAT, "version": VERSION, **about, "files": dict(sorted(files.items()))}
        sealed = {**manifest, "sha256": _digest(manifest)}
        (partial / MANIFEST).write_text(json.dumps(sealed, indent=1), encoding="utf-8")
        flush(partial / MANIFEST)
        flush(partial)
        point("before-rename")
        if final.exists():  # the same step once more, after its run was resumed from an older one elsewhere
            shutil.rmtree(_put_aside(final))
        os.replace(partial, final)
        point("after-rename")
    flush(final.parent)
    point("before-pointer")
    write_text(final.parent / POINTER, final.name)


def purge(folder: Path, keep_last: int, keep_every: int | None) -> None:
    """Remove the oldest checkpoints but the newest `keep_last` and those of steps that `keep_every` divides. One that
    is being removed never looks like a complete one, however far that got. Raises OSError."""
    for old in complete_checkpoints(folder)[:-keep_last]:
        if not keep_every or int(old.name.removeprefix("step-")) % keep_every:
            aside = _put_aside(old)
            point("during-purge")
            shutil.rmtree(aside)


def _put_aside(checkpoint: Path) -> Path:
    aside = checkpoint.with_name(f"{PARTIAL}old-{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(checkpoint, aside)
    return aside


def remove_partials(folder: Path) -> None:
    """Remove what saves and purges that were killed left behind. Only for the one process that trains here."""
    for leftover in folder.glob(f"{PARTIAL}*"):
        shutil.rmtree(leftover)


def find_checkpoint(folder: Path, resume: str) -> Path | None:
    """The checkpoint that `resume` names: `auto` (the newest, None when there is none), `latest`, or a path."""
    if resume not in ("auto", "latest"):
        path = Path(resume)
        if not (path / MANIFEST).is_file():
            raise CheckpointError(f"{path}: not a checkpoint folder (no {MANIFEST}); see {folder}")
        return path
    found, pointer = complete_checkpoints(folder), folder / POINTER
    if found:
        named = pointer.read_bytes()[:100].decode(errors="replace").strip() if pointer.is_file() else ""
        if named != found[-1].name:
            print(
                f"note: {pointer} does not name the newest complete checkpoint; using {found[-1].name}", file=sys.stderr
            )
        return found[-1]
    if resume == "latest" or (folder.is_dir() and (pointer.exists() or any(folder.glob("step-*")))):
        raise CheckpointError(f"{folder}: no complete checkpoint to resume from; start anew in another folder")
    return None


def complete_checkpoints(folder: Path) -> list[Path]:
    """All committed checkpoints, oldest first. A copy that somebody gave another name is none of the run's."""
    found = sorted(path.parent for path in folder.glob(f"step-*/{MANIFEST}"))
    return [path for path in found if path.name.removeprefix("step-").isdecimal()]


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """Verify every file's size and hash, then read: (state, weights by name, all else by `kind/name`).

    Raises CheckpointError naming the file that is missing, damaged or not what its names and shapes say.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / MANIFEST}: missing or damaged: {error}; use another step") from error
    try:
        if isinstance(manifest, dict) and str(manifest.get("version", "")).startswith("1."):
            return _read_version_1(path, manifest)
        check_version(manifest, FORMAT, VERSION, path, CheckpointError)
        if manifest.pop("sha256", None) != _digest(manifest):
            raise CheckpointError(f"{path / MANIFEST}: damaged (its hash differs from its content); use another step")
        for name, file in manifest["files"].items():
            _verify(path, name, file["sha256"], file["bytes"])
        if STATE not in manifest["files"]:
            raise CheckpointError(f"{path / MANIFEST}: does not list {STATE}")
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        tensors = _join(path, [name for name in manifest["files"] if name != STATE], state["shapes"])
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a readable checkpoint: {error!r}") from error
    weights = {key.removeprefix("weight/"): x for key, x in tensors.items() if key.startswith("weight/")}
    return state, weights, {key: x for key, x in tensors.items() if not key.startswith("weight/")}


def _verify(path: Path, name: str, digest: str, size: int | None = None) -> None:
    """Before any parser sees a byte of it."""
    file = path / name
    if name in ("", ".", "..", MANIFEST) or "/" in name or "\\" in name or file.is_symlink():
        raise CheckpointError(f"{path / MANIFEST}: lists {name!r}, which is no file of a checkpoint")
    if not file.is_file():
        raise CheckpointError(f"{file}: missing, though the manifest lists it; use another step")
    if size not in (None, file.stat().st_size) or hash_file(file) != digest:
        raise CheckpointError(f"{file}: damaged (its size or hash differs from the manifest); use another step")


def _join(path: Path, names: list[str], shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """Whole tensors by `kind/name`, from the pieces in the files."""
    tensors: dict[str, Tensor] = {}
    places: dict[str, list[tuple[int, int]]] = {}
    for name in names:
        with safe_open(path / name, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (no dictionary, it has no other iterator)
                whole, at, start = key.partition("@")
                kind, _, parameter = whole.partition("/")
                piece = file.get_tensor(key)
                shape = torch.Size([]) if kind == "step" else torch.Size(shapes[parameter])
                begin, end = int(start or 0), int(start or 0) + piece.numel()
                fits = end <= shape.numel() if at else piece.shape == shape
                if piece.dtype != torch.float32 or not fits or kind not in KINDS:
                    raise CheckpointError(f"{path / name}: `{key}` is {piece.dtype} {list(piece.shape)}, not a part of "
                                          f"float32 {list(shape)}")  # fmt: skip
                if not piece.isfinite().all():
                    raise CheckpointError(f"{path / name}: `{key}` has numbers that are not finite")
                tensors.setdefault(whole, torch.empty(shape)).view(-1)[begin:end] = piece.view(-1)
                places.setdefault(whole, []).append((begin, end))
    partly = [key for key, tensor in tensors.items() if not _side_by_side(places[key], tensor.numel())]
    partly += [f"weight/{parameter}" for parameter in shapes if f"weight/{parameter}" not in tensors]
    if partly:
        raise CheckpointError(f"{path}: pieces are missing or there twice, of {', '.join(sorted(partly)[:5])}")
    return tensors


def _side_by_side(places: list[tuple[int, int]], count: int) -> bool:
    """Whether pieces make `count` numbers whole, none of them there twice."""
    begins, ends = zip(*sorted(places), strict=True)
    return begins == (0, *ends[:-1]) and ends[-1] == count


def _read_version_1(
    path: Path, manifest: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """One rank wrote `model.safetensors` and `optimizer.safetensors`, whole tensors by `name` and by `name:kind`."""
    check_version(manifest, FORMAT, "1.0", path, CheckpointError)
    for name, digest in manifest["files"].items():
        _verify(path, name, digest)
    if not {STATE, "model.safetensors", "optimizer.safetensors"} <= manifest["files"].keys():
        raise CheckpointError(f"{path / MANIFEST}: does not list all files of a checkpoint of version 1")
    with safe_open(path / "model.safetensors", "pt") as file:
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    with safe_open(path / "optimizer.safetensors", "pt") as file:
        split = {key: key.rpartition(":") for key in file.keys()}  # noqa: SIM118
        moments = {f"{kind}/{name}": file.get_tensor(key) for key, (name, _, kind) in split.items()}
    return json.loads((path / STATE).read_text(encoding="utf-8")), weights, moments


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
