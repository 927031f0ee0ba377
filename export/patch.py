"""A loaded model with its attention calls replaced by the operator, and the same model exact, to compare.

Nothing here knows an architecture: transformers calls our attention function through its AttentionInterface, and the
module that calls tells which layer of the plan it is.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any, Mapping

import torch
from onnx import ModelProto
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hyperattention.config import Config
from hyperattention.errors import UnsupportedModel, UsageError
from hyperattention.export.attention_rules import direction, find_problem
from hyperattention.export.masks import attention_mask_function, given_lengths
from hyperattention.export.onnx_trace import trace
from hyperattention.export.plan import ExportPlan, LayerPlan
from hyperattention.export.probe import accepted
from hyperattention.export.switched import Captured, State, Switched
from hyperattention.export.task_module import TaskModule

IMPLEMENTATION = "hyperattention"
_SLOT = "_hyperattention_slot"
_MASK_ELEMENTS = 2**26  # boolean mask entries held at once by the exact path with a cache


@dataclass
class _Slot:
    layer: LayerPlan
    state: State
    calls: int = field(default=0)


class Patched(Switched):
    """A model whose attention layers follow a plan. Inference only; made by `install`."""

    def __init__(self, model: PreTrainedModel, plan: ExportPlan, slots: dict[int, _Slot], state: State) -> None:
        super().__init__(state)
        self.model, self.plan, self._slots = model, plan, slots

    @torch.no_grad()
    def forward(self, input_ids: Tensor, lengths: Tensor | None = None, past_key_values: Any = None, use_cache: bool = False) -> Any:
        """Runs the model on input_ids int64 [B, S]; lengths int [B] counts each row's valid keys, cached ones included.

        Returns transformers' output, with .logits [B, S, vocab] or .last_hidden_state [B, S, hidden size], and .past_key_values. A
        cache that is passed in is extended in place. Raises UsageError for lengths that do not fit and UnsupportedModel for a call
        the operator cannot compute.
        """
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        cached = accepted(self.model, {"past_key_values": past_key_values, "use_cache": use_cache})
        if lengths is None:
            return self.model(input_ids=input_ids, **cached)
        if tuple(lengths.shape) != (input_ids.shape[0],):
            raise UsageError(f"lengths has shape {tuple(lengths.shape)}; it takes one length a row: ({input_ids.shape[0]},)")
        mask = padding_mask(lengths, past + input_ids.shape[1])
        with given_lengths(lengths):
            return self.model(input_ids=input_ids, attention_mask=mask, **cached)

    @torch.no_grad()
    def run(self, feed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The plan's outputs by name (`TaskModule`), on the model's device; `feed` has one tensor for each of plan.inputs."""
        first = next(self.model.parameters())
        given = [feed[entry.name].to(first.device, first.dtype if entry.dtype == "float" else None) for entry in self.plan.inputs]
        if len(given) == 2 and bool((given[1] == given[0].shape[1]).all()):
            del given[1]  # without padding no mask is built
        return dict(zip(self.plan.outputs, TaskModule(self)(*given), strict=True))

    def trace(self) -> ModelProto:
        """The raw graph of the plan's task. Raises ExportFailed where torch cannot trace it."""
        task = TaskModule(self)
        return trace(task, task.examples(), self.plan, type(self.model).__name__)

    def calls(self) -> dict[int, int]:
        """How often each layer's attention was called through us, by layer index."""
        return {index: slot.calls for index, slot in self._slots.items()}


def padding_mask(lengths: Tensor, keys: int) -> Tensor:
    """The right-padded mask bool [B, keys] of `lengths` [B]."""
    return torch.arange(keys, device=lengths.device)[None] < lengths[:, None]


def install(model: PreTrainedModel, plan: ExportPlan) -> Patched:
    """Routes the attention of `model` through the operator as `plan` says. Raises UnsupportedModel when a layer is not there."""
    AttentionInterface.register(IMPLEMENTATION, _attention_function)
    AttentionMaskInterface.register(IMPLEMENTATION, attention_mask_function)
    state = State()
    slots = {}
    modules = dict(model.named_modules())
    for layer in plan.layers:
        if layer.name not in modules:
            raise UnsupportedModel(f"the plan names layer {layer.index} {layer.name}, which {type(model).__name__} does not have")
        slot = _Slot(layer, state)
        setattr(modules[layer.name], _SLOT, slot)
        slots[layer.index] = slot
    model.set_attn_implementation(IMPLEMENTATION)
    return Patched(model, plan, slots, state)


def _attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls: q, k, v [B,H,S,D] in, [B,S,H,D] out."""
    slot: _Slot | None = getattr(module, _SLOT, None)
    if slot is None:
        raise UsageError(f"{type(module).__name__} is not part of a plan; call hyperattention.export.patch.install on the model first")
    slot.calls += 1
    layer, state = slot.layer, slot.state
    if layer.config is None:
        return _native(module, query, key, value, attention_mask, scaling, dropout, kwargs)
    problem = find_problem(module, attention_mask, scaling, dropout, kwargs) or _other_scale(layer.config, scaling, query.shape[-1])
    if problem is None and direction(module, attention_mask, kwargs) != bool(layer.config.causal):
        problem = f"attention that is {'not causal' if layer.config.causal else 'causal'}, where the plan says otherwise"
    if problem is not None:
        raise UnsupportedModel(f"layer {layer.index} ({layer.name}) uses {problem}; leave it out of --layers or pass plain inputs")
    if state.mode == "exact":
        scale = layer.config.resolved_scale(query.shape[-1])
        o = exact_attention(query, key, value, scale, bool(layer.config.causal), attention_mask)
    else:
        o, _ = state.attention(query, key, value, layer.config, attention_mask)
    state.keep(Captured(layer.index, query, key, value, attention_mask, layer.config, o))
    return o.transpose(1, 2), None


def _other_scale(config: Config, scaling: float | None, head_dim: int) -> str | None:
    wanted = head_dim**-0.5 if scaling is None else scaling
    planned = config.resolved_scale(head_dim)
    return None if abs(wanted - planned) <= 1e-5 * planned else f"scale {wanted:.6g}, where the plan says {planned:.6g}"


def exact_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = True, lengths: Tensor | None = None) -> Tensor:
    """PyTorch's exact attention, causal aligned bottom-right or full, without an n x n mask. Returns [B,Hq,Sq,Dv].

    A live row of causal attention never sees a key past its row's length (right padding), so lengths change nothing there.
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    sdpa = nn.functional.scaled_dot_product_attention
    rows, keys = q.shape[2], k.shape[2]
    if not causal:
        return sdpa(q, k, v, attn_mask=None if lengths is None else padding_mask(lengths, keys)[:, None, None], scale=scale)
    if rows == keys:
        return sdpa(q, k, v, is_causal=True, scale=scale)
    parts = []
    step = max(1, _MASK_ELEMENTS // keys)
    for start in range(0, rows, step):
        position = torch.arange(start, min(start + step, rows), device=q.device) + keys - rows
        visible = torch.arange(keys, device=q.device)[None] <= position[:, None]
        parts.append(sdpa(q[:, :, start : start + step], k, v, attn_mask=visible, scale=scale))
    return torch.cat(parts, 2)


def _native(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """The model's own attention: PyTorch's, or the module's own function for what PyTorch's cannot do."""
    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    special = any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias"))
    plain = mask is None or mask.dim() == 1
    causal = direction(module, mask, kwargs)
    if plain and not special and not dropout:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return exact_attention(query, key, value, scale, causal, mask).transpose(1, 2), None
    visible = _visible(query.shape[2], key.shape[2], causal, mask, query.device) if mask is None or plain else mask
    if own is None or not special:
        return sdpa_attention_forward(module, query, key, value, visible, dropout=dropout, scaling=scaling, **kwargs)
    if visible.dtype == torch.bool:
        lowest = torch.finfo(query.dtype).min
        visible = torch.zeros(visible.shape, dtype=query.dtype, device=query.device).masked_fill(~visible, lowest)
    return own(module, query, key, value, visible, scaling=scaling, dropout=dropout, **kwargs)


def _visible(rows: int, keys: int, causal: bool, lengths: Tensor | None, device: torch.device) -> Tensor:
    """The causal mask aligned bottom-right, or the full one, bool [1 or B, 1, rows, keys]."""
    position = torch.arange(rows, device=device)[:, None] + keys - rows
    visible = ((torch.arange(keys, device=device) <= position) | (not causal))[None, None]
    return visible if lengths is None else visible & padding_mask(lengths, keys)[:, None, None]
