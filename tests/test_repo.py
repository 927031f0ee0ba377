"""The repository's own rules: imports go one way, names are declared, C and Python agree, nothing names a machine."""

from __future__ import annotations

import ast
import ctypes
import dataclasses
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import hyperattention
from hyperattention.config import PRESETS, RANGES, Config
from hyperattention.library import ABI_VERSION, SELECTOR_CODES, HaAttributes, HaParams

ROOT = Path(__file__).resolve().parent.parent
LAYERS = {"hyperattention": 0, "export": 1, "validate": 2}
# Third-party text that the demo reads; it may say what it likes.
FOREIGN = ("tests/data/", "LICENSE")


def tracked() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.fail("these rules are about tracked files: run them in a git checkout")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in names.split("\0") if name and (ROOT / name).is_file() and not (ROOT / name).is_symlink()]


def python_files(folder: str) -> list[Path]:
    return sorted(p for p in (ROOT / folder).glob("**/*.py"))


def imported(path: Path) -> set[str]:
    """Modules of this project that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in names if name.split(".")[0] in LAYERS}


@pytest.mark.parametrize("folder", LAYERS)
def test_imports_go_one_way(folder: str) -> None:
    for path in python_files(folder):
        for name in imported(path):
            parts = name.split(".")
            assert parts[0] == "hyperattention", f"{path.relative_to(ROOT)} imports {name}; write hyperattention.{name}"
            target = parts[1] if len(parts) > 1 and parts[1] in LAYERS else "hyperattention"
            assert LAYERS[target] <= LAYERS[folder], f"{path.relative_to(ROOT)} imports {name}: {folder} may not know {target}"


def test_native_sources_know_no_framework() -> None:
    adapters = {"trt": "NvInfer", "ort": "onnxruntime"}
    for path in sorted((ROOT / "plugins").rglob("*")):
        if path.suffix in {".h", ".cuh", ".cpp", ".cu", ".inl"}:
            for header in re.findall(r'#include\s*[<"]([^>"]+)', path.read_text()):
                assert not re.match(r"(torch|ATen|c10|Python)\b", header), f"{path.name} includes {header}"
                for prefix, sdk in adapters.items():
                    if header.startswith(sdk):
                        assert path.name.startswith(f"{prefix}_"), f"{path.name} includes {header}; only {prefix}_* may"
                if re.match("(cute|cutlass)/", header):
                    assert path.name.startswith("sm90_"), f"{path.name} includes {header}; only sm90_* may"


@pytest.mark.parametrize("package", ["hyperattention", "hyperattention.export", "hyperattention.validate"])
def test_all_names_exist(package: str) -> None:
    module = __import__(package, fromlist=["__all__"])
    for name in module.__all__:
        assert hasattr(module, name), f"{package}.__all__ lists {name}"
    assert list(module.__all__) == sorted(module.__all__)


@pytest.mark.parametrize("name", ["export", "validate"])
def test_packages_refuse_their_bare_name(name: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and f"import hyperattention.{name}, not {name}" in done.stderr
    link = ROOT / "hyperattention" / name
    assert link.is_symlink() and link.readlink() == Path("..") / name


def test_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == hyperattention.__version__
    abi = re.search(r"#define HA_ABI_VERSION (\d+)", (ROOT / "plugins/attention.h").read_text())
    assert abi and int(abi.group(1)) == ABI_VERSION


def test_config_and_its_mirrors_have_one_order() -> None:
    fields = [field.name for field in dataclasses.fields(Config)]
    struct = re.search(r"typedef struct HaAttributes \{(.*?)\}", (ROOT / "plugins/attention.h").read_text(), re.S)
    assert struct
    declared = re.findall(r"(\w+) (\w+);", struct.group(1))
    assert [name for _, name in declared] == fields == [name for name, _ in HaAttributes._fields_]
    types = {"float": ctypes.c_float, "int32_t": ctypes.c_int32}
    assert [types[kind] for kind, _ in declared] == [kind for _, kind in HaAttributes._fields_]


def test_native_ranges_and_defaults_equal_configs() -> None:
    table = re.search(r"kFields\[kIntegerFields\] = \{(.*?)\n\};", (ROOT / "plugins/config.cpp").read_text(), re.S)
    assert table
    rows = re.findall(r'\{"(\w+)", &HaAttributes::(\w+), (\w+), (\w+), (\w+)\}', table.group(1))
    number = {"INT32_MAX": 2**31 - 1}
    found = {name: tuple(number.get(text) or int(text) for text in (low, high, default)) for name, _, low, high, default in rows}
    assert all(name == member for name, member, *_ in rows)
    assert found == {name: (*RANGES[name], getattr(Config(), name)) for name in RANGES}


def test_operator_page_has_configs_ranges_and_presets() -> None:
    text = (ROOT / "docs/operator.md").read_text()
    said = {name: (int(low), int(high)) for name, low, high in re.findall(r"`(\w+)` (\d+)(?: to |/)(\d+)\b", text)}
    assert {name: said.get(name) for name in RANGES} == RANGES
    columns = "block_size num_blocks sample_size local_size local_overlap sinks exact_below".split()
    for preset in ("blocks", "paper"):
        row = re.search(rf"^\| `{preset}`.*$", text, re.M)
        assert row
        found = [int(cell.split()[0]) for cell in row.group().strip("|").split("|")[2:]]
        assert found == [getattr(PRESETS[preset], name) for name in columns], preset


LAYOUT = """
#include <stdio.h>
#include "attention.h"
#define SHOW(S, F) printf("  \\"" #S "." #F "\\": [%zu, %zu],\\n", offsetof(S, F), sizeof(((S*)0)->F));
int main(void) { printf("{"); @ROWS@ printf("\\"sizes\\": [%zu, %zu]}", sizeof(HaAttributes), sizeof(HaParams)); return 0; }
"""


def test_ctypes_mirrors_have_the_compilers_layout(tmp_path: Path) -> None:
    mirrors = {"HaAttributes": HaAttributes, "HaParams": HaParams}
    rows = "".join(f"SHOW({name}, {field})" for name, mirror in mirrors.items() for field, *_ in mirror._fields_)
    (tmp_path / "layout.c").write_text(LAYOUT.replace("@ROWS@", rows))
    subprocess.run(["cc", "-I", ROOT / "plugins", "-o", tmp_path / "layout", tmp_path / "layout.c"], check=True)
    layout = json.loads(subprocess.run([tmp_path / "layout"], capture_output=True, check=True).stdout)
    assert layout.pop("sizes") == [ctypes.sizeof(HaAttributes), ctypes.sizeof(HaParams)]
    for name, mirror in mirrors.items():
        for field, *_ in mirror._fields_:
            descriptor = getattr(mirror, field)
            assert layout[f"{name}.{field}"] == [descriptor.offset, descriptor.size], f"{name}.{field}"


def test_selector_codes_equal_the_headers() -> None:
    names = re.search(r"enum HaSelector \{(.*?)\}", (ROOT / "plugins/attention.h").read_text())
    assert names
    assert SELECTOR_CODES == {name.lower(): int(code) for name, code in re.findall(r"HA_(\w+) = (\d+)", names.group(1))}


def test_no_file_names_a_machine_or_a_registry() -> None:
    # Spelled in pieces, so that this file passes its own test.
    folders = "|".join(("root", "home", "work", "tmp/dev", "Users"))
    hosts = ("py" + "pi.org", "python" + "hosted", "crates" + ".io", "maven" + ".org", "debian" + ".org", "npmjs" + ".")
    pattern = re.compile(rf"(?<![\w.$}}])/(?:{folders})/\w|{'|'.join(map(re.escape, hosts))}")
    for path in tracked():
        name = path.relative_to(ROOT).as_posix()
        data = path.read_bytes()
        if name.startswith(FOREIGN) or b"\0" in data[:1024]:
            continue
        for number, line in enumerate(data.decode().splitlines(), 1):
            assert not pattern.search(line), f"{name}:{number}: {line.strip()}"


def test_files_stay_small() -> None:
    for path in tracked():
        if path.suffix in {".py", ".h", ".cuh", ".cpp", ".cu", ".inl", ".cmake", ".sh"}:
            lines = len(path.read_text().splitlines())
            assert lines <= 400, f"{path.relative_to(ROOT)} has {lines} lines; at most 400"


def test_readme_commands_exist() -> None:
    text = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.M))
    code = "\n".join("".join(groups) for groups in re.findall(r"```\w*\n(.*?)```|`([^`]+)`", text, re.S))
    used = set(re.findall(r"\bmake ([a-z-]+)", code))
    assert {"demo", "test"} <= used
    assert used <= targets, f"README.md names {sorted(used - targets)}, which the Makefile lacks"
    for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", text):
        assert (ROOT / target).exists(), f"README.md links {target}"


def test_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    """Python content only; the libraries' place in the wheel is CMake's install rule, checked below."""
    options = ["--quiet", "--no-deps", "--no-build-isolation", "-C", "wheel.cmake=false", "-w", tmp_path]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, ROOT], check=True)
    (path,) = tmp_path.glob("hyperattention-*.whl")
    wheel = zipfile.ZipFile(path)
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = {
        f"hyperattention/{prefix}{path.relative_to(ROOT / folder).as_posix()}"
        for folder, prefix in (("hyperattention", ""), ("export", "export/"), ("validate", "validate/"))
        for path in tracked()
        if path.is_relative_to(ROOT / folder)
    }
    assert expected <= names
    assert not {name for name in names if not name.startswith("hyperattention/") or "/tests/" in name}
    kept = {name.split("/licenses/")[1] for name in wheel.namelist() if "/licenses/" in name}
    assert kept == {"LICENSE", "THIRD_PARTY_NOTICES.md"}
    entry_points = wheel.read(next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))).decode()
    assert {"export-model", "hyperattention"} <= set(re.findall(r"^([\w-]+) *=", entry_points, re.M))


@pytest.mark.native
def test_libraries_are_installed_where_the_package_looks(tmp_path: Path) -> None:
    cmake = shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake")
    build = ROOT / "build" / "dev"
    if not (build / "cmake_install.cmake").is_file():
        pytest.skip("build/dev is missing: the libraries were not built by `make native`")
    subprocess.run([str(cmake), "--install", build, "--prefix", tmp_path], check=True, capture_output=True)
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert "hyperattention/lib/libhyperattention_ort.so" in found
    assert found <= {f"hyperattention/lib/libhyperattention_{name}.so" for name in ("ort", "trt")}
