"""The command `export-model MODEL OUT`: options to a plan, then the stages; errors to exit codes. Nothing else."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.markup import escape

from hyperattention.config import PRESETS
from hyperattention.export import budget as budgets
from hyperattention.export import entry, gate_options, op_options
from hyperattention.export.choices import DEVICES, DTYPES, FEATURES, INPUT_IDS, KEEP_EXACT, LANGUAGE_TASKS

if TYPE_CHECKING:
    from hyperattention.export import automatic, pipeline
    from hyperattention.export.console import Reporter
    from hyperattention.export.held_out import Extent
    from hyperattention.export.plan import ExportPlan
    from hyperattention.export.source import Source

_SHAPES, _CHECKS, _AUTO = (dict[str, Any](rich_help_panel=name) for name in ("Shapes", "Validation", "Automatic policy"))

app = typer.Typer(pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]})


@app.command(epilog=entry.epilog("export-model models/byte-lm-4m out --input-ids bytes --text held-out.txt"))
def export_model(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A directory as transformers saves it, or FILE.py:FUNCTION (runs it).")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make. A finished output is replaced.")],
    layers: Annotated[
        str, typer.Option(help="Layers that approximate: auto (measured, under --budget), all, none, odd, even, first:N, last:N, or 0-3,7.")
    ] = "odd",
    preset: Annotated[
        str,
        typer.Option(autocompletion=entry.one_of(*PRESETS), help="blocks, paper (the paper's choices), or exact: our own exact attention."),
    ] = "blocks",
    keep_exact: Annotated[
        str,
        typer.Option(autocompletion=entry.one_of(*KEEP_EXACT), help="The other layers: op (exact path of the op) or onnx (n x n memory)."),
    ] = "op",
    dtype: Annotated[
        Optional[str],
        typer.Option(autocompletion=entry.one_of(*DTYPES), help="fp32, fp16 or bf16. (default: fp32, on a GPU the model's half type)"),
    ] = None,
    task: Annotated[
        Optional[str],
        typer.Option(
            autocompletion=entry.one_of(*LANGUAGE_TASKS, FEATURES),
            help="logits, last-logits, prefill (last logits, keys and values), or features. (default: by model)",
        ),
    ] = None,
    image_size: Annotated[
        Optional[str], typer.Option("--image-size", help="Pixels of an image model, N or HEIGHTxWIDTH. (default: its configuration's)")
    ] = None,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Load pickled weights (.bin), which can run code.")] = False,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code that lies in the model's directory.")] = False,
    input_ids: Annotated[
        str,
        typer.Option("--input-ids", autocompletion=entry.one_of(*INPUT_IDS), help="tokens, or bytes for a model that reads bytes."),
    ] = "tokens",
    seed: Annotated[int, typer.Option(help="Base seed, 0 to 2147483647; layer i samples with seed + i.")] = 0,
    min_seq: Annotated[Optional[int], typer.Option(help="Shortest sequence, 1 to 16777216. (default: 1)", **_SHAPES)] = None,
    opt_seq: Annotated[
        Optional[int], typer.Option(help="Length to tune for, 1 to 16777216. (default: a quarter of the longest)", **_SHAPES)
    ] = None,
    max_seq: Annotated[
        Optional[int], typer.Option(help="Longest sequence, 1 to 16777216. (default: what the model was trained for)", **_SHAPES)
    ] = None,
    batch: Annotated[Optional[str], typer.Option(help="Rows: N, or min,opt,max. (default: 1)", **_SHAPES)] = None,
    dim: Annotated[
        Optional[list[str]], typer.Option(metavar="NAME=MIN,OPT,MAX", help="Range of a dimension that FUNCTION names.", **_SHAPES)
    ] = None,
    # The attributes of the op: op_options.given takes them from the context.
    selector: op_options.Selector = None,
    block_size: op_options.BlockSize = None,
    num_blocks: op_options.NumBlocks = None,
    pool_size: op_options.PoolSize = None,
    sample_size: op_options.SampleSize = None,
    stratified: op_options.Stratified = None,
    local_size: op_options.LocalSize = None,
    local_overlap: op_options.LocalOverlap = None,
    sinks: op_options.Sinks = None,
    exact_below: op_options.ExactBelow = None,
    num_projections: op_options.NumProjections = None,
    strict_causal: op_options.StrictCausal = False,
    hash_centre: op_options.HashCentre = False,
    budget: Annotated[
        Optional[list[str]], typer.Option(metavar="NAME=VALUE", help=f"{budgets.help_text()} (default: {budgets.DEFAULT})", **_AUTO)
    ] = None,
    budget_regime: Annotated[
        str,
        typer.Option(autocompletion=entry.one_of(*budgets.JUDGED), help="Where it holds: " + ", ".join(budgets.JUDGED) + ".", **_AUTO),
    ] = budgets.BOTH,
    budget_cost: Annotated[
        str,
        typer.Option(
            autocompletion=entry.one_of(*budgets.COSTS),
            help="What is saved: keys, time of the op here, or auto (time with speedup=).",
            **_AUTO,
        ),
    ] = "auto",
    policy: Annotated[
        Optional[Path], typer.Option(metavar="FILE", help="A policy that `hyperattention policy` wrote; nothing is measured.", **_AUTO)
    ] = None,
    calibration_length: Annotated[
        Optional[int], typer.Option(help="Tokens of a window, 2 to 16777216. (default: at most 32768 with CUDA, 8192 without)", **_AUTO)
    ] = None,
    validate: Annotated[bool, typer.Option(help="Measure the result against exact attention.", **_CHECKS)] = True,
    text: Annotated[Optional[Path], typer.Option(help="Held-out text; a model that reads bytes needs one.", **_CHECKS)] = None,
    inputs: Annotated[
        Optional[Path], typer.Option(metavar="FILE.npz", help="Real inputs of any other model, an array for each by name.", **_CHECKS)
    ] = None,
    lengths: Annotated[str, typer.Option(help="Lengths to measure at, e.g. 8192,32768.", **_CHECKS)] = "",
    device: Annotated[str, typer.Option(autocompletion=entry.one_of(*DEVICES), help="auto, cpu or cuda.", **_CHECKS)] = "auto",
    gate: Annotated[Optional[list[str]], typer.Option(metavar="NAME=VALUE", help=gate_options.help_text(), **_CHECKS)] = None,
    require_engine: Annotated[bool, typer.Option("--require-engine", help="Fail (3) where no TensorRT engine can be built.")] = False,
    timing_cache: Annotated[
        Optional[Path], typer.Option(metavar="FILE", help="TensorRT's timings to start from: timing.cache of another OUT.")
    ] = None,
    triton: Annotated[bool, typer.Option("--triton", help="Write OUT/triton too, a model repository for Triton Inference Server.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Take over stages of an earlier run, stopped or finished; when this one stops, keep its own.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, predicted memory and missing parts; write nothing.")] = False,
    as_json: entry.AsJson = False,
    quiet: entry.Quiet = False,
    version: entry.Version = False,
) -> None:
    """Turn a model into OUT: ONNX with the HyperAttention op, both native libraries, a TensorRT engine where there is a GPU, and a report.

    Stages: policy (--layers auto), load, ONNX, engine, validation, manifest. OUT appears when all of them are done; where only an accuracy
    gate failed, OUT is kept with the report that says why. A run that fails or is interrupted leaves nothing, with --resume what it
    had finished.
    """
    from hyperattention.export import automatic, pipeline, shape_options
    from hyperattention.export import plan as planning
    from hyperattention.export.console import Reporter
    from hyperattention.export.folder import check_out
    from hyperattention.export.source import Trust, default_dtype, open_source, parse_image_size
    from hyperattention.export.validation import Request

    reporter = Reporter(quiet, as_json)
    attributes, ranges = op_options.given(context.params), shape_options.named_ranges(dim or [], batch)
    source = open_source(
        model,
        task=task,
        image_size=parse_image_size(image_size) if image_size is not None else None,
        trust=Trust(pickle=allow_pickle, code=trust_remote_code),
        say=lambda text: reporter.say(escape(text)),
    ).ranged(ranges, (min_seq, opt_seq, max_seq))
    check_out(out, source.directory)
    trusted = ("--allow-pickle",) * allow_pickle + ("--trust-remote-code",) * trust_remote_code
    searched_dtype = automatic.searched_dtype(dtype, device)
    searched = ("--input-ids", input_ids, "--device", device, "--seed", str(seed), *searched_dtype, *trusted)
    search = automatic.request(
        layers, preset, budget or [], budget_regime, budget_cost, policy, text, calibration_length, fixed=attributes, further=searched
    )
    entry.check_file("--text", text, "held-out plain text")
    entry.check_file("--inputs", inputs, "an .npz file with one array for each input of the model")
    entry.check_file("--timing-cache", timing_cache, "timing.cache of an earlier export with an engine")
    checks = Request(validate, text, inputs, lengths, device, tuple(gate or ()), further=trusted)
    options = pipeline.Options(out, checks, require_engine, resume, triton, timing_cache)
    plan_for = functools.partial(
        planning.make_plan,
        source,
        preset=preset,
        attributes=attributes,
        dtype=dtype or default_dtype(source),
        seq=shape_options.sequence_range(source, min_seq, opt_seq, max_seq),
        batch=shape_options.parse_batch(batch or "1"),
        input_ids=input_ids,
        seed=seed,
        keep_exact=keep_exact,
    )
    if search is None:
        plan, found, read = plan_for(layers=layers), {}, None
    else:
        plan, found, read = _plan_by_policy(search, plan_for, source, options, dry_run, reporter)
    idle = planning.idle_attributes(preset, attributes) + checks.idle_options(search is not None and search.measures)
    found |= _announce(plan, source, [*planning.warnings(plan, source.max_positions), *idle], reporter)
    pipeline.check_validation(source, plan, checks, read)
    if dry_run:
        for name, reason in found["missing"].items():
            reporter.say(escape(f"missing: {name}: {reason}"))
        if found["engine_obstacle"] is not None:
            reporter.say(escape(f"no engine from this plan: {found['engine_obstacle']}"))
    else:
        found |= pipeline.run(source, plan, options, reporter)
        reporter.say(f"{escape(str(out))} is ready" + (f"; report: {escape(str(out))}/report/report.html" if validate else ""))
    reporter.answer(found)


def _plan_by_policy(
    search: automatic.Request,
    plan_for: Callable[..., ExportPlan],
    source: Source,
    options: pipeline.Options,
    dry_run: bool,
    reporter: Reporter,
) -> tuple[ExportPlan, dict[str, Any], Extent | None]:
    """The plan that a policy decides, read or measured here; of a dry run, which measures none, also what the search would do; and the
    text as far as it was read for that."""
    from hyperattention.export import automatic, pipeline

    every, read = plan_for(layers="all"), None
    if search.measures:
        read = pipeline.check_validation(source, every, options.validation)  # a wrong option is found before a policy is measured
        if dry_run:
            return automatic.undecided(every), {"policy": automatic.dry_run(search, source, reporter)}, read
        pipeline.check_environment(source, every, options, pipeline.missing_parts())
    chosen = automatic.choose(search, source, options.out, options.resume, reporter)
    reporter.say(escape(chosen.summary()))
    return plan_for(layers=automatic.AUTO, policy=chosen), {}, read


def _announce(plan: ExportPlan, source: Source, warnings: list[str], reporter: Reporter) -> dict[str, Any]:
    """Shows the plan, the memory it is predicted to take, and the warnings; the same, and what the machine lacks, as JSON values."""
    from hyperattention.export import memory, pipeline

    missing, items = pipeline.missing_parts(), memory.predict(source, plan)
    items.append(memory.Item("disk", pipeline.disk_bytes(source, plan, missing), "at most, beside OUT, while the export runs"))
    reporter.plan(plan, source.architecture)
    reporter.memory(items)
    for warning in warnings:
        reporter.warn(warning)
    return {
        "plan": plan.to_json(),
        "memory": [vars(item) for item in items],
        "missing": missing,
        "engine_obstacle": pipeline.engine_obstacle(source, plan),
        "warnings": warnings,
    }


def main(arguments: list[str] | None = None) -> None:
    """Entry point; see `entry.run`."""
    entry.run(app, "export-model", arguments)
