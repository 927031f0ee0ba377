"""One-node models inside their runtimes, over torch tensors by pointer: an ONNX Runtime session and a TensorRT engine.

`bind` sets the problem and `launch` runs it: at once on the processor, enqueued on `stream` on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hyperattention.export.engine import tensor_dtype
from hyperattention.library import ort_library_path, trt_library_path
from hyperattention.validate.ort_session import ONNX_TYPES


class OrtNode:
    """A session of `model` on "cpu" or "cuda", our library registered. Raises ImportError where ONNX Runtime or its provider is missing.

    `threads` (CPU): 0 = all. Idle sessions do not spin, so that they do not slow the one that is timed.
    """

    def __init__(self, model: bytes, device: str, threads: int = 0) -> None:
        import onnxruntime

        options, self.device, self.stream = onnxruntime.SessionOptions(), device, None
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.register_custom_ops_library(str(ort_library_path()))
        provider: Any = "CPUExecutionProvider"
        self.run_options = onnxruntime.RunOptions()
        if device == "cuda":
            if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
                raise ImportError(f"ONNX Runtime {onnxruntime.__version__} has no CUDA provider")
            onnxruntime.preload_dlls()  # CUDA's and cuDNN's libraries of the installed wheels
            self.stream = torch.cuda.Stream()
            provider = ("CUDAExecutionProvider", {"user_compute_stream": str(self.stream.cuda_stream)})
            self.run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self.session = onnxruntime.InferenceSession(model, options, providers=[provider])
        if device == "cuda" and self.session.get_providers()[0] != provider[0]:
            raise ImportError(f"ONNX Runtime's CUDA provider does not start; the session runs on {self.session.get_providers()}")
        self.held: dict[str, Tensor] = {}

    def bind(self, feed: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
        """Inputs and outputs by name, dense tensors on the device; holds them until the next call."""
        self.binding, self.held = self.session.io_binding(), {**feed, **outputs}
        for name, tensor in self.held.items():
            bind = self.binding.bind_output if name in outputs else self.binding.bind_input
            bind(name, self.device, 0, ONNX_TYPES[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
        if self.device == "cuda":
            torch.cuda.synchronize()

    def launch(self) -> None:
        """One run."""
        self.session.run_with_iobinding(self.binding, self.run_options)


class EngineNode:
    """An engine of `model` with our plugin; `profile` gives (min, opt, max) shapes by input. Raises ImportError without TensorRT."""

    def __init__(self, model: bytes, profile: dict[str, tuple]) -> None:
        import tensorrt as trt  # pyright: ignore[reportMissingImports]

        from hyperattention.export.engine_plugin import register_plugin

        register_plugin(trt_library_path())
        self.engine = build_engine(trt, trt.Logger(trt.Logger.ERROR), model, profile)
        self.runner = EngineRunner(trt, self.engine)
        self.stream = self.runner.stream

    def bind(self, feed: dict[str, Tensor]) -> None:
        """Inputs by name, dense tensors on the GPU."""
        self.runner.bind(**feed)

    def launch(self) -> None:
        """Enqueues one run."""
        self.runner.launch()


def build_engine(trt: Any, logger: Any, model: bytes, profile: dict[str, tuple], refit: bool = False) -> Any:
    """The engine of `model`, strongly typed; `profile` gives (min, opt, max) shapes. Raises RuntimeError with the parser's errors."""
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model):
        raise RuntimeError("; ".join(parser.get_error(i).desc() for i in range(parser.num_errors)))
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if refit:
        config.set_flag(trt.BuilderFlag.REFIT)
    shapes = builder.create_optimization_profile()
    for name, bounds in profile.items():
        shapes.set_shape(name, *bounds)
    config.add_optimization_profile(shapes)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError("TensorRT built no engine")
    return trt.Runtime(logger).deserialize_cuda_engine(plan)


class EngineRunner:
    """One execution context of an engine with a stream of its own; call it with CUDA tensors by input name."""

    def __init__(self, trt: Any, engine: Any) -> None:
        self.trt, self.engine = trt, engine
        self.context, self.stream = engine.create_execution_context(), torch.cuda.Stream()
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}

    def bind(self, **inputs: Tensor) -> None:
        """Sets shapes and addresses, and allocates the outputs; holds all of them until the next call."""
        self.inputs = inputs
        for name, tensor in inputs.items():
            if not self.context.set_input_shape(name, tuple(tensor.shape)):
                raise RuntimeError(f"the profile does not hold {name} of shape {tuple(tensor.shape)}")
            self.context.set_tensor_address(name, tensor.data_ptr())
        self.outputs = {}
        for i in range(self.engine.num_io_tensors):
            name = self.engine.get_tensor_name(i)
            if self.engine.get_tensor_mode(name) == self.trt.TensorIOMode.OUTPUT:
                shape, dtype = tuple(self.context.get_tensor_shape(name)), tensor_dtype(self.trt, self.engine.get_tensor_dtype(name))
                self.outputs[name] = torch.full(shape, float("nan"), dtype=dtype, device="cuda")
                self.context.set_tensor_address(name, self.outputs[name].data_ptr())
        torch.cuda.synchronize()

    def launch(self) -> None:
        """Enqueues one run on the stream."""
        if not self.context.execute_async_v3(self.stream.cuda_stream):
            raise RuntimeError("enqueue failed; the reason is in TensorRT's log")

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        self.bind(**inputs)
        self.launch()
        self.stream.synchronize()
        return self.outputs
