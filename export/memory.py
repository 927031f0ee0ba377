"""What an export will need in memory, predicted from the configuration alone for --dry-run."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from hyperattention.config import Config
from hyperattention.errors import EnvironmentFault, UsageError
from hyperattention.export.choices import FEATURES, LANGUAGE_TASKS
from hyperattention.export.plan import ExportPlan
from hyperattention.export.source import AttentionLayer, Source, torch_dtype
from hyperattention.library import HaAttributes, HaParams, open_library, ort_library_path, trt_library_path
from hyperattention.native import DTYPE_CODES


@dataclass(frozen=True)
class Item:
    """One line of the prediction; `bytes` is None where it cannot be known here, and `note` says why."""

    name: str
    bytes: int | None
    note: str


def predict(source: Source, plan: ExportPlan) -> list[Item]:
    """Memory at the largest batch and sequence of the plan. Estimates are of the tensors alive at once, without fragmentation."""
    size, batch, rows = torch_dtype(plan.dtype).itemsize, plan.batch[2], plan.seq[2]
    tokens = batch * rows
    # Residual, its normalised copy and the two halves of a gated MLP are alive together.
    activations = tokens * (2 * source.hidden_size + 2 * source.intermediate_size) * size
    cached = [layer.heads_kv * (layer.head_dim + layer.head_dim_v) for layer in source.layers]
    widest = max((layer.heads_q * layer.head_dim + keys for layer, keys in zip(source.layers, cached, strict=True)), default=0)
    attention = tokens * (source.hidden_size + widest) * size
    planned = {layer.name for layer in plan.planned}
    heads = max((layer.heads_q for layer in source.layers if layer.name in planned), default=0)
    items = [
        Item("weights", source.num_parameters * size, f"{source.num_parameters:,} parameters in {plan.dtype}"),
        Item("activations", max(activations, attention), f"{batch} x {rows} tokens, one layer at a time"),
        _outputs(source, plan, tokens, size),
        *([Item("keys and values", tokens * sum(cached) * size, "outputs of the task prefill")] if plan.task == "prefill" else []),
        _workspace(source, plan),
    ]
    if plan.planned:
        # Logits, their masked copy and the probabilities, in fp32.
        body = 3 * batch * heads * rows * rows * 4
        items.append(Item("function body", body, "only where the file runs without our library: n x n logits a head"))
    native = [layer for layer in plan.layers if layer.config is None]
    if native:
        items.append(Item("masks", batch * rows * rows, f"{len(native)} layers keep the model's own attention, which takes n x n masks"))
    return items


def _outputs(source: Source, plan: ExportPlan, tokens: int, size: int) -> Item:
    if plan.task in LANGUAGE_TASKS:
        every = plan.task == "logits"
        note = "every position" if every else "last position of each row"
        return Item("logits", (tokens if every else plan.batch[2]) * source.vocab_size * size, note)
    if plan.task == FEATURES:
        return Item("features", tokens * source.hidden_size * size, "every position")
    return Item("outputs", None, "the module alone says how large they are")


def _workspace(source: Source, plan: ExportPlan) -> Item:
    by_name = {layer.name: layer for layer in source.layers}
    sizes = []
    kernels = "CUDA" if plan.dtype != "fp32" or torch.cuda.is_available() else "CPU"
    try:
        for layer in plan.planned:
            assert layer.config is not None
            sizes.append(workspace_bytes(by_name[layer.name], layer.config, plan, kernels))
    except EnvironmentFault:
        return Item("workspace", None, f"unknown until the library with the {kernels} kernels is built")
    except UsageError as error:
        return Item("workspace", None, f"the {kernels} kernels do not take this: {error}")
    return Item("workspace", max(sizes, default=0), f"of the {kernels} kernels, shared by all layers")


def workspace_bytes(layer: AttentionLayer, config: Config, plan: ExportPlan, kernels: str) -> int:
    """Scratch of one call of the "CPU" or "CUDA" kernels at the plan's largest shape, asked of the library itself.

    Raises EnvironmentFault where it is missing and UsageError for a layer it has no kernel for.
    """
    library = open_library(trt_library_path() if kernels == "CUDA" else ort_library_path())
    measure = library.ha_cuda_workspace_size if kernels == "CUDA" else library.ha_cpu_workspace_size
    library.ha_last_error.restype = ctypes.c_char_p
    params = HaParams(
        ctypes.sizeof(HaParams),
        DTYPE_CODES[torch_dtype(plan.dtype)],
        batch=plan.batch[2],
        heads_q=layer.heads_q,
        heads_kv=layer.heads_kv,
        seq_q=plan.seq[2],
        seq_k=plan.seq[2],
        head_dim=layer.head_dim,
        head_dim_v=layer.head_dim_v,
        attributes=HaAttributes.of(config),
    )
    size = ctypes.c_size_t()
    if measure(ctypes.byref(params), ctypes.byref(size)):
        raise UsageError(f"layer {layer.index} ({layer.name}): {library.ha_last_error().decode(errors='replace')}")
    return size.value
