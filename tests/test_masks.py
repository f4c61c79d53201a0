"""Masks: fixed counts, tubes, keyed by clip, padding hidden first."""

import random

import torch

from affekt.pretrain.masks import Mask, random_mask, tube_mask


def test_counts_and_partition_over_random_shapes():
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(200):
        grid = (rng.randint(1, 8), rng.randint(1, 10), rng.randint(2, 10))
        ratio, keys = rng.uniform(0.01, 0.99), torch.tensor([rng.randrange(-(2**63), 2**63) for _ in range(3)])
        spatial = grid[1] * grid[2]
        for mask, hidden_count, total in (
            (tube_mask(keys, grid, ratio), grid[0] * int(ratio * spatial), grid[0] * spatial),
            (random_mask(keys, spatial, ratio), int(ratio * spatial), spatial),
        ):
            assert mask.ids_mask.shape == (3, hidden_count)
            both = torch.cat((mask.ids_keep, mask.ids_mask), 1).sort(1)[0]
            assert torch.equal(both, torch.arange(total).expand(3, -1))
            assert torch.equal(mask.hidden.sum(1), torch.full((3,), hidden_count))


def test_tubes_hide_the_same_place_at_every_time():
    hidden = tube_mask(torch.arange(5), (4, 6, 6), 0.75).hidden.unflatten(1, (4, 36))
    assert (hidden == hidden[:, :1]).all()
    assert len({tuple(row.tolist()) for row in hidden[:, 0]}) == 5


def test_masks_depend_on_the_key_alone():
    keys = torch.tensor([7, 123, 99])
    together = random_mask(keys, 64, 0.8)
    for row, key in enumerate(keys):
        alone = random_mask(key[None], 64, 0.8)
        assert torch.equal(alone.ids_keep[0], together.ids_keep[row])


def test_padding_is_hidden_first():
    valid = torch.ones(2, 64, dtype=torch.bool)
    valid[0, 20:] = False
    mask = random_mask(torch.arange(2), 64, 0.75, valid)
    assert (mask.ids_keep[0] < 20).all()
    assert (mask.ids_keep[1] >= 20).any()


def test_from_hidden_inverts_hidden():
    mask = random_mask(torch.arange(4), 50, 0.8)
    again = Mask.from_hidden(mask.hidden)
    assert torch.equal(again.ids_keep, mask.ids_keep) and torch.equal(again.ids_mask, mask.ids_mask)


def test_visible_padding_is_marked():
    valid = torch.ones(3, 64, dtype=torch.bool)
    valid[0, 10:], valid[1] = False, False
    mask = random_mask(torch.arange(3), 64, 0.75, valid)
    assert torch.equal(mask.valid_keep[0], mask.ids_keep[0] < 10) and mask.valid_keep[0].sum() == 10
    assert mask.valid_keep[1:].all()  # a clip without the stream counts as full
    assert random_mask(torch.arange(3), 64, 0.75, torch.ones(3, 64, dtype=torch.bool)).valid_keep is None
