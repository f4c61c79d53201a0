"""Kills: at random moments, at every named point of a save, while old checkpoints are removed; two trainers."""

import os
import signal
import time
from collections.abc import Sequence

from affekt.pretrain.log import read_metrics
from benchmarks.faults import child
from benchmarks.faults.child import POINTS, Fault
from benchmarks.faults.rig import SAVE_EVERY, STEPS, Rig, differences, loadable, metrics


def random_kills(rig: Rig, rounds: int) -> tuple[int, int, str]:
    """A1: a run killed at a random moment goes on and ends as the straight run."""
    straight, passed, redone, longest = rig.straight(), 0, 0, 0.0
    whole = float((straight / "seconds").read_text())
    for _ in range(rounds):
        out = rig.new()
        job = rig.start(out)
        job.wait(rig.rng.uniform(0, whole))
        job.kill()
        steps = [row["step"] for row in read_metrics(out / "metrics.jsonl")]
        saved = [int(path.name[5:]) for path in loadable(out)]
        redone = max(redone, max(steps, default=0) - max(saved, default=0))
        started = time.monotonic()
        rig.finish(out)
        longest = max(longest, time.monotonic() - started)
        passed += not differences(out, straight)
    return passed, rounds, f"at most {redone} steps redone of {SAVE_EVERY} between saves; longest run {longest:.1f} s"


def kills_at_points(rig: Rig, rounds: int, points: Sequence[str] = POINTS) -> tuple[int, int, str]:
    """A2: two ranks; when rank 0 comes to a named point of its third save, one of them is killed."""
    straight, passed, failed = rig.straight(ranks=2), 0, []
    for number in range(rounds):  # every point once, with the victims in turn, then once more the other way round
        point, victim = points[number % len(points)], (number + number // len(points)) % 2
        out = rig.new()
        job = rig.start(out, ranks=2, fault=Fault(point, save=3), at=victim)
        job.wait()
        kept = len(loadable(out))
        rig.finish(out, ranks=2)
        wrong = differences(out, straight)
        good = job.codes[victim] == -9 and kept >= 1 and not wrong
        passed += good
        failed += [] if good else [f"{point}, rank {victim}: {job.codes}, {kept} kept, {wrong[:3]}"]
    return passed, rounds, "; ".join(failed)


def purge_race(rig: Rig, rounds: int) -> tuple[int, int, str]:
    """A10: killed at any moment of saves that follow each other, two complete checkpoints are there and readable."""
    passed, most = 0, 0
    for number in range(rounds):
        out = rig.new()
        # Half of them at the point itself, the others anywhere.
        fault = Fault("during-purge", save=rig.rng.randrange(3, 30)) if number % 2 else None
        job = rig.call(child.save_forever, out / "checkpoints", fault=fault)
        while len(list((out / "checkpoints").glob("step-*/manifest.json"))) < 2 and job.processes[0].is_alive():
            time.sleep(0.002)
        job.wait(60 if fault else rig.rng.uniform(0, 0.5))
        job.kill()
        kept = loadable(out)
        most = max(most, int(kept[-1].name[5:]) if kept else 0)
        passed += 2 <= len(kept) <= 3
    return passed, rounds, f"up to {most} saves before the kill"


def two_trainers(rig: Rig, rounds: int) -> tuple[int, int, str]:
    """A11: the second trainer of a folder is refused and told of the first; a killed one leaves no lock."""
    passed = 0
    for _ in range(rounds):
        out = rig.new()
        first = rig.start(out, "train.steps=400")
        while not (out / "metrics.jsonl").exists() and first.processes[0].is_alive():
            time.sleep(0.01)
        os.kill(first.processes[0].pid, signal.SIGSTOP)  # before it comes past STEPS
        second = rig.start(out, "train.steps=400", "--resume", "auto")
        second.wait()
        told = f"process {first.processes[0].pid} on " in second.told
        first.kill()
        rig.finish(out, "--allow-change", "train.steps")
        passed += second.codes == [1] and told and metrics(out)[-1]["step"] == STEPS
    return passed, rounds, ""


ROWS = {
    "A1": ("kill -9 at a random moment of a run", random_kills, 50),
    "A2": ("kill -9 of a rank at each point of a save", kills_at_points, 16),
    "A10": ("kill -9 while old checkpoints are removed", purge_race, 20),
    "A11": ("two trainers in one folder, and a lock left behind", two_trainers, 5),
}
