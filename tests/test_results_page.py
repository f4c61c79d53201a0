"""The page of an evaluation: all of it drawn from results, and safe for any text."""

import base64
import csv
import hashlib
import io
import json
import random
import re
from html.parser import HTMLParser
from itertools import pairwise

import cv2
import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from affekt.data.charts import LEFT, Line, line_chart
from affekt.data.errors import SettingsError
from affekt.data.page import page
from affekt.finetune.report.map import FEW, SHOWN, as_json, drawn, embedding_map
from affekt.finetune.report.results import write_results_report
from affekt.finetune.report.rows import HEAD, results_csv
from affekt.finetune.report.summary import holm
from affekt.finetune.report.words import figure, score_name
from affekt.finetune.schema import Results
from benchmarks.example_results import example

ATTACK = "</script><img src=x onerror=alert(1)>\u2028\"'"
SECTIONS = (
    "The short answer", "Chosen on the test clips", "Differences", "What is taken for what", "Speakers",
    "Groups of people", "Confidence", "Against the raters' votes", "When it may stay silent",
    "Where in the network it sits", "Under stress", "When face and voice disagree", "Map of the clips",
    "Worst mistakes", "More tables", "Folds and seeds", "What pre-training saw", "The clips",
    "Limits and intended use", "How it was measured",
)  # fmt: skip


@pytest.fixture(scope="module")
def index(tiny_shards):
    return tiny_shards(48, "mixed", seconds=0.5, size=32)


@pytest.fixture(scope="module")
def results(index):
    return example(index)


@pytest.fixture(scope="module")
def report(results, index, tmp_path_factory):
    return write_results_report(tmp_path_factory.mktemp("page") / "report.html", results, index)


def minimal(**more):
    """Results with as little as there may be."""
    rows = [{"name": "m", "title": "Majority", "kind": "majority", "streams": "audio", "clips": 5}]
    score = {"value": 0.5, "low": 0.4, "high": 0.6, "unit": "clips", "clusters": 5}
    about = {"title": "Least", "task": "single", "label": "label", "classes": ["a", "b"], "main_score": "uar"}
    return Results(**about | {"systems": [row | {"scores": {"uar": score}} for row in rows]} | more)


class Reader(HTMLParser):
    """Elements with their attributes, and the text of each section by its title."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self.heading, self.title = [], {}, False, ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.heading = tag == "h2"
        self.title = "" if self.heading else self.title

    def handle_data(self, data):
        if self.heading:
            self.title, self.heading = data, False
        self.text[self.title] = self.text.get(self.title, "") + " " + data

    def titles(self):
        return [title for title in self.text if title]


def test_every_section_is_there_in_its_order_and_led_to(report):
    read = Reader(report.read_text())
    assert tuple(read.titles()) == SECTIONS
    ids = [about["id"] for tag, about in read.elements if tag == "section"]
    links = [about["href"] for tag, about in read.elements if tag == "a"]
    assert links == [f"#{i}" for i in ids] and len(set(ids)) == len(ids)
    for tag, about in read.elements:
        if tag == "img":
            assert "alt" in about
        if tag == "svg" and about.get("aria-hidden") != "true":
            assert about["aria-label"] and about["role"] in ("img", "application")


def test_sections_without_data_are_left_out(tmp_path):
    text = write_results_report(tmp_path / "least.html", minimal()).read_text()
    read = Reader(text)
    assert read.titles() == ["The short answer", "Limits and intended use"]
    assert not re.search(r"\b(nan|None)\b", text)
    assert "<script" not in text and "script-src" not in text
    only_test = minimal()
    only_test.systems[0].selected = "test"
    read = Reader(write_results_report(tmp_path / "report.html", only_test).read_text())
    assert read.titles()[0] == "Chosen on the test clips"


def test_what_test_clips_chose_is_in_no_table_with_the_rest(report):
    text = Reader(report.read_text()).text
    marked = {title for title in SECTIONS if "chosen on test clips" in text[title].lower()}
    assert marked == {"Chosen on the test clips", "Folds and seeds"}
    assert text["Chosen on the test clips"].count("chosen on test clips") == 1
    assert "transductive" in text["The short answer"]


def test_figures_are_those_of_the_results(results, report):
    text = {title: " ".join(words.split()) for title, words in Reader(report.read_text()).text.items()}
    for s in (s for s in results.systems if s.selected == "dev"):
        e = s.scores["uar"]
        assert f"{s.title} " in text["The short answer"]
        assert f"{100 * e.value:.1f} [{100 * e.low:.0f}, {100 * e.high:.0f}]" in text["The short answer"]
    for d in results.differences:
        e = d.estimate
        shown = f"{100 * e.value:+.1f} [{100 * e.low:+.1f}, {100 * e.high:+.1f}]".replace("-", "\u2212")
        assert shown in text["Differences"]
    counts = results.systems[0].confusion[0]
    cells = " ".join(f"{100 * c / sum(counts):.0f} {c}" for c in counts if c)
    assert f"{results.classes[0]} {cells} {sum(counts)}" in text["What is taken for what"]
    assert "\u22125" in text["Under stress"] and "AUILC" in text["Under stress"]
    assert all(m.id in text["Worst mistakes"] for m in results.systems[0].mistakes)


def test_no_text_of_the_results_becomes_markup(index, tmp_path):
    hostile = example(index, attack=ATTACK)
    read = Reader(write_results_report(tmp_path / "report.html", hostile, index).read_text())
    scripts = [about for tag, about in read.elements if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "map-data"}, {}]
    handlers = [name for _, about in read.elements for name in about if name.startswith("on")]
    assert not handlers and not [about for tag, about in read.elements if tag == "img" and about.get("src") == "x"]
    assert set(read.titles()) == set(SECTIONS) - {"The clips"}  # whose labels in the shards are not the hostile ones


def test_curves_and_pictures_of_the_pretraining_run(tmp_path):
    run = tmp_path / "run"
    (run / "pictures").mkdir(parents=True)
    rows = [{"step": s, "loss_video": 1 / s, "loss_audio": 2 / s, "lr": 1e-3, "clips_per_s": 9.0} for s in (10, 20, 30)]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    for step in (10, 20, 30):
        cv2.imwrite(str(run / "pictures" / f"step-{step:06d}.png"), np.zeros((4, 4, 3), np.uint8))
    read = Reader(write_results_report(tmp_path / "report.html", minimal(), run=run).read_text())
    text = read.text["How it was learned"]
    assert "Reconstruction error" in text and "Contrast" not in text  # that loss is not in this run
    assert "After step 10" in text and "After step 30" in text and "After step 20" not in text
    assert [tag for tag, _ in read.elements].count("img") == 2
    absent = write_results_report(tmp_path / "report.html", minimal(), run=tmp_path / "no run").read_text()
    assert "How it was learned" not in absent


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        (
            {"shared_with_test": {"ids": 0, "sources": 0, "speakers": 0}},
            "None of them shares an id, a source file or",
        ),
        ({"shared_with_test": {"ids": 0, "speakers": 2}}, "They share 2 speakers with the test clips"),
        ({"shared_with_test": {"speakers": 0}, "without_speaker": 7}, "But 7 of its clips name no speaker"),
    ],
)
def test_what_pretraining_saw_is_told(seen, words, tmp_path):
    found = minimal(pretraining={"clips": 40, "speakers": 5} | seen)
    report = write_results_report(tmp_path / "report.html", found, extras={"Sheet": "<p>one</p>"})
    text = Reader(report.read_text()).text
    assert "on 40 clips of 5 named speakers" in text["What pre-training saw"]
    assert words in " ".join(text["What pre-training saw"].split()) and "one" in text["Sheet"]


def test_a_difference_that_is_not_clear_is_not_called_a_gain(tmp_path):
    rows = [s.model_dump() for s in minimal().systems * 2]
    rows[0] |= {"name": "a", "kind": "probe", "title": "A"}
    verdicts = {(-0.1, 0.2): "not clearly apart from Majority", (0.1, 0.2): "above Majority", (-0.2, -0.1): "below Maj"}
    verdicts[0.0, 0.0] = "not clearly apart from"
    for (low, high), verdict in verdicts.items():
        e = {"value": (low + high) / 2, "low": low, "high": high, "unit": "clips", "clusters": 5}
        one = {"of": "a", "minus": "m", "score": "uar", "clips": 5, "estimate": e, "p": 0.2}
        found = minimal(systems=rows, differences=[one])
        text = Reader(write_results_report(tmp_path / "report.html", found).read_text()).text["The short answer"]
        assert f"That is {verdict}" in text


def test_without_shards_there_are_names_in_place_of_pictures(results, tmp_path):
    text = write_results_report(tmp_path / "report.html", results).read_text()
    assert "data:image" not in text and "Faces and voices" not in text
    assert all(m.id in Reader(text).text["Worst mistakes"] for m in results.systems[0].mistakes)


def test_damaged_and_unknown_clips_do_not_cost_the_page(tmp_path, tiny_shards):
    index = tiny_shards(12, "both", speakers=2, seconds=0.3, size=32, shards=1)
    results = example(index)
    shard = index.root / index.shard_name(index.samples[0])
    shard.write_bytes(bytes(shard.stat().st_size))
    results.systems[0].mistakes = results.systems[1].mistakes[:1]
    results.systems[0].mistakes.append(results.systems[1].mistakes[0].model_copy(update={"id": "elsewhere"}))
    text = Reader(write_results_report(tmp_path / "report.html", results, index).read_text()).text["Worst mistakes"]
    assert "checksum: the clip cannot be shown" in text and "Not in the shards" in text


def test_the_policy_allows_nothing_but_the_page_s_own_script():
    text = page("A", "b", script="let a = 1;")
    assert "default-src 'none'" in text and "script-src 'sha256-" in text
    digest = base64.b64encode(hashlib.sha256(b"let a = 1;").digest()).decode()
    assert f"'sha256-{digest}'" in text and "unsafe-inline" not in text.partition("script-src")[2].partition('"')[0]


def test_csv_has_a_row_per_system_and_score(results):
    rows = list(csv.DictReader(io.StringIO(results_csv(results))))
    assert len(rows) == sum(len(s.scores) for s in results.systems) and tuple(rows[0]) == HEAD
    for s in results.systems:
        for score, e in s.scores.items():
            (row,) = [r for r in rows if (r["system"], r["score"]) == (s.name, score)]
            assert [float(row[name]) for name in ("value", "low", "high")] == [e.value, e.low, e.high]
            assert (row["unit"], int(row["clusters"])) == (e.unit, e.clusters)
            assert (row["selected"], row["transductive"]) == (s.selected, str(s.transductive).lower())
            assert (row["seeds"], int(row["folds"])) == (" ".join(map(str, s.seeds)), len(s.by_fold))
    tricky = minimal()
    tricky.systems[0].title = '=HYPERLINK("x"), "y"\n'
    (row,) = csv.DictReader(io.StringIO(results_csv(tricky)))
    assert row["title"] == "'" + tricky.systems[0].title


def test_scores_are_written_as_their_kind_asks():
    assert [score_name(s) for s in ("uar", "ccc_valence", "top_3", "f1_joy")][:2] == ["UAR", "CCC valence"]
    assert (figure("uar", 0.6123), figure("macro_f1", 0.5), figure("top3", 1.0)) == ("61.2", "50.0", "100.0")
    assert (figure("ccc_valence", -0.51234), figure("nll", 1.5)) == ("\u22120.512", "1.500")


def test_holm_equals_its_definition():
    seed = random.SystemRandom().randrange(2**32)
    print("seed", seed)
    p = np.random.default_rng(seed).random(7).tolist()
    slow = [max(min((len(p) - sum(r < q for r in p)) * q, 1) for q in p if q <= one) for one in p]
    assert holm(p) == pytest.approx(slow)
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


# The map.


def planted(clips, rng):
    labels = rng.integers(0, 3, clips)
    return 2 * rng.normal(size=(3, 40))[labels] + rng.normal(size=(clips, 40)), labels


@pytest.mark.parametrize("clips", [12, 60])
def test_the_map_keeps_groups_together_and_is_the_same_each_time(clips):
    features, labels = planted(clips, np.random.default_rng(0))
    names = [str(i) for i in range(clips)]

    def places():
        points = embedding_map(features, names, labels, names)
        assert [(p.id, p.label) for p in points] == [(n, str(label)) for n, label in zip(names, labels)]
        return np.array([[p.x, p.y] for p in points])

    first = places()
    apart = np.linalg.norm(first[:, None] - first, axis=-1) + 1e9 * np.eye(clips)
    assert (labels[apart.argmin(1)] == labels).mean() > 0.9
    with threadpool_limits(2):
        np.testing.assert_array_equal(first, places())
    if clips < FEW:  # the first two principal components, by another road
        z = (features - features.mean(0)) / features.std(0)
        np.testing.assert_allclose(np.abs(first), np.abs(z @ np.linalg.svd(z)[2][:2].T), atol=1e-8)


def test_maps_of_odd_features_are_defined_or_refused():
    names = ["a", "b", "c"]
    assert {(p.x, p.y) for p in embedding_map(np.ones((3, 4)), names, names, names)} == {(0.0, 0.0)}
    assert embedding_map(np.ones((1, 4)), names[:1], names[:1], names[:1])[0].x == 0
    assert [p.y for p in embedding_map(np.arange(3.0)[:, None], names, names, names)] == [0, 0, 0]
    with pytest.raises(SettingsError, match=r"NaN.*first b"):
        embedding_map(np.array([[0.0], [np.nan], [1.0]]), names, names, names)
    with pytest.raises(SettingsError, match="2 speakers"):
        embedding_map(np.ones((3, 4)), names, names, names[:2])


def test_many_points_are_thinned_and_data_survives_its_script_element():
    point = example_points(1)[0]
    many = [point.model_copy(update={"id": str(i)}) for i in range(SHOWN + 100)]
    shown = [int(p.id) for p in drawn(many)]
    assert len(shown) == SHOWN and (shown[0], shown[-1]) == (0, SHOWN + 99) and shown == sorted(set(shown))
    text = as_json({"id": ATTACK})
    assert json.loads(text) == {"id": ATTACK} and not set(text) & set("<>&\u2028")


def example_points(clips):
    features, labels = planted(clips, np.random.default_rng(0))
    names = [str(i) for i in range(clips)]
    return embedding_map(features, names, labels, names)


def test_lines_over_negative_and_broken_levels_stay_in_the_chart():
    chart = line_chart([Line("a", [-5, 0, 20], [1, 2, 3], "red")], x_name="dB", dots=True)
    places = [float(x) for x in re.findall(r'<circle class="at" cx="([\d.-]+)"', chart)]
    assert len(places) == 3 and all(a < b for a, b in pairwise(places)) and min(places) >= LEFT
    assert "\u22125" in chart
    assert ">0.6<" in line_chart([Line("a", [0.5, 1, 1.5], [1, 2, 3], "red")], x_name="factor")
