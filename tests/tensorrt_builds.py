"""The plugin libraries that this checkout has built, by the release of the TensorRT headers they are compiled against."""

from __future__ import annotations

from pathlib import Path

import pytest

from hyperattention.errors import EnvironmentFault
from hyperattention.library import TRT_LIBRARY, trt_library_path

ROOT = Path(__file__).resolve().parent.parent
OWN, OTHER = "own", "11.4"  # the headers of the library that is installed, and those of a second one for tests
HEADERS = [OWN, pytest.param(OTHER, marks=pytest.mark.tensorrt)]
_MENDS = {
    OWN: "make native (it needs the TensorRT headers and a CUDA 13 compiler)",
    OTHER: "make test-tensorrt builds it, or cmake with -DHYPERATTENTION_TENSORRT_VARIANTS=11.4",
}


def plugin_library(headers: str) -> Path:
    """The plugin library of these headers; skips the test where it is not built."""
    if headers != OWN:
        return _newest(f"headers-{headers}/{TRT_LIBRARY}", headers)
    try:
        return trt_library_path()
    except EnvironmentFault as error:
        pytest.skip(f"{TRT_LIBRARY}: {error}")


def native_checks(headers: str) -> Path:
    """The executable of tests/trt_*_test.cpp, against the same headers; skips the test where it is not built."""
    return _newest("trt_fields_test" if headers == OWN else f"headers-{headers}/trt_fields_test", headers)


def _newest(name: str, headers: str) -> Path:
    built = sorted(ROOT.glob(f"build/*/{name}"), key=lambda path: path.stat().st_mtime)
    if not built:
        pytest.skip(f"build/*/{name} is not built: {_MENDS[headers]}")
    return built[-1]
