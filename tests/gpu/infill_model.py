"""A small transformer that attends in both directions over bytes, trained here in a minute; its attention can be replaced."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from infill_task import MASK, VOCABULARY, Batch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

# (q, k, v [B,H,n,D], layer) -> o [B,H,n,D]
Attend = Callable[[Tensor, Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class Shape:
    """Sizes of the model."""

    hidden: int = 256
    layers: int = 4
    heads: int = 4
    theta: float = 1e4  # of the rotary positions


def exact(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
    """PyTorch's full attention."""
    return scaled_dot_product_attention(q, k, v)


def rotary(n: int, dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine [n, dim / 2] of rotary positions."""
    angle = torch.arange(n, device=device)[:, None] * theta ** (-torch.arange(0, dim, 2, device=device) / dim)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """x [B,H,n,D], a quarter of it turned by its positions: the rest tells what stands there, whatever the distance."""
    turned = 2 * cosine.shape[-1]
    a, b = x[..., :turned].float().chunk(2, -1)
    return torch.cat([(a * cosine - b * sine).to(x.dtype), (b * cosine + a * sine).to(x.dtype), x[..., turned:]], -1)


class Block(nn.Module):
    """Attention and a feed-forward network, each on a normalised residual stream."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        d = shape.hidden
        self.heads = shape.heads
        self.norms = nn.ModuleList(nn.RMSNorm(d) for _ in range(2))
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.up, self.down = nn.Linear(d, 3 * d, bias=False), nn.Linear(3 * d, d, bias=False)
        with torch.no_grad():  # alike attends to alike from the start: without it a minute is too short to discover copying
            self.qkv.weight[: 2 * d] *= 1.5
            self.qkv.weight[d : 2 * d] = self.qkv.weight[:d]

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], attend: Attend, layer: int) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(attend(rotate(q, *angles), rotate(k, *angles), v, layer).transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))


class Infill(nn.Module):
    """Bytes int64 [B, n] to logits [B, n, VOCABULARY]. Each byte is read together with two neighbours to each side."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed = nn.Embedding(VOCABULARY, shape.hidden)
        self.near = nn.Conv1d(shape.hidden, shape.hidden, 5, padding=2)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm, self.head = nn.RMSNorm(shape.hidden), nn.Linear(shape.hidden, VOCABULARY, bias=False)
        with torch.no_grad():
            self.embed.weight[MASK] = 0  # or hidden bytes would be alike before anything else is

    def forward(self, ids: Tensor, attend: Attend = exact) -> Tensor:
        x = self.near(self.embed(ids).transpose(1, 2)).transpose(1, 2)
        angles = rotary(ids.shape[1], self.shape.hidden // self.shape.heads // 4, self.shape.theta, ids.device)
        for layer, block in enumerate(self.blocks):
            x = block(x, angles, attend, layer)
        return self.head(self.norm(x))


def lesson(share: float, longest: int) -> int:
    """Length of the windows after `share` of the training: a sixteenth of the longest, a quarter, all of it. Few keys to choose from
    are what teaches a model to find a copy at all."""
    return max(256, longest // (16 if share < 0.5 else 4 if share < 0.7 else 1))


def train(
    model: Infill, take: Callable[[int], Batch], longest: int, seconds: float, steps: int, rate: float, say: Callable[[str], None]
) -> int:
    """AdamW on the hidden bytes of `take(length)` until `seconds` or `steps` are over, `rate` falling to a tenth; returns the steps done.

    In bf16 where the model lies on a GPU.
    """
    device = next(model.parameters()).device
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    begun, done = time.monotonic(), 0
    while done < steps and (spent := time.monotonic() - begun) < seconds:
        share = max(done / steps, spent / seconds)
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, (done + 1) / 50) * (0.1 + 0.45 * (1 + math.cos(math.pi * share)))
        given = take(lesson(share, longest)).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(given.inputs)[given.hidden]
        target = given.targets[given.hidden]
        loss = cross_entropy(logits.float(), target)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        done += 1
        if done % 50 == 0 or done == 1:
            restored = (logits.argmax(-1) == target)[given.copied[given.hidden]].float().mean()
            said = f"{loss.item():.3f} nats a hidden byte, copies restored {restored.item():.3f}"
            say(f"step {done}, {spent:.0f} s, windows of {given.inputs.shape[1]}: {said}")
    return done
