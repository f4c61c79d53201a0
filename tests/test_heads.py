"""Every head against its obvious version, on features that are fine and on features that are not."""

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge

from affekt.data.errors import DataError, SettingsError
from affekt.finetune.features import FeatureTable
from affekt.finetune.probes import heads as heads_module
from affekt.finetune.probes.heads import HeadName, heads_of
from affekt.finetune.probes.linear import Path, standardise
from affekt.finetune.probes.menu import best_of, fit_choice, search_stream, try_all
from affekt.finetune.probes.neighbours import knn, nearest, unit_rows
from affekt.finetune.probes.ridge import broad, ridge
from affekt.finetune.probes.settings import ProbeSettings
from affekt.finetune.probes.targets import Targets
from affekt.finetune.probes.task import Task
from affekt.finetune.probes.trained import Attention, attentive, layer_weights, token_moments

HEADS = get_args(HeadName)
CLIPS, WIDTH, STEPS = 150, 6, 5


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Small data takes few steps."""
    monkeypatch.setattr(heads_module, "STEPS", (40, 100))


def table_of(mean, tokens=None, real=None, other=None):
    """Two layers: the second is `mean` (N, D), the first `other` or noise; tokens are those of the second."""
    noise = np.random.default_rng(9).normal(size=mean.shape) if other is None else other
    blocks = {"audio_1/mean": noise.astype(np.float32), "audio_2/mean": mean.astype(np.float32)}
    if tokens is None:
        tokens = np.repeat(mean[:, None], STEPS, 1)
    blocks["audio_2/tokens"] = tokens.astype(np.float16)
    blocks["audio_2/real"] = np.ones(tokens.shape[:2], bool) if real is None else real
    has = {"audio": np.ones(len(mean), bool), "video": np.zeros(len(mean), bool), "both": np.zeros(len(mean), bool)}
    return FeatureTable([f"c{i:03d}" for i in range(len(mean))], has, blocks)


def task_of(labels, classes=3):
    places = np.arange(len(labels))
    fitting, test = places[places % 3 != 2], places[places % 3 == 2]
    groups = [str(i) for i in places]
    return Task(list("abcdef")[:classes], labels, groups, fitting, (fitting[::3],), test)


def planted(rng, clips=CLIPS, signal=3.0):
    labels = rng.integers(0, 3, clips)
    return signal * np.eye(3, WIDTH)[labels] + rng.normal(size=(clips, WIDTH)), labels


def told(table, task, name, seed=0):
    """Choose on development clips and answer for the test clips, as the probe does."""
    (head,) = heads_of([name], [0.1, 0.01])
    trials = search_stream(table, "audio", task, [head], seed)
    return best_of(trials), fit_choice(table, best_of(trials), task, head, task.test, seed)


@pytest.mark.parametrize("name", HEADS)
def test_each_head_finds_what_is_planted_and_repeats_itself(name):
    features, labels = planted(np.random.default_rng(0))
    table, task = table_of(features), task_of(labels)
    state = torch.random.get_rng_state()
    choice, (said, _) = told(table, task, name)
    assert task.score(task.test, said) > 0.85 and said.shape == (50, 3)
    again, (repeated, _) = told(table, task, name)
    assert again == choice
    np.testing.assert_array_equal(repeated, said)
    assert torch.equal(torch.random.get_rng_state(), state), "the random state of the process is its own"
    if name != "layer_weights":
        assert choice.blocks[0].startswith("audio_2/")
    garbled = replace(task, labels=np.where(np.isin(np.arange(CLIPS), task.test), 0, labels))
    np.testing.assert_array_equal(told(table, garbled, name)[1][0], said)


@pytest.mark.parametrize("name", [name for name in HEADS if name != "logistic"])
def test_each_head_but_the_logistic_tells_dimensions(name):
    rng = np.random.default_rng(1)
    features = rng.normal(size=(CLIPS, WIDTH))
    ratings = features[:, :2] * [10, 0.1] + [50, -3] + 0.2 * rng.normal(size=(CLIPS, 2)) * [10, 0.1]
    task = replace(task_of(np.zeros(CLIPS, int), 1), classes=[], dimensions=["valence", "arousal"], ratings=ratings)
    _, (said, _) = told(table_of(features), task, name)
    assert said.shape == (50, 2) and task.score(task.test, said) > 0.6
    constant = replace(task, ratings=np.full_like(ratings, 4.0))
    _, (said, _) = told(table_of(features), constant, name)
    np.testing.assert_allclose(said, 4.0, atol=1e-3)
    assert task.score_name == "ccc" and constant.score(task.test, said) == 0.0


@pytest.mark.parametrize("name", HEADS)
def test_useless_features_have_a_defined_answer(name):
    """Constant and zero features say nothing, duplicates are told alike, and a class may have one clip."""
    features, labels = planted(np.random.default_rng(2))
    task = task_of(labels)
    for value in (0.0, 3.7):
        constant = np.full_like(features, value)
        _, (said, _) = told(table_of(constant, other=constant), task, name)
        assert np.isfinite(said).all() and (said.argmax(1) == said.argmax(1)[0]).all()
        assert task.score(task.test, said) == pytest.approx(1 / 3)
    twice = np.repeat(features[: CLIPS // 2], 2, 0)
    both = task_of(np.repeat(labels[: CLIPS // 2], 2))
    _, (said, _) = told(table_of(twice, other=twice), both, name)
    pairs = [(a, b) for a, b in zip(range(49), range(1, 50)) if both.test[a] // 2 == both.test[b] // 2]
    assert np.isfinite(said).all() and all(np.allclose(said[a], said[b], atol=1e-5) for a, b in pairs)
    lonely = np.where(labels == 2, 1, labels)
    lonely[1] = 2  # one clip to fit on, none to choose on
    _, (said, _) = told(table_of(features), task_of(lonely), name)
    assert np.isfinite(said).all() and task_of(lonely).score(task.test, said) > 0.6
    length = features * (np.arange(CLIPS) % 7 > 0)[:, None]
    _, (said, _) = told(table_of(length, other=length), task, name)
    assert np.isfinite(said).all() and task.score(task.test, said) > 0.6


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused_by_every_head(name, value):
    features, labels = planted(np.random.default_rng(3))
    features[4] = value
    with pytest.raises(DataError, match=r"audio_2/\w+: 1 of \d+ clips have NaN or infinite features, first c004"):
        told(table_of(features), task_of(labels), name)


# Each against its slow twin.


def test_ridge_equals_that_of_scikit_learn():
    rng = np.random.default_rng(4)
    for wide in (5, 80):
        x, y, other = rng.normal(size=(40, wide)), rng.normal(size=(40, 3)), rng.normal(size=(9, wide))
        for penalty, said in zip((1.0, 0.01), ridge(x, Targets(y, False), other, (1.0, 0.01)), strict=True):
            np.testing.assert_allclose(said, Ridge(40 * penalty).fit(x, y).predict(other), atol=1e-8)
        targets = Targets.of_labels(np.array([0] * 30 + [1] * 8 + [2] * 2), 4)
        twin = Ridge(40 * 0.01).fit(x, targets.values, sample_weight=targets.weights)
        np.testing.assert_allclose(next(ridge(x, targets, other, (0.01,))), twin.predict(other), atol=1e-8)
    assert targets.weights.sum() == pytest.approx(40) and targets.weights[:30].sum() == pytest.approx(40 / 3)


def test_broad_learning_reads_what_no_linear_model_can():
    rng = np.random.default_rng(5)
    x = rng.uniform(-1, 1, (400, 2))
    targets = Targets.of_labels((x[:, 0] * x[:, 1] > 0).astype(int), 2)
    straight = next(ridge(x[:300], targets.take(np.arange(300)), x[300:], (1e-3,)))
    seeds = [next(broad(x[:300], targets.take(np.arange(300)), x[300:], (1e-5,), seed)) for seed in (0, 0, 1)]
    right = [(said.argmax(1) == targets.labels[300:]).mean() for said in (straight, *seeds)]
    assert right[0] < 0.7 < 0.9 < min(right[1:])
    assert (seeds[0] == seeds[1]).all() and (seeds[0] != seeds[2]).any()


def test_neighbours_equal_a_loop_with_ties_by_place_and_k_above_n():
    rng = np.random.default_rng(6)
    train = rng.integers(-1, 2, (90, 3)).astype(float)  # many duplicates, many ties, some rows without length
    other = np.concatenate([rng.normal(size=(10, 3)), np.zeros((1, 3)), train[:10]])
    ours, theirs = unit_rows(train), unit_rows(other)
    assert not ours[(train == 0).all(1)].any() and len(np.flatnonzero((train == 0).all(1)))
    for k in (1, 7, 40, 90):
        cosine, near = nearest(ours, theirs, k)
        for row in range(len(other)):
            every = [sum(float(a) * float(b) for a, b in zip(ours[i], theirs[row])) for i in range(90)]
            expected = sorted(range(90), key=lambda i: (-round(every[i], 9), i))[:k]
            assert near[row].tolist() == expected
            np.testing.assert_allclose(cosine[row], [every[i] for i in expected], atol=1e-7)
    labels = rng.integers(0, 3, 90)
    targets = Targets.of_labels(labels, 3)
    for (k, t), said in zip(((5, 0.1), (500, 1.0)), knn(train, targets, other, ((5, 0.1), (500, 1.0))), strict=True):
        cosine, near = nearest(ours, theirs, min(k, 90))
        for row in range(len(other)):
            votes = np.zeros(3)
            for c, i in zip(cosine[row], near[row]) if theirs[row].any() else zip(np.ones(90), range(90)):
                votes[labels[i]] += targets.weights[i] * np.exp(c / t)
            np.testing.assert_allclose(np.exp(said[row]), np.maximum(votes / votes.sum(), 1e-6), atol=1e-9)


def test_a_query_of_zeros_is_the_mean_over_real_tokens_and_a_learned_one_finds_the_step():
    rng = np.random.default_rng(7)
    tokens = rng.normal(2, 3, (200, STEPS, WIDTH)).astype(np.float16)
    real = np.arange(STEPS) < rng.integers(1, STEPS + 1, 200)[:, None]
    mean, scale = token_moments(tokens, real)
    flat = tokens[real].astype(float)
    np.testing.assert_allclose(mean, flat.mean(0), atol=1e-5)
    np.testing.assert_allclose(scale, 1 / flat.std(0), atol=1e-5)
    module = Attention([(mean, scale)], 3)
    said = module(torch.tensor(tokens), torch.tensor(real)).detach()
    pooled = np.stack([((t[r].astype(float) - mean) * scale).mean(0) for t, r in zip(tokens, real)])
    expected = module.head(torch.tensor(pooled, dtype=torch.float32)).detach()
    torch.testing.assert_close(said, expected, atol=1e-3, rtol=1e-3)
    # One step, marked in the last dimension, says the class; the others say another one.
    labels, place = rng.integers(0, 3, 600), rng.integers(0, STEPS, 600)
    x = 3 * np.eye(3, WIDTH)[rng.integers(0, 3, (600, STEPS))]
    x[np.arange(600), place] = 3 * np.eye(3, WIDTH)[labels] + 4 * np.eye(WIDTH)[-1]
    x, real = (x + 0.1 * rng.normal(size=x.shape)).astype(np.float16), np.ones((600, STEPS), bool)
    targets = Targets.of_labels(labels[:400], 3)
    *_, said = attentive([(x[:400], real[:400])], targets, [(x[400:], real[400:])], (50, 250), 0)
    of_mean = next(ridge(x[:400].mean(1).astype(float), targets, x[400:].mean(1).astype(float), (1e-3,)))
    right = [(answers.argmax(1) == labels[400:]).mean() for answers in (of_mean, said)]
    assert right[0] < 0.8 < 0.95 < right[1]


def test_layer_weights_find_the_layer_of_each_stream():
    rng = np.random.default_rng(8)
    labels = rng.integers(0, 4, 300)
    audio, video = rng.normal(size=(300, 4, WIDTH)), rng.normal(size=(300, 2, WIDTH))
    audio[:, 2, 0] += 4 * (labels % 2)
    video[:, 0, 0] += 4 * (labels // 2)
    train, other = [x[:200] for x in (audio, video)], [x[200:] for x in (audio, video)]
    *_, (said, weights) = layer_weights(train, Targets.of_labels(labels[:200], 4), other, (50, 250), 0)
    assert (said.argmax(1) == labels[200:]).mean() > 0.85
    assert [w.argmax() for w in weights] == [2, 0] and [w.sum() for w in weights] == pytest.approx([1, 1], abs=1e-6)


def test_logistic_answers_are_log_probabilities_also_of_an_absent_class():
    rng = np.random.default_rng(10)
    features, labels = planted(rng)
    rows, others = standardise([features[:100]], [features[100:]])
    path = Path(rows, 2 * (labels[:100] > 0))  # classes 0 and 2 of 3
    path.model.set_params(tol=1e-8)
    said = path.fit(0.01).answers(others, 3)
    twin = LogisticRegression(C=1 / (0.01 * 100), class_weight="balanced", tol=1e-8, max_iter=10000)
    twin.fit(rows, labels[:100] > 0)
    np.testing.assert_allclose(np.exp(said[:, [0, 2]]), twin.predict_proba(others), atol=1e-4)
    assert (said[:, 1] < said[:, [0, 2]].min(1)).all()


def test_heads_that_read_alike_share_the_trials_and_options_go_from_simple_to_free():
    features, labels = planted(np.random.default_rng(11))
    table, task = table_of(features), task_of(labels)
    heads = heads_of(["ridge", "knn", "logistic"], [0.01, 0.1])
    trials = try_all(table, [("audio_1/mean",), ("audio_2/mean",)], task, heads)
    assert [(t.head, t.blocks[0]) for t in trials][:4] == [
        *((name, "audio_1/mean") for name in ("ridge", "knn", "logistic")),
        ("ridge", "audio_2/mean"),
    ]
    assert heads[0].options == (0.1, 0.01) and heads[1].options[0] == (50, 0.2)
    alone = try_all(table, [("audio_2/mean",)], task, heads[:1])
    assert alone[0] == trials[3] and best_of(trials).best > 0.85


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": ["logistic", "svm"]}, "heads"),
        ({"heads": ["ridge", "ridge"]}, "each only once"),
        ({"dimensions": ["valence"]}, "logistic tells classes"),
        ({"poolings": ["mean_std"]}, "mean is always among them"),
        ({"poolings": ["mean", "median"]}, "median.*segments_1"),
        ({"depth": False, "nuisance": ["sex"]}, "depth: true"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(changes, message):
    values = {"shards": "s", "encoder": "e", "output": "o", "test": {"split": "test"}, "dev": {"split": "dev"}}
    with pytest.raises(SettingsError, match=message):
        ProbeSettings.parse(values | changes)
