"""Selector `sortlsh` beyond the oracle: what its tree, hash, sort and draws promise (rules 24 to 29)."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from operator_cases import SORTED, Case, sorted_config
from operator_checks import assert_near
from oracle_sortlsh import gray_ranks
from torch import Tensor

from hyperattention.config import INT32_MAX, PRESETS, Config
from hyperattention.geometry import Geometry
from hyperattention.reference import attention, exact_attention
from hyperattention.selection import make_plan
from hyperattention.sortlsh import gray_rank, mean_token, ranks

pytestmark = pytest.mark.usefixtures("one_thread")
Pair = tuple[tuple[int, ...], tuple[int, ...]]  # a node's row indices and keys, as sorted


def orders(case: Case) -> tuple[Tensor, Tensor]:
    """Sorted rows [B, Hq, levels, Sq] and keys [B, Hkv, levels, Sk] of the reference's plan."""
    q, k, v = case.inputs()
    g = Geometry.of(q, k, v, case.config)
    return make_plan(q, k, g, case.lengths_tensor()).orders(g)


def pairs(case: Case) -> list[list[Pair]]:
    """The nodes of each batch row: slots of one segment of 2^level local blocks, and the keys one segment before them."""
    found = []
    first = case.seq_k - case.seq_q
    for rows, keys in zip(*(order[:, 0].tolist() for order in orders(case)), strict=True):
        mine = []
        for level, (row_slots, key_slots) in enumerate(zip(rows, keys, strict=True)):
            size = case.config.local_size << level
            nodes = []
            for n in sorted({(first + i) // size for i, row in enumerate(row_slots) if row >= 0}):
                members = row_slots[max(0, n * size - first) : max(0, (n + 1) * size - first)]
                met = [j for j in key_slots[(n - 1) * size : n * size] if j >= 0]
                assert min(members) >= 0 and met, "a node has all of its rows and some key, or no slot at all"
                nodes.append((tuple(members), tuple(met)))
            assert sum(len(met) for _, met in nodes) == sum(j >= 0 for j in key_slots), "keys of no node"
            mine += nodes
        found.append(mine)
    return found


# --- the tree --------------------------------------------------------------------------------------------------------


TREES = [
    Case(name, rows, keys, sorted_config(local_size=local, local_overlap=overlap, sinks=sinks), lengths=lengths)
    for overlap in (0, 1)
    for sinks in (0, 21)
    for name, rows, keys, local, lengths in (
        ("square", 203, 203, 20, None),
        ("power", 256, 256, 16, None),
        ("chunk", 70, 301, 17, None),
        ("more-queries", 203, 150, 16, None),
        ("lengths", 203, 203, 20, (203, 160, 141, 20, 1, 0)),
    )
]


@pytest.mark.parametrize("case", TREES, ids=lambda c: f"{c}-overlap{c.config.local_overlap}-sinks{c.config.sinks}")
def test_every_far_pair_is_in_one_node(case: Case) -> None:
    c, key = case.config, torch.arange(case.seq_k)
    position = torch.arange(case.seq_q)[:, None] + case.seq_k - case.seq_q
    far = (position // c.local_size - c.local_overlap).clamp(min=0) * c.local_size
    for length, nodes in zip(case.lengths or (case.seq_k,), pairs(case), strict=True):
        count = torch.zeros(case.seq_q, case.seq_k, dtype=torch.int64)
        for rows, keys in nodes:
            count[torch.tensor(rows)[:, None], torch.tensor(keys)] += 1
        wanted = (key >= c.sinks) & (key < length) & (key < far)
        assert nodes or not wanted.any()
        assert (count[wanted] == 1).all() and count.max() <= 1
        assert (count[~wanted & (key < far)] == 0).all()  # sinks and padding
        if not c.local_overlap:
            assert (count[key >= far] == 0).all()


def halving(start: int, stop: int, smallest: int) -> list[tuple[range, range]]:
    """The paper's causal recursion (its algorithm 4): the lower half's rows meet the upper half's keys, then each half alone."""
    if stop - start <= smallest:
        return []
    middle = (start + stop) // 2
    halves = halving(start, middle, smallest) + halving(middle, stop, smallest)
    return [(range(middle, stop), range(start, middle)), *halves]


@pytest.mark.parametrize("depth", range(1, 5))
def test_tree_is_the_papers_halving_where_both_exist(depth: int) -> None:
    length = 33 << depth
    (nodes,) = pairs(Case("halving", length, length, sorted_config(sinks=0, local_size=33)))
    wanted = halving(0, length, 33)
    assert len(wanted) == 2**depth - 1
    assert {(tuple(sorted(r)), tuple(sorted(k))) for r, k in nodes} == {(tuple(r), tuple(k)) for r, k in wanted}
    assert len(nodes) == len(wanted)


# --- hash and sort ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 17))
def test_neighbouring_ranks_differ_in_one_bit(bits: int) -> None:
    rank = gray_rank(torch.arange(2**bits))
    code = rank.argsort()
    assert torch.equal(rank[code], torch.arange(2**bits))
    difference = (code[1:] ^ code[:-1]).tolist()
    assert [bin(x).count("1") for x in difference] == [1] * (2**bits - 1)
    assert dict(enumerate(rank.tolist())) == gray_ranks(bits)


def test_the_other_direction_of_gray_is_worse() -> None:
    """Why rule 27 takes the inverse: 96 of 127 neighbours at r = 7."""
    codes = torch.arange(128)
    order = (codes ^ codes >> 1).argsort()
    assert sum(bin(x).count("1") == 1 for x in (order[1:] ^ order[:-1]).tolist()) == 96


@pytest.mark.parametrize("angle", [0.2, 0.8, math.pi / 2, 2.4])
def test_signs_agree_as_often_as_the_angle_says(angle: float) -> None:
    """P(same bit) = 1 - angle/pi, as for Gaussian projections: 200 pairs under 300 matrices, a standard error near 0.002."""
    rng = torch.Generator().manual_seed(3)
    a, b = torch.randn(2, 200, 64, generator=rng, dtype=torch.float64)
    a = a / a.norm(dim=-1, keepdim=True)
    b = b - (a * b).sum(-1, keepdim=True) * a
    b = math.cos(angle) * a + math.sin(angle) * b / b.norm(dim=-1, keepdim=True)
    bits = torch.stack([ranks(torch.stack([a, b]), sorted_config(num_projections=1, seed=seed * 7919)) for seed in range(300)])
    assert abs(float((bits[:, 0] == bits[:, 1]).double().mean()) - (1 - angle / math.pi)) < 0.01


def test_every_bit_has_its_own_projection() -> None:
    x = torch.randn(4096, 64, generator=torch.Generator().manual_seed(5))
    rank = ranks(x, sorted_config(num_projections=16))
    code = rank ^ rank >> 1  # the codes again
    bits = ((code[:, None] >> torch.arange(16)) & 1).double()
    assert ((bits.mean(0) - 0.5).abs() < 0.05).all()
    assert (torch.corrcoef(bits.T) - torch.eye(16)).abs().max() < 0.5
    assert not torch.equal(rank, ranks(x, sorted_config(num_projections=16, seed=8)))
    fewer = ranks(x, sorted_config(num_projections=5))
    assert torch.equal(fewer ^ fewer >> 1, code & 31)


def test_a_token_is_hashed_once() -> None:
    """Its rank knows neither batch row, head, place nor side, so equal heads sort equally."""
    q, k, v = Case("hash", heads=(1, 1)).inputs()
    rank = ranks(q, SORTED)
    assert torch.equal(rank[0, 0].flip(0), ranks(q[0, 0].flip(0), SORTED))
    assert torch.equal(rank[0, 0, 17:18], ranks(q[0, 0, 17:18], SORTED))
    q, k, v = q.expand(3, 4, -1, -1), k.expand(3, 2, -1, -1), v.expand(3, 2, -1, -1)
    g = Geometry.of(q, k, v, SORTED)
    for order in make_plan(q, k, g).orders(g):
        assert (order >= 0).any() and (order == order[:1, :1]).all()


def test_dead_rows_come_last_and_ties_keep_their_order() -> None:
    lengths = (203, 150, 170)
    case = Case("ties", config=sorted_config(num_projections=2), lengths=lengths, heads=(1, 1))
    q, k, _ = case.inputs()
    for b, (length, nodes) in enumerate(zip(lengths, pairs(case), strict=True)):
        rank_q, rank_k = ranks(q[b, 0], case.config).tolist(), ranks(k[b, 0], case.config).tolist()
        for rows, keys in nodes:
            assert list(rows) == sorted(rows, key=lambda i: (i >= length, i >= length or rank_q[i], i))
            assert list(keys) == sorted(keys, key=lambda j: (rank_k[j], j))
            assert len({rank_k[j] for j in keys}) <= 4 and max(keys) < length


def test_sorting_finds_a_planted_key() -> None:
    """Queries that are noisy copies of one key each: the one taken block of 16 holds it far more often than a random one."""
    rng = torch.Generator().manual_seed(11)
    k = torch.randn(1, 1, 1024, 64, generator=rng)
    partner = torch.randperm(1024, generator=rng)
    q = k[:, :, partner] + 0.1 * torch.randn(k.shape, generator=rng)
    c = Config(causal=0, selector="sortlsh", block_size=64, num_blocks=1, sample_size=0, sinks=0, exact_below=0)
    v = torch.nn.functional.one_hot(torch.arange(1024), 1024).float()[None, None]
    weight = attention(q, k, v, c).o[0, 0]
    assert (weight > 0).sum(-1).unique().tolist() == [64]
    found = (weight[torch.arange(1024), partner] > 0).double().mean()
    assert found > 0.5, f"{float(found):.2f} of the planted keys; chance is {1 / 16:.2f}"


# --- hash_centre ---


def test_keys_that_share_a_mean_are_sorted_as_without_it() -> None:
    """Moving all keys by one vector changes no attention; with hash_centre it changes no plan either, without it most of one."""
    c = sorted_config(causal=0, hash_centre=1, sinks=0, num_projections=5)
    q, k, _ = Case("shift", heads=(2, 2), dims=(32, 4)).inputs()
    q, k = (x.mul(64).round() / 64 for x in (q, k))  # sums of these and of whole numbers are exact
    g = Geometry.of(q, k, k, c)
    moved = k + torch.randint(-3, 4, (1, 2, 1, 32), generator=torch.Generator().manual_seed(1))
    for mine, theirs in zip(make_plan(q, k, g).orders(g), make_plan(q, moved, g).orders(g), strict=True):
        assert (mine == theirs).double().mean() > 0.98  # the mean is rounded: a sum next to its threshold may change sides
    plain = Geometry.of(q, k, k, replace(c, hash_centre=0))
    _, before = make_plan(q, k, plain).orders(plain)
    _, after = make_plan(q, moved, plain).orders(plain)
    assert (before == after).double().mean() < 0.2


def test_centring_halves_each_bit() -> None:
    """Of keys around a large mean nearly all have the same bits; with hash_centre each bit splits them."""
    x = 4 + torch.randn(2, 3000, 64, generator=torch.Generator().manual_seed(2))
    c = sorted_config(num_projections=8)
    bits = [(rank ^ rank >> 1)[..., None] >> torch.arange(8) & 1 for rank in (ranks(x, c), ranks(x, c, mean_token(x)))]
    share = [b.double().mean((0, 1)) for b in bits]
    assert ((share[0] - 0.5).abs() > 0.3).sum() >= 6 and ((share[1] - 0.5).abs() < 0.05).all()


@pytest.mark.parametrize("tokens", [1, 127, 129, 4095, 4096, 4097, 9000])
def test_mean_token(tokens: int) -> None:
    x = torch.randn(2, tokens, 5, generator=torch.Generator().manual_seed(tokens))
    at = [s * tokens // min(tokens, 4096) for s in range(min(tokens, 4096))]
    assert len(set(at)) == len(at)
    assert torch.allclose(mean_token(x), x[:, at].double().mean(1).float(), atol=1e-6)
    assert not mean_token(x[:, :0]).any()


def test_the_mean_knows_neither_padding_nor_sinks_nor_dead_rows() -> None:
    """What lies behind the length, in the sinks and in other batch rows changes nothing."""
    c = sorted_config(hash_centre=1, sinks=9)
    case = Case("centred", config=c, lengths=(203, 150, 40), heads=(4, 2))
    q, k, v = case.inputs()
    other_q, other_k = q.clone(), k.clone()
    for b, length in enumerate(case.lengths or ()):
        other_q[b, :, length:], other_k[b, :, length:], other_k[b, :, :9] = float("nan"), float("nan"), 1e4
    g = Geometry.of(q, k, v, c)
    for mine, theirs in zip(
        make_plan(q, k, g, case.lengths_tensor()).orders(g), make_plan(other_q, other_k, g, case.lengths_tensor()).orders(g)
    ):
        assert torch.equal(mine, theirs)


# --- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [None, (203, 150, 20)], ids=["full", "lengths"])
@pytest.mark.parametrize("shape", [(203, 203), (90, 203), (203, 90)], ids=str)
@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize(
    "changes",
    [
        {"num_blocks": 64, "sample_size": 0},
        {"num_blocks": 64, "local_overlap": 1},
        {"num_blocks": 0, "sample_size": 203},
        {"num_blocks": 2, "sample_size": 4096, "sinks": 0, "local_overlap": 1},
        {"num_blocks": 0, "sample_size": 0, "sinks": 4096},
    ],
    ids=str,
)
def test_all_selected_is_exact(changes: dict, causal: int, shape: tuple[int, int], lengths: tuple[int, ...] | None) -> None:
    case = Case("all", *shape, sorted_config(causal=causal, **changes), heads=(4, 2), lengths=lengths)
    q, k, v = case.inputs()
    out = attention(q, k, v, case.config, case.lengths_tensor())
    exact = exact_attention(q, k, v, bool(causal), case.lengths_tensor())
    assert out.plan.selection.numel() > 0
    assert_near(out.o, exact.o, 1e-12)
    assert_near(out.lse, exact.lse, 1e-12)


def test_a_batch_row_equals_it_alone() -> None:
    case = Case("batch", config=SORTED, lengths=(203, 60, 150), heads=(4, 2))
    q, k, v = case.inputs()
    lengths = case.lengths_tensor()
    assert lengths is not None
    together = attention(q, k, v, case.config, lengths)
    for b in range(case.batch):
        one = (q[b : b + 1], k[b : b + 1], v[b : b + 1])
        alone = attention(*one, case.config, lengths[b : b + 1])
        g, all_rows = (Geometry.of(*x, case.config) for x in (one, (q, k, v)))
        for mine, theirs in zip(alone.plan.orders(g), together.plan.orders(all_rows), strict=True):
            assert torch.equal(mine[0], theirs[b])
        assert torch.equal(alone.plan.sample_index[0], together.plan.sample_index[b])
        assert torch.equal(alone.o[0], together.o[b]) and torch.equal(alone.lse[0], together.lse[b])


def test_the_papers_preset() -> None:
    """What the released code does at 131,072 tokens: blocks of 256, 256 samples, halving down to 4,096."""
    c = PRESETS["paper"]
    assert (c.selector, c.block_size, c.num_blocks, c.sample_size, c.stratified, c.num_projections) == ("sortlsh", 256, 1, 256, 0, 7)
    assert (c.local_size, c.local_overlap, c.sinks, c.exact_below) == (4096, 0, 0, 4096)
    scaled = replace(c, block_size=16, sample_size=16, local_size=32, exact_below=32, seed=INT32_MAX)
    case = Case("paper", 256, 256, scaled, dims=(64, 64))
    assert len(pairs(case)[0]) == 7
    out = attention(*case.inputs(), scaled)
    assert out.plan.sample_index.shape == (1, 2, 7, 16) and out.o.isfinite().all()
