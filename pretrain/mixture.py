"""From settings to the clips that a run learns from: which of each corpus, what is held out, and whether they fit."""

import numpy as np

from affekt.data.decode import Window
from affekt.data.errors import DataError, SettingsError
from affekt.data.mixture import Corpus, check_together
from affekt.data.shards import ShardIndex
from affekt.data.split import assert_disjoint, where
from affekt.pretrain.settings import CorpusSettings, PretrainSettings

MOSTLY = 0.5  # of the clips


def open_corpora(settings: PretrainSettings) -> list[Corpus]:
    """The corpora of a run, by name, so that their order in the settings decides nothing.

    Raises SettingsError when a clip to learn from, its group or the file it was made from is held out (files in any of
    the corpora), or corpora were not prepared alike; DataError when there is nothing to learn a stream from.
    """
    streams = settings.model.streams
    chosen = [(part, ShardIndex.open(part.shards)) for part in sorted(settings.data.parts, key=lambda part: part.name)]
    corpora = [
        Corpus(index, training_positions(index, part, streams), part.weight, part.name) for part, index in chosen
    ]
    check_together(corpora)
    held_out: dict[str, str] = {}  # source file -> a clip made from it
    for part, index in chosen:
        rows = map(index.samples.row, where(index, part.held_out) if part.held_out else ())
        held_out |= {row["source_sha256"]: f"{row['id']} of {index.root}" for row in rows if row["source_sha256"]}
    for corpus in corpora if held_out else ():
        for row in map(corpus.index.samples.row, corpus.positions):
            if row["source_sha256"] in held_out:
                raise SettingsError(
                    f"{corpus.index.root}: the clips {row['id']} and {held_out[row['source_sha256']]} stand on two "
                    "sides and were made from the same file; put both on one side"
                )
    for stream in ("video", "audio") if streams == "both" else ():
        if not any(getattr(c.index.samples, f"has_{stream}")[c.positions].any() for c in corpora):
            other = "audio" if stream == "video" else "video"
            raise DataError(
                f"{', '.join(str(c.index.root) for c in corpora)}: not one clip to learn from has {stream}, so half of "
                f"the model would stay random; say model.streams={other}"
            )
    return corpora


def training_positions(index: ShardIndex, part: CorpusSettings, streams: str) -> np.ndarray:
    """Positions of the clips of one corpus to learn from. Raises SettingsError when one of them or its group is held
    out, and when `held_out` names no clip at all; DataError when there is nothing to learn from."""
    positions = where(index, part.include)
    if streams == "both":
        has = index.samples.has_video | index.samples.has_audio
    else:
        has = getattr(index.samples, f"has_{streams}")
    positions = [i for i in positions if has[i]]
    if not positions:
        raise DataError(
            f"{part.shards}: no clip with {streams} and {part.include or 'any metadata'}; see its summary.json"
        )
    if part.held_out:
        held_out = where(index, part.held_out)
        if not held_out:
            raise SettingsError(
                f"held_out {part.held_out} names no clip of {part.shards}, so nothing would be checked; "
                "correct it, or say held_out: {} where no clip is to be held out"
            )
        for field in ("id", *([part.group] if part.group else [])):
            assert_disjoint(index, positions, held_out, field)
    return np.array(positions)


def notes(corpora: list[Corpus], window: Window, shares: list[int], by_speaker: bool = False) -> list[str]:
    """What somebody who starts a run should know of its data and would not see: lines of text."""
    lines = []
    if len(corpora) > 1:
        of = [
            f"{c.name} {share / sum(shares):.1%} ({share} of {len(c.positions)} clips)"
            for c, share in zip(corpora, shares, strict=True)
        ]
        lines.append(f"an epoch of {sum(shares)} clips: {', '.join(of)}")
    if by_speaker:
        known = [bool(c.index.samples.row(i)["meta"].get("speaker")) for c in corpora for i in c.positions]
        if not all(known):
            lines.append(
                f"model.contrast_exclude=speaker: {len(known) - sum(known)} of {len(known)} clips name no speaker, so "
                "they stay negatives of all others"
            )
    durations = np.concatenate([c.index.samples.duration[c.positions] for c in corpora])
    short = (durations < window.duration - 1 / window.fps).mean()
    if short > MOSTLY:
        lines.append(
            f"{short:.0%} of the clips are shorter than the window of {window.duration:.2f} s (pictures "
            f"{window.picture_seconds:.2f} s, sound {window.sound_seconds:.2f} s): their last picture is repeated and "
            "their sound padded; lower data.frame_stride, model.num_frames or model.mel_frames"
        )
    return lines
