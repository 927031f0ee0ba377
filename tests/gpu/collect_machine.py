"""Writes what one verification run was made on and of: `collect_machine.py OUT/machine.json`.

Exit code 3 where there is no CUDA device, or a library is missing or not built from the sources beside it: what such a run showed
would say nothing about them.
"""

from __future__ import annotations

import json
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from hyperattention import __version__
from hyperattention.doctor import sources_id
from hyperattention.errors import EnvironmentFault
from hyperattention.export.bundle import package_versions
from hyperattention.export.engine_check import EngineHost
from hyperattention.library import build_info, ort_library_path, trt_library_path

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = "torch onnxruntime-gpu tensorrt-cu12-bindings tensorrt-cu13-bindings flash-attn-4 transformers onnx".split()


def describe() -> dict[str, Any]:
    """The record's head. Raises EnvironmentFault."""
    if not torch.cuda.is_available():
        raise EnvironmentFault("PyTorch sees no CUDA device; the verification needs one")
    sources, libraries = sources_id(ROOT), {}
    for path in (trt_library_path(), ort_library_path()):
        libraries[path.name] = info = build_info(path)
        if info["build_id"] != sources:
            raise EnvironmentFault(f"{path.name} is build {info['build_id']}, the sources beside it are {sources}; run `make native`")
    host = EngineHost.here(trt_library_path())
    return {
        "build_id": sources,
        "version": __version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": host.gpu,
        "compute_capability": host.compute_capability,
        "driver": host.driver,
        "cuda_of_torch": torch.version.cuda,
        "python": sys.version.split()[0],
        "packages": package_versions(PACKAGES),
        "libraries": libraries,
    }


def main() -> int:
    try:
        machine = describe()
    except EnvironmentFault as fault:
        print(fault, file=sys.stderr)
        return fault.exit_code
    Path(sys.argv[1]).write_text(json.dumps(machine, indent=1) + "\n")
    print(f"{machine['device']}, driver {machine['driver']}, build {machine['build_id']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
