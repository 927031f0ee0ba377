"""An ONNX Runtime session with our library on the processor or a GPU; torch tensors go in and come out by pointer, any dtype."""

from __future__ import annotations

import ctypes
import math
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyperattention.errors import EnvironmentFault, one_line

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
# ONNX Runtime's name of a tensor type: torch's dtype and ONNX's code. NumPy, the usual way in, has no bfloat16.
DTYPES = {
    "tensor(float)": (torch.float32, 1),
    "tensor(int32)": (torch.int32, 6),
    "tensor(int64)": (torch.int64, 7),
    "tensor(bool)": (torch.bool, 9),
    "tensor(float16)": (torch.float16, 10),
    "tensor(bfloat16)": (torch.bfloat16, 16),
}
ONNX_TYPES = dict(DTYPES.values())  # ONNX's code by torch's dtype


def provider_of(device: torch.device) -> str:
    """The provider whose kernels are to run the nodes."""
    return CUDA if device.type == "cuda" else CPU


def session_options(library: Path | None, external_data: Path) -> Any:
    """Options that register `library` (None: none) and find weights outside the file in the folder `external_data`.

    Raises EnvironmentFault where the library is missing, or ONNX Runtime cannot load it or is too old for it.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    if library is not None:
        if not library.is_file():
            raise EnvironmentFault(f"{library.name} is not in the output folder; export again")
        try:
            options.register_custom_ops_library(str(library))
        except Exception as error:  # ONNX Runtime raises a class of its own per status
            raise EnvironmentFault(
                f"ONNX Runtime {ort.__version__} does not take {library.name}: {one_line(error)}; install the onnxruntime-gpu of "
                f"pyproject.toml, or rebuild the library with `make native`"
            ) from error
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(external_data))
    return options


def open_session(model: bytes, options: Any, device: torch.device, name: str) -> Any:
    """A session of `model` on `device`. Raises EnvironmentFault where ONNX Runtime cannot open it there.

    ONNX Runtime itself falls back to the processor, with a warning, where its CUDA provider cannot be loaded.
    """
    import onnxruntime as ort

    provider = provider_of(device)
    providers: list[Any] = [CPU]
    if provider == CUDA:
        if CUDA not in ort.get_available_providers():
            raise EnvironmentFault(f"ONNX Runtime {ort.__version__} has no {CUDA}; install onnxruntime-gpu, or use --device cpu")
        ort.preload_dlls()  # CUDA's and cuDNN's libraries of the installed wheels
        providers.insert(0, (CUDA, {"device_id": device.index or 0}))
    try:
        session = ort.InferenceSession(model, options, providers=providers)
    except Exception as error:  # ONNX Runtime raises a class of its own per status
        raise EnvironmentFault(f"ONNX Runtime cannot open {name}: {error}") from error
    if provider not in session.get_providers():
        raise EnvironmentFault(
            f"ONNX Runtime {ort.__version__} could not load its {provider} (session has {', '.join(session.get_providers())}): "
            "its CUDA and cuDNN libraries must be those of its build, CUDA 13 and cuDNN 9 for 1.31; run `hyperattention doctor`"
        )
    return session


@dataclass(frozen=True)
class Bound:
    """A session's inputs and outputs bound to torch tensors, which it keeps alive; `outputs` are written by a run.

    None stands for an output whose sizes a run alone can tell: ONNX Runtime makes it, in the processor's memory.
    """

    binding: Any
    inputs: dict[str, Tensor]
    outputs: OrderedDict[str, Tensor | None]


def bind(session: Any, feed: Mapping[str, Tensor], device: torch.device) -> Bound:
    """Binds `feed`, name to tensor, and fresh outputs on `device`; an input that is there already, dense and of its type, is not copied.

    Sizes of outputs come from the names of the inputs' dimensions. Raises EnvironmentFault for a type that is not carried.
    """
    made, sizes = Bound(session.io_binding(), {}, OrderedDict()), {}
    for node in session.get_inputs():
        dtype, code = _dtype(node)
        value = made.inputs[node.name] = feed[node.name].to(device, dtype).contiguous()
        sizes.update((dim, size) for dim, size in zip(node.shape, value.shape, strict=True) if isinstance(dim, str))
        made.binding.bind_input(node.name, device.type, device.index or 0, code, tuple(value.shape), value.data_ptr())
    for node in session.get_outputs():
        dtype, code = _dtype(node)
        shape = tuple(sizes.get(size, size) for size in node.shape)
        if not all(isinstance(size, int) for size in shape):
            made.outputs[node.name] = None
            made.binding.bind_output(node.name, "cpu")
            continue
        value = made.outputs[node.name] = torch.empty(shape, dtype=dtype, device=device)
        made.binding.bind_output(node.name, device.type, device.index or 0, code, shape, value.data_ptr())
    return made


def run_bound(session: Any, feed: Mapping[str, Tensor], device: torch.device) -> tuple[OrderedDict[str, Tensor], float]:
    """Runs `session` on `feed`; answers its outputs, tensors on `device`, and the seconds of the run alone. Raises as `bind` does."""
    bound = bind(session, feed, device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # the inputs were written on torch's stream, the session has its own
    start = time.perf_counter()
    session.run_with_iobinding(bound.binding)
    bound.binding.synchronize_outputs()
    seconds = time.perf_counter() - start
    made = zip(session.get_outputs(), bound.outputs.items(), bound.binding.get_outputs(), strict=True)
    answer = ((name, _copied(value, node).to(device) if bound_to is None else bound_to) for node, (name, bound_to), value in made)
    return OrderedDict(answer), seconds


def _copied(value: Any, node: Any) -> Tensor:
    """A tensor of what ONNX Runtime made in the processor's memory; by pointer, as NumPy has no bfloat16."""
    shape, (dtype, _) = tuple(value.shape()), _dtype(node)
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    memory = (ctypes.c_char * (math.prod(shape) * dtype.itemsize)).from_address(value.data_ptr())
    return torch.frombuffer(memory, dtype=dtype).clone().view(shape)


def _dtype(node: Any) -> tuple[torch.dtype, int]:
    if node.type not in DTYPES:
        raise EnvironmentFault(f"{node.name} is a {node.type}, which this runner does not carry; it takes {', '.join(DTYPES)}")
    return DTYPES[node.type]
