"""What is exported, probed and fine-tuned: the encoders and the fusion of a pre-trained model, without decoders."""

from typing import Any

import torch
from torch import Tensor, nn

from affekt.data.batch import Batch, Streams
from affekt.data.decode import Window
from affekt.data.errors import SettingsError
from affekt.data.transforms import Inputs, Preprocess
from affekt.pretrain.hicmae import (
    HiCMAE,
    contrast_means,
    patches_audio,
    patches_video,
    valid_audio_tokens,
)
from affekt.pretrain.hicmae_settings import HiCMAESettings
from affekt.pretrain.patches import mean_of_tokens

NOT_EXPORTED = ("decoder_", "functionals", "edges")  # what predicts, and is of no use behind the encoders


class Encoder(nn.Module):
    """The encoders of a HiCMAE model together with the preprocessing they were trained on.

    `window` says which frames and how much sound a view holds, `preprocess` turns a `Batch` into `Inputs`. With `model`
    the encoders are that model's own, to look at while it learns; without, fresh ones.
    """

    def __init__(
        self,
        settings: HiCMAESettings,
        window: Window,
        preprocess: Preprocess,
        prepare: dict[str, Any],
        model: HiCMAE | None = None,
    ):
        super().__init__()
        self.settings = settings
        self.window = window
        self.preprocess = preprocess
        self.prepare = prepare  # the settings of `affekt prepare` behind the training shards
        self.grid_video = settings.grid_video
        self.grid_audio = settings.grid_audio
        for name, part in (model or HiCMAE(settings)).named_children():
            if not name.startswith(NOT_EXPORTED):
                self.add_module(name, part)

    @property
    def streams(self) -> Streams:
        """The streams this encoder was trained on."""
        return self.settings.streams

    @property
    def has_projectors(self) -> bool:
        """Whether there are the projection heads that the contrast was computed behind."""
        return hasattr(self, "projector_video")

    def drop_projectors(self) -> None:
        """Leave the heads out: of no use behind the encoders, and absent from exports before 1.1."""
        for name in [name for name, _ in self.named_children() if name.startswith("projector_")]:
            delattr(self, name)

    def layers(self, inputs: Inputs, streams: Streams = "both") -> dict[str, Tensor]:
        """Tokens (B, N, D) of every layer, nothing hidden: `video_1..L`, `audio_1..L` (each through the encoder's
        final norm, as the taps in training), and for `streams="both"` `fusion_video` and `fusion_audio`.

        Rows of clips without a stream mean nothing; the caller leaves them out by `inputs.has_video/has_audio`.
        """
        if self.streams not in ("both", streams):
            raise SettingsError(f"this encoder was trained on {self.streams} alone and cannot encode {streams}")
        s, tokens, valid = self.settings, {}, None
        if streams != "audio":
            layers = self.encoder_video(patches_video(inputs, s))
            tokens |= {f"video_{i}": self.encoder_video.norm(x) for i, x in enumerate(layers, 1)}
        if streams != "video":
            valid = self.valid_audio_tokens(inputs)
            layers = self.encoder_audio(patches_audio(inputs, s), valid=valid)
            tokens |= {f"audio_{i}": self.encoder_audio.norm(x) for i, x in enumerate(layers, 1)}
        if streams == "both":
            tokens["fusion_video"], tokens["fusion_audio"] = self.encoder_fusion(
                tokens[f"video_{s.depth}"], tokens[f"audio_{s.depth}"], inputs.has_video, inputs.has_audio, valid
            )
        return tokens

    def valid_audio_tokens(self, inputs: Inputs) -> Tensor | None:
        """(B, N) bool, False for padding tokens; None when every window is full, so that attention needs no mask.

        Clips without sound count as full: their rows are ignored, and an empty softmax would spread NaN. Sound shorter
        than one log-mel frame counts as one, for the same reason.
        """
        frames = torch.where(inputs.has_audio, inputs.audio_frames.clamp(min=1), self.settings.mel_frames)
        return None if bool((frames >= self.settings.mel_frames).all()) else valid_audio_tokens(frames, self.settings)

    @torch.inference_mode()
    def contrast_features(self, batch: Batch, segments: int = 0) -> dict[str, Tensor]:
        """What pre-training compares between the streams (HiCMAE section 3.3), with nothing hidden and not normalised.

        `{"video_taps": (B, K, D), "audio_taps": (B, K, D)}`, the mean of the tokens of each of K taps, and behind the
        projection heads, where the export has them, `video_heads` and `audio_heads` (B, K, P). With `segments`, also
        `video_steps` and `audio_steps` (B, K * segments, D), the means over so many equal parts of the window, which
        keep what happens when (zeros where sound is over). A stream that the batch or the encoder lacks has no entry,
        rows of clips without it are NaN.
        """
        inputs, s = self.preprocess(batch), self.settings
        there = {"video": inputs.video is not None, "audio": inputs.audio is not None}
        features = {}
        for stream in (name for name in there if there[name] and s.streams in ("both", name)):
            tokens = self.layers(inputs, stream)
            valid = self.valid_audio_tokens(inputs) if stream == "audio" else None
            means = contrast_means([tokens[f"{stream}_{tap}"] for tap in s.taps], stream, s, None, valid)
            features[f"{stream}_taps"] = torch.stack([x.flatten(1) for x in means], 1)
            if self.has_projectors:
                heads = getattr(self, f"projector_{stream}")
                features[f"{stream}_heads"] = torch.stack(
                    [head(x).flatten(1) for head, x in zip(heads, means, strict=True)], 1
                )
            if segments:
                steps = [mean_by_time(tokens[f"{stream}_{tap}"], valid, segments) for tap in s.taps]
                features[f"{stream}_steps"] = torch.cat(steps, 1)
            for name in (f"{stream}_{kind}" for kind in ("taps", "heads", "steps") if f"{stream}_{kind}" in features):
                features[name] = features[name].float()
                features[name][~getattr(inputs, f"has_{stream}")] = float("nan")
        return features

    @torch.inference_mode()
    def embed(self, batch: Batch) -> dict[str, Tensor]:
        """L2-normalised embeddings by stream: mean of the last layer's tokens over each window of the batch.

        `{"video": (B, D), "audio": (B, D)}`, and with both streams `"both": (B, 2 D)`, their concatenation. Rows of
        clips without the stream are NaN: they have no embedding.
        """
        inputs = self.preprocess(batch)
        streams = ("video", "audio") if self.streams == "both" else (self.streams,)
        last = {stream: self.layers(inputs, stream)[f"{stream}_{self.settings.depth}"] for stream in streams}
        pooled = {}
        if "video" in last:
            pooled["video"] = last["video"].mean(1)
            pooled["video"][~inputs.has_video] = float("nan")
        if "audio" in last:
            pooled["audio"] = mean_of_tokens(last["audio"], self.valid_audio_tokens(inputs))
            pooled["audio"][~inputs.has_audio] = float("nan")
        embeddings = {name: nn.functional.normalize(x.float(), dim=-1) for name, x in pooled.items()}
        if len(streams) == 2:
            embeddings["both"] = torch.cat((embeddings["video"], embeddings["audio"]), -1) / 2**0.5
        return embeddings


def mean_by_time(tokens: Tensor, valid: Tensor | None, segments: int) -> Tensor:
    """(B, N, D), the first axis of whose grid is time, -> (B, segments, D): means over equal runs of tokens that are no
    padding, as `valid` (B, N) says, and zeros where all of a run is."""
    weight = tokens.new_ones(tokens.shape[:2]) if valid is None else valid.to(tokens)
    parts = zip(tokens.tensor_split(segments, 1), weight.tensor_split(segments, 1), strict=True)
    return torch.stack([(x * w[..., None]).sum(1) / w.sum(1, keepdim=True).clamp(min=1) for x, w in parts], 1)
