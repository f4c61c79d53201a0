"""The report: whole, self-contained, safe for any label, and saying what the results say."""

import copy
import json
import re
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest

from affekt.data.charts import Line, line_chart, nice_ticks, smooth, x_ticks
from affekt.finetune.report.gallery import spectrogram, spread
from affekt.finetune.report.probe import write_report

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CLASSES = ["<b>anger</b>", "joy & more"]


def interval(value):
    return {
        "value": value,
        "low": value - 0.1,
        "high": value + 0.1,
        "unit": "speakers, then their clips",
        "clusters": 3,
    }


def row(features, stream, value, kind="chosen"):
    choice = {"blocks": [f"{stream}_2/mean"], "penalty": 0.01, "dev_uar": value, "test_uar": value}
    return {
        "features": features,
        "stream": stream,
        "kind": kind,
        "transductive": False,
        "clips": {"fit": 30, "choose": 10, "test": 20},
        "choices": [] if features == "majority" else [choice],
        "test": {name: interval(value) for name in ("uar", "war", "macro_f1")},
        "confusion": [[9, 1], [3, 7]],
    }


@pytest.fixture
def results():
    streams = ("audio", "video", "both")
    values = {"pretrained": 0.8, "random": 0.6, "statistics": 0.55, "majority": 0.5}
    rows = [row(features, stream, value) for features, value in values.items() for stream in streams]
    rows += [row(features, stream, 0.58, "plain") for features in ("pretrained", "random") for stream in streams]
    trials = [
        {
            "features": features,
            "seed": seed,
            "stream": stream,
            "blocks": [f"{stream}_{layer}/mean"],
            "dev_uar": [0.5, 0.6],
        }
        for features, seeds in (("pretrained", 1), ("random", 2))
        for seed in range(seeds)
        for stream in ("audio", "video")
        for layer in (1, 2)
    ]
    pairs = [(("pretrained", s), ("random", s), 0.2) for s in streams]
    pairs += [(("pretrained", "both"), ("pretrained", s), 0.05) for s in ("audio", "video")]
    part = {"clips": 30, "classes": dict.fromkeys(CLASSES, 15), "speakers": ["s1"], "with_audio": 30, "with_video": 30}
    return {
        "settings": {"random_seeds": [0, 1], "shards": "shards"},
        "classes": CLASSES,
        "chance": 0.5,
        "clips": {
            "label": "label",
            "group": "speaker",
            "folds": 1,
            "labelled": 50,
            "left_out": {"without_label": 2, "not_selected": 0},
            "parts": {name: part for name in ("fit", "choose", "test")},
        },
        "unread": {},
        "streams_without_clips": {},
        "rows": rows,
        "differences": [{"of": of, "minus": minus, "uar": interval(value)} for of, minus, value in pairs],
        "trials": trials,
        "pretraining": {"clips": 40, "speakers": 5, "shared_with_test": {"ids": 0, "sources": 0, "speakers": 0}},
        "weights": {"pretrained": ["ab" * 32], "random": ["cd" * 32]},
        "shards": "ef" * 32,
        "licences": ["CC BY-NC-SA 4.0 <script>alert(1)</script>"],
        "versions": {"affekt": "0.1.0"},
        "seconds": {"features": 1.0, "fits_and_scores": 2.0},
    }


class Checker(HTMLParser):
    """Collects the text, and fails on tags that do not close or that reach outside the file."""

    VOID = ("meta", "img", "br", "line")

    def __init__(self):
        super().__init__()
        self.open, self.words, self.tags = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attributes:
            assert name not in ("href", "onclick") and (name != "src" or value.startswith("data:")), (tag, name, value)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.words.append(data)


def read(path):
    checker = Checker()
    checker.feed(path.read_text(encoding="utf-8"))
    checker.close()
    assert not checker.open
    return checker, " ".join(" ".join(checker.words).split())


def test_the_answer_comes_first_and_everything_is_inside_the_file(results, tmp_path):
    checker, text = read(write_report(tmp_path / "report.html", results=results, title="A <title>"))
    assert "script" not in checker.tags and "link" not in checker.tags
    assert "A <title>" in text and "joy & more" in text and "alert(1)" in text  # as words, not as tags
    assert checker.tags.count("b") == 3  # the tiles; none came from a label
    order = ["80.0 % UAR", "20.0 points", "What is taken for what", "Where in the network", "Limits and intended use"]
    assert [text.index(words) for words in order] == sorted(text.index(words) for words in order)
    for words in ("60.0 [50.0, 70.0]", "2 clips without a label were left out", "on 40 clips of 5 named speakers"):
        assert words in text, words
    assert not re.search(r"\bnan\b|\bNone\b(?! of them)|inf\b", text)


def test_a_difference_that_is_not_clear_is_not_called_a_gain(results, tmp_path):
    unclear = copy.deepcopy(results)
    for difference in unclear["differences"]:
        difference["uar"] = interval(0.05)
    _, text = read(write_report(tmp_path / "report.html", results=unclear))
    assert "not clearly apart from the same network" in text and "\u22125.0 to +15.0" in text
    for difference in unclear["differences"]:
        difference["uar"] = interval(-0.2)
    _, text = read(write_report(tmp_path / "report.html", results=unclear))
    assert "20.0 points below the same network" in text


def test_curves_and_pictures_of_the_run(results, tmp_path):
    run = tmp_path / "run"
    (run / "pictures").mkdir(parents=True)
    rows = [{"step": s, "loss_video": 1 / s, "loss_audio": 2 / s, "lr": 1e-3, "clips_per_s": 9.0} for s in (10, 20, 30)]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    for step in (10, 20, 30):
        plt.imsave(run / "pictures" / f"step-{step:06d}.png", np.zeros((4, 4, 3)))
    checker, text = read(write_report(tmp_path / "report.html", results=results, run_folder=run))
    assert "Reconstruction error" in text and "Contrast" not in text  # that loss is not in this run
    assert "After step 10" in text and "After step 30" in text and "After step 20" not in text
    assert checker.tags.count("img") == 2
    _, text = read(write_report(tmp_path / "report.html", results=results, run_folder=tmp_path / "no run"))
    assert "How it was learned" not in text


def test_one_stream_alone(results, tmp_path):
    alone = copy.deepcopy(results)
    alone["rows"] = [r for r in alone["rows"] if r["stream"] == "audio"]
    alone["trials"] = [t for t in alone["trials"] if t["stream"] == "audio"]
    alone["differences"] = [d for d in alone["differences"] if d["of"] == ("pretrained", "audio")]
    alone["streams_without_clips"] = {"video": "no clips to fit on"}
    alone["clips"]["group"] = "id"
    _, text = read(write_report(tmp_path / "report.html", results=alone))
    assert "From sound alone" in text and "Both streams" not in text
    assert "Video was not probed: no clips to fit on" in text and "clips it never met" in text


def test_ticks_enclose_the_values_at_round_steps():
    rng = np.random.default_rng(0)
    for _ in range(300):
        low, high = np.sort(rng.normal(0, 10.0 ** rng.integers(-6, 7), 2))
        ticks = nice_ticks(low, high)
        steps = np.diff(ticks)
        assert ticks[0] <= low + 1e-9 * abs(low) and ticks[-1] >= high - 1e-9 * abs(high) and 2 <= len(ticks) <= 8
        np.testing.assert_allclose(steps, steps[0], rtol=1e-6)
    assert nice_ticks(5, 5)[0] <= 5 <= nice_ticks(5, 5)[-1]
    assert x_ticks(1, 4) == [1, 2, 3, 4] and 0 in x_ticks(0, 1500)


def test_charts_leave_out_what_is_not_finite():
    chart = line_chart([Line("loss", [1, 2, 3], [1.0, float("nan"), 2.0], "red")], x_name="step")
    assert chart.count("polyline") == 1 and "nan" not in chart
    assert "Too few points" in line_chart([Line("loss", [1], [1.0], "red")], x_name="step")


def test_running_mean_equals_the_slow_one():
    values = np.random.default_rng(0).normal(size=20).tolist()
    assert smooth(values, 1) == pytest.approx(values)
    slow = [np.mean(values[max(i - 2, 0) : i + 3]) for i in range(20)]
    assert smooth(values, 5) == pytest.approx(slow)


def test_low_tones_are_at_the_bottom_of_a_spectrogram():
    wave = np.sin(2 * np.pi * 200 * np.arange(16000) / 16000).astype(np.float32)
    picture = spectrogram(wave).astype(int).sum((1, 2))
    assert picture.argmax() > 0.7 * len(picture)


def test_faces_are_of_different_speakers():
    class Clip:
        def __init__(self, name, speaker):
            self.id, self.meta = name, {"speaker": speaker}

    clips = [Clip(f"{speaker}{take}", speaker) for speaker in "abcdef" for take in range(5)]
    assert [clip.id for clip in spread(clips, 4)] == ["a0", "b0", "d0", "f0"]
    assert [clip.id for clip in spread(clips[:7], 4)] == ["a0", "b0", "a1", "a2"]


@pytest.mark.parametrize("values", [[0.0] * 3, [2.5] * 3, [-1.0] * 3, [1e-300] * 3, [0.0, 1e9, float("nan")]])
@pytest.mark.parametrize("zero", [False, True])
def test_constant_and_extreme_values_are_drawn_inside_of_a_chart(values, zero):
    chart = line_chart([Line("loss", [1, 2, 3], values, "red")], x_name="step", zero=zero)
    places = [float(pair.split(",")[1]) for pair in re.search(r'points="([^"]+)"', chart)[1].split()]
    assert len(places) == sum(value == value for value in values)
    assert (zero and min(values) < 0) or all(0 <= y <= 230 for y in places)
