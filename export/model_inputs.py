"""What a transformers model reads: text, an image or audio, and its sizes, from what the model and its configuration say."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hyperattention.errors import UnsupportedModel, UsageError
from hyperattention.export.choices import LANGUAGE_TASKS
from hyperattention.export.source import TEXT, Input
from hyperattention.export.task_module import image_size, other_size

# Odd and distinct, so that sizes tell the dimensions apart.
_PROBE_SIZES = {"batch": 2, "sequence": 7}


@dataclass(frozen=True)
class Reads:
    """The kind of a Source, the inputs of its graph, and what transformers' forward takes beside them."""

    kind: str
    inputs: tuple[Input, ...]
    more: dict[str, Any]

    @property
    def text(self) -> bool:
        """Whether the input is tokens, of a length that varies."""
        return self.inputs is TEXT

    def feed(self) -> dict[str, Any]:
        """Arguments of the model's forward on the meta device, at sizes that tell the dimensions apart."""
        first = self.inputs[0]
        shape = tuple(_PROBE_SIZES[size] if isinstance(size, str) else size for size in first.shape)
        if not self.text:
            return {first.name: torch.zeros(shape, device="meta"), **self.more}
        mask = torch.ones(shape, dtype=torch.bool, device="meta")
        return {first.name: torch.zeros(shape, dtype=torch.long, device="meta"), "attention_mask": mask, "use_cache": False}


def what_it_reads(model: PreTrainedModel, task: str, size: tuple[int, int] | None) -> Reads:
    """The inputs of `model` for `task`; `size` is (height, width) of an image, by default the configuration's.

    Raises UsageError for a size that does not fit and UnsupportedModel for a model that reads anything else.
    """
    name = model.main_input_name
    if size is not None and name != "pixel_values":
        raise UsageError(f"--image-size: {type(model).__name__} reads {name}, no image; leave it out")
    if name == "input_ids":
        return Reads("language" if task in LANGUAGE_TASKS else "encoder", TEXT, {})
    if name == "pixel_values":
        return _image(model, size)
    if name == "input_features":
        return _audio(model)
    raise UnsupportedModel(
        f"{type(model).__name__} reads {name}; a directory's model takes text (input_ids), an image (pixel_values) or audio "
        f"(input_features): write FILE.py:FUNCTION for any other"
    )


def _image(model: PreTrainedModel, size: tuple[int, int] | None) -> Reads:
    config = model.config
    chosen = size or image_size(config)
    if chosen is None:
        raise UsageError(f"the configuration of {type(model).__name__} names no image_size; give --image-size HEIGHTxWIDTH")
    patch = getattr(config, "patch_size", None)
    patches = tuple(patch) if isinstance(patch, (list, tuple)) else (patch or 1,) * 2
    if any(length % step for length, step in zip(chosen, patches, strict=True)):
        raise UsageError(
            f"the image is {chosen[0]}x{chosen[1]}; {type(model).__name__} takes multiples of its patch, {patches[0]}x{patches[1]}"
        )
    channels = int(getattr(config, "num_channels", 3))
    return Reads("image", (Input("pixel_values", "float", ("batch", channels, *chosen)),), other_size(model, chosen))


def _audio(model: PreTrainedModel) -> Reads:
    bands, positions = (getattr(model.config, name, None) for name in ("num_mel_bins", "max_source_positions"))
    if not bands or not positions:
        raise UnsupportedModel(
            f"the configuration of {type(model).__name__} names no num_mel_bins and max_source_positions, which fix the size of "
            f"input_features; write FILE.py:FUNCTION"
        )
    # Its convolutions shorten the frames to the positions.
    frames = positions * prod(module.stride[0] for module in model.modules() if isinstance(module, nn.Conv1d))
    return Reads("audio", (Input("input_features", "float", ("batch", int(bands), int(frames))),), {})
