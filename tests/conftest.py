"""One rule for skips: a marker names what a test needs, and where that is missing the skip says so.

HYPERATTENTION_NO_SKIP=1 (CI) turns every skip into a failure. The summary names the markers that were left out.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from emulated import build_emulated

from hyperattention.errors import EnvironmentFault
from hyperattention.library import ort_library_path, trt_library_path
from hyperattention.native import Library

PARALLEL = "PYTEST_XDIST_WORKER" in os.environ
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: its kernels run on the processor
NO_SKIP = os.environ.get("HYPERATTENTION_NO_SKIP") == "1"
LEFT_OUT = {
    "tensorrt": "make test-tensorrt runs them",
    "gpu": "make test-gpu runs them on a machine with a CUDA device",
    "package": "make test-package runs them",
}
_left_out: Counter[str] = Counter()


@functools.cache
def _missing(marker: str) -> str:
    """What the machine lacks for tests with this marker; empty when nothing."""
    try:
        if marker == "gpu":
            return "" if torch.cuda.is_available() else "PyTorch sees no CUDA device"
        if marker == "tensorrt":
            import tensorrt  # noqa: F401

            trt_library_path()
        if marker == "ort":
            import onnxruntime  # noqa: F401
        if marker in ("ort", "native"):
            ort_library_path()
    except (ImportError, EnvironmentFault) as error:
        return str(error)
    return ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in ("gpu", "tensorrt", "ort", "native"):
        if item.get_closest_marker(marker) and (reason := _missing(marker)):
            pytest.skip(f"{marker}: {reason}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    if NO_SKIP and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.longrepr = f"HYPERATTENTION_NO_SKIP=1 and the test was skipped: {reason}"
    return report


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        _left_out.update(marker for marker in LEFT_OUT if item.get_closest_marker(marker))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if PARALLEL:
        session.config.workeroutput["left_out"] = dict(_left_out)  # type: ignore[attr-defined]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Of processes that share the tests (pytest-xdist), each has left out the same ones."""
    _left_out.update(Counter(getattr(node, "workeroutput", {}).get("left_out", {})) - _left_out)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for marker, count in _left_out.items():
        terminalreporter.write_line(f"left out: {count} tests marked {marker} ({LEFT_OUT[marker]})")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread():
    """For a reference's tiny problems: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Libraries of the CUDA sources compiled for the processor, by the compute capability that the emulated device has."""
    compiler = shutil.which("g++")
    if not compiler:
        pytest.skip("g++ is missing")
    own = tmp_path_factory.getbasetemp()
    return build_emulated(compiler, (own.parent if PARALLEL else own) / "emulated")


@pytest.fixture(scope="session")
def hopper(emulated: dict[int, Path]) -> Library:
    """On an emulated device of compute capability 9.0."""
    return Library(emulated[90], "ha_cuda_", "cpu")
