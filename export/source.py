"""What every front end finds out about a model before any weight is loaded, and what it hands over afterwards.

A front end is a class derived from `Source`: export/load.py for a transformers directory, export/function.py for a function
of the user's own. The stages behind it know these classes alone.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Mapping, Protocol

import torch

from hyperattention.errors import UsageError
from hyperattention.export.choices import FEATURES, TASKS, choice

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import Tensor, nn

    from hyperattention.export.plan import ExportPlan
    from hyperattention.export.switched import Captured

Range = tuple[int, int, int]  # (min, opt, max)
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Input:
    """One input of the exported graph. A dimension is a size, or the name of one that varies within its range of ExportPlan.dims."""

    name: str
    dtype: str  # "int64", "int32", "bool", "float32" and so on; "float" is the plan's dtype
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Trust:
    """What of MODEL may run code: weights that are pickled, and code that lies beside them. Neither does unless it is asked for."""

    pickle: bool = False
    code: bool = False


# What a text model reads: rows padded on the right, and how many tokens of each are text.
TEXT = (Input("input_ids", "int64", ("batch", "sequence")), Input("lengths", "int32", ("batch",)))


@dataclass(frozen=True)
class AttentionLayer:
    """One attention layer: its number in calling order, module path, sizes, scale on the logits, and why the operator cannot replace it."""

    index: int
    name: str
    heads_q: int
    heads_kv: int
    head_dim: int
    head_dim_v: int
    scale: float
    problem: str | None
    causal: bool = True


@dataclass(frozen=True)
class Source(ABC):
    """A model as its front end found it.

    `model` is what the user gave and is never written to OUT; `name` is, and holds no path. `dims`, `keys` and `rows` are the
    ranges that the model itself fixes: of a named dimension, of the attention's key length and of the batch. Where they are
    absent the options decide: the dimension "sequence" is the key length, "batch" the rows.
    """

    model: str
    name: str
    kind: str  # "language", "encoder" (text), "image", "audio" or "function"
    task: str
    architecture: str
    layers: tuple[AttentionLayer, ...]
    num_parameters: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int  # 0 for a model without logits
    max_positions: int | None
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    dims: dict[str, Range]
    keys: Range | None
    rows: Range | None

    @property
    def directory(self) -> Path | None:
        """Where configuration and tokenizer lie, to be copied beside the ONNX files; None where there are none."""
        return None

    @property
    def half(self) -> str:
        """The half type of the weights: "fp16" or "bf16"."""
        return "bf16"

    def ranged(self, dims: Mapping[str, Range], sequence: tuple[int | None, int | None, int | None]) -> "Source":
        """The same with ranges for its dimensions by name (--dim, --batch) and for its sequence (min, opt, max, None where not given).

        Raises UsageError for a dimension that the model does not name.
        """
        unknown = sorted(set(dims) - {"batch"})
        if unknown:
            raise UsageError(f"--dim {unknown[0]}: {self.name} has no dimensions of its own; use --batch and --max-seq")
        return self

    @property
    def position_limit(self) -> int | None:
        """The longest sequence that the model can run at all, in tokens; None where there is no such limit."""
        return None

    def dropped_keys(self, length: int) -> tuple[int, ...]:
        """Numbers of the cache layers that keep fewer than `length` keys, in calling order."""
        return ()

    def content(self) -> dict[str, str]:
        """sha256 by name of what the model is made of beside the files that `model` names."""
        return {}

    @abstractmethod
    def load(self, plan: "ExportPlan", device: torch.device | str = "cpu") -> "ReplacedModel":
        """The model with its weights, in the plan's dtype, in eval mode, with its attention replaced as `plan` says.

        Raises UsageError for weights that are unreadable or do not fit, UnsupportedModel where a planned layer is not there.
        """


class ReplacedModel(Protocol):
    """A loaded model whose attention follows a plan. Inference only."""

    @property
    def plan(self) -> "ExportPlan":
        """What was decided."""
        ...

    @property
    def model(self) -> "nn.Module":
        """The module, on its device."""
        ...

    def mode(self, name: str, attention: Any = None) -> AbstractContextManager[Any]:
        """Inside: "plan" runs the plan's layers by the operator (computed by `attention` where given), "exact" all layers exactly."""
        ...

    def capture(self, layers: frozenset[int] | None = None) -> AbstractContextManager["list[Captured]"]:
        """Inside: a list that fills with the attention calls of the layers that have a node (or of `layers`, by index)."""
        ...

    def run(self, feed: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
        """The outputs by name, in the order of plan.outputs, for one tensor for each of plan.inputs."""
        ...

    def trace(self) -> "ModelProto":
        """The graph as torch exports it, with the plan's names of inputs, outputs and dimensions. Raises ExportFailed."""
        ...


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of a plan's `dtype`."""
    return _DTYPES[name]


def default_dtype(source: Source) -> str:
    """fp32 without a CUDA device, else the model's half type (bf16 for a model in fp32: there the kernels are several times as fast)."""
    return source.half if torch.cuda.is_available() else "fp32"


def parse_image_size(text: str) -> tuple[int, int]:
    """(height, width) of --image-size: N, or HEIGHTxWIDTH, in pixels. Raises UsageError."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(re.fullmatch("[0-9]{1,5}", part) and int(part) for part in parts):
        raise UsageError(f"--image-size is {text!r}; it takes pixels as N or HEIGHTxWIDTH, such as 224 or 448x392")
    return int(parts[0]), int(parts[-1])


def reopen(model: str, plan: "ExportPlan", *, trust: Trust = Trust(), say: Callable[[str], None] = lambda text: None) -> Source:
    """`open_source` for the task and the sizes of a plan that was made from `model`."""
    image = next((entry.shape[-2:] for entry in plan.inputs if entry.name == "pixel_values" and plan.task == FEATURES), None)
    size = (int(image[0]), int(image[1])) if image else None
    return open_source(model, task=plan.task, image_size=size, trust=trust, say=say)


def open_source(
    model: str,
    *,
    task: str | None = None,
    image_size: tuple[int, int] | None = None,
    trust: Trust = Trust(),
    say: Callable[[str], None] = lambda text: None,
) -> Source:
    """The front end's answer for MODEL: `FILE.py:FUNCTION`, or a directory as transformers saves it.

    `task` is one of TASKS; by default what the architecture is made for. `image_size` (height, width) is for a directory's image
    model, by default the configuration's. `say` gets one sentence before foreign code runs. Raises
    UsageError for a model that is missing or broken or a task it does not have, UnsupportedModel for one that no front end takes.
    """
    from hyperattention.export.function_call import is_function

    if task is not None:
        choice("--task", task, TASKS)
    if not model.strip():
        raise UsageError(f"MODEL is {model!r}; it is a directory as transformers saves it, or FILE.py:FUNCTION")
    if is_function(model):
        from hyperattention.export.function import open_function

        return open_function(model, task, say)
    from hyperattention.export.load import inspect_source

    return inspect_source(Path(model), task, image_size=image_size, trust=trust, say=say)
