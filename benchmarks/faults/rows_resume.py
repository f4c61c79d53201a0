"""Going on: after any order of saves and loads, at any step of an epoch, with what may change and what may not."""

import torch

from affekt.pretrain.checkpoint import read_checkpoint
from affekt.pretrain.saver import Saver
from benchmarks.faults import child
from benchmarks.faults.child import Fault
from benchmarks.faults.rig import Rig, differences, metrics
from benchmarks.faults.rows_damage import small_checkpoint

EVERY_STEP = "train.checkpoint_every=1"


def stop_after(rig: Rig, out, save: int, *settings: str) -> None:
    """Train until the `save`th save of this process is complete, and not further."""
    job = rig.start(out, *settings, "--resume", "auto", fault=Fault("before-pointer", save))
    job.wait()
    assert job.codes == [-9], job.told


def orders(rig: Rig, rounds: int) -> tuple[int, int, str]:
    """A12: save after load, save after save, load after save after load, and a save among the parts of steps, whose
    gradients are gathered over several passes: bit-equal."""
    straight = rig.straight()
    source = sorted((straight / "checkpoints").glob("step-*"))[-1]
    _, weights, moments = read_checkpoint(source)

    def same(folder) -> bool:
        _, other, more = read_checkpoint(next(folder.glob("checkpoints/step-*")))
        pairs = [(weights, other), (moments, more)]
        return all(a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in pairs)

    once, twice = rig.new(), rig.new()
    rig.call(child.save_again, source, once, 0).wait()
    load_save = same(once)
    rig.call(child.save_again, next(once.glob("checkpoints/step-*")), twice, 0).wait()
    load_save_load = same(twice)
    folder = rig.new()
    first = small_checkpoint(folder, 1)
    x = read_checkpoint(first)[1]["x"]
    with Saver(folder, keep_last=9) as saver:
        for _ in range(2):
            saver.save(2, {"weight/x": x}, {"shapes": {"x": [64, 64]}}, {})
    save_save = torch.equal(read_checkpoint(folder / "step-00000002")[1]["x"], x)
    parts = ("train.accumulate=2", "model.contrast_weight=0")
    out = rig.new()
    stop_after(rig, out, 2, *parts)
    rig.finish(out, *parts)
    results = [load_save, load_save_load, save_save, not differences(out, rig.straight(*parts))]
    return sum(results), 4, ""


def epochs(rig: Rig, rounds: int) -> tuple[int, int, str]:
    """A13: stopped twice within an epoch (of three steps), at its end, and one step before and after it."""
    passed, cases = 0, ((1, 1), (4, 1), (2,), (3,), (4,), (6,))
    straight = rig.straight(EVERY_STEP)
    for stops in cases:
        out = rig.new()
        for save in stops:
            stop_after(rig, out, save, EVERY_STEP)
        rig.finish(out, EVERY_STEP)
        passed += not differences(out, straight)
    return passed, len(cases), ""


def traces(rig: Rig, rounds: int) -> tuple[int, int, str]:
    """A14: learning rate, norm, losses and loss scale of 200 steps in fp16, half of them after a resume."""
    settings = ("train.steps=200", "train.checkpoint_every=50", "train.precision=fp16")
    out, straight = rig.new(), rig.straight(*settings)
    stop_after(rig, out, 2, *settings)
    rig.finish(out, *settings)
    rows = list(zip(metrics(out), metrics(straight), strict=True))
    equal = sum(a == b for a, b in rows)
    states = [read_checkpoint(folder / "checkpoints" / "step-00000200")[0] for folder in (out, straight)]
    same = all(states[0][key] == states[1][key] for key in ("lr", "loss_scale", "steps_since_overflow", "accounting"))
    return equal * same, len(rows), f"loss scale {states[0]['loss_scale']:g}; " + "; ".join(differences(out, straight))


EDITS = (
    "optim.base_lr=0.1",
    "optim.betas=[0.9, 0.99]",
    "optim.clip_grad=0",
    "train.global_batch=4",
    "train.seed=1",
    "train.steps=13",
    "train.precision=bf16",
    "model.depth=3",
    "model.mask_ratio_audio=0.5",
    "data.include={split: [train, dev]}",
)


def edits(rig: Rig, rounds: int) -> tuple[int, int, str]:
    """A15: a setting that decides the result and differs on resume is told with both values, and refused."""
    straight, passed = rig.straight(), 0
    for edit in EDITS:
        job = rig.start(straight, edit, "--resume", "auto")
        job.wait()
        key = edit.partition("=")[0]
        passed += job.codes == [1] and f"{key}" in job.told and " -> " in job.told and "--allow-change" in job.told
    return passed, len(EDITS), ""


def changing_weights(rig: Rig, rounds: int) -> tuple[int, int, str]:
    """A16: weights change as soon as a save returns; what is saved is what they were."""
    passed, folder = 0, rig.new()
    weights = torch.randn(1 << 20)
    kept = []
    with Saver(folder, keep_last=rounds) as saver:
        for step in range(rounds):
            kept.append(weights.clone())
            saver.save(step, {"weight/x": weights}, {"shapes": {"x": [1 << 20]}}, {})
            weights += 1  # at once, while the thread hashes and writes
    for step, expected in enumerate(kept):
        passed += torch.equal(read_checkpoint(folder / f"step-{step:08d}")[1]["x"], expected)
    return passed, rounds, ""


def workers(rig: Rig, rounds: int) -> tuple[int, int, str]:
    """B4: from no loader worker to three and back, at two steps each."""
    passed, straight = 0, rig.straight(EVERY_STEP)
    for before, after, save in ((0, 3, 2), (3, 0, 2), (0, 3, 5), (3, 0, 7)):
        out = rig.new()
        stop_after(rig, out, save, EVERY_STEP, f"data.workers={before}")
        rig.finish(out, EVERY_STEP, f"data.workers={after}")
        passed += not differences(out, straight)
    return passed, 4, ""


ROWS = {
    "A12": ("save and load in every order", orders, 4),
    "A13": ("resumed within, at and about the end of an epoch", epochs, 6),
    "A14": ("rate, norm, losses and loss scale after a resume", traces, 200),
    "A15": ("settings changed on resume", edits, 10),
    "A16": ("weights change while they are saved", changing_weights, 20),
    "B4": ("other numbers of loader workers", workers, 4),
}
