"""Eyes on real runs: probes that change nothing, what is logged, wandb only when asked, states, report, comparison."""

import fcntl
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from affekt.cli import run as affekt
from affekt.data.errors import HealthError, SettingsError
from affekt.pretrain.boards import require_wandb
from affekt.pretrain.checkpoint import read_checkpoint
from affekt.pretrain.log import TIMINGS, read_metrics, told, told_probe
from affekt.pretrain.online import OnlineProbeSettings, split, untouched
from affekt.pretrain.report import failure_noted, write_run_report
from affekt.pretrain.runs import describe, different_settings, find_runs, short_names, state_of
from affekt.pretrain.settings import PretrainSettings, refuse_changes
from affekt.progress import training

MODEL = {"name": "hicmae_nano", "embed_dim": 48, "depth": 2, "taps": [1, 2], "decoder_embed_dim": 32, "img_size": 32}
MODEL |= {"mask_ratio_video": 0.5, "contrast_weight": 0.1}
STEPS = 6
# A stand-in for the package: notes what it is asked for, and nothing leaves the machine.
WANDB = """
import json, os
def note(**values):
    with open(os.environ["NOTES"], "a") as file:
        file.write(json.dumps(values, default=str) + "\\n")
class Run:
    def log(self, values, step): note(call="log", step=step, names=sorted(values))
    def finish(self, exit_code): note(call="finish", exit_code=exit_code)
def init(**options):
    note(call="init", **options)
    return Run()
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_shards) -> Path:
    """A folder with three runs of the same settings, side by side: `plain`, `probed` (with wandb) and `two` ranks that
    are probed. What `plain` was seen to be while it ran is in `seen.json`."""
    folder = tmp_path_factory.mktemp("runs")
    shards = tiny_shards(48, speakers=8).root
    settings = {
        "out": str(folder / "plain"),
        "model": MODEL,
        "data": {"shards": str(shards), "frame_stride": 8, "workers": 0},
        "train": {"steps": STEPS, "global_batch": 8, "log_every": 1, "checkpoint_every": 4, "picture_every": 3},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "modules").mkdir()
    (folder / "modules" / "wandb.py").write_text(WANDB)
    path = os.pathsep.join(filter(None, (str(folder / "modules"), os.environ.get("PYTHONPATH"))))
    probing = [f"train.probe.shards={shards}", "train.probe.every=4", "train.probe.clips=24"]
    started = {
        "plain": ([], []),
        "probed": ([], [*probing, "train.wandb=offline"]),
        "two": (["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"], probing),
    }
    processes = {
        name: subprocess.Popen(
            [
                sys.executable,
                *launcher,
                "-m",
                "affekt",
                "pretrain",
                folder / "config.yaml",
                f"out={folder / name}",
                *more,
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "NOTES": str(folder / "notes.jsonl")},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, (launcher, more) in started.items()
    }
    seen: list[str] = []
    while processes["plain"].poll() is None:
        if (folder / "plain" / "metrics.jsonl").is_file():
            seen.append(state_of(folder / "plain")[0])
        time.sleep(0.05)
    (folder / "seen.json").write_text(json.dumps(seen))
    for name, process in processes.items():
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        (folder / name / "stderr.txt").write_text(errors)
    return folder


def rows(run: Path, probes: bool) -> list[dict]:
    found = [row for row in read_metrics(run / "metrics.jsonl") if ("probe/chance" in row) == probes]
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in found]


def test_a_run_with_probes_is_bit_for_bit_the_one_without(runs):
    plain, probed = ((runs / name / "checkpoints" / f"step-{STEPS:08d}") for name in ("plain", "probed"))
    for expected, found in zip(read_checkpoint(plain)[1:], read_checkpoint(probed)[1:], strict=True):
        assert expected.keys() == found.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    assert rows(runs / "plain", False) == rows(runs / "probed", False)
    assert not rows(runs / "plain", True)
    ledgers = {
        json.loads((runs / name / "summary.json").read_text())["accounting"]["ledger"] for name in started_names()
    }
    assert len(ledgers) == 1


def started_names() -> tuple[str, ...]:
    return ("plain", "probed", "two")


def test_probes_are_logged_and_two_ranks_find_the_same(runs):
    one, two = rows(runs / "probed", True), rows(runs / "two", True)
    assert [row["step"] for row in one] == [row["step"] for row in two] == [4, STEPS]
    wanted = {f"probe/{kind}_{stream}" for kind in ("linear", "knn") for stream in ("audio", "video", "both")}
    wanted |= {f"probe/{way}_{k}" for way in ("video_to_audio", "audio_to_video") for k in (1, 5, 10)}
    wanted |= {f"probe/{meter}_{stream}" for meter in ("rank", "uniformity") for stream in ("audio", "video")}
    wanted |= {"step", "probe/alignment", "probe/gap", "probe/chance", "probe/clips_fit", "probe/clips_score"}
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys() == wanted
        assert a["probe/clips_fit"] == a["probe/clips_score"] == 12 and a["probe/chance"] == pytest.approx(1 / 6)
        for name in ("rank_audio", "rank_video", "uniformity_video", "alignment", "gap"):  # no argmax to flip
            assert b[f"probe/{name}"] == pytest.approx(a[f"probe/{name}"], rel=1e-3)
        assert 1 < a["probe/rank_audio"] < 24 and 0 <= a["probe/video_to_audio_1"] <= a["probe/video_to_audio_10"] <= 1
    told = (runs / "probed" / "stderr.txt").read_text()
    assert "12 of the clips to score are also trained on, without their labels" in told
    assert "every 4 steps: 6 classes, 12 clips to fit on, 12 of other speakers to score" in told
    assert told.count("linear probe (audio, video, both)") == 2


def test_a_logged_step_says_how_the_machine_is_used(runs):
    row = read_metrics(runs / "plain" / "metrics.jsonl")[-1]
    assert {"loss", "lr", "grad_norm", "clips_per_s", "data_wait", "memory_gib", "mfu", "time_left_s"} <= row.keys()
    assert 0.05 < row["memory_gib"] < 16 and 0 < row["mfu"] < 2 and row["time_left_s"] == 0
    told = (runs / "plain" / "stderr.txt").read_text()
    assert "GFLOP per clip; MFU is the share of" in told and f"step {STEPS}/{STEPS}  loss" in told and " GiB" in told


def test_wandb_hears_of_a_run_that_asks_for_it_and_of_no_other(runs, monkeypatch):
    notes = [json.loads(line) for line in (runs / "notes.jsonl").read_text().splitlines()]
    first, *logged, last = notes
    assert first["call"] == "init" and first["mode"] == "offline" and first["dir"] == str(runs / "probed")
    assert first["id"] == (runs / "probed" / "wandb" / "id").read_text() and first["config"]["train"]["steps"] == STEPS
    assert [note["step"] for note in logged] == [1, 2, 3, 4, 4, 5, 6, 6]
    assert "loss" in logged[0]["names"] and "probe/gap" in logged[-1]["names"]
    assert last == {"call": "finish", "exit_code": 0}
    assert not (runs / "plain" / "wandb").exists()
    monkeypatch.setitem(sys.modules, "wandb", None)  # not installed
    with pytest.raises(SettingsError, match=r"pip install 'affekt\[wandb\]'"):
        require_wandb()


def test_states_of_runs(runs, tmp_path):
    seen = json.loads((runs / "seen.json").read_text())
    assert "running" in seen and set(seen) <= {"running", "finished"}
    assert state_of(runs / "plain") == ("finished", "")
    cut = shutil.copytree(runs / "probed", tmp_path / "cut")
    (cut / "summary.json").unlink()
    assert state_of(cut)[0] == "interrupted"
    with open(cut / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert describe(cut)["state"] == "running"
    page = write_run_report(cut).read_text()
    assert "pre-training, interrupted" in page and "Up to step-00000006" in page and "Ledger" in page
    with pytest.raises(HealthError), failure_noted(cut):
        raise HealthError("before it was started: another's folder")
    assert state_of(cut)[0] == "interrupted"
    with pytest.raises(HealthError), failure_noted(cut):
        started = json.loads((cut / "run.json").read_text()) | {"pid": os.getpid(), "started": time.time()}
        (cut / "run.json").write_text(json.dumps(started))
        raise HealthError("step 3: not <finite>")
    assert state_of(cut) == ("failed", "exit code 4: step 3: not <finite>")
    assert "step 3: not &lt;finite&gt;" in (cut / "report.html").read_text()


def test_runs_are_listed(runs, capsys):
    assert affekt(["runs", str(runs), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["runs"]
    assert [Path(one["run"]).name for one in listed] == ["plain", "probed", "two"]
    assert all(one["state"] == "finished" and one["step"] == one["steps"] == STEPS for one in listed)
    assert listed[0]["probe"] is None and listed[1]["probe_step"] == STEPS and 0 <= listed[1]["probe"] <= 1
    assert all(one["loss"] > 0 and one["clips_per_s"] > 0 and one["model"] == "hicmae_nano" for one in listed)
    assert affekt(["runs", str(runs / "two"), "--report"]) == 0
    told = capsys.readouterr().out
    assert f"{STEPS}/{STEPS}" in told and "report: " in told
    assert find_runs(runs / "plain") == [runs / "plain"]
    assert affekt(["runs", str(runs / "nowhere")]) == 1 and "no such folder" in capsys.readouterr().err


def test_runs_are_compared(runs, tmp_path, capsys):
    page = tmp_path / "pages" / "compared.html"
    folders = [str(runs / name) for name in ("plain", "probed", "plain")]
    assert affekt(["compare", *folders, "--html", str(page)]) == 0
    told = capsys.readouterr().out
    assert "train.probe.every" in told and "train.steps" not in told and "probe/gap" in told
    assert page.read_text().count("<svg") >= 8
    assert affekt(["compare", *folders[:2], "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"]["train.probe.every"] == [None, 4] and "train.steps" not in found["settings"]
    assert found["curves"]["loss"][0] == found["curves"]["loss"][1]
    assert found["curves"]["loss"][0]["step"] == list(range(1, STEPS + 1))
    assert affekt(["compare", str(tmp_path)]) == 1 and "not the folder of a run" in capsys.readouterr().err


class Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.tags, self.sources = [], set(), []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "line", "polyline", "polygon"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("line", "polyline", "polygon"):
            assert self.open.pop() == tag


def test_the_report_needs_nothing_beside_it_and_no_name_gets_out_of_its_place(runs, tmp_path):
    text = (runs / "probed" / "report.html").read_text()
    for title in ("Reconstruction error", "Gradient norm", "Learning rate", "Waiting for data", "Linear probe",
                  "Effective rank", "What it fills in", "Ledger", "Settings and environment"):  # fmt: skip
        assert title in text, title
    assert "prefers-color-scheme: dark" in text and "@media print" in text
    evil = "<script>alert(1)</script>&\"'"
    run = shutil.copytree(runs / "probed", tmp_path / "<b>run")
    values = yaml.safe_load((run / "settings.yaml").read_text())
    values["model"]["name"] = values["data"]["shards"] = evil
    (run / "settings.yaml").write_text(yaml.safe_dump(values))
    summary = json.loads((run / "summary.json").read_text())
    summary |= {"state": evil, "exit_code": 4, "reason": evil, "guard": [{"step": 3, evil: evil, "ids": [evil]}]}
    summary["accounting"]["skipped"] = {evil: 2}
    summary["versions"][evil] = evil
    (run / "summary.json").write_text(json.dumps(summary))
    seen = json.loads((run / "pretrain_data.json").read_text())
    (run / "pretrain_data.json").write_text(json.dumps(seen | {"licences": [evil]}))
    evil_page = tmp_path / "compared.html"
    assert affekt(["compare", str(run), str(runs / "plain"), "--html", str(evil_page)]) == 0
    for page in (text, write_run_report(run).read_text(), evil_page.read_text()):
        reader = Reader()
        reader.feed(page)
        assert not reader.open and not reader.tags & {"script", "link", "iframe", "b-run"}
        assert all(source.startswith("data:") for source in reader.sources)
        assert not re.search(r"url\(|@import|https?://", page) and "<b>run" not in page
    assert "&lt;script&gt;" in (run / "report.html").read_text()


def test_a_terminal_shows_one_live_line_with_the_figures(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    row = {"loss": 1.25, "loss_video": 0.5, "grad_norm": 2.0, "lr": 1e-3, "clips_per_s": 64.0, "data_wait": 0.01}
    row |= {"mfu": 0.41, "memory_gib": 3.2, "time_left_s": 90.0}
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with training() as show:
        show(20, 100, row)

    def on_screen():
        return " ".join(re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue()).split())

    shown = on_screen()
    assert "20/100" in shown and "1.5 min left" in shown and "loss 1.2500" in shown and "MFU 41%" in shown
    with training(quiet=True) as show:
        show(20, 100, row)
    assert on_screen() == shown
    assert told(row).endswith("3.2 GiB")
    alone = {f"probe/{name}": 0.5 for name in ("linear_audio", "knn_audio", "rank_audio", "seconds")}
    assert told_probe(alone) == "linear probe (audio) 50.0%; neighbours 50.0%; effective rank (audio) 0.5; 0.5 s"


def test_a_probe_leaves_modes_and_generators_alone():
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    module[1].eval()
    before = torch.get_rng_state()
    with pytest.raises(KeyError), untouched(module, torch.device("cpu")):
        torch.rand(3)
        assert not module[0].training
        raise KeyError
    assert module.training and module[0].training and not module[1].training
    assert torch.equal(before, torch.get_rng_state())


def test_probed_clips_are_split_by_speaker(tiny_shards):
    index = tiny_shards(48, streams="mixed", speakers=8)

    def sides(streams="both", **values):
        return split(index, OnlineProbeSettings(shards="here", **values), streams)

    for streams, values in (
        ("both", {}),
        ("audio", {"test": {"split": ["test"]}, "clips": 8}),
        ("video", {"group": "id"}),
    ):
        fit, score = sides(streams, **values)
        samples = [[index.samples[p] for p in side] for side in (fit, score)]
        wanted = ("video", "audio") if streams == "both" else (streams,)
        assert all(getattr(sample, f"has_{stream}") for side in samples for sample in side for stream in wanted)
        assert not set(fit) & set(score) and fit and score
        if values.get("group") != "id":
            assert not {s.meta["speaker"] for s in samples[0]} & {s.meta["speaker"] for s in samples[1]}
    fit, score = sides("audio", clips=8)
    assert len(fit) == len(score) == 4 and sides("audio", clips=8) == (fit, score)
    with pytest.raises(SettingsError, match="no clip has the field `mood`"):
        sides(label="mood")
    with pytest.raises(SettingsError, match="no clips to score"):
        sides(test={"split": ["nothing"]})
    with pytest.raises(SettingsError, match="stand on both sides"):
        sides("audio", test={"label": ["sad", "happy"]})
    with pytest.raises(SettingsError, match="two classes at least"):
        sides("audio", group="id", test={"label": ["sad"]}, train={"label": ["angry"]})


def test_settings_of_probes_and_boards_decide_no_result():
    base = {"out": "run", "model": MODEL, "data": {"shards": "here"}, "train": {"steps": 3}}
    before = PretrainSettings.parse(base)
    watched = {"steps": 3, "wandb": "offline", "probe": {"shards": "there", "test": {"split": ["test"]}}}
    after = PretrainSettings.parse({**base, "train": watched})
    refuse_changes(after.changes_from(before), ())
    refuse_changes(before.changes_from(after), ())
    with pytest.raises(SettingsError, match="every: without effect"):
        PretrainSettings.parse({**base, "train": {"steps": 3, "probe": {"every": 5}}})
    assert different_settings([{"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": []}]) == {
        "a.c": [2, 3],
        "d": [None, []],
    }
    assert short_names([Path("x/a/one"), Path("x/b/one")]) == ["a/one", "b/one"] and short_names([Path("x/a")]) == ["a"]
