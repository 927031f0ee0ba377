"""The patched model: padding, caches, capture, masks, and calls that the operator cannot compute."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
import transformers

from hyperattention.config import Config
from hyperattention.errors import UnsupportedModel, UsageError
from hyperattention.export.load import TransformersSource, inspect_source, load_model
from hyperattention.export.masks import attention_mask_function, lengths_of
from hyperattention.export.patch import IMPLEMENTATION, Patched, install, padding_mask
from hyperattention.export.plan import make_plan
from hyperattention.reference import exact_attention

ROWS = 150


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> TransformersSource:
    return inspect_source(tiny.save(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def ours(source: TransformersSource) -> Patched:
    return install(load_model(source, torch.float32), make_plan(source, layers="all", attributes=tiny.SMALL))


@pytest.mark.parametrize("mode", ["plan", "exact"])
def test_padded_rows_equal_the_row_alone(ours: Patched, mode: str) -> None:
    ids, lengths = tiny.token_ids(3, ROWS), torch.tensor([ROWS, 101, 1])
    with ours.mode(mode):
        together = ours.forward(ids, lengths).logits
        for row, length in enumerate(lengths.tolist()):
            alone = ours.forward(ids[row : row + 1, :length]).logits[0]
            if mode == "exact" or length == ROWS:
                torch.testing.assert_close(together[row, :length], alone, atol=1e-5, rtol=1e-5)
    # Rule 5: whether a call is exact follows from the padded shape, and so may differ from the short row alone.
    with ours.mode("plan"):
        padded = torch.cat([ids[1:2, :101], torch.full((1, ROWS - 101), 5)], 1)
        other = torch.cat([ids[1:2, :101], torch.full((1, ROWS - 101), 60)], 1)
        a, b = (ours.forward(x, torch.tensor([101])).logits[0, :101] for x in (padded, other))
        assert torch.equal(a, b), "padding reached a live row"


def test_plan_mode_approximates_and_exact_mode_does_not(ours: Patched) -> None:
    ids = tiny.token_ids(2, ROWS)
    plan = ours.forward(ids).logits
    with ours.mode("exact"):
        exact = ours.forward(ids).logits
    assert (plan - exact).abs().max() > 0.01
    assert torch.equal(ours.forward(ids).logits, plan), "the mode is left behind"


def test_exact_tail_after_a_cached_prefill(ours: Patched) -> None:
    ids = tiny.token_ids(2, ROWS)
    with ours.mode("exact"):
        whole = ours.forward(ids).logits
        cache = ours.forward(ids[:, :90], use_cache=True).past_key_values
        tail = ours.forward(ids[:, 90:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(tail, whole[:, 90:], atol=1e-5, rtol=1e-5)


def test_chunked_prefill_on_local_blocks_equals_one_call(ours: Patched) -> None:
    ids = tiny.token_ids(1, 192)  # two chunks of more than 64 rows, which would be exact
    whole = ours.forward(ids).logits
    first = ours.forward(ids[:, :96], use_cache=True)
    rest = ours.forward(ids[:, 96:], past_key_values=first.past_key_values, use_cache=True).logits
    torch.testing.assert_close(torch.cat([first.logits, rest], 1), whole, atol=1e-4, rtol=1e-4)


def test_capture_holds_every_planned_call(ours: Patched) -> None:
    ids, lengths = tiny.token_ids(2, ROWS), torch.tensor([ROWS, 101])
    with ours.capture() as captured:
        ours.forward(ids, lengths)
    assert [c.layer for c in captured] == [0, 1]
    call = captured[1]
    assert call.q.shape == (2, 4, ROWS, 8) and call.k.shape == (2, 2, ROWS, 8) and call.config == ours.plan.layers[1].config
    assert call.lengths is not None and call.lengths.dtype == torch.int32 and call.lengths.tolist() == [ROWS, 101]
    with ours.capture(frozenset({1})) as one, ours.mode("exact"):
        ours.forward(ids)
    assert [c.layer for c in one] == [1]
    expected = exact_attention(one[0].q, one[0].k, one[0].v, True).o
    torch.testing.assert_close(one[0].o, expected, atol=1e-5, rtol=1e-5)


def test_another_operator_can_take_its_place(ours: Patched) -> None:
    seen = []

    def zeros(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: Config, lengths: torch.Tensor | None) -> Any:
        seen.append((config.seed, lengths))
        return torch.zeros_like(q), q.new_zeros(q.shape[:-1])

    with ours.mode("plan", attention=zeros):
        ours.forward(tiny.token_ids(1, ROWS))
    assert seen == [(0, None), (1, None)]


def test_a_plan_of_another_model_is_refused(source: TransformersSource) -> None:
    plan = make_plan(source)
    other = replace(plan, layers=(replace(plan.layers[0], name="model.layers.9.self_attn"),))
    with pytest.raises(UnsupportedModel, match="model.layers.9.self_attn, which LlamaForCausalLM does not have"):
        install(load_model(source, torch.float32), other)


# --- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "kind"),
    [([0, 0, 1, 1, 1], "left-padded"), ([1, 1, 0, 1, 1], "not one run of ones"), ([0, 1, 1, 1, 0], "not one run of ones")],
    ids=["left", "holed", "both-ends"],
)
def test_masks_that_are_not_right_padded_are_refused(ours: Patched, row: list[int], kind: str) -> None:
    mask = torch.tensor([[1] * 5, row])
    with pytest.raises(UsageError, match=f"row 1 of attention_mask is {kind}"):
        lengths_of(mask)
    with pytest.raises(UsageError, match=kind), torch.no_grad():
        ours.model(input_ids=tiny.token_ids(2, 5), attention_mask=mask)


def test_a_right_padded_mask_given_to_the_model_becomes_lengths(ours: Patched) -> None:
    ids, lengths = tiny.token_ids(2, ROWS), torch.tensor([ROWS, 101])
    with torch.no_grad():
        direct = ours.model(input_ids=ids, attention_mask=padding_mask(lengths, ROWS).long()).logits
    assert torch.equal(direct, ours.forward(ids, lengths).logits)


def test_lengths_of_masks() -> None:
    assert lengths_of(torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]])).tolist() == [3, 1, 0]


def test_packed_positions_are_refused(ours: Patched) -> None:
    positions = torch.cat([torch.arange(40), torch.arange(60)])[None]
    with pytest.raises(UnsupportedModel, match=r"layer 0 .*packed positions"), torch.no_grad():
        ours.model(input_ids=tiny.token_ids(1, 100), position_ids=positions, use_cache=False)


def test_a_cache_of_fixed_size_is_refused(ours: Patched) -> None:
    cache = transformers.StaticCache(config=ours.model.config, max_cache_len=200)
    with pytest.raises(UsageError, match="DynamicCache"), torch.no_grad():
        ours.model(input_ids=tiny.token_ids(1, 50), past_key_values=cache)


def test_a_cache_that_drops_keys_is_refused() -> None:
    with pytest.raises(UsageError, match="has dropped its first 3 keys"):
        attention_mask_function(1, 5, 8, 6, 3)


@pytest.mark.parametrize(
    ("name", "kwargs", "words"),
    [
        ("argument", {"temperature_curve": 2.0}, "does not know: temperature_curve"),
        ("softcap", {"softcap": 30.0}, "softcap 30.0"),
        ("dropout", {"dropout": 0.1}, "dropout 0.1"),
        ("direction", {"is_causal": False}, "not causal"),
        ("bias", {"position_bias": torch.zeros(1)}, "position bias"),
        ("packed", {"cu_seq_lens_q": torch.zeros(2)}, "packed sequences"),
        ("scale", {"scaling": 0.5}, "scale 0.5, where the plan says 0.35"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_calls_the_operator_cannot_compute_are_refused(ours: Patched, name: str, kwargs: dict[str, Any], words: str) -> None:
    function = transformers.AttentionInterface()[IMPLEMENTATION]
    module = ours.model.get_submodule("model.layers.1.self_attn")
    x = torch.randn(1, 4, 9, 8)
    function(module, x, x[:, :2], x[:, :2], None, scaling=8**-0.5, position_ids=torch.arange(9), softcap=None)
    with pytest.raises(UnsupportedModel, match=rf"layer 1 \(model.layers.1.self_attn\) uses .*{words}"):
        function(module, x, x[:, :2], x[:, :2], None, **{"scaling": 8**-0.5, **kwargs})


def test_lengths_of_the_wrong_shape_are_refused(ours: Patched) -> None:
    with pytest.raises(UsageError, match="one length a row"):
        ours.forward(tiny.token_ids(2, 5), torch.tensor([5]))
