"""Keys per query: what the operator computes for a mean query row, so that a rival can be given exactly as much.

The unit is one key: a logit and a value row added up. Pairs that a kernel computes and then masks (a sample inside a chosen
block, the rest of a partly visible block) count, because they cost the same. A pooled pair of the selection counts as a whole
key although it is an 8-bit logit without a value: where the count errs, it favours the rival. Rules as in docs/operator.md.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace
from functools import lru_cache

from hyperattention.config import RANGES, Config
from hyperattention.geometry import Geometry
from hyperattention.selection import COARSE_POOL, KEPT_MIN, KEPT_SHARE, SUPERBLOCK, uses_superblocks
from hyperattention.sortlsh import taken_keys

STREAMING_SINKS = 4  # of a window whose rival has none (Xiao et al. 2023, "Efficient streaming language models")


@dataclass(frozen=True)
class Keys:
    """Keys of a mean query row, by part; `selection` in pooled pairs (`blocks`) or projections (`sortlsh`)."""

    local: float = 0.0
    sinks: float = 0.0
    heavy: float = 0.0
    samples: float = 0.0
    selection: float = 0.0

    @property
    def total(self) -> float:
        return sum(astuple(self))


def keys_per_query(config: Config, length: int) -> float:
    """Mean over the query rows of `length` tokens (Sq = Sk = length, no padding) of all that `count_keys` counts."""
    return count_keys(config, length).total


def count_keys(config: Config, length: int) -> Keys:
    """Keys of a mean query row of `length` tokens, Sq = Sk, no padding. The exact path counts as `local`."""
    if length < 1:
        return Keys()
    if config.is_exact(length, length):
        return Keys(local=(length + 1) / 2 if config.causal else float(length))
    g = Geometry(config, 1, 1, 1, length, length, 1, 1)
    local, sinks = _near(config, length)
    heavy, samples, selection = _sortlsh(g, length) if g.sorts else _blocks(g, length)
    return Keys(*(part / length for part in (local, sinks, heavy, samples, selection)))


def _near(c: Config, length: int) -> tuple[int, int]:
    """Pairs of the local part and of the sinks, over all rows (rules 7 to 9)."""
    if not c.causal:
        return 0, length * min(c.sinks, length)
    local = sinks = 0
    for start in range(0, length, c.local_size):
        rows = min(c.local_size, length - start)
        far = max(0, start - c.local_overlap * c.local_size)
        local += rows * (start - far) + rows * (rows + 1) // 2
        sinks += rows * min(c.sinks, far)
    return local, sinks


def _blocks(g: Geometry, length: int) -> tuple[int, int, int]:
    """Pairs of heavy blocks, of samples and of pools, over all rows (rules 13 to 23)."""
    c, size = g.config, g.config.block_size
    heavy = selection = 0
    for block in g.query_blocks if c.num_blocks else ():
        first, last = block * size, min((block + 1) * size, length)
        candidates = range(c.sinks // size, -(-min(g.far(first, length), length) // size))
        heavy += (last - first) * min(c.num_blocks, len(candidates)) * size
        selection += _pooled_pairs(c, last - first, candidates)
    counts = [min(c.sample_size, total) if c.stratified else c.sample_size * (total > 0) for _, total in g.draws(length)]
    rows = [min(c.local_size, length - n * c.local_size) if c.causal else length for n in g.local_blocks]
    return heavy, sum(a * b for a, b in zip(counts, rows, strict=True)), selection


def _pooled_pairs(c: Config, rows: int, candidates: range) -> int:
    """Scores of pools that choosing for one query block of `rows` rows takes (rules 20 and 23)."""
    if not candidates:
        return 0
    queries = -(-rows // c.pool_size)
    if not uses_superblocks(c, candidates):
        return queries * len(candidates) * (c.block_size // c.pool_size)
    per = SUPERBLOCK // c.block_size
    supers = -(-candidates.stop // per) - candidates.start // per
    coarse = candidates.stop * c.block_size // COARSE_POOL - candidates.start // per * SUPERBLOCK // COARSE_POOL
    kept = max(KEPT_MIN, -(-supers // KEPT_SHARE))
    return -(-rows // COARSE_POOL) * coarse + queries * kept * (SUPERBLOCK // c.pool_size)


def _sortlsh(g: Geometry, length: int) -> tuple[int, int, int]:
    """Pairs of taken blocks and of samples, and the projections, over all rows (rules 13 and 24 to 29).

    Each token is hashed once as a query and once as a key: 2 num_projections products a row. Sorting is not counted.
    """
    c, heavy, samples = g.config, 0, 0
    for level, m in g.nodes:
        node = g.node(level, m, length)
        rows, keys = len(node.rows), len(node.keys)
        if keys == 0:
            continue
        for block, start in enumerate(range(0, rows, c.block_size)):
            heavy += min(c.block_size, rows - start) * len(taken_keys(c, block, rows, keys))
        samples += rows * (min(c.sample_size, keys) if c.stratified else c.sample_size)
    return heavy, samples, 2 * c.num_projections * length


# --- window + sinks ----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=128)
def window_baseline(config: Config, length: int) -> Config:
    """Window and sinks at the keys per query of `config`, as `window_within` has it."""
    return window_within(config, keys_per_query(config, length), length)


def window_within(config: Config, budget: float, length: int) -> Config:
    """Window and sinks with the mask, scale and seed of `config`: the widest window, then as many sinks, of at most `budget` keys a query.

    Causal: the operator itself without heavy blocks and samples, its local part overlapping. Non-causal the operator has no local
    part; there `local_size` is the tile of validate/window.py, whose rows meet their own tile and the two beside it. Sizes
    step by block_size, so the window may end up with a few keys less, or where the ranges end with many less:
    `window_keys` says how many it has.
    """
    base = Config() if config.selector == "sortlsh" else config
    step = base.block_size if config.causal else RANGES["local_size"][0]
    low = -(-RANGES["local_size"][0] // step) * step
    shape = dict(block_size=base.block_size, pool_size=base.pool_size, local_size=low)
    plain = replace(config, selector="blocks", num_blocks=0, sample_size=0, local_overlap=1, **shape)
    sinks = config.sinks or STREAMING_SINKS
    sizes = range(low, RANGES["local_size"][1] + 1, step)
    fitting = [size for size in sizes if window_keys(replace(plain, local_size=size, sinks=sinks), length) <= budget]
    narrow = replace(plain, local_size=fitting[0] if fitting else low, sinks=sinks)
    widest = max((replace(plain, local_size=size, sinks=sinks) for size in fitting), key=lambda c: window_keys(c, length), default=narrow)
    low, high = (sinks, RANGES["sinks"][1]) if fitting else (0, sinks)
    while low < high:  # the most sinks that fit
        middle = (low + high + 1) // 2
        fits = window_keys(replace(widest, sinks=middle), length) <= budget
        low, high = (middle, high) if fits else (low, middle - 1)
    return replace(widest, sinks=low)


def window_keys(window: Config, length: int) -> float:
    """Keys of a mean query row of a `window_baseline`; the exact path as in `count_keys`."""
    if window.causal or window.is_exact(length, length):
        return keys_per_query(window, length)
    size, pairs = window.local_size, 0
    for start in range(0, length, size):
        low, high = max(0, start - size), min(length, start + 2 * size)
        pairs += min(size, length - start) * (high - low + min(window.sinks, low))
    return pairs / length
