"""What a training step of a model takes, from the model itself on torch's meta device, where nothing is computed:
parameters, floating-point operations, and the memory that is alive at every moment of forward and backward pass."""

import math
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from affekt.data.transforms import Inputs
from affekt.pretrain.hicmae import HiCMAE
from affekt.pretrain.hicmae_settings import HiCMAESettings
from affekt.pretrain.masks import Mask

META = torch.device("meta")


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one step on one device, without weights and optimiser state.

    `inputs` are the batch as the model takes it, `activations` what the backward pass needs (with the 16-bit copies of
    weights that autocast keeps for it), `peak` the most that is alive at once: both of these, the gradients made by
    then and what operators hold while they work. `kernels` counts the operators that write memory.
    """

    inputs: int
    activations: int
    peak: int
    kernels: int


def parameters_by_part(settings: HiCMAESettings) -> dict[str, int]:
    """Numbers of parameters of encoders, fusion, decoders and heads."""
    return {name: sum(p.numel() for p in part.parameters()) for name, part in _model(settings).named_children()}


@cache
def flops_per_clip(settings: HiCMAESettings, checkpointing: bool = False) -> tuple[int, int]:
    """(forward, forward + backward) as executed for one clip with both streams, 2 x MAC of the matrix products; what
    checkpoints compute again is in it, what fused attention computes again inside of its backward pass is not."""
    model = _model(settings)
    model.set_grad_checkpointing(checkpointing)
    with FlopCounterMode(display=False) as counter:
        loss = model(*_batch(settings, 1))["loss"]
        forward = counter.get_total_flops()
        loss.backward()
    return forward, counter.get_total_flops()


@cache
def encoding_flops_per_clip(settings: HiCMAESettings) -> int:
    """Of the encoders and the fusion, which batches in parts go through a second time for the contrast."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        _model(settings).encode(*_batch(settings, 1))
    return counter.get_total_flops()


def step_memory(
    settings: HiCMAESettings, batch: int, *, bf16: bool = False, on_cpu: bool = False, checkpointing: bool = False
) -> StepMemory:
    """The memory of a step with `batch` clips that have both streams, in fp32 or in autocast to bf16, uncompiled."""
    model = _model(settings)
    model.set_grad_checkpointing(checkpointing)
    with _Live(model) as live, _AsOnDevice(bf16, on_cpu):
        inputs = _batch(settings, batch)
        at_start = live.bytes
        loss = model(*inputs)["loss"]
        after_forward = live.bytes
        _backward(loss)
    return StepMemory(at_start, after_forward - at_start, live.peak, live.kernels)


def _backward(loss: Tensor) -> None:
    """`loss.backward()`, in which function modes would be off, and with them off for what checkpoints compute again."""
    engine, ones = torch.autograd.Variable._execution_engine, torch.ones_like(loss)
    engine.run_backward((loss,), (ones,), False, False, (), allow_unreachable=True, accumulate_grad=True)


def _model(settings: HiCMAESettings) -> HiCMAE:
    with META:
        return HiCMAE(settings).train()


def _batch(s: HiCMAESettings, batch: int) -> tuple[Inputs, Mask, Mask]:
    """Shapes of `batch` whole clips and of their masks."""
    tokens, side, audio = math.prod(s.grid_video), math.prod(s.grid_video[1:]), math.prod(s.grid_audio)
    hidden, hidden_audio = s.grid_video[0] * int(s.mask_ratio_video * side), int(s.mask_ratio_audio * audio)

    def ids(count: int) -> Tensor:
        return torch.empty(batch, count, dtype=torch.int64, device=META)

    present = torch.empty(batch, dtype=torch.bool, device=META)
    video = torch.empty(batch, 3, s.num_frames, s.img_size, s.img_size, device=META) if s.streams != "audio" else None
    sound = torch.empty(batch, 1, s.mel_frames, s.mel_bins, device=META) if s.streams != "video" else None
    inputs = Inputs(video, sound, present, present, torch.empty(batch, dtype=torch.int64, device=META))
    return inputs, Mask(ids(tokens - hidden), ids(hidden)), Mask(ids(audio - hidden_audio), ids(hidden_audio))


class _Live(TorchDispatchMode):
    """Counts the bytes of all storages that are made inside and still alive, and their most."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.bytes = self.peak = self.kernels = 0
        self._known: set[int] = set()
        for tensor in (*model.parameters(), *model.buffers()):
            self._known.add(tensor.untyped_storage()._cdata)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.kernels += not func.is_view
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device == META:
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size


class _AsOnDevice(TorchFunctionMode):
    """Lets the meta device keep what a CPU or GPU would: it knows neither fused attention nor autocast."""

    LOWER = (F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__)

    def __init__(self, bf16: bool, on_cpu: bool):
        super().__init__()
        self.bf16, self.on_cpu = bf16, on_cpu
        self._casts: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if self.bf16 and (func in self.LOWER or func is F.scaled_dot_product_attention):
            args = tree_map_only(Tensor, self._cast, args)
            kwargs = tree_map_only(Tensor, self._cast, kwargs)
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        q, k, v = args
        if self.bf16 and self.on_cpu:  # as `affekt.pretrain.layers.attend` has it
            return ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1) @ v
        return _FusedAttention.apply(q, k, v)

    def _cast(self, x: Tensor) -> Tensor:
        """In bf16; a weight once for all its uses, as autocast does."""
        if x.dtype != torch.float32:
            return x
        if not (x.is_leaf and x.requires_grad):
            return x.to(torch.bfloat16)
        if id(x) not in self._casts:
            self._casts[id(x)] = x.to(torch.bfloat16)
        return self._casts[id(x)]

    def __exit__(self, *error: Any) -> None:
        self._casts.clear()
        super().__exit__(*error)


class _FusedAttention(torch.autograd.Function):
    """Keeps what flash attention keeps: its inputs, its output and one float32 for each query."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, _, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def product_rate(precision: str, rounds: int = 5) -> float:
    """FLOP/s of this machine's CPU in a large product of fp32 or bf16 matrices, the best of some rounds."""
    dtype, side = torch.float32 if precision == "fp32" else torch.bfloat16, 2048
    a, b = (torch.randn(side, side, generator=torch.Generator().manual_seed(0)).to(dtype) for _ in range(2))
    return 2 * side**3 / min(_seconds(lambda: F.linear(a, b)) for _ in range(rounds))


def _seconds(call: Callable[[], object]) -> float:
    """With one thread its own time, so that a busy machine does not matter."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    call()
    return clock() - start
