"""The output folder: file names, hashes, versions, and manifest.json, which is written last.

A folder without manifest.json is not whole. `Bundle.open` also takes the draft that the validation step works on. Nothing
in here holds a path of the machine that made it.
"""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from hyperattention import __version__
from hyperattention.errors import UsageError
from hyperattention.export.files import ENGINE, MODEL, TWIN, sha256, write_whole
from hyperattention.export.plan import ExportPlan
from hyperattention.library import ORT_LIBRARY, TRT_LIBRARY

MANIFEST, DRAFT = "manifest.json", "manifest.partial.json"
SCHEMA = 2
REPORT = "report/report.json"
_PACKAGES = (
    "torch", "transformers", "onnx", "onnxscript", "onnxruntime-gpu", "onnxruntime", "polygraphy",
    "tensorrt", "tensorrt-cu12-bindings", "numpy",
)  # fmt: skip
_SIDE_FILES = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "chat_template*", "LICENSE*",
    "preprocessor_config.json", "processor_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class Bundle:
    """An output folder and what its manifest (or draft) says."""

    folder: Path
    manifest: dict[str, Any]
    plan: ExportPlan

    @classmethod
    def open(cls, folder: Path) -> "Bundle":
        """Reads the manifest. Raises UsageError for a folder that export-model did not finish or did not write."""
        if not folder.is_dir():
            raise UsageError(f"there is no folder {folder}; give the OUT of export-model")
        file = next((folder / name for name in (MANIFEST, DRAFT) if (folder / name).is_file()), None)
        if file is None:
            raise UsageError(f"{folder} holds no {MANIFEST}, so it is no finished output; run export-model again")
        manifest = _read(file)
        return cls(folder, manifest, ExportPlan.from_json(manifest.get("plan")))

    @property
    def model_onnx(self) -> Path:
        """The ONNX file with the function body."""
        return self.folder / MODEL

    @property
    def trt_onnx(self) -> Path:
        """Its twin for TensorRT."""
        return self.folder / TWIN

    @property
    def engine(self) -> Path | None:
        """The TensorRT engine, where one was built."""
        return self._present(ENGINE)

    @property
    def ort_library(self) -> Path | None:
        """ONNX Runtime's custom-op library, where it was built."""
        return self._present(ORT_LIBRARY)

    @property
    def trt_library(self) -> Path | None:
        """TensorRT's plugin library, where it was built."""
        return self._present(TRT_LIBRARY)

    @property
    def libraries(self) -> list[Path]:
        """The native libraries that are there."""
        return [path for path in (self.ort_library, self.trt_library) if path is not None]

    def _present(self, name: str) -> Path | None:
        path = self.folder / name
        return path if path.is_file() else None

    def changed_files(self) -> list[str]:
        """Names of files that are missing or no longer have the manifest's sha256."""
        files = {self.folder / name: entry["sha256"] for name, entry in self.manifest.get("files", {}).items()}
        return [path.relative_to(self.folder).as_posix() for path, digest in files.items() if not path.is_file() or sha256(path) != digest]


def _read(file: Path) -> dict[str, Any]:
    """A manifest or draft. Raises UsageError where it is broken or of another schema."""
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        schema = manifest["schema"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise UsageError(f"{file} is broken ({type(error).__name__}: {error}); run export-model again") from error
    if schema != SCHEMA:
        raise UsageError(f"{file} is of schema {schema}, this version reads {SCHEMA}; run export-model again")
    if not _files_are_whole(manifest.get("files"), file.name == DRAFT):
        raise UsageError(f"{file} is broken (files does not give the sha256 of each file by its name); run export-model again")
    return manifest


def _files_are_whole(files: object, draft: bool) -> bool:
    """Whether `files` of a manifest maps names inside the folder to entries with a sha256; a draft has none yet."""
    if files is None:
        return draft
    return isinstance(files, dict) and all(
        isinstance(entry, dict) and isinstance(entry.get("sha256"), str) and not Path(name).is_absolute() and ".." not in Path(name).parts
        for name, entry in files.items()
    )


def copy_side_files(model: Path | None, folder: Path, libraries: list[Path]) -> None:
    """Copies the configuration and the tokenizer's files of the directory `model`, and the native libraries, beside the ONNX files."""
    for file in [file for pattern in _SIDE_FILES for file in sorted(model.glob(pattern))] if model is not None else ():
        if file.suffix == ".json":
            _copy_json(file, folder / file.name)
        elif file.is_file():
            shutil.copyfile(file, folder / file.name)
    for library in libraries:
        shutil.copyfile(library, folder / library.name)


def _copy_json(source: Path, target: Path) -> None:
    """transformers writes the directory that a model came from into its files."""
    data = json.loads(source.read_text(encoding="utf-8"))
    if isinstance(data, dict) and ({"_name_or_path", "name_or_path"} & set(data)):
        data = {name: value for name, value in data.items() if name not in ("_name_or_path", "name_or_path")}
        target.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    else:
        shutil.copyfile(source, target)


def write_draft(folder: Path, plan: ExportPlan, model: dict[str, Any], engine: dict[str, Any] | None, libraries: dict[str, Any]) -> None:
    """Writes the draft that lets validation open the folder. `model` and `engine` describe them; `libraries` is their build info."""
    draft = {
        "schema": SCHEMA,
        "model": model,
        "plan": plan.to_json(),
        "seeds": {layer.name: layer.config.seed for layer in plan.approximate if layer.config is not None},
        "versions": versions(),
        "libraries": libraries,
        "engine": engine,
    }
    _write_json(folder / DRAFT, draft)


def finish(folder: Path) -> dict[str, Any]:
    """Hashes every file, takes lengths, tolerances and verdict from the report, writes manifest.json and removes the draft."""
    manifest = json.loads((folder / DRAFT).read_text(encoding="utf-8"))
    manifest["validation"] = _validation(folder)
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != DRAFT)
    manifest["files"] = _entries(folder, files)
    _write_json(folder / MANIFEST, manifest)
    (folder / DRAFT).unlink()
    return manifest


def update_report(folder: Path) -> None:
    """Brings manifest.json's verdict and hashes of the report up to date after it was written anew; leaves a draft alone."""
    if not (folder / MANIFEST).is_file():
        return
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    manifest["validation"] = _validation(folder)
    report = (folder / REPORT).parent
    others = {name: entry for name, entry in manifest["files"].items() if Path(name).parts[0] != report.name}
    manifest["files"] = {**others, **_entries(folder, sorted(p for p in report.rglob("*") if p.is_file()))}
    _write_json(folder / MANIFEST, manifest)


def check_report(folder: Path) -> None:
    """Raises UsageError where report.json is not the file whose sha256 stands in manifest.json; without a manifest nothing is asked."""
    if not (folder / MANIFEST).is_file():
        return
    told = _read(folder / MANIFEST)["files"].get(REPORT, {}).get("sha256")
    found = sha256(folder / REPORT)
    if told != found:
        expected = f"{MANIFEST} has {told[:12]}" if told else f"{MANIFEST} knows of no report"
        raise UsageError(
            f"{folder / REPORT} is not the one that was measured (sha256 {found[:12]}, {expected}): it was changed or put there since. "
            f"Only a report as it was written is rendered or judged again; run `hyperattention validate` again"
        )


def _validation(folder: Path) -> dict[str, Any] | None:
    """What the manifest says of the report; None without one."""
    if not (folder / REPORT).is_file():
        return None
    report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    return {
        "report": REPORT,
        "lengths": report.get("inputs", {}).get("lengths"),
        "tolerances": report.get("limits"),
        "verdict": report.get("verdict"),
        "dtype": report.get("plan", {}).get("dtype"),  # fp32 where a half-precision target was judged through its twin
    }


def _entries(folder: Path, files: list[Path]) -> dict[str, dict[str, Any]]:
    """What the manifest says of `files`, by name; one of several names (OUT/triton) is read once."""
    found: dict[tuple[int, int], str] = {}
    entries = {}
    for path in files:
        stat = path.stat()
        place = (stat.st_dev, stat.st_ino)
        if place not in found:
            found[place] = sha256(path)
        entries[path.relative_to(folder).as_posix()] = {"bytes": stat.st_size, "sha256": found[place]}
    return entries


def versions() -> dict[str, str]:
    """Versions of this package, Python and the packages that shape the files and the numbers."""
    return {"hyperattention": __version__, "python": platform.python_version(), **package_versions(_PACKAGES)}


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """Versions of those of the packages that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _write_json(path: Path, data: dict[str, Any]) -> None:
    write_whole(path, json.dumps(data, indent=2) + "\n")
