"""What the ONNX file of a transformers model computes: the plan's inputs to the task's outputs."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hyperattention.errors import ExportFailed
from hyperattention.export.choices import FEATURES

if TYPE_CHECKING:
    from hyperattention.export.patch import Patched

# Distinct and above 1: torch.export fixes a dimension whose example is 0 or 1, and merges equal ones.
_EXAMPLE_SIZES = {"batch": 2, "sequence": 130}


class TaskModule(nn.Module):
    """The plan's inputs, in order, to the task's outputs, in the order of plan.outputs.

    Text is (input_ids int64 [B, S], lengths int32 [B]), or None for lengths where every row is full; images and audio are one
    tensor in the plan's dtype.
    """

    def __init__(self, patched: "Patched") -> None:
        super().__init__()
        self.patched, self.plan, self.model = patched, patched.plan, patched.model

    def examples(self) -> tuple[Tensor, ...]:
        """Inputs to trace with: zeros, and rows of full length."""
        first = next(self.model.parameters())
        found = []
        for entry in self.plan.inputs:
            shape = tuple(_EXAMPLE_SIZES[size] if isinstance(size, str) else size for size in entry.shape)
            dtype = first.dtype if entry.dtype == "float" else getattr(torch, entry.dtype)
            fill = _EXAMPLE_SIZES["sequence"] if entry.name == "lengths" else 0
            found.append(torch.full(shape, fill, dtype=dtype, device=first.device))
        return tuple(found)

    def forward(self, ids: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, ...]:
        """logits [B, S or 1, vocab]; present [B, heads_kv, S, head_dim]; features [B, S, hidden size]. For images and audio `ids` is
        the one input.
        """
        if len(self.plan.inputs) == 1:
            return (call_encoder(self.model, self.plan.inputs[0].name, ids).last_hidden_state,)
        if self.plan.task == FEATURES:
            return (self.patched.forward(ids, lengths).last_hidden_state,)
        if self.plan.task == "logits":
            return (self.patched.forward(ids, lengths).logits,)
        with _last_row_only(self.model, lengths, ids.shape[1]):
            out = self.patched.forward(ids, lengths, use_cache=self.plan.task == "prefill")
        if self.plan.task == "last-logits":
            return (out.logits,)
        cache = [tensor for layer in out.past_key_values.layers if layer.keys is not None for tensor in (layer.keys, layer.values)]
        if len(cache) + 1 != len(self.plan.outputs):
            layers = len(self.plan.layers)
            raise ExportFailed(f"the cache has {len(cache) // 2} layers, the model {layers} attention layers; use --task last-logits")
        return (out.logits, *cache)


def call_encoder(model: PreTrainedModel, name: str, values: Tensor) -> Any:
    """transformers' output of an image or audio model for its one input, at sizes other than the configuration's too."""
    more = other_size(model, tuple(values.shape[-2:])) if values.dim() == 4 else {}
    return model(**{name: values}, **more)


def other_size(model: PreTrainedModel, size: tuple[int, ...]) -> dict[str, bool]:
    """What makes an image model take (height, width) other than the configuration's.

    Some take any size by themselves, some only where asked, and some never (their own error says so).
    """
    asks = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    return {"interpolate_pos_encoding": True} if asks and size != image_size(model.config) else {}


def image_size(config: object) -> tuple[int, int] | None:
    """(height, width) that a configuration names; None without one."""
    size = getattr(config, "image_size", None)
    if isinstance(size, (list, tuple)):
        return (int(size[0]), int(size[-1]))
    return (int(size), int(size)) if size else None


class _last_row_only:
    """Inside, the output embedding sees each row's last valid position alone: [B, S, H] becomes [B, 1, H]."""

    def __init__(self, model: PreTrainedModel, lengths: Tensor | None, rows: int) -> None:
        head = model.get_output_embeddings()
        if head is None:
            raise ExportFailed(f"{type(model).__name__} has no output embedding; use --task logits")
        self.head, self.lengths, self.rows = head, lengths, rows

    def __enter__(self) -> None:
        def keep_last(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden = args[0]
            if self.lengths is None:
                return (hidden[:, self.rows - 1 :], *args[1:])
            index = (self.lengths.long() - 1).clamp(min=0)
            return (hidden.gather(1, index[:, None, None].expand(-1, 1, hidden.shape[-1])), *args[1:])

        self.handle = self.head.register_forward_pre_hook(keep_last)

    def __exit__(self, *_: object) -> None:
        self.handle.remove()
