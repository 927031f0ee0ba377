"""One engine of the prefill benchmark: built, loaded, run, timed, and its time split between the plugin and the rest."""

from __future__ import annotations

import time
from pathlib import Path

import tensorrt as trt
import torch
from gpu_timing import median_ms
from prefill_split import split
from torch import Tensor

from hyperattention.errors import EnvironmentFault
from hyperattention.export.engine import build_engine, layer_names, read_engine
from hyperattention.export.files import ENGINE
from hyperattention.export.plan import ExportPlan
from hyperattention.library import trt_library_path
from hyperattention.validate.bench_profile_cuda import launches_of
from hyperattention.validate.bench_runtimes import EngineRunner
from hyperattention.validate.provenance import engine_proof


class LayerTimes(trt.IProfiler):
    """Milliseconds by layer, of one run."""

    def __init__(self) -> None:
        trt.IProfiler.__init__(self)
        self.ms: dict[str, float] = {}

    def report_layer_time(self, layer_name: str, ms: float) -> None:
        self.ms[layer_name] = self.ms.get(layer_name, 0.0) + ms


class PrefillEngine:
    """The engine of `folder`/model.trt.onnx while inside, a context manager; `build` holds what it took.

    A timing.cache in `folder` is used and extended; the engine's file, of gigabytes, is removed. Raises BuildFailed where TensorRT
    cannot build it, EnvironmentFault where it holds other plugin layers than the plan.
    """

    def __init__(self, folder: Path, plan: ExportPlan) -> None:
        self.folder, self.plan = folder, plan

    def __enter__(self) -> "PrefillEngine":
        torch.cuda.empty_cache()  # the builder takes what the device has left
        info = build_engine(self.folder, self.plan, trt_library_path())
        start = time.perf_counter()
        self.engine = read_engine(self.folder / ENGINE, trt_library_path())
        (self.folder / ENGINE).unlink()
        self.plugin_layers = layer_names(self.engine)  # in the order of the model's
        engine_proof(self.folder.name, self.plugin_layers, len(self.plan.planned), 0)
        self.runner = EngineRunner(trt, self.engine)
        self.build = {
            "build_seconds": info.seconds,
            "load_seconds": round(time.perf_counter() - start, 1),
            "engine_bytes": info.size,
            "device_memory": info.device_memory,
            "tensorrt": info.tensorrt,
        }
        return self

    def __exit__(self, *_: object) -> None:
        for name in ("runner", "engine"):
            self.__dict__.pop(name, None)
        torch.cuda.empty_cache()

    def logits(self, ids: Tensor) -> Tensor:
        """The last token's logits, fp32 [vocabulary], of `ids` int64 [1, S] on the GPU."""
        lengths = torch.tensor([ids.shape[1]], dtype=torch.int32, device="cuda")
        return self.runner(input_ids=ids, lengths=lengths)["logits"].float().flatten()

    def time(self, budget_ms: float) -> float:
        """Median milliseconds of a run of what `logits` had last, whose run was the warm-up: one takes up to ten seconds."""
        with torch.cuda.stream(self.runner.stream):
            return median_ms(self.runner.launch, budget_ms, warm_ups=0)

    def split(self, ids: Tensor) -> dict[str, float]:
        """One more run of `ids`, split by its launches (prefill_split.py). Costs least for the length that ran last."""
        self._bind(ids)
        return split(launches_of(self.runner.launch), [layer.mode for layer in self.plan.planned])

    def split_by_layers(self, ids: Tensor) -> dict[str, float]:
        """The same by TensorRT's own profiler, which stays on and under which a run takes 4 to 22 % longer.

        Raises EnvironmentFault where the profiler does not know the plugin's layers.
        """
        self._bind(ids)
        self.runner.context.profiler = profiler = LayerTimes()
        self.runner.launch()
        self.runner.stream.synchronize()
        found = profiler.ms
        missing = [name for name in self.plugin_layers if name not in found]
        if missing:
            raise EnvironmentFault(f"TensorRT's profiler names no {missing[0]}; it names {', '.join(found)}"[:1000])
        sums = {"approximate": 0.0, "exact": 0.0}
        for name, layer in zip(self.plugin_layers, self.plan.planned, strict=True):
            sums[layer.mode] += found[name]
        parts = {f"{mode}_ms": value for mode, value in sums.items()}
        return {"plugin_ms": sum(sums.values()), **parts, "profiled_ms": sum(found.values())}

    def _bind(self, ids: Tensor) -> None:
        if self.runner.inputs["input_ids"].shape != ids.shape:
            self.logits(ids)
