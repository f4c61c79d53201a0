"""Fine-tuning HiCMAE: hierarchical feature fusion over the encoders, and a head per set of streams that a clip has."""

from pathlib import Path
from typing import Any, Literal

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

    `outputs` is the number of classes or dimensions. Raises SettingsError where `paths` has a stream that the encoder
    was not trained on.
    """

    def __init__(
        self,
        encoder: Encoder,
        outputs: int,
        paths: tuple[Streams, ...] = ("both", "video", "audio"),
        missing: Missing = "leave_out",
    ):
        super().__init__()
        if encoder.streams != "both":
            if set(paths) != {encoder.streams}:
                raise SettingsError(f"the encoder knows {encoder.streams} alone, the paths asked for are {paths}")
        elif missing == "token" and "both" not in paths:
            raise SettingsError(
                "missing=`token` judges every clip by the head of both streams; add `both` to the paths"
            )
        s = encoder.settings
        self.encoder, self.paths, self.missing = encoder, paths, missing
        for stream in ("video", "audio"):
            if encoder.streams in ("both", stream):
                setattr(self, f"layer_weights_{stream}", nn.Parameter(torch.full((s.depth,), 1 / s.depth)))
        heads = ("both",) if missing == "token" else paths
        self.heads = nn.ModuleDict({path: Head(s.embed_dim * (4 if path == "both" else 2), outputs) for path in heads})
        if missing == "token":
            self.missing_video, self.missing_audio = (nn.Parameter(torch.zeros(2, s.embed_dim)) for _ in range(2))

    def forward(self, inputs: Inputs) -> Tensor:
        """Logits (B, outputs), each clip judged by the streams that it has. NaN where there is no path for those."""
        if self.encoder.streams != "both":
            return self.heads[self.encoder.streams](self.features(inputs, self.encoder.streams).flatten(1))
        features = self.features(inputs, "both")  # (B, 4, D)
        has_video, has_audio = (has[:, None] for has in (inputs.has_video, inputs.has_audio))
        if self.missing == "token":
            video = torch.where(has_video[..., None], features[:, [0, 2]], self.missing_video)
            audio = torch.where(has_audio[..., None], features[:, [1, 3]], self.missing_audio)
            joined = torch.stack((video, audio), 2).flatten(1)  # (B, 4 D): video, audio, fused video, fused audio
            return self.heads["both"](joined).masked_fill(~(has_video | has_audio), float("nan"))
        parts = {"both": features, "video": features[:, [0, 2]], "audio": features[:, [1, 3]]}
        have = {"both": has_video & has_audio, "video": has_video & ~has_audio, "audio": has_audio & ~has_video}
        logits = features.new_full((len(features), next(iter(self.heads.values())).linear.out_features), float("nan"))
        for path, head in self.heads.items():
            logits = torch.where(have[path], head(parts[path].flatten(1)), logits)
        return logits

    def features(self, inputs: Inputs, streams: Streams) -> Tensor:
        """(B, 4, D): video and audio over layers, fused video, fused audio; of one stream (B, 2, D), without fusion the
        last layer in its place. Rows of a stream that a clip lacks mean nothing."""
        tokens = self.encoder.layers(inputs, streams)
        valid = None if streams == "video" else self.encoder.valid_audio_tokens(inputs)
        depth = self.encoder.settings.depth
        summed, fused = [], []
        for stream in ("video", "audio") if streams == "both" else (streams,):
            real = valid if stream == "audio" else None
            means = torch.stack([mean_of_tokens(tokens[f"{stream}_{i}"], real) for i in range(1, depth + 1)], 1)
            weights = getattr(self, f"layer_weights_{stream}").softmax(0)
            summed.append((means * weights[:, None]).sum(1))  # (B, depth, D) -> (B, D)
            last = tokens[f"fusion_{stream}"] if streams == "both" else tokens[f"{stream}_{depth}"]
            fused.append(mean_of_tokens(last, real))
        return torch.stack(summed + fused, 1)


class Head(nn.Module):
    """LayerNorm and a linear map, (B, width) -> (B, outputs)."""

    def __init__(self, width: int, outputs: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.linear = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))


def create_classifier(
    pretrained: str | Path,
    outputs: int,
    paths: tuple[Streams, ...] = ("both", "video", "audio"),
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
