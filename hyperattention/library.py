"""Finds the two native libraries, and mirrors their C structs (plugins/attention.h) for ctypes. Needs no torch.

`load_cpu` and `load_cuda` give the kernels as functions over torch tensors (hyperattention/native.py).
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
from ctypes import c_char_p, c_float, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyperattention.config import Config
from hyperattention.errors import EnvironmentFault

if TYPE_CHECKING:
    from hyperattention.native import Library

ABI_VERSION = 4
ORT_LIBRARY = "libhyperattention_ort.so"
TRT_LIBRARY = "libhyperattention_trt.so"
SELECTOR_CODES = {"blocks": 0, "sortlsh": 1}


class HaAttributes(ctypes.Structure):
    """`HaAttributes` of plugins/attention.h: Config's fields in the same order, the selector as its code."""

    _fields_ = [
        (name, c_float if name == "scale" else c_int32)
        for name in (
            "causal scale selector block_size num_blocks pool_size sample_size stratified "
            "local_size local_overlap sinks exact_below num_projections seed strict_causal hash_centre"
        ).split()
    ]

    @classmethod
    def of(cls, config: Config) -> "HaAttributes":
        """The attributes of `config`."""
        return cls(**{**config.attributes(), "selector": SELECTOR_CODES[config.selector]})


class HaParams(ctypes.Structure):
    """`HaParams` of plugins/attention.h."""

    _fields_ = [
        ("struct_size", c_uint32),
        ("dtype", c_int32),
        *((name, c_int64) for name in "batch heads_q heads_kv seq_q seq_k head_dim head_dim_v".split()),
        ("attributes", HaAttributes),
        *((name, c_void_p) for name in "q k v lengths out lse plan workspace".split()),
        ("workspace_size", c_size_t),
        ("stream", c_void_p),
        ("threads", c_int32),
        ("reserved", c_int32),
    ]


def _find(name: str) -> Path:
    override = os.environ.get("HYPERATTENTION_LIBRARY_DIR")
    if override:
        path = Path(override) / name
        if path.is_file():
            return path
        raise EnvironmentFault(f"HYPERATTENTION_LIBRARY_DIR is {override}, which holds no {name}; build it there or unset the variable")
    path = Path(str(resources.files("hyperattention").joinpath("lib", name)))
    if path.is_file():
        return path
    raise EnvironmentFault(
        f"{name} is not built (looked in {path.parent}); run `make native`, or install the package with pip, "
        f"or set HYPERATTENTION_LIBRARY_DIR; `hyperattention doctor` says what the build lacks"
    )


def ort_library_path() -> Path:
    """libhyperattention_ort.so: ONNX Runtime's custom op, the CPU kernels and, where CUDA was built, its kernels.

    Raises EnvironmentFault when it is not built.
    """
    return _find(ORT_LIBRARY)


def trt_library_path() -> Path:
    """libhyperattention_trt.so: TensorRT's plugin and the CUDA kernels. Raises EnvironmentFault when it is not built."""
    return _find(TRT_LIBRARY)


def build_info(path: Path) -> dict[str, Any]:
    """What a library says of itself: version, abi, build_id, backends, architectures, compiler. Raises EnvironmentFault."""
    library = open_library(path)
    if not hasattr(library, "ha_build_info"):
        raise EnvironmentFault(f"{path.name} is another library of that name: it has no ha_build_info; build ours with `make native`")
    library.ha_build_info.restype = c_char_p
    return json.loads(library.ha_build_info().decode())


def check_interface(path: Path) -> None:
    """Raises EnvironmentFault where a library cannot be loaded, is not ours, or was built for another version of this package."""
    found = build_info(path).get("abi")
    if found != ABI_VERSION:
        raise EnvironmentFault(f"{path.name} has interface {found}, this package {ABI_VERSION}; rebuild it with `make native`")


@functools.cache
def load_cpu() -> "Library":
    """The CPU kernels (float32, host tensors). Raises EnvironmentFault when they are not built."""
    from hyperattention.native import Library

    return Library(ort_library_path(), "ha_cpu_", "cpu")


@functools.cache
def load_cuda() -> "Library":
    """The CUDA kernels (float16, bfloat16 and float32, device tensors). Raises EnvironmentFault when they are not built."""
    from hyperattention.native import Library

    return Library(trt_library_path(), "ha_cuda_", "cuda")


def open_library(path: Path) -> ctypes.CDLL:
    """Loads a library into this process. Raises EnvironmentFault with the loader's reason."""
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise EnvironmentFault(f"{path.name} cannot be loaded: {error}; rebuild it with `make native`") from error
