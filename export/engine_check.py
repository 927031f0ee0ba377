"""Whether an engine can run here: what it is tied to, as the manifest of its folder records it, beside what is found.

An engine is code for one TensorRT release and one kind of GPU, and holds its plugin layers by name only.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hyperattention.doctor import find_driver
from hyperattention.errors import EnvironmentFault, UsageError
from hyperattention.export.bundle import Bundle
from hyperattention.library import TRT_LIBRARY, build_info

OK, WARNING, FATAL = "ok", "warning", "fatal"
_AGAIN = "run export-model again here"


@dataclass(frozen=True)
class EngineHost:
    """TensorRT's version, the GPU's compute capability ("9.0") and name, the driver, and the plugin's build id; None: not known."""

    tensorrt: str | None = None
    compute_capability: str | None = None
    gpu: str | None = None
    driver: str | None = None
    plugin_build: str | None = None

    @classmethod
    def here(cls, library: Path | None) -> "EngineHost":
        """This machine with the plugin library `library`. Raises EnvironmentFault where that is there and cannot be loaded."""
        import torch

        try:
            import tensorrt as trt  # pyright: ignore[reportMissingImports]

            version = str(trt.__version__)
        except (ImportError, OSError):
            version = None
        capability = name = None
        if torch.cuda.is_available():
            capability, name = "{}.{}".format(*torch.cuda.get_device_capability()), torch.cuda.get_device_name()
        build = str(build_info(library)["build_id"]) if library is not None and library.is_file() else None
        return cls(version, capability, name, find_driver()[0] or None, build)

    @classmethod
    def recorded(cls, manifest: dict[str, Any]) -> "EngineHost":
        """What the engine of this manifest was built with. Raises UsageError where it records no engine."""
        engine = manifest.get("engine")
        if not isinstance(engine, dict):
            raise UsageError("the manifest records no engine; run export-model again on a machine with a GPU and TensorRT")
        # Versions before this check recorded TensorRT and the libraries alone.
        before = {"tensorrt": engine.get("tensorrt"), "plugin_build": manifest.get("libraries", {}).get(TRT_LIBRARY, {}).get("build_id")}
        known = {**before, **engine.get("host", {})}
        return cls(**{name: str(known[name]) for name in cls.__dataclass_fields__ if known.get(name) is not None})


@dataclass(frozen=True)
class Finding:
    """One thing that the engine is tied to; `mend` says what to do unless `state` is "ok"."""

    part: str
    state: str
    built_with: str
    found: str
    mend: str = ""

    def to_json(self) -> dict[str, str]:
        """The same as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.part}: built with {self.built_with}, here {self.found}" + (f": {self.mend}" if self.mend else "")


def compare(built: EngineHost, here: EngineHost, plugin: bool = True) -> list[Finding]:
    """Every finding, the fatal ones among them; `plugin`: the engine holds layers of the plugin."""
    release, again = f"{_AGAIN}, or install TensorRT {built.tensorrt}", f"{_AGAIN}: an engine is code for one kind of GPU"
    rows = [
        _finding("TensorRT", FATAL, built.tensorrt, here.tensorrt, release, _same_release),
        _finding("compute capability", FATAL, built.compute_capability, here.compute_capability, again),
        _finding("GPU", WARNING, built.gpu, here.gpu, f"it runs, tuned for the other; {_AGAIN} for the best times"),
        _finding("driver", WARNING, built.driver, here.driver, f"install {built.driver} or newer, or {_AGAIN}", _not_older),
    ]
    if plugin:
        mend = f"put the {TRT_LIBRARY} of build {built.plugin_build} beside the engine, or {_AGAIN}"
        rows.append(_finding("plugin build", FATAL, built.plugin_build, here.plugin_build, mend))
    return rows


def findings(bundle: Bundle, library: Path | None = None, here: EngineHost | None = None) -> list[Finding]:
    """The folder's engine against this machine, with the plugin library of the folder unless another one is given."""
    built = EngineHost.recorded(bundle.manifest)
    layers = bundle.manifest["engine"].get("plugin_layers", True)  # not recorded: taken to be there
    return compare(built, here or EngineHost.here(library or bundle.trt_library), bool(layers))


def check_engine(bundle: Bundle, library: Path | None = None, here: EngineHost | None = None) -> list[str]:
    """The warnings, one line each. Raises EnvironmentFault with a table where the engine cannot run, UsageError where there is none."""
    rows = findings(bundle, library, here)
    if any(row.state == FATAL for row in rows):
        raise EnvironmentFault("model.engine cannot run here:\n" + "\n".join(table(rows)))
    return [f"Engine: {row}." for row in rows if row.state == WARNING]


def table(rows: list[Finding]) -> list[str]:
    """The findings in columns, a line each, below a line of headings."""
    cells = [("", "built with", "found here", "what to do"), *((row.part, row.built_with, row.found, row.mend) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(3)]
    return ["  " + "  ".join([*(text.ljust(width) for text, width in zip(row, widths)), row[3]]).rstrip() for row in cells]


_ABSENT = {
    "TensorRT": "install hyperattention[tensorrt]",
    "compute capability": "use a machine with a CUDA device; `hyperattention doctor` says what this one lacks",
    "GPU": "",
    "driver": "",
}


def _finding(
    part: str, worst: str, built: str | None, here: str | None, mend: str, fits: Callable[[str, str], bool] = operator.eq
) -> Finding:
    if here is None:
        return Finding(part, worst, built or "not recorded", "none", _ABSENT.get(part, mend))
    if built is None:
        return Finding(part, WARNING, "not recorded", here, f"if it does not run, {_AGAIN}")
    return Finding(part, OK, built, here) if fits(built, here) else Finding(part, worst, built, here, mend)


def _numbers(version: str) -> list[int]:
    """The leading numbers of a version: 10.6.0.post1 -> [10, 6, 0]."""
    return [int(part) for part in itertools.takewhile(str.isdigit, version.split("."))]


def _same_release(built: str, here: str) -> bool:
    """Equal as far as both go: wheels of one release differ behind its third number."""
    return built == here or bool(_numbers(here)) and all(a == b for a, b in zip(_numbers(built), _numbers(here)))


def _not_older(built: str, here: str) -> bool:
    return _numbers(here) >= _numbers(built)
