"""What the op is timed against: cuDNN and FA2 through PyTorch, FA4, and the released HyperAttention code.

Each maker returns a function of (q, k, v, causal) that gives the call to time, or raises ImportError with what is missing.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from hyperattention.validate.bench_rivals import Rival, Run, flash_attention_4, sdpa

__all__ = ["Rival", "find_rivals"]


def released_hyperattention(folder: Path | None) -> Rival:
    """The released code (github.com/insuhan/hyper-attn, a checkout in `folder`) with its own defaults, which are those of preset
    `paper`: blocks and samples of 256, 7 projections, exact up to 4,096. It calls the package flash_attn, in whose place stands
    PyTorch's FA2 kernel, the same one.
    """
    if folder is None:
        raise ImportError("no checkout of the released code (--upstream DIR)")
    if not (folder / "models/attention/hyper_attn.py").is_file():
        raise ImportError(f"{folder} holds no models/attention/hyper_attn.py")
    stand_in = types.ModuleType("flash_attn")
    stand_in.flash_attn_func = _flash_attn_func  # pyright: ignore[reportAttributeAccessIssue]
    before = sys.modules.get("flash_attn")
    sys.modules["flash_attn"] = stand_in
    sys.path.insert(0, str(folder))
    try:
        from models.attention.hyper_attn import HyperAttention  # pyright: ignore[reportMissingImports]
    finally:
        sys.path.remove(str(folder))
        del sys.modules["flash_attn"]
        if before is not None:
            sys.modules["flash_attn"] = before

    def prepare(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Run:
        module = HyperAttention(input_dim=q.shape[-1], block_size=256, sample_size=256, min_seq_len=4096, cuda=True).to(q.device, q.dtype)

        def run() -> Tensor:
            with torch.no_grad():
                o = module(q, k, v, causal=causal)
            return o[0] if isinstance(o, tuple) else o

        return run

    return prepare


def _flash_attn_func(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool, return_attn_probs: bool):
    assert return_attn_probs, "the released code asks for the log-sum-exp"
    o, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), 0.0, causal, False, scale=softmax_scale
    )
    return o.transpose(1, 2), lse, None


def find_rivals(upstream: Path | None) -> tuple[dict[str, Rival], dict[str, str]]:
    """The rivals that are here by column name, and of the others what they lack."""
    makers: dict[str, Callable[[], Rival]] = {
        "cudnn": lambda: sdpa(SDPBackend.CUDNN_ATTENTION),
        "fa2": lambda: sdpa(SDPBackend.FLASH_ATTENTION),
        "released": lambda: released_hyperattention(upstream),
        "fa4": flash_attention_4,
    }
    found: dict[str, Rival] = {}
    missing: dict[str, str] = {}
    for name, make in makers.items():
        try:
            found[name] = make()
        except ImportError as error:
            missing[name] = str(error)
    return found, missing
