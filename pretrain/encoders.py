"""The parts of HiCMAE: the per-modality encoder, the fusion encoder, and the decoder with hierarchical skips."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from affekt.pretrain.layers import NORM_EPS, Block, CrossBlock, LeanMlp, run
from affekt.pretrain.masks import Mask
from affekt.pretrain.patches import gather_tokens


class ModalityEncoder(nn.Module):
    """A transformer over the visible patches of one modality; video and audio differ in the patch length alone."""

    grad_checkpointing = False

    def __init__(self, patch_dim: int, pos_embed: Tensor, dim: int, num_heads: int, depth: int, drop_path: float = 0.0):
        super().__init__()
        self.patch_embed = nn.Linear(patch_dim, dim)
        self.register_buffer("pos_embed", pos_embed, persistent=False)  # (1, N, dim)
        rates = drop_path_rates(drop_path, depth)
        self.blocks = nn.ModuleList(Block(dim, num_heads, rate) for rate in rates)
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)

    def forward(self, patches: Tensor, ids: Tensor | None = None, valid: Tensor | None = None) -> list[Tensor]:
        """Raw outputs of every block, each (B, K, D).

        `patches` (B, N, P) are all patches of the clip; only those at `ids` (B, K) are embedded (all when None).
        `valid` (B, K) marks tokens that are not padding.
        """
        pos_embed = self.pos_embed
        if ids is not None:
            patches, pos_embed = gather_tokens(patches, ids), gather_tokens(pos_embed, ids)
        x = self.patch_embed(patches) + pos_embed.type_as(patches)
        outputs = []
        for block in self.blocks:
            x = run(block, x, valid, checkpointed=self.grad_checkpointing)
            outputs.append(x)
        return outputs


class FusionEncoder(nn.Module):
    """Levels of cross-attention between the two streams; both blocks of a level read the level before (in parallel)."""

    grad_checkpointing = False

    def __init__(self, dim: int, num_heads: int, depth: int, drop_path: float = 0.0):
        super().__init__()
        rates = drop_path_rates(drop_path, depth)  # anew from 0, as in the published fine-tuning
        self.blocks_video = nn.ModuleList(CrossBlock(dim, num_heads, rate) for rate in rates)
        self.blocks_audio = nn.ModuleList(CrossBlock(dim, num_heads, rate) for rate in rates)
        self.norm_video = nn.LayerNorm(dim, eps=NORM_EPS)
        self.norm_audio = nn.LayerNorm(dim, eps=NORM_EPS)

    def forward(
        self,
        video: Tensor,
        audio: Tensor,
        has_video: Tensor,
        has_audio: Tensor,
        valid_audio: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(B, Kv, D), (B, Ka, D) -> the same shapes. A clip without one stream passes the other one on unmixed."""
        saving = self.grad_checkpointing
        for block_video, block_audio in zip(self.blocks_video, self.blocks_audio, strict=True):
            video, audio = (
                run(block_video, video, audio, present=has_audio, context_valid=valid_audio, checkpointed=saving),
                run(block_audio, audio, video, present=has_video, valid=valid_audio, checkpointed=saving),
            )
        return self.norm_video(video), self.norm_audio(audio)

    def alone(self, x: Tensor, stream: Literal["video", "audio"], valid: Tensor | None = None) -> Tensor:
        """(B, K, D) -> (B, K, D): one stream with no other beside it, as `forward` takes clips that lack one."""
        blocks, norm = getattr(self, f"blocks_{stream}"), getattr(self, f"norm_{stream}")
        for block in blocks:
            x = run(block, x, None, valid=valid, checkpointed=self.grad_checkpointing)
        return norm(x)


class Decoder(nn.Module):
    """Predicts the hidden patches of one modality, with hierarchical skip connections by cross-attention.

    Block 1 is a self block; block 2, 3, ... read the encoder's taps from the deepest to the shallowest
    (HiCMAE section 3.2), so `depth` is the number of taps plus one.
    """

    grad_checkpointing = False

    def __init__(self, encoder_dim: int, patch_dim: int, pos_embed: Tensor, dim: int, num_heads: int, num_taps: int):
        super().__init__()
        self.decoder_embed = nn.Linear(encoder_dim, dim, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("pos_embed", pos_embed, persistent=False)
        lean = {"mlp_layer": LeanMlp}
        blocks = [Block(dim, num_heads, **lean), *(CrossBlock(dim, num_heads, **lean) for _ in range(num_taps))]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.decoder_pred = nn.Linear(dim, patch_dim)

    def forward(self, x: Tensor, taps: Sequence[Tensor], mask: Mask) -> Tensor:
        """`x` (B, K, D) fused visible tokens, `taps` shallow to deep, each (B, K, D) -> (B, M, patch_dim)."""
        pos_keep, pos_mask = (gather_tokens(self.pos_embed, ids) for ids in (mask.ids_keep, mask.ids_mask))
        x = torch.cat((self.decoder_embed(x) + pos_keep, self.mask_token + pos_mask), dim=1)  # (B, N, decoder_dim)
        valid = None
        if mask.valid_keep is not None:  # padding that is visible is attended to no more than in the encoder
            valid = torch.cat((mask.valid_keep, torch.ones_like(mask.ids_mask, dtype=torch.bool)), dim=1)
        x = run(self.blocks[0], x, valid, checkpointed=self.grad_checkpointing)
        hidden = mask.ids_mask.shape[1]  # all that is predicted, so all that the last block has to finish
        for block, tap in zip(self.blocks[1:], reversed(taps), strict=True):
            queries = hidden if block is self.blocks[-1] else None
            context = self.decoder_embed(tap) + pos_keep
            options = {"valid": valid, "context_valid": mask.valid_keep, "queries": queries}
            x = run(block, x, context, **options, checkpointed=self.grad_checkpointing)
        return self.decoder_pred(self.norm(x[:, -hidden:]))


def drop_path_rates(last: float, depth: int) -> list[float]:
    """From 0 at the first block to `last` at the last one, in even steps (timm's convention)."""
    return [last * i / max(1, depth - 1) for i in range(depth)]


def init_weights(module: nn.Module) -> None:
    """Xavier-uniform linears with zero bias, LayerNorm 1/0, mask tokens truncated normal of std 0.02. The patch
    embedding keeps torch's default, as in the published code. (Projection heads are our own addition.)"""
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear) and not name.endswith("patch_embed"):
            nn.init.xavier_uniform_(child.weight)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
        elif isinstance(child, Decoder):
            nn.init.trunc_normal_(child.mask_token, std=0.02, a=-0.02, b=0.02)
