"""The whole validation of one output folder: inputs, runners, proof, both errors, time; ends in one report dictionary."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path

from hyperattention.config import INT32_MAX
from hyperattention.errors import UsageError
from hyperattention.export.bundle import REPORT, Bundle
from hyperattention.export.gate_options import kind_of
from hyperattention.export.plan import DEVICES, ExportPlan, choice
from hyperattention.export.source import Source, open_source
from hyperattention.validate import environment
from hyperattention.validate.approximation import Bench, is_exact, measure_length, measure_needle, measure_time, needle_steps
from hyperattention.validate.backends import BACKENDS, check_engines, choose, make_runners, prove, prove_first
from hyperattention.validate.describe import plan_notes, plan_summary
from hyperattention.validate.gates import Limits, judge
from hyperattention.validate.implementation import check_length, check_model, check_op, op_cases, seeds_spread
from hyperattention.validate.inputs import Corpus, load_corpus, windows
from hyperattention.validate.operators import native_library, native_operator, reference_operator
from hyperattention.validate.report import SCHEMA
from hyperattention.validate.runners import TorchRunner, feed

LENGTHS = (8192, 16384, 32768)
WINDOWS = (4, 2, 1)
TAIL = 512
EXTRA_SEEDS = 4
NEEDLE_PROMPTS = 4


@dataclass(frozen=True)
class Options:
    """What to measure; paths are read, never written into the report."""

    folder: Path
    model: Path
    text: Path | None = None
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

    def __post_init__(self) -> None:
        choice("--device", self.device, DEVICES)
        choice("--backend", self.backend, BACKENDS)
        for name, value, top in (("--threads", self.threads, 1024), ("--seed", self.seed, INT32_MAX - EXTRA_SEEDS)):
            if not 0 <= value <= top:
                raise UsageError(f"{name} is {value}; it takes 0 to {top}")
        if any(n < 2 for n in self.lengths) or any(n < 1 for n in self.windows) or self.tail < 1:
            raise UsageError("--lengths takes numbers of at least 2, --windows and --tail of at least 1")
        if self.windows and len(self.windows) not in (1, len(self.lengths or LENGTHS)):
            raise UsageError(
                f"--windows has {len(self.windows)} numbers; give one, or one for each of the {len(self.lengths or LENGTHS)} lengths"
            )


def validate(options: Options, step: Callable[[str], None]) -> dict:
    """Measures the folder and returns the report, gates and verdict included.

    Raises EnvironmentFault where the backend cannot run or ran something else than was built, UsageError for bad options.
    """
    started = time.monotonic()
    bundle = Bundle.open(options.folder)
    check_files(bundle)
    device, backend_kind = choose(bundle, options.device, options.backend)
    plan, notes = bundle.plan, check_engines(bundle, options.exact_engine) if backend_kind == "tensorrt" else []
    if device.type == "cpu" and plan.dtype != "fp32":
        notes.append(
            f"The {plan.dtype} target was validated through its fp32 twin: ONNX Runtime's CPU provider has no {plan.dtype} arithmetic."
        )
        plan = replace(plan, dtype="fp32")
    source = open_source(str(options.model), task=plan.task)
    check_model_fits(bundle, source)
    lengths, counts = _lengths(plan, options, source.max_positions)
    corpus = load_corpus(options.text, plan.input_ids, options.model, source.vocab_size, options.seed, max(lengths))
    notes += plan_notes(plan, corpus, lengths)
    beyond = [n for n in options.time_lengths if source.max_positions and n > source.max_positions]
    if beyond:
        notes.append(f"Past {source.max_positions:,} tokens, which the model was trained for, only the time was measured.")
    busy = environment.busy_note()
    notes += [busy] if busy else []
    step("loading the model")
    patched = source.load(plan, device)
    with contextlib.ExitStack() as stack:
        backend, backend_exact = make_runners(bundle, plan, patched, backend_kind, options.exact_engine, options.threads, stack, step)
        step("proving that the library runs")
        prove_first(backend, corpus.ids[None, : max(plan.seq[0], min(64, plan.seq[2]))])
        kernels = native_library(bundle, device) if plan.planned else None
        operator = native_operator(kernels) if kernels else reference_operator()
        exact = stack.enter_context(TorchRunner(patched, None, "torch exact"))
        definition = stack.enter_context(TorchRunner(patched, reference_operator(), "torch reference"))
        scorer = stack.enter_context(TorchRunner(patched, operator, "torch native"))
        stack.enter_context(backend)
        if backend_exact is not None:
            stack.enter_context(backend_exact)
        repeats = 5 if device.type == "cuda" else 0
        tail = min(options.tail, min(lengths) // 2)
        bench = Bench(patched, plan, exact, backend, backend_exact, scorer, operator, kernels, tail, repeats, step)
        measured = measure(bench, definition, corpus, dict(zip(lengths, counts, strict=True)), options)
        step("proving what ran in all of it")
        proofs = prove([backend, *([backend_exact] if backend_exact else [])])
    report = {
        "schema": SCHEMA,
        "kind": kind_of(plan.task),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - started, 1),
        "model": {
            "name": options.model.resolve().name,
            "architecture": source.architecture,
            "parameters": source.num_parameters,
            "layers": len(source.layers),
            "max_positions": source.max_positions,
        },
        "plan": plan.to_json(),
        "target_dtype": bundle.plan.dtype,
        "plan_summary": plan_summary(plan),
        "inputs": {**corpus.describe(), "seed": options.seed, "lengths": list(lengths), "windows": list(counts), "tail": tail},
        "backend": backend.backend,
        "provenance": [proof.to_json() for proof in proofs],
        **measured,
        "environment": environment.describe(device, [p for p in (bundle.ort_library, bundle.trt_library) if p is not None]),
        "notes": notes,
    }
    return judge(report, options.limits)


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
            raise UsageError(
                f"--model {source.name} has {what} {found}, the exported model {expected}; give the model it was made from"
            )


def measure(bench: Bench, definition: TorchRunner, corpus: Corpus, lengths: dict[int, int], options: Options) -> dict:
    """Everything that is measured on active runners, for report.json; `lengths` maps each length to its number of windows."""
    report: dict = {"implementation": _implementation(bench, definition, corpus, tuple(lengths), options)}
    report |= {"approximation": [], "time": [], "layers": [], "baseline": [], "hard_inputs": []}
    for length, count in lengths.items():
        row, seconds, table = measure_length(bench, corpus, length, count)
        report["approximation"].append(row)
        report["time"].append(seconds)
        report["layers"] += table
    report["time"] += [measure_time(bench, corpus, length) for length in options.time_lengths]
    report["needle"] = _needle(bench, corpus, max(lengths), options)
    return report


def count_steps(options: Options) -> int:
    """About how many steps `validate` reports, for the progress bar."""
    lengths = options.lengths or LENGTHS
    counts = _counts(options, len(lengths))
    return 16 + sum(4 * n + 4 for n in counts) + 3 * len(options.time_lengths) + (needle_steps(1) if options.needle else 0)


def _counts(options: Options, lengths: int) -> tuple[int, ...]:
    counts = options.windows or WINDOWS
    return counts * lengths if len(counts) == 1 else tuple(counts[min(i, len(counts) - 1)] for i in range(lengths))


def _lengths(plan: ExportPlan, options: Options, max_positions: int | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Lengths, ascending, within the exported range, and the windows of each."""
    low, _, high = plan.seq
    lengths = options.lengths
    if not lengths:
        top = min(high, max_positions or high)
        lengths = tuple(n for n in LENGTHS if low <= n <= top) or (top,)
    outside = [n for n in (*lengths, *options.time_lengths) if not low <= n <= high]
    if outside:
        raise UsageError(f"length {outside[0]} was not exported; the folder takes {low} to {high} (--min-seq, --max-seq of the export)")
    counts = _counts(options, len(lengths))
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return tuple(lengths[i] for i in order), tuple(counts[i] for i in order)


def _implementation(bench: Bench, definition: TorchRunner, corpus: Corpus, lengths: tuple[int, ...], options: Options) -> dict:
    """Both halves, a little above exact_below (at the shortest length where nothing approximates)."""
    length = check_length(bench.plan, next((n for n in lengths if not is_exact(bench.plan, n)), lengths[0]))
    window = windows(corpus, length, 1)[0]
    bench.step(f"{length:,} tokens: Q, K, V of every layer")
    with bench.patched.capture() as captured:
        bench.exact.infer(feed(window.inputs))
    rows, spread = [], []
    if captured and bench.kernels is not None:
        wanted = {layer.index for layer in bench.plan.approximate} or {captured[0].layer}
        chosen = [c for c in captured if c.layer in wanted]
        for case in op_cases(chosen):
            bench.step(f"op against float64: {case}")
            rows.append(check_op(case, bench.kernels))
        bench.step("the layers under other seeds")
        spread = seeds_spread(chosen, bench.kernels, tuple(options.seed + 1 + i for i in range(EXTRA_SEEDS)))
        del chosen
    del captured
    model = check_model(bench.backend, definition, bench.patched.model, window.inputs, options.seed, bench.step)
    return {"length": length, "per_op": rows, "seeds": spread, "whole_model": model}


def _needle(bench: Bench, corpus: Corpus, length: int, options: Options) -> dict | None:
    cuda = bench.device.type == "cuda"
    wanted = options.needle if options.needle is not None else cuda and corpus.tokens == "bytes"
    if not wanted:
        return None
    if corpus.tokens != "bytes":
        raise UsageError("--needle plants a prompt of bytes; it needs a model with --input-ids bytes")
    return measure_needle(bench, corpus, length, options.seed, NEEDLE_PROMPTS if cuda else 1)
