"""Views that lack something on purpose: a whole stream (modality dropout), or pictures and sound here and there."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from pydantic import Field, model_validator
from torch import Tensor

from affekt.data.settings import Settings
from affekt.data.transforms import Inputs
from affekt.finetune.training.draws import column, uniforms


class StreamDropout(Settings):
    """Whole streams hidden from the model, of clips that have both; never both of a clip."""

    video: float = Field(0.0, ge=0, le=1, description="share of the clips whose pictures are hidden")
    audio: float = Field(0.0, ge=0, le=1, description="share of the clips whose sound is hidden")

    @model_validator(mode="after")
    def _check(self) -> "StreamDropout":
        if self.video + self.audio > 1:
            raise ValueError(f"video {self.video} and audio {self.audio} hide more than all clips")
        return self


def drop_streams(inputs: Inputs, keys: Sequence[int], settings: StreamDropout) -> Inputs:
    """Clips with both streams lose one of them, as if it had never been there."""
    if not (settings.video or settings.audio):
        return inputs
    u = column(uniforms(keys, 1, "stream dropout")[:, 0], inputs.has_video.device, torch.float64)
    both = inputs.has_video & inputs.has_audio
    hide_video = both & (u < settings.video)
    hide_audio = both & (u >= settings.video) & (u < settings.video + settings.audio)
    return replace(inputs, has_video=inputs.has_video & ~hide_video, has_audio=inputs.has_audio & ~hide_audio)


def incomplete_view(inputs: Inputs, keys: Sequence[int], tubelet: int = 1) -> tuple[Inputs, Tensor, Tensor]:
    """The clips with moments hidden: each stream of each clip draws a rate in 0..1, and hides each `tubelet` of its
    pictures and each 16 frames of its log-mel with that probability (RMFM of CIDer, at the size of a patch). What is
    hidden is 0, the mean. Also returns which moments are hidden, bool (B, T) of pictures and (B, F) of the log-mel."""
    device = inputs.has_video.device
    video, audio = inputs.video, inputs.audio
    hidden_video = hidden_audio = torch.zeros(len(keys), 0, dtype=torch.bool, device=device)
    if video is not None:
        hidden_video = _hidden(keys, "hidden pictures", video.shape[2], tubelet, device)
        video = video.masked_fill(hidden_video[:, None, :, None, None], 0.0)
    if audio is not None:
        hidden_audio = _hidden(keys, "hidden sound", audio.shape[2], 16, device)
        real = torch.arange(audio.shape[2], device=device) < inputs.audio_frames[:, None]
        hidden_audio = hidden_audio & real
        audio = audio.masked_fill(hidden_audio[:, None, :, None], 0.0)
    return replace(inputs, video=video, audio=audio), hidden_video, hidden_audio


def _hidden(keys: Sequence[int], name: str, length: int, run: int, device: torch.device) -> Tensor:
    u = column(uniforms(keys, 1 + -(-length // run), name), device)
    return (u[:, 1:] < u[:, :1]).repeat_interleave(run, 1)[:, :length]
