"""The page of a run: what became of it, its curves, probes and pictures, its clips, actions, settings and versions.

It is written at the end of a run, and from whatever an interrupted one has left. The page of a comparison is beside it.
"""

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from affekt.data.errors import AffektError
from affekt.data.files import write_text
from affekt.data.page import card, grid, page, section, table
from affekt.pretrain.curves import HEALTH, LEARNING, PROBES, curve_cards, picture_cards
from affekt.pretrain.log import ENDED, STARTED, read_json, read_metrics, say, versions
from affekt.pretrain.runs import compare, describe, read_settings, short_names
from affekt.pretrain.seen import SEEN_FILE

REPORT = "report.html"
PICTURES = 4
SHOWN = 20  # rows of a list of skipped clips or of actions


def write_run_report(run: Path) -> Path:
    """Write `report.html` into the folder of a run, finished or not, and return its path."""
    rows, about = read_metrics(run / "metrics.jsonl"), describe(run)
    started, summary = read_json(run / STARTED), read_json(run / ENDED)
    curves = {"": rows}
    probes = curve_cards(PROBES, curves)
    body = [
        _header(run, about, started),
        _tiles(about, rows),
        section("What it learns from", _lead(curve_cards(LEARNING, curves))),
        section("What it has learned", _probe_table(rows), grid(probes, "two")),
        section("What it fills in", grid(picture_cards(run, PICTURES), "two")),
        section("How it runs", grid(curve_cards(HEALTH, curves), "two")),
        section("The clips", _accounting(run, summary), _seen(run)),
        section("Actions", _actions(summary)),
        section("Settings and environment", _settings(read_settings(run), started, summary)),
        "<footer>Made by affekt. All numbers are in <code>metrics.jsonl</code> beside this file.</footer>",
    ]
    write_text(run / REPORT, page(f"Run: {run.resolve().name}", "\n".join(part for part in body if part)))
    return run / REPORT


def try_report(run: Path) -> None:
    """The report of a run that has just ended: what goes wrong with it is said and costs nothing else."""
    try:
        write_run_report(run)
    except Exception as error:  # whatever it is, the run's work is done and stays
        say(f"{run}: no report: {error}; `affekt runs {run} --report` writes it")


@contextmanager
def failure_noted(run: Path) -> Iterator[None]:
    """An error that leaves this block is written into the run's summary and report, if the run was started inside of it
    by this process: another's folder, refused before that, stays as it is."""
    entered = time.time()
    try:
        yield
    except Exception as error:
        started = read_json(run / STARTED)
        if started.get("pid") == os.getpid() and started.get("started", 0) >= entered:
            code = getattr(error, "exit_code", 1)
            reason = str(error) if hasattr(error, "exit_code") else f"{type(error).__name__}: {error}"
            ended = {"format": "affekt-run 1", "state": "failed", "exit_code": code, "reason": reason}
            try:
                write_text(run / ENDED, json.dumps(read_json(run / ENDED) | ended | {"versions": versions()}, indent=1))
            except AffektError as other:  # the first error is the one to hear of
                say(f"{run}: what ended the run cannot be noted: {other}")
            try_report(run)
        raise


def write_comparison(out: Path, runs: Sequence[Path]) -> Path:
    """Write a page with the curves of several runs in the same charts, and the settings that differ."""
    found, names = compare(runs), short_names(runs)
    metrics = {name: read_metrics(run / "metrics.jsonl") for name, run in zip(names, runs, strict=True)}
    values = [[escape(key), *map(_number, row)] for key, row in found["values"].items()]
    settings = [[escape(key), *(escape(str(value)) for value in row)] for key, row in found["settings"].items()]
    overview = [
        [
            f"<strong>{escape(name)}</strong>",
            escape(one["state"]),
            escape(str(one["model"])),
            _of(one["step"], one["steps"]),
        ]
        for name, one in zip(names, found["runs"], strict=True)
    ]
    head = [escape(name) for name in names]
    body = [
        f'<header><p class="over">affekt · compare</p><h1>{len(runs)} runs side by side</h1></header>',
        card(table(["Run", "State", "Model", "Step"], overview, numbers=3)),
        section("Settings that differ", card(table(["Setting", *head], settings)) if settings else "<p>None.</p>"),
        section("Last values", card(table(["What", *head], values, numbers=1))),
        section("What they learn from", grid(curve_cards(LEARNING, metrics), "two")),
        section("What they have learned", grid(curve_cards(PROBES, metrics), "two")),
        section("How they run", grid(curve_cards(HEALTH, metrics), "two")),
    ]
    write_text(out, page("Runs side by side", "\n".join(part for part in body if part)))
    return out


def _header(run: Path, about: dict[str, Any], started: dict[str, Any]) -> str:
    facts = [str(about["model"] or "")]
    if "parameters" in started:
        facts.append(f"{started['parameters'] / 1e6:.2f} M parameters")
        facts.append(f"{started.get('precision')} on {started.get('world_size')} x {started.get('device')}")
    ended = f'<div class="card"><h3>Why it ended</h3><p>{escape(about["reason"])}</p></div>' if about["reason"] else ""
    return (
        f'<header><p class="over">affekt · pre-training, {escape(about["state"])}</p><h1>{escape(run.resolve().name)}'
        f'</h1><p class="soft">{escape(", ".join(filter(None, facts)))}</p></header>{ended}'
    )


def _tiles(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    rates = [row["clips_per_s"] for row in rows if "clips_per_s" in row]
    waits = [row["data_wait"] for row in rows if "data_wait" in row]
    shares = [row["mfu"] for row in rows if "mfu" in row]
    tiles = [("Steps", f"{about['step']:,}", f"of {about['steps']:,}" if about["steps"] else "")]
    if about["loss"] is not None:
        tiles.append(("Loss", _number(about["loss"]), "mean over the last logged steps"))
    if about["probe"] is not None:
        name = "both streams" if any("probe/linear_both" in row for row in rows) else "its stream"
        note = f"balanced accuracy of a linear probe of {name}, at step {about['probe_step']:,}"
        tiles.append(("Online probe", f"{100 * about['probe']:.1f}<small>%</small>", note))
    if rates:
        wait = f"median; {100 * np.mean(waits):.1f} % of the time waiting for data" if waits else "median"
        tiles.append(("Clips per second", f"{np.median(rates):,.0f}", wait))
    if shares:
        tiles.append(("MFU", f"{100 * np.median(shares):.0f}<small>%</small>", "of the peak of the machine, median"))
    tiles.append(("Time", _duration(about["time_s"]), "over all resumes"))
    cards = [
        f'<div class="card tile"><span class="name">{name}</span><b>{value}</b><span>{escape(note)}</span></div>'
        for name, value, note in tiles
    ]
    return grid(cards, "tiles")


def _lead(cards: list[str]) -> str:
    return (
        "<p>Masked patches are predicted from the visible ones; no label is used.</p>" + grid(cards, "two")
        if cards
        else ""
    )


def _probe_table(rows: list[dict[str, Any]]) -> str:
    last = next((row for row in reversed(rows) if "probe/chance" in row), None)
    if last is None:
        return ""
    share = sum(row.get("probe/seconds", 0.0) for row in rows) / max(rows[-1]["time_s"], 1e-9)
    lines = [
        [
            name,
            *(
                f"{100 * last[key]:.1f}" if (key := f"probe/{kind}_{stream}") in last else ""
                for kind in ("linear", "knn")
            ),
        ]
        for name, stream in (("Sound", "audio"), ("Picture", "video"), ("Both", "both"))
        if f"probe/linear_{stream}" in last
    ]
    note = (
        f"<p>Frozen embeddings at step {last['step']:,}: {last['probe/clips_fit']} labelled clips to fit on and "
        f"{last['probe/clips_score']} of other groups to score; balanced accuracy in percent, chance "
        f"{100 * last['probe/chance']:.1f}. It watches a run and is no result: <code>affekt probe</code> measures. "
        f"Probes took {100 * share:.1f} % of the time.</p>"
    )
    return note + card(table(["Stream", "Linear probe", "Nearest neighbours"], lines, numbers=1))


def _accounting(run: Path, summary: dict[str, Any]) -> str:
    """Of the run's summary, or of its newest checkpoint where it was interrupted."""
    found, where = summary.get("accounting"), "over the whole run"
    states = sorted((run / "checkpoints").glob("step-*/state.json"))
    if not found and states:
        found, where = read_json(states[-1]).get("accounting"), f"up to {states[-1].parent.name}"
    if not isinstance(found, dict):
        return ""
    skipped = found.get("skipped") if isinstance(found.get("skipped"), dict) else {}
    counts = {"planned": found.get("planned"), "used": found.get("used"), "skipped": sum(skipped.values())}
    counts |= {"padded": found.get("padded")}
    rows = [[name.capitalize(), f"{count:,}" if isinstance(count, int) else ""] for name, count in counts.items()]
    rows += [["Ledger", f"<code>{escape(str(found.get('ledger', '')))}</code>"]]
    worst = sorted(skipped.items(), key=lambda item: -item[1])[:SHOWN]
    listed = table(["Clips that could not be read", "Times"], [[escape(k), str(v)] for k, v in worst], numbers=1)
    where = f'<p class="soft">{escape(where.capitalize())}.</p>'
    return card(table(["Clips", ""], rows, numbers=1), where) + (card(listed) if worst else "")


def _seen(run: Path) -> str:
    seen = read_json(run / SEEN_FILE)
    if not seen:
        return ""
    licences = "".join(f"<li>{escape(str(licence))}</li>" for licence in seen.get("licences", []))
    listed = f"<p>Their licences, which pass on to the weights:</p><ul>{licences}</ul>" if licences else ""
    return (
        f"<p>{len(seen.get('ids', [])):,} clips of {len(seen.get('speakers', [])):,} named speakers are trained on.</p>"
        + listed
    )


def _actions(summary: dict[str, Any]) -> str:
    """What the guard of the run did: steps skipped, returns to a checkpoint."""
    actions = [action for action in summary.get("guard") or [] if isinstance(action, dict)]
    keys = list(dict.fromkeys(key for action in actions for key in action))
    rows = [[escape(_plain(action.get(key, ""))) for key in keys] for action in actions[-SHOWN:]]
    more = f"<p>The last {SHOWN} of {len(actions)}:</p>" if len(actions) > SHOWN else ""
    return more + card(table([escape(key) for key in keys], rows)) if actions else ""


def _settings(settings: dict[str, Any], started: dict[str, Any], summary: dict[str, Any]) -> str:
    made_by = summary.get("versions") or started.get("versions") or {}
    rows = [[escape(str(name)), escape(str(value))] for name, value in made_by.items()]
    rows += [
        [name, escape(str(started[name]))] for name in ("host", "device", "world_size", "precision") if name in started
    ]
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True) if settings else ""
    parts = [f"<details><summary>Settings</summary><pre>{escape(text)}</pre></details>"] if text else []
    if rows:
        parts.append(f"<details><summary>Environment</summary>{table(['What', 'Value'], rows)}</details>")
    return card(*parts) if parts else ""


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _of(step: int, steps: int | None) -> str:
    return f"{step:,} of {steps:,}" if steps else f"{step:,}"


def _duration(seconds: float) -> str:
    for limit, unit in ((3600, "h"), (60, "min")):
        if seconds >= limit:
            return f"{seconds / limit:.1f}<small>{unit}</small>"
    return f"{seconds:.0f}<small>s</small>"
