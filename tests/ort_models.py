"""One-node models and sessions with our library, for the tests of the op in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from onnx import TensorProto, helper

from hyperattention.config import DOMAIN, OP_TYPE
from hyperattention.library import build_info, ort_library_path

ONNX_TYPES = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16, torch.bfloat16: TensorProto.BFLOAT16}
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


def has_cuda_kernels() -> bool:
    """Whether the library was built with a CUDA compiler."""
    return "cuda" in build_info(ort_library_path())["backends"]  # type: ignore[operator]


def one_node(
    attributes: dict,
    *,
    dtype: torch.dtype = torch.float32,
    lengths: str | None = "lengths",
    lse: bool = True,
    rank: int | None = 4,
    then: str = "",
    declared: bool = False,
) -> bytes:
    """A model of one HyperAttention node with symbolic shapes, q, k, v (, lengths) to o (, lse).

    `lengths` "" names the input and leaves it empty; `then` is an operator between the node and o, whose input has no declared type;
    `declared` names the outputs' sizes too, which the op's own inference does for o alone.
    """
    kind = ONNX_TYPES[dtype]
    shapes = {"q": ["batch", "heads", "rows", "size"], "k": ["batch", "groups", "keys", "size"], "v": ["batch", "groups", "keys", "out"]}
    graph_inputs = [helper.make_tensor_value_info(name, kind, shape if rank else None) for name, shape in shapes.items()]
    names = [*shapes]
    if lengths is not None:
        names.append(lengths)
    if lengths:
        graph_inputs.append(helper.make_tensor_value_info(lengths, TensorProto.INT32, ["batch"]))
    outputs = {"o": kind, "lse": TensorProto.FLOAT} if lse else {"o": kind}
    made = ["between", *list(outputs)[1:]] if then else list(outputs)
    nodes = [helper.make_node(OP_TYPE, names, made, name="attention", domain=DOMAIN, **attributes)]
    if then:
        nodes.append(helper.make_node(then, ["between"], ["o"], name="then"))
    sizes = {"o": ["batch", "heads", "rows", "out"], "lse": ["batch", "heads", "rows"]}
    values = [helper.make_tensor_value_info(name, element, sizes[name] if declared else None) for name, element in outputs.items()]
    imports = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    graph = helper.make_graph(nodes, "one", graph_inputs, values)
    return helper.make_model(graph, opset_imports=imports, ir_version=10).SerializeToString()


def options(threads: int = 1, profile: Path | None = None) -> Any:
    """Session options with our library; `profile` is the prefix of the profile's file."""
    import onnxruntime as ort

    made = ort.SessionOptions()
    made.intra_op_num_threads = threads
    made.log_severity_level = 4  # refusals are asked for
    made.register_custom_ops_library(str(ort_library_path()))
    if profile:
        made.enable_profiling, made.profile_file_prefix = True, str(profile)
    return made


def session(model: bytes, threads: int = 1, profile: Path | None = None, providers: list | None = None) -> Any:
    """A session on the processor, or on `providers`."""
    import onnxruntime as ort

    return ort.InferenceSession(model, options(threads, profile), providers=providers or [CPU])
