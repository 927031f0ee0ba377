"""OUT/triton: a model repository for Triton Inference Server, of the same files under the names that Triton looks for.

NAME_onnxruntime serves model.onnx, NAME_tensorrt the engine where there is one. No configuration names an absolute path: the
server is started inside the repository, as its README.md says.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Iterable

import onnx

from hyperattention.errors import ExportFailed
from hyperattention.export.bundle import Bundle
from hyperattention.export.choices import MODULE
from hyperattention.export.files import DATA, ENGINE, MODEL, link
from hyperattention.export.plan import ExportPlan
from hyperattention.export.source import torch_dtype
from hyperattention.library import ORT_LIBRARY, TRT_LIBRARY

FOLDER = "triton"
_TYPES = {
    "bool": "BOOL", "uint8": "UINT8", "int8": "INT8", "int16": "INT16", "int32": "INT32", "int64": "INT64",
    "float16": "FP16", "bfloat16": "BF16", "float32": "FP32", "float64": "FP64",
}  # fmt: skip
Tensor = tuple[str, str, list[int]]  # name, Triton's type, dimensions with -1 for one that varies


def write_repository(folder: Path, name: str) -> list[str]:
    """Writes `folder`/triton for the output in `folder` (finished, or its draft); the names of its models.

    Files are hard links where the disk has them. Raises ExportFailed for a tensor that Triton cannot describe.
    """
    bundle = Bundle.open(folder)
    root, base = folder / FOLDER, re.sub(r"[^A-Za-z0-9_.-]+", "_", name).strip("_") or "model"
    batch = max_batch_size(bundle.plan)
    inputs, outputs = _inputs(bundle.plan, batch), _outputs(bundle.model_onnx, batch)
    models = []
    if bundle.ort_library is not None:
        models.append(f"{base}_onnxruntime")
        files = {name: name for name in (MODEL, DATA, ORT_LIBRARY) if (folder / name).is_file()}
        library = f"{models[-1]}/1/{ORT_LIBRARY}"
        # Without a GPU ONNX Runtime has arithmetic for fp32 alone.
        kind = "KIND_AUTO" if bundle.plan.dtype == "fp32" else "KIND_GPU"
        rest = f'model_operations {{ op_library_filename: "{library}" }}\n'
        _model(folder, root / models[-1], files, _config(models[-1], "onnxruntime", batch, inputs, outputs, kind) + rest)
    if bundle.engine is not None and bundle.trt_library is not None:
        models.append(f"{base}_tensorrt")
        files = {"model.plan": ENGINE, TRT_LIBRARY: TRT_LIBRARY}
        _model(folder, root / models[-1], files, _config(models[-1], "tensorrt", batch, inputs, outputs, "KIND_GPU"))
    (root / "README.md").write_text(_readme(bundle, models, batch, inputs), encoding="utf-8")
    return models


def max_batch_size(plan: ExportPlan) -> int:
    """Rows that Triton may put together in one call; 0 where requests come with their rows and are never put together.

    That is so where the batch is of one size, and for a function of the user's, whose rows may depend on each other.
    """
    rows = plan.dims.get("batch", (0, 0, 0))
    leads = all(entry.shape[:1] == ("batch",) for entry in plan.inputs)
    return rows[2] if leads and plan.task != MODULE and rows[0] == 1 < rows[2] else 0


def _inputs(plan: ExportPlan, batch: int) -> list[Tensor]:
    tensors = []
    for entry in plan.inputs:
        smallest, _, largest = plan.shapes(entry)
        dims = [low if low == high else -1 for low, high in zip(smallest, largest, strict=True)]
        kind = str(torch_dtype(plan.dtype)).removeprefix("torch.") if entry.dtype == "float" else entry.dtype
        tensors.append((entry.name, _type(entry.name, kind), dims[1:] if batch else dims))
    return tensors


def _outputs(path: Path, batch: int) -> list[Tensor]:
    """From the file itself: nothing else says their shapes. Triton wants -1 wherever the file leaves a dimension open."""
    tensors = []
    for value in onnx.load(path, load_external_data=False).graph.output:
        kind = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name
        dims = [size.dim_value if size.HasField("dim_value") else -1 for size in value.type.tensor_type.shape.dim]
        tensors.append((value.name, _type(value.name, kind), dims[1:] if batch else dims))
    return tensors


def _type(name: str, dtype: str) -> str:
    if dtype not in _TYPES:
        raise ExportFailed(f"--triton: {name} is of type {dtype}, which Triton does not have; leave --triton out")
    return f"TYPE_{_TYPES[dtype]}"


def _model(folder: Path, target: Path, files: dict[str, str], config: str) -> None:
    for name, source in files.items():
        link(folder / source, target / "1" / name)
    (target / "config.pbtxt").write_text(config, encoding="utf-8")


def _config(name: str, backend: str, batch: int, inputs: list[Tensor], outputs: list[Tensor], kind: str) -> str:
    """config.pbtxt: Triton's message ModelConfig as protobuf text."""
    lines = [f"name: {json.dumps(name)}", f'backend: "{backend}"', f"max_batch_size: {batch}"]
    lines += [_tensor("input", tensor) for tensor in inputs] + [_tensor("output", tensor) for tensor in outputs]
    lines.append(f"instance_group [ {{ count: 1 kind: {kind} }} ]")
    return "\n".join([*lines, *(["dynamic_batching { }"] if batch else [])]) + "\n"


def _tensor(field: str, tensor: Tensor) -> str:
    name, kind, dims = tensor
    # Triton has no tensor of no dimension beside the batch: each row's one value is reshaped away.
    shape = f"dims: [ {', '.join(map(str, dims))} ]" if dims else "dims: [ 1 ] reshape { shape: [ ] }"
    return f"{field} {{ name: {json.dumps(name, ensure_ascii=False)} data_type: {kind} {shape} }}"


def _readme(bundle: Bundle, models: list[str], batch: int, inputs: list[Tensor]) -> str:
    engines = [name for name in models if name.endswith("_tensorrt")]
    plugin = f" \\\n  --backend-config=tensorrt,plugins={engines[0]}/1/{TRT_LIBRARY}" if engines else ""
    return _README.format(
        command=f"tritonserver --model-repository=.{plugin}",
        models=", ".join(f"`{name}`" for name in models),
        engine=_about_engine(bundle) if engines else "There is no engine in this output, and so no model for the TensorRT backend.",
        rows="\n".join(f"| {name} | {kind.removeprefix('TYPE_')} | {_request(dims, batch)} |" for name, kind, dims in inputs),
        batching=_batching(batch),
        seq=bundle.plan.seq,
    )


_README = """\
# Model repository for Triton Inference Server
Models: {models}. Start the server inside this folder, because the libraries are named relative to it:
```
{command}
```
In a container of Triton (IMAGE):
```
docker run --rm --gpus=all -p 8000-8002:8000-8002 -v "$PWD":/models:ro -w /models IMAGE {command}
```
{engine}

| input | type | shape of a request |
|---|---|---|
{rows}

{batching} A sequence has {seq[0]} to {seq[2]} positions.
"""


def _about_engine(bundle: Bundle) -> str:
    host: dict[str, Any] = bundle.manifest["engine"].get("host") or {}
    release, gpu = host.get("tensorrt") or "of the release that built it", host.get("gpu") or "not recorded"
    return (
        f"The engine needs a Triton with TensorRT {release}, on the kind of GPU that built it ({gpu}). `plugins=` opens its plugin after "
        f"TensorRT; LD_PRELOAD would open it before, when there is no registry that it could enter."
    )


def _request(dims: Iterable[int], batch: int) -> str:
    rows = [f"1 to {batch}"] if batch else []
    return " x ".join([*rows, *("any" if size == -1 else str(size) for size in (dims or [1]))])


def _batching(batch: int) -> str:
    if batch:
        return f"Triton puts requests of equal shapes together, up to {batch} rows; others run one by one."
    return "Triton never puts requests together; a request brings its rows itself, in the first dimension."
