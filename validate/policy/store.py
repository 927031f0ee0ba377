"""Measurements that were made, one JSON object a line, so that an interrupted search goes on where it stopped.

A line is found again by the digest of everything that its measurement reads: the model's files, the calibration text, the code and
the machine's kind (`base`), and what was measured. Nothing else is trusted: a line that was cut off when its writer was killed, or was
changed since, is left out, and so is measured anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hyperattention.export.files import digest

_BEGIN = b'{"key": "'  # of every line


class Store:
    """Measurements by what they measure. `path` None keeps them in memory; without `resume` what the file holds is begun anew."""

    def __init__(self, path: Path | None, base: Mapping[str, Any], resume: bool = False) -> None:
        self.path, self.base = path, digest(base)
        self.found: dict[str, Any] = {}
        self.reused = self.made = 0
        if path is not None and resume:
            self.found = dict(_lines(path))
            if path.is_file() and not path.read_bytes().endswith(b"\n"):
                _append(path, "")  # ends a line that was cut off
        elif path is not None:
            path.unlink(missing_ok=True)

    def get(self, kind: str, what: Any, work: Callable[[], Any]) -> Any:
        """What `work` returns (JSON values), or returned earlier for the same `kind` and `what` (JSON values)."""
        key = digest([self.base, kind, what])
        if key in self.found:
            self.reused += 1
            return self.found[key]
        self.made += 1
        self.found[key] = work()
        if self.path is not None:
            line = {"key": key, "kind": kind, "what": what, "found": self.found[key], "digest": digest([key, self.found[key]])}
            _append(self.path, json.dumps(line))
        return self.found[key]

    def has(self, kind: str, what: Any) -> bool:
        """Whether `get` would measure nothing."""
        return digest([self.base, kind, what]) in self.found


def _append(path: Path, line: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def is_store(path: Path) -> bool:
    """Whether a file was begun by a Store, or is empty."""
    with path.open("rb") as file:
        start = file.read(len(_BEGIN))
    return _BEGIN.startswith(start)


def _lines(path: Path) -> list[tuple[str, Any]]:
    """Key and finding of every line that is as it was written."""
    found = []
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    for line in text.splitlines():
        try:
            data = json.loads(line)
            if data["digest"] == digest([data["key"], data["found"]]):
                found.append((data["key"], data["found"]))
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return found
