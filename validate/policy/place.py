"""Where `hyperattention policy` writes: FILE, and FILE.jsonl with the measurements. Nothing else is ever overwritten."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from hyperattention.errors import UsageError
from hyperattention.export.folder import refuse_output
from hyperattention.validate.policy.store import is_store


def measurements(out: Path) -> Path:
    """The file beside `out` that keeps what was measured."""
    return out.with_name(out.name + ".jsonl")


def check_out(out: Path, text: Path, model: str) -> None:
    """Before any work, and leaving nothing behind. Raises UsageError where `out` or its measurements cannot be written, lie in the
    directory `model` or in an output of export-model, or would replace the text or a file that this command did not write.
    """
    parent = out.absolute().parent
    if out.is_dir() or not parent.is_dir():
        raise UsageError(f"--out {out} is no place for a file; give a name in a folder that exists")
    if Path(model).is_dir() and Path(os.path.realpath(parent)).is_relative_to(os.path.realpath(model)):
        raise UsageError(f"--out {out} lies in the directory MODEL, which is read only; give a place outside it")
    refuse_output(parent, "--out")
    for file, ours in ((out, _is_policy), (measurements(out), is_store)):
        if file.exists() and text.exists() and file.samefile(text):
            raise UsageError(f"--out {out} writes {file.name}, which is the --text and would be lost; give another name")
        if file.exists() and not (file.is_file() and ours(file)):
            raise UsageError(
                f"--out {out} writes {file.name}, and there is one that `hyperattention policy` did not write; give another name"
            )
        if file.exists() and not os.access(file, os.W_OK):
            raise UsageError(f"--out {out}: {file.name} is there and may not be written; give another name, or permit it")
    try:
        with tempfile.NamedTemporaryFile(dir=parent, prefix=".hyperattention-"):
            pass
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written: {error.strerror}; give a name in another folder") from error


def _is_policy(file: Path) -> bool:
    """Whether a file is a policy of any version; one that was cut off is not, as it is written whole."""
    try:
        data: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(data, dict) and {"schema", "budget", "calibration", "layers"} <= data.keys()
