"""What pre-training is worth on real clips, from shards to the table: `python -m benchmarks.quality [--only emodb]`.

`speech` pre-trains the audio encoder on the training rows of RAVDESS, EMO-DB and GRID; `ravdess` and `emodb` probe it
frozen and fine-tune it, beside plain statistics, openSMILE's feature sets where `opensmile` is installed, random
encoders with the same menu, and the same network from scratch with as much compute as pre-training and fine-tuning
took together; `grid` pre-trains on lips and sound and finds one for the other; `folds` leaves four actors out at a
time over RAVDESS 1 to 20, with an encoder per fold that never heard them. All of it is the shipped experiment files,
each a command that is printed as it runs; what is finished is kept. Every recipe was found on development speakers.
"""

import argparse
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.table import Table

from affekt.finetune.schema import Difference, Estimate, Results, System
from benchmarks.report import print_figures

PARTS = ("speech", "ravdess", "emodb", "grid", "folds")
PREPARED = {
    "ravdess_audio": ("data_set=RAVDESS", "has_video=0"),
    "emodb": ("data_set=EMO-DB",),
    "grid": ("data_set=GRID",),
}
