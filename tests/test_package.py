"""The package as a user gets it: sdist from the checkout, wheel from the sdist, installed in an environment of its own, used there.

HYPERATTENTION_WHEEL=FILE tests a wheel that is built already. Else one is built here, in isolation, with the CUDA kernels cut to one
GPU and one head size (the documented options), because the whole table takes minutes and is compiled by `make native` as well.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from hyperattention import __version__
from hyperattention.doctor import sources_id

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = {"libhyperattention_ort.so", "libhyperattention_trt.so"}
CUT = ("-C", "cmake.define.HYPERATTENTION_CUDA_ARCHITECTURES=90-real", "-C", "cmake.define.HYPERATTENTION_HEAD_SIZES=64")
pytestmark = pytest.mark.package


def run(*command: object, cwd: Path) -> str:
    """Standard output of a command outside the checkout, which sees nothing of this environment; fails with both outputs."""
    dropped = ("PYTHONPATH", "HYPERATTENTION_LIBRARY_DIR", "VIRTUAL_ENV")
    environment = {k: v for k, v in os.environ.items() if k not in dropped} | {"PYTHONSAFEPATH": "1"}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    code = "import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])"
    run(sys.executable, "-c", code, folder, cwd=ROOT)
    (path,) = folder.glob("*.tar.gz")
    return path


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if "HYPERATTENTION_WHEEL" in os.environ:
        return Path(os.environ["HYPERATTENTION_WHEEL"]).resolve()
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", *CUT, "-w", folder, sdist, cwd=folder)
    (path,) = folder.glob("hyperattention-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment that holds the wheel; what it depends on is read from the environment of the tests."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    bin_folder = folder / "bin"
    site = Path(run(bin_folder / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    # As a plain entry of sys.path: .pth files inside, such as that of an editable install, do not count.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(sys.executable, "-m", "pip", "--python", bin_folder / "python", "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=folder)
    return bin_folder


def test_the_sdist_holds_what_a_build_needs(sdist: Path) -> None:
    prefix = f"hyperattention-{__version__}/"
    with tarfile.open(sdist) as archive:
        names = {name.removeprefix(prefix) for name in archive.getnames()}
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    folders = ("plugins/", "cmake/", "export/", "validate/")
    wanted = {name for name in listed if name.startswith(folders) and (ROOT / name).is_file()}
    wanted |= {"CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE", "THIRD_PARTY_NOTICES.md", "hyperattention/op.py", "PKG-INFO"}
    assert wanted <= names, sorted(wanted - names)
    elsewhere = ("tests/", "models/", ".ci/", ".deps/", ".venv/", "build/", "out/")
    stray = {name for name in names if name.startswith(elsewhere) or name.endswith(".so")}
    assert not stray, sorted(stray)


def test_the_wheel_holds_both_libraries(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"hyperattention/lib/{name}" for name in LIBRARIES} <= set(names)
    assert {"hyperattention/export/cli.py", "hyperattention/validate/templates/report.html.jinja"} <= set(names)
    assert wheel.name.startswith(f"hyperattention-{__version__}-py3-none-linux")


def test_the_installed_libraries_are_of_these_sources(installed: Path, tmp_path: Path) -> None:
    code = (
        "import json, hyperattention; from hyperattention import library as l;"
        "paths = [l.ort_library_path(), l.trt_library_path()];"
        "print(json.dumps([hyperattention.__file__, *[[str(p), l.build_info(p)] for p in paths]]))"
    )
    package, *libraries = json.loads(run(installed / "python", "-c", code, cwd=tmp_path))
    assert Path(package).is_relative_to(installed.parent)
    for path, info in libraries:
        assert Path(path).is_relative_to(installed.parent) and info["build_id"] == sources_id(ROOT)
        assert "cuda" in info["backends"]


@pytest.mark.skipif("HYPERATTENTION_WHEEL" in os.environ, reason="HYPERATTENTION_WHEEL is set: that wheel may hold every head size")
def test_head_sizes_that_were_left_out_are_refused(installed: Path, tmp_path: Path) -> None:
    """Smaller ones are padded to the one that was built. Needs no device: the workspace is a function of shapes."""
    code = (
        "import ctypes; from hyperattention.config import Config;"
        "from hyperattention.library import HaAttributes, HaParams, trt_library_path;"
        "library = ctypes.CDLL(str(trt_library_path())); library.ha_last_error.restype = ctypes.c_char_p;"
        "ask = lambda d: library.ha_cuda_workspace_size(ctypes.byref(HaParams(ctypes.sizeof(HaParams), 2, 1, 1, 1, 100, 100, d, d,"
        " HaAttributes.of(Config()))), ctypes.byref(ctypes.c_size_t()));"
        "print(ask(40), ask(64), ask(72), library.ha_last_error().decode())"
    )
    words = run(installed / "python", "-c", code, cwd=tmp_path)
    assert words.startswith("0 0 2 head sizes are 72 and 72; this build has CUDA kernels up to 64") and "HYPERATTENTION_HEAD_SIZES" in words


def test_doctor_is_content(installed: Path, tmp_path: Path) -> None:
    answer = json.loads(run(installed / "hyperattention", "doctor", "--json", cwd=tmp_path))
    checks = {check["name"]: check for check in answer["checks"]}
    for name in (*LIBRARIES, "op in ONNX Runtime"):
        assert checks[name]["status"] == "ok", checks[name]


def test_export_runs_to_completion_and_the_result_runs(installed: Path, tmp_path: Path) -> None:
    """The bundled model; then the example, which has the exported files alone, at a length that approximates."""
    out = tmp_path / "out"
    options = ("--input-ids", "bytes", "--no-validate", "--max-seq", "8192", "--quiet")
    run(installed / "export-model", ROOT / "models/byte-lm-4m", out, *options, cwd=tmp_path)
    manifest = json.loads((out / "manifest.json").read_text())
    assert {"model.onnx", *LIBRARIES} <= set(manifest["files"])
    words = run(installed / "python", ROOT / "examples/onnxruntime_logits.py", out, ROOT / "tests/data/heldout.txt", 4608, cwd=tmp_path)
    found = re.fullmatch(r"4608 bytes in [\d.]+ s: ([\d.]+) nats a byte\n", words)
    assert found and 0.3 < float(found[1]) < 2
