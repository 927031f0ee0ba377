"""Inputs that hurt: what they are by construction, who passes and who must not; and the rows of single layers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hyperattention import reference
from hyperattention.config import Config
from hyperattention.errors import UsageError
from hyperattention.export.patch import Captured
from hyperattention.selection import Plan
from hyperattention.validate import distributions
from hyperattention.validate.distributions import DISTRIBUTIONS, Problem, Sizes, approximates, exact_reach, far_of
from hyperattention.validate.hard_inputs import CRITERIA, Bounds, exact_rows, first_row, hard_rows, hard_steps
from hyperattention.validate.layers import EDGES, histogram, layer_rows, seeds_of
from hyperattention.validate.operators import Operator, one_thread

CONFIG = Config(exact_below=64, block_size=16, num_blocks=8, sample_size=32, local_size=64, sinks=16)
LENGTH = 1031
SIZES = Sizes(heads_q=4, heads_kv=2, length=LENGTH, head_dim=32, head_dim_v=24, rows=48)
CONFIGS = {
    "blocks": CONFIG,
    "blocks, full": replace(CONFIG, causal=0),
    "sortlsh": replace(CONFIG, selector="sortlsh", num_blocks=1, local_overlap=0, sinks=0),
    "own scale": replace(CONFIG, scale=0.03),
}


def run(q: Tensor, k: Tensor, v: Tensor, config: Config, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    with one_thread():
        return reference.attention(q, k, v, config, lengths)[:2]


def doubled(q: Tensor, k: Tensor, v: Tensor, config: Config, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Every sample counts twice."""
    plan = reference.attention(q, k, v, config, lengths).plan
    twice = Plan(plan.selection, plan.sample_index, 2 * plan.sample_weight)
    return reference.attention(q, k, v, config, lengths, twice)[:2]


def blind(q: Tensor, k: Tensor, v: Tensor, config: Config, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """No chosen blocks."""
    return run(q, k, v, replace(config, num_blocks=0), lengths)


REFERENCE = Operator("reference", run)


def captured(config: Config = CONFIG, length: int = LENGTH, layer: int = 0, seed: int = 0) -> Captured:
    """A call whose keys drift with the position: near ones look alike, as a text's do."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, heads, length, 32, generator=g) for heads in (4, 2, 2))
    drift = torch.randn(1, 1, length, 32, generator=g).cumsum(2) / 12
    q, k = q + drift, k + drift
    return Captured(layer, q, k, v, None, config, q)


def dense(p: Problem, config: Config) -> Tensor:
    """Attention probabilities of the problem's rows [Hq, R, S], float64."""
    k = p.k[0].double().repeat_interleave(p.q.shape[1] // p.k.shape[1], 0)
    logits = p.q[0, :, p.rows].double() @ k.transpose(-1, -2) * config.resolved_scale(p.q.shape[-1])
    if config.causal:
        logits = logits.masked_fill(torch.arange(p.k.shape[2]) > p.rows[:, None], -torch.inf)
    return logits.softmax(-1)


def problem(name: str, config: Config, seed: int = 0) -> Problem:
    return DISTRIBUTIONS[name](config, SIZES, torch.Generator().manual_seed(seed))


# --- what the inputs are ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_needle_holds_nearly_all_attention_from_afar(config: Config) -> None:
    p = problem("needle", config)
    mass, place = dense(p, config).max(-1)
    assert float(mass.mean()) > 0.95 and float((mass > 0.8).double().mean()) > 0.98
    values = p.v[0].repeat_interleave(2, 0)
    assert p.planted is not None
    for head in range(4):
        assert torch.equal(values[head, place[head]], p.planted[head])
        for row, at in zip(p.rows.tolist(), place[head].tolist(), strict=True):
            assert row >= LENGTH // 2 and config.sinks <= at < far_of(config, row, LENGTH)
    assert len(set(place[0].tolist())) > 8


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_heavy_columns_are_few_far_and_shared(config: Config) -> None:
    p = problem("heavy columns", config)
    attention = dense(p, config)
    columns = attention.mean((0, 1)).topk(distributions.HEAVY).indices
    # 80% where a row sees every key; more where it sees fewer.
    assert float(attention[..., columns].sum(-1).mean()) == pytest.approx(0.84, abs=0.06)
    assert int(columns.min()) >= config.sinks and int(columns.max()) < min(far_of(config, int(row), LENGTH) for row in p.rows)
    assert float(attention[..., columns].sum(-1).min()) > 0.3


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_clusters_hold_attention_in_scattered_runs(config: Config) -> None:
    p = problem("clustered", config)
    met = dense(p, config)[:, p.rows > LENGTH // 2]
    # Keys of one run share a mean value; runs of 16 that hold much of a row's attention lie apart.
    runs = torch.nn.functional.pad(met, (0, -LENGTH % distributions.RUN)).unflatten(-1, (-1, distributions.RUN)).sum(-1)
    strongest = runs.topk(8, dim=-1)
    assert float(strongest.values.sum(-1).mean()) > 0.7  # 128 keys of about 1,000, of which 8 runs are a cluster's
    spread = strongest.indices.max(-1).values - strongest.indices.min(-1).values
    assert float(spread.double().mean()) > 20


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_gaussian_logits_have_unit_spread_whatever_the_scale(config: Config) -> None:
    p = problem("gaussian", config)
    logits = p.q[0, 0] @ p.k[0, 0].T * config.resolved_scale(SIZES.head_dim)
    assert float(logits.std()) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_seed_is_a_problem(name: str) -> None:
    one, same, other = (problem(name, CONFIG, seed) for seed in (1, 1, 2))
    assert torch.equal(one.q, same.q) and torch.equal(one.rows, same.rows)
    assert not torch.equal(one.k, other.k)
    assert 0 < len(one.rows) <= SIZES.rows + distributions.NEEDLES and len(set(one.rows.tolist())) == len(one.rows)


@pytest.mark.parametrize("length", [130, 145, 200], ids=str)
def test_needle_where_only_the_last_rows_have_far_keys(length: int) -> None:
    config = replace(CONFIG, sinks=3)
    p = distributions.needle(config, replace(SIZES, length=length), torch.Generator().manual_seed(0))
    assert all(128 <= row < length for row in p.rows.tolist())


# --- exact attention of a few rows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [1, 0], ids=["causal", "full"])
def test_exact_rows_against_pytorch(causal: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyperattention.validate.hard_inputs._TILE", 1000)  # several parts a head
    c = captured(replace(CONFIG, causal=causal), 203)
    rows = torch.tensor([0, 7, 100, 202])
    o, lse = exact_rows(c.q, c.k, c.v, rows, c.config)
    k, v = (x.double().repeat_interleave(2, 1) for x in (c.k, c.v))
    whole = torch.nn.functional.scaled_dot_product_attention(c.q.double(), k, v, is_causal=bool(causal))
    torch.testing.assert_close(o, whole[0, :, rows])
    torch.testing.assert_close(lse.float(), reference.exact_attention(c.q, c.k, c.v, bool(causal)).lse[0, :, rows])


# --- verdicts --------------------------------------------------------------------------------------------------------


def verdicts(operator: Operator, config: Config = CONFIG) -> dict[str, dict]:
    steps: list[str] = []
    found = hard_rows(operator, [captured(config)], steps.append)
    assert len(steps) == hard_steps() == len(found)
    return {row["distribution"]: row for row in found}


def test_blocks_passes_and_every_number_is_there() -> None:
    rows = verdicts(REFERENCE)
    assert list(rows) == ["text", "needle", "clustered", "heavy columns", "gaussian"]
    for name, row in rows.items():
        assert row["length"] == LENGTH and row["seeds"] == [0, 1, 2] and row["meaning"]
        assert row["passed"] == CRITERIA[name].passed(row["value"])
        for side in ("ours", "window"):
            l2 = row[side]["relative_l2"]
            assert 0 <= l2["min"] <= l2["mean"] <= l2["max"]
            assert {"cosine", "norm_ratio", "lse_bias", "lse_spread"} <= set(row[side])
    assert rows["needle"]["passed"] and rows["needle"]["window"]["recall"] < 0.5
    assert rows["heavy columns"]["passed"] and rows["heavy columns"]["window"]["relative_l2"]["mean"] > 0.7
    assert rows["gaussian"]["passed"] and rows["gaussian"]["window"]["lse_bias"] < -0.5


def test_without_chosen_blocks_the_needle_and_the_columns_are_lost() -> None:
    rows = verdicts(Operator("blind", blind))
    assert not rows["needle"]["passed"] and rows["needle"]["value"] < 0.5
    assert not rows["heavy columns"]["passed"]


def test_samples_that_count_twice_bias_the_mass() -> None:
    rows = verdicts(Operator("doubled", doubled))
    assert not rows["gaussian"]["passed"] and rows["gaussian"]["ours"]["lse_bias"] > 0.3


def test_a_result_that_is_not_a_number_never_passes() -> None:
    def broken(q, k, v, config, lengths=None):
        o, lse = run(q, k, v, config, lengths)
        return o * torch.nan, lse * torch.nan

    assert not any(row["passed"] for row in verdicts(Operator("broken", broken)).values())


def test_sortlsh_and_full_attention_are_judged_too() -> None:
    for config in (CONFIGS["sortlsh"], CONFIGS["blocks, full"]):
        rows = verdicts(REFERENCE, config)
        assert len(rows) == 5 and rows["gaussian"]["passed"]
    assert rows["needle"]["passed"] and rows["needle"]["window"]["recall"] < 0.5


def test_own_inputs_are_the_mean_over_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyperattention.validate.hard_inputs.DISTRIBUTIONS", {})
    calls = [captured(layer=layer, seed=layer) for layer in range(5)]
    exact = replace(calls[0], layer=9, config=CONFIG.exact())
    row = hard_rows(REFERENCE, [exact, *calls], lambda text: None, "examples")[0]
    alone = [hard_rows(REFERENCE, [calls[i]], lambda text: None)[0] for i in (0, 2, 4)]
    assert row["distribution"] == "examples" and row["seeds"] == [0, 1, 2]
    found = sum(one["ours"]["relative_l2"]["mean"] for one in alone) / 3
    assert row["ours"]["relative_l2"]["mean"] == pytest.approx(found)


def test_nothing_to_judge_where_every_row_meets_every_key() -> None:
    for config, length in ((CONFIG.exact(), LENGTH), (CONFIG, 128), (replace(CONFIG, local_size=1024), LENGTH)):
        assert hard_rows(REFERENCE, [captured(config, length)], lambda text: None) == []
    assert hard_rows(REFERENCE, [], lambda text: None) == []


def test_the_processor_gets_whole_groups_and_no_padding() -> None:
    c = replace(captured(), lengths=torch.tensor([900], dtype=torch.int32))
    cut = first_row(c, Bounds(length=300, heads=3))
    assert (cut.q.shape, cut.k.shape, cut.v.shape) == ((1, 2, 300, 32), (1, 1, 300, 32), (1, 1, 300, 32)) and cut.lengths is None
    assert torch.equal(cut.q, c.q[:, :2, :300])
    assert first_row(c, None).q.shape == (1, 4, 900, 32)
    late = replace(c, config=replace(CONFIG, exact_below=400))
    assert first_row(late, Bounds(length=300)).k.shape[2] == 800


# --- rows of single layers -------------------------------------------------------------------------------------------


def test_histogram_loses_no_row() -> None:
    errors = torch.tensor([[0.0, 1e-9, 1e-4, 0.00011, 0.1], [9.9, 10.0, 1e6, torch.inf, torch.nan]])
    found = histogram(errors)
    assert found["edges"][0] == pytest.approx(1e-4) and found["edges"][-1] == pytest.approx(10)
    ratios = [b / a for a, b in zip(EDGES, EDGES[1:])]
    assert ratios == pytest.approx([10**0.25] * len(ratios))
    counts = dict(zip(EDGES, found["counts"], strict=False))
    assert len(found["counts"]) == len(EDGES) - 1 and sum(found["counts"]) == 10
    assert found["counts"][0] == 4 and found["counts"][-1] == 5 and counts[EDGES[12]] == 1


def test_layer_rows_carry_their_spread() -> None:
    calls = [captured(layer=2), replace(captured(), layer=3, config=CONFIG.exact())]
    (row,) = layer_rows(REFERENCE, None, calls, LENGTH, lambda text: None)
    exact = reference.exact_attention(calls[0].q, calls[0].k, calls[0].v, True).o
    errors = [((run(*(calls[0].q, calls[0].k, calls[0].v), c)[0] - exact).norm() / exact.norm()).item() for c in seeds_of(CONFIG)]
    assert row["layer"] == 2 and row["seeds"]["relative_l2"] == pytest.approx(errors, rel=1e-4)
    assert row["relative_l2"] == row["seeds"]["relative_l2"][0] and len(set(errors)) == 5
    assert sum(row["row_errors"]["counts"]) == 4 * LENGTH
    assert row["row_errors"]["counts"][0] >= 4 * 128  # the first rows meet every key
    blind_row = layer_rows(Operator("blind", blind), None, calls[:1], LENGTH, lambda text: None)[0]
    assert blind_row["relative_l2"] > row["relative_l2"] and blind_row["window_relative_l2"] == row["window_relative_l2"]


def test_seeds_wrap_at_the_top() -> None:
    assert [c.seed for c in seeds_of(replace(CONFIG, seed=2**31 - 1))] == [2**31 - 1, 0, 1, 2, 3]
    with pytest.raises(UsageError):
        replace(CONFIG, seed=2**31)


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("sinks", [0, 1, 47, 48, 49, 120])
def test_exact_attention_reaches_as_far_as_nothing_approximates(causal: int, overlap: int, sinks: int) -> None:
    for below in (0, 170):
        config = Config(causal=causal, block_size=16, local_size=48, local_overlap=overlap, sinks=sinks, exact_below=below)
        found = [n for n in range(1, 400) if not config.is_exact(n, n) and approximates(config, n)]
        assert found == list(range(exact_reach(config) + 1, 400))
