"""Judges docs/gpu_verification.json: sound or contradicting itself, and current or stale for the sources beside it.

tests/gpu/collect.py writes the record. A stale record is said loudly and fails nothing, because a GPU run cannot happen in CI; one
that is malformed, or claims more than its own figures show, fails.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import prefill_table
from bench_table import check_targets

from hyperattention.doctor import sources_id

ROOT = Path(__file__).resolve().parent.parent.parent
RECORD = ROOT / "docs" / "gpu_verification.json"
SCHEMA = 1
MODELS = ("odd", "all", "paper", "prefill")
STEPS = ("cuda", "engines", "ort", "sanitizer", "attention", "prefill", "kinds", "export-exact")
STEPS += tuple(f"bench-{name}" for name in ("attention", "grouped", "growth", "profile", "model"))
STEPS += tuple(f"{verb}-{name}" for name in MODELS for verb in ("export", "validate"))


def rounded(value: Any) -> Any:
    """The same with five significant digits: the rest is noise."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, list) else value


def contradictions(record: Any) -> list[str]:
    """What is malformed in a record, or claims more than its own figures show; empty when nothing."""
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        return [f"it is no record of schema {SCHEMA}"]
    try:
        return _contradictions(record)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        return [f"it is malformed: {type(error).__name__}: {error}"]


def _contradictions(record: dict[str, Any]) -> list[str]:
    found, steps = [], record["steps"]
    for name in ("date", "device", "driver"):
        if not record[name]:
            found.append(f"{name} is empty")
    for library, info in record["libraries"].items():
        if info["build_id"] != record["build_id"]:
            found.append(f"{library} is build {info['build_id']}, the record is of {record['build_id']}")
    missing = [name for name in STEPS if name not in steps]
    if missing != record["steps_missing"]:
        found.append(f"steps {missing} are missing, it says {record['steps_missing']}")
    if record["passed"] != (not missing and all(step["passed"] for step in steps.values())):
        found.append(f"passed is {record['passed']}, its steps say otherwise")
    for name, step in steps.items():
        if step["passed"] and (reason := _refuted(step)):
            found.append(f"step {name} is said to have passed: {reason}")
    return found


def _refuted(step: dict[str, Any]) -> str:
    """Why a step cannot have passed by its own figures; empty when it can."""
    suites = [step["tests"]] if "tests" in step else []
    for tool, row in step.get("tools", {}).items():
        if row["errors"] != 0 or row["tests"] is None:
            return f"{tool}: {row['summary']}"
        suites.append(row["tests"])
    suites += [{"errors": 0, "skipped": 0, **step["engines"]}] if "engines" in step else []
    for suite in suites:
        if suite["failures"] or suite["errors"] or suite["skipped"] or not suite["passed"]:
            return f"{suite['passed']} tests passed, {suite['failures']} failed, {suite['errors']} broke, {suite['skipped']} were skipped"
    broken = [name for name, row in step.get("kinds", {}).items() if not row["passed"]]
    if broken:
        return f"{', '.join(broken)} failed"
    if "benchmark" in step:
        results = rounded(check_targets(step["benchmark"]["rows"]))
        if [r["met"] for r in results] != [r["met"] for r in step["benchmark"]["targets"]]:
            return "its rows do not give its targets"
        if step["benchmark"]["failed"] or any(r["least"] is not None and not r["met"] for r in results):
            return "a runtime failed or a target was missed"
    if "prefill" in step:
        found = step["prefill"]
        results = rounded(prefill_table.check_targets(prefill_table.results(found)))
        if [r["met"] for r in results] != [r["met"] for r in found["targets"]]:
            return "its engines' times do not give its targets"
        if found["failed"] or not all(r["met"] for r in results):
            return "an engine failed or a target was missed"
    if "model" in step and not all(gate["passed"] for gate in step["model"]["gates"].values()):
        return "a gate was not met"
    return ""


def status(path: Path = RECORD, root: Path = ROOT) -> tuple[bool, str]:
    """Whether the record is sound, and a line that says what it is worth for the sources under `root`."""
    again = "run tests/gpu/verify.sh on a GPU host and then tests/gpu/collect.py"
    if not path.is_file():
        return True, f"GPU verification: NONE: {path.name} is missing; {again}"
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        return False, f"GPU verification: BROKEN: {path.name}: {error}"
    problems = contradictions(record)
    if problems:
        return False, f"GPU verification: BROKEN: {path.name}: {'; '.join(problems)}"
    failed = [name for name, step in record["steps"].items() if not step["passed"]]
    lacks = [f"{word}: {', '.join(names)}" for word, names in (("FAILED", failed), ("NOT RUN", record["steps_missing"])) if names]
    verdict = "; ".join(lacks) or "passed"
    words = f"{record['date'][:10]}, {record['device']}, build {record['build_id']}, {verdict}"
    if record["build_id"] != (now := sources_id(root)):
        return True, f"GPU verification: STALE: plugins/ is now {now}, the record is of {words}; {again}"
    return True, f"GPU verification: current: {words}"
