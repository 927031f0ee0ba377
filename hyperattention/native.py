"""Calls a native library's kernels, stage by stage, on torch tensors; plugins/attention.h has the C side."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Sequence
from ctypes import POINTER, byref, c_char_p, c_int, c_int32, c_int64, c_size_t, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from hyperattention.config import Config
from hyperattention.errors import EnvironmentFault, UsageError
from hyperattention.library import HaAttributes, HaParams, check_interface, open_library
from hyperattention.selection import Geometry

OK, INVALID, UNSUPPORTED, FAILED = range(4)
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_ALIGNMENT = 256  # of the workspace, bytes
Function = Callable[..., int]  # of the C interface; it returns a status


class Library:
    """One backend's C functions over torch tensors: q [B,Hq,Sq,D], k [B,Hkv,Sk,D], v [B,Hkv,Sk,Dv], lengths int [B] or None.

    A tensor that is not dense is copied first. Every method raises UsageError for a problem the backend does not take
    and EnvironmentFault when the runtime refused, with the library's own text. CUDA calls run on torch's current stream.
    """

    def __init__(self, path: Path, prefix: str, device_type: str) -> None:
        self.path, self.device_type, self._library = path, device_type, open_library(path)
        check_interface(path)
        self._library.ha_last_error.restype = c_char_p
        self._plan_dims = self._bind("ha_plan_dims", POINTER(c_int64))
        self._workspace_size = self._bind(prefix + "workspace_size", POINTER(c_size_t))
        self._pool = self._bind(prefix + "pool", c_int32, c_int32, c_void_p, c_void_p)  # a stage that tests alone look at
        self._select = self._bind(prefix + "select", c_void_p)
        self._samples = self._bind(prefix + "samples", c_void_p, c_void_p)
        self._attend = self._bind(prefix + "attend")
        self._forward = self._bind(prefix + "forward")

    def select(self, q: Tensor, k: Tensor, v: Tensor, config: Config, lengths: Tensor | None = None) -> Tensor:
        """What the selector chose, int32: a Plan's `selection`."""
        call = _Call(self, q, k, v, config, lengths)
        plan = call.output(call.plan_shape(), torch.int32)
        call.run(self._select, plan.data_ptr())
        return plan

    def select_each(self, q: Tensor, k: Tensor, config: Config, seeds: Sequence[int]) -> Tensor:
        """`select` of several problems q [N,B,Hq,Sq,D], k [N,B,Hkv,Sk,D] that differ in their seeds: int32 [N, ...].

        They are described once and share the scratch, as their kernels run one problem behind the other: little is left for the host.
        """
        q, k = q.contiguous(), k.contiguous()
        call = _Call(self, q[0], k[0], k[0], config, None)
        plans = call.output((len(seeds), *call.plan_shape()), torch.int32)
        places = ([x.data_ptr() for x in some] for some in (q, k, plans))
        with call.ready():
            for q_at, k_at, plan, seed in zip(*places, seeds, strict=True):
                call.params.q, call.params.k, call.params.attributes.seed = q_at, k_at, seed
                self.check(self._select, byref(call.params), plan)
        return plans

    def samples(self, q: Tensor, k: Tensor, v: Tensor, config: Config, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Index (int32, -1 = none; `blocks`: of the key, `sortlsh`: into the node's sorted keys) and weight (float32) of each
        sample, [B, Hq, local blocks or nodes, sample_size]."""
        call = _Call(self, q, k, v, config, lengths)
        shape = (*call.rows, call.plan_dims()[2], config.sample_size)
        index, weight = call.output(shape, torch.int32), call.output(shape, torch.float32)
        call.run(self._samples, index.data_ptr(), weight.data_ptr())
        return index, weight

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, config: Config, plan: Tensor, lengths: Tensor | None = None, threads: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Attention under a plan as `select` writes it: o [B,Hq,Sq,Dv] in Q's dtype, lse float32 [B,Hq,Sq]."""
        return _Call(self, q, k, v, config, lengths, plan, threads).attention(self._attend)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, config: Config, lengths: Tensor | None = None, threads: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Selection and attention: o [B,Hq,Sq,Dv] in Q's dtype, lse float32 [B,Hq,Sq]. `threads` (CPU): 0 = all."""
        return _Call(self, q, k, v, config, lengths, None, threads).attention(self._forward)

    def workspace_size(self, q: Tensor, k: Tensor, v: Tensor, config: Config) -> int:
        """Bytes of scratch that the problem needs: a function of shapes, dtype and attributes only."""
        return _Call(self, q, k, v, config, None).workspace_size()

    def check(self, function: Function, *arguments: object) -> None:
        """Calls a C function and raises what its status means."""
        status = function(*arguments)
        if status != OK:
            text = self._library.ha_last_error().decode(errors="replace")
            raise (UsageError if status in (INVALID, UNSUPPORTED) else EnvironmentFault)(text)

    def _bind(self, name: str, *arguments: type) -> Function:
        try:
            function = getattr(self._library, name)
        except AttributeError as error:
            raise EnvironmentFault(f"{self.path.name} lacks {name}; rebuild it with `make native`") from error
        function.restype, function.argtypes = c_int, [POINTER(HaParams), *arguments]
        return function


class _Call:
    """One problem's HaParams and the tensors it points at, kept alive."""

    def __init__(
        self,
        library: Library,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        config: Config,
        lengths: Tensor | None,
        plan: Tensor | None = None,
        threads: int = 0,
    ) -> None:
        self.library, self.device = library, q.device
        given = {"q": q, "k": k, "v": v, "lengths": lengths, "plan": plan}
        present = {name: t for name, t in given.items() if t is not None}
        if q.device.type != library.device_type or any(t.device != q.device for t in present.values()):
            found = ", ".join(f"{name} on {t.device}" for name, t in present.items())
            raise UsageError(f"{library.path.name} takes tensors of one {library.device_type} device; found {found}")
        if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPE_CODES:
            raise UsageError(f"Q, K, V are {q.dtype}, {k.dtype}, {v.dtype}; they take one of float32, float16, bfloat16 together")
        self.geometry = g = Geometry.of(q, k, v, config, lengths)
        self.rows = (g.batch, g.heads_q)
        self.o_shape, self.dtype = (g.batch, g.heads_q, g.seq_q, g.head_dim_v), q.dtype
        int32 = {"lengths", "plan"}
        self.tensors = {name: (t.to(torch.int32) if name in int32 else t).contiguous() for name, t in present.items()}
        sizes = {name: getattr(g, name) for name in "batch heads_q heads_kv seq_q seq_k head_dim head_dim_v".split()}
        pointers = {name: t.data_ptr() for name, t in self.tensors.items()}
        stream = torch.cuda.current_stream(q.device).cuda_stream if q.is_cuda else None
        self.params = HaParams(ctypes.sizeof(HaParams), DTYPE_CODES[q.dtype], attributes=HaAttributes.of(config), **sizes, **pointers)
        self.params.stream, self.params.threads = stream, threads
        self.config = config
        if plan is not None and tuple(plan.shape) != self.plan_shape():
            raise UsageError(f"the plan has shape {tuple(plan.shape)}; this problem's has {self.plan_shape()}")

    def plan_dims(self) -> tuple[int, int, int]:
        dims = (c_int64 * 3)()
        self.library.check(self.library._plan_dims, byref(self.params), dims)
        return dims[0], dims[1], dims[2]

    def plan_shape(self) -> tuple[int, ...]:
        """Of the tensor that `select` writes."""
        elements, query_blocks, _ = self.plan_dims()
        return (*self.rows, query_blocks, self.config.num_blocks) if self.config.selector == "blocks" else (elements,)

    def workspace_size(self) -> int:
        size = c_size_t()
        self.library.check(self.library._workspace_size, byref(self.params), byref(size))
        return size.value

    def output(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def run(self, function: Function, *arguments: object) -> None:
        with self.ready():
            self.library.check(function, byref(self.params), *arguments)

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """The problem has its scratch, and its device is the current one."""
        size = self.workspace_size()
        scratch = torch.empty(size + _ALIGNMENT, dtype=torch.uint8, device=self.device)
        self.params.workspace = -(-scratch.data_ptr() // _ALIGNMENT) * _ALIGNMENT
        self.params.workspace_size = size
        with torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext():
            yield

    def attention(self, function: Function) -> tuple[Tensor, Tensor]:
        o = self.output(self.o_shape, self.dtype)
        lse = self.output(self.o_shape[:3], torch.float32)
        self.params.out, self.params.lse = o.data_ptr(), lse.data_ptr()
        self.run(function)
        return o, lse
