"""The authors' HiCMAE weights: their `.pth` files read without running anything in them, under our names.

A file is a dictionary with the weights under `model` or `module`, beside what training left: optimiser, epoch and an
`argparse.Namespace`, the one class that is let in, and dropped. Pre-training files hold the whole model, fine-tuning
files the encoders, `*_layer_weights`, `fc_norm` and `head`.
"""

import argparse
import pickle
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from affekt.data.errors import CheckpointError, SettingsError
from affekt.data.media.clip import PrepareSettings
from affekt.pretrain.hicmae import HiCMAE
from affekt.pretrain.hicmae_settings import HiCMAESettings

PUBLISHED_STRIDE = 4
HEAD_DIM = 64  # in all published sizes; the number of heads is not in a file
# What a fine-tuning file holds beside the encoders, under our names.
CLASSIFIER = (
    "layer_weights_video",
    "layer_weights_audio",
    "fc_norm.weight",
    "fc_norm.bias",
    "head.weight",
    "head.bias",
)
PREFIXES = (  # the first that fits; the authors leave the video stream without a suffix
    ("mask_token_audio", "decoder_audio.mask_token"),
    ("mask_token", "decoder_video.mask_token"),
    ("encoder_to_decoder_audio.", "decoder_audio.decoder_embed."),
    ("encoder_to_decoder.", "decoder_video.decoder_embed."),
    ("encoder_fusion.blocks_audio.", "encoder_fusion.blocks_audio."),
    ("encoder_fusion.norm_audio.", "encoder_fusion.norm_audio."),
    ("encoder_fusion.blocks.", "encoder_fusion.blocks_video."),
    ("encoder_fusion.norm.", "encoder_fusion.norm_video."),
    ("encoder_audio.", "encoder_audio."),
    ("encoder.", "encoder_video."),
    ("decoder_audio.", "decoder_audio."),
    ("decoder.", "decoder_video."),
    ("video_layer_weights", "layer_weights_video"),
    ("audio_layer_weights", "layer_weights_audio"),
)


@dataclass(frozen=True)
class Published:
    """A file's tensors under our names, and the architecture they have.

    `classifier` holds CLASSIFIER of a fine-tuning file, and is empty for a pre-training file.
    """

    path: Path
    settings: HiCMAESettings
    weights: dict[str, Tensor]
    classifier: dict[str, Tensor]

    @property
    def prepare(self) -> dict[str, Any]:
        """How clips are to be prepared for these weights: the published crop size, everything else as we do."""
        return PrepareSettings(size=self.settings.img_size).model_dump(mode="json")

    @property
    def seen(self) -> dict[str, Any]:
        """What is known of the clips behind the weights, in the form of `affekt.pretrain.seen`."""
        labelled = ["labelled clips of a data set that the file does not name"] if self.classifier else []
        return {
            "ids": [],
            "sources": [],
            "speakers": [],
            "without_speaker": 1_091_581,  # all of pre-training's at least: the files do not list their clips
            "licences": [f"not in {self.path.name}: ask where it came from (HiCMAE was pre-trained on VoxCeleb2)"],
            "data_sets": ["VoxCeleb2", *labelled],
            "prepare": self.prepare,
        }


def read_published(path: str | Path, **changes: Any) -> Published:
    """Read a file of the authors. `changes` are settings that no file tells: `num_heads`, `taps`, `img_size`...

    Raises CheckpointError for a file that is no such checkpoint, holds anything but tensors and plain values (its code
    is not run), or whose tensors are not, by name and shape, exactly those of a HiCMAE model or classifier.
    """
    path = Path(path)
    stored = _tensors_of(_safe_load(path), path)
    renamed = {our_name(name): our_tensor(value) for name, value in stored.items()}
    if len(renamed) < len(stored):
        raise CheckpointError(f"{path}: holds a tensor under two names that mean the same")
    classifier = {name: renamed.pop(name) for name in CLASSIFIER if name in renamed}
    settings = _settings_of(renamed, path, changes)
    shapes = {name: tuple(value.shape) for name, value in {**renamed, **classifier}.items()}
    _check_whole(shapes, _shapes_of(settings, classifier), path)
    return Published(path, settings, renamed, classifier)


def load_weights(module: nn.Module, weights: dict[str, Tensor], what: str, may_lack: tuple[str, ...] = ()) -> None:
    """Load `weights` of a whole model into `module`. Its parts whose names start with one of `may_lack` may be absent
    and keep their fresh values; parts that `module` has not are left out. Both is said on stderr, by rank 0.

    Raises CheckpointError listing missing names and tensors of another shape.
    """
    ours = module.state_dict()
    missing, left = sorted(ours.keys() - weights.keys()), sorted(weights.keys() - ours.keys())
    there = {name.partition(".")[0] for name in weights}
    odd = [f"missing {n}" for n in missing if n.partition(".")[0] in there or not n.startswith(tuple(may_lack))]
    odd += [
        f"{name} is {tuple(weights[name].shape)}, the model's is {tuple(ours[name].shape)}"
        for name in sorted(ours.keys() & weights.keys())
        if ours[name].shape != weights[name].shape
    ]
    if odd:
        raise CheckpointError(f"{what}: does not fit the model: {_some(odd)}")
    for names, fate in ((missing, "are new"), (left, "are left out")):
        if names and (not dist.is_initialized() or dist.get_rank() == 0):
            parts = sorted({name.partition(".")[0] for name in names})
            print(f"{what}: {len(names)} tensors {fate}: {', '.join(parts)}", file=sys.stderr)
    module.load_state_dict({name: weights.get(name, value) for name, value in ours.items()})


def our_name(name: str) -> str:
    """A tensor name of the authors as ours."""
    for theirs, ours in PREFIXES:
        if name.startswith(theirs):
            name = ours + name[len(theirs) :]
            break
    return re.sub(r"^(decoder_\w+)\.head\.", r"\1.decoder_pred.", name).replace("patch_embed.proj.", "patch_embed.")


def our_tensor(value: Tensor) -> Tensor:
    """Convolution kernels become linear maps of our patch vectors: (frame, y, x, channel) and (frame, mel)."""
    if value.ndim == 5:
        return value.permute(0, 2, 3, 4, 1).flatten(1)
    return value.flatten(1) if value.ndim == 4 else value


def _safe_load(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Torch's own text advises to load without the safeguard.
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f" ({found[1]})" if found else ""
        raise CheckpointError(
            f"{path}: refused: it holds more than tensors, plain values and an argparse.Namespace{what}; nothing in it "
            "was run. Get the file from its authors again, or save its weights alone where you trust it"
        ) from None
    except Exception as error:  # the reader meets damage with errors of many classes
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path}: not readable as a checkpoint of torch: {reason}; copy it again") from None


def _tensors_of(content: Any, path: Path) -> dict[str, Tensor]:
    keys = [key for key in ("model", "module") if isinstance(content, dict) and isinstance(content.get(key), dict)]
    if not keys:
        found = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"{path}: no weights under `model` or `module` (found {found[:200]})")
    tensors = content[keys[0]]
    strange = [str(name) for name, value in tensors.items() if not _is_weight(name, value)]
    if strange:
        raise CheckpointError(
            f"{path}: under `{keys[0]}` are values that are no tensors of finite real numbers: {_some(strange)}"
        )
    names = [name.removeprefix("module.") for name in tensors]
    if len(set(names)) < len(names):
        raise CheckpointError(f"{path}: holds a tensor under two names, with and without `module.`")
    return dict(zip(names, tensors.values(), strict=True))


def _is_weight(name: Any, value: Any) -> bool:
    plain = isinstance(name, str) and isinstance(value, Tensor) and value.layout == torch.strided
    return plain and value.device.type == "cpu" and value.is_floating_point() and bool(value.isfinite().all())


def _settings_of(weights: dict[str, Tensor], path: Path, changes: dict[str, Any]) -> HiCMAESettings:
    """The architecture, read off names and shapes; what they do not tell is as published."""

    def count(prefix: str) -> int:
        return len({name[len(prefix) :].partition(".")[0] for name in weights if name.startswith(prefix)})

    try:
        dim = weights["encoder_video.norm.weight"].numel()
        found: dict[str, Any] = {"embed_dim": dim, "num_heads": dim // HEAD_DIM or 1}
        found |= {"depth": count("encoder_video.blocks."), "fusion_depth": count("encoder_fusion.blocks_video.")}
        if "decoder_video.norm.weight" in weights:
            width = weights["decoder_video.norm.weight"].numel()
            found |= {"decoder_embed_dim": width, "decoder_num_heads": width // HEAD_DIM or 1}
    except LookupError as error:
        raise CheckpointError(f"{path}: not the weights of a HiCMAE model: no tensor {error}") from None
    name = {256: "hicmae_tiny", 384: "hicmae_small", 512: "hicmae_base"}.get(dim, f"hicmae_{dim}")
    if found["depth"] != 10 and "taps" not in changes:
        raise CheckpointError(f"{path}: {found['depth']} encoder layers; the published sizes have 10 (say taps=...)")
    try:
        settings = HiCMAESettings.parse({"name": name, **found, **changes}, str(path))
    except SettingsError as error:
        raise CheckpointError(f"{error}; that is no architecture of HiCMAE") from None
    layers = count("decoder_video.blocks.")
    if layers and layers != len(settings.taps) + 1:
        raise CheckpointError(
            f"{path}: width {dim}, {found['depth']} encoder layers and {layers} decoder layers, which read "
            f"{layers - 1} taps; the taps are {settings.taps}. Choose model.name and model.taps like the file's"
        )
    return settings


def _shapes_of(settings: HiCMAESettings, classifier: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a file with these settings, of fine-tuning if it has a classifier."""
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in HiCMAE(settings).state_dict().items()}
    if not classifier:
        return shapes
    joined = (4 * settings.embed_dim,)
    outputs = tuple(classifier["head.bias"].shape)[:1] if "head.bias" in classifier else (1,)
    kinds = ((settings.depth,), (settings.depth,), joined, joined, outputs + joined, outputs)
    encoders = {name: shape for name, shape in shapes.items() if not name.startswith("decoder_")}
    return encoders | dict(zip(CLASSIFIER, kinds, strict=True))


def _check_whole(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], path: Path) -> None:
    odd = [f"missing {name}" for name in sorted(expected.keys() - found.keys())]
    odd += [f"unexpected {name}" for name in sorted(found.keys() - expected.keys())]
    odd += [
        f"{name} is {found[name]}, not {expected[name]}"
        for name in sorted(found.keys() & expected.keys())
        if found[name] != expected[name]
    ]
    if odd:
        raise CheckpointError(f"{path}: not a whole HiCMAE model: {_some(odd)}")


def _some(things: list[str]) -> str:
    more = f" and {len(things) - 8} more" if len(things) > 8 else ""
    return "; ".join(things[:8]) + more
