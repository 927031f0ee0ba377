"""What the hardness of heads costs, counted instead of timed: logits, exact attention on parts, and what a GPU has to start."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
import torch
from operator_cases import config
from test_hardness import assert_same
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hyperattention.config import Config
from hyperattention.export.switched import Captured
from hyperattention.reference import exact_attention
from hyperattention.selection import Plan
from hyperattention.validate import hardness, hardness_fused, hardness_layers
from hyperattention.validate.hardness_layers import groups, layers_hardness

BLOCKS = config(local_size=64, exact_below=64, num_blocks=4, sample_size=64)
SORTLSH = replace(BLOCKS, selector="sortlsh", local_overlap=0)
HEADS, SHARED = 4, 2


@pytest.fixture(autouse=True)
def layers_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardness_layers, "HEAD_KEYS", {"cpu": hardness_layers.HEAD_KEYS["cuda"]})


class Kernel:
    """Stands for one of Triton's kernels: counts its starts and computes nothing."""

    def __init__(self, name: str, counted: "Work") -> None:
        self.name, self.counted = name, counted

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def start(*args: object, **constants: object) -> None:
            assert all(size > 0 for size in grid)
            self.counted.launches += 1
            self.counted.started.append(self.name)

        return start


def layers(count: int, length: int, c: Config, exact: bool = True) -> tuple[list[Captured], list[Tensor]]:
    """Calls that are alike but for their numbers and seeds, and the LSE of exact attention, or zeros that only have its shape."""
    calls, lses = [], []
    for layer in range(count):
        generator = torch.Generator().manual_seed(layer)
        q, k, v = (torch.randn(1, heads, length, 8, generator=generator) for heads in (HEADS, SHARED, SHARED))
        calls.append(Captured(layer, q, k, v, None, replace(c, seed=layer), v))
        lses.append(exact_attention(q, k, v, bool(c.causal)).lse if exact else torch.zeros(1, HEADS, length))
    return calls, lses


@dataclass
class Work(TorchDispatchMode):
    """Launches of the measuring code (views start nothing), logits it computes, pairs of rows and keys of exact attention asked for, the
    kernels it starts, and those of them that it starts before it asks for the plan."""

    launches: int = 0
    logits: int = 0
    exact: int = 0
    started: list[str] = field(default_factory=list)
    without_plan: list[str] | None = None

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


def work(count: int, length: int, c: Config, monkeypatch: pytest.MonkeyPatch, fused: bool = False) -> Work:
    calls, lses = layers(count, length, c, exact=False)
    counted, real = Work(), hardness_layers.exact_lse(None)

    def asked(q: Tensor, k: Tensor, config: Config) -> Tensor:
        counted.exact += q.shape[1] * q.shape[2] * k.shape[2]
        return real(q, k, config)

    def planned(*arguments: object) -> Plan:
        counted.without_plan = list(counted.started)
        return plan(*arguments)

    plan = hardness_layers._plan
    monkeypatch.setattr(hardness_layers, "exact_lse", lambda kernels: asked)
    if fused:
        names = ("row_kernel", "left_kernel", "sampled_kernel", "column_kernel", "lse_kernel")
        monkeypatch.setattr(hardness, "takes_kernels", lambda q: True)
        monkeypatch.setattr(hardness_fused, "kernels", SimpleNamespace(**{name: Kernel(name, counted) for name in names}))
    with counted, monkeypatch.context() as patched:
        patched.setattr(hardness_layers, "_plan", planned)
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


@pytest.mark.parametrize("c", [BLOCKS, SORTLSH, replace(BLOCKS, causal=0)], ids=["blocks", "sortlsh", "non-causal"])
def test_a_gpu_starts_as_much_for_many_layers_as_for_one(c: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    one, four, long = (work(n, length, c, monkeypatch, True).launches for n, length in ((1, 1500), (4, 1500), (1, 4096)))
    assert 60 < one < 170 and four < 1.1 * one and long < 1.3 * one


@pytest.mark.parametrize("c", [BLOCKS, SORTLSH], ids=["blocks", "sortlsh"])
def test_a_gpu_is_at_work_while_the_plan_is_made(c: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    found = work(4, 1500, c, monkeypatch, True)
    assert found.without_plan == found.started[:-1] and found.started[-1] == "left_kernel"


@pytest.mark.parametrize("c", [BLOCKS, SORTLSH], ids=["blocks", "sortlsh"])
def test_work_against_one_exact_pass(c: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer than 40 % of the pass's logits; PyTorch asks for exact attention on at most 60 % of its pairs."""
    pairs = HEADS * 4096 * 4097 // 2
    assert 0 < work(1, 4096, c, monkeypatch, True).logits < 0.4 * pairs
    monkeypatch.setattr(hardness, "takes_kernels", lambda q: False)
    found = work(1, 4096, c, monkeypatch)
    assert 0 < found.logits < 0.4 * pairs and 0 < found.exact < 0.6 * pairs
