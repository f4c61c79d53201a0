"""What judges tokens: the published fusion over depths, or statistics of parts of the spectrum and of the face."""

import math

import torch
from torch import Tensor, nn

from affekt.data.batch import Streams
from affekt.data.errors import SettingsError
from affekt.data.transforms import Inputs
from affekt.finetune.classifier import Classifier
from affekt.finetune.pooling import BANDS, means_of_cells
from affekt.finetune.training.settings import HeadSettings
from affekt.pretrain.encoder import Encoder

SMALLEST_VARIANCE = 1e-5  # under a square root whose slope at 0 has no end


class BandsClassifier(Classifier):
    """Judges the last layer's tokens (those after fusion, where a clip has both streams) by their mean and deviation
    over time, in each of eight bands of the spectrum and of four of the face.

    With few clips a better start than the mean over all tokens: where in the spectrum something happens, and how much
    it changes, need not be learned.
    """

    columns = 1  # that a band is divided into, where its grid has them

    def feature_rows(self) -> dict[str, int]:
        known = ("video", "audio") if self.encoder.streams == "both" else (self.encoder.streams,)
        return {stream: 2 * math.prod(self.parts(stream)) for stream in known}

    def parts(self, stream: str) -> tuple[int, int]:
        """Parts of the rows and of the columns of a stream's grid."""
        _, rows, columns = self.grid(stream)
        return min(BANDS[stream], rows), min(self.columns, columns)

    def grid(self, stream: str) -> tuple[int, int, int]:
        """Time, rows and columns of a stream's tokens."""
        return (*self.encoder.grid_audio, 1) if stream == "audio" else self.encoder.grid_video

    def features(self, inputs: Inputs) -> dict[str, Tensor]:
        """By stream (B, 2 x parts, D): means, then deviations."""
        features = {}
        for stream, (last, valid) in self.last_tokens(inputs).items():
            time, rows, columns = self.grid(stream)
            if valid is None:
                steps = last.new_ones(len(last), time, dtype=torch.float32)
            else:
                steps = valid.view(len(last), time, rows)[:, :, 0].float()
            x = last.float().unflatten(1, (time, rows, columns))
            features[stream] = statistics_of_parts(x, steps, self.parts(stream))
        return features

    @staticmethod
    def joined(video: Tensor, audio: Tensor) -> Tensor:
        return torch.cat((video, audio), 1).flatten(1)


class CellsClassifier(BandsClassifier):
    """Judges as `BandsClassifier`, with each band of the face in four parts from its left to its right: what a corner
    of the mouth does is not averaged with its middle."""

    columns = 4


def statistics_of_parts(x: Tensor, steps: Tensor, parts: tuple[int, int]) -> Tensor:
    """(B, T, rows, columns, D) -> (B, 2 x parts, D): mean and deviation over time of so many joined rows and columns,
    over the time steps that `steps` (B, T) marks with 1."""
    share = (steps / steps.sum(1, keepdim=True))[:, :, None, None]
    x = means_of_cells(x, *parts).flatten(2, 3)
    mean = (x * share).sum(1)
    variance = ((x - mean[:, None]).square() * share).sum(1)
    return torch.cat((mean, (variance + SMALLEST_VARIANCE).sqrt()), 1)


def create_head(encoder: Encoder, outputs: int, streams: Streams, head: HeadSettings) -> Classifier:
    """The encoder with a new head for what the streams in use can be judged by. Raises SettingsError for a head that
    these have nothing for."""
    if head.kind == "cells" and streams == "audio":
        raise SettingsError("head.kind `cells` divides the face, and sound alone has none: choose bands")
    kind = {"layers": Classifier, "bands": BandsClassifier, "cells": CellsClassifier}[head.kind]
    paths = None if streams == encoder.streams else (streams,)
    network = kind(encoder, outputs, paths, head.missing, head.dropout)
    for part in network.heads.values() if head.init_std is not None else ():
        nn.init.trunc_normal_(part.linear.weight, std=head.init_std)
        nn.init.zeros_(part.linear.bias)
    return network
