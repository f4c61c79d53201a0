"""Random erasing: one box for all pictures of a clip, drawn from the clip's key."""

import numpy as np
import torch

from affekt.data.order import clip_key
from affekt.data.transforms import Inputs
from affekt.finetune.training.erasing import Erasing


def keys_of(count):
    return [clip_key(0, 0, f"clip{i}") for i in range(count)]


def inputs_of(video):
    has = torch.ones(len(video), dtype=torch.bool)
    return Inputs(video, None, has, ~has, torch.zeros(len(video), dtype=torch.long))


def test_boxes_lie_where_they_are_said_to_in_all_pictures():
    erasing, keys, video = Erasing(share=0.5), keys_of(200), torch.full((200, 3, 4, 40, 30), 9.0)
    erased = erasing.erase(inputs_of(video), keys).video
    areas, aspects = [], []
    for row, key in enumerate(keys):
        changed = (erased[row] != 9).flatten(0, 1).numpy()
        box = erasing.box(key, 40, 30)
        if box is None:
            assert not changed.any()
            continue
        slow = np.zeros((40, 30), bool)
        slow[box[0] : box[0] + box[2], box[1] : box[1] + box[3]] = True
        assert box[0] + box[2] <= 40 and box[1] + box[3] <= 30 and (changed == slow).all()
        areas.append(slow.mean())
        aspects.append(box[2] / box[3])
    assert 70 < len(areas) < 130 and min(areas) > 0.01 and 0.25 < max(areas) < 0.36
    assert min(aspects) < 0.5 and max(aspects) > 2
    noise = erased[erased != 9]
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    assert (erased[:, :, 0] != erased[:, :, 1]).any()  # another number at every pixel


def test_a_clip_is_erased_alike_in_any_batch_and_not_at_all_by_default():
    erasing, keys, video = Erasing(share=0.5), keys_of(12), torch.zeros(12, 3, 2, 16, 16)
    whole = erasing.erase(inputs_of(video), keys).video
    assert torch.equal(erasing.erase(inputs_of(video[3:7]), keys[3:7]).video, whole[3:7])
    assert Erasing().erase(inputs_of(video), keys).video is video and not video.any()
