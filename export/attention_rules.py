"""Which attention calls the operator can stand in for. Everything else is named, never dropped.

A layer is judged by what its module passes to transformers' attention function: the mask and the keyword arguments.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from hyperattention.export.masks import is_lengths, mask_direction

# Arguments that steer the model around the attention, not the attention itself.
_HARMLESS = frozenset(
    "position_ids use_cache cache_position past_key_values position_embeddings output_hidden_states output_router_logits "
    "return_dict logits_to_keep num_items_in_batch layer_idx training deterministic".split()
)
_NAMED = {
    "sliding_window": "sliding window of {value} keys",
    "softcap": "softcap {value} on the logits",
    "s_aux": "attention sinks (s_aux) in the softmax",
    "position_bias": "position bias on the logits",
    "alibi": "position bias (ALiBi) on the logits",
    "cu_seq_lens_q": "packed sequences (cu_seq_lens_q)",
    "cu_seq_lens_k": "packed sequences (cu_seq_lens_k)",
    "encoder_hidden_states": "cross-attention",
    "key_value_states": "cross-attention",
    "head_mask": "a head mask",
    "output_attentions": "attention weights as an output",
}


def direction(module: nn.Module, attention_mask: Any, kwargs: dict[str, Any]) -> bool:
    """Whether this call is causal: by its mask where that says so, else as transformers' own SDPA decides without a mask."""
    masked, given = mask_direction(attention_mask), kwargs.get("is_causal")
    if masked is not None:
        return masked
    return bool(given if given is not None else getattr(module, "is_causal", True))


def find_problem(module: nn.Module, attention_mask: Any, scale: float | None, dropout: float, kwargs: dict[str, Any]) -> str | None:
    """Why the operator cannot compute this call, in a few words; None when it can.

    `attention_mask` is what the registered mask function gave: None or lengths [B] for plain attention with right padding, causal
    or of every key, anything else for every other kind; `kwargs` are the remaining arguments of the attention function.
    """
    for name, value in sorted(kwargs.items()):
        if name in _HARMLESS or name == "is_causal" or value is None or value is False:
            continue
        if name in _NAMED:
            return _NAMED[name].format(value=value)
        return f"an argument of its attention that the operator does not know: {name}"
    if dropout:
        return f"dropout {dropout} in the attention"
    if scale is not None and not scale > 0:
        return f"scale {scale} on the logits; the operator takes one above 0"
    if attention_mask is not None and not is_lengths(attention_mask):
        return _layer_type(module) or "a mask that is neither plain causal nor full (packed positions or a position bias)"
    if direction(module, attention_mask, kwargs) != direction(module, None, kwargs):
        return "a mask of another direction than its module's is_causal says"
    return None


def _layer_type(module: nn.Module) -> str | None:
    """What the configuration calls this layer, where that is not full attention."""
    types = getattr(getattr(module, "config", None), "layer_types", None)
    index = getattr(module, "layer_idx", None)
    if not types or not isinstance(index, int) or index >= len(types) or types[index] == "full_attention":
        return None
    return str(types[index]).replace("_", " ")
