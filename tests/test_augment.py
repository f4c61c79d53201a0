"""What is varied of a view: the published crops and gains, each drawn from numbers of its own."""

import numpy as np
import torch
from scipy.stats import beta, kstest

from affekt.data.augment import CROP_OFFSETS, Augment
from affekt.data.transforms import vary_sound


def test_crops_are_those_of_multi_scale_cropping():
    augment, size = Augment(), 160
    boxes = [augment.crop(size, 0, 0, f"clip{i}") for i in range(3000)]
    sides, places = set(), set()
    for x0, y0, x1, y1 in boxes:
        assert 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1
        assert all(abs(v * size - round(v * size)) < 1e-9 for v in (x0, y0, x1, y1))
        width, height = round((x1 - x0) * size), round((y1 - y0) * size)
        sides.add((width, height))
        if width < size and height < size:
            places.add((round(x0 * size) // ((size - width) // 4), round(y0 * size) // ((size - height) // 4)))
    scales = [160, 140, 120, 105]
    assert sides == {(w, h) for i, w in enumerate(scales) for j, h in enumerate(scales) if abs(i - j) <= 1}
    assert places == set(CROP_OFFSETS) and len(places) == 13
    flipped = [Augment(flip=True).crop(size, 0, 0, f"clip{i}") for i in range(3000)]
    assert 1300 < sum(x0 > x1 for x0, _, x1, _ in flipped) < 1700
    assert all(sorted((a[0], a[2])) == [b[0], b[2]] and a[1::2] == b[1::2] for a, b in zip(flipped, boxes))


def test_gain_is_beta_distributed():
    gains = [Augment().sound(100, 0, 0, f"c{i}")[0] - 0.5 for i in range(2000)]
    assert kstest(gains, beta(10, 10).cdf).pvalue > 1e-4
    assert Augment(gain=False).sound(100, 0, 0, "c1") == (1.0, 0)


def test_roll_really_shifts_the_sound_and_not_its_padding():
    rolls = [Augment(gain=False, roll=True).sound(100, 0, 0, f"c{number}")[1] for number in range(300)]
    assert len(set(rolls)) > 80 and min(rolls) >= 0 and max(rolls) < 100
    valid = torch.tensor([100, 37, 0, 120])
    sound = torch.arange(1.0, 121.0).repeat(4, 1) * (torch.arange(120) < valid[:, None])
    roll, gain = torch.tensor([rolls[0], 36, 0, 119]), torch.tensor([0.5, 1.5, 2.0, 1.0])
    varied = vary_sound(sound, valid, gain, roll)
    for row, length, shift, factor, before in zip(varied, valid, roll, gain, sound, strict=True):
        expected = np.concatenate((np.roll(before[:length], int(shift)), before[length:])) * factor.numpy()
        assert np.array_equal(row, expected)
    assert vary_sound(sound, valid, None, None) is sound
