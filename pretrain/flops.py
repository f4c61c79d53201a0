"""How much arithmetic a clip costs, counted in the model itself, and what share of the machine's peak that is."""

import math
import re
import time
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from affekt.data.transforms import Inputs, plain_mel
from affekt.pretrain.engine import AUTOCAST
from affekt.pretrain.functionals import functionals
from affekt.pretrain.hicmae import HiCMAE, patches_audio, patches_video
from affekt.pretrain.hicmae_settings import HiCMAESettings
from affekt.pretrain.masks import random_mask, tube_mask

# Dense products on tensor cores in bf16 (fp16 where there is no bf16), and in fp32 without TF32: TFLOP/s of NVIDIA's
# data sheets. The first pattern that the device's name holds counts.
PEAK_TFLOPS = {
    r"\bB200\b": (2250, 75),
    r"\bH100 (PCIe|NVL)\b": (756, 51),
    r"\b(H200|H100|GH200)\b": (989, 67),
    r"\bA100\b": (312, 19.5),
    r"\bL40S\b": (362, 91.6),
    r"\bL4\b": (121, 30.3),
    r"\bA10G?\b": (125, 31.2),
    r"\bV100\b": (125, 15.7),
    r"\bT4\b": (65, 8.1),
    r"\bRTX 4090\b": (165, 82.6),
    r"\bRTX 3090\b": (71, 35.6),
}
CLEARLY = 4  # times slower; two short measurements on a busy machine differ by less
GEMM_SIDE, GEMM_ROUNDS = 512, 8  # 0.27 GFLOP a product: milliseconds, and large enough to run at the full rate


def training_flops(settings: HiCMAESettings) -> float:
    """FLOPs (2 x MAC) of forward and backward per clip with every stream: what the method needs, so that activations
    computed again by checkpointing do not count (Chowdhery et al. 2022, PaLM, appendix B).

    The backward pass multiplies twice for each product, but once for the patch embeddings and never for targets: nobody
    asks for the gradient of the pixels.
    """
    keys = torch.zeros(1, dtype=torch.int64)
    mask_video = tube_mask(keys, settings.grid_video, settings.mask_ratio_video)
    mask_audio = random_mask(keys, math.prod(settings.grid_audio), settings.mask_ratio_audio)
    # One clip alone has no other rank's clips to be told from, and a count must not wait for other ranks.
    model = _on_meta(HiCMAE, settings.model_copy(update={"contrast_negatives": "local"}))
    forward = _count(lambda: model(_blank_inputs(settings), mask_video.to("meta"), mask_audio.to("meta")))
    embedding = 0
    for stream, mask in (("video", mask_video), ("audio", mask_audio)):
        if settings.streams in ("both", stream):
            weight = getattr(model, f"encoder_{stream}").patch_embed.weight
            embedding += 2 * mask.ids_keep.shape[1] * weight.numel()
    targets = 0
    if settings.functionals_weight and settings.streams != "video":
        inputs, steps = _blank_inputs(settings), settings.grid_audio[0]
        targets = _count(lambda: functionals(plain_mel(inputs.audio[:, 0]), inputs.audio_frames, steps))
    return 3.0 * forward - embedding - 2 * targets


def encoding_flops(settings: HiCMAESettings) -> float:
    """FLOPs of the encoders per clip with nothing hidden, as an online probe runs them."""
    model, inputs = _on_meta(HiCMAE, settings), _blank_inputs(settings)
    flops = 0
    if settings.streams != "audio":
        flops += _count(lambda: model.encoder_video(patches_video(inputs, settings)))
    if settings.streams != "video":
        flops += _count(lambda: model.encoder_audio(patches_audio(inputs, settings)))
    return float(flops)


def peak_flops(device: torch.device, precision: str) -> tuple[float | None, str]:
    """(FLOP/s, where that figure is from) of one device; None with the reason where its peak is not known.

    On a CPU the rate of a large product, measured now in some milliseconds; elsewhere the data sheet's.
    """
    if device.type == "cpu":
        return _gemm_rate(torch.bfloat16 if precision == "bf16" else torch.float32), "the rate of a large product here"
    name = torch.cuda.get_device_name(device)
    for pattern, (half, full) in PEAK_TFLOPS.items():
        if re.search(pattern, name):
            return (full if precision == "fp32" else half) * 1e12, f"the peak of {name}"
    return None, f"the peak of {name} is not known here"


@cache
def slow_precision(precision: str, device: torch.device) -> str | None:
    """What to tell who trains on a CPU in a precision that it is slow in, as one without instructions for bf16, where a
    product takes tens of times as long as in fp32; None where it takes no longer than a busy machine might make it."""
    if device.type != "cpu" or precision == "fp32":
        return None
    half, full = (_gemm_rate(dtype, rounds=2) for dtype in (AUTOCAST[precision], torch.float32))
    if half * CLEARLY > full:
        return None
    return (
        f"train.precision={precision}: no fast {precision} on this CPU, {half / 1e9:.3g} GFLOP/s in a large product, "
        f"{full / 1e9:.3g} in fp32: with train.precision=fp32 a step would take a fraction of the time"
    )


def _gemm_rate(dtype: torch.dtype, rounds: int = GEMM_ROUNDS) -> float:
    a = torch.ones(GEMM_SIDE, GEMM_SIDE, dtype=dtype)
    best = math.inf
    for _ in range(rounds):
        before = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - before)
    return 2 * GEMM_SIDE**3 / best


def _on_meta(kind, *arguments):
    with torch.device("meta"):  # shapes alone: nothing is drawn and nothing is computed
        return kind(*arguments)


def _count(function) -> int:
    # Torch's counter knows no fused attention on the CPU and would count nothing for it.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def _blank_inputs(s: HiCMAESettings) -> Inputs:
    def blank(*shape: int) -> Tensor:
        return torch.empty(1, *shape, device="meta")

    present = torch.ones(1, dtype=torch.bool, device="meta")
    frames = torch.full((1,), s.mel_frames, device="meta")
    video, audio = blank(3, s.num_frames, s.img_size, s.img_size), blank(1, s.mel_frames, s.mel_bins)
    return Inputs(video, audio, present, present, frames)
