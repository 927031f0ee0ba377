"""The command `hyperattention`: validate (also `run`), report, inspect, doctor. Turns errors into exit codes, nothing else."""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Annotated, Optional

import typer

from hyperattention.errors import AccuracyFailed, EnvironmentFault, HyperAttentionError, UsageError

INTERNAL_ERROR = 70  # sysexits' EX_SOFTWARE; Python's own 1 after a traceback would read as a failed gate

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Measure, judge and describe what export-model wrote. Exit 70: an internal error, a bug.",
)

Folder = Annotated[Path, typer.Argument(metavar="OUT", help="Folder that export-model wrote.")]
DeltaNats = Annotated[Optional[float], typer.Option("--max-delta-nats", help="Loss that may be added, nats a token. [default: 0.01]")]
Kl = Annotated[Optional[float], typer.Option("--max-kl", help="KL(exact || ours) allowed, nats a token. [default: 0.005]")]
Top1 = Annotated[Optional[float], typer.Option("--min-top1", help="Share of equal first choices demanded. [default: 0.98]")]
OpRatio = Annotated[Optional[float], typer.Option("--max-op-ratio", help="Op's error over plain low precision's. [default: 2]")]
ModelRatio = Annotated[Optional[float], typer.Option("--max-model-ratio", help="Backend's error over one ulp of noise. [default: 2]")]


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise UsageError(f"{option} is {text!r}; it takes numbers with commas between them, such as 8192,32768") from None


def _limits(given: dict[str, float | None], base: dict[str, float] | None = None):
    from hyperattention.validate.gates import Limits

    return Limits(**{**(base or {}), **{name: value for name, value in given.items() if value is not None}})


def _say(report: dict, written: list[Path], as_json: bool) -> None:
    """The verdict and the gates on stdout; AccuracyFailed where one was not met."""
    failed = [g for g in report["gates"] if not g["passed"]]
    if as_json:
        print(json.dumps({"verdict": report["verdict"], "gates": report["gates"], "files": [p.name for p in written]}, default=str))
    else:
        print(report["verdict"]["headline"])
        print(report["verdict"]["speed"])
        for g in report["gates"]:
            print(f"  {'pass' if g['passed'] else 'FAIL'}  {g['name']:<12} {g['value']:.4g} {g['sense']} {g['limit']:.4g}  ({g['where']})")
        print(f"Report: {written[-1]}")
    if failed:
        names = ", ".join(g["name"] for g in failed)
        raise AccuracyFailed(f"gates not met: {names}; the report says where. Approximate fewer layers (--layers) or raise num_blocks")


@app.command("validate")
def validate_command(
    folder: Folder,
    model: Annotated[Path, typer.Option(help="The model that was exported: a transformers directory.")],
    text: Annotated[Optional[Path], typer.Option(help="Held-out plain text. A model that reads bytes needs one.")] = None,
    lengths: Annotated[str, typer.Option(help="Window lengths, e.g. 8192,32768. [default: 8192,16384,32768 as exported]")] = "",
    windows: Annotated[str, typer.Option(help="Windows of each length. [default: 4,2,1]")] = "",
    time_lengths: Annotated[str, typer.Option(help="Further lengths to time only.")] = "",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    backend: Annotated[str, typer.Option(help="auto (the engine where it can run), ort or tensorrt.")] = "auto",
    exact_engine: Annotated[Optional[Path], typer.Option(help="model.engine of an export with --preset exact, to time against.")] = None,
    tail: Annotated[int, typer.Option(help="Positions that attend exactly after an approximate prefill.")] = 512,
    needle: Annotated[Optional[bool], typer.Option(help="Recall of planted keys. [default: on with CUDA, off without]")] = None,
    seed: Annotated[int, typer.Option(help="Seed of prompts, perturbations and extra draws.")] = 0,
    threads: Annotated[int, typer.Option(help="Threads of ONNX Runtime; 0 = all.")] = 0,
    max_delta_nats: DeltaNats = None,
    max_kl: Kl = None,
    min_top1: Top1 = None,
    max_op_ratio: OpRatio = None,
    max_model_ratio: ModelRatio = None,
    as_json: Annotated[bool, typer.Option("--json", help="Verdict and gates as one line of JSON.")] = False,
) -> None:
    """Measure OUT against exact attention, prove what ran, and write OUT/report. Exit 1: a gate was not met."""
    from hyperattention.export.bundle import update_report
    from hyperattention.validate.progress import Steps
    from hyperattention.validate.report import write
    from hyperattention.validate.run import Options, count_steps, validate

    given = dict(
        max_delta_nats=max_delta_nats, max_kl=max_kl, min_top1=min_top1, max_op_ratio=max_op_ratio, max_model_ratio=max_model_ratio
    )
    options = Options(
        folder=folder,
        model=model,
        text=text,
        lengths=_numbers("--lengths", lengths),
        windows=_numbers("--windows", windows),
        time_lengths=_numbers("--time-lengths", time_lengths),
        device=device,
        backend=backend,
        exact_engine=exact_engine,
        tail=tail,
        needle=needle,
        seed=seed,
        threads=threads,
        limits=_limits(given),
    )
    with Steps(count_steps(options)) as step:
        report = validate(options, step)
    written = write(report, folder / "report")
    update_report(folder)
    _say(report, written, as_json)


app.command("run", hidden=True, help="Same as validate.")(validate_command)


@app.command("report")
def report_command(
    folder: Folder,
    max_delta_nats: DeltaNats = None,
    max_kl: Kl = None,
    min_top1: Top1 = None,
    max_op_ratio: OpRatio = None,
    max_model_ratio: ModelRatio = None,
    as_json: Annotated[bool, typer.Option("--json", help="Verdict and gates as one line of JSON.")] = False,
) -> None:
    """Judge a saved report again, under other limits if given, and write it anew. Needs neither model nor device."""
    from hyperattention.export.bundle import REPORT, update_report
    from hyperattention.validate.gates import judge
    from hyperattention.validate.report import INCOMPLETE, read, write

    path = folder if folder.is_file() else folder / "report" / "report.json"
    saved = read(path)
    given = dict(
        max_delta_nats=max_delta_nats, max_kl=max_kl, min_top1=min_top1, max_op_ratio=max_op_ratio, max_model_ratio=max_model_ratio
    )
    limits = _limits(given, saved["limits"])
    try:
        report = judge(saved, limits)
        written = write(report, path.parent)
    except UsageError:
        raise
    except INCOMPLETE as error:
        raise UsageError(f"{path} is incomplete ({type(error).__name__}: {error}); run `hyperattention validate` again") from error
    out = path.parent.parent
    if path == out / REPORT:  # a report.json copied elsewhere has no manifest to keep in step
        update_report(out)
    _say(report, written, as_json)


@app.command("inspect")
def inspect_command(folder: Folder, as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """Say what OUT holds: plan, files, whether they are the ones the manifest lists (exit 3 if not), and the report's verdict."""
    from hyperattention.validate.inspect_folder import describe, lines

    found = describe(folder)
    print(json.dumps(found, indent=1) if as_json else "\n".join(lines(found)))
    if found["changed"]:
        raise EnvironmentFault(f"changed or missing since the export: {', '.join(found['changed'])}; run export-model again")


@app.command("doctor")
def doctor_command(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """Say what this machine has (driver, CUDA, TensorRT, ONNX Runtime, both libraries) and how to mend the rest."""
    from rich.console import Console

    from hyperattention import doctor

    checks = doctor.collect()
    if as_json:
        print(doctor.to_json(checks))
    else:
        doctor.render(checks, Console())
    raise typer.Exit(doctor.exit_code(checks))


def main(arguments: list[str] | None = None) -> None:
    """Entry point; exits with the code of the error raised (hyperattention/errors.py). A bug shows its traceback and exits 70."""
    try:
        app(args=arguments)
    except HyperAttentionError as error:
        print(f"hyperattention: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception:
        traceback.print_exc()
        print(f"hyperattention: internal error, a bug (exit code {INTERNAL_ERROR}); please report the lines above", file=sys.stderr)
        sys.exit(INTERNAL_ERROR)
