"""What is varied of a training view: pure functions of seed, epoch and the view's name."""

from typing import Annotated

import numpy as np
from pydantic import Field

from affekt.data.order import uniform
from affekt.data.settings import Settings

# Where a crop may lie, in quarters of the room it has: the corners, the centre, the middles of the edges, and the four
# points between centre and corners (the 13 fixed offsets of multi-scale cropping; HiCMAE 1.1).
CROP_OFFSETS = ((0, 0), (4, 0), (0, 4), (4, 4), (2, 2), (0, 2), (4, 2), (2, 4), (2, 0), (1, 1), (3, 1), (1, 3), (3, 3))


class Augment(Settings):
    """What is varied of a training view. Each draws numbers of its own, so that one can be turned off alone."""

    crop_scales: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        (1.0, 0.875, 0.75, 0.66), min_length=1, description="sides of the crop; published: these four"
    )
    flip: bool = Field(False, description="mirror half of the views; off in HiCMAE")
    gain: bool = Field(True, description="loudness times Beta(10, 10) + 0.5; published: true, in tests too")
    roll: bool = Field(
        False,
        description="turn the sound round by a random time; not with contrast; published: by 0",
    )

    def crop(self, size: int, seed: int, epoch: int, clip: str) -> tuple[float, float, float, float]:
        """A box of whole pixels in a square picture, as x0, y0, x1, y1 in 0..1; mirrored when x0 > x1."""
        sides = [int(size * scale) for scale in self.crop_scales]
        pairs = [(w, h) for i, w in enumerate(sides) for j, h in enumerate(sides) if abs(i - j) <= 1]
        u = uniform(2, seed, epoch, clip, "crop")
        width, height = pairs[int(u[0] * len(pairs))]
        across, down = CROP_OFFSETS[int(u[1] * len(CROP_OFFSETS))]
        x, y = (size - width) // 4 * across, (size - height) // 4 * down
        left, right = x / size, (x + width) / size
        if self.flip and uniform(1, seed, epoch, clip, "flip")[0] < 0.5:
            left, right = right, left
        return left, y / size, right, (y + height) / size

    def sound(self, samples: int, seed: int, epoch: int, clip: str) -> tuple[float, int]:
        """What the device multiplies the sound by, and by how many of its samples it turns it round
        (`transforms.vary_sound`). The 10th of 19 sorted uniform numbers has Beta(10, 10)."""
        gain = float(np.sort(uniform(19, seed, epoch, clip, "gain"))[9]) + 0.5 if self.gain else 1.0
        return gain, int(uniform(1, seed, epoch, clip, "roll")[0] * samples) if self.roll else 0
