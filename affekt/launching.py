"""`affekt launch`: says how a run is started, and starts it."""

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from affekt.arguments import AllowChange, Config, Overrides, Resume, find_experiment
from affekt.data.errors import AffektError, SettingsError
from affekt.data.machine import available_cores

ELSEWHERE = "on each machine the same command with its own --node-rank"


def launch(
    config: Config,
    overrides: Overrides = None,
    procs: Annotated[
        int | None, typer.Option(min=1, help="Processes of this machine; default: one a GPU, or one.")
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines that train together.")] = 1,
    node_rank: Annotated[
        int | None, typer.Option(min=0, help="Which of the machines this is, from 0; give it on each of them.")
    ] = None,
    master: Annotated[
        str | None, typer.Option(metavar="HOST[:PORT]", help="The machine with --node-rank 0, where all meet.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="This machine's own address; default: the one that reaches --master.")
    ] = None,
    hostfile: Annotated[
        Path | None,
        typer.Option(help="DeepSpeed's list of machines (HOST slots=N), reached by ssh, or by nobody: --node-rank."),
    ] = None,
    slurm: Annotated[
        Path | None, typer.Option(help="Write this batch script, unless it is there, and submit it with sbatch.")
    ] = None,
    sbatch: Annotated[
        list[str] | None, typer.Option(help="An option of sbatch in the script, as --time=24:00:00; repeat for more.")
    ] = None,
    resume: Resume = None,
    allow_change: AllowChange = None,
    command: Annotated[str, typer.Option(help="pretrain, or finetune, which goes on by itself.")] = "pretrain",
    print_only: Annotated[bool, typer.Option("--print", help="Print the line and start nothing.")] = False,
) -> None:
    """Print the line that starts a training on one process, several, or several machines, and start it."""
    find_experiment(config)  # a mistake is told here, and not by every process
    if command not in ("pretrain", "finetune"):
        raise SettingsError(f"--command {command}: choose pretrain or finetune")
    if command == "finetune":
        _refuse("--command finetune", {"--resume": resume, "--allow-change": allow_change, "--slurm": slurm})
    options = [*(["--resume", resume] if resume else [])]
    options += [word for key in allow_change or [] for word in ("--allow-change", key)]
    arguments = [config, *(overrides or []), *options]
    try:
        if slurm:
            _refuse("--slurm", {"--node-rank": node_rank, "--master": master, "--hostfile": hostfile})
            _submit(slurm, arguments, nodes, procs, sbatch or [], print_only)
            return
        if sbatch:
            raise SettingsError("--sbatch is for the script of --slurm; add --slurm FILE")
        line = _line(["affekt", command, *arguments], procs, nodes, node_rank, master, address, hostfile)
    except (ValueError, OSError) as error:
        raise SettingsError(f"{master or hostfile}: {error}" if isinstance(error, OSError) else str(error)) from None
    print(line, flush=True)
    if not print_only:
        from affekt.launch.start import start

        _leave(start(line))


def _line(command, procs, nodes, node_rank, master, address, hostfile):  # as the options above
    from affekt.launch import lines

    cores = available_cores()
    if hostfile:
        _refuse("--hostfile", {"--procs": procs, "--nodes": nodes if nodes > 1 else None})
        if node_rank is None:
            _refuse("--hostfile without --node-rank", {"--address": address})
            lines.read_hostfile(hostfile)
            return lines.hostfile_by_ssh(command, hostfile, master)
        return lines.hostfile_without_ssh(command, hostfile, cores, node_rank, master, address)
    procs = procs or _gpus() or 1
    if nodes > 1:
        if node_rank is None or master is None or node_rank >= nodes:
            raise SettingsError(f"--nodes {nodes}: needs --master HOST and --node-rank 0 to {nodes - 1}: {ELSEWHERE}")
        return lines.several_machines(command, nodes, procs, cores, node_rank, master, address)
    _refuse("a run on one machine", {"--node-rank": node_rank, "--master": master, "--address": address})
    return lines.one_process(command) if procs == 1 else lines.one_machine(command, procs, cores)


def _submit(path: Path, arguments: list[str], nodes: int, procs: int | None, options: list[str], dry: bool) -> None:
    from affekt.launch.slurm import batch_script

    if procs is None:
        raise SettingsError("--slurm: this may be another kind of machine than the job's; say --procs N, one a GPU")
    bad = [option for option in options if not option.startswith("-") or "\n" in option]
    if bad:
        raise SettingsError(f"--sbatch {bad[0]}: not an option of sbatch; write --sbatch=--time=24:00:00")
    has_gpus = not any("gpu" in option or "gres" in option for option in options)
    text = batch_script(path.name, arguments, nodes, procs, has_gpus, options)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        print(f"{path} stands as it is: it was edited, or made with other options (remove it to have it anew)")
    elif not dry:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    else:
        print(text)
    words = ["sbatch", str(path)]
    print(shlex.join(words), flush=True)
    if not dry:
        try:
            _leave(subprocess.run(words).returncode)
        except FileNotFoundError:
            raise SettingsError(f"there is no sbatch on this machine; submit {path} where SLURM is") from None


def _refuse(what: str, given: dict[str, object]) -> None:
    idle = [name for name, value in given.items() if value is not None]
    if idle:
        raise SettingsError(f"{', '.join(idle)}: without effect for {what}; leave it out")


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _leave(code: int) -> None:
    """Leave with the exit code of the processes; they have said why."""
    if code in (128 + 2, 128 + 15):
        sys.exit(code)
    if code:
        error = AffektError(f"the processes of the run ended with exit code {code}; what they said stands above")
        error.exit_code = code
        raise error
