"""The lines that start a command: as one process, on one machine, on several by torchrun, by a DeepSpeed hostfile."""

import os
import re
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

from affekt.launch.network import address_towards, interface_of

PORT = 29400  # torchrun's default for its rendezvous
OWN_TORCHRUN = "affekt.launch.torchrun"
LOST = 5  # the exit code for a process that a signal ended


@dataclass(frozen=True)
class Line:
    """What is started, and what is set in its environment where the caller has not set it."""

    words: list[str]
    environment: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """As a shell reads it."""
        settings = [f"{name}={value}" for name, value in self.environment.items()]
        return shlex.join([*(["env", *settings] if settings else []), *self.words])


def one_process(command: list[str]) -> Line:
    return Line([sys.executable, "-m", *command])


def one_machine(command: list[str], procs: int, cores: int) -> Line:
    """torchrun for `procs` processes of this machine. They meet in a file, and then at the loopback address, so that no
    other machine can reach them."""
    words = [sys.executable, "-m", OWN_TORCHRUN, "--nnodes=1", f"--nproc_per_node={procs}"]
    words += ["--rdzv_backend=c10d", "--rdzv_conf=store_type=file", "--local_addr=127.0.0.1"]
    # torchrun would hold a store for its processes, which listens on all interfaces; without it they make their own.
    environment = {**_environment(procs, cores), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return Line([*words, "-m", *command], environment)


def several_machines(
    command: list[str], nodes: int, procs: int, cores: int, node_rank: int, master: str, address: str | None
) -> Line:
    """torchrun for this machine, one of `nodes`, each with `procs` processes, which meet at `master` (HOST or
    HOST:PORT), the machine with node rank 0. `address` is this machine's own; None takes the one from which `master`
    is reached. Raises OSError for a host that has no address."""
    host, port = split_master(master)
    address = address or address_towards(host)
    words = [sys.executable, "-m", OWN_TORCHRUN, f"--nnodes={nodes}", f"--nproc_per_node={procs}"]
    words += [f"--node_rank={node_rank}", f"--rdzv_id=affekt-{port}", "--rdzv_backend=c10d"]
    words += [f"--rdzv_endpoint={host}:{port}", f"--rdzv_conf=is_host={int(node_rank == 0)}", f"--local_addr={address}"]
    return Line([*words, "-m", *command], _environment(procs, cores, interface_of(address)))


def hostfile_by_ssh(command: list[str], hostfile: Path, master: str | None) -> Line:
    """DeepSpeed's launcher on the first machine, which reaches the others by pdsh and ssh."""
    words = [*_deepspeed(hostfile), *_master_options(master)]
    return Line([*words, "--no_local_rank", "--module", *command])


def hostfile_without_ssh(
    command: list[str], hostfile: Path, cores: int, node_rank: int, master: str | None, address: str | None
) -> Line:
    """DeepSpeed's launcher for this machine alone, started on each of them. Raises ValueError for a hostfile that
    cannot be read or has no such machine."""
    hosts = read_hostfile(hostfile)
    if not 0 <= node_rank < len(hosts):
        raise ValueError(f"{hostfile}: has {len(hosts)} machines, so no --node-rank {node_rank}; they count from 0")
    master = master or next(iter(hosts))
    interface = interface_of(address or address_towards(split_master(master)[0]))
    words = [*_deepspeed(hostfile), "--no_ssh", f"--node_rank={node_rank}", *_master_options(master)]
    environment = _environment(list(hosts.values())[node_rank], cores, interface)
    return Line([*words, "--no_local_rank", "--module", *command], environment)


def read_hostfile(path: Path) -> dict[str, int]:
    """Processes of each machine, from DeepSpeed's lines `worker-1 slots=8`. Raises ValueError with file and line."""
    hosts: dict[str, int] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    for number, line in enumerate(lines, 1):
        line = line.partition("#")[0].strip()
        found = re.fullmatch(r"(\S+)\s+slots=([1-9]\d*)", line)
        if line and (not found or found[1] in hosts):
            raise ValueError(
                f"{path}, line {number}: `{line}` is not of the form `HOST slots=N`, or names a host twice"
            )
        if found:
            hosts[found[1]] = int(found[2])
    if not hosts:
        raise ValueError(f"{path}: names no machine; write a line `HOST slots=N` for each")
    return hosts


def split_master(master: str) -> tuple[str, int]:
    """`host:port` or `host`. Raises ValueError for a port that is none."""
    host, colon, port = master.rpartition(":") if master.count(":") == 1 else (master, "", "")
    if not host or (colon and not (port.isdigit() and 0 < int(port) < 2**16)):
        raise ValueError(f"--master {master}: not of the form HOST or HOST:PORT")
    return host, int(port or PORT)


def _environment(procs: int, cores: int, interface: str | None = None) -> dict[str, str]:
    """Threads, because every process would take all cores; and where gloo and NCCL talk, because gloo would take the
    interface that the machine's name leads to, on many machines none that others reach."""
    environment = {"OMP_NUM_THREADS": str(max(1, cores // procs))}
    if interface:
        environment |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
    return {name: value for name, value in environment.items() if name not in os.environ}


def _deepspeed(hostfile: Path) -> list[str]:
    return [sys.executable, "-m", "deepspeed.launcher.runner", f"--hostfile={hostfile}"]


def _master_options(master: str | None) -> list[str]:
    if master is None:
        return []
    host, port = split_master(master)
    return [f"--master_addr={host}", f"--master_port={port}"]
