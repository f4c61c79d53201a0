"""What a head is to say about clips: one of several classes, or a value on each of several dimensions."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Targets:
    """`values` float64 (n, K): one-hot rows where `classes`, else ratings, such as of valence and arousal."""

    values: np.ndarray
    classes: bool

    @classmethod
    def of_labels(cls, labels: np.ndarray, num_classes: int) -> "Targets":
        """From class indices (n,)."""
        return cls(np.eye(num_classes)[labels], True)

    @property
    def labels(self) -> np.ndarray:
        """Class indices (n,)."""
        return self.values.argmax(1)

    @property
    def weights(self) -> np.ndarray:
        """(n,) with mean 1. Classes count equally, as they do in the score, whatever their numbers of clips."""
        if not self.classes:
            return np.ones(len(self.values))
        counts = self.values.sum(0)
        return (self.values @ (1 / np.maximum(counts, 1))) * len(self.values) / (counts > 0).sum()

    def take(self, rows: np.ndarray) -> "Targets":
        """The same for some clips."""
        return Targets(self.values[rows], self.classes)
