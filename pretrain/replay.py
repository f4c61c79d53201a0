"""A step that was skipped, written down so that it can be done again clip by clip: which one spoils the loss?"""

import json
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from affekt.data.accounting import all_gather_json
from affekt.data.batch import Batch
from affekt.data.decode import Window
from affekt.data.errors import CheckpointError, DataError, SettingsError
from affekt.data.files import check_version, write_text
from affekt.data.loader import train_loader
from affekt.data.mixture import Corpus
from affekt.data.settings import apply_overrides
from affekt.data.transforms import Inputs
from affekt.pretrain.checkpoint import complete_checkpoints, read_checkpoint
from affekt.pretrain.guard import finite_or_text
from affekt.pretrain.hicmae import HiCMAE
from affekt.pretrain.log import say
from affekt.pretrain.masks import Mask
from affekt.pretrain.mixture import open_corpora
from affekt.pretrain.settings import PretrainSettings

FORMAT, VERSION = "affekt-batch", "1.0"


def write_dump(
    folder: Path, event: dict[str, Any], batch: Batch, corpora: Sequence[Corpus], settings: PretrainSettings, rank: int
) -> None:
    """All ranks call it: rank 0 writes `folder/step-XXXXXXXX.json` with the clips of all of them."""
    own = {"loss": event["own_loss"], "clips": _clips(batch, corpora)}
    parts = all_gather_json(own)
    if rank == 0:
        dump = {
            "format": FORMAT,
            "version": VERSION,
            **{key: value for key, value in event.items() if key != "own_loss"},
            "seed": settings.train.seed,
            "epoch": batch.epoch,
            "ranks": [{"rank": number, **part} for number, part in enumerate(parts)],
            "settings": settings.model_dump(mode="json"),
        }
        path = folder / f"step-{event['step']:08d}.json"
        figures = f"loss {event['loss']}, limit {event['limit']}, gradient norm {event['grad_norm']}"
        try:
            folder.mkdir(exist_ok=True)
            write_text(path, json.dumps(dump, indent=1, ensure_ascii=False))
            way = f"affekt pretrain --replay {path}"
        except (OSError, DataError) as error:  # this rank alone would leave the others waiting for it
            way = f"no dump to replay: {error}"
        say(f"step {event['step']}: skipped ({event['why']}): {figures}; {way}")


def _clips(batch: Batch, corpora: Sequence[Corpus]) -> list[dict[str, Any]]:
    clips = []
    for row, name in enumerate(batch.ids):
        clip = {"id": name, "shard": "", "audio_samples": int(batch.audio_valid[row])}
        number = int(batch.clip[row])
        for corpus in corpora if number >= 0 else ():
            if number < len(corpus.index.samples):
                clip["shard"] = corpus.index.shard_name(corpus.index.samples[number])
                break
            number -= len(corpus.index.samples)
        clips.append(clip)
    return clips


def replay_step(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Do the step of a dump again, in this process alone: `{"step", "why", "weights", "ranks", "clips"}`.

    Each rank's rows go through the model as they did, but for the contrast, whose negatives are theirs alone; then each
    clip by itself, with its own mask. `not_finite` names the inputs, losses and gradients that are not. The weights are
    those of the newest checkpoint at or before the step, or else those that the run began with; no layer is dropped.
    Raises SettingsError when the shards do not give the clips of the dump.
    """
    dump = _read(path)
    settings = PretrainSettings.parse_saved(apply_overrides(dump["settings"], tuple(overrides)), str(path))
    step, s = dump["step"], settings.model
    torch.manual_seed(settings.train.seed)
    model = HiCMAE(s).eval()
    weights = _load_weights(model, settings, step)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    corpora = open_corpora(settings)
    batch = _batch(corpora, settings, step)
    planned = [clip["id"] for part in dump["ranks"] for clip in part["clips"]]
    if batch.ids != planned:
        odd = next(f"{a!r}, not {b!r}" for a, b in zip(batch.ids, planned, strict=False) if a != b)
        raise SettingsError(f"{path}: step {step} of these shards has the clip {odd}; name the run's (data.shards=...)")
    inputs, masks = s.preprocess(batch.to(device)), [mask.to(device) for mask in model.masks(batch)]

    def again(first: int, last: int) -> dict[str, Any]:
        return _step(model, _rows(inputs, first, last), [_rows(mask, first, last) for mask in masks])

    share = len(batch.ids) // len(dump["ranks"])
    ranks = [{"rank": n, **again(n * share, (n + 1) * share)} for n in range(len(dump["ranks"]))]
    clips = []
    for row, clip in enumerate(clip for part in dump["ranks"] for clip in part["clips"]):
        clips.append({"id": clip["id"], "shard": clip["shard"], **again(row, row + 1)})
        clips[-1].pop("loss_contrast", None)  # a clip alone has no negatives
    return {"step": step, "why": dump["why"], "weights": weights, "ranks": ranks, "clips": clips}


def _step(model: nn.Module, inputs: Inputs, masks: Sequence[Mask]) -> dict[str, Any]:
    """Losses and the norm of their gradient, and what of it all is not finite."""
    model.zero_grad(set_to_none=True)
    losses = model(inputs, *masks)
    losses["loss"].backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norm = torch.nn.utils.get_total_norm(list(gradients.values()))
    values = {name: float(value.detach()) for name, value in losses.items()} | {"grad_norm": float(norm)}
    tensors = {f"input {f.name}": getattr(inputs, f.name) for f in fields(inputs)}
    tensors |= {name: value.detach() for name, value in losses.items()}
    tensors |= {f"gradient of {name}": gradient for name, gradient in gradients.items()}
    broken = [name for name, x in tensors.items() if isinstance(x, Tensor) and not x.isfinite().all()]
    return {**finite_or_text(values), "not_finite": broken}


def _rows(values: Any, first: int, last: int) -> Any:
    """Some rows of all tensors of a dataclass."""
    parts = {f.name: getattr(values, f.name) for f in fields(values)}
    return replace(values, **{name: x[first:last] for name, x in parts.items() if isinstance(x, Tensor)})


def _batch(corpora: Sequence[Corpus], settings: PretrainSettings, step: int) -> Batch:
    """The global batch of one step, however many ranks shared it."""
    s, data, train = settings.model, settings.data, settings.train
    window = Window(num_frames=s.num_frames, frame_stride=data.frame_stride, mel_frames=s.mel_frames)
    how = {"streams": s.streams, "augment": data.augment, "epoch_clips": data.epoch_clips, "repeats": data.repeats}
    place = {"start_step": step, "total_steps": step + 1, "seed": train.seed}
    return next(iter(train_loader(corpora, window, global_batch=train.global_batch, **place, **how)))


def _load_weights(model: nn.Module, settings: PretrainSettings, step: int) -> str:
    folder = Path(settings.out) / "checkpoints"
    before = [path for path in complete_checkpoints(folder) if int(path.name.removeprefix("step-")) <= step]
    if before:
        model.load_state_dict(read_checkpoint(before[-1])[1])
        return str(before[-1])
    if settings.pretrained:
        from affekt.pretrain.export import start_from

        start_from(model, settings.pretrained)
    return "those that the run began with"


def told(result: dict[str, Any]) -> str:
    """The result as lines for a person, the clips with the largest losses first."""
    lines = [f"step {result['step']}, skipped as {result['why']}; weights: {result['weights']}; in float32"]
    for part in result["ranks"]:
        lines.append(f"rank {part['rank']}: {_figures(part)}")
    if not any(part["not_finite"] for part in (*result["ranks"], *result["clips"])):
        lines.append("everything is finite here: look at the losses, the weights (older ones?) or the machine")
    by_loss = sorted(result["clips"], key=lambda clip: (not clip["not_finite"], -float(clip["loss"])))
    lines += [f"{clip['id']} ({clip['shard']}): {_figures(clip)}" for clip in by_loss]
    return "\n".join(lines)


def _figures(values: dict[str, Any]) -> str:
    figures = [f"{key} {float(x):.4g}" for key, x in values.items() if key.startswith("loss") or key == "grad_norm"]
    broken = values["not_finite"]
    more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
    return "  ".join(figures) + (f"  NOT FINITE: {', '.join(broken[:3])}{more}" if broken else "")


def _read(path: Path) -> dict[str, Any]:
    try:
        dump = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path}: not a dump of a skipped step: {error}") from None
    check_version(dump, FORMAT, VERSION, path, CheckpointError)
    return dump
