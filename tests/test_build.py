"""What the build makes of its options, without building; and that the portable kernels compile for later GPUs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hyperattention.doctor import find_nvcc

ROOT = Path(__file__).resolve().parent.parent
CUDA = ROOT / "plugins/cuda"
# All that is portable, with one of the attention kernel's instances.
PORTABLE = sorted(p for p in CUDA.glob("*.cu") if not p.name.startswith(("sm90_", "attend_"))) + [CUDA / "attend_bf16_64.cu"]
SM90 = {f"sm90_attend_{dtype}_{size}" for dtype in ("bf16", "f16") for size in (64, 128)}


@pytest.fixture(scope="module")
def nvcc() -> Path:
    found = find_nvcc()
    if found is None:
        pytest.skip("nvcc is missing: make native fetches it")
    return found


@pytest.mark.parametrize("source", PORTABLE, ids=lambda path: path.stem)
def test_portable_kernels_compile_for_later_gpus(nvcc: Path, source: Path, tmp_path: Path) -> None:
    """To PTX once and from that to the code of each, because no source asks which of them it is compiled for."""
    target = tmp_path / "kernels.fatbin"
    targets = ("-gencode=arch=compute_100,code=[sm_100,sm_120]", "-fatbin")
    options = ["-std=c++17", "-O3", "-DHA_HEAD_SIZES=2", "-I", ROOT / "plugins", *targets]
    done = subprocess.run([nvcc, *options, "-o", target, source], capture_output=True, text=True)
    assert done.returncode == 0 and target.stat().st_size, done.stderr[-3000:]


def test_no_kernel_asks_what_it_is_compiled_for() -> None:
    sources = [path for path in CUDA.iterdir() if path.suffix in (".cu", ".cuh", ".h")]
    assert len(sources) > 30
    assert not [path.name for path in sources if "__CUDA_ARCH__" in path.read_text()]


class Build:
    """A build folder that CMake is run in again and again; what it finds out about the compilers it finds out once."""

    def __init__(self, folder: Path, nvcc: Path) -> None:
        self.folder, self.nvcc = folder, nvcc

    def configure(self, cutlass: Path, **options: str) -> str:
        """With HYPERATTENTION_* options and CUTLASS at `cutlass`; returns what CMake said if it refused, else "". Nothing is fetched."""
        tool = {name: shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name) for name in ("cmake", "ninja")}
        given = {f"HYPERATTENTION_{name}": value for name, value in options.items()}
        given |= {"HYPERATTENTION_FETCH": "OFF", "CUTLASS_ROOT": str(cutlass), "CUDA_HOME": str(self.nvcc.parent.parent)}
        given |= {"CMAKE_MAKE_PROGRAM": str(tool["ninja"]), "CMAKE_EXPORT_COMPILE_COMMANDS": "ON"}
        command = [tool["cmake"], "-S", ROOT, "-B", self.folder, "-G", "Ninja", "-U", "HYPERATTENTION_*"]
        done = subprocess.run([*command, *(f"-D{name}={value}" for name, value in given.items())], capture_output=True, text=True)
        return "" if done.returncode == 0 else " ".join(done.stderr.split())

    def commands(self) -> dict[str, str]:
        """How each CUDA source would be compiled, by its stem."""
        listed = json.loads((self.folder / "compile_commands.json").read_text())
        return {Path(entry["file"]).stem: entry["command"] for entry in listed if entry["file"].endswith(".cu")}


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory, nvcc: Path) -> Build:
    return Build(tmp_path_factory.mktemp("build"), nvcc)


def headers(folder: Path, version: tuple[int, int] = (4, 2)) -> Path:
    """A folder that looks like CUTLASS to the build."""
    for name in ("cute/arch/mma_sm90_gmma.hpp", "cutlass/version.h"):
        (folder / "cutlass/include" / name).parent.mkdir(parents=True)
        (folder / "cutlass/include" / name).write_text("#define CUTLASS_MAJOR {}\n#define CUTLASS_MINOR {}\n".format(*version))
    return folder / "cutlass"


def test_hopper_kernels_are_compiled_for_hopper_alone(build: Build, tmp_path: Path) -> None:
    """And only they see CUTLASS; the dispatch knows of them."""
    cutlass = headers(tmp_path)
    assert build.configure(cutlass) == ""
    found = build.commands()
    assert {stem for stem in found if stem.startswith("sm90_")} == SM90
    for stem, command in found.items():
        targets = set(re.findall(r"sm_\w+|compute_\w+(?=[],\"])", command.replace("arch=compute", "")))
        assert targets == ({"sm_90a"} if stem in SM90 else {"sm_80", "sm_90", "compute_90"}), (stem, targets)
        assert (str(cutlass) in command) == (stem in SM90), command
        assert "-DHA_HOPPER=1" in command.split(), command


@pytest.mark.parametrize(
    "options, kernels",
    [
        ({"CUDA_ARCHITECTURES": "80-real;90-virtual"}, set()),
        ({"HOPPER": "OFF"}, set()),
        ({"HEAD_SIZES": "32;96;256"}, set()),
        ({"HEAD_SIZES": "128", "CUDA_ARCHITECTURES": "90a-real"}, {name for name in SM90 if name.endswith("128")}),
    ],
    ids=["no-sm90-code", "switched-off", "other-head-sizes", "only-sm90a-and-128"],
)
def test_hopper_kernels_follow_the_options(build: Build, tmp_path: Path, options: dict[str, str], kernels: set[str]) -> None:
    """Where none is wanted CUTLASS is not asked for."""
    assert build.configure(headers(tmp_path) if kernels else tmp_path, **options) == ""
    found = build.commands()
    assert {stem for stem in found if stem.startswith("sm90_")} == kernels
    assert f"-DHA_HOPPER={int(bool(kernels))}" in found["api"].split()


def test_missing_cutlass_is_an_error(build: Build, tmp_path: Path) -> None:
    said = build.configure(tmp_path)
    assert f"CUTLASS_ROOT is '{tmp_path}', which holds no include/cute" in said and "or HYPERATTENTION_HOPPER=OFF" in said


def test_old_cutlass_is_an_error(build: Build, tmp_path: Path) -> None:
    said = build.configure(headers(tmp_path, (3, 9)))
    assert "is '3.9'; 4.0 or newer is needed: set CUTLASS_ROOT to" in said
