"""The pieces of reports: line charts, spectrograms, the choice of clips to show."""

import re

import numpy as np
import pytest

from affekt.data.charts import Line, line_chart, nice_ticks, smooth, x_ticks
from affekt.finetune.report.gallery import spectrogram, spread


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
    nothing = line_chart([Line("wrong", [1, 2, 3], [0.0, 0.0, 0.0], "red")], x_name="kept", zero=True)
    assert "0.2" in nothing and "e-" not in nothing, "an axis for people"


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
