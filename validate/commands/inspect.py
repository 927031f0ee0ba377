"""`hyperattention inspect OUT`: what the folder holds."""

from __future__ import annotations

from hyperattention.errors import EnvironmentFault
from hyperattention.validate.commands.options import AsJson, Folder, Quiet

EXAMPLE = "hyperattention inspect out"


def command(folder: Folder, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Say what OUT holds: plan, files, whether they are the ones the manifest lists (exit 3 if not), and the report's verdict."""
    from hyperattention.export.console import Reporter
    from hyperattention.validate.inspect_folder import describe, lines

    reporter, found = Reporter(quiet, as_json), describe(folder)
    if not (quiet or as_json):
        for line in lines(found):
            reporter.out.print(line, markup=False)
    if found["changed"]:
        raise EnvironmentFault(f"changed or missing since the export: {', '.join(found['changed'])}; run export-model again", found)
    reporter.answer(found)
