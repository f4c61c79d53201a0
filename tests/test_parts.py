"""A batch in parts: losses and gradients are those of the whole, on one process and on two."""

import os
import socket
import subprocess
import sys

import pytest
import torch

# One rank: a model in float64 on its share of a batch, in 1, 2 and 4 parts; losses and gradients averaged over all.
RANK = """
import contextlib, sys, types, torch, torch.distributed as dist
from affekt.data.batch import Batch
from affekt.data.transforms import Inputs
from affekt.pretrain.parts import in_parts
from affekt.pretrain.registry import create_model
world, rank, port, out, seed, negatives = *map(int, sys.argv[1:4]), sys.argv[4], int(sys.argv[5]), sys.argv[6]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
torch.manual_seed(seed)
small = {"embed_dim": 24, "depth": 2, "taps": (1, 2), "decoder_embed_dim": 16, "img_size": 32, "mel_frames": 64}
contrast = {"contrast_weight": 0.5, "projector_dim": 8, "contrast_center": True, "contrast_exclude": "speaker"}
contrast["contrast_negatives"] = negatives
model = create_model("hicmae_nano", **small, mask_ratio_video=0.5, **contrast).double()
for parameter in model.parameters():
    torch.nn.init.normal_(parameter, parameter.mean().item(), 0.1)
video, audio = torch.randn(16, 3, 8, 32, 32).double(), torch.randn(16, 1, 64, 128).double()
has_video, has_audio = torch.rand(16) < 0.8, torch.rand(16) < 0.8
has_video[0], has_audio[0] = True, True
valid = torch.randint(400, 10480, (16,)) * has_audio
mine = slice(rank * 16 // world, (rank + 1) * 16 // world)
rows = torch.arange(16)
batch = Batch([""] * 16, rows, None, has_video, has_audio, valid, torch.zeros(16, 4), rows)
batch.clip, batch.speaker = torch.randint(0, 12, (16,)), torch.randint(-1, 4, (16,))
batch = batch._each(lambda x: x[mine])
batch.ids = batch.ids[mine]

def preprocess(part):  # `video` holds the row numbers
    there = part.has_video, part.has_audio, part.audio_frames(64), part.clip, part.speaker
    return Inputs(video[part.video], audio[part.video], *there)

features = torch.no_grad()(lambda *inputs: model(*inputs, only_features=True)["features"])
engine = types.SimpleNamespace(autocast=contextlib.nullcontext, features=features)
found = {}
for count in (1, 2, 4):
    model.zero_grad()
    total = {}
    for inputs, masks, whole in in_parts(batch, [0] * count, model, engine, preprocess, torch.device("cpu")):
        assert len(inputs.video) == 16 // world // count and (whole is None) == (count == 1)
        losses = model(inputs, *masks, whole)
        (losses["loss"] / count).backward()
        total = {name: loss.detach() / count + total.get(name, 0) for name, loss in losses.items()}
    total |= {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    for value in total.values():
        dist.all_reduce(value)
        value /= world
    found |= {f"{count} {name}": value for name, value in total.items()}
if rank == 0:
    torch.save(found, out)
dist.barrier()
dist.destroy_process_group()
"""


def averaged(world: int, seed: int, path, negatives: str = "global") -> dict[str, torch.Tensor]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    arguments = [port, str(path), str(seed), negatives]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RANK, str(world)]
    ranks = [subprocess.Popen([*command, str(rank), *arguments], env=environment) for rank in range(world)]
    assert [rank.wait(timeout=200) for rank in ranks] == [0] * world
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def seed() -> int:
    return torch.seed() % 2**31


def test_parts_give_the_losses_and_gradients_of_the_whole(seed, tmp_path):
    print(f"seed {seed}")
    found = {world: averaged(world, seed, tmp_path / f"{world}.pt") for world in (1, 2)}
    whole = {name[2:]: value for name, value in found[1].items() if name.startswith("1 ")}
    assert {"loss", "loss_video", "loss_audio", "loss_contrast"} < set(whole)
    for name, value in whole.items():
        assert value.any(), name
        for world, parts in ((1, 2), (1, 4), (2, 1), (2, 2), (2, 4)):
            worst = (found[world][f"{parts} {name}"] - value).abs().max().item()
            assert worst <= 1e-6 * value.abs().max().item() + 1e-12, (name, world, parts)


def test_local_negatives_are_those_of_the_ranks_own_batch_in_parts_too(seed, tmp_path):
    print(f"seed {seed}")
    found = averaged(2, seed, tmp_path / "local.pt", "local")
    for name, value in found.items():
        whole = found[f"1 {name[2:]}"]
        assert (value - whole).abs().max().item() <= 1e-6 * whole.abs().max().item() + 1e-12, name
