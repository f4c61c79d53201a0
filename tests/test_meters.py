"""The meters of online probes, each beside its slow and obvious twin."""

import math

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from affekt.data.transforms import Inputs
from affekt.pretrain.flops import encoding_flops, peak_flops, training_flops
from affekt.pretrain.footprint import flops_per_clip
from affekt.pretrain.hicmae import HiCMAE
from affekt.pretrain.hicmae_settings import HiCMAESettings
from affekt.pretrain.masks import random_mask, tube_mask
from affekt.pretrain.meters import (
    INTERCEPT,
    RIDGE_PENALTIES,
    alignment,
    balanced_accuracy,
    effective_rank,
    modality_gap,
    neighbour_predict,
    recall_at,
    ridge_predict,
    uniformity,
)
from affekt.pretrain.online import LEAST_STEPS, TIMES_THE_WORK, default_interval

SMALL = {"embed_dim": 48, "num_heads": 3, "depth": 2, "taps": [1, 2], "decoder_embed_dim": 32, "decoder_num_heads": 2}
SMALL |= {"img_size": 32, "num_frames": 4, "mel_frames": 64, "mel_bins": 64, "mask_ratio_video": 0.5}


@pytest.fixture
def rng():
    seed = np.random.SeedSequence().entropy % 2**32
    print("seed", seed)
    return np.random.default_rng(seed)


def on_sphere(rng, n, dim, spread=1.0):
    x = rng.normal(size=dim) + spread * rng.normal(size=(n, dim))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def test_recall_is_that_of_sorting_every_row(rng):
    queries, answers = on_sphere(rng, 40, 6), on_sphere(rng, 40, 6)
    answers[:20] = queries[:20] + 0.1 * answers[:20]
    answers /= np.linalg.norm(answers, axis=1, keepdims=True)
    found = recall_at(queries, answers)
    for k in (1, 5, 10):
        hits = 0
        for i in range(40):
            order = sorted(range(40), key=lambda j: -float(queries[i].astype(float) @ answers[j].astype(float)))
            hits += i in order[:k]
        assert found[k] == pytest.approx(hits / 40)
    assert found[1] > 0.2 and found[1] <= found[5] <= found[10]
    assert recall_at(queries, queries)[1] == 1
    same = np.repeat(queries[:1], 40, 0)
    assert recall_at(same, same) == {1: 0, 5: 0, 10: 0}  # a collapse is no success


def test_geometry_is_that_of_loops_over_pairs(rng):
    x, y = on_sphere(rng, 25, 8, 0.5), on_sphere(rng, 25, 8)
    pairs = [math.exp(-2 * sum((a - b) ** 2)) for i, a in enumerate(x.astype(float)) for b in x[:i].astype(float)]
    assert uniformity(x) == pytest.approx(math.log(sum(pairs) / len(pairs)), rel=1e-5)
    assert alignment(x, y) == pytest.approx(np.mean([sum((a - b) ** 2) for a, b in zip(x, y)]), rel=1e-5)
    assert modality_gap(x, y) == pytest.approx(
        math.dist(sum(x.astype(float)) / 25, sum(y.astype(float)) / 25), rel=1e-5
    )
    assert uniformity(np.repeat(x[:1], 25, 0)) == pytest.approx(0, abs=1e-5)


def test_effective_rank_counts_directions(rng):
    values = np.linalg.eigvalsh(np.cov((x := on_sphere(rng, 60, 10)).astype(float).T)).clip(0) ** 0.5
    share = values / values.sum()
    assert effective_rank(x) == pytest.approx(math.exp(-sum(p * math.log(p) for p in share if p > 0)), rel=1e-4)
    for directions in (1, 3):  # as many orthogonal ones of equal extent
        corners = np.repeat(np.eye(12)[:directions], 2, 0) * np.tile([1, -1], directions)[:, None]
        assert effective_rank(corners + 0.3) == pytest.approx(directions)
    assert effective_rank(np.full((8, 4), 0.5, np.float32)) == 0


def test_ridge_in_closed_form_is_the_one_fitted_anew_for_every_speaker(rng):
    """The twin: weighted least squares with the constant as a feature, refitted without each speaker."""
    labels = rng.integers(0, 3, 48)
    labels[:3] = 0, 1, 2
    groups = [f"s{i % 6}" for i in range(48)]
    train, other = rng.normal(size=(48, 20)) + 0.8 * labels[:, None] * (np.arange(20) < 3), rng.normal(size=(30, 20))
    mean, deviation = train.mean(0), train.std(0)
    features, others = (
        np.hstack([(x - mean) / deviation / math.sqrt(20), np.full((len(x), 1), math.sqrt(INTERCEPT))])
        for x in (train, other)
    )
    weights = np.array([48 / 3 / (labels == c).sum() for c in labels])

    def fit(rows, penalty):
        x, w = features[rows], weights[rows, None]
        return np.linalg.solve(x.T @ (w * x) + penalty * np.eye(21), x.T @ (w * np.eye(3)[labels[rows]]))

    best = (-1.0, None)
    for penalty in RIDGE_PENALTIES:
        answers = np.empty(48, int)
        for name in set(groups):
            inside = np.array([group == name for group in groups])
            answers[inside] = (features[inside] @ fit(~inside, penalty)).argmax(1)
        score = balanced_accuracy(labels, answers)
        best = max(best, (score, penalty), key=lambda pair: pair[0])
    expected = (others @ fit(np.ones(48, bool), best[1])).argmax(1)
    assert (ridge_predict(train, labels, groups, other) == expected).all()


def test_readouts_find_what_is_there_and_nothing_in_what_is_not(rng):
    labels, groups = np.arange(60) % 3, [f"s{i // 6}" for i in range(60)]
    x = np.eye(8)[labels] * 2 + 0.1 * rng.normal(size=(60, 8))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    assert balanced_accuracy(labels[30:], ridge_predict(x[:30], labels[:30], groups[:30], x[30:])) > 0.85
    assert balanced_accuracy(labels[30:], neighbour_predict(x[:30], labels[:30], x[30:])) == 1
    same = np.ones((60, 8), np.float32) / 8**0.5
    for guess in (
        ridge_predict(same[:30], labels[:30], groups[:30], same[30:]),
        neighbour_predict(same[:30], labels[:30], same[30:]),
    ):
        assert balanced_accuracy(labels[30:], guess) == pytest.approx(1 / 3)  # one class for all
    assert balanced_accuracy(np.array([0, 0, 0, 1]), np.array([0, 0, 0, 0])) == 0.5


def test_neighbours_vote_by_similarity(rng):
    train, other = on_sphere(rng, 30, 5), on_sphere(rng, 12, 5)
    labels = rng.integers(0, 4, 30)
    for row, answer in zip(other.astype(float), neighbour_predict(train, labels, other)):
        nearest = sorted(range(30), key=lambda j: -float(row @ train[j].astype(float)))[:10]
        votes = [sum(math.exp((row @ train[j] - 1) / 0.07) for j in nearest if labels[j] == c) for c in range(4)]
        assert votes[answer] == pytest.approx(max(votes))


@pytest.mark.parametrize("streams", ["both", "video"])
def test_flops_are_those_that_torch_counts(streams):
    settings = HiCMAESettings(**SMALL, streams=streams)
    model = HiCMAE(settings)
    batch = torch.zeros(1, dtype=torch.int64)
    masks = tube_mask(batch, settings.grid_video, 0.5), random_mask(batch, 16, settings.mask_ratio_audio)
    present = torch.ones(1, dtype=torch.bool)
    inputs = Inputs(torch.rand(1, 3, 4, 32, 32), torch.rand(1, 1, 64, 64), present, present, torch.tensor([64]))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(inputs, *masks)["loss"].backward()
    assert training_flops(settings) == counter.get_total_flops()
    assert training_flops(settings) == flops_per_clip(settings)[1]  # which `affekt plan` counts
    assert encoding_flops(settings) > 0
    before = torch.get_rng_state()
    training_flops(settings)
    assert torch.equal(before, torch.get_rng_state())


def test_the_default_interval_keeps_the_work_of_probes_small():
    settings = HiCMAESettings(**SMALL)
    probe, training = 256 * encoding_flops(settings), training_flops(settings)
    for batch in (2, 2000):
        steps = default_interval(settings, 256, batch)
        share = probe / (steps * batch * training)
        assert share <= 1.001 / TIMES_THE_WORK
        assert (steps == LEAST_STEPS) == (batch == 2000) and (batch == 2000 or share > 0.9 / TIMES_THE_WORK)


def test_the_peak_of_a_cpu_is_what_a_product_reaches():
    peak, source = peak_flops(torch.device("cpu"), "fp32")
    assert peak > 1e8 and "product" in source
