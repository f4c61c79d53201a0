"""A rehearsal of several machines on one: `python -m affekt.launch.rehearse`.

Each machine is a network namespace with an address of its own on a bridge, which an ordinary user may make where user
namespaces are allowed; elsewhere it is a loopback address. A short nano pre-training on synthetic shards is started
once as one process, and then on 2 and on 4 machines by torchrun's rendezvous and by DeepSpeed's launcher without ssh.
Exit code 0 if every loss is that of the one process within 1e-5.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

AFFEKT = [sys.executable, "-m", "affekt"]
SAME_LOSS = 1e-5  # relative; the ranks sum in another order
SECONDS = 600  # for one run, on a busy machine
CONFIG = """\
out: run
model: {{name: hicmae_nano, embed_dim: 48, depth: 2, taps: [1, 2], decoder_embed_dim: 32, img_size: 32}}
data: {{shards: {shards}, frame_stride: 4, workers: 0}}
train: {{steps: 6, global_batch: 8, log_every: 1, checkpoint_every: 6, picture_every: 6, precision: fp32}}
"""


def main() -> int:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as scratch:
        out = arguments.out or Path(scratch)
        out.mkdir(parents=True, exist_ok=True)
        config = arguments.config or synthetic_config(out)
        run([[*AFFEKT, "launch", str(config), f"out={out / 'one'}", *arguments.overrides]], out / "one.log")
        expected = losses(out / "one")
        results = []
        for machines in arguments.machines:
            with ExitStack() as stack:
                kind, places = stack.enter_context(loopback(machines) if arguments.loopback else network(machines))
                for launcher in arguments.launchers:
                    name = f"{launcher}-{machines}"
                    lines = node_lines(launcher, config, out, name, places, arguments.overrides)
                    run(lines, out / f"{name}.log")
                    error = largest_difference(losses(out / name), expected)
                    results.append({"launcher": launcher, "machines": machines, "as": kind, "difference": error})
    table = Table(
        "Launcher", "Machines", "as", "Largest relative difference of a loss", title="One process and several"
    )
    for row in results:
        table.add_row(row["launcher"], str(row["machines"]), row["as"], f"{row['difference']:.1e}")
    Console().print(table)
    print(json.dumps({"steps": len(expected), "runs": results}))
    return int(any(row["difference"] > SAME_LOSS for row in results))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="a settings file of `affekt pretrain`; default: made here")
    parser.add_argument("--machines", type=int, nargs="+", default=[2, 4], metavar="N")
    parser.add_argument("--launchers", nargs="+", choices=["torchrun", "deepspeed"], default=["torchrun", "deepspeed"])
    parser.add_argument("--loopback", action="store_true", help="loopback addresses, not namespaces")
    parser.add_argument("--out", type=Path, help="keep runs and logs in this folder")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    return parser.parse_args()


def synthetic_config(out: Path) -> Path:
    """A settings file for 12 synthetic clips, which are made and prepared here."""
    corpus, shards = out / "corpus", out / "shards"
    run([[*AFFEKT, "synth", str(corpus), "--clips", "12", "--speakers", "4"]], out / "synth.log")
    run([[*AFFEKT, "prepare", str(corpus), str(shards), "--size", "64", "--face", "center"]], out / "prepare.log")
    path = out / "config.yaml"
    path.write_text(CONFIG.format(shards=json.dumps(str(shards.absolute()))), encoding="utf-8")
    return path


def node_lines(
    launcher: str, config: Path, out: Path, name: str, places: Sequence[tuple[list[str], str]], overrides: list[str]
) -> list[list[str]]:
    """What is started on each machine, the first one first."""
    hostfile = out / f"{name}.hosts"
    hostfile.write_text("".join(f"{address} slots=1\n" for _, address in places), encoding="utf-8")
    lines = []
    for rank, (enter, address) in enumerate(places):
        line = [*enter, *AFFEKT, "launch", str(config), f"out={out / name}", *overrides]
        line += ["--node-rank", str(rank), "--address", address]
        if launcher == "torchrun":
            line += ["--nodes", str(len(places)), "--procs", "1", "--master", f"{places[0][1]}:29517"]
        else:
            line += ["--hostfile", str(hostfile), "--master", f"{places[0][1]}:29518"]
        lines.append(line)
    return lines


def run(lines: Sequence[list[str]], log: Path) -> None:
    """Run all lines at once to their end; SystemExit with what they said where one fails."""
    with log.open("wb") as file:
        processes = [subprocess.Popen(line, stdout=file, stderr=file, start_new_session=True) for line in lines]
        try:
            codes = [process.wait(SECONDS) for process in processes]
        finally:
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGTERM)  # `affekt launch` passes it on to its processes
                    process.wait()
    if any(codes):
        text = log.read_text(encoding="utf-8", errors="replace")
        raise SystemExit(f"{text}\nfailed with exit codes {codes}: {lines[0]}")


@contextmanager
def network(machines: int) -> Iterator[tuple[str, list[tuple[list[str], str]]]]:
    """Namespaces on a bridge: what goes before a command to run it on each machine, and the machine's address."""
    with ExitStack() as stack:
        try:
            hub = stack.enter_context(namespace(["unshare", "--user", "--map-root-user", "--net"]))
            ip(hub, "link add affekt type bridge")
            ip(hub, "link set affekt up")
            places = []
            for number in range(machines):
                machine = stack.enter_context(namespace([*inside(hub), "unshare", "--net"]))
                address = f"10.77.0.{number + 1}"
                ip(hub, f"link add m{number} type veth peer name eth0 netns {machine}")
                ip(hub, f"link set m{number} master affekt up")
                ip(machine, f"addr add {address}/24 dev eth0")
                ip(machine, "link set eth0 up")
                ip(machine, "link set lo up")
                places.append((inside(machine), address))
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"no network namespaces here, so loopback addresses: {error}", file=sys.stderr)
            with loopback(machines) as fallback:
                yield fallback
            return
        yield "namespaces", places


@contextmanager
def loopback(machines: int) -> Iterator[tuple[str, list[tuple[list[str], str]]]]:
    yield "loopback addresses", [([], f"127.0.0.{number + 2}") for number in range(machines)]


@contextmanager
def namespace(unshare: list[str]) -> Iterator[int]:
    """The id of a process that holds a new namespace open. Raises CalledProcessError where none may be made."""
    holder = subprocess.Popen([*unshare, "sh", "-c", "echo ready && exec cat"], stdin=-1, stdout=-1, stderr=-1)
    try:
        if holder.stdout.readline() != b"ready\n":
            holder.stdin.close()
            raise subprocess.CalledProcessError(holder.wait(), unshare, stderr=holder.stderr.read())
        yield holder.pid
    finally:
        holder.kill()  # it ends by itself when this process does: its input is then closed
        holder.wait()


def inside(holder: int) -> list[str]:
    return ["nsenter", f"--target={holder}", "--user", "--net", "--preserve-credentials"]


def ip(holder: int, words: str) -> None:
    subprocess.run([*inside(holder), "ip", *words.split()], check=True, capture_output=True)


def losses(folder: Path) -> list[float]:
    rows = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(row)["loss"] for row in rows]


def largest_difference(found: list[float], expected: list[float]) -> float:
    """Relative; infinite where the runs are of different lengths."""
    if len(found) != len(expected):
        return float("inf")
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


if __name__ == "__main__":
    sys.exit(main())
