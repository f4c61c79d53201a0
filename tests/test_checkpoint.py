"""Checkpoints: what is saved comes back bit by bit, damage is refused, a failed write costs nothing."""

import errno
import json
import os
import shutil
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from affekt.data.errors import CheckpointError
from affekt.data.files import hash_file
from affekt.pretrain import checkpoint as checkpoints
from affekt.pretrain import writing
from affekt.pretrain.checkpoint import find_checkpoint, read_checkpoint
from affekt.pretrain.optim import OptimSettings, clip_gradients, create_optimizer, lr_at
from affekt.pretrain.pieces import numbers_to_save, restore_moments
from affekt.pretrain.run_folder import open_run
from affekt.pretrain.saver import Saver
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


def plain(model: nn.Module, optimizer: torch.optim.Optimizer) -> SimpleNamespace:
    """As much of an engine at stage 0 as checkpoints look at."""
    return SimpleNamespace(module=model, optimizer=optimizer, zero_optimization_stage=lambda: 0)


def numbers(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return numbers_to_save(plain(model, optimizer), 0, 1)


def begin(saver: Saver, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, **state: object) -> Path:
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    saver.save(step, numbers(model, optimizer), {"shapes": shapes, **state}, {"zero_stage": 0})
    return saver.folder / f"step-{step:08d}"


def save(folder: Path, step: int, model=None, optimizer=None, keep_last=2, **state: object) -> Path:
    """One checkpoint, of a model of its own where none is given, on the disk when it returns."""
    if model is None:
        model, optimizer = trained_model()
    with Saver(folder, keep_last) as saver:
        return begin(saver, step, model, optimizer, **state)


def test_weights_and_moments_come_back_bit_by_bit(tmp_path):
    model, optimizer = trained_model()
    path = save(tmp_path, 3, model, optimizer, note="ü")
    state, weights, moments = read_checkpoint(path)
    assert state == {"step": 3, "note": "ü", "shapes": {name: list(p.shape) for name, p in model.named_parameters()}}
    again, again_optimizer = trained_model(steps=0)
    again.load_state_dict(weights)
    restore_moments(plain(again, again_optimizer), moments)
    second = read_checkpoint(save(tmp_path, 4, again, again_optimizer))  # saved right after it was loaded
    assert all(torch.equal(x, second[1][name]) for name, x in weights.items()) and len(weights) == len(second[1])
    assert all(torch.equal(x, second[2][name]) for name, x in moments.items()) and len(moments) == len(second[2])
    train(model, optimizer, 2)
    train(again, again_optimizer, 2)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_is_saved_is_the_moment_of_the_save(tmp_path, monkeypatch):
    """The writer is slow and the weights move on: twenty saves, each equal to what it was asked to hold."""
    monkeypatch.setattr(writing, "point", lambda name, count=0: time.sleep(0.005))
    model, optimizer = trained_model()
    with Saver(tmp_path, keep_last=20) as saver:
        expected = []
        for step in range(20):
            expected.append({name: x.clone() for name, x in numbers(model, optimizer).items()})
            begin(saver, step, model, optimizer)
            train(model, optimizer, 1)
            saver.poll()
    for step, kept in enumerate(expected):
        _, weights, moments = read_checkpoint(tmp_path / f"step-{step:08d}")
        found = {f"weight/{name}": x for name, x in weights.items()} | moments
        assert found.keys() == kept.keys() and all(torch.equal(found[name], x) for name, x in kept.items()), step


def test_only_the_newest_stay_and_every_nth_and_the_pointer_names_the_last(tmp_path):
    model, optimizer = trained_model()
    with Saver(tmp_path, keep_last=2, keep_every=4) as saver:
        for step in (2, 4, 6, 8, 10, 12):
            begin(saver, step, model, optimizer)
            begin(saver, step, model, optimizer)  # twice in a row: the second takes the place of the first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", *(f"step-{s:08d}" for s in (4, 8, 10, 12))]
    assert (tmp_path / "latest").read_text() == "step-00000012"
    assert find_checkpoint(tmp_path, "auto").name == find_checkpoint(tmp_path, "latest").name == "step-00000012"


FILES = ["rank-00000.safetensors", "state.json", "manifest.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "zeros", "cut", "delete", "swap"])
def test_damage_is_refused_before_anything_is_parsed(tmp_path, name, damage, monkeypatch):
    other = save(tmp_path, 2, *trained_model(steps=1)) / name
    path = save(tmp_path, 1) / name
    content = bytearray(path.read_bytes())
    if damage == "delete":
        path.unlink()
    elif damage == "swap":
        shutil.copy(other, path)
    else:
        start = len(content) // 2
        for place in range(start, min(start + 4096, len(content)) if damage == "zeros" else start + 1):
            content[place] = 0 if damage == "zeros" else content[place] ^ 1
        path.write_bytes(content[:-3] if damage == "cut" else content)
    monkeypatch.setattr(checkpoints, "safe_open", lambda *_: pytest.fail("a damaged checkpoint was parsed"))
    # A manifest of another step describes files that these are not.
    told = r"rank-00000\.safetensors|state\.json" if (name, damage) == ("manifest.json", "swap") else name
    with pytest.raises(CheckpointError, match=told):
        read_checkpoint(path.parent)


def test_another_major_version_is_refused_and_a_newer_minor_read(tmp_path):
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"]
    for version, good in (("2.9", True), ("3.0", False)):
        sealed = {**manifest, "version": version}
        sealed["sha256"] = checkpoints._digest(sealed)
        (path / "manifest.json").write_text(json.dumps(sealed))
        if good:
            read_checkpoint(path)
        else:
            with pytest.raises(CheckpointError, match=r"version 3\.0.*reads 2\.x"):
                read_checkpoint(path)


def test_the_checkpoints_of_the_first_version_are_read(tmp_path):
    model, optimizer = trained_model()
    kinds = numbers(model, optimizer).items()
    save_file({key[7:]: x.detach() for key, x in kinds if key.startswith("weight/")}, tmp_path / "model.safetensors")
    moments = {":".join(key.split("/")[::-1]): x for key, x in kinds if not key.startswith("weight/")}
    save_file(moments, tmp_path / "optimizer.safetensors")
    (tmp_path / "state.json").write_text('{"step": 3}')
    files = {path.name: hash_file(path) for path in tmp_path.iterdir()}
    (tmp_path / "manifest.json").write_text(
        json.dumps({"format": "affekt-checkpoint", "version": "1.0", "step": 3, "files": files})
    )
    state, weights, found = read_checkpoint(tmp_path)
    assert state == {"step": 3} and torch.equal(weights["0.weight"], model[0].weight)
    assert torch.equal(found["exp_avg/2.bias"], optimizer.state[model[2].bias]["exp_avg"]) and "step/0.weight" in found
    (tmp_path / "model.safetensors").write_bytes(b"?")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("cause", [errno.ENOSPC, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("times", [1, 2, 99])
@pytest.mark.parametrize("where", ["before-fsync", "before-rename"])
def test_what_the_disk_refuses_is_tried_thrice_and_then_told(tmp_path, monkeypatch, cause, times, where):
    monkeypatch.setattr(writing, "PAUSE", 0.001)
    model, optimizer = trained_model()
    save(tmp_path, 1, model, optimizer)
    left = [times]

    def refuse(name, count=0):
        if name == where and left[0] > 0:
            left[0] -= 1
            raise OSError(cause, os.strerror(cause))

    monkeypatch.setattr(writing, "point", refuse)
    monkeypatch.setattr(checkpoints, "point", refuse)
    if times < writing.ATTEMPTS:
        _, weights, _ = read_checkpoint(save(tmp_path, 2, model, optimizer))
        assert torch.equal(weights["0.weight"], model[0].weight)
        return
    with pytest.raises(CheckpointError, match=f"step-00000002: cannot be written: .*{os.strerror(cause)}"):
        save(tmp_path, 2, model, optimizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]
    read_checkpoint(find_checkpoint(tmp_path, "latest"))


def test_training_goes_on_after_a_failed_save_where_that_is_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(writing, "PAUSE", 0.001)
    model, optimizer = trained_model()
    with Saver(tmp_path, 2, on_failure="continue") as saver:
        for step in (1, 2, 3):
            monkeypatch.setattr(writing.os, "fsync", os_fsync if step != 2 else full)
            begin(saver, step, model, optimizer)
            saver.wait()
    assert "step-00000002: cannot be written" in capsys.readouterr().err
    assert find_checkpoint(tmp_path, "latest").name == "step-00000003" and not list(tmp_path.glob(".*"))
    monkeypatch.setattr(writing.os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left"), Saver(tmp_path, 2, on_failure="continue") as saver:
        begin(saver, 4, model, optimizer)  # but a run does not end well without its last checkpoint


os_fsync = os.fsync


def full(*_args, ignore_errors=False):
    if not ignore_errors:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_purge_that_fails_costs_nothing(tmp_path, monkeypatch, capsys):
    model, optimizer = trained_model()
    with Saver(tmp_path, 2) as saver:
        for step in (1, 2, 3):
            begin(saver, step, model, optimizer)
            saver.wait()
            monkeypatch.setattr(checkpoints.shutil, "rmtree", full)
    assert "cannot be removed" in capsys.readouterr().err
    monkeypatch.undo()
    assert [path.name for path in checkpoints.complete_checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]
    checkpoints.remove_partials(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000002", "step-00000003"]


def test_resume_never_starts_silently_at_zero(tmp_path):
    assert find_checkpoint(tmp_path / "none", "auto") is None
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        find_checkpoint(tmp_path / "none", "latest")
    (tmp_path / "step-00000001").mkdir()  # what a copy that broke off leaves behind
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        find_checkpoint(tmp_path, "auto")
    with pytest.raises(CheckpointError, match="not a checkpoint folder"):
        find_checkpoint(tmp_path, str(tmp_path / "step-00000001"))
    (tmp_path / "step-00000001").rmdir()
    (tmp_path / "latest").write_text("step-00000001")  # a pointer alone says that there was one
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        find_checkpoint(tmp_path, "auto")


def test_a_lost_pointer_falls_back_to_the_newest_with_a_note(tmp_path, capsys):
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / ".partial-step-00000009").mkdir()
    for content in (None, "", "step-00000007", ".partial-step-00000009", "../../elsewhere", "step-00000001"):
        (tmp_path / "latest").unlink(missing_ok=True)
        if content is not None:
            (tmp_path / "latest").write_text(content)
        assert find_checkpoint(tmp_path, "auto") == find_checkpoint(tmp_path, "latest") == tmp_path / "step-00000002"
        assert capsys.readouterr().err.count("using step-00000002") == 2


def test_a_copy_under_another_name_is_none_of_the_run(tmp_path):
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000001-good")
    for step in (2, 3):
        save(tmp_path, step)  # whose purge counts and removes the run's own
    assert find_checkpoint(tmp_path, "auto").name == "step-00000003"
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [
        "step-00000001-good",
        "step-00000002",
        "step-00000003",
    ]
    read_checkpoint(find_checkpoint(tmp_path, str(tmp_path / "step-00000001-good")))


@pytest.mark.parametrize("starts, good", [((0, 4), True), ((4, 0), True), ((0, 0), False), ((0, 3), False)])
def test_pieces_must_lie_side_by_side(tmp_path, starts, good):
    pieces = {f"weight/x@{start}": torch.full((4,), float(n)) for n, start in enumerate(starts)}
    if len(set(starts)) < 2:
        pieces = {"weight/x@0": torch.zeros(4), "weight/x@00": torch.ones(4)}
    with Saver(tmp_path, keep_last=2) as saver:
        saver.save(1, pieces, {"shapes": {"x": [8]}}, {})
    if good:
        assert read_checkpoint(tmp_path / "step-00000001")[1]["x"].numel() == 8
    else:
        with pytest.raises(CheckpointError, match="missing or there twice"):
            read_checkpoint(tmp_path / "step-00000001")


def test_an_older_checkpoint_is_not_resumed_beside_newer_ones(tmp_path):
    """Its checkpoints would be purged or passed over in favour of those of the run it leaves."""
    older, newer = (save(tmp_path / "checkpoints", s) for s in (1, 2))
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
