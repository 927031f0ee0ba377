"""Ways to find heavy keys by hashing and sorting, for tests/study_sortlsh.py: what the operator does, and what it could do.

Every variant meets the same number of keys in each node of the tree (operator rules 24 and 25); sinks, local part and samples are
the operator's. A softmax does not change when all keys move by one vector, and for one query a change of its length is a change of
temperature: hashes may look at Q and K after any such step, attention itself never does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hyperattention.config import Config
from hyperattention.draws import draw_samples
from hyperattention.geometry import Geometry, Node
from hyperattention.sortlsh import mean_token, ranks, taken_keys

ROUND_SEEDS = 7919  # between the seeds of two rounds
AS_NOW, BY_HASH, BY_CENTROID = "equal rank", "hash", "centroid"


@dataclass(frozen=True)
class Variant:
    """centre: "" (hash Q and K themselves), "keys" or "both", each less its mean over all tokens of its head, or "operator": as the
    operator's hash_centre does it. angle: Simple-LSH (Neyshabur and Srebro 2015), keys get one more element that
    gives all of them the length of the longest, queries a 0. bits: projections, 0 for the config's. match: how a block of sorted
    rows gets its keys. rounds: sorts under seeds of their own, each with its part of the keys; a key found twice counts once.
    """

    name: str
    centre: str = ""
    angle: bool = False
    bits: int = 0
    match: str = AS_NOW
    rounds: int = 1


def hashed(variant: Variant, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """What is hashed in the place of q [Hq, S, D] and k [Hkv, S, D]."""
    if variant.centre in ("keys", "both"):
        k = k - k.mean(1, keepdim=True)
    if variant.centre == "both":
        q = q - q.mean(1, keepdim=True)
    if variant.angle:
        square = k.square().sum(-1, keepdim=True)
        k = torch.cat([k, (square.amax(1, keepdim=True) - square).sqrt()], -1)
        q = torch.cat([q, torch.zeros_like(q[..., :1])], -1)
    return q, k


def weights(variant: Variant, c: Config, q: Tensor, k: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Which keys each of `rows` [R] meets under a variant: exact ones bool [Hq, R, S], and the weights of all, fp32 [Hq, R, S].

    q [Hq, S, D], k [Hkv, S, D] of one self-attention. Each node's samples are drawn from its keys as the first round sorts them; one
    among the row's exact keys counts 0 (rule 16).
    """
    heads, size, dim = q.shape
    g = Geometry(c, 1, heads, len(k), size, size, dim, dim)
    exact = local_and_sinks(c, rows, size).expand(heads, -1, -1).clone()
    first_orders = []
    of_hash = hashed(variant, q.float(), k.float())
    bits, part = variant.bits or c.num_projections, c.block_size // variant.rounds
    for turn in range(variant.rounds):
        of_round = replace(c, num_projections=bits, seed=c.seed + turn * ROUND_SEEDS, block_size=part)
        means = (mean_token(q), mean_token(k[:, c.sinks :])) if variant.centre == "operator" else (None, None)
        rank_q, rank_k = (ranks(x, of_round, mean) for x, mean in zip(of_hash, means, strict=True))
        for level, m in g.nodes:
            node = g.node(level, m, size)
            inside = ((rows >= node.rows.start) & (rows < node.rows.stop)).nonzero()[:, 0]
            order = torch.sort(rank_k[:, node.keys.start : node.keys.stop], stable=True).indices.repeat_interleave(g.group, 0)
            if turn == 0:
                first_orders.append((inside, node.keys.start + order))
            if len(inside) and len(node.keys):
                own = rank_q[:, node.rows.start : node.rows.stop], rank_k[:, node.keys.start : node.keys.stop].repeat_interleave(g.group, 0)
                starts, count = _starts(variant, of_round, own, order, (q, k.repeat_interleave(g.group, 0)), node)
                slot = torch.sort(own[0], stable=True).indices.argsort(-1)[:, rows[inside] - node.rows.start]
                place = starts.gather(1, slot // part)[..., None] + torch.arange(count, device=q.device)
                place = place.clamp(max=len(node.keys) - 1)
                key = node.keys.start + order.gather(1, place.flatten(1)).view_as(place)
                exact[:, inside] = exact[:, inside].scatter(2, key, True)
    exact &= visible(c, rows, size)
    weight = exact.float()
    index, factor = draw_samples(g, None, q.device)
    for draw, (inside, key) in enumerate(first_orders):
        at = index[0, :, draw].long()
        at = key.gather(1, at.clamp(min=0))[:, None].expand(-1, len(inside), -1)
        far = at < far_of(c, rows[inside], size)[:, None]
        amount = factor[0, :, draw, None] * (far & ~exact[:, inside].gather(2, at))
        weight[:, inside] = weight[:, inside].scatter_add(2, at, amount)
    return exact, weight


def _starts(
    variant: Variant, c: Config, rank: tuple[Tensor, Tensor], order: Tensor, qk: tuple[Tensor, Tensor], node: Node
) -> tuple[Tensor, int]:
    """First place in the sorted keys of each query block [Hq, blocks], and how many keys are taken from there."""
    rows, keys, b = len(node.rows), len(node.keys), c.block_size
    blocks, count = -(-rows // b), min(c.num_blocks * b, keys)
    if variant.match == AS_NOW:
        starts = [taken_keys(c, block, rows, keys).start for block in range(blocks)]
        return torch.tensor(starts, device=order.device).expand(len(order), -1), count
    edges = torch.arange(blocks, device=order.device) * b
    if variant.match == BY_HASH:
        middle = rank[0].sort(-1).values[:, torch.minimum(edges + b // 2, edges * 0 + rows - 1)].contiguous()
        sorted_k = rank[1].sort(-1).values
        centre = (torch.searchsorted(sorted_k, middle) + torch.searchsorted(sorted_k, middle, right=True)) // 2
    else:
        queries, keys_sorted = (
            x[:, r.start : r.stop].float().gather(1, o[..., None].expand(-1, -1, x.shape[-1]))
            for x, r, o in zip(qk, (node.rows, node.keys), (torch.sort(rank[0], stable=True).indices, order), strict=True)
        )
        centre = (_means(queries, b) @ _means(keys_sorted, b).transpose(1, 2)).argmax(-1) * b + b // 2
    return (centre - count // 2).clamp(0, keys - count), count


def _means(x: Tensor, size: int) -> Tensor:
    """Mean of each `size` consecutive rows of x [H, S, D]; the last may be of fewer."""
    return torch.stack([part.mean(1) for part in x.split(size, 1)], 1)


def far_of(c: Config, rows: Tensor, size: int) -> Tensor:
    """First key that is not local, for each row [R] (rule 9)."""
    return (rows // c.local_size - c.local_overlap).clamp(min=0) * c.local_size if c.causal else torch.full_like(rows, size)


def visible(c: Config, rows: Tensor, size: int) -> Tensor:
    """Keys that each row may see, bool [R, S]."""
    key = torch.arange(size, device=rows.device)
    return key <= rows[:, None] if c.causal else torch.ones(len(rows), size, dtype=torch.bool, device=rows.device)


def local_and_sinks(c: Config, rows: Tensor, size: int) -> Tensor:
    """Rules 7 to 9: bool [R, S]."""
    key, far = torch.arange(size, device=rows.device), far_of(c, rows, size)[:, None]
    local = key >= far if c.causal else torch.zeros_like(key >= far)
    return visible(c, rows, size) & (local | (key < far.clamp(max=c.sinks)))
