"""`bench --attention --profile` from options to a record: every preset at every head size and length."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from hyperattention.errors import EnvironmentFault, UsageError
from hyperattention.export.shape_options import MAX_SEQUENCE
from hyperattention.library import load_cuda
from hyperattention.validate import environment
from hyperattention.validate.bench_attention import Inputs
from hyperattention.validate.bench_profile import split
from hyperattention.validate.bench_profile_cuda import CudaOperation, CudaRecorder, measure_ceilings
from hyperattention.validate.bench_record import SCHEMA
from hyperattention.validate.bench_run import (
    CUDA_LENGTHS,
    AttentionOptions,
    Step,
    Stopped,
    check_lengths,
    check_settings,
    head_of,
    problem_of,
)
from hyperattention.validate.bench_timing import LeftOut, reason_of

METHOD = (
    "pool, select, hash, sort: the kernels' own times (CUPTI, through torch.profiler), medians",
    "local, sinks, heavy, sampled: differences of attention under the same plan, parts added one by one in this order, runs interleaved; "
    "the first also holds what every run costs (reading Q, writing O and LSE)",
    "merge: estimated, O and LSE that one launch writes and the next reads, at the measured copy rate; taken off heavy (or sampled)",
    "rest: the time from the first kernel's start to the last one's end that no stage holds; below 0 where launches overlap",
    "operations: 4 D a pair of attention, 2 D 8-bit ones a pair of pools; bytes: every input read and every output written once",
    "of roofline: the time that the work takes at the measured ceilings, the larger of matrix and memory, over the time measured",
)


def check_profile(options: AttentionOptions) -> None:
    """Raises UsageError for what cannot be profiled and EnvironmentFault without a CUDA device."""
    if options.device == "cpu":
        raise UsageError("--profile times CUDA kernels; leave --device cpu out, or leave --profile out")
    if options.backend != "library":
        raise UsageError(f"--profile times our kernels alone; leave --backend {options.backend} out")
    if not torch.cuda.is_available():
        raise EnvironmentFault("--profile needs a CUDA device, and PyTorch sees none; run it on a machine with an NVIDIA GPU")


def profile_run(options: AttentionOptions, head_dims: Sequence[int], step: Step, stopped: Stopped) -> dict[str, Any]:
    """The record of the time splits. Raises UsageError for bad options and EnvironmentFault where nothing could be profiled."""
    began = time.monotonic()
    check_settings(options.settings, options.threads, options.seed)
    check_profile(options)
    lengths = check_lengths(options.lengths or CUDA_LENGTHS, 1, MAX_SEQUENCE)
    problems = [problem_of(replace(options, head_dim=size), "cuda") for size in head_dims or (None,)]
    step("ceilings: a large copy and large matrix products")
    ceilings = measure_ceilings(problems[0].dtype)
    recorder, cases, missing, interrupted = CudaRecorder(), [], [], False
    for problem in problems:
        inputs = Inputs(problem)
        for length in lengths:
            for name, config in options.presets.items():
                interrupted = interrupted or stopped()
                if interrupted:
                    continue
                step(f"{length:,} tokens, head size {problem.head_dim}: {name}")
                case = {"preset": name, "head_dim": problem.head_dim, "length": length}
                masked = replace(config, causal=int(problem.causal))
                try:
                    q, k, v = inputs.at(length)
                    op = CudaOperation(load_cuda(), q, k, v, masked)
                    cases.append({**case, **split(op, recorder, ceilings, q.element_size(), options.settings)})
                except (RuntimeError, UsageError) as error:
                    missing.append(LeftOut(f"ours-{name}", length, f"head size {problem.head_dim}: {reason_of(error)}"))
                    torch.cuda.empty_cache()
    first = problems[0]
    sizes = [problem.head_dim for problem in problems]
    said = {"text": first.text(", ".join(map(str, sizes))), **asdict(first), "head_dim": sizes, "backend": options.backend}
    return {
        "schema": SCHEMA,
        "kind": "profile",
        **head_of(began, said, options.settings, options.threads),
        "clock": "kernels' own times from CUPTI, L2 cache overwritten before each run",
        "environment": environment.describe(torch.device("cuda"), [load_cuda().path]),
        "presets": {name: config.attributes() for name, config in options.presets.items()},
        "interrupted": interrupted,
        "against": None,
        "contenders": [{"name": f"ours-{n}", "title": f"HyperAttention, {n}", "ours": True, "exact": False} for n in options.presets],
        "rows": [],
        "left_out": [asdict(left) for left in missing],
        "profile": {"method": list(METHOD), "ceilings": asdict(ceilings), "cases": cases},
    }
