"""`hyperattention doctor`: each part is found by itself and every fault says how to mend it."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

from hyperattention import doctor
from hyperattention.library import ORT_LIBRARY, build_info, load_cpu, ort_library_path, trt_library_path

ROOT = Path(__file__).resolve().parent.parent


def test_every_part_is_named_once_and_each_fault_has_a_remedy() -> None:
    checks = doctor.collect()
    names = [check.name for check in checks]
    assert len(set(names)) == len(names)
    assert {"Python", "NVIDIA driver", "PyTorch", "ONNX Runtime", "TensorRT", ORT_LIBRARY, "libhyperattention_trt.so"} <= set(names)
    for check in checks:
        assert check.status in (doctor.OK, doctor.MISSING, doctor.MISMATCH) and check.found
        assert bool(check.mend) == (check.status != doctor.OK), check
    assert json.loads(json.dumps(doctor.to_json(checks)))[0]["name"] == "Python"


@dataclass(frozen=True)
class Driver:
    version: str
    devices: str
    status: str
    words: str

    def __str__(self) -> str:
        return f"{self.version or 'none'}-{self.devices or 'none'}"


@pytest.mark.parametrize(
    "case",
    [
        Driver("580.95.05", "H200", doctor.OK, "580.95.05"),
        Driver("612.1", "H200", doctor.OK, "612.1"),
        Driver("550.54.15", "H200", doctor.MISMATCH, "too old"),
        Driver("580.95.05", "", doctor.MISSING, "no device"),
        Driver("", "", doctor.MISSING, "no driver"),
    ],
    ids=str,
)
def test_driver(case: Driver) -> None:
    check = doctor.check_driver(case.version, case.devices)
    assert check.status == case.status and case.words in check.found
    if case.status == doctor.MISMATCH:
        assert str(doctor.OLDEST_DRIVER) in check.mend


def test_a_missing_library_is_not_a_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HYPERATTENTION_LIBRARY_DIR", str(tmp_path))
    for check in (doctor.check_library(ORT_LIBRARY, ort_library_path, True), doctor.check_ort_op(), doctor.check_trt_plugin()):
        assert check.status == doctor.MISSING and "make native" in check.mend
    assert doctor.exit_code([doctor.check_ort_op()]) == 3


def test_a_file_that_is_no_library_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ORT_LIBRARY).write_bytes(b"not a library")
    monkeypatch.setenv("HYPERATTENTION_LIBRARY_DIR", str(tmp_path))
    check = doctor.check_library(ORT_LIBRARY, ort_library_path, True)
    assert check.status == doctor.MISSING and "cannot be loaded" in check.found


def test_a_missing_package_is_named_with_its_release(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_polygraphy().status == doctor.OK
    monkeypatch.setitem(sys.modules, "polygraphy", None)
    monkeypatch.setattr("importlib.metadata.requires", lambda name: ["polygraphy-extra", "polygraphy<9,>=8; python_version > '3'"])
    check = doctor.check_polygraphy()
    assert (check.status, check.mend) == (doctor.MISSING, "pip install 'polygraphy<9,>=8'") and doctor.exit_code([check]) == 3


def test_optional_parts_may_be_missing() -> None:
    missing = doctor.Check("TensorRT", doctor.MISSING, "-", "install it")
    assert doctor.exit_code([missing]) == 0
    assert doctor.exit_code([doctor.Check("TensorRT", doctor.MISMATCH, "-", "install it")]) == 3


def test_square_brackets_survive_the_table() -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    doctor.render([doctor.Check("x", doctor.MISSING, "a[b]", "pip install 'y[z]'")], console)
    text = console.export_text()
    assert "a[b]" in text and "y[z]" in text


def test_build_id_follows_the_sources(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "plugins", tmp_path / "plugins")
    before = doctor.sources_id(tmp_path)
    assert before == doctor.sources_id(ROOT)
    with (tmp_path / "plugins" / "geometry.h").open("a") as file:
        file.write("\n")
    assert doctor.sources_id(tmp_path) != before


def test_cmake_computes_the_same_build_id(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "plugins", tmp_path / "plugins")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    lines = ["cmake_minimum_required(VERSION 3.24)", "project(x NONE)", f'include("{ROOT}/cmake/BuildId.cmake")']
    (tmp_path / "CMakeLists.txt").write_text("\n".join([*lines, 'file(WRITE id "${HA_VERSION} ${HA_BUILD_ID}")']))
    cmake = shutil.which("cmake", path=str(Path(sys.executable).parent)) or "cmake"
    subprocess.run([cmake, "-S", tmp_path, "-B", tmp_path / "build"], check=True, capture_output=True)
    assert (tmp_path / "id").read_text() == f"{doctor.__version__} {doctor.sources_id(tmp_path)}"


@pytest.mark.native
def test_the_built_library_says_what_it_is() -> None:
    info = build_info(ort_library_path())
    assert info["backends"] == ["cpu", "cuda"] and info["architectures"] and info["build_id"] == doctor.sources_id(ROOT)
    assert load_cpu().path == ort_library_path()


@pytest.mark.ort
def test_the_op_loads_in_onnx_runtime() -> None:
    assert doctor.check_ort_op().status == doctor.OK


@pytest.mark.tensorrt
def test_the_plugin_loads_in_tensorrt() -> None:
    assert doctor.check_tensorrt().status == doctor.OK
    assert doctor.check_trt_plugin().status == doctor.OK
    assert build_info(trt_library_path())["build_id"] == doctor.sources_id(ROOT)
