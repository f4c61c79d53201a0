"""Other numbers of processes and other ZeRO stages: the same order, the same losses, the same export."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from affekt.data.errors import AffektError
from affekt.pretrain.checkpoint import complete_checkpoints
from affekt.pretrain.export import export, load_encoder
from benchmarks.faults import child
from benchmarks.faults.child import Fault
from benchmarks.faults.rig import Rig, ledger, metrics

STEPS = 50
LARGEST_DIFFERENCE = 1e-5  # of a loss, between runs of other numbers of processes
FEATURES = """
import sys, torch, affekt
from safetensors.torch import save_file
model = affekt.load(sys.argv[1])
assert "deepspeed" not in sys.modules
save_file({name: x.contiguous() for name, x in model.encoder.state_dict().items()}, sys.argv[2])
"""


@cache  # B2 and B3 look at the same runs
def other_worlds(rig: Rig, rounds: int, steps: int = STEPS) -> list[tuple[bool, float]]:
    """2 processes, then 1, then 4, each at another ZeRO stage and killed at a random step, against one process: whether
    the ledgers are equal, and the largest difference of a loss. Drop path draws per process, so it is off."""
    common = (f"train.steps={steps}", "model.drop_path=0", "train.checkpoint_every=1")
    straight, results = rig.straight(*common), []
    for _ in range(rounds):
        out, first, second = rig.new(), *(rig.rng.randrange(1, steps // 3) for _ in range(2))
        for save, ranks, stage in ((first, 2, 1), (second, 1, 0)):
            resume = (f"train.zero_stage={stage}", "--resume", "auto")
            rig.start(out, *common, *resume, ranks=ranks, fault=Fault("before-pointer", save)).wait()
        rig.finish(out, *common, "train.zero_stage=2", ranks=4)
        losses = zip(metrics(out), metrics(straight), strict=True)
        results.append((ledger(out) == ledger(straight), max(abs(a["loss"] - b["loss"]) for a, b in losses)))
    return results


def same_order(rig: Rig, rounds: int) -> tuple[int, int, str]:
    """B2: the ledger of which clip stood where."""
    results = other_worlds(rig, rounds)
    return sum(equal for equal, _ in results), rounds, ""


def same_losses(rig: Rig, rounds: int) -> tuple[int, int, str]:
    """B3: the loss of every step."""
    results = other_worlds(rig, rounds)
    worst = max(difference for _, difference in results)
    good = sum(difference <= LARGEST_DIFFERENCE for _, difference in results)
    return good, rounds, f"largest difference of a loss {worst:.1e}"


def finished_export(rig: Rig) -> tuple[Path, Path]:
    run, out = rig.straight(), rig.folder / "export"
    return run, export(run, out)


def fresh_process(rig: Rig, rounds: int) -> tuple[int, int, str]:
    """G1: what a process without DeepSpeed loads is what the trainer had."""
    run, exported = finished_export(rig)
    target = rig.new("features")
    subprocess.run([sys.executable, "-c", FEATURES, str(exported), str(target)], check=True)
    trained, loaded = _weights(run), load_file(target)
    shared = [name for name in loaded if name in trained]
    equal = shared and all(torch.equal(loaded[name], trained[name]) for name in shared)
    return int(bool(equal)), 1, f"{len(shared)} tensors"


def _weights(run: Path) -> dict[str, torch.Tensor]:
    from affekt.pretrain.checkpoint import read_checkpoint

    return read_checkpoint(complete_checkpoints(run / "checkpoints")[-1])[1]


def every_stage(rig: Rig, rounds: int) -> tuple[int, int, str]:
    """G2: the state of one checkpoint, saved at each ZeRO stage by 1, 2 and 4 ranks, exports to the same bytes."""
    run, exported = finished_export(rig)
    source, passed, cases = complete_checkpoints(run / "checkpoints")[-1], 0, 0
    for ranks in (2, 1, 4)[: rounds // 4]:
        for stage in (0, 1, 2, 3):
            other = rig.new("stage")
            rig.call(child.save_again, source, other, stage, ranks=ranks).wait()
            for name in ("settings.yaml", "pretrain_data.json"):
                other.mkdir(exist_ok=True)
                (other / name).write_bytes((run / name).read_bytes())
            again, cases = export(other, rig.new("export")), cases + 1
            passed += (again / "model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()
    return passed, cases, ""


def wrong_exports(rig: Rig, rounds: int) -> tuple[int, int, str]:
    """G3: another architecture, lost and foreign tensors, numbers that are none, another format."""
    _, good = finished_export(rig)
    passed, weights, config = 0, load_file(good / "model.safetensors"), json.loads((good / "config.json").read_text())
    first = next(iter(weights))
    changes = [
        (weights, {**config, "model": {**config["model"], "depth": 1, "taps": [1]}}),
        ({name: x for name, x in weights.items() if name != first}, config),
        ({**weights, "head.weight": torch.zeros(2)}, config),
        ({**weights, first: torch.full_like(weights[first], float("nan"))}, config),
        (weights, {**config, "version": "9.0"}),
    ]
    for tensors, settings in changes:
        folder = rig.new("wrong")
        folder.mkdir()
        for name in ("preprocess.json", "pretrain_data.json"):
            (folder / name).write_bytes((good / name).read_bytes())
        (folder / "config.json").write_text(json.dumps(settings))
        save_file(tensors, folder / "model.safetensors")
        try:
            load_encoder(folder)
        except AffektError as error:
            passed += str(folder) in str(error)
    return passed, len(changes), ""


ROWS = {
    "B2": ("2, 1 and 4 processes: the order of clips", same_order, 20),
    "B3": ("2, 1 and 4 processes: the losses", same_losses, 20),
    "G1": ("an export in a fresh process without DeepSpeed", fresh_process, 1),
    "G2": ("ZeRO 0 to 3 by 1, 2 and 4 ranks: one export", every_stage, 12),
    "G3": ("exports that do not fit", wrong_exports, 5),
}
