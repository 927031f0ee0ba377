"""The PyTorch reference against the rules: a dense oracle, exact attention, statistics, and what padding may not do."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from functools import lru_cache

import oracle
import pytest
import torch
from operator_cases import BASE, CASES, LOW, PLAN_ONLY, SORTED, SORTED_CASES, SORTED_PLAN_ONLY, Case, config, sorted_config
from operator_checks import as_plan, assert_near, assert_same_plan, oracle_plan
from torch import Tensor

from hyperattention.reference import attention, exact_attention
from hyperattention.selection import Geometry, Plan, draw_samples, make_plan

pytestmark = pytest.mark.usefixtures("one_thread")


# --- against the oracle ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES + SORTED_CASES + PLAN_ONLY + SORTED_PLAN_ONLY, ids=str)
def test_plan_equals_oracle(case: Case) -> None:
    q, k, v = case.inputs()
    lengths = case.lengths_tensor()
    assert_same_plan(make_plan(q, k, Geometry.of(q, k, v, case.config, lengths), lengths), as_plan(oracle_plan(case)))


@pytest.mark.parametrize(("case", "dtype"), LOW, ids=lambda x: str(x))
def test_plan_of_low_precision_inputs(case: Case, dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in case.inputs())
    plan = attention(q, k, v, case.config).plan
    assert_same_plan(plan, as_plan(oracle.make_plan(q.double().numpy(), k.double().numpy(), case.config)))


@pytest.mark.parametrize("case", CASES + SORTED_CASES, ids=str)
def test_output_equals_oracle(case: Case) -> None:
    q, k, v = case.inputs()
    out = attention(q, k, v, case.config, case.lengths_tensor(), as_plan(oracle_plan(case)))
    o, lse = oracle.attention(q.numpy(), k.numpy(), v.numpy(), case.config, case.lengths, oracle_plan(case))
    assert_near(out.o, torch.from_numpy(o), 1e-12)
    assert_near(out.lse, torch.from_numpy(lse), 1e-12)


def test_cases_cover_every_part_and_both_levels() -> None:
    """The list above would prove little if its plans were empty."""
    full = {str(c): oracle_plan(c) for c in CASES if c.name in ("square", "chunk", "non-causal", "lengths-causal")}
    for name, plan in full.items():
        assert (plan.selection >= 0).any() and (plan.sample_index >= 0).any(), name
        assert (plan.sample_weight > 1).any(), name
    assert any((oracle_plan(c).selection >= 0).sum(-1).max() > 32 for c in CASES if c.name.startswith("two-levels-block"))


# --- exact attention -------------------------------------------------------------------------------------------------


def dense(q: Tensor, k: Tensor, v: Tensor, causal: bool, lengths: Tensor | None, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """PyTorch's own attention under an explicit mask, and the mask's [B,1,Sq,Sk]."""
    (b, h, sq, _), sk = q.shape, k.shape[2]
    position = torch.arange(sq)[:, None] + sk - sq
    key = torch.arange(sk)
    mask = (key <= position) if causal else torch.ones(sq, sk, dtype=torch.bool)
    mask = mask.expand(b, 1, sq, sk)
    if lengths is not None:
        mask = mask & (key < lengths[:, None, None, None])
    k, v = (x.repeat_interleave(h // x.shape[1], 1) for x in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale), mask


EXACT = [
    Case(f"causal{causal}", sq, sk, config(causal=causal).exact(), (4, 2), (8, 5), lengths)
    for causal in (0, 1)
    for sq, sk, lengths in ((130, 130, None), (130, 130, (130, 77, 1)), (1, 65, (40, 65)), (33, 97, (97, 12)), (97, 33, (33, 20)))
]


@pytest.mark.parametrize("case", EXACT, ids=str)
def test_exact_path_equals_sdpa(case: Case) -> None:
    q, k, v = case.inputs()
    lengths = case.lengths_tensor()
    expected, mask = dense(q, k, v, bool(case.config.causal), lengths)
    seen = mask.any(-1)[..., None]
    out = attention(q, k, v, case.config, lengths)
    assert out.plan.selection.shape[2] == 0 and out.plan.sample_index.shape[2] == 0
    assert_near(out.o, torch.where(seen, expected, 0.0), 1e-12)
    helper = exact_attention(q, k, v, bool(case.config.causal), lengths)
    assert torch.equal(helper.o, out.o) and torch.equal(helper.lse, out.lse)


def test_scale_reaches_the_logits() -> None:
    q, k, v = Case("scale").inputs()
    # 0.3125: fp32 holds it, as the attribute does
    assert_near(exact_attention(q, k, v, True, scale=0.3125).o, dense(q, k, v, True, None, 0.3125)[0], 1e-12)


@pytest.mark.parametrize("lengths", [None, (203, 150, 20)], ids=["full", "lengths"])
@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize(
    "changes",
    [
        {"num_blocks": 64, "sample_size": 0},
        {"num_blocks": 64},
        {"num_blocks": 0, "sample_size": 203},
        {"num_blocks": 2, "sample_size": 4096, "sinks": 0},
        {"num_blocks": 0, "sample_size": 0, "sinks": 4096},
    ],
    ids=str,
)
def test_all_selected_is_exact(changes: dict, causal: int, lengths: tuple[int, ...] | None) -> None:
    case = Case("all", config=config(causal=causal, **changes), heads=(4, 2), lengths=lengths)
    q, k, v = case.inputs()
    out = attention(q, k, v, case.config, case.lengths_tensor())
    exact = exact_attention(q, k, v, bool(causal), case.lengths_tensor())
    assert out.plan.selection.shape[2] > 0
    assert_near(out.o, exact.o, 1e-12)
    assert_near(out.lse, exact.lse, 1e-12)


# --- the residual's statistics ---------------------------------------------------------------------------------------


@lru_cache(maxsize=None)
def _monte_carlo_inputs(heavy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """64 heads with the same queries, so that a call gives 64 independent draws of one problem."""
    case = Case("monte-carlo", 70, 205, heads=(1, 1), dims=(4, 3))
    q, k, v = case.inputs()
    if heavy:  # one far key carries nearly all of the mass, in turn for each row
        k = k * 0.05
        k[:, :, 14::29] += 2.0
        q = q.abs() + 0.5
    return q.expand(-1, 64, -1, -1), k, v + 0.5


@pytest.mark.parametrize("heavy", [False, True], ids=["normal", "heavy-tailed"])
@pytest.mark.parametrize(
    "changes",
    [
        {"stratified": 1},
        {"stratified": 0},
        {"stratified": 1, "num_blocks": 0, "sample_size": 97},
        {"causal": 0, "num_blocks": 1},
        {"selector": "sortlsh", "stratified": 1, "num_blocks": 1},
        {"selector": "sortlsh", "stratified": 0, "num_blocks": 1, "local_overlap": 0},
        {"selector": "sortlsh", "stratified": 0, "causal": 0, "num_blocks": 1},
    ],
    ids=str,
)
def test_sum_and_numerator_are_unbiased(changes: dict, heavy: bool) -> None:
    """exp(LSE) and exp(LSE) O against exact attention: within 5 standard errors over 64 x 32 draws (rules 14 to 16)."""
    q, k, v = _monte_carlo_inputs(heavy)
    c = config(**changes)
    exact = exact_attention(q, k, v, bool(c.causal))
    shift = exact.lse
    base = make_plan(q, k, Geometry.of(q, k, v, c))
    totals = []
    for seed in range(32):
        seeded = replace(c, seed=seed * 7919)
        samples = draw_samples(Geometry.of(q, k, v, seeded), None)
        out = attention(q, k, v, seeded, plan=Plan(base.selection, *samples))
        mass = (out.lse - shift).exp()[0]
        totals.append(torch.cat([mass[..., None], mass[..., None] * out.o[0]], -1))
    draws = torch.stack(totals).flatten(0, 1)  # [draws, rows, 1 + Dv]
    expected = torch.cat([torch.ones(70, 1, dtype=torch.float64), exact.o[0, 0]], -1)
    error = draws.std(0) / len(draws) ** 0.5
    sampled = error[:, 0] > 1e-9
    assert sampled.float().mean() > 0.5  # most rows have far keys left to sample
    score = ((draws.mean(0) - expected) / error)[sampled]
    assert score.abs().max() < 5, f"largest deviation {float(score.abs().max()):.1f} standard errors"
    assert_near(draws.mean(0)[~sampled], expected[~sampled], 1e-9)


def test_slices_of_a_draw_partition_the_candidates() -> None:
    """Rule 14: the weights of one draw sum to N, each sample in its own slice, also where m does not divide N."""
    q, k, v = Case("draw", heads=(4, 4)).inputs()
    g = Geometry.of(q, k, v, config(sample_size=7, sinks=3))
    index, weight = draw_samples(g, None)
    for n, tile in enumerate(g.local_blocks):
        total = max(0, g.far(tile * 32, 203) - 3)
        assert (weight[:, :, n].sum(-1) == total).all()
        ends = 3 + weight[:, :, n].cumsum(-1)
        live = weight[:, :, n] > 0
        assert (index[:, :, n] < ends)[live].all() and (index[:, :, n] >= ends - weight[:, :, n])[live].all()
    assert len(torch.unique(index[0], dim=0)) == 4  # heads draw differently


# --- padding and empty rows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e4], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case("causal", lengths=(203, 150, 33, 1, 0), heads=(2, 1)),
        Case("non-causal", config=config(causal=0), lengths=(203, 150, 33, 1, 0)),
        Case("chunk", 70, 203, lengths=(203, 150, 134)),
        Case("non-causal-cross", 90, 203, config(causal=0), lengths=(203, 150, 0)),
        Case("sorted", config=SORTED, lengths=(203, 150, 33, 1, 0)),
        Case("sorted-chunk-overlap", 70, 203, sorted_config(local_overlap=1), lengths=(203, 150, 134)),
        Case("sorted-non-causal", config=sorted_config(causal=0), lengths=(203, 150, 1)),
        Case("exact", config=BASE.exact(), lengths=(203, 150, 0)),
    ],
    ids=str,
)
def test_padding_never_reaches_a_live_row(case: Case, garbage: float) -> None:
    q, k, v = (x.float() for x in case.inputs())
    lengths = case.lengths_tensor()
    assert lengths is not None and case.lengths
    clean = attention(q, k, v, case.config, lengths)
    live = []
    for b, length in enumerate(case.lengths):
        k[b, :, length:], v[b, :, length:] = garbage, garbage
        rows = oracle.Rows(case.config, case.seq_q, case.seq_k, length)
        live.append(sum(not rows.dead(rows.first + i) for i in range(case.seq_q)))
        q[b, :, live[-1] :] = garbage
    dirty = attention(q, k, v, case.config, lengths)
    assert_same_plan(dirty.plan, clean.plan)
    for b, rows in enumerate(live):
        assert torch.equal(dirty.o[b, :, :rows], clean.o[b, :, :rows]) and torch.equal(dirty.lse[b, :, :rows], clean.lse[b, :, :rows])
        assert clean.o[b].isfinite().all()


def test_rows_that_see_one_key_or_none() -> None:
    case = Case("few-keys", 150, 80, lengths=(80, 1, 0), heads=(2, 1))
    q, k, v = case.inputs()
    for c in (case.config, case.config.exact(), config(causal=0), config(causal=0, num_blocks=0, sample_size=0)):
        out = attention(q, k, v, c, case.lengths_tensor())
        none = torch.zeros(3, 2, 150, dtype=torch.bool)
        none[2] = True
        if c.causal:
            none[:, :, :70] = True  # positions before the first key
        assert (out.o[none] == 0).all() and (out.lse[none] == -torch.inf).all()
        assert out.o.isfinite().all() and out.lse[~none].isfinite().all()
        assert_near(out.o[1, :, 70:], v[1, :, :1].expand(2, 80, 8), 1e-12)
        assert_near(out.lse[1, :, 70:], (q[1, :, 70:] * k[1, :, :1]).sum(-1) / 8**0.5, 1e-12)


def test_a_row_that_nothing_selects_is_empty() -> None:
    q, k, v = Case("nothing").inputs()
    out = attention(q, k, v, config(causal=0, num_blocks=0, sample_size=0, sinks=0))
    assert (out.o == 0).all() and (out.lse == -torch.inf).all()


# --- invariances -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"local_overlap": 0}, {"stratified": 0, "sinks": 0}, {"block_size": 48, "pool_size": 3}], ids=str)
def test_prefill_in_chunks_equals_one_call(changes: dict) -> None:
    """Rule 22: the look-ahead stays inside a query block, so chunks of local_size change nothing."""
    local, total = 96, 4 * 96 + 70
    c = config(**{"local_size": local, **changes})
    q, k, v = Case("prefill", total, total, c, heads=(4, 2)).inputs()
    whole = attention(q, k, v, c)
    parts = [attention(q[:, :, s : s + local], k[:, :, : s + local], v[:, :, : s + local], c) for s in range(0, total, local)]
    joined = Plan(*(torch.cat([getattr(p.plan, f) for p in parts], 2) for f in ("selection", "sample_index", "sample_weight")))
    assert_same_plan(joined, whole.plan)
    assert_near(torch.cat([p.o for p in parts], 2), whole.o, 1e-12)
    assert_near(torch.cat([p.lse for p in parts], 2), whole.lse, 1e-12)


def test_strict_chunks_differ_in_their_first_blocks_alone() -> None:
    """Rule 22: the second block's plan is one shot's, or the third's where the first row lies inside a block."""
    c = config(strict_causal=1)
    q, k, v = Case("prefill", 259, 259, c, heads=(4, 2)).inputs()
    whole = attention(q, k, v, c).plan.selection
    for first in (96, 101, 111):
        part = attention(q[:, :, first:], k, v, c).plan.selection
        same = 1 if first % c.block_size == 0 else 2
        assert torch.equal(part[:, :, same:], whole[:, :, first // c.block_size + same :])
        assert not torch.equal(part[:, :, :same], whole[:, :, first // c.block_size :][:, :, :same])


STRICT = {
    "whole": (203, 203, {}),
    "chunk": (133, 203, {}),
    "pool1": (203, 203, {"pool_size": 1, "sinks": 0}),
    "block48": (150, 203, {"block_size": 48, "local_size": 48}),
    "two-levels": (90, 8800, {"block_size": 64, "local_size": 64}),
}


@pytest.mark.parametrize("strict", [0, 1], ids=["plain", "strict"])
@pytest.mark.parametrize(("rows", "keys", "changes"), STRICT.values(), ids=STRICT)
def test_look_ahead(rows: int, keys: int, changes: dict, strict: int) -> None:
    """Another query, key and value in row j moves no earlier row where the rule is strict, and at most block_size - 1 rows else."""
    c = config(strict_causal=strict, num_blocks=1, **changes)
    q, k, v = Case("look-ahead", rows, keys, c, heads=(2, 1), dims=(16, 8)).inputs()
    before, farthest = attention(q, k, v, c).o, 0
    for row in range(1, rows, 7):
        other = [x.clone() for x in (q, k, v)]
        for x, at in zip(other, (row, row + keys - rows, row + keys - rows), strict=True):
            x[:, :, at] = 20 * x[:, :, at].flip(-1)
        moved = (attention(*other, c).o != before).any(-1).any(1)[0].nonzero().flatten()
        assert row in moved
        farthest = max(farthest, row - int(moved.min()))
    assert farthest == 0 if strict else 0 < farthest < c.block_size


def test_a_batch_row_equals_it_alone() -> None:
    case = Case("batch", lengths=(203, 60, 150), heads=(4, 2))
    q, k, v = case.inputs()
    lengths = case.lengths_tensor()
    assert lengths is not None
    together = attention(q, k, v, case.config, lengths)
    for b in range(case.batch):
        alone = attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], case.config, lengths[b : b + 1])
        assert_same_plan(alone.plan, Plan(*(getattr(together.plan, f)[b : b + 1] for f in ("selection", "sample_index", "sample_weight"))))
        assert torch.equal(alone.o[0], together.o[b]) and torch.equal(alone.lse[0], together.lse[b])


def test_values_do_not_touch_the_plan() -> None:
    q, k, v = Case("values").inputs()
    assert_same_plan(attention(q, k, v * 3 + 1, BASE).plan, attention(q, k, torch.zeros(1, 1, 203, 2), BASE).plan)


def test_a_plan_that_is_passed_is_followed() -> None:
    q, k, v = Case("passed").inputs()
    other = attention(q.flip(2), k.flip(2), v, replace(BASE, seed=99)).plan
    mine = attention(q, k, v, BASE)
    assert not torch.equal(mine.plan.selection, other.selection)
    followed = attention(q, k, v, BASE, plan=other)
    assert followed.plan is other and not torch.equal(followed.o, mine.o)


# --- arithmetic and memory -------------------------------------------------------------------------------------------


def test_low_precision_twin_differs_by_its_own_rounding() -> None:
    case = Case("twin", 300, 300, config(local_size=64), heads=(4, 2), dims=(64, 64))
    q, k, v = (x.bfloat16() for x in case.inputs())
    true = attention(q.double(), k.double(), v.double(), case.config)
    fine = attention(q.float(), k.float(), v.float(), case.config, plan=true.plan)
    twin = attention(q, k, v, case.config, plan=true.plan, arithmetic=torch.bfloat16)
    assert fine.lse.dtype == torch.float32 and twin.o.dtype == torch.bfloat16
    assert_near(fine.o.double(), true.o, 2e-6)
    error = (twin.o.double() - true.o).abs().max() / true.o.abs().max()
    assert 2**-11 < error < 2**-6, float(error)
    assert 1e-6 < (twin.lse.double() - true.lse).abs().max() < 2**-5


MEMORY = """
import torch
from pathlib import Path
from hyperattention import Config
from hyperattention.reference import attention
torch.set_num_threads(1)
def peak(n, **changes):
    attention(*torch.randn(3, 1, 2, n, 16), Config(local_size=256, num_blocks=4, **changes))
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024  # ru_maxrss begins with the peak of the process that started this one
print(peak(2048, exact_below=0), peak(16384, exact_below=0), peak(8192, exact_below=8192))
"""


def test_memory_is_linear() -> None:
    """A matrix of all pairs would add 2,000 MB, and 500 on the exact path; linear parts and tiles add tens."""
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    small, large, exact = map(float, run.stdout.split())
    assert large - small < 300 and exact - small < 300, f"peaks at 2k, 16k, exact 8k: {small:.0f}, {large:.0f}, {exact:.0f} MB"
