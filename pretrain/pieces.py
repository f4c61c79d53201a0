"""The training state in pieces: what a rank holds of every weight and moment, at any ZeRO stage.

A piece is a run of numbers of one flattened tensor, named by the parameter. The pieces of all ranks make the state
whole, so a checkpoint of them can be read at another stage and by another number of ranks, and writing it takes no
communication.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from affekt.data.errors import CheckpointError

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, of the parameter's shape
STEP = "step"  # of AdamW, one number


@dataclass(frozen=True)
class Held:
    """Where a rank holds the numbers `start` to `start + count` of a flattened parameter: `flat[at : at + count]`, and
    its moments at the same place of `state`, the optimiser's own dictionary for `flat`."""

    name: str
    start: int
    count: int
    flat: Tensor
    at: int
    state: dict[str, Tensor]

    def of(self, tensor: Tensor) -> Tensor:
        """The part of `flat`, or of a moment of its shape."""
        return tensor.detach().view(-1)[self.at : self.at + self.count]


def held_pieces(engine) -> list[Held]:
    """What this rank holds of every parameter of a DeepSpeed engine. At stage 0 every rank holds all."""
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage == 0:
        state = optimizer.state
        return [Held(names[id(p)], 0, p.numel(), p, 0, state[p]) for p in engine.module.parameters()]
    find = _held_at_stage_3 if stage == 3 else _held_at_stage_1_and_2
    find = {True: find, False: _held_frozen}
    return [
        Held(names[id(p)], *place) for p in engine.module.parameters() for place in find[p.requires_grad](optimizer, p)
    ]


def _held_frozen(_optimizer, parameter: nn.Parameter) -> Iterator[tuple]:
    """What is not trained is in no partition (of stage 1 and 2): all ranks have it, and the first one speaks for it."""
    if dist.get_rank() == 0:
        yield 0, parameter.numel(), parameter, 0, {}


def _held_at_stage_1_and_2(optimizer, parameter: nn.Parameter) -> Iterator[tuple]:
    mapping = parameter._hp_mapping  # None where all of it is in the partitions of other ranks
    if mapping is not None:
        flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
        here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
        yield here.start, here.numel, flat, there.start, optimizer.optimizer.state[flat]


def _held_at_stage_3(optimizer, parameter: nn.Parameter) -> Iterator[tuple]:
    group, at, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
    flat = optimizer.fp32_partitioned_groups_flat[group]
    start = optimizer._get_param_partition_rank(parameter) * size
    count = min(size, parameter.ds_numel - start)  # the last partitions are padded, or padding alone
    if count > 0:
        yield start, count, flat, at, optimizer.optimizer.state[flat]


def numbers_to_save(engine, rank: int, world_size: int) -> dict[str, Tensor]:
    """The pieces that this rank writes, by `kind/name` for a whole tensor, in its own shape, and `kind/name@start` for
    a run of its flattened numbers. Kinds are `weight`, MOMENTS and STEP. The tensors are those that training changes.

    At stage 0, where all ranks hold all, each writes a share of about the same size.
    """
    pieces, shapes = held_pieces(engine), parameter_shapes(engine.module)
    if engine.zero_optimization_stage() == 0:
        pieces = _share(pieces, rank, world_size)
    tensors = {}
    for piece in pieces:
        whole = piece.count == shapes[piece.name].numel()
        suffix, shape = ("", shapes[piece.name]) if whole else (f"@{piece.start}", (piece.count,))
        tensors[f"weight/{piece.name}{suffix}"] = piece.of(piece.flat).view(shape)
        for kind in MOMENTS:
            if kind in piece.state:
                tensors[f"{kind}/{piece.name}{suffix}"] = piece.of(piece.state[kind]).view(shape)
        if STEP in piece.state and piece.start == 0:
            tensors[f"{STEP}/{piece.name}"] = piece.state[STEP]
    return tensors


def _share(pieces: list[Held], rank: int, world_size: int) -> list[Held]:
    sizes, mine = [0] * world_size, []
    for piece in sorted(pieces, key=lambda piece: (-piece.count, piece.name)):
        smallest = sizes.index(min(sizes))
        sizes[smallest] += piece.count
        if smallest == rank:
            mine.append(piece)
    return mine


def restore_moments(engine, moments: dict[str, Tensor]) -> None:
    """Put whole moments, by `kind/name`, where this rank holds them. A parameter without any starts afresh.

    Raises CheckpointError where some of a parameter's moments are missing or have another shape, or where parameters
    that ZeRO keeps in one tensor were not stepped equally often.
    """
    shapes = parameter_shapes(engine.module)
    for piece in held_pieces(engine):
        saved = {kind: moments.get(f"{kind}/{piece.name}") for kind in (*MOMENTS, STEP)}
        if all(value is None for value in saved.values()):
            continue  # saved before its first gradient
        if any(value is None for value in saved.values()) or any(
            saved[kind].shape != shapes[piece.name] for kind in MOMENTS
        ):
            raise CheckpointError(f"the optimiser state of `{piece.name}` is missing or has another shape")
        if not piece.state:
            device = piece.flat.device
            piece.state[STEP] = saved[STEP].to(device, torch.float32).clone()
            piece.state.update({kind: torch.zeros_like(piece.flat.detach()) for kind in MOMENTS})
        if piece.state[STEP].item() != saved[STEP].item():
            raise CheckpointError(
                f"`{piece.name}` was stepped {saved[STEP].item():g} times and others {piece.state[STEP].item():g}; "
                "ZeRO counts for all of them together: go on with train.zero_stage=0"
            )
        for kind in MOMENTS:
            whole = saved[kind].reshape(-1)
            piece.of(piece.state[kind]).copy_(whole[piece.start : piece.start + piece.count])


def parameter_shapes(module: nn.Module) -> dict[str, torch.Size]:
    """The shape of every parameter, also where ZeRO has taken its numbers apart."""
    return {name: getattr(p, "ds_shape", p.shape) for name, p in module.named_parameters()}
