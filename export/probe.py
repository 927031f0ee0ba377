"""A model run once on the meta device, without weights, with an attention function that only looks.

That tells each layer's sizes, scale, direction and peculiarities for any architecture that goes through transformers'
AttentionInterface.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any, Mapping

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from hyperattention.config import MOST_HEAD_DIM
from hyperattention.errors import UnsupportedModel, one_line
from hyperattention.export.attention_rules import direction, find_problem
from hyperattention.export.masks import attention_mask_function
from hyperattention.export.model_files import quiet
from hyperattention.export.source import AttentionLayer

_PROBE = "hyperattention_probe"
_REFUSALS = (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError, KeyError, IndexError, ArithmeticError)


@dataclass(frozen=True)
class Probed:
    """The layers in calling order, the longest key length that one of them saw, and the tokens that learned positions end at."""

    layers: tuple[AttentionLayer, ...]
    keys: int
    positions: int | None


def probe(model: PreTrainedModel, feed: Mapping[str, Any]) -> Probed:
    """Runs `model`, on the meta device, on the arguments `feed`. Raises UnsupportedModel where it cannot be looked at so."""
    names = {id(module): name for name, module in model.named_modules()}
    found: dict[str, AttentionLayer] = {}
    keys = [0]

    def look(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        name = names[id(module)]
        scale, dropout = kwargs.pop("scaling", None), kwargs.pop("dropout", 0.0)
        output = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
        keys.append(key.shape[2])
        if name in found:
            found[name] = replace(found[name], problem="weights that several layers share: it is called more than once")
            return output, None
        found[name] = AttentionLayer(
            index=len(found),
            name=name,
            heads_q=query.shape[1],
            heads_kv=key.shape[1],
            head_dim=query.shape[3],
            head_dim_v=value.shape[3],
            scale=scale if scale is not None else query.shape[3] ** -0.5,
            problem=_size_problem(query, key, value) or find_problem(module, attention_mask, scale, dropout, kwargs),
            causal=direction(module, attention_mask, kwargs),
        )
        return output, None

    AttentionInterface.register(_PROBE, look)
    AttentionMaskInterface.register(_PROBE, attention_mask_function)
    architecture = type(model).__name__
    try:
        model.set_attn_implementation(_PROBE)
        with quiet(), torch.no_grad():
            model(**accepted(model, feed))
    except _REFUSALS as error:
        reason = one_line(error)
        raise UnsupportedModel(
            f"{architecture} does not run on the meta device ({reason}), so its layers cannot be planned; save the part that is to be "
            f"exported by itself (its vision or text model), or write FILE.py:FUNCTION"
        ) from error
    if not found and _unseen(model, found):
        raise UnsupportedModel(
            f"{architecture} does not go through transformers' AttentionInterface, so its attention cannot be replaced; "
            f"write FILE.py:FUNCTION, which finds attention in the graph"
        )
    if not found:
        raise UnsupportedModel(f"{architecture} has no attention layer; is its number of layers 0?")
    for layer in found.values():
        if layer.heads_kv == 0 or layer.heads_q % layer.heads_kv:
            raise UnsupportedModel(
                f"layer {layer.index} ({layer.name}) has {layer.heads_q} query heads over {layer.heads_kv} key heads; no attention can run "
                f"that, the first must be a multiple of the second: check config.json"
            )
    return Probed((*found.values(), *_unseen(model, found)), max(keys), _learned_positions(model))


def accepted(model: nn.Module, feed: Mapping[str, Any]) -> dict[str, Any]:
    """`feed` without what only models that keep a cache take."""
    parameters = inspect.signature(model.forward).parameters
    return {name: value for name, value in feed.items() if name in parameters or name not in ("use_cache", "past_key_values")}


def _size_problem(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    size, size_v = query.shape[3], value.shape[3]
    if query.shape[2] != key.shape[2]:
        return "cross-attention"
    if not 0 < min(size, size_v) <= max(size, size_v) <= MOST_HEAD_DIM:
        return f"heads of size {size} and {size_v}; the operator takes 1 to {MOST_HEAD_DIM}"
    return None


def _learned_positions(model: PreTrainedModel) -> int | None:
    """Tokens that the smallest table of learned positions holds: past its end the model fails. None without such a table."""
    sizes = []
    rows = getattr(model.config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding) or module is model.get_input_embeddings() or "relative" in name:
            continue
        if "position" in name.rpartition(".")[2] or module.num_embeddings == rows:
            # Some count from behind the padding token, some from a fixed offset.
            skipped = module.padding_idx + 1 if module.padding_idx is not None else int(getattr(module, "offset", 0))
            sizes.append(module.num_embeddings - skipped)
    return min(sizes, default=None)


def _unseen(model: nn.Module, found: dict[str, AttentionLayer]) -> list[AttentionLayer]:
    """Modules named Attention that computed something of their own."""
    layers = []
    for name, module in model.named_modules():
        related = any(seen == name or seen.startswith(name + ".") or name.startswith(seen + ".") for seen in found)
        if type(module).__name__.endswith("Attention") and not related:
            problem = "attention of its own, outside transformers' AttentionInterface"
            layers.append(AttentionLayer(len(found) + len(layers), name, 0, 0, 1, 1, 1.0, problem))
    return layers
