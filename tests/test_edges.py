"""Edges of a picture as what an encoder tells: against a slow version, under light and colour, and learned."""

import cmath
import math

import pytest
import torch

from affekt.data.errors import SettingsError
from affekt.data.transforms import Inputs, normalise_picture
from affekt.pretrain.edges import CELLS, FAINT, NUM_EDGES, ORDERS, edges
from affekt.pretrain.export import create_encoder
from affekt.pretrain.hicmae import HiCMAE
from affekt.pretrain.masks import random_mask, tube_mask
from affekt.pretrain.registry import create_model, model_settings

SMALL = {"streams": "video", "embed_dim": 48, "depth": 2, "taps": (1, 2), "decoder_embed_dim": 32, "img_size": 32}


def slowly(picture: torch.Tensor, patch_size: int) -> torch.Tensor:
    """0..255 (3, H, W) -> (patches, NUM_EDGES), pixel by pixel."""
    grey = (picture.double() / 255).mean(0)
    height, width = grey.shape

    def at(y, x):
        return float(grey[min(max(y, 0), height - 1), min(max(x, 0), width - 1)])

    patches, cell = [], patch_size // CELLS
    for top in range(0, height, patch_size):
        for left in range(0, width, patch_size):
            values = []
            for cell_top in range(top, top + patch_size, cell):
                for cell_left in range(left, left + patch_size, cell):
                    sums = [0j] * (ORDERS + 1)
                    for y in range(cell_top, cell_top + cell):
                        for x in range(cell_left, cell_left + cell):
                            edge = complex(at(y, x + 1) - at(y, x - 1), at(y + 1, x) - at(y - 1, x))
                            for order in range(ORDERS + 1):
                                sums[order] += abs(edge) * cmath.exp(2j * order * cmath.phase(edge)) / cell**2
                    values += [sums[0].real, *(part for z in sums[1:] for part in (z.real, z.imag))]
            norm = math.sqrt(sum(v * v for v in values) / len(values) + FAINT**2)
            patches.append([v / norm for v in values])
    return torch.tensor(patches)


def films(count: int, frames: int = 4, side: int = 32) -> torch.Tensor:
    seed = torch.seed() % 2**31
    print(f"seed {seed}")
    small = torch.rand(count, 3, frames, 8, 8, generator=torch.Generator().manual_seed(seed)) * 255
    return torch.nn.functional.interpolate(small, (frames, side, side), mode="trilinear")


def test_edges_are_those_of_a_loop_over_pixels():
    video = films(2)
    found = edges(normalise_picture(video), 2, 16).view(2, 2, 4, NUM_EDGES)
    for clip in range(2):
        for step in range(2):  # the first frame of each tubelet
            torch.testing.assert_close(found[clip, step], slowly(video[clip, :, 2 * step], 16), rtol=1e-3, atol=1e-3)


def test_light_changes_little_and_a_blank_patch_has_no_edges():
    video = torch.rand(1, 3, 2, 32, 32, generator=torch.Generator().manual_seed(0)) * 255
    plain, darker = (edges(normalise_picture(x), 2, 16) for x in (video, video * 0.6 + 40))
    torch.testing.assert_close(darker, plain, atol=0.02, rtol=0.05)
    torch.testing.assert_close(edges(normalise_picture(255 - video), 2, 16), plain)  # dark on light as light on dark
    blank = edges(normalise_picture(torch.full((1, 3, 2, 32, 32), 90.0)), 2, 16)
    assert blank.isfinite().all() and blank.abs().max() < 1e-3
    faint = normalise_picture(90 + 0.5 * torch.randn(1, 3, 2, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert edges(faint, 2, 16).square().mean() < 0.1 < plain.square().mean()


def test_an_edge_says_which_way_it_runs():
    ramp = torch.arange(32.0) * 8
    across, along = ramp.expand(32, 32), ramp[:, None].expand(32, 32)
    for picture, sign in ((across, 1), (along, -1)):
        found = edges(normalise_picture(picture.expand(1, 3, 2, 32, 32)), 2, 16).view(4, CELLS, CELLS, -1)
        size, twice = found[..., 0], found[..., 1]
        torch.testing.assert_close(twice, sign * size, atol=1e-4, rtol=1e-4)  # cos of twice 0 or 90 degrees
        torch.testing.assert_close(found[..., 3], size, atol=1e-4, rtol=1e-4)  # and of four times
        assert found[..., [2, 4]].abs().max() < 1e-3


def test_edges_can_be_learned_from_visible_patches():
    """Of eight films, from half of their patches, better than any constant could; clips without a picture count
    for nothing."""
    torch.manual_seed(0)
    model = create_model("hicmae_nano", **SMALL, num_frames=4, mask_ratio_video=0.5, edges_weight=1.0)
    s, there = model.settings, torch.ones(8, dtype=torch.bool)
    inputs = Inputs(normalise_picture(films(8)), None, there, ~there, torch.zeros(8, dtype=torch.int64))
    optimizer, seen = torch.optim.AdamW(model.parameters(), 3e-3), []
    for step in range(150):
        keys = torch.arange(8) + 100 * step
        masks = tube_mask(keys, s.grid_video, 0.5), random_mask(keys, math.prod(s.grid_audio), 0.8)
        losses = model(inputs, *masks)
        torch.testing.assert_close(losses["loss"], losses["loss_video"] + losses["loss_edges"])
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        seen.append(losses["loss_edges"].item())
    target = edges(inputs.video, s.tubelet_size, s.patch_size)
    constant = (target - target.mean((0, 1))).square().mean().item()
    print(seen[0], seen[-1], constant)
    assert sum(seen[-5:]) / 5 < 0.6 * constant
    blind = Inputs(inputs.video, None, torch.arange(8) < 3, ~there, inputs.audio_frames)
    few = Inputs(inputs.video[:3], None, there[:3], ~there[:3], inputs.audio_frames[:3])
    masks_of_few = tube_mask(keys[:3], s.grid_video, 0.5), random_mask(keys[:3], math.prod(s.grid_audio), 0.8)
    torch.testing.assert_close(model(blind, *masks)["loss_edges"], model(few, *masks_of_few)["loss_edges"])


def test_settings_say_where_edges_have_no_effect_and_an_export_has_no_head():
    assert "edges_weight" in model_settings("hicmae_nano", streams="audio", edges_weight=1).without_effect
    with pytest.raises(SettingsError, match="patch_size 14 has to be divisible by 4"):
        model_settings("hicmae_nano", edges_weight=1, patch_size=14, img_size=112)
    plain, telling = (model_settings("hicmae_nano", **SMALL, edges_weight=weight) for weight in (0, 1))
    models = []
    for settings in (plain, telling):
        torch.manual_seed(0)
        models.append(HiCMAE(settings).state_dict())
    without, with_head = models
    assert with_head.keys() - without.keys() == {"edges.weight", "edges.bias"}
    assert all(torch.equal(x, with_head[name]) for name, x in without.items())  # pairs of runs start alike
    assert not any("edges" in name for name in create_encoder(telling, 4, {}).state_dict())
