"""The whole way in small, as a real process: every stage of `affekt demo` on 48 clips and four steps."""

import csv
import json
import subprocess
import sys

import yaml

# Runs the real command with a smaller corpus and shorter experiments; the guard is for the spawned workers.
SMALL = """
import sys
from pathlib import Path

import yaml

import affekt.demo
from affekt.cli import run

shipped = affekt.demo.experiment


def small(name):
    values = yaml.safe_load(shipped(name).read_text(encoding="utf-8"))
    if "model" in values:
        values["train"] |= {"steps": 4, "global_batch": 8, "log_every": 2}
    else:
        values |= {"bootstrap": 100, "random_seeds": [0]}
    path = Path(f"{name}.yaml")
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


affekt.demo.CLIPS, affekt.demo.SPEAKERS, affekt.demo.SECONDS = 48, 8, 1.5
affekt.demo.experiment = small
if __name__ == "__main__":
    sys.exit(run(["demo", *sys.argv[1:]]))
"""


def demo(folder, *arguments):
    (folder / "small.py").write_text(SMALL, encoding="utf-8")
    command = [sys.executable, "small.py", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def test_the_whole_way_and_once_more(tmp_path):
    done = demo(tmp_path, "--workers", "1")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "runs" / "demo"
    assert "Pre-trained encoder" in done.stdout and "report: runs/demo/report.html" in done.stdout
    assert "step 4/4" in done.stderr and "synth: 48/48 clips" in done.stderr

    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    found = {(row["features"], row["stream"]) for row in results["rows"]}
    features = ("pretrained", "random", "statistics", "majority")
    assert found == {(name, stream) for name in features for stream in ("audio", "video", "both")}
    seen = json.loads((out / "export" / "pretrain_data.json").read_text(encoding="utf-8"))
    tested = {row["speaker"] for row in manifest(out) if row["split"] == "test"}
    assert tested and not tested & set(seen["speakers"])
    settings = yaml.safe_load((out / "pretrain" / "settings.yaml").read_text(encoding="utf-8"))
    assert settings["train"]["steps"] == 4

    again = demo(tmp_path, "--workers", "1", "--json")
    assert again.returncode == 0, again.stderr
    repeated = json.loads(again.stdout)
    assert repeated["rows"] == results["rows"]
    assert "step 4/4" not in again.stderr, "the finished training was not repeated"


def manifest(out):
    with (out / "corpus" / "manifest.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
