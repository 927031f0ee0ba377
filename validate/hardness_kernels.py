"""Triton kernels of hardness on a GPU: what PyTorch would do in dozens of passes over the logits, in one launch each.

`hardness_fused.py` starts them and says what goes in. Arithmetic is fp32; products of fp16 and bf16 are exact, those of fp32 are not
rounded first. "first" and "stop" bound half-open ranges everywhere; logits in memory are not scaled yet.
"""

# Triton reads the annotations of its kernels, so there is no `from __future__ import annotations` here.
import triton
import triton.language as tl

_NONE = tl.constexpr(float("-inf"))
_LOWEST = tl.constexpr(-1e38)  # finite: its difference from -inf is no NaN
_UNRANKED, _FIRST = tl.constexpr(-(2**63)), tl.constexpr(2**63 - 1)  # before and behind all ranks
# Numbers for whose sake no kernel is compiled anew: all but the strides of logits and vectors, which decide how wide loads are.
_ANY_ROWS = ["length", "sinks", "rows", "nodes"]
_ANY_LEFT = ["sinks", "samples", "heads", "rows", "ranges", "order_keys", "order_levels", "order_first", "draws", "group"]
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


@triton.jit
def _ranked(value, index, there):
    """Numbers in the order of the values, each with its index; of those that are hidden (-inf) or not there the least of all."""
    bits = value.to(tl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # as integers in the order of the floats
    return tl.where(there & (value > _NONE), (order.to(tl.int64) << 32) | index, _UNRANKED)


@triton.jit
def _index(rank):
    """The index in a number of _ranked."""
    return (rank & 0xFFFFFFFF).to(tl.int32)


@triton.jit
def _top_keys(logits, groups, groups_of, stop, SIZE: tl.constexpr, TOP: tl.constexpr):
    """Keys before `stop` of the TOP largest logits, int32 [TOP], -1 behind the last.

    They are in the TOP groups of 16 keys with the largest maxima, which are found one by one, as are the keys in these groups.
    """
    lane, place, inside = tl.arange(0, SIZE), tl.arange(0, TOP), tl.arange(0, 16)
    chosen, last = tl.full([TOP], -1, tl.int32), _FIRST
    for n in range(TOP):
        most = tl.full([SIZE], _UNRANKED, tl.int64)
        for start in range(0, groups_of, SIZE):
            there = start + lane < groups_of
            found = _ranked(tl.load(groups + start + lane, there, _NONE), start + lane, there)
            most = tl.maximum(most, tl.where(found < last, found, _UNRANKED))
        last = tl.max(most, 0)
        chosen = tl.where((place == n) & (last > _UNRANKED), _index(last), chosen)
    key = chosen[:, None] * 16 + inside[None, :]
    there = (chosen[:, None] >= 0) & (key < stop)
    ranked = tl.reshape(_ranked(tl.load(logits + key, there, _NONE), key, there), (TOP * 16,))
    top, last = tl.full([TOP], -1, tl.int32), _FIRST
    for n in range(TOP):
        last = tl.max(tl.where(ranked < last, ranked, _UNRANKED), 0)
        top = tl.where((place == n) & (last > _UNRANKED), _index(last), top)
    return top


@triton.jit(do_not_specialize=_ANY_ROWS)
def row_kernel(
    logits,  # fp32 [Hq, rows, keys]
    position,  # int32 [rows]
    own_first,  # int32 [rows]: first key of the row's own local block
    node_first,  # int32 [rows, nodes]: the blocks off the diagonal: with the sinks and the own block all keys of the row
    node_count,  # int32 [rows, nodes]
    lse,  # out: fp32 [Hq, rows]
    groups,  # for its own use: fp32 [Hq, rows, ceil(keys / 16)]: largest logit of each 16 keys
    top,  # out: int32 [Hq, rows, TOP]: keys of the largest logits, -1 behind the last
    node_lse,  # out: fp32 [Hq, nodes, rows]
    scale,
    length,
    sinks,
    rows,
    keys,
    nodes,
    CAUSAL: tl.constexpr,
    TOP: tl.constexpr,
    SIZE: tl.constexpr,  # keys at once
):
    """LSE of one sampled row of one query head over all its keys and over each of its blocks off the diagonal, and its largest logits."""
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
    tl.debug_barrier()  # other threads read the groups
    tl.store(top + row * TOP + tl.arange(0, TOP), _top_keys(logits, groups + row * groups_of, groups_of, stop, SIZE // 2, TOP))


@triton.jit(do_not_specialize=_ANY_LEFT)
def left_kernel(
    logits,  # in and out: fp32 [Hq, rows, keys]; -inf afterwards where a chosen block holds the key
    lse,  # fp32 [Hq, rows]
    top,  # int32 [Hq, rows, TOP]: keys of the largest logits, -1 behind the last
    heavy,  # int32 [Hq, rows, ranges, 2]: first and stop of the keys of the chosen blocks; where ORDERED of places in the order of a draw
    far,  # int32 [rows]: first key of the local part
    draw_first,  # int32 [rows, draws]
    draw_count,  # int32 [rows, draws]
    order,  # int32 [Hkv, order_levels, order_keys]; read where ORDERED, whose draws have an order each
    numbers,  # out: fp32 [5, Hq, rows], the fields of RowNumbers
    scale,
    sinks,
    samples,
    heads,
    rows,
    keys,
    ranges,
    order_keys,
    order_levels,
    order_first,
    draws,
    group,
    ORDERED: tl.constexpr,
    TOP: tl.constexpr,
    SIZE: tl.constexpr,  # keys at once
    WIDTH: tl.constexpr,  # keys of a slice at once
):
    """What the exact part takes of one sampled row of one query head, what it leaves, and the variances of the estimates of the rest."""
    r, h = tl.program_id(0), tl.program_id(1)
    row, field = h.to(tl.int64) * rows + r, heads.to(tl.int64) * rows
    logits += row * keys
    of_draws = (h // group).to(tl.int64) * order_levels + order_first  # the line of `order` that the first draw has
    lane = tl.arange(0, SIZE)
    for n in range(ranges):
        first, stop = tl.load(heavy + (row * ranges + n) * 2), tl.load(heavy + (row * ranges + n) * 2 + 1)
        for start in range(first, stop, SIZE):
            there, key = start + lane < stop, start + lane
            if ORDERED:
                key = tl.load(order + (of_draws + n) * order_keys + key, there, 0)
            tl.store(logits + key, tl.full([SIZE], _NONE, tl.float32), there & (key < keys))
    tl.debug_barrier()  # other threads read what was stored
    local, whole = tl.load(far + r), tl.load(lse + row)
    left = _lse(logits, sinks, local, scale, SIZE)
    tl.store(numbers + row, 1 - tl.exp(left - whole))
    largest = tl.load(top + row * TOP + tl.arange(0, TOP))
    real = largest >= 0
    held = real & ((tl.load(logits + largest, real, 0.0) == _NONE) | (largest < sinks) | (largest >= local))
    hits, those = tl.sum(held.to(tl.float32), 0), tl.sum(real.to(tl.float32), 0)
    tl.store(numbers + field + row, hits / those)  # pyright: ignore[reportOperatorIssue]
    tl.store(numbers + 2 * field + row, tl.where(left == _NONE, float("nan"), left))
    SLICES: tl.constexpr = SIZE // WIDTH
    by_slices, by_all = 0.0, 0.0
    for draw in range(draws):
        first, count = tl.load(draw_first + r * draws + draw), tl.load(draw_count + r * draws + draw)
        slices = tl.maximum(tl.minimum(count, samples), 1)
        each, rest = count // slices, count % slices
        into = order + (of_draws + draw) * order_keys
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
    tl.store(numbers + 3 * field + row, by_slices)
    tl.store(numbers + 4 * field + row, by_all)


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
