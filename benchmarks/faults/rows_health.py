"""Numbers that are not finite, spikes, odd batches, flipped bits."""

import json
import random
from collections import Counter
from pathlib import Path

import torch

from benchmarks.faults import sick
from benchmarks.faults.rig import Rig, loadable, metrics

SEEDS = 5


def not_finite(rig: Rig, rounds: int) -> tuple[int, int, str]:
    """F1: rank 1 of two meets NaN or inf at every other step. Both skip just these steps, with no bit of weights and
    moments changed, and their replicas are the same after every step; too many in a row end both with exit code 4."""
    bad = {2 * n + 1: sick.KINDS[n % len(sick.KINDS)] for n in range(rounds)}
    settings = [f"train.steps={2 * rounds + 1}", "train.replicas_every=1", "train.checkpoint_every=1000"]
    out = rig.new()
    job = rig.call(sick.poisoned, bad, 1, str(out), str(rig.config), *settings, ranks=2)
    job.wait()
    if job.codes != [0, 0]:
        return 0, rounds, f"exit codes {job.codes}: {job.told[-2000:]}"
    moved = [set(json.loads(Path(f"{out}-moved-{rank}.json").read_text())) for rank in (0, 1)]
    rows = metrics(out)
    passed = sum(rows[step].get("skipped") == 1 and step not in moved[0] | moved[1] for step in bad)
    passed -= sum("skipped" in rows[step] or step not in moved[0] & moved[1] for step in range(2, 2 * rounds, 2))
    dumps = len(list((out / "health").glob("step-*.json")))
    many = {step: "loss nan" for step in range(3, 11)}
    last = rig.call(sick.poisoned, many, 1, str(rig.new()), str(rig.config), "train.steps=12", ranks=2)
    last.wait()
    stopped = last.codes == [4, 4] and "6 skipped in a row" in last.told
    passed = passed if stopped and dumps == rounds else 0
    return passed, rounds, f"{dumps} dumps; six in a row: exit codes {last.codes}"


GUARD = ("train.guard.window=8", "train.guard.max_skips=1", "train.guard.mads=5")


def spikes(rig: Rig, rounds: int) -> tuple[int, int, str]:
    """F2: two batches with ten times the loss, or one step at 300 times the learning rate. Back to the checkpoint from
    before, past the steps since, and then bit by bit a run that never saw them; a second time it ends with code 4."""
    kinds = [("batch", 2), ("rate", 1)]
    places = [9, 14, 10, 17, 13, 18, 11, 15]
    second = max(1, rounds // 5)
    cases = [(kinds[n % 2], places[n % len(places)]) for n in range(rounds - second)]
    runs = [(str(rig.new()), kind, list(range(at, at + many))) for (kind, many), at in cases]
    again = [(str(rig.new()), "batch", [9, 10, 13 + n, 14 + n]) for n in range(second)]
    settings = (str(rig.config), *GUARD, f"train.steps={24 if rounds > 2 else 16}")
    rig.call(sick.spiking, runs + again, *settings).wait()
    twins, failed = [], []
    for folder, kind, steps in runs:
        actions = [a for a in _guard(Path(folder)) if a["action"] == "rollback"]
        if len(actions) == 1 and actions[0]["to"] <= steps[0] < actions[0]["step"] <= steps[0] + 4:
            twins.append((folder, str(rig.new()), range(actions[0]["to"], actions[0]["step"])))
        else:
            failed.append(f"{kind} at {steps}: {actions}")
    straight = [(twin, "left out", list(steps)) for _, twin, steps in twins]
    rig.call(sick.spiking, straight, *settings).wait()
    for folder, twin, steps in twins:
        if odd := _other_weights(Path(folder), Path(twin)):
            failed.append(f"{steps}: {odd}")
    for folder, _, steps in again:
        code = Path(f"{folder}-code").read_text()
        failed += [] if code == "4" else [f"a second time at {steps}: exit code {code}"]
    return rounds - len(failed), rounds, "; ".join(failed)


def _guard(run: Path) -> list[dict]:
    summary = run / "summary.json"
    return json.loads(summary.read_text())["guard"] if summary.exists() else []


def _other_weights(run: Path, twin: Path) -> list[str]:
    from affekt.pretrain.checkpoint import read_checkpoint

    (_, *ours), (_, *theirs) = (read_checkpoint(loadable(folder)[-1]) for folder in (run, twin))
    return [name for a, b in zip(ours, theirs) for name in a if not torch.equal(a[name], b[name])]


def odd_batches(rig: Rig, rounds: int) -> tuple[int, int, str]:
    """F5: batches of one, of copies of one clip, of any mixture: the contrast is finite and is the slow twin's. And
    real runs with a batch of one, and with a tail that does not fill a batch."""
    from affekt.pretrain.objectives import contrastive_loss

    rng, passed = random.Random(rig.rng.random()), 0
    for case in range(rounds):
        rows = 1 if case % 5 == 0 else rng.randint(2, 9)
        clip = torch.tensor([0 if case % 5 == 1 else rng.randint(0, rows) for _ in range(rows)])
        paired = torch.tensor([case % 5 == 2 or rng.random() < 0.8 for _ in range(rows)])
        video, audio = (torch.randn(rows, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
        loss = contrastive_loss(video, audio, paired, 0.1, same=[clip])
        loss.backward()
        finite = all(x.isfinite().all() for x in (loss, video.grad, audio.grad))
        passed += bool(finite) and abs(loss.item() - _slow_contrast(video, audio, paired, clip)) < 1e-9
    ends = Counter()
    for settings in (("train.global_batch=1", "train.steps=3"), ("train.global_batch=7", "train.steps=8")):
        job = rig.start(rig.new(), *settings)
        job.wait()
        ends[tuple(job.codes)] += 1
    return passed if ends == {(0,): 2} else 0, rounds, f"runs with batches of 1 and of 7 of 24 clips ended {dict(ends)}"


def _slow_contrast(video: torch.Tensor, audio: torch.Tensor, paired: torch.Tensor, clip: torch.Tensor) -> float:
    """Row by row: the positive is the row's own other stream, negatives are paired rows of other clips."""
    total, count = 0.0, int(paired.sum())
    v, a = (torch.nn.functional.normalize(x.detach(), dim=1) for x in (video, audio))
    for i in range(len(v)):
        if not paired[i]:
            continue
        for own, other in ((v[i], a), (a[i], v)):
            logits = [own @ other[i] / 0.1]
            logits += [own @ other[j] / 0.1 for j in range(len(v)) if paired[j] and clip[j] != clip[i]]
            total += float(torch.logsumexp(torch.stack(logits), 0) - logits[0])
    return total / (2 * count) if count else 0.0


def flipped_bits(rig: Rig, rounds: int) -> tuple[int, int, str]:
    """F7: every flipped bit of a weight, buffer or moment of rank 1 is found and the tensor named; in a run, both
    ranks end with exit code 4 at the next comparison."""
    out = rig.new()
    job = rig.call(sick.flipped_places, str(rig.config), rounds, rig.rng.randrange(10**6), str(out), ranks=2)
    job.wait()
    if job.codes != [0, 0]:
        return 0, rounds, f"exit codes {job.codes}: {job.told[-2000:]}"
    found = [int(Path(f"{out}-{rank}").read_text()) for rank in (0, 1)]
    settings = (str(rig.config), f"out={rig.new()}", "train.replicas_every=5", "train.steps=12")
    last = rig.call(sick.flipping, 1, 6, *settings, ranks=2)
    last.wait()
    stopped = last.codes == [4, 4] and "step 10: the ranks hold different numbers" in last.told
    return min(found) if stopped else 0, rounds, f"a run whose bit flipped in step 6 ended with {last.codes} at step 10"


ROWS = {
    "F1": ("not finite on one rank", not_finite, 30),
    "F2": ("spikes: skip, back, stop", spikes, 10),
    "F5": ("odd batches", odd_batches, 100),
    "F7": ("flipped bits", flipped_bits, 200),
}
