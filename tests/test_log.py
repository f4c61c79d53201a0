"""What a run writes beside its checkpoints, where the disk refuses it, and what is read of it when it is damaged."""

import json

import pytest

from affekt.pretrain.log import RunLog, read_metrics
from affekt.pretrain.report import write_run_report
from affekt.pretrain.runs import compare, describe
from affekt.pretrain.settings import PretrainSettings

ROW = {"loss": 1.0, "lr": 0.1, "clips_per_s": 5.0, "data_wait": 0.0}


@pytest.fixture
def log(tmp_path) -> RunLog:
    given = {"out": "run", "model": {"name": "hicmae_nano"}, "data": {"shards": "s"}, "train": {"steps": 3}}
    log = RunLog(tmp_path, 0, PretrainSettings.parse(given))
    log.total_steps = 3
    return log


def test_a_full_disk_costs_rows_and_not_the_run(log, capsys):
    log.step(1, ROW)
    log.file.close()
    log.file = open("/dev/full", "w")  # noqa: SIM115 (it stays open, as the file that it stands for)
    log.step(2, ROW)
    assert "step 2: cannot be logged: [Errno 28] No space left" in capsys.readouterr().err
    assert [row["step"] for row in read_metrics(log.run / "metrics.jsonl")] == [1]


def test_a_resume_goes_on_behind_a_torn_row(log):
    for step in (1, 2):
        log.step(step, ROW)
    log.close()
    path = log.run / "metrics.jsonl"
    path.write_text(path.read_text()[:-9])
    again = RunLog(log.run, 1, log.settings)
    again.total_steps = 3
    again.step(2, ROW)
    again.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_a_damaged_run_is_listed_with_what_can_be_read(log):
    log.step(1, ROW)
    log.close()
    rows = ['{"step": "x", "loss": 1}', '{"step": 2, "loss": "nan", "lr": null, "time_s": [1]}', "[" * 10**5, "7", ""]
    with open(log.run / "metrics.jsonl", "a") as file:
        file.write("\n".join(rows))
    for name in ("summary.json", "run.json"):
        (log.run / name).write_text("[" * 10**5)
    one = describe(log.run)
    assert (one["state"], one["step"], one["loss"], one["time_s"]) == ("interrupted", 2, 1.0, 0.0)
    assert compare([log.run])["values"]["loss"] == [1.0] and write_run_report(log.run).is_file()
