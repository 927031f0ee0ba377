"""The whole validation of one output folder: inputs, runners, proof, both errors, time; ends in one report dictionary."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path

import torch

from hyperattention.config import INT32_MAX
from hyperattention.errors import UsageError
from hyperattention.export.bundle import REPORT, Bundle
from hyperattention.export.choices import DEVICES, choice
from hyperattention.export.gate_options import LANGUAGE, Limits, kind_of
from hyperattention.export.held_out import LENGTHS
from hyperattention.export.patch import Patched
from hyperattention.export.plan import ExportPlan
from hyperattention.export.source import Source, Trust, reopen
from hyperattention.validate import environment
from hyperattention.validate.approximation import every_position
from hyperattention.validate.backends import BACKENDS, check_engines, choose, make_runners, prove, prove_first
from hyperattention.validate.describe import plan_notes, plan_summary, result_notes
from hyperattention.validate.feeds import Material
from hyperattention.validate.material import check_lengths, choose_material
from hyperattention.validate.measure import EXTRA_SEEDS, Extent, measure
from hyperattention.validate.needle import choose_grid
from hyperattention.validate.operators import native_library, native_operator, reference_operator
from hyperattention.validate.provenance import Proof
from hyperattention.validate.regimes import TAIL
from hyperattention.validate.report import SCHEMA
from hyperattention.validate.runners import TorchRunner
from hyperattention.validate.signature import length_range
from hyperattention.validate.steps import count_steps
from hyperattention.validate.verdict import judge
from hyperattention.validate.workbench import Workbench

WINDOWS = (4, 2, 1)


@dataclass(frozen=True)
class Options:
    """What to measure; paths are read, never written into the report."""

    folder: Path
    model: str | Path | None = None
    text: Path | None = None
    inputs: Path | None = None
    lengths: tuple[int, ...] = ()
    windows: tuple[int, ...] = ()
    time_lengths: tuple[int, ...] = ()
    device: str = "auto"
    backend: str = "auto"
    exact_engine: Path | None = None
    tail: int = TAIL
    needle: bool | None = None
    seed: int = 0
    threads: int = 0
    limits: Limits = field(default_factory=Limits)
    trust: Trust = Trust()

    def __post_init__(self) -> None:
        choice("--device", self.device, DEVICES)
        choice("--backend", self.backend, BACKENDS)
        for name, value, top in (("--threads", self.threads, 1024), ("--seed", self.seed, INT32_MAX - EXTRA_SEEDS)):
            if not 0 <= value <= top:
                raise UsageError(f"{name} is {value}; it takes 0 to {top}")
        for name, values, least in (("--lengths", self.lengths, 2), ("--windows", self.windows, 1), ("--tail", (self.tail,), 1)):
            if min(values, default=least) < least:
                raise UsageError(f"{name} holds {min(values)}; it takes numbers of at least {least}")
        if self.needle is False and self.limits.needle is not None:
            raise UsageError("--gate needle judges what --no-needle leaves out; give one of the two")
        if self.windows and len(self.windows) not in (1, len(self.lengths or LENGTHS)):
            raise UsageError(
                f"--windows has {len(self.windows)} numbers; give one, or one for each of the {len(self.lengths or LENGTHS)} lengths"
            )


@dataclass(frozen=True)
class _Subject:
    """What is measured, opened and checked before any work: the folder, its model, what that reads, and where it runs.

    plan: the folder's, in fp32 where a half-precision target is judged through its twin. kind: "ort" or "tensorrt". tail: positions
    that attend exactly after an approximate prefill, 0 for a model without a vocabulary. notes: for the report.
    """

    bundle: Bundle
    plan: ExportPlan
    source: Source
    material: Material
    extent: Extent
    tail: int
    device: torch.device
    kind: str
    notes: list[str]


def validate(options: Options, counted: Callable[[int], Callable[[str], None]], say: Callable[[str], None] = lambda text: None) -> dict:
    """Measures the folder and returns the report, gates and verdict included. `say` gets one sentence before foreign code runs.

    `counted` gets the number of steps once it is known, and returns what is called as each begins.

    Raises EnvironmentFault where the backend cannot run or ran something else than was built, UsageError for bad options.
    """
    started = time.monotonic()
    subject = _open(options, say)
    bundle, plan, source, busy = subject.bundle, subject.plan, subject.source, environment.busy_note()
    rival = bool(plan.approximate) if subject.kind == "ort" else options.exact_engine is not None
    twin = plan.dtype != bundle.plan.dtype
    step = counted(count_steps(plan, subject.material, subject.extent, twin, rival, subject.device.type == "cuda"))
    measured, proofs, backend = _measure(subject, options, step)
    report = {
        "schema": SCHEMA,
        "kind": kind_of(plan.task),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - started, 1),
        "model": {
            "name": source.name,
            "architecture": source.architecture,
            "parameters": source.num_parameters,
            "layers": len(source.layers),
            "max_positions": source.max_positions,
        },
        "plan": plan.to_json(),
        "target_dtype": bundle.plan.dtype,
        "plan_summary": plan_summary(plan),
        "inputs": {
            **subject.material.describe(),
            "seed": options.seed,
            "lengths": list(subject.extent.windows),
            "windows": [row["windows"] for row in measured["approximation"]],
            "tail": subject.tail or None,
        },
        "backend": backend,
        "provenance": [proof.to_json() for proof in proofs],
        **measured,
        "environment": {**environment.describe(subject.device, bundle.libraries), "busy": busy},
        "notes": [*subject.notes, *([busy] if busy else []), *result_notes(plan, measured)],
    }
    return judge(report, options.limits)


def _open(options: Options, say: Callable[[str], None]) -> _Subject:
    """Everything that the options name. Raises UsageError and EnvironmentFault for what cannot be measured."""
    bundle = Bundle.open(options.folder)
    check_files(bundle)
    device, kind = choose(bundle, options.device, options.backend)
    plan, notes = bundle.plan, check_engines(bundle, options.exact_engine) if kind == "tensorrt" else []
    if device.type == "cpu" and plan.dtype != "fp32":
        notes.append(
            f"The {plan.dtype} target was validated through its fp32 twin: ONNX Runtime's CPU provider has no {plan.dtype} arithmetic."
        )
        plan = replace(plan, dtype="fp32")
    source = reopen(_model(options, bundle), plan, trust=options.trust, say=say)
    check_model_fits(bundle, source)
    material, lengths = choose_material(source, plan, options.text, options.inputs, options.lengths, options.seed)
    extent = _extent(options, lengths)
    check_lengths(plan, extent.time_lengths)
    choose_grid(plan, material, extent.windows, extent.needle, device.type == "cuda")  # refuses what cannot be planted
    notes += plan_notes(plan, material.note)
    if any(source.max_positions and length > source.max_positions for length in extent.time_lengths):
        notes.append(f"Past {source.max_positions:,} tokens, which the model was trained for, only the time was measured.")
    tail = min(options.tail, min(lengths) // 2) if kind_of(plan.task) == LANGUAGE else 0
    return _Subject(bundle, plan, source, material, extent, tail, device, kind, notes)


def _measure(subject: _Subject, options: Options, step: Callable[[str], None]) -> tuple[dict, list[Proof], str]:
    """The parts of report.json that are numbers, what proves that the library made them, and the backend's name."""
    bundle, plan, device, material = subject.bundle, subject.plan, subject.device, subject.material
    step("loading the model")
    patched = subject.source.load(plan, device)
    with contextlib.ExitStack() as stack:
        backend, backend_exact = make_runners(
            bundle, plan, patched, subject.kind, device, options.exact_engine, options.threads, stack, step
        )
        step("proving that the library runs")
        low, high = length_range(plan)
        prove_first(backend, material.stretched(plan, max(low, min(64, high))))
        kernels = native_library(bundle, device) if plan.planned else None
        operator = native_operator(kernels) if kernels else reference_operator()
        # A language model is scored at every position, also where its graph answers the last one alone.
        forward = every_position(patched) if isinstance(patched, Patched) and kind_of(plan.task) == LANGUAGE else None
        exact = stack.enter_context(TorchRunner(patched, None, "torch exact", forward, device))
        definition = stack.enter_context(TorchRunner(patched, reference_operator(), "torch reference", device=device))
        scorer = stack.enter_context(TorchRunner(patched, operator, "torch native", forward, device))
        runners = [stack.enter_context(runner) for runner in (backend, backend_exact) if runner is not None]
        repeats = 5 if device.type == "cuda" else 0
        bench = Workbench(patched, plan, exact, backend, backend_exact, scorer, operator, kernels, subject.tail, repeats, step)
        measured = measure(bench, definition, material, subject.extent)
        step("proving what ran in all of it")
        return measured, prove(runners), backend.backend


def _model(options: Options, bundle: Bundle) -> str:
    """--model. Raises UsageError where it was left out: OUT holds no path that it could be found by."""
    if options.model is None:
        name = (bundle.manifest.get("model") or {}).get("name", "MODEL")
        raise UsageError(
            f"--model is missing: the weights of {name} are compared with what was exported, and {options.folder} names no path; "
            f"such as `hyperattention validate {options.folder} --model path/to/{name}`"
        )
    return str(options.model)


def check_files(bundle: Bundle) -> None:
    """Raises UsageError unless the files are the manifest's; the report is not looked at, a validation writes it anew."""
    changed = [name for name in bundle.changed_files() if Path(name).parts[0] != Path(REPORT).parts[0]]
    if changed:
        raise UsageError(f"{', '.join(changed)} changed or missing since the export, so it would not be what is judged; export again")


def check_model_fits(bundle: Bundle, source: Source) -> None:
    """Raises UsageError for a --model whose architecture, parameter count or attention layers are not the exported model's."""
    exported = bundle.manifest.get("model") or {}
    names = [layer.name for layer in bundle.plan.layers]
    pairs = (
        ("architecture", source.architecture, exported.get("architecture", source.architecture)),
        ("number of parameters", source.num_parameters, exported.get("parameters", source.num_parameters)),
        ("number of attention layers", len(source.layers), len(names)),
        ("attention layers", [layer.name for layer in source.layers], names),
    )
    for what, found, expected in pairs:
        if found != expected:
            raise UsageError(f"--model {source.name} has {what} {found}, the exported model {expected}; give the model it was made from")


def _extent(options: Options, lengths: tuple[int, ...]) -> Extent:
    """The lengths in ascending order, each with its number of windows."""
    counts = options.windows or WINDOWS
    each = counts * len(lengths) if len(counts) == 1 else tuple(counts[min(i, len(counts) - 1)] for i in range(len(lengths)))
    windows = dict(sorted(zip(lengths, each, strict=True)))
    needle = True if options.needle is None and options.limits.needle is not None else options.needle
    return Extent(windows, options.time_lengths, needle, options.seed)
