"""The values that options take by name, and their check. Imports nothing slow, so that --help and completion can name them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from hyperattention.errors import EnvironmentFault, UsageError

LANGUAGE_TASKS = ("logits", "last-logits", "prefill")
FEATURES, MODULE = "features", "module"  # of a directory without logits, and of FILE.py:FUNCTION
TASKS = (*LANGUAGE_TASKS, FEATURES, MODULE)
DTYPES = ("fp32", "fp16", "bf16")
INPUT_IDS = ("tokens", "bytes")
DEVICES = ("auto", "cpu", "cuda")
KEEP_EXACT = ("op", "onnx")


def choice(option: str, value: str, allowed: Sequence[str]) -> str:
    """`value`, checked. Raises UsageError."""
    if value not in allowed:
        raise UsageError(f"{option} is {value!r}; it takes one of {', '.join(allowed)}")
    return value


def named_values(
    option: str, given: Iterable[str], names: Sequence[str], convert: Callable[[str, str], Any], example: str, *, kind: str, allowed: str
) -> dict[str, Any]:
    """`["kl=0.01", ...]` by name, each value as `convert`(name, text) gives it; `kind` and `allowed` are the errors' words for them.

    Raises UsageError for a name not among `names`, one given twice, and a value at which `convert` raises ValueError.
    """
    found: dict[str, Any] = {}
    for text in given:
        name, _, value = (part.strip() for part in text.partition("="))
        if name not in names:
            raise UsageError(f"{option} names {name or text!r}; {allowed} {', '.join(names)}, such as {option} {example}")
        if name in found:
            raise UsageError(f"{option} {name} is given twice; give it once")
        try:
            found[name] = convert(name, value)
        except ValueError:
            raise UsageError(f"{option} is {text!r}; it takes NAME=VALUE with {kind}, such as {option} {example}") from None
    return found


def check_device(device: str) -> None:
    """Raises UsageError for a --device that is unknown, EnvironmentFault for cuda where there is none."""
    if choice("--device", device, DEVICES) == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise EnvironmentFault("--device cuda, but PyTorch sees no CUDA device; leave --device out, or run `hyperattention doctor`")
