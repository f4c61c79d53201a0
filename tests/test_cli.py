"""The command line: exit codes, messages instead of tracebacks, answers for machines."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path

import pytest
import typer

from affekt import __version__
from affekt.cli import app, run
from affekt.data.errors import AffektError, CheckpointError, DataError, HealthError, SettingsError
from affekt.progress import progress

EXPERIMENTS = sorted(path.name for path in resources.files("affekt.launch").iterdir() if path.name.endswith(".yaml"))
COMMANDS = ["synth", "import", "prepare", "inspect", "pretrain", "launch", "plan", "export", "probe", "demo"]
COMMANDS += ["index", "retrieve", "recall"]


README = Path(__file__).resolve().parents[1] / "README.md"


def affekt(*arguments, **options):
    command = [sys.executable, "-m", "affekt", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


@pytest.mark.parametrize("arguments", [["--version"], ["--version", "synth"]])
def test_version(arguments, tmp_path):
    done = affekt(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"affekt {__version__}\n")


def test_help_names_every_command_without_loading_torch(tmp_path):
    code = "import sys, affekt.cli; code = affekt.cli.run(['--help']); print('torch' in sys.modules); sys.exit(code)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"
    assert all(command in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    assert run([command, "--help"]) == 0
    assert "Usage" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["synht"], ["synth"], ["synth", "out", "--clips", "many"], ["synth", "--nope"]])
def test_wrong_usage_exits_with_1(arguments, capsys):
    assert run(arguments) == 1
    error = capsys.readouterr().err
    assert "Error" in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("error", "code"),
    [(AffektError, 1), (SettingsError, 1), (DataError, 2), (CheckpointError, 3), (HealthError, 4)],
)
def test_an_error_raised_on_purpose_is_a_message_and_an_exit_code(error, code, monkeypatch, capsys):
    def fail(*_):
        raise error("clip_7: what is wrong\nand what to do")

    monkeypatch.setattr("affekt.pretrain.export.export", fail)
    assert run(["export", "run", "out"]) == code
    captured = capsys.readouterr()
    assert captured.err == "affekt: clip_7: what is wrong\nand what to do\n"
    assert captured.out == ""


def test_a_bug_keeps_its_traceback(monkeypatch):
    def fail(*_):
        raise ZeroDivisionError

    monkeypatch.setattr("affekt.pretrain.export.export", fail)
    with pytest.raises(ZeroDivisionError):
        run(["export", "run", "out"])


def test_an_interruption_says_how_to_go_on(monkeypatch, capsys, tmp_path):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("affekt.data.prepare.prepare", interrupt)
    assert run(["prepare", str(tmp_path), str(tmp_path / "out")]) == 130
    assert "the same command goes on from there" in capsys.readouterr().err


def test_an_unknown_experiment_names_the_nearest(capsys):
    wanted = EXPERIMENTS[0].removesuffix(".yaml")
    assert run(["pretrain", f"{wanted}x"]) == 1
    assert f"did you mean `{wanted}`?" in capsys.readouterr().err
    assert run(["probe", "zzzzzz"]) == 1
    assert wanted in capsys.readouterr().err


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_shipped_experiment_resolves(name, capsys, tmp_path):
    """As a command's settings; printed settings read back to the same settings."""
    path = resources.files("affekt.launch") / name
    assert path.read_text(encoding="utf-8").startswith("#"), "begins with its command, hardware, hours and score"
    command = next(c for c in ("pretrain", "probe", "finetune", "recall") if run([c, name, "--print-config"]) == 0)
    capsys.readouterr()
    assert run([command, name.removesuffix(".yaml"), "--print-config"]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "again.yaml").write_text(printed, encoding="utf-8")
    assert run([command, str(tmp_path / "again.yaml"), "--print-config"]) == 0
    assert capsys.readouterr().out == printed


def test_the_commands_that_the_readme_shows_are_understood():
    """Parsed as the command would, without running them; the real options decide, not a copy of them."""
    shown = re.findall(r"^    affekt (\w+) (.+)$", README.read_text(encoding="utf-8"), re.M)
    assert len(shown) >= 5
    commands = typer.main.get_command(app).commands
    for name, arguments in shown:
        commands[name].make_context(name, shlex.split(arguments))
    with pytest.raises(Exception, match="--nope"):
        commands["export"].make_context("export", ["run", "out", "--nope"])


def test_an_unknown_setting_names_the_nearest(capsys, tmp_path):
    (tmp_path / "run.yaml").write_text(
        "out: runs/x\nmodel: {name: hicmae_nano}\ndata: {shards: s}\ntrain: {steps: 1}\n", encoding="utf-8"
    )
    assert run(["pretrain", str(tmp_path / "run.yaml"), "train.sede=1", "--print-config"]) == 1
    error = capsys.readouterr().err
    assert "unknown setting `train.sede`; did you mean `seed`?" in error and "run.yaml" in error
    assert run(["pretrain", str(tmp_path / "run.yaml"), "train.seed=7", "--print-config"]) == 0
    assert "  seed: 7\n" in capsys.readouterr().out


def test_an_empty_folder_is_refused(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    assert run(["prepare", str(tmp_path / "empty"), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert str(tmp_path / "empty") in error and "Traceback" not in error


def test_a_folder_that_is_no_run_is_refused_with_3(capsys, tmp_path):
    assert run(["export", str(tmp_path), str(tmp_path / "out")]) == 3
    assert "settings.yaml" in capsys.readouterr().err


def test_json_is_one_object_on_stdout_and_nothing_on_stderr(tmp_path):
    done = affekt("synth", "corpus", "--clips", 2, "--speakers", 2, "--seconds", 1, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"clips": 2, "manifest": "corpus/manifest.csv"}
    assert done.stderr == ""


def test_a_signal_stops_a_real_process_with_130(tmp_path):
    command = [sys.executable, "-m", "affekt", "synth", "corpus", "--clips", "500", "--speakers", "5"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.rglob("*.mp4")) and time.monotonic() < deadline:
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "affekt: interrupted" in error and "Traceback" not in error


def test_progress_writes_plain_lines_where_there_is_no_terminal(capsys):
    with progress("work", "clips") as report:
        for done in range(101):
            report(done, 100)
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()  # far fewer than calls: one line per interval, and the last
    assert line.startswith("work: 100/100 clips") and captured.out == ""
    with progress("work", quiet=True) as report:
        report(100, 100)
    assert capsys.readouterr().err == ""
