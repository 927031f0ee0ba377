"""The ONNX files: the function body against the reference, the custom node, its twin, the checkers, and what must not be inside."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper
from onnx.reference import ReferenceEvaluator

from hyperattention.config import DOMAIN, OP_TYPE, Config
from hyperattention.errors import ExportFailed
from hyperattention.export import onnx_graph
from hyperattention.export.load import inspect_source, load_model
from hyperattention.export.onnx_body import OPSET, attention_function
from hyperattention.export.onnx_graph import check, export_onnx, hyper_nodes
from hyperattention.export.onnx_schema import attribute_values, register_schema
from hyperattention.export.patch import Patched, install
from hyperattention.export.plan import make_plan
from hyperattention.export.source import torch_dtype
from hyperattention.reference import exact_attention

CPU = ["CPUExecutionProvider"]
TYPES = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16, torch.bfloat16: TensorProto.BFLOAT16}


# --- the function body -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Sizes of one call; rows below keys is a chunk of a prefill, above is a call whose first rows see nothing."""

    batch: int
    heads_q: int
    heads_kv: int
    rows: int
    keys: int
    head_dim: int
    head_dim_v: int
    lengths: tuple[int, ...]
    scale: float = 0.0
    causal: int = 1
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        sizes = f"{self.batch}x{self.heads_q}over{self.heads_kv}-{self.rows}of{self.keys}-{self.head_dim}to{self.head_dim_v}"
        rest = [str(self.dtype).removeprefix("torch."), *([f"scale{self.scale}"] if self.scale else []), *([] if self.causal else ["full"])]
        return "-".join([sizes, *rest])


CASES = [
    Case(2, 4, 2, 9, 9, 8, 6, (9, 3)),
    Case(1, 1, 1, 1, 1, 1, 1, (1,)),
    Case(2, 6, 2, 5, 17, 16, 16, (17, 13)),
    Case(1, 3, 1, 7, 3, 16, 16, (3,)),
    Case(2, 2, 1, 11, 11, 8, 8, (0, 5)),
    Case(1, 4, 4, 13, 13, 8, 8, (13,), scale=0.7),
    Case(2, 4, 1, 6, 10, 8, 8, (10, 4), causal=0),
    Case(2, 4, 2, 9, 14, 8, 8, (14, 11), dtype=torch.float16),
]


def call(case: Case, outputs: tuple[str, str]) -> ModelProto:
    """A model of one node with the body."""
    kind = TYPES[case.dtype]
    config = Config(causal=case.causal, scale=case.scale)
    node = helper.make_node(OP_TYPE, ["Q", "K", "V", "lengths"], list(outputs), domain=DOMAIN, **config.attributes())
    inputs = [
        helper.make_tensor_value_info("Q", kind, ["batch", "heads", "rows", "d"]),
        helper.make_tensor_value_info("K", kind, ["batch", "groups", "keys", "d"]),
        helper.make_tensor_value_info("V", kind, ["batch", "groups", "keys", "dv"]),
        helper.make_tensor_value_info("lengths", TensorProto.INT32, ["batch"]),
    ]
    results = [helper.make_tensor_value_info("O", kind, ["batch", "heads", "rows", "dv"])]
    if outputs[1]:
        results.append(helper.make_tensor_value_info("LSE", TensorProto.FLOAT, ["batch", "heads", "rows"]))
    graph = helper.make_graph([node], "call", inputs, results)
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, functions=[attention_function()], opset_imports=imports, ir_version=9)


def tensors(case: Case) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    keys = (case.heads_kv, case.keys)
    sizes = ((case.heads_q, case.rows, case.head_dim), (*keys, case.head_dim), (*keys, case.head_dim_v))
    q, k, v = (torch.randn(case.batch, *size, generator=generator).to(case.dtype) for size in sizes)
    for row, length in enumerate(case.lengths):
        k[row, :, length:] = torch.nan  # rule 2: what lies in the padding never matters
        v[row, :, length:] = torch.nan
    return q, k, v, torch.tensor(case.lengths, dtype=torch.int32)


@pytest.mark.parametrize("runtime", ["onnxruntime", "onnx.reference"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_body_is_exact_attention_without_our_library(case: Case, runtime: str) -> None:
    model = call(case, ("O", "LSE"))
    onnx.checker.check_model(model, full_check=True)
    q, k, v, lengths = tensors(case)
    feed = {"Q": q.numpy(), "K": k.numpy(), "V": v.numpy(), "lengths": lengths.numpy()}
    if runtime == "onnxruntime":
        o, lse = onnxruntime.InferenceSession(model.SerializeToString(), providers=CPU).run(None, feed)
    else:
        o, lse = ReferenceEvaluator(model).run(None, feed)
    expected = exact_attention(q, k, v, bool(case.causal), lengths, case.scale)
    tolerance = 1e-6 if case.dtype == torch.float32 else 1e-3
    assert o.dtype == feed["Q"].dtype and lse.dtype == np.float32
    np.testing.assert_allclose(o, expected.o.numpy(), atol=tolerance, rtol=tolerance)
    np.testing.assert_allclose(lse, expected.lse.numpy(), atol=1e-5, rtol=1e-5)


def test_body_with_the_lse_left_out() -> None:
    case = CASES[0]
    model = call(case, ("O", ""))
    onnx.checker.check_model(model, full_check=True)
    q, k, v, lengths = tensors(case)
    feed = {"Q": q.numpy(), "K": k.numpy(), "V": v.numpy(), "lengths": lengths.numpy()}
    (o,) = onnxruntime.InferenceSession(model.SerializeToString(), providers=CPU).run(None, feed)
    np.testing.assert_allclose(o, exact_attention(q, k, v, True, lengths).o.numpy(), atol=1e-6)


def test_body_computes_bfloat16_in_single_precision() -> None:
    """Checked as a graph: neither vanilla runtime takes bfloat16 inputs from numpy."""
    function = attention_function()
    widened = {node.output[0] for node in function.node if node.op_type == "Cast" and node.input[0] in "QKV"}
    narrowed = [node for node in function.node if node.op_type == "CastLike"]
    assert len(widened) == 3 and [node.output[0] for node in narrowed] == ["O"]
    onnx.checker.check_model(call(Case(1, 2, 1, 3, 5, 8, 8, (5,), dtype=torch.bfloat16), ("O", "LSE")), full_check=True)


def test_function_declares_every_attribute() -> None:
    assert list(attention_function().attribute) == list(Config().attributes())


def test_schema_registers_once_and_infers_shapes() -> None:
    register_schema()
    register_schema()
    model = call(CASES[2], ("O", "LSE"))
    del model.functions[:]
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, check_type=True)
    shapes = [[d.dim_param for d in out.type.tensor_type.shape.dim] for out in inferred.graph.output]
    assert shapes == [["batch", "heads", "rows", "dv"], ["batch", "heads", "rows"]]
    model.graph.node[0].input[3] = "Q"
    with pytest.raises(Exception, match="lengths|int32"):
        onnx.checker.check_model(model, full_check=True)


# --- exported models -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Export:
    """One export of a tiny model."""

    name: str
    model_type: str = "llama"
    task: str = "logits"
    dtype: str = "fp32"
    layers: str = "all"
    keep_exact: str = "op"
    external_threshold: int = onnx_graph.EXTERNAL_THRESHOLD
    tied: bool = False

    def __str__(self) -> str:
        return self.name


EXPORTS = [
    Export("logits"),
    Export("last-logits-beside-native", task="last-logits", layers="odd", keep_exact="onnx"),
    Export("prefill-external-tied", task="prefill", external_threshold=2000, tied=True),
    Export("gemma2-native", model_type="gemma2"),
    Export("bf16", task="prefill", dtype="bf16", layers="odd"),
]


@dataclass(frozen=True)
class Exported:
    case: Export
    folder: Path
    patched: Patched

    def model(self, name: str = onnx_graph.MODEL) -> ModelProto:
        return onnx.load(self.folder / name, load_external_data=False)


@pytest.fixture(scope="module", params=EXPORTS, ids=str)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    case: Export = request.param
    folder = tmp_path_factory.mktemp(case.name)
    source = inspect_source(tiny.save(folder / "model", case.model_type, tie_word_embeddings=case.tied), case.task)
    plan = make_plan(source, layers=case.layers, dtype=case.dtype, keep_exact=case.keep_exact, attributes=tiny.SMALL)
    patched = install(load_model(source, torch_dtype(case.dtype)), plan)
    steps: list[str] = []
    export_onnx(patched, plan, folder, steps.append, case.external_threshold)
    assert len(steps) >= 3
    return Exported(case, folder, patched)


def test_nodes_are_the_planned_layers(exported: Exported) -> None:
    planned = exported.patched.plan.planned
    for name in (onnx_graph.MODEL, onnx_graph.TWIN):
        nodes = hyper_nodes(exported.model(name))
        assert len(nodes) == len(planned)
        for node, layer in zip(nodes, planned, strict=True):
            assert layer.config is not None and Config.from_attributes(attribute_values(node)) == layer.config
            assert node.input[3] == "lengths"


def test_body_is_in_the_model_and_not_in_the_twin(exported: Exported) -> None:
    model, twin = exported.model(), exported.model(onnx_graph.TWIN)
    has_nodes = bool(exported.patched.plan.planned)
    assert [f.name for f in model.functions] == ([OP_TYPE] if has_nodes else [])
    assert not twin.functions
    for node in hyper_nodes(twin):
        plugin = {a.name: helper.get_attribute_value(a) for a in node.attribute if a.name.startswith("plugin_")}
        assert plugin == {"plugin_version": b"1", "plugin_namespace": DOMAIN.encode()}
        assert len(node.output) == 1
    assert without_plugin(model) == without_plugin(twin)


def without_plugin(model: ModelProto) -> list[bytes]:
    nodes = []
    for node in model.graph.node:
        copy = NodeProto()
        copy.CopyFrom(node)
        kept = [a for a in node.attribute if not a.name.startswith("plugin_")]
        del copy.attribute[:], copy.output[:]
        copy.attribute.extend(kept)
        copy.output.extend(name for name in node.output if name)
        nodes.append(copy.SerializeToString())
    return nodes


def test_checkers_take_both_files(exported: Exported) -> None:
    for name in (onnx_graph.MODEL, onnx_graph.TWIN):
        check(exported.folder / name)
    assert not list(exported.folder.glob("*.inferred"))


def test_dimensions_are_named(exported: Exported) -> None:
    model = exported.model()
    dims = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*model.graph.input, *model.graph.output)}
    assert dims["input_ids"] == ["batch", "sequence"] and dims["lengths"] == ["batch"]
    rows = "sequence" if exported.case.task == "logits" else 1
    assert dims["logits"] == ["batch", rows, tiny.VOCABULARY]
    expected = {"input_ids", "lengths", "logits"}
    if exported.case.task == "prefill":
        present = {f"present.{i}.{part}" for i in range(2) for part in ("key", "value")}
        assert all(dims[name] == ["batch", 2, "sequence", 8] for name in present)
        expected |= present
    assert set(dims) == expected


def test_no_trace_of_the_machine(exported: Exported) -> None:
    for name in (onnx_graph.MODEL, onnx_graph.TWIN):
        data = (exported.folder / name).read_bytes()
        for word in (b"stack_trace", b".py", b"site-packages", str(exported.folder).encode(), b"pkg.torch"):
            assert word not in data, f"{word!r} is in {name}"


def test_weights_are_stored_once(exported: Exported) -> None:
    model = exported.model()
    parameters = {name: p.numel() for name, p in exported.patched.model.named_parameters()}  # tied ones are named once
    stored = sum(int(np.prod(t.dims)) for t in model.graph.initializer if int(np.prod(t.dims)) > 8)
    assert sum(parameters.values()) <= stored <= sum(parameters.values()) + 64
    data = exported.folder / onnx_graph.DATA
    if exported.case.external_threshold < onnx_graph.EXTERNAL_THRESHOLD:
        for name in (onnx_graph.MODEL, onnx_graph.TWIN):
            external = [t for t in exported.model(name).graph.initializer if t.data_location == TensorProto.EXTERNAL]
            assert external and {e.value for t in external for e in t.external_data if e.key == "location"} == {onnx_graph.DATA}
            assert (exported.folder / name).stat().st_size < data.stat().st_size
    else:
        assert not data.exists()


def test_only_operators_of_opset_18(exported: Exported) -> None:
    """TensorRT 10.6 reads opsets up to 20 and knows neither RMSNormalization nor Attention as operators."""
    model = exported.model(onnx_graph.TWIN)
    assert {(o.domain, o.version) for o in model.opset_import} - {(DOMAIN, 1)} == {("", OPSET)}
    assert {node.domain for node in model.graph.node} <= {"", DOMAIN}
    kinds = Counter(node.op_type for node in model.graph.node)
    assert not {"RMSNormalization", "Attention", "RotaryEmbedding", "If", "Loop", "Scan", "NonZero"} & set(kinds)


@dataclass(frozen=True)
class Shape:
    lengths: tuple[int, ...]
    sequence: int

    def __str__(self) -> str:
        return f"{len(self.lengths)}x{self.sequence}"


@pytest.mark.parametrize("shape", [Shape((77, 50), 77), Shape((1,), 1), Shape((131, 1, 64), 131)], ids=str)
def test_file_runs_without_our_library_as_exact_attention(exported: Exported, shape: Shape) -> None:
    if exported.case.dtype != "fp32":
        with pytest.raises(Exception, match="bfloat16|NOT_IMPLEMENTED|invalid"):
            onnxruntime.InferenceSession(exported.folder / onnx_graph.MODEL, providers=CPU)
        return
    ids, lengths = tiny.token_ids(len(shape.lengths), shape.sequence), torch.tensor(shape.lengths, dtype=torch.int32)
    session = onnxruntime.InferenceSession(exported.folder / onnx_graph.MODEL, providers=CPU)
    found = session.run(None, {"input_ids": ids.numpy(), "lengths": lengths.numpy()})
    with exported.patched.mode("exact"):
        expected = exported.patched.run({"input_ids": ids, "lengths": lengths})
    assert [o.name for o in session.get_outputs()] == list(expected)
    for (name, b), a in zip(expected.items(), found, strict=True):
        for row, length in enumerate(shape.lengths):
            live = slice(None) if a.shape[-2] == 1 else slice(length)
            np.testing.assert_allclose(a[row][..., live, :], b[row][..., live, :].numpy(), atol=5e-5, rtol=5e-5, err_msg=name)


@pytest.mark.ort
def test_file_runs_with_our_library_as_planned(exported: Exported) -> None:
    from hyperattention.library import ort_library_path

    if exported.case.dtype != "fp32":
        return
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(ort_library_path()))
    ids, lengths = tiny.token_ids(2, 150), torch.tensor([150, 101], dtype=torch.int32)
    expected = next(iter(exported.patched.run({"input_ids": ids, "lengths": lengths}).values()))
    for name in (onnx_graph.MODEL, onnx_graph.TWIN):
        session = onnxruntime.InferenceSession(exported.folder / name, options, providers=CPU)
        found = session.run(None, {"input_ids": ids.numpy(), "lengths": lengths.numpy()})
        np.testing.assert_allclose(found[0][0], expected[0].numpy(), atol=1e-4, rtol=1e-4)


def test_last_logits_are_those_of_the_last_valid_position() -> None:
    ids, lengths = tiny.token_ids(3, 40), torch.tensor([40, 17, 1], dtype=torch.int32)
    every, last = (_random_model(task).run({"input_ids": ids, "lengths": lengths})["logits"] for task in ("logits", "last-logits"))
    assert last.shape == (3, 1, tiny.VOCABULARY)
    for row, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(last[row, 0], every[row, length - 1], atol=1e-5, rtol=1e-5)


def _random_model(task: str | None = None) -> Patched:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        source = inspect_source(tiny.save(Path(folder), num_hidden_layers=1), task)
        return source.load(make_plan(source, layers="all", attributes=tiny.SMALL))


def test_a_model_that_cannot_be_traced_is_an_export_failure(tmp_path: Path) -> None:
    model = _random_model()

    def branches_on_data(*_: Any) -> Any:
        raise RuntimeError("cannot trace this")

    model.model.model.norm.forward = branches_on_data
    with pytest.raises(ExportFailed, match="torch cannot export LlamaForCausalLM: .*cannot trace this"):
        export_onnx(model, model.plan, tmp_path, lambda _: None)
    assert not list(tmp_path.iterdir())


def test_the_same_plan_gives_the_same_bytes(tmp_path: Path) -> None:
    files = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        model = _random_model()
        export_onnx(model, model.plan, tmp_path / name, lambda _: None)
        files.append((tmp_path / name / onnx_graph.MODEL).read_bytes())
    assert files[0] == files[1]
