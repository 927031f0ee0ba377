"""One export at a time into one OUT: a lock on a file beside OUT, which dies with the process that holds it."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from hyperattention.errors import UsageError


class Lock:
    """An exclusive lock (flock) on the file `path`, which names the process that holds it and exists only while one does.

    The kernel lets go of it when the process ends, in whatever way; a file that a killed process left is taken over.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._file is not None

    def acquire(self, what: str) -> None:
        """Takes the lock. Raises UsageError, naming the holder and `what` it works on, where another process has it; OSError."""
        while self._file is None:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_current(file):
                    os.ftruncate(file, 0)
                    os.write(file, f"{os.getpid()}\n".encode())
                    self._file, file = file, -1
            except BlockingIOError:
                holder = os.read(file, 32).decode(errors="replace").strip() or "unknown"
                raise UsageError(
                    f"another export-model (process {holder}) is writing {what}; wait until it is done, or give another OUT"
                ) from None
            finally:
                if file >= 0:
                    os.close(file)

    def release(self) -> None:
        """Removes the file and lets go. Does nothing where the lock is not held."""
        if self._file is not None:
            # Still under the lock, so that no one else's file is removed.
            self.path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = None

    def _is_current(self, file: int) -> bool:
        """Whether `path` is still this file: its last holder may have removed it after we opened it."""
        try:
            return os.path.samestat(os.fstat(file), os.stat(self.path))
        except FileNotFoundError:
            return False
