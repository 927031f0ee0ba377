"""What the hardness of heads costs, counted instead of timed, as a GPU is given it: launches, logits, and exact attention on parts."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import pytest
import torch
from operator_cases import config
from test_hardness import assert_same
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hyperattention.config import Config
from hyperattention.export.switched import Captured
from hyperattention.reference import exact_attention
from hyperattention.validate import hardness, hardness_columns, hardness_layers
from hyperattention.validate.hardness_layers import groups, layers_hardness

BLOCKS = config(local_size=64, exact_below=64, num_blocks=4, sample_size=64)
SORTLSH = replace(BLOCKS, selector="sortlsh", local_overlap=0)
HEADS, SHARED = 4, 2


@pytest.fixture(autouse=True)
def like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((hardness, "_TILE"), (hardness, "_TILES"), (hardness_columns, "_TILE"), (hardness_layers, "HEAD_KEYS")):
        monkeypatch.setattr(module, name, {"cpu": getattr(module, name)["cuda"]})


def layers(count: int, length: int, c: Config) -> tuple[list[Captured], list[Tensor]]:
    """Calls that are alike but for their numbers and seeds, and the LSE of exact attention."""
    calls, lses = [], []
    for layer in range(count):
        generator = torch.Generator().manual_seed(layer)
        q, k, v = (torch.randn(1, heads, length, 8, generator=generator) for heads in (HEADS, SHARED, SHARED))
        exact = exact_attention(q, k, v, bool(c.causal))
        calls.append(Captured(layer, q, k, v, None, replace(c, seed=layer), exact.o))
        lses.append(exact.lse)
    return calls, lses


@dataclass
class Work(TorchDispatchMode):
    """Launches of the measuring code (views start nothing), logits it computes, and pairs of rows and keys of exact attention asked for."""

    launches: int = 0
    logits: int = 0
    exact: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        found = func(*args, **(kwargs or {}))
        if _measuring() and not func.is_view:
            self.launches += 1
            if func.overloadpacket in (torch.ops.aten.matmul, torch.ops.aten.bmm):  # the first where inference takes it whole
                self.logits += found.numel()
        return found


def _measuring() -> bool:
    """Whether the code that runs belongs to the measurement, not to the reference's plan or attention under it."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename.rsplit("/", 1)[-1]
        if name in ("reference.py", "selection.py", "sortlsh.py", "parts.py"):
            return False
        if name.startswith("hardness"):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def work(count: int, length: int, c: Config, monkeypatch: pytest.MonkeyPatch) -> Work:
    calls, lses = layers(count, length, c)
    counted, real = Work(), hardness_layers.exact_lse(None)

    def asked(q: Tensor, k: Tensor, v: Tensor, config: Config) -> Tensor:
        counted.exact += q.shape[1] * q.shape[2] * k.shape[2]
        return real(q, k, v, config)

    monkeypatch.setattr(hardness_layers, "exact_lse", lambda kernels: asked)
    with counted:
        layers_hardness(calls, None, lses)
    return counted


@pytest.mark.parametrize("c", [BLOCKS, SORTLSH, replace(BLOCKS, causal=0)], ids=["blocks", "sortlsh", "non-causal"])
def test_layers_together_are_the_layers_alone(c: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, lses = layers(3, 700, c)
    together = layers_hardness(calls, None, lses)
    monkeypatch.setattr(hardness_layers, "HEAD_KEYS", {"cpu": 0})
    for found, alone in zip(together, layers_hardness(calls, None, lses), strict=True):
        for head in range(HEADS):
            assert_same(found.head(head), alone.head(head))


def test_only_layers_that_are_alike_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, _ = layers(5, 100, BLOCKS)
    calls[2] = replace(calls[2], config=replace(calls[2].config, num_blocks=1))
    assert list(groups(calls)) == [[0, 1], [2], [3, 4]] and list(groups([])) == []
    monkeypatch.setattr(hardness_layers, "HEAD_KEYS", {"cpu": 3 * HEADS * 100})
    assert list(groups(layers(7, 100, BLOCKS)[0])) == [[0, 1, 2], [3, 4, 5], [6]]


def test_launches_do_not_grow_with_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    one, four = (work(count, 1500, BLOCKS, monkeypatch).launches for count in (1, 4))
    assert 200 < one < 600 and four < 1.3 * one


@pytest.mark.parametrize("c", [BLOCKS, SORTLSH], ids=["blocks", "sortlsh"])
def test_work_against_one_exact_pass(c: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 local blocks: launches as for 23, fewer than a third of the pass's logits, and not more of exact attention than half of it."""
    few, many = (work(1, length, c, monkeypatch) for length in (1500, 4096))
    pairs = HEADS * 4096 * 4097 // 2
    assert many.launches < 1.4 * few.launches
    assert 0 < many.logits < 0.4 * pairs and 0 < many.exact < 0.6 * pairs
