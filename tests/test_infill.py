"""The infilling task and its model (tests/gpu/infill_*.py): what is hidden, that batches repeat, what replaced attention is judged by."""

from __future__ import annotations

import random

import infill_run
import pytest
import torch
import validation_bench as vb
from infill_feed import Feed
from infill_model import Infill, Shape, exact, lesson, train
from infill_task import COPY, MASK, SLOT, Batch, batch, pair_places, training_text
from torch import Tensor

from hyperattention.reference import exact_attention
from hyperattention.validate.operators import reference_operator

TEXT = vb.TEXT.read_bytes()


@pytest.mark.parametrize("length", [SLOT, 256, 1000, 4096], ids=str)
def test_pairs_lie_apart_and_do_not_touch(length: int) -> None:
    for seed in range(20):
        pairs = pair_places(length, random.Random(seed))
        places = sorted(place for pair in pairs for place in pair)
        assert all(b - a >= COPY for a, b in zip(places, places[1:])) and all(0 <= place <= length - COPY for place in places)
        assert all(abs(a - b) > max(1, length // SLOT // 4) * SLOT - SLOT for a, b in pairs)
        assert len(pairs) == (0 if length == SLOT else max(1, length // 512))


@pytest.mark.parametrize("length", [256, 1001], ids=str)
def test_what_is_hidden_in_a_copy_stands_whole_elsewhere(length: int) -> None:
    made = batch(TEXT, length, 5, 3)
    assert torch.equal(made.inputs == MASK, made.hidden) and bool((made.copied <= made.hidden).all())
    assert torch.equal(made.inputs[~made.hidden], made.targets[~made.hidden])
    assert 0.03 < float((made.hidden & ~made.copied).float().mean()) < 0.06 and int(made.copied.sum()) >= 5
    for row in range(5):
        seen, body = bytes(made.inputs[row].clamp(max=255).tolist()), bytes(made.targets[row].tolist())
        for at in made.copied[row].nonzero().flatten().tolist():
            around = body[max(0, at - 2) : at + 3]
            assert body.count(around) >= 2 or body.count(body[at : at + 3]) >= 2 or body.count(body[at - 2 : at + 1]) >= 2
            assert seen[at] == MASK - 1  # out of sight


def test_batches_follow_the_seed_whoever_makes_them() -> None:
    with Feed(TEXT, 700, 2, 1) as one, Feed(TEXT, 700, 2, 2) as two:
        for length in (256, 256, 300):
            a, b = one.take(length), two.take(length)
            assert torch.equal(a.inputs, b.inputs) and torch.equal(a.copied, b.copied) and a.inputs.shape == (700 // length, length)
    first, again, other = (batch(TEXT, 256, 2, seed) for seed in (1, 1, 2))
    assert torch.equal(first.inputs, again.inputs) and not torch.equal(first.inputs, other.inputs)


def test_training_text_is_the_sources_and_no_more(tmp_path: object) -> None:
    assert 2**16 <= len(training_text([vb.ROOT / "validate", vb.ROOT / "export"], 2**17)) <= 2**17
    with pytest.raises(ValueError, match="bytes of Python sources"):
        training_text([vb.ROOT / "docs"])


def test_lessons_grow_longer() -> None:
    found = [lesson(share / 100, 8192) for share in range(100)]
    assert found == sorted(found) and sorted(set(found)) == [512, 2048, 8192] and lesson(0.0, 1024) == 256


def test_the_model_learns_and_its_attention_is_replaced() -> None:
    torch.manual_seed(0)
    model, said = Infill(Shape(hidden=32, layers=2, heads=2)), list[str]()
    given = batch(TEXT, 256, 4, 0)
    before = infill_run.judge(model, [given], exact)
    assert train(model, lambda length: given, 256, 100.0, 40, 2e-3, said.append) == 40 and len(said) == 1
    after = infill_run.judge(model, [given], exact)
    assert after["nats_copies"] < before["nats_copies"] - 0.5 and after["nats_text"] < before["nats_text"] - 0.5

    def written_out(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return exact_attention(q, k, v, False).o

    def nothing(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return torch.zeros_like(v)

    assert infill_run.judge(model, [given], written_out) == pytest.approx(after, abs=1e-5)
    assert infill_run.judge(model, [given], nothing)["nats_copies"] != pytest.approx(after["nats_copies"], abs=1e-3)


def test_judge_counts_hidden_copies() -> None:
    made = batch(TEXT, 256, 3, 0)

    class Half(torch.nn.Module):
        """Knows every byte in the even places, and takes the others for zero."""

        def forward(self, ids: Tensor, attend: object) -> Tensor:
            known = torch.where(torch.arange(256) % 2 == 0, made.targets, 0)
            return 50.0 * torch.nn.functional.one_hot(known, 257)

    found = infill_run.judge(Half(), [made], exact)  # type: ignore[arg-type]
    even = made.copied & (torch.arange(256) % 2 == 0)
    assert found["restored"] == pytest.approx(float(even.sum() / made.copied.sum()))
    assert found["nats_copies"] == pytest.approx(50 * (1 - found["restored"]), rel=1e-5)


def test_every_method_is_measured_beside_exact_attention() -> None:
    torch.manual_seed(0)
    model = Infill(Shape(hidden=32, layers=2, heads=2)).eval()
    row = infill_run.measure(model, TEXT, 601, 1, reference_operator())
    assert set(row["methods"]) == set(infill_run.methods(reference_operator(), 601))
    for name, told in row["methods"].items():
        assert len(told["layers_relative_l2"]) == 2 and 0 < told["keys_per_query"] and told["restored"] >= 0, name
    assert row["methods"]["sortlsh (paper)"]["layers_relative_l2"][0] > 1e-3
    assert row["methods"]["window + sinks"]["keys_per_query"] <= row["methods"]["blocks"]["keys_per_query"]


def test_a_batch_moves_whole() -> None:
    made = batch(TEXT, 256, 1, 0).to(torch.device("cpu"))
    assert isinstance(made, Batch) and made.inputs.shape == made.hidden.shape == (1, 256)
