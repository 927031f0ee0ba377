"""What each stage of an export reads, as JSON values in named parts: equal parts, equal result (export/stages.py)."""

from __future__ import annotations

import functools
import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Mapping

import hyperattention
from hyperattention.export import bundle
from hyperattention.export.engine_check import EngineHost
from hyperattention.export.files import sha256
from hyperattention.export.plan import ExportPlan
from hyperattention.export.stages import digests

if TYPE_CHECKING:
    from hyperattention.export.source import Source

# Weights in forms that transformers does not load where there are safetensors, and what only people read.
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".tflite")
_NOT_READ = (".md", ".png", ".jpg", ".pdf")


def model(source: "Source") -> dict[str, str]:
    """The model's files by name: of a directory those that may be loaded, of FILE.py:FUNCTION the file, and what the function returned,
    as nothing else tells of the files that it reads and imports."""
    path = Path(source.model)
    if path.is_dir():
        return digests(path, _model_files(path))
    file, _, function = source.model.rpartition(":")
    return {**digests(Path(file).parent, [Path(file).name]), "function": function, **source.content()}


def onnx(plan: ExportPlan, weights: dict[str, str]) -> dict[str, Any]:
    """Of the stage ONNX. A range matters only where it holds one size: the graph has that size, or a free dimension."""
    data = plan.to_json()
    ranges = {"batch": data.pop("batch"), "seq": data.pop("seq"), **data.pop("dims", {})}
    for part in ("input_ids", "preset", "keep_exact", "seed", "policy", "policy_notes"):  # said by the layers, or of no matter to the graph
        data.pop(part)
    layers = [{name: value for name, value in layer.items() if name != "reason"} for layer in data.pop("layers")]
    fixed = {name: low if low == high else None for name, (low, _, high) in ranges.items()}
    return {
        "the model": weights,
        "the plan": {**data, "layers": layers, "fixed sizes": fixed},
        "a package's version": _versions("torch", "transformers", "onnx", "onnxscript"),
        "hyperattention itself": _code("export"),
    }


def side_files(weights: dict[str, str], libraries: list[Path]) -> dict[str, Any]:
    """Of the stage that copies the model's side files and the libraries."""
    return {
        "the model": weights,
        "a library": {path.name: sha256(path) for path in libraries},
        "hyperattention itself": _code("export"),
    }


def engine(graph: Mapping[str, str], plan: ExportPlan, library: Path) -> dict[str, Any]:
    """Of the stage engine, for the ONNX files `graph` by name."""
    data = plan.to_json()
    return {
        "the ONNX file": dict(graph),
        "the shapes": {name: data.get(name) for name in ("inputs", "dims", "seq", "batch")},
        "the plugin": sha256(library),
        "the machine": asdict(EngineHost.here(library)),
        "a package's version": _versions("polygraphy"),
        "hyperattention itself": _code("export"),
    }


def validation(files: Mapping[str, str], plan: ExportPlan, weights: dict[str, str], options: tuple[str, ...]) -> dict[str, Any]:
    """Of the stage validation, for the `files` of OUT by name. A file that an option names counts by its content."""
    values = [sha256(Path(option)) if Path(option).is_file() else option for option in options]
    return {
        "the files of OUT": dict(files),
        "the plan": plan.to_json(),
        "the model": weights,
        "the options of the validation": values,
        "the machine": {**asdict(EngineHost.here(None)), "processors": os.cpu_count()},
        "a package's version": bundle.versions(),
        "hyperattention itself": _code("export", "validate"),
    }


def policy(source: "Source", what: Mapping[str, Any], library: Path, device: str) -> dict[str, Any]:
    """Of the measurements of an automatic policy: `what` says which text and length, `library` holds the kernels for `device`."""
    return {
        "the model": model(source),
        "what is measured": dict(what),
        "the library": sha256(library),
        "the machine": {**asdict(EngineHost.here(None)), "device": device},
        "a package's version": _versions("torch", "transformers"),
        "hyperattention itself": _code("export", "validate"),
    }


def _model_files(folder: Path) -> list[str]:
    names = [path.name for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
    skipped = (*_NOT_READ, *(_OTHER_WEIGHTS if any(name.endswith(".safetensors") for name in names) else ()))
    return [name for name in names if not name.endswith(skipped)]


def _versions(*names: str) -> dict[str, str]:
    return {"python": platform.python_version(), **bundle.package_versions(names)}


@functools.cache
def _code(*folders: str) -> dict[str, str]:
    """This package's own sources: a version is not raised at every change."""
    root = Path(hyperattention.__path__[0])
    inner = (file for folder in folders for file in (root / folder).rglob("*"))
    files = [*root.glob("*.py"), *(file for file in inner if file.is_file() and file.suffix != ".pyc")]  # templates shape the report too
    return digests(root, sorted(file.relative_to(root).as_posix() for file in files))
