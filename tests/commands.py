"""The two commands, run inside the test's process, and folders for them to work on."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny

from hyperattention.export.cli import main as export_main
from hyperattention.validate.cli import main as tool_main

MAIN = {"export-model": export_main, "hyperattention": tool_main}
SMALL = tuple(part for name, value in tiny.SMALL.items() for part in (f"--{name.replace('_', '-')}", str(value)))


@dataclass(frozen=True)
class Result:
    """What a command left in its streams, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        """Standard error with every run of spaces as one."""
        return " ".join(self.err.split())


def run(capfd: pytest.CaptureFixture[str], command: str, *arguments: object) -> Result:
    """Runs "export-model" or "hyperattention" in this process."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as status:
        MAIN[command]([str(argument) for argument in arguments])
    streams = capfd.readouterr()
    return Result(int(status.value.code or 0), str(streams.out), str(streams.err))


Runner = Callable[..., Result]


def finished(model: object, out: Path, *options: str) -> Path:
    """`out` as export-model leaves it, without a validation."""
    with pytest.raises(SystemExit) as status:
        export_main([str(model), str(out), "--no-validate", "--quiet", *options, *SMALL])
    assert status.value.code == 0
    return out


def copy(folder: Path, target: Path) -> Path:
    """A copy to damage; the native libraries are second names of the same files, so they must be replaced, not written to."""
    shutil.copytree(folder, target, copy_function=lambda a, b: os.link(a, b) if str(a).endswith(".so") else shutil.copyfile(a, b))
    return target


def contents(folder: Path) -> dict[str, str]:
    """Every entry below `folder` by name: the hash of a small file, the size of a large one, where a link points."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = f"link to {os.readlink(path)}"
        elif path.is_file():
            size = path.stat().st_size
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if size < 2**20 else str(size)
        else:
            found[name] = "folder"
    return found
