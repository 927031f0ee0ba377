"""Hardness of heads against the dense attention matrix: the oracle says which keys a row meets, numpy the rest."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import oracle
import oracle_sortlsh
import pytest
import torch
from operator_cases import Case, config, sorted_config
from oracle_rules import Rows
from test_hard_inputs import CONFIG, LENGTH, REFERENCE, captured

from hyperattention.export.switched import Captured
from hyperattention.geometry import Geometry
from hyperattention.reference import exact_attention
from hyperattention.selection import make_plan
from hyperattention.validate import hardness as hardness_module
from hyperattention.validate import hardness_columns
from hyperattention.validate.hardness import Hardness, measure_hardness, measured_cv, sampled_rows
from hyperattention.validate.hardness_layers import exact_lse, layers_hardness
from hyperattention.validate.hardness_rows import draw_variances, largest
from hyperattention.validate.head_metrics import head_rows
from hyperattention.validate.layers import layer_rows, seeds_of
from hyperattention.validate.metrics import head_errors

RAGGED = (0, 1, 33, 77, 150, 203)
CASES = [
    Case("square", heads=(4, 2)),
    Case("strict", config=config(strict_causal=1), heads=(4, 2)),
    Case("chunk", 97, 203, heads=(2, 2)),
    Case("more-queries", 203, 90, heads=(3, 1)),
    Case("lengths", config=config(), lengths=RAGGED),
    Case("lengths-chunk", 97, 203, config(), lengths=(40, 139, 203)),
    Case("non-causal", config=config(causal=0), heads=(4, 2)),
    Case("non-causal-lengths", 90, 203, config(causal=0), lengths=RAGGED),
    Case("uniform", config=config(stratified=0)),
    Case("no-samples", config=config(sample_size=0)),
    Case("no-blocks", config=config(num_blocks=0)),
    Case("no-sinks", config=config(sinks=0, local_overlap=0)),
    Case("every-sample", config=config(sample_size=300)),
    Case("all-taken", 130, 130, config(num_blocks=64)),
    Case("one-key", 70, 1),
    Case("large-logits", fill="large"),
    Case("sorted", config=sorted_config(), heads=(4, 2)),
    Case("sorted-local32", config=sorted_config(local_size=32, stratified=0), heads=(2, 1)),
    Case("sorted-overlap", config=sorted_config(local_overlap=1)),
    Case("sorted-chunk", 97, 203, sorted_config(), heads=(2, 2)),
    Case("sorted-lengths", config=sorted_config(), lengths=RAGGED),
    Case("sorted-lengths-overlap", config=sorted_config(local_overlap=1), lengths=RAGGED),
    Case("sorted-non-causal", config=sorted_config(causal=0), heads=(4, 2)),
    Case("sorted-non-causal-lengths", 150, 203, sorted_config(causal=0), lengths=(9, 120, 203)),
    Case("sorted-value-size", config=sorted_config(), dims=(5, 24)),
]


def measured(case: Case) -> tuple[Hardness, list[dict]]:
    q, k, v = case.inputs()
    lengths = case.lengths_tensor()
    plan = make_plan(q, k, Geometry.of(q, k, v, case.config, lengths), lengths)
    lse = exact_attention(q, k, v, bool(case.config.causal), lengths).lse
    found = measure_hardness(q, k, case.config, plan, lse, exact_lse(None), lengths)
    return found, [found.head(h) for h in range(q.shape[1])]


def softmax(logits: np.ndarray) -> np.ndarray:
    """Of each row; no row without a finite logit."""
    return np.exp(logits - np.logaddexp.reduce(logits, axis=1)[:, None])


class Dense:
    """One head of one batch row: everything of [Sq, Sk] at once, in float64, from the rules alone."""

    def __init__(self, case: Case, plan: oracle.Plan, b: int, head: int) -> None:
        q, k, _ = (x.numpy() for x in case.inputs())
        self.config, self.heads, self.b, self.head = case.config, case.heads, b, head
        length = case.seq_k if case.lengths is None else min(case.lengths[b], case.seq_k)
        self.rows, self.plan, head_kv = Rows(case.config, case.seq_q, case.seq_k, length), plan, head * case.heads[1] // case.heads[0]
        logits = q[b, head] @ k[b, head_kv].T / math.sqrt(case.dims[0])
        visible = self.rows.visible()
        live = np.array([not self.rows.dead(p) for p in self.rows.positions()])
        self.seen = np.flatnonzero(visible.any(1) & live)
        self.logits = np.where(visible, logits, -np.inf)[self.seen]
        self.p = softmax(self.logits)
        none = oracle.Plan(plan.chosen, np.full_like(plan.sample_index, -1), np.zeros_like(plan.sample_weight))
        exactly = oracle.weights(self.rows, none, b, head, head_kv)[self.seen] > 0
        self.exactly, self.left, self.head_kv = exactly, visible[self.seen] & ~exactly, head_kv

    def recall(self) -> list[float]:
        found = []
        for logits, exactly in zip(self.logits, self.exactly, strict=True):
            top = sorted(np.flatnonzero(logits > -np.inf), key=lambda j: -logits[j])[:16]
            found.append(float(np.mean(exactly[top])))
        return found

    def log_residual(self) -> np.ndarray:
        any_left = self.left.any(1)
        return np.logaddexp.reduce(np.where(self.left, self.logits, -np.inf)[any_left], axis=1)

    def alpha(self, first: int = 0) -> float:
        norms = (self.p**2).sum(0)[first : self.rows.length]
        return self.rows.length * norms.max() if len(norms) and len(self.seen) else math.nan

    def alpha_blocks(self) -> float:
        found = [math.nan]
        tree = replace(self.rows, config=replace(self.config, selector="sortlsh", local_overlap=0, strict_causal=0))
        for node in oracle_sortlsh.nodes(tree):
            mine = np.isin(self.seen, node.rows)
            if mine.sum() >= 32 and len(node.keys):
                p = softmax(self.logits[mine][:, list(node.keys)])
                found.append(len(node.keys) * (p**2).sum(0).max())
        return float(np.nanmax(found)) if len(found) > 1 else math.nan

    def draws(self, row: int) -> list[np.ndarray]:
        """Candidates of each draw that this row reads, in order."""
        rows, c = self.rows, self.config
        if c.selector == "blocks":
            return [np.arange(c.sinks, max(c.sinks, min(rows.far(rows.first + row), rows.length)))]
        order = self.plan.chosen[1][self.b, self.head_kv]
        return [order[node.level, list(node.keys)] for node in oracle_sortlsh.nodes(rows) if row in node.rows and len(node.keys)]

    def variances(self, stratified: bool) -> np.ndarray:
        """Of the sampled row sum over the row sum, from the definition: the variance of each single draw."""
        found = np.zeros(len(self.seen))
        for at, row in enumerate(self.seen):
            b = np.where(self.left[at], self.p[at], 0)
            for keys in self.draws(int(row)):
                n, m = len(keys), min(self.config.sample_size, len(keys))
                if stratified:
                    found[at] += sum(np.var(len(part) * b[part]) for part in (keys[s * n // m : (s + 1) * n // m] for s in range(m)))
                elif n:
                    found[at] += np.var(n * b[keys]) / self.config.sample_size
        return found


def dense_head(case: Case, plan: oracle.Plan, head: int) -> dict:
    """What `Hardness.head` should say."""
    parts = [Dense(case, plan, b, head) for b in range(case.batch)]
    left = np.concatenate([x.log_residual() for x in parts])
    low, high = (np.quantile(left, share, method="nearest") for share in (0.01, 0.99)) if len(left) else (math.nan, math.nan)
    cv = {
        rule: math.sqrt(np.concatenate([x.variances(rule == "stratified") for x in parts]).mean()) if case.config.sample_size else None
        for rule in ("stratified", "uniform")
    }

    def worst(values: list[float]) -> float:
        return max((x for x in values if not math.isnan(x)), default=math.nan)

    return {
        "mass": np.concatenate([np.where(x.exactly, x.p, 0).sum(1) for x in parts]).mean(),
        "top16_recall": np.mean(sum([x.recall() for x in parts], [])),
        "alpha": worst([x.alpha() for x in parts]),
        "alpha_without_first_32": worst([x.alpha(32) for x in parts]),
        "alpha_blocks": worst([x.alpha_blocks() for x in parts]) if case.config.causal else None,
        "log_kappa": left.max() - left.min() if len(left) else math.nan,
        "log_kappa_p1_p99": high - low,
        "cv_stratified": cv["stratified"],
        "cv_uniform": cv["uniform"],
        "cv_predicted": cv["stratified" if case.config.stratified else "uniform"],
    }


def assert_same(found: dict, wanted: dict, rel: float = 1e-5, abs: float = 1e-7) -> None:
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        # A variance of 0 is a difference of numbers near 1e-4: its root is only known to 1e-8.
        assert found[name] == (value if value is None else pytest.approx(value, rel=rel, abs=abs, nan_ok=True)), name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_number_is_the_dense_one(case: Case) -> None:
    found, heads = measured(case)
    q, k, _ = case.inputs()
    plan = oracle.make_plan(q.numpy(), k.numpy(), case.config, case.lengths)
    for head, row in enumerate(heads):
        assert_same(row, dense_head(case, plan, head))
    wanted = [Dense(case, plan, b, 0).seen.tolist() for b in range(case.batch)]
    assert [rows.tolist() for rows in found.rows] == wanted


def test_the_cases_have_something_to_say() -> None:
    """The numbers of the cases differ and are not all NaN or none."""
    rows = {str(case): measured(case)[1][0] for case in CASES}
    for name in next(iter(rows.values())):
        values = {round(row[name], 6) for row in rows.values() if row[name] is not None and not math.isnan(row[name])}
        assert len(values) > 8, name


@pytest.mark.parametrize("causal", [0, 1])
def test_a_row_without_keys_says_nothing(causal: int) -> None:
    case = Case("empty", config=config(causal=causal), lengths=(0, 0))
    found, heads = measured(case)
    assert [len(rows) for rows in found.rows] == [0, 0]
    assert all(value is None or math.isnan(value) for value in heads[0].values())


@pytest.mark.parametrize("tile", [1, 2**26], ids=["one-row", "all-rows"])
@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[5], CASES[17], CASES[21]], ids=str)
def test_tiles_change_nothing(case: Case, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measured(case)[1]
    monkeypatch.setattr(hardness_module, "_TILE", tile)
    monkeypatch.setattr(hardness_module, "_TILES", 1)
    monkeypatch.setattr(hardness_columns, "_TILE", tile)
    monkeypatch.setattr(hardness_columns, "BAND", 4)
    for found, wanted in zip(measured(case)[1], whole, strict=True):
        assert_same(found, wanted)


# --- long heads: some rows, some columns -----------------------------------------------------------------------------


@pytest.mark.parametrize("seen, count", [(0, 0), (1, 1), (511, 511), (512, 512), (513, 256), (16_384, 256), (20_000, 312), (100_000, 512)])
def test_sampled_rows_are_even(seen: int, count: int) -> None:
    rows = sampled_rows(range(7, 7 + seen))
    assert len(rows) == count
    if count:
        steps = rows.diff().tolist() or [1]
        assert min(steps) >= 1 and max(steps) - min(steps) <= 1
        assert 0 <= rows[0] - 7 <= seen // count and 0 <= 7 + seen - 1 - rows[-1] <= seen // count


LONG = Case("long", 1500, 1500, config(local_size=64, exact_below=64, num_blocks=4, sample_size=64), heads=(2, 1))


@pytest.mark.parametrize(
    "changes", [{}, {"causal": 0}, {"selector": "sortlsh", "local_overlap": 0}], ids=["blocks", "non-causal", "sortlsh"]
)
def test_long_heads_are_exact_on_their_rows_and_largest_columns(changes: dict) -> None:
    case = replace(LONG, config=replace(LONG.config, **changes))
    q, k, v = case.inputs()
    k[:, :, 777] *= 4.0  # one column stands out
    c = case.config
    g = Geometry.of(q, k, v, c)
    plan = make_plan(q, k, g)
    truth = exact_attention(q, k, v, bool(c.causal))
    found = measure_hardness(q, k, c, plan, truth.lse, exact_lse(None))
    logits = torch.einsum("hid,jd->hij", q[0], k[0, 0]) / math.sqrt(q.shape[-1])
    if c.causal:
        logits = logits.masked_fill(torch.ones(1500, 1500).triu(1).bool(), -math.inf)
    p = logits.softmax(-1)
    for head in range(2):
        row, norms = found.head(head), p[head].square().sum(0)
        assert row["alpha"] == pytest.approx(1500 * float(norms.max()), rel=1e-6)
        assert row["alpha_without_first_32"] == pytest.approx(1500 * float(norms[32:].max()), rel=1e-6)
        assert row["alpha_blocks"] is None if not c.causal else row["alpha_blocks"] > 1
        # The mass again, from the operator itself: its row sums without samples, on the rows that were looked at.
        kept = REFERENCE(q.float(), k.float(), v.float(), replace(c, sample_size=0))[1][0, head]
        share = torch.exp(kept.double() - truth.lse[0, head])[found.rows[0]]
        assert row["mass"] == pytest.approx(float(share.mean()), rel=1e-4)


@pytest.mark.parametrize("tile", [1, 2**20], ids=["one-band", "all-bands"])
@pytest.mark.parametrize("causal", [0, 1])
def test_a_column_that_only_rows_beside_it_read_is_found(causal: int, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of the rows is sampled: 256 columns look larger on those that are."""
    monkeypatch.setattr(hardness_columns, "_TILE", tile)
    case = replace(LONG, config=replace(LONG.config, causal=causal), dims=(32, 8), heads=(1, 1))
    q, k, v = case.inputs()
    missed = sorted(set(range(600, 620)) - set(sampled_rows(range(1500)).tolist()))
    for row in missed:
        q[0, 0, row] = 40 * k[0, 0, 601] / k[0, 0, 601].norm()
    plan = make_plan(q, k, Geometry.of(q, k, v, case.config))
    lse = exact_attention(q, k, v, bool(causal)).lse
    found = measure_hardness(q, k, case.config, plan, lse, exact_lse(None)).head(0)
    logits = torch.einsum("id,jd->ij", q[0, 0], k[0, 0]) / math.sqrt(32)
    norms = (logits.masked_fill(torch.ones(1500, 1500).triu(1).bool(), -math.inf) if causal else logits).softmax(-1).square().sum(0)
    assert int(norms[32:].argmax()) == 601 - 32 and norms[601] > 5
    assert found["alpha_without_first_32"] == pytest.approx(1500 * float(norms[601]), rel=1e-6)


def test_blocks_off_the_diagonal_at_length() -> None:
    """Only the blocks that hold 32 sampled rows: here the three largest levels of five."""
    case = LONG
    q, k, v = case.inputs()
    plan = make_plan(q, k, Geometry.of(q, k, v, case.config))
    truth = exact_attention(q, k, v, True)
    found = measure_hardness(q, k, case.config, plan, truth.lse, exact_lse(None))
    rows, tree = set(found.rows[0].tolist()), Rows(replace(case.config, selector="sortlsh", local_overlap=0), 1500, 1500, 1500)
    best, judged = 0.0, set()
    for node in oracle_sortlsh.nodes(tree):
        if len(rows & set(node.rows)) >= 32:
            judged.add(node.level)
            keys = list(node.keys)
            p = (torch.einsum("id,jd->ij", q[0, 1, list(node.rows)], k[0, 0, keys]) / math.sqrt(8)).softmax(-1)
            best = max(best, len(keys) * float(p.square().sum(0).max()))
    assert judged == {2, 3, 4}
    assert found.head(1)["alpha_blocks"] == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 255, 256, 257, 300, 1031])
@pytest.mark.parametrize("fill", ["normal", "ties", "masked"])
def test_largest_is_topk(n: int, fill: str) -> None:
    x = torch.randn(3, 2, n, generator=torch.Generator().manual_seed(n))
    if fill == "ties":
        x = x.sign()
    elif fill == "masked":
        x[..., n // 3 :] = -torch.inf
    value, at = largest(x, 16)
    assert torch.equal(value.sort(-1).values, x.topk(min(16, n)).values.sort(-1).values)
    assert torch.equal(x.gather(-1, at), value) and all(len(set(row.tolist())) == min(16, n) for row in at.flatten(0, 1))


# --- predicted against measured --------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, m", [(1, 1), (7, 3), (64, 64), (64, 65), (100, 33)])
def test_variance_of_the_draws_themselves(n: int, m: int) -> None:
    """Every outcome of every draw, weighted: the rules' own variance."""
    b = torch.rand(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    parts = min(n, m)
    slices = [b[s * n // parts : (s + 1) * n // parts] for s in range(parts)]
    stratified, uniform = draw_variances(b[None], torch.zeros(1, 1, dtype=torch.long), torch.full((1, 1), n), m)
    assert float(stratified) == pytest.approx(sum(float((len(x) * x).var(correction=0)) for x in slices), abs=1e-12)
    assert float(uniform) == pytest.approx(float((n * b).var(correction=0)) / m, abs=1e-12)


@pytest.mark.parametrize("name", ["blocks", "uniform", "sortlsh"])
def test_predicted_spread_is_the_measured_one(name: str) -> None:
    """Where the logits are even, so that the mean over a few seeds comes close: over 100 of them, within 12%."""
    changes = {"blocks": {}, "uniform": {"stratified": 0}, "sortlsh": {"selector": "sortlsh", "num_blocks": 0, "local_overlap": 0}}[name]
    call = captured(replace(CONFIG, **{"num_blocks": 2, "sample_size": 16, **changes}), length=300)
    q, k, v = (torch.randn(1, heads, 300, 32, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 3))
    call = replace(call, q=q, k=k, v=v[:, :2])
    exact = exact_attention(call.q, call.k, call.v, True).lse
    (hard,) = layers_hardness([call], None, [exact])
    lses = [REFERENCE(call.q, call.k, call.v, c)[1] for c in seeds_of(call.config, 100)]
    predicted = [hard.head(head)["cv_predicted"] for head in range(4)]
    found = [measured_cv(hard, lses, exact, head) for head in range(4)]
    assert min(predicted) > 0.03 and found == pytest.approx(predicted, rel=0.12)
    other = [hard.head(head)["cv_uniform" if call.config.stratified else "cv_stratified"] for head in range(4)]
    assert other != pytest.approx(predicted, rel=0.02)


# --- rows of the report ----------------------------------------------------------------------------------------------


def test_heads_of_a_layer_agree_with_the_layer() -> None:
    call = captured()
    (row,) = layer_rows(REFERENCE, None, [call], LENGTH, lambda text: None)
    heads = row["heads"]
    assert [head["head"] for head in heads] == [0, 1, 2, 3]
    errors = [head["relative_l2"] for head in heads]
    size = exact_attention(call.q, call.k, call.v, True).o.double().square().sum((0, 2, 3))
    for seed, spread in enumerate(row["seeds"]["relative_l2"]):  # a layer's error is its heads', by the size of their exact output
        own = torch.tensor([head["seeds"]["relative_l2"][seed] for head in heads], dtype=torch.float64)
        assert spread == pytest.approx(float((own.square() @ size / size.sum()).sqrt()), rel=1e-6)
    assert errors == [head["seeds"]["relative_l2"][0] for head in heads]
    assert row["worst_head"] == errors.index(max(errors)) and row["worst_head_relative_l2"] == max(errors)
    assert sum(head["lse_bias"] for head in heads) / 4 == pytest.approx(row["lse_bias"], rel=1e-6)
    # The layer's mass is over all rows, a head's over the sampled ones.
    assert sum(head["mass"] for head in heads) / 4 == pytest.approx(row["mass"], abs=0.01)
    assert all(len(head["cv_seeds"]) == 5 for head in heads)
    spreads = [math.sqrt(sum(cv * cv for cv in head["cv_seeds"]) / 5) for head in heads]
    assert spreads == pytest.approx([head["cv_measured"] for head in heads], rel=1e-9)
    assert all(0 < head["cv_measured"] < 0.01 and 0.99 < head["top16_recall"] <= 1 and head["alpha"] > 1 for head in heads)


def test_head_rows_name_the_head_that_is_wrong() -> None:
    call = captured(length=300)
    exact = exact_attention(call.q, call.k, call.v, True)
    (hard,) = layers_hardness([call], None, [exact.lse])
    ours, lse = exact.o.clone(), exact.lse.clone()
    ours[:, 2] *= 1.5
    lse[:, 1] += 0.25
    rows = head_rows([head_errors(o, exact.o) for o in (ours, exact.o)], hard, exact.lse, [lse])
    assert [round(row["relative_l2"], 6) for row in rows] == [0, 0, 0.5, 0] and rows[2]["norm_ratio"] == pytest.approx(1.5)
    assert [[round(x, 6) for x in row["seeds"]["relative_l2"]] for row in rows] == [[0, 0], [0, 0], [0.5, 0], [0, 0]]
    assert [round(row["lse_bias"], 5) for row in rows] == [0, 0.25, 0, 0] and rows[1]["lse_std"] == pytest.approx(0, abs=1e-5)
    assert [round(row["cv_measured"], 5) for row in rows] == [0, round(math.expm1(0.25), 5), 0, 0]
    assert [row["cv_seeds"] for row in rows] == [[row["cv_measured"]] for row in rows]


def test_a_selector_that_chooses_nothing_recalls_less() -> None:
    call = captured()
    blind = Captured(0, call.q, call.k, call.v, None, replace(CONFIG, num_blocks=0), call.o)
    lse = exact_attention(call.q, call.k, call.v, True).lse
    with_blocks, without = (hard.head(0) for hard in layers_hardness([call, blind], None, [lse, lse]))
    for name in ("mass", "top16_recall"):
        assert without[name] < with_blocks[name]
    assert without["cv_predicted"] > with_blocks["cv_predicted"] and without["alpha"] == with_blocks["alpha"]
