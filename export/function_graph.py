"""A module's graph by torch.export, the attention calls in it, and which of them the operator can stand in for.

PyTorch's causal mask is aligned upper-left and ours bottom-right, so a causal call is taken only where the graph proves that
there are as many rows as keys. Every other kind of attention that can be recognised is listed with the reason it stays.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, Iterator

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

import hyperattention.op  # noqa: F401  registers torch.ops.hyperattention.attention
from hyperattention.config import MOST_HEAD_DIM, SCALES
from hyperattention.errors import UnsupportedModel
from hyperattention.export.source import AttentionLayer

OPERATOR = torch.ops.hyperattention.attention.default
SDPA = torch.ops.aten.scaled_dot_product_attention.default
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_OTHER = re.compile(
    r"flash|efficient_attention|cudnn_attention|flex_attention|sage_?attn|native_multi_head_attention|transformer_encoder_layer"
)
_PRODUCTS = re.compile(r"^aten\.(matmul|bmm|baddbmm|einsum|mm)\.")
_SOFTMAX = re.compile(r"^aten\.(_?softmax|_safe_softmax)\.")
# What lies between the two products and the softmax: scaling, masks, dropout, casts, views.
_BETWEEN = re.compile(
    r"^aten\.(mul|div|add|sub|where|masked_fill|dropout|to|_to_copy|view|reshape|transpose|permute|expand|contiguous|clone|unsqueeze|"
    r"squeeze|nan_to_num|clamp|tanh|detach|alias|type_as)\."
)
_REGIONS = {
    "wrap_with_autocast": "an autocast region",
    "wrap_with_set_grad_enabled": "a region that switches gradients on",
    "cond": "torch.cond",
    "while_loop": "a while_loop",
    "scan": "a scan",
}


@dataclass(frozen=True)
class Call:
    """One attention call of the graph: its layer, its node, and its batch and key length, which may be symbolic (None: unknown)."""

    layer: AttentionLayer
    node: Node
    batch: Any = None
    keys: Any = None


def find_calls(program: ExportedProgram, architecture: str) -> tuple[Call, ...]:
    """All attention of the graph in calling order. Raises UnsupportedModel where there is none of known size, or where it is our
    operator already.
    """
    calls: list[Call] = []
    names: Counter[str] = Counter()
    for node, region in _nodes(program.graph_module, None):
        if node.target is OPERATOR:
            raise UnsupportedModel(f"{architecture} calls hyperattention's operator itself; return the module with PyTorch's attention")
        if node.target is SDPA:
            call = _call(node, region)
        else:
            reason = _other_attention(node)
            if reason is None:
                continue
            call = Call(AttentionLayer(0, "", 0, 0, 1, 1, 1.0, reason, causal=False), node)
        name = module_path(node) or architecture
        names[name] += 1
        name = name if names[name] == 1 else f"{name}#{names[name]}"
        calls.append(replace(call, layer=replace(call.layer, index=len(calls), name=name)))
    if not calls:
        raise UnsupportedModel(
            f"no attention was found in the graph of {architecture}: it was searched for scaled_dot_product_attention, which can be "
            f"replaced, for flash and flex attention, and for softmax(QK^T)V written out; compute the attention by "
            f"torch.nn.functional.scaled_dot_product_attention(q, k, v)"
        )
    if all(call.keys is None or call.batch is None for call in calls):
        listed = "; ".join(f"{call.layer.name}: {call.layer.problem}" for call in calls[:3])
        more = f"; and {len(calls) - 3} more" if len(calls) > 3 else ""
        raise UnsupportedModel(f"none of the {len(calls)} attention calls of {architecture} can be replaced: {listed}{more}")
    return tuple(calls)


def module_path(node: Node) -> str:
    """The path of the module whose forward made the node, as named_modules of the user's module calls it."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    # The user's module is called "module" in the one that is traced (function_export.Flat).
    return re.sub(r"@\d+", "", path.removeprefix("module").removeprefix("."))


def arguments(node: Node) -> dict[str, Any]:
    """The arguments of an operator's node by their names in its schema; those left out are absent."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _nodes(graph: GraphModule, region: str | None) -> Iterator[tuple[Node, str | None]]:
    """Calls in calling order, with the region that holds them: those of a graph inside come where that graph is called."""
    inner = dict(graph.named_modules())
    for node in graph.graph.nodes:
        if node.op != "call_function":
            continue
        yield node, region
        for argument in node.all_input_nodes:
            if argument.op == "get_attr" and isinstance(inner.get(str(argument.target)), GraphModule):
                name = getattr(node.target, "__name__", str(node.target))
                yield from _nodes(inner[str(argument.target)], region or _REGIONS.get(name, name))


def _call(node: Node, region: str | None) -> Call:
    given = arguments(node)
    q, k, v = (given[name].meta["val"] for name in ("query", "key", "value"))
    scale = given.get("scale")
    problem = f"a call inside {region}" if region else _problem(q, k, v, given)
    known = q.dim() == k.dim() == v.dim() == 4 and all(isinstance(t.shape[i], int) for t in (q, k, v) for i in (1, 3))
    layer = AttentionLayer(
        index=0,
        name="",
        heads_q=q.shape[1] if known else 0,
        heads_kv=k.shape[1] if known else 0,
        head_dim=q.shape[3] if known else 1,
        head_dim_v=v.shape[3] if known else 1,
        scale=float(scale) if isinstance(scale, (int, float)) else float(q.shape[-1]) ** -0.5 if isinstance(q.shape[-1], int) else 1.0,
        problem=problem,
        causal=bool(given.get("is_causal", False)),
    )
    sizes = (q.shape[0] if q.dim() == 4 else None, k.shape[-2])
    return Call(layer, node, *(None if _depends_on_data(size) else size for size in sizes))


def _problem(q: Tensor, k: Tensor, v: Tensor, given: dict[str, Any]) -> str | None:
    """Why the operator cannot compute scaled_dot_product_attention of these; None when it can."""
    if given.get("attn_mask") is not None:
        return "a mask given (attn_mask)"
    if given.get("dropout_p", 0.0) != 0.0:
        return f"dropout_p {given['dropout_p']}"
    scale = given.get("scale")
    if scale is not None and not isinstance(scale, (int, float)):
        return "a scale computed in the graph"
    if scale is not None and not SCALES[0] <= scale <= SCALES[1]:
        return f"scale {scale} on the logits; the operator takes one above 0"
    return _shape_problem(q, k, v, given)


def _shape_problem(q: Tensor, k: Tensor, v: Tensor, given: dict[str, Any]) -> str | None:
    if not q.dim() == k.dim() == v.dim() == 4:
        return f"tensors of {q.dim()}, {k.dim()} and {v.dim()} axes; the operator takes 4: batch, heads, sequence, head size"
    if not (q.dtype == k.dtype == v.dtype and q.dtype in _DTYPES):
        kinds = " and ".join(sorted({str(t.dtype).removeprefix("torch.") for t in (q, k, v)}))
        return f"attention in {kinds}; the operator takes fp32, fp16 or bf16"
    if not all(isinstance(t.shape[axis], int) for t in (q, k, v) for axis in (1, 3)):
        return "a number of heads or a head size that varies"
    if not 0 < min(q.shape[3], v.shape[3]) <= max(q.shape[3], v.shape[3]) <= MOST_HEAD_DIM:
        return f"heads of size {q.shape[3]} and {v.shape[3]}; the operator takes 1 to {MOST_HEAD_DIM}"
    if not all(_equal(q.shape[0], t.shape[0]) for t in (k, v)):
        return f"batches that are not proved equal ({q.shape[0]}, {k.shape[0]} and {v.shape[0]}), so one is broadcast"
    heads_q, heads_kv = q.shape[1], k.shape[1]
    if heads_kv != v.shape[1]:
        return f"{heads_kv} heads of keys and {v.shape[1]} of values"
    if heads_q != heads_kv and not given.get("enable_gqa", False):
        return f"{heads_q} heads of queries over {heads_kv} of keys, broadcast without enable_gqa"
    if heads_q % heads_kv:
        return f"{heads_q} heads of queries, no multiple of the {heads_kv} of keys"
    if not _equal(k.shape[2], v.shape[2]):
        return f"{k.shape[2]} keys and {v.shape[2]} values, not proved equal"
    if _depends_on_data(k.shape[2]) or _depends_on_data(q.shape[0]):
        return "a number of keys or rows that depends on the data"
    if given.get("is_causal", False) and not _equal(q.shape[2], k.shape[2]):
        return (
            f"is_causal with {q.shape[2]} rows and {k.shape[2]} keys, not proved equal: PyTorch's mask is aligned upper-left, the "
            f"operator's bottom-right"
        )
    return None


def _equal(a: Any, b: Any) -> bool:
    return statically_known_true(a == b)


def _depends_on_data(size: Any) -> bool:
    symbols = size.node.expr.free_symbols if isinstance(size, torch.SymInt) else ()
    return any(str(symbol).startswith("u") for symbol in symbols)


def _other_attention(node: Node) -> str | None:
    """What kind of attention, but scaled_dot_product_attention, the node is; None for any other node."""
    name = str(node.target)
    if _OTHER.search(name):
        short = name.removeprefix("aten.").removesuffix(".default")
        return f"attention of its own ({short}); scaled_dot_product_attention could be replaced"
    if not _SOFTMAX.match(name) or not _reaches(node, backwards=True) or not _reaches(node, backwards=False):
        return None
    if "MultiheadAttention" in _module_type(node):
        return "softmax(QK^T)V written out by nn.MultiheadAttention; call it with need_weights=False"
    return "softmax(QK^T)V written out; call scaled_dot_product_attention instead"


def _reaches(softmax: Node, backwards: bool) -> bool:
    """Whether a matrix product lies behind or before the softmax, with nothing but scaling, masking and views between."""
    waiting, seen = [softmax], {softmax}
    while waiting:
        node = waiting.pop()
        for other in node.all_input_nodes if backwards else node.users:
            name = str(other.target)
            if other.op == "call_function" and _PRODUCTS.match(name):
                return True
            if other not in seen and other.op == "call_function" and _BETWEEN.match(name):
                seen.add(other)
                waiting.append(other)
    return False


def _module_type(node: Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][1]) if stack else ""
