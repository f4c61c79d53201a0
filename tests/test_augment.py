"""What is varied of a view: the published crops and gains, each drawn from numbers of its own."""

import random

import numpy as np
import pytest
import torch
from scipy.stats import beta, kstest
from scipy.stats import uniform as uniform_law

import affekt.data.torch_extensions  # noqa: F401 (lets timm import beside a CPU build of torch)
from affekt.data.augment import CROP_OFFSETS, Augment
from affekt.data.order import clip_key
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


def test_random_resized_crops_keep_to_their_area_and_aspect():
    augment, size = Augment(crop_area=(0.08, 1.0)), 160
    boxes = np.array([augment.crop(size, 0, 0, f"clip{i}") for i in range(3000)]) * size
    assert np.abs(boxes - boxes.round()).max() < 1e-9 and boxes.min() >= 0 and boxes.max() <= size
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area, aspect = width * height / size**2, width / height
    assert 0.07 < area.min() < 0.1 and 0.9 < area.max() <= 1 and 0.45 < area.mean() < 0.56
    inner = (area < 0.5) & (area > 0.1)  # where no aspect is refused for want of room
    assert kstest(np.log(aspect[inner]), uniform_law(-np.log(4 / 3), 2 * np.log(4 / 3)).cdf).pvalue > 1e-4
    assert (boxes[:, 0] > 0).any() and (boxes[:, 3] < size).any()
    with pytest.raises(ValueError, match="set one"):
        Augment(crop_area=(0.5, 1), crop_scales=(1.0, 0.5))
    with pytest.raises(ValueError, match="the least comes first"):
        Augment(crop_area=(1, 0.5))


def test_all_pictures_of_a_clip_get_the_operations_that_timm_would_do():
    """The twin: timm's own transform of one picture, from the same state of the generators of the process."""
    from PIL import Image
    from timm.data.auto_augment import rand_augment_transform

    recipe = "rand-m7-n4-mstd0.5-inc1"
    augment, rng = Augment(rand_augment=recipe), np.random.default_rng(0)
    first = rng.integers(0, 256, (32, 32, 3), np.uint8)
    video = np.stack([first, first, rng.integers(0, 256, (32, 32, 3), np.uint8)])
    twin = rand_augment_transform(recipe, {"translate_const": 14, "interpolation": Image.BICUBIC})
    before, results = (random.getstate(), np.random.get_state()[1].copy()), []
    for clip in map(str, range(30)):
        varied = augment.pictures(video, 0, 0, clip)
        assert varied.dtype == np.uint8 and varied is not video and np.array_equal(varied[0], varied[1])
        assert np.array_equal(varied, augment.pictures(video, 0, 0, clip))
        results.append(varied[0].tobytes())
        key = clip_key(0, 0, clip) % 2**32
        assert random.getstate() == before[0] and np.array_equal(np.random.get_state()[1], before[1])
        random.seed(key)
        np.random.seed(key)
        assert np.array_equal(varied[2], np.asarray(twin(Image.fromarray(video[2]))))
        random.setstate(before[0])
        np.random.seed(0)
        before = random.getstate(), np.random.get_state()[1].copy()
    assert len(set(results)) > 20
    assert Augment().pictures(video, 0, 0, "0") is video
    with pytest.raises(ValueError, match="none of timm's"):
        Augment(rand_augment="rand-z9")
