"""Random erasing: a box of noise at the same place of all pictures of a clip (Zhong et al. 2020)."""

import math
from collections.abc import Sequence
from dataclasses import replace

from pydantic import Field

from affekt.data.settings import Settings
from affekt.data.transforms import Inputs
from affekt.finetune.training.draws import normals, uniforms

TRIALS = 10  # of boxes, until one fits into the picture (timm)


class Erasing(Settings):
    """Which clips have a box of their pictures erased; none by default. Published fine-tuning (HiCMAE): 0.25."""

    share: float = Field(0.0, ge=0, le=1, description="of the clips; published: 0.25")
    area: tuple[float, float] = Field((0.02, 1 / 3), description="least and most of the picture in the box")
    aspect: float = Field(0.3, gt=0, le=1, description="height to width of the box, from this to 1 / this")

    def box(self, key: int, height: int, width: int) -> tuple[int, int, int, int] | None:
        """Top, left, height and width of a clip's box; None where the clip is left alone."""
        if uniforms([key], 1, "erase")[0, 0] >= self.share:
            return None
        for area, aspect, down, across in uniforms([key], 4 * TRIALS, "box").reshape(TRIALS, 4).tolist():
            area = (self.area[0] + (self.area[1] - self.area[0]) * area) * height * width
            aspect = math.exp((2 * aspect - 1) * -math.log(self.aspect))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < h < height and 0 < w < width:
                return int(down * (height - h + 1)), int(across * (width - w + 1)), h, w
        return None

    def erase(self, inputs: Inputs, keys: Sequence[int]) -> Inputs:
        """Normalised pictures with the boxes filled with standard normal noise, another one at every pixel."""
        if not self.share or inputs.video is None:
            return inputs
        video = inputs.video.clone()
        for row, key in enumerate(keys):
            box = self.box(key, *video.shape[3:])
            if box:
                top, left, height, width = box
                noise = normals(key, "erased", *video.shape[1:3], height, width, device=video.device)
                video[row, :, :, top : top + height, left : left + width] = noise
        return replace(inputs, video=video)
