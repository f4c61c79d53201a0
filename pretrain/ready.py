"""What a run needs before its first step: data, model and optimiser, as they are at the step where it begins."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from affekt.data.accounting import Accounting
from affekt.data.decode import Window
from affekt.data.errors import CheckpointError, SettingsError
from affekt.data.loader import TrainLoader, train_loader
from affekt.data.mixture import Corpus, changed_corpora, fingerprints
from affekt.data.transforms import Preprocess
from affekt.pretrain.boards import require_wandb
from affekt.pretrain.checkpoint import read_checkpoint
from affekt.pretrain.engine import agree, choose_matmul_precision, digest, resolve_precision
from affekt.pretrain.export import start_from
from affekt.pretrain.feed import together
from affekt.pretrain.flops import slow_precision
from affekt.pretrain.guard import GoBack
from affekt.pretrain.hicmae import HiCMAE
from affekt.pretrain.log import say
from affekt.pretrain.mixture import open_corpora
from affekt.pretrain.online import OnlineProbe
from affekt.pretrain.optim import create_optimizer
from affekt.pretrain.run_folder import open_run
from affekt.pretrain.seen import merged, seen_data, with_seen_before
from affekt.pretrain.settings import PretrainSettings, refuse_changes


@dataclass
class Ready:
    """A run before its first step. `state` and `moments` are those of the checkpoint it goes on from, or empty."""

    corpora: list[Corpus]
    window: Window
    loader: TrainLoader
    preprocess: Preprocess
    model: HiCMAE
    optimizer: torch.optim.Optimizer
    precision: str
    compiled: bool
    probe: OnlineProbe | None
    seen: dict[str, Any]
    accounting: Accounting
    state: dict[str, Any]
    moments: dict[str, Tensor]
    start_step: int
    total_steps: int
    epoch_views: int


def get_ready(
    settings: PretrainSettings,
    resume: str | None,
    allow_change: tuple[str, ...],
    rank: int,
    world_size: int,
    device: torch.device,
    back: GoBack | None,
) -> Ready:
    """Open the data, make the model and, where the run goes on, read its checkpoint; nothing is written. Raises
    SettingsError, DataError or CheckpointError, on all ranks together where one alone would leave the others waiting.
    """
    s, data, train = settings.model, settings.data, settings.train
    if train.threads:
        torch.set_num_threads(train.threads)
    precision = resolve_precision(train.precision, device)
    choose_matmul_precision()
    if rank == 0 and (slow := slow_precision(precision, device)):
        say(slow)
    torch.manual_seed(train.seed)

    if train.wandb:
        together(require_wandb)
    if rank == 0 and s.without_effect:
        say(f"model.streams={s.streams}: without effect are {', '.join(s.without_effect)}")
    if train.global_batch % (world_size * train.accumulate * data.repeats):
        raise SettingsError(
            f"train.global_batch {train.global_batch} is not divisible by {world_size} ranks x train.accumulate "
            f"{train.accumulate} x data.repeats {data.repeats}"
        )
    corpora = together(lambda: open_corpora(settings))
    epoch_views = (data.epoch_clips or sum(len(corpus.positions) for corpus in corpora)) * data.repeats
    total_steps = train.steps or round(train.epochs * epoch_views / train.global_batch)
    if not total_steps:
        raise SettingsError(f"train.epochs {train.epochs} of {epoch_views} views of clips is less than one step")
    model = HiCMAE(s).to(device)
    model.set_grad_checkpointing(train.activation_checkpointing)
    compiled = device.type == "cuda" if train.compile is None else train.compile
    if compiled and train.zero_stage < 3:
        model.compile(dynamic=False)  # shapes never change, but for the rare batch with a sound too short to mask
    optimizer = create_optimizer(model, settings.optim)

    if allow_change and not resume:
        raise SettingsError("--allow-change says what may differ from the run that --resume goes on with; add --resume")
    settings.check_keys(allow_change)
    checkpoint = back.checkpoint if back else open_run(Path(settings.out), resume)
    seen, start_step, accounting, state, moments = seen_data(corpora), 0, Accounting(), {}, {}
    if checkpoint:
        state, moments = load_checkpoint(checkpoint, settings, allow_change, corpora, model)
        if back:
            state |= back.onwards(state)
        start_step, accounting = state["step"], Accounting.from_dict(state["accounting"])
        seen = with_seen_before(seen, checkpoint)
    elif settings.pretrained:
        seen = merged(seen, start_from(model, settings.pretrained))
    at = checkpoint.name if checkpoint else start_step  # two machines may see a shared folder at two moments
    agree(digest(settings.to_yaml(), fingerprints(corpora), at), "settings, data or checkpoint")

    window = Window(num_frames=s.num_frames, frame_stride=data.frame_stride, mel_frames=s.mel_frames)
    probe = None
    if train.probe.shards:
        how = (window, s.preprocess, precision, train.global_batch)
        probe = together(lambda: OnlineProbe(train.probe, model, corpora, *how))
    loader = train_loader(
        corpora,
        window,
        global_batch=train.global_batch,
        rank=rank,
        world_size=world_size,
        seed=train.seed,
        start_step=start_step,
        total_steps=total_steps,
        workers=data.workers,
        streams=s.streams,
        augment=data.augment,
        epoch_clips=data.epoch_clips,
        repeats=data.repeats,
    )
    return Ready(
        corpora=corpora,
        window=window,
        loader=loader,
        preprocess=s.preprocess,
        model=model,
        optimizer=optimizer,
        precision=precision,
        compiled=compiled,
        probe=probe,
        seen=seen,
        accounting=accounting,
        state=state,
        moments=moments,
        start_step=start_step,
        total_steps=total_steps,
        epoch_views=epoch_views,
    )


def load_checkpoint(
    path: Path, settings: PretrainSettings, allow_change: tuple[str, ...], corpora: list[Corpus], model: HiCMAE
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Weights into the model; the state and moments of the checkpoint. Raises SettingsError when settings or data are
    not those of its run and not allowed to be others, CheckpointError for a file that cannot be trusted or used."""
    state, weights, moments = read_checkpoint(path)
    refuse_changes(settings.changes_from(PretrainSettings.parse_saved(state["settings"], str(path))), allow_change)
    changed, key = changed_corpora(state["data"], corpora), "data.mixture" if settings.data.mixture else "data.shards"
    if changed and key not in allow_change:
        raise SettingsError(
            f"{', '.join(changed)}: not the shards that {path} was trained on (--allow-change {key} goes on with these)"
        )
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:  # names or shapes differ, after --allow-change of a setting of the model
        raise CheckpointError(f"{path}: its weights do not fit the settings of the model: {error}") from error
    return state, moments
