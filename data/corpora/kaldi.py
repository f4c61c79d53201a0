"""A Kaldi data folder: wav.scp, and where they are there segments, utt2spk, spk2gender and text.

Paths in wav.scp may be absolute; `--media FOLDER` says where those of another machine, and relative ones, are here.
Lines that are commands, `sph2pipe ... |`, are left out: nothing is run.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from affekt.data.corpora.corpus import Corpus, Report, Row, Tree, number_of
from affekt.data.corpora.lists import Locator
from affekt.data.errors import SettingsError
from affekt.data.manifest import safe_id


def rows(tree: Tree, report: Report) -> Iterator[Row]:
    if "wav.scp" not in tree.files:
        raise SettingsError(f"{tree.source}: no wav.scp; give the folder that holds it")
    sounds = _sounds(tree, report)
    speakers, sexes, texts = (_pairs(tree, name) for name in ("utt2spk", "spk2gender", "text"))
    for name, sound in _utterances(tree, sounds, report):
        speaker = speakers.get(name)
        about = {"speaker": speaker, "sex": sexes.get(speaker, "").upper(), "transcript": texts.get(name)}
        yield {"id": safe_id(name), **sound, **about}


def _sounds(tree: Tree, report: Report) -> dict[str, Path]:
    sounds, locate = {}, Locator(tree)
    for name, text in _pairs(tree, "wav.scp").items():
        if text.endswith("|"):
            report.leave_out("commands, which are not run", name)
            continue
        path = Path(text) if os.path.isabs(text) and os.path.isfile(text) else locate(text, "wav.scp")
        if path is None or not path.is_file():
            report.absent.append(text)
        else:
            sounds[name] = path
    return sounds


def _utterances(tree: Tree, sounds: dict[str, Path], report: Report) -> Iterator[tuple[str, Row]]:
    if "segments" not in tree.files:
        yield from ((name, {"audio": path}) for name, path in sounds.items())
        return
    for where, line in tree.lines("segments"):
        fields = line.split()
        if len(fields) != 4:
            raise SettingsError(f"{where}: expected `utterance recording start end`, found {len(fields)} words")
        name, recording = fields[:2]
        start, end = (number_of(where, "the time", field) for field in fields[2:])
        if recording in sounds:
            until = end if end is None or end >= 0 else None  # -1: to the end of the recording
            yield name, {"audio": sounds[recording], "start": start, "end": until}


def _pairs(tree: Tree, name: str) -> dict[str, str]:
    """Key and rest of each line, with spaces or a tab between them."""
    lines = tree.lines(name) if name in tree.files else ()
    pairs = (line.split(maxsplit=1) for _, line in lines)
    return {pair[0]: pair[1].strip() if len(pair) > 1 else "" for pair in pairs}


KALDI = Corpus(
    name="kaldi", title="Kaldi data folder", rows=rows, looks_like="wav.scp, utt2spk, segments", is_list=True
)
