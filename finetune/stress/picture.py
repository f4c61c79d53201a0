"""What can happen to the pictures of a clip: something before the face, bad light, compression, a camera that lags.

Each function maps the pictures of one view, uint8 (T, H, W, 3), to as many, given the level and a generator of the
clip's own, which is the same at every level.
"""

import cv2
import numpy as np
import simplejpeg

COVER = 128  # grey, which is no end of the scale


def cover_lower(video: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """A bar over this share of the height, from below: a mask, a hand, a microphone."""
    video = video.copy()
    video[:, video.shape[1] - round(share * video.shape[1]) :] = COVER
    return video


def cover_upper(video: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """A bar from above: a headset, sunglasses."""
    video = video.copy()
    video[:, : round(share * video.shape[1])] = COVER
    return video


def cover_box(video: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """A square of this share of the area, anywhere, in all pictures at the same place."""
    video, (high, wide) = video.copy(), video.shape[1:3]
    h, w = round(high * share**0.5), round(wide * share**0.5)
    y, x = (int(u * (free + 1)) for u, free in zip(rng.random(2), (high - h, wide - w)))
    video[:, y : y + h, x : x + w] = COVER
    return video


def brightness(video: np.ndarray, factor: float, rng: np.random.Generator) -> np.ndarray:
    """Times a factor; what is too bright is cut."""
    return cv2.convertScaleAbs(video.reshape(-1, 3), alpha=factor).reshape(video.shape) if factor != 1 else video


def jpeg(video: np.ndarray, quality: float, rng: np.random.Generator) -> np.ndarray:
    """As JPEG pictures of this quality, colours at half the size; 100 leaves them as they are."""
    if quality >= 100:
        return video
    coded = [simplejpeg.encode_jpeg(np.ascontiguousarray(picture), round(quality), "RGB", "420") for picture in video]
    return np.stack([simplejpeg.decode_jpeg(picture, "RGB") for picture in coded])


def blur(video: np.ndarray, percent: float, rng: np.random.Generator) -> np.ndarray:
    """By a Gaussian whose deviation is this many percent of the picture's side."""
    if percent <= 0:
        return video
    sigma = percent / 100 * video.shape[1]
    return np.stack([cv2.GaussianBlur(picture, (0, 0), sigma) for picture in video])


def freeze(video: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """With this share of the pictures lost, each shown as the last one before it that was not; the first comes always.

    What is lost at one level is lost at every higher one.
    """
    order = 1 + rng.permutation(len(video) - 1)
    kept = np.ones(len(video), bool)
    kept[order[: round(share * len(order))]] = False
    return video[np.maximum.accumulate(np.where(kept, np.arange(len(video)), 0))]
