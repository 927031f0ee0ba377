"""Two output folders side by side: what differs in the plans, verdicts, errors, times and sizes, and what makes that unfair.

Every row holds a pair, first and second folder, with None where one has nothing to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyperattention.config import shared
from hyperattention.errors import UsageError
from hyperattention.export.bundle import MANIFEST, REPORT, Bundle, check_report
from hyperattention.export.gate_options import LANGUAGE
from hyperattention.validate import compare_parts as parts
from hyperattention.validate.configs import configs
from hyperattention.validate.report import INCOMPLETE, read
from hyperattention.validate.verdict import fastest_exact

ERROR, TIME = "error", "time"
_PLAN = ("task", "preset", "dtype", "input_ids", "seed", "keep_exact", "seq", "batch", "inputs", "outputs", "dims")
BY_LAYER = "by layer"  # an attribute that the layers of one plan do not have alike
_OURS_ALONE = ("seed", "scale")  # attributes that say nothing about a plan, or are said with its seed
_TOKEN_METRICS = (
    ("delta nats", "prefill_exact_decode", "delta_nats"),
    ("KL", "prefill_exact_decode", "kl"),
    ("top-1", "prefill_exact_decode", "top1"),
    ("delta nats, all positions", "all_positions", "delta_nats"),
    ("KL, all positions", "all_positions", "kl"),
    ("top-1, all positions", "all_positions", "top1"),
)


@dataclass(frozen=True)
class Side:
    """One folder and its report; `problem` says why there is none."""

    name: str
    bundle: Bundle
    report: dict | None
    problem: str | None

    @classmethod
    def open(cls, folder: Path, name: str) -> "Side":
        """Raises UsageError for a folder that export-model did not finish."""
        bundle = Bundle.open(folder)
        path = folder / REPORT
        if not path.is_file():
            return cls(name, bundle, None, "it has no report; run `hyperattention validate`")
        try:
            report = read(path)
            check_report(folder)
            return cls(name, bundle, report, None)
        except UsageError as error:
            return cls(name, bundle, None, str(error))

    @property
    def model(self) -> dict:
        return self.bundle.manifest.get("model") or {}


def compare(first: Path, second: Path) -> dict[str, Any]:
    """Everything `hyperattention compare` says, as JSON values.

    Raises UsageError where a folder is not one of export-model's, or a report's inner parts are broken.
    """
    names = [first.resolve().name, second.resolve().name]
    if names[0] == names[1]:
        names = [f"{name} ({which})" for name, which in zip(names, ("first", "second"), strict=True)]
    a, b = (Side.open(folder, name) for folder, name in zip((first, second), names, strict=True))
    reports = (a.report, b.report)
    try:
        length = parts.common_length(reports)
        return {
            "names": names,
            "models": [a.model, b.model],
            "problems": [a.problem, b.problem],
            "unfair": unfair(a, b),
            "verdicts": [report and report["verdict"] for report in reports],
            "kinds": [report and report["kind"] for report in reports],
            "plan": plan_differences(a, b),
            "gates": _joined(reports, _gates),
            "errors": _joined(reports, _errors),
            "time": _joined(reports, _times),
            "layers": _layers(a, b, length),
            "heads_length": length,
            "heads": _joined(reports, lambda report: parts.heads(report, length)),
            "keys": _joined(reports, parts.keys),
            "policy": parts.policies([side.bundle.plan.policy for side in (a, b)]),
            "look_ahead": _joined(reports, parts.look_ahead),
            "strict": _joined(reports, parts.strict),
            "needle": _joined(reports, _recall),
            "needle_grid": _joined(reports, parts.needle_grid),
            "hard_inputs": _joined(reports, _hard),
            "sizes": _sizes(a, b),
        }
    except INCOMPLETE as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"a report is incomplete ({type(error).__name__}: {error}); run `hyperattention validate` again") from error


def unfair(a: Side, b: Side) -> list[dict]:
    """Differences that make numbers incomparable: {"what", "pair", "affects"}, the last of "error" and "time", or of neither where
    only some lengths are left out."""
    found: list[dict] = []

    def check(what: str, pair: list, *affects: str) -> None:
        if pair[0] != pair[1]:
            found.append({"what": what, "pair": pair, "affects": list(affects)})

    for key, what in (("name", "model"), ("architecture", "architecture"), ("parameters", "parameters")):
        check(what, [side.model.get(key) for side in (a, b)], ERROR, TIME)
    check("task", [a.bundle.plan.task, b.bundle.plan.task], ERROR, TIME)
    if a.report is None or b.report is None:
        return found
    r, s = a.report, b.report
    inputs = [r["inputs"], s["inputs"]]
    check("kind of report", [r["kind"], s["kind"]], ERROR)
    check("number type as validated", [r["plan"]["dtype"], s["plan"]["dtype"]], ERROR, TIME)
    check("input", [_input(i) for i in inputs], ERROR)
    check("lengths", [i["lengths"] for i in inputs])
    common = [n for n in inputs[0]["lengths"] if n in inputs[1]["lengths"]]
    counts = [dict(zip(i["lengths"], i["windows"], strict=True)) for i in inputs]
    check("windows at the common lengths", [[c[n] for n in common] for c in counts], ERROR)
    check("positions that attend exactly", [i.get("tail") for i in inputs], ERROR)
    check("backend", [r["backend"], s["backend"]], TIME)
    for key, what in (("processor", "processor"), ("cores", "cores"), ("gpu", "GPU")):
        check(what, [x["environment"]["machine"].get(key) for x in (r, s)], TIME)
    check("load on the machine", ["busy" if x["environment"].get("busy") else "quiet" for x in (r, s)], TIME)
    for package in ("torch", "onnxruntime-gpu", "tensorrt"):
        check(f"version of {package}", [x["environment"]["versions"].get(package) for x in (r, s)], TIME)
    return found


def _input(inputs: dict) -> str:
    """An input by what is in it: the same text under another name is the same."""
    return inputs["sha256"] or f"{inputs['kind']}, seed {inputs['seed']}"


def plan_differences(a: Side, b: Side) -> list[dict]:
    """{"what", "pair"} for every decision that differs; attributes are those of the layers that approximate in both plans."""
    plans = [side.bundle.plan for side in (a, b)]
    told = [plan.to_json() for plan in plans]
    rows = [{"what": name, "pair": [t.get(name) for t in told]} for name in _PLAN]
    rows.append({"what": "approximate layers", "pair": [[n.index for n in plan.approximate] for plan in plans]})
    told = [[config.attributes() for config in configs(plan.approximate)] for plan in plans]
    attributes = [{**dict.fromkeys(rows[0], BY_LAYER), **shared(rows)} if rows else {} for rows in told]
    names = [name for name in {**attributes[0], **attributes[1]} if name not in _OURS_ALONE]
    rows += [{"what": name, "pair": [found.get(name) for found in attributes]} for name in names]
    return [row for row in rows if row["pair"][0] != row["pair"][1]]


def _joined(reports: tuple[dict | None, dict | None], rows: Callable[[dict], Iterable[tuple[dict, dict]]]) -> list[dict]:
    """Rows of both reports by key, in the order of the first and then of the second: {**key, "pair": [...]}."""
    found: dict[tuple, dict] = {}
    for i, report in enumerate(reports):
        for key, value in rows(report) if report else ():
            found.setdefault(tuple(key.items()), {**key, "pair": [None, None]})["pair"][i] = value
    by_length = list(found.values())
    return sorted(by_length, key=lambda row: row.get("length", 0))


def _gates(report: dict) -> Iterable[tuple[dict, dict]]:
    for gate in report["gates"]:
        yield {"name": gate["name"]}, {key: gate[key] for key in ("value", "limit", "sense", "passed", "advisory", "where")}


def _errors(report: dict) -> Iterable[tuple[dict, dict]]:
    for row in report["approximation"]:
        if report["kind"] == LANGUAGE:
            for metric, regime, key in _TOKEN_METRICS:
                if row[regime]:
                    yield {"length": row["length"], "metric": metric}, row[regime][key]
            continue
        for output in row["outputs"]:
            for key in ("relative_l2", "cosine", "norm_ratio"):
                yield {"length": row["length"], "metric": f"{output['name']}: {key.replace('_', ' ')}"}, output[key]


def _recall(report: dict) -> Iterable[tuple[dict, dict]]:
    for row in report["needle"]["rows"] if report["needle"] else ():
        for regime in ("exact", "all_positions", "prefill_exact_decode"):
            yield {"kind": row["kind"], "regime": regime.replace("_", " "), "length": row["length"]}, row[regime]


def _times(report: dict) -> Iterable[tuple[dict, dict]]:
    for row in report["time"]:
        exact = fastest_exact(row)
        times = {"ours_s": row.get("ours_s"), "exact_s": exact, "time_only": row["time_only"]}
        yield {"length": row["length"]}, times | {"speedup": exact / row["ours_s"] if exact and row.get("ours_s") else None}


def _hard(report: dict) -> Iterable[tuple[dict, dict]]:
    for row in report["hard_inputs"]:
        key = {"distribution": row["distribution"], "length": row["length"]}
        yield key, {"passed": row["passed"], "value": row["value"], "relative_l2": row["ours"]["relative_l2"]["mean"]}


def _layers(a: Side, b: Side, length: int | None) -> list[dict]:
    """Every attention layer: {"index", "pair"} with name, mode and, at `length`, its own error."""
    rows: dict[int, dict] = {}
    for i, side in enumerate((a, b)):
        measured = {row["layer"]: row for row in (side.report["layers"] if side.report else ()) if row["length"] == length}
        for layer in side.bundle.plan.layers:
            told = {"name": layer.name, "mode": layer.mode, "length": length if layer.index in measured else None}
            told |= {key: measured.get(layer.index, {}).get(key) for key in ("relative_l2", "norm_ratio", "lse_std")}
            rows.setdefault(layer.index, {"index": layer.index, "pair": [None, None]})["pair"][i] = told
    return [rows[index] for index in sorted(rows)]


def _sizes(a: Side, b: Side) -> list[dict]:
    """Bytes of every file of either folder, the report and the manifest left out."""
    found = [
        {p.relative_to(f).as_posix(): p.stat().st_size for p in sorted(f.rglob("*")) if p.is_file()}
        for f in (side.bundle.folder for side in (a, b))
    ]
    names = [n for n in {**found[0], **found[1]} if n != MANIFEST and Path(n).parts[0] != Path(REPORT).parts[0]]
    return [{"file": name, "pair": [sizes.get(name) for sizes in found]} for name in sorted(names)]
