"""The probe: how much of what people express a simple model can read from frozen features.

Everything is chosen on development clips, and each row of the table meets the test clips once. A randomly initialised
encoder gets the same menu of heads, layers and poolings, because a good pooling alone makes an untrained network look
trained.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from affekt.data.errors import SettingsError
from affekt.data.files import refuse_other_kind, write_text
from affekt.data.shards import ShardIndex
from affekt.finetune.features import FeatureTable, extract, weights_hash
from affekt.finetune.probes.baselines import statistics
from affekt.finetune.probes.depth import depth_tasks, layers_of
from affekt.finetune.probes.findings import describe, majority_row, map_of
from affekt.finetune.probes.results import write_json
from affekt.finetune.probes.search import one_thread, search_tables
from affekt.finetune.probes.settings import ProbeSettings
from affekt.finetune.probes.splits import make_task, unlearnable
from affekt.finetune.probes.task import Task
from affekt.finetune.report.results import write_results_report
from affekt.finetune.report.rows import results_csv
from affekt.finetune.schema import Layers, Results
from affekt.finetune.splits import check_unseen, licences
from affekt.pretrain.device import device_of
from affekt.pretrain.encoder import Encoder
from affekt.pretrain.export import load_encoder, random_encoder
from affekt.pretrain.seen import read_seen

Tables = dict[str, list[FeatureTable]]


def probe(settings: ProbeSettings, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Run the probe and write `results.json`, `results.csv`, the predictions, `settings.yaml` and `report.html`.

    Returns the results. `progress(done, total)` hears of windows whose features are computed. Under `torchrun` all
    ranks compute features and the first one does the rest; the others return {}.

    Raises SettingsError where the split is not disjoint or pre-training has seen test clips, DataError and
    CheckpointError where the shards or the export cannot be used.
    """
    started = time.perf_counter()
    index = ShardIndex.open(settings.shards)
    which = settings.model_dump(include={"label", "dimensions", "group", "test", "dev", "train", "seed"})
    positions, task, left_out = make_task(index, **which)
    pretraining = read_seen(settings.encoder)
    seen = check_unseen(
        index, positions[task.test], pretraining, group=settings.group, transductive=settings.transductive
    )
    depth = depth_tasks(index, positions, task, settings) if settings.depth else None
    refuse_other_kind(settings.output, "results of `affekt probe`")
    settings.output.mkdir(parents=True, exist_ok=True)
    tables, weights = feature_tables(settings, index, positions, progress)
    if ranks()["rank"]:
        return {}
    extracted = time.perf_counter()
    tasks, without = stream_tasks(tables, task, settings.streams)
    rows, trials = search_tables(tables, tasks, settings)
    rows += [majority_row(stream, tasks[stream]) for stream in settings.streams if stream in tasks]
    layers: list[Layers] = []
    if depth:
        with one_thread():
            curves = (
                layers_of(features, stream, tables[features], depth, settings.penalties)
                for features in ("pretrained", "random")
                for stream in ("audio", "video")
                if stream in tasks
            )
            layers = [of_stream for of_stream in curves if of_stream]
    fitted = time.perf_counter()
    results = describe(settings, index, positions, task, rows, layers, depth)
    results |= {
        "clips": results["clips"] | {"left_out": left_out},
        "pretraining": seen,
        "map": map_of(rows, tables, index, positions),
        "unread": tables["pretrained"][0].unread,
        "streams_without_clips": without,
        "trials": trials,
        "weights": weights,
        "licences": licences(index, positions, pretraining),
        "seconds": {
            "features": round(extracted - started, 2),
            "fits": round(fitted - extracted, 2),
            "scores": round(time.perf_counter() - fitted, 2),
        },
    }
    write_json(settings.output / "results.json", results)
    write_text(settings.output / "settings.yaml", settings.to_yaml())
    write_text(settings.output / "results.csv", results_csv(Results.model_validate(results)))
    write_results_report(settings.output / "report.html", Results.model_validate(results), index, run=settings.run)
    return results


def feature_tables(
    settings: ProbeSettings, index: ShardIndex, positions: np.ndarray, progress: Callable[[int, int], None] | None
) -> tuple[Tables, dict[str, list[str]]]:
    """Tables of the pre-trained encoder, of each random one and of plain statistics, and the hashes of the weights."""
    device = device_of(settings.device)
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
            progress(min(done, total), total)

    how = {"windows": settings.windows, "batch_size": settings.batch_size, "workers": settings.workers}
    how |= {"cache": settings.cache or settings.output / "features", "on_batch": on_batch} | ranks()
    first = encoders[0][1]
    kept = {"poolings": settings.poolings, "tokens": token_layers(first, settings), "token_limit": settings.token_limit}
    tables: Tables = {}
    for name, encoder in encoders:
        table = extract(encoder.to(device), index, positions, **how, **kept)
        encoder.cpu()
        tables.setdefault(name, []).append(table)
    tables["statistics"] = [statistics(index, positions, first.window, streams=first.streams, **how)]
    if progress:
        progress(total, total)  # a short clip has fewer different windows than were reckoned with
    return tables, hashes


def ranks() -> dict[str, int]:
    """This process among those that `torchrun` started; the only one otherwise."""
    return {"rank": int(os.environ.get("RANK", 0)), "world_size": int(os.environ.get("WORLD_SIZE", 1))}


def token_layers(encoder: Encoder, settings: ProbeSettings) -> list[str]:
    """The layers whose tokens the attentive head will read; none without that head."""
    if "attentive" not in settings.heads:
        return []
    depth = encoder.settings.depth
    numbers = range(1, depth + 1) if settings.token_layers == "all" else (depth,)
    streams = [s for s in ("audio", "video") if encoder.streams in (s, "both")]
    streams = [s for s in streams if s in settings.streams or "both" in settings.streams]
    return [f"{stream}_{number}" for stream in streams for number in numbers]


def check_preparation(index: ShardIndex, trained_on: dict[str, Any], encoder: Path) -> None:
    """SettingsError when the clips were prepared otherwise than those that the encoder was trained on."""
    ours = index.header["prepare"]
    keys = [key for key in ("size", "fps", "sample_rate", "face") if key in trained_on and key in ours]
    other = [f"{key} {ours[key]}, not {trained_on[key]}" for key in keys if ours[key] != trained_on[key]]
    if other:
        raise SettingsError(
            f"{index.root}: prepared with {'; '.join(other)}, which {encoder} was trained on; prepare them the same way"
        )


def stream_tasks(tables: Tables, task: Task, streams: tuple[str, ...]) -> tuple[dict[str, Task], dict[str, str]]:
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
