"""How the plugin comes into TensorRT's registry: opened (static), through loadLibrary (dynamic), in every order.

Each case is a process of its own, with the real library. One creator at most, at any time; none when the library is gone.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from tensorrt_builds import HEADERS, plugin_library

from hyperattention.config import DOMAIN, OP_TYPE
from hyperattention.library import TRT_LIBRARY

pytestmark = pytest.mark.tensorrt

# Steps name what is done and, behind a dot, to which copy of the library: a or b. The process prints what it finds after each.
PROGRAM = """
import ctypes, json, sys
from pathlib import Path
import _ctypes

KEY = {key}
held, loaded, rows = {{}}, {{}}, []
for step in sys.argv[2:]:
    what, _, copy = step.partition(".")
    path = str(Path(sys.argv[1]) / (copy or "a") / {library!r})
    told = None
    if what == "tensorrt":
        import tensorrt as trt
    elif what == "open":
        held[copy] = ctypes.CDLL(path)
    elif what == "close":
        _ctypes.dlclose(held.pop(copy)._handle)
    elif what == "polygraphy":  # --plugins: opened before TensorRT is, so libnvinfer has to be the first of them
        from polygraphy.backend.trt import load_plugins
        load_plugins([str((Path(sys.argv[1]) / "libnvinfer").resolve()), path])
    elif what == "trtexec":  # --staticPlugins: TensorRT's own plugins, and with them libnvinfer, are opened before
        held["own"] = ctypes.CDLL(str((Path(sys.argv[1]) / "libnvinfer_plugin").resolve()))
        held[copy] = ctypes.CDLL(path)
    elif what == "load":
        handle = trt.get_plugin_registry().load_library(path)
        told = handle is not None
        loaded[copy] = handle
    elif what == "unload":
        trt.get_plugin_registry().deregister_library(loaded.pop(copy))
    elif what == "register":
        from hyperattention.export.engine_plugin import register_plugin
        register_plugin(Path(path))
    if "tensorrt" in sys.modules:
        import tensorrt as trt
        registry = trt.get_plugin_registry()
        creator = registry.get_creator(*KEY)
        made = creator is not None and creator.create_plugin("x", trt.PluginFieldCollection([]), trt.TensorRTPhase.BUILD) is not None
        rows.append([step, [c.name for c in registry.all_creators].count(KEY[0]), made, told, path in open("/proc/self/maps").read()])
print(json.dumps(rows))
"""


@dataclass(frozen=True)
class Case:
    """Steps of one process; behind each, separated by a colon, the number of creators that it leaves (and "no" if it is refused)."""

    name: str
    steps: str

    def __str__(self) -> str:
        return self.name


CASES = (
    Case("static", "tensorrt:0 open:1"),
    Case("static-closed", "tensorrt:0 open:1 close:0 open:1"),
    Case("static-twice", "tensorrt:0 open:1 open:1"),
    Case("static-before-tensorrt", "open tensorrt:0 load:1"),
    Case("dynamic", "tensorrt:0 load:1"),
    Case("dynamic-unloaded", "tensorrt:0 load:1 unload:0 load:1 unload:0"),
    Case("dynamic-twice", "tensorrt:0 load:1 load.b:1:no"),
    Case("static-then-dynamic", "tensorrt:0 open:1 load:1"),
    Case("static-then-dynamic-unloaded", "tensorrt:0 open:1 load:1 unload:0 load:1"),
    Case("dynamic-then-static", "tensorrt:0 load:1 open:1"),
    Case("dynamic-then-static-unloaded", "tensorrt:0 load:1 open:1 unload:0 load:1 unload:0"),
    Case("two-copies-static", "tensorrt:0 open.a:1 open.b:1 close.b:1 close.a:0"),
    Case("two-copies-static-then-dynamic", "tensorrt:0 open.a:1 load.b:1:no"),
    Case("two-copies-dynamic-then-static", "tensorrt:0 load.a:1 open.b:1 unload.a:0"),
    Case("polygraphy", "polygraphy tensorrt:1"),
    Case("trtexec-static", "trtexec tensorrt:1 load:1"),
    Case("register", "tensorrt:0 register:1 register:1"),
    Case("register-after-static", "tensorrt:0 open:1 register:1"),
    Case("register-after-dynamic", "tensorrt:0 load:1 register:1"),
    Case("register-before-tensorrt", "open register:1"),
    Case("register-then-dynamic", "tensorrt:0 register:1 load:1"),
    Case("register-copies", "tensorrt:0 register.a:1 register.b:1"),
)


@pytest.fixture(scope="module", params=HEADERS, ids=lambda headers: f"headers-{headers}")
def copies(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the library twice, as two files, and links to TensorRT's own libraries."""
    folder = tmp_path_factory.mktemp("copies")
    library = plugin_library(request.param)
    for copy in "ab":
        (folder / copy).mkdir()
        shutil.copyfile(library, folder / copy / TRT_LIBRARY)
    import tensorrt  # noqa: F401  (opens them, wherever they lie)

    mapped = {line.split()[-1] for line in open("/proc/self/maps") if "/libnvinfer" in line}
    for path in mapped:
        (folder / Path(path).name.partition(".so")[0]).symlink_to(path)
    return folder


def _run(copies: Path, steps: list[str]) -> list[tuple[str, int, bool, bool | None, bool]]:
    """After each step since TensorRT is there: its name, creators registered, whether one makes a plugin, what loadLibrary told, mapped."""
    program = PROGRAM.format(key=(OP_TYPE, "1", DOMAIN), library=TRT_LIBRARY)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program, str(copies), *steps]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, f"ended with {done.returncode}: {done.stdout}{done.stderr}"
    return [tuple(row) for row in json.loads(done.stdout.splitlines()[-1])]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_creator(case: Case, copies: Path) -> None:
    steps = [step.split(":") for step in case.steps.split()]
    rows = _run(copies, [name for name, *_ in steps])
    wanted = [(name, int(count[0]), "no" not in count) for name, *count in steps if count]
    assert [(name, count, told is not False) for name, count, _, told, _ in rows] == wanted
    assert all(made == (count > 0) for _, count, made, _, _ in rows), "the registry gives a creator that makes no plugin"


@pytest.mark.parametrize("steps", ["tensorrt load unload tensorrt", "tensorrt open close tensorrt"])
def test_the_unloaded_library_is_gone(steps: str, copies: Path) -> None:
    """Nothing keeps it mapped, so nothing that it registered may be left; TensorRT still is there and answers."""
    assert [row[-1] for row in _run(copies, steps.split())] == [False, True, False, False]
