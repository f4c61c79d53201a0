"""Faults planted in real runs, and what has to come out: `python -m benchmarks.faults --rows A1,A6`.

Each row is one of the project's list of failures. A row's figure is how many of its cases ended as they must, such as
"50/50". Without `--rows` all run, which takes an hour and more on two cores. Rows stand in files `rows_*.py` of this
folder, in a dictionary ROWS: name -> (what it is about, function(rig, rounds), rounds).
"""

import argparse
import importlib
import pkgutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

from rich.console import Console
from rich.table import Table

import benchmarks.faults
from benchmarks.faults.rig import Rig
from benchmarks.report import print_figures


def main() -> int:
    rows = known_rows()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(rows), help=f"of {', '.join(rows)}")
    parser.add_argument("--rounds", type=int, help="in place of each row's own number of cases, where that can vary")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for the runs; default: a temporary one, removed at the end")
    arguments = parser.parse_args()
    wanted = [name.strip() for name in arguments.rows.split(",")]
    if unknown := set(wanted) - rows.keys():
        parser.error(f"unknown rows {', '.join(sorted(unknown))}; known: {', '.join(rows)}")
    table = Table("row", "what", "passed", "seconds", "notes", title=f"faults, seed {arguments.seed}")
    figures: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        rig = Rig(arguments.out or Path(temporary), arguments.seed)
        for name in wanted:
            about, function, rounds = rows[name]
            started = time.monotonic()
            try:
                passed, cases, notes = function(rig, arguments.rounds or rounds)
            except Exception:  # a row that breaks must not hide the others
                traceback.print_exc()
                passed, cases, notes = 0, arguments.rounds or rounds, "it broke; see above"
            figures[name] = f"{passed}/{cases}"
            table.add_row(name, about, figures[name], f"{time.monotonic() - started:.0f}", notes)
            print(f"{name} {figures[name]} {notes}", file=sys.stderr, flush=True)
    Console().print(table)
    print_figures("faults", figures)
    return any(len(set(figure.split("/"))) > 1 for figure in figures.values())


def known_rows() -> dict[str, tuple]:
    rows: dict[str, tuple] = {}
    for module in pkgutil.iter_modules(benchmarks.faults.__path__):
        if module.name.startswith("rows_"):
            rows |= importlib.import_module(f"benchmarks.faults.{module.name}").ROWS
    return dict(sorted(rows.items(), key=lambda row: (row[0][0], int(row[0][1:]))))


if __name__ == "__main__":
    sys.exit(main())
