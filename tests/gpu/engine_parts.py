"""What engine_run.py works with: hand-made ONNX models, an engine over torch tensors, and the comparison with the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor

from hyperattention import reference
from hyperattention.config import DOMAIN, OP_TYPE, Config

ONNX_TYPES = {torch.bfloat16: TensorProto.BFLOAT16, torch.float16: TensorProto.FLOAT16, torch.float32: TensorProto.FLOAT}
# TensorRT 10.6 reads this release of the format; later ones came after it.
IR_VERSION, OPSET = 9, 17


@dataclass(frozen=True)
class Heads:
    """Sizes that a model fixes."""

    q: int = 8
    kv: int = 2
    dim: int = 64
    dim_v: int = 64


def attention_node(config: Config, inputs: list[str], outputs: list[str], **more: int) -> onnx.NodeProto:
    """The node as the engine's twin carries it; `more` are fields that only the plugin knows."""
    attributes = {**config.attributes(), **more, "plugin_version": "1", "plugin_namespace": DOMAIN}
    return helper.make_node(OP_TYPE, inputs, outputs, name="attention", domain=DOMAIN, **attributes)


def op_model(config: Config, dtype: torch.dtype, heads: Heads = Heads(), lengths: bool = True, lse: bool = False) -> bytes:
    """One node: q, k, v [batch, heads, sequence, head size] and lengths [batch] -> o and, when asked for, lse."""
    kind = ONNX_TYPES[dtype]
    shapes = {"q": (heads.q, heads.dim), "k": (heads.kv, heads.dim), "v": (heads.kv, heads.dim_v)}
    inputs = [helper.make_tensor_value_info(n, kind, ["batch", h, "sequence", d]) for n, (h, d) in shapes.items()]
    if lengths:
        inputs.append(helper.make_tensor_value_info("lengths", TensorProto.INT32, ["batch"]))
    outputs = [helper.make_tensor_value_info("o", kind, ["batch", heads.q, "sequence", heads.dim_v])]
    if lse:
        outputs.append(helper.make_tensor_value_info("lse", TensorProto.FLOAT, ["batch", heads.q, "sequence"]))
    more = {"with_lse": 1} if lse else {}
    node = attention_node(config, [i.name for i in inputs], [o.name for o in outputs], **more)
    return _model([node], inputs, outputs, []).SerializeToString()


def token_model(config: Config, dtype: torch.dtype, heads: Heads, tables: dict[str, Tensor]) -> onnx.ModelProto:
    """input_ids [batch, sequence] int64, lengths -> logits: the rows of three tables [256, heads x head size], attended."""
    kind = ONNX_TYPES[dtype]
    inputs = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"]),
        helper.make_tensor_value_info("lengths", TensorProto.INT32, ["batch"]),
    ]
    nodes, weights = [], []
    for name, table in tables.items():
        count, dim = (heads.q if name == "q" else heads.kv), (heads.dim_v if name == "v" else heads.dim)
        raw = table.cpu().contiguous().view(torch.int16).numpy().tobytes()
        weights.append(helper.make_tensor(f"{name}_table", kind, list(table.shape), raw, raw=True))
        weights.append(helper.make_tensor(f"{name}_shape", TensorProto.INT64, [4], [0, 0, count, dim]))
        nodes.append(helper.make_node("Gather", [f"{name}_table", "input_ids"], [f"{name}_rows"], axis=0))
        nodes.append(helper.make_node("Reshape", [f"{name}_rows", f"{name}_shape"], [f"{name}_split"]))
        nodes.append(helper.make_node("Transpose", [f"{name}_split"], [name], perm=[0, 2, 1, 3]))
    nodes.append(attention_node(config, ["q", "k", "v", "lengths"], ["logits"]))
    outputs = [helper.make_tensor_value_info("logits", kind, ["batch", heads.q, "sequence", heads.dim_v])]
    return _model(nodes, inputs, outputs, weights)


def _model(nodes: list, inputs: list, outputs: list, weights: list) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "attention", inputs, outputs, weights)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)


def build(trt: Any, logger: Any, model: bytes, profile: dict[str, tuple], refit: bool = False) -> Any:
    """The engine of `model`, strongly typed; `profile` gives (min, opt, max) shapes. Raises RuntimeError with the parser's errors."""
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model):
        raise RuntimeError("; ".join(parser.get_error(i).desc() for i in range(parser.num_errors)))
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if refit:
        config.set_flag(trt.BuilderFlag.REFIT)
    shapes = builder.create_optimization_profile()
    for name, bounds in profile.items():
        shapes.set_shape(name, *bounds)
    config.add_optimization_profile(shapes)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError("TensorRT built no engine")
    return trt.Runtime(logger).deserialize_cuda_engine(plan)


class Runner:
    """One execution context of an engine with a stream of its own; call it with CUDA tensors by input name."""

    def __init__(self, trt: Any, engine: Any) -> None:
        self.trt, self.engine = trt, engine
        self.context, self.stream = engine.create_execution_context(), torch.cuda.Stream()
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}

    def bind(self, **inputs: Tensor) -> None:
        """Sets shapes and addresses, and allocates the outputs; holds all of them until the next call."""
        self.inputs = inputs
        for name, tensor in inputs.items():
            if not self.context.set_input_shape(name, tuple(tensor.shape)):
                raise RuntimeError(f"the profile does not hold {name} of shape {tuple(tensor.shape)}")
            self.context.set_tensor_address(name, tensor.data_ptr())
        self.outputs = {}
        for i in range(self.engine.num_io_tensors):
            name = self.engine.get_tensor_name(i)
            if self.engine.get_tensor_mode(name) == self.trt.TensorIOMode.OUTPUT:
                kind = {self.trt.bfloat16: torch.bfloat16, self.trt.float16: torch.float16, self.trt.float32: torch.float32}
                shape = tuple(self.context.get_tensor_shape(name))
                self.outputs[name] = torch.full(shape, float("nan"), dtype=kind[self.engine.get_tensor_dtype(name)], device="cuda")
                self.context.set_tensor_address(name, self.outputs[name].data_ptr())
        torch.cuda.synchronize()

    def launch(self) -> None:
        """Enqueues one run on the stream."""
        if not self.context.execute_async_v3(self.stream.cuda_stream):
            raise RuntimeError("enqueue failed; the reason is in TensorRT's log")

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        self.bind(**inputs)
        self.launch()
        self.stream.synchronize()
        return self.outputs


def random_inputs(heads: Heads, batch: int, seq: int, dtype: torch.dtype, lengths: list[int] | None, seed: int = 0) -> dict[str, Tensor]:
    """q, k, v and lengths on the GPU; keys repeat in clusters so that some blocks are heavy, and padding holds NaN."""
    g = torch.Generator().manual_seed(seed)

    def draw(count: int, dim: int) -> Tensor:
        centres = torch.randn(batch, count, seq // 64 + 1, dim, generator=g).repeat_interleave(64, 2)[:, :, :seq]
        return torch.randn(batch, count, seq, dim, generator=g) + centres

    q, k, v = draw(heads.q, heads.dim), draw(heads.kv, heads.dim), draw(heads.kv, heads.dim_v)
    valid = lengths or [seq] * batch
    for row, length in enumerate(valid):
        k[row, :, length:] = v[row, :, length:] = float("nan")
    made = {"q": q, "k": k, "v": v}
    return {n: x.to("cuda", dtype) for n, x in made.items()} | {"lengths": torch.tensor(valid, dtype=torch.int32, device="cuda")}


def random_tables(heads: Heads, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """The tables of token_model: a row of q, k and v for each of 256 tokens."""
    g = torch.Generator().manual_seed(seed)
    widths = {"q": heads.q * heads.dim, "k": heads.kv * heads.dim, "v": heads.kv * heads.dim_v}
    return {n: torch.randn(256, width, generator=g).to(dtype) for n, width in widths.items()}


def table_inputs(heads: Heads, tables: dict[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
    """q, k and v as token_model makes them of `ids` int [batch, sequence], on the GPU."""
    counts = {"q": heads.q, "k": heads.kv, "v": heads.kv}
    return {n: table[ids].unflatten(-1, (counts[n], -1)).transpose(1, 2).contiguous().cuda() for n, table in tables.items()}


def compare(inputs: dict[str, Tensor], config: Config, o: Tensor, lse: Tensor | None = None) -> dict[str, float]:
    """Errors against the reference in fp64 with the reference's own plan, beside those of the naive twin in `o`'s dtype.

    Raises AssertionError where an error is over twice the twin's plus two units in the last place of the largest value.
    """
    q, k, v, lengths = (inputs[n] for n in ("q", "k", "v", "lengths"))
    plan = reference.attention(q, k, v, config, lengths).plan
    exact = reference.attention(q.double(), k.double(), v.double(), config, lengths, plan)
    naive = reference.attention(q, k, v, config, lengths, plan, arithmetic=q.dtype)
    found = _error("o", o, naive.o, exact.o, q.dtype)
    if lse is not None:
        found |= _error("lse", lse, naive.lse, exact.lse, torch.float32)
    return found


def _error(name: str, value: Tensor, naive: Tensor, exact: Tensor, dtype: torch.dtype) -> dict[str, float]:
    finite = exact.isfinite()
    differing = int((value.isfinite() != finite).sum())
    assert differing == 0, f"{name}: {differing} values are finite in one of the two only"
    exact = exact[finite]
    error, twin = (float((x[finite].double() - exact).abs().max()) for x in (value, naive))
    allowed = 2 * twin + 2 * torch.finfo(dtype).eps * float(exact.abs().max())
    assert error <= allowed, f"{name}: largest error {error:.3g}, allowed {allowed:.3g} (twin {twin:.3g})"
    return {f"{name}_error": error, f"{name}_twin": twin, f"{name}_allowed": allowed}
