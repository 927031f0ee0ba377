"""The engine: model.trt.onnx and the plugin library become model.engine, with timing.cache and build.log beside it.

TensorRT is imported inside the functions, so that the module loads where it is missing; `runtime_available` says so first.
"""

from __future__ import annotations

import json
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyperattention import requirements
from hyperattention.config import OP_TYPE
from hyperattention.errors import EnvironmentFault, UsageError
from hyperattention.export.bundle import Bundle
from hyperattention.export.engine_check import EngineHost, check_engine
from hyperattention.export.engine_log import BuildLog, Progress, Share, make_logger, make_monitor
from hyperattention.export.engine_plugin import register_plugin
from hyperattention.export.files import ENGINE, TWIN
from hyperattention.library import TRT_LIBRARY

if TYPE_CHECKING:
    import torch

    from hyperattention.export.plan import ExportPlan

CACHE_FILE, LOG_FILE = "timing.cache", "build.log"


@dataclass(frozen=True)
class EngineInfo:
    """What was built, and with what: bytes of model.engine, seconds, bytes of device memory for activations, layers by name."""

    tensorrt: str
    host: EngineHost
    seconds: float
    size: int
    device_memory: int
    layers: int
    plugin_layers: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The same as JSON values."""
        return asdict(self)


def runtime_available() -> str | None:
    """None where an engine can be built, else the reason in one line.

    The device is asked for first: TensorRT 10's builder ends the whole process where there is none.
    """
    import torch

    if not torch.cuda.is_available():
        return "no CUDA device (or a driver older than 580); an engine is built on the GPU it will run on"
    try:
        import tensorrt as trt  # pyright: ignore[reportMissingImports]
    except (ImportError, OSError) as error:
        return f"TensorRT's Python bindings cannot be imported: {error}; install hyperattention[tensorrt]"
    if int(trt.__version__.split(".")[0]) < 10:
        return f"TensorRT is {trt.__version__}; the plugin takes 10.6 or newer"
    return requirements.lacking("polygraphy")


def build_engine(
    folder: Path, plan: ExportPlan, library: Path, progress: Progress = lambda text: None, workspace: int | None = None
) -> EngineInfo:
    """Builds `folder`/model.engine from model.trt.onnx: strongly typed, one profile of plan.inputs over plan.dims.

    A timing.cache that lies in `folder` is used and extended. `workspace` limits the builder's scratch, in bytes (None: all of
    the device's memory). Raises EnvironmentFault where TensorRT, the device or the library cannot be used, and BuildFailed,
    with TensorRT's last errors, where the model cannot be parsed or built; build.log is written in any case.
    """
    reason = runtime_available()
    if reason is not None:
        raise EnvironmentFault(reason)
    import tensorrt as trt  # pyright: ignore[reportMissingImports]

    log = BuildLog(folder / LOG_FILE, folder, library.parent)
    logger, share = make_logger(trt, log), Share(progress)
    register_plugin(library)
    start = time.perf_counter()
    # In a thread of its own, so that Ctrl-C is raised here and never inside TensorRT's frames.
    with ThreadPoolExecutor(1) as pool:
        building = pool.submit(_build, trt, logger, log, share, folder, plan, workspace)
        try:
            data = building.result()
        except KeyboardInterrupt:
            share.cancelled = True
            raise
    (folder / ENGINE).write_bytes(data)
    seconds = time.perf_counter() - start
    engine = read_engine(folder / ENGINE, library, logger)
    return EngineInfo(
        tensorrt=trt.__version__,
        host=EngineHost.here(library),
        seconds=round(seconds, 1),
        size=len(data),
        device_memory=_device_memory(engine),
        layers=engine.num_layers,
        plugin_layers=tuple(layer_names(engine)),
    )


def load_engine(folder: Path, logger: Any = None) -> Any:
    """The deserialised `trt.ICudaEngine` of an output folder, wherever it was moved to, with its own plugin library registered.

    Warns (RuntimeWarning) where it was built on another GPU or with a newer driver. Raises UsageError where the folder holds no
    engine, and EnvironmentFault with a table of what it was built with, what is found here and what to do where it cannot run.
    """
    bundle = Bundle.open(folder)
    for warning in check_engine(bundle):
        warnings.warn(warning, RuntimeWarning, stacklevel=2)
    if bundle.engine is None or bundle.trt_library is None:
        raise UsageError(f"{folder} lacks {ENGINE} or {TRT_LIBRARY}; run export-model again")
    return read_engine(bundle.engine, bundle.trt_library, logger)


def read_engine(path: Path, library: Path, logger: Any = None) -> Any:
    """The deserialised `trt.ICudaEngine`, with the plugin registered. Raises EnvironmentFault where it cannot be used here."""
    reason = runtime_available()
    if reason is not None:
        raise EnvironmentFault(reason)
    import tensorrt as trt  # pyright: ignore[reportMissingImports]

    register_plugin(library)
    runtime = trt.Runtime(logger or trt.Logger(trt.Logger.WARNING))
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise EnvironmentFault(
            f"TensorRT {trt.__version__} cannot read {path.name}; an engine runs only with the TensorRT release and on the kind of "
            f"GPU that built it: build it again here"
        )
    return engine


def tensor_dtype(trt: Any, dtype: Any) -> torch.dtype:
    """torch's dtype of one of TensorRT's. Raises EnvironmentFault for a type that no tensor of ours has."""
    import torch

    table = {
        trt.float32: torch.float32,
        trt.float16: torch.float16,
        trt.bfloat16: torch.bfloat16,
        trt.int32: torch.int32,
        trt.int64: torch.int64,
        trt.bool: torch.bool,
    }
    if dtype not in table:
        raise EnvironmentFault(f"the engine has a tensor of type {dtype}, which is not carried; export the model again")
    return table[dtype]


def layer_names(engine: Any) -> list[str]:
    """Names of the engine's HyperAttention layers, from its inspector: the proof of what runs.

    Raises EnvironmentFault where the engine was built without the detail that this needs.
    """
    import tensorrt as trt  # pyright: ignore[reportMissingImports]

    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    layers = json.loads(text).get("Layers", [])
    if any(isinstance(layer, str) for layer in layers):
        raise EnvironmentFault("the engine holds only its layers' names; build it with profiling verbosity DETAILED to prove what runs")
    # The name is found in the layer's plugin type, and in the metadata that our plugin gives.
    plugins = (layer for layer in layers if "PluginType" in layer or "Plugin" in layer.get("LayerType", ""))
    return [layer["Name"] for layer in plugins if OP_TYPE in json.dumps(layer)]


def _build(trt: Any, logger: Any, log: BuildLog, share: Share, folder: Path, plan: ExportPlan, workspace: int | None) -> bytes:
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    # The parser lives as long as the network, which may point into its copy of the weights.
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(folder / TWIN)):
        for i in range(parser.num_errors):
            error = parser.get_error(i)
            log.write("ERROR", f"{error.node_name() or 'the model'} ({error.node_operator() or 'no node'}): {error.desc()}")
        raise log.failure(f"TensorRT {trt.__version__} cannot parse {TWIN}")
    return _serialise(trt, builder, network, log, share, folder / CACHE_FILE, plan, workspace)


def _serialise(
    trt: Any, builder: Any, network: Any, log: BuildLog, share: Share, cache: Path, plan: ExportPlan, workspace: int | None
) -> bytes:
    from polygraphy.backend.trt import CreateConfig, EngineBytesFromNetwork, Profile
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    profile = Profile()
    for entry in plan.inputs:
        profile.add(entry.name, *plan.shapes(entry))
    config = CreateConfig(
        profiles=[profile],
        load_timing_cache=str(cache) if cache.is_file() else None,
        profiling_verbosity=trt.ProfilingVerbosity.DETAILED,
        memory_pool_limits={trt.MemoryPoolType.WORKSPACE: workspace} if workspace else None,
        progress_monitor=make_monitor(trt, share),
    )
    try:
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):  # silent: what it would print is in the build log
            return bytes(EngineBytesFromNetwork((builder, network), config, save_timing_cache=str(cache))())
    except PolygraphyException as error:
        if not log.errors:
            log.write("ERROR", str(error).strip().partition("\n")[0])
        raise log.failure(f"TensorRT {trt.__version__} could not build the engine") from error
    finally:
        cache.with_name(cache.name + ".lock").unlink(missing_ok=True)


def _device_memory(engine: Any) -> int:
    # 10.1 widened the property and renamed it; the old name goes away.
    return int(engine.device_memory_size_v2 if hasattr(engine, "device_memory_size_v2") else engine.device_memory_size)
