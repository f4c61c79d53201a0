"""Several corpora in one run: exact shares, every clip of a corpus as often as any other, and nothing that depends on
who reads it."""

import random
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
import yaml

from affekt.data.decode import Window
from affekt.data.errors import DataError, SettingsError
from affekt.data.loader import train_loader
from affekt.data.mixture import Corpus, changed_corpora, check_together, fingerprints
from affekt.data.order import Plan, Source, interleaved, shares
from affekt.data.shard_writer import ShardWriter
from affekt.data.shards import ShardIndex
from affekt.pretrain.mixture import notes, open_corpora
from affekt.pretrain.objectives import contrastive_loss
from affekt.pretrain.seen import seen_data
from affekt.pretrain.settings import PretrainSettings

WINDOW = Window(num_frames=4, frame_stride=6, mel_frames=64)


def picks(plan, steps):
    for step in steps:
        epoch, slots = plan.slots(step)
        yield [next(plan.candidates(epoch, slot)) for slot in slots]


def random_plan(rng: random.Random, weighted: bool) -> Plan:
    sources = [
        Source(
            np.sort([rng.randrange(5) for _ in range(size)]),
            range(size),
            rng.choice([0.1, 0.25, 0.7, 1.0, 3]) if weighted else None,
            f"corpus{number}",
        )
        for number, size in enumerate(rng.choices([17, 40, 90], k=rng.randrange(2, 5)))
    ]
    return Plan(sources, rng.choice([1, 4, 12]), rng.randrange(9), rng.choice([None, 60, 250]))


@pytest.mark.parametrize("weighted", [True, False])
def test_shares_are_exact_and_no_clip_is_favoured(weighted):
    """Of every epoch, of every beginning of an epoch, of every corpus, after every step of a run."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(15):
        plan = random_plan(rng, weighted)
        counts = [np.zeros(len(source.positions), int) for source in plan.sources]
        for epoch in range(4):
            met = np.zeros(len(plan.sources), int)
            steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
            for done, batch in enumerate(picks(plan, steps), 1):
                for pick in batch:
                    assert counts[pick.corpus][pick.position] == pick.turn  # met once in each turn before
                    counts[pick.corpus][pick.position] += 1
                    met[pick.corpus] += 1
                exact = np.array(plan.shares) * done / plan.steps_per_epoch
                assert (abs(met - exact) <= 1 + len(met) * np.array(plan.shares) / plan.epoch_clips).all()
                assert all(np.ptp(count) <= 1 for count in counts)
            assert met.tolist() == plan.shares and sum(met) == plan.epoch_clips


def test_shares_are_the_nearest_whole_numbers():
    assert shares([0.7, 0.3], 10) == [7, 3] and shares([0.1, 0.2, 0.7], 1000) == [100, 200, 700]
    assert shares([1, 1, 1], 100) == [34, 33, 33] and shares([2, 1], 0) == [0, 0]
    rng = random.Random(0)
    for _ in range(200):
        weights, total = [rng.choice([0.1, 0.3, 1, 7]) for _ in range(rng.randrange(1, 6))], rng.randrange(500)
        quotas = [Fraction(w) * total / sum(map(Fraction, weights)) for w in weights]
        found = shares(weights, total)
        assert sum(found) == total and all(abs(n - q) < 1 for n, q in zip(found, quotas))


def test_corpora_are_spread_evenly():
    assert interleaved([3, 3]).tolist() == [0, 1, 0, 1, 0, 1]
    assert interleaved([4, 2]).tolist() == [0, 1, 0, 0, 1, 0]
    assert np.bincount(interleaved([70, 0, 30])).tolist() == [70, 0, 30]


def test_corpora_of_one_shape_have_orders_of_their_own():
    shards = np.repeat(np.arange(4), 10)
    plan = Plan([Source(shards, range(40), name=name) for name in "ab"], 8, 0)
    taken = [[pick.position for batch in picks(plan, range(5)) for pick in batch if pick.corpus == c] for c in (0, 1)]
    assert len(taken[0]) == len(taken[1]) == 20 and sum(a == b for a, b in zip(*taken)) < 8


def test_a_short_epoch_goes_on_where_the_last_one_ended():
    """Ten clips in epochs of four: all are met before one comes again."""
    plan = Plan([Source(np.zeros(10, int), range(10))], 2, 0, epoch_clips=5)
    assert (plan.steps_per_epoch, plan.epoch_clips, plan.dropped_per_epoch) == (2, 4, 0)
    order = [pick.position for batch in picks(plan, range(10)) for pick in batch]
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10)) and order[:10] != order[10:]
    whole = Plan([Source(np.zeros(10, int), range(10))], 2, 0)
    assert order[:10] == [pick.position for batch in picks(whole, range(5)) for pick in batch]


def test_what_stands_in_for_a_clip_is_of_its_corpus():
    plan = Plan([Source(np.zeros(40, int), range(40), 1, "a"), Source(np.zeros(3, int), range(3), 1, "b")], 6, 0)
    for slot in range(plan.epoch_clips):
        first, *others = plan.candidates(1, slot)
        positions = [other.position for other in others]
        assert {other.corpus for other in others} <= {first.corpus}
        assert first.position not in positions and len(set(positions)) == len(positions)
        assert first.corpus == 0 or len(others) == 2


def test_mixtures_that_cannot_be():
    a, b = (Source(np.zeros(9, int), range(9), weight, name) for weight, name in ((1.0, "a"), (None, "b")))
    with pytest.raises(SettingsError, match="state all or none"):
        Plan([a, b], 4, 0)
    rare = Source(np.zeros(9, int), range(9), 1e-9, "rare")
    with pytest.raises(SettingsError, match="rare: 9 clips and weight 1e-09 give it none of the 16 clips"):
        Plan([a, rare], 4, 0)


@pytest.fixture(scope="module")
def corpora(tiny_shards):
    """Two corpora of other sizes whose clips have the same ids, and one of sound alone."""
    a = tiny_shards(9, seconds=1.4, size=32, shards=3)
    b = tiny_shards(22, streams="mixed", seconds=1.4, size=32, shards=4, speakers=3)
    c = tiny_shards(5, streams="audio", seconds=1.4, size=64)
    return [Corpus(x, range(len(x.samples)), w, n) for x, w, n in ((a, 0.5, "a"), (b, 0.3, "b"), (c, 0.2, "c"))]


def load(corpora, **changes):
    arguments = {"global_batch": 8, "total_steps": 12, "seed": 5, "epoch_clips": 40}
    return train_loader(corpora, WINDOW, **(arguments | changes))


def as_rows(batches):
    """step -> name, key, crop, sound and picture of every row."""
    return [
        [
            (name, int(b.clip[i]), int(b.keys[i]), b.crop[i].tolist(), b.audio[i].numpy().tobytes(), b.video[i].sum())
            for i, name in enumerate(b.ids)
        ]
        for b in batches
    ]


def test_a_mixture_is_the_same_for_any_world_workers_and_start(corpora):
    straight = as_rows(load(corpora))
    for world, workers, start in ((2, 0, 0), (4, 2, 5), (8, 0, 11), (1, 3, 7)):
        ranks = [
            as_rows(load(corpora, rank=rank, world_size=world, workers=workers if rank == 0 else 0, start_step=start))
            for rank in range(world)
        ]
        assert [[row for rank in rows for row in rank] for rows in zip(*ranks, strict=True)] == straight[start:]
    assert as_rows(load(corpora, seed=6)) != straight


def test_clips_of_the_same_id_are_told_apart(corpora):
    straight = as_rows(load(corpora))
    epoch = [row for rows in straight[:5] for row in rows]
    assert Counter(row[0][0] for row in epoch) == {"a": 20, "b": 12, "c": 8}
    names = {row[0]: row[1] for rows in straight for row in rows}
    assert len(set(names.values())) == len(names) > 22
    views = Counter((row[0], row[2]) for rows in straight for row in rows)
    assert max(views.values()) == 1  # met again, a clip has another key
    same = {name.partition("/")[2]: key for name, key in views if name[0] == "a"}
    assert not any(same.get(name.partition("/")[2]) == key for name, key in views if name[0] == "b")


def test_a_corpus_alone_is_as_without_a_mixture(corpora):
    alone = Corpus(corpora[0].index, corpora[0].positions)
    whole = {"epoch_clips": None, "global_batch": 4}
    assert as_rows(load([alone], **whole)) == as_rows(load(corpora[0].index, **whole))


def test_repeats_are_views_of_one_decoded_clip(corpora):
    once = list(load(corpora, global_batch=4, epoch_clips=None))
    for one, two in zip(once, load(corpora, global_batch=12, epoch_clips=None, repeats=3), strict=True):
        assert two.ids == [name for name in one.ids for _ in range(3)] and two.repeats == 3
        assert two.clip.tolist() == one.clip.repeat_interleave(3).tolist()
        for name in ("keys", "crop", "gain", "audio", "video", "has_audio", "has_video"):
            assert torch.equal(getattr(two, name)[::3], getattr(one, name))  # the first view is that of one view alone
        assert torch.equal(two.video[::3], two.video[1::3])
        assert len(set(two.keys.tolist())) == 12
        assert torch.equal(two.audio[::3], two.audio[1::3]) and len(set(two.gain.tolist())) == 12
    with pytest.raises(SettingsError, match="3 views of each clip do not go evenly into the 4 rows that each of 2"):
        load(corpora, world_size=2, repeats=3)


def test_the_contrast_never_pushes_views_of_a_clip_apart():
    seed = torch.seed()
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed % 2**31)
    video, audio = (torch.randn(6, 5, dtype=torch.float64, generator=generator) for _ in range(2))
    paired, clip = torch.tensor([True, True, True, True, False, True]), torch.tensor([4, 4, 7, 1, 4, 7])
    video.requires_grad_()
    v, a = (torch.nn.functional.normalize(x, dim=-1) for x in (video, audio))
    slow = 0
    for i in range(6):
        others = [j for j in range(6) if j == i or (paired[j] and clip[j] != clip[i])]
        for rows, columns in ((v, a), (a, v)):
            logits = torch.stack([rows[i] @ columns[j] / 0.07 for j in others])
            slow = slow + paired[i] * (logits.logsumexp(0) - logits[others.index(i)]) / 10
    loss = contrastive_loss(video, audio, paired, 0.07, same=[clip])
    torch.testing.assert_close(loss, slow)
    for one, two in zip(*(torch.autograd.grad(x, video, retain_graph=True) for x in (loss, slow)), strict=True):
        torch.testing.assert_close(one, two)
    distinct = contrastive_loss(video, audio, paired, 0.07, same=[torch.arange(6)])
    assert torch.equal(distinct, contrastive_loss(video, audio, paired, 0.07)) and not torch.equal(distinct, loss)


def prepared(folder, encode_clip, names, source="", size=32, **meta):
    tone = np.sin(np.arange(24000) * 0.1)
    clips = [encode_clip(name, np.full((20, size, size, 3), 99, np.uint8), tone, **meta) for name in names]
    for record, _ in clips:
        record["source_sha256"] = source or str(folder) + record["id"]
    writer = ShardWriter(folder)
    writer.write_shard(0, clips)
    prepare = {"size": size, "face": meta.pop("face", "haar")}
    return writer.finish({"size": size, "fps": 25, "sample_rate": 16000, "picture": "mjpeg", "prepare": prepare})


def settings_of(*parts, **data):
    data = {"mixture": list(parts), **data}
    return PretrainSettings.parse({"out": "run", "model": {"name": "hicmae_nano"}, "data": data, "train": {"steps": 1}})


def test_settings_of_a_mixture(tmp_path, encode_clip):
    for name, speaker in (("a", "s1"), ("b", "s2")):
        prepared(tmp_path / name, encode_clip, ["x", "y"], speaker=speaker, split="train", licence=f"licence {name}")
    parts = [{"shards": str(tmp_path / "b"), "weight": 3}, {"shards": str(tmp_path / "a"), "weight": 1}]
    settings = settings_of(*parts, include={"split": ["train"]}, group=None)
    assert [(part.name, part.include, part.group) for part in settings.data.mixture] == [
        ("b", {"split": ["train"]}, None),
        ("a", {"split": ["train"]}, None),
    ]
    assert PretrainSettings.parse(yaml.safe_load(settings.to_yaml())) == settings
    corpora = open_corpora(settings)
    assert [corpus.name for corpus in corpora] == ["a", "b"]  # their order in the file decides nothing
    seen = seen_data(corpora)
    assert seen["ids"] == ["x", "x", "y", "y"] and seen["speakers"] == ["s1", "s2"] and len(seen["sources"]) == 4
    assert seen["licences"] == ["licence a", "licence b"] and seen["prepare"] == {"size": 32, "face": "haar"}
    assert seen["fingerprint"] == {corpus.name: corpus.index.fingerprint for corpus in corpora}
    said = notes(corpora, Window(), [1, 3])
    assert said[0] == "an epoch of 4 clips: a 25.0% (1 of 2 clips), b 75.0% (3 of 2 clips)"
    assert said[1].startswith("100% of the clips are shorter than the window of 2.58 s (pictures 2.44 s, sound 2.58 s)")
    assert len(notes(corpora, WINDOW, [1, 3])) == len(notes(corpora, WINDOW, [1, 3], by_speaker=True)) == 1


def test_what_a_resume_may_change_of_a_mixture(tmp_path):
    old = settings_of({"shards": "x/a", "weight": 1}, {"shards": "x/b", "weight": 2})
    moved = settings_of({"shards": "y/b", "weight": 2}, {"shards": "y/a", "weight": 1}, skip_budget=0.5)
    assert moved.changes_from(old) == {}
    other = settings_of({"shards": "x/a", "weight": 1}, {"shards": "x/b", "weight": 3}, repeats=2)
    assert other.changes_from(old) == {"data.mixture.b.weight": (2.0, 3.0), "data.repeats": (1, 2)}
    other.check_keys(("data.mixture", "data.mixture.b.weight"))
    with pytest.raises(SettingsError, match="not a setting"):
        other.check_keys(("data.mixture.c.weight",))


def test_changed_data_are_told_by_corpus(corpora):
    a, b, c = corpora
    before = fingerprints([a, b])
    roots = [str(corpus.index.root) for corpus in corpora]
    assert changed_corpora(before, [a, b]) == []
    assert changed_corpora(before, [a, Corpus(c.index, [0], name="b")]) == [roots[2]]  # edited
    assert changed_corpora(before, [a, b, c]) == [roots[2]]  # added
    assert changed_corpora(before, [a]) == [roots[0]] and changed_corpora(fingerprints([a]), [a]) == []  # removed
    assert changed_corpora({**before, "c": "0"}, [a, b]) == ["c (left out)"]


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({}, "set one of data.shards and data.mixture"),
        ({"shards": "a", "mixture": [{"shards": "b"}]}, "set one of data.shards and data.mixture"),
        ({"mixture": [{"shards": "x/a"}, {"shards": "y/a/"}]}, r"need different names; they are \['a', 'a'\]"),
        ({"mixture": [{"shards": "a", "weight": 1}, {"shards": "b"}]}, "state all or none"),
        ({"mixture": [{"shards": "a", "weight": -1}]}, "greater than 0"),
        ({"mixture": [{"shards": "a", "wieght": 1}]}, r"mixture.0.wieght`; did you mean `weight`"),
        ({"mixture": [{"weight": 1}]}, r"data.mixture.0.shards"),
        ({"mixture": ["a", "b"]}, r"data.mixture.0"),
        ({"mixture": "a"}, r"data.mixture"),
        ({"shards": "a", "skip_budget": 2}, "data.skip_budget"),
        ({"mixture": [{"shards": "a", "weight": 1}]}, "one corpus has no use for a weight"),
        (
            {"include": {"split": ["x"]}, "mixture": [{"shards": "a", "include": {"split": ["train"]}}]},
            "data.include has no effect",
        ),
        ({"shards": "a", "repeats": 100}, "leaves one clip in a batch of 160"),
    ],
)
def test_settings_that_cannot_be(data, told):
    with pytest.raises(SettingsError, match=told):
        PretrainSettings.parse({"out": "run", "model": {"name": "hicmae_nano"}, "data": data, "train": {"steps": 1}})


def test_the_same_shards_twice_are_refused(corpora):
    a = corpora[0]
    with pytest.raises(SettingsError, match="are the same shards"):
        check_together([a, Corpus(a.index, [0], name="again")])


def test_a_file_held_out_of_one_corpus_is_not_learned_from_in_another(tmp_path, encode_clip):
    prepared(tmp_path / "a", encode_clip, ["x"], speaker="s1", split="test", source="f" * 64)
    prepared(tmp_path / "b", encode_clip, ["y"], speaker="s1", split="train", source="f" * 64)
    prepared(tmp_path / "d", encode_clip, ["z"], speaker="s1", split="train")
    a = {"shards": str(tmp_path / "a"), "include": {"id": ["w"]}, "held_out": {"split": ["test"]}}
    b, d = {"shards": str(tmp_path / "b")}, {"shards": str(tmp_path / "d")}
    with pytest.raises(DataError, match="no clip with both"):
        open_corpora(settings_of(a, b))
    writer = ShardWriter(tmp_path / "c")
    picture, tone = np.zeros((9, 32, 32, 3), np.uint8), np.zeros(9000)
    w, x = encode_clip("w", picture, tone, split="train", speaker="s0"), encode_clip("x", picture, tone, split="test")
    x[0]["source_sha256"], x[0]["meta"]["speaker"] = "f" * 64, "s1"
    writer.write_shard(0, [w, x])
    prepare = {"size": 32, "face": "haar"}
    writer.finish({"size": 32, "fps": 25, "sample_rate": 16000, "picture": "mjpeg", "prepare": prepare})
    c = {"shards": str(tmp_path / "c"), "include": {"split": ["train"]}, "held_out": {"split": ["test"]}}
    with pytest.raises(SettingsError, match=r"clips y and x of .*/c stand on two sides"):
        open_corpora(settings_of(c, b))
    assert len(open_corpora(settings_of(c, d))) == 2  # speaker s1 of another corpus is somebody else


def test_corpora_prepared_otherwise_are_refused(tmp_path, encode_clip):
    prepared(tmp_path / "a", encode_clip, ["x"])
    prepared(tmp_path / "b", encode_clip, ["x"], size=64)
    with pytest.raises(SettingsError, match=r"/b: prepared with size 64, not 32 as .*/a; prepare the corpora"):
        open_corpora(settings_of({"shards": str(tmp_path / "a")}, {"shards": str(tmp_path / "b")}))
    indices = [ShardIndex.open(tmp_path / name) for name in "aa"]
    with pytest.raises(SettingsError, match="need a name each"):
        load([Corpus(index, [0]) for index in indices], global_batch=1)


def test_strata_are_met_equally_often_whoever_reads_them(tiny_shards):
    """Ten clips of one class, three of another, one of a third: each class is a third of every epoch; its clips come in
    turn, and each time with draws of their own."""
    index = tiny_shards(14, streams="audio", seconds=1.4, size=16, shards=3)
    strata = [range(10), range(10, 13), range(13, 14), []]
    corpus = Corpus(index, range(14), strata=strata)
    arguments = {"global_batch": 6, "total_steps": 10, "seed": 3}
    steps = list(train_loader([corpus], WINDOW, **arguments))
    ids = [[int(clip[4:]) for clip in batch.ids] for batch in steps]
    for step in ids:
        assert np.bincount(np.digitize(step, (10, 13)), minlength=3).tolist() == [2, 2, 2]
    flat = [clip for step in ids for clip in step]
    first = [clip for clip in flat if clip < 10]
    assert sorted(first[:10]) == sorted(first[10:20]) == list(range(10)) and first[:10] != first[10:20]
    keys = [key for batch in steps for clip, key in zip(batch.ids, batch.keys.tolist()) if clip == "clip0013"]
    assert len(keys) == 20 == len(set(keys))
    assert train_loader([corpus], WINDOW, **arguments).shares == [12]  # of an epoch: 14 clips, cut to whole batches
    ranks = [list(train_loader([corpus], WINDOW, rank=r, world_size=2, start_step=4, **arguments)) for r in (0, 1)]
    assert [a.ids + b.ids for a, b in zip(*ranks)] == [batch.ids for batch in steps[4:]]


def test_strata_share_the_weight_of_their_corpus(tiny_shards):
    one, two = (tiny_shards(12, streams="audio", seconds=1.4 + i, size=16, shards=1) for i in (0, 1))
    halves = [range(9), range(9, 12)]
    for weights, expected in (((None, None), [12, 12]), ((1, 3), [6, 18])):
        corpora = [Corpus(one, range(12), weights[0], "one", halves), Corpus(two, range(12), weights[1], "two")]
        loader = train_loader(corpora, WINDOW, global_batch=24, total_steps=1)
        assert loader.shares == expected
        ids = next(iter(loader)).ids
        assert Counter(name.partition("/")[0] for name in ids) == {"one": expected[0], "two": expected[1]}
        of_one = [int(name[8:]) for name in ids if name.startswith("one/")]
        assert sum(clip >= 9 for clip in of_one) == expected[0] // 2
