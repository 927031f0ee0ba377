"""`hyperattention inspect OUT`: what the folder holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hyperattention.errors import EnvironmentFault
from hyperattention.export.entry import AsJson, Quiet

EXAMPLE = "hyperattention inspect out --json"


def command(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="Folder that export-model wrote, or one ONNX file.")],
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Say what OUT holds: policy, graph, engine, files, whether they are the manifest's (exit 3 if not), and the report's verdict.

    Of an ONNX file: inputs, outputs, opsets, parameters, our nodes with their attributes, and whether the function body is there.
    """
    from hyperattention.export.bundle import REPORT
    from hyperattention.export.console import Reporter
    from hyperattention.validate.inspect_folder import describe, lines
    from hyperattention.validate.onnx_file import describe_onnx, graph_lines

    one_file = folder.is_file()
    found = {"kind": "onnx", "graph": describe_onnx(folder), "changed": []} if one_file else describe(folder)
    reporter = Reporter(quiet, as_json)
    if not (quiet or as_json):
        for line in graph_lines(found["graph"]) if one_file else lines(found):
            reporter.out.print(line, markup=False)
    if found["changed"]:
        report_alone = all(Path(name).parts[0] == Path(REPORT).parts[0] for name in found["changed"])
        remedy = "hyperattention validate" if report_alone else "export-model"
        raise EnvironmentFault(f"changed or missing since the export: {', '.join(found['changed'])}; run `{remedy}` again", found)
    reporter.answer(found)
