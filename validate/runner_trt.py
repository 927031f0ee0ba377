"""The TensorRT runner: an engine with our plugin, fed from and answering into torch CUDA tensors without host copies."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from hyperattention.errors import EnvironmentFault
from hyperattention.export.plan import ExportPlan
from hyperattention.validate.provenance import Proof, engine_proof
from hyperattention.validate.runners import ModelRunner


class TensorRTRunner(ModelRunner):
    """Runs a serialised engine; the plugin library is registered before the engine is read.

    Raises EnvironmentFault on activation where TensorRT, the device, the plugin library or the engine cannot be used.
    """

    def __init__(self, plan: ExportPlan, engine: Path, library: Path, name: str) -> None:
        super().__init__(plan, name)
        self.path, self.library, self.planned = engine, library, len(plan.planned)
        self.backend = "TensorRT"

    def activate_impl(self) -> None:
        from hyperattention.export.engine import read_engine, tensor_dtype

        self.engine = read_engine(self.path, self.library)
        import tensorrt as trt  # pyright: ignore[reportMissingImports]

        self.backend = f"TensorRT {trt.__version__}"
        self.context = self.engine.create_execution_context()
        if self.context is None:
            raise EnvironmentFault(f"TensorRT could not make an execution context for {self.path.name}: not enough device memory?")
        self.stream = torch.cuda.Stream()
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        self.inputs = [n for n in names if self.engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        self.outputs = [n for n in names if n not in self.inputs]
        self.dtypes = {n: tensor_dtype(trt, self.engine.get_tensor_dtype(n)) for n in names}
        self.buffers: dict[str, Tensor] = {}
        self.runs = 0

    def infer_impl(self, feed_dict: Mapping[str, Tensor]) -> OrderedDict:
        held = {n: feed_dict[n].to("cuda", self.dtypes[n]).contiguous() for n in self.inputs}
        for name, value in held.items():
            if not self.context.set_input_shape(name, tuple(value.shape)):
                raise EnvironmentFault(f"the engine does not take {name} of shape {tuple(value.shape)}; its profile does not hold it")
            self.context.set_tensor_address(name, value.data_ptr())
        for name in self.outputs:
            shape = tuple(self.context.get_tensor_shape(name))
            if any(size < 0 for size in shape):
                raise EnvironmentFault(f"the engine does not know the shape of {name} from its inputs: {shape}")
            if name not in self.buffers or self.buffers[name].shape != shape:
                self.buffers[name] = torch.empty(shape, dtype=self.dtypes[name], device="cuda")
            self.context.set_tensor_address(name, self.buffers[name].data_ptr())
        torch.cuda.synchronize()
        start = time.perf_counter()
        if not self.context.execute_async_v3(self.stream.cuda_stream):
            raise EnvironmentFault(f"{self.path.name} failed to run; TensorRT's own message is above")
        self.stream.synchronize()
        self.inference_time = time.perf_counter() - start
        self.runs += 1
        return self._by_plan({name: self.buffers[name].clone() for name in self.outputs})

    def prove(self) -> Proof:
        from hyperattention.export.engine import layer_names

        return engine_proof(self.name, layer_names(self.engine), self.planned, self.runs)

    def deactivate_impl(self) -> None:
        del self.context, self.engine, self.stream, self.buffers, self.inputs, self.outputs, self.dtypes, self.runs
        torch.cuda.empty_cache()
