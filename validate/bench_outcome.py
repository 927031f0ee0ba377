"""`bench OUT`: the whole exported model on seeded random inputs, against the same file with every layer exact and PyTorch.

Random inputs of the right shapes are enough for time: the op's work depends on shapes and attributes alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import torch

from hyperattention.errors import EnvironmentFault, UsageError
from hyperattention.export.bundle import Bundle
from hyperattention.export.plan import ExportPlan
from hyperattention.export.source import open_source
from hyperattention.library import TRT_LIBRARY
from hyperattention.validate import environment
from hyperattention.validate.backends import BACKENDS, check_engines, choose
from hyperattention.validate.bench_timing import Contender, LeftOut, Run, l2_scratch
from hyperattention.validate.feeds import RandomMaterial
from hyperattention.validate.provenance import Proof, check_graph
from hyperattention.validate.run import check_files, check_model_fits
from hyperattention.validate.runner_trt import TensorRTRunner
from hyperattention.validate.runners import ModelRunner, OrtRunner, TorchRunner
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
        return environment.describe(self.device, [p for p in (self.bundle.ort_library, self.bundle.trt_library) if p is not None])


class RunnerRun:
    """A Run through a validation runner, which times itself; on a GPU the L2 cache is overwritten first."""

    def __init__(self, runner: ModelRunner, feed: dict[str, torch.Tensor], scratch: torch.Tensor | None) -> None:
        self.runner, self.feed, self.scratch, self.output = runner, feed, scratch, None

    def time(self) -> float:
        if self.scratch is not None:
            self.scratch.zero_()
            torch.cuda.synchronize()
        self.runner.infer(self.feed)
        return self.runner.seconds


@dataclass
class RunnerContender:
    """A runner, activated when it is first needed and left active until the benchmark ends."""

    name: str
    title: str
    ours: bool
    exact: bool
    memory: str
    runner: ModelRunner
    feeds: Callable[[int], dict[str, torch.Tensor]]
    stack: contextlib.ExitStack
    scratch: torch.Tensor | None

    def prepare(self, length: int) -> Run:
        if not self.runner.is_active:
            self.stack.enter_context(self.runner)
        return RunnerRun(self.runner, self.feeds(length), self.scratch)


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
    """Powers of two within the exported range from 1,024 on, and its end."""
    low, high = length_range(plan)
    powers = (2**i for i in range(high.bit_length()))
    return (*(n for n in powers if max(low, _FEWEST_TOKENS) <= n < high), high)


def contenders(
    subject: Subject,
    model: str | None,
    exact_engine: Path | None,
    seed: int,
    threads: int,
    stack: contextlib.ExitStack,
    step: Callable[[str], None],
) -> tuple[list[Contender], list[LeftOut]]:
    """Ours, the same with every layer exact, PyTorch; and those that cannot run, with the reason."""
    bundle, plan, device = subject.bundle, subject.plan, subject.device
    material, cuda = RandomMaterial(seed, vocabulary(bundle.model_onnx, [entry.name for entry in plan.inputs])), device.type == "cuda"
    scratch, held = l2_scratch() if cuda else None, {}

    def feeds(length: int) -> dict[str, torch.Tensor]:
        if length not in held:
            held.clear()
            held[length] = material.feeds(plan, length, 1)[0]
        return held[length]

    def add(name: str, title: str, runner: ModelRunner, memory: str) -> None:
        exact = name != OURS or not plan.approximate
        found.append(RunnerContender(name, title, name == OURS, exact, memory, runner, feeds, stack, scratch))

    found: list[Contender] = []
    missing: list[LeftOut] = []
    if subject.kind == "tensorrt":
        if bundle.engine is None or bundle.trt_library is None:
            raise EnvironmentFault(f"the folder lacks model.engine or {TRT_LIBRARY}; export again on a machine with a GPU")
        subject.notes += check_engines(bundle, exact_engine)
        planned = len(plan.planned)
        add(OURS, "HyperAttention, TensorRT", TensorRTRunner(bundle.engine, bundle.trt_library, planned, "TensorRT engine"), "device")
        if exact_engine is None:
            missing.append(LeftOut(TWIN, None, "no --exact-engine FILE: export the model with --preset exact and give its model.engine"))
        elif not exact_engine.is_file():
            raise UsageError(f"--exact-engine {exact_engine} does not exist; export with --preset exact and give its model.engine")
        else:
            runner = TensorRTRunner(exact_engine, bundle.trt_library, planned, "TensorRT engine, exact")
            add(TWIN, "every layer exact, TensorRT", runner, "device")
    else:
        if exact_engine is not None:
            raise UsageError("--exact-engine belongs to the backend tensorrt; ONNX Runtime times the same file with every layer exact")
        nodes, memory = check_graph(bundle.model_onnx, plan), "device" if cuda else "process"
        common = dict(threads=threads, device=device)
        add(OURS, "HyperAttention, ONNX Runtime", OrtRunner(bundle.model_onnx, bundle.ort_library, nodes, "ONNX Runtime", **common), memory)
        if plan.approximate:
            twin = OrtRunner(bundle.model_onnx, bundle.ort_library, nodes, "ONNX Runtime, exact", exact=True, **common)
            add(TWIN, "every layer exact, ONNX Runtime", twin, memory)
        else:
            missing.append(LeftOut(TWIN, None, "no layer of OUT approximates, so it would be the same file"))
    if model is None:
        missing.append(LeftOut(TORCH, None, "no --model MODEL: PyTorch needs the model that OUT was made from"))
    else:
        step("loading the model")
        source = open_source(model, task=plan.task)
        check_model_fits(bundle, source)
        runner = TorchRunner(source.load(plan, device), None, "PyTorch")
        add(TORCH, "PyTorch, exact", runner, "torch" if cuda else "process")
    return found, missing


def prove(contenders: list[Contender]) -> list[Proof]:
    """What each runner that ran was really running. Raises EnvironmentFault where it is not what was planned."""
    runners = [c.runner for c in contenders if isinstance(c, RunnerContender) and c.runner.is_active]
    return [proof for proof in (runner.prove() for runner in runners) if proof is not None]


def vocabulary(model: Path, inputs: list[str]) -> int:
    """Rows of the smallest table that one of the integer `inputs` looks up, so that random ids are ids; 2 where there is none."""
    graph = onnx.load(str(model), load_external_data=False).graph
    sizes = {tensor.name: tensor.dims[0] for tensor in graph.initializer if len(tensor.dims)}
    names = set(inputs)
    for node in graph.node:  # in order: an id may be cast or reshaped on its way
        if node.op_type in ("Cast", "Reshape", "Identity") and node.input[0] in names:
            names.update(node.output)
    rows = [sizes[n.input[0]] for n in graph.node if n.op_type == "Gather" and n.input[1] in names and n.input[0] in sizes]
    return min(rows, default=2)
