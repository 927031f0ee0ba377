"""The look-ahead test: what it finds where an operator looks ahead, and that it finds nothing where none does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import validation_bench as vb
from torch import Tensor

from hyperattention.config import PRESETS, Config
from hyperattention.export.switched import Captured
from hyperattention.reference import attention
from hyperattention.validate.configs import configs
from hyperattention.validate.describe import plan_notes, plan_summary
from hyperattention.validate.distributions import approximates
from hyperattention.validate.look_ahead import VARIANTS, Place, moved, name_of, places, variants
from hyperattention.validate.look_ahead_runs import judged_layer, model_rows, op_rows
from hyperattention.validate.operators import Operator, reference_operator
from hyperattention.validate.strict_cost import has_twin, twin

CONFIG = Config(exact_below=64, block_size=16, num_blocks=1, sample_size=8, local_size=48, sinks=5)
SORTED = replace(CONFIG, selector="sortlsh", local_overlap=0)
LENGTH = 331


def captured(config: Config = CONFIG, rows: int = LENGTH, keys: int = LENGTH, lengths: Tensor | None = None) -> Captured:
    g = torch.Generator().manual_seed(rows)
    q, k, v = (torch.randn(2, heads, n, 16, generator=g) for heads, n in ((4, rows), (2, keys), (2, keys)))
    return Captured(3, q, k, v, lengths, config, q)


def found(config: Config, operator: Operator | None = None) -> dict[str, dict]:
    rows = op_rows(operator or reference_operator(), captured(config), lambda text: None)
    assert [row["selector"] for row in rows] == list(VARIANTS)
    return {row["selector"]: row for row in rows}


# --- what is compared ------------------------------------------------------------------------------------------------


def test_places_lie_where_they_say() -> None:
    size, local = CONFIG.block_size, CONFIG.local_size
    where = places(CONFIG, LENGTH)
    rows = [place.row for place in where]
    assert rows == sorted(set(rows), reverse=True) and rows[0] == LENGTH - 1 and min(rows) > 0
    for place in where[1:]:
        remainder = {"start of a query block": (size, 0), "inside a query block": (size, size // 2), "start of a local block": (local, 0)}
        remainder |= {"inside a local block": (local, local // 2), "end of a query block and of a local block": (local, local - 1)}
        period, rest = remainder[place.name]
        assert place.row % period == rest, place
    assert {place.name for place in where} > {"last row", "start of a query block", "end of a query block and of a local block"}


@pytest.mark.parametrize("length", [1, 2, 16, 47, 48, 49])
def test_places_of_short_sequences(length: int) -> None:
    assert all(0 < place.row < length for place in places(CONFIG, length))
    assert len(places(CONFIG, length)) >= (length > 1)


def test_moved_counts_what_differs_before_the_place() -> None:
    before = torch.ones(2, 3, 10, 4)
    after = before.clone()
    after[1, 2, 2] *= 1.5
    after[0, 0, 5, 0] = 1.0 + 2**-23
    after[..., 7:, :] = 9.0  # the place itself and what follows it
    row = moved(before, after, Place(7, "here"))
    assert (row["row"], row["place"], row["moved"], row["farthest"]) == (7, "here", 2, 5)
    assert row["largest_change"] == pytest.approx(0.5) and [entry["row"] for entry in row["rows"]] == [2, 5]
    assert row["rows"][1]["change"] == pytest.approx(2**-24) and row["runs"] == [[2, 2], [5, 5]]
    assert moved(before, before, Place(9, "here")) == {
        "row": 9, "place": "here", "moved": 0, "farthest": 0, "largest_change": 0.0, "rows": [], "runs": []
    }  # fmt: skip


def test_moved_names_runs_of_neighbours_and_the_rows_that_moved_most() -> None:
    before = torch.ones(1, 1, 70, 4)
    after = before.clone()
    odd, whole = list(range(1, 20, 2)), list(range(40, 65))
    after[..., [*odd, *whole], :] += torch.arange(1, 36)[:, None] / 100
    row = moved(before, after, Place(65, "here"))
    assert (row["moved"], row["farthest"], row["runs"]) == (35, 64, [[n, n] for n in odd[:8]])
    assert [entry["row"] for entry in row["rows"]] == whole[:-9:-1]
    near = moved(before[..., 30:, :], after[..., 30:, :], Place(35, "here"))
    assert near["runs"] == [[10, 34]]


def test_variants_keep_what_is_the_layers_own() -> None:
    for config in (CONFIG, replace(CONFIG, strict_causal=1), SORTED):
        made = variants(replace(config, scale=0.25, seed=9), LENGTH)
        assert tuple(made) == VARIANTS and made[name_of(config)] == replace(config, scale=0.25, seed=9)
        assert [name_of(c) for c in list(made.values())[1:]] == list(VARIANTS[1:])
        assert {(c.scale, c.seed, c.causal) for c in made.values()} == {(0.25, 9, 1)}
    assert replace(variants(SORTED, 32768)["blocks"], exact_below=4096) == PRESETS["blocks"]
    assert replace(variants(CONFIG, 32768)["sortlsh"], exact_below=4096) == PRESETS["paper"]


@pytest.mark.parametrize("length", [257, 331, 512, 513, 1000, 2048, 2049, 4096, 4097, 8192], ids=str)
@pytest.mark.parametrize("other", ["sortlsh", "blocks"])
def test_the_other_selector_has_keys_to_choose_on_short_sequences(other: str, length: int) -> None:
    """The largest tiles of the preset, halved together, that leave keys behind local ones and sinks."""
    own, preset = (CONFIG, PRESETS["paper"]) if other == "sortlsh" else (SORTED, PRESETS["blocks"])
    made = variants(own, length)[other]
    sizes = ("local_size", "block_size", "sample_size")
    (factor,) = {getattr(preset, name) // getattr(made, name) for name in sizes}
    if other == "blocks" and length < 513:  # two local blocks of 256 and a row: query blocks of 16 are the smallest
        assert factor == 1 and not approximates(made, length)
        return
    assert replace(made, exact_below=4096, **{name: getattr(preset, name) for name in sizes}) == preset
    assert approximates(made, length)
    assert factor == 1 or not approximates(replace(made, **{name: 2 * getattr(made, name) for name in sizes}), length)


# --- one layer -------------------------------------------------------------------------------------------------------


def test_each_selector_looks_as_far_ahead_as_its_rule_says() -> None:
    blocks, sorts = found(CONFIG), found(SORTED)
    for rows in (blocks, sorts):
        assert rows["exact"]["farthest"] == rows["blocks, strict"]["farthest"] == 0
        assert rows["exact"]["largest_change"] == 0 and not rows["exact"]["approximates"]
    assert blocks["blocks, strict"]["approximates"] and blocks["blocks"]["approximates"] and sorts["sortlsh"]["approximates"]
    assert 0 < blocks["blocks"]["farthest"] < CONFIG.block_size
    assert CONFIG.block_size < sorts["sortlsh"]["farthest"] < 4 * SORTED.local_size  # of the tree's largest node
    assert blocks["sortlsh"]["attributes"] == variants(CONFIG, LENGTH)["sortlsh"].attributes()
    assert blocks["sortlsh"]["approximates"] and blocks["sortlsh"]["farthest"] > CONFIG.block_size
    for row in (blocks["blocks"], sorts["sortlsh"], blocks["sortlsh"]):
        assert row["largest_change"] == max(place["largest_change"] for place in row["places"]) > 1e-3
        assert any(place["moved"] for place in row["places"])


def test_a_leak_through_keys_is_found() -> None:
    """An operator whose rows see one key too many."""

    def leak(q: Tensor, k: Tensor, v: Tensor, config: Config, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        return attention(q, k.roll(-1, 2), v.roll(-1, 2), config.exact(), lengths)[:2]

    rows = found(CONFIG, Operator("leak", leak))
    assert all(row["farthest"] == 1 for row in rows.values())


def test_which_layer_is_judged() -> None:
    full, chunk = captured(replace(CONFIG, causal=0)), captured(rows=100)
    exact, near = captured(CONFIG.exact()), captured(replace(CONFIG, local_size=LENGTH // 16 * 16 + 16))
    assert judged_layer([full, chunk, exact, near]) is None
    padded = judged_layer([full, captured(lengths=torch.tensor([200, 331], dtype=torch.int32)), captured()])
    assert padded is not None and padded.lengths is None and padded.q.shape[:3] == (1, 4, 200)
    noise, choosing = captured(replace(CONFIG, num_blocks=0)), captured()  # samples alone cannot look ahead
    for given, wanted in (([noise, choosing], choosing), ([noise], noise)):
        assert (judged := judged_layer(given)) is not None and judged.config == wanted.config


# --- the whole model -------------------------------------------------------------------------------------------------


def test_a_whole_model() -> None:
    model, ids = vb.model(), vb.corpus().ids[None, :301]
    config = replace(configs(model.plan.approximate)[0], num_blocks=1)
    rows = {row["selector"]: row for row in model_rows(model, reference_operator(), config, ids, lambda text: None)}
    assert rows["exact"]["farthest"] == rows["blocks, strict"]["farthest"] == 0
    assert 0 < rows["blocks"]["farthest"] < config.block_size and 0 < rows["blocks"]["largest_change"] < 1
    (place,) = model_rows(model, reference_operator(), config, ids, lambda text: None, 1)[0]["places"]
    assert place["place"].startswith("end of a query block")


def test_a_token_becomes_another_one() -> None:
    """Also where every token of the text is the same."""
    model, config = vb.model(), configs(vb.model().plan.approximate)[0]
    ids = torch.full((1, 201), 97)
    seen = []

    def watched(q: Tensor, k: Tensor, v: Tensor, c: Config, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        seen.append(v)
        return attention(q, k, v, c.exact(), lengths)[:2]

    rows = model_rows(model, Operator("watched", watched), config, ids, lambda text: None, 1)
    layers, place = len(model.plan.planned), rows[0]["places"][0]["row"]
    before, after = seen[0], seen[layers]  # of the first layer of two runs
    assert (before != after).any(-1).any(1)[0].nonzero().flatten().tolist() == [place]


def test_what_strict_costs_is_measured_in_both_regimes() -> None:
    report = vb.measured(vb.ReferenceKernels())
    ahead, row = report["look_ahead"], report["approximation"][0]
    assert ahead["own"] == "blocks" and ahead["length"] == vb.LENGTH and ahead["layer"] == 1
    for regime in ("all_positions", "prefill_exact_decode"):
        part = ahead["strict"][regime]
        assert part["blocks"] == row[regime]
        difference = part["strict"]["delta_nats"]["mean"] - part["blocks"]["delta_nats"]["mean"]
        assert part["cost"]["mean"] == pytest.approx(difference, abs=1e-12)
    assert ahead["strict"]["all_positions"]["cost"]["mean"] != 0
    assert [row["selector"] for row in ahead["model"]] == list(VARIANTS)


def test_a_strict_plan_says_so_and_its_twin_is_plain() -> None:
    with vb.bench(vb.ReferenceKernels()) as (bench, _):
        strict = replace(
            bench.plan, layers=tuple(replace(layer, config=layer.config and twin(layer.config)) for layer in bench.plan.layers)
        )
        assert plan_summary(bench.plan)["look_ahead"] == 15 and "Look-ahead: the keys" in plan_notes(bench.plan, "")[0]
        assert plan_summary(strict)["look_ahead"] == 0 and "Look-ahead: none" in plan_notes(strict, "")[0]
        assert has_twin(strict, vb.LENGTH) and has_twin(bench.plan, vb.LENGTH) and not has_twin(strict, 100)
        mixed = replace(strict, layers=(*strict.layers[:2], *bench.plan.layers[2:]))
        assert not has_twin(mixed, vb.LENGTH)
    assert twin(SORTED) == SORTED and twin(twin(CONFIG)) == CONFIG != twin(CONFIG)
