"""The study of `sortlsh`'s variants (study_sortlsh.py): two of them are the operator, and all of them spend the same keys."""

from __future__ import annotations

from dataclasses import replace

import oracle_rows
import pytest
import torch
from oracle_rows import HeadPlan
from sortlsh_variants import AS_NOW, BY_CENTROID, BY_HASH, Variant, hashed, weights
from study_sortlsh import METHODS, Problem, look_ups, rows_of, spent

from hyperattention.config import Config
from hyperattention.geometry import Geometry
from hyperattention.selection import make_plan

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = Config(selector="sortlsh", block_size=16, num_blocks=2, sample_size=20, stratified=1, local_size=48, sinks=5, exact_below=0)
SHAPES = {"causal": CONFIG, "overlap-0": replace(CONFIG, local_overlap=0), "full": replace(CONFIG, causal=0)}
OPERATORS = {**SHAPES, **{f"{name}-centred": replace(c, hash_centre=1, num_projections=9) for name, c in SHAPES.items()}}


def problem(config: Config, size: int = 301) -> Problem:
    rng = torch.Generator().manual_seed(size)
    q, k, v = (torch.randn(heads, size, 24, generator=rng) for heads in (4, 2, 2))
    return Problem("made", config, q, k, v, torch.arange(0, size, 7))


@pytest.mark.parametrize("config", OPERATORS.values(), ids=OPERATORS)
def test_two_variants_are_the_operator(config: Config) -> None:
    p = problem(config)
    g = Geometry(config, 1, 4, 2, 301, 301, 24, 24)
    plan = make_plan(p.q[None], p.k[None], g)
    rows, keys = plan.orders(g)
    exact, weight = weights(Variant("own", "operator" if config.hash_centre else ""), config, p.q, p.k, p.rows)
    for h in range(4):
        of_head = HeadPlan((rows[0, h], keys[0, h // 2]), plan.sample_index[0, h], plan.sample_weight[0, h])
        assert torch.equal(weight[h], oracle_rows.weights(config, of_head, p.rows, 301).float())
    assert bool((weight[exact] == 1).all()) and bool((weight[~exact] != 1).all())


@pytest.mark.parametrize("match", [AS_NOW, BY_HASH, BY_CENTROID])
@pytest.mark.parametrize("centre", ["", "both"])
def test_a_key_found_by_every_round_counts_once(match: str, centre: str) -> None:
    p = problem(replace(CONFIG, causal=0, sample_size=0, block_size=64))
    one, _ = weights(Variant("one", centre, match=match), p.config, p.q, p.k, p.rows)
    assert (one.sum(-1) <= 5 + 128).all() and one.sum() > 0.7 * one[..., 0].numel() * 133
    four, weight = weights(Variant("four", centre, match=match, rounds=4), p.config, p.q, p.k, p.rows)
    assert torch.equal(four.float(), weight) and (four.sum(-1) <= 5 + 128).all()


def test_what_is_hashed() -> None:
    p = problem(CONFIG)
    q, k = hashed(Variant("both", "both", angle=True), p.q, p.k)
    assert q.shape[-1] == 25 and not q[..., 24].any()
    lengths = k.norm(dim=-1)
    assert torch.allclose(lengths, lengths.amax(1, keepdim=True).expand_as(lengths))
    assert torch.allclose(k[..., :24], p.k - p.k.mean(1, keepdim=True), atol=1e-6)
    assert torch.equal(hashed(Variant("keys", "keys"), p.q, p.k)[0], p.q)


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_every_method_spends_the_same_keys(config: Config) -> None:
    rows = list(rows_of(problem(replace(config, sample_size=4, block_size=256, num_blocks=1, local_size=256), 1301)))
    assert [row["method"] for row in rows] == list(METHODS)
    keys = [row["keys"] for row in rows]
    assert min(keys) > 0.6 * max(keys), keys
    assert all(0 < row["mass"] < 1 and 0 < row["top16_recall"] < 1 and row["relative_l2"] > 0 for row in rows)


def test_look_ups_are_what_they_say() -> None:
    p = look_ups(1024, 64, 0.9, 0.0, 0.0, torch.device("cpu"))
    share = (p.q[:, p.rows] @ p.k.transpose(1, 2) / 8).softmax(-1)
    assert 0.85 < share.amax(-1).mean() < 0.99
    moved = look_ups(1024, 64, 0.9, 2.0, 0.0, torch.device("cpu"))
    assert torch.allclose((moved.q[:, p.rows] @ moved.k.transpose(1, 2) / 8).softmax(-1), share, atol=1e-4)
    assert spent(p) == (256, 128)
