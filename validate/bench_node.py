"""ONNX models of one attention node: ours, as an engine's twin carries it, and ONNX Runtime's own exact ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor

from hyperattention.config import DOMAIN, OP_TYPE, Config
from hyperattention.validate.ort_session import ONNX_TYPES

MICROSOFT = "com.microsoft"
# TensorRT 10.6 reads this release of the format; later ones came after it. ONNX's own Attention needs a newer one.
IR_VERSION, OPSET = 9, 17
_ATTENTION_IR_VERSION, _ATTENTION_OPSET = 11, 23


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
    return make_model([node], inputs, outputs, []).SerializeToString()


def make_model(nodes: list, inputs: list, outputs: list, weights: list) -> onnx.ModelProto:
    """A model of the opsets that hold our node, readable by the oldest TensorRT."""
    graph = helper.make_graph(nodes, "attention", inputs, outputs, weights)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)


@dataclass(frozen=True)
class RivalNode:
    """One of ONNX Runtime's exact attention ops. `packed`: it takes [batch, sequence, heads x head size]; `quadratic`: it holds all
    logits at once; `causal_only` and `equal_heads`: what it cannot leave out or tell apart."""

    name: str
    domain: str
    packed: bool
    quadratic: bool
    causal_only: bool = False
    equal_heads: bool = False

    def model(self, heads: Heads, causal: bool, feed: dict[str, Tensor]) -> bytes:
        """The model for the shapes of `feed`, as `feed_of` makes it; its output is `o`."""
        attributes: dict[str, Any] = {"is_causal": int(causal)}
        names, outputs = list(feed), ["o"]
        if self.name == "GroupQueryAttention":
            attributes = {"num_heads": heads.q, "kv_num_heads": heads.kv}
            names, outputs = ["q", "k", "v", "", "", "last", "total"], ["o", "present_k", "present_v"]
        elif self.name == "MultiHeadAttention":
            attributes = {"num_heads": heads.q, "unidirectional": int(causal)}
        node = helper.make_node(self.name, names, outputs, domain=self.domain, **attributes)
        values = [helper.make_tensor_value_info(n, ONNX_TYPES[x.dtype], list(x.shape)) for n, x in feed.items()]
        answer = helper.make_tensor_value_info("o", ONNX_TYPES[feed["q"].dtype], list(feed["q"].shape))
        graph = helper.make_graph([node], "rival", values, [answer])
        opsets = [helper.make_opsetid("", _ATTENTION_OPSET), helper.make_opsetid(MICROSOFT, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=_ATTENTION_IR_VERSION).SerializeToString()

    def feed_of(self, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        """Inputs by name, in the op's layout, of q, k, v [batch, heads, sequence, head size]."""
        split = {"q": q, "k": k, "v": v}
        feed = {n: x.transpose(1, 2).flatten(2).contiguous() if self.packed else x for n, x in split.items()}
        if self.name == "GroupQueryAttention":
            length = q.shape[2]
            feed["last"] = torch.full((q.shape[0],), length - 1, dtype=torch.int32)
            feed["total"] = torch.tensor(length, dtype=torch.int32)
        return feed

    def split(self, o: Tensor, heads: Heads) -> Tensor:
        """The op's output as [batch, heads, sequence, head size]."""
        return o.unflatten(2, (heads.q, -1)).transpose(1, 2) if self.packed else o


RIVAL_NODES = (
    RivalNode("GroupQueryAttention", MICROSOFT, packed=True, quadratic=False, causal_only=True),
    RivalNode("MultiHeadAttention", MICROSOFT, packed=True, quadratic=True, equal_heads=True),
    RivalNode("Attention", "", packed=False, quadratic=True),
)
