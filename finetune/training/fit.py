"""One fit of one seed: steps, looks at the development clips, checkpoints."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from affekt.data.accounting import Accounting
from affekt.data.batch import Batch, Streams
from affekt.data.errors import SettingsError
from affekt.data.files import committed
from affekt.data.loader import train_loader
from affekt.data.mixture import example
from affekt.data.transforms import Inputs
from affekt.finetune.classifier import Classifier
from affekt.finetune.finetuned import Finetuned
from affekt.finetune.training.adapting import merge_lora
from affekt.finetune.training.choice import score_to_choose_by
from affekt.finetune.training.clips import Clips, Part, Table
from affekt.finetune.training.ema import Ema
from affekt.finetune.training.judging import judge_part
from affekt.finetune.training.log import Log
from affekt.finetune.training.losses import Loss, count, effective_weights, penalty_matrix
from affekt.finetune.training.network import create_network, create_optimizer
from affekt.finetune.training.settings import FinetuneSettings
from affekt.pretrain.checkpoint import complete_checkpoints, find_checkpoint, read_checkpoint, remove_partials
from affekt.pretrain.engine import Stopwatch
from affekt.pretrain.feed import Feed
from affekt.pretrain.guard import Guard
from affekt.pretrain.means import add_taken, mean_taken
from affekt.pretrain.optim import lr_at
from affekt.pretrain.saver import Saver
from affekt.pretrain.signals import Leave
from affekt.pretrain.watchdog import Watchdog
from affekt.pretrain.zero import Engine


@dataclass
class Run:
    """What all seeds share."""

    settings: FinetuneSettings
    clips: Clips
    table: Table
    streams: Streams
    precision: str
    rank: int
    ranks: int
    device: torch.device
    leave: Leave
    watchdog: Watchdog
    seen: dict[str, Any] | None
    seen_by_test: dict[str, Any]
    progress: Callable[[int, int], None] | None = None

    @property
    def kind(self) -> str:
        return "multi" if self.settings.multi else "single"

    def how_to_judge(self, step: int) -> dict[str, Any]:
        """Arguments of `judge_clips`, which goes on for so long that the watchdog has to hear of it."""
        train, workers = self.settings.train, self.settings.data.workers
        how = {"windows": train.windows, "speech": train.speech, "batch_size": train.eval_batch}
        return {**how, "workers": workers, "on_batch": lambda _: self.watchdog.beat(step, "judge")}

    def tell(self, seed: int, refit: bool, steps: int, done: int) -> None:
        """How far the fit of a seed is, which would have so many steps, among all of them."""
        settings = self.settings
        fits = len(settings.seeds) * (1 + settings.refit)
        before = settings.seeds.index(seed) * (1 + settings.refit) + refit
        if self.progress:
            self.progress(before * steps + done, fits * steps)

    def about(self, part: str) -> dict[str, Any]:
        """What predictions for the `dev` or the `test` clips say of themselves."""
        settings = self.settings
        return {
            "name": "scratch" if settings.scratch or settings.model else "finetuned",
            "title": settings.title,
            "part": part,
            "task": settings.task,
            "selected": settings.train.choose_on,
            "streams": self.streams,
            "transductive": settings.transductive,
        }

    def judge(self, network: Classifier, part: Part) -> Finetuned:
        """The network as it judges the clips of one corpus."""
        return Finetuned(
            network,
            part.targets.classes,
            part.targets.dimensions,
            self.kind,
            self.settings.head,
            self.streams,
            self.precision,
            columns=part.columns,
            places=part.dimensions,
            width=len(self.clips.classes),
        )


@dataclass
class Fitted:
    """A network with the weights of the epoch that was chosen, and the score of the development clips there."""

    network: Classifier
    epoch: int
    score: float | None


def fit(run: Run, seed: int, refit_to: int | None) -> Fitted:
    """Train the network of a seed, looking at the development clips as the settings say, and return the choice. With
    `refit_to` they are trained on too, for so many epochs of the same schedule."""
    settings, train, clips = run.settings, run.settings.train, run.clips
    refit = refit_to is not None
    folder = Path(settings.out) / f"seed-{seed}" / ("refit" if refit else "choice")
    corpora = clips.corpora(with_dev=refit, balance=settings.data.balance)
    outputs = len(clips.classes) + len(clips.dimensions)
    network = create_network(settings, outputs, example(corpora).header["prepare"], seed).to(run.device)
    optimizer = create_optimizer(network, settings.optim)
    epoch_steps = sum(len(c.positions) for c in corpora) // train.global_batch
    if not epoch_steps:
        raise SettingsError(f"train.global_batch {train.global_batch}: there are fewer clips to learn from")
    total = train.steps or max(1, round(train.epochs * epoch_steps))
    last = min(total, refit_to * epoch_steps) if refit else total

    state, moments = _checkpoint(run, folder, network)
    start = state.get("step", 0)
    history: list[dict[str, float]] = state.get("history", [])
    loader = train_loader(
        corpora,
        network.encoder.window,
        global_batch=train.global_batch,
        rank=run.rank,
        world_size=run.ranks,
        seed=seed,
        start_step=start,
        total_steps=last,
        workers=settings.data.workers,
        streams=run.streams,
        augment=settings.data.augment,
    )
    micro = train.global_batch // (run.ranks * train.accumulate)
    engine = Engine(
        network,
        optimizer,
        micro,
        run.precision,
        stage=train.zero_stage,
        accumulate=train.accumulate,
        clip=settings.optim.clip_grad,
    )
    ema = Ema(network, settings.ema) if settings.ema else None
    if state:
        engine.restore(moments, state)
        if ema:
            ema.restore(moments)
        moments = {}
    judged = ema.in_place if ema else nullcontext  # the weights that are looked at, and chosen
    loss = make_loss(run, refit)
    accounting = Accounting.from_dict(state["accounting"]) if state else Accounting()
    feed = Feed(loader, accounting, settings.data.skip_budget, start, run.rank, run.leave)
    guard = Guard(train.guard, run.device, state.get("guard"))
    path = Path(settings.out) / "metrics.jsonl"
    log = Log(path, seed, refit, start, partial(run.tell, seed, refit, total)) if run.rank == 0 else None
    watch, sums, done, saved_at = Stopwatch(), {}, start, start
    saver = Saver(folder / "checkpoints", keep_last=1)

    def save() -> None:
        nonlocal saved_at
        run.watchdog.beat(done, "save")
        feed.check()
        summed = accounting.summed_over_ranks().to_dict()
        about = {"step": done, "history": history, "accounting": summed, "guard": guard.to_dict(), **engine.state()}
        numbers = engine.numbers()
        saver.save(done, numbers | (ema.numbers(numbers) if ema else {}), about, {"seed": seed})
        saved_at = done

    network.train()
    with saver:
        for step in range(start, last) if not _is_over(history, train.patience) else ():
            run.watchdog.beat(step, "data")
            batch = watch.wait_for(feed)
            if run.leave.agreed():
                feed.take_back()
                break
            run.watchdog.beat(step, "step")
            losses: dict[str, Tensor] = {}
            for inputs, keys, rows, counts in in_parts(run, batch, network, seed, step):
                of_part = loss_of_part(run, engine, loss, inputs, keys, rows, counts)
                engine.backward(of_part["loss"])
                losses = {k: v.detach() / train.accumulate + losses.get(k, 0.0) for k, v in of_part.items()}
            lr = lr_at(step, total, settings.optim, train.global_batch)
            losses["grad_norm"], taken = engine.step(lr, partial(guard.judge, step, losses["loss"]))
            if ema:
                ema.update(step)
            saver.poll()
            done = step + 1
            sums = add_taken(sums, losses, taken)
            looks = done == last or done % (epoch_steps * train.evaluate_every) == 0
            if looks or done % train.log_every == 0:
                feed.check()
                steps, seconds, waited = watch.lap()
                values, sums = mean_taken(sums, steps), {}
                if log:
                    rate = {"clips_per_s": steps * train.global_batch / seconds, "data_wait": waited / seconds}
                    log.row(done, {**values, "lr": lr, "epoch": done / epoch_steps, **rate})
            if looks or run.device.type == "cpu":
                guard.look()
                guard.must_go_back()  # raises HealthError: there is nothing to go back to
            if looks and not refit and train.choose == "best":
                with watch.paused(), judged():
                    look = {
                        "step": done,
                        "epoch": max(1, round(done / epoch_steps)),
                        "score": look_at(run, network, done),
                    }
                    history.append(look)
                    if _best(history) is look and run.rank == 0:
                        write_weights(network, folder / "best.safetensors")
                    if log:
                        log.look(look, _best(history))
            if done % train.checkpoint_every == 0 if train.checkpoint_every else looks:
                with watch.paused():
                    save()
            run.leave.begin()
            if looks and _is_over(history, train.patience):
                break
        if done > saved_at or (run.leave.heard and done > start):
            guard.look()
            save()
    if log:
        log.close()
    engine.close()
    if ema:
        ema.keep()
    if run.leave.heard and done < last and not _is_over(history, train.patience):
        raise run.leave.stopped(f"at step {done} of {last} of seed {seed}", "the same command")
    accounting.check(settings.data.skip_budget, finished=True)
    return chosen(run, network, folder, history, refit_to or max(1, round(last / epoch_steps)))


def in_parts(
    run: Run, batch: Batch, network: Classifier, seed: int, step: int
) -> Iterator[tuple[Inputs, list[int], Table, Tensor]]:
    """What the network takes, the keys of its views and what is known of them, in `train.accumulate` parts; torch's
    generator stands at the part's own seed, for drop path and dropout."""
    parts, preprocess = run.settings.train.accumulate, network.encoder.preprocess
    counts = count(run.table.of(batch.clip).to(run.device), parts)
    for number, part in enumerate(batch.parts(parts)):
        rows = run.table.of(part.clip).to(run.device)
        inputs, mixed = run.settings.varied.view(part, preprocess, run.device, rows.group)
        if mixed:
            rows = replace(rows, target=mixed.targets(rows.target), ratings=mixed.targets(rows.ratings))
        torch.manual_seed(step_seed(seed, step, run.rank, number))
        yield inputs, part.keys.tolist(), rows, counts


def loss_of_part(
    run: Run, engine: Engine, loss: Loss, inputs: Inputs, keys: list[int], rows: Table, counts: Tensor
) -> dict[str, Tensor]:
    """By the clips as they are, and where asked for by incomplete views of them."""
    distilling, tubelet = run.settings.distilling, engine.deepspeed.module.encoder.settings.tubelet_size
    if not distilling.on:
        return loss(engine(inputs), rows, counts)
    how = {"classes": len(run.clips.classes), "known": rows.known, "multi": run.settings.multi, "tubelet": tubelet}
    return distilling.losses(engine, partial(loss, rows=rows, counts=counts), inputs, keys, **how)


def make_loss(run: Run, refit: bool) -> Loss:
    """With the weights and penalties that the clips to learn from ask for."""
    settings, classes = run.settings.loss, len(run.clips.classes)
    weights = penalty = None
    if settings.balance or settings.penalty:
        target, first = [], 0
        for part in run.clips.parts:
            target.append(run.table.target[[first + p for p in (part.train + part.dev if refit else part.train)]])
            first += len(part.index.samples)
        taught = torch.cat(target).nan_to_num()
        if settings.balance:
            weights = effective_weights(taught.sum(0)).to(run.device)
        if settings.penalty:
            penalty = penalty_matrix(taught).to(run.device)
    return Loss(settings, classes, run.settings.multi, weights, penalty)


def look_at(run: Run, network: Classifier, step: int) -> float:
    """The score to choose by, of the development clips of every judged corpus; their mean."""
    run.watchdog.beat(step, "look")
    scores = []
    for part in (part for part in run.clips.parts if part.judged):
        table = judge_part(run.judge(network, part), part, part.dev, run.kind, run.how_to_judge(step), run.about("dev"))
        scores.append(score_to_choose_by(table, run.settings))
    network.train()
    return sum(scores) / len(scores)


def chosen(run: Run, network: Classifier, folder: Path, history: list[dict[str, float]], last_epoch: int) -> Fitted:
    """The network with the weights of the best look, or as it stands where none was asked for."""
    if not history:
        return Fitted(merge_lora(network).eval(), last_epoch, None)
    best = _best(history)
    network.load_state_dict(load_file(folder / "best.safetensors", device=str(run.device)))
    return Fitted(merge_lora(network).eval(), int(best["epoch"]), best["score"])


def write_weights(network: Classifier, path: Path) -> None:
    """In one step: a run that is killed here has the old ones or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with committed(path) as file:
        file.write(to_bytes({name: value.detach().cpu() for name, value in network.state_dict().items()}))


def step_seed(seed: int, step: int, rank: int, part: int) -> int:
    """For drop path and dropout, which draw from torch's generator."""
    return int.from_bytes(hashlib.sha256(f"finetune/{seed}/{step}/{rank}/{part}".encode()).digest()[:8]) >> 1


def _checkpoint(run: Run, folder: Path, network: Classifier) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """State and moments of the newest checkpoint of a fit, whose weights go into the network; empty for a new one."""
    if run.rank == 0:
        remove_partials(folder / "checkpoints")
    if not complete_checkpoints(folder / "checkpoints"):
        return {}, {}
    state, weights, moments = read_checkpoint(find_checkpoint(folder / "checkpoints", "latest"))
    network.load_state_dict(weights)
    return state, moments


def _best(history: list[dict[str, float]]) -> dict[str, float]:
    """The look with the best score, the earliest of equals."""
    return max(history, key=lambda look: look["score"])


def _is_over(history: list[dict[str, float]], patience: int | None) -> bool:
    return bool(history) and patience is not None and len(history) - 1 - history.index(_best(history)) >= patience
