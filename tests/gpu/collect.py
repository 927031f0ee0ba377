"""Makes docs/gpu_verification.json of what tests/gpu/verify.sh wrote, and says whether it is still of these sources.

    python tests/gpu/collect.py OUT...     one run's folders, all steps among them; a later folder's step replaces an earlier one's
    python tests/gpu/collect.py --status   current, stale (plugins/ changed since), or none; exit code 1 when it contradicts itself

The record carries the hash of plugins/ (hyperattention.doctor.sources_id), the machine, and of every step its verdict, seconds,
counts and figures. Needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_record import RECORD, SCHEMA, STEPS, rounded, status

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
_SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (.*)")


def read_junit(path: Path) -> dict[str, Any]:
    """Counts of a pytest run and the names of the tests that did not pass."""
    suite = ET.parse(path).getroot().find("testsuite")
    if suite is None:
        raise ValueError(f"{path.name} has no testsuite")
    total, bad = int(suite.get("tests", 0)), {name: int(suite.get(name, 0)) for name in ("failures", "errors", "skipped")}
    names = {case.get("name", ""): case.find("failure") is None and case.find("error") is None for case in suite.iter("testcase")}
    found: dict[str, Any] = {"passed": total - sum(bad.values()), **bad, "not_passed": [name for name, ok in names.items() if not ok]}
    # One test may stand for many problems.
    if many := [int(match[1]) for name, ok in names.items() if ok and (match := re.fullmatch(r"test_(\d+)_random_problems", name))]:
        found["random_problems"] = sum(many)
    return found


def read_sanitizer(folder: Path) -> dict[str, Any]:
    """Of each tool its own summary line, its count of errors, and pytest's counts under it."""
    found = {}
    for tool in TOOLS:
        log, junit = folder / f"sanitizer-{tool}.log", folder / f"sanitizer-{tool}.xml"
        summaries = _SUMMARY.findall(log.read_text()) if log.is_file() else []
        numbers = re.findall(r"\d+", summaries[-1]) if summaries else []
        found[tool] = {
            "summary": summaries[-1] if summaries else "no summary",
            "errors": int(numbers[0]) if numbers else None,
            "tests": read_junit(junit) if junit.is_file() else None,
        }
    return found


def read_engines(folder: Path) -> dict[str, Any]:
    """The engine checks by name: passed, seconds, error."""
    report = json.loads((folder / "engines" / "engine_run.json").read_text())
    checks = {name: {k: row[k] for k in ("passed", "seconds", "error") if k in row} for name, row in report["checks"].items()}
    passed = sum(row["passed"] for row in checks.values())
    return {"tensorrt": report["tensorrt"], "passed": passed, "failures": len(checks) - passed, "checks": checks}


def read_bench(file: Path) -> dict[str, Any]:
    """What was timed, by length and contender medians in seconds and ratios to the rival over the rounds that both ran in, and how the
    medians grow; or the time split, without single launches.
    """
    report = json.loads(file.read_text())
    if report["kind"] == "profile":
        cases = [{key: value for key, value in case.items() if key != "launches"} for case in report["profile"]["cases"]]
        return {"problem": report["problem"]["text"], "profile": {**report["profile"], "cases": cases}}
    medians: dict[str, dict[str, float]] = {}
    against: dict[str, dict[str, Any]] = {}
    for row in report["rows"]:
        medians.setdefault(str(row["length"]), {})[row["contender"]] = row["median_s"]
        against.setdefault(str(row["length"]), {})[row["contender"]] = row["against"]
    return {"problem": report["problem"]["text"], "seconds": medians, "against": against, "growth": report["growth"]}


def read_model(folder: Path, name: str) -> dict[str, Any]:
    """The figures of one validated export: both regimes by length, needle, times, implementation error, gates."""
    report = json.loads((folder / name / "report" / "report.json").read_text())
    keys = ("delta_nats", "kl", "top1", "exact_nats")
    regimes = ("all_positions", "prefill_exact_decode")
    approximation = [
        {"length": row["length"], **{r: {k: row[r][k] for k in keys} for r in regimes if row[r]}} for row in report["approximation"]
    ]
    implementation = {
        "plan_differences": sum(row["plan_differences"] for row in report["implementation"]["per_op"]),
        "op_ratio": max(row["ratio"] for row in report["implementation"]["per_op"]),
        "model_ratio": max(row["ratio"] for row in report["implementation"]["whole_model"]),
    }
    judging = [g for g in report["gates"] if not g["advisory"]]
    return {
        "model": report["model"]["name"],
        "preset": report["plan"]["preset"],
        "backend": report["backend"],
        "plugin_layers": [len(row["found"]) for row in report["provenance"]],
        "implementation": implementation,
        "approximation": approximation,
        "time": report["time"],
        "needle": report.get("needle"),
        "gates": {g["name"]: {"value": g["value"], "limit": g["limit"], "passed": g["passed"]} for g in judging},
        "hard_inputs": {row["distribution"]: row["passed"] for row in report["hard_inputs"]},
        "headline": report["verdict"]["headline"],
    }


def read_json(file: Path) -> dict[str, Any]:
    """What a step of ours wrote, as it is."""
    return json.loads(file.read_text())


def read_step(folder: Path, name: str) -> dict[str, Any]:
    """A step's figures, under their name in the record; empty for a step that leaves none."""
    verb, _, rest = name.partition("-")
    readers: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
        "cuda": ("tests", lambda: read_junit(folder / "cuda.xml")),
        "ort": ("tests", lambda: read_junit(folder / "ort.xml")),
        "engines": ("engines", lambda: read_engines(folder)),
        "sanitizer": ("tools", lambda: read_sanitizer(folder)),
        "attention": ("benchmark", lambda: read_json(folder / "attention.json")),
        "prefill": ("prefill", lambda: read_json(folder / "prefill" / "prefill.json")),
        "kinds": ("kinds", lambda: read_json(folder / "kinds" / "kinds.json")),
        "bench": ("bench", lambda: read_bench(folder / name / "bench.json")),  # bench-attention and so on
        "validate": ("model", lambda: read_model(folder, rest)),  # validate-odd and so on
    }
    if verb not in readers:
        return {}
    key, read = readers[verb]
    return {key: read()}


def collect(folders: list[Path]) -> dict[str, Any]:
    """The record. Raises ValueError where folders are of different builds or a folder is none of verify.sh's."""
    record: dict[str, Any] = {}
    steps: dict[str, Any] = {}
    for folder in folders:
        if not (folder / "machine.json").is_file() or not (folder / "steps.tsv").is_file():
            raise ValueError(f"{folder} has no machine.json and steps.tsv; give folders that tests/gpu/verify.sh wrote")
        machine = json.loads((folder / "machine.json").read_text())
        if record and machine["build_id"] != record["build_id"]:
            raise ValueError(f"{folder} is of build {machine['build_id']}, another of {record['build_id']}; run its steps again")
        record = machine
        for line in (folder / "steps.tsv").read_text().splitlines():
            name, verdict, seconds = line.split("\t")
            steps[name] = {"passed": verdict == "PASS", "seconds": int(seconds)}
            try:
                steps[name] |= read_step(folder, name)
            except (OSError, ValueError, KeyError, ET.ParseError) as error:
                steps[name] |= {"passed": False, "unread": f"{type(error).__name__}: {error}"}
    missing = [name for name in STEPS if name not in steps]
    passed = not missing and all(step["passed"] for step in steps.values())
    return rounded({"schema": SCHEMA, **record, "passed": passed, "steps_missing": missing, "steps": steps})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*", metavar="OUT")
    parser.add_argument("--status", action="store_true", help="judge the committed record instead of writing one")
    given = parser.parse_args()
    if given.folders:
        RECORD.write_text(json.dumps(collect(given.folders), indent=1) + "\n")
    elif not given.status:
        parser.error("give the folders of a verification, or --status")
    sound, line = status()
    print(line)
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
