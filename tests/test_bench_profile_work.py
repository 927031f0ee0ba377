"""The time split's counts, against what the reference really computes at small sizes: pairs, pools, bytes of tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from hyperattention import node_attention, reference, selection
from hyperattention.config import PRESETS, Config
from hyperattention.geometry import Geometry
from hyperattention.selection import Plan, make_plan
from hyperattention.sortlsh import ranks
from hyperattention.validate.bench_profile_work import Work, attention_work, merge_bytes, part_launches, selection_work

pytestmark = pytest.mark.usefixtures("one_thread")
BLOCKS = Config(block_size=16, num_blocks=2, pool_size=4, sample_size=24, local_size=64, sinks=16, exact_below=32)
SORTED = replace(PRESETS["paper"], block_size=16, num_blocks=2, sample_size=24, local_size=32, exact_below=32)
CASES = {
    "blocks": BLOCKS,
    "blocks without overlap": replace(BLOCKS, local_overlap=0),
    "blocks, full": replace(BLOCKS, causal=0),
    "blocks without sinks": replace(BLOCKS, sinks=0),
    "blocks without samples": replace(BLOCKS, sample_size=0),
    "blocks, pools of one": replace(BLOCKS, pool_size=1),
    "sortlsh": SORTED,
    "sortlsh with sinks": replace(SORTED, sinks=16),
    "sortlsh, full": replace(SORTED, causal=0),
    "sortlsh, full, with sinks": replace(SORTED, causal=0, sinks=16),
    "sortlsh without blocks": replace(SORTED, num_blocks=0),
    "exact": replace(BLOCKS, exact_below=4096),
    "exact, full": replace(BLOCKS, exact_below=4096, causal=0),
}
BATCH, HEADS, KV_HEADS, LENGTH, DIM = 2, 4, 2, 384, 64
cases = pytest.mark.parametrize("config", CASES.values(), ids=CASES.keys())


def inputs(dtype: torch.dtype = torch.float16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = (torch.randn(BATCH, heads, LENGTH, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    return q.to(dtype), k.to(dtype), v.to(dtype)


def geometry(config: Config) -> Geometry:
    return Geometry.of(*inputs(), config)


def visible_pairs(config: Config, monkeypatch: pytest.MonkeyPatch) -> int:
    """(Query, key) pairs that the reference does not mask, over all heads and batch rows."""
    counted, original = [], reference.part

    def part(q, k, v, bias, scale, wide):
        shape = (*q.shape[:-1], k.shape[-2])
        counted.append(int((bias > -torch.inf).expand(shape).sum()))
        return original(q, k, v, bias, scale, wide)

    with monkeypatch.context() as patch:
        patch.setattr(reference, "part", part)
        patch.setattr(node_attention, "part", part)
        reference.attention(*inputs(torch.float32), config)
    return sum(counted)


@cases
def test_operations_are_four_d_for_each_pair_that_the_reference_computes(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts are told apart by leaving the others out of the reference. Lengths and blocks divide each other, so nothing that is taken
    is partly hidden; samples are counted where no block is taken, because one in a taken block is computed too."""

    def pairs(**changes: int) -> int:
        return visible_pairs(replace(config, **changes), monkeypatch)

    near = pairs(num_blocks=0, sample_size=0)
    if geometry(config).exact:
        wanted = {"exact": near}
    else:
        local = pairs(num_blocks=0, sample_size=0, sinks=0)
        heavy, sampled = pairs(sample_size=0) - near, pairs(num_blocks=0) - near
        wanted = {"local": local, "sinks": near - local, "heavy": heavy, "sampled": sampled}
    found = {name: work.flops for name, work in attention_work(geometry(config), 2).items()}
    assert found == {name: 4 * DIM * count for name, count in wanted.items() if count}


@cases
def test_attention_reads_q_k_v_and_writes_o_and_lse_once(config: Config) -> None:
    q, k, v = inputs()
    out = reference.attention(q, k, v, config)
    works = list(attention_work(geometry(config), q.element_size()).values())
    assert works[0].bytes == sum(x.nbytes for x in (q, k, v, out.o, out.lse))
    assert not any(work.bytes for work in works[1:])


def plan_of(config: Config) -> Plan:
    q, k, _ = inputs()
    return make_plan(q, k, geometry(config))


@pytest.mark.parametrize("config", [c for n, c in CASES.items() if "blocks" in n and "sortlsh" not in n], ids=str)
@pytest.mark.parametrize("two_levels", [False, True], ids=["flat", "two levels"])
def test_selection_counts_the_pools_that_the_reference_multiplies(
    config: Config, two_levels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if two_levels:
        monkeypatch.setattr(selection, "SUPERBLOCK", 32)
        monkeypatch.setattr(selection, "KEPT_MIN", 4)
        monkeypatch.setattr("hyperattention.validate.cost.SUPERBLOCK", 32)
        monkeypatch.setattr("hyperattention.validate.cost.KEPT_MIN", 4)
    products, pooled = [], []

    def scores(queries, keys, per_block, original: Callable = selection._scores):
        products.append(queries[0][..., 0].numel() * keys[0].shape[-2])
        return original(queries, keys, per_block)

    def remember(function: Callable) -> Callable:
        def made(*arguments):
            pooled.append(function(*arguments))
            return pooled[-1]

        return made

    monkeypatch.setattr(selection, "_scores", scores)
    for name in ("query_pools", "key_pools"):
        monkeypatch.setattr(selection, name, remember(getattr(selection, name)))
    plan, work = plan_of(config), selection_work(geometry(config), 2)
    assert list(work) == ["pool", "select"]
    q, k, _ = inputs()
    pools = sum(values.nbytes + factor.nbytes for values, factor in pooled)
    assert work["pool"] == Work(bytes=q.nbytes + k.nbytes + pools)
    assert work["select"].bytes == pools + plan.selection.nbytes
    # The reference fills the last superblocks up and multiplies coarse pools of the key side that are no candidates.
    assert work["select"].int8_ops == pytest.approx(2 * DIM * sum(products), rel=0.15 if two_levels else 0)


@pytest.mark.parametrize("config", [c for n, c in CASES.items() if "sortlsh" in n], ids=str)
def test_hash_and_sort_move_ranks_and_the_plan(config: Config) -> None:
    q, k, _ = inputs()
    work, slots = selection_work(geometry(config), 2), plan_of(config).selection
    assert list(work) == ["hash", "sort"]
    rank_bytes = 2 * sum(ranks(x, config).numel() for x in (q, k))  # 16 bits hold every rank
    assert work["hash"] == Work(bytes=q.nbytes + k.nbytes + rank_bytes)
    assert work["sort"] == Work(bytes=slots.nbytes + 2 * int((slots >= 0).sum()))


@pytest.mark.parametrize("config", [c for n, c in CASES.items() if "sortlsh" in n], ids=str)
def test_merge_moves_o_and_lse_once_for_every_launch_after_a_rows_first(config: Config) -> None:
    rows, _ = plan_of(config).orders(geometry(config))
    near = int(bool(config.causal or config.sinks))  # local part and sinks
    launches = (rows >= 0).sum(2) + near  # [B, Hq, Sq]
    assert part_launches(geometry(config)) == near + int((rows >= 0).any(-1).any(1).any(0).sum())
    again = int((launches - 1).clamp(min=0).sum())
    assert merge_bytes(geometry(config), 2) == 2 * again * (2 * DIM + 4)


@pytest.mark.parametrize("changes", [{}, dict(local_overlap=0), dict(sinks=0), dict(sinks=300), dict(sinks=LENGTH)], ids=str)
def test_blocks_merge_the_rows_that_see_more_than_local_part_and_sinks(changes: dict[str, int]) -> None:
    c = replace(BLOCKS, **changes)
    local = [row // c.local_size - c.local_overlap for row in range(LENGTH)]
    seen = [any(key // c.local_size < first for key in range(c.sinks, LENGTH)) for first in local]
    assert merge_bytes(geometry(c), 2) == 2 * BATCH * HEADS * sum(seen) * (2 * DIM + 4)
    assert part_launches(geometry(c)) == 2 and merge_bytes(geometry(replace(c, causal=0)), 2) == 0


@pytest.mark.parametrize("name", ["exact", "exact, full"])
def test_an_exact_call_chooses_and_merges_nothing(name: str) -> None:
    assert selection_work(geometry(CASES[name]), 2) == {} and merge_bytes(geometry(CASES[name]), 2) == 0
    assert selection_work(geometry(replace(BLOCKS, num_blocks=0)), 2) == {}
    assert selection_work(geometry(replace(SORTED, num_blocks=0, sample_size=0)), 2) == {}
