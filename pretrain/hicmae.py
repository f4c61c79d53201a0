"""HiCMAE (Sun et al., Information Fusion 2024): hierarchical contrastive masked autoencoder for video with sound."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from affekt.data.batch import Batch
from affekt.data.errors import SettingsError
from affekt.data.transforms import Inputs, plain_mel
from affekt.pretrain.edges import NUM_EDGES, edges
from affekt.pretrain.encoders import Decoder, FusionEncoder, ModalityEncoder, init_weights
from affekt.pretrain.functionals import FunctionalsHead, Told, functionals, steps_seen
from affekt.pretrain.gather import Gather
from affekt.pretrain.hicmae_settings import HiCMAESettings
from affekt.pretrain.layers import Mlp
from affekt.pretrain.masks import Mask, random_mask, tube_mask
from affekt.pretrain.objectives import contrastive_loss, reconstruction_loss
from affekt.pretrain.patches import (
    factorised_positions,
    flat_positions,
    gather_tokens,
    mean_of_tokens,
    patchify_audio,
    patchify_video,
    segment_means,
    standardise_audio,
    video_target,
)


class Whole(NamedTuple):
    """What a part of a batch has to know of the others (`pretrain.parts`).

    `tokens` (4,): `HiCMAE.tokens` of all parts of all ranks, averaged. `contrast` (): the loss over them all, and
    `gradient` (B, 2, K, D): its gradient for this part's features times the number of parts; None without a contrast.
    """

    tokens: Tensor
    contrast: Tensor | None
    gradient: Tensor | None


class HiCMAE(nn.Module):
    """Two encoders, a fusion encoder and two decoders; `forward` gives the loss and its parts.

    With `streams` "video" or "audio" the model has that stream alone: no fusion, no contrast.
    """

    def __init__(self, settings: HiCMAESettings):
        super().__init__()
        self.settings = s = settings
        video_patch, audio_patch = s.tubelet_size * s.patch_size**2 * 3, s.patch_size_audio**2
        encoder = (s.embed_dim, s.num_heads, s.depth, s.drop_path)
        decoder = (s.decoder_embed_dim, s.decoder_num_heads, len(s.taps))
        positions = flat_positions if s.positions == "flat" else factorised_positions
        if s.streams != "audio":
            self.encoder_video = ModalityEncoder(video_patch, positions(s.grid_video, s.embed_dim), *encoder)
            table = positions(s.grid_video, s.decoder_embed_dim)
            self.decoder_video = Decoder(s.embed_dim, video_patch, table, *decoder)
        if s.streams != "video":
            self.encoder_audio = ModalityEncoder(audio_patch, positions(s.grid_audio, s.embed_dim), *encoder)
            table = positions(s.grid_audio, s.decoder_embed_dim)
            self.decoder_audio = Decoder(s.embed_dim, audio_patch, table, *decoder)
            if s.functionals_weight:
                self.functionals = FunctionalsHead(s.embed_dim, s.grid_audio)
        if s.streams == "both":
            self.encoder_fusion = FusionEncoder(s.embed_dim, s.num_heads, s.fusion_depth, s.drop_path)
            if s.projector_dim:
                for stream in ("video", "audio"):
                    heads = [Mlp(s.embed_dim, s.projector_dim, s.projector_dim) for _ in s.taps]
                    setattr(self, f"projector_{stream}", nn.ModuleList(heads))
        init_weights(self)
        if s.edges_weight and s.streams != "audio":  # last: all else is as the seed has it without
            self.edges = nn.Linear(s.embed_dim, NUM_EDGES)
            init_weights(self.edges)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep no activations inside of blocks and compute them again in the backward pass: less memory, more time."""
        for child in self.children():
            child.grad_checkpointing = enable

    def masks(self, batch: Batch) -> tuple[Mask, Mask]:
        """The video and audio masks of a batch on the host, drawn from each clip's key."""
        s = self.settings
        mask_video = tube_mask(batch.keys, s.grid_video, s.mask_ratio_video)
        valid = valid_audio_tokens(batch.audio_frames(s.mel_frames), s)
        mask_audio = random_mask(batch.keys, math.prod(s.grid_audio), s.mask_ratio_audio, valid)
        return mask_video, mask_audio

    def tokens(self, batch: Batch, mask_video: Mask, mask_audio: Mask) -> Tensor:
        """float32 (4,): of how many hidden tokens of video, hidden tokens of sound, sounds and steps of a sound with a
        visible token a batch has an error."""
        s = self.settings
        video = batch.has_video.sum() * mask_video.ids_mask.shape[1]
        frames = batch.audio_frames(s.mel_frames)
        real = valid_audio_tokens(frames, s).gather(1, mask_audio.ids_mask)
        sounds = _sounds(batch.has_audio, frames)
        seen = steps_seen(mask_audio.ids_keep, mask_audio.valid_keep, s.grid_audio) & sounds[:, None]
        return torch.stack([video, (real & batch.has_audio[:, None]).sum(), sounds.sum(), seen.sum()]).float()

    def forward(
        self,
        inputs: Inputs,
        mask_video: Mask,
        mask_audio: Mask,
        whole: Whole | None = None,
        only_features: bool = False,
    ) -> dict[str, Tensor]:
        """`{"loss", "loss_video", "loss_audio", "loss_contrast", "loss_functionals", "loss_edges"}`, scalars, those
        that the streams and the settings allow. With `whole` the inputs are a part of a batch, and the mean over its
        parts is the loss of the batch. `only_features` gives `{"features"}`, what the contrast is between, alone."""
        s, tokens = self.settings, whole.tokens if whole else (None,) * 4
        if only_features:
            taps, _ = self.encode(inputs, mask_video, mask_audio)
            return {"features": self.features(taps, mask_video, mask_audio)}
        targets = self.targets(inputs, mask_video, mask_audio)  # first: its copies are gone when activations pile up
        taps, encoded = self.encode(inputs, mask_video, mask_audio)
        pairs = None
        if s.streams == "both":
            features = self.features(taps, mask_video, mask_audio)
            pairs = None if whole else self.gathered(features, self.numbers(inputs))
        predictions = self.decode(encoded, taps, mask_video, mask_audio)
        losses = {}
        if "video" in predictions:
            weight = inputs.has_video[:, None].float().expand(-1, targets["video"].shape[1])
            losses["loss_video"] = reconstruction_loss(predictions["video"], targets["video"], weight, tokens[0])
        if "audio" in predictions:
            real = valid_audio_tokens(inputs.audio_frames, s).gather(1, mask_audio.ids_mask)
            weight = (real & inputs.has_audio[:, None]).float()
            losses["loss_audio"] = reconstruction_loss(predictions["audio"], targets["audio"], weight, tokens[1])
        losses["loss"] = sum(losses.values())
        if "audio" in predictions and s.functionals_weight:
            told = self.functionals(taps["audio"][-1], mask_audio.ids_keep, mask_audio.valid_keep)
            error = self.error_of_functionals(told, targets["functionals"], inputs, mask_audio, tokens[2:])
            losses["loss_functionals"] = error
            losses["loss"] = losses["loss"] + s.functionals_weight * losses["loss_functionals"]
        if "video" in predictions and s.edges_weight:
            told, weight = self.edges(taps["video"][-1]), inputs.has_video[:, None].float()
            seen = None if whole is None else tokens[0] * told.shape[1] / mask_video.ids_mask.shape[1]
            error = reconstruction_loss(told, targets["edges"], weight.expand(told.shape[:2]), seen)
            losses["loss_edges"] = error
            losses["loss"] = losses["loss"] + s.edges_weight * error
        if pairs:
            losses["loss_contrast"] = self.contrast(*pairs)
        elif whole and whole.contrast is not None:
            pulled = (features * whole.gradient).sum()
            losses["loss_contrast"] = whole.contrast + pulled - pulled.detach()
        if "loss_contrast" in losses:
            losses["loss"] = losses["loss"] + s.contrast_weight * losses["loss_contrast"]
        return losses

    def error_of_functionals(
        self, told: Told, target: Told, inputs: Inputs, mask: Mask, counts: Sequence[Tensor | None]
    ) -> Tensor:
        """What visible tokens tell of the sound's statistics, over the window and step by step, against what they are;
        `counts` as in `reconstruction_loss`, of sounds and of steps."""
        sounds = _sounds(inputs.has_audio, inputs.audio_frames)[:, None]
        seen = steps_seen(mask.ids_keep, mask.valid_keep, self.settings.grid_audio) & sounds
        window = reconstruction_loss(told.window[:, None], target.window[:, None], sounds.float(), counts[0])
        return window + reconstruction_loss(told.steps, target.steps, seen.float(), counts[1])

    def features(self, taps: dict[str, list[Tensor]], mask_video: Mask, mask_audio: Mask) -> Tensor:
        """What the contrast is between: (B, 2, K, D) of video and audio, for each tap the mean of its tokens; with
        segments of the time one behind the other (B, 2, K, S D)."""
        s = self.settings
        means = {
            "video": contrast_means(taps["video"], "video", s, mask_video.ids_keep),
            "audio": contrast_means(taps["audio"], "audio", s, mask_audio.ids_keep, mask_audio.valid_keep),
        }
        if s.projector_dim:
            for stream, heads in (("video", self.projector_video), ("audio", self.projector_audio)):
                means[stream] = [head(x) for head, x in zip(heads, means[stream], strict=True)]
        return torch.stack([torch.stack([x.flatten(1) for x in of_taps], 1) for of_taps in means.values()], 1)

    def numbers(self, inputs: Inputs) -> Tensor:
        """What the contrast asks of each clip, int64 (B, 3): whether it has both streams, its number, its speaker's."""
        paired = inputs.has_video & _sounds(inputs.has_audio, inputs.audio_frames)
        none = torch.full_like(inputs.audio_frames, -1)
        return torch.stack([paired.long(), *(none if x is None else x for x in (inputs.clip, inputs.speaker))], 1)

    def gathered(self, features: Tensor, numbers: Tensor) -> tuple[Gather, Gather]:
        """Both on their way from all ranks."""
        across = self.settings.contrast_negatives == "global"
        return Gather(features, across, half=True), Gather(numbers, across)

    def contrast(self, features: Gather, numbers: Gather) -> Tensor:
        """Hierarchical cross-modal contrast (HiCMAE section 3.3): one loss per tap on the means of its tokens."""
        s = self.settings
        video, audio = features.wait().permute(1, 2, 0, 3)  # (K, B, D)
        paired, clip, speaker = numbers.wait().T
        per_tap = contrastive_loss(
            video,
            audio,
            paired > 0,
            s.temperature,
            center=s.contrast_center,
            same=(clip,) if s.contrast_exclude == "clip" else (clip, speaker),
            rows=features.rows,
        )
        return per_tap.sum() if s.contrast_taps == "sum" else per_tap.mean()

    def targets(self, inputs: Inputs, mask_video: Mask, mask_audio: Mask) -> dict[str, Any]:
        """What the decoders are to predict, (B, M, P) by stream, for hidden patches alone, and what the encoders are to
        tell: the `Told` of the sound, the edges (B, K, NUM_EDGES) of visible patches."""
        s, targets = self.settings, {}
        if s.streams != "audio":
            hidden = gather_tokens(patches_video(inputs, s), mask_video.ids_mask)
            targets["video"] = video_target(hidden, s.tubelet_size, s.frame_difference)
            if s.edges_weight:
                everywhere = edges(inputs.video, s.tubelet_size, s.patch_size)
                targets["edges"] = gather_tokens(everywhere, mask_video.ids_keep)
        if s.streams != "video":
            targets["audio"], _, _ = standardise_audio(gather_tokens(patches_audio(inputs, s), mask_audio.ids_mask))
            if s.functionals_weight:
                mel = plain_mel(inputs.audio[:, 0])
                targets["functionals"] = functionals(mel, inputs.audio_frames, s.grid_audio[0])
        return targets

    def reconstruct(
        self, inputs: Inputs, mask_video: Mask, mask_audio: Mask
    ) -> tuple[dict[str, Tensor], dict[str, list[Tensor]]]:
        """Predictions (B, M, P) of the hidden patches and the normed taps (B, K, D), each by stream."""
        taps, encoded = self.encode(inputs, mask_video, mask_audio)
        return self.decode(encoded, taps, mask_video, mask_audio), taps

    def encode(
        self, inputs: Inputs, mask_video: Mask, mask_audio: Mask
    ) -> tuple[dict[str, list[Tensor]], dict[str, Tensor]]:
        """Embed, hide, encode, fuse: the normed taps (B, K, D) and the last layer's tokens (B, K, D), by stream."""
        s = self.settings
        taps, fused = {}, {}
        if s.streams != "audio":
            layers = self.encoder_video(patches_video(inputs, s), mask_video.ids_keep)
            taps["video"] = [self.encoder_video.norm(layers[tap - 1]) for tap in s.taps]
            fused["video"] = self.encoder_video.norm(layers[-1])
        if s.streams != "video":
            layers = self.encoder_audio(patches_audio(inputs, s), mask_audio.ids_keep, mask_audio.valid_keep)
            taps["audio"] = [self.encoder_audio.norm(layers[tap - 1]) for tap in s.taps]
            fused["audio"] = self.encoder_audio.norm(layers[-1])
        if s.streams == "both":
            fused["video"], fused["audio"] = self.encoder_fusion(
                fused["video"], fused["audio"], inputs.has_video, inputs.has_audio, mask_audio.valid_keep
            )
        return taps, fused

    def decode(
        self, encoded: dict[str, Tensor], taps: dict[str, list[Tensor]], mask_video: Mask, mask_audio: Mask
    ) -> dict[str, Tensor]:
        """Predictions (B, M, P) of the hidden patches, by stream; each decoder layer also sees a tap."""
        predictions = {}
        if "video" in encoded:
            predictions["video"] = self.decoder_video(encoded["video"], taps["video"], mask_video)
        if "audio" in encoded:
            predictions["audio"] = self.decoder_audio(encoded["audio"], taps["audio"], mask_audio)
        return predictions


def contrast_means(
    taps: list[Tensor], stream: str, s: HiCMAESettings, ids: Tensor | None = None, valid: Tensor | None = None
) -> list[Tensor]:
    """What the contrast compares of each tap (B, N, D), before heads: (B, D), the mean of its tokens, or with
    `contrast_segments` S above 1 the means of S parts of the time, (B, S, D). `ids` and `valid` as `segment_means`."""
    if s.contrast_segments == 1:
        return [mean_of_tokens(tap, valid) for tap in taps]
    steps, *rest = s.grid_video if stream == "video" else s.grid_audio
    return [segment_means(tap, ids, math.prod(rest), steps, s.contrast_segments, valid) for tap in taps]


def patches_video(inputs: Inputs, s: HiCMAESettings) -> Tensor:
    """All patches (B, N, P) of the video. Raises SettingsError for a video of another shape."""
    _check_shape("video", inputs.video, (3, s.num_frames, s.img_size, s.img_size))
    return patchify_video(inputs.video, s.tubelet_size, s.patch_size)


def patches_audio(inputs: Inputs, s: HiCMAESettings) -> Tensor:
    """All patches (B, N, P) of the log-mel. Raises SettingsError for one of another shape."""
    _check_shape("audio", inputs.audio, (1, s.mel_frames, s.mel_bins))
    return patchify_audio(inputs.audio, s.patch_size_audio)


def valid_audio_tokens(audio_frames: Tensor, s: HiCMAESettings) -> Tensor:
    """(B,) real log-mel frames -> (B, N) bool, True where a token holds at least one real frame."""
    time, mel = s.grid_audio
    starts = torch.arange(time, device=audio_frames.device) * s.patch_size_audio
    return (starts < audio_frames[:, None]).repeat_interleave(mel, dim=1)


def _sounds(has_audio: Tensor, audio_frames: Tensor) -> Tensor:
    """bool (B,): whether there is a frame of sound."""
    return has_audio & (audio_frames > 0)


def _check_shape(name: str, x: Tensor | None, expected: tuple[int, ...]) -> None:
    if x is None or tuple(x.shape[1:]) != expected:
        wanted = ", ".join(map(str, ("B", *expected)))
        found = "missing from the batch" if x is None else tuple(x.shape)
        raise SettingsError(f"{name} is {found}, the model takes ({wanted})")
