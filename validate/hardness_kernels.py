"""Triton kernels of hardness on a GPU: what PyTorch would do in dozens of passes over the logits, in one launch each.

`hardness_fused.py` starts them and says what goes in. Arithmetic is fp32; products of fp16 and bf16 are exact, those of fp32 are not
rounded first. "first" and "stop" bound half-open ranges everywhere; logits in memory are not scaled yet.
"""

# Triton reads the annotations of its kernels, so there is no `from __future__ import annotations` here.
import triton
import triton.language as tl

_NONE = tl.constexpr(float("-inf"))
_LOWEST = tl.constexpr(-1e38)  # finite: its difference from -inf is no NaN
# Numbers for whose sake no kernel is compiled anew: all but the strides of logits and vectors, which decide how wide loads are.
_ANY_ROWS = ["length", "sinks", "rows", "nodes"]
_ANY_LEFT = ["sinks", "samples", "rows", "heavy_keys", "order_keys", "order_levels", "order_first", "draws", "group"]
_ANY_SAMPLED = ["length", "rows", "padded", "local_size", "blocks", "levels"]
_ANY_COLUMNS = ["heads", "first", "seq_q", "seq_k", "group", "columns", "column_stride", "range_stride", "tile_stride"]
_ANY_LSE = ["heads", "seq_q", "seq_k", "group"]


@triton.jit
def _lse(logits, first, stop, scale, SIZE: tl.constexpr):
    """Log of the sum of exp(scale * logits[first:stop]), -inf of none; each lane keeps its own largest logit."""
    lane = tl.arange(0, SIZE)
    most, total = tl.full([SIZE], _LOWEST, tl.float32), tl.zeros([SIZE], tl.float32)
    for start in range(first, stop, SIZE):
        logit = tl.load(logits + start + lane, start + lane < stop, _NONE) * scale
        higher = tl.maximum(most, logit)
        total = total * tl.exp(most - higher) + tl.exp(logit - higher)
        most = higher
    highest = tl.max(most, 0)
    return highest + tl.log(tl.sum(total * tl.exp(most - highest), 0))


@triton.jit
def _joined(a, b):
    """log(exp(a) + exp(b))."""
    highest = tl.maximum(tl.maximum(a, b), _LOWEST)
    return highest + tl.log(tl.exp(a - highest) + tl.exp(b - highest))


@triton.jit(do_not_specialize=_ANY_ROWS)
def row_kernel(
    logits,  # fp32 [Hq, rows, keys]
    position,  # int32 [rows]
    own_first,  # int32 [rows]: first key of the row's own local block
    node_first,  # int32 [rows, nodes]: the blocks off the diagonal: with the sinks and the own block all keys of the row
    node_count,  # int32 [rows, nodes]
    lse,  # out: fp32 [Hq, rows]
    groups,  # out: fp32 [Hq, rows, ceil(keys / 16)]: largest logit of each 16 keys
    node_lse,  # out: fp32 [Hq, nodes, rows]
    scale,
    length,
    sinks,
    rows,
    keys,
    nodes,
    CAUSAL: tl.constexpr,
    SIZE: tl.constexpr,  # keys at once
):
    """LSE of one sampled row of one query head over all its keys and over each of its blocks off the diagonal."""
    r, h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = h * rows + r
    logits += row * keys
    stop = length
    if CAUSAL:
        stop = tl.minimum(tl.load(position + r) + 1, length)
    groups_of, lane = (keys + 15) // 16, tl.arange(0, SIZE)
    for start in range(0, keys, SIZE):
        most = tl.max(tl.reshape(tl.load(logits + start + lane, start + lane < stop, _NONE), (SIZE // 16, 16)), 1)
        at = start // 16 + tl.arange(0, SIZE // 16)
        tl.store(groups + row * groups_of + at, most, at < groups_of)
    behind = tl.minimum(sinks, stop)
    whole = _joined(_lse(logits, 0, behind, scale, SIZE), _lse(logits, tl.maximum(tl.load(own_first + r), behind), stop, scale, SIZE))
    for node in range(nodes):
        first = tl.load(node_first + r * nodes + node)
        found = _lse(logits, first, first + tl.load(node_count + r * nodes + node), scale, SIZE)
        tl.store(node_lse + (h * nodes + node) * rows + r, found)
        whole = _joined(whole, found)
    tl.store(lse + row, whole)


@triton.jit(do_not_specialize=_ANY_LEFT)
def left_kernel(
    logits,  # in and out: fp32 [Hq, rows, keys]; -inf afterwards where a chosen block holds the key
    lse,  # fp32 [Hq, rows]
    heavy,  # int32 [Hq, rows, heavy_keys]: keys of the chosen blocks; places without a key hold one that is not there
    far,  # int32 [rows]: first key of the local part
    draw_first,  # int32 [rows, draws]
    draw_count,  # int32 [rows, draws]
    order,  # int32 [Hkv, order_levels, order_keys]; read where ORDERED
    log_residual,  # out: fp32 [Hq, rows], -inf where no key is left
    stratified,  # out: fp32 [Hq, rows]
    uniform,  # out: fp32 [Hq, rows]
    scale,
    sinks,
    samples,
    rows,
    keys,
    heavy_keys,
    order_keys,
    order_levels,
    order_first,
    draws,
    group,
    ORDERED: tl.constexpr,
    SIZE: tl.constexpr,  # keys at once
    WIDTH: tl.constexpr,  # keys of a slice at once
):
    """What the exact part leaves of one sampled row of one query head: its sum, and the variances of its estimates."""
    r, h = tl.program_id(0), tl.program_id(1)
    row = h.to(tl.int64) * rows + r
    logits += row * keys
    lane = tl.arange(0, SIZE)
    for start in range(0, heavy_keys, SIZE):
        key = tl.load(heavy + row * heavy_keys + start + lane, start + lane < heavy_keys, keys)
        tl.store(logits + key, tl.full([SIZE], _NONE, tl.float32), key < keys)
    tl.debug_barrier()  # other threads read what was stored
    local, whole = tl.load(far + r), tl.load(lse + row)
    tl.store(log_residual + row, _lse(logits, sinks, local, scale, SIZE))
    SLICES: tl.constexpr = SIZE // WIDTH
    by_slices, by_all = 0.0, 0.0
    for draw in range(draws):
        first, count = tl.load(draw_first + r * draws + draw), tl.load(draw_count + r * draws + draw)
        slices = tl.maximum(tl.minimum(count, samples), 1)
        each, rest = count // slices, count % slices
        into = order + ((h // group).to(tl.int64) * order_levels + order_first + draw) * order_keys
        variance, all_sum, all_square = tl.zeros([SLICES], tl.float32), tl.zeros([SLICES], tl.float32), tl.zeros([SLICES], tl.float32)
        for start in range(0, slices, SLICES):
            part = tl.minimum(start + tl.arange(0, SLICES), slices)
            low, after = part * each + part * rest // slices, tl.minimum(part + 1, slices)  # part * count // slices
            high = after * each + after * rest // slices
            sums, squares = tl.zeros([SLICES], tl.float32), tl.zeros([SLICES], tl.float32)
            for at in range(0, each + tl.minimum(rest, 1), WIDTH):
                place = low[:, None] + at + tl.arange(0, WIDTH)[None, :]
                there = place < high[:, None]
                key = first + place
                if ORDERED:
                    key = tl.load(into + key, there, 0)
                p = tl.exp(tl.load(logits + key, there & (key >= sinks) & (key < local), _NONE) * scale - whole)
                sums += tl.sum(p, 1)
                squares += tl.sum(p * p, 1)
            variance += (high - low) * squares - sums * sums
            all_sum += sums
            all_square += squares
        by_slices += tl.maximum(tl.sum(variance, 0), 0.0)
        drawn = tl.sum(all_sum, 0)
        by_all += tl.maximum(count * tl.sum(all_square, 0) - drawn * drawn, 0.0) / samples
    tl.store(stratified + row, by_slices)
    tl.store(uniform + row, by_all)


@triton.jit(do_not_specialize=_ANY_SAMPLED)
def sampled_kernel(
    logits,  # fp32 [Hq, rows, keys]
    lse,  # fp32 [Hq, rows]
    node_lse,  # fp32 [Hq, levels, rows]
    position,  # int32 [rows], ascending
    edge,  # int32 [blocks + 1]: rows before each local block
    sums,  # out: fp32 [Hq, padded]: without the near rows of each key
    node_sums,  # out: fp32 [Hq, levels, padded]
    scale,
    length,
    rows,
    keys,
    padded,
    local_size,
    blocks,
    levels,
    BAND: tl.constexpr,
    CAUSAL: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Sums of squared probabilities of the columns of a part of a local block over the sampled rows, of all and of each node."""
    tiles = (local_size + SIZE - 1) // SIZE
    block, h = tl.program_id(0) // tiles, tl.program_id(1).to(tl.int64)
    inside = tl.program_id(0) % tiles * SIZE + tl.arange(0, SIZE)
    key = block * local_size + inside
    there = (inside < local_size) & (key < keys) & (key < length)
    whole = tl.zeros([SIZE], tl.float32)
    # The rows of the key's own block, then those of the node of each level that has the block among its keys: all rows behind it.
    for level in range(-1, levels):
        first, after = block, block + 1
        if level >= 0:
            first = ((block >> level) | 1) << level
            after = tl.where((block >> level) & 1 == 1, first, first + (1 << level))
        stop = tl.load(edge + tl.minimum(after, blocks))
        node = tl.zeros([SIZE], tl.float32)
        for start in range(tl.load(edge + tl.minimum(first, blocks)), stop, ROWS):
            row = start + tl.arange(0, ROWS)
            pair = (row < stop)[:, None] & there[None, :]
            logit = tl.load(logits + (h * rows + row)[:, None] * keys + key[None, :], pair, _NONE) * scale
            at = tl.load(position + row, row < stop, 0)
            apart = at[:, None] // BAND - key[None, :] // BAND
            counts = (apart > 1) | (apart < -1)
            if CAUSAL:
                counts = counts & (key[None, :] <= at[:, None])
            p = tl.exp(2 * (logit - tl.load(lse + h * rows + row, row < stop, 0.0)[:, None]))
            whole += tl.sum(tl.where(counts, p, 0.0), 0)
            if level >= 0:
                own = tl.load(node_lse + (h * levels + level) * rows + row, row < stop, 0.0)
                node += tl.sum(tl.exp(2 * (logit - own[:, None])), 0)
        if level >= 0:
            tl.store(node_sums + (h * levels + level) * padded + key, node, there)
    tl.store(sums + h * padded + key, whole, there)


@triton.jit(do_not_specialize=_ANY_COLUMNS)
def column_kernel(
    q,  # [Hq, seq_q, dim]
    k,  # [Hkv, seq_k, dim]
    lse,  # fp32 [N, seq_q], N a multiple of Hq: n is of head n % Hq
    column,  # int32 [N or 1, columns]: keys
    row_first,  # int32 [N or 1, tiles or 1]
    row_stop,  # the same
    sums,  # out: fp32 [splits, N, columns]
    scale,
    heads,
    first,
    seq_q,
    seq_k,
    dim,
    group,
    columns,
    column_stride,
    range_stride,
    tile_stride,
    CAUSAL: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Sums of squared probabilities of chosen columns over a range of rows; each tile of columns has its own range."""
    tile, split, n = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    h = n % heads
    place, d = tile * SIZE + tl.arange(0, SIZE), tl.arange(0, DIM)
    key = tl.load(column + n * column_stride + place, place < columns, 0)
    chosen = tl.load(k + ((h // group * seq_k + key) * dim)[:, None] + d[None, :], (place < columns)[:, None] & (d < dim)[None, :], 0.0)
    start = tl.load(row_first + n * range_stride + tile * tile_stride)
    stop = tl.load(row_stop + n * range_stride + tile * tile_stride)
    share = tl.cdiv(tl.cdiv(stop - start, tl.num_programs(1)), ROWS) * ROWS
    start += split * share
    stop = tl.minimum(stop, start + share)
    total = tl.zeros([SIZE], tl.float32)
    for at in range(start, stop, ROWS):
        row = at + tl.arange(0, ROWS)
        some = tl.load(q + ((h * seq_q + row) * dim)[:, None] + d[None, :], (row < stop)[:, None] & (d < dim)[None, :], 0.0)
        logit = tl.dot(some, tl.trans(chosen), input_precision="ieee") * scale
        p = tl.exp(2 * (logit - tl.load(lse + n * seq_q + row, row < stop, float("inf"))[:, None]))
        if CAUSAL:
            p = tl.where(key[None, :] <= (row + first)[:, None], p, 0.0)
        total += tl.sum(p, 0)
    tl.store(sums + (split * tl.num_programs(2) + n) * columns + place, total, place < columns)


@triton.jit(do_not_specialize=_ANY_LSE)
def lse_kernel(
    q,  # [Hq, seq_q, dim]
    k,  # [Hkv, seq_k, dim]
    row_first,  # int32 [N], N a multiple of Hq: n is of head n % Hq; so are the next three
    row_stop,
    key_first,
    key_stop,
    lse,  # out: fp32 [N, seq_q], of the block's rows alone
    scale,
    heads,
    seq_q,
    seq_k,
    dim,
    group,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """LSE of the rows of a block of a query head over the block's keys, none of which is masked."""
    n = tl.program_id(1).to(tl.int64)
    h = n % heads
    row = tl.load(row_first + n) + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d, real = tl.arange(0, DIM), row < tl.load(row_stop + n)
    if tl.load(row_first + n) + tl.program_id(0) * ROWS < tl.load(row_stop + n):
        some = tl.load(q + ((h * seq_q + row) * dim)[:, None] + d[None, :], real[:, None] & (d < dim)[None, :], 0.0)
        most, total = tl.full([ROWS], _NONE, tl.float32), tl.zeros([ROWS], tl.float32)
        stop = tl.load(key_stop + n)
        for start in range(tl.load(key_first + n), stop, SIZE):
            key = start + tl.arange(0, SIZE)
            keys = tl.load(k + ((h // group * seq_k + key) * dim)[:, None] + d[None, :], (key < stop)[:, None] & (d < dim)[None, :], 0.0)
            logit = tl.where((key < stop)[None, :], tl.dot(some, tl.trans(keys), input_precision="ieee") * scale, _NONE)
            highest = tl.maximum(most, tl.max(logit, 1))
            total = total * tl.exp(most - highest) + tl.sum(tl.exp(logit - highest[:, None]), 1)
            most = highest
        tl.store(lse + n * seq_q + row, most + tl.log(total), real)
