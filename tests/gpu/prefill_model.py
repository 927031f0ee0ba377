"""A Llama shape with random weights, one layer's tied over all layers, as ONNX files for bench_prefill.py. Needs no GPU.

Tied, the file is as large as one layer, whatever the depth; what a layer computes and how long it takes is the same.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from hyperattention.export.files import TWIN
from hyperattention.export.model_files import quiet
from hyperattention.export.onnx_graph import export_onnx, hyper_nodes
from hyperattention.export.patch import install
from hyperattention.export.plan import ExportPlan, make_plan
from hyperattention.export.source import Range, open_source, torch_dtype
from hyperattention.validate.provenance import check_graph

# name: (--layers, --preset), as of export-model.
VARIANTS = {"exact": ("all", "exact"), "half": ("odd", "blocks"), "all": ("all", "blocks"), "paper": ("all", "paper")}


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama model; the defaults are of the 6 B class. The vocabulary is small: prefill computes one row of logits."""

    hidden: int = 4096
    intermediate: int = 11008
    heads: int = 32
    heads_kv: int = 8
    head_dim: int = 128
    layers: int = 32
    vocabulary: int = 1024

    def config(self, longest: int) -> LlamaConfig:
        """transformers' configuration, for up to `longest` tokens."""
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads_kv,
            head_dim=self.head_dim,
            max_position_embeddings=longest,
            tie_word_embeddings=False,
            architectures=["LlamaForCausalLM"],
        )

    def layer_parameters(self) -> int:
        """Weights of the matrices of one layer."""
        return self.hidden * (2 * self.head_dim * (self.heads + self.heads_kv) + 3 * self.intermediate)


@dataclass(frozen=True)
class Model:
    """`shape` in `dtype`, to be exported for the range `seq` of lengths; `attributes` override the presets'."""

    shape: Shape
    seq: Range
    dtype: str = "bf16"
    attributes: Mapping[str, int] | None = None

    def tied(self) -> PreTrainedModel:
        """The model on the processor, random and always the same."""
        return _repeat_layer(self.one_layer(), self.shape.layers)

    def one_layer(self) -> PreTrainedModel:
        """The same of one layer."""
        torch.manual_seed(0)
        config = replace(self.shape, layers=1).config(self.seq[2])
        return AutoModelForCausalLM.from_config(config, dtype=torch_dtype(self.dtype)).eval()

    def save(self, folder: Path) -> PreTrainedModel:
        """Writes the directory that export-model would be given, its weights of one layer; returns what `tied` does."""
        one = self.one_layer()
        with quiet():
            one.save_pretrained(folder)
        self.shape.config(self.seq[2]).save_pretrained(folder)
        return _repeat_layer(one, self.shape.layers)

    def plan(self, folder: Path, variant: str) -> ExportPlan:
        """What export-model would do with the directory in `folder` for one of VARIANTS."""
        layers, preset = VARIANTS[variant]
        source = open_source(str(folder), task="last-logits")
        return make_plan(source, layers=layers, preset=preset, attributes=self.attributes, dtype=self.dtype, seq=self.seq)


def _repeat_layer(model: Any, count: int) -> PreTrainedModel:
    """A Llama of one layer with `count` of them, all with the parameters of the first."""
    first = model.model.layers[0]
    # What stands in the memo is not copied: the parameters, and the configuration, which says how attention is computed.
    shared = {id(part): part for part in (*first.parameters(), model.config)}
    for index in range(1, count):
        layer = copy.deepcopy(first, dict(shared))
        layer.self_attn.layer_idx = index
        model.model.layers.append(layer)
    model.config.num_hidden_layers = count
    return model


def prepare(model: Model, folder: Path) -> None:
    """Writes `folder`/model, the directory of `Model.save`, and `folder`/onnx, the ONNX files of the exact plan.

    Uses the processor alone, so that a process of its own can do it meanwhile.
    """
    loaded, plan = model.save(folder / "model"), model.plan(folder / "model", "exact")
    (folder / "onnx").mkdir()
    export_onnx(install(loaded, plan), plan, folder / "onnx", lambda step: None)


def write_variant(onnx_file: Path, plan: ExportPlan, folder: Path) -> list[str]:
    """Writes `folder`/model.trt.onnx: `onnx_file`, of another plan of the same layers, with the attributes of `plan`.

    The graph around the nodes is the same for all plans, so that it is traced once. Returns the nodes' names, in the order of the
    layers. Raises EnvironmentFault where the file does not hold what the plan says.
    """
    proto = onnx.load(onnx_file)
    for node, layer in zip(hyper_nodes(proto), plan.planned, strict=True):
        assert layer.config is not None
        wanted = layer.config.attributes()
        kept = [attribute for attribute in node.attribute if attribute.name not in wanted]
        del node.attribute[:]
        node.attribute.extend([*kept, *(onnx.helper.make_attribute(name, value) for name, value in wanted.items())])
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(proto, folder / TWIN)
    return check_graph(folder / TWIN, plan)
