"""The heads that a probe can have, each with the few options that development clips choose from."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from affekt.finetune.probes.linear import logistic, strongest_first
from affekt.finetune.probes.neighbours import knn
from affekt.finetune.probes.ridge import broad, ridge
from affekt.finetune.probes.targets import Targets
from affekt.finetune.probes.trained import attentive, layer_weights, mlp

HeadName = Literal["logistic", "ridge", "mlp", "attentive", "knn", "broad", "layer_weights"]
STEPS = (50, 100, 200, 400)  # of 64 clips
NEIGHBOURS = tuple((k, t) for k in (50, 20, 10, 5, 1) for t in (0.2, 0.05))


@dataclass(frozen=True)
class Head:
    """A simple model of frozen features.

    It `reads` pooled features `(n, d)`, tokens, or the means of all layers, of which `coordinates` of the menu makes
    what `answer` takes. `answer(train, targets, other, options, seed)` gives `(m, K)` for each option; `options` are
    the simplest first, and on equal scores the first is kept. `seeded` ones draw random numbers.
    """

    name: HeadName
    reads: Literal["pooled", "tokens", "layers"]
    answer: Callable[[Any, Targets, Any, Sequence[Any], int], Iterator[Any]]
    option: str
    options: tuple[Any, ...]
    seeded: bool = False
    regresses: bool = True

    def only(self, option: Any) -> "Head":
        """The same head with its option chosen."""
        return replace(self, options=(option,))


def heads_of(names: Sequence[HeadName], penalties: Sequence[float]) -> list[Head]:
    """The heads of these names; `penalties` serve all that are linear in what they solve for."""
    penalties = tuple(strongest_first(penalties))
    known = [
        Head("logistic", "pooled", unseeded(logistic), "penalty", penalties, regresses=False),
        Head("ridge", "pooled", unseeded(ridge), "penalty", penalties),
        Head("mlp", "pooled", mlp, "steps", STEPS, seeded=True),
        Head("attentive", "tokens", attentive, "steps", STEPS, seeded=True),
        Head("knn", "pooled", unseeded(knn), "k and temperature", NEIGHBOURS),
        Head("broad", "pooled", broad, "penalty", penalties, seeded=True),
        Head("layer_weights", "layers", layer_weights, "steps", STEPS, seeded=True),
    ]
    assert [head.name for head in known] == list(get_args(HeadName))
    by_name = {head.name: head for head in known}
    return [by_name[name] for name in names]


def unseeded(answer: Callable[..., Iterator[np.ndarray]]) -> Callable[..., Iterator[np.ndarray]]:
    """For a head without random numbers: the seed goes nowhere."""
    return lambda train, targets, other, options, _seed: answer(train, targets, other, options)
