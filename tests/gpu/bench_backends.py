"""The op inside its two runtimes, over torch tensors and torch's stream: a TensorRT engine and an ONNX Runtime session of one node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from engine_parts import ONNX_TYPES, Heads, Runner, build, op_model
from torch import Tensor

from hyperattention.config import Config
from hyperattention.library import ort_library_path, trt_library_path


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
        import tensorrt as trt  # pyright: ignore[reportMissingImports]

        from hyperattention.export.engine_plugin import register_plugin

        register_plugin(trt_library_path())
        shapes = tuple((1, heads.q, n, heads.dim) for n in (1, min(8192, longest), longest))
        model = op_model(config, torch.bfloat16, heads, lengths=False)
        self.engine = build(trt, trt.Logger(trt.Logger.ERROR), model, {name: shapes for name in "qkv"})
        self.runner = Runner(trt, self.engine)
        self.stream = self.runner.stream

    def bind(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.runner.bind(q=q, k=k, v=v)

    def launch(self) -> None:
        self.runner.launch()

    @property
    def output(self) -> Tensor:
        return self.runner.outputs["o"]

    def workspace(self) -> int | None:
        """Device memory that a context takes for the longest shape of the profile, bytes."""
        return int(self.engine.device_memory_size_v2)


class OrtBackend:
    """A session on ONNX Runtime's CUDA provider, inputs and output bound to torch's buffers. Raises ImportError without the provider."""

    def __init__(self, config: Config, heads: Heads, longest: int) -> None:
        import onnxruntime

        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise ImportError(f"ONNX Runtime {onnxruntime.__version__} has no CUDA provider")
        onnxruntime.preload_dlls()  # CUDA's and cuDNN's libraries of the installed wheels
        options, self.stream = onnxruntime.SessionOptions(), torch.cuda.Stream()
        options.register_custom_ops_library(str(ort_library_path()))
        provider = ("CUDAExecutionProvider", {"user_compute_stream": str(self.stream.cuda_stream)})
        model = op_model(config, torch.bfloat16, heads, lengths=False)
        self.session = onnxruntime.InferenceSession(model, options, providers=[provider])
        if self.session.get_providers()[0] != provider[0]:
            raise ImportError(f"ONNX Runtime's CUDA provider does not start; the session runs on {self.session.get_providers()}")
        self.run_options = onnxruntime.RunOptions()
        self.run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self.held: dict[str, Tensor] = {}

    def bind(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.binding = self.session.io_binding()
        self.held = {"q": q, "k": k, "v": v, "o": torch.full_like(q, float("nan"))}
        for name, tensor in self.held.items():
            bind = self.binding.bind_output if name == "o" else self.binding.bind_input
            bind(name, "cuda", 0, int(ONNX_TYPES[tensor.dtype]), tuple(tensor.shape), tensor.data_ptr())
        torch.cuda.synchronize()

    def launch(self) -> None:
        self.session.run_with_iobinding(self.binding, self.run_options)

    @property
    def output(self) -> Tensor:
        return self.held["o"]

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
