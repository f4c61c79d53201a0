"""Making the folder of `affekt index`: features part by part, vectors, and for approximate kinds a faiss index."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from affekt import __version__
from affekt.data.errors import DataError, SettingsError
from affekt.data.files import committed, flush, hash_file, refuse_other_kind, write_text
from affekt.data.shards import ShardIndex
from affekt.finetune.features import weights_hash
from affekt.finetune.retrieval.features import clip_features, unread_clips
from affekt.finetune.retrieval.index import FORMAT, MANIFEST, STREAMS, VERSION, stored
from affekt.finetune.retrieval.search import Kind, Search, build, tune, write_index
from affekt.finetune.retrieval.space import Features, Space, default_space
from affekt.pretrain.encoder import Encoder

PER_PART = 256  # clips whose features are written at once: what a kill may cost
TUNING_QUERIES = 500  # of each stream that may ask


def write_clip_index(
    encoder: Encoder,
    export: str | Path,
    shards: ShardIndex,
    out: str | Path,
    *,
    positions: Sequence[int] | None = None,
    kind: Kind = "flat",
    streams: Sequence[str] | None = None,
    windows: int = 4,
    space: Space | None = None,
    batch_size: int = 16,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write the index of the clips at `positions` (all by default) to the folder `out`; returns its manifest.

    Features are kept part by part beside `out`, so that an interrupted command goes on; an index that stood there is
    replaced when the new one is whole. All vectors are in memory once. `streams` is what may be found, all that the
    clips have by default. `space` is by default the one that pre-training compared in, centred, where the contrast was,
    on the clips of the index. Clips that cannot be read are named in the manifest, `unread`. Raises SettingsError for a
    stream that no clip has, for a space of another encoder and for a folder that holds something else, DataError where
    the disk refuses.
    """
    strange = set(streams or ()) - set(STREAMS)
    if strange:
        raise SettingsError(f"no stream is called {', '.join(sorted(strange))}; there are {', '.join(STREAMS)}")
    out, positions = Path(out).resolve(), range(len(shards.samples)) if positions is None else positions
    refuse_other_kind(out, "an index of `affekt index`")
    if out.exists() and not out.is_dir():
        raise SettingsError(f"{out}: is a file; an index is a folder")
    if out.exists() and not (out / MANIFEST).is_file() and any(out.iterdir()):
        raise SettingsError(f"{out}: holds other files; choose another folder")
    if out.exists():
        check_ours(out)
    positions = sorted(map(int, positions), key=lambda p: shards.samples.row(p)["id"])  # equal scores go by id
    if not positions:
        raise SettingsError(f"{shards.root}: no clip to index")
    clips = [shards.samples.row(p) for p in positions]
    made_of = {"weights": weights_hash(encoder), "shards": shards.fingerprint, "windows": windows}
    if space and space.weights not in ("", made_of["weights"]):
        raise SettingsError(f"the space was chosen for another encoder than {export}; `affekt recall` finds its own")
    segments = space.segments if space else 0
    partial = kept(out, {**made_of, "segments": segments, "ids": [clip["id"] for clip in clips]})
    parts = []
    for start in range(0, len(positions), PER_PART):
        path = partial / f"part-{start // PER_PART:06d}.safetensors"
        if not path.is_file():
            some = positions[start : start + PER_PART]
            how = {"windows": windows, "segments": segments, "batch_size": batch_size, "workers": workers}
            features = clip_features(encoder, shards, some, **how)
            with committed(path) as file:
                file.write(safetensors.numpy.save(features))
        parts.append(safetensors.numpy.load_file(path))
        if progress:
            progress(min(start + PER_PART, len(positions)), len(positions))
    features = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    unread = unread_clips(features, shards, positions, encoder.streams)
    if len(unread) == len(positions):
        raise DataError(f"{shards.root}: not one of {len(unread)} clips could be read, first {unread[0]}")
    space = space or default_space(encoder, features)
    vectors, wanted = vectors_of(space, features, streams)
    counts = {stream: len(vectors[f"{stream}_rows"]) for stream in wanted}
    about = {
        "format": FORMAT,
        "version": VERSION,
        "affekt": __version__,
        "kind": kind,
        "streams": wanted,
        "clips": counts,
        "space": space.name,
        "unread": unread,
        "export": str(Path(export).resolve()),
        **made_of,
        "licences": sorted({str(clip["meta"].get("licence") or "") for clip in clips} - {""}),
    }
    write_folder(out, about, vectors, clips, replace(space, weights=made_of["weights"]))
    shutil.rmtree(partial, ignore_errors=True)
    return about


def check_ours(out: Path) -> None:
    """Raises SettingsError where a folder holds files beside those of an index, which is about to be replaced."""
    ours = {MANIFEST, "vectors.safetensors", "clips.jsonl", "space.safetensors", *(f"{s}.faiss" for s in STREAMS)}
    others = sorted({path.name for path in out.iterdir()} - ours)
    if others:
        raise SettingsError(f"{out}: holds other files beside the index ({', '.join(others[:3])}); move them away")


def kept(out: Path, made_of: dict[str, Any]) -> Path:
    """The folder beside `out` of the parts that are done. Parts made of something else are removed."""
    folder, text = out.with_name(f".{out.name}.partial"), json.dumps(made_of)
    try:
        same = (folder / "made_of.json").read_text(encoding="utf-8") == text
    except OSError:
        same = False
    if not same:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_text(folder / "made_of.json", text)
    return folder


def vectors_of(
    space: Space, features: Features, streams: Sequence[str] | None
) -> tuple[dict[str, np.ndarray], list[str]]:
    """What is stored: vectors and rows by stream, `audio` (n, width) and `audio_rows` (n,); and what may be found."""
    vectors, known = {}, [name.partition("_")[0] for name in features if name.endswith(space.features)]
    for stream in known:
        if not np.isfinite(features[f"{stream}_{space.features}"]).any():
            continue
        found = space.vectors(features, stream)
        vectors[f"{stream}_rows"] = np.flatnonzero(np.isfinite(found).all(1))
        vectors[stream] = found[vectors[f"{stream}_rows"]]
    if {"audio", "video"} <= vectors.keys():
        vectors["both_rows"] = np.intersect1d(vectors["audio_rows"], vectors["video_rows"])
    there = [stream for stream in STREAMS if len(vectors.get(f"{stream}_rows", ()))]
    wanted = there if streams is None else [stream for stream in STREAMS if stream in streams]
    if not wanted or set(wanted) - set(there):
        raise SettingsError(
            f"the clips have {', '.join(there) or 'no stream of this encoder'}, not {', '.join(wanted)}"
        )
    return vectors, wanted


def write_folder(
    out: Path, about: dict[str, Any], vectors: dict[str, np.ndarray], clips: list[dict[str, Any]], space: Space
) -> None:
    """Build the folder under a temporary name and rename it; `about` gets what was tuned and the checksums."""
    new = out.with_name(f".{out.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir(parents=True)
        about["tuned"] = {}
        for stream in about["streams"] if about["kind"] != "flat" else ():
            about["tuned"][stream] = write_search(about["kind"], vectors, stream, new / f"{stream}.faiss")
        with committed(new / "vectors.safetensors") as file:
            file.write(safetensors.numpy.save(vectors))
        lines = [{key: clip[key] for key in ("id", "source_sha256", "meta")} for clip in clips]
        write_text(new / "clips.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        space.save(new / "space.safetensors")
        about["files"] = {path.name: hash_file(path) for path in sorted(new.iterdir())}
        write_text(new / MANIFEST, json.dumps(about, indent=1, ensure_ascii=False) + "\n")
        if out.exists():
            shutil.rmtree(out)
        os.replace(new, out)
        flush(out.resolve().parent)
    except (OSError, RuntimeError) as error:  # faiss raises RuntimeError for a full disk
        raise DataError(f"{out}: the index cannot be written: {error}; make room, run the command again") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def write_search(kind: Kind, vectors: dict[str, np.ndarray], stream: str, path: Path) -> dict[str, float]:
    """An approximate index of one stream, tuned with clips' vectors of each stream that may ask for it."""
    rows = stored(vectors, stream)
    search = Search(rows, approximate=build(kind, rows))
    rng, asking = np.random.default_rng(0), []
    for asks in ("both",) if stream == "both" else sorted({"audio", "video"} & vectors.keys()):
        queries = stored(vectors, asks)
        asking.append(queries[np.sort(rng.permutation(len(queries))[:TUNING_QUERIES])])
    tuned = tune(kind, search, np.concatenate(asking))
    write_index(search.approximate, path)
    return tuned
