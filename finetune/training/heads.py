"""What judges tokens: the published fusion over depths, or statistics per band of the spectrum and of the face."""

import torch
from torch import Tensor, nn

from affekt.data.batch import Streams
from affekt.data.transforms import Inputs
from affekt.finetune.classifier import Classifier
from affekt.finetune.features import BANDS
from affekt.finetune.training.settings import HeadSettings
from affekt.pretrain.encoder import Encoder

SMALLEST_VARIANCE = 1e-5  # under a square root whose slope at 0 has no end


class BandsClassifier(Classifier):
    """Judges the last layer's tokens (those after fusion, where a clip has both streams) by their mean and deviation
    over time, in each of eight bands of the spectrum and of four of the face.

    With few clips a better start than the mean over all tokens: where in the spectrum something happens, and how much
    it changes, need not be learned.
    """

    def feature_rows(self) -> dict[str, int]:
        grids = {"video": self.encoder.grid_video[1], "audio": self.encoder.grid_audio[1]}
        known = ("video", "audio") if self.encoder.streams == "both" else (self.encoder.streams,)
        return {stream: 2 * min(BANDS[stream], grids[stream]) for stream in known}

    def features(self, inputs: Inputs) -> dict[str, Tensor]:
        """By stream (B, 2 x bands, D): means, then deviations."""
        features = {}
        for stream, (last, valid) in self.last_tokens(inputs).items():
            time, rows, columns = (*self.encoder.grid_audio, 1) if stream == "audio" else self.encoder.grid_video
            if valid is None:
                steps = last.new_ones(len(last), time, dtype=torch.float32)
            else:
                steps = valid.view(len(last), time, rows)[:, :, 0].float()
            x = last.float().unflatten(1, (time, rows, columns)).mean(3)  # (B, T, rows, D)
            features[stream] = band_statistics(x, steps, min(BANDS[stream], rows))
        return features

    @staticmethod
    def joined(video: Tensor, audio: Tensor) -> Tensor:
        return torch.cat((video, audio), 1).flatten(1)


def band_statistics(x: Tensor, steps: Tensor, bands: int) -> Tensor:
    """(B, T, rows, D) -> (B, 2 x bands, D): mean and deviation over time of rows joined to bands, over the time steps
    that `steps` (B, T) marks with 1."""
    share = (steps / steps.sum(1, keepdim=True))[:, :, None, None]
    x = torch.stack([band.mean(2) for band in x.tensor_split(bands, dim=2)], dim=2)
    mean = (x * share).sum(1)
    variance = ((x - mean[:, None]).square() * share).sum(1)
    return torch.cat((mean, (variance + SMALLEST_VARIANCE).sqrt()), 1)


def create_head(encoder: Encoder, outputs: int, streams: Streams, head: HeadSettings) -> Classifier:
    """The encoder with a new head for what the streams in use can be judged by."""
    kind = Classifier if head.kind == "layers" else BandsClassifier
    paths = None if streams == encoder.streams else (streams,)
    network = kind(encoder, outputs, paths, head.missing, head.dropout)
    for part in network.heads.values() if head.init_std is not None else ():
        nn.init.trunc_normal_(part.linear.weight, std=head.init_std)
        nn.init.zeros_(part.linear.bias)
    return network
