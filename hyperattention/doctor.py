"""What this machine has of what the tool needs, and how to mend the rest: `hyperattention doctor`.

`collect` looks at each part by itself, so that one broken part never hides another; it changes nothing.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from ctypes import byref, c_int
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hyperattention import __version__, requirements
from hyperattention.config import DOMAIN, OP_TYPE
from hyperattention.errors import EnvironmentFault
from hyperattention.library import ABI_VERSION, ORT_LIBRARY, TRT_LIBRARY, build_info, ort_library_path, trt_library_path

OK, MISSING, MISMATCH = "ok", "missing", "mismatch"
OLDEST_DRIVER = 580  # CUDA 13
_INSTALL_TENSORRT = "pip install tensorrt (NVIDIA's own index has its libraries), 10.6 or newer"
_SOURCE_SUFFIXES = {".h", ".cuh", ".cpp", ".cu", ".inl"}


@dataclass(frozen=True)
class Check:
    """One part: what was found and, unless `status` is "ok", how to mend it. `required`: the CPU path needs it."""

    name: str
    status: str
    found: str
    mend: str = ""
    required: bool = False


def collect() -> list[Check]:
    """Every check, in the order in which the parts build on each other."""
    return [
        check_python(),
        check_driver(*find_driver()),
        check_torch(),
        check_onnxruntime(),
        check_polygraphy(),
        check_tensorrt(),
        check_nvcc(),
        check_library(ORT_LIBRARY, ort_library_path, required=True),
        check_ort_op(),
        check_library(TRT_LIBRARY, trt_library_path, required=False),
        check_trt_plugin(),
    ]


def check_python() -> Check:
    """The interpreter."""
    ok = sys.version_info >= (3, 11)
    return Check("Python", OK if ok else MISMATCH, platform.python_version(), "" if ok else "use Python 3.11 or newer", required=True)


def find_driver() -> tuple[str, str]:
    """Driver version and device names; empty where there is none."""
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
        lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip().splitlines()
        rows = [[part.strip() for part in line.split(",", 1)] for line in lines if re.match(r"\d+\.", line)]
        if rows:
            return rows[0][0], ", ".join(sorted({row[1] for row in rows}))
    version = _read("/proc/driver/nvidia/version")
    match = re.search(r"Kernel Module.*?\s(\d+\.\d+(\.\d+)?)\s", version)
    return (match.group(1) if match else ""), _cuda_device_name()


def _cuda_device_name() -> str:
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ""
    device, name = c_int(), ctypes.create_string_buffer(128)
    if cuda.cuInit(0) or cuda.cuDeviceGet(byref(device), 0) or cuda.cuDeviceGetName(name, 128, device):
        return ""
    return name.value.decode(errors="replace")


def check_driver(version: str, devices: str) -> Check:
    """NVIDIA's driver: 580 or newer for CUDA 13."""
    mend = f"install NVIDIA driver {OLDEST_DRIVER} or newer"
    if not version and not devices:
        return Check("NVIDIA driver", MISSING, "no driver, no CUDA device", f"with an NVIDIA GPU, {mend}; the CPU path needs none")
    found = f"{version or 'unknown version'}, {devices or 'no device'}"
    if version and int(version.split(".")[0]) < OLDEST_DRIVER:
        return Check("NVIDIA driver", MISMATCH, f"{found}: too old for CUDA 13", mend)
    if not devices:
        return Check("NVIDIA driver", MISSING, found, "no device answers: check that this user or container may use the GPU")
    return Check("NVIDIA driver", OK, found)


def check_torch() -> Check:
    """PyTorch and the CUDA runtime it was built for."""
    try:
        import torch
    except ImportError as error:
        return Check("PyTorch", MISSING, str(error), "pip install torch", required=True)
    runtime = f"CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    return Check("PyTorch", OK, f"{torch.__version__}, {runtime}, {device}", required=True)


def check_onnxruntime() -> Check:
    """ONNX Runtime and its execution providers."""
    try:
        import onnxruntime
    except ImportError as error:
        return Check("ONNX Runtime", MISSING, str(error), "pip install onnxruntime-gpu", required=True)
    providers = ", ".join(p.removesuffix("ExecutionProvider") for p in onnxruntime.get_available_providers())
    return Check("ONNX Runtime", OK, f"{onnxruntime.__version__}: {providers}", required=True)


def check_polygraphy() -> Check:
    """Polygraphy, which builds engines and judges the outputs of backends."""
    if requirements.lacking("polygraphy"):
        return Check("Polygraphy", MISSING, "not installed", requirements.install("polygraphy"), required=True)
    return Check("Polygraphy", OK, metadata.version("polygraphy"), required=True)


def check_tensorrt() -> Check:
    """TensorRT's Python package; an engine cannot be built without it."""
    mend = f"{_INSTALL_TENSORRT}; without it everything but the engine is made"
    try:
        import tensorrt  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        return Check("TensorRT", MISSING, str(error), mend)
    version = str(tensorrt.__version__)
    if tuple(int(n) for n in version.split(".")[:2]) < (10, 6):
        return Check("TensorRT", MISMATCH, f"{version}; the plugin needs 10.6 or newer", mend)
    return Check("TensorRT", OK, version)


def find_nvcc() -> Path | None:
    """The CUDA compiler: what the build fetched, `CUDA_HOME`'s or the one on the PATH."""
    root = source_root()
    places = [root / ".deps/cuda/nvidia/cu13/bin/nvcc"] if root else []
    places += [Path(os.environ["CUDA_HOME"]) / "bin/nvcc"] if "CUDA_HOME" in os.environ else []
    places += [Path(p) for p in [shutil.which("nvcc")] if p]
    return next((p for p in places if p.is_file()), None)


def check_nvcc() -> Check:
    """The CUDA compiler; only a build from source needs it."""
    found = find_nvcc()
    if found is None:
        return Check("nvcc", MISSING, "no CUDA compiler", "only a build from source needs it: `make native` fetches nvcc 13.0")
    text = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout
    match = re.search(r"release (\d+)\.(\d+)", text)
    if match is None or int(match.group(1)) < 13:
        return Check("nvcc", MISMATCH, match.group(0) if match else "does not run", "use CUDA 13.0 or newer; `make native` fetches it")
    return Check("nvcc", OK, match.group(0))


def source_root() -> Path | None:
    """The checkout that this package runs from, or None when it is installed."""
    root = Path(__file__).resolve().parent.parent
    return root if (root / "plugins" / "attention.h").is_file() else None


def sources_id(root: Path) -> str:
    """The build id that a library built from the sources under `root` carries (cmake/BuildId.cmake)."""
    paths = sorted(p.relative_to(root).as_posix() for p in (root / "plugins").rglob("*") if p.suffix in _SOURCE_SUFFIXES)
    listing = "".join(f"{hashlib.sha256((root / p).read_bytes()).hexdigest()}  {p}\n" for p in paths)
    return hashlib.sha256(listing.encode()).hexdigest()[:16]


def check_library(name: str, find, required: bool) -> Check:
    """A native library: there, of this version, and built from the sources beside it."""
    try:
        path = find()
        info = build_info(path)
    except EnvironmentFault as fault:
        return Check(name, MISSING, str(fault).split(";")[0], "run `make native`; it says which SDK is missing, if any", required)
    shown = Path(os.path.relpath(path)) if path.is_relative_to(Path.cwd()) else path
    kernels = f"{' and '.join(info['backends'])} kernels for {', '.join(info['architectures'])}"
    found = f"{shown}, {info['version']}, build {info['build_id']}, {kernels}"
    mend = "rebuild it: `make native`"
    if info["version"] != __version__ or info["abi"] != ABI_VERSION:
        return Check(name, MISMATCH, f"{found}; this package is {__version__}, interface {ABI_VERSION}", mend, required)
    root = source_root()
    if root and info["build_id"] != sources_id(root):
        return Check(name, MISMATCH, f"{found}; the sources beside it are {sources_id(root)}", mend, required)
    return Check(name, OK, found, "", required)


def check_ort_op() -> Check:
    """Whether ONNX Runtime takes the op from our library: a session with one node."""
    name = "op in ONNX Runtime"
    try:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.register_custom_ops_library(str(ort_library_path()))
        onnxruntime.InferenceSession(_one_node(), options, providers=["CPUExecutionProvider"])
    except EnvironmentFault:
        return Check(name, MISSING, f"{ORT_LIBRARY} is not built", "run `make native`", required=True)
    except ImportError as error:
        return Check(name, MISSING, str(error), "pip install onnxruntime-gpu", required=True)
    except Exception as error:  # ONNX Runtime's own exceptions have no common base
        return Check(name, MISMATCH, str(error).splitlines()[0], "rebuild the library: `make native`", required=True)
    return Check(name, OK, f"{DOMAIN}::{OP_TYPE} loads", required=True)


def _one_node() -> bytes:
    from onnx import TensorProto, helper

    shape = [1, 1, 8, 16]
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in "QKV"]
    node = helper.make_node(OP_TYPE, ["Q", "K", "V"], ["O"], domain=DOMAIN)
    graph = helper.make_graph([node], "check", inputs, [helper.make_tensor_value_info("O", TensorProto.FLOAT, shape)])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def check_trt_plugin() -> Check:
    """Whether TensorRT's registry takes the plugin from our library. In a process of its own: loading cannot be undone."""
    name = "plugin in TensorRT"
    try:
        path = trt_library_path()
    except EnvironmentFault:
        return Check(name, MISSING, f"{TRT_LIBRARY} is not built", "run `make native`")
    code = (
        "import sys, tensorrt as trt; r = trt.get_plugin_registry(); "
        f"r.load_library(sys.argv[1]); sys.exit(0 if r.get_creator({OP_TYPE!r}, '1', {DOMAIN!r}) else 'no creator')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return Check(name, OK, f"{DOMAIN}::{OP_TYPE} version 1 is registered")
    reason = (done.stderr.strip().splitlines() or [f"the process ended with {done.returncode}"])[-1]
    if "tensorrt" in reason and "Module" in reason:
        return Check(name, MISSING, "not tried: TensorRT is not installed", _INSTALL_TENSORRT)
    return Check(name, MISMATCH, reason, "rebuild the library: `make native`")


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def render(checks: list[Check], console: Console) -> None:
    """The checks as a table, and below it what to do."""
    colour = {OK: "green", MISSING: "yellow", MISMATCH: "red"}
    table = Table("part", "state", "found")
    for check in checks:
        table.add_row(check.name, f"[{colour[check.status]}]{check.status}[/]", escape(check.found))
    console.print(table)
    for check in checks:
        if check.mend:
            console.print(f"[bold]{check.name}[/]: {escape(check.mend)}", highlight=False)


def to_json(checks: list[Check]) -> list[dict[str, Any]]:
    """The checks as JSON values."""
    return [asdict(check) for check in checks]


def exit_code(checks: list[Check]) -> int:
    """0 when all that the CPU path needs is there and nothing contradicts, else 3."""
    broken = any(c.status == MISMATCH or (c.required and c.status != OK) for c in checks)
    return EnvironmentFault.exit_code if broken else 0
