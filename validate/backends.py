"""Which device and backend a validation runs on, its runners, and their proof."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from hyperattention.errors import EnvironmentFault, UsageError
from hyperattention.export.bundle import DRAFT, MANIFEST, Bundle
from hyperattention.export.choices import check_device
from hyperattention.export.engine_check import check_engine
from hyperattention.export.onnx_graph import export_onnx
from hyperattention.export.plan import ExportPlan
from hyperattention.export.source import ReplacedModel
from hyperattention.library import TRT_LIBRARY
from hyperattention.validate.provenance import Proof, check_graph
from hyperattention.validate.runner_trt import TensorRTRunner
from hyperattention.validate.runners import ModelRunner, OrtRunner

BACKENDS = ("auto", "ort", "tensorrt")


def choose(bundle: Bundle, device: str, backend: str) -> tuple[torch.device, str]:
    """Device of the PyTorch side and the backend under test, "ort" or "tensorrt". Raises UsageError and EnvironmentFault."""
    check_device(device)
    kind = backend
    if kind == "auto":
        kind = "tensorrt" if bundle.engine is not None and torch.cuda.is_available() and device != "cpu" else "ort"
    if kind == "tensorrt" and bundle.engine is None:
        raise UsageError("--backend tensorrt, but the folder holds no model.engine; export again on a machine with a GPU")
    if kind == "tensorrt" and device == "cpu":
        raise UsageError("--device cpu with the backend tensorrt, which runs on cuda alone; leave --device out, or give --backend ort")
    return torch.device("cuda" if kind == "tensorrt" or device == "cuda" else "cpu"), kind


def check_engines(bundle: Bundle, exact_engine: Path | None) -> list[str]:
    """Warnings about the engines that will run. Raises EnvironmentFault where one cannot: built for another machine or plugin."""
    found = check_engine(bundle)
    if exact_engine is not None and any((exact_engine.parent / name).is_file() for name in (MANIFEST, DRAFT)):
        found += check_engine(Bundle.open(exact_engine.parent), bundle.trt_library)
    return found


def make_runners(
    bundle: Bundle,
    plan: ExportPlan,
    replaced: ReplacedModel | None,
    kind: str,
    device: torch.device,
    exact_engine: Path | None,
    threads: int,
    stack: contextlib.ExitStack,
    step: Callable[[str], None],
) -> tuple[ModelRunner, ModelRunner | None]:
    """The backend under test and its exact rival, not yet active. `replaced` is needed where `plan` is not of the export's dtype."""
    if kind == "tensorrt":
        if bundle.engine is None or bundle.trt_library is None:
            raise EnvironmentFault(f"the folder lacks model.engine or {TRT_LIBRARY}; export again on a machine with a GPU")
        engine = TensorRTRunner(plan, bundle.engine, bundle.trt_library, "TensorRT engine")
        if exact_engine is None:
            return engine, None
        if not exact_engine.is_file():
            raise UsageError(f"--exact-engine {exact_engine} does not exist; export with --preset exact and give its model.engine")
        return engine, TensorRTRunner(plan, exact_engine, bundle.trt_library, "TensorRT engine, exact")
    if exact_engine is not None:
        raise UsageError("--exact-engine is for --backend tensorrt; here ONNX Runtime runs the result and its exact twin: leave it out")
    model = bundle.model_onnx
    if plan.dtype != bundle.plan.dtype:
        assert replaced is not None, "a twin is exported from the model"
        step("exporting the fp32 twin")
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hyperattention-twin-")))
        export_onnx(replaced, plan, folder, step)
        model = folder / model.name
    nodes = check_graph(model, plan)
    ours = OrtRunner(plan, model, bundle.ort_library, nodes, "ONNX Runtime", threads=threads, device=device)
    rival = OrtRunner(plan, model, bundle.ort_library, nodes, "ONNX Runtime, exact", exact=True, threads=threads, device=device)
    return ours, rival if plan.approximate else None


def prove_first(runner: ModelRunner, given: Mapping[str, torch.Tensor]) -> None:
    """A short run and its proof, before the long ones: the exact body that a missing library leaves needs n x n memory."""
    with runner:
        runner.infer(given)
        runner.prove()


def prove(runners: list[ModelRunner]) -> list[Proof]:
    """What each active runner ran. Raises EnvironmentFault where it is not what was planned."""
    return [proof for proof in (runner.prove() for runner in runners) if proof is not None]
