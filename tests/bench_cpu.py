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
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from onnx import TensorProto, helper

from hyperattention.config import DOMAIN, OP_TYPE, PRESETS, Config
from hyperattention.library import build_info, ort_library_path
from hyperattention.reference import attention

MICROSOFT = "com.microsoft"
TOLERANCE = 2e-4  # absolute, on outputs whose size is about 1
CHECKED_ROWS = 256


@dataclass(frozen=True)
class Problem:
    """Inputs q, k, v [1, heads, length, head_dim] and the two layouts that the ops take."""

    heads: int
    head_dim: int
    causal: bool
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray

    @classmethod
    def random(cls, length: int, heads: int, head_dim: int, causal: bool) -> "Problem":
        torch.manual_seed(length)
        return cls(heads, head_dim, causal, *(torch.randn(1, heads, length, head_dim).numpy() for _ in "qkv"))

    @property
    def length(self) -> int:
        return self.q.shape[2]

    def split(self) -> dict[str, np.ndarray]:
        return {"q": self.q, "k": self.k, "v": self.v}

    def packed(self) -> dict[str, np.ndarray]:
        return {name: np.ascontiguousarray(x.transpose(0, 2, 1, 3)).reshape(1, self.length, -1) for name, x in self.split().items()}

    def exact(self) -> torch.Tensor:
        q, k, v = (torch.from_numpy(x) for x in (self.q, self.k, self.v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)


@dataclass(frozen=True)
class Op:
    """One ONNX op: how its node looks, what it is fed, and whether it holds all logits at once; `preset` for ours."""

    name: str
    node: Callable[[Problem], dict]
    packed: bool
    quadratic: bool
    preset: str | None = None
    causal_only: bool = False

    def config(self, p: Problem) -> Config | None:
        return configured(self.preset, p) if self.preset else None

    def extra(self, p: Problem) -> dict[str, np.ndarray]:
        if self.name != "GroupQueryAttention":
            return {}
        return {"last": np.array([p.length - 1], np.int32), "total": np.array(p.length, np.int32)}

    def feed(self, p: Problem) -> dict[str, np.ndarray]:
        return {**(p.packed() if self.packed else p.split()), **self.extra(p)}

    def session(self, p: Problem, threads: int) -> ort.InferenceSession:
        feed, node = self.feed(p), self.node(p)
        types = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.int32): TensorProto.INT32}
        values = [helper.make_tensor_value_info(name, types[x.dtype], x.shape) for name, x in feed.items()]
        names = node.pop("inputs", [*feed])
        made = helper.make_node(node.pop("op"), names, node.pop("outputs", ["o"]), domain=node.pop("domain"), **node)
        graph = helper.make_graph([made], "one", values, [helper.make_tensor_value_info("o", TensorProto.FLOAT, None)])
        imports = [helper.make_opsetid("", 23), helper.make_opsetid(MICROSOFT, 1), helper.make_opsetid(DOMAIN, 1)]
        model = helper.make_model(graph, opset_imports=imports, ir_version=11)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle sessions must not slow the one timed
        options.register_custom_ops_library(str(ort_library_path()))
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def configured(preset: str, p: Problem) -> Config:
    return replace(PRESETS[preset], causal=int(p.causal))


def ours(preset: str) -> Op:
    def node(p: Problem) -> dict:
        return {"op": OP_TYPE, "domain": DOMAIN, **configured(preset, p).attributes()}

    return Op(f"HyperAttention {preset}", node, packed=False, quadratic=False, preset=preset)


OPS = [
    *(ours(preset) for preset in ("blocks", "paper", "exact")),
    Op(
        "GroupQueryAttention",
        lambda p: {
            "op": "GroupQueryAttention", "domain": MICROSOFT, "num_heads": p.heads, "kv_num_heads": p.heads,
            "inputs": ["q", "k", "v", "", "", "last", "total"], "outputs": ["o", "present_k", "present_v"],
        },
        packed=True,
        quadratic=False,
        causal_only=True,
    ),
    Op(
        "MultiHeadAttention",
        lambda p: {"op": "MultiHeadAttention", "domain": MICROSOFT, "num_heads": p.heads, "unidirectional": int(p.causal)},
        packed=True,
        quadratic=True,
    ),
    Op("Attention-23", lambda p: {"op": "Attention", "domain": "", "is_causal": int(p.causal)}, packed=False, quadratic=True),
]  # fmt: skip
BASELINES = {True: "GroupQueryAttention", False: "HyperAttention exact"}  # causal or not


class Runner:
    """A session with its inputs in place; a call runs it once and gives the output [1, heads, length, head_dim]."""

    def __init__(self, op: Op, p: Problem, threads: int) -> None:
        self.op, self.p = op, p
        self.session = op.session(p, threads)
        self.values = {name: ort.OrtValue.ortvalue_from_numpy(x) for name, x in op.feed(p).items()}
        self.seconds: list[float] = []

    def __call__(self) -> torch.Tensor:
        start = time.perf_counter()
        (value,) = self.session.run_with_ort_values(["o"], self.values)
        self.seconds.append(time.perf_counter() - start)
        o = torch.from_numpy(value.numpy())
        return o.view(1, self.p.length, self.p.heads, -1).transpose(1, 2) if self.op.packed else o

    def check(self, exact: torch.Tensor) -> float:
        """Largest deviation from what the op should give; SystemExit when that is too much."""
        o, p, config = self(), self.p, self.op.config(self.p)
        self.seconds.clear()
        if config is None or config.is_exact(p.length, p.length):
            deviation = (o - exact).abs().max().item()
        else:
            q, k, v = (torch.from_numpy(x) for x in (p.q, p.k, p.v))
            if config.selector == "blocks":  # the last rows as a chunk see the same keys
                q, o = q[:, :, -CHECKED_ROWS:], o[:, :, -CHECKED_ROWS:]
            else:  # a row's place in its node depends on all the others
                q, k, v, o = (x[:, :1] for x in (q, k, v, o))
            deviation = (o - attention(q, k, v, config).o).abs().max().item()
        if not deviation <= TOLERANCE:
            raise SystemExit(f"{self.op.name} at {p.length} is off by {deviation:.3g}; allowed is {TOLERANCE:.3g}: nothing was timed")
        return deviation


def free_memory() -> int:
    """Bytes that may be taken without swapping."""
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), "unknown")


def measure(length: int, arguments: argparse.Namespace) -> list[dict]:
    """One row per op at this length; ops that do not fit have no seconds but a reason."""
    p = Problem.random(length, arguments.heads, arguments.head_dim, not arguments.full)
    exact = p.exact()
    rows, runners = [], {}
    for op in OPS:
        if op.causal_only and arguments.full:
            continue
        row = {"op": op.name, "length": length}
        logits = 4 * arguments.heads * length**2
        if op.quadratic and 2 * logits > free_memory() / 2:
            row["left_out"] = f"its logits take {logits / 2**30:.0f} GiB or more"
        else:
            runners[op.name] = Runner(op, p, arguments.threads)
            row["deviation"] = runners[op.name].check(exact)
        rows.append(row)
    for _ in range(arguments.repeats):
        for runner in runners.values():
            runner()
    baseline = statistics.median(runners[BASELINES[p.causal]].seconds)
    for row in rows:
        if row["op"] in runners:
            seconds = runners[row["op"]].seconds
            row |= {"seconds": statistics.median(seconds), "all_seconds": seconds, "speedup": baseline / statistics.median(seconds)}
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
    machine = {"processor": processor(), "onnxruntime": ort.__version__, "build": build_info(ort_library_path())["build_id"]}
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
