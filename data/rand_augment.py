"""RandAugment on clips (Cubuk et al. 2020): timm's operations, the same ones on all pictures of a clip."""

import random
from functools import lru_cache

import numpy as np

from affekt.data.order import clip_key


def rand_augment(video: np.ndarray, recipe: str, seed: int, epoch: int, clip: str) -> np.ndarray:
    """Pictures uint8 (T, H, W, 3) after the operations of `recipe`, `rand-m7-n4-mstd0.5-inc1` in the published
    fine-tuning of HiCMAE, in memory of their own.

    Timm draws from the generators of the process. They are set for each picture, so that all have the same draws, and
    are afterwards as they were. Another release of timm may draw others.
    """
    from PIL import Image

    transform = _transform(recipe, video.shape[1])
    state, numpy_state, key = random.getstate(), np.random.get_state(), clip_key(seed, epoch, clip) % 2**32
    varied = np.empty_like(video)
    try:
        for before, after in zip(video, varied, strict=True):
            random.seed(key)
            np.random.seed(key)
            after[...] = np.asarray(transform(Image.fromarray(before)))
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)
    return varied


@lru_cache(maxsize=4)
def _transform(recipe: str, size: int):
    from affekt.data import torch_extensions  # noqa: F401  (timm imports torchvision)

    # isort: split
    from PIL import Image
    from timm.data.auto_augment import rand_augment_transform

    return rand_augment_transform(recipe, {"translate_const": int(size * 0.45), "interpolation": Image.BICUBIC})
