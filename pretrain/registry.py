"""Model names: `create_model("hicmae_base")`, `list_models()`, as in timm."""

import fnmatch
from typing import Any

from affekt.data.errors import SettingsError
from affekt.pretrain.hicmae import HiCMAE
from affekt.pretrain.hicmae_settings import HiCMAESettings

# Widths and heads of tiny, small and base as published (HiCMAE table 2); nano is ours, for a CPU: patches of 16 on
# 96 px and 8 frames.
SIZES = {
    "hicmae_nano": {
        "embed_dim": 96,
        "num_heads": 3,
        "depth": 4,
        "fusion_depth": 1,
        "decoder_embed_dim": 64,
        "decoder_num_heads": 2,
        "taps": (2, 4),
        "img_size": 96,
        "num_frames": 8,
    },
    "hicmae_tiny": {"embed_dim": 256, "num_heads": 4, "decoder_embed_dim": 128, "decoder_num_heads": 2},
    "hicmae_small": {"embed_dim": 384, "num_heads": 6, "decoder_embed_dim": 192, "decoder_num_heads": 3},
    "hicmae_base": {},
}


def list_models(pattern: str = "*") -> list[str]:
    """Known model names that match a shell-style pattern."""
    return fnmatch.filter(sorted(SIZES), pattern)


def model_settings(name: str, **overrides: object) -> HiCMAESettings:
    """The settings of a named model with single fields replaced. Raises SettingsError for an unknown name or field."""
    if name not in SIZES:
        raise SettingsError(f"unknown model `{name}`; known: {', '.join(list_models())}")
    return HiCMAESettings.parse({"name": name, **SIZES[name], **overrides}, f"model {name}")


def create_model(name: str, **overrides: object) -> HiCMAE:
    """A pre-training model with fresh weights, e.g. `create_model("hicmae_nano", mask_ratio_video=0.75)`."""
    return HiCMAE(model_settings(name, **overrides))


def with_size(values: Any) -> Any:
    """Raw settings whose `model.name` is a size, with the values of that size under those that are stated; anything
    else as it is. Raises ValueError for a name that is not known, as a validator of settings has to."""
    model = values.get("model") if isinstance(values, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("name"), str):
        return values
    if model["name"] not in SIZES:
        raise ValueError(f"unknown model `{model['name']}`; known: {', '.join(list_models())}")
    return {**values, "model": {**SIZES[model["name"]], **model}}
