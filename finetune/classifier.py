"""Fine-tuning HiCMAE: hierarchical feature fusion over the encoders, and a head per set of streams that a clip has."""

from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from affekt.data.batch import Streams
from affekt.data.errors import SettingsError
from affekt.data.transforms import Inputs
from affekt.pretrain.encoder import Encoder
from affekt.pretrain.export import create_encoder, load_encoder
from affekt.pretrain.layers import NORM_EPS
from affekt.pretrain.patches import mean_of_tokens
from affekt.pretrain.published import PUBLISHED_STRIDE, load_weights, read_published

Missing = Literal["leave_out", "token"]


class Classifier(nn.Module):
    """The encoders with hierarchical feature fusion (HiCMAE section 3.4) and linear heads; fine-tuned as a whole.

    Per stream two features of D numbers: the tokens of every layer averaged and summed with softmaxed weights that are
    learned, and the mean of the fused tokens. A clip with both streams is judged by `heads.both` on all four, as
    published. A clip with one stream is judged by the head of that stream on its two, as good as an encoder of that
    stream alone: nothing stands in for what is absent. With `missing="token"` it is judged by `heads.both`, with a
    learned vector in place of the features of the absent stream.

    `outputs` is the number of classes or dimensions, `paths` the heads there are; by default all that the encoder
    knows. Raises SettingsError for paths that it was not trained for, or that `missing="token"` leaves unused.
    """

    def __init__(
        self,
        encoder: Encoder,
        outputs: int,
        paths: tuple[Streams, ...] | None = None,
        missing: Missing = "leave_out",
        dropout: float = 0.0,
    ):
        super().__init__()
        known = ("both", "video", "audio") if encoder.streams == "both" else (encoder.streams,)
        if missing not in get_args(Missing):
            raise SettingsError(f"missing is `{missing}`; choose one of {', '.join(get_args(Missing))}")
        if missing == "token":
            if encoder.streams != "both" or paths not in (None, ("both",)):
                raise SettingsError(
                    "missing=`token` judges every clip by the head of both streams: it needs an encoder of both, and "
                    f"no other paths (the encoder knows {encoder.streams}, paths are {paths})"
                )
            paths = ("both",)
        paths = known if paths is None else tuple(paths)
        if not paths or not set(paths) <= set(known):
            raise SettingsError(f"paths are {paths}; this encoder has {', '.join(known)}")
        s = encoder.settings
        encoder.drop_projectors()  # nothing here would train them
        self.encoder, self.paths, self.missing = encoder, paths, missing
        rows = self.feature_rows()
        rows["both"] = sum(rows.values())
        heads = {path: Head(rows[path] * s.embed_dim, outputs, dropout) for path in paths}
        self.heads = nn.ModuleDict(heads)
        if missing == "token":
            self.missing_video, self.missing_audio = (
                nn.Parameter(torch.zeros(rows[stream], s.embed_dim)) for stream in ("video", "audio")
            )

    def feature_rows(self) -> dict[str, int]:
        """How many features of D numbers `features` gives per stream; makes what is learned for them."""
        depth, rows = self.encoder.settings.depth, {}
        for stream in ("video", "audio"):
            if self.encoder.streams in ("both", stream):
                setattr(self, f"layer_weights_{stream}", nn.Parameter(torch.full((depth,), 1 / depth)))
                rows[stream] = 2
        return rows

    def forward(self, inputs: Inputs, with_features: bool = False) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Logits (B, outputs), each clip judged by the streams that it has. NaN where there is no path for those. With
        `with_features` also what `features` says.

        A stream that the encoder does not know, or that the batch was loaded without, counts as absent from all clips
        and costs nothing.
        """
        parts = self.features(inputs)
        logits = self._logits(parts, inputs)
        return (logits, parts) if with_features else logits

    def _logits(self, parts: dict[str, Tensor], inputs: Inputs) -> Tensor:
        has_video, has_audio = (
            has[:, None] & (stream in parts)
            for stream, has in (("video", inputs.has_video), ("audio", inputs.has_audio))
        )
        if self.missing == "token":
            video = self._or_token(parts.get("video"), has_video, self.missing_video)
            audio = self._or_token(parts.get("audio"), has_audio, self.missing_audio)
            logits = self.heads["both"](self.joined(video, audio))
            return logits.masked_fill(~(has_video | has_audio), float("nan"))
        have = {"both": has_video & has_audio, "video": has_video & ~has_audio, "audio": has_audio & ~has_video}
        if len(parts) == 2:
            parts = {**parts, "both": self.joined(parts["video"], parts["audio"])}
        logits = torch.full_like(has_video, float("nan"), dtype=torch.float32)
        for path, head in self.heads.items():
            if path in parts:
                logits = torch.where(have[path], head(parts[path].flatten(1)), logits)
        return logits.expand(-1, next(iter(self.heads.values())).linear.out_features)

    def features(self, inputs: Inputs) -> dict[str, Tensor]:
        """By stream (B, 2, D): the sum over layers, and the mean of the last tokens. Rows of clips that lack the stream
        mean nothing."""
        tokens = self.tokens(inputs)
        features = {}
        for stream, (last, valid) in self.last_tokens(inputs, tokens).items():
            means = [mean_of_tokens(tokens[f"{stream}_{i}"], valid) for i in range(1, self.encoder.settings.depth + 1)]
            weights = getattr(self, f"layer_weights_{stream}").softmax(0)
            summed = (torch.stack(means, 1) * weights[:, None]).sum(1)  # (B, depth, D) -> (B, D)
            features[stream] = torch.stack((summed, mean_of_tokens(last, valid)), 1)
        return features

    def tokens(self, inputs: Inputs) -> dict[str, Tensor]:
        """Of every layer of the streams that the batch holds and the encoder knows, as `Encoder.layers`."""
        there = {"video": inputs.video is not None, "audio": inputs.audio is not None}
        streams = [stream for stream in there if there[stream] and self.encoder.streams in ("both", stream)]
        if not streams:
            raise SettingsError(f"the batch holds no stream of this encoder, which knows {self.encoder.streams}")
        return self.encoder.layers(inputs, "both" if len(streams) == 2 else streams[0])

    def last_tokens(
        self, inputs: Inputs, tokens: dict[str, Tensor] | None = None
    ) -> dict[str, tuple[Tensor, Tensor | None]]:
        """By stream the tokens (B, N, D) after fusion (of the last layer, where the encoder has no fusion), and which
        of them (B, N) are no padding, None where all are."""
        encoder, tokens = self.encoder, tokens or self.tokens(inputs)
        streams = [stream for stream in ("video", "audio") if f"{stream}_1" in tokens]
        found = {}
        for stream in streams:
            valid = encoder.valid_audio_tokens(inputs) if stream == "audio" else None
            last = tokens.get(f"fusion_{stream}", tokens[f"{stream}_{encoder.settings.depth}"])
            if encoder.streams == "both" and len(streams) == 1:
                last = encoder.encoder_fusion.alone(last, stream, valid)
            found[stream] = last, valid
        return found

    @staticmethod
    def joined(video: Tensor, audio: Tensor) -> Tensor:
        """(B, 2, D) of each -> (B, 4 D): video and audio over layers, fused video, fused audio."""
        return torch.stack((video, audio), 2).flatten(1)

    def _or_token(self, features: Tensor | None, has: Tensor, token: Tensor) -> Tensor:
        return token.expand(len(has), -1, -1) if features is None else torch.where(has[..., None], features, token)


class Head(nn.Module):
    """LayerNorm, dropout and a linear map, (B, width) -> (B, outputs), in float32: in the eight bits of bf16 the logits
    of different clips would tie."""

    def __init__(self, width: int, outputs: int, dropout: float = 0.0):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.linear(self.dropout(self.norm(x.float())))


def create_classifier(
    pretrained: str | Path,
    outputs: int,
    paths: tuple[Streams, ...] | None = None,
    missing: Missing = "leave_out",
) -> Classifier:
    """A classifier to fine-tune on the encoders of an export folder or of a file of the authors. Layer weights and
    heads are new, also where that file has some, which is said on stderr; `published_classifier` keeps them. Raises
    CheckpointError as `affekt.load` does."""
    return Classifier(load_encoder(pretrained), outputs, paths, missing)


def published_classifier(path: str | Path, **changes: Any) -> Classifier:
    """A fine-tuned file of the authors as it was published: both streams, one head. `changes` as in `read_published`.
    Raises CheckpointError for a file that does not fit, and SettingsError for one of pre-training, which has no head.
    """
    published = read_published(path, **changes)
    told = published.classifier
    if not told:
        raise SettingsError(f"{path}: a pre-training file has no classifier; fine-tune it (`create_classifier`)")
    encoder = create_encoder(published.settings, PUBLISHED_STRIDE, published.prepare)
    model = Classifier(encoder, len(told["head.bias"]), paths=("both",))
    heads = {"fc_norm": "heads.both.norm", "head": "heads.both.linear"}
    weights = {f"encoder.{name}": value for name, value in published.weights.items()}
    for name, value in told.items():
        module, dot, rest = name.partition(".")
        weights[heads.get(module, module) + dot + rest] = value
    load_weights(model, weights, str(path))
    return model.eval()
