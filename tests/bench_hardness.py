"""Times the numbers of each head against one exact pass of the same layer, on the Q, K, V of a model of bytes that reads text.

    python tests/bench_hardness.py MODEL TEXT [--lengths 8192 32768] [--preset blocks] [--layers 0 4 9] [--repeats 3] [--json FILE]

With the CUDA kernels and a model in bf16 where there is a GPU, else with the processor's in fp32. The exact pass is the op's own
exact path. Both are run `repeats` times in turn after one run that is not counted; the least time of each is told, on the processor that of
all its threads, so that other work counts less. The numbers beside them are those of report.json: the mean and the worst over the heads.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean

import torch

from hyperattention.export.load import inspect_source
from hyperattention.export.plan import make_plan
from hyperattention.export.switched import Captured
from hyperattention.library import load_cpu, load_cuda
from hyperattention.native import Library
from hyperattention.validate.environment import describe
from hyperattention.validate.hardness_layers import groups, layers_hardness
from hyperattention.validate.head_metrics import head_rows
from hyperattention.validate.inputs import load_corpus, windows
from hyperattention.validate.layers import seeds_of
from hyperattention.validate.metrics import head_errors

# What is told, and which end of it is the worst.
SHOWN: dict[str, Callable] = {
    "relative_l2": max,
    "mass": min,
    "top16_recall": min,
    "alpha_without_first_32": max,
    "alpha_blocks": max,
    "log_kappa_p1_p99": max,
    "cv_predicted": max,
    "cv_measured": max,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--preset", choices=("blocks", "paper"), default="blocks")
    parser.add_argument("--layers", type=int, nargs="+", help="numbers of layers, all by default")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    kernels, device = (load_cuda(), torch.device("cuda")) if cuda else (load_cpu(), torch.device("cpu"))
    rows = []
    print("| length | layer | layers at once | exact, s | heads, s | ratio | " + " | ".join(SHOWN) + " |")
    print("|---" * (6 + len(SHOWN)) + "|", flush=True)
    for row in measure(options, kernels, device):
        rows.append(row)
        print(table_row(row), flush=True)
        if options.json:
            options.json.write_text(json.dumps({"machine": describe(device, [kernels.path])["machine"], "rows": rows}, indent=1) + "\n")


def measure(options: argparse.Namespace, kernels: Library, device: torch.device) -> Iterator[dict]:
    """A row for each layer at each length: seconds, and the rows of its heads."""
    source = inspect_source(options.model)
    plan = make_plan(source, layers="all", preset=options.preset, dtype="bf16" if device.type == "cuda" else "fp32", input_ids="bytes")
    model = source.load(plan, device)
    corpus = load_corpus(options.text, "bytes", options.model, source.vocab_size, 0, max(options.lengths))
    for length in options.lengths:
        ids = windows(corpus, length, 1)[0].inputs.to(device)
        wanted = frozenset(options.layers) if options.layers else None
        with model.capture(wanted) as captured, model.mode("exact"), torch.inference_mode():
            model.forward(ids)
        for group in groups(captured):
            for row in group_rows([captured[at] for at in group], kernels, options.repeats):
                yield {"length": length, "preset": options.preset, **row}


def group_rows(calls: list[Captured], kernels: Library, repeats: int) -> Iterator[dict]:
    """Captured layers that are measured together: each has an equal share of the time."""
    exact = [kernels.forward(c.q, c.k, c.v, c.config.exact()) for c in calls]
    lses = [lse for _, lse in exact]
    hardness = layers_hardness(calls, kernels, lses)
    jobs = {
        "exact_s": lambda: [kernels.forward(c.q, c.k, c.v, c.config.exact()) for c in calls],
        "hardness_s": lambda: layers_hardness(calls, kernels, lses),
    }
    runs = [{name: seconds(job, calls[0].q.device) / len(calls) for name, job in jobs.items()} for _ in range(repeats)]
    times = {name: min(run[name] for run in runs) for name in jobs}
    for call, (o, lse), hard in zip(calls, exact, hardness, strict=True):
        ours = [kernels.forward(call.q, call.k, call.v, config) for config in seeds_of(call.config)]
        heads = head_rows([head_errors(found, o) for found, _ in ours], hard, lse, [found for _, found in ours])
        yield {"layer": call.layer, "together": len(calls), **times, "heads": heads}


def seconds(job: Callable[[], object], device: torch.device) -> float:
    """Of one run: until a GPU is done, by the wall clock; on the processor those of its threads."""
    if device.type == "cpu":
        start = time.process_time()
        job()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    job()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def table_row(row: dict) -> str:
    """A row in Markdown."""
    cells = [f"{row['length']:,}", str(row["layer"]), str(row["together"]), f"{row['exact_s']:.4f}", f"{row['hardness_s']:.4f}"]
    cells.append(f"{row['hardness_s'] / row['exact_s']:.2f}x")
    for name, worst in SHOWN.items():
        values = [head[name] for head in row["heads"]]
        cells.append(f"{fmean(values):.4g} ({worst(values):.4g})")
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
