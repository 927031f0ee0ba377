"""The command `hyperattention`: its commands by name. Turns errors into exit codes, nothing else."""

from __future__ import annotations

import sys
import traceback

import typer

from hyperattention.errors import HyperAttentionError
from hyperattention.validate.commands import doctor, inspect, report, validate

INTERNAL_ERROR = 70  # sysexits' EX_SOFTWARE; Python's own 1 after a traceback would read as a failed gate

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Measure, judge and describe what export-model wrote. Exit 70: an internal error, a bug.",
)
app.command("validate")(validate.command)
app.command("run", hidden=True, help="Same as validate.")(validate.command)
app.command("report")(report.command)
app.command("inspect")(inspect.command)
app.command("doctor")(doctor.command)


def main(arguments: list[str] | None = None) -> None:
    """Entry point; exits with the code of the error raised (hyperattention/errors.py). A bug shows its traceback and exits 70."""
    try:
        app(args=arguments)
    except HyperAttentionError as error:
        print(f"hyperattention: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception:
        traceback.print_exc()
        print(f"hyperattention: internal error, a bug (exit code {INTERNAL_ERROR}); please report the lines above", file=sys.stderr)
        sys.exit(INTERNAL_ERROR)
