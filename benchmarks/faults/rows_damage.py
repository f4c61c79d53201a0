"""Damaged and hostile checkpoints: refused by the name of the file, and nothing in them is run."""

import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import torch

from affekt.data.errors import CheckpointError
from affekt.pretrain import checkpoint
from affekt.pretrain.checkpoint import find_checkpoint, read_checkpoint
from affekt.pretrain.saver import Saver
from benchmarks.faults.rig import Rig

TENSORS = "rank-00000.safetensors"


def small_checkpoint(folder: Path, step: int = 1) -> Path:
    numbers = {"weight/x": torch.randn(64, 64), "exp_avg/x": torch.randn(64, 64), "weight/y": torch.randn(8)}
    with Saver(folder, keep_last=9) as saver:
        saver.save(step, numbers, {"shapes": {"x": [64, 64], "y": [8]}}, {"zero_stage": 0})
    return folder / f"step-{step:08d}"


def seal(path: Path) -> None:
    """Make a manifest that fits what its files hold now, as somebody would who means harm."""
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"]
    for name in manifest["files"]:
        file = path / name
        manifest["files"][name] = {"bytes": file.stat().st_size, "sha256": checkpoint.hash_file(file)}
    manifest["sha256"] = checkpoint._digest(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def refused(path: Path, told: str = "") -> bool:
    try:
        read_checkpoint(path)
    except CheckpointError as error:
        return told in str(error)
    return False


def damage(rig: Rig, rounds: int) -> tuple[int, int, str]:
    """A8: one bit, 4 KiB of zeros, a cut, a removal, the file of another step; in each file."""
    passed, cases = 0, 0
    for name in (TENSORS, "state.json", "manifest.json"):
        for kind in ("bit", "zeros", "cut", "delete", "swap"):
            folder = rig.new("damage")
            other, path = small_checkpoint(folder, 1), small_checkpoint(folder, 2)
            content = bytearray((path / name).read_bytes())
            at = rig.rng.randrange(len(content) - 1)
            if kind == "bit":
                content[at] ^= 1 << rig.rng.randrange(8)
            elif kind == "zeros":
                at = min(at, max(0, len(content) - 4096))
                content[at : at + 4096] = bytes(len(content[at : at + 4096]))
            elif kind == "cut":
                del content[at:]
            elif kind == "swap":
                content = (other / name).read_bytes()
            (path / name).write_bytes(content)
            if kind == "delete":
                (path / name).unlink()
            cases += 1
            passed += refused(path, "" if (name, kind) == ("manifest.json", "swap") else name)
    return passed, cases, ""


def pointer(rig: Rig, rounds: int) -> tuple[int, int, str]:
    """A9: `latest` missing, empty, to nothing, to a partial folder: the newest complete one, or an error."""
    passed = 0
    for content in (None, "", "step-00000077", ".partial-step-00000003"):
        folder = rig.new("pointer")
        small_checkpoint(folder, 1)
        newest = small_checkpoint(folder, 2)
        (folder / ".partial-step-00000003").mkdir()
        (folder / "latest").unlink()
        if content is not None:
            (folder / "latest").write_text(content)
        good = find_checkpoint(folder, "auto") == find_checkpoint(folder, "latest") == newest
        for path in folder.glob("step-*"):
            (path / "manifest.json").unlink()
        for resume in ("auto", "latest"):
            try:
                good &= find_checkpoint(folder, resume) is not None
            except CheckpointError:
                continue
        passed += good
    return passed, 4, ""


class _Payload:
    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def payloads(rig: Rig, rounds: int) -> tuple[int, int, str]:
    """E3: a pickle in each file and under names that other formats unpickle, sealed by a fitting manifest; names that
    lead out of the folder; a pointer that does."""
    passed, cases, canary = 0, 0, rig.new("canary")
    payload = pickle.dumps(_Payload(canary))
    foreign = (".metadata", "rng_state.pth", "training_args.bin", "mp_rank_00_model_states.pt", "optimizer.pt")
    for name in (TENSORS, "state.json", "manifest.json", *foreign):
        for whole in (True, False):
            path = small_checkpoint(rig.new("hostile"))
            known = (path / name).exists()
            (path / name).write_bytes(payload if whole or not known else (path / name).read_bytes() + payload)
            if not known and whole:  # listed by the manifest
                manifest = json.loads((path / "manifest.json").read_text())
                manifest["files"][name] = {}
                (path / "manifest.json").write_text(json.dumps(manifest))
            if name != "manifest.json":
                seal(path)
            stands_by = not known and not whole  # a file that nothing names: not opened at all
            cases, passed = cases + 1, passed + (stands_by or refused(path)) * (not canary.exists())
    for outside in ("../state.json", "/etc/hostname", "..", ""):
        path = small_checkpoint(rig.new("hostile"))
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["files"][outside] = manifest["files"]["state.json"]
        del manifest["sha256"]
        (path / "manifest.json").write_text(json.dumps({**manifest, "sha256": checkpoint._digest(manifest)}))
        cases, passed = cases + 1, passed + refused(path, "no file of a checkpoint")
    return passed, cases, ""


def safetensors_abuse(rig: Rig, rounds: int) -> tuple[int, int, str]:
    """E4: headers that lie, each sealed by a manifest that fits."""
    passed, failed = 0, []
    for name, change in ABUSES.items():
        path = small_checkpoint(rig.new("abuse"))
        content = (path / TENSORS).read_bytes()
        size = struct.unpack("<Q", content[:8])[0]
        header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
        changed = change(header, data)
        if not isinstance(changed, bytes):
            header, data = changed
            text = header if isinstance(header, bytes) else json.dumps(header).encode()
            changed = struct.pack("<Q", len(text)) + text + data
        (path / TENSORS).write_bytes(changed)
        seal(path)
        good = refused(path)
        passed += good
        failed += [] if good else [name]
        shutil.rmtree(path.parent)
    return passed, len(ABUSES), ", ".join(failed)


def _with(key: str, **values):
    return lambda header, data: ({**header, key: {**header[key], **values}}, data)


def _text(header: dict) -> bytes:
    return json.dumps(header).encode()


ABUSES = {
    "length beyond the file": lambda h, d: struct.pack("<Q", 2**62) + _text(h) + d,
    "100 MB header": lambda h, d: (_text(h)[:-1] + b" " * 100_000_001 + b"}", d),
    "overlap": _with("exp_avg/x", data_offsets=[0, 4 * 64 * 64]),
    "hole": lambda h, d: ({k: x for k, x in h.items() if k != "exp_avg/x"}, d),
    "duplicate key": lambda h, d: (_text(h)[:-1] + b', "weight/y": ' + _text(h["weight/x"]) + b"}", d),
    "trailing bytes": lambda h, d: (h, d + b"more"),
    "cut": lambda h, d: (h, d[:-4]),
    "other type": _with("weight/x", dtype="I32"),
    "unknown type": _with("weight/x", dtype="OBJECT"),
    "other shape": _with("weight/x", shape=[32, 128]),
    "not finite": lambda h, d: (h, struct.pack("<f", float("nan")) * (len(d) // 4)),
    "unknown name": lambda h, d: ({("weight/z" if k == "weight/y" else k): x for k, x in h.items()}, d),
}

ROWS = {
    "A8": ("damage in each file of a checkpoint", damage, 15),
    "A9": ("`latest` missing, empty, wrong", pointer, 4),
    "E3": ("payloads in checkpoints", payloads, 20),
    "E4": ("safetensors files that lie", safetensors_abuse, 12),
}
