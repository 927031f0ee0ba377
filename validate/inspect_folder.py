"""What an output folder holds: policy, graph, engine, files and whether they still are the manifest's, and the report's verdict."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from hyperattention.config import shared
from hyperattention.errors import HyperAttentionError, UsageError
from hyperattention.export.bundle import MANIFEST, REPORT, Bundle
from hyperattention.export.engine_check import FATAL, EngineHost, Finding, findings, table
from hyperattention.validate.onnx_file import describe_onnx, graph_lines
from hyperattention.validate.report import read

OK, CHANGED, MISSING, UNLISTED = "ok", "changed", "missing", "not in the manifest"


def describe(folder: Path) -> dict[str, Any]:
    """Everything `hyperattention inspect OUT` says, as JSON values. Raises UsageError for a folder export-model did not write."""
    bundle = Bundle.open(folder)
    changed = bundle.changed_files()
    return {
        "kind": "folder",
        "finished": (folder / MANIFEST).is_file(),
        "model": bundle.manifest.get("model") or {},
        "policy": _policy(bundle),
        "graph": _graph(bundle.model_onnx),
        "twin": _graph(bundle.trt_onnx),
        "engine": _engine(bundle) if bundle.engine is not None else None,
        "files": _files(bundle, changed),
        "changed": changed,
        "versions": bundle.manifest.get("versions", {}),
        "libraries": bundle.manifest.get("libraries", {}),
        "verdict": _verdict(folder / REPORT),
    }


def _policy(bundle: Bundle) -> dict[str, Any]:
    plan = bundle.plan
    rows = [
        {
            "index": layer.index,
            "name": layer.name,
            "mode": layer.mode,
            "reason": layer.reason,
            "selector": layer.config.selector if layer.config is not None and layer.mode == "approximate" else None,
            "seed": layer.config.seed if layer.config is not None and layer.mode == "approximate" else None,
            "attributes": layer.config.attributes() if layer.config is not None else None,
        }
        for layer in plan.layers
    ]
    whole = plan.to_json()
    return {**{name: value for name, value in whole.items() if name != "layers"}, "layers": rows}


def _graph(path: Path) -> dict[str, Any]:
    """The graph, or {"file", "problem"} where it cannot be read: the rest of the folder is still worth a look."""
    try:
        return describe_onnx(path)
    except UsageError as error:
        return {"file": path.name, "problem": str(error)}


def _engine(bundle: Bundle) -> dict[str, Any]:
    """What the manifest records of the engine, whether it can run here, and where it can, what its inspector says."""
    try:
        recorded = EngineHost.recorded(bundle.manifest)
        rows = findings(bundle)
    except HyperAttentionError as error:
        return {"problem": str(error)}
    runs = not any(row.state == FATAL for row in rows)
    return {
        "built_with": {name: value for name, value in vars(recorded).items() if value is not None},
        "recorded": {name: value for name, value in bundle.manifest["engine"].items() if name != "host"},
        "runs_here": runs,
        "findings": [row.to_json() for row in rows],
        "inspector": _inspector(bundle) if runs else {"problem": "not asked: the engine cannot run here"},
    }


def _inspector(bundle: Bundle) -> dict[str, Any]:
    from hyperattention.export.engine import layer_names, load_engine

    try:
        with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # the findings say it
            engine = load_engine(bundle.folder)
        return {"layers": engine.num_layers, "plugin_layers": layer_names(engine)}
    except HyperAttentionError as error:
        return {"problem": str(error)}


def _files(bundle: Bundle, changed: list[str]) -> dict[str, dict[str, Any]]:
    """Every file of the folder and of the manifest: bytes, sha256 as the manifest has it, and its state."""
    listed = bundle.manifest.get("files", {})
    found = {p.relative_to(bundle.folder).as_posix(): p.stat().st_size for p in bundle.folder.rglob("*") if p.is_file()}
    rows = {}
    for name in sorted({*found, *listed} - {MANIFEST}):
        state = UNLISTED if name not in listed else OK if name not in changed else CHANGED if name in found else MISSING
        rows[name] = {"bytes": found.get(name), "sha256": listed.get(name, {}).get("sha256"), "state": state}
    return rows


def _verdict(report: Path) -> dict[str, Any] | None:
    if not report.is_file():
        return None
    try:
        return read(report)["verdict"]
    except UsageError as error:
        return {"headline": str(error)}


def lines(found: dict[str, Any]) -> list[str]:
    """What `describe` found, for people."""
    model, policy = found["model"], found["policy"]
    low, opt, high = policy["seq"]
    rows = policy["batch"]
    attributes = _attributes(policy["layers"])
    text = [
        f"{model.get('name', 'a model')}, {model.get('architecture', 'of an architecture not recorded')}",
        "finished" if found["finished"] else f"NOT finished: {MANIFEST} is missing; run export-model again",
        "",
        f"Policy: {policy['task']}, {policy['dtype']}, preset {policy['preset']}, {low:,} to {high:,} keys (tuned for {opt:,}), "
        f"batch {rows[0]} to {rows[2]}, seed {policy['seed']}",
    ]
    for n in policy["layers"]:
        how = f", {n['selector']}, seed {n['seed']}" if n["selector"] else ""
        text.append(f"  layer {n['index']:>3}  {n['mode']:<12} {n['name']}{how}  ({n['reason']})")
    text += [f"  attributes: {attributes}"] if attributes else []
    text += ["", *_graph_text(found["graph"]), *_twin_lines(found["graph"], found["twin"])]
    text += ["", *_engine_lines(found["engine"]), "", "Files:"]
    for name, row in found["files"].items():
        size = f"{row['bytes']:>14,}" if row["bytes"] is not None else " " * 14
        text.append(f"  {size}  {(row['sha256'] or '')[:12]:<12}  {name}" + ("" if row["state"] == OK else f"  {row['state'].upper()}"))
    text += ["", found["verdict"]["headline"] if found["verdict"] else "No report; run `hyperattention validate`."]
    return text


def _attributes(layers: list[dict[str, Any]]) -> str:
    """The attributes that all layers that approximate have alike."""
    found = shared([n["attributes"] for n in layers if n["mode"] == "approximate"])
    return ", ".join(f"{name} {value}" for name, value in found.items() if name not in ("seed", "selector", "scale"))


def _graph_text(graph: dict[str, Any]) -> list[str]:
    return [f"{graph['file']}: {graph['problem']}"] if "problem" in graph else graph_lines(graph)


def _twin_lines(graph: dict[str, Any], twin: dict[str, Any]) -> list[str]:
    """One line where the twin is the same graph with TensorRT's plugin named, as it should be; all of it where it is not."""
    if "problem" in graph or "problem" in twin:
        return _graph_text(twin)
    plain = [
        {**node, "attributes": {name: value for name, value in node["attributes"].items() if not name.startswith("plugin_")}}
        for node in twin["nodes"]
    ]
    same = all(graph[part] == twin[part] for part in ("inputs", "outputs", "opset", "parameters", "operators")) and plain == graph["nodes"]
    if not same or twin["function_body"]:
        return [f"{twin['file']} is NOT the same graph:", *graph_lines(twin)]
    return [f"{twin['file']}: {twin['bytes']:,} bytes, the same graph for TensorRT, its nodes name the plugin, without the function body"]


def _engine_lines(engine: dict[str, Any] | None) -> list[str]:
    if engine is None:
        return ["No engine in this folder."]
    if "problem" in engine:
        return [f"model.engine: {engine['problem']}"]
    recorded, asked = engine["recorded"], engine["inspector"]
    plugin = recorded.get("plugin_layers") or []
    said = asked.get("problem") or f"{asked['layers']} layers, of the plugin {len(asked['plugin_layers'])}"
    return [
        f"model.engine {'can' if engine['runs_here'] else 'cannot'} run here: "
        f"{recorded.get('layers', 'unknown')} layers, {len(plugin)} of them of the plugin",
        *("  " + line for line in table([Finding(**row) for row in engine["findings"]])),
        *(f"  plugin layer {name}" for name in plugin),
        f"  inspector: {said}",
    ]
