"""How runs are started: lines, exit codes, interruption, who listens where, the batch script, several machines."""

import json
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import yaml

from affekt.cli import run
from affekt.launch import lines
from affekt.launch.network import address_towards, interface_of
from affekt.pretrain import rendezvous

WORKER = """
import os, sys, time
from pathlib import Path
from affekt.pretrain.rendezvous import join_group
import torch, torch.distributed as dist

def listening(pid):
    inodes = {os.readlink(link)[8:-1] for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()}
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return [row[1] for row in rows if row[3] == "0A" and row[9] in inodes]

if __name__ == "__main__":
    rank, out, what = os.environ["RANK"], Path(sys.argv[1]), sys.argv[2:]
    if what == ["talk"]:
        join_group("gloo")
        total = torch.tensor([float(rank)])
        dist.all_reduce(total)
        sockets = listening("self") + listening(os.getppid())
        (out / rank).write_text(f"{total.item()} {os.environ['OMP_NUM_THREADS']} {','.join(sockets)}")
        dist.barrier()
        dist.destroy_process_group()
        sys.exit()
    (out / rank).write_text(str(os.getpid()))
    if rank == "1" and what == ["killed"]:
        os.kill(os.getpid(), 9)
    if rank == "1" and what:
        sys.exit(int(what[0]))
    time.sleep(300)
"""


@pytest.fixture
def worker(tmp_path, monkeypatch) -> list[str]:
    """A module that ends as its last argument says; `[module, folder]`."""
    (tmp_path / "launched_worker.py").write_text(WORKER)
    (tmp_path / "out").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return ["launched_worker", str(tmp_path / "out")]


def starting(line: lines.Line) -> subprocess.Popen:
    """`affekt.launch.start` as a process of its own, which signals can be sent to."""
    code = f"import sys; from affekt.launch.start import *; sys.exit(start(Line({line.words!r}, {line.environment!r})))"
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.05)


def ended(pid: int) -> bool:
    """Also true of a zombie, which a container without an init process keeps."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("how, code", [("3", 3), ("killed", 5)])
def test_the_exit_code_of_a_rank_comes_out_and_the_other_ranks_end(worker, how, code):
    process = starting(lines.one_machine([*worker, how], 2, 2))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors
    assert "process 1 " in errors
    assert all(ended(int(file.read_text())) for file in Path(worker[1]).iterdir())


@pytest.mark.parametrize("by", ["torchrun", "deepspeed"])
def test_an_interruption_ends_all_ranks(worker, tmp_path, by):
    (tmp_path / "hosts").write_text("127.0.0.1 slots=2\n")
    if by == "torchrun":
        line = lines.one_machine(worker, 2, 2)
    else:
        line = lines.hostfile_without_ssh(worker, tmp_path / "hosts", 2, 0, None, None)
    process = starting(line)
    wait_for(lambda: len([file for file in Path(worker[1]).iterdir() if file.read_text()]) == 2, process)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert all(ended(int(file.read_text())) for file in Path(worker[1]).iterdir())


def test_one_machine_listens_on_loopback_alone(worker):
    process = starting(lines.one_machine([*worker, "talk"], 2, 4))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    for rank in "01":
        total, threads, sockets = (Path(worker[1]) / rank).read_text().split(" ")
        assert (total, threads) == ("1.0", "2")
        assert sockets, "gloo listens somewhere"
        assert all(address.startswith("0100007F:") for address in sockets.split(",")), sockets


def shown(capsys, *arguments: str) -> str:
    assert run(["launch", "demo", *arguments, "--print"]) == 0
    return capsys.readouterr().out


def test_lines_are_printed(capsys, tmp_path, monkeypatch):
    for name in ("OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    assert shown(capsys, "--procs", "1", "a.b=[1, 2]") == f"{sys.executable} -m affekt pretrain demo 'a.b=[1, 2]'\n"
    line = shown(capsys, "--procs", "4", "--resume", "auto", "--allow-change", "optim")
    assert "-m affekt.launch.torchrun --nnodes=1 --nproc_per_node=4" in line and "--local_addr=127.0.0.1" in line
    assert line.endswith("-m affekt pretrain demo --resume auto --allow-change optim\n")
    line = shown(capsys, "--nodes", "2", "--procs", "8", "--node-rank", "1", "--master", "127.0.0.1:7000")
    assert "--rdzv_endpoint=127.0.0.1:7000" in line and "is_host=0" in line and "GLOO_SOCKET_IFNAME=lo" in line
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 slots=2  # the first\nother slots=4\n")
    line = shown(capsys, "--hostfile", str(hosts))
    assert f"deepspeed.launcher.runner --hostfile={hosts} --no_local_rank --module affekt" in line
    line = shown(capsys, "--hostfile", str(hosts), "--node-rank", "1", "--address", "127.0.0.1")
    assert "--no_ssh --node_rank=1 --master_addr=127.0.0.1 --master_port=29400" in line


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--nodes", "2"], "needs --master HOST and --node-rank 0 to 1"),
        (["--nodes", "2", "--node-rank", "2", "--master", "a"], "--node-rank 0 to 1"),
        (["--nodes", "2", "--node-rank", "0", "--master", "a:b"], "HOST:PORT"),
        (["--master", "a"], "--master: without effect"),
        (["--hostfile", "nowhere"], "nowhere: cannot be read"),
        (["--hostfile", "nowhere", "--procs", "2"], "--procs: without effect"),
        (["--slurm", "job.sh"], "say --procs"),
        (["--sbatch", "--time=1"], "add --slurm"),
    ],
)
def test_mistakes_are_told(arguments, told, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(["launch", "demo", *arguments]) == 1
    assert told in capsys.readouterr().err
    assert run(["launch", "dmeo"]) == 1


def test_a_hostfile_line_that_is_none_is_named(tmp_path):
    for text, told in [
        ("a slots=2\nb\n", "line 2: `b`"),
        ("a slots=1\na slots=1", "line 2"),
        ("# none\n", "no machine"),
    ]:
        (tmp_path / "hosts").write_text(text)
        with pytest.raises(ValueError, match=told):
            lines.read_hostfile(tmp_path / "hosts")


def test_the_interface_that_leads_to_a_host_is_found():
    assert address_towards("127.0.0.1") == "127.0.0.1" and interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.77") is None  # an address for documentation, which nobody has


FAKE = {
    "sbatch": 'SLURM_JOB_ID=7 SLURM_JOB_NODELIST="127.0.0.1,127.0.0.1" SLURM_NNODES=2 exec bash "$1"',
    "scontrol": "echo 127.0.0.1; sleep 0.3; echo 127.0.0.1",  # as long lists come: in more than one piece
    "srun": 'shift; for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@" & pids="$pids $!"; done\n'
    "for pid in $pids; do wait $pid || code=$?; done; exit ${code:-0}",
}


def test_the_batch_script_starts_every_machine_of_the_job(tmp_path, monkeypatch, capfd):
    """SLURM's own commands are stand-ins, the script and what it starts are real: two machines meet, and each starts a
    process, which finds a mistake in the settings."""
    for name, body in FAKE.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    script = ["--slurm", "job.sh", "--nodes", "2", "--procs", "1", "--sbatch=--gpus-per-node=0", "--sbatch=--time=1:00"]
    what = ["launch", "demo", "train.sede=it's", f"out={tmp_path / 'run'}", *script]
    assert run([*what, "--print"]) == 0 and not Path("job.sh").exists()
    assert "#SBATCH --time=1:00" in capfd.readouterr().out
    assert run(what) == 1
    told = capfd.readouterr()
    assert told.out.count("--nnodes=2 --nproc_per_node=1") == 2 and "sbatch job.sh" in told.out
    assert told.err.count("did you mean `seed`?") == 2
    text = Path("job.sh").read_text()
    assert "#SBATCH --nodes=2" in text and "SLURM_RESTART_COUNT:+--resume auto" in text
    Path("job.sh").write_text(text.replace("1:00", "2:00"))
    assert run([*what, "--print"]) == 0 and "stands as it is" in capfd.readouterr().out
    assert "2:00" in Path("job.sh").read_text()


@pytest.fixture
def config(tmp_path, tiny_shards) -> Path:
    small = {"embed_dim": 48, "depth": 2, "taps": [1, 2], "decoder_embed_dim": 32, "img_size": 32}
    settings = {
        "out": "run",
        "model": {"name": "hicmae_nano", **small, "mask_ratio_video": 0.5, "contrast_weight": 0.1},
        "data": {"shards": str(tiny_shards(12, seconds=1.0).root), "frame_stride": 2, "workers": 0},
        "optim": {"base_lr": 0.05, "clip_grad": 1.0},
        "train": {"steps": 4, "global_batch": 8, "log_every": 1, "checkpoint_every": 4, "picture_every": 4},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def rehearse(config: Path, out: Path, *arguments: str) -> dict:
    command = [sys.executable, "-m", "affekt.launch.rehearse", "--config", str(config), "--out", str(out), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=550, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_two_machines_train_as_one_process(config, tmp_path):
    """In network namespaces where they may be made; each machine sees no interface of the others'."""
    answer = rehearse(config, tmp_path / "out", "--machines", "2", "--launchers", "torchrun")
    (row,) = answer["runs"]
    assert answer["steps"] == 4 and row["machines"] == 2 and row["difference"] <= 1e-5
    if row["as"] == "namespaces":
        assert "GLOO_SOCKET_IFNAME=eth0" in (tmp_path / "out" / "torchrun-2.log").read_text()


@pytest.mark.slow
def test_two_and_four_machines_train_as_one_process_by_both_launchers(config, tmp_path):
    rows = rehearse(config, tmp_path / "out")["runs"] + rehearse(config, tmp_path / "lo", "--loopback")["runs"]
    assert len(rows) == 8 and all(row["difference"] <= 1e-5 for row in rows)


@pytest.mark.parametrize("watchdog_s, minutes", [(None, None), (5.0, 30), (7200.0, 122)])
def test_collectives_wait_longer_than_the_watchdog(monkeypatch, watchdog_s, minutes):
    made = {}
    monkeypatch.setattr(rendezvous.dist, "init_process_group", lambda backend, **how: made.update(how))
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    rendezvous.join_group("gloo", watchdog_s)
    assert made["timeout"] == (None if minutes is None else timedelta(minutes=minutes))
