"""Pre-training, from settings to the last checkpoint, read from top to bottom."""

import hashlib
import json
from functools import partial
from pathlib import Path

import torch

from affekt import __version__
from affekt.data.accounting import FIRST_CLIPS
from affekt.data.batch import Batch
from affekt.data.files import write_text
from affekt.data.mixture import fingerprints
from affekt.pretrain.checkpoint import complete_checkpoints
from affekt.pretrain.engine import Stopwatch, digest, start_processes
from affekt.pretrain.feed import Feed, together
from affekt.pretrain.guard import GoBack, Guard
from affekt.pretrain.log import Progress, RunLog, say
from affekt.pretrain.means import add_taken, mean_taken
from affekt.pretrain.mixture import notes
from affekt.pretrain.optim import lr_at
from affekt.pretrain.parts import in_parts
from affekt.pretrain.pictures import reconstruction_picture
from affekt.pretrain.ready import get_ready
from affekt.pretrain.replay import write_dump
from affekt.pretrain.replicas import check_replicas
from affekt.pretrain.report import failure_noted, try_report
from affekt.pretrain.run_folder import claim_run
from affekt.pretrain.saver import Saver
from affekt.pretrain.seen import SEEN_FILE, stamped
from affekt.pretrain.settings import PretrainSettings
from affekt.pretrain.signals import Leave
from affekt.pretrain.vitals import Vitals
from affekt.pretrain.watchdog import Watchdog
from affekt.pretrain.zero import Engine


def pretrain(
    settings: PretrainSettings,
    resume: str | None = None,
    allow_change: tuple[str, ...] = (),
    progress: Progress | None = None,
) -> Path:
    """Train to the last step and return the run folder.

    `resume` is None (a new run), `auto`, `latest` or a checkpoint folder. The order of clips, their windows, crops and
    masks are functions of (seed, step), so a resumed run repeats the straight one exactly. `allow_change` names the
    settings that may differ from those of the resumed run. Losses are logged as means over the steps since the last
    logged one. `progress(step, total, metrics)` is called on rank 0 at every logged step.
    """
    with failure_noted(Path(settings.out)), Leave() as leave:
        processes = start_processes(settings.train.watchdog_s)
        with Watchdog(Path(settings.out) / "health", *processes[:2], settings.train.watchdog_s) as watchdog:
            back = None
            while True:
                try:
                    return _train(settings, resume, allow_change, progress, *processes, leave, watchdog, back)
                except GoBack as going:
                    back = going.with_traceback(None)  # its frames hold the old model, its moments and its batches


def _train(
    settings: PretrainSettings,
    resume: str | None,
    allow_change: tuple[str, ...],
    progress: Progress | None,
    rank: int,
    world_size: int,
    device: torch.device,
    leave: Leave,
    watchdog: Watchdog,
    back: GoBack | None,
) -> Path:
    s, data, train, run = settings.model, settings.data, settings.train, Path(settings.out)
    ready = get_ready(settings, resume, allow_change, rank, world_size, device, back)
    model, optimizer, preprocess, corpora = ready.model, ready.optimizer, ready.preprocess, ready.corpora
    probe, accounting, start_step, total_steps = ready.probe, ready.accounting, ready.start_step, ready.total_steps
    lock = together(lambda: claim_run(run) if rank == 0 else None)
    watchdog.start()
    engine = Engine(
        model,
        optimizer,
        train.global_batch // (world_size * train.accumulate),
        ready.precision,
        stage=train.zero_stage,
        offload=train.offload,
        accumulate=train.accumulate,
        clip=settings.optim.clip_grad,
    )
    if ready.state:
        engine.restore(ready.moments, ready.state)
        ready.moments = {}  # as large as the optimiser
    if ready.compiled and train.zero_stage == 3:
        engine.compile()
    saver = Saver(run / "checkpoints", train.keep_last, train.keep_every, train.on_failed_save)
    vitals = Vitals(s, device, ready.precision, world_size) if rank == 0 else None
    log = RunLog(run, start_step, settings, progress) if rank == 0 else None
    if rank == 0:
        write_text(run / "settings.yaml", settings.to_yaml())
        write_text(run / SEEN_FILE, json.dumps(stamped(ready.seen), ensure_ascii=False))
        log.start(model, world_size, str(device), ready.precision, total_steps)
        lines = [vitals.note, *notes(corpora, ready.window, ready.loader.shares, s.contrast_exclude == "speaker")]
        for line in lines + (probe.notes(ready.seen) if probe else []):
            say(line)

    model.train()
    feed, watch = Feed(ready.loader, accounting, data.skip_budget, start_step, rank, leave), Stopwatch()
    guard = Guard(train.guard, device, ready.state.get("guard"))
    first_checks = (start_step + 1, start_step + -(-FIRST_CLIPS // train.global_batch))
    batches: dict[int, Batch] = {}  # since the guard was asked last
    sums: dict[str, torch.Tensor] = {}  # of what is logged, since it was logged last; kept on the device
    saved_at = done = start_step
    lr = 0.0

    def save() -> None:
        nonlocal saved_at
        watchdog.beat(done, "save")
        with watch.paused():
            feed.check()
            summed = accounting.summed_over_ranks()
            if log:
                say(f"step {done}: {summed}")
            state = {
                "settings": settings.model_dump(mode="json"),
                "data": fingerprints(corpora),
                "accounting": summed.to_dict(),
                "guard": guard.to_dict(),
                "lr": lr,
                "affekt": __version__,
                "torch": torch.__version__,
                "world_size": world_size,
                **engine.state(),
            }
            about = {"zero_stage": train.zero_stage, "settings": digest(settings.to_yaml())}
            about["data"] = digest(fingerprints(corpora))
            saver.save(done, engine.numbers(), state, about)
        saved_at = done

    with saver:
        if back:  # a resume must not see the steps again that were left out
            save()
        for step in range(start_step, total_steps):
            watchdog.beat(step, "data")
            batch = watch.wait_for(feed)
            if leave.agreed():
                feed.take_back()
                break
            watchdog.beat(step, "forward")
            seeds = [_step_seed(train.seed, step, rank, part) for part in range(train.accumulate)]
            losses: dict[str, torch.Tensor] = {}  # means over the parts
            for inputs, masks, whole in in_parts(batch, seeds, model, engine, preprocess, device):
                of_part = engine(inputs, *masks, whole)
                watchdog.beat(step, "backward")
                engine.backward(of_part["loss"])
                losses = {k: v.detach() / train.accumulate + losses.get(k, 0.0) for k, v in of_part.items()}
            lr = lr_at(step, total_steps, settings.optim, train.global_batch)
            watchdog.beat(step, "step")
            judge = partial(guard.judge, step, losses["loss"], scaled=(engine.loss_scale or 1) > 1)
            losses["grad_norm"], taken = engine.step(lr, judge)
            saver.poll()

            done = step + 1
            batches[step] = batch.facts()
            sums = add_taken(sums, losses, taken)
            to_log, to_save = (done % n == 0 or done == total_steps for n in (train.log_every, train.checkpoint_every))
            if to_log or done in first_checks:
                feed.check()
            if to_log or to_save or device.type == "cpu":  # on a GPU where it is waited for anyhow
                for event in guard.look():
                    watchdog.beat(step, "dump")
                    write_dump(run / "health", event, batches[event["step"]], corpora, settings, rank)
                batches = {}
                if guard.must_go_back():
                    saver.wait()
                    good = guard.last_good(complete_checkpoints(run / "checkpoints"))
                    feed.check()
                    going = GoBack(good, done, guard.actions, accounting.summed_over_ranks().to_dict())
                    engine.close()
                    if log:
                        say(str(going))
                        log.close()
                        lock.close()
                    raise going
            if train.replicas_every and world_size > 1 and train.zero_stage == 0 and done % train.replicas_every == 0:
                check_replicas(done, model, optimizer)
            if to_log:
                steps, seconds, waited = watch.lap()
                values = mean_taken(sums, steps)
                sums = {}
                values |= {
                    "lr": lr,
                    "epoch": done * train.global_batch / ready.epoch_views,
                    "clips_per_s": steps * train.global_batch / seconds,
                    "data_wait": waited / seconds,
                }
                if log:
                    log.step(done, values | vitals.read(values["clips_per_s"]))
            if probe and probe.due(done, total_steps):
                watchdog.beat(step, "probe")
                with watch.paused():
                    found = probe.measure()  # every rank embeds its share of the clips
                    if log:
                        log.probe(done, found)
            # At stage 3 a forward pass needs all ranks, each of which has a share of every weight.
            if (log or train.zero_stage == 3) and (done % train.picture_every == 0 or done == total_steps):
                watchdog.beat(step, "picture")
                with watch.paused():
                    try:
                        path = run / "pictures" / f"step-{done:08d}.png" if log else None
                        reconstruction_picture(path, model, inputs, *masks)
                    except OSError as error:
                        say(f"step {done}: no picture of reconstructions: {error}; training goes on")
            if to_save:
                save()
            leave.begin()
        if leave.heard and done > saved_at:
            guard.look()
            save()
        watchdog.beat(done, "finish")
    stopped_at = done if leave.heard and done < total_steps else None
    summed = accounting.summed_over_ranks()
    if log:
        log.finish(summed.to_dict(), guard.actions, stopped_at)
    engine.close()
    if stopped_at is not None:
        raise leave.stopped(f"at step {done} of {total_steps}")
    accounting.check(data.skip_budget, finished=True)
    if log:
        try_report(run)
        lock.close()
    return run


def _step_seed(seed: int, step: int, rank: int, part: int) -> int:
    place = f"{seed}/{step}/{rank}" + (f"/{part}" if part else "")
    return int.from_bytes(hashlib.sha256(place.encode()).digest()[:8]) >> 1
