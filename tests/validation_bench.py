"""The bundled model with small attributes, and ways to break the operator, for the tests of the gates."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from hyperattention import selection
from hyperattention.config import Config
from hyperattention.export.console import numbered
from hyperattention.export.load import inspect_source, load_model
from hyperattention.export.patch import Patched, install
from hyperattention.export.plan import make_plan
from hyperattention.reference import attention
from hyperattention.selection import Geometry, Plan, draw_samples
from hyperattention.validate.approximation import every_position
from hyperattention.validate.describe import plan_summary
from hyperattention.validate.feeds import TextMaterial
from hyperattention.validate.gates import Gate, Limits, evaluate
from hyperattention.validate.inputs import Corpus, load_corpus
from hyperattention.validate.measure import Extent, measure
from hyperattention.validate.operators import Operator, one_thread, reference_operator
from hyperattention.validate.runners import TorchRunner
from hyperattention.validate.workbench import Workbench

ROOT = Path(__file__).resolve().parent.parent
MODEL, TEXT = ROOT / "models" / "byte-lm-4m", ROOT / "tests" / "data" / "heldout.txt"
LENGTH, TAIL = 601, 100
ATTRIBUTES = dict(exact_below=150, block_size=16, num_blocks=4, sample_size=48, local_size=64, sinks=16)


class ReferenceKernels:
    """The stage functions of hyperattention.native.Library, computed by the reference in fp32; subclasses break them."""

    device_type = "cpu"

    def select(self, q: Tensor, k: Tensor, v: Tensor, config: Config, lengths: Tensor | None = None) -> Tensor:
        return selection.make_plan(q, k, Geometry.of(q, k, v, config, lengths), lengths).selection

    def samples(self, q: Tensor, k: Tensor, v: Tensor, config: Config, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return draw_samples(Geometry.of(q, k, v, config, lengths), lengths)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, config: Config, blocks: Tensor, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        index, weight = self.samples(q, k, v, config, lengths)
        return attention(q, k, v, config, lengths, Plan(blocks, index, weight))[:2]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, config: Config, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.attend(q, k, v, config, self.select(q, k, v, config, lengths), lengths)


class WeightsDoubled(ReferenceKernels):
    """Every sample counts twice."""

    def attend(self, q, k, v, config, blocks, lengths=None):
        index, weight = self.samples(q, k, v, config, lengths)
        return attention(q, k, v, config, lengths, Plan(blocks, index, 2 * weight))[:2]


class LengthsIgnored(ReferenceKernels):
    """Padding is attended to."""

    def attend(self, q, k, v, config, blocks, lengths=None):
        return super().attend(q, k, v, config, blocks, None)


class UpperLeft(ReferenceKernels):
    """Causal from the upper left corner: a chunk's rows believe that they stand at the start."""

    def attend(self, q, k, v, config, blocks, lengths=None):
        rows = q.shape[2]
        return attention(q, k[:, :, :rows], v[:, :, :rows], config, lengths)[:2]


class HeavyDropped(ReferenceKernels):
    """The chosen blocks are left out and the samples stay masked there."""

    def attend(self, q, k, v, config, blocks, lengths=None):
        index, weight = self.samples(q, k, v, config, lengths)
        return attention(q, k, v, config, lengths, Plan(torch.full_like(blocks, -1), index, weight))[:2]


class OtherDraw(ReferenceKernels):
    """Samples of another seed than the node's."""

    def samples(self, q, k, v, config, lengths=None):
        return super().samples(q, k, v, replace(config, seed=config.seed + 1), lengths)


class WindowOnly(ReferenceKernels):
    """Right by its own attributes, which leave out everything but a short window: an approximation that is too coarse."""

    def forward(self, q, k, v, config, lengths=None):
        coarse = replace(config, num_blocks=0, sample_size=0, sinks=0, block_size=16, local_size=16, local_overlap=0)
        return attention(q, k, v, coarse, lengths)[:2]


@dataclass(frozen=True)
class Broken:
    """One way to break the op, and the gates that must see it."""

    kernels: Callable[[], ReferenceKernels]
    trips: frozenset[str]

    def __str__(self) -> str:
        return self.kernels.__name__


@lru_cache(maxsize=None)
def model() -> Patched:
    source = inspect_source(MODEL)
    plan = make_plan(source, layers="odd", attributes=ATTRIBUTES, seq=(1, 512, 2048), input_ids="bytes")
    return install(load_model(source, torch.float32), plan)


@lru_cache(maxsize=None)
def corpus() -> Corpus:
    return load_corpus(TEXT, "bytes", MODEL, 256, 0, LENGTH)


@contextlib.contextmanager
def bench(kernels: ReferenceKernels) -> Iterator[tuple[Workbench, TorchRunner]]:
    """Active runners with `kernels` under test in every place where the native library stands, and the definition."""
    patched = model()
    operator = Operator("kernels under test", lambda *problem: kernels.forward(*problem))
    with (
        one_thread(),
        TorchRunner(patched, None, "exact", every_position(patched)) as exact,
        TorchRunner(patched, operator, "under test") as backend,
        TorchRunner(patched, reference_operator(), "reference") as definition,
    ):
        yield Workbench(patched, patched.plan, exact, backend, None, backend, operator, kernels, TAIL, 0, lambda text: None), definition


def measured(kernels: ReferenceKernels) -> dict:
    """A report's numbers at one length above exact_below, with what the gates need beside them."""
    with bench(kernels) as (under_test, definition):
        report = measure(under_test, definition, TextMaterial(corpus()), Extent({LENGTH: 1}))
    beside = {"kind": "language", "environment": {"busy": None}, "plan_summary": plan_summary(model().plan)}
    return {**report, **beside, "inputs": corpus().describe()}


def check_steps(errors: str) -> None:
    """Steps are counted one by one up to a total that is right from the first on."""
    steps = [found for found in map(numbered, errors.splitlines()) if found]
    assert [done for _, done, _ in steps] == list(range(len(steps))) and len(steps) > 9
    assert {total for *_, total in steps} == {len(steps)}, [text for text, *_ in steps]


def failing(report: dict, limits: Limits = Limits()) -> set[str]:
    """Names of the gates that a report does not meet; advice is none."""
    return {gate.name for gate in gates(report, limits) if not gate.passed and not gate.advisory}


def gates(report: dict, limits: Limits = Limits()) -> list[Gate]:
    return evaluate(report, limits)
