"""The op inside its two runtimes, over torch tensors and torch's stream: a TensorRT engine and an ONNX Runtime session of one node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from hyperattention.config import Config
from hyperattention.validate.bench_node import Heads, op_model
from hyperattention.validate.bench_runtimes import EngineNode, OrtNode


class Backend(Protocol):
    """`bind` sets the problem, `launch` enqueues it on `stream` and returns; `output` is then being written."""

    stream: torch.cuda.Stream

    def bind(self, q: Tensor, k: Tensor, v: Tensor) -> None: ...
    def launch(self) -> None: ...
    @property
    def output(self) -> Tensor: ...
    def workspace(self) -> int | None: ...


class TensorRTBackend:
    """An engine built for lengths up to `longest`. Raises ImportError without TensorRT."""

    def __init__(self, config: Config, heads: Heads, longest: int) -> None:
        shapes = tuple((1, heads.q, n, heads.dim) for n in (1, min(8192, longest), longest))
        self.node = EngineNode(op_model(config, torch.bfloat16, heads, lengths=False), {name: shapes for name in "qkv"})
        self.stream, self.launch = self.node.stream, self.node.launch

    def bind(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.node.bind({"q": q, "k": k, "v": v})

    @property
    def output(self) -> Tensor:
        return self.node.runner.outputs["o"]

    def workspace(self) -> int | None:
        """Device memory that a context takes for the longest shape of the profile, bytes."""
        return int(self.node.engine.device_memory_size_v2)


class OrtBackend:
    """A session on ONNX Runtime's CUDA provider, inputs and output bound to torch's buffers. Raises ImportError without the provider."""

    def __init__(self, config: Config, heads: Heads, longest: int) -> None:
        self.node = OrtNode(op_model(config, torch.bfloat16, heads, lengths=False), "cuda")
        assert self.node.stream is not None
        self.stream, self.launch = self.node.stream, self.node.launch

    def bind(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.node.bind({"q": q, "k": k, "v": v}, {"o": torch.full_like(q, float("nan"))})

    @property
    def output(self) -> Tensor:
        return self.node.held["o"]

    def workspace(self) -> int | None:
        """Unknown: the scratch comes from ONNX Runtime's arena."""
        return None


MAKERS: dict[str, Callable[[Config, Heads, int], Backend]] = {"plugin": TensorRTBackend, "ort": OrtBackend}


def make_backends(config: Config, heads: Heads, longest: int) -> tuple[dict[str, Any], dict[str, str], dict[str, str]]:
    """The backends by column name; of those that are not installed what they lack; of those that refused to start, why."""
    found: dict[str, Any] = {}
    missing: dict[str, str] = {}
    failed: dict[str, str] = {}
    for name, make in MAKERS.items():
        try:
            found[name] = make(config, heads, longest)
        except ImportError as error:
            missing[name] = str(error)
        except Exception as error:  # the other columns are still worth their time
            failed[name] = f"{type(error).__name__}: {error}"[:300]
    return found, missing, failed
