"""The tasks and the model of tests/gpu/infill_*.py: what is hidden, that batches repeat, what replaced attention is judged by."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import infill_run
import pytest
import torch
import validation_bench as vb
from infill_model import Infill, Shape, exact, lesson, train
from infill_task import COPY, KEYS, MASK, SLOT, VOCABULARY, Batch, as_tensor, copies, pair_places, recall, training_text
from torch import Tensor

from hyperattention.reference import exact_attention
from hyperattention.validate.operators import reference_operator

TEXT = as_tensor(vb.TEXT.read_bytes())


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("length", [SLOT, 256, 1000, 4096], ids=str)
def test_pairs_lie_apart_and_do_not_touch(length: int) -> None:
    places, taken = pair_places(length, 20, seeded(0))
    assert int(taken.sum(-1).amax()) == (0 if length == SLOT else max(1, length // 512))
    for row in range(20):
        begins = sorted(places[row][taken[row]].flatten().tolist())
        assert all(b - a >= COPY for a, b in zip(begins, begins[1:])) and all(0 <= place <= length - COPY for place in begins)
        assert all(abs(a - b) > max(1, length // SLOT // 4) * SLOT - SLOT for a, b in places[row][taken[row]].tolist())


@pytest.mark.parametrize("length", [256, 1001], ids=str)
def test_what_is_hidden_in_a_copy_stands_whole_elsewhere(length: int) -> None:
    made = copies(TEXT, length, 5, seeded(3))
    assert torch.equal(made.inputs == MASK, made.hidden) and bool((made.found <= made.hidden).all())
    assert torch.equal(made.inputs[~made.hidden], made.targets[~made.hidden])
    assert 0.015 < float((made.hidden & ~made.found).float().mean()) < 0.07 and bool(made.found.any(-1).all())
    for row in range(5):
        seen, body = bytes(made.inputs[row].clamp(max=255).tolist()), bytes(made.targets[row].tolist())
        for at in made.found[row].nonzero().flatten().tolist():
            around = body[max(0, at - 2) : at + 3]
            assert body.count(around) >= 2 or body.count(body[at : at + 3]) >= 2 or body.count(body[at - 2 : at + 1]) >= 2
            assert seen[at] == MASK - 1  # out of sight


@pytest.mark.parametrize("length", [1, 2, 257], ids=str)
def test_a_hidden_value_stands_beside_its_key_once_elsewhere(length: int) -> None:
    made = recall(length, 3, seeded(0))
    assert torch.equal(made.inputs % VOCABULARY == MASK, made.hidden) and torch.equal(made.found, made.hidden)
    assert made.hidden.sum(-1).tolist() == [length // 2] * 3 and int(made.inputs.max()) < KEYS * VOCABULARY
    for row in range(3):
        shown = {key: value for key, value in (divmod(token, VOCABULARY) for token in made.inputs[row].tolist()) if value != MASK}
        assert len(shown) == length - length // 2
        for token, value in zip(made.inputs[row][made.hidden[row]].tolist(), made.targets[row][made.hidden[row]].tolist()):
            assert shown[token // VOCABULARY] == value


def test_records_are_in_no_order() -> None:
    made = recall(2000, 1, seeded(1))
    places: dict[int, list[int]] = {}
    for at, token in enumerate(made.inputs[0].tolist()):
        places.setdefault(token // VOCABULARY, []).append(at)
    apart = torch.tensor([b - a for a, b in places.values()]).double()
    assert abs(float(apart.mean()) - 2000 / 3) < 60  # of two places at random
    assert 0.45 < float(made.hidden[0, :1000].double().mean()) < 0.55


@pytest.mark.parametrize("task", infill_run.TASKS)
def test_batches_follow_the_seed(task: str) -> None:
    first, again, other = (infill_run.batches(task, vb.TEXT.read_bytes, seeded(seed))(256, 2) for seed in (1, 1, 2))
    assert torch.equal(first.inputs, again.inputs) and torch.equal(first.found, again.found)
    assert first.inputs.shape == (2, 256) and not torch.equal(first.inputs, other.inputs)


def test_training_text_is_the_sources_and_no_more(tmp_path: Path) -> None:
    assert 2**16 <= len(training_text([vb.ROOT / "validate", vb.ROOT / "export"], 2**17)) <= 2**17
    with pytest.raises(ValueError, match="bytes of Python sources"):
        training_text([vb.ROOT / "docs"])


def test_lessons_grow_longer() -> None:
    found = [lesson(share / 100, 16384) for share in range(101)]
    assert found == sorted(found) and sorted(set(found)) == [512, 1024, 2048, 4096, 8192, 16384]
    assert lesson(0.0, 1024) == 256 and lesson(0.0, 100) == lesson(1.0, 100) == 100


@pytest.mark.parametrize("task", infill_run.TASKS)
def test_the_model_learns_and_its_attention_is_replaced(task: str) -> None:
    torch.manual_seed(0)
    model, said = Infill(Shape(hidden=32, layers=2, heads=2, reach=2, keys=task == "recall")), list[str]()
    given = infill_run.batches(task, vb.TEXT.read_bytes, seeded(0))(128, 4)
    before = infill_run.judge(model, [given], exact)
    assert set(before) == {"nats_found", "restored", "restored_error"} | ({"nats_text"} if task == "copies" else set())
    assert train(model, lambda length: given, 128, math.inf, 60, 2e-3, said.append) == 60 and said[-1].startswith("step 60, ")
    after = infill_run.judge(model, [given], exact)
    assert after["nats_found"] < before["nats_found"] - 0.5

    def written_out(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return exact_attention(q, k, v, False).o

    def nothing(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return torch.zeros_like(v)

    assert infill_run.judge(model, [given], written_out) == pytest.approx(after, abs=1e-5)
    assert infill_run.judge(model, [given], nothing)["nats_found"] != pytest.approx(after["nats_found"], abs=1e-3)


def test_a_shown_value_is_read_where_its_key_matches() -> None:
    """Without training: of all records attention weighs the one with the same key most."""
    torch.manual_seed(0)
    model, made = Infill(Shape(hidden=64, layers=1, heads=1, reach=0, keys=True)), recall(64, 1, seeded(0))
    seen: list[Tensor] = []

    def keep(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        seen.append((q @ k.transpose(2, 3))[0, 0])
        return exact(q, k, v, layer)

    model(made.inputs, keep)
    keys = made.inputs[0] // VOCABULARY
    logits = seen[0].fill_diagonal_(-torch.inf)
    assert torch.equal(keys[logits.argmax(-1)], keys)


def test_judge_counts_what_is_to_be_found() -> None:
    made = copies(TEXT, 256, 3, seeded(0))

    class Half(torch.nn.Module):
        """Knows every byte in the even places, and takes the others for zero."""

        def forward(self, ids: Tensor, attend: object) -> Tensor:
            known = torch.where(torch.arange(256) % 2 == 0, made.targets, 0)
            return 50.0 * torch.nn.functional.one_hot(known, VOCABULARY)

    found = infill_run.judge(Half(), [made], exact)  # type: ignore[arg-type]
    even = made.found & (torch.arange(256) % 2 == 0)
    assert found["restored"] == pytest.approx(float(even.sum() / made.found.sum()))
    assert found["nats_found"] == pytest.approx(50 * (1 - found["restored"]), rel=1e-5) and found["restored_error"] == 0


def test_the_error_of_a_share_is_that_of_the_mean_of_batches() -> None:
    rows = [copies(TEXT, 256, 1, seeded(seed)) for seed in range(5)]

    class Last(torch.nn.Module):
        """Answers what its input has one place to the right."""

        def forward(self, ids: Tensor, attend: object) -> Tensor:
            return 50.0 * torch.nn.functional.one_hot(ids.roll(-1, 1) % 64, VOCABULARY)

    given = [Batch(row.inputs, row.inputs.roll(-1, 1) % 64 + (torch.rand(1, 256, generator=seeded(n)) < 0.1 * n), row.found, row.hidden)
             for n, row in enumerate(rows)]  # fmt: skip
    found = infill_run.judge(Last(), given, exact)  # type: ignore[arg-type]
    shares = [float((row.targets == row.inputs.roll(-1, 1) % 64)[row.found].double().mean()) for row in given]
    assert found["restored_error"] == pytest.approx(torch.tensor(shares).double().std().item() / 5**0.5) and found["restored_error"] > 0.01


def test_every_method_is_measured_beside_exact_attention() -> None:
    torch.manual_seed(0)
    model = Infill(Shape(hidden=32, layers=2, heads=2)).eval()
    row = infill_run.measure(model, [copies(TEXT, 601, 1, seeded(0))], reference_operator())
    assert set(row["methods"]) == set(infill_run.methods(reference_operator(), 601)) and row["length"] == 601
    for name, told in row["methods"].items():
        assert len(told["layers_relative_l2"]) == 2 and 0 < told["keys_per_query"] and told["restored"] >= 0, name
        assert f"601 {name}: restored " in infill_run.table(row)
    assert row["methods"]["sortlsh (paper)"]["layers_relative_l2"][0] > 1e-3
    assert row["methods"]["window + sinks"]["keys_per_query"] <= row["methods"]["blocks"]["keys_per_query"]


@pytest.mark.parametrize("length", [512, 4096, 16384], ids=str)
def test_sortlsh_at_equal_keys_has_no_more_than_blocks(length: int) -> None:
    found = infill_run.methods(reference_operator(), length)
    budget, more = found["blocks"][2], found["sortlsh, keys of blocks"]
    assert found["sortlsh (paper)"][2] < more[2] <= budget < more[2] + 257


def test_weights_are_written_and_read(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    infill_run.add_training(parser, 60.0)
    sizes = ["--task", "recall", "--hidden", "16", "--layers", "1", "--heads", "1", "--tokens", "64"]
    files = ["--out", str(tmp_path / "out.json"), "--weights", str(tmp_path / "model.pt")]
    options = parser.parse_args([*sizes, *files, "--steps", "2"])
    made, steps = infill_run.trained(options, 64)
    again, none = infill_run.trained(parser.parse_args([*sizes, *files, "--trained"]), 64)
    assert (steps, none) == (2, 0) and len(list(made.parameters())) == len(list(again.parameters())) > 4
    assert all(torch.equal(a, b.bfloat16().float()) for a, b in zip(again.parameters(), made.parameters(), strict=True))
    first, second = (infill_run.held_out(made, options, 64, 2) for _ in range(2))
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(first, second, strict=True)) and len(first) == 2


def test_a_batch_moves_whole() -> None:
    made = recall(256, 1, seeded(0)).to(torch.device("cpu"))
    assert isinstance(made, Batch) and made.inputs.shape == made.hidden.shape == (1, 256)
