"""Fine-tuning a frozen encoder by few weights: low-rank changes of its linear maps, or small maps beside its MLPs."""

import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.utils import parametrize

from affekt.data.settings import Settings
from affekt.finetune.classifier import Classifier

Target = Literal["qkv", "q", "kv", "proj", "fc1", "fc2"]
ADAPTER_SCALE = 0.1  # of what an adapter adds (AdaptFormer, Chen et al. 2022, section 3.2)


class Adapting(Settings):
    """Where one is on, the encoder is frozen: what is added to it is trained, and the head."""

    lora_rank: int = Field(0, ge=0, description="of the change of a weight (LoRA); 0: none")
    lora_alpha: float = Field(16.0, gt=0, description="the change counts alpha / rank")
    lora_targets: tuple[Target, ...] = Field(
        ("qkv", "q", "kv", "proj"), min_length=1, description="of qkv, q, kv, proj (attention), fc1, fc2 (MLP)"
    )
    adapter_width: int = Field(0, ge=0, description="of the bottleneck beside every MLP (AdaptFormer); 0: none")

    @property
    def on(self) -> bool:
        return bool(self.lora_rank or self.adapter_width)

    @model_validator(mode="after")
    def _check(self) -> "Adapting":
        idle = [name for name in ("lora_alpha", "lora_targets") if name in self.model_fields_set and not self.lora_rank]
        idle = [name for name in idle if getattr(self, name) != type(self).model_fields[name].default]
        if idle:
            raise ValueError(f"{idle[0]}: without lora_rank nothing uses it")
        return self

    def add(self, model: Classifier) -> Classifier:
        """Freeze the encoder of `model` and put in what is to be trained instead; at first nothing it says changes."""
        if not self.on:
            return model
        model.encoder.requires_grad_(False)
        blocks = {name: part for name, part in model.encoder.named_modules() if ".blocks" in name}
        for name, part in blocks.items():
            last = name.rpartition(".")[2]
            if self.lora_rank and isinstance(part, nn.Linear) and last in self.lora_targets:
                parametrize.register_parametrization(part, "weight", LowRank(part.weight, self))
            if self.adapter_width and last == "mlp":
                model.encoder.set_submodule(name, Adapter(part, self.adapter_width))
        return model


class LowRank(nn.Module):
    """A weight (out, in) plus alpha / rank times the product of two thin ones (LoRA, Hu et al. 2022, equation 3).

    It changes the weight and not the module's call, since attention reads `weight` without a call.
    """

    def __init__(self, weight: Tensor, settings: Adapting):
        super().__init__()
        outputs, inputs = weight.shape
        self.scale = settings.lora_alpha / settings.lora_rank
        self.down = nn.Parameter(torch.empty(settings.lora_rank, inputs, device=weight.device))
        self.up = nn.Parameter(torch.zeros(outputs, settings.lora_rank, device=weight.device))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.up @ self.down)


class Adapter(nn.Module):
    """An MLP with a bottleneck beside it: `mlp(x) + 0.1 up(relu(down(x)))` (AdaptFormer, equation 4)."""

    def __init__(self, mlp: nn.Module, width: int):
        super().__init__()
        self.mlp = mlp
        dim = mlp.fc1.in_features
        device = mlp.fc1.weight.device
        self.down, self.up = nn.Linear(dim, width, device=device), nn.Linear(width, dim, device=device)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x) + ADAPTER_SCALE * self.up(self.down(x).relu())


def merge_lora(model: nn.Module) -> nn.Module:
    """Make the low-rank changes part of the weights, which then have the names of a plain model. Adapters stay."""
    for part in model.modules():
        if parametrize.is_parametrized(part, "weight"):
            parametrize.remove_parametrizations(part, "weight", leave_parametrized=True)
    return model
