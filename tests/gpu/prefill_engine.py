"""One engine of the prefill benchmark: built, loaded, run, timed, and its time split between the plugin and the rest."""

from __future__ import annotations

import time
from pathlib import Path

import tensorrt as trt
import torch
from gpu_timing import median_ms
from prefill_split import split
from torch import Tensor

from hyperattention.export.engine import build_engine, layer_names, read_engine
from hyperattention.export.files import ENGINE
from hyperattention.export.plan import ExportPlan
from hyperattention.library import trt_library_path
from hyperattention.validate.bench_profile_cuda import launches_of
from hyperattention.validate.bench_runtimes import EngineRunner
from hyperattention.validate.provenance import engine_proof


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
        engine_proof(self.folder.name, layer_names(self.engine), len(self.plan.planned), 0)
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
        """One more run of `ids`, split by its launches (prefill_split.py). Costs least for the length that ran last.

        Raises EnvironmentFault where these are not those of the plugin's layers.
        """
        if self.runner.inputs["input_ids"].shape != ids.shape:
            self.logits(ids)
        return split(launches_of(self.runner.launch), [layer.mode for layer in self.plan.planned])
