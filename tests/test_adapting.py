"""Few weights beside a frozen encoder, and the running mean of the weights."""

import copy

import pytest
import torch

from affekt.data.errors import CheckpointError
from affekt.data.transforms import Inputs
from affekt.finetune.classifier import Classifier
from affekt.finetune.training.adapting import Adapter, Adapting, merge_lora
from affekt.finetune.training.ema import Ema
from affekt.finetune.training.layers import layer_ids
from affekt.pretrain.export import create_encoder
from affekt.pretrain.registry import model_settings

SMALL = {"embed_dim": 48, "depth": 2, "taps": (1, 2), "decoder_embed_dim": 32, "img_size": 32, "mel_frames": 64}


def make_classifier():
    torch.manual_seed(0)
    return Classifier(create_encoder(model_settings("hicmae_nano", **SMALL), 4, {}), 5)


def make_inputs(rows=4):
    generator = torch.Generator().manual_seed(1)
    video, audio = (torch.randn(rows, *shape, generator=generator) for shape in ((3, 8, 32, 32), (1, 64, 128)))
    has = torch.ones(rows, dtype=torch.bool)
    return Inputs(video, audio, has, has, torch.full((rows,), 64))


def train(model, steps=5):
    inputs, labels = make_inputs(), torch.arange(4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    "settings", [Adapting(lora_rank=3), Adapting(adapter_width=7), Adapting(lora_rank=2, adapter_width=5)]
)
def test_what_is_added_and_the_head_learn_and_nothing_else(settings):
    plain, model = make_classifier(), make_classifier()
    settings.add(model)
    inputs = make_inputs()
    assert torch.equal(model(inputs), plain(inputs))  # at first nothing changes
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = train(model)
    assert losses[-1] < losses[0] - 0.05
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    added = {name for name in trained if name.startswith("encoder.")}
    assert changed <= trained and {name for name in changed if name.startswith("encoder.")} == added
    assert added and all(name.rpartition(".")[0].endswith((".0", ".down", ".up")) for name in added)
    ids = layer_ids(model, 2, 1)
    assert {ids[name] for name in added} == {1, 2, 3}


def test_merged_lora_is_a_plain_model_that_says_the_same():
    plain, model = make_classifier(), Adapting(lora_rank=3, lora_alpha=9).add(make_classifier())
    train(model)
    inputs = make_inputs()
    with torch.no_grad():
        expected = model(inputs)
        low = model.encoder.encoder_video.blocks[1].attn.qkv.parametrizations.weight[0]
        by_hand = (
            model.encoder.encoder_video.blocks[1].attn.qkv.parametrizations.weight.original + 3 * low.up @ low.down
        )
        merge_lora(model)
        torch.testing.assert_close(model(inputs), expected)
    torch.testing.assert_close(model.encoder.encoder_video.blocks[1].attn.qkv.weight, by_hand)
    assert set(model.state_dict()) == set(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain(inputs), expected)


def test_targets_choose_the_linear_maps():
    model = Adapting(lora_rank=2, lora_targets=("fc1", "kv")).add(make_classifier())
    names = {name.partition(".parametrizations")[0].rpartition(".")[2] for name in dict(model.named_parameters())
             if ".parametrizations." in name}  # fmt: skip
    assert names == {"fc1", "kv"}
    assert not any(isinstance(part, Adapter) for part in model.modules())
    plain = make_classifier()
    assert Adapting().add(plain) is plain and all(p.requires_grad for p in plain.parameters())
    with pytest.raises(ValueError, match="lora_alpha: without lora_rank"):
        Adapting(lora_alpha=2.0)


def test_adapters_by_hand():
    model = Adapting(adapter_width=4).add(make_classifier())
    part = model.encoder.encoder_audio.blocks[0].mlp
    torch.nn.init.normal_(part.up.weight)
    x = torch.randn(2, 3, 48)
    hidden = (x @ part.down.weight.T + part.down.bias).clamp(min=0)
    slow = part.mlp(x) + 0.1 * (hidden @ part.up.weight.T + part.up.bias)
    torch.testing.assert_close(part(x), slow)


def test_the_mean_of_the_weights():
    model = make_classifier()
    ema, slow = Ema(model, 0.6), {name: p.detach().double() for name, p in model.named_parameters()}
    for step in range(8):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        ema.update(step)
        decay = min(0.6, (1 + step) / (10 + step))
        slow = {name: decay * slow[name] + (1 - decay) * p.detach().double() for name, p in model.named_parameters()}
    for name, mean in ema.means.items():
        torch.testing.assert_close(mean, slow[name].float(), atol=1e-5, rtol=1e-5)
    own = copy.deepcopy(model.state_dict())
    with ema.in_place():
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.detach(), slow[name].float(), atol=1e-5, rtol=1e-5)
    assert all(torch.equal(x, own[name]) for name, x in model.state_dict().items())
    with pytest.raises(ZeroDivisionError), ema.in_place():
        raise ZeroDivisionError
    assert all(torch.equal(x, own[name]) for name, x in model.state_dict().items())


def test_the_mean_goes_through_a_checkpoint_in_pieces():
    model = make_classifier()
    model.encoder.encoder_video.requires_grad_(False)
    ema = Ema(model, 0.9)
    train(model, steps=2)
    ema.update(0)
    name = "heads.both.linear.weight"
    weights = {f"weight/{key}": p.detach() for key, p in model.named_parameters() if key != name}
    flat = dict(model.named_parameters())[name].detach().view(-1)
    weights |= {f"weight/{name}@0": flat[:100], f"weight/{name}@100": flat[100:], f"exp_avg/{name}@0": flat[:100]}
    numbers = ema.numbers(weights)
    assert not any("encoder_video" in key or key.startswith("weight/") for key in numbers)
    joined = torch.cat((numbers.pop(f"ema/{name}@0"), numbers.pop(f"ema/{name}@100")))
    numbers[f"ema/{name}"] = joined.view(ema.means[name].shape)
    other = Ema(model, 0.9)
    assert not torch.equal(other.means[name], ema.means[name])
    other.restore(numbers)
    assert all(torch.equal(other.means[key], mean) for key, mean in ema.means.items())
    del numbers["ema/layer_weights_audio"]
    with pytest.raises(CheckpointError, match="mean of `layer_weights_audio`"):
        other.restore(numbers)
