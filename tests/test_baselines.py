"""Baselines of fixed descriptors, and predictions of other models as tables."""

from importlib.metadata import PackageNotFoundError

import cv2
import numpy as np
import pytest
from sklearn.svm import LinearSVC

from affekt.data.decode import Window
from affekt.data.errors import DataError, SettingsError
from affekt.data.loader import eval_loader
from affekt.data.shard_writer import ShardWriter
from affekt.data.shards import ShardIndex
from affekt.finetune.contenders import Classic
from affekt.finetune.imported import read_table
from affekt.finetune.probes import classic
from affekt.finetune.probes.baselines import statistics
from affekt.finetune.probes.classic import LinearModel, descriptors
from affekt.finetune.probes.linear import standardise


@pytest.fixture(scope="module")
def shards(shards_of_tones):
    return shards_of_tones


def test_descriptors_are_kept_by_what_they_come_from(tmp_path, encode_clip, monkeypatch):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (2, 12, 32, 32, 3), dtype=np.uint8)
    clips = [encode_clip(f"c{i}", frames[i], 0.1 * rng.standard_normal(7680), label="a") for i in range(2)]
    writer = ShardWriter(tmp_path)
    writer.write_shard(0, clips)
    writer.finish({"size": 32, "fps": 25, "sample_rate": 16000, "picture": "mjpeg", "prepare": {}})
    index = ShardIndex.open(tmp_path)
    pixels = descriptors("pixels", index, [0, 1], tmp_path / "cache")
    table = statistics(index, [0, 1], Window(frame_stride=2), windows=3, streams="video")
    np.testing.assert_array_equal(pixels, table.take("video_statistics/grid8", np.arange(2)))
    hog = descriptors("hog", index, [0, 1], tmp_path / "cache")
    describe = cv2.HOGDescriptor((96, 96), (16, 16), (8, 8), (8, 8), 9)
    for clip, found in enumerate(hog):
        (views,) = eval_loader(index, Window(frame_stride=2), indices=[clip], windows_per_clip=3, streams="video")
        small = [cv2.resize(f, (96, 96), interpolation=cv2.INTER_AREA) for f in views.video.flatten(0, 1).numpy()]
        seen = [describe.compute(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)).ravel() for frame in small]
        np.testing.assert_allclose(found, np.mean(seen, axis=0), atol=1e-5)
    assert hog.shape == (2, 11 * 11 * 4 * 9)
    (tmp_path / "damaged").mkdir()
    for path in tmp_path.glob("*.*"):
        content = bytearray(path.read_bytes())
        if path.suffix == ".tar":
            at = content.index(b"\xff\xd8\xff")  # where the first picture begins
            content[at + 20 : at + 200] = bytes(180)
        (tmp_path / "damaged" / path.name).write_bytes(content)
    with pytest.raises(DataError, match="no hog descriptors of c0: checksum"):
        descriptors("hog", ShardIndex.open(tmp_path / "damaged"), [0, 1], tmp_path / "other")
    mel = descriptors("mel", index, [1], tmp_path / "cache")
    heard = []
    both = descriptors("mel", index, [0, 1], tmp_path / "cache", lambda *counts: heard.append(counts))
    assert heard == [(2, 2)] and np.array_equal(both[1], mel[0]) and not np.array_equal(both[0], both[1])
    monkeypatch.setattr(classic, "whole_sound", lambda *_: pytest.fail("decoded again"))
    assert np.array_equal(descriptors("mel", index, [0, 1], tmp_path / "cache"), both)
    for path in (tmp_path / "cache").glob("mel-*"):
        path.write_bytes(b"no features")
    with pytest.raises(DataError, match="no descriptors can be read"):
        descriptors("mel", index, [0], tmp_path / "cache")


def test_opensmile_is_asked_for_where_it_is_needed(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(classic, "version", missing)
    assert classic.needs("mel") == "mel 1"
    with pytest.raises(SettingsError, match="needs openSMILE, which is not installed: pip install opensmile"):
        Classic("compare", None)
    with pytest.raises(SettingsError, match="descriptors `cry`: known are mel"):
        classic.needs("cry")


def test_opensmile_gives_the_published_numbers_of_features(shards, tmp_path):
    pytest.importorskip("opensmile", reason="the extra `opensmile` is not installed")
    index = ShardIndex.open(shards)
    assert descriptors("egemaps", index, [0, 1], tmp_path).shape == (2, 88)
    assert descriptors("compare", index, [0], tmp_path).shape == (1, 6373)


def test_an_svm_is_scikit_learns_on_features_that_are_not_turned():
    rng = np.random.default_rng(0)
    train, other, truth = rng.normal(size=(30, 100)), rng.normal(size=(12, 100)), rng.integers(0, 3, 30)
    model = LinearModel((0.01, 0.1))
    for cost, said in zip(model.costs, model.path(train, truth, other, model.costs, 4)):
        rows, others = standardise([train], [other])
        plain = LinearSVC(C=cost, class_weight="balanced", random_state=0, max_iter=5000).fit(rows, truth)
        np.testing.assert_allclose(said[:, :3], plain.decision_function(others), atol=1e-3)
        assert (said[:, 3] < said[:, :3].min()).all()  # no row has this class
    [constant] = model.path(np.ones((6, 4)), np.array([0, 1] * 3), np.ones((2, 4)), [1.0])
    assert np.isfinite(constant).all()
    [alone] = model.path(train, np.zeros(30, int), other, [1.0], 2)
    assert alone.argmax(1).tolist() == [0] * 12


def test_tables_of_other_models_are_read(tmp_path):
    path = tmp_path / "theirs.csv"
    path.write_text("id,label,p_sad,p_happy,speaker\na,sad,8,2,x\nb,happy,0.5,0.5,y\n")
    table = read_table(path)
    assert table.classes == ["sad", "happy"] and table.label.tolist() == [0, 1] and table.meta["speaker"] == ["x", "y"]
    np.testing.assert_allclose(table.probabilities, [[0.8, 0.2], [0.5, 0.5]], atol=1e-12)
    path.write_text("id,value_valence,rating_valence\na,0.5,0.25\nb,1,\n")
    table = read_table(path)
    assert table.dimensions == ["valence"] and table.ratings[0, 0] == 0.25 and np.isnan(table.ratings[1, 0])
    path.write_text("id,multi_sad,multi_happy,share_sad,share_happy\na,0.5,0.9,0.2,0.8\n")
    table = read_table(path)
    assert table.kind == "multi" and table.shares.tolist() == [[0.2, 0.8]]
    np.testing.assert_allclose(table.probabilities, [[0.5, 0.9]], atol=1e-12)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,label\na,sad\n", "no column p_CLASS"),
        ("name,p_a,p_b\na,1,0\n", "header with the column `id`"),
        ("id,p_a,p_b\na,1,x\n", "line 2: p_b is 'x', expected a number"),
        ("id,p_a,p_b\na,1,0\nb,-1,2\n", "line 3: p_... are .*no probabilities"),
        ("id,p_a,p_b\na,0,0\n", "line 2: p_... are .*no probabilities"),
        ("id,p_a,p_b,label\na,1,0,c\n", "line 2: the label 'c' is none of a, b"),
        ("id,p_a,p_b\na,1,0\na,0,1\n", "predicted more than once, first a"),
        ("id,p_a,p_b\na,1\n", "line 2: not as many values"),
        ("id,logit_a,logit_b\na,1,nan\n", "line 2: logit_b is nan, no number that can be scored"),
        ("id,p_a,p_b\na,1,1e308\n", "line 2: p_b is 1e308, no number"),
        ("id,value_v,rating_v\na,1,1\nb,1,inf\n", "line 3: rating_v is inf, no number"),
        ("id,p_a,p_a\na,1,0\n", "the column p_a stands there twice"),
        ("id,p_a,label\na,1,a\n", "p_a is the only class; it takes two"),
        ("id,p_a,p_b,logit_a,logit_b\na,1,0,1,0\n", "logit_CLASS and p_CLASS; keep those of one kind"),
        ("id,multi_a,multi_b,share_a\na,1,0,1\n", "no column share_b; each class has one"),
        ("id,p_a,p_b\n,1,0\n", "line 2: no id"),
        ("", "expected a header"),
    ],
)
def test_a_table_with_a_mistake_is_refused_with_its_line(tmp_path, text, message):
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_table(tmp_path / "bad.csv")
