"""Ranks that are killed, stopped or stuck; signals; workers that die; who listens."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from affekt.pretrain.log import read_metrics
from benchmarks.faults import sick
from benchmarks.faults.rig import STEPS, Job, Rig, differences, loadable

ENDS_WITHIN = 30  # seconds, after a rank was killed
LEAVES_WITHIN = 20  # after a signal
STUCK = 10  # seconds of train.watchdog_s, on a machine that does much else
LOOPBACK = ("0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F")


def killed_ranks(rig: Rig, rounds: int) -> tuple[int, int, str]:
    """A4: rank 1 of two is killed at a moment of the run. Rank 0 ends with exit code 5, every complete checkpoint has
    the files of both, and the run goes on from there as if nothing had been."""
    straight, passed, longest, failed = rig.straight(ranks=2), 0, 0.0, []
    for _ in range(rounds):
        out = rig.new()
        job = rig.start(out, ranks=2)
        at = _somewhere(rig, job, out)
        os.kill(_of_rank(job, 1).pid, signal.SIGKILL)
        seconds = _ends(job, ENDS_WITHIN)
        longest = max(longest, seconds)
        both = all(len(list(path.glob("rank-*.safetensors"))) == 2 for path in loadable(out))
        good = job.codes == [5, -9] and "rank 1" in job.told and both
        if good:
            rig.finish(out, ranks=2)
            good = not differences(out, straight)
        passed += good
        failed += [] if good else [f"at {at}: {job.codes} after {seconds:.0f} s: {job.told[-300:]}"]
    return passed, rounds, f"longest {longest:.1f} s {'; '.join(failed)}"


def asked_to_leave(rig: Rig, rounds: int) -> tuple[int, int, str]:
    """A5: one rank of two gets SIGTERM, SIGUSR1 or SIGINT at a moment of the run, or all processes of the run do. Both
    save and leave together, and the run goes on from there with no step done twice."""
    straight, passed, longest, failed = rig.straight(ranks=2), 0, 0.0, []
    for number in range(rounds):
        out = rig.new()
        job = rig.start(out, "data.workers=1", ranks=2)
        at = _somewhere(rig, job, out)
        kind = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)[number % 3]
        with contextlib.suppress(ProcessLookupError):  # it may have come to its end
            if number % 2:
                os.kill(_of_rank(job, number // 2 % 2).pid, kind)
            else:
                for process in job.processes:  # its session: loader workers too
                    os.killpg(process.pid, kind)
        seconds = _ends(job, LEAVES_WITHIN)
        longest = max(longest, seconds)
        steps = max((row["step"] for row in read_metrics(out / "metrics.jsonl")), default=0)
        saved = max((int(path.name[5:]) for path in loadable(out)), default=0)
        expected = 130 if kind == signal.SIGINT else 143
        code = 0 if steps == STEPS else expected
        good = set(job.codes) == {code} and steps - saved <= 1
        if not steps:  # before there was anything to save, each leaves for itself or because the other did
            good = set(job.codes) <= {expected, 5}
        rig.finish(out, "data.workers=1", ranks=2)
        good = good and not differences(out, straight)
        passed += good
        failed += [] if good else [f"{kind.name} at {at}: {job.codes}, step {steps}, saved {saved}: {job.told[-600:]}"]
    return passed, rounds, f"longest {longest:.1f} s {'; '.join(failed)}"


def stuck_ranks(rig: Rig, rounds: int) -> tuple[int, int, str]:
    """F8: rank 1 sleeps in a step, or is stopped at a moment of the run. Both write their stacks and end with code 5,
    naming rank 1."""
    passed, longest, failed = 0, 0.0, []
    for number in range(rounds):
        out = rig.new()
        settings = (str(rig.config), f"out={out}", f"train.watchdog_s={STUCK}")
        if number % 2:
            job = rig.call(sick.stalled, 1, 1 + number // 2, *settings, ranks=2)
            while f"step {1 + number // 2}/" not in job.told and any(p.is_alive() for p in job.processes):
                time.sleep(0.05)
        else:
            job = rig.call(sick.stalled, 1, -1, *settings, "train.steps=10000", ranks=2)
            _somewhere(rig, job, out)
            os.kill(_of_rank(job, 1).pid, signal.SIGSTOP)
        seconds = _ends(job, STUCK + 10 + 30)
        longest = max(longest, seconds)
        stacks = [out / "health" / f"stacks-rank-{rank}.txt" for rank in (0, 1)]
        told = all("most recent call first" in path.read_text() for path in stacks if path.exists())
        good = job.codes == [5, 5] and told and all(map(Path.exists, stacks)) and seconds <= STUCK + 10
        good = good and "rank 1 (process" in stacks[0].read_text().split("\n")[0]
        passed += good
        failed += [] if good else [f"{number}: {job.codes} after {seconds:.0f} s: {job.told[-500:]}"]
    return passed, rounds, f"longest {longest:.1f} s of {STUCK} + 10 {'; '.join(failed)}"


def lost_workers(rig: Rig, rounds: int) -> tuple[int, int, str]:
    """F9: a loader's worker is killed as for want of memory; or /dev/shm has 16 MiB, of which none is free. The run
    ends with a named cause, or does without, and never hangs."""
    passed, failed = 0, []
    for number in range(rounds):
        out = rig.new()
        if number % 2:
            job = rig.start(out, "data.workers=2", "train.steps=10000")
            _somewhere(rig, job, out)
            while not (workers := _workers(job.processes[0].pid)):
                time.sleep(0.05)
            os.kill(rig.rng.choice(workers), signal.SIGKILL)
            seconds, codes, told = _ends(job, 60), job.codes, job.told
            good = codes == [2] and "a loader worker died" in told
        else:
            fill = 'mount -t tmpfs -o size=16m none /dev/shm && (cat /dev/zero > /dev/shm/full; exec "$@")'
            command = [sys.executable, "-m", "affekt", "pretrain", str(rig.config), f"out={out}", "data.workers=2"]
            started = time.monotonic()
            done = subprocess.run(
                ["unshare", "-m", "sh", "-c", fill, "sh", *command], capture_output=True, text=True, timeout=600
            )
            seconds, codes, told = time.monotonic() - started, [done.returncode], done.stderr
            good = codes == [0] or (codes == [2] and "/dev/shm" in told)
        passed += good and seconds < 60
        failed += [] if good else [f"{number}: {codes} after {seconds:.0f} s: {told[-500:]}"]
    return passed, rounds, "; ".join(failed)


def listeners(rig: Rig, rounds: int) -> tuple[int, int, str]:
    """E10: no rank of a local run listens anywhere but on the loopback interface."""
    found = []
    for ranks in (1, 2):
        out = rig.new()
        rig.call(sick.listening, str(out), str(rig.config), "train.steps=6", ranks=ranks).wait()
        for rank in range(ranks):
            found += json.loads(Path(f"{out}-listens-{rank}.json").read_text())
    outside = [address for address in found if not address.startswith(LOOPBACK)]
    return (rounds if found and not outside else 0), rounds, f"{len(found)} listeners, outside: {outside}"


def _somewhere(rig: Rig, job: Job, out: Path) -> str:
    """Wait until all ranks have heartbeats, and then for a moment of the run: the beginning of a random step, or of
    what comes before the first, and a bit of it. Returns where that was."""
    files = [out / "health" / f"rank-{rank}.json" for rank in range(len(job.processes))]
    while not all(file.exists() for file in files) and all(process.is_alive() for process in job.processes):
        time.sleep(0.01)
    step = rig.rng.randrange(-2, STEPS - 2)
    while len(re.findall(r"^step \d+/", job.told, re.MULTILINE)) < step and all(
        process.is_alive() for process in job.processes
    ):
        time.sleep(0.01)
    time.sleep(rig.rng.uniform(0, 0.3))
    return f"step {step}"


def _of_rank(job: Job, rank: int):
    return list(reversed(job.processes))[rank]


def _ends(job: Job, seconds: float) -> float:
    """How long the processes of a job took to end; those that have not after so long are killed."""
    started = time.monotonic()
    for process in job.processes:
        process.join(max(0, seconds - (time.monotonic() - started)))
    took = time.monotonic() - started
    job.kill()
    return took


def _workers(session: int) -> list[int]:
    """The loader's workers of a process that leads a session: those of it that no other is the parent of, but one."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session:
            parents[int(path.parent.name)] = int(fields[1])
    return [pid for pid, parent in parents.items() if parent in parents and parent != session]


ROWS = {
    "A4": ("one rank killed", killed_ranks, 10),
    "A5": ("asked to leave", asked_to_leave, 10),
    "E10": ("listeners", listeners, 1),
    "F8": ("stuck ranks", stuck_ranks, 10),
    "F9": ("lost workers, full /dev/shm", lost_workers, 10),
}
