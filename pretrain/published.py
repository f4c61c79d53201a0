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
from torch import Tensor, nn

from affekt.data.errors import CheckpointError
from affekt.data.media.clip import PrepareSettings
from affekt.pretrain.hicmae import HiCMAESettings

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
        return {
            "ids": [],
            "sources": [],
            "speakers": [],
            "without_speaker": 1_091_581,  # all of them: the files do not list their clips
            "licences": [f"not in {self.path.name}: ask where it came from (HiCMAE was pre-trained on VoxCeleb2)"],
            "data_sets": ["VoxCeleb2"],
            "prepare": self.prepare,
        }


def read_published(path: str | Path, **changes: Any) -> Published:
    """Read a file of the authors. `changes` are settings that no file tells: `num_heads`, `taps`, `img_size`...

    Raises CheckpointError for a file that is no such checkpoint, holds anything but tensors and plain values (its code
    is not run), a name we do not know, or an architecture that does not hang together.
    """
    path = Path(path)
    stored = _tensors_of(_safe_load(path), path)
    renamed = {our_name(name): our_tensor(value) for name, value in stored.items()}
    classifier = {name: renamed.pop(name) for name in CLASSIFIER if name in renamed}
    if classifier and len(classifier) < len(CLASSIFIER):
        missing = ", ".join(name for name in CLASSIFIER if name not in classifier)
        raise CheckpointError(f"{path}: a fine-tuning file without {missing}")
    return Published(path, _settings_of(renamed, path, changes), renamed, classifier)


def load_weights(module: nn.Module, weights: dict[str, Tensor], what: str, may_lack: tuple[str, ...] = ()) -> None:
    """Load `weights` and account for every name: parts of `module` that start with one of `may_lack` may be absent and
    keep their fresh values, which is said on stderr; so is any part of a decoder or classifier that the module has no
    place for.

    Raises CheckpointError listing every other missing or unexpected name, and tensors of another shape.
    """
    ours = module.state_dict()
    missing, unexpected = sorted(ours.keys() - weights.keys()), sorted(weights.keys() - ours.keys())
    odd = [f"missing {name}" for name in missing if not name.startswith(may_lack or (" ",))]
    odd += [f"unexpected {n}" for n in unexpected if not n.startswith("decoder_") and n not in CLASSIFIER]
    odd += [
        f"{name} is {tuple(weights[name].shape)}, the model's is {tuple(ours[name].shape)}"
        for name in sorted(ours.keys() & weights.keys())
        if ours[name].shape != weights[name].shape
    ]
    if odd:
        more = f" and {len(odd) - 8} more" if len(odd) > 8 else ""
        raise CheckpointError(f"{what}: does not fit the model: {'; '.join(odd[:8])}{more}")
    for names, fate in ((missing, "are new"), (unexpected, "are left out")):
        if names:
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
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; a published HiCMAE checkpoint or an export folder is expected")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).partition("WeightsUnpickler error: ")[2].partition("\n")[0] or str(error).splitlines()[0]
        raise CheckpointError(
            f"{path}: refused: it holds more than tensors, plain values and an argparse.Namespace ({reason}); "
            "nothing in it was run"
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: not readable as a checkpoint of torch: {error}") from None


def _tensors_of(content: Any, path: Path) -> dict[str, Tensor]:
    keys = [key for key in ("model", "module") if isinstance(content, dict) and isinstance(content.get(key), dict)]
    if not keys:
        found = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"{path}: no weights under `model` or `module` (found {found[:200]})")
    tensors = content[keys[0]]
    strange = [str(name) for name, value in tensors.items() if not isinstance(value, Tensor)]
    if strange:
        raise CheckpointError(f"{path}: under `{keys[0]}` are values that are no tensors: {', '.join(strange[:5])}")
    return {name.removeprefix("module."): value for name, value in tensors.items()}


def _settings_of(weights: dict[str, Tensor], path: Path, changes: dict[str, Any]) -> HiCMAESettings:
    """The architecture, read off names and shapes; what they do not tell is as published."""

    def count(prefix: str) -> int:
        return len({name[len(prefix) :].partition(".")[0] for name in weights if name.startswith(prefix)})

    try:
        dim = len(weights["encoder_video.norm.weight"])
        found: dict[str, Any] = {"embed_dim": dim, "num_heads": dim // HEAD_DIM or 1}
        found |= {"depth": count("encoder_video.blocks."), "fusion_depth": count("encoder_fusion.blocks_video.")}
        if "decoder_video.norm.weight" in weights:
            width = len(weights["decoder_video.norm.weight"])
            found |= {"decoder_embed_dim": width, "decoder_num_heads": width // HEAD_DIM or 1}
    except LookupError as error:
        raise CheckpointError(f"{path}: not the weights of a HiCMAE model: no tensor {error}") from None
    name = {256: "hicmae_tiny", 384: "hicmae_small", 512: "hicmae_base"}.get(dim, f"hicmae_{dim}")
    if found["depth"] != 10 and "taps" not in changes:
        raise CheckpointError(f"{path}: {found['depth']} encoder layers; the published sizes have 10 (say taps=...)")
    return HiCMAESettings.parse({"name": name, **found, **changes}, str(path))
