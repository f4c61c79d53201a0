"""Fits and choices of the probe on made-up features: exact, defined for odd ones, blind to test labels."""

import json
import os
import random
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from affekt.finetune.features import FeatureTable
from affekt.finetune.probes.heads import heads_of
from affekt.finetune.probes.linear import Path, rotate, standardise
from affekt.finetune.probes.menu import best_of, fit_choice, search_both, search_stream
from affekt.finetune.probes.results import at_the_end, write_json
from affekt.finetune.probes.task import Task

# The fit.


def made_up(rng, clips=60, dims=400, classes=3, signal=1.0):
    labels = rng.integers(0, classes, clips)
    return (rng.normal(size=(clips, dims)) + signal * rng.normal(size=(classes, dims))[labels]), labels


def test_fit_in_the_span_of_the_rows_equals_the_direct_fit():
    rng = np.random.default_rng(0)
    wide, labels = made_up(rng)
    narrow = rng.normal(size=(60, 5)) * 100 + 7
    train, test = standardise([wide[:40], narrow[:40]], [wide[40:], narrow[40:]])
    z_train, z_test = rotate(train, test)
    assert z_train.shape[1] <= 40 < train.shape[1]
    np.testing.assert_allclose(z_train @ z_train.T, train @ train.T, atol=1e-8)
    np.testing.assert_allclose(z_test @ z_train.T, test @ train.T, atol=1e-8)
    path = Path(z_train, labels[:40])
    path.model.set_params(tol=1e-8)
    for penalty in (0.1, 0.01, 0.001):
        direct = LogisticRegression(C=1 / (penalty * 40), class_weight="balanced", tol=1e-8, max_iter=10000)
        direct.fit(train, labels[:40])
        path.fit(penalty)
        np.testing.assert_allclose(path.model.predict_proba(z_test), direct.predict_proba(test), atol=1e-4)
        assert (path.answers(z_test, 3).argmax(1) == direct.predict(test)).all()


def test_standardising_uses_training_rows_alone_and_gives_blocks_equal_weight():
    rng = np.random.default_rng(1)
    train, other = rng.normal(3, 5, (30, 200)), rng.normal(100, 1, (10, 200))
    rows, others = standardise([train, train[:, :4] * 9], [other, other[:, :4] * 9])
    expected = (other - train.mean(0)) / train.std(0) / np.sqrt(200 * 2)
    np.testing.assert_allclose(others[:, :200], expected)
    assert np.square(rows[:, :200]).sum() == pytest.approx(np.square(rows[:, 200:]).sum()) == pytest.approx(15)


@pytest.mark.parametrize("dims", [1, 100])
def test_constant_and_duplicate_features_have_a_defined_answer(dims):
    labels = np.arange(12) % 3
    train, test = rotate(*standardise([np.full((12, dims), 3.7, np.float32)], [np.full((4, dims), 3.7, np.float32)]))
    assert Path(train, labels).fit(0.01).answers(test, 3).argmax(1).tolist() == [0, 0, 0, 0]
    duplicates = np.eye(3)[labels].repeat(dims, 1)
    train, test = rotate(*standardise([duplicates], [duplicates]))
    assert (Path(train, labels).fit(0.001).answers(test, 3).argmax(1) == labels).all()


def test_class_with_one_clip_to_fit_on():
    rng = np.random.default_rng(0)
    features, labels = made_up(rng, 40, 200, 2, signal=3.0)
    labels[0], features[0] = 2, features[0] + 9 * np.ones(200)
    train, test = rotate(*standardise([features], [features]))
    assert (Path(train, labels).fit(0.001).answers(test, 3).argmax(1) == labels).all()


# The choice.


def task_of(labels, rng):
    train, dev, test = np.split(rng.permutation(len(labels)), [len(labels) // 2, 3 * len(labels) // 4])
    groups = [str(i) for i in range(len(labels))]
    return Task(list("abc"), labels, groups, np.sort(np.concatenate([train, dev])), (np.sort(dev),), np.sort(test))


def table_of(blocks, clips):
    everyone = {stream: np.ones(clips, bool) for stream in ("audio", "video", "both")}
    return FeatureTable([f"c{i}" for i in range(clips)], everyone, blocks)


def test_the_best_layer_is_found_and_test_labels_play_no_part():
    rng = np.random.default_rng(0)
    good, labels = made_up(rng, 200, 50)
    table = table_of({"audio_1/mean": rng.normal(size=(200, 50)), "audio_2/mean": good}, 200)
    task = task_of(labels, rng)
    heads = heads_of(["logistic"], [0.01, 0.1])
    trials = search_stream(table, "audio", task, heads)
    assert best_of(trials).blocks == ("audio_2/mean",) and trials[0].options == (0.1, 0.01)
    said, _ = fit_choice(table, best_of(trials), task, heads[0], task.test)
    assert (said.argmax(1) == labels[task.test]).mean() > 0.9
    garbled = labels.copy()
    garbled[task.test] = rng.permutation(garbled[task.test])
    garbled = replace(task, labels=garbled)
    assert search_stream(table, "audio", garbled, heads) == trials
    np.testing.assert_array_equal(fit_choice(table, best_of(trials), garbled, heads[0], task.test)[0], said)


def test_noise_scores_at_chance():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 600)
    table = table_of({f"audio_{layer}/mean": rng.normal(size=(600, 40)) for layer in range(6)}, 600)
    task = task_of(labels, rng)
    heads = heads_of(["logistic"], [0.1, 0.001])
    said, _ = fit_choice(table, best_of(search_stream(table, "audio", task, heads)), task, heads[0], task.test)
    assert (said.argmax(1) == labels[task.test]).mean() == pytest.approx(1 / 3, abs=0.12)  # 3 deviations of 150 clips


def test_both_streams_try_the_join_the_fusion_and_all_of_it():
    rng = np.random.default_rng(0)
    half = np.arange(120) % 2
    labels = half + rng.integers(0, 2, 120)  # what is left of the label is in the other stream
    blocks = {
        "audio_1/mean": half[:, None] + 0.1 * rng.normal(size=(120, 8)),
        "video_1/mean": (labels - half)[:, None] + 0.1 * rng.normal(size=(120, 8)),
        "fusion_audio/mean": rng.normal(size=(120, 8)),
        "fusion_video/mean": rng.normal(size=(120, 8)),
    }
    table, task = table_of(blocks, 120), task_of(labels, rng)
    joined, fused = ("audio_1/mean", "video_1/mean"), ("fusion_audio/mean", "fusion_video/mean")
    heads = heads_of(["logistic"], [0.01])
    best = {(s, "logistic"): best_of(search_stream(table, s, task, heads)) for s in ("audio", "video")}
    trials = search_both(table, task, heads, best)
    assert [trial.blocks for trial in trials] == [joined, joined + fused, fused]
    assert best_of(trials).blocks == joined and best_of(trials).best > 0.95
    assert best["audio", "logistic"].best < 0.8


def test_results_survive_a_kill_at_any_moment(tmp_path):
    seed = random.SystemRandom().randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    path, value = tmp_path / "results.json", {"numbers": list(range(200_000))}
    write_json(path, value)
    for _ in range(10):
        child = os.fork()
        if not child:
            while True:
                write_json(path, value)
        time.sleep(rng.uniform(0.005, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert json.loads(path.read_text()) == value
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"uar": float("nan")})
    assert json.loads(path.read_text()) == value


def test_a_choice_at_the_end_of_the_menu_is_told():
    def results(scores, head="ridge", features="pretrained"):
        options = [0.1, 0.01, 0.001]
        best = options[int(np.argmax(scores))]
        same = {"features": features, "stream": "audio", "head": head}
        row = {"system": "s", "kind": "chosen", "choices": [{"blocks": ["audio_1/mean"], "option": best}]} | same
        return {
            "rows": [row],
            "trials": [{"blocks": ["audio_1/mean"], "options": options, "dev_scores": scores} | same],
        }

    [weak], [strong] = at_the_end(results([0.4, 0.5, 0.6])), at_the_end(results([0.6, 0.5, 0.4]))
    assert weak.startswith("s: the best penalty, 0.001, is the weakest") and "0.1, is the strongest" in strong
    for quiet in (
        results([0.5, 0.6, 0.5]),
        results([0.6, 0.6, 0.5]),  # the next one is as good
        results([0.4, 0.5, 0.6], head="knn"),
        results([0.4, 0.5, 0.6], features="random"),
    ):
        assert at_the_end(quiet) == []
