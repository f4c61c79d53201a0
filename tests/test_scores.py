"""From predictions to scores: the right ones, over people, seeds and ranks; pairs; one row of the table."""

import socket
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from affekt.data.errors import SettingsError
from affekt.finetune.calibration import fit_temperatures
from affekt.finetune.ceiling import describe_raters
from affekt.finetune.gather import gather_predictions
from affekt.finetune.metrics.confusion import confusion_matrix, uar
from affekt.finetune.metrics.intervals import bootstrap_interval
from affekt.finetune.predictions import Predictions, pooled
from affekt.finetune.scores import clusters, compare, describe_system, main_score, score, task_of, values

CLASSES = ["anger", "joy", "neutral", "sadness"]


def made(clips: int = 120, skill: float = 1.0, seed: int = 0, speakers: int = 12, **about) -> Predictions:
    """Clips whose label is the same for every seed; `skill` is how far its logit stands out of noise."""
    truth = np.random.default_rng(clips)
    label = truth.integers(0, 4, clips)
    logits = np.random.default_rng([seed, clips]).normal(size=(clips, 4)) + skill * np.eye(4)[label]
    return Predictions(
        [f"c{n}" for n in range(clips)],
        CLASSES,
        logits=logits,
        label=label,
        meta={
            "speaker": [f"s{n % speakers}" for n in range(clips)],
            "sex": ["mf"[n % speakers % 2] for n in range(clips)],
        },
        about={"name": "made", "seed": seed, **about},
    )


def with_votes(table: Predictions, raters: int = 8) -> tuple[Predictions, np.ndarray]:
    rng = np.random.default_rng(5)
    counts = np.array([rng.multinomial(raters, 0.1 + 0.6 * np.eye(4)[label]) for label in table.label])
    return replace(table, shares=counts / raters), counts


def rated(table: Predictions, noise: float = 1.0) -> Predictions:
    rng = np.random.default_rng(6)
    ratings = rng.normal(size=(len(table), 2))
    said = ratings + noise * rng.normal(size=ratings.shape)
    return replace(table, dimensions=["valence", "arousal"], ratings=ratings, values=said)


def test_each_task_has_its_scores():
    single = made()
    soft = replace(with_votes(single)[0], label=None)
    sets = replace(soft, kind="multi")
    joint = rated(single)
    alone = replace(joint, classes=[], logits=None, label=None)
    tasks = {"single": single, "soft": soft, "multi": sets, "joint": joint, "dimensions": alone}
    for task, table in tasks.items():
        assert task_of(table) == task and main_score(task) in values(table)
    assert {"uar", "war", "weighted_f1", "top3", "nll", "brier", "ece", "aurc"} < values(single).keys()
    assert "kl" not in values(single) and "present_macro_f1" not in values(single)
    assert {"kl", "js", "cosine", "agreement", "multi_macro_f1"} < values(soft).keys() and "uar" not in values(soft)
    assert "uar" not in values(sets) and "weighted_accuracy" in values(sets)
    assert values(joint).keys() > values(alone).keys() == score(alone, bootstrap=10).keys()
    means = values(alone)
    assert means["ccc"] == pytest.approx((means["ccc_valence"] + means["ccc_arousal"]) / 2)
    with pytest.raises(SettingsError, match="score kl needs; those there are: uar, war"):
        values(single, ["kl"])


def test_sets_are_said_above_chance_of_a_softmax_and_above_half_of_sigmoids():
    votes = np.array([[0.5, 0.5, 0], [1.0, 0, 0]])
    logits = np.array([[1.0, 0.9, -3], [0.1, -0.1, -0.2]])
    table = Predictions(["a", "b"], ["x", "y", "z"], logits=logits, shares=votes)
    assert values(table)["multi_macro_f1"] == 1  # of the second clip, only x has more than a third
    assert values(replace(table, kind="multi"))["multi_macro_f1"] == 1
    assert values(replace(table, kind="multi", logits=logits + 0.15))["multi_macro_f1"] == pytest.approx(
        (1 + 2 / 3) / 2
    )


def test_a_test_set_that_lacks_classes_has_present_only_scores():
    table = made()
    there = table.take(table.label != 3)
    found = values(there)
    assert found["masked_uar"] > found["uar"]  # answers of the class that is not there were errors
    assert found["present_macro_f1"] > found["macro_f1"]
    assert found["masked_uar"] == values(replace(there, logits=np.where([1, 1, 1, 0], there.logits, -99)))["uar"]


def test_scores_are_over_speakers_and_means_over_seeds():
    tables = [made(seed=seed) for seed in range(3)]
    shuffled = tables[1].take(np.random.default_rng(0).permutation(120))
    found = score([tables[0], shuffled, tables[2]], ["uar", "war"], bootstrap=400)
    each = [table.logits.argmax(1) for table in tables]
    expected = bootstrap_interval(uar, tables[0].label, np.stack(each), tables[0].meta["speaker"], n=400)
    assert vars(found["uar"]) == pytest.approx(expected.as_dict())
    assert (found["uar"].unit, found["uar"].clusters) == ("speakers", 12)
    assert score(made(speakers=4), ["uar"], bootstrap=50)["uar"].unit == "speakers, then their clips"
    assert score(tables[0], ["uar"], bootstrap=50, cluster=None)["uar"].clusters == 120
    with pytest.raises(SettingsError, match="1 are in one alone, first c119"):
        score([tables[0], tables[1].take(range(119))])
    with pytest.raises(SettingsError, match="two tables were told different label of the same clips"):
        score([tables[0], replace(tables[1], label=np.roll(tables[1].label, 1))])


def test_a_clip_of_an_unknown_speaker_stands_for_itself():
    table = made(40, speakers=8)
    speakers = ["", "", *table.meta["speaker"][2:]]
    groups = clusters(replace(table, meta={"speaker": speakers}), "speaker")
    assert len(set(groups)) == 8 + 2
    assert clusters(replace(table, meta={"speaker": [""] * 40}), "speaker") is None
    assert clusters(table, "session") is None


def test_clips_without_a_label_or_a_rating_do_not_count():
    table = rated(made())
    label, ratings = table.label.copy(), table.ratings.copy()
    label[:20], ratings[10:30, 0] = -1, np.nan
    part = replace(table, label=label, ratings=ratings)
    found, kept = values(part), values(table.take(np.arange(20, 120)))
    assert found["uar"] == kept["uar"] and found["nll"] == kept["nll"]
    rows = np.r_[0:10, 30:120]
    assert found["ccc_valence"] == found["ccc_valence"] == values(table.take(rows))["ccc_valence"]
    assert found["ccc_arousal"] == values(table)["ccc_arousal"] and found["ccc"] == values(table.take(rows))["ccc"]
    with pytest.raises(SettingsError, match="of no clip"):
        score(replace(made(), label=np.full(120, -1)))


@pytest.mark.parametrize("clips", [1, 2, 30])
@pytest.mark.parametrize("label", [0, 1])
def test_constants_and_single_clips_have_defined_figures(clips, label):
    rng = np.random.default_rng(7)
    table = Predictions(
        [str(n) for n in range(clips)],
        ["x", "y"],
        ["valence"],
        logits=np.zeros((clips, 2)),
        values=np.full((clips, 1), 0.3),
        label=np.full(clips, label),
        shares=np.tile([[1.0, 0.0]], (clips, 1)),
        ratings=rng.normal(size=(clips, 1)),
        meta={"speaker": ["s"] * clips},
    )
    found = score(table, bootstrap=60)
    assert all(np.isfinite([e.value, e.low, e.high]).all() for e in found.values())
    assert found["uar"].value == 1 - label and found["present_macro_f1"].value == 1 - label
    assert found["ccc"].value == found["pcc"].value == found["ccc"].high == 0
    assert found["auroc"].value == 0.5 and found["aurc"].value == label and found["ece"].value == 0.5
    assert score(replace(table, kind="multi"), bootstrap=20)["multi_macro_f1"].value == 0
    dev = replace(table, ids=[f"dev{n}" for n in range(clips)], about={"part": "dev"})
    described = describe_system("x", "X", "other", table, [dev], bootstrap=20)
    assert described.scores["uar"].value == 1 - label


def test_shuffled_labels_give_chance_within_the_interval():
    hits = 0
    for trial in range(60):
        table = made(200, skill=2, seed=trial, speakers=20)
        label = np.random.default_rng(trial).permutation(table.label)
        found = score(replace(table, label=label), ["uar"], bootstrap=200)["uar"]
        hits += found.low <= 0.25 <= found.high
    assert hits >= 52  # 57 expected; fewer than 52 has a chance of 1 %


def test_the_interval_of_an_error_holds_its_value():
    found = score(made(400), ["ece", "classwise_ece"], bootstrap=300)
    assert all(e.low <= e.value <= e.high for e in found.values())


def test_runs_are_compared_in_pairs_on_the_clips_they_share():
    good = [made(seed=seed, skill=2) for seed in range(3)]
    bad = [made(seed=seed, skill=1, name="bad").take(range(100)) for seed in (7, 8)]
    found = compare(good, bad, bootstrap=400)
    assert (found.of, found.minus, found.score, found.clips) == ("made", "bad", "uar", 100)
    truth, groups = good[0].label[:100], good[0].meta["speaker"][:100]
    said = [np.stack([t.logits[:100].argmax(1) for t in tables]) for tables in (good, bad)]
    expected = bootstrap_interval(uar, truth, said[0], groups, n=400, minus=said[1])
    assert vars(found.estimate) == pytest.approx(expected.as_dict())
    assert found.p == pytest.approx(2 / 401) and found.estimate.low > 0
    back = compare(bad, good, bootstrap=400)
    assert back.p == found.p and back.estimate.high == pytest.approx(-found.estimate.low)
    same = compare(good, good, "nll", bootstrap=100)
    assert (same.p, same.estimate.value, same.estimate.low) == (1, 0, 0)


def test_runs_that_are_equally_good_seldom_differ():
    p = [
        compare(made(200, seed=n, speakers=20), made(200, seed=n + 500, speakers=20), bootstrap=200).p
        for n in range(60)
    ]
    assert sum(x < 0.05 for x in p) <= 8  # 3 expected; more than 8 has a chance of 0.4 %
    assert stats.kstest(p, "uniform").pvalue > 1e-3


def test_runs_that_cannot_be_compared():
    table = made(20)
    with pytest.raises(SettingsError, match="no clip in common"):
        compare(table.take(range(10)), table.take(range(10, 20)))
    with pytest.raises(SettingsError, match="different label of the same clips"):
        compare(table, replace(table, label=(table.label + 1) % 4))
    with pytest.raises(SettingsError, match="classes differ"):
        compare(table, replace(table, classes=["a", "b", "c", "d"]))


def test_temperatures_meet_no_test_clip_under_another_name():
    table, devs = folded(0)
    peeking = replace(table.take(range(150, 250)), about=devs[0].about)  # says that it is the development part
    with pytest.raises(SettingsError, match="50 development clips are test clips of the same fold, first one-c150"):
        describe_system("ours", "Ours", "other", table, [peeking, devs[1]], bootstrap=20)


def folded(seed: int, scale: float = 1.0) -> tuple[Predictions, list[Predictions]]:
    """A table of two folds, the second with logits three times too large, and the development clips of each."""
    tests, devs = [], []
    for fold, factor in (("one", 1.0), ("two", 3.0)):
        part = made(400, seed=seed, skill=2, fold=fold)
        part = replace(part, logits=factor * part.logits, ids=[f"{fold}-{clip}" for clip in part.ids])
        meta = {**part.meta, "fold": [fold] * 400}
        tests.append(replace(part, meta=meta).take(range(200)))
        devs.append(replace(part, about={**part.about, "part": "dev"}).take(range(200, 400)))
    return pooled(tests, fold="all"), devs


def test_a_system_is_described_from_its_folds_and_seeds():
    (first, dev_first), (second, dev_second) = folded(0), folded(1)
    found = describe_system(
        "ours",
        "Ours",
        "finetuned",
        [first, second],
        [*dev_second, *dev_first],
        bootstrap=60,
        mistakes=5,
        selected="test",
    )
    assert (found.seeds, found.clips, found.selected, len(found.by_seed)) == ([0, 1], 400, "test", 2)
    assert found.scores["uar"].value == pytest.approx(np.mean([seed["uar"] for seed in found.by_seed]))
    assert [(fold.name, fold.clips) for fold in found.by_fold] == [("one", 200), ("two", 200)]
    expected = np.mean([values(table.take(range(200, 400)))["war"] for table in (first, second)])
    assert found.by_fold[1].scores["war"] == pytest.approx(expected)
    matrices = [confusion_matrix(table.label, table.logits.argmax(1), 4) for table in (first, second)]
    assert found.confusion == sum(matrices).tolist()
    assert len(found.speakers) == 12 and {one.sex for one in found.speakers} == {"m", "f"}
    temperatures = np.reshape(found.calibration.temperatures, (2, 2))
    assert temperatures[:, 1] / temperatures[:, 0] == pytest.approx([3, 3], rel=1e-3)  # each fold by its own dev clips
    # Scaled by its own temperature the second fold says what the first one does.
    halves = [(first.take(range(200)), dev_first[0]), (second.take(range(200)), dev_second[0])]
    scaled = [values(fit_temperatures(dev).apply(half), ["nll"])["nll"] for half, dev in halves]
    assert found.calibration.after["nll"] == pytest.approx(np.mean(scaled), rel=1e-6)
    assert found.calibration.before["nll"] == pytest.approx(found.scores["nll"].value)
    assert found.risk_coverage.y[-1] == pytest.approx(1 - found.scores["war"].value)
    sure = [one.confidence for one in found.mistakes]
    assert len(sure) == 5 and sure == sorted(sure, reverse=True)
    assert all(one.truth != one.prediction for one in found.mistakes)
    assert describe_system("x", "X", "other", first, dev_first[:1], bootstrap=20).calibration is None


def test_temperatures_never_see_the_test_part():
    table = made(part="test")
    with pytest.raises(SettingsError, match="120 development clips are test clips of the same fold, first c0"):
        describe_system("x", "X", "other", table, [replace(table, about=table.about | {"part": "dev"})], bootstrap=20)
    with pytest.raises(SettingsError, match="fitted on development clips"):
        describe_system("x", "X", "other", table, [replace(table, ids=[f"d{c}" for c in table.ids])], bootstrap=20)


def test_raters_are_a_row_beside_the_models():
    table, counts = with_votes(made(400))
    counts[:3] = 0
    found = describe_raters(table, counts, bootstrap=100)
    assert (found.kind, found.clips) == ("raters", 397)
    rng, hits, agreed = np.random.default_rng(0), [], []
    for row in counts[3:]:  # the same by drawing the rater, ten times each
        votes = np.repeat(np.arange(4), row)
        for held in rng.choice(8, 10):
            others = row - np.eye(4, dtype=int)[votes[held]]
            hits.append((others[votes[held]] == others.max()) / (others == others.max()).sum())
            agreed.append(others[votes[held]] / 7)
    assert found.scores["war"].value == pytest.approx(np.mean(hits), abs=0.02)
    assert found.scores["agreement"].value == pytest.approx(np.mean(agreed), abs=0.02)
    assert found.scores["uar"].low < found.scores["uar"].value < found.scores["uar"].high
    with pytest.raises(SettingsError, match="two raters"):
        describe_raters(table, np.eye(4, dtype=int)[table.label])


RANK = """
import sys
import numpy as np
import torch.distributed as dist
from affekt.data.errors import SettingsError
from affekt.finetune.gather import gather_predictions
from affekt.finetune.predictions import Predictions
folder, port, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
whole = Predictions.read(f"{folder}/whole.safetensors")
padded = [*range(rank, len(whole), 2), 0]  # rank 1 pads with a clip that is not its own
gather_predictions(whole.take(padded[:-1] if rank == 0 else padded), whole.ids).save(f"{folder}/gathered{rank}")
gather_predictions(whole.take(range(len(whole)) if rank else [])).save(f"{folder}/sorted{rank}")
try:
    gather_predictions(whole.take([rank]), whole.ids)
except SettingsError as error:
    print(error)
dist.destroy_process_group()
"""


def test_two_ranks_gather_the_table_of_one_process_bit_by_bit(tmp_path):
    whole = rated(with_votes(made(21))[0])
    whole.save(tmp_path / "whole.safetensors")
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = str(listening.getsockname()[1])
    command = [sys.executable, "-c", RANK, str(tmp_path), port]
    ranks = [subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(2)]
    told = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert all("19 of 21 clips were judged by no rank" in text for text in told)
    alone = score(whole, bootstrap=50)
    for rank in range(2):
        found = Predictions.read(tmp_path / f"gathered{rank}")
        assert found.ids == whole.ids and found.logits.tobytes() == whole.logits.tobytes()
        assert score(found, bootstrap=50) == alone
        assert Predictions.read(tmp_path / f"sorted{rank}").ids == sorted(whole.ids)


def test_one_process_gathers_its_own():
    table = made(10)
    assert gather_predictions(table, table.ids[::-1]).ids == table.ids[::-1]
    with pytest.raises(SettingsError, match="0 of 9 clips were judged by no rank, 1 were that should not be"):
        gather_predictions(table, table.ids[:9])
    with pytest.raises(SettingsError, match="nothing to gather"):
        gather_predictions(table.take([]))
