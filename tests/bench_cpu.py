"""Times the op in ONNX Runtime on the processor against ONNX Runtime's exact attention ops, in one run.

    python tests/bench_cpu.py [--full] [--lengths 4096 16384 32768] [--threads 2] [--repeats 5] [--json FILE]

Causal (`--full`: without a mask), fp32, normal inputs, batch 1. Every op is checked before it is timed: the exact ones against
PyTorch's exact attention, `blocks` against the reference on its last rows, `paper` on its first head. Then all of them run
in turn, `repeats` times; the table has medians.
Ops that hold every logit at once are left out where that takes more than half of the free memory, and the table says so.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import onnxruntime as ort
import torch

from hyperattention.config import PRESETS, Config
from hyperattention.library import build_info, ort_library_path
from hyperattention.reference import attention
from hyperattention.validate.bench_attention import Inputs, OrtRival, Ours, Problem
from hyperattention.validate.bench_node import RIVAL_NODES
from hyperattention.validate.bench_timing import Run, WallClock
from hyperattention.validate.environment import describe

TOLERANCE = 2e-4  # absolute, on outputs whose size is about 1
CHECKED_ROWS = 256
BASELINES = {True: "GroupQueryAttention", False: "HyperAttention exact"}  # causal or not


@dataclass(frozen=True)
class Op:
    """One ONNX op under its name in the table; `config` for ours."""

    name: str
    contender: Ours | OrtRival
    config: Config | None = None


def ops(inputs: Inputs, longest: int, threads: int) -> list[Op]:
    """Ours with each preset, and ONNX Runtime's exact ones that take the problem's mask."""
    causal, clock = inputs.problem.causal, WallClock()
    found = []
    for preset in ("blocks", "paper", "exact"):
        config = replace(PRESETS[preset], causal=int(causal))
        ours = Ours(f"ours-{preset}", preset, preset == "exact", config, "ort", inputs, clock, longest, threads)
        found.append(Op(f"HyperAttention {preset}", ours, config))
    names = {"Attention": "Attention-23"}
    for node in RIVAL_NODES:
        if causal or not node.causal_only:
            found.append(Op(names.get(node.name, node.name), OrtRival(node.name, node.name, node, inputs, clock, threads)))
    return found


def check(op: Op, run: Run, inputs: Inputs, length: int, exact: torch.Tensor) -> float:
    """Largest deviation from what the op should give; SystemExit when that is too much."""
    run.time()
    o, config = run.take(), op.config
    if config is None or config.is_exact(length, length):
        deviation = (o - exact).abs().max().item()
    else:
        q, k, v = inputs.at(length)
        if config.selector == "blocks":  # the last rows as a chunk see the same keys
            q, o = q[:, :, -CHECKED_ROWS:], o[:, :, -CHECKED_ROWS:]
        else:  # a row's place in its node depends on all the others
            q, k, v, o = (x[:, :1] for x in (q, k, v, o))
        deviation = (o - attention(q, k, v, config).o).abs().max().item()
    if not deviation <= TOLERANCE:
        raise SystemExit(f"{op.name} at {length} is off by {deviation:.3g}; allowed is {TOLERANCE:.3g}: nothing was timed")
    return deviation


def measure(length: int, arguments: argparse.Namespace) -> list[dict]:
    """One row per op at this length; ops that do not fit have no seconds but a reason."""
    inputs = Inputs(Problem(1, arguments.heads, arguments.heads, arguments.head_dim, "fp32", not arguments.full, "cpu"))
    exact = torch.nn.functional.scaled_dot_product_attention(*inputs.at(length), is_causal=not arguments.full)
    rows, runs = [], {}
    for op in ops(inputs, length, arguments.threads):
        row: dict = {"op": op.name, "length": length}
        try:
            runs[op.name] = op.contender.prepare(length)
            row["deviation"] = check(op, runs[op.name], inputs, length, exact)
        except MemoryError as error:
            row["left_out"] = str(error)
        rows.append(row)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(arguments.repeats):
        for name, run in runs.items():
            seconds[name].append(run.time())
    baseline = statistics.median(seconds[BASELINES[not arguments.full]])
    for row in rows:
        if row["op"] in runs:
            times = seconds[row["op"]]
            row |= {"seconds": statistics.median(times), "all_seconds": times, "speedup": baseline / statistics.median(times)}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="without the causal mask")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384, 32768])
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write everything there")
    arguments = parser.parse_args()
    processor = describe(torch.device("cpu"), [])["machine"]["processor"]
    machine = {"processor": processor, "onnxruntime": ort.__version__, "build": build_info(ort_library_path())["build_id"]}
    print(f"{machine['processor']}, {arguments.threads} threads, ONNX Runtime {machine['onnxruntime']}, batch 1, {arguments.heads} heads, "
          f"D={arguments.head_dim}, {'full' if arguments.full else 'causal'}, fp32, medians of {arguments.repeats}\n")  # fmt: skip
    print(f"| length | op | seconds | against {BASELINES[not arguments.full]} | deviation |\n|---|---|---|---|---|")
    rows = []
    for length in arguments.lengths:
        for row in measure(length, arguments):
            rows.append(row)
            told = f"left out, {row.get('left_out')} | | |"
            if "seconds" in row:
                told = f"{row['seconds']:.3f} | {row['speedup']:.2f}x | {row['deviation']:.1e} |"
            print(f"| {length} | {row['op']} | {told}", flush=True)
    if arguments.json:
        shown = {name: getattr(arguments, name) for name in ("full", "heads", "head_dim", "threads", "repeats")}
        arguments.json.write_text(json.dumps({"machine": machine, **shown, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
