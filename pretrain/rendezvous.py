"""Joins the process group. What is one machine's own listens on its loopback interface alone."""

import ipaddress
import os
import socket

import torch.distributed as dist


def join_group(backend: str) -> None:
    """Join the group that MASTER_ADDR, MASTER_PORT, RANK and WORLD_SIZE announce, unless this process is in one.

    torch's store listens on all interfaces, whatever its address, and gloo on the one that the machine's name leads to.
    """
    if dist.is_initialized():
        return
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if not is_loopback(host) or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        dist.init_process_group(backend)
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    how = {"timeout": dist.default_pg_timeout}
    if rank == 0:
        # The store's thread accepts on this socket from here on, and closes it with the store.
        how["master_listen_fd"] = socket.create_server((host, port), backlog=max(128, world_size)).detach()
    store = dist.TCPStore(host, port, world_size, is_master=rank == 0, **how)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
