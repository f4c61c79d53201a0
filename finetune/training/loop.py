"""Fine-tuning, from settings to scores, read from top to bottom: per seed a fit that is chosen on development clips, a
second one on all that is no test clip where that is asked for, and one look at the test clips."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from affekt.data.errors import SettingsError
from affekt.data.files import refuse_other_kind, write_text
from affekt.finetune.calibration import fit_temperatures
from affekt.finetune.finetuned import Finetuned, load_finetuned, save_finetuned
from affekt.finetune.predictions import Predictions
from affekt.finetune.schema import Results
from affekt.finetune.training.clips import Part, check_leaks, make_table, open_clips
from affekt.finetune.training.fit import Fitted, Run, fit
from affekt.finetune.training.judging import judge_part
from affekt.finetune.training.mapping import write_maps
from affekt.finetune.training.network import hash_of_weights, seen_before, streams_of
from affekt.finetune.training.outcome import corpus_folder, map_file, prediction_file, write_results
from affekt.finetune.training.settings import FREE, FinetuneSettings
from affekt.pretrain.engine import agree, choose_matmul_precision, digest, resolve_precision, start_processes
from affekt.pretrain.feed import together
from affekt.pretrain.flops import slow_precision
from affekt.pretrain.log import say, versions
from affekt.pretrain.run_folder import lock_folder
from affekt.pretrain.seen import merged, seen_data
from affekt.pretrain.settings import changes_between
from affekt.pretrain.signals import Leave
from affekt.pretrain.watchdog import Watchdog

MARK = "finetune.json"
Progress = Callable[[int, int], None]


def finetune(settings: FinetuneSettings, progress: Progress | None = None) -> Results:
    """Fit, choose, score and write `settings.out`; returns what `results.json` holds (of the first corpus, where
    several are judged; the others have folders by their names).

    The same call goes on where an earlier one was ended, to the same numbers: the order of clips and all that is varied
    are functions of seed and step. `progress(done, total)` hears of steps on rank 0.

    Raises SettingsError where sides share a group or a file, pre-training has seen test clips, or the folder holds a
    fine-tuning of other settings; DataError and CheckpointError where shards or weights cannot be used.
    """
    out = Path(settings.out)
    with Leave() as leave:
        rank, ranks, device = start_processes(settings.train.watchdog_s)
        with Watchdog(out / "health", rank, ranks, settings.train.watchdog_s) as watchdog:
            run = together(lambda: get_ready(settings, rank, ranks, device, leave, watchdog, progress))
            agree(digest(settings.to_yaml(), *(p.index.fingerprint for p in run.clips.parts)), "settings or data")
            lock = together(lambda: claim_folder(run) if rank == 0 else None)
            watchdog.start()
            for seed in settings.seeds:
                if not all(path.exists() for path in prediction_files(run, seed, "test")):
                    finetune_seed(run, seed)
                if rank == 0:
                    remove_checkpoints(run, seed)
            first = partial(load_finetuned, seed_folder(run, settings.seeds[0]) / "model", device)
            write_maps(run, first, {p.name: map_file(corpus_folder(settings, p)) for p in judged_parts(run)})
            results = together(
                lambda: write_results(settings, run.clips, run.seen, run.seen_by_test) if rank == 0 else None
            )
            if lock:
                lock.close()
    return results or Results.read(out / "results.json")


def get_ready(settings, rank, ranks, device, leave, watchdog, progress) -> Run:  # as in `finetune`
    """Open the data and compare it with what pre-training has seen; nothing is written."""
    train = settings.train
    if train.threads:
        torch.set_num_threads(train.threads)
    choose_matmul_precision()
    precision = resolve_precision(train.precision, device)
    if rank == 0 and (slow := slow_precision(precision, device)):
        say(slow)
    if train.global_batch % (ranks * train.accumulate):
        raise SettingsError(
            f"train.global_batch {train.global_batch} is not divisible by {ranks} ranks x train.accumulate "
            f"{train.accumulate}"
        )
    streams = streams_of(settings)
    settings.varied.check(streams, settings.data.augment)
    clips = open_clips(settings, streams)
    for note in clips.notes if rank == 0 else ():
        say(note)
    seen = seen_before(settings)
    return Run(
        settings=settings,
        clips=clips,
        table=make_table(clips),
        streams=streams,
        precision=precision,
        rank=rank,
        ranks=ranks,
        device=device,
        leave=leave,
        watchdog=watchdog,
        seen=seen,
        seen_by_test=check_leaks(clips, settings, seen),
        progress=progress,
    )


def claim_folder(run: Run):
    """Make the folder, or find this very fine-tuning in it. Raises SettingsError naming the settings that differ."""
    settings, out = run.settings, Path(run.settings.out)
    ours = {
        "format": "affekt-finetune 1",
        "settings": settings.model_dump(mode="json"),
        "data": {part.name: part.index.fingerprint for part in run.clips.parts},
        "weights": hash_of_weights(settings),
    }
    if not (out / MARK).exists():
        refuse_other_kind(out, "a fine-tuning")
        out.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(out)
    if (out / MARK).exists():
        theirs = json.loads((out / MARK).read_text(encoding="utf-8"))
        before = FinetuneSettings.parse_saved(theirs["settings"], str(out / MARK)).model_dump(mode="json")
        changes = changes_between(before, ours["settings"], (*FREE, "seeds", "bootstrap"))
        changes |= changes_between(*({k: x[k] for k in ("data", "weights")} for x in (theirs, ours)), ())
        if changes:
            lines = [f"  {key}: {old!r} -> {new!r}" for key, (old, new) in changes.items()]
            raise SettingsError(
                f"{out}: holds a fine-tuning with other settings or data:\n" + "\n".join(lines) + "\n"
                "restore them, or choose another folder (out=...)"
            )
    write_text(out / MARK, json.dumps({**ours, "versions": versions()}, indent=1))
    write_text(out / "settings.yaml", settings.to_yaml())
    return lock


def finetune_seed(run: Run, seed: int) -> None:
    """Fit, choose, fit again where asked, and score the test clips once; the predictions are what is left."""
    settings = run.settings
    chosen = fit(run, seed, refit_to=None)
    has_dev = settings.train.choose_on == "dev"  # or else nothing is left to fit a temperature on
    for part, path in zip(judged_parts(run), prediction_files(run, seed, "dev")) if has_dev else ():
        predict(run, chosen, part, part.dev, seed, "dev", path)
    temperatures = temperatures_of(run, seed) if run.rank == 0 and has_dev else []
    final = fit(run, seed, refit_to=chosen.epoch) if settings.refit else chosen
    if run.rank == 0:
        whole = Finetuned(
            final.network,
            run.clips.classes,
            run.clips.dimensions,
            kind="multi" if settings.multi else "single",
            head=settings.head,
            streams=run.streams,
            temperatures=temperatures,
            adapter_width=settings.adapting.adapter_width,
        )
        origin = {
            "title": settings.title,
            "encoder": settings.encoder if settings.encoder and not settings.scratch else "fresh weights",
            "seed": seed,
            "epoch": chosen.epoch,
            "chosen": settings.train.choose,
            "refit": settings.refit,
        }
        corpora = run.clips.corpora(with_dev=True)  # the epoch was chosen on development clips, so they were seen
        seen = seen_data(corpora)
        save_finetuned(whole, seed_folder(run, seed) / "model", origin, merged(seen, run.seen) if run.seen else seen)
    for part, path in zip(judged_parts(run), prediction_files(run, seed, "test")):
        predict(run, final, part, part.test, seed, "test", path, epoch=chosen.epoch)


def predict(
    run: Run,
    fitted: Fitted,
    part: Part,
    positions: list[int],
    seed: int,
    side: str,
    path: Path,
    epoch: int | None = None,
) -> Predictions:
    """Predictions for one side of a corpus, written by rank 0."""
    about = {"corpus": part.name, "seed": seed, "epoch": fitted.epoch if epoch is None else epoch, **run.about(side)}
    table = judge_part(
        run.judge(fitted.network, part), part, positions, run.kind, run.how_to_judge(fitted.epoch), about
    )
    if run.rank == 0:
        table.save(path)
        say(f"seed {seed}: {len(table)} {side} clips judged, {path}")
    return table


def temperatures_of(run: Run, seed: int) -> list[float]:
    """For the saved model, from the development clips; none for a head that corpora with other classes share."""
    parts = judged_parts(run)
    if len(parts) > 1 or not run.clips.classes or parts[0].targets.classes != run.clips.classes:
        return []
    return fit_temperatures(Predictions.read(prediction_files(run, seed, "dev")[0])).values.tolist()


def remove_checkpoints(run: Run, seed: int) -> None:
    """Of a seed that is judged; its model stays."""
    for phase in ("choice", "refit"):
        shutil.rmtree(seed_folder(run, seed) / phase, ignore_errors=True)


def judged_parts(run: Run) -> list[Part]:
    return [part for part in run.clips.parts if part.judged]


def prediction_files(run: Run, seed: int, side: str) -> list[Path]:
    """Of every judged corpus."""
    return [prediction_file(corpus_folder(run.settings, part), seed, side) for part in judged_parts(run)]


def seed_folder(run: Run, seed: int) -> Path:
    return Path(run.settings.out) / f"seed-{seed}"
