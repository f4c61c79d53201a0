"""A model in float64 or float32 on its share of a batch, in one part or in several: the work of one rank."""

import contextlib
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from affekt.data.batch import Batch
from affekt.data.transforms import Inputs
from affekt.pretrain import gather
from affekt.pretrain.engine import start_processes
from affekt.pretrain.hicmae import HiCMAE
from affekt.pretrain.parts import in_parts
from affekt.pretrain.registry import create_model

CLIPS, FRAMES = 16, 64
SMALL = {"embed_dim": 24, "depth": 2, "taps": (1, 2), "decoder_embed_dim": 16, "img_size": 32, "mel_frames": FRAMES}
CONTRAST = {
    "contrast_weight": 0.5,
    "projector_dim": 8,
    "contrast_exclude": "speaker",
    "functionals_weight": 0.5,
    "edges_weight": 0.5,
}


def losses_and_gradients(
    out: str, seed: int, counts: tuple[int, ...], dtype: torch.dtype, negatives: str = "global", mutant: str = ""
) -> None:
    """Losses and gradients averaged over ranks, for the batch in each of `counts` parts, as `COUNT/NAME` in the file
    `out`. A `mutant` gathers wrongly: `no gradient` for the rows of other ranks, or `scaled` by two."""
    torch.set_num_threads(1)
    rank, world_size, device = start_processes()
    torch.manual_seed(seed)
    # Around their mean, features know nothing of the last bias before it: its gradient is rounding, large in float32.
    how = {"contrast_negatives": negatives, "contrast_center": dtype == torch.float64}
    model = create_model("hicmae_nano", **SMALL, **CONTRAST, **how, mask_ratio_video=0.5)
    model = model.to(device, dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, parameter.mean().item(), 0.1)
    batch, video, audio = make_batch(dtype)
    share = slice(rank * CLIPS // world_size, (rank + 1) * CLIPS // world_size)
    ids = batch.ids[share]
    batch = batch._each(lambda x: x[share])
    batch.ids = ids
    if mutant:
        gather.Gather.wait = MUTANTS[mutant](gather.Gather.wait)

    def preprocess(part: Batch) -> Inputs:
        there = part.has_video, part.has_audio, part.audio_frames(FRAMES), part.clip, part.speaker
        return Inputs(video[part.video], audio[part.video], *there)

    features = torch.no_grad()(lambda *inputs: model(*inputs, only_features=True)["features"])
    engine = SimpleNamespace(autocast=contextlib.nullcontext, features=features)
    found = {}
    for count in counts:
        for name, value in _whole(model, engine, batch, count, preprocess, device).items():
            dist.all_reduce(value)
            found[f"{count}/{name}"] = value / world_size
    if rank == 0:
        save_file(found, Path(out))
    dist.barrier()


def _whole(model: HiCMAE, engine, batch: Batch, count: int, preprocess, device) -> dict[str, torch.Tensor]:
    model.zero_grad()
    total: dict[str, torch.Tensor] = {}
    for inputs, masks, whole in in_parts(batch, [0] * count, model, engine, preprocess, device):
        assert (whole is None) == (count == 1)
        losses = model(inputs, *masks, whole)
        (losses["loss"] / count).backward()
        total = {name: loss.detach() / count + total.get(name, 0) for name, loss in losses.items()}
    return total | {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def make_batch(dtype: torch.dtype) -> tuple[Batch, torch.Tensor, torch.Tensor]:
    """Clips of which some lack a stream, are views of one clip or of one speaker; `Batch.video` holds their rows in the
    pictures (CLIPS, 3, 8, 32, 32) and sounds (CLIPS, 1, FRAMES, 128)."""
    video = torch.randn(CLIPS, 3, 8, 32, 32, dtype=torch.float64).to(dtype)
    audio = torch.randn(CLIPS, 1, FRAMES, 128, dtype=torch.float64).to(dtype)
    has_video, has_audio, rows = torch.rand(CLIPS) < 0.8, torch.rand(CLIPS) < 0.8, torch.arange(CLIPS)
    has_video[0], has_audio[0] = True, True
    valid = torch.randint(400, 10480, (CLIPS,)) * has_audio
    batch = Batch([""] * CLIPS, rows, None, has_video, has_audio, valid, torch.zeros(CLIPS, 4), rows)
    batch.clip, batch.speaker = torch.randint(0, CLIPS * 3 // 4, (CLIPS,)), torch.randint(-1, 4, (CLIPS,))
    return batch, video, audio


def _no_gradient(right):
    def wait(self):
        rows = right(self)
        if not rows.requires_grad:
            return rows
        own = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        own[self.rows] = True
        return torch.where(own.view(-1, *[1] * (rows.dim() - 1)), rows, rows.detach())

    return wait


def _scaled(right):
    def wait(self):
        rows = right(self)
        return 2 * rows - rows.detach() if rows.requires_grad else rows

    return wait


MUTANTS = {"no gradient": _no_gradient, "scaled": _scaled}
