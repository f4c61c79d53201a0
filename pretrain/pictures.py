"""Reconstruction pictures: target, masked input and output of both streams, with the normalisation undone."""

from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import Tensor

from affekt.data.transforms import Inputs, picture_constants
from affekt.pretrain.hicmae import HiCMAE, patches_audio, patches_video
from affekt.pretrain.masks import Mask
from affekt.pretrain.patches import (
    gather_tokens,
    standardise_audio,
    standardise_video,
    unpatchify_audio,
    unpatchify_video,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HIDDEN_GREY = 0.5
FRAMES_SHOWN = 4


@torch.no_grad()
def reconstruction_picture(
    path: Path | None, model: HiCMAE, inputs: Inputs, mask_video: Mask, mask_audio: Mask, clips: int = 2
) -> None:
    """Write one PNG with the first `clips` clips of a batch; without a `path`, only take part in the forward pass.

    The decoder predicts standardised patches. To show them, mean and contrast of each patch are taken from the
    target, and the picture says so: what is judged is the structure within the patches.
    """
    was_training = model.training
    model.eval()
    predictions, _ = model.reconstruct(inputs, mask_video, mask_audio)
    model.train(was_training)
    if path is None:
        return
    rows: list[tuple[str, np.ndarray, str | None]] = []  # title, image, colour map
    for clip in range(min(clips, len(mask_video.ids_keep))):
        if "video" in predictions and inputs.has_video[clip]:
            images = video_images(model, inputs, predictions["video"], mask_video, clip)
            rows += [(title, np.concatenate(list(frames), axis=1), None) for title, frames in images.items()]
        if "audio" in predictions and inputs.has_audio[clip]:
            images = audio_images(model, inputs, predictions["audio"], mask_audio, clip)
            rows += [(title, image.T[::-1], "magma") for title, image in images.items()]
    if not rows:
        return
    figure, axes = plt.subplots(len(rows), 1, figsize=(7, 1.75 * len(rows)), layout="constrained", squeeze=False)
    for axis, (title, image, colours) in zip(axes[:, 0], rows, strict=True):
        axis.imshow(image, cmap=colours, aspect="equal" if colours is None else "auto")
        axis.set_title(title, fontsize=8, loc="left")
        axis.set_axis_off()
    figure.suptitle("outputs use the target's mean and contrast per patch", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def video_images(model: HiCMAE, inputs: Inputs, prediction: Tensor, mask: Mask, clip: int) -> dict[str, np.ndarray]:
    """Target, masked input and output as (FRAMES_SHOWN, H, W, 3) arrays in 0..1."""
    s = model.settings
    patches = patches_video(inputs, model.settings)[clip : clip + 1].float()
    mean, std = picture_constants(patches.device)
    pixels = patches.unflatten(-1, (-1, 3)) * std + mean
    pixels = pixels.flatten(2)
    _, mean, std = standardise_video(gather_tokens(patches, mask.ids_mask[clip : clip + 1]))
    output = prediction[clip : clip + 1].float().unflatten(-1, (s.tubelet_size, -1, 3))  # (1, M, tubelet, p*p, 3)
    if s.frame_difference:
        output = output.cumsum(2)
    output = (output.flatten(2, 3) * std[:, :, None] + mean[:, :, None]).flatten(2)
    return {
        title: _frames(unpatchify_video(tokens, s.grid_video, s.tubelet_size, s.patch_size)[0])
        for title, tokens in _three(pixels, output, mask, clip, HIDDEN_GREY).items()
    }


def audio_images(model: HiCMAE, inputs: Inputs, prediction: Tensor, mask: Mask, clip: int) -> dict[str, np.ndarray]:
    """Target, masked input and output log-mel as (frames, mels) arrays."""
    s = model.settings
    patches = patches_audio(inputs, model.settings)[clip : clip + 1].float()
    _, mean, std = standardise_audio(gather_tokens(patches, mask.ids_mask[clip : clip + 1]))
    output = prediction[clip : clip + 1].float() * std + mean
    return {
        title: unpatchify_audio(tokens, s.grid_audio, s.patch_size_audio)[0, 0].cpu().numpy()
        for title, tokens in _three(patches, output, mask, clip, patches.min().item()).items()
    }


def _three(tokens: Tensor, output: Tensor, mask: Mask, clip: int, blank: float) -> dict[str, Tensor]:
    ids = mask.ids_mask[clip : clip + 1, :, None].expand(-1, -1, tokens.shape[-1])
    hidden = tokens.scatter(1, ids, torch.full_like(output, blank))
    return {"target": tokens, "input": hidden, "output": tokens.scatter(1, ids, output)}


def _frames(video: Tensor) -> np.ndarray:
    """(3, T, H, W) -> evenly spaced frames (FRAMES_SHOWN, H, W, 3) in 0..1."""
    chosen = torch.linspace(0, video.shape[1] - 1, min(FRAMES_SHOWN, video.shape[1])).round().long()
    return video[:, chosen].permute(1, 2, 3, 0).clamp(0, 1).cpu().numpy()
