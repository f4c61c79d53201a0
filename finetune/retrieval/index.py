"""The folder of `affekt index`: vectors of clips, what is known of the clips, and how to ask.

`retrieval.json` (what it was made of, and a SHA-256 of every other file), `vectors.safetensors`, `clips.jsonl`,
`space.safetensors`, and for approximate kinds `STREAM.faiss`. A flat index is built from the vectors when it is opened.
faiss trusts what stands in its files, so one is read only when it has the checksum that was written with it; open
folders of your own making alone.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from affekt.data.errors import DataError, SettingsError
from affekt.data.files import check_version, hash_file
from affekt.finetune.retrieval.search import Search, effort, read_index
from affekt.finetune.retrieval.space import Features, Space

FORMAT, VERSION = "affekt-retrieval", "1.0"
MANIFEST = "retrieval.json"
STREAMS = ("audio", "video", "both")


@dataclass
class ClipIndex:
    """An index that was opened. `clips` are the lines of clips.jsonl, in the order of the ids; `rows[stream]` (n,) says
    which clip each row of a stream's vectors belongs to."""

    folder: Path
    about: dict[str, Any]
    space: Space
    clips: list[dict[str, Any]]
    rows: dict[str, np.ndarray]
    searches: dict[str, Search]
    files: np.ndarray  # SHA-256 of the source files, sorted: their places are the groups of the searches

    @classmethod
    def open(cls, folder: str | Path) -> "ClipIndex":
        """Raises DataError where a file is missing, has another checksum or is of another major version."""
        folder = Path(folder)
        try:
            about = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            check_version(about, FORMAT, VERSION, folder / MANIFEST)
            own = [f"{stream}.faiss" for stream in about["streams"]] if about["kind"] != "flat" else []
            for name in ("vectors.safetensors", "clips.jsonl", "space.safetensors", *own):
                if hash_file(folder / name) != about["files"][name]:
                    raise DataError(f"{folder / name}: its checksum differs from {MANIFEST}; make the index again")
            vectors = safetensors.numpy.load_file(folder / "vectors.safetensors")
            clips = [json.loads(line) for line in (folder / "clips.jsonl").read_bytes().splitlines()]
            space = Space.load(folder / "space.safetensors")
            names = [clip["source_sha256"] or f"clip {clip['id']}" for clip in clips]
            files, sources = np.unique(names, return_inverse=True)
            rows = {stream: vectors[f"{stream}_rows"] for stream in about["streams"]}
            searches = {}
            for stream, where in rows.items():
                searches[stream] = Search(stored(vectors, stream), sources[where])
                if about["kind"] != "flat":
                    searches[stream].approximate = read_index(folder / f"{stream}.faiss")
                    effort(about["kind"], searches[stream].approximate, about["tuned"][stream]["effort"])
            return cls(folder, about, space, clips, rows, searches, files)
        except (OSError, LookupError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            raise DataError(f"{folder}: no index can be read: {error!r}; `affekt index` writes one") from None

    def search(
        self, features: Features, query: str, target: str, k: int, sources: Sequence[str] = ()
    ) -> list[list[dict[str, Any]]]:
        """The k best clips by their `target` stream for each row of `features` by its `query` stream:
        `{"id", "score", "source_sha256", "meta"}` each. Clips of the file with the SHA-256 `sources[row]` are left out.
        """
        if target not in self.searches:
            raise SettingsError(
                f"{self.folder}: holds {', '.join(self.searches)}, not {target}; index it with --stream"
            )
        if "both" in (query, target) and query != target:
            raise SettingsError(f"asking with {query} for {target}: `both` is compared with `both` alone")
        search, rows = self.searches[target], self.rows[target]
        own = None
        if len(sources):
            places = np.searchsorted(self.files, np.array(sources)).clip(max=len(self.files) - 1)
            own = np.where(self.files[places] == np.array(sources), places, -1)
        scores, places = search(self.space.vectors(features, query), k, own)
        return [
            [{**self.clips[rows[p]], "score": float(s)} for s, p in zip(*pair) if p >= 0]
            for pair in zip(scores, places)
        ]


def stored(vectors: dict[str, np.ndarray], stream: str) -> np.ndarray:
    """Vectors of the clips that have a stream; those of `both` are made of the two that are on the disk."""
    if stream != "both":
        return vectors[stream]
    parts = []
    for one in ("video", "audio"):
        places = np.searchsorted(vectors[f"{one}_rows"], vectors["both_rows"])
        parts.append(vectors[one][places])
    return np.concatenate(parts, 1) / np.float32(np.sqrt(2))
