"""A small transformer that attends in both directions over bytes, trained here in a minute; its attention can be replaced."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from infill_task import KEYS, MASK, VOCABULARY, Batch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, pad, scaled_dot_product_attention

# (q, k, v [B,H,n,D], layer) -> o [B,H,n,D]
Attend = Callable[[Tensor, Tensor, Tensor, int], Tensor]
SHORTEST = 256  # windows that a training begins with, at least
GROWING = (0.2, 0.65)  # the share of the training at which windows begin to grow, and from which on they are of full length


@dataclass(frozen=True)
class Shape:
    """Sizes of the model. `reach`: neighbours to each side that a token is read together with. `keys`: whether tokens have keys."""

    hidden: int = 256
    layers: int = 4
    heads: int = 4
    reach: int = 4
    keys: bool = False
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


def norm(x: Tensor) -> Tensor:
    """x [..., d] with a root mean square of 1; the linear map behind it holds the weights."""
    return nn.functional.rms_norm(x, x.shape[-1:], eps=1e-6)


class Block(nn.Module):
    """Attention and a feed-forward network, each on a normalised residual stream."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        d = shape.hidden
        self.heads = shape.heads
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.up, self.down = nn.Linear(d, 3 * d, bias=False), nn.Linear(3 * d, d, bias=False)
        with torch.no_grad():  # alike attends to alike from the start: without it a minute is too short to discover copying
            self.qkv.weight[: 2 * d] *= 2.3
            self.qkv.weight[d : 2 * d] = self.qkv.weight[:d]

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], attend: Attend, layer: int) -> Tensor:
        q, k, v = self.qkv(norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(attend(rotate(q, *angles), rotate(k, *angles), v, layer).transpose(1, 2).flatten(2))
        return x + self.down(gelu(self.up(norm(x))))


class Infill(nn.Module):
    """Tokens int64 [B, n] as in `Batch.inputs` to logits [B, n, VOCABULARY]."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape, d = shape, shape.hidden
        self.embed = nn.Embedding(VOCABULARY, d)
        self.near = nn.Linear((2 * shape.reach + 1) * d, d)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.head = nn.Linear(d, VOCABULARY, bias=False)
        with torch.no_grad():
            self.embed.weight[MASK] = 0  # or hidden bytes would be alike before anything else is
        if shape.keys:  # never trained: nothing about a key can be learnt by heart
            self.register_buffer("keys", torch.randn(KEYS, d, generator=torch.Generator().manual_seed(0)), persistent=False)

    def forward(self, ids: Tensor, attend: Attend = exact) -> Tensor:
        n, reach = ids.shape[1], self.shape.reach
        around = pad(self.embed(ids % VOCABULARY), (0, 0, reach, reach))
        x = self.near(torch.cat([around[:, at : at + n] for at in range(2 * reach + 1)], -1))
        if self.shape.keys:
            x = x + self.keys[ids // VOCABULARY]
        angles = rotary(n, self.shape.hidden // self.shape.heads // 4, self.shape.theta, ids.device)
        for layer, block in enumerate(self.blocks):
            x = block(x, angles, attend, layer)
        return self.head(norm(x))


def lesson(share: float, longest: int) -> int:
    """Length of the windows after `share` of the training: a thirty-second of the longest at first, then doubled step by step.

    Few keys to choose from are what teaches a model to find a copy at all.
    """
    low, high = GROWING
    steps = math.ceil(5 * (1 - (share - low) / (high - low))) if share >= low else 5
    return max(min(SHORTEST, longest), longest >> min(5, max(0, steps)))


def train(
    model: Infill, take: Callable[[int], Batch], longest: int, seconds: float, steps: int, rate: float, say: Callable[[str], None]
) -> int:
    """AdamW on the hidden bytes of `take(length)` until `seconds` or `steps` are over, `rate` falling to a fiftieth.

    In bf16 where the model lies on a GPU. Returns the steps done.
    """
    device = next(model.parameters()).device
    cuda = device.type == "cuda"
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=cuda)
    begun, done, tokens, said = time.monotonic(), 0, 0, -10.0
    while done < steps and (spent := time.monotonic() - begun) < seconds:
        share = max(done / steps, spent / seconds)
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, (done + 1) / 100) * (0.02 + 0.49 * (1 + math.cos(math.pi * share)))
        given = take(lesson(share, longest))
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            logits = model(given.inputs)[given.hidden].float()
        target = given.targets[given.hidden]
        loss = cross_entropy(logits, target)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        done, tokens = done + 1, tokens + given.inputs.numel()
        if spent - said >= 5 or done == steps:
            said = spent
            restored = (logits.argmax(-1) == target)[given.found[given.hidden]].float().mean()
            told = f"{loss.item():.3f} nats a hidden byte, restored {restored.item():.3f}"
            say(f"step {done}, {spent:.0f} s, {tokens / 1e6:.2f} M tokens, windows of {given.inputs.shape[1]}: {told}")
    return done
