"""The linear probe: how much of what people express a linear model can read from frozen features.

Everything is chosen on development clips, and each row of the table meets the test clips once. A randomly initialised
encoder gets the same menu of layers and poolings, because a good pooling alone makes an untrained network look trained.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from threadpoolctl import threadpool_limits

from affekt.data.errors import SettingsError
from affekt.data.files import refuse_other_kind, write_text
from affekt.data.machine import run_in_processes
from affekt.data.settings import Settings
from affekt.data.shards import ShardIndex
from affekt.finetune.features import FeatureTable, extract, weights_hash
from affekt.finetune.metrics.confusion import SCORES, confusion_matrix, uar
from affekt.finetune.metrics.intervals import bootstrap_interval
from affekt.finetune.probes.baselines import majority, statistics
from affekt.finetune.probes.menu import (
    Task,
    Trial,
    best_of,
    plain_blocks,
    predict_test,
    search_both,
    search_stream,
    try_all,
)
from affekt.finetune.probes.results import describe_clips, versions, write_json
from affekt.finetune.probes.splits import make_task, unlearnable
from affekt.finetune.report.probe import write_report
from affekt.finetune.splits import Selector, check_unseen
from affekt.pretrain.export import load_encoder, random_encoder
from affekt.pretrain.seen import read_seen

Stream = Literal["audio", "video", "both"]


class ProbeSettings(Settings):
    """What to probe, and on which clips.

    `test`, `dev` and `train` select by manifest fields, `{split: [test]}`, or by `{fraction: 0.2}` of the groups there
    are; `dev` is taken from what `test` leaves, `train` from what `dev` leaves. `dev: {folds: 5}` chooses by
    cross-validation over the groups of `train`: steadier with few speakers, at five times the fits.
    """

    shards: str | Path = Field(description="folder written by `affekt prepare`, or its url")
    encoder: Path = Field(description="export folder of the pre-trained encoder")
    output: Path = Field(description="folder for results.json, settings.yaml and report.html")
    label: str = Field("label", description="manifest field to tell apart")
    group: Literal["speaker", "id"] = Field("speaker", description="what may not stand on two sides of the split")
    test: Selector
    dev: Selector
    train: Selector = Field({}, description="all that is left when empty")
    streams: tuple[Stream, ...] = Field(("audio", "video", "both"), min_length=1)
    windows: int = Field(2, ge=1, description="evenly spaced windows per clip whose features are averaged")
    penalties: tuple[Annotated[float, Field(gt=0, lt=1e6)], ...] = Field(
        (0.1, 0.03, 0.01, 0.003, 0.001, 0.0001), min_length=1
    )
    random_seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1, description="random encoders to compare with")
    bootstrap: int = Field(2000, ge=100)
    seed: int = Field(0, ge=0, lt=2**31)
    transductive: bool = Field(False, description="allow test clips in pre-training, and name every result so")
    cache: Path | None = Field(None, description="folder of frozen features; `features` in the output when not set")
    batch_size: int = Field(16, ge=1)
    workers: int = Field(0, ge=0, description="processes that decode clips, and then that fit")
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="cuda, cpu, or cuda where there is one"
    )
    run: Path | None = Field(None, description="pre-training run whose curves and pictures the report shows")
    title: str = "What the features know"


@dataclass
class Row:
    """A cell of the table: one kind of features on one stream, with the test predictions `(seeds, clips)`."""

    features: str
    stream: str
    kind: Literal["chosen", "plain"]
    task: Task
    choices: list[Trial] = field(default_factory=list)
    predictions: list[np.ndarray] = field(default_factory=list)


def probe(settings: ProbeSettings, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Run the probe and write `results.json`, `settings.yaml` and `report.html`; returns the results.

    `progress(done, total)` hears of windows whose features are computed.

    Raises SettingsError where the split is not disjoint or pre-training has seen test clips, DataError and
    CheckpointError where the shards or the export cannot be used.
    """
    started = time.perf_counter()
    index = ShardIndex.open(settings.shards)
    parts = {"test": settings.test, "dev": settings.dev, "train": settings.train}
    by = {"label": settings.label, "group": settings.group}
    positions, task, left_out = make_task(index, **by, **parts, seed=settings.seed)
    pretraining = read_seen(settings.encoder)
    seen = check_unseen(
        index, positions[task.test], pretraining, group=settings.group, transductive=settings.transductive
    )
    refuse_other_kind(settings.output, "results of `affekt probe`")
    settings.output.mkdir(parents=True, exist_ok=True)
    tables, weights = feature_tables(settings, index, positions, progress)
    extracted = time.perf_counter()
    tasks, without = stream_tasks(tables, task, settings.streams)
    rows, trials = search_tables(tables, tasks, settings)
    for stream in (s for s in settings.streams if s in tasks):
        guess = majority(task.labels[tasks[stream].fitting], len(task.classes))
        rows.append(Row("majority", stream, "chosen", tasks[stream]))
        rows[-1].predictions.append(np.full(len(tasks[stream].test), guess))
    results = {
        "format": "affekt-probe 1",
        "settings": json.loads(settings.model_dump_json()),
        "classes": task.classes,
        "chance": 1 / len(task.classes),
        "clips": describe_clips(index, positions, task, left_out, **by),
        "unread": tables["pretrained"][0].unread,
        "streams_without_clips": without,
        "rows": [describe_row(row, settings) for row in rows],
        "differences": differences(rows, settings),
        "trials": trials,
        "pretraining": seen,
        "weights": weights,
        "shards": index.fingerprint,
        "licences": licences(index, positions, pretraining),
        "versions": versions(),
        "seconds": {
            "features": round(extracted - started, 2),
            "fits_and_scores": round(time.perf_counter() - extracted, 2),
        },
    }
    write_json(settings.output / "results.json", results)
    write_text(settings.output / "settings.yaml", settings.to_yaml())
    report = settings.output / "report.html"
    write_report(report, results=results, run_folder=settings.run, corpus=index, title=settings.title)
    return results


def feature_tables(
    settings: ProbeSettings, index: ShardIndex, positions: np.ndarray, progress: Callable[[int, int], None] | None
) -> tuple[dict[str, list[FeatureTable]], dict[str, list[str]]]:
    """Tables of the pre-trained encoder, of each random one and of plain statistics, and the hashes of the weights."""
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise SettingsError(f"device {device}: this machine has no CUDA device; say device=cpu or leave it to `auto`")
    encoders = [("pretrained", load_encoder(settings.encoder))]
    check_preparation(index, encoders[0][1].prepare, settings.encoder)
    encoders += [("random", random_encoder(settings.encoder, seed)) for seed in settings.random_seeds]
    hashes: dict[str, list[str]] = {}
    for name, encoder in encoders:
        hashes.setdefault(name, []).append(weights_hash(encoder))
    if set(hashes["pretrained"]) & set(hashes["random"]):
        raise SettingsError(f"{settings.encoder}: its weights equal a random initialisation; it was never trained")
    total, done = len(positions) * settings.windows * (len(encoders) + 1), 0

    def on_batch(views: int) -> None:
        nonlocal done
        done += views
        if progress:
            progress(done, total)

    how = {"windows": settings.windows, "batch_size": settings.batch_size, "workers": settings.workers}
    tables: dict[str, list[FeatureTable]] = {}
    for name, encoder in encoders:
        cache = settings.cache or settings.output / "features"
        table = extract(encoder.to(device), index, positions, **how, cache=cache, on_batch=on_batch)
        tables.setdefault(name, []).append(table)
    first = encoders[0][1]
    tables["statistics"] = [statistics(index, positions, first.window, **how, streams=first.streams, on_batch=on_batch)]
    if progress:
        progress(total, total)  # a short clip has fewer different windows than were reckoned with
    return tables, hashes


def check_preparation(index: ShardIndex, trained_on: dict[str, Any], encoder: Path) -> None:
    """SettingsError when the clips were prepared otherwise than those that the encoder was trained on."""
    ours = index.header["prepare"]
    keys = [key for key in ("size", "fps", "sample_rate", "face") if key in trained_on and key in ours]
    other = [f"{key} {ours[key]}, not {trained_on[key]}" for key in keys if ours[key] != trained_on[key]]
    if other:
        raise SettingsError(
            f"{index.root}: prepared with {'; '.join(other)}, which {encoder} was trained on; prepare them the same way"
        )


def stream_tasks(
    tables: dict[str, list[FeatureTable]], task: Task, streams: tuple[str, ...]
) -> tuple[dict[str, Task], dict[str, str]]:
    """The task on the clips that have each stream, and why a stream has none. SettingsError when all are without."""
    every = [table for versions_of in tables.values() for table in versions_of]
    tasks, without = {}, {}
    for stream in ("audio", "video", "both") if "both" in streams else streams:
        part = task.having(np.logical_and.reduce([table.has[stream] for table in every]))
        trouble = unlearnable(part)
        if trouble:
            without[stream] = trouble
        else:
            tasks[stream] = part
    if not set(tasks) & set(streams):
        raise SettingsError(f"nothing can be probed: {'; '.join(f'{s}: {why}' for s, why in without.items())}")
    return tasks, without


def search_tables(
    tables: dict[str, list[FeatureTable]], tasks: dict[str, Task], settings: ProbeSettings
) -> tuple[list[Row], list[dict[str, Any]]]:
    """Search every feature table, side by side with `settings.workers` above 1: the rows, and all trials.

    The tables of further seeds of the same features join the rows that are there.
    """
    named = [(name, seed, table) for name, versions_of in tables.items() for seed, table in enumerate(versions_of)]
    jobs = [(table, tasks, settings, name != "statistics") for name, _, table in named]
    if settings.workers > 1:
        found = dict(run_in_processes(search_table, jobs, settings.workers, _one_thread))
    else:
        with _one_thread():
            found = {number: search_table(*job) for number, job in enumerate(jobs)}
    rows: dict[tuple[str, str, str], Row] = {}
    trials = []
    for number, (name, seed, _) in enumerate(named):
        for stream, kind, choice, prediction in found[number].chosen:
            row = rows.setdefault((name, stream, kind), Row(name, stream, kind, tasks[stream]))
            row.choices.append(choice)
            row.predictions.append(prediction)
        trials += [{"features": name, "seed": seed, "stream": s} | asdict(trial) for s, trial in found[number].tried]
    return list(rows.values()), trials


@dataclass
class Found:
    """What the search of one table gives: (stream, kind, choice, test predictions), and every (stream, trial)."""

    chosen: list[tuple[str, str, Trial, np.ndarray]] = field(default_factory=list)
    tried: list[tuple[str, Trial]] = field(default_factory=list)


def search_table(table: FeatureTable, tasks: dict[str, Task], settings: ProbeSettings, plain: bool) -> Found:
    """Choose from every stream's menu in one feature table and predict the test clips; `plain` adds the fixed row."""
    found = Found()
    best: dict[str, Trial] = {}
    for stream, task in tasks.items():
        if stream != "both":
            trials = search_stream(table, stream, task, settings.penalties)
        elif len(best) == 2:
            trials = search_both(table, best["audio"].blocks + best["video"].blocks, task, settings.penalties)
        else:
            continue  # stream_tasks gives `both` only to clips that have the two
        best[stream] = best_of(trials)
        found.tried += [(stream, trial) for trial in trials]
        if stream not in settings.streams:
            continue
        found.chosen.append((stream, "chosen", best[stream], predict_test(table, best[stream], task)))
        if plain:
            fixed = try_all(table, [plain_blocks(table, stream)], task, settings.penalties)[0]
            found.chosen.append((stream, "plain", fixed, predict_test(table, fixed, task)))
    return found


def _one_thread() -> threadpool_limits:
    """The matrices of a fit are so small that BLAS loses more by sharing them out than it gains."""
    return threadpool_limits(1)


def describe_row(row: Row, settings: ProbeSettings) -> dict[str, Any]:
    """A row for results.json. With several seeds scores are means over them and the confusion matrix is their sum."""
    classes, truth = len(row.task.classes), row.task.labels[row.task.test]
    predictions = np.stack(row.predictions)
    groups = test_groups(row.task, settings)
    how = {"n": settings.bootstrap, "seed": settings.seed, "num_classes": classes}
    return {
        "features": row.features,
        "stream": row.stream,
        "kind": row.kind,
        "transductive": settings.transductive,
        "clips": row.task.counts(),
        "choices": [
            {"blocks": list(c.blocks), "penalty": c.penalty, "dev_uar": c.best, "test_uar": _uar(truth, p, classes)}
            for c, p in zip(row.choices, row.predictions)
        ],
        "test": {
            name: asdict(bootstrap_interval(score, truth, predictions, groups, **how)) for name, score in SCORES.items()
        },
        "confusion": sum(confusion_matrix(truth, p, classes) for p in row.predictions).tolist(),
    }


def differences(rows: list[Row], settings: ProbeSettings) -> list[dict[str, Any]]:
    """Paired differences of UAR on the test clips that two rows share: pre-trained against random encoder and plain
    statistics on each stream, and both streams against either alone."""
    chosen = {(row.features, row.stream): row for row in rows if row.kind == "chosen"}
    pairs = [(("pretrained", s), (other, s)) for s in settings.streams for other in ("random", "statistics")]
    pairs += [(("pretrained", "both"), ("pretrained", s)) for s in ("audio", "video")]
    found = []
    for one, other in pairs:
        if one not in chosen or other not in chosen:
            continue
        a, b = chosen[one], chosen[other]
        shared, in_a, in_b = np.intersect1d(a.task.test, b.task.test, return_indices=True)
        task = replace(a.task, test=shared)
        interval = bootstrap_interval(
            uar,
            task.labels[shared],
            np.stack(a.predictions)[:, in_a],
            test_groups(task, settings),
            settings.bootstrap,
            settings.seed,
            num_classes=len(task.classes),
            minus=np.stack(b.predictions)[:, in_b],
        )
        found.append({"of": one, "minus": other, "clips": len(shared), "uar": asdict(interval)})
    return found


def test_groups(task: Task, settings: ProbeSettings) -> list[str] | None:
    """What the bootstrap resamples: the speakers of the test clips, or None for the clips themselves."""
    return [task.groups[clip] for clip in task.test] if settings.group == "speaker" else None


def licences(index: ShardIndex, positions: np.ndarray, pretraining: dict[str, Any]) -> list[str]:
    """Licences of the clips behind the features and the probe; they bind whoever passes the results on."""
    probed = {str(index.samples[p].meta["licence"]) for p in positions if index.samples[p].meta.get("licence")}
    return sorted(probed | set(pretraining["licences"]))


def _uar(truth: np.ndarray, prediction: np.ndarray, classes: int) -> float:
    return float(uar(confusion_matrix(truth, prediction, classes)))
