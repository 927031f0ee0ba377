"""`hyperattention doctor`: what this machine has."""

from __future__ import annotations

import typer

from hyperattention.validate.commands.options import AsJson


def command(as_json: AsJson = False) -> None:
    """Say what this machine has (driver, CUDA, TensorRT, ONNX Runtime, both libraries) and how to mend the rest."""
    from rich.console import Console

    from hyperattention import doctor

    checks = doctor.collect()
    if as_json:
        print(doctor.to_json(checks))
    else:
        doctor.render(checks, Console())
    raise typer.Exit(doctor.exit_code(checks))
