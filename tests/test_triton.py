"""OUT/triton against Triton's own schema, against the ONNX files themselves, and served by ONNX Runtime as Triton would."""

from __future__ import annotations

import importlib.util
import json
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
from commands import SMALL
from export_runs import stand_ins
from google.protobuf import text_format
from onnx import TensorProto, helper

from hyperattention.errors import EnvironmentFault, ExportFailed
from hyperattention.export import pipeline
from hyperattention.export.bundle import Bundle, write_draft
from hyperattention.export.cli import main
from hyperattention.export.plan import ExportPlan
from hyperattention.export.source import Input
from hyperattention.export.triton import write_repository
from hyperattention.export.validation import Request
from hyperattention.library import ORT_LIBRARY, TRT_LIBRARY

# onnx's own names beside Triton's.
TYPES = {"FLOAT": "FP32", "FLOAT16": "FP16", "BFLOAT16": "BF16", "DOUBLE": "FP64"}


@pytest.fixture(scope="module")
def schema() -> ModuleType:
    """Triton's model_config.proto as its client ships it; the package around it would want gRPC."""
    found = importlib.util.find_spec("tritonclient")
    assert found is not None and found.submodule_search_locations, "tritonclient is not installed; `make dev` installs the dev group"
    path = Path(found.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("triton_model_config", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(schema: ModuleType, model: Path) -> Any:
    """config.pbtxt; fields that the schema lacks are refused."""
    return text_format.Parse((model / "config.pbtxt").read_text(), schema.ModelConfig())


def check(schema: ModuleType, model: Path, graph: onnx.GraphProto) -> Any:
    """What Triton's two backends hold a configuration to: each tensor of the file, by name, type and dimensions."""
    config = read(schema, model)
    assert config.name == model.name and config.backend == model.name.rpartition("_")[2]
    for tensors, values in ((config.input, graph.input), (config.output, graph.output)):
        assert [tensor.name for tensor in tensors] == [value.name for value in values]
        for tensor, value in zip(tensors, values):
            name = TensorProto.DataType.Name(value.type.tensor_type.elem_type)
            assert schema.DataType.Name(tensor.data_type) == f"TYPE_{TYPES.get(name, name)}"
            assert all(size == -1 or size > 0 for size in tensor.dims) and len(tensor.dims) > 0
            ours = list(tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims)
            ours = [-1, *ours] if config.max_batch_size else ours
            theirs = [size.dim_value or -1 for size in value.type.tensor_type.shape.dim]
            assert len(ours) == len(theirs)
            if tensors is config.output:  # ONNX Runtime's backend demands equality
                assert ours == theirs
            assert all(a == b or -1 in (a, b) for a, b in zip(ours, theirs))
    return config


# --- a whole export --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real ONNX of a tiny model and the real libraries, with a stand-in for the engine."""
    scratch = tmp_path_factory.mktemp("triton")
    model = tiny.save(scratch / "tiny model (v1)")
    names = ("export.engine.build_engine", "export.pipeline.engine_obstacle", "export.pipeline.missing_parts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signal, "signal", lambda *_: None)
        for name, value in stand_ins(scratch).items():
            if name.removeprefix("hyperattention.") in names:
                patch.setattr(name, value)
        options = ["--no-validate", "--triton", "--task", "prefill", "--batch", "1,2,4", "--quiet", *SMALL]
        with pytest.raises(SystemExit, match="^0$"):
            main([str(model), str(scratch / "out"), *options])
    return scratch / "out"


@pytest.mark.ort
def test_the_repository_of_an_export(exported: Path, schema: ModuleType) -> None:
    root = exported / "triton"
    models = sorted(path.name for path in root.iterdir() if path.is_dir())  # each of them Triton takes for a model
    assert models == ["tiny_model_v1_onnxruntime", "tiny_model_v1_tensorrt"]
    names = ["logits", *(f"present.{i}.{part}" for i in (0, 1) for part in ("key", "value"))]
    for name, file in zip(models, ("model.onnx", "model.trt.onnx")):
        config = check(schema, root / name, onnx.load(exported / file).graph)
        assert config.max_batch_size == 4 and config.HasField("dynamic_batching")
        assert [tensor.name for tensor in config.output] == names
    assert read(schema, root / models[0]).instance_group[0].kind == schema.ModelInstanceGroup.KIND_AUTO
    assert read(schema, root / models[1]).instance_group[0].kind == schema.ModelInstanceGroup.KIND_GPU
    pairs = {f"{models[0]}/1/model.onnx": "model.onnx", f"{models[0]}/1/{ORT_LIBRARY}": ORT_LIBRARY}
    pairs |= {f"{models[1]}/1/model.plan": "model.engine", f"{models[1]}/1/{TRT_LIBRARY}": TRT_LIBRARY}
    files = Bundle.open(exported).manifest["files"]
    for ours, original in pairs.items():
        assert files[f"triton/{ours}"] == files[original] and (root / ours).samefile(exported / original)
    assert {name for name in files if name.startswith("triton/")} == {
        "triton/README.md", *(f"triton/{name}" for name in pairs), *(f"triton/{name}/config.pbtxt" for name in models)
    }  # fmt: skip
    assert Bundle.open(exported).changed_files() == []


@pytest.mark.ort
def test_the_start_command_names_files_of_the_repository(exported: Path, schema: ModuleType) -> None:
    root = exported / "triton"
    text = (root / "README.md").read_text()
    command = re.findall(r"```\n(tritonserver[^`]*)```", text)[0].replace("\\\n", " ").split()
    assert command[0] == "tritonserver" and (root / command[1].removeprefix("--model-repository=")).samefile(root)
    plugins = command[2].removeprefix("--backend-config=tensorrt,plugins=")
    assert "/" in plugins and (root / plugins).is_file(), "dlopen takes a path only where there is a slash in it"
    for file in [*root.rglob("*.pbtxt"), root / "README.md"]:
        assert str(exported) not in file.read_text()


SERVE = """
import json, sys
import numpy as np, onnxruntime
request, library, model = json.load(sys.stdin), *sys.argv[1:]
options = onnxruntime.SessionOptions()
options.register_custom_ops_library(library)
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
feed = {name: np.array(value, dtype) for name, (dtype, value) in request.items()}
print(json.dumps({o.name: v.tolist() for o, v in zip(session.get_outputs(), session.run(None, feed))}))
"""


@pytest.mark.ort
def test_a_request_in_the_shapes_of_the_configuration(exported: Path, schema: ModuleType) -> None:
    """The library by its relative name, the batch put in front and reshaped away as the configuration says."""
    root, name = exported / "triton", "tiny_model_v1_onnxruntime"
    config = read(schema, root / name)
    rows, length, random, request = 3, 131, np.random.default_rng(0), {}
    for tensor in config.input:
        shape = [rows, *(length if size == -1 else size for size in tensor.dims)]
        values = random.integers(3, 60, shape) if tensor.name == "input_ids" else np.full(shape, length)
        if tensor.HasField("reshape"):
            values = values.reshape([rows, *tensor.reshape.shape])
        request[tensor.name] = (schema.DataType.Name(tensor.data_type).removeprefix("TYPE_").lower(), values.tolist())
    command = [sys.executable, "-c", SERVE, config.model_operations.op_library_filename[0], f"{name}/1/model.onnx"]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    found = {key: np.array(value) for key, value in json.loads(done.stdout).items()}
    for tensor in config.output:
        shape = found[tensor.name].shape
        assert shape[0] == rows and len(shape) == 1 + len(tensor.dims)
        assert all(size in (-1, there) for size, there in zip(tensor.dims, shape[1:]))
    assert np.isfinite(found["logits"]).all() and np.ptp(found["logits"]) > 0


# --- other shapes and types ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A graph by its inputs and outputs, the batch of the plan, and what max_batch_size has to be."""

    name: str
    batch: tuple[int, int, int]
    expected: int
    inputs: tuple[Input, ...]
    outputs: tuple[tuple[str, int, tuple[Any, ...]], ...]
    task: str = "features"
    dtype: str = "fp32"

    def __str__(self) -> str:
        return self.name


IDS = (Input("input_ids", "int64", ("batch", "sequence")), Input("lengths", "int32", ("batch",)))
PIXELS = (Input("pixel_values", "float", ("batch", 3, 7, 5)),)
FLOAT, HALF, BF16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
CASES = [
    Case("batch-of-one", (1, 1, 1), 0, IDS, (("logits", FLOAT, ("batch", "sequence", 11)),), "logits"),
    Case("batch-to-four", (1, 2, 4), 4, IDS, (("logits", FLOAT, ("batch", 1, 11)),), "last-logits"),
    Case("never-one-row", (2, 4, 8), 0, IDS, (("features", FLOAT, ("batch", "sequence", 9)),)),
    Case("image-bf16", (1, 1, 3), 3, PIXELS, (("features", BF16, ("batch", 36, 9)),), dtype="bf16"),
    Case("image-fp16-fixed", (1, 1, 1), 0, PIXELS, (("features", HALF, ("batch", 36, 9)),), dtype="fp16"),
    Case("a-number-a-row", (1, 1, 5), 5, IDS, (("score", FLOAT, ("batch",)),)),
    Case("function-of-the-users", (1, 1, 5), 0, IDS, (("y", FLOAT, ("batch", "batch + sequence")),), "module"),
    Case("no-batch", (1, 1, 1), 0, (Input('odd "name"', "bool", ("sequence", 3)),), (("y", TensorProto.INT64, ("sequence",)),), "module"),
]


def draft(folder: Path, case: Case) -> Path:
    """An output folder as `write_repository` finds it: a graph without nodes, a library, the draft of a manifest."""
    folder.mkdir()
    kinds = {"int64": TensorProto.INT64, "int32": TensorProto.INT32, "bool": TensorProto.BOOL}
    kinds["float"] = {"fp32": FLOAT, "fp16": HALF, "bf16": BF16}[case.dtype]
    ins = [helper.make_tensor_value_info(entry.name, kinds[entry.dtype], entry.shape) for entry in case.inputs]
    outs = [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in case.outputs]
    onnx.save(helper.make_model(helper.make_graph([], "graph", ins, outs)), folder / "model.onnx")
    (folder / ORT_LIBRARY).write_text("library")
    dims = {size: case.batch if size == "batch" else (1, 8, 64) for entry in case.inputs for size in entry.shape if isinstance(size, str)}
    names = tuple(name for name, _, _ in case.outputs)
    plan = ExportPlan(case.task, case.dtype, (), case.inputs, names, dims, (1, 8, 64), case.batch, "tokens", 0, "blocks", "op")
    write_draft(folder, plan, {}, None, {})
    return folder


@pytest.mark.parametrize("case", CASES, ids=str)
def test_shapes_types_and_batching(case: Case, schema: ModuleType, tmp_path: Path) -> None:
    folder = draft(tmp_path / "out", case)
    models = write_repository(folder, case.name)
    assert models == [f"{case.name}_onnxruntime"]
    config = check(schema, folder / "triton" / models[0], onnx.load(folder / "model.onnx").graph)
    assert config.max_batch_size == case.expected and config.HasField("dynamic_batching") == (case.expected > 0)
    expected = "KIND_AUTO" if case.dtype == "fp32" else "KIND_GPU"
    assert schema.ModelInstanceGroup.Kind.Name(config.instance_group[0].kind) == expected
    text = (folder / "triton" / "README.md").read_text()
    assert "There is no engine in this output" in text and "plugins=" not in text
    assert (f"up to {case.expected} rows" in text) == (case.expected > 0) == ("never puts requests together" not in text)


def test_large_weights_come_along(schema: ModuleType, tmp_path: Path) -> None:
    folder = draft(tmp_path / "out", CASES[0])
    (folder / "model.onnx.data").write_bytes(b"weights")
    (model,) = write_repository(folder, "m")
    assert (folder / "triton" / model / "1" / "model.onnx.data").read_bytes() == b"weights"


def test_a_type_that_triton_does_not_have(tmp_path: Path) -> None:
    folder = draft(tmp_path / "out", Case("c", (1, 1, 1), 0, IDS, (("y", TensorProto.COMPLEX64, ("batch",)),)))
    with pytest.raises(ExportFailed, match="--triton: y is of type complex64"):
        write_repository(folder, "m")


def test_neither_backend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nothing: Any = None
    options = pipeline.Options(tmp_path / "out", Request(wanted=False), triton=True)
    with pytest.raises(EnvironmentFault, match="--triton: neither of its backends could serve the result: not built"):
        pipeline.check_environment(nothing, nothing, options, {"ONNX Runtime library": "not built", "engine": "no GPU"})
