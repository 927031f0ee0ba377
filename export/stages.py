"""Finished stages of an export and what they were made from, so that a later run can take them over.

`stages.json` in the output folder holds a record for each stage: a digest of everything that the stage reads, in named parts,
and the sha256 of every file that it wrote. A stage is taken over where all parts are equal and every file is as it was.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Callable, Mapping

from hyperattention.export.bundle import MANIFEST
from hyperattention.export.files import digest, link, sha256, write_whole

RECORDS = "stages.json"
_FORMAT = 1


@dataclass(frozen=True)
class Record:
    """One finished stage: the digests of its inputs by part, the sha256 of its files by name, and what it returned (JSON)."""

    inputs: dict[str, str]
    files: dict[str, str]
    result: Any

    @classmethod
    def from_json(cls, data: Any) -> "Record":
        """The inverse of `asdict`. Raises ValueError, KeyError or TypeError for anything else."""
        record = cls(dict(data["inputs"]), dict(data["files"]), data["result"])
        for name in record.files:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise ValueError(f"{name} lies outside the folder")
        return record


class Stages:
    """The stages of one run that writes into `folder`, which may hold stages already; `earlier` is a finished output, or None.

    `say` is told, a line a stage, what was taken over and why something is not.
    """

    def __init__(self, folder: Path, earlier: Path | None, say: Callable[[str], None]) -> None:
        self.folder, self.say = folder, say
        prune(folder)
        self.places = [(folder, read(folder)), *([(earlier, read(earlier))] if earlier is not None else [])]
        self.records: dict[str, Record] = {}
        self.reused: list[str] = []

    def run(self, name: str, inputs: Mapping[str, Any], work: Callable[[], Any]) -> Any:
        """What `work` returns (JSON values), or returned when it was run on the same `inputs` (JSON values by part).

        `work` writes into the folder; files that it adds are recorded as its own.
        """
        parts = {part: digest(value) for part, value in inputs.items()}
        obstacles = []
        for folder, records in self.places:
            if name in records:
                obstacles.append(_obstacle(folder, records[name], parts))
                if obstacles[-1] is None:
                    return self._take(name, folder, records[name])
        if obstacles:
            self.say(f"{name}: made anew, {obstacles[0]} since")
        self.skip(name)
        before = set(_files(self.folder))
        result = work()
        self._record(name, Record(parts, digests(self.folder, sorted(set(_files(self.folder)) - before)), result))
        return result

    def skip(self, name: str) -> None:
        """Removes what an earlier run left of a stage that is not wanted, or no longer fits."""
        folder, records = self.places[0]
        if name in records and name not in self.records:
            for file in records.pop(name).files:
                (folder / file).unlink(missing_ok=True)

    def digests_of(self, *names: str) -> dict[str, str]:
        """The sha256 of every file of these stages, as far as they have run, by file name."""
        return {file: value for name in names if name in self.records for file, value in self.records[name].files.items()}

    def _take(self, name: str, folder: Path, record: Record) -> Any:
        if folder != self.folder:
            self.skip(name)
            for file in record.files:
                link(folder / file, self.folder / file)
        self.reused.append(name)
        self.say(f"{name}: taken over from an earlier run")
        self._record(name, record)
        return record.result

    def _record(self, name: str, record: Record) -> None:
        self.records[name] = record
        _write(self.folder, {**self.places[0][1], **self.records})


def begin(folder: Path) -> None:
    """Marks an empty folder as the work of an export; leaves the records of one that holds some."""
    if not (folder / RECORDS).is_file():
        _write(folder, {})


def is_unfinished(folder: Path) -> bool:
    """Whether `folder` was begun as the work of an export and not finished."""
    return (folder / RECORDS).is_file() and not (folder / MANIFEST).is_file()


def prune(folder: Path) -> list[str]:
    """Removes what no finished stage recorded, such as the half of a file; the names of the finished stages."""
    records = read(folder)
    kept = {RECORDS, *(file for record in records.values() for file in record.files)}
    for name in _files(folder):
        if name not in kept:
            (folder / name).unlink()
    return list(records)


def read(folder: Path) -> dict[str, Record]:
    """The records of `folder` by stage; none where there are none, or none that this version wrote."""
    try:
        data = json.loads((folder / RECORDS).read_text(encoding="utf-8"))
        return {name: Record.from_json(record) for name, record in data["stages"].items()} if data["format"] == _FORMAT else {}
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return {}


def digests(folder: Path, names: list[str]) -> dict[str, str]:
    """The sha256 of files by name."""
    return {name: sha256(folder / name) for name in names}


def _obstacle(folder: Path, record: Record, parts: dict[str, str]) -> str | None:
    """Why a record does not fit the inputs of now, or the files no longer fit the record; None when all do."""
    other = sorted(part for part in parts.keys() | record.inputs.keys() if parts.get(part) != record.inputs.get(part))
    if other:
        return f"{' and '.join(other)} changed"
    for name, value in record.files.items():
        if not (folder / name).is_file():
            return f"{name} went missing"
        if sha256(folder / name) != value:
            return f"{name} changed"
    return None


def _files(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_symlink() or path.is_file()]


def _write(folder: Path, records: dict[str, Record]) -> None:
    data = {"format": _FORMAT, "stages": {name: asdict(record) for name, record in records.items()}}
    write_whole(folder / RECORDS, json.dumps(data, indent=1) + "\n")
