"""The CUDA sources compiled for the processor (tests/emulation), once for all tests that run them."""

from __future__ import annotations

import fcntl
import re
import subprocess
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WARNINGS = "-Wall -Wextra -Wno-unknown-pragmas -Wno-missing-field-initializers -Werror".split()
FLAGS = [*"-std=c++17 -O2 -fPIC -fvisibility=hidden -ffp-contract=off -DHA_HOPPER=1".split(), *WARNINGS]
CAPABILITIES = (80, 90)
INCLUDES = [f"-I{ROOT / folder}" for folder in ("plugins", "plugins/cuda", "tests/emulation")]


def build_emulated(compiler: str, folder: Path) -> dict[int, Path]:
    """Libraries in `folder`, by the compute capability of the emulated device.

    The first of the processes that ask for the same folder builds, the others wait for it. Raises CalledProcessError where they do not
    compile.
    """
    paths = {capability: folder / str(capability) / "libhyperattention_trt.so" for capability in CAPABILITIES}
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "built").is_file():
            _build(compiler, folder, paths)
            (folder / "built").touch()
    return paths


def _build(compiler: str, folder: Path, paths: dict[int, Path]) -> None:
    for path in paths.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    emulator = ROOT / "tests/emulation/emulator.cpp"
    common = {*_kernels(folder), ROOT / "plugins/config.cpp", *emulator.parent.glob("*.cpp")} - {emulator}

    def build(source: Path, capability: int) -> Path:
        target = folder / f"{source.stem}_{capability}.o"
        command = [compiler, *FLAGS, f"-DHA_EMULATE={capability}", *INCLUDES, "-x", "c++", "-c", str(source), "-o", str(target)]
        subprocess.run(command, check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        own = {capability: pool.submit(build, emulator, capability) for capability in CAPABILITIES}  # the one that says what device it is
        shared = list(pool.map(lambda source: build(source, CAPABILITIES[0]), sorted(common)))
    for capability, path in paths.items():
        objects = map(str, [*shared, own[capability].result()])
        subprocess.run([compiler, "-shared", "-o", str(path), *objects], check=True)


def _kernels(folder: Path) -> list[Path]:
    """The CUDA sources; instances of one template (attend_bf16_64.cu and so on) as one source for each dtype, read once."""
    sources, groups = [], defaultdict(list)
    for source in sorted((ROOT / "plugins/cuda").glob("*.cu")):
        if match := re.fullmatch(r"((?:sm90_)?attend_\w+)_\d+", source.stem):
            groups[match[1]].append(source)
        else:
            sources.append(source)
    for name, instances in groups.items():
        sources.append(folder / f"{name}.cu")
        sources[-1].write_text("".join(f'#include "{instance}"\n' for instance in instances))
    return sources
