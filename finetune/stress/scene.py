"""The clips that are judged, as far as spoiling one of them needs the others: voices for a babble, exact shares."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from xxhash import xxh3_64_intdigest

from affekt.data.decode import Window, decode_window, window_starts
from affekt.data.errors import SettingsError
from affekt.data.shards import ShardIndex

VOICES = 6  # in a babble


def generator(clip: str, name: str) -> np.random.Generator:
    """Random numbers of a clip and of what they are drawn for: batches, ranks and levels change nothing."""
    return np.random.default_rng(xxh3_64_intdigest(f"{name}\0{clip}".encode()))


class Scene:
    """`positions` of an index, in views of a window."""

    def __init__(self, index: ShardIndex, positions: Sequence[int], window: Window):
        self.index, self.window = index, window
        self.samples = {s.id: s for s in (index.samples[p] for p in positions)}
        self.speakers = {name: str(s.meta.get("speaker") or name) for name, s in self.samples.items()}
        self.sounding = sorted(name for name, s in self.samples.items() if s.has_audio)
        self.sound = lru_cache(maxsize=512)(self._sound)  # float32 (S,) of the window in the middle of a clip

    def first(self, share: float, name: str) -> set[str]:
        """That share of the clips, in an order that is drawn for `name`."""
        drawn = sorted(self.samples, key=lambda clip: (generator(clip, name).random(), clip))
        return set(drawn[: round(share * len(drawn))])

    def babble(self, clip: str, length: int, rng: np.random.Generator) -> np.ndarray:
        """`length` samples of six other speakers at once, each equally loud; of fewer where there are no six, and where
        there is one other speaker, or none, of six other clips. Raises SettingsError where no other clip has sound."""
        mine = self.speakers.get(clip, clip)
        others = [name for name in self.sounding if self.speakers[name] != mine]
        others = others or [name for name in self.sounding if name != clip]
        if not others:
            raise SettingsError("a babble takes the voices of other clips, and no other has sound; leave it out")
        total = np.zeros(length)
        for name in self._voices(others, rng):
            voice = self.sound(name)
            voice = np.resize(voice, length) if len(voice) else np.zeros(length)
            total += voice / max(float(np.sqrt(np.mean(np.square(voice, dtype=float)))), 1e-9)
        return total

    def _voices(self, others: list[str], rng: np.random.Generator) -> list[str]:
        """At most six of the clips: one of each speaker, or any where there is one speaker alone."""
        shuffled = [others[i] for i in rng.permutation(len(others))]
        first = {self.speakers[name]: name for name in reversed(shuffled)}
        return (shuffled if len(first) == 1 else [name for name in shuffled if name in set(first.values())])[:VOICES]

    def partners(self, labels: dict[str, str]) -> dict[str, str]:
        """For each clip with sound another of the same speaker, with another label where there is one, each once: the
        clips of a speaker sorted by label, turned by the size of the largest class."""
        found: dict[str, str] = {}
        for speaker in sorted({self.speakers[name] for name in self.sounding}):
            clips = sorted((c for c in self.sounding if self.speakers[c] == speaker), key=lambda c: (labels[c], c))
            counts = [sum(labels[c] == label for c in clips) for label in dict.fromkeys(labels[c] for c in clips)]
            turn = max(counts, default=0) % max(1, len(clips))
            found |= {clip: clips[(i + turn) % len(clips)] for i, clip in enumerate(clips)}
        return found

    def _sound(self, clip: str) -> np.ndarray:
        sample = self.samples[clip]
        start = window_starts(sample.duration, self.window, 1)[0]
        view = decode_window(self.index, sample, self.window, start, "audio")
        return view.audio[: view.audio_valid]
