"""The depth of every weight of a classifier: which are frozen, and how much of the learning rate each one gets."""

import re

from torch import nn

from affekt.data.errors import SettingsError


def layer_ids(model: nn.Module, depth: int, fusion_depth: int) -> dict[str, int]:
    """The depth of every parameter, by name: 0 patch embeddings, then 1 to `depth` the blocks of both encoders, then
    the fusion blocks, and last all else: final norms, layer weights, heads (HiCMAE, published fine-tuning; 13 for ten
    blocks and two of fusion)."""
    ids = {}
    for name, _ in model.named_parameters():
        block = re.search(r"encoder_(video|audio)\.blocks\.(\d+)\.", name)
        fusion = re.search(r"encoder_fusion\.blocks_(video|audio)\.(\d+)\.", name)
        if re.search(r"encoder_(video|audio)\.patch_embed\.", name):
            ids[name] = 0
        elif block:
            ids[name] = 1 + int(block[2])
        elif fusion:
            ids[name] = 1 + depth + int(fusion[2])
        else:
            ids[name] = 1 + depth + fusion_depth
    return ids


def parameter_groups(model: nn.Module, ids: dict[str, int], layer_decay: float, weight_decay: float) -> list[dict]:
    """Groups of the parameters that are trained, for an optimiser: `weight_decay` 0 for biases, norms and tokens, and
    `lr_scale` = `layer_decay` ** (deepest - depth), which the loop multiplies the learning rate by (timm's name)."""
    deepest = max(ids.values())
    groups: dict[tuple[int, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            spared = parameter.ndim == 1 or name.rpartition(".")[2].startswith(("missing_", "mask_token"))
            group = groups.setdefault((ids[name], spared), {"params": []})
            group["params"].append(parameter)
            group["weight_decay"] = 0.0 if spared else weight_decay
            group["lr_scale"] = layer_decay ** (deepest - ids[name])
    return list(groups.values())


def freeze(model: nn.Module, ids: dict[str, int], stages: int | str) -> None:
    """Take the first `stages` depths out of training: 1 the patch embeddings, 2 those and the first blocks, and so on;
    `encoder` all but the heads and the layer weights. Raises SettingsError for more than there are."""
    deepest = max(ids.values())
    if stages != "encoder" and not 0 <= stages <= deepest:
        raise SettingsError(f"{stages} frozen stages: this encoder has {deepest}; `encoder` freezes all of it")
    for name, parameter in model.named_parameters():
        frozen = name.startswith("encoder.") if stages == "encoder" else ids[name] < stages
        if frozen:
            parameter.requires_grad_(False)
