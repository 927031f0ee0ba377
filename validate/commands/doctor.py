"""`hyperattention doctor`: what this machine has."""

from __future__ import annotations

import typer

from hyperattention.export.entry import AsJson, Quiet

EXAMPLE = "hyperattention doctor --json"


def command(as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Say what this machine has (driver, CUDA, TensorRT, ONNX Runtime, both libraries) and how to mend the rest.

    Exit 3: something that the processor's path needs is missing, or parts contradict each other.
    """
    from hyperattention import doctor
    from hyperattention.export.console import Reporter

    reporter, checks = Reporter(quiet, as_json), doctor.collect()
    if not (quiet or as_json):
        doctor.render(checks, reporter.out)
    code = doctor.exit_code(checks)
    reporter.answer({"checks": doctor.to_json(checks), "exit_code": code})
    raise typer.Exit(code)
