"""The DeepSpeed engine behind the calls of the loop, the same at every ZeRO stage and precision.

bf16 and fp16 are autocast over float32 weights, so that checkpoints hold the master weights in any precision.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from affekt.pretrain.engine import AUTOCAST
from affekt.pretrain.optim import clip_gradients
from affekt.pretrain.pieces import numbers_to_save, parameter_shapes, restore_moments

Offload = Literal["none", "optimizer", "parameters"]
FIRST_LOSS_SCALE, LARGEST_LOSS_SCALE = 2.0**16, 2.0**24
STEPS_TO_DOUBLE = 2000  # without an overflow, as in torch.amp and DeepSpeed


class Engine:
    """`engine(...)`, `engine.backward(loss)` for each part of a batch, then `engine.step(lr)`."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        micro_batch: int,
        precision: str,
        *,
        stage: int = 0,
        offload: Offload = "none",
        accumulate: int = 1,
        clip: float = 0.0,
    ):
        """`clip` is the largest norm of all gradients together, 0 for none; `micro_batch` the clips of one part of a
        rank's batch, of which `accumulate` make a step."""
        import deepspeed

        self.stage, self.accumulate, self.clip, self._parts = stage, accumulate, clip, 0
        self.half = AUTOCAST.get(precision)
        config = {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulate,
            "zero_optimization": _zero(stage, offload),
            "gradient_clipping": clip if stage else 0.0,  # its default is 1.0; at stage 0 `step` clips
            "torch_autocast": {"enabled": precision != "fp32", "dtype": str(self.half or torch.bfloat16)},
            "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW is quick on a CPU, and needs no compiler
            "steps_per_print": 2**31,
            "timers": {"throughput": {"enabled": False}},  # it would wait for the device twice a step, for a log line
        }
        self.deepspeed, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        self.optimizer, self._bad = optimizer, None
        if stage:
            optimizer.register_step_pre_hook(self._before_optimizer)
        self._numbers: dict[str, Tensor] | None = None
        if stage == 0 and dist.get_world_size() == 1:
            self.deepspeed.enable_backward_allreduce = False  # it would copy all gradients to and fro, with no other
        # DeepSpeed's scalers look for overflows in the gradients of one rank alone. Ours asks for the norm of all.
        self.deepspeed.torch_autocast_z0_gradscaler = self.deepspeed.optimizer.torch_autocast_gradscaler = None
        self.loss_scale, self.steps_since_overflow = None, 0
        if precision == "fp16":
            self._set_loss_scale(FIRST_LOSS_SCALE)

    def autocast(self) -> torch.autocast:
        """The precision that the engine computes in, for what is computed beside it."""
        device = next(self.deepspeed.module.parameters()).device.type
        return torch.autocast(device, self.half or torch.bfloat16, enabled=self.half is not None)

    @torch.no_grad()
    def features(self, *inputs) -> Tensor:
        """`HiCMAE.features` of a part, through DeepSpeed, which at stage 3 has to fetch the weights."""
        return self.deepspeed(*inputs, only_features=True)["features"]

    def __call__(self, *inputs):
        self._parts += 1
        self.deepspeed.set_gradient_accumulation_boundary(self._parts == self.accumulate)
        return self.deepspeed(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one part; the loss of a step is the mean over its parts and over ranks."""
        self.deepspeed.backward(loss if self.stage or not self.loss_scale else loss * self.loss_scale)

    def step(self, lr: float, judge: Callable[[Tensor], Tensor] = lambda norm: (~norm.isfinite()).float()):
        """Move the weights, unless `judge`, which all ranks call with the norm of all gradients, gives 1.0 on each of
        them: (that norm, before clipping; 1.0 where the step was taken, 0.0 where it was not)."""
        assert self._parts == self.accumulate, f"{self._parts} parts of {self.accumulate} came before the step"
        self._parts, self._judge, self._bad = 0, judge, None
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)  # of layer decay, in fine-tuning
        if self.stage == 0:
            norm = clip_gradients(self.deepspeed.module, self.clip, self.loss_scale or 1.0)
            self._decide(norm)
            self.deepspeed.step()
        else:
            self.deepspeed.step()  # which knows the norm only inside
            norm = torch.as_tensor(self.deepspeed.get_global_grad_norm(), dtype=torch.float32)
            if self._bad is None:  # it saw that the norm is not finite, and never came to the optimiser
                self._bad = judge(norm)
        if self.loss_scale:
            self._adapt_loss_scale(norm)
        return norm, 1 - self._bad

    def _decide(self, norm: Tensor) -> None:
        """With this flag set, fused AdamW leaves weights, moments and steps alone, and the host need not wait."""
        self._bad = self._judge(norm)
        self.optimizer.found_inf = self._bad.to(self.optimizer.param_groups[0]["params"][0].device)

    def _before_optimizer(self, *_arguments) -> None:
        if self._bad is None:  # once a step, though there is a call for every group
            self._decide(torch.as_tensor(self.deepspeed.optimizer._global_grad_norm, dtype=torch.float32))

    def _adapt_loss_scale(self, norm: Tensor) -> None:
        """A norm that is not finite is how the loss scale is found."""
        good = math.isfinite(norm.item())
        self.steps_since_overflow = self.steps_since_overflow + 1 if good else 0
        if not good and self.loss_scale > 1:
            self._set_loss_scale(self.loss_scale / 2)
        elif good and self.steps_since_overflow % STEPS_TO_DOUBLE == 0:
            self._set_loss_scale(min(LARGEST_LOSS_SCALE, self.loss_scale * 2))

    def _set_loss_scale(self, scale: float) -> None:
        self.loss_scale = scale
        if self.stage:
            self.deepspeed.optimizer.override_loss_scale(scale)

    def numbers(self) -> dict[str, Tensor]:
        """What this rank writes into a checkpoint, as `pieces.numbers_to_save`. The tensors stay where they are from
        the first step on, so they are looked up once."""
        if self._numbers is None:
            numbers = numbers_to_save(self.deepspeed, dist.get_rank(), dist.get_world_size())
            if self.deepspeed.global_steps == 0:
                return numbers  # there are no moments yet
            self._numbers = numbers
        return self._numbers

    def state(self) -> dict:
        """What of a checkpoint is not a tensor: shapes of the parameters, and the loss scale."""
        shapes = {name: list(shape) for name, shape in parameter_shapes(self.deepspeed.module).items()}
        return {"shapes": shapes, "loss_scale": self.loss_scale, "steps_since_overflow": self.steps_since_overflow}

    def restore(self, moments: dict[str, Tensor], state: dict) -> None:
        """Go on from a checkpoint whose weights the model had when the engine was made. Raises CheckpointError."""
        restore_moments(self.deepspeed, moments)
        self._numbers = None
        if self.loss_scale and state.get("loss_scale"):
            self.steps_since_overflow = state["steps_since_overflow"]
            self._set_loss_scale(state["loss_scale"])

    def compile(self) -> None:
        """torch.compile of the model. Stage 3 puts hooks into its modules first, so it can only be done then."""
        self.deepspeed.compile(compile_kwargs={"dynamic": False})

    def close(self) -> None:
        """Let go of DeepSpeed's hooks and buffers: what is left of stage 3 may abort the interpreter at its end."""
        self.deepspeed.destroy()
        dist.barrier()


def _zero(stage: int, offload: Offload) -> dict:
    config: dict = {"stage": stage}
    if offload != "none":
        pinned = torch.cuda.is_available()
        config["offload_optimizer"] = {"device": "cpu", "pin_memory": pinned}
        if offload == "parameters":
            config["offload_param"] = {"device": "cpu", "pin_memory": pinned}
    return config
