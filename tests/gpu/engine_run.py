"""Builds engines of one node on a GPU host, runs them at lengths other than opt and holds them against the reference.

    python tests/gpu/engine_run.py --out DIR [--only NAME,NAME]

Needs a CUDA device, TensorRT with its builder, and libhyperattention_trt.so; one check also ONNX Runtime with its CUDA provider
and libhyperattention_ort.so. Every check stands alone: a failure is recorded and the next one runs. DIR/engine_run.json holds the
numbers; the exit code is 1 if any check failed. HYPERATTENTION_NO_SKIP=1: a check that could not run is a failure.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import engine_lifecycle  # noqa: F401  (fills CHECKS, as the next does)
import engine_operator  # noqa: F401
import tensorrt as trt
import torch
from engine_session import CHECKS, NotRun, Session

from hyperattention.export.engine_plugin import register_plugin
from hyperattention.library import trt_library_path

NO_SKIP = os.environ.get("HYPERATTENTION_NO_SKIP") == "1"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for engine_run.json and the logs")
    parser.add_argument("--only", default=",".join(CHECKS), help="checks to run, by name: " + ", ".join(CHECKS))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    register_plugin(trt_library_path())
    session = Session(arguments.out)
    report: dict[str, Any] = {"tensorrt": trt.__version__, "torch": torch.__version__, "device": torch.cuda.get_device_name(), "checks": {}}
    for name in arguments.only.split(","):
        start = time.perf_counter()
        try:
            row = {"passed": True, **CHECKS[name](session)}
        except NotRun as reason:
            row = {"passed": not NO_SKIP, "error": f"not run: {reason}"}
        except Exception as error:  # one failure must not cost the other checks
            row = {"passed": False, "error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc(limit=-3)}
        row["seconds"] = round(time.perf_counter() - start, 1)
        report["checks"][name] = row
        print(f"{'PASS' if row['passed'] else 'FAIL'} {name} ({row['seconds']} s) {row.get('error', '')}", flush=True)
        (arguments.out / "engine_run.json").write_text(json.dumps(report, indent=1, default=str))
    report["device_memory"] = {key: int(engine.device_memory_size_v2) for key, engine in session.engines.items()}
    (arguments.out / "engine_run.json").write_text(json.dumps(report, indent=1, default=str))
    failed = sum(not row["passed"] for row in report["checks"].values())
    print(f"{len(report['checks']) - failed} passed, {failed} failed; TensorRT's errors: {session.log.errors[-5:]}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
