"""Where the numbers come from: machine, versions, libraries. No path and no host name."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from hyperattention.errors import EnvironmentFault
from hyperattention.export.bundle import versions
from hyperattention.library import build_info


def busy_note() -> str | None:
    """A warning about the times where other work kept the processor busy as the measurement began."""
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if load <= cores + 1:
        return None
    return f"The machine was busy as this began (load {load:.1f} on {cores} cores): take the times with care, the errors do not change."


def describe(device: torch.device, libraries: list[Path]) -> dict:
    """Processor, memory, GPU, package versions and what each native library says of its build."""
    machine = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(_memory() / 2**30, 1),
        "gpu": None,
        "cuda": None,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine["gpu"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, sm_{properties.major}{properties.minor}"
        machine["cuda"] = torch.version.cuda
    return {"machine": machine, "versions": versions(), "libraries": [_library(path) for path in libraries]}


def _library(path: Path) -> dict:
    try:
        info = build_info(path)
    except EnvironmentFault as fault:
        return {"file": path.name, "problem": str(fault)}
    return {"file": path.name, **{key: info[key] for key in ("version", "abi", "build_id", "architectures") if key in info}}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
