"""A sweep's record, sweep.json (docs/sweep.schema.json), written anew after every point, so that whatever ends a run loses no point."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from hyperattention.errors import EnvironmentFault, UsageError
from hyperattention.export import fingerprint
from hyperattention.export.console import jsonable
from hyperattention.export.files import write_whole
from hyperattention.export.folder import refuse_output
from hyperattention.library import build_info
from hyperattention.validate import environment
from hyperattention.validate.sweep_plan import Point
from hyperattention.validate.sweep_subject import Options, Subject

SCHEMA = 1
RECORD, TABLE, FIGURE = "sweep.json", "sweep.md", "sweep.png"
_NUMBERS = ("all_positions", "prefill_exact_decode")


class Record:
    """The record of one sweep in `folder`. Points of the same settings that it holds already are not asked for again."""

    def __init__(self, folder: Path, data: dict[str, Any]) -> None:
        self.folder, self.data = folder, data
        self._begun, self._before = time.monotonic(), float(data["seconds"])
        self._measured = {_point(row).key: {name: row[name] for name in _NUMBERS} for row in data["points"]}
        self._rows = {(point.key, point.order): row for row in data["points"] for point in [_point(row)]}

    def layers(self, length: int, methods: Sequence[str]) -> list[dict]:
        """The rows of the layers alone at `length`; empty where one of `methods` was not measured there."""
        rows = [row for row in self.data["layers"] if row["length"] == length]
        return rows if all(method in row["methods"] for row in rows for method in methods) else []

    def add_layers(self, rows: list[dict]) -> None:
        """Takes the place of the rows of the same length."""
        lengths = {row["length"] for row in rows}
        self.data["layers"] = sorted([r for r in self.data["layers"] if r["length"] not in lengths] + rows, key=lambda r: r["length"])
        self.write()

    def add_windows(self, length: int, ranking: int, judged: Sequence[int]) -> None:
        """Where the windows of one length begin in the text: the one that ranks the layers, and those that are judged."""
        others = [row for row in self.data["windows"] if row["length"] != length]
        self.data["windows"] = sorted([*others, {"length": length, "ranking": ranking, "judged": list(judged)}], key=lambda r: r["length"])

    def known(self, point: Point) -> bool:
        """Whether the same model was measured, in whichever order its layers were replaced."""
        return point.key in self._measured

    def add_numbers(self, point: Point, numbers: dict) -> None:
        """What was measured of a model."""
        self._measured[point.key] = numbers

    def add(self, point: Point, cost: dict) -> None:
        """The row of a point whose numbers are known; takes the place of an older one of the same layers and order."""
        row = {"length": point.length, "method": point.method, "order": point.order, "replaced": len(point.layers),
               "layers": list(point.layers), **cost, **self._measured[point.key]}  # fmt: skip
        self._rows[point.key, point.order] = row
        methods, orders = list(self.data["settings"]["methods"]), list(self.data["settings"]["orders"])
        ranked = sorted(
            self._rows.values(), key=lambda r: (r["length"], methods.index(r["method"]), orders.index(r["order"]), r["replaced"])
        )
        self.data["points"] = ranked
        self.write()

    def write(self) -> Path:
        """sweep.json as it stands. Raises EnvironmentFault where it cannot be written."""
        self.data["seconds"] = round(self._before + time.monotonic() - self._begun, 1)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self.folder / RECORD, json.dumps(jsonable(self.data), indent=1) + "\n")
        except OSError as error:
            raise EnvironmentFault(f"{self.folder} cannot be written ({error.strerror}); give another folder with --output") from error
        return self.folder / RECORD

    def finish(self) -> list[Path]:
        """Writes the record, and where it has a point the table and the figure. Raises EnvironmentFault where that cannot be done."""
        from hyperattention.validate import sweep_page, sweep_plot

        written = [self.write()]
        try:
            for name in (TABLE, FIGURE):
                (self.folder / name).unlink(missing_ok=True)
            if self.data["points"]:
                write_whole(self.folder / TABLE, sweep_page.markdown(self.data))
                written += [self.folder / TABLE, sweep_plot.draw(self.data, self.folder / FIGURE)]
        except OSError as error:
            raise EnvironmentFault(f"{self.folder} cannot be written ({error.strerror}); give another folder with --output") from error
        return written


def _point(row: dict) -> Point:
    return Point(row["length"], row["method"], row["order"], tuple(row["layers"]))


def check_output(folder: Path) -> None:
    """Before any work. Raises UsageError for a folder that is no place for a record."""
    refuse_output(folder, "--output")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output {folder} is no folder; it takes one for {RECORD}, {TABLE} and {FIGURE}")


def open_record(subject: Subject, options: Options, folder: Path, resume: bool) -> Record:
    """A new record, or with `resume` the one in `folder`, whose points of the same settings stay.

    Raises UsageError where that one is broken, or of another model, text or setting, naming what differs.
    """
    fresh = _fresh(subject, options)
    if not resume:
        return Record(folder, fresh)
    path = folder / RECORD
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        changed = _changed(old, fresh)
        kept = {name: old[name] for name in ("windows", "layers", "points", "seconds", "created")}
        settings = {name: _joined(old["settings"][name], fresh["settings"][name]) for name in ("lengths", "methods", "orders")}
        record = None if changed else Record(folder, {**fresh, **kept, "settings": {**fresh["settings"], **settings}})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} cannot be gone on from ({type(error).__name__}: {error}); leave --resume out to start anew") from error
    if record is None:
        raise UsageError(f"--resume: {path} was measured with another {', '.join(changed)}; leave --resume out, or give another --output")
    return record


def _joined(old: Any, new: Any) -> Any:
    """What either names, the old first."""
    if isinstance(old, dict):
        return {**old, **new}
    return sorted({*old, *new}) if all(isinstance(value, int) for value in old) else list(dict.fromkeys([*old, *new]))


def _changed(old: dict, new: dict) -> list[str]:
    """Names of the settings under which a point would have come out otherwise."""
    found = [name for name in ("schema", "kind") if old[name] != new[name]]
    names = [name for name in new["settings"] if name not in ("lengths", "methods", "orders", "replaced")]
    found += [name for name in names if old["settings"][name] != new["settings"][name]]
    both = set(old["settings"]["methods"]) & set(new["settings"]["methods"])
    return found + [f"{name} (--set)" for name in sorted(both) if old["settings"]["methods"][name] != new["settings"]["methods"][name]]


def _fresh(subject: Subject, options: Options) -> dict[str, Any]:
    source, busy = subject.source, environment.busy_note()
    limit = source.max_positions or max(options.lengths)
    notes = (
        [f"Past {limit:,} tokens the model was not trained: there only the time means anything."] if max(options.lengths) > limit else []
    )
    return {
        "schema": SCHEMA,
        "kind": "sweep",
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": 0.0,
        "interrupted": False,
        "model": {
            "name": source.name,
            "architecture": source.architecture,
            "parameters": source.num_parameters,
            "layers": len(source.layers),
            "replaceable": len(subject.configs),
            "max_positions": source.max_positions,
        },
        "settings": {
            "lengths": sorted(options.lengths),
            "methods": {name: _attributes(config.attributes()) for name, config in options.configs.items()},
            "orders": list(options.orders),
            "replaced": list(options.replaced),
            "windows": options.windows,
            "tail": options.tail,
            "seed": options.seed,
            "dtype": subject.plan.dtype,
            "device": subject.device.type,
            "text": subject.corpus.describe(),
            "weights": fingerprint.model(source),
            "library": build_info(subject.kernels.path)["build_id"],
        },
        "environment": {**environment.describe(subject.device, [subject.kernels.path]), "busy": busy},
        "notes": [*notes, *([busy] if busy else [])],
        "windows": [],
        "layers": [],
        "points": [],
    }


def _attributes(found: dict[str, Any]) -> dict[str, Any]:
    """Without what each layer sets for itself."""
    return {name: value for name, value in found.items() if name not in ("causal", "scale", "seed")}
