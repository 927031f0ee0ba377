"""Exact attention timed within a model (tests/gpu/prefill_attention.py), on the processor with made-up times."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import prefill_attention
import pytest
import torch
from bench_prefill import relative, token_ids
from prefill_model import Model, Shape
from tiny import SMALL

from hyperattention.config import PRESETS, Config
from hyperattention.export.patch import install
from hyperattention.op import attention

TINY = Shape(hidden=160, intermediate=192, heads=4, heads_kv=2, head_dim=40, layers=3, vocabulary=67)


class Stamp:
    """An event of the processor: how much time attention took before it."""

    spent = 0

    def record(self) -> None:
        self.at = float(Stamp.spent)

    def elapsed_time(self, later: "Stamp") -> float:
        return later.at - self.at

    def synchronize(self) -> None: ...


def contender(time: int, seen: list[tuple[int, ...]]) -> prefill_attention.Contender:
    """The operator in the model's own layout; each of its calls takes `time`, and leaves the shape of Q."""

    def prepare(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: Config) -> Any:
        def run() -> torch.Tensor:
            seen.append(tuple(q.shape))
            Stamp.spent += time
            return attention(q, k, v, config)[0]

        return run

    return prepare


@pytest.mark.parametrize("most", [41 * TINY.layers, 2 * 41, 1])
def test_attention_is_timed_within_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """In turns, in every layer that the limit leaves, and the model is afterwards what it was."""
    monkeypatch.setattr(prefill_attention, "TOKEN_LAYERS", most)
    model = Model(TINY, (1, 150, 300), "fp32", SMALL)
    loaded, plan, ids = model.save(tmp_path), model.plan(tmp_path, "exact"), token_ids(TINY, 41)
    seen: list[tuple[int, ...]] = []
    given = {"fa4": contender(7, seen), "ours": contender(5, seen)}
    found, logits = prefill_attention.attention_times(loaded, plan, ids, given, 0, Stamp)
    layers = max(1, most // 41)
    assert found == {"tokens": 41, "layers": layers, "warm_ups": 1, "runs": 2, "fa4_ms_in_model": 7.0, "ours_ms_in_model": 5.0}
    assert seen == [(1, 4, 41, 40)] * (2 * 3 * layers)
    whole = install(loaded, plan).run({"input_ids": ids, "lengths": torch.tensor([41], dtype=torch.int32)})["logits"].flatten()
    assert len(logits) == 2 and all(torch.equal(each, logits["fa4"]) for each in logits.values())
    assert (relative(logits["fa4"], whole) < 1e-5) == (layers == TINY.layers)


def test_ours_and_fa4_get_what_they_take() -> None:
    """Ours: dense heads, made before the call that is timed. FA4: the mask."""
    q, k, v = (torch.randn(1, 5, heads, 8).transpose(1, 2) for heads in (4, 2, 2))
    calls: list[tuple[Any, ...]] = []
    library = SimpleNamespace(forward=lambda *given: calls.append(given) or ("o", "lse"))
    found = prefill_attention.contenders(lambda *given: calls.append(given) or (lambda: given[0]), library)
    assert found["fa4"](q, k, v, PRESETS["exact"])() is q and calls.pop()[3] is True
    ours = found["ours"](q, k, v, PRESETS["exact"])
    assert calls == [] and ours() == "o"
    assert all(x.is_contiguous() for x in calls[0][:3]) and torch.equal(calls[0][0], q) and calls[0][3] == PRESETS["exact"]
