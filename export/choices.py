"""The values that options take by name, and their check. Imports nothing slow, so that --help and completion can name them."""

from __future__ import annotations

from collections.abc import Sequence

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


def check_device(device: str) -> None:
    """Raises UsageError for a --device that is unknown, EnvironmentFault for cuda where there is none."""
    if choice("--device", device, DEVICES) == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise EnvironmentFault("--device cuda, but PyTorch sees no CUDA device; leave --device out, or run `hyperattention doctor`")
