"""`bench --attention`: the op alone on random Q, K, V, against every exact implementation that is installed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hyperattention.config import MOST_HEAD_DIM, PRESETS, Config
from hyperattention.errors import UsageError
from hyperattention.export.shape_options import MAX_BATCH
from hyperattention.export.source import torch_dtype
from hyperattention.library import load_cpu, load_cuda
from hyperattention.validate.bench_node import RIVAL_NODES, Heads, RivalNode, op_model
from hyperattention.validate.bench_rivals import RIVALS, Rival, refuse_quadratic
from hyperattention.validate.bench_runtimes import EngineNode, OrtNode
from hyperattention.validate.bench_timing import Call, Contender, CudaClock, LeftOut, Run, WallClock, clock_for

BACKENDS = ("library", "ort", "tensorrt")
OURS_EXACT = "ours-exact"
_MOST_HEADS = 4096
_MOST_KEPT = 2**24  # numbers of an output that are compared
# Relative L2 distance of two right exact outputs is far below these, of a wrong mask or head far above.
TOLERANCE = {"fp32": 1e-3, "fp16": 1e-2, "bf16": 4e-2}


@dataclass(frozen=True)
class Problem:
    """Self-attention over `length` tokens: Q [batch, heads, length, head_dim], K and V [batch, kv_heads, length, head_dim], normal."""

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    causal: bool
    device: str
    seed: int = 0

    def __post_init__(self) -> None:
        for name, most in (("batch", MAX_BATCH), ("heads", _MOST_HEADS), ("kv_heads", _MOST_HEADS), ("head_dim", MOST_HEAD_DIM)):
            if not 1 <= getattr(self, name) <= most:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it takes 1 to {most}")
        if self.heads % self.kv_heads:
            raise UsageError(f"--heads {self.heads} is not a multiple of --kv-heads {self.kv_heads}; give a number that divides it")

    @property
    def sizes(self) -> Heads:
        return Heads(self.heads, self.kv_heads, self.head_dim, self.head_dim)

    def text(self, head_dims: str = "") -> str:
        """One line; `head_dims` where there are several."""
        grouped = f" over {self.kv_heads}" if self.kv_heads != self.heads else ""
        sizes = f"head size {head_dims or self.head_dim}, {self.dtype}, {'causal' if self.causal else 'full'}"
        return f"Attention alone, batch {self.batch}, {self.heads} heads{grouped}, {sizes}"

    def inputs(self, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v for this length: the same for every contender and every run."""
        generator = torch.Generator(device=self.device).manual_seed(self.seed + length)

        def draw(heads: int) -> Tensor:
            made = torch.randn(self.batch, heads, length, self.head_dim, generator=generator, device=self.device)
            return made.to(torch_dtype(self.dtype))

        return draw(self.heads), draw(self.kv_heads), draw(self.kv_heads)


@dataclass
class Inputs:
    """The tensors of one length at a time, shared by the contenders."""

    problem: Problem
    length: int = 0
    tensors: tuple[Tensor, ...] = field(default_factory=tuple)

    def at(self, length: int) -> tuple[Tensor, Tensor, Tensor]:
        if length != self.length:
            self.tensors = ()
            self.tensors, self.length = self.problem.inputs(length), length
        q, k, v = self.tensors
        return q, k, v


@dataclass
class Ours:
    """The op with `config`, run by the kernels directly, by ONNX Runtime or by a TensorRT engine for lengths up to `longest`."""

    name: str
    title: str
    exact: bool
    config: Config
    backend: str
    inputs: Inputs
    clock: WallClock | CudaClock
    longest: int
    threads: int
    ours: bool = True
    engine: EngineNode | None = None

    @property
    def quadratic(self) -> bool:
        return self.exact

    @property
    def memory(self) -> str:
        cuda = self.inputs.problem.device == "cuda"
        return "process" if not cuda else "torch" if self.backend == "library" else "device"

    def prepare(self, length: int) -> Run:
        q, k, v = self.inputs.at(length)
        if self.backend == "library":
            library = load_cuda() if q.is_cuda else load_cpu()
            return Call(self.clock, lambda: library.forward(q, k, v, self.config, None, self.threads)[0])
        return self._engine(q, k, v) if self.backend == "tensorrt" else self._session(q, k, v)

    def _session(self, q: Tensor, k: Tensor, v: Tensor) -> Run:
        problem = self.inputs.problem
        node = OrtNode(op_model(self.config, q.dtype, problem.sizes, lengths=False), problem.device, self.threads)
        node.bind({"q": q, "k": k, "v": v}, {"o": torch.empty_like(q)})
        return Call(self.clock, lambda: (node.launch(), node.held["o"])[1], node.stream)

    def _engine(self, q: Tensor, k: Tensor, v: Tensor) -> Run:
        problem = self.inputs.problem
        if self.engine is None:
            lengths = (1, min(8192, self.longest), self.longest)
            heads = {"q": problem.heads, "k": problem.kv_heads, "v": problem.kv_heads}
            profile = {name: tuple((problem.batch, h, n, problem.head_dim) for n in lengths) for name, h in heads.items()}
            self.engine = EngineNode(op_model(self.config, q.dtype, problem.sizes, lengths=False), profile)
        node = self.engine
        node.bind({"q": q, "k": k, "v": v})
        return Call(self.clock, lambda: (node.launch(), node.runner.outputs["o"])[1], node.stream, int(node.engine.device_memory_size_v2))


@dataclass
class TorchRival:
    """One exact implementation of bench_rivals.py."""

    name: str
    title: str
    rival: Rival
    inputs: Inputs
    clock: WallClock | CudaClock
    ours: bool = False
    exact: bool = True
    quadratic: bool = True

    @property
    def memory(self) -> str:
        return "torch" if self.inputs.problem.device == "cuda" else "process"

    def prepare(self, length: int) -> Run:
        q, k, v = self.inputs.at(length)
        if self.name == "sdpa-math":
            refuse_quadratic(q, self.inputs.problem.device)
        return Call(self.clock, torch.inference_mode()(self.rival(q, k, v, self.inputs.problem.causal)))


@dataclass
class OrtRival:
    """One of ONNX Runtime's exact attention ops, on the processor."""

    name: str
    title: str
    node: RivalNode
    inputs: Inputs
    clock: WallClock | CudaClock
    threads: int
    ours: bool = False
    exact: bool = True
    quadratic: bool = True
    memory: str = "process"

    def prepare(self, length: int) -> Run:
        problem = self.inputs.problem
        if self.node.causal_only and not problem.causal:
            raise ValueError(f"{self.node.name} is causal only")
        if self.node.equal_heads and problem.heads != problem.kv_heads:
            raise ValueError(f"{self.node.name} takes as many heads of keys as of queries")
        q, k, v = self.inputs.at(length)
        if self.node.quadratic:
            refuse_quadratic(q, problem.device)
        feed = self.node.feed_of(q, k, v)
        node = OrtNode(self.node.model(problem.sizes, problem.causal, feed), problem.device, self.threads)
        node.bind(feed, {"o": torch.empty_like(feed["q"])})
        return Call(self.clock, lambda: (node.launch(), self.node.split(node.held["o"], problem.sizes))[1])


ORT_NAMES = {"GroupQueryAttention": "ort-gqa", "MultiHeadAttention": "ort-mha", "Attention": "ort-attention"}


def rival_names() -> tuple[str, ...]:
    """Names that --rivals and --against take."""
    return (*RIVALS, *ORT_NAMES.values())


def contenders(
    problem: Problem, presets: dict[str, Config], backend: str, rivals: Sequence[str], longest: int, threads: int = 0
) -> tuple[list[Contender], list[LeftOut]]:
    """Ours with each preset and with the exact path, and the rivals named; and those that cannot run here at all, with the reason."""
    clock, inputs = clock_for(problem.device), Inputs(problem)
    causal = {name: replace(config, causal=int(problem.causal)) for name, config in presets.items()}
    causal.setdefault("exact", replace(PRESETS["exact"], causal=int(problem.causal)))
    found: list[Contender] = [
        Ours(
            f"ours-{name}",
            "HyperAttention, exact path" if name == "exact" else f"HyperAttention, {name}",
            name == "exact",
            config,
            backend,
            inputs,
            clock,
            longest,
            threads,
        )
        for name, config in causal.items()
    ]
    missing: list[LeftOut] = []
    for name in rivals:
        try:
            found.append(_rival(name, problem, inputs, clock, threads))
        except ImportError as error:
            missing.append(LeftOut(name, None, str(error)))
    return found, missing


def _rival(name: str, problem: Problem, inputs: Inputs, clock: WallClock | CudaClock, threads: int) -> Contender:
    if name in RIVALS:
        title, make, devices = RIVALS[name]
        if problem.device not in devices:
            raise ImportError(f"it runs on {' and '.join(devices)} only; this is {problem.device}")
        return TorchRival(name, title, make(), inputs, clock)
    node = next(node for node in RIVAL_NODES if ORT_NAMES[node.name] == name)
    if problem.device != "cpu":
        raise ImportError("it is timed on the processor only, where PyTorch has no fast kernel")
    return OrtRival(name, f"ONNX Runtime {node.name}", node, inputs, clock, threads)


def check_backend(backend: str, device: str) -> None:
    """Raises UsageError for a backend that is unknown or not of this device."""
    if backend not in BACKENDS:
        raise UsageError(f"--backend is {backend!r}; with --attention it takes one of {', '.join(BACKENDS)}")
    if backend == "tensorrt" and device != "cuda":
        raise UsageError("--backend tensorrt runs on cuda alone; give --device cuda on a machine with a GPU, or another --backend")


@dataclass(frozen=True)
class Kept:
    """Of an output [batch, heads, length, head_dim]: whether all of it is finite, and evenly spaced rows of it."""

    finite: bool
    rows: Tensor


@dataclass(frozen=True)
class OutputCheck:
    """Exact outputs have to agree (with the first rival, or ours where there is none), all have to be finite."""

    problem: Problem

    def keep(self, output: Tensor) -> Kept:
        """Every row of a short output, else as many as make 16 million numbers."""
        step = -(-output.numel() // _MOST_KEPT)
        return Kept(bool(output.isfinite().all()), output[:, :, ::step].float())

    def wrong(self, kept: dict[str, Kept]) -> dict[str, str]:
        """What is wrong by contender."""
        wrong = {name: "its output is not finite" for name, found in kept.items() if not found.finite}
        exact = {name: found.rows for name, found in kept.items() if name not in wrong and not _approximate(name)}
        if not exact:
            return wrong
        first = min(exact, key=lambda name: name == OURS_EXACT)
        wanted, allowed = exact[first], TOLERANCE[self.problem.dtype]
        for name, rows in exact.items():
            distance = float(torch.linalg.vector_norm(rows - wanted) / torch.linalg.vector_norm(wanted))
            if not distance <= allowed:
                wrong[name] = f"its output differs from {first}'s by {distance:.2g} (relative L2), allowed is {allowed:g}"
        return wrong


def _approximate(name: str) -> bool:
    return name.startswith("ours-") and name != OURS_EXACT
