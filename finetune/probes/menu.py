"""Choosing layer, pooling and a head's option on development clips, and asking the choice once about test clips."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from affekt.data.errors import DataError
from affekt.finetune.features import REAL, TOKENS, FeatureTable, stream_of
from affekt.finetune.probes.heads import Head
from affekt.finetune.probes.linear import rotate, standardise
from affekt.finetune.probes.task import Task

Blocks = tuple[str, ...]


@dataclass(frozen=True)
class Trial:
    """A point of the menu: a head on joined feature blocks, and its score on development clips for each option."""

    head: str
    blocks: Blocks
    options: tuple[Any, ...]
    dev_scores: tuple[float, ...]

    @property
    def best(self) -> float:
        return max(self.dev_scores)

    @property
    def option(self) -> Any:
        """The best option, on a tie the first, simplest."""
        return self.options[self.dev_scores.index(self.best)]


def try_all(
    table: FeatureTable, menu: Sequence[Blocks], task: Task, heads: Sequence[Head], seed: int = 0
) -> list[Trial]:
    """Fit and choose for every point of the menu, every head and option; answers of all folds are scored together."""
    held = np.concatenate(task.folds)
    trials = []
    for blocks in menu:
        answered: dict[str, list[list[np.ndarray]]] = {head.name: [[] for _ in head.options] for head in heads}
        for fit, choose in task.rounds:
            fit = by_id(table, fit)
            for reads in dict.fromkeys(head.reads for head in heads):  # heads that read alike share the coordinates
                train, dev = coordinates(table, blocks, fit, choose, reads)
                for head in (head for head in heads if head.reads == reads):
                    answers = head.answer(train, task.targets(fit), dev, head.options, seed)
                    for option, answer in zip(answered[head.name], answers, strict=True):
                        option.append(answer_of(answer))
        for head in heads:
            scores = tuple(task.score(held, np.concatenate(folds)) for folds in answered[head.name])
            trials.append(Trial(head.name, blocks, head.options, scores))
    return trials


def best_of(trials: Sequence[Trial]) -> Trial:
    """The trial with the best development score, on a tie the first of the menu."""
    return max(trials, key=lambda trial: trial.best)


def fit_choice(
    table: FeatureTable, choice: Trial, task: Task, head: Head, asked: np.ndarray, seed: int = 0
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Fit the choice again on all clips for fitting and ask it about others: answers `(asked, K)`, and, of a head with
    layer weights, those of each stream."""
    fit = by_id(table, task.fitting)
    train, test = coordinates(table, choice.blocks, fit, asked, head.reads)
    (answer,) = head.only(choice.option).answer(train, task.targets(fit), test, (choice.option,), seed)
    return answer_of(answer), answer[1] if isinstance(answer, tuple) else []


def answer_of(answer: np.ndarray | tuple[np.ndarray, Any]) -> np.ndarray:
    """The answers alone. No score may rest on NaN, whatever the head."""
    answer = answer[0] if isinstance(answer, tuple) else answer
    if not np.isfinite(answer).all():
        raise DataError("a head answered NaN or infinity; its features are out of the range of its arithmetic")
    return answer


def search_stream(table: FeatureTable, stream: str, task: Task, heads: Sequence[Head], seed: int = 0) -> list[Trial]:
    """Trials of audio or of video: each head on every layer, under every pooling if it reads those."""
    pooled, others = sorted_heads(heads)
    trials = try_all(table, [(name,) for name in pooled_blocks(table, stream)], task, pooled, seed) if pooled else []
    for head in others:
        trials += try_all(table, menu_of(table, head, stream), task, [head], seed)
    return trials


def search_both(
    table: FeatureTable, task: Task, heads: Sequence[Head], best: dict[tuple[str, str], Trial], seed: int = 0
) -> list[Trial]:
    """Trials of both streams, given the `best` by (stream, head).

    For heads on pooled features: the best of audio beside the best of video, the fused streams under every pooling, and
    the former beside the best of those.
    """
    pooled, others = sorted_heads(heads)
    poolings = dict.fromkeys(name.split("/")[1] for name in pooled_blocks(table, "both"))
    fused = [(f"fusion_audio/{pooling}", f"fusion_video/{pooling}") for pooling in poolings]
    trials = try_all(table, fused, task, pooled, seed) if fused and pooled else []
    for head in pooled:
        joined = best["audio", head.name].blocks + best["video", head.name].blocks
        menu = [joined]
        if fused:
            menu.append(joined + best_of([trial for trial in trials if trial.head == head.name]).blocks)
        # The plain join goes first: on equal scores it is kept.
        trials = try_all(table, menu, task, [head], seed) + trials
    for head in others:
        trials += try_all(table, menu_of(table, head, "both"), task, [head], seed)
    return trials


def sorted_heads(heads: Sequence[Head]) -> tuple[list[Head], list[Head]]:
    """Heads that read pooled features, and the others."""
    return [h for h in heads if h.reads == "pooled"], [h for h in heads if h.reads != "pooled"]


def pooled_blocks(table: FeatureTable, stream: str) -> list[str]:
    """Blocks of pooled features of a stream; `both` are the fused ones."""
    return [name for name in table.blocks if stream_of(name) == stream and name.split("/")[1] not in (TOKENS, REAL)]


def menu_of(table: FeatureTable, head: Head, stream: str) -> list[Blocks]:
    """The menu of a head on tokens (each layer whose tokens are kept; for both streams the last of either) or on the
    means of all layers."""
    if head.reads == "layers":
        layers = layer_means(table, stream)
        return [tuple(layers)] if layers else []
    kept = {
        part: [n for n in table.blocks if n.endswith(f"/{TOKENS}") and stream_of(n) == part]
        for part in ("audio", "video", "both")
    }
    if stream != "both":
        return [(name,) for name in kept[stream]]
    last = tuple(max(kept[part], key=depth_of) for part in ("audio", "video") if kept[part])
    fused = tuple(kept["both"])
    return [blocks for blocks in (last, fused) if len(blocks) == 2]


def layer_means(table: FeatureTable, stream: str) -> list[str]:
    """The blocks of all layers of a stream under mean pooling, by depth; for both streams all, fusion last."""
    parts = ("audio", "video", "both") if stream == "both" else (stream,)
    return sorted(
        (name for name in table.blocks if stream_of(name) in parts and re.fullmatch(r"\w+_\w+/mean", name)),
        key=lambda name: (modality_of(name), depth_of(name)),
    )


def depth_of(block: str) -> float:
    """`audio_3/mean` -> 3; the fusion lies behind all encoder layers."""
    last = block.split("/")[0].split("_")[1]
    return float(last) if last.isdigit() else float("inf")


def modality_of(block: str) -> str:
    """`audio_3/mean` and `fusion_audio/mean` -> audio: which stream's tokens these are."""
    return "audio" if "audio" in block else "video"


def plain_blocks(table: FeatureTable, stream: str) -> Blocks:
    """The fixed row beside the menu: mean pooling of the last layer, for both streams the two joined."""
    parts = ("audio", "video") if stream == "both" else (stream,)
    return tuple(max(layer_means(table, part), key=depth_of) for part in parts)


def by_id(table: FeatureTable, clips: np.ndarray) -> np.ndarray:
    """Clips in the order of their ids, so that no answer depends on the order of shards, and ties go by id."""
    return clips[np.argsort(np.array([table.ids[clip] for clip in clips]), kind="stable")]


def coordinates(
    table: FeatureTable, blocks: Blocks, fitting: np.ndarray, other: np.ndarray, reads: str = "pooled"
) -> tuple[Any, Any]:
    """What a head takes, of the clips to fit on and of other clips.

    `pooled`: the joined blocks, standardised and rotated for the fit, `(n, d)`. `tokens`: a pair of tokens `(n, T, D)`
    and which are real `(n, T)` per block. `layers`: the blocks of each modality stacked, `(n, L, D)`.
    """
    if reads == "tokens":
        pairs = [[(name, name.replace(f"/{TOKENS}", f"/{REAL}")) for name in blocks]] * 2
        return tuple(
            [(finite(table, name, clips), table.take(real, clips)) for name, real in names]
            for names, clips in zip(pairs, (fitting, other))
        )
    train, asked = ([finite(table, block, clips) for block in blocks] for clips in (fitting, other))
    if reads == "pooled":
        return rotate(*standardise(train, asked))
    modalities = list(dict.fromkeys(map(modality_of, blocks)))
    return tuple(
        [np.stack([x for x, name in zip(side, blocks) if modality_of(name) == m], 1) for m in modalities]
        for side in (train, asked)
    )


def finite(table: FeatureTable, block: str, clips: np.ndarray) -> np.ndarray:
    """Rows of a block; DataError naming block and clip where a value is NaN or infinite: no score may rest on it."""
    rows = table.take(block, clips)
    bad = np.flatnonzero(~np.isfinite(rows).reshape(len(rows), -1).all(1))
    if len(bad):
        raise DataError(
            f"{block}: {len(bad)} of {len(rows)} clips have NaN or infinite features, first {table.ids[clips[bad[0]]]}"
        )
    return rows
