"""Times and memory of the op against exact attention and the released HyperAttention code, all in one run on one GPU.

    PYTHONPATH=. python tests/gpu/bench_attention.py --json OUT/attention.json [--upstream DIR] [--lengths 8192 131072] [--dims 64 128]

Inputs are bf16, batch 1. Every time is the median of CUDA events after a warm-up, in milliseconds, without the time to launch;
calls of 150 ms and more are timed twice, others at least three times. `forward` is our kernels without a runtime, `select` and
`attend` its stages; these and both runtimes take turns. The outputs of the runtimes have to equal the kernels' bit for bit.
Writes OUT/attention.json and, beside it, attention.md with the tables. Exit code 1 when a runtime failed or a target of
bench_table.py is missed. About two minutes on an H200.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench_backends import make_backends
from bench_rivals import Rival, find_rivals
from bench_table import MASKS, check_targets, markdown, verdict
from engine_parts import Heads
from gpu_timing import Turn, median_ms, medians_ms
from torch import Tensor

from hyperattention.config import PRESETS, Config
from hyperattention.library import build_info, load_cuda, ort_library_path, trt_library_path

LENGTHS = [4096, 8192, 16384, 32768, 65536, 131072]


def peak_bytes(run: Callable[[], object]) -> int:
    """The most device memory that torch held during one run, over what it held before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def inputs(n: int, heads: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device="cuda").manual_seed(n + dim)
    q, k, v = (torch.randn(1, heads, n, dim, generator=generator, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    return q, k, v


class Bench:
    """The problem at hand and what is measured of it."""

    def __init__(self, heads: int, budget_ms: float, rivals: dict[str, Rival]) -> None:
        self.heads, self.budget_ms, self.rivals, self.library = heads, budget_ms, rivals, load_cuda()

    def measure(self, runs: dict[str, Callable[[], object]]) -> dict[str, Any]:
        """Times and peaks by name. A rival may lack a kernel for this shape or the memory for it: then its error stands there."""
        found: dict[str, Any] = {"ms": {}, "peak": {}, "errors": {}}
        for name, run in runs.items():
            try:
                found["ms"][name] = median_ms(run, self.budget_ms)
                found["peak"][name] = peak_bytes(run)
            except Exception as error:
                if name not in self.rivals:
                    raise
                found["errors"][name] = f"{type(error).__name__}: {error}"[:300]
        return found

    def exact(self, q: Tensor, k: Tensor, v: Tensor, config: Config) -> dict[str, Any]:
        """Everything that does not depend on the preset."""
        runs: dict[str, Callable[[], object]] = {"exact": lambda: self.library.forward(q, k, v, config.exact())}
        runs |= {name: rival(q, k, v, bool(config.causal)) for name, rival in self.rivals.items()}
        return self.measure(runs)

    def approximate(self, q: Tensor, k: Tensor, v: Tensor, config: Config, backends: dict[str, Any]) -> dict[str, Any]:
        """One preset: the kernels, their stages, both runtimes, which take turns: clocks differ by more than they do."""
        library, n = self.library, k.shape[2]
        runs: dict[str, Callable[[], object]] = {"forward": lambda: library.forward(q, k, v, config)}
        if not config.is_exact(q.shape[2], n):
            plan = library.select(q, k, v, config)
            runs |= {"select": lambda: library.select(q, k, v, config), "attend": lambda: library.attend(q, k, v, config, plan)}
        row: dict[str, Any] = {"peak": {name: peak_bytes(run) for name, run in runs.items()}, "errors": {}, "engine_memory": {}}
        row["workspace"] = library.workspace_size(q, k, v, config)
        turns = {name: Turn(run) for name, run in runs.items()}
        wanted = library.forward(q, k, v, config)[0]
        for name, backend in backends.items():
            try:
                backend.bind(q, k, v)
                backend.launch()
                torch.cuda.synchronize()
                assert torch.equal(backend.output, wanted), "the output is not the kernels'"
                turns[name] = Turn(backend.launch, backend.stream)
                row["engine_memory"][name] = backend.workspace()
            except Exception as error:  # recorded and counted; the other columns are still worth their time
                row["errors"][name] = f"{type(error).__name__}: {error}"[:300]
        return row | {"ms": medians_ms(turns, self.budget_ms)}


def bench_head_size(bench: Bench, dim: int, causal: int, options: argparse.Namespace, report: dict[str, Any]) -> list[dict[str, Any]]:
    """All lengths and presets at one head size and mask."""
    configs = {name: replace(PRESETS[name], causal=causal) for name in options.presets}
    backends: dict[str, dict[str, Any]] = {}
    for name, config in configs.items():
        heads = Heads(options.heads, options.heads, dim, dim)
        backends[name], missing, failed = make_backends(config, heads, max(options.lengths))
        report["missing"] |= missing
        report["failed"] |= {f"{backend}, {name}, {MASKS[causal]}, D={dim}": text for backend, text in failed.items()}
    rows = []
    for n in options.lengths:
        q, k, v = inputs(n, options.heads, dim)
        common = bench.exact(q, k, v, configs[options.presets[0]])
        for name, config in configs.items():
            own = bench.approximate(q, k, v, config, backends[name])
            row: dict[str, Any] = {"preset": name, "causal": causal, "head_dim": dim, "heads": options.heads, "n": n}
            row |= {key: {**own[key], **common[key]} for key in ("ms", "peak", "errors")}
            rows.append(row | {"workspace": own["workspace"], "engine_memory": own["engine_memory"]})
            times = " ".join(f"{column} {ms:.3f}" for column, ms in row["ms"].items())
            print(f"{name} {MASKS[causal]} D={dim} n={n}: {times} {row['errors'] or ''}", flush=True)
        del q, k, v
        torch.cuda.empty_cache()
    return rows


def failures(rows: list[dict[str, Any]]) -> dict[str, str]:
    """What went wrong in our own runtimes, by problem; a rival that refuses a shape is no failure of ours."""
    return {
        f"{name}, {row['preset']}, {MASKS[row['causal']]}, D={row['head_dim']}, n={row['n']}": text
        for row in rows
        for name, text in row["errors"].items()
        if name in ("plugin", "ort")
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--presets", nargs="+", default=["blocks", "paper"], choices=[p for p in PRESETS if p != "exact"])
    parser.add_argument("--causal", type=int, nargs="+", default=[1, 0], choices=[0, 1])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--budget-ms", type=float, default=100, help="time spent on each number")
    parser.add_argument("--upstream", type=Path, help="a checkout of the released HyperAttention code")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()

    start = time.perf_counter()
    rivals, missing = find_rivals(options.upstream)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "libraries": {path.name: build_info(path)["build_id"] for path in (trt_library_path(), ort_library_path())},
        "missing": missing,
        "failed": {},
        "rows": [],
    }
    print(f"{report['device']}, torch {torch.__version__}, libraries {report['libraries']}, missing {missing}", flush=True)
    bench = Bench(options.heads, options.budget_ms, rivals)
    for dim in options.dims:
        for causal in options.causal:
            report["rows"] += bench_head_size(bench, dim, causal, options, report)
            report["targets"] = check_targets(report["rows"])
            report["seconds"] = round(time.perf_counter() - start, 1)
            options.json.write_text(json.dumps(report, indent=1))
    report["failed"] |= failures(report["rows"])
    options.json.write_text(json.dumps(report, indent=1))
    options.json.with_suffix(".md").write_text(markdown(report))
    for name, text in report["failed"].items():
        print(f"FAILED: {name}: {text}")
    print("; ".join(verdict(result) for result in report["targets"]))
    return 1 if report["failed"] or any(result["least"] and not result["met"] for result in report["targets"]) else 0


if __name__ == "__main__":
    sys.exit(main())
