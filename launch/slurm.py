"""The batch script for SLURM: a file to keep and to edit, which starts torchrun on every machine of a job."""

import shlex
import sys

SCRIPT = """\
#!/bin/bash
# Written by `affekt launch --slurm`; edit it as you like and submit it with `sbatch {name}`.
#SBATCH --job-name=affekt
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
{options}
#SBATCH --output=affekt-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
# Two minutes before the time is over the processes are told to leave; a job that comes again goes on where it was.
#SBATCH --signal=TERM@120

set -euo pipefail
# All machines meet at the first one, on a port that two jobs on it hardly share. All names are read before the first is
# taken: `| head` would end scontrol by a broken pipe, and with it the job.
HOSTS="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
MASTER="${{HOSTS%%$'\n'*}}:$((20000 + SLURM_JOB_ID % 20000))"
export MASTER
# One task a machine; `affekt launch` starts torchrun there. The run folder has to be on a disk that all of them share.
srun --kill-on-bad-exit=1 bash -c '{line}'
"""


def batch_script(name: str, arguments: list[str], nodes: int, procs: int, gpus: bool, options: list[str]) -> str:
    """The text of the script. `arguments` are those of `affekt launch` that do not say where it runs, `options` further
    ones of sbatch, as `--time=24:00:00`; `procs` is the number of processes, and with `gpus` of GPUs, of a machine."""
    asked = [f"--gpus-per-node={procs}", *options] if gpus else [*options]
    place = '--nodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" --master "$MASTER"'
    words = shlex.join([sys.executable, "-m", "affekt", "launch", *arguments, "--procs", str(procs)])
    again = [] if "--resume" in arguments else ["${SLURM_RESTART_COUNT:+--resume auto}"]
    line = " ".join(["exec", words, *([place] if nodes > 1 else []), *again])
    return SCRIPT.format(
        name=name,
        nodes=nodes,
        options="\n".join(f"#SBATCH {option}" for option in asked) or "# (no further options of sbatch)",
        line=line.replace("'", "'\\''"),
    )
