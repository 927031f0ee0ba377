"""The command `hyperattention`: its commands by name."""

from __future__ import annotations

import typer

from hyperattention.errors import UsageError
from hyperattention.export import entry
from hyperattention.validate.commands import bench, compare, doctor, inspect, policy, report, sweep, validate

COMMANDS = {
    "policy": policy,
    "validate": validate,
    "report": report,
    "compare": compare,
    "bench": bench,
    "sweep": sweep,
    "inspect": inspect,
    "doctor": doctor,
}

app = typer.Typer(
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=entry.epilog("hyperattention inspect out", "hyperattention doctor"),
)
for _name, _module in COMMANDS.items():
    app.command(_name, epilog=entry.epilog(_module.EXAMPLE))(_module.command)
app.command("run", hidden=True, help="Same as validate.")(validate.command)


@app.callback(invoke_without_command=True)
def hyperattention(context: typer.Context, version: entry.Version = False) -> None:
    """Measure, judge and describe what export-model wrote."""
    if context.invoked_subcommand is None:
        raise UsageError(f"no command given; give one of {', '.join(COMMANDS)}, or --help")


def main(arguments: list[str] | None = None) -> None:
    """Entry point; see `entry.run`."""
    entry.run(app, "hyperattention", arguments)
