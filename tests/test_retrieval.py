"""Search equals comparing everything, ties and all; ranks equal counting over all orders; spaces hold what they say."""

import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from affekt.data.errors import SettingsError
from affekt.data.loader import eval_loader
from affekt.finetune.retrieval.features import clip_features, plain_features
from affekt.finetune.retrieval.ranks import CUTS, estimates, rank
from affekt.finetune.retrieval.recall import ALIKE, CROSS, Clips, choose, measure
from affekt.finetune.retrieval.search import Search, build, effort, read_index, recall_against, tune, write_index
from affekt.finetune.retrieval.space import Space, aligned, centred, default_space, menu, unit
from affekt.pretrain.encoder import Encoder
from affekt.pretrain.export import create_encoder, load_encoder, save_encoder, start_from
from affekt.pretrain.hicmae import HiCMAE
from affekt.pretrain.masks import Mask
from affekt.pretrain.registry import create_model, model_settings

SMALL = {"embed_dim": 24, "num_heads": 2, "depth": 2, "taps": (1, 2), "decoder_embed_dim": 16, "img_size": 32}
SMALL |= {"num_frames": 4, "mel_frames": 64}
SEEN = {"ids": ["a"], "sources": [], "speakers": ["s9"], "licences": ["CC0"], "data_sets": [], "prepare": {}}


def one_by_one(vectors, queries, k, groups=None, own=None):
    """Every score in float64, sorted by (score, position)."""
    found = []
    for q, query in enumerate(queries.astype(np.float64)):
        scores = (vectors.astype(np.float64) * query).sum(1)
        allowed = [i for i in range(len(vectors)) if own is None or own[q] < 0 or groups[i] != own[q]]
        found.append(sorted(allowed, key=lambda i: (-scores[i], i))[:k])
    return found


@pytest.mark.parametrize("kind", ["few values", "copies", "all alike", "unit"])
def test_exact_search_is_comparing_everything(kind):
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print("seed", seed)
    rng = np.random.default_rng(seed)
    vectors = rng.integers(-1, 2, (1000, 64)).astype(np.float32)  # scores are whole numbers: ties everywhere
    queries = rng.integers(-1, 2, (8, 64)).astype(np.float32)
    if kind != "few values":
        vectors = unit(rng.standard_normal((1000, 64))).astype(np.float32)
        queries = unit(rng.standard_normal((8, 64))).astype(np.float32)
    if kind == "copies":
        vectors = vectors[rng.integers(0, 9, 1000)]  # each stands there some hundred times
    if kind == "all alike":
        vectors[:] = vectors[0]
    groups = rng.integers(0, 4, 1000)
    own = rng.integers(-1, 4, len(queries))
    search = Search(vectors, groups)
    for k in (1, 10, 999, 5000):
        scores, positions = search(queries, k)
        assert positions.tolist() == one_by_one(vectors, queries, k)
        assert positions.shape == (len(queries), min(k, 1000)) and (np.diff(scores, axis=1) <= 0).all()
    for k in (10, 990):
        scores, positions = search(queries, k, own)
        for row, expected in zip(positions, one_by_one(vectors, queries, k, groups, own)):
            assert row[row >= 0].tolist() == expected
        assert (np.isinf(scores) == (positions < 0)).all()


def test_search_refuses_what_has_no_answer():
    search = Search(np.eye(3, dtype=np.float32))
    for queries, k in ((np.zeros((1, 4)), 1), (np.full((1, 3), np.nan), 1), (np.zeros((1, 3)), 0)):
        with pytest.raises(SettingsError, match="queries"):
            search(queries, k)
    with pytest.raises(SettingsError, match="finite"):
        Search(np.full((2, 2), np.inf))
    assert search(np.zeros((0, 3)), 2)[1].shape == (0, 2)
    assert Search(np.zeros((0, 3)))(np.ones((2, 3)), 5)[1].shape == (2, 0)


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_approximate_search_is_tuned_and_says_what_it_misses(kind, tmp_path):
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((60, 32))
    vectors = unit(centres[rng.integers(0, 60, 3000)] + 0.5 * rng.standard_normal((3000, 32))).astype(np.float32)
    queries = unit(vectors[::30] + 0.05 * rng.standard_normal((100, 32))).astype(np.float32)
    exact, search = Search(vectors), Search(vectors, approximate=build(kind, vectors))
    tuned = tune(kind, search, queries)
    wanted, found = exact(queries, 10)[1], search(queries, 10)[1]
    counted = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(wanted.tolist(), found.tolist())])
    assert tuned["recall"] == pytest.approx(counted) and counted >= 0.95
    assert effort(kind, search.approximate, 1) == 1
    assert kind == "hnsw" or recall_against(wanted, search(queries, 10)[1]) < counted
    effort(kind, search.approximate, tuned["effort"])
    write_index(search.approximate, tmp_path / "file")
    again = Search(vectors, approximate=read_index(tmp_path / "file"))
    effort(kind, again.approximate, tuned["effort"])
    assert (again(queries, 10)[1] == found).all()
    same = [a[np.isin(a, b)].tolist() == b[np.isin(b, a)].tolist() for a, b in zip(wanted, found)]
    assert all(same)  # what both find, they find in the same order


def over_all_orders(scores, right):
    """Mean over all orders of the ties: first rank, average precision, hits."""
    values = []
    for order in itertools.permutations(range(len(scores))):
        hits = [right[i] for i in sorted(order, key=lambda i: -scores[i])]
        first = hits.index(True) + 1
        precision = np.mean([np.mean(hits[: j + 1]) for j in range(len(hits)) if hits[j]])
        values.append([first, precision, *(first <= k for k in CUTS)])
    return np.mean(values, 0)


def test_ranks_are_the_mean_over_all_orders_of_ties():
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print("seed", seed)
    rng = np.random.default_rng(seed)
    for n in (1, 2, 3, 5, 6):
        scores = rng.integers(0, 3, (8, n)) / 3
        right, away = rng.random((8, n)) < 0.5, rng.random((8, n)) < 0.2
        found = rank(8, lambda rows: scores[rows], lambda rows: right[rows], lambda rows: away[rows])  # noqa: B023
        asked = [q for q in range(8) if (right[q] & ~away[q]).any()]
        assert found.queries.tolist() == asked
        for at, q in enumerate(asked):
            got = [found.first[at], found.precision[at], *(found.hits[k][at] for k in CUTS)]
            np.testing.assert_allclose(got, over_all_orders(scores[q][~away[q]], right[q][~away[q]]), atol=1e-12)


def test_ranks_without_ties_are_those_of_scikit_learn():
    rng = np.random.default_rng(1)
    scores, right = rng.standard_normal((30, 200)), rng.random((30, 200)) < 0.1
    found = rank(30, lambda rows: scores[rows], lambda rows: right[rows])
    for q in range(30):
        assert found.precision[q] == pytest.approx(average_precision_score(right[q], scores[q]), abs=1e-12)
        assert found.first[q] == 1 + (scores[q] > scores[q][right[q]].max()).sum()


def test_scores_that_are_all_the_same_are_worth_what_chance_is():
    found = rank(40, lambda rows: np.ones((rows.stop - rows.start, 40)), lambda rows: np.eye(40, dtype=bool)[rows])
    scores = found.scores()
    assert [scores[f"recall_{k}"] for k in CUTS] == pytest.approx([k / 40 for k in CUTS])
    assert scores["median_rank"] == 20.5
    assert scores["map"] == pytest.approx(np.mean([1 / rank for rank in range(1, 41)]))


def test_intervals_resample_queries_by_their_groups():
    rng = np.random.default_rng(2)
    scores = rng.standard_normal((90, 90)) + 2.2 * np.eye(90)
    found = rank(90, lambda rows: scores[rows], lambda rows: np.eye(90, dtype=bool)[rows])
    groups = [f"s{q % 15}" for q in range(90)]
    drawn = estimates(found, groups, 400, 0)
    member = np.array([q % 15 for q in range(90)])
    medians, recalls = [], []
    for _ in range(400):
        rows = np.concatenate([np.flatnonzero(member == s) for s in rng.integers(0, 15, 15)])
        medians.append(np.median(found.first[rows]))
        recalls.append(found.hits[1][rows].mean())
    for name, slow, room in (("median_rank", medians, 1.0), ("recall_1", recalls, 0.03)):
        low, high = np.quantile(slow, [0.025, 0.975])
        assert abs(drawn[name].low - low) <= room and abs(drawn[name].high - high) <= room, name
        assert drawn[name].low <= drawn[name].value <= drawn[name].high
    assert drawn["map"].clusters == 15 and drawn["map"].unit == "speakers"
    assert estimates(found, [str(q) for q in range(90)], 100, 0, "id")["map"].unit == "clips"


def planted(n=60, noise=0.3, seed=0):
    """Clips whose streams share what they hold behind two different maps, so that no cosine across them means much."""
    rng = np.random.default_rng(seed)
    maps = np.random.default_rng(99).standard_normal((2, 8, 2 * 12))  # of all clips alike
    hidden = rng.standard_normal((n, 8))
    features = {}
    for stream, mapped in zip(("video", "audio"), maps):
        x = hidden @ mapped + noise * rng.standard_normal((n, 24)) + 5
        features[f"{stream}_taps"] = x.reshape(n, 2, 12).astype(np.float32)
    return features


def clips_of(n, labels=None, speakers=None, sources=None):
    none = np.full(n, -1)
    return Clips(
        [str(i) for i in range(n)],
        none if labels is None else np.array(labels),
        none if speakers is None else np.array(speakers),
        np.arange(n) if sources is None else np.array(sources),
    )


def test_an_inner_product_is_the_mean_cosine_over_taps():
    features = planted(5)
    for space in (Space("taps", (0, 1)), Space("taps", (1,)), centred(Space("taps", (0, 1)), planted(9, seed=3))):
        video, audio = (space.vectors(features, stream) for stream in ("video", "audio"))
        means = {s: space.means.get(s, np.zeros((len(space.taps), 12))) for s in ("video", "audio")}
        for i, j in itertools.product(range(5), range(5)):
            cosines = []
            for place, tap in enumerate(space.taps):
                a = features["video_taps"][i, tap] - means["video"][place]
                b = features["audio_taps"][j, tap] - means["audio"][place]
                cosines.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
            assert video[i] @ audio[j] == pytest.approx(np.mean(cosines), abs=1e-5)
        both = space.vectors(features, "both")
        assert both[0] @ both[1] == pytest.approx((video[0] @ video[1] + audio[0] @ audio[1]) / 2, abs=1e-5)


def test_alignment_finds_across_streams_what_cosines_do_not(tmp_path):
    fit, base = planted(300, seed=1), planted(60, seed=2)
    plain = centred(Space("taps", (0, 1)), fit)
    space = aligned(plain, fit, [0.01])[0]
    assert measure(CROSS[0], plain, base, clips_of(60)).ranks.scores()["recall_1"] < 0.2
    for task in CROSS:
        assert measure(task, space, base, clips_of(60)).ranks.scores()["recall_1"] > 0.8
    shuffled = fit | {"audio_taps": fit["audio_taps"][np.random.default_rng(0).permutation(300)]}
    nothing = measure(CROSS[0], aligned(plain, shuffled, [0.01])[0], base, clips_of(60)).ranks.scores()
    assert nothing["recall_1"] < 0.15
    space.save(tmp_path / "space.safetensors")
    again = Space.load(tmp_path / "space.safetensors")
    assert (again.vectors(base, "audio") == space.vectors(base, "audio")).all() and again.name == space.name
    best = choose([Space("taps", (0, 1)), plain, space], list(CROSS), planted(40, seed=5), clips_of(40), "source")
    assert best == {"across streams": space}


def test_what_is_left_out_of_a_list_and_what_counts_as_right():
    x = np.eye(6, dtype=np.float32)[[0, 0, 1, 1, 2, 0]][:, None]
    features = {"video_taps": x, "audio_taps": x.copy()}
    features["audio_taps"][4] = np.nan  # a clip without sound neither asks by it nor is found by it
    space = Space("taps", (0,))
    cross = measure(CROSS[1], space, features, clips_of(6, sources=[0, 0, 2, 3, 4, 5]))
    assert cross.items == 5 and cross.ranks.queries.tolist() == [0, 1, 2, 3, 5]
    # 0 and 1 are of one file: 1 is left out of the list of 0, whose sound ties with that of 5 alone
    assert cross.ranks.first.tolist() == [1.5, 1.5, 1.5, 1.5, 2.0]
    clips = clips_of(6, labels=[0, 0, 0, 1, 1, 0], speakers=[7, 7, 8, 8, 8, -1], sources=[0, 1, 2, 3, 4, 5])
    by_source = measure(ALIKE[1], space, features, clips, "source").ranks
    assert by_source.queries.tolist() == [0, 1, 2, 3, 4, 5]
    assert by_source.first[0] == 1 and by_source.first[3] > 1  # itself is never among the answers
    by_speaker = measure(ALIKE[1], space, features, clips, "speaker").ranks
    assert by_speaker.queries.tolist() == [0, 1, 2, 5]  # 3 and 4 have none of their label but their own speaker's
    with pytest.raises(SettingsError, match="speakers apart"):
        measure(ALIKE[1], space, features, clips_of(6, [0] * 6, [1] * 6), "speaker")


def encoder_of(**changes) -> Encoder:
    torch.manual_seed(0)
    return create_encoder(model_settings("hicmae_nano", **SMALL, **changes), 4, {})


@pytest.mark.parametrize("projector", [0, 10])
def test_features_are_what_the_contrast_compares(projector, tiny_shards):
    torch.manual_seed(0)
    model = HiCMAE(model_settings("hicmae_nano", **SMALL, projector_dim=projector)).eval()
    encoder = encoder_of(projector_dim=projector)
    encoder.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("decoder_")})
    index = tiny_shards(3, "mixed", size=32)
    batch = next(iter(eval_loader(index, encoder.window, batch_size=3)))
    found = encoder.contrast_features(batch)
    inputs = encoder.preprocess(batch)
    tokens = encoder.layers(inputs)
    valid = encoder.valid_audio_tokens(inputs)
    with torch.inference_mode():
        taps = {stream: [tokens[f"{stream}_{tap}"] for tap in (1, 2)] for stream in ("video", "audio")}
        expected = model.features(taps, Mask(None, None), Mask(None, None, valid))
    kind = "heads" if projector else "taps"
    for place, (stream, has) in enumerate((("video", inputs.has_video), ("audio", inputs.has_audio))):
        torch.testing.assert_close(found[f"{stream}_{kind}"][has], expected[has, place])
        assert found[f"{stream}_taps"].shape == (3, 2, 24) and found[f"{stream}_taps"][~has].isnan().all()
    steps = encoder.contrast_features(batch, segments=4)["audio_steps"]
    runs = encoder.grid_audio[0] // 4 * encoder.grid_audio[1]
    mean = tokens["audio_2"][:, runs : 2 * runs].mean(1)  # the second quarter, of full windows
    torch.testing.assert_close(steps[inputs.has_audio, 4 + 1], mean[inputs.has_audio])
    features = clip_features(encoder, index, [0, 1, 2], windows=1)
    np.testing.assert_allclose(features[f"audio_{kind}"], found[f"audio_{kind}"], atol=1e-5)
    assert default_space(encoder, features).name == f"{kind} 1+2"
    assert len(list(menu(encoder, None, 2))) == (9 if projector else 6)


def test_plain_features_are_means_over_parts_of_the_window(tiny_shards):
    encoder, index = encoder_of(), tiny_shards(3, "mixed", size=32)
    features = plain_features(encoder, index, [0, 1, 2], windows=1, segments=2)
    assert features["audio_steps"].shape == (3, 2, 64) and features["video_steps"].shape == (3, 2, 512)
    assert np.isnan(features["audio_steps"][1]).all() and np.isnan(features["video_steps"][2]).all()
    batch = next(iter(eval_loader(index, encoder.window, batch_size=1)))
    grey = batch.video[0].double().mean(-1).reshape(4, 16, 2, 16, 2).mean((2, 4)).flatten(1) / 255
    np.testing.assert_allclose(features["video_steps"][0, 1, :256], grey[2:].mean(0), atol=1e-5)
    change = (grey[1:] - grey[:-1]).abs()
    np.testing.assert_allclose(features["video_steps"][0, 1, 256:], change[1:].mean(0), atol=1e-5)
    np.testing.assert_allclose(features["video_steps"][0, 0, 256:], change[0] / 2, atol=1e-5)


def test_exports_carry_the_projection_heads(tmp_path, capsys):
    encoder = encoder_of(projector_dim=10)
    save_encoder(encoder, tmp_path / "export", {"run": "test", "step": 1}, SEEN)
    loaded = load_encoder(tmp_path / "export")
    assert loaded.has_projectors
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    other = create_model("hicmae_nano", **SMALL, projector_dim=6)  # heads of another width begin anew
    start_from(other, tmp_path / "export")
    assert "are new: decoder_audio, decoder_video, projector_audio, projector_video" in capsys.readouterr().err
    same = create_model("hicmae_nano", **SMALL, projector_dim=10)
    start_from(same, tmp_path / "export")
    assert torch.equal(same.projector_video[0].fc1.weight, encoder.projector_video[0].fc1.weight)
    encoder.drop_projectors()  # as exports were before 1.1
    save_encoder(encoder, tmp_path / "old", {"run": "test", "step": 1}, SEEN)
    assert not load_encoder(tmp_path / "old").has_projectors
    assert math.isfinite(sum(p.sum().item() for p in load_encoder(tmp_path / "old").parameters()))
