"""The stages of export-model in order: load, patch, ONNX, engine, validation, manifest.

All work happens in a temporary folder beside OUT, which takes OUT's name at the end: an interrupted or failed run leaves
neither. Only a run whose accuracy gates failed leaves OUT, with the report that says why.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator

from rich.markup import escape

from hyperattention.errors import (
    AccuracyFailed,
    BuildFailed,
    EnvironmentFault,
    ExportFailed,
    HyperAttentionError,
    UsageError,
)
from hyperattention.export import bundle, interrupt
from hyperattention.export.console import Reporter, numbered
from hyperattention.export.memory import workspace_bytes
from hyperattention.export.plan import ExportPlan
from hyperattention.library import build_info, ort_library_path, trt_library_path

if TYPE_CHECKING:
    from hyperattention.export.load import Source

VALIDATE = (sys.executable, "-m", "hyperattention.validate", "run")
_BY_CODE: dict[int, type[HyperAttentionError]] = {e.exit_code: e for e in (UsageError, EnvironmentFault, ExportFailed, BuildFailed)}


@dataclass(frozen=True)
class Options:
    """What the stages need beside the plan. `validation` holds further arguments of `hyperattention validate`."""

    out: Path
    require_engine: bool = False
    validate: bool = True
    validation: tuple[str, ...] = ()


_LIBRARIES = {"ONNX Runtime library": ort_library_path, "TensorRT library": trt_library_path}


def missing_parts() -> dict[str, str]:
    """What this machine lacks, each with the reason and what to do: the libraries, and what an engine needs."""
    from hyperattention.export.engine import runtime_available

    missing = {}
    for name, find in _LIBRARIES.items():
        try:
            find()
        except EnvironmentFault as fault:
            missing[name] = str(fault)
    reason = runtime_available() or missing.get("TensorRT library")
    if reason is not None:
        missing["engine"] = reason
    return missing


def engine_obstacle(source: "Source", plan: ExportPlan) -> str | None:
    """Why the plugin cannot take this plan on any machine; None when it can."""
    if not plan.planned:
        return None
    by_name = {layer.name: layer for layer in source.layers}
    try:
        for layer in plan.planned:
            assert layer.config is not None
            workspace_bytes(by_name[layer.name], layer.config, plan, "CUDA")
    except UsageError as error:
        return str(error)
    except EnvironmentFault:
        return None  # the library is missing, which missing_parts says
    return None


def check_environment(source: "Source", plan: ExportPlan, options: Options, missing: dict[str, str]) -> None:
    """Before any work: raises EnvironmentFault where a stage that was asked for lacks something, UsageError where it cannot be."""
    if options.require_engine:
        if "engine" in missing:
            raise EnvironmentFault(f"--require-engine: {missing['engine']}; run it on a GPU host, or leave the option out for ONNX alone")
        obstacle = engine_obstacle(source, plan)
        if obstacle is not None:
            raise UsageError(f"--require-engine: {obstacle}")
    if options.validate and "ONNX Runtime library" in missing and "engine" in missing:
        raise EnvironmentFault(f"the result cannot be validated: {missing['ONNX Runtime library']}, or pass --no-validate")


def check_validation_on_cuda(missing: dict[str, str], obstacle: str | None) -> None:
    """Before any work, for --device cuda: an engine, or ONNX Runtime's CUDA provider, will be there to be validated.

    Raises UsageError where the CUDA kernels do not take the plan, EnvironmentFault where neither runtime is there.
    """
    if obstacle is not None:
        raise UsageError(f"--device cuda: {obstacle}; leave --device out, or give cpu")
    if "engine" in missing and not _has_cuda_provider():
        raise EnvironmentFault(
            f"--device cuda validates an engine, and none will be built ({missing['engine']}), or ONNX Runtime's CUDA provider, which is "
            f"not installed either; install onnxruntime-gpu, or give --device cpu"
        )


def _has_cuda_provider() -> bool:
    import onnxruntime

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


@contextmanager
def output_folder(out: Path) -> Iterator[Path]:
    """A temporary folder that becomes `out` when the block ends well or raises AccuracyFailed, and vanishes otherwise.

    A finished output of ours is replaced. Raises UsageError where `out` is a file or a link, holds something else, or cannot be
    written.
    """
    out = Path(os.path.abspath(out))
    if not out.name:
        raise UsageError(f"OUT is {out}, the root of the file system; give a folder that does not exist yet")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UsageError(f"OUT {out} is a {'link' if out.is_symlink() else 'file'}; give a folder that does not exist yet")
    # Named before it is made, so that an interruption at any point finds it.
    work = out.with_name(f".{out.name}.{os.getpid()}.partial")
    made = [parent for parent in out.parents if not parent.exists()]
    old = work.with_suffix(".old")

    def undo() -> None:
        if old.exists() and not out.exists():  # between the two renames of _move
            old.rename(out)
        for folder in (work, old):
            shutil.rmtree(folder, ignore_errors=True)
        for parent in made:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()

    with interrupt.undoing(undo):
        try:
            _make(out, work)
            try:
                yield work
            except AccuracyFailed:
                _move(work, out, old)
                raise
            _move(work, out, old)
        finally:
            undo()


def _make(out: Path, work: Path) -> None:
    try:
        _check_replaceable(out)
        work.mkdir(parents=True)
    except OSError as error:
        raise UsageError(f"OUT {out} cannot be written: {error.strerror}; give a folder you may write to") from error


def _check_replaceable(out: Path) -> None:
    """Raises UsageError where `out` holds anything that its own manifest does not list: replacing it would destroy that."""
    foreign = _foreign(out) if out.is_dir() else None
    if foreign is not None:
        raise UsageError(
            f"OUT {out} holds {foreign}, which export-model did not write; move it away, or give a folder that does not exist yet"
        )


def _foreign(out: Path) -> str | None:
    """The first entry of `out` that is not part of a finished output of ours, by its name in `out`."""
    try:
        # Other tools write a manifest.json too: only one that opens as ours says what may go.
        listed = {bundle.MANIFEST, *bundle.Bundle.open(out).manifest["files"]} if (out / bundle.MANIFEST).is_file() else None
    except UsageError:
        listed = None
    if listed is None:
        return min((path.name for path in out.iterdir()), default=None)
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        # A report may have been written anew since.
        ours = name in listed or name.startswith("report/")
        if (path.is_symlink() or not path.is_dir()) and not ours:
            return name
    return None


def _move(work: Path, out: Path, old: Path) -> None:
    # Again, for what came to lie there during the run.
    _check_replaceable(out)
    if out.is_dir():
        out.rename(old)
    work.rename(out)


def run(source: "Source", plan: ExportPlan, options: Options, reporter: Reporter) -> dict[str, Any]:
    """All stages; returns the manifest. Raises what the stages raise, AccuracyFailed last of all."""
    missing = missing_parts()
    check_environment(source, plan, options, missing)
    with output_folder(options.out) as folder:
        _export(source, plan, folder, reporter)
        libraries = [find() for name, find in _LIBRARIES.items() if name not in missing]
        bundle.copy_side_files(source.path, folder, libraries)
        for name in _LIBRARIES:
            if name in missing:
                reporter.warn(f"OUT is without the {name}: {missing[name]}")
        engine = None
        reason = missing.get("engine") or engine_obstacle(source, plan)
        if reason is not None:
            reporter.say(escape(f"no engine: {reason}"))
        else:
            engine = _engine(plan, folder, reporter)
        model = {"name": source.path.resolve().name, "architecture": source.architecture, "parameters": source.num_parameters}
        bundle.write_draft(folder, plan, model, engine, {path.name: build_info(path) for path in libraries})
        failed = None
        if options.validate:
            failed = _validate(source.path, folder, options, reporter)
        with reporter.stage("manifest"):
            manifest = bundle.finish(folder)
        if failed is not None:
            raise failed
    return manifest


def _export(source: "Source", plan: ExportPlan, folder: Path, reporter: Reporter) -> None:
    from hyperattention.export.load import load_model, torch_dtype
    from hyperattention.export.onnx_graph import export_onnx
    from hyperattention.export.patch import install

    with reporter.stage("load"):
        model = load_model(source, torch_dtype(plan.dtype))
        patched = install(model, plan)
    with reporter.stage("ONNX"):
        export_onnx(patched, plan, folder, reporter.step)


def _engine(plan: ExportPlan, folder: Path, reporter: Reporter) -> dict[str, Any]:
    from hyperattention.export.engine import build_engine

    with reporter.stage("engine"):
        return build_engine(folder, plan, trt_library_path(), reporter.step).to_json()


def _validate(model: Path, folder: Path, options: Options, reporter: Reporter) -> AccuracyFailed | None:
    """Runs `hyperattention validate` as a process of its own; imports go one way. Returns the failed gates, if any."""
    command = [*VALIDATE, str(folder), "--model", str(model), *options.validation, "--json"]
    said: deque[str] = deque(maxlen=40)
    with reporter.stage("validation"):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment())
        assert process.stdout is not None and process.stderr is not None

        def stop() -> None:
            process.kill()  # it holds nothing worth an ending of its own: the folder goes with it
            process.wait()

        with interrupt.undoing(stop):
            try:
                for line in process.stderr:
                    if counted := numbered(line):
                        reporter.step(*counted)
                    elif line.strip():
                        said.append(line.rstrip())
                output = process.stdout.read()
                code = process.wait()
            except BaseException:
                stop()
                raise
    message = said[-1].removeprefix("error: ") if said else f"the validation ended with status {code}"
    if code in _BY_CODE:
        raise _BY_CODE[code](message)
    answer = output.strip().splitlines()[-1:]
    # Python ends with 1 after a traceback too; only the verdict tells a failed gate from that.
    if code not in (0, 1) or not answer or not (folder / bundle.REPORT).is_file():
        raise RuntimeError("the validation crashed:\n" + "\n".join(said))
    reporter.gates(json.loads(answer[0]))
    return AccuracyFailed(message) if code == 1 else None


def _environment() -> dict[str, str]:
    """The child finds this package wherever this process found it."""
    root = str(Path(sys.modules["hyperattention"].__path__[0]).parent)
    path = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{path}" if path else root}
