"""`bench OUT`: the whole exported model on seeded random inputs, against the same file with every layer exact and PyTorch.

Random inputs of the right shapes are enough for time: the op's work depends on shapes and attributes alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hyperattention.errors import UsageError
from hyperattention.export.bundle import Bundle
from hyperattention.export.plan import ExportPlan
from hyperattention.export.source import Trust, reopen
from hyperattention.validate import environment
from hyperattention.validate.backends import BACKENDS, check_engines, choose, make_runners, prove
from hyperattention.validate.bench_timing import LeftOut, Run, l2_scratch
from hyperattention.validate.feeds import RandomMaterial
from hyperattention.validate.onnx_file import read_onnx
from hyperattention.validate.provenance import Proof
from hyperattention.validate.run import check_files, check_model_fits
from hyperattention.validate.runner_trt import TensorRTRunner
from hyperattention.validate.runners import ModelRunner, TorchRunner
from hyperattention.validate.signature import length_range

OURS, TWIN, TORCH = "ours", "exact", "torch"
_FEWEST_TOKENS = 1024  # of the lengths that are tried where the user names none


@dataclass
class Subject:
    """The folder, and where and by what it runs: `kind` is "ort" or "tensorrt"."""

    bundle: Bundle
    device: torch.device
    kind: str
    notes: list[str] = field(default_factory=list)

    @property
    def plan(self) -> ExportPlan:
        return self.bundle.plan

    def describe(self) -> dict[str, Any]:
        """For the record: what is timed, without a folder."""
        plan, model = self.plan, self.bundle.manifest.get("model") or {}
        name, runtime = model.get("name", "model"), "TensorRT" if self.kind == "tensorrt" else f"ONNX Runtime, {self.device.type.upper()}"
        layers = f"{len(plan.approximate)} of {len(plan.layers)} layers approximate"
        text = f"{name}, {runtime}, {plan.dtype}, {layers}, batch {plan.batch[0]}"
        return {"text": text, "name": name, "backend": self.kind, "device": self.device.type, "task": plan.task, "dtype": plan.dtype}

    def environment(self) -> dict[str, Any]:
        """Machine, versions and libraries."""
        return environment.describe(self.device, self.bundle.libraries)


class RunnerRun:
    """A Run through a validation runner, which times itself; on a GPU the L2 cache is overwritten first."""

    def __init__(self, runner: ModelRunner, feed: dict[str, torch.Tensor], scratch: torch.Tensor | None) -> None:
        self.runner, self.feed, self.scratch = runner, feed, scratch
        self.reserved = int(runner.engine.device_memory_size_v2) if isinstance(runner, TensorRTRunner) else None

    def time(self) -> float:
        if self.scratch is not None:
            self.scratch.zero_()
            torch.cuda.synchronize()
        self.runner.infer(self.feed)
        return self.runner.seconds

    def take(self) -> None:
        """The runner keeps what it answers with."""


@dataclass
class Feeds:
    """Random inputs of one length at a time, shared by the contenders."""

    subject: Subject
    seed: int
    length: int = 0
    held: dict[str, torch.Tensor] = field(default_factory=dict)

    def at(self, length: int) -> dict[str, torch.Tensor]:
        """The feed of `length`, by the names of the plan's inputs."""
        if length != self.length:
            plan, model = self.subject.plan, self.subject.bundle.model_onnx
            material = RandomMaterial(self.seed, vocabulary(model, [entry.name for entry in plan.inputs]))
            self.held, self.length = material.feeds(plan, length, 1)[0], length
        return self.held


@dataclass
class RunnerContender:
    """A runner, activated when it is first needed and left active until the benchmark ends."""

    name: str
    title: str
    ours: bool
    exact: bool
    memory: str
    runner: ModelRunner
    feeds: Feeds
    stack: contextlib.ExitStack
    scratch: torch.Tensor | None
    quadratic: bool = False  # a model's layers do more than attend

    def prepare(self, length: int) -> Run:
        if not self.runner.is_active:
            self.stack.enter_context(self.runner)
        return RunnerRun(self.runner, self.feeds.at(length), self.scratch)


def open_subject(folder: Path, device: str, backend: str) -> Subject:
    """The folder, its files checked against the manifest. Raises UsageError and EnvironmentFault."""
    if backend not in BACKENDS:
        raise UsageError(f"--backend is {backend!r}; for an OUT it takes one of {', '.join(BACKENDS)}")
    bundle = Bundle.open(folder)
    check_files(bundle)
    subject = Subject(bundle, *choose(bundle, device, backend))
    if subject.kind == "ort" and subject.device.type == "cpu" and subject.plan.dtype == "bf16":
        raise UsageError(
            "the export is bf16, in which ONNX Runtime's CPU provider has no arithmetic; time it on a GPU (--device cuda), "
            "or export again with --dtype fp32"
        )
    return subject


def default_lengths(plan: ExportPlan) -> tuple[int, ...]:
    """Powers of two within the exported range, from 1,024 or an eighth of it on, and its end."""
    low, high = length_range(plan)
    first = max(low, min(_FEWEST_TOKENS, high // 8))
    return (*(n for n in (2**i for i in range(high.bit_length())) if first <= n < high), high)


def contenders(
    subject: Subject,
    model: str | None,
    trust: Trust,
    exact_engine: Path | None,
    seed: int,
    threads: int,
    stack: contextlib.ExitStack,
    step: Callable[[str], None],
) -> tuple[list[RunnerContender], list[LeftOut]]:
    """Ours, the same with every layer exact, PyTorch; and those that cannot run, with the reason. Raises as `make_runners` does."""
    bundle, plan, device, tensorrt = subject.bundle, subject.plan, subject.device, subject.kind == "tensorrt"
    if exact_engine is not None and not tensorrt:
        raise UsageError("--exact-engine belongs to the backend tensorrt; ONNX Runtime times the same file with every layer exact")
    subject.notes += check_engines(bundle, exact_engine) if tensorrt else []
    ours, twin = make_runners(bundle, plan, None, subject.kind, device, exact_engine, threads, stack, step)
    torch_runner = None
    if model is not None:
        step("loading the model")
        source = reopen(model, plan, trust=trust, say=step)
        check_model_fits(bundle, source)
        torch_runner = TorchRunner(source.load(plan, device), None, "PyTorch", device=device)
    reasons = {
        TWIN: "no --exact-engine FILE: export the model with --preset exact and give its model.engine"
        if tensorrt
        else "no layer of OUT approximates, so it would be the same file",
        TORCH: "no --model MODEL: PyTorch needs the model that OUT was made from",
    }
    runtime, apart = ("TensorRT" if tensorrt else "ONNX Runtime"), ("device" if device.type == "cuda" else "process")
    candidates = (
        (OURS, f"HyperAttention, {runtime}", ours, apart),
        (TWIN, f"every layer exact, {runtime}", twin, apart),
        (TORCH, "PyTorch, exact", torch_runner, "torch" if device.type == "cuda" else "process"),
    )
    feeds, scratch = Feeds(subject, seed), l2_scratch() if device.type == "cuda" else None
    found = [
        RunnerContender(name, title, name == OURS, name != OURS or not plan.approximate, memory, runner, feeds, stack, scratch)
        for name, title, runner, memory in candidates
        if runner is not None
    ]
    return found, [LeftOut(name, None, reasons[name]) for name, _, runner, _ in candidates if runner is None]


def prove_active(contenders: list[RunnerContender]) -> list[Proof]:
    """What each runner that ran was really running. Raises EnvironmentFault where it is not what was planned."""
    return prove([c.runner for c in contenders if c.runner.is_active])


def vocabulary(model: Path, inputs: list[str]) -> int:
    """Rows of the smallest table that one of the integer `inputs` looks up, so that random ids are ids; 2 where there is none."""
    graph = read_onnx(model).graph
    sizes = {tensor.name: tensor.dims[0] for tensor in graph.initializer if len(tensor.dims)}
    names = set(inputs)
    for node in graph.node:  # in order: an id may be cast or reshaped on its way
        if node.op_type in ("Cast", "Reshape", "Identity") and node.input[0] in names:
            names.update(node.output)
    rows = [sizes[n.input[0]] for n in graph.node if n.op_type == "Gather" and n.input[1] in names and n.input[0] in sizes]
    return min(rows, default=2)
