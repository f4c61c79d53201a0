"""Checkpoints: what is saved comes back bit by bit, damage is refused, a failed write costs nothing."""

import errno
import json
import os
from itertools import pairwise

import pytest
import torch
from torch import nn

from affekt.data.errors import CheckpointError
from affekt.pretrain import checkpoint as module
from affekt.pretrain.checkpoint import find_checkpoint, load_optimizer, read_checkpoint, save_checkpoint
from affekt.pretrain.loop import open_run
from affekt.pretrain.optim import OptimSettings, clip_gradients, create_optimizer, lr_at
from affekt.pretrain.seen import stamped, with_seen_before


def trained_model(steps: int = 3) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    optimizer = create_optimizer(model, OptimSettings())
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    train(model, optimizer, steps)
    return model, optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    generator = torch.Generator().manual_seed(steps)
    for _ in range(steps):
        model(torch.randn(16, 4, generator=generator)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_weights_and_moments_come_back_bit_by_bit(tmp_path):
    model, optimizer = trained_model()
    path = save_checkpoint(tmp_path, 3, model, optimizer, {"note": "ü"}, keep_last=2)
    state, weights, moments = read_checkpoint(path)
    assert state == {"step": 3, "note": "ü"}
    again, again_optimizer = trained_model(steps=1)
    again.load_state_dict(weights)
    load_optimizer(again, again_optimizer, moments)
    train(model, optimizer, 2)
    train(again, again_optimizer, 2)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_only_the_newest_stay_and_the_pointer_names_the_last(tmp_path):
    model, optimizer = trained_model()
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, step, model, optimizer, {}, keep_last=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000003", "step-00000004"]
    assert (tmp_path / "latest").read_text() == "step-00000004"
    assert find_checkpoint(tmp_path, "auto").name == find_checkpoint(tmp_path, "latest").name == "step-00000004"


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_damage_is_refused_before_anything_is_parsed(tmp_path, name, damage):
    path = save_checkpoint(tmp_path, 1, *trained_model(), {}, keep_last=1) / name
    content = bytearray(path.read_bytes())
    if damage == "delete":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content if damage == "flip" else content[:-3])
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        read_checkpoint(path.parent)


def test_another_major_version_is_refused_and_a_newer_minor_read(tmp_path):
    path = save_checkpoint(tmp_path, 1, *trained_model(), {}, keep_last=1)
    manifest = json.loads((path / "manifest.json").read_text())
    for version, good in (("1.9", True), ("2.0", False)):
        (path / "manifest.json").write_text(json.dumps({**manifest, "version": version}))
        if good:
            read_checkpoint(path)
        else:
            with pytest.raises(CheckpointError, match=r"version 2\.0.*reads 1\.x"):
                read_checkpoint(path)


def test_a_full_disk_leaves_the_older_checkpoint_and_no_partial_folder(tmp_path, monkeypatch):
    model, optimizer = trained_model()
    save_checkpoint(tmp_path, 1, model, optimizer, {}, keep_last=1)

    def full(*_args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save_checkpoint(tmp_path, 2, model, optimizer, {}, keep_last=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]
    read_checkpoint(find_checkpoint(tmp_path, "latest"))


def test_resume_never_starts_silently_at_zero(tmp_path):
    assert find_checkpoint(tmp_path / "none", "auto") is None
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        find_checkpoint(tmp_path / "none", "latest")
    (tmp_path / "step-00000001").mkdir()  # what a copy that broke off leaves behind
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        find_checkpoint(tmp_path, "auto")
    with pytest.raises(CheckpointError, match="not a checkpoint folder"):
        find_checkpoint(tmp_path, str(tmp_path / "step-00000001"))


def test_a_lost_pointer_falls_back_to_the_newest_with_a_note(tmp_path, capsys):
    model, optimizer = trained_model()
    for step in (1, 2):
        save_checkpoint(tmp_path, step, model, optimizer, {}, keep_last=2)
    (tmp_path / "latest").unlink()
    assert find_checkpoint(tmp_path, "auto").name == "step-00000002"
    assert "step-00000002" in capsys.readouterr().err


def test_an_older_checkpoint_is_not_resumed_beside_newer_ones(tmp_path):
    """Its checkpoints would be purged or passed over in favour of those of the run it leaves."""
    model, optimizer = trained_model()
    older, newer = (save_checkpoint(tmp_path / "checkpoints", s, model, optimizer, {}, keep_last=2) for s in (1, 2))
    with pytest.raises(CheckpointError, match=r"holds step-00000002.*out=") as caught:
        open_run(tmp_path, str(older))
    assert str(older) in str(caught.value)
    assert open_run(tmp_path, str(newer)) == newer == open_run(tmp_path, "auto")
    assert open_run(tmp_path / "another", str(older)) == older
    with pytest.raises(CheckpointError, match="--resume auto"):
        open_run(tmp_path, None)


def test_what_a_resumed_run_has_seen_is_not_forgotten(tmp_path):
    checkpoint = tmp_path / "checkpoints" / "step-00000001"
    now = {"ids": ["b", "c"], "sources": [], "speakers": ["t"], "licences": ["CC0"], "data_sets": [], "prepare": {}}
    now["without_speaker"] = 2
    with pytest.raises(CheckpointError, match=r"pretrain_data\.json.*what the weights have seen"):
        with_seen_before(now, checkpoint)
    (tmp_path / "pretrain_data.json").write_text(json.dumps(stamped({**now, "ids": ["a", "b"], "speakers": ["s"]})))
    assert with_seen_before(now, checkpoint) == {**now, "ids": ["a", "b", "c"], "speakers": ["s", "t"]}


def test_decay_spares_biases_norms_and_mask_tokens():
    from affekt.pretrain.registry import create_model

    model = create_model("hicmae_nano")
    decayed, free = create_optimizer(model, OptimSettings(weight_decay=0.3)).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.3, 0.0)
    assert {names[id(p)].rsplit(".", 1)[1] for p in decayed["params"]} == {"weight"}
    assert {"decoder_video.mask_token", "decoder_audio.mask_token"} <= {names[id(p)] for p in free["params"]}
    assert len(decayed["params"]) + len(free["params"]) == len(names)
    published, _ = create_optimizer(model, OptimSettings(decay_mask_token_audio=True)).param_groups
    more = {names[id(p)] for p in published["params"]} - {names[id(p)] for p in decayed["params"]}
    assert more == {"decoder_audio.mask_token"}


def test_gradients_are_measured_and_clipped_where_asked():
    model = torch.nn.Linear(3, 1)
    model(torch.full((1, 3), 10.0)).sum().backward()
    norm = (300 + 1) ** 0.5
    assert clip_gradients(model, 0.0).item() == pytest.approx(norm) and model.weight.grad[0, 0] == 10
    assert clip_gradients(model, 2.0).item() == pytest.approx(norm)
    assert clip_gradients(model, 0.0).item() == pytest.approx(2.0, rel=1e-4)


def test_the_learning_rate_warms_up_and_falls_to_its_floor():
    settings = OptimSettings(base_lr=1e-3, min_lr=1e-5, warmup_share=0.1)
    rates = [lr_at(step, 100, settings, global_batch=512) for step in range(100)]
    assert rates[0] == pytest.approx(2e-4) and max(rates) == rates[9] == rates[10] == pytest.approx(2e-3)
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(2e-5, rel=0.05)
