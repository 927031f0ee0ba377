"""What each stage of the op has to do: floating-point operations, 8-bit operations, and the fewest bytes through device memory.

Attention takes 4 D operations a pair of a query and a key (a logit and a value row added up; head sizes of values and keys are
equal here), over the pairs of validate/cost.py: those of the operator's rules, not those that a tile masks. The selector `blocks`
takes 2 D 8-bit operations a pair of pools. Bytes count every input read once and every output written once.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import astuple, dataclass

from hyperattention.geometry import Geometry
from hyperattention.selection import COARSE_POOL, uses_superblocks
from hyperattention.validate.cost import count_keys

# In the order in which they run; those of attention from the first to the last that a row meets.
SELECTION = {"blocks": ("pool", "select"), "sortlsh": ("hash", "sort")}
PARTS = ("local", "sinks", "heavy", "sampled")
EXACT = "exact"
LSE_BYTES, RANK_BYTES, PLAN_BYTES, FACTOR_BYTES = 4, 2, 4, 4
POOL_STEP = 64  # bytes that a quantised pool's row is filled up to


@dataclass(frozen=True)
class Work:
    """Operations of one stage over all heads and batch rows."""

    flops: int = 0
    int8_ops: int = 0
    bytes: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def attention_work(g: Geometry, element: int) -> dict[str, Work]:
    """Work of every part that holds a pair, in order; `element` = bytes of one. The first carries Q, K, V, O and the LSE.

    Sq = Sk and no padding, as in the benchmark. The exact path is one part.
    """
    keys, rows = count_keys(g.config, g.seq_q), g.batch * g.heads_q
    pairs = {name: round(count * g.seq_q) * rows for name, count in zip(PARTS, (keys.local, keys.sinks, keys.heavy, keys.samples))}
    if g.exact:
        pairs = {EXACT: pairs["local"]}
    moved = element * (g.head_dim + g.head_dim_v) * (g.batch * g.heads_kv * g.seq_k + rows * g.seq_q) + LSE_BYTES * rows * g.seq_q
    present = [name for name, count in pairs.items() if count]
    return {name: Work(flops=2 * (g.head_dim + g.head_dim_v) * pairs[name], bytes=moved * (name == present[0])) for name in present}


def selection_work(g: Geometry, element: int) -> dict[str, Work]:
    """Work of the two stages that make the plan; empty where there is no plan to make."""
    c = g.config
    if g.exact or not (c.num_blocks or (g.sorts and c.sample_size)):
        return {}
    sides = ((g.batch * g.heads_q, g.seq_q), (g.batch * g.heads_kv, g.seq_k))
    read = sum(element * g.head_dim * heads * length for heads, length in sides)
    if g.sorts:
        ranks = RANK_BYTES * sum(heads * length for heads, length in sides)
        return {"hash": Work(bytes=read + ranks), "sort": Work(bytes=_sorted_bytes(g))} if g.nodes else {}
    two_levels = uses_superblocks(c, range(-(-g.seq_k // c.block_size)))
    sizes = {c.pool_size, COARSE_POOL} if two_levels else {c.pool_size}
    row = -(-g.head_dim // POOL_STEP) * POOL_STEP + FACTOR_BYTES
    pools = sum(heads * -(-length // size) * row for heads, length in sides for size in sizes)
    plan = PLAN_BYTES * g.batch * g.heads_q * len(g.query_blocks) * c.num_blocks
    pooled = round(count_keys(c, g.seq_q).selection * g.seq_q) * g.batch * g.heads_q
    return {"pool": Work(bytes=read + pools), "select": Work(int8_ops=2 * g.head_dim * pooled, bytes=pools + plan)}


def merge_bytes(g: Geometry, element: int) -> int:
    """Bytes of O and LSE that attention writes and reads again where its parts are launches of their own.

    `sortlsh`: every level of the tree, and local part and sinks; causal `blocks`: heavy blocks and samples, and local part and sinks.
    A row is written and read once more for every launch but the first that it takes part in.
    """
    c = g.config
    if g.exact or not (c.causal or (g.sorts and c.sinks)):
        return 0
    if g.sorts:
        nodes = (g.node(level, m, g.seq_k) for level, m in g.nodes)
        again = sum(len(node.rows) for node in nodes if len(node.keys))
    else:
        again = g.seq_q - bisect_right(range(g.seq_q), c.sinks, key=lambda row: g.far(g.first + row, g.seq_k))
    return 2 * g.batch * g.heads_q * again * (element * g.head_dim_v + LSE_BYTES)


def part_launches(g: Geometry) -> int:
    """Launches of attention where the parts that `merge_bytes` names are launches of their own."""
    near = int(bool(g.config.causal or g.config.sinks))
    if not g.sorts:
        return near + 1
    return near + len({level for level, m in g.nodes if len(g.node(level, m, g.seq_k).keys)})


def _sorted_bytes(g: Geometry) -> int:
    """The ranks of every node's rows and keys read, and the whole plan written: a slot a level of every row and key."""
    rows = keys = 0
    for level, m in g.nodes:
        node = g.node(level, m, g.seq_k)
        rows, keys = rows + len(node.rows) * bool(len(node.keys)), keys + len(node.keys)
    read = RANK_BYTES * g.batch * (g.heads_q * rows + g.heads_kv * keys)
    slots = sum(batch * heads * levels * length for batch, heads, levels, length in g.order_shapes)
    return read + PLAN_BYTES * slots
