"""The operator as a torch.library op: `torch.ops.hyperattention.attention`, and `attention` which takes a Config.

The processor runs the reference. CUDA runs the kernel library on the current stream for fp16, bf16 and fp32 and head sizes that
are multiples of 8 up to 256, and the reference for fp64 and other head sizes, which the kernels do not take. Inference only:
there is no backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hyperattention import reference
from hyperattention.config import MOST_HEAD_DIM, Config
from hyperattention.selection import Geometry

_NAME = "hyperattention::attention"
_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_HEAD_STEP = 8


def _has_kernel(q: Tensor, v: Tensor) -> bool:
    """Whether CUDA kernels take this dtype and these head sizes (plugins/cuda/launch_config.h has the same limits)."""
    sizes = (q.shape[-1], v.shape[-1])
    return q.is_cuda and q.dtype in _KERNEL_DTYPES and all(0 < d <= MOST_HEAD_DIM and d % _HEAD_STEP == 0 for d in sizes)


@torch.library.custom_op(_NAME, mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    causal: int,
    scale: float,
    selector: str,
    block_size: int,
    num_blocks: int,
    pool_size: int,
    sample_size: int,
    stratified: int,
    local_size: int,
    local_overlap: int,
    sinks: int,
    exact_below: int,
    num_projections: int,
    seed: int,
    strict_causal: int,
    hash_centre: int,
) -> tuple[Tensor, Tensor]:
    config = Config(
        causal=causal,
        scale=scale,
        selector=selector,
        block_size=block_size,
        num_blocks=num_blocks,
        pool_size=pool_size,
        sample_size=sample_size,
        stratified=stratified,
        local_size=local_size,
        local_overlap=local_overlap,
        sinks=sinks,
        exact_below=exact_below,
        num_projections=num_projections,
        seed=seed,
        strict_causal=strict_causal,
        hash_centre=hash_centre,
    )
    Geometry.of(q, k, v, config, lengths)
    if _has_kernel(q, v):
        from hyperattention.library import load_cuda

        return load_cuda().forward(q, k, v, config, lengths)
    out = reference.attention(q, k, v, config, lengths)
    return out.o, out.lse


@_attention.register_fake
def _fake(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, *attributes: object) -> tuple[Tensor, Tensor]:
    o = q.new_empty((*q.shape[:-1], v.shape[-1]))
    return o, q.new_empty(q.shape[:-1], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)


def _register_autocast(device: str, key: torch._C.DispatchKey) -> torch.library.Library:
    """Under autocast Q, K and V go to the region's dtype, as PyTorch's own attention does (fp64 stays)."""
    library = torch.library.Library("hyperattention", "FRAGMENT")
    below = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)

    def kernel(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
        dtype = torch.get_autocast_dtype(device)
        if q.dtype != torch.float64:
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        with torch._C._ExcludeDispatchKeyGuard(below):
            return torch.ops.hyperattention.attention(q, k, v, *rest)

    library.impl("attention", kernel, key.name, with_keyset=False)
    return library


_autocast_rules = [
    _register_autocast("cpu", torch._C.DispatchKey.AutocastCPU),
    _register_autocast("cuda", torch._C.DispatchKey.AutocastCUDA),
]


def attention(q: Tensor, k: Tensor, v: Tensor, config: Config, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """HyperAttention (arXiv 2310.05869, rules of docs/operator.md), traceable by torch.compile and torch.export.

    q [B,Hq,Sq,D], k [B,Hkv,Sk,D], v [B,Hkv,Sk,Dv] of one floating dtype; lengths int [B], valid keys of each row.
    Returns o [B,Hq,Sq,Dv] in Q's dtype and lse [B,Hq,Sq] float32 (float64 for float64 inputs). Raises UsageError for
    shapes that do not fit and EnvironmentFault where the kernel library is needed and missing.
    """
    return torch.ops.hyperattention.attention(q, k, v, lengths, *config.attributes().values())
