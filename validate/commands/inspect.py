"""`hyperattention inspect OUT`: what the folder holds."""

from __future__ import annotations

import json

from hyperattention.errors import EnvironmentFault
from hyperattention.validate.commands.options import AsJson, Folder


def command(folder: Folder, as_json: AsJson = False) -> None:
    """Say what OUT holds: plan, files, whether they are the ones the manifest lists (exit 3 if not), and the report's verdict."""
    from hyperattention.validate.inspect_folder import describe, lines

    found = describe(folder)
    print(json.dumps(found, indent=1) if as_json else "\n".join(lines(found)))
    if found["changed"]:
        raise EnvironmentFault(f"changed or missing since the export: {', '.join(found['changed'])}; run export-model again")
