"""A vision transformer for export-model: export-model examples/vision_tower.py:tower OUT --layers all

Shows the form of a front end of one's own: a function without arguments that returns the module, its example inputs and which of
their axes vary. Replace `tower` with a function that loads your weights and a few of your images.

The weights and images here are random. The report of this export therefore shows that the graph runs and how fast it is; how well
attention is approximated on random numbers says nothing about a trained tower.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class Attention(nn.Module):
    """Self-attention over all patches. The call of scaled_dot_product_attention is what export-model replaces."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, width] to the same."""
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        return self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width))


class Block(nn.Module):
    """Attention and a perceptron, each behind a norm and beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(width), Attention(width, heads), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, width] to the same."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTower(nn.Module):
    """Square images to one vector a patch and their mean."""

    def __init__(self, pixels: int, patch: int, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, patch, stride=patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, (pixels // patch) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """images [batch, 3, pixels, pixels] to patches [batch, (pixels / patch)^2, width] and pooled [batch, width]."""
        x = self.embed(images).flatten(2).transpose(1, 2) + self.position
        patches = self.norm(self.blocks(x))
        return {"patches": patches, "pooled": patches.mean(1)}


def tower():
    """1008 pixels in patches of 14: 5184 tokens."""
    return VisionTower(1008, 14, width=384, heads=6, depth=4), (torch.randn(2, 3, 1008, 1008),), ({0: "batch"},)


def small():
    """The same form in seconds on a processor: 132 pixels in patches of 11, 144 tokens."""
    return VisionTower(132, 11, width=48, heads=3, depth=2), (torch.randn(3, 3, 132, 132),), ({0: "batch"},)
