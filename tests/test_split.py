"""Selecting clips by metadata, holding out whole groups, and refusing a speaker on both sides."""

import random
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from affekt.data.errors import SettingsError
from affekt.data.samples import open_samples, write_samples
from affekt.data.split import assert_disjoint, group_fraction, where


def index_of(*metas):
    row = {"shard": 0, "members": {}, "frames": 0, "samples": 0, "duration": 0.0, "flags": [], "frame_sizes": []}
    rows = [{**row, "id": f"clip{i}", "source_sha256": "", "meta": meta} for i, meta in enumerate(metas)]
    with tempfile.NamedTemporaryFile() as file:
        write_samples(file.name, {}, [rows])
        return SimpleNamespace(root="shards", samples=open_samples(Path(file.name))[1])


INDEX = index_of(
    {"speaker": "anna", "split": "train", "fold": 1},
    {"speaker": "bert", "split": "train", "fold": 2},
    {"speaker": "anna", "split": "test", "fold": 1},
    {"speaker": "cleo", "split": "dev"},
    {"split": "test"},
)


def test_where():
    assert where(INDEX, {}) == [0, 1, 2, 3, 4]
    assert where(INDEX, {"split": ["train", "dev"]}) == [0, 1, 3]
    assert where(INDEX, {"split": "test", "speaker": ["anna"]}) == [2]
    assert where(INDEX, {"fold": ["1"]}) == where(INDEX, {"fold": [1]}) == where(INDEX, {"fold": 1}) == [0, 2]
    assert where(INDEX, {"id": ["clip4", "clip1"]}) == [1, 4]
    assert where(INDEX, {"split": ["nowhere"]}) == []
    with pytest.raises(SettingsError, match="no clip has the metadata `speakr`; known here: fold, id, speaker, split"):
        where(INDEX, {"speakr": ["anna"]})


def test_disjoint():
    assert_disjoint(INDEX, [0, 1], [3], "speaker")
    assert_disjoint(INDEX, [0, 1], [2, 3], "id")
    with pytest.raises(SettingsError, match=r"1 value\(s\) of `speaker` stand on both sides: anna"):
        assert_disjoint(INDEX, [0, 1], [2, 3], "speaker")
    with pytest.raises(SettingsError, match="clip clip4 has no `speaker`"):
        assert_disjoint(INDEX, [0], [4], "speaker")
    assert_disjoint(INDEX, [0], [], "speaker")
    many = index_of(*({"speaker": f"s{i:02d}"} for i in range(14)))
    with pytest.raises(SettingsError, match=r"s00, .*s09 and 4 more"):
        assert_disjoint(many, range(14), range(14), "speaker")


def test_whole_groups_are_held_out():
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(100):
        speakers = rng.randrange(2, 20)
        index = index_of(*({"speaker": f"s{rng.randrange(speakers)}"} for _ in range(rng.randrange(40, 200))))
        fraction = rng.choice([0.1, 0.25, 0.5])
        positions = rng.sample(range(len(index.samples)), 30)
        rest, held = group_fraction(index, positions, "speaker", fraction, seed)
        assert sorted(rest + held) == sorted(positions) and rest and held
        assert_disjoint(index, rest, held, "speaker")
        sizes = [sum(index.samples[p].meta["speaker"] == f"s{s}" for p in positions) for s in range(speakers)]
        assert abs(len(held) - fraction * 30) <= max(sizes)
        assert (rest, held) == group_fraction(index, positions, "speaker", fraction, seed)
    index = index_of(*({"speaker": f"s{i}"} for i in range(40)))
    assert len({tuple(group_fraction(index, range(40), seed=s)[1]) for s in range(5)}) == 5
    assert len(group_fraction(index, range(40), "id", 0.25)[1]) == 10


def test_one_group_cannot_be_split():
    with pytest.raises(SettingsError, match=r"1 value\(s\) of `speaker` cannot be split"):
        group_fraction(INDEX, [0, 2])
