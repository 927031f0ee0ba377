"""Room on the disk of OUT: what an export will need, asked for before any work, and what to say when it runs out."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

from hyperattention.errors import EnvironmentFault
from hyperattention.export.console import readable

if TYPE_CHECKING:
    from hyperattention.export.plan import ExportPlan
    from hyperattention.export.source import Source

# EFBIG is the limit of one process (ulimit -f), which reads the same to the user.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REST = 32 * 2**20  # report, tokenizer, logs, the graph itself
_NOTHING = 2**20


def predict(source: "Source", plan: "ExportPlan", libraries: list[Path], engine: bool) -> int:
    """Bytes that .OUT.partial holds at most while it is written. A finished OUT that it replaces stays beside it until the end."""
    from hyperattention.export.onnx_graph import EXTERNAL_THRESHOLD
    from hyperattention.export.source import torch_dtype

    weights = source.num_parameters * torch_dtype(plan.dtype).itemsize
    # Small weights lie in both ONNX files, and while these are checked in a third; large ones in one file that both share.
    lasting, checked = (1, 1) if weights > EXTERNAL_THRESHOLD else (2, 3)
    return max(checked, lasting + engine) * weights + _REST + sum(path.stat().st_size for path in libraries)


def check(out: Path, need: int, there: int = 0) -> None:
    """Raises EnvironmentFault where the disk of `out` has less than `need` bytes free, of which `there` are written already."""
    free = _free(out)
    if free + there < need:
        raise EnvironmentFault(
            f"the disk of OUT has {readable(free)} free, the export needs about {readable(need)} ({need} bytes); "
            f"free some, or give an OUT on another disk"
        )


def is_full(error: BaseException, folder: Path) -> bool:
    """Whether `error` came from a full disk: by its number, or, as not every library says it, because nothing is left."""
    return isinstance(error, OSError) and error.errno in _FULL or _free(folder) < _NOTHING


def fault(error: BaseException, folder: Path, need: int) -> EnvironmentFault:
    """What to tell the user of a disk that ran full under `folder`."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
    return EnvironmentFault(
        f"the disk of OUT is full ({said}): {readable(_free(folder))} free, the export needs about {readable(need)} ({need} bytes) "
        f"in all; free some, or give an OUT on another disk"
    )


def _free(path: Path) -> int:
    """Bytes that this user may still write to the disk of `path`, or of its nearest parent that exists."""
    while not path.exists():
        path = path.parent
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize
