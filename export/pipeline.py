"""The stages of export-model in order: load, ONNX, side files, engine, validation, manifest.

All work happens in a folder beside OUT, which takes OUT's name at the end (export/folder.py); each stage is taken over from an
earlier run where --resume asks for it and everything that it reads is as it was (export/stages.py). Where only the accuracy
gates failed, OUT is kept, with the report that says why.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from hyperattention import requirements
from hyperattention.errors import AccuracyFailed, EnvironmentFault, UsageError
from hyperattention.export import bundle, disk, fingerprint, policy
from hyperattention.export.automatic import forget
from hyperattention.export.console import Reporter
from hyperattention.export.folder import output_folder
from hyperattention.export.held_out import Extent
from hyperattention.export.memory import workspace_bytes
from hyperattention.export.plan import ExportPlan
from hyperattention.export.stages import Stages
from hyperattention.export.triton import write_repository
from hyperattention.export.validation import Request, validate
from hyperattention.library import build_info, check_interface, ort_library_path, trt_library_path

if TYPE_CHECKING:
    from hyperattention.export.source import Source


@dataclass(frozen=True)
class Options:
    """What the stages need beside the plan."""

    out: Path
    validation: Request = Request()
    require_engine: bool = False
    resume: bool = False
    triton: bool = False
    timing_cache: Path | None = None


_LIBRARIES = {"ONNX Runtime library": ort_library_path, "TensorRT library": trt_library_path}


def missing_parts() -> dict[str, str]:
    """What this machine lacks, each with the reason and what to do: the libraries, and what an engine needs."""
    from hyperattention.export.engine import runtime_available

    missing = {}
    for name, find in _LIBRARIES.items():
        try:
            check_interface(find())
        except EnvironmentFault as fault:
            missing[name] = str(fault)
    reason = runtime_available() or missing.get("TensorRT library")
    if reason is not None:
        missing["engine"] = reason
    return missing


def disk_bytes(source: "Source", plan: ExportPlan, missing: dict[str, str]) -> int:
    """The most that the export will hold on disk at any time, beside a finished OUT."""
    engine = "engine" not in missing and engine_obstacle(source, plan) is None
    return disk.predict(source, plan, _libraries(missing), engine)


def _libraries(missing: dict[str, str]) -> list[Path]:
    return [find() for name, find in _LIBRARIES.items() if name not in missing]


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
    if options.triton and "ONNX Runtime library" in missing and "engine" in missing:
        raise EnvironmentFault(f"--triton: neither of its backends could serve the result: {missing['ONNX Runtime library']}")
    if options.validation.wanted and "ONNX Runtime library" in missing and "engine" in missing:
        raise EnvironmentFault(f"the result cannot be validated: {missing['ONNX Runtime library']}, or pass --no-validate")
    lacking = requirements.lacking("polygraphy") if options.validation.wanted else None
    if lacking is not None:
        raise EnvironmentFault(f"the result cannot be validated: {lacking}, or pass --no-validate")


def check_validation(source: "Source", plan: ExportPlan, asked: Request, read: Extent | None = None) -> Extent | None:
    """Before any work: the validation takes what was asked of it and, with --device cuda, will have an engine, or ONNX Runtime's CUDA
    provider, to measure. `read` and what is returned: as `Request.check` has them.

    Raises UsageError for an option that does not fit, EnvironmentFault where the device or both runtimes are missing.
    """
    read = asked.check(source, plan, read)
    if not asked.wanted or asked.device != "cuda":
        return read
    obstacle, missing = engine_obstacle(source, plan), missing_parts()
    if obstacle is not None:
        raise UsageError(f"--device cuda: {obstacle}; leave --device out, or give cpu")
    if "engine" in missing and not _has_cuda_provider():
        raise EnvironmentFault(
            f"--device cuda validates an engine, and none will be built ({missing['engine']}), or ONNX Runtime's CUDA provider, which is "
            f"not installed either; install onnxruntime-gpu, or give --device cpu"
        )
    return read


def _has_cuda_provider() -> bool:
    import onnxruntime

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def run(source: "Source", plan: ExportPlan, options: Options, reporter: Reporter) -> dict[str, Any]:
    """All stages: {"manifest", "reused": names of the stages that were taken over}. Raises what they raise, AccuracyFailed last."""
    missing = missing_parts()
    check_environment(source, plan, options, missing)
    need = disk_bytes(source, plan, missing)
    with output_folder(options.out, options.resume, reporter.warn) as folder:
        earlier = [folder, options.out] if options.resume else []
        disk.check(folder, need, there=sum(file.stat().st_size for place in earlier for file in place.rglob("*")))
        try:
            return _stages(source, plan, options, folder, missing, reporter)
        except (AccuracyFailed, UsageError, EnvironmentFault):
            raise
        except Exception as error:
            if disk.is_full(error, folder):
                raise disk.fault(error, folder, need) from error
            raise


def _stages(
    source: "Source", plan: ExportPlan, options: Options, folder: Path, missing: dict[str, str], reporter: Reporter
) -> dict[str, Any]:
    stages = Stages(folder, options.out if options.resume else None, lambda text: reporter.say(escape(text)))
    reporter.step("reading the model's files")
    weights = fingerprint.model(source)
    stages.run("ONNX", fingerprint.onnx(plan, weights), lambda: _export(source, plan, folder, reporter))
    libraries = _libraries(missing)
    copy = fingerprint.side_files(weights, libraries)
    stages.run("side files", copy, lambda: bundle.copy_side_files(source.directory, folder, libraries))
    for name in _LIBRARIES:
        if name in missing:
            reporter.warn(f"OUT is without the {name}: {missing[name]}")
    engine, obstacle = None, missing.get("engine") or engine_obstacle(source, plan)
    if obstacle is not None:
        stages.skip("engine")
        reporter.say(escape(f"no engine: {obstacle}"))
    else:
        reads = fingerprint.engine(stages.digests_of("ONNX"), plan, trt_library_path())
        engine = stages.run("engine", reads, lambda: _engine(plan, folder, options.timing_cache, reporter))
    model = {"name": source.name, "architecture": source.architecture, "parameters": source.num_parameters}
    bundle.write_draft(folder, plan, model, engine, {path.name: build_info(path) for path in libraries})
    failed = None
    if options.validation.wanted:
        reads = fingerprint.validation(stages.digests_of("ONNX", "side files", "engine"), plan, weights, options.validation.arguments())
        found = stages.run("validation", reads, lambda: _validate(source.model, folder, options, reporter))
        reporter.gates(found)
        failed = found["failed"]
    else:
        stages.skip("validation")
    if plan.policy is not None:
        policy.write_policy(plan.policy, folder / policy.FILE)
    if options.triton:
        with reporter.stage("Triton"):
            write_repository(folder, source.name)
    with reporter.stage("manifest"):
        manifest = bundle.finish(folder)
    forget(options.out)
    found = {"manifest": manifest, "reused": stages.reused}
    if failed is not None:
        raise AccuracyFailed(failed, found)
    return found


def _export(source: "Source", plan: ExportPlan, folder: Path, reporter: Reporter) -> None:
    from hyperattention.export.onnx_graph import export_onnx

    with reporter.stage("load"):
        replaced = source.load(plan)
    with reporter.stage("ONNX"):
        export_onnx(replaced, plan, folder, reporter.step)


def _engine(plan: ExportPlan, folder: Path, timing_cache: Path | None, reporter: Reporter) -> dict[str, Any]:
    from hyperattention.export.engine import CACHE_FILE, build_engine

    if timing_cache is not None:
        shutil.copyfile(timing_cache, folder / CACHE_FILE)
    with reporter.stage("engine"):
        return build_engine(folder, plan, trt_library_path(), reporter.step).to_json()


def _validate(model: str, folder: Path, options: Options, reporter: Reporter) -> dict[str, Any]:
    with reporter.stage("validation"):
        return validate(model, folder, options.validation.arguments(), reporter)
