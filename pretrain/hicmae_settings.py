"""What decides a HiCMAE model: its architecture, its masks and the weights of its objectives."""

import math
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from affekt.data.batch import Streams
from affekt.data.settings import Settings
from affekt.data.transforms import MEL_WINDOW_MS, Preprocess
from affekt.pretrain.edges import CELLS

CONTRAST = (
    "temperature",
    "contrast_weight",
    "contrast_taps",
    "contrast_negatives",
    "contrast_exclude",
    "contrast_center",
    "contrast_segments",
    "projector_dim",
)


class HiCMAESettings(Settings):
    """The architecture and its objective; the defaults are the base size of the published pre-training."""

    name: str = "hicmae_base"
    streams: Streams = "both"
    embed_dim: PositiveInt = 512
    num_heads: PositiveInt = 8
    depth: PositiveInt = 10
    fusion_depth: NonNegativeInt = 2
    decoder_embed_dim: PositiveInt = 384
    decoder_num_heads: PositiveInt = 6
    taps: tuple[int, ...] = Field((4, 7, 10), min_length=1, description="1-based encoder layers for skips and contrast")
    img_size: PositiveInt = 160
    patch_size: PositiveInt = 16
    num_frames: PositiveInt = 16
    tubelet_size: PositiveInt = 2
    mel_frames: PositiveInt = 256
    mel_bins: PositiveInt = 128
    mel_window_ms: float = Field(
        MEL_WINDOW_MS, ge=MEL_WINDOW_MS, le=128, description="one frame of the log-mel; published: 25. 64 shows pitch"
    )
    patch_size_audio: PositiveInt = 16
    mask_ratio_video: float = Field(0.9, gt=0, lt=1, description="places hidden, in all frames alike; published: 0.9")
    mask_ratio_audio: float = Field(0.8, gt=0, lt=1, description="patches of the log-mel hidden; published: 0.8")
    frame_difference: bool = Field(
        True, description="predict later frames of a tubelet as difference to the one before; published: true"
    )
    temperature: float = Field(0.07, gt=0, description="of the contrast, fixed; published: 0.07")
    contrast_weight: float = Field(0.0025, ge=0, description="lambda, on the sum or mean over taps; published: 0.0025")
    contrast_taps: Literal["sum", "mean"] = Field("sum", description="published: sum")
    contrast_negatives: Literal["global", "local"] = Field(
        "global", description="from all ranks, with gradient, or from the rank's own clips; published: local"
    )
    contrast_exclude: Literal["clip", "speaker"] = Field(
        "clip", description="no negatives of each other: views of one clip, or also all clips of one speaker"
    )
    contrast_center: bool = Field(False, description="take the batch mean off pooled features; published: no")
    contrast_segments: PositiveInt = Field(
        1, description="parts of the time pooled by themselves and compared with the same part; published: 1, the whole"
    )
    projector_dim: NonNegativeInt = Field(0, description="width of projection heads before the contrast; published: 0")
    functionals_weight: float = Field(
        0.0,
        ge=0,
        description="of descriptors of the sound told from visible tokens, best at mel_window_ms 64; published: 0",
    )
    edges_weight: float = Field(
        0.0, ge=0, description="of edges and their directions in small cells, told from visible patches; published: 0"
    )
    positions: Literal["flat", "factorised"] = Field(
        "flat", description="one sinusoid over the flattened index, or one per axis of the grid; published: flat"
    )
    drop_path: float = Field(0.0, ge=0, lt=1, description="of the encoders' last layer; published: 0, 0.1 to fine-tune")

    @property
    def preprocess(self) -> Preprocess:
        """From a batch to what the model takes."""
        return Preprocess(self.img_size, self.mel_bins, self.mel_frames, self.mel_window_ms)

    @property
    def grid_video(self) -> tuple[int, int, int]:
        side = self.img_size // self.patch_size
        return self.num_frames // self.tubelet_size, side, side

    @property
    def grid_audio(self) -> tuple[int, int]:
        return self.mel_frames // self.patch_size_audio, self.mel_bins // self.patch_size_audio

    @model_validator(mode="after")
    def _check(self) -> "HiCMAESettings":
        for size, patch in (
            ("img_size", "patch_size"),
            ("num_frames", "tubelet_size"),
            ("mel_frames", "patch_size_audio"),
            ("mel_bins", "patch_size_audio"),
            ("embed_dim", "num_heads"),
            ("decoder_embed_dim", "decoder_num_heads"),
        ):
            value, step = getattr(self, size), getattr(self, patch)
            if value % step:
                low = value // step * step
                near = f"{low} or {low + step}" if low else f"{step}"
                raise ValueError(f"{size} {value} is not divisible by {patch} {step}; use {near}")
        if list(self.taps) != sorted(set(self.taps)) or not all(1 <= tap <= self.depth for tap in self.taps):
            raise ValueError(f"taps {self.taps} must ascend within 1..depth ({self.depth})")
        for dim in (self.embed_dim, self.decoder_embed_dim):
            if self.positions == "factorised" and dim < 6:
                raise ValueError(f"positions `factorised` needs two channels for each of three axes, there are {dim}")
        for name, steps in (("grid_video", self.grid_video[0]), ("grid_audio", self.grid_audio[0])):
            if steps % self.contrast_segments:
                raise ValueError(
                    f"contrast_segments {self.contrast_segments}: {name} has {steps} steps, no multiple of it"
                )
        if self.functionals_weight and (self.mel_bins < 64 or self.mel_frames < 16):
            raise ValueError("functionals_weight: pitch and slopes need mel_bins of 64 and mel_frames of 16 at least")
        if self.edges_weight and self.patch_size % CELLS:
            raise ValueError(f"edges_weight: patch_size {self.patch_size} has to be divisible by {CELLS}")
        if self.projector_dim and not self.contrast_weight:
            raise ValueError("projector_dim: with contrast_weight 0 nothing trains projection heads; leave it out")
        maps = {"mask_ratio_video": math.prod(self.grid_video[1:]), "mask_ratio_audio": math.prod(self.grid_audio)}
        for name, tokens in maps.items():
            if not int(getattr(self, name) * tokens):
                raise ValueError(f"{name} {getattr(self, name)} hides none of {tokens} tokens; raise it")
        return self

    @property
    def without_effect(self) -> list[str]:
        """Settings that were changed and decide nothing, because `streams` leaves out what they are about."""
        idle = {
            "both": [],
            "video": ["mask_ratio_audio", "mel_window_ms", "functionals_weight", *CONTRAST],
            "audio": ["mask_ratio_video", "frame_difference", "edges_weight", *CONTRAST],
        }
        return [name for name in idle[self.streams] if getattr(self, name) != type(self).model_fields[name].default]
