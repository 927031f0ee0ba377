"""What engine_run.py works with: hand-made ONNX models, an engine over torch tensors, and the comparison with the reference."""

from __future__ import annotations

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor

from hyperattention import reference
from hyperattention.config import Config
from hyperattention.validate.bench_node import Heads, attention_node, make_model, op_model
from hyperattention.validate.bench_runtimes import EngineRunner as Runner
from hyperattention.validate.bench_runtimes import build_engine as build
from hyperattention.validate.ort_session import ONNX_TYPES

__all__ = ["Heads", "Runner", "build", "compare", "op_model", "random_inputs", "random_tables", "table_inputs", "token_model"]


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
    return make_model(nodes, inputs, outputs, weights)


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
