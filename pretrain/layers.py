"""Attention and transformer blocks of HiCMAE: pre-LN self blocks, and cross+self blocks that read another stream."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from affekt.data import torch_extensions  # noqa: F401  (timm imports torchvision)

# isort: split
from timm.layers import DropPath, Mlp

NORM_EPS = 1e-6


class Attention(nn.Module):
    """Multi-head self-attention with learned query and value bias; a key bias would cancel in the softmax.

    `forward(x (B, N, D), valid (B, N) bool or None) -> (B, N, D)`; tokens with `valid` False are never attended to.
    With `queries` only the last so many tokens ask, and (B, queries, D) comes out.
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, valid: Tensor | None = None, queries: int | None = None) -> Tensor:
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        if queries is None:
            q, k, v = F.linear(x, self.qkv.weight, bias).chunk(3, dim=-1)
        else:
            dim = x.shape[-1]
            q = F.linear(x[:, -queries:], self.qkv.weight[:dim], self.q_bias)
            k, v = F.linear(x, self.qkv.weight[dim:], bias[dim:]).chunk(2, dim=-1)
        return self.proj(attend(q, k, v, self.num_heads, valid))


class CrossAttention(nn.Module):
    """Queries from one sequence, keys and values from another: x (B, N, D), context (B, M, D) -> (B, N, D)."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(dim, 2 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor, valid: Tensor | None = None) -> Tensor:
        q = F.linear(x, self.q.weight, self.q_bias)
        bias = torch.cat((torch.zeros_like(self.v_bias), self.v_bias))
        k, v = F.linear(context, self.kv.weight, bias).chunk(2, dim=-1)
        return self.proj(attend(q, k, v, self.num_heads, valid))


def attend(q: Tensor, k: Tensor, v: Tensor, num_heads: int, valid: Tensor | None) -> Tensor:
    """Scaled dot-product attention of (B, N, D) tensors, split into heads; keys with `valid` (B, M) False count not."""
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))  # (B, heads, N, head_dim)
    mask = None if valid is None else valid[:, None, None, :]
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # The fused kernel is three to eight times as slow there at 26 to 80 tokens, and 1.6 times at 800.
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
        with torch.autocast("cpu", enabled=False):  # which would take the softmax to float32, at twice the time
            x = scores.softmax(-1) @ v
    else:
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return x.transpose(1, 2).flatten(2)


def run(block: nn.Module, *args: Tensor | None, checkpointed: bool, **kwargs: Tensor | int | None) -> Tensor:
    """`block(*args, **kwargs)`; with `checkpointed` its activations are computed again in the backward pass."""
    if checkpointed and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False, **kwargs)
    return block(*args, **kwargs)


class LeanMlp(Mlp):
    """timm's MLP, whose activation is computed again in the backward pass: a quarter less of a block to keep, for one
    or two percent of the time. Decoders have it, where all tokens are and most of the memory."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self._second_half, self.fc1(x), use_reentrant=False, preserve_rng_state=False)

    def _second_half(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(x))


class Block(nn.Module):
    """Pre-LN self-attention and MLP of ratio 4."""

    def __init__(self, dim: int, num_heads: int, drop_path: float = 0.0, mlp_layer: type[Mlp] = Mlp):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = mlp_layer(dim, 4 * dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, valid: Tensor | None = None, queries: int | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D), or with `queries` the last so many tokens of it, (B, queries, D)."""
        read = self.attn(self.norm1(x), valid, queries)
        x = x[:, -read.shape[1] :] + self.drop_path(read)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class CrossBlock(Block):
    """Cross-attention to a context, then the self block ("CS block", HiCMAE section 3.2).

    The context may be missing: `context=None` for the whole batch, or `present (B,)` False for single clips. Those
    clips pass the cross-attention unchanged, exactly as if the block were a self block.
    """

    def __init__(self, dim: int, num_heads: int, drop_path: float = 0.0, mlp_layer: type[Mlp] = Mlp):
        super().__init__(dim, num_heads, drop_path, mlp_layer)
        self.cross_norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.cross_norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.cross_attn = CrossAttention(dim, num_heads)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None,
        *,
        present: Tensor | None = None,
        valid: Tensor | None = None,
        context_valid: Tensor | None = None,
        queries: int | None = None,
    ) -> Tensor:
        if context is not None:
            read = self.cross_attn(self.cross_norm1(x), self.cross_norm2(context), context_valid)
            if present is not None:
                read = torch.where(present[:, None, None], read, 0.0)
            x = x + self.drop_path(read)
        return super().forward(x, valid, queries)
