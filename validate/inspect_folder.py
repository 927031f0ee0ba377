"""What an output folder holds: plan, files and whether they still are the manifest's, and the verdict of its report."""

from __future__ import annotations

from pathlib import Path

from hyperattention.export.bundle import MANIFEST, REPORT, Bundle
from hyperattention.export.engine_check import FATAL, Finding, findings, table
from hyperattention.validate.configs import configs
from hyperattention.validate.report import read


def describe(folder: Path) -> dict:
    """Everything `hyperattention inspect` says, as JSON values. Raises UsageError for a folder export-model did not write."""
    bundle = Bundle.open(folder)
    report = folder / REPORT
    attributes = [config.attributes() for config in configs(bundle.plan.approximate)]
    return {
        "finished": (folder / MANIFEST).is_file(),
        "task": bundle.plan.task,
        "dtype": bundle.plan.dtype,
        "sequence": list(bundle.plan.seq),
        "batch": list(bundle.plan.batch),
        "input_ids": bundle.plan.input_ids,
        "layers": [{"index": n.index, "name": n.name, "mode": n.mode, "reason": n.reason} for n in bundle.plan.layers],
        "attributes": attributes[0] if attributes else {},
        "files": {p.relative_to(folder).as_posix(): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()},
        "changed": bundle.changed_files(),
        "versions": bundle.manifest.get("versions", {}),
        "engine": [finding.to_json() for finding in findings(bundle)] if bundle.engine is not None else None,
        "verdict": read(report)["verdict"] if report.is_file() else None,
    }


def lines(found: dict) -> list[str]:
    """The same for people."""
    low, opt, high = found["sequence"]
    text = [
        f"{found['task']}, {found['dtype']}, {low} to {high} tokens (tuned for {opt}), batch {found['batch'][0]} to {found['batch'][2]}",
        "finished" if found["finished"] else "NOT finished: manifest.json is missing; run export-model again",
    ]
    text += [f"  layer {n['index']:>3}  {n['mode']:<12} {n['name']}  ({n['reason']})" for n in found["layers"]]
    if found["attributes"]:
        text.append("  " + ", ".join(f"{name} {value}" for name, value in found["attributes"].items()))
    if found["engine"] is not None:
        rows = [Finding(**row) for row in found["engine"]]
        text.append("  model.engine " + ("cannot run here:" if any(row.state == FATAL for row in rows) else "can run here:"))
        text += ["  " + line for line in table(rows)]
    text += [f"  {size:>14,}  {name}" for name, size in found["files"].items()]
    text += [f"  CHANGED or missing since the export: {name}" for name in found["changed"]]
    text.append(found["verdict"]["headline"] if found["verdict"] else "No report; run `hyperattention validate`.")
    return text
