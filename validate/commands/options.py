"""Options that several commands of `hyperattention` share, and what they print of a judged report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from hyperattention.errors import AccuracyFailed, UsageError
from hyperattention.export import gate_options

Folder = Annotated[Path, typer.Argument(metavar="OUT", help="Folder that export-model wrote.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
Gates = Annotated[Optional[list[str]], typer.Option("--gate", metavar="NAME=VALUE", help=gate_options.help_text())]


def numbers(option: str, text: str) -> tuple[int, ...]:
    """Numbers with commas between them. Raises UsageError."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise UsageError(f"{option} is {text!r}; it takes numbers with commas between them, such as 8192,32768") from None


def say(report: dict, written: list[Path], as_json: bool) -> None:
    """The verdict and the gates on stdout; AccuracyFailed where one was not met."""
    if as_json:
        print(json.dumps({"verdict": report["verdict"], "gates": report["gates"], "files": [p.name for p in written]}, default=str))
    else:
        print(report["verdict"]["headline"])
        print(report["verdict"]["speed"])
        for g in report["gates"]:
            mark = "pass" if g["passed"] else "note" if g["advisory"] else "FAIL"
            print(f"  {mark}  {g['name']:<12} {g['value']:.4g} {g['sense']} {g['limit']:.4g}  ({g['where']})")
        print(f"Report: {written[-1]}")
    if failed := report["verdict"]["failed"]:
        names = ", ".join(failed)
        raise AccuracyFailed(f"gates not met: {names}; the report says where. Approximate fewer layers (--layers) or raise num_blocks")
