"""The model and its objectives against obvious slow versions."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from affekt.data.errors import SettingsError
from affekt.data.transforms import Inputs
from affekt.pretrain.hicmae import HiCMAE, patches_audio, patches_video, valid_audio_tokens
from affekt.pretrain.layers import LeanMlp, Mlp, attend
from affekt.pretrain.masks import random_mask, tube_mask
from affekt.pretrain.objectives import contrastive_loss, reconstruction_loss
from affekt.pretrain.patches import (
    factorised_positions,
    patchify_audio,
    patchify_video,
    unpatchify_audio,
    unpatchify_video,
)
from affekt.pretrain.registry import create_model, list_models, model_settings

SMALL = {"embed_dim": 48, "depth": 2, "taps": (1, 2), "decoder_embed_dim": 32, "img_size": 32, "mel_frames": 64}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return create_model("hicmae_nano", **SMALL)


def make_inputs(model, has_video=(True, True, True), has_audio=(True, True, True)):
    s, b = model.settings, len(has_video)
    generator = torch.Generator().manual_seed(1)
    video = torch.randn(b, 3, s.num_frames, s.img_size, s.img_size, generator=generator)
    audio = torch.randn(b, 1, s.mel_frames, s.mel_bins, generator=generator)
    frames = torch.full((b,), s.mel_frames)
    inputs = Inputs(video, audio, torch.tensor(has_video), torch.tensor(has_audio), frames)
    keys = torch.arange(b)
    mask_audio = random_mask(keys, s.grid_audio[0] * s.grid_audio[1], s.mask_ratio_audio)
    return inputs, tube_mask(keys, s.grid_video, 0.75), mask_audio


def test_sizes_have_the_published_parameter_counts():
    counts = {name: sum(p.numel() for p in create_model(name).parameters()) for name in list_models()}
    assert counts["hicmae_base"] == 99_609_344  # spec: 540 tensors, 99,609,344 numbers
    assert round(counts["hicmae_small"] / 1e6, 1) == 50.6
    assert counts["hicmae_tiny"] == pytest.approx(22.8e6, rel=0.01)
    assert 1e6 <= counts["hicmae_nano"] <= 2e6


def test_settings_name_the_way_out():
    with pytest.raises(SettingsError, match="img_size 100 is not divisible by patch_size 16; use 96 or 112"):
        model_settings("hicmae_nano", img_size=100)
    with pytest.raises(SettingsError, match=r"unknown model `hicmae_huge`.*hicmae_base"):
        create_model("hicmae_huge")
    with pytest.raises(SettingsError, match="did you mean `mask_ratio_video`"):
        create_model("hicmae_nano", mask_ratio_vido=0.5)
    with pytest.raises(SettingsError, match="taps"):
        create_model("hicmae_nano", taps=(2, 9))
    with pytest.raises(SettingsError, match=r"patch_size: .*greater than 0"):
        create_model("hicmae_nano", patch_size=0)
    with pytest.raises(SettingsError, match=r"mask_ratio_video 0\.02 hides none of 36 tokens"):
        create_model("hicmae_nano", mask_ratio_video=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_lean_mlp_keeps_less_and_computes_the_same(dtype):
    torch.manual_seed(0)
    plain, lean = Mlp(32, 128), LeanMlp(32, 128)
    lean.load_state_dict(plain.state_dict())
    found = []
    for module in (plain, lean):
        x, kept = torch.randn(4, 16, 32, generator=torch.Generator().manual_seed(1)).requires_grad_(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                out = module(x)
        out.float().square().sum().backward()
        gradients = [parameter.grad for parameter in module.parameters()]
        found.append(([out, x.grad, *gradients], sum(t.numel() == 4 * 16 * 128 for t in kept)))
    assert all(map(torch.equal, found[0][0], found[1][0]))
    assert [count for _, count in found] == [2, 1]  # before and after the activation, or before it alone


def test_patches_round_trip():
    video, mel = torch.randn(2, 3, 8, 32, 48), torch.randn(2, 1, 64, 128)
    assert torch.equal(unpatchify_video(patchify_video(video, 2, 16), (4, 2, 3), 2, 16), video)
    assert torch.equal(unpatchify_audio(patchify_audio(mel, 16), (4, 8), 16), mel)
    # the first vector is the first tubelet in (frame, y, x, channel) order
    first = video[0, :, :2, :16, :16].permute(1, 2, 3, 0).flatten()
    assert torch.equal(patchify_video(video, 2, 16)[0, 0], first)


def test_only_visible_tokens_are_embedded(model):
    """What is hidden can be anything: every encoder output and every prediction stays bit by bit."""
    inputs, mask_video, mask_audio = make_inputs(model)
    s = model.settings
    video, audio = patches_video(inputs, s), patches_audio(inputs, s)
    video = video.scatter(1, mask_video.ids_mask[..., None].expand(-1, -1, video.shape[-1]), 1e3)
    audio = audio.scatter(1, mask_audio.ids_mask[..., None].expand(-1, -1, audio.shape[-1]), 1e3)
    changed = replace(
        inputs,
        video=unpatchify_video(video, s.grid_video, s.tubelet_size, s.patch_size),
        audio=unpatchify_audio(audio, s.grid_audio, s.patch_size_audio),
    )
    assert not torch.equal(changed.video, inputs.video) and not torch.equal(changed.audio, inputs.audio)
    seen = []
    for module in (model.encoder_video, model.encoder_audio, model.encoder_fusion):
        module.register_forward_hook(lambda _module, _inputs, outputs: seen.append(outputs))
    (before, taps), (after, taps_after) = (model.reconstruct(x, mask_video, mask_audio) for x in (inputs, changed))
    assert len(seen) == 6
    pairs = [pair for i in range(3) for pair in zip(seen[i], seen[i + 3], strict=True)]
    for stream in ("video", "audio"):
        pairs += [(before[stream], after[stream]), *zip(taps[stream], taps_after[stream], strict=True)]
    assert len(pairs) == 2 * s.depth + 2 + 2 + 2 * len(s.taps) and all(torch.equal(a, b) for a, b in pairs)


def test_the_compiled_step_is_the_step(model):
    """Forward pass, losses and gradients as one graph without a break; its code generation is left to torch's tests."""
    inputs = make_inputs(model)
    expected = model(*inputs)
    expected["loss"].backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    found = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")(*inputs)
    found["loss"].backward()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)


def test_contradictions_are_told():
    with pytest.raises(SettingsError, match="contrast_weight 0 nothing trains projection heads"):
        model_settings("hicmae_nano", projector_dim=16, contrast_weight=0)
    with pytest.raises(SettingsError, match="two channels for each of three axes"):
        model_settings("hicmae_nano", positions="factorised", decoder_embed_dim=4)
    changed = {"mask_ratio_video": 0.5, "mask_ratio_audio": 0.5, "contrast_weight": 0.1}
    assert model_settings("hicmae_nano", **changed).without_effect == []
    assert model_settings("hicmae_nano", streams="audio", **changed).without_effect == [
        "mask_ratio_video",
        "contrast_weight",
    ]


def test_a_clip_without_sound_changes_nothing_else(model):
    """The absent stream is left out: what stands in its place has no influence, and no loss or gradient comes of it."""
    inputs, mask_video, mask_audio = make_inputs(model, has_audio=(True, False, True))
    losses = model(inputs, mask_video, mask_audio)
    inputs = replace(inputs, audio=inputs.audio.index_fill(0, torch.tensor([1]), 7.0).requires_grad_())
    again = model(inputs, mask_video, mask_audio)
    for name, value in losses.items():
        assert torch.equal(value, again[name]), name
    again["loss"].backward()
    assert not inputs.audio.grad[1].any() and inputs.audio.grad[0].any()


def test_absent_context_equals_no_context(model):
    """A gated clip in a mixed batch comes out as from a fusion that has no second stream at all."""
    inputs, mask_video, mask_audio = make_inputs(model, has_audio=(True, False, True))
    layers = model.encoder_video(patches_video(inputs, model.settings), mask_video.ids_keep)
    x = model.encoder_video.norm(layers[-1])
    audio = torch.randn(3, mask_audio.ids_keep.shape[1], x.shape[-1])
    fused, _ = model.encoder_fusion(x, audio, inputs.has_video, inputs.has_audio)
    alone = x
    for block in model.encoder_fusion.blocks_video:
        alone = block(alone, None)
    alone = model.encoder_fusion.norm_video(alone)
    torch.testing.assert_close(fused[1], alone[1])
    assert (fused[0] - alone[0]).abs().max() > 1e-3


def test_single_stream_models_have_that_stream_alone():
    model = create_model("hicmae_nano", streams="audio", **SMALL)
    assert not any("video" in name or "fusion" in name for name, _ in model.named_parameters())
    losses = model(*make_inputs(model))
    assert set(losses) == {"loss", "loss_audio"}


def test_reconstruction_loss_against_a_loop():
    prediction, target = torch.randn(3, 5, 7), torch.randn(3, 5, 7)
    weight = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 1, 0, 0, 0]], dtype=torch.float)
    slow = [((prediction[i, j] - target[i, j]) ** 2).mean() for i in range(3) for j in range(5) if weight[i, j]]
    torch.testing.assert_close(reconstruction_loss(prediction, target, weight), torch.stack(slow).mean())
    assert reconstruction_loss(prediction, target, torch.zeros(3, 5)) == 0


def test_contrastive_loss_against_a_loop():
    video, audio = torch.randn(4, 8, dtype=torch.float64), torch.randn(4, 8, dtype=torch.float64)
    paired = torch.tensor([True, False, True, True])
    rows = [0, 2, 3]
    v, a = F.normalize(video[rows], dim=-1), F.normalize(audio[rows], dim=-1)
    logits = v @ a.T / 0.07
    slow = torch.tensor(0.0, dtype=torch.float64)
    for i in range(3):
        slow += -(logits[i, i] - logits[i].logsumexp(0)) / 6 - (logits[i, i] - logits[:, i].logsumexp(0)) / 6
    torch.testing.assert_close(contrastive_loss(video, audio, paired, 0.07), slow, rtol=1e-12, atol=1e-12)
    assert contrastive_loss(video, audio, torch.zeros(4, dtype=torch.bool), 0.07) == 0


def test_padded_sound_weighs_nothing(model):
    inputs, mask_video, mask_audio = make_inputs(model)
    inputs = replace(inputs, audio_frames=torch.tensor([64, 32, 64]))
    first = model(inputs, mask_video, mask_audio)["loss_audio"]
    hidden = mask_audio.hidden[1].unflatten(0, model.settings.grid_audio)
    hidden[:2] = False  # hidden tokens of the padding alone: visible ones would change what the encoder sees
    mel = hidden.repeat_interleave(16, 0).repeat_interleave(16, 1)
    padding = torch.stack([torch.zeros_like(mel), mel, torch.zeros_like(mel)])[:, None]
    inputs = replace(inputs, audio=torch.where(padding, 9.0, inputs.audio))
    torch.testing.assert_close(first, model(inputs, mask_video, mask_audio)["loss_audio"])


def test_a_sound_shorter_than_the_visible_share_brings_no_padding_along(model):
    """One clip has 8 real tokens of 32 and 16 are visible: what stands in the padding changes nothing anywhere."""
    inputs, mask_video, _ = make_inputs(model)
    inputs = replace(inputs, audio_frames=torch.tensor([64, 16, 64]))
    valid = valid_audio_tokens(inputs.audio_frames, model.settings)
    mask_audio = random_mask(torch.arange(3), 32, 0.5, valid)
    assert mask_audio.valid_keep.sum(1).tolist() == [16, 8, 16]
    first = model(inputs, mask_video, mask_audio)
    audio = inputs.audio.clone()
    audio[1, :, 16:] = 9.0
    again = model(replace(inputs, audio=audio), mask_video, mask_audio)
    for name, value in first.items():
        torch.testing.assert_close(again[name], value, msg=name)
    full = replace(mask_audio, valid_keep=None)
    assert (model(replace(inputs, audio=audio), mask_video, full)["loss"] - first["loss"]).abs() > 1e-3


def test_every_parameter_gets_a_gradient():
    torch.manual_seed(0)
    model = create_model("hicmae_nano", projector_dim=24, **SMALL)
    model(*make_inputs(model))["loss"].backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_the_last_block_finishes_hidden_tokens_alone(model):
    """As if it had computed all of them."""
    inputs, mask_video, mask_audio = make_inputs(model)
    predictions, taps = model.reconstruct(inputs, mask_video, mask_audio)
    decoder, ids_keep, ids_mask = model.decoder_audio, mask_audio.ids_keep, mask_audio.ids_mask
    video = model.encoder_video.norm(
        model.encoder_video(patches_video(inputs, model.settings), mask_video.ids_keep)[-1]
    )
    audio = model.encoder_audio.norm(model.encoder_audio(patches_audio(inputs, model.settings), ids_keep)[-1])
    _, fused = model.encoder_fusion(video, audio, inputs.has_video, inputs.has_audio)
    positions = decoder.pos_embed[0]
    x = torch.cat((decoder.decoder_embed(fused) + positions[ids_keep], decoder.mask_token + positions[ids_mask]), 1)
    x = decoder.blocks[0](x)
    for block, tap in zip(decoder.blocks[1:], reversed(taps["audio"])):
        x = block(x, decoder.decoder_embed(tap) + positions[ids_keep])
    slow = decoder.decoder_pred(decoder.norm(x))[:, ids_keep.shape[1] :]
    torch.testing.assert_close(predictions["audio"], slow)


def test_checkpointing_changes_no_gradient():
    torch.manual_seed(0)
    model = create_model("hicmae_nano", drop_path=0.3, **SMALL).train()
    gradients = []
    for saving in (False, True):
        model.set_grad_checkpointing(saving)
        model.zero_grad()
        torch.manual_seed(1)
        model(*make_inputs(model))["loss"].backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_bf16_attention_on_a_cpu_is_attention(model):
    q, k, v = (torch.randn(2, 30, 48) for _ in range(3))
    valid = torch.rand(2, 30) > 0.3
    exact = attend(q, k, v, 3, valid)
    rounded = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), 3, valid)
    assert rounded.dtype == torch.bfloat16 and (rounded.float() - exact).abs().max() < 0.03
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(*make_inputs(model))
    assert all(value.dtype == torch.float32 for value in losses.values())
    assert losses["loss"].item() == pytest.approx(model(*make_inputs(model))["loss"].item(), rel=0.02)


def test_factorised_positions_tell_axes_apart():
    table = factorised_positions((4, 3, 5), 50)[0]
    assert table.shape == (60, 50)
    grid = table.unflatten(0, (4, 3, 5))
    assert torch.equal(grid[1, :, :, :18], grid[1, :1, :1, :18].expand(3, 5, 18))  # time alone
    assert torch.equal(grid[:, 2, :, 18:34], grid[:1, 2, :1, 18:34].expand(4, 5, 16))  # row alone
    assert torch.equal(grid[:, :, 4, 34:], grid[:1, :1, 4, 34:].expand(4, 3, 16))  # column alone
    assert len(torch.unique(table, dim=0)) == 60
    model = create_model("hicmae_nano", positions="factorised", **SMALL)
    assert not torch.equal(model.encoder_video.pos_embed, create_model("hicmae_nano", **SMALL).encoder_video.pos_embed)


def test_mean_over_taps_is_a_share_of_their_sum(model):
    inputs = make_inputs(model)
    summed = model(*inputs)["loss_contrast"]
    mean = HiCMAE(model.settings.model_copy(update={"contrast_taps": "mean"}))
    mean.load_state_dict(model.state_dict())
    torch.testing.assert_close(mean(*inputs)["loss_contrast"], summed / 2)


def test_inputs_of_another_shape_are_told(model):
    inputs, mask_video, mask_audio = make_inputs(model)
    with pytest.raises(SettingsError, match=r"video is \(3, 3, 8, 32, 16\), the model takes \(B, 3, 8, 32, 32\)"):
        model(replace(inputs, video=inputs.video[..., :16]), mask_video, mask_audio)
    with pytest.raises(SettingsError, match=r"audio is \(3, 1, 48, 128\), the model takes \(B, 1, 64, 128\)"):
        model(replace(inputs, audio=inputs.audio[:, :, :48]), mask_video, mask_audio)
