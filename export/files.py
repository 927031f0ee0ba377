"""Files of an output folder: their names; written whole or not at all, given a second name, told by their digest."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

MODEL, DATA, TWIN, ENGINE = "model.onnx", "model.onnx.data", "model.trt.onnx", "model.engine"


def write_whole(path: Path, text: str) -> None:
    """Writes `path` in one step, so that no reader ever sees half of it. Raises OSError."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def link(source: Path, target: Path) -> None:
    """A second name for a file that is never written again, or a copy where the file system has none."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def sha256(path: Path) -> str:
    """The sha256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """sha256 of JSON values; equal values have equal digests in whatever order their names stand."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
