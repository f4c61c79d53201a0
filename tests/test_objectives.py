"""The losses over two real gloo ranks equal those of one process, and wrong ways to gather are caught."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch

from affekt.pretrain.objectives import contrastive_loss, reconstruction_loss

# One rank: its half of a global batch, the two losses, and the gradients of its features averaged as DDP would do.
RANK = """
import sys, json, torch, torch.distributed as dist
from affekt.pretrain import gather as gathering
from affekt.pretrain.objectives import contrastive_loss, reconstruction_loss
rank, port, gather, across = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4] == "global"
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
right = gathering.Gather.wait
if gather == "no gradient":
    own = torch.arange(4) + 4 * rank
    gathering.Gather.wait = lambda self: right(self).detach().index_copy(0, own, torch.stack((v, a), 1))
elif gather == "scaled":
    gathering.Gather.wait = lambda self: 2 * (x := right(self)) - x.detach()
generator = torch.Generator().manual_seed(int(sys.argv[5]))
video, audio, target = (torch.randn(8, 6, 5, dtype=torch.float64, generator=generator) for _ in range(3))
paired = torch.tensor([True, True, False, True, True, True, False, True])
weight = (torch.rand(8, 6, generator=generator) > 0.4).double()
scale = torch.ones((), dtype=torch.float64, requires_grad=True)  # a parameter that every rank shares
mine = slice(4 * rank, 4 * rank + 4)
v, a = ((x * torch.sin(scale * (i + 1)) + x.square() * scale).mean(1)[mine] for i, x in enumerate((video, audio)))
clip = torch.tensor([3, 1, 2, 3, 1, 6, 7, 6])[mine]  # the second views of clips 3 and 1 are on both ranks
pending = gathering.Gather(torch.stack((v, a), 1), across)
numbers = right(gathering.Gather(torch.stack((paired[mine].long(), clip), 1), across))
video_all, audio_all = pending.wait().unbind(1)
how = {"same": [numbers[:, 1]], "rows": pending.rows}
contrast = contrastive_loss(video_all, audio_all, numbers[:, 0] > 0, 0.07, **how)
rebuilt = reconstruction_loss(video[mine] * scale, target[mine], weight[mine])
result = []
for loss in (contrast, rebuilt):
    (gradient,) = torch.autograd.grad(loss, scale, retain_graph=True)
    both = torch.stack((loss.detach(), gradient))
    dist.all_reduce(both)
    result += (both / 2).tolist()
print(json.dumps(result), flush=True)
dist.barrier()
dist.destroy_process_group()
"""


def two_ranks(seed: int, gather: str = "right", negatives: str = "global") -> list[float]:
    """[contrast, its gradient, reconstruction, its gradient], averaged over two processes."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-c", RANK]
    arguments = [str(port), gather, negatives, str(seed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([*command, str(rank), *arguments], stdout=subprocess.PIPE, text=True, env=environment)
        for rank in range(2)
    ]
    answers = [rank.communicate(timeout=200)[0] for rank in ranks]
    assert not any(rank.returncode for rank in ranks)
    first, second = (json.loads(answer.splitlines()[-1]) for answer in answers)
    assert first == second
    return first


def one_process(seed: int, clips: tuple[slice, ...] = (slice(0, 8),)) -> list[float]:
    """The same from one process; with several slices the mean of the contrast over them."""
    generator = torch.Generator().manual_seed(seed)
    video, audio, target = (torch.randn(8, 6, 5, dtype=torch.float64, generator=generator) for _ in range(3))
    paired = torch.tensor([True, True, False, True, True, True, False, True])
    weight = (torch.rand(8, 6, generator=generator) > 0.4).double()
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    v, a = ((x * torch.sin(scale * (i + 1)) + x.square() * scale).mean(1) for i, x in enumerate((video, audio)))
    clip = torch.tensor([3, 1, 2, 3, 1, 6, 7, 6])
    losses = [contrastive_loss(v[part], a[part], paired[part], 0.07, same=[clip[part]]) for part in clips]
    contrast = sum(losses) / len(clips)
    rebuilt = reconstruction_loss(video * scale, target, weight)
    result = []
    for loss in (contrast, rebuilt):
        result += [loss.item(), torch.autograd.grad(loss, scale, retain_graph=True)[0].item()]
    return result


@pytest.fixture(scope="module")
def seed() -> int:
    seed = torch.seed() % 2**31
    print(f"seed {seed}")
    return seed


def test_reconstruction_is_the_mean_square_slowly_written_out(seed):
    generator = torch.Generator().manual_seed(seed)
    prediction, target = (torch.randn(3, 4, 5, dtype=torch.float64, generator=generator) for _ in range(2))
    weight = (torch.rand(3, 4, generator=generator) > 0.4).double()
    weight[0, 0], prediction.requires_grad = 1, True
    pairs = [(b, m) for b in range(3) for m in range(4) if weight[b, m]]
    slow = sum(((prediction[b, m] - target[b, m]) ** 2).sum() for b, m in pairs) / (5 * len(pairs))
    torch.testing.assert_close(reconstruction_loss(prediction, target, weight), slow)
    assert torch.autograd.gradcheck(lambda x: reconstruction_loss(x, target, weight), prediction)
    rounded = prediction.detach().bfloat16().requires_grad_()
    loss = reconstruction_loss(rounded, target.float(), weight.float())
    (gradient,) = torch.autograd.grad(loss, rounded)
    assert loss.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    wide = rounded.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(reconstruction_loss(wide, target, weight), wide)
    torch.testing.assert_close(gradient.double(), exact, rtol=2**-8, atol=0)


def test_the_contrast_is_computed_in_float32_under_autocast(seed):
    """With features nearly alike, as at the start of training, where logits in bf16 would all be the same."""
    generator = torch.Generator().manual_seed(seed)
    common, *noise = (torch.randn(16, 32, dtype=torch.float64, generator=generator) for _ in range(3))
    video, audio = ((common[:1] + 0.003 * x).requires_grad_() for x in noise)
    paired = torch.ones(16, dtype=torch.bool)
    exact = contrastive_loss(video, audio, paired, 0.07)
    expected = torch.autograd.grad(exact, video)[0]
    half_video, half_audio = (x.detach().float().requires_grad_() for x in (video, audio))
    with torch.autocast("cpu", torch.bfloat16):
        loss = contrastive_loss(half_video, half_audio, paired, 0.07)
    (gradient,) = torch.autograd.grad(loss, half_video)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=1e-5)
    assert (gradient - expected).norm() < 0.01 * expected.norm()


# One rank: a whole model in float64 on its share of a batch with missing streams, its loss and gradients averaged. It
# says in which order transfers begin and are awaited and decoders run, forward and back.
MODEL_RANK = """
import gc, sys, torch, torch.distributed as dist
from affekt.data.transforms import Inputs
from affekt.pretrain import gather
from affekt.pretrain.masks import random_mask, tube_mask
from affekt.pretrain.registry import create_model
world, rank, port, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
if world > 1:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
gc.disable()
torch.manual_seed(int(sys.argv[5]))
small = {"embed_dim": 24, "depth": 2, "taps": (1, 2), "decoder_embed_dim": 16, "img_size": 32, "mel_frames": 64}
contrast = {"contrast_weight": 0.5, "projector_dim": 8, "contrast_exclude": "speaker", "functionals_weight": 0.5}
contrast["edges_weight"] = 0.5
model = create_model("hicmae_nano", **small, mask_ratio_video=0.5, **contrast).double()
for parameter in model.parameters():
    torch.nn.init.normal_(parameter, parameter.mean().item(), 0.1)
video, audio = torch.randn(8, 3, 8, 32, 32).double(), torch.randn(8, 1, 64, 128).double()
has_video = torch.tensor([True, True, True, False, True, True, True, True])
has_audio = torch.tensor([True, False, True, True, True, True, True, True])
clip, speaker = torch.tensor([0, 1, 2, 3, 4, 0, 6, 7]), torch.tensor([5, 5, -1, 9, 9, 5, -1, 9])
frames, keys, s = torch.tensor([64, 64, 30, 50, 64, 64, 20, 64]), torch.arange(8), model.settings
mine = slice(rank * 8 // world, (rank + 1) * 8 // world)
events = []
def watched(name):
    begin = getattr(gather, name)
    def function(*arguments, **options):
        work = begin(*arguments, **options)
        events.append(name)
        return type("Work", (), {"wait": lambda self: (events.append(name + " awaited"), work.wait())})()
    setattr(gather, name, function)
watched("_all_gather")
watched("_reduce_scatter")
model.decoder_video.register_forward_hook(lambda *_: events.append("decoded"))
back = lambda _gradient: events.append("decoded back")
model.decoder_video.blocks[0].register_forward_pre_hook(lambda _module, given: given[0].register_hook(back) and None)
valid = (torch.arange(4) * 16 < frames[:, None]).repeat_interleave(8, dim=1)
masks = tube_mask(keys[mine], s.grid_video, 0.5), random_mask(keys[mine], 32, 0.8, valid[mine])
there = has_video[mine], has_audio[mine], frames[mine], clip[mine], speaker[mine]
inputs = Inputs(video[mine], audio[mine], *there)
losses = model(inputs, *masks)
losses["loss"].backward()
going, coming = ["_all_gather"] * 2, ["_all_gather awaited"] * 2
going += ["decoded", *coming, "_reduce_scatter", "decoded back", "_reduce_scatter awaited"]
assert events == (going if world > 1 else ["decoded", "decoded back"]), events
found = {**{name: loss.detach() for name, loss in losses.items()}, **{n: p.grad for n, p in model.named_parameters()}}
del losses
assert not [x for x in gc.get_objects() if type(x) is gather.Gather]  # nothing waits for a collection of cycles
for value in found.values():
    if world > 1:
        dist.all_reduce(value.data)
        value.data /= world
inputs = Inputs(video[mine].float(), audio[mine].float(), *there)
for half in (False, True) if world > 1 else ():
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        features = model.float().features(model.encode(inputs, *masks)[0], *masks)
        pairs = model.gathered(features, model.numbers(inputs))
        assert pairs[0].wait().dtype == (torch.bfloat16 if half else torch.float32)
        assert len(pairs[1].wait()) == 8
if rank == 0:
    torch.save({name: value.detach() for name, value in found.items()}, out)
if world > 1:
    dist.barrier()
    dist.destroy_process_group()
"""


def test_a_model_on_two_ranks_is_the_model_on_one(seed, tmp_path):
    print(f"seed {seed}")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = {}
    for world in (1, 2):  # four are in tests/test_parts.py
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = str(listener.getsockname()[1])
        command = [sys.executable, "-c", MODEL_RANK, str(world)]
        ranks = [
            subprocess.Popen([*command, str(rank), port, str(tmp_path / f"{world}.pt"), str(seed)], env=environment)
            for rank in range(world)
        ]
        assert [rank.wait(timeout=200) for rank in ranks] == [0] * world
        found[world] = torch.load(tmp_path / f"{world}.pt", weights_only=True)
    assert {"loss", "loss_video", "loss_audio", "loss_contrast", "loss_functionals", "loss_edges"} < set(found[1])
    for name, value in found[1].items():
        worst = (found[2][name] - value).abs().max().item()
        assert worst <= 1e-6 * value.abs().max().item(), name
    assert all(value.any() for value in found[1].values())


def test_two_ranks_equal_one_process(seed):
    print(f"seed {seed}")
    assert two_ranks(seed) == pytest.approx(one_process(seed), rel=1e-6)


def test_local_negatives_are_the_mean_of_two_batches(seed):
    print(f"seed {seed}")
    halves = (slice(0, 4), slice(4, 8))
    found = two_ranks(seed, negatives="local")
    assert found == pytest.approx(one_process(seed, halves), rel=1e-6)
    assert found[0] != pytest.approx(one_process(seed)[0], rel=1e-3)


@pytest.mark.parametrize("gather", ["no gradient", "scaled"])
def test_a_wrong_gather_is_caught(seed, gather):
    print(f"seed {seed}")
    found, expected = two_ranks(seed, gather), one_process(seed)
    assert found[0] == pytest.approx(expected[0], rel=1e-6)  # the value alone would not tell
    assert found[1] != pytest.approx(expected[1], rel=1e-6)
