"""The paper's selector (Han et al. 2023, sortLSH): hash, rank, and the sorted rows and keys of each node.

Rules 24 to 28 of docs/operator.md; comments quote the numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hyperattention.config import Config
from hyperattention.draws import philox
from hyperattention.geometry import Geometry, Node

# Rule 26: the tokens whose mean is taken with hash_centre are added up in parts of this many, then the parts.
CENTRE_PARTS, CENTRE_PART = 32, 128


def signs(config: Config, head_dim: int, device: torch.device | str = "cpu") -> Tensor:
    """The projections' entries, +1 or -1, float32 [D, r] (rule 26)."""
    d = torch.arange(head_dim, device=device)
    zero = torch.zeros_like(d)
    word = philox(d, zero, zero, zero + 1, config.seed)
    return 1.0 - 2.0 * ((word[:, None] >> torch.arange(config.num_projections, device=device)) & 1).float()


def gray_rank(code: Tensor) -> Tensor:
    """The inverse Gray code of up to 16 bits: neighbouring ranks are codes that differ in one bit (rule 27)."""
    for shift in (1, 2, 4, 8):
        code = code ^ (code >> shift)
    return code


def project(x: Tensor, config: Config) -> Tensor:
    """x [..., D] on each projection, float32 [..., r] (rule 26)."""
    sign = signs(config, x.shape[-1], x.device)
    total = torch.zeros(*x.shape[:-1], config.num_projections, device=x.device)
    for d in range(x.shape[-1]):  # ascending: the order of the sum is part of the contract
        total = total + x[..., d, None].float() * sign[d]
    return total


def mean_token(x: Tensor) -> Tensor:
    """Mean [..., D] of up to 4,096 of the tokens x [..., N, D] at even distances, float32; zeros where there are none (rule 26)."""
    tokens = x.shape[-2]
    count = min(tokens, CENTRE_PARTS * CENTRE_PART)
    at = torch.arange(count, device=x.device) * tokens // max(count, 1)
    taken = torch.nn.functional.pad(x[..., at, :].float(), (0, 0, 0, CENTRE_PARTS * CENTRE_PART - count))
    part = torch.zeros_like(taken[..., :CENTRE_PARTS, :])
    for s in range(CENTRE_PART):  # ascending, as is the sum of the parts: part of the contract
        part = part + taken[..., s::CENTRE_PART, :]
    total = torch.zeros_like(part[..., 0, :])
    for p in range(CENTRE_PARTS):
        total = total + part[..., p, :]
    return total / torch.full_like(total, max(count, 1))  # a plain number would become a multiplication on CUDA


def ranks(x: Tensor, config: Config, mean: Tensor | None = None) -> Tensor:
    """Rank of each row of x [..., S, D] in fp32 arithmetic, int64 [..., S] (rules 26 and 27); `mean` [..., D] with hash_centre."""
    total = project(x, config)
    least = torch.zeros_like(total[..., :1, :]) if mean is None else project(mean, config)[..., None, :]
    return gray_rank(((total > least).long() << torch.arange(config.num_projections, device=x.device)).sum(-1))


def sort_nodes(q: Tensor, k: Tensor, g: Geometry, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sorted row indices [B, Hq, levels, Sq] and key indices [B, Hkv, levels, Sk] of every node, -1 elsewhere."""
    rows, keys = (torch.full(shape, -1, dtype=torch.int32, device=q.device) for shape in g.order_shapes)
    for b, length in enumerate(g.clamp(lengths) if g.nodes else ()):
        live = g.live_rows(length)
        rank_q = ranks(q[b], g.config, mean_token(q[b, :, :live]) if g.config.hash_centre else None)
        rank_k = ranks(k[b], g.config, mean_token(k[b, :, g.config.sinks : length]) if g.config.hash_centre else None)
        for level, m in g.nodes:
            node = g.node(level, m, length)
            if len(node.keys) == 0:
                continue
            _sort(rank_q, range(node.rows.start, min(node.rows.stop, live)), rows[b, :, level])
            dead = range(min(max(node.rows.start, live), node.rows.stop), node.rows.stop)
            rows[b, :, level, dead.start : dead.stop] = torch.arange(dead.start, dead.stop, device=q.device)
            _sort(rank_k, node.keys, keys[b, :, level])
    return rows, keys


def _sort(rank: Tensor, members: range, out: Tensor) -> None:
    """Writes the members by (rank, position) into their own slots of out [H, S]."""
    if len(members):
        order = torch.sort(rank[:, members.start : members.stop], dim=-1, stable=True).indices
        out[:, members.start : members.stop] = (members.start + order).int()


def taken_keys(config: Config, block: int, live: int, keys: int) -> range:
    """Places in the node's sorted keys that query block `block` meets exactly; `live` rows in the node (rule 28)."""
    size = config.block_size
    nq, nk = max(1, -(-live // size)), -(-keys // size)
    taken = min(config.num_blocks, nk)
    centre = min((2 * block + 1) * nk // (2 * nq), nk - 1)
    start = max(0, min(centre - taken // 2, nk - taken))
    return range(start * size, min((start + taken) * size, keys))


def live_in(node: Node, live_rows: int) -> int:
    """Live rows of a node, of `live_rows` in the whole problem."""
    return max(0, min(node.rows.stop, live_rows) - node.rows.start)
