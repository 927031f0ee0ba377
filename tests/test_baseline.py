"""Keys per query against the oracle's plan, and window + sinks of equal cost."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
import validation_bench as vb
from oracle_rules import Rows

from hyperattention import reference
from hyperattention.config import Config
from hyperattention.export.load import inspect_source, load_model
from hyperattention.export.patch import install
from hyperattention.export.plan import make_plan
from hyperattention.validate.baseline import Baseline, approximating
from hyperattention.validate.cost import Keys, count_keys, keys_per_query, window_baseline, window_keys
from hyperattention.validate.feeds import feed
from hyperattention.validate.inputs import windows
from hyperattention.validate.layers import layer_rows
from hyperattention.validate.metrics import tensor_error, token_metrics
from hyperattention.validate.operators import Operator
from hyperattention.validate.regimes import prefill_exact_decode
from hyperattention.validate.window import window_attention, window_config, window_operator

SMALL = Config(exact_below=32, block_size=16, num_blocks=2, pool_size=4, sample_size=24, local_size=32, sinks=16)
SORTED = replace(SMALL, selector="sortlsh", num_projections=5, local_overlap=0, sinks=3)
SHAPES = {
    "blocks": (SMALL, 203),
    "blocks, no overlap": (replace(SMALL, local_overlap=0, pool_size=16), 129),
    "blocks, uniform samples": (replace(SMALL, stratified=0, sample_size=300), 97),
    "blocks, full": (replace(SMALL, causal=0), 131),
    "blocks, two levels": (replace(SMALL, num_blocks=1, pool_size=2, local_size=64), 16 * 640 + 5),
    "sortlsh": (SORTED, 203),
    "sortlsh, overlap": (replace(SORTED, local_overlap=1, num_blocks=1), 161),
    "sortlsh, full": (replace(SORTED, causal=0), 141),
    "nothing far": (SMALL, 65),
    "exact": (replace(SMALL, exact_below=99), 99),
}


def operator() -> Operator:
    return Operator("reference", lambda q, k, v, config, lengths: reference.attention(q, k, v, config, lengths)[:2])


def qkv(length: int, heads: int = 2, heads_kv: int = 1, size: int = 8, seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(1, h, length, size, generator=g) for h in (heads, heads_kv, heads_kv)]


def met(config: Config, length: int) -> tuple[float, ...]:
    """Local, sink, heavy and sampled pairs a row, counted in the plan that the oracle makes for random Q and K."""
    q, k, _ = (x.numpy() for x in qkv(length, heads=1))
    rows = Rows(config, length, length, length)
    plan = oracle.make_plan(q, k, config)
    if not plan.sample_index.size and oracle.is_exact(config, length, length):
        return rows.visible().sum() / length, 0, 0, 0
    key, far = np.arange(length)[None], np.array([rows.far(p) for p in rows.positions()])[:, None]
    near = rows.near() > 0
    local = (near & (key >= far)).sum()
    if config.selector == "blocks":
        tiles = np.array([p // config.block_size for p in rows.positions()])
        heavy = (plan.chosen[0][0, 0] >= 0).sum(-1)[tiles - tiles[0]].sum() * config.block_size
        draws = [rows.local_blocks().index(rows.local_block(p)) for p in rows.positions()]
        samples = (plan.sample_index[0, 0] >= 0).sum(-1)[draws].sum()
    else:
        heavy = samples = 0
        for at, node in enumerate(oracle.oracle_sortlsh.nodes(rows)):
            if not len(node.keys):
                continue
            samples += len(node.rows) * (plan.sample_index[0, 0, at] >= 0).sum()
            nq, nk = -(-len(node.rows) // config.block_size), -(-len(node.keys) // config.block_size)
            for place in range(len(node.rows)):  # rule 28, row by row
                taken = min(config.num_blocks, nk)
                centre = min((2 * (place // config.block_size) + 1) * nk // (2 * nq), nk - 1)
                first = min(max(centre - taken // 2, 0), nk - taken)
                heavy += sum(first <= j // config.block_size < first + taken for j in range(len(node.keys)))
    return tuple(float(n) / length for n in (local, near.sum() - local, heavy, samples))


@pytest.mark.parametrize("name", [n for n in SHAPES if n != "blocks, two levels"], ids=str)
def test_keys_are_counted_as_the_plan_meets_them(name: str) -> None:
    config, length = SHAPES[name]
    found = count_keys(config, length)
    assert (found.local, found.sinks, found.heavy, found.samples) == pytest.approx(met(config, length))


def test_a_window_costs_what_its_visible_pairs_are() -> None:
    config = replace(SMALL, num_blocks=0, sample_size=0)
    rows = Rows(config, 203, 203, 203)
    assert keys_per_query(config, 203) == pytest.approx(rows.near().sum() / 203)


@pytest.mark.parametrize("name", ["blocks", "blocks, full", "blocks, two levels"], ids=str)
def test_selection_counts_every_score_of_two_pools(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pairs that the reference's scoring multiplies, for one head, seen from outside."""
    from hyperattention import selection
    from hyperattention.geometry import Geometry

    config, length = SHAPES[name]
    scores, pairs = selection._scores, []

    def counted(queries, keys, per_block):
        pairs.append(queries[1].shape[-1] * keys[1].shape[-1])
        return scores(queries, keys, per_block)

    monkeypatch.setattr(selection, "_scores", counted)
    q, k, v = qkv(length, heads=1, size=2)
    selection.select_blocks(q, k, Geometry.of(q, k, v, config))
    # Padding up to a whole superblock is not work: at most one superblock a query block.
    assert sum(pairs) / length == pytest.approx(count_keys(config, length).selection, rel=0.02)


def test_sortlsh_pays_for_its_hashes() -> None:
    assert count_keys(SORTED, 203).selection == 2 * SORTED.num_projections


def test_no_tokens_cost_nothing() -> None:
    assert count_keys(SMALL, 0) == Keys()


@pytest.mark.parametrize("length", [4999, 8192, 32768, 262147], ids=str)
@pytest.mark.parametrize("selector", ["blocks", "sortlsh"])
@pytest.mark.parametrize("causal", [1, 0], ids=["causal", "full"])
def test_the_window_has_the_same_number_of_keys(causal: int, selector: str, length: int) -> None:
    config = replace(Config(), selector=selector, causal=causal)
    ours, window = keys_per_query(config, length), window_baseline(config, length)
    assert (window.num_blocks, window.sample_size, window.causal) == (0, 0, causal)
    assert window.sinks >= config.sinks
    assert ours * 0.998 <= window_keys(window, length) <= ours


def test_a_window_that_may_see_everything_is_exact() -> None:
    config = replace(SMALL, num_blocks=64, sample_size=4096)
    q, k, v = qkv(203)
    window = window_config(config, 203)
    o = operator()(q, k, v, window)[0]
    torch.testing.assert_close(o, reference.exact_attention(q, k, v, True).o)


def test_more_than_the_ranges_hold_is_said_by_the_count() -> None:
    config = replace(Config(), num_blocks=64, block_size=256, pool_size=1, sample_size=4096, local_size=65536)
    window = window_baseline(config, 2**20)
    assert window.sinks == 4096 and window_keys(window, 2**20) < keys_per_query(config, 2**20)


@pytest.mark.parametrize("lengths", [None, [150, 61]], ids=["whole", "padded"])
def test_full_window_against_a_dense_mask(lengths: list[int] | None) -> None:
    config = replace(SMALL, causal=0, num_blocks=0, sample_size=0, sinks=5, local_size=32)
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, h, 203, 8, generator=g) for h in (4, 2, 2))
    given = None if lengths is None else torch.tensor(lengths)
    o, lse = window_attention(q, k, v, config, given)
    key, tile = torch.arange(203), torch.arange(203)[:, None] // 32
    mask = ((key // 32 - tile).abs() <= 1) | (key < 5)
    for b in range(2):
        seen = mask & (key < (lengths[b] if lengths else 203))
        logits = q[b].double() @ k[b].double().repeat_interleave(2, 0).transpose(-1, -2) * 8**-0.5
        logits = logits.masked_fill(~seen, -torch.inf)
        live = seen.any(-1)
        torch.testing.assert_close(lse[b].double(), logits.logsumexp(-1), rtol=1e-5, atol=1e-5)
        dense = torch.softmax(logits[:, live], -1) @ v[b].double().repeat_interleave(2, 0)
        torch.testing.assert_close(o[b][:, live].double(), dense, rtol=1e-5, atol=1e-5)
        assert not o[b][:, ~live].any()
    if lengths is None:
        assert window_keys(config, 203) == pytest.approx(float(mask.sum()) / 203)


@pytest.mark.parametrize("causal", [1, 0], ids=["causal", "full"])
def test_the_window_is_right_where_attention_is_local_and_wrong_where_it_is_far(causal: int) -> None:
    """Keys turn with the position: a query that looks at its own place sees it in the window, one that looks far back does not."""
    config, length = replace(SMALL, causal=causal), 403
    angle = torch.arange(length) * (2 * torch.pi / length)
    k = 60 * torch.stack([angle.cos(), angle.sin()], -1)[None, None]
    v = torch.randn(1, 1, length, 4, generator=torch.Generator().manual_seed(3))
    for back, right in ((0, True), (length // 3, False)):
        q = k.roll(back, 2) / 4
        rows = slice(length // 2, None)
        exact = reference.exact_attention(q, k, v, bool(causal)).o[:, :, rows]
        window = window_operator(operator())(q, k, v, config)[0][:, :, rows]
        error = tensor_error(window, exact).relative_l2
        assert error < 1e-3 if right else error > 0.5


def test_a_layer_that_is_exact_stays_exact() -> None:
    assert window_config(SMALL.exact(), 500) == SMALL.exact()
    q, k, v = qkv(203)
    o, lse = window_operator(operator())(q, k, v, replace(SMALL, exact_below=203))
    exact = reference.exact_attention(q, k, v, True)
    assert torch.equal(o, exact.o) and torch.equal(lse, exact.lse)


def test_the_whole_model_beside_ours_is_one_planned_with_the_window() -> None:
    """Both regimes of the baseline, against a model whose plan has the window's own attributes."""
    length = vb.LENGTH
    window = windows(vb.corpus(), length, 1)[0]
    with vb.bench(vb.ReferenceKernels()) as (bench, _):
        with bench.patched.capture() as captured:
            exact = bench.exact.infer(feed(window.inputs))["logits"][0]
        calls = approximating(captured)
        rival = Baseline(bench, length)
        rival.add(window, exact)
        row = rival.row(layer_rows(bench.operator, None, captured, length, bench.step), calls)
        assert [keys for _, keys in calls] == [length] * 3
        assert row["keys_per_query"] <= row["keys_per_query_ours"] < row["keys_per_query"] + vb.ATTRIBUTES["block_size"]
        attributes = {**vb.ATTRIBUTES, **row["attributes"], "num_blocks": 0, "sample_size": 0}
        source = inspect_source(vb.MODEL)
        plan = make_plan(source, layers="odd", attributes=attributes, seq=(1, 512, 2048), input_ids="bytes")
        planned = install(load_model(source, torch.float32), plan)
        other = replace(bench, patched=planned, plan=plan)
        with planned.mode("plan", attention=bench.operator), torch.inference_mode():
            everywhere = token_metrics(exact, planned.forward(window.inputs).logits[0], window.targets)
        tail = token_metrics(exact[-vb.TAIL :], prefill_exact_decode(other, window), window.targets[-vb.TAIL :])
    assert row["all_positions"]["kl"]["mean"] == pytest.approx(float(everywhere.kl.mean()), rel=1e-5)
    for name, values in (("delta_nats", tail.delta), ("kl", tail.kl), ("top1", tail.top1)):
        assert row[name]["mean"] == pytest.approx(float(values.mean()), rel=1e-5)
    assert row["kl"]["mean"] > 0 and row["windows"] == 1


def test_a_model_without_a_vocabulary_has_the_layers_alone() -> None:
    layers = [{"window_relative_l2": 0.5, "relative_l2": 0.25}, {"window_relative_l2": 0.1, "relative_l2": 0.2}]
    with vb.bench(vb.ReferenceKernels()) as (bench, _):
        row = Baseline(bench, 203).row(layers, [(SMALL, 203), (replace(SMALL, causal=0), 131)])
    assert row["delta_nats"] is row["kl"] is row["top1"] is row["all_positions"] is None and row["windows"] == 0
    assert row["layers_relative_l2"] == {"mean": 0.3, "min": 0.1, "max": 0.5}
    assert row["keys_per_query_ours"] == (keys_per_query(SMALL, 203) + keys_per_query(replace(SMALL, causal=0), 131)) / 2
    assert row["keys_per_query_exact"] == (sum(range(1, 204)) / 203 + 131) / 2
