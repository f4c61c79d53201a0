"""The network of a fine-tuning before its first step: an encoder, trained or fresh, with a new head on it."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from affekt.data.batch import Streams
from affekt.data.errors import SettingsError
from affekt.data.files import hash_file
from affekt.finetune.classifier import Classifier
from affekt.finetune.training.heads import create_head
from affekt.finetune.training.layers import freeze, layer_ids, parameter_groups
from affekt.finetune.training.settings import FinetuneOptim, FinetuneSettings
from affekt.pretrain.encoder import Encoder
from affekt.pretrain.encoders import drop_path_rates
from affekt.pretrain.export import create_encoder, load_encoder
from affekt.pretrain.layers import Block
from affekt.pretrain.published import PUBLISHED_STRIDE, read_published
from affekt.pretrain.seen import read_seen


def streams_of(settings: FinetuneSettings) -> Streams:
    """The streams that a fine-tuning uses, without reading weights where an architecture says it."""
    known = settings.model.streams if settings.model else load_encoder(settings.encoder).streams
    if settings.streams not in (None, known) and known != "both":
        raise SettingsError(f"streams is {settings.streams}; {settings.encoder or 'the model'} knows {known} alone")
    return settings.streams or known


def seen_before(settings: FinetuneSettings) -> dict[str, Any] | None:
    """What the weights have seen that training starts from; None for fresh ones."""
    if settings.encoder is None or settings.scratch:
        return None
    return read_published(settings.encoder).seen if Path(settings.encoder).is_file() else read_seen(settings.encoder)


def hash_of_weights(settings: FinetuneSettings) -> str | None:
    """SHA-256 of the file that training starts from; None for fresh weights."""
    if settings.encoder is None or settings.scratch:
        return None
    path = Path(settings.encoder)
    return hash_file(path if path.is_file() else path / "model.safetensors")


def create_network(settings: FinetuneSettings, outputs: int, prepare: dict[str, Any], seed: int) -> Classifier:
    """The classifier of a seed, `outputs` numbers a clip. `prepare` says how the clips were prepared. Weights that no
    clip can teach, as those of a stream that is not used, are frozen. Raises CheckpointError as `load_encoder`."""
    torch.manual_seed(seed)
    if settings.model:
        encoder = create_encoder(settings.model, settings.frame_stride or PUBLISHED_STRIDE, prepare)
    else:
        encoder = load_encoder(settings.encoder)
        _check_preparation(encoder, prepare, settings)
        if settings.scratch:
            encoder = create_encoder(encoder.settings, encoder.window.frame_stride, prepare)
        if settings.frame_stride:
            encoder.window = encoder.window.model_copy(update={"frame_stride": settings.frame_stride})
    set_drop_path(encoder, settings.drop_path)
    network = create_head(encoder, outputs, settings.streams or encoder.streams, settings.head)
    freeze(network, depths(network), settings.freeze)
    settings.adapting.add(network)
    _freeze_unused(network)
    return network


def depths(network: Classifier) -> dict[str, int]:
    """The depth of every weight, see `layer_ids`."""
    s = network.encoder.settings
    return layer_ids(network, s.depth, s.fusion_depth if s.streams == "both" else 0)


def set_drop_path(encoder: Encoder, last: float) -> None:
    """Rates from 0 at the first block of each encoder to `last`, in the fusion anew, as published."""
    encoder.settings = encoder.settings.model_copy(update={"drop_path": last})
    for blocks in (m for name, m in encoder.named_modules() if name.rpartition(".")[2].startswith("blocks")):
        if isinstance(blocks, nn.ModuleList) and all(isinstance(block, Block) for block in blocks):
            for block, rate in zip(blocks, drop_path_rates(last, len(blocks)), strict=True):
                block.drop_path.drop_prob = rate


def create_optimizer(network: Classifier, settings: FinetuneOptim) -> torch.optim.AdamW:
    """Fused AdamW over what is not frozen, with a factor `lr_scale` on the rate of each layer."""
    groups = parameter_groups(network, depths(network), settings.layer_decay, settings.weight_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, eps=settings.eps, fused=True)


def _freeze_unused(network: Classifier) -> None:
    """Where an encoder of both streams judges by one, the other one's weights never get a gradient."""
    if network.encoder.streams != "both" or len(network.paths) > 1 or network.paths == ("both",):
        return
    used = network.paths[0]
    other = "video" if used == "audio" else "audio"
    for name, parameter in network.named_parameters():
        crosses = name.startswith("encoder.encoder_fusion") and ".cross_" in name
        if crosses or f"_{other}" in name.partition(".blocks.")[0]:
            parameter.requires_grad_(False)


def _check_preparation(encoder: Encoder, prepare: dict[str, Any], settings: FinetuneSettings) -> None:
    keys = [key for key in ("size", "fps", "sample_rate", "face") if key in encoder.prepare and key in prepare]
    used = settings.streams or encoder.streams
    keys = [key for key in keys if used != "audio" or key in ("fps", "sample_rate")]
    other = [
        f"{key} {prepare[key]}, not {encoder.prepare[key]}" for key in keys if prepare[key] != encoder.prepare[key]
    ]
    if other:
        raise SettingsError(
            f"the clips were prepared with {'; '.join(other)}, which {settings.encoder} was trained on; prepare them "
            "the same way"
        )
