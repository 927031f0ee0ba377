"""`hyperattention compare OUT1 OUT2`: two exports side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from hyperattention.errors import UsageError
from hyperattention.export.entry import AsJson, Quiet

EXAMPLE = "hyperattention compare out/odd out/all --html compare.html"
Html = Annotated[Optional[Path], typer.Option("--html", metavar="FILE", help="Write the comparison as a page too; it needs no network.")]


def command(
    first: Annotated[Path, typer.Argument(metavar="OUT1", help="Folder that export-model wrote.")],
    second: Annotated[Path, typer.Argument(metavar="OUT2", help="Another one.")],
    html: Html = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Two outputs side by side: plans, gates, error and time by length, layers, heads, keys a query, look-ahead, planted keys, sizes,
    and what makes that unfair.

    A folder without a report is compared by its plan and sizes. Gates that fail are told, and do not fail the comparison.
    """
    from rich.markup import escape
    from rich.table import Table

    from hyperattention.export.console import Reporter
    from hyperattention.export.folder import refuse_output
    from hyperattention.validate.compare_folders import compare
    from hyperattention.validate.compare_text import sentences, tables

    if html is not None:
        refuse_output(html, "--html")
    found, reporter = compare(first, second), Reporter(quiet, as_json)
    for sentence in sentences(found):
        reporter.warn(sentence)
    for table in [] if quiet or as_json else tables(found):
        reporter.out.print(f"\n[bold]{escape(table.title)}[/]")
        shown = Table(box=None, header_style="dim", pad_edge=False)
        for head in table.heads:
            shown.add_column(escape(head.removeprefix(">")), justify="right" if head.startswith(">") else "left", overflow="fold")
        for row in table.rows:
            shown.add_row(*map(escape, row))
        reporter.out.print(shown if table.rows else table.otherwise)
    if html is not None:
        _write(html, found)
        reporter.say(f"\nPage: {escape(str(html))}")
    reporter.answer(found)


def _write(file: Path, found: dict) -> None:
    from hyperattention.validate.compare_page import page

    try:
        file.write_text(page(found), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--html {file} cannot be written: {error.strerror}; give a file in a folder that exists") from error
