"""Planted keys: the prompts, which lengths are asked at, and the grid against recallers whose answers are known."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import validation_bench as vb
from torch import Tensor

from hyperattention.errors import UsageError
from hyperattention.validate import needle as needle_module
from hyperattention.validate.feeds import IDS, TextMaterial
from hyperattention.validate.inputs import DEPTHS, EDGE_ROWS, NEEDLE_DIGITS, QUESTION_ROWS, Window, needle, needle_room, recalled
from hyperattention.validate.needle import KINDS, Grid, choose_grid, measure_needle

PAIR = re.compile(r"# key ([0-9a-f]{8}) = (\d{8})\n")
KEYS = [kind.keys for kind in KINDS]


# --- prompts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [*KEYS, 7], ids=str)
@pytest.mark.parametrize("depth", [0.1, 0.6, 0.85, 1.0])
def test_pairs_are_planted_once_and_one_is_asked_at_the_end(depth: float, keys: int) -> None:
    length = 3001
    w = needle(vb.corpus(), length, depth, 5, keys)
    text = bytes(w.ids[0].tolist()).decode()
    pairs = PAIR.findall(text)
    assert w.ids.shape == (1, length + 1) and len(pairs) == len(dict(pairs)) == keys
    key, digits = re.search(r"\n# recall ([0-9a-f]{8}) = (\d{8})$", text).groups()
    assert text[-QUESTION_ROWS - 1 :].startswith("\n# recall") and w.asked == QUESTION_ROWS
    assert (key, digits) in pairs and bytes(w.answer).decode() == digits and text.count("# recall") == 1
    for name, _ in pairs:
        at = text.index(f"# key {name}")
        assert text.count(name) == (2 if name == key else 1) and (at == 0 or text[at - 1] == "\n")
        assert at < length - EDGE_ROWS
    assert abs(text.index(f"# key {key}") - min(depth * length, length - EDGE_ROWS)) < 200 + 29 * keys


@pytest.mark.parametrize("keys", KEYS, ids=str)
def test_the_shortest_prompt(keys: int) -> None:
    least = needle_room(keys)
    assert len(PAIR.findall(bytes(needle(vb.corpus(), least, 1.0, 0, keys).ids[0].tolist()).decode())) == keys
    with pytest.raises(UsageError, match=f"at least {least} bytes; {least - 1} is too short"):
        needle(vb.corpus(), least - 1, 1.0, 0, keys)


def test_prompts_differ_by_seed_and_keep_the_asked_pair_when_others_join() -> None:
    one, again, other = (needle(vb.corpus(), 2001, 0.35, seed) for seed in (0, 0, 1))
    assert torch.equal(one.ids, again.ids) and one.answer != other.answer
    assert needle(vb.corpus(), 2001, 0.35, 0, 4).answer == one.answer


def test_recall_counts_digits() -> None:
    w = needle(vb.corpus(), 2001, 0.5, 0)
    logits = torch.nn.functional.one_hot(w.targets, 256).float()
    assert recalled(logits, w) == 1
    logits[-NEEDLE_DIGITS // 2 :] = torch.nn.functional.one_hot(torch.tensor(0), 256)
    assert recalled(logits, w) == recalled(logits[-NEEDLE_DIGITS:], w) == 0.5


# --- which prompts -----------------------------------------------------------------------------------------------------


def grid(wanted: bool | None, cuda: bool, lengths: tuple[int, ...], tokens: str = "bytes", task: str = "logits") -> Grid:
    plan = replace(vb.model().plan, task=task)
    return choose_grid(plan, TextMaterial(replace(vb.corpus(), tokens=tokens)), lengths, wanted, cuda)


def test_the_grid_is_where_a_gpu_makes_it_cheap_or_it_was_asked_for() -> None:
    room = needle_room(max(KEYS))
    lengths = (4096, 60, room - 1, room)
    assert grid(None, False, lengths).steps == grid(False, True, lengths).steps == grid(None, True, lengths, "tokenizer").steps == 0
    assert grid(None, True, (60,)).steps == 0
    asked, gpu = grid(True, False, lengths), grid(None, True, lengths)
    assert asked.lengths == gpu.lengths == (room, 4096)
    assert asked.steps == len(KINDS) * 2 * len(DEPTHS) and gpu.steps == 4 * asked.steps


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (((600,),), "600 is too short"),
        (((4096,), "tokenizer"), "needs a language model"),
        (((4096,), "bytes", "features"), "--input-ids bytes"),
    ],
    ids=["short", "tokens", "features"],
)
def test_what_cannot_be_asked_is_refused(arguments: tuple[Any, ...], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        grid(True, False, *arguments)


# --- the grid ----------------------------------------------------------------------------------------------------------


class Recaller:
    """Answers the prompt's digits with those of the pair that `choose` picks of all planted ones; at the other rows nothing."""

    backend = "stub"

    def __init__(self, choose: Any) -> None:
        self.choose = choose

    def infer(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"logits": self.answer(given[IDS][0])[None]}

    def answer(self, ids: Tensor) -> Tensor:
        text = bytes(ids.tolist()).decode()
        key = re.search(r"# recall ([0-9a-f]{8})", text[-60:])[1]
        digits = self.choose(PAIR.findall(text), key)
        logits = torch.zeros(len(ids), 256)
        logits[torch.arange(-NEEDLE_DIGITS, 0), torch.tensor(list(digits.encode()))] = 1
        return logits


def test_the_grid_tells_what_was_recalled_by_whom_and_where(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Recaller(lambda pairs, key: dict(pairs)[key])
    first = Recaller(lambda pairs, key: pairs[0][1])  # whatever was planted first, asked for or not
    last = Recaller(lambda pairs, key: pairs[-1][1])
    steps: list[str] = []
    bench: Any = SimpleNamespace(plan=vb.model().plan, exact=right, backend=first, scorer=right, step=steps.append)
    monkeypatch.setattr(needle_module, "prefill_exact_decode", lambda _, window: last.answer(window.inputs[0])[-100:])
    asked = Grid(vb.corpus(), (1501, 2048), 2)
    found = measure_needle(bench, asked, 3)
    assert found is not None and len(steps) == len(set(steps)) == asked.steps == 2 * 2 * 4 * 2
    assert [(row["kind"], row["keys"], row["length"]) for row in found["rows"]] == [
        ("single", 1, 1501), ("single", 1, 2048), ("multi-key", 4, 1501), ("multi-key", 4, 2048)
    ]  # fmt: skip
    for row in found["rows"]:
        assert [cell["depth"] for cell in row["depths"]] == list(DEPTHS)
        for cell in row["depths"]:
            windows = [needle(vb.corpus(), row["length"], cell["depth"], 3 + i, row["keys"]) for i in range(2)]
            for regime, recaller in (("exact", right), ("all_positions", first), ("prefill_exact_decode", last)):
                expected = [share(recaller, window) for window in windows]
                assert cell[regime]["mean"] == pytest.approx(sum(expected) / 2) and cell[regime]["blocks"] == 2
        for regime in ("exact", "all_positions", "prefill_exact_decode"):
            assert row[regime]["mean"] == pytest.approx(sum(cell[regime]["mean"] for cell in row["depths"]) / len(DEPTHS))
        others = [row["all_positions"]["mean"], row["prefill_exact_decode"]["mean"]]
        assert row["exact"]["mean"] == 1 and (others == [1, 1]) == (row["kind"] == "single"), row


def share(recaller: Recaller, window: Window) -> float:
    """Digits of the chosen pair that are the asked one's, place by place."""
    text = bytes(window.inputs[0].tolist()).decode()
    key = re.search(r"# recall ([0-9a-f]{8})", text[-60:])[1]
    return sum(a == b for a, b in zip(recaller.choose(PAIR.findall(text), key).encode(), window.answer, strict=True)) / NEEDLE_DIGITS


def test_nothing_asked_is_nothing_measured() -> None:
    assert measure_needle(SimpleNamespace(), Grid(), 0) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_bundled_model_recalls_what_it_is_asked(kind: needle_module.Kind) -> None:
    scores = []
    with vb.bench(vb.ReferenceKernels()) as (bench, _):
        for depth in (0.35, 0.85):
            window = needle(vb.corpus(), 1536, depth, 0, kind.keys)
            scores.append(recalled(bench.exact.infer(needle_module.token_feed(bench, window.inputs))["logits"][0], window))
    assert sum(scores) / len(scores) >= 0.75
