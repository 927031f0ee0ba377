"""Writes docs/options.md: every option of every command, from the commands themselves. tests/test_docs.py holds the page current.

PYTHONPATH=. python docs/make_options.py
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from typer.models import ArgumentInfo, OptionInfo

PAGE = Path(__file__).with_name("options.md")
HEAD = """# Options

Made by `docs/make_options.py` from the commands: do not edit. `COMMAND --help` says the same, `COMMAND --install-completion` sets up
completion in your shell. Both commands take `--version`. No colour goes to a file or a pipe, nor anywhere when `NO_COLOR` is set.

Exit codes: 0 done, 1 an accuracy gate was not met, 2 usage, 3 environment, 4 export, 5 engine build, 70 an internal error (a bug, with its
traceback), 130 interrupted.
"""
_TYPES = {int: "integer", float: "number", Path: "path", str: "text"}
_DEFAULT = re.compile(r"\s*\((?:default: )?((?<=default: ).*|blocks: .*)\)\s*$")


@dataclass(frozen=True)
class Row:
    """One option or argument, as the page shows it."""

    panel: str
    option: str
    takes: str
    default: str
    meaning: str


def commands() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Every command that is not hidden, with its function."""
    from hyperattention.export import cli as export
    from hyperattention.validate import cli as validate

    for program, app in (("export-model", export.app), ("hyperattention", validate.app)):
        found = [c for c in app.registered_commands if not c.hidden]
        for command in found:
            assert command.callback is not None
            yield (f"{program} {command.name}" if command.name else program), command.callback


def rows(function: Callable[..., Any]) -> list[Row]:
    """The arguments and options of a command in the order of its function."""
    hints = get_type_hints(function, include_extras=True)
    defaults = {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}
    return [row(name, hints[name], default) for name, default in defaults.items() if hints[name] is not typer.Context]


def row(name: str, hint: Any, default: Any) -> Row:
    """What the page says of one parameter."""
    assert get_origin(hint) is Annotated, f"{name} has no typer.Option"
    kind, info = get_args(hint)[:2]
    assert isinstance(info, (OptionInfo, ArgumentInfo)), f"{name} has no typer.Option"
    needed = default is inspect.Parameter.empty
    several = get_origin(kind) is list or any(get_origin(part) is list for part in get_args(kind))
    kind = next((part for part in get_args(kind) if part is not NoneType), kind)
    kind = next(iter(get_args(kind)), kind)
    said = " ".join((info.help or "").split())
    match = _DEFAULT.search(said)
    if match:
        said = said[: match.start()]
    if needed:
        shown = "required"
    elif default in (None, ""):
        shown = match[1] if match else "none"
    elif isinstance(default, bool):
        shown = {True: "on", False: "off"}[default]
    else:
        shown = str(default)
    if isinstance(info, ArgumentInfo):
        return Row("Arguments", info.metavar or name.upper(), _TYPES[kind], shown, said)
    # Inside Annotated typer takes its first positional argument, called default, for a declaration too.
    declared = [d for d in (info.default, *(info.param_decls or ())) if isinstance(d, str)]
    long = f"--{name.replace('_', '-')}"
    if not declared:
        declared = [f"{long}/--no-{long[2:]}"] if kind is bool else [long]
    takes = "switch" if kind is bool else info.metavar or _TYPES[kind]
    return Row(info.rich_help_panel or "Options", ", ".join(declared), takes + (", repeatable" if several else ""), shown, said)


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for name, function in commands():
        text = " ".join((inspect.getdoc(function) or "").split("\n\n")[0].split())
        parts.append(f"## {name}\n{text}\n")
        found = rows(function)
        for panel in dict.fromkeys(r.panel for r in found):
            title = f"{panel}\n\n" if panel not in ("Arguments", "Options") else ""
            lines = [f"| {panel[:-1].lower() if not title else 'option'} | takes | default | |", "|---|---|---|---|"]
            for r in (r for r in found if r.panel == panel):
                cells = (f"`{r.option}`", r.takes, r.default, r.meaning)
                lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
            parts.append(title + "\n".join(lines) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    typer.echo(f"{PAGE.name} written")
