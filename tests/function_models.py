"""Modules that use attention in every way, and functions that return them: the FILE.py:FUNCTION of the tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, S, H * D] to [B, H, S, D]."""
    return x.view(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Queries from x, keys and values from `memory` (x itself by default), with fewer key heads where `groups` says so."""

    def __init__(self, width: int = 24, heads: int = 4, groups: int = 4, causal: bool = False, scale: float | None = None) -> None:
        super().__init__()
        self.heads, self.groups, self.causal, self.scale = heads, groups, causal, scale
        self.q, self.o = nn.Linear(width, width), nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width * groups // heads)
        for part in (self.q, self.kv):
            nn.init.normal_(part.weight, std=0.6)  # sharp: an approximation shows

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        k, v = self.kv(x if memory is None else memory).chunk(2, -1)
        q, k, v = split_heads(self.q(x), self.heads), split_heads(k, self.groups), split_heads(v, self.groups)
        gqa = self.heads != self.groups
        return self.o(join_heads(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, scale=self.scale, enable_gqa=gqa)))


class Encoder(nn.Module):
    """Token ids to features; the second block is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(31, 24)
        self.first, self.second = Attention(), Attention(groups=2, scale=0.3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.first(x)
        x = x + self.second(x)
        return x + self.second(x)


def encoder():
    return Encoder(), (torch.randint(31, (2, 17)),), ({0: "batch", 1: "sequence"},)


@dataclass
class Decoded:
    hidden: Tensor
    skipped: Tensor | None
    parts: tuple[Tensor, Tensor]


class Decoder(nn.Module):
    """Causal self-attention with as many rows as keys, cross-attention, and a causal call whose rows and keys differ."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.cross = Attention(groups=2, causal=True), Attention(groups=1)
        self.unproved = Attention(causal=True)

    def forward(self, x: Tensor, *, memory: Tensor, scale: Tensor) -> Decoded:
        x = x + self.own(x) * scale
        y = x + self.cross(x, memory)
        z = y + self.unproved(y, memory)
        return Decoded(z, None, (x, y))


def decoder():
    length, keys = Dim("sequence", max=300), Dim("keys", min=3, max=200)
    examples = {"x": torch.randn(2, 13, 24), "memory": torch.randn(2, 11, 24), "scale": torch.ones(1)}
    return Decoder(), examples, {"x": {0: "batch", 1: length}, "memory": {0: "batch", 1: keys}}


class VitAttention(nn.Module):
    """As the usual libraries of vision models write it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = nn.LayerNorm(width // heads), nn.LayerNorm(width // heads)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = 3 * self.q_norm(q), 3 * self.k_norm(k)
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.drop.p if self.training else 0.0)
        return self.drop(self.proj(x.transpose(1, 2).reshape(batch, tokens, width)))


class Vit(nn.Module):
    """Odd image, class token, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 30, 5, stride=5)
        self.cls_token, self.pos_embed = nn.Parameter(torch.randn(1, 1, 30)), nn.Parameter(torch.randn(1, 1 + 9 * 11, 30))
        self.norms = nn.ModuleList(nn.LayerNorm(30) for _ in range(2))
        self.blocks = nn.ModuleList(VitAttention(30, 3) for _ in range(2))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x))
        return x[:, 1:], x[:, 0]


def vit():
    """The example has one image; the dimension still varies."""
    return Vit(), (torch.randn(1, 3, 47, 55),), ({0: "batch"},)


def fixed():
    return Attention(causal=True), (torch.randn(1, 71, 24),)


class Layers(nn.Module):
    """PyTorch's own layer, which calls a fused operator unless it is told not to."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(24, 4, 48, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"x": self.encoder(x)}


def layers():
    return Layers(), {"x": torch.randn(2, 9, 24)}, {"x": {1: Dim.DYNAMIC}}


class EveryKind(nn.Module):
    """One attention call of each kind that must stay, and one that can go; [B, 4, S, 6] and [B, 4, M, 6] in."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.MultiheadAttention(24, 4, batch_first=True)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        attend = F.scaled_dot_product_attention
        rows = q.shape[2]
        mask = torch.ones(rows, rows, dtype=torch.bool, device=q.device).tril()
        logits = q @ k.transpose(-1, -2) / 6**0.5
        with torch.autocast("cpu", torch.bfloat16):
            low = attend(q, k, k)
        sequence = join_heads(q)
        return (
            attend(q, k, k),
            attend(q, q, q, attn_mask=mask),
            attend(q, k, k, dropout_p=0.25) * 0,  # an answer that differs each time is refused
            attend(q, k, k, scale=-0.5),
            attend(q, k, k, is_causal=True),
            attend(q[0], k[0], k[0]),
            attend(q, k[:1], k[:1]),
            attend(q, k[:, :1], k[:, :1]),
            attend(q.double(), k.double(), k.double()).to(q.dtype),
            torch.cond(q.sum() > 0, lambda q: attend(q, q, q), lambda q: q.clone(), (q,)),
            low.to(q.dtype),
            torch.softmax(logits.masked_fill(logits > 9, 0.0), -1) @ k,
            self.weights(sequence, sequence, sequence)[0],
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q)[0],
        )


def every_kind():
    shapes = ({0: "batch", 2: "sequence"}, {0: "batch", 2: "keys"})
    return EveryKind(), (torch.randn(2, 4, 7, 6), torch.randn(2, 4, 5, 6)), shapes


class OutOfRange(nn.Module):
    """A call that the operator takes between heads that are too large, values that are, and a scale below 0."""

    def forward(self, q: Tensor) -> tuple[Tensor, ...]:
        attend, large = F.scaled_dot_product_attention, q.repeat(1, 1, 1, 43)
        return attend(large, large, q), attend(q, q, large), attend(q, q, q), attend(q, q, q, scale=-0.5)


def out_of_range():
    return OutOfRange(), (torch.randn(1, 4, 7, 6),), ({2: "sequence"},)
