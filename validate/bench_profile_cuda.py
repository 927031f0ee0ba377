"""What the time split needs of a CUDA device: launches as CUPTI reports them, the op's stages, and the two ceilings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median

import torch
from torch import Tensor

from hyperattention.config import Config
from hyperattention.errors import EnvironmentFault
from hyperattention.export.console import readable
from hyperattention.export.source import torch_dtype
from hyperattention.geometry import Geometry
from hyperattention.native import Library
from hyperattention.validate.bench_profile import Ceilings, Launch
from hyperattention.validate.bench_timing import CudaClock, l2_scratch

_MARKER = "at::native"  # the namespace of PyTorch's own kernels, which the library never launches
_FILLS = 20  # as the benchmark's clock does: the L2 cache is overwritten, and the call is enqueued meanwhile
_COPY_BYTES = 2**31
_SIDE, _RUNS = 8192, 15


class CudaOperation:
    """The kernels of `library` on q [B,Hq,S,D], k and v [B,Hkv,S,D]."""

    def __init__(self, library: Library, q: Tensor, k: Tensor, v: Tensor, config: Config) -> None:
        self.library, self.tensors, self.config = library, (q, k, v), config
        self.geometry = Geometry.of(q, k, v, config)

    def select(self) -> Tensor:
        return self.library.select(*self.tensors, self.config)

    def attend(self, config: Config, plan: Tensor) -> object:
        return self.library.attend(*self.tensors, config, plan)

    def forward(self) -> object:
        return self.library.forward(*self.tensors, self.config)


class CudaRecorder:
    """Records launches with torch.profiler, which reads them from CUPTI: kernels' own times, however they were launched.

    Between two calls PyTorch fills a tensor larger than the L2 cache; its kernels mark where a call begins.
    """

    def __init__(self) -> None:
        self.scratch = l2_scratch()

    def record(self, calls: Sequence[Callable[[], object]]) -> list[list[Launch]]:
        """Raises EnvironmentFault where the profiler did not see every call."""

        def run() -> None:
            for call in calls:
                for _ in range(_FILLS):
                    self.scratch.fill_(1)
                call()

        found = grouped(launches_of(run))
        if len(found) != len(calls):
            raise EnvironmentFault(
                f"the profiler recorded {len(found)} of {len(calls)} runs; CUPTI has to be usable (no other profiler may be attached)"
            )
        return found


def launches_of(run: Callable[[], object]) -> list[Launch]:
    """All that the device did for `run`, which may return before it is done, in order of their start."""
    from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        run()
        torch.cuda.synchronize()
    seen = [event for event in profiler.events() or () if event.device_type == DeviceType.CUDA]
    launches = [Launch(event.name, event.time_range.start / 1e6, event.time_range.end / 1e6) for event in seen]
    return sorted(launches, key=lambda launch: launch.start)


def grouped(launches: Sequence[Launch]) -> list[list[Launch]]:
    """The library's launches and copies, by the marks that lie before each call; what else a profiler reports is no launch."""
    groups: list[list[Launch]] = []
    marked = False
    for launch in sorted(launches, key=lambda launch: launch.start):
        if _MARKER in launch.name:
            if not marked:
                groups.append([])
            marked = True
        elif groups and (launch.ours or launch.moves):
            groups[-1].append(launch)
            marked = False
    return groups


def measure_ceilings(dtype: str) -> Ceilings:
    """A copy of 2 GiB (less where memory is short) and products of two 8,192 x 8,192 matrices of random numbers, medians of 15.

    `dtype` is the problem's; fp32 matrices are multiplied in TF32, as the library's kernels do.
    """
    clock = CudaClock()
    size = min(_COPY_BYTES, torch.cuda.mem_get_info()[0] // 8)
    copy = _copy_rate(clock, size)
    with _tf32():
        a, b = (torch.randn(_SIDE, _SIDE, device="cuda").to(torch_dtype(dtype)) for _ in range(2))
        matrix = 2 * _SIDE**3 / _median(clock, lambda: a @ b)
    a8, b8 = (torch.randint(-127, 128, (_SIDE, _SIDE), dtype=torch.int8, device="cuda") for _ in range(2))
    try:
        int8 = 2 * _SIDE**3 / _median(clock, lambda: torch._int_mm(a8, b8.t()))  # pyright: ignore[reportPrivateImportUsage]
        said = f"and int8 {int8 / 1e12:.0f} TOP/s"
    except RuntimeError as error:
        int8, said = None, f"int8 not measured ({' '.join(str(error).split())[:120]})"
    kind = "TF32" if dtype == "fp32" else dtype
    copied = f"copy of {readable(size)} {copy / 1e12:.2f} TB/s (read + written)"
    return Ceilings(copy, matrix, int8, f"{copied}, {_SIDE}^3 matrix product {kind} {matrix / 1e12:.0f} TFLOP/s, {said}")


def _copy_rate(clock: CudaClock, size: int) -> float:
    """Bytes read plus bytes written a second of a copy of `size` bytes."""
    source = torch.randint(-128, 128, (size,), dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * size / _median(clock, lambda: target.copy_(source))


def _median(clock: CudaClock, call: Callable[[], object]) -> float:
    for _ in range(3):
        call()
    return median(clock(call)[0] for _ in range(_RUNS))


@contextmanager
def _tf32() -> Iterator[None]:
    """Inside, PyTorch's fp32 matrix products run in TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
