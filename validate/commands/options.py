"""Options that several commands of `hyperattention` share, and what they print of a judged report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from hyperattention.errors import AccuracyFailed, UsageError

Folder = Annotated[Path, typer.Argument(metavar="OUT", help="Folder that export-model wrote.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
DeltaNats = Annotated[Optional[float], typer.Option("--max-delta-nats", help="Loss that may be added, nats a token. [default: 0.01]")]
Kl = Annotated[Optional[float], typer.Option("--max-kl", help="KL(exact || ours) allowed, nats a token. [default: 0.005]")]
Top1 = Annotated[Optional[float], typer.Option("--min-top1", help="Share of equal first choices demanded. [default: 0.98]")]
OpRatio = Annotated[Optional[float], typer.Option("--max-op-ratio", help="Op's error over plain low precision's. [default: 2]")]
ModelRatio = Annotated[Optional[float], typer.Option("--max-model-ratio", help="Backend's error over one ulp of noise. [default: 2]")]


def numbers(option: str, text: str) -> tuple[int, ...]:
    """Numbers with commas between them. Raises UsageError."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise UsageError(f"{option} is {text!r}; it takes numbers with commas between them, such as 8192,32768") from None


def limits(given: dict[str, float | None], base: dict[str, float] | None = None):
    """The gates' limits: those given, over `base`, over the defaults."""
    from hyperattention.validate.gates import Limits

    return Limits(**{**(base or {}), **{name: value for name, value in given.items() if value is not None}})


def say(report: dict, written: list[Path], as_json: bool) -> None:
    """The verdict and the gates on stdout; AccuracyFailed where one was not met."""
    failed = [g for g in report["gates"] if not g["passed"]]
    if as_json:
        print(json.dumps({"verdict": report["verdict"], "gates": report["gates"], "files": [p.name for p in written]}, default=str))
    else:
        print(report["verdict"]["headline"])
        print(report["verdict"]["speed"])
        for g in report["gates"]:
            print(f"  {'pass' if g['passed'] else 'FAIL'}  {g['name']:<12} {g['value']:.4g} {g['sense']} {g['limit']:.4g}  ({g['where']})")
        print(f"Report: {written[-1]}")
    if failed:
        names = ", ".join(g["name"] for g in failed)
        raise AccuracyFailed(f"gates not met: {names}; the report says where. Approximate fewer layers (--layers) or raise num_blocks")
