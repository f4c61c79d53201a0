"""What is varied of a training view: pure functions of seed, epoch and the view's name."""

import math
import re
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from affekt.data.order import uniform
from affekt.data.rand_augment import rand_augment
from affekt.data.settings import Settings

# Where a crop may lie, in quarters of the room it has: the corners, the centre, the middles of the edges, and the four
# points between centre and corners (the 13 fixed offsets of multi-scale cropping; HiCMAE 1.1).
CROP_OFFSETS = ((0, 0), (4, 0), (0, 4), (4, 4), (2, 2), (0, 2), (4, 2), (2, 4), (2, 0), (1, 1), (3, 1), (1, 3), (3, 3))
SCALES = (1.0, 0.875, 0.75, 0.66)
TRIALS = 10  # of boxes of a random resized crop, until one fits (torchvision)
RECIPE = r"rand(-(m|n|mstd|mmax|inc|p)\d+(\.\d+)?)*"  # of timm's operations, without its named sets of them


class Augment(Settings):
    """What is varied of a training view. Each draws numbers of its own, so that one can be turned off alone."""

    crop_scales: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        SCALES, min_length=1, description="sides of the crop; published: these four"
    )
    crop_area: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]] | None = Field(
        None, description="least and most of the picture in a random resized crop; fine-tuning as published: [0.08, 1]"
    )
    rand_augment: str = Field(
        "",
        description="operations on the pictures, as timm names them; fine-tuning as published: rand-m7-n4-mstd0.5-inc1",
    )
    flip: bool = Field(False, description="mirror half of the views; off in HiCMAE, on in its fine-tuning")
    gain: bool = Field(True, description="loudness times Beta(10, 10) + 0.5; published: true, in tests too")
    roll: bool = Field(
        False,
        description="turn the sound round by a random time; not with contrast; published: by 0",
    )
    windows: Literal["any", "speech"] = Field(
        "any", description="speech: those alone that hold most of a clip's sound, which has to be read as a whole"
    )

    @model_validator(mode="after")
    def _check(self) -> "Augment":
        if self.crop_area and "crop_scales" in self.model_fields_set and self.crop_scales != SCALES:
            raise ValueError("crop_scales and crop_area are two ways to crop; set one")
        if self.crop_area and self.crop_area[0] > self.crop_area[1]:
            raise ValueError(f"crop_area {list(self.crop_area)}: the least comes first")
        if self.rand_augment and not re.fullmatch(RECIPE, self.rand_augment):
            raise ValueError(f"rand_augment `{self.rand_augment}` is none of timm's, as rand-m7-n4-mstd0.5-inc1")
        return self

    def pictures(self, video: np.ndarray, seed: int, epoch: int, clip: str) -> np.ndarray:
        """The pictures uint8 (T, H, W, 3) after the same random operations on each; new memory where there are some."""
        return rand_augment(video, self.rand_augment, seed, epoch, clip) if self.rand_augment else video

    def crop(self, size: int, seed: int, epoch: int, clip: str) -> tuple[float, float, float, float]:
        """A box of whole pixels in a square picture, as x0, y0, x1, y1 in 0..1; mirrored when x0 > x1."""
        x, y, width, height = (self._resized if self.crop_area else self._scaled)(size, seed, epoch, clip)
        left, right = x / size, (x + width) / size
        if self.flip and uniform(1, seed, epoch, clip, "flip")[0] < 0.5:
            left, right = right, left
        return left, y / size, right, (y + height) / size

    def _scaled(self, size: int, *key: int | str) -> tuple[int, int, int, int]:
        sides = [int(size * scale) for scale in self.crop_scales]
        pairs = [(w, h) for i, w in enumerate(sides) for j, h in enumerate(sides) if abs(i - j) <= 1]
        u = uniform(2, *key, "crop")
        width, height = pairs[int(u[0] * len(pairs))]
        across, down = CROP_OFFSETS[int(u[1] * len(CROP_OFFSETS))]
        return (size - width) // 4 * across, (size - height) // 4 * down, width, height

    def _resized(self, size: int, *key: int | str) -> tuple[int, int, int, int]:
        """A share of the area, at an aspect of 3/4 to 4/3 (Inception crops, as in torchvision); else all."""
        low, high = self.crop_area
        for area, aspect, across, down in uniform(4 * TRIALS, *key, "area").reshape(TRIALS, 4).tolist():
            area = (low + (high - low) * area) * size**2
            aspect = math.exp((2 * aspect - 1) * math.log(4 / 3))
            width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < width <= size and 0 < height <= size:
                return int(across * (size - width + 1)), int(down * (size - height + 1)), width, height
        return 0, 0, size, size

    def sound(self, samples: int, seed: int, epoch: int, clip: str) -> tuple[float, int]:
        """What the device multiplies the sound by, and by how many of its samples it turns it round
        (`transforms.vary_sound`). The 10th of 19 sorted uniform numbers has Beta(10, 10)."""
        gain = float(np.sort(uniform(19, seed, epoch, clip, "gain"))[9]) + 0.5 if self.gain else 1.0
        return gain, int(uniform(1, seed, epoch, clip, "roll")[0] * samples) if self.roll else 0
