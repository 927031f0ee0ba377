"""The two benchmarks from options to a record: the op alone, and the model of an output folder."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from hyperattention.config import Config
from hyperattention.errors import EnvironmentFault, UsageError
from hyperattention.export.choices import DTYPES, check_device, choice
from hyperattention.export.shape_options import MAX_SEQUENCE
from hyperattention.export.source import Trust
from hyperattention.library import ort_library_path, trt_library_path
from hyperattention.validate import bench_attention, environment
from hyperattention.validate.bench_attention import Problem
from hyperattention.validate.bench_record import record
from hyperattention.validate.bench_timing import Contender, LeftOut, Settings, clock_for, measure
from hyperattention.validate.operators import torch_threads

CPU_LENGTHS = (1024, 2048, 4096, 8192, 16384)
CUDA_LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
# A small problem where an exact run of a large one takes minutes.
CPU_SIZES, CUDA_SIZES = (4, 64, "fp32"), (32, 128, "bf16")  # heads, head_dim, dtype

Step = Callable[[str], None]
Stopped = Callable[[], bool]


@dataclass(frozen=True)
class AttentionOptions:
    """What `bench --attention` times; None: the device's default."""

    presets: dict[str, Config]
    lengths: tuple[int, ...] = ()
    batch: int = 1
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    dtype: str | None = None
    causal: bool = True
    device: str = "auto"
    backend: str = "library"
    rivals: tuple[str, ...] = ()
    against: str | None = None
    seed: int = 0
    threads: int = 0
    settings: Settings = field(default_factory=Settings)


@dataclass(frozen=True)
class OutcomeOptions:
    """What `bench OUT` times: the folder's model, the same with every layer exact, and with `model` PyTorch's exact attention."""

    folder: Path
    model: str | None = None
    trust: Trust = Trust()
    exact_engine: Path | None = None
    lengths: tuple[int, ...] = ()
    device: str = "auto"
    backend: str = "auto"
    against: str | None = None
    seed: int = 0
    threads: int = 0
    settings: Settings = field(default_factory=Settings)


def check_lengths(lengths: tuple[int, ...], low: int, high: int) -> tuple[int, ...]:
    """Ascending, each once. Raises UsageError for one outside low to high."""
    for length in lengths:
        if not low <= length <= high:
            raise UsageError(f"--lengths names {length}; it takes {low} to {high}")
    return tuple(sorted(set(lengths)))


def check_settings(settings: Settings, threads: int, seed: int) -> None:
    """Raises UsageError for numbers out of range."""
    for option, value, low, high in (
        ("--repeats", settings.repeats, 1, 100_000),
        ("--max-seconds", settings.max_seconds, 0.001, 86_400),
        ("--threads", threads, 0, 1024),
        ("--seed", seed, 0, 2**31 - 1 - MAX_SEQUENCE),
    ):
        if not low <= value <= high:
            raise UsageError(f"{option} is {value}; it takes {low} to {high}")


def bench_attention_run(options: AttentionOptions, step: Step, stopped: Stopped) -> dict[str, Any]:
    """Times the op against what is installed and returns the record (bench_record.py).

    Raises UsageError for bad options and EnvironmentFault where the device is not there.
    """
    began = time.monotonic()
    check_settings(options.settings, options.threads, options.seed)
    check_device(options.device)
    device = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    bench_attention.check_backend(options.backend, device)
    problem = problem_of(options, device)
    lengths = check_lengths(options.lengths or (CUDA_LENGTHS if device == "cuda" else CPU_LENGTHS), 1, MAX_SEQUENCE)
    with torch_threads(options.threads):
        contenders, missing = bench_attention.contenders(
            problem, options.presets, options.backend, options.rivals, max(lengths), options.threads
        )
        _check_against(options.against, contenders, missing)
        found = measure(contenders, lengths, options.settings, step, stopped, bench_attention.OutputCheck(problem))
    said = {"text": problem.text(), **asdict(problem), "backend": options.backend}
    head = head_of(began, said, options.settings, options.threads)
    head |= {"clock": clock_for(device).name, "environment": environment.describe(torch.device(device), _libraries())}
    head["presets"] = {name: config.attributes() for name, config in options.presets.items()}
    return record("attention", head, contenders, missing, found, options.against)


def bench_outcome_run(options: OutcomeOptions, step: Step, stopped: Stopped) -> dict[str, Any]:
    """Times an output folder's model and returns the record. Raises as `validate` does: UsageError and EnvironmentFault."""
    from hyperattention.validate import bench_outcome  # the whole validation; the op alone needs none of it
    from hyperattention.validate.material import check_lengths as check_exported

    began = time.monotonic()
    check_settings(options.settings, options.threads, options.seed)
    subject = bench_outcome.open_subject(options.folder, options.device, options.backend)
    wanted = options.lengths or bench_outcome.default_lengths(subject.plan)
    lengths = tuple(sorted(set(check_exported(subject.plan, wanted))))
    with torch_threads(options.threads), contextlib.ExitStack() as stack:
        contenders, missing = bench_outcome.contenders(
            subject, options.model, options.trust, options.exact_engine, options.seed, options.threads, stack, step
        )
        _check_against(options.against, contenders, missing)
        found = measure(contenders, lengths, options.settings, step, stopped)
        proofs = [] if found.interrupted and not found.rows else bench_outcome.prove_active(contenders)
    head = head_of(began, subject.describe(), options.settings, options.threads)
    head |= {"clock": "wall clock from the first kernel's launch to the last one's end", "environment": subject.environment()}
    head["provenance"] = [proof.to_json() for proof in proofs]
    head["notes"] += subject.notes
    return record("model", head, contenders, missing, found, options.against)


def check_ours(report: dict[str, Any]) -> None:
    """Raises EnvironmentFault, the record with it, where ours was not timed (or profiled) at any length."""
    if report["kind"] == "profile" and report["profile"]["cases"]:
        return
    ours = {c["name"] for c in report["contenders"] if c["ours"]}
    if any(row["contender"] in ours for row in report["rows"]):
        return
    reason = next((left["reason"] for left in report["left_out"] if left["contender"] in ours), "no reason was given")
    message = f"HyperAttention itself could not be timed: {reason}; `hyperattention doctor` says what this machine lacks"
    raise EnvironmentFault(message, report)


def problem_of(options: AttentionOptions, device: str) -> Problem:
    """The problem on "cpu" or "cuda", what was not given filled in. Raises UsageError."""
    heads, head_dim, dtype = CUDA_SIZES if device == "cuda" else CPU_SIZES
    heads = heads if options.heads is None else options.heads
    return Problem(
        batch=options.batch,
        heads=heads,
        kv_heads=heads if options.kv_heads is None else options.kv_heads,
        head_dim=head_dim if options.head_dim is None else options.head_dim,
        dtype=choice("--dtype", dtype if options.dtype is None else options.dtype, DTYPES),
        causal=options.causal,
        device=device,
        seed=options.seed,
    )


def head_of(began: float, problem: dict[str, Any], settings: Settings, threads: int) -> dict[str, Any]:
    """What every record begins with; `began` by the monotonic clock."""
    busy = environment.busy_note()
    return {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - began, 1),
        "problem": problem,
        "settings": {**asdict(settings), "threads": threads},
        "provenance": [],
        "notes": [busy] if busy else [],
    }


def _check_against(against: str | None, contenders: Sequence[Contender], missing: list[LeftOut]) -> None:
    names = [c.name for c in contenders]
    if against is not None and against not in names:
        reason = next((f", which cannot run here: {left.reason}" for left in missing if left.contender == against), "")
        raise UsageError(f"--against is {against!r}{reason}; it takes one of {', '.join(names)}")


def _libraries() -> list[Path]:
    found = []
    for find in (ort_library_path, trt_library_path):
        with contextlib.suppress(EnvironmentFault):
            found.append(find())
    return found
