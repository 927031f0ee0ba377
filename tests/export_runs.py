"""Whole runs of export-model in which every stage is quick, in this process or in one that a test may kill.

Real: the command line, the plan, the order of stages, folders, locks, records, signals. Stood in for, each with tests of its own:
the ONNX export, the engine, the native libraries and the validation. What a stand-in writes follows from the plan and from what
lies in the folder, so that a stage that was wrongly taken over shows.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

HANGS = 300  # seconds, less than a run waits at a pause; on a busy machine with a cold disk its imports take many
STAGES = ("plan", "load", "ONNX", "engine", "validation", "manifest")
_PRELOAD = ("hyperattention.export.load", "hyperattention.export.onnx_graph", "hyperattention.export.pipeline", "export_runs")
# The validation: waits for ever where `pause` names it; `full` names a file without room.
VALIDATOR = """
import hashlib, json, os, pathlib, sys, time
folder, arguments = pathlib.Path(sys.argv[1]), sys.argv[2:]
pause, marker, full = {pause!r}, pathlib.Path({marker!r}), {full!r}
digest = hashlib.sha256()
for file in sorted(folder.glob("model.*")):
    digest.update(file.read_bytes())
(folder / "report").mkdir(exist_ok=True)
if pause == "validation":
    (folder / "report" / "half").write_text("half")
    marker.write_text(str(os.getpid()))
    time.sleep(600)
limit = float(next((a.partition("=")[2] for a in arguments if a.startswith("kl=")), 1))
text = pathlib.Path(arguments[arguments.index("--text") + 1]).read_text() if "--text" in arguments else ""
report = dict(inputs=dict(lengths=[64], text=text), limits=dict(kl=limit), verdict=dict(headline="done"), of=digest.hexdigest())
(folder / "report" / "report.json").write_text(json.dumps(report))
gate = dict(name="kl", value=0.1, limit=limit, sense="<=", where="here", passed=limit >= 0.1)
failed = dict() if gate["passed"] else dict(error="gates not met: kl", exit_code=1)
print(json.dumps(dict(verdict=dict(headline="done"), gates=[gate], **failed)))
sys.exit(not gate["passed"])
"""


def stand_ins(scratch: Path, pause: str | None = None, full: str | None = None) -> dict[str, Any]:
    """What to set, by dotted name. At `pause` (one of STAGES) the run writes `scratch`/at and waits to be killed; where `full` is ONNX,
    engine or manifest, the disk has no room for what that stage writes."""
    marker = scratch / "at"

    def wait(stage: str) -> None:
        if stage == pause:
            marker.write_text(str(os.getpid()))
            time.sleep(600)

    def write(stage: str, path: Path, text: str) -> None:
        if stage == full:
            path.symlink_to("/dev/full")  # the kernel's own "No space left on device"
        path.write_text(text)

    def export(source: Any, plan: Any, folder: Path, reporter: Any) -> None:
        wait("load")
        graph = f"{[(layer.name, layer.config) for layer in plan.layers]} {plan.seq[0] if plan.seq[0] == plan.seq[2] else 'any'}"
        read = b"".join((Path(source.model) / name).read_bytes() for name in ("model.safetensors", "config.json"))
        (folder / "model.onnx").write_text(f"{graph} {hashlib.sha256(read).hexdigest()}")
        wait("ONNX")
        write("ONNX", folder / "model.trt.onnx", "twin " + (folder / "model.onnx").read_text())

    def build(folder: Path, plan: Any, library: Path, progress: Any) -> Any:
        (folder / "build.log").write_text("building")
        wait("engine")
        graph = hashlib.sha256((folder / "model.trt.onnx").read_bytes()).hexdigest()
        write("engine", folder / "model.engine", f"engine {plan.seq} of {graph}")
        return _Info()

    def finish(folder: Path) -> dict[str, Any]:
        wait("manifest")
        if full == "manifest":
            write("manifest", folder / ".manifest.json.partial", "{}")
            raise AssertionError("there was room")
        return real_finish(folder)

    def predict(source: Any, plan: Any) -> Any:
        wait("plan")
        return real_predict(source, plan)

    from hyperattention.export.bundle import finish as real_finish
    from hyperattention.export.memory import predict as real_predict

    libraries = {name: _library(scratch, name) for name in ("libhyperattention_ort.so", "libhyperattention_trt.so")}
    find = {name: lambda path=path: path for name, path in libraries.items()}
    said = {"build_id": "1"}
    program = VALIDATOR.format(pause=pause, marker=str(marker), full=full)
    return {
        "hyperattention.export.memory.predict": predict,
        "hyperattention.export.pipeline._export": export,
        "hyperattention.export.pipeline.missing_parts": dict,
        "hyperattention.export.pipeline.engine_obstacle": lambda *_: None,
        "hyperattention.export.pipeline._LIBRARIES": dict(zip(("ONNX Runtime library", "TensorRT library"), find.values())),
        "hyperattention.export.pipeline.trt_library_path": find["libhyperattention_trt.so"],
        "hyperattention.export.pipeline.build_info": lambda path: said,
        "hyperattention.export.engine_check.build_info": lambda path: said,
        "hyperattention.export.engine.build_engine": build,
        "hyperattention.export.bundle.finish": finish,
        "hyperattention.export.validation.VALIDATE": (sys.executable, "-S", "-c", program),
    }


class _Info:
    def to_json(self) -> dict[str, Any]:
        return {"tensorrt": "0.0", "host": {"gpu": "none", "tensorrt": "0.0"}, "plugin_layers": []}


def _library(scratch: Path, name: str) -> Path:
    path = scratch / "lib" / name
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    return path


class Run:
    """export-model in a process of its own, forked from a server that has the imports done."""

    def __init__(
        self,
        scratch: Path,
        *arguments: object,
        pause: str | None = None,
        full: str | None = None,
        limit: int | None = None,
        nohup: bool = False,
    ):
        """`limit`: the largest file that the process may write, in bytes; then nothing is stood in for but what `pause` names.

        `nohup`: whether it was started to outlive its terminal, whatever these tests were.
        """
        self.scratch, self.log = scratch, scratch / "log"
        (scratch / "at").unlink(missing_ok=True)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(_PRELOAD))
        self.process = context.Process(target=_main, args=(scratch, [str(a) for a in arguments], pause, full, limit, nohup))
        self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def wait_for_pause(self, seconds: float = HANGS) -> int:
        """Until the run has come to `pause`; the process that waits there, which in the validation is a child."""
        deadline = time.monotonic() + seconds
        while not (self.scratch / "at").is_file() or not (self.scratch / "at").read_text():
            assert self.process.is_alive() and time.monotonic() < deadline, self.said()
            time.sleep(0.01)
        return int((self.scratch / "at").read_text())

    def send(self, number: int) -> int:
        """Sends a signal; what `end` returns."""
        os.kill(self.pid, number)
        return self.end()

    def end(self, seconds: float = HANGS) -> int:
        """The exit code, negative for a signal."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, self.said()
        return self.process.exitcode

    def said(self) -> str:
        """All that the run wrote to standard error, in one line."""
        return " ".join(self.log.with_suffix(".err").read_text().split())

    def answer(self) -> dict[str, Any]:
        """The object that --json printed."""
        return json.loads(self.log.with_suffix(".out").read_text())


def _main(scratch: Path, arguments: list[str], pause: str | None, full: str | None, limit: int | None, nohup: bool) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
    for number, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open((scratch / "log").with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    else:
        for name, value in stand_ins(scratch, pause, full).items():
            module, _, attribute = name.rpartition(".")
            setattr(importlib.import_module(module), attribute, value)
    from hyperattention.export.cli import main

    main(arguments)
