"""The implementations of the op that a PyTorch model can be run with: the reference, the native kernels, exact attention."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperattention import reference
from hyperattention.config import INT32_MAX, Config
from hyperattention.errors import EnvironmentFault
from hyperattention.export.bundle import Bundle
from hyperattention.export.patch import exact_attention
from hyperattention.export.switched import AttentionCall
from hyperattention.library import ORT_LIBRARY
from hyperattention.native import Library


@dataclass(frozen=True)
class Operator:
    """`function`(q [B,Hq,Sq,D], k [B,Hkv,Sk,D], v [B,Hkv,Sk,Dv], config, lengths int [B] or None) -> o, lse float32 [B,Hq,Sq]."""

    name: str
    function: AttentionCall

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, config: Config, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.function(q, k, v, config, lengths)


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Inside, PyTorch's processor kernels run on `count` threads; 0: as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def one_thread() -> contextlib.AbstractContextManager[None]:
    """The reference is made of small tensor operations: on the CPU a team of threads costs several times what it saves."""
    return torch_threads(1)


def reference_operator() -> Operator:
    """The definition: fp32 arithmetic in PyTorch. A layer planned as exact is left to PyTorch's own exact attention, which is
    faster than the reference's tiles and just as independent of the kernels."""

    def run(q: Tensor, k: Tensor, v: Tensor, config: Config, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        with one_thread():
            out = reference.attention(q, k, v, config, lengths)
        return out.o, out.lse

    return exact_by_torch(Operator("reference", run))


def exact_by_torch(operator: Operator) -> Operator:
    """`operator`, but a layer planned as exact is left to PyTorch's own exact attention; its LSE is then NaN, not computed.

    So a model whose layers are all exact computes the same, bit for bit, as in the mode "exact".
    """

    def run(q: Tensor, k: Tensor, v: Tensor, config: Config, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        if config.exact_below == INT32_MAX:
            o = exact_attention(q, k, v, config.resolved_scale(q.shape[-1]), bool(config.causal), lengths)
            return o, q.new_full(q.shape[:3], torch.nan, dtype=torch.float32)
        return operator(q, k, v, config, lengths)

    return Operator(operator.name, run)


def native_library(bundle: Bundle, device: torch.device) -> Library:
    """The kernels that the folder itself ships for tensors on `device`: fp32 on the CPU, fp32, fp16 and bf16 on CUDA (either library).

    Raises EnvironmentFault where the folder has none for it, or of another interface version.
    """
    cuda = device.type == "cuda"
    path = (bundle.trt_library if cuda else None) or bundle.ort_library
    if path is None:
        raise EnvironmentFault(f"the folder holds no {ORT_LIBRARY}; build it (`make native`) and export again")
    return Library(path, "ha_cuda_" if cuda else "ha_cpu_", device.type)


def native_operator(kernels: Library) -> Operator:
    """A native library as an operator."""

    def run(q: Tensor, k: Tensor, v: Tensor, config: Config, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        return kernels.forward(q, k, v, config, lengths)

    return Operator("native CUDA kernels" if kernels.device_type == "cuda" else "native CPU kernels", run)
