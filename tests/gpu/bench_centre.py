"""What `hash_centre` costs: `paper` with and without it in turn, its selection alone and the whole op.

    PYTHONPATH=. python tests/gpu/bench_centre.py [--lengths 32768 131072] [--dims 64 128] [--heads 32] [--rounds 15] [--device cuda]

bf16 on a GPU, fp32 on the processor; normal inputs, batch 1. Prints a Markdown table: medians in milliseconds, and the median of the
ratios, each of two runs of one round. `centre` is the own time of the kernel that adds up the means (CUPTI; a GPU alone). A few
seconds on an H200.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import torch
from bench_table import MASKS, table

from hyperattention.config import PRESETS, Config
from hyperattention.library import load_cpu, load_cuda
from hyperattention.native import Library
from hyperattention.validate.bench_profile_cuda import CudaRecorder
from hyperattention.validate.bench_timing import clock_for

PAIR = (PRESETS["paper"], replace(PRESETS["paper"], hash_centre=1))
COLUMNS = ("D", "tokens", "mask", "selection", "with `hash_centre`", "ratio", "`centre`", "op", "with `hash_centre`", "ratio")


def in_turn(clock: Callable, runs: list[Callable[[], object]], rounds: int) -> tuple[list[float], float]:
    """Median milliseconds of two runs, after one of each that does not count, and the median over the rounds of the second's over the
    first's. Every other round begins with the second."""
    for run in runs:
        run()
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds):
        for which in (0, 1) if number % 2 else (1, 0):
            seconds[which].append(clock(runs[which])[0])
    return [1000 * median(times) for times in seconds], median(b / a for a, b in zip(*seconds, strict=True))


def centre_ms(select: Callable[[], object]) -> float:
    """The time of `centre_kernel` in a selection, median of 5."""
    calls = CudaRecorder().record([select] * 5)
    return 1000 * median(sum(launch.seconds for launch in call if "centre_kernel" in launch.name) for call in calls)


def row(library: Library, dim: int, tokens: int, causal: int, options: argparse.Namespace) -> list[str]:
    """One line of the table."""
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    tensors = [torch.randn(1, options.heads, tokens, dim, device=options.device, dtype=dtype) for _ in range(3)]
    clock, configs = clock_for(options.device), [replace(config, causal=causal) for config in PAIR]

    def calls(function: Callable) -> list[Callable[[], object]]:
        def of(config: Config) -> Callable[[], object]:
            return lambda: function(*tensors, config)

        return [of(config) for config in configs]

    selections = calls(library.select)
    times, ratio = in_turn(clock, selections, options.rounds)
    centre = f"{centre_ms(selections[1]):.3f}" if options.device == "cuda" else "–"
    whole, whole_ratio = in_turn(clock, calls(library.forward), options.rounds)
    cells = [f"{times[0]:.3f}", f"{times[1]:.3f}", f"{ratio:.2f}", centre, f"{whole[0]:.2f}", f"{whole[1]:.2f}", f"{whole_ratio:.3f}"]
    return [str(dim), f"{tokens:,}", MASKS[causal], *cells]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = parser.parse_args()
    library = load_cuda() if options.device == "cuda" else load_cpu()
    print(table(COLUMNS, ()))
    for problem in ((dim, n, causal) for dim in options.dims for n in options.lengths for causal in (1, 0)):
        print("| " + " | ".join(row(library, *problem, options)) + " |", flush=True)


if __name__ == "__main__":
    main()
