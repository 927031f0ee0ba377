"""What both command lines share: options every command has, how --help ends, and outcomes as exit codes."""

from __future__ import annotations

import errno
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from hyperattention import __version__, requirements
from hyperattention.errors import EnvironmentFault, HyperAttentionError, UsageError
from hyperattention.export import interrupt

INTERNAL_ERROR = 70  # EX_SOFTWARE of sysexits.h; Python's own 1 after a traceback would read as a failed gate
_READER_GONE = 141  # what a shell reports for a command ended by SIGPIPE
# The machine's condition rather than a mistake of ours: space, quota, rights, open files, broken or read-only disk.
_OF_THE_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EMFILE, errno.EIO, errno.ENOMEM}
EXIT_CODES = (
    "Exit codes: 0 done, 1 an accuracy gate was not met, 2 usage, 3 environment, 4 export, 5 engine build, "
    "70 internal error (a bug, with its traceback), 130 interrupted."
)


def _show_version(context: typer.Context, wanted: bool) -> None:
    if wanted:
        print(f"{context.find_root().info_name} {__version__}")
        raise typer.Exit()


Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Errors and warnings only.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on standard output; all else on standard error.")]
Version = Annotated[bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)]


def epilog(*examples: str) -> str:
    """The end of a command's --help: how it is called, and what its exit codes mean."""
    return "\n\n".join([*(f"Example: {example}" for example in examples), EXIT_CODES])


def numbers(option: str, text: str) -> tuple[int, ...]:
    """Whole numbers with commas between them; none for an empty text. Raises UsageError."""
    if text and not re.fullmatch(r" *[0-9]{1,9} *(, *[0-9]{1,9} *)*", text):
        raise UsageError(f"{option} is {text!r}; it takes numbers with commas between them, such as 8192,32768")
    return tuple(int(part) for part in text.split(",")) if text else ()


def check_file(option: str, path: Path | None, what: str) -> None:
    """Raises UsageError where `path`, which an option named (None: not given), is no file; `what` says what to give."""
    if path is not None and not path.is_file():
        raise UsageError(f"{option}: there is no file {path}; give {what}")


def one_of(*values: str) -> Callable[[str], list[str]]:
    """For shell completion: those of `values` that begin with what was typed."""
    return lambda incomplete: [value for value in values if value.startswith(incomplete)]


def run(app: typer.Typer, name: str, arguments: Sequence[str] | None) -> NoReturn:
    """Runs `app` as the command `name` and ends the process: with 0, or with the code of the error (hyperattention/errors.py).

    The message goes to standard error, and with --json into the one object on standard output as well.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    as_json, found = "--json" in arguments, {}
    try:
        with interrupt.handled(as_json):
            # Not standalone: typer returns the code of its Exit, and raises its usage errors instead of printing them.
            code = app(args=arguments, prog_name=name, standalone_mode=False) or 0
            sys.stdout.flush()
        message = ""
    except HyperAttentionError as error:
        code, message, found = error.exit_code, str(error), error.found
    except BrokenPipeError:
        code, message = _READER_GONE, ""
    except SystemExit as status:  # typer's own ways out: completion, and a reader that went away
        code, message = _READER_GONE if isinstance(status.__context__, BrokenPipeError) else int(status.code or 0), ""
    except Exception as error:
        code, message = _judge(error, arguments)
    if code == _READER_GONE:
        sys.stdout = None  # the interpreter would try to flush it on its way out
    if message:
        from hyperattention.export.console import Reporter

        reporter = Reporter(json=as_json)
        reporter.fail(message)
        reporter.answer({**found, "error": message, "exit_code": code})
    sys.exit(code)


def _judge(error: Exception, arguments: Sequence[str]) -> tuple[int, str]:
    """Exit code and message of what is not an error of ours; a bug has its traceback printed first."""
    format_message = getattr(error, "format_message", None)
    if format_message is not None:  # typer's usage errors; its versions do not share a public class
        path = getattr(getattr(error, "ctx", None), "command_path", None)
        hint = f"; `{path} --help` says what it takes" if path else ""
        return UsageError.exit_code, _with_value(" ".join(format_message().split()).rstrip("."), arguments) + hint
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return UsageError.exit_code, f"{error.filename} is too long for the file system; give a shorter name"
    if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE:
        where = f" ({error.filename})" if error.filename else ""
        return EnvironmentFault.exit_code, f"the system refused: {error.strerror}{where}; make room or permit it, then run it again"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error):
        asked = " ".join(str(error).split())[:200] or "the system gave no size"
        return EnvironmentFault.exit_code, f"out of memory: {asked}; give shorter lengths or a smaller batch"
    if isinstance(error, ImportError) and (lacking := requirements.of_import(error)):
        return EnvironmentFault.exit_code, lacking
    traceback.print_exc()
    return INTERNAL_ERROR, f"internal error, a bug: {type(error).__name__}: {error}; please report it with the traceback above"


def _with_value(message: str, arguments: Sequence[str]) -> str:
    """typer names the option of a wrong value, and what it takes, but not the value."""
    option = re.match("Invalid value for '(--[a-z-]+)'", message)
    if option is None or option[1] not in arguments[:-1]:
        return message
    given = arguments[len(arguments) - list(reversed(arguments)).index(option[1])]  # of several the last one counts
    return f"{option[0]} (given: {given!r}){message[option.end() :]}"
