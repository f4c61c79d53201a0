"""The plain twin: HiCMAE pre-training written from the description of the method the obvious way.

It is what `affekt.pretrain` is compared with, in its losses and in its speed, and it wastes what the published code
wastes: it embeds every token and drops nine of ten, gathers by boolean mask, writes attention out, finishes the last
decoder layer for tokens nobody predicts, normalises layers nobody reads, and walks through the parameters one by one.
Modules and parameters have the names of `affekt.pretrain.hicmae.HiCMAE`; `load_ours` copies its weights.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from affekt.pretrain.hicmae_settings import HiCMAESettings

PICTURE_MEAN, PICTURE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, heads, N, d), (B, heads, M, d), (B, heads, M, d) -> (B, N, heads * d)."""
    weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return (weights.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        q, k, v = F.linear(x, self.qkv.weight, bias).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj(softmax_attention(q, k, v))


class CrossAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.kv = nn.Linear(dim, dim, bias=False), nn.Linear(dim, 2 * dim, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = F.linear(x, self.q.weight, self.q_bias).reshape(b, n, self.num_heads, -1).transpose(1, 2)
        bias = torch.cat([torch.zeros_like(self.v_bias), self.v_bias])
        kv = F.linear(context, self.kv.weight, bias)
        k, v = kv.reshape(b, context.shape[1], 2, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj(softmax_attention(q, k, v))


class Mlp(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A self block; with `cross` it first reads a context."""

    def __init__(self, dim: int, num_heads: int, cross: bool = False):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), SelfAttention(dim, num_heads)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), Mlp(dim)
        if cross:
            self.cross_norm1, self.cross_norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
            self.cross_attn = CrossAttention(dim, num_heads)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if context is not None:
            x = x + self.cross_attn(self.cross_norm1(x), self.cross_norm2(context))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    def __init__(self, patch_embed: nn.Module, tokens: int, s: HiCMAESettings):
        super().__init__()
        self.patch_embed = patch_embed
        self.pos_embed = sinusoids(tokens, s.embed_dim)  # a plain tensor: it stays on the CPU and is copied every step
        self.blocks = nn.ModuleList(Block(s.embed_dim, s.num_heads) for _ in range(s.depth))
        self.norm = nn.LayerNorm(s.embed_dim, eps=1e-6)

    def forward(self, x: Tensor, mask: Tensor) -> list[Tensor]:
        """Pictures or log-mels and a bool (B, N) mask, True = hidden -> every layer's normed output, each (B, K, D)."""
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = x + self.pos_embed.to(x)
        x = x[~mask].reshape(len(mask), -1, x.shape[-1])
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(self.norm(x))
        return outputs


class Fusion(nn.Module):
    def __init__(self, s: HiCMAESettings):
        super().__init__()
        shape, levels = (s.embed_dim, s.num_heads, True), range(s.fusion_depth)
        self.blocks_video = nn.ModuleList(Block(*shape) for _ in levels)
        self.blocks_audio = nn.ModuleList(Block(*shape) for _ in levels)
        self.norm_video, self.norm_audio = (nn.LayerNorm(s.embed_dim, eps=1e-6) for _ in range(2))

    def forward(self, video: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
        for block_video, block_audio in zip(self.blocks_video, self.blocks_audio, strict=True):
            video, audio = block_video(video, audio), block_audio(audio, video)
        return self.norm_video(video), self.norm_audio(audio)


class Decoder(nn.Module):
    def __init__(self, tokens: int, patch_dim: int, s: HiCMAESettings):
        super().__init__()
        dim, heads = s.decoder_embed_dim, s.decoder_num_heads
        self.decoder_embed = nn.Linear(s.embed_dim, dim, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = sinusoids(tokens, dim)
        self.blocks = nn.ModuleList([Block(dim, heads), *(Block(dim, heads, cross=True) for _ in s.taps)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.decoder_pred = nn.Linear(dim, patch_dim)

    def forward(self, x: Tensor, taps: list[Tensor], mask: Tensor) -> Tensor:
        """Fused tokens and taps, shallow to deep, each (B, K, D) -> the hidden patches (B, M, patch_dim)."""
        x = self.decoder_embed(x)
        b, _, dim = x.shape
        pos = self.pos_embed.to(x).expand(b, -1, -1)
        pos_visible, pos_hidden = pos[~mask].reshape(b, -1, dim), pos[mask].reshape(b, -1, dim)
        x = torch.cat([x + pos_visible, self.mask_token + pos_hidden], dim=1)
        x = self.blocks[0](x)
        for block, tap in zip(self.blocks[1:], reversed(taps), strict=True):
            x = block(x, self.decoder_embed(tap) + pos_visible)
        return self.decoder_pred(self.norm(x[:, -pos_hidden.shape[1] :]))


class PlainHiCMAE(nn.Module):
    """The losses of our `HiCMAE`, for clips that have both streams, in one process.

    `forward(video (B, 3, T, H, W), audio (B, 1, frames, mels), mask_video (B, N), mask_audio (B, N))`; masks are bool,
    True = hidden.
    """

    def __init__(self, s: HiCMAESettings):
        super().__init__()
        self.settings = s
        tubelet, patch = (s.tubelet_size, s.patch_size, s.patch_size), (s.patch_size_audio, s.patch_size_audio)
        tokens_video, tokens_audio = math.prod(s.grid_video), math.prod(s.grid_audio)
        self.encoder_video = Encoder(nn.Conv3d(3, s.embed_dim, tubelet, tubelet), tokens_video, s)
        self.encoder_audio = Encoder(nn.Conv2d(1, s.embed_dim, patch, patch), tokens_audio, s)
        self.encoder_fusion = Fusion(s)
        self.decoder_video = Decoder(tokens_video, 3 * math.prod(tubelet), s)
        self.decoder_audio = Decoder(tokens_audio, math.prod(patch), s)

    def load_ours(self, weights: dict[str, Tensor]) -> None:
        """Copy the weights of a `HiCMAE` with the same settings."""
        self.load_state_dict({name: self.in_our_place(name, tensor) for name, tensor in weights.items()})

    def in_our_place(self, name: str, tensor: Tensor) -> Tensor:
        """A weight, or its gradient, of our model in this one's shape: patches are embedded by convolutions here."""
        s = self.settings
        if name == "encoder_video.patch_embed.weight":  # ours is (D, frame * y * x * channel)
            return tensor.unflatten(1, (s.tubelet_size, s.patch_size, s.patch_size, 3)).permute(0, 4, 1, 2, 3)
        if name == "encoder_audio.patch_embed.weight":
            return tensor.unflatten(1, (1, s.patch_size_audio, s.patch_size_audio))
        return tensor

    def forward(self, video: Tensor, audio: Tensor, mask_video: Tensor, mask_audio: Tensor) -> dict[str, Tensor]:
        s = self.settings
        layers_video, layers_audio = self.encoder_video(video, mask_video), self.encoder_audio(audio, mask_audio)
        taps_video, taps_audio = ([layers[tap - 1] for tap in s.taps] for layers in (layers_video, layers_audio))
        fused_video, fused_audio = self.encoder_fusion(layers_video[-1], layers_audio[-1])
        predicted_video = self.decoder_video(fused_video, taps_video, mask_video)
        predicted_audio = self.decoder_audio(fused_audio, taps_audio, mask_audio)

        with torch.no_grad():
            wanted_video = video_targets(video, s)[mask_video].reshape(predicted_video.shape)
            wanted_audio = audio_targets(audio, s.patch_size_audio)[mask_audio].reshape(predicted_audio.shape)
        losses = {
            "loss_video": F.mse_loss(predicted_video, wanted_video),
            "loss_audio": F.mse_loss(predicted_audio, wanted_audio),
            "loss_contrast": sum(info_nce(v, a, s.temperature) for v, a in zip(taps_video, taps_audio, strict=True)),
        }
        weighted = s.contrast_weight * losses["loss_contrast"]
        return {"loss": losses["loss_video"] + losses["loss_audio"] + weighted, **losses}


def video_targets(video: Tensor, s: HiCMAESettings) -> Tensor:
    """(B, 3, T, H, W) -> (B, N, tubelet * p * p * 3): pixels of 0 to 1, standardised per tubelet and colour, later
    frames of a tubelet as their difference to the frame before."""
    mean, std = (
        torch.tensor(values, device=video.device)[:, None, None, None] for values in (PICTURE_MEAN, PICTURE_STD)
    )
    (t, h, w), p = s.grid_video, s.patch_size
    x = (video * std + mean).reshape(-1, 3, t, s.tubelet_size, h, p, w, p)
    x = x.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(-1, t * h * w, s.tubelet_size * p * p, 3)
    x = (x - x.mean(dim=2, keepdim=True)) / (x.var(dim=2, unbiased=True, keepdim=True).sqrt() + 1e-6)
    frames = x.reshape(-1, t * h * w, s.tubelet_size, p * p * 3)
    return torch.cat([frames[:, :, :1], frames[:, :, 1:] - frames[:, :, :-1]], dim=2).flatten(2)


def audio_targets(audio: Tensor, p: int) -> Tensor:
    """(B, 1, frames, mels) -> (B, N, p * p), each patch standardised over its values."""
    b, _, frames, mels = audio.shape
    x = audio.reshape(b, frames // p, p, mels // p, p).transpose(2, 3).reshape(b, -1, p * p)
    return (x - x.mean(dim=-1, keepdim=True)) / (x.var(dim=-1, unbiased=True, keepdim=True).sqrt() + 1e-6)


def info_nce(video: Tensor, audio: Tensor, temperature: float) -> Tensor:
    """Symmetric contrast of (B, K, D) token sequences, pooled, against the other clips of the batch."""
    video, audio = F.normalize(video.mean(dim=1), dim=-1), F.normalize(audio.mean(dim=1), dim=-1)
    logits, labels = video @ audio.T / temperature, torch.arange(len(video), device=video.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def sinusoids(length: int, dim: int) -> Tensor:
    """(1, length, dim): sin on even channels, cos on odd ones, of position / 10000 ** (2 * (channel // 2) / dim)."""
    rows = [[p / 10000 ** (2 * (j // 2) / dim) for j in range(dim)] for p in range(length)]
    table = torch.tensor(rows, dtype=torch.float64)
    table[:, 0::2], table[:, 1::2] = table[:, 0::2].sin(), table[:, 1::2].cos()
    return table.float()[None]


def plain_optimizer(model: nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW one parameter at a time, with the hyper-parameters of the published pre-training."""
    decay, free = [], []
    for name, parameter in model.named_parameters():
        (free if parameter.ndim == 1 or name.endswith("mask_token") else decay).append(parameter)
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, foreach=False, fused=False)


def plain_step(model: PlainHiCMAE, optimizer: torch.optim.Optimizer, *inputs: Tensor) -> None:
    """One step in the precision of the weights; as in the published loop it looks at the loss before it goes on."""
    loss = model(*inputs)["loss"]
    if not math.isfinite(loss.item()):
        raise FloatingPointError("the plain twin's loss is not finite")
    loss.backward()
    torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm()
    optimizer.step()
    optimizer.zero_grad()
