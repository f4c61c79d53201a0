"""Where and which way the edges of a picture run, in small cells: histograms of oriented gradients as targets.

Brows, lids and lips are edges, and an emotion moves them by less than a patch: plain pixels tell little of that, their
gradients much (Dalal & Triggs, CVPR 2005). To predict them is the task of MaskFeat (Wei et al., CVPR 2022, section 3.2)
for hidden patches; here the encoder's deepest tap tells those of the patches it sees, so that it keeps what a probe or
a fine-tuning needs, as `pretrain.functionals` has it tell the sound's.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from affekt.data.transforms import picture_constants

CELLS = 4  # on each side of a patch
ORDERS = 4  # of the circular harmonics of the directions: as much as nine bins hold, without borders between them
NUM_EDGES = CELLS**2 * (1 + 2 * ORDERS)
FAINT = 0.02  # of the range of grey: below this, patches hold noise, and their targets go to 0
SMALLEST = 1e-12  # under a square root


@torch.no_grad()
def edges(video: Tensor, tubelet_size: int, patch_size: int) -> Tensor:
    """ImageNet-normalised (B, 3, T, H, W) -> (B, N, NUM_EDGES) for every patch, of its tubelet's first frame.

    In each cell the sum of the gradients' sizes and of their directions' harmonics: with size m and direction a, which
    light on dark shares with dark on light, the means of m, m cos 2ka and m sin 2ka, k = 1..ORDERS. A patch is divided
    by its root mean square, so that light and contrast change little.
    """
    cell = patch_size // CELLS
    _, std = picture_constants(video.device)
    colours = video[:, :, ::tubelet_size].float().unbind(1)
    grey = sum(weight * colour for weight, colour in zip(std / 3, colours, strict=True))  # but for a constant
    grey = F.pad(grey, (1, 1, 1, 1), mode="replicate")
    right = grey[:, :, 1:-1, 2:] - grey[:, :, 1:-1, :-2]
    down = grey[:, :, 2:, 1:-1] - grey[:, :, :-2, 1:-1]
    square = right * right + down * down + SMALLEST
    size = square.sqrt()
    cosine, sine = (right * right - down * down) / square, 2 * right * down / square  # of twice the direction
    sums, x, y = [F.avg_pool2d(size, cell)], size, torch.zeros_like(size)
    for _ in range(ORDERS):
        x, y = x * cosine - y * sine, x * sine + y * cosine
        sums += [F.avg_pool2d(x, cell), F.avg_pool2d(y, cell)]
    cells = torch.stack(sums, -1)  # (B, t, H / cell, W / cell, 1 + 2 ORDERS)
    patches = cells.unflatten(3, (-1, CELLS)).unflatten(2, (-1, CELLS)).transpose(3, 4).flatten(4).flatten(1, 3)
    return patches / (patches.square().mean(-1, keepdim=True) + FAINT**2).sqrt()
