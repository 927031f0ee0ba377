"""Exact attention in PyTorch: the backends of scaled_dot_product_attention, and the packages flash-attn (FA2) and flash-attn-4.

Each maker returns a function of (q, k, v, causal) that gives the call to time, or raises ImportError with what is missing.
q [B,Hq,S,D], k and v [B,Hkv,S,D]; as many queries as keys, so that PyTorch's upper-left causal mask is ours.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hyperattention.export.console import readable

Run = Callable[[], Tensor]
Rival = Callable[[Tensor, Tensor, Tensor, bool], Run]


def sdpa(backend: SDPBackend) -> Rival:
    """One backend of torch's scaled_dot_product_attention; PyTorch raises RuntimeError where it has no kernel for the problem."""

    def prepare(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Run:
        grouped = q.shape[1] != k.shape[1]

        def run() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)

        return run

    return prepare


def _swapped(function: Callable[..., Tensor | tuple]) -> Rival:
    """A function over [batch, sequence, heads, head size]; the copies into that layout are not timed."""

    def prepare(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Run:
        given = [x.transpose(1, 2).contiguous() for x in (q, k, v)]

        def run() -> Tensor:
            o = function(*given, causal=causal)
            return (o[0] if isinstance(o, tuple) else o).transpose(1, 2)

        return run

    return prepare


def flash_attention_2() -> Rival:
    """FA2, of the package flash-attn."""
    try:
        from flash_attn import flash_attn_func  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(f"flash-attn is not installed ({error})") from error
    return _swapped(flash_attn_func)


def flash_attention_4() -> Rival:
    """FA4, of the package flash-attn-4."""
    try:
        from flash_attn.cute import flash_attn_func  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(f"flash-attn-4 is not installed ({error})") from error
    return _swapped(flash_attn_func)


# name: (title, maker, device types that it runs on)
RIVALS: dict[str, tuple[str, Callable[[], Rival], tuple[str, ...]]] = {
    "sdpa-flash": ("PyTorch SDPA, flash", lambda: sdpa(SDPBackend.FLASH_ATTENTION), ("cpu", "cuda")),
    "sdpa-cudnn": ("PyTorch SDPA, cuDNN", lambda: sdpa(SDPBackend.CUDNN_ATTENTION), ("cuda",)),
    "sdpa-efficient": ("PyTorch SDPA, memory-efficient", lambda: sdpa(SDPBackend.EFFICIENT_ATTENTION), ("cuda",)),
    "sdpa-math": ("PyTorch SDPA, math", lambda: sdpa(SDPBackend.MATH), ("cpu", "cuda")),
    "flash-attn-2": ("flash-attn (FA2)", flash_attention_2, ("cuda",)),
    "flash-attn-4": ("flash-attn-4 (FA4)", flash_attention_4, ("cuda",)),
}


def logits_bytes(q: Tensor, length: int) -> int:
    """Least memory of an implementation that holds every logit at once: logits and probabilities, in fp32."""
    return 2 * 4 * q.shape[0] * q.shape[1] * q.shape[2] * length


def free_bytes(device: str) -> int:
    """Memory of the device that may be taken."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    with open("/proc/meminfo") as file:
        line = next(line for line in file if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024


def refuse_quadratic(q: Tensor, device: str) -> None:
    """Raises MemoryError where all logits at once would take more than half of the free memory: on the processor the kernel would
    end the whole process."""
    need, free = logits_bytes(q, q.shape[2]), free_bytes(device)
    if need > free / 2:
        raise MemoryError(f"it holds all logits at once, {readable(need)}; half of the free memory is {readable(free // 2)}")
