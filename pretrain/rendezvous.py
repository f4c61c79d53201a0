"""How the processes of a run find each other, and that nobody else does: local ones listen on the loopback alone."""

import ipaddress
import os
import socket
from datetime import timedelta

import torch.distributed as dist

MEETING_MINUTES = 10  # for nodes that start late; from then on a watchdog looks after the others
PATIENCE, SPARE = timedelta(minutes=30), timedelta(minutes=2)  # of a collective, where a watchdog looks on


def join_group(backend: str, watchdog_s: float | None = None) -> None:
    """Make the process group that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe. Its collectives wait longer
    than a watchdog does, who can say which rank is silent and what each of them stood in: NCCL would abort after ten
    minutes.

    torch's own store listens on every interface of the machine. A run of one process needs none, and where
    MASTER_ADDR is a loopback address ours is bound to it (but for torchrun, whose store is its own).
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address = os.environ["MASTER_ADDR"]
    if _is_loopback(address):
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
    timeout = None if watchdog_s is None else max(PATIENCE, timedelta(seconds=watchdog_s) + SPARE)
    if world_size == 1:
        store = dist.HashStore()
    elif _is_loopback(address) and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        store = _local_store(address, int(os.environ["MASTER_PORT"]), rank, world_size)
    else:
        dist.init_process_group(backend, timeout=timeout)
        return
    dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world_size)


def _local_store(address: str, port: int, rank: int, world_size: int) -> dist.TCPStore:
    listener = None
    if rank == 0:
        listener = socket.create_server((socket.gethostbyname(address), port))
    return dist.TCPStore(
        address,
        port,
        world_size,
        is_master=rank == 0,
        timeout=timedelta(minutes=MEETING_MINUTES),
        master_listen_fd=listener.detach() if listener else None,  # the store closes it
    )


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(socket.gethostbyname(address)).is_loopback
    except OSError:  # not known here; torch will say so
        return False
