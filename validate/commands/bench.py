"""`hyperattention bench`: how long the op, or an exported model, takes, beside exact attention in the same run."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from hyperattention.config import PRESETS, Config
from hyperattention.errors import UsageError
from hyperattention.export import op_options
from hyperattention.export.choices import DEVICES, DTYPES
from hyperattention.export.entry import AsJson, Quiet, numbers, one_of
from hyperattention.export.interrupt import EXIT_CODE as INTERRUPTED

EXAMPLE = "hyperattention bench --attention --preset blocks,paper --lengths 4096,32768,131072"
_ALONE, _MODEL = (dict[str, Any](rich_help_panel=name) for name in ("With --attention", "With OUT"))

_USUAL_LENGTHS = 6  # about as many as are measured where the user names none


def command(
    context: typer.Context,
    folder: Annotated[Optional[Path], typer.Argument(metavar="OUT", help="Folder that export-model wrote.")] = None,
    attention: Annotated[bool, typer.Option("--attention", help="Time the op alone, on random Q, K, V; no OUT is needed.")] = False,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile",
            help="With --attention, on a CUDA device: where the time of one call goes, by stage, with the rates reached and the share "
            "of the roofline, instead of times beside rivals. Kernels are timed by CUPTI, parts of one kernel by differences of runs.",
        ),
    ] = False,
    lengths: Annotated[str, typer.Option(help="E.g. 4096,32768. (default: 1k to 16k, on a GPU 4k to 128k; of OUT what it takes)")] = "",
    device: Annotated[str, typer.Option(autocompletion=one_of(*DEVICES), help="auto, cpu or cuda.")] = "auto",
    backend: Annotated[
        str,
        typer.Option(
            autocompletion=one_of("ort", "tensorrt", "library"),
            help="ort, tensorrt, or library (--attention: our kernels alone, the default there).",
        ),
    ] = "",
    against: Annotated[
        Optional[str],
        typer.Option(help="Rival that ratios are against, over the rounds in which both ran. (default: the fastest at each length)"),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Rounds, 1 to 100000; in each every contender runs once.")] = 30,
    max_seconds: Annotated[
        float,
        typer.Option(
            help="0.001 to 86400: after so long at a length a contender sits out, but runs three times. Exact attention whose single run "
            "would take longer, by a shorter length, is left out."
        ),
    ] = 10.0,
    threads: Annotated[int, typer.Option(help="Threads on the processor, 0 to 1024; 0 = all.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the random inputs, 0 to 2130706431.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder for bench.json and bench.png.")] = Path("hyperattention-bench"),
    model: Annotated[Optional[str], typer.Option(help="The model OUT was made from: adds PyTorch's exact attention.", **_MODEL)] = None,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Load pickled weights of --model (.bin).", **_MODEL)] = False,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code of --model's directory.", **_MODEL)] = False,
    exact_engine: Annotated[Optional[Path], typer.Option(help="model.engine of an export with --preset exact.", **_MODEL)] = None,
    preset: Annotated[
        Optional[str],
        typer.Option(autocompletion=one_of("blocks", "paper"), help="One or more of blocks, paper. (default: blocks)", **_ALONE),
    ] = None,
    batch: Annotated[Optional[int], typer.Option(help="Rows, 1 to 4096. (default: 1)", **_ALONE)] = None,
    heads: Annotated[Optional[int], typer.Option(help="Heads of Q, 1 to 4096. (default: 4, on a GPU 32)", **_ALONE)] = None,
    kv_heads: Annotated[
        Optional[int], typer.Option(help="Heads of K and V, 1 to 4096; divides --heads. (default: --heads)", **_ALONE)
    ] = None,
    head_dim: Annotated[
        Optional[str], typer.Option(help="Head size, 1 to 256; with --profile also several, 64,128. (default: 64, on a GPU 128)", **_ALONE)
    ] = None,
    dtype: Annotated[
        Optional[str],
        typer.Option(autocompletion=one_of(*DTYPES), help="fp32, fp16 or bf16. (default: fp32, on a GPU bf16)", **_ALONE),
    ] = None,
    causal: Annotated[Optional[bool], typer.Option("--causal/--full", help="Causal mask or none. (default: causal)", **_ALONE)] = None,
    rivals: Annotated[Optional[str], typer.Option(help="all, none, or names with commas. (default: all)", **_ALONE)] = None,
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
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Time OUT, or the op alone, against every exact rival that is installed; writes bench.json and bench.png.

    All contenders run in turn, after a warm-up, in one process. What is not installed or does not take a shape is listed with the
    reason. Ctrl-C ends after the run in progress and keeps what was measured (exit 130).
    """
    from hyperattention.export.console import Reporter
    from hyperattention.export.source import Trust
    from hyperattention.validate import bench_run
    from hyperattention.validate.bench_profile_run import profile_run
    from hyperattention.validate.bench_record import check_output, write
    from hyperattention.validate.bench_timing import Settings, stoppable

    sizes = numbers("--head-dim", head_dim or "")
    if profile:
        _check_profile(attention, {"rivals": rivals, "against": against})
    elif len(sizes) > 1:
        raise UsageError(f"--head-dim names {len(sizes)} sizes; it takes one, and several with --profile")

    tuned = op_options.given(context.params)
    shape = dict(batch=batch, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, causal=causal)
    if attention == (folder is not None):
        raise UsageError("bench takes either an OUT or --attention; " + ("both were given" if attention else "neither was given"))
    trusted = {"allow_pickle": allow_pickle or None, "trust_remote_code": trust_remote_code or None}
    _refuse(attention, {"preset": preset, "rivals": rivals, **shape, **tuned}, {"model": model, "exact_engine": exact_engine, **trusted})
    check_output(output)
    chosen = numbers("--lengths", lengths)
    common: dict[str, Any] = dict(
        lengths=chosen, device=device, against=against, seed=seed, threads=threads, settings=Settings(repeats, max_seconds)
    )
    if folder is not None:
        trust = Trust(pickle=allow_pickle, code=trust_remote_code)
        outcome = bench_run.OutcomeOptions(folder, model, trust, exact_engine, backend=backend or "auto", **common)
        run, contenders = functools.partial(bench_run.bench_outcome_run, outcome), 3
    else:
        shape["head_dim"] = sizes[0] if sizes else None
        given: dict[str, Any] = {name: value for name, value in shape.items() if value is not None}
        alone = bench_run.AttentionOptions(
            presets=_presets(preset or "blocks", tuned), rivals=_rivals(rivals or "all"), backend=backend or "library", **common, **given
        )
        if profile:
            run, contenders = functools.partial(profile_run, alone, sizes), len(alone.presets) * max(1, len(sizes))
        else:
            run, contenders = functools.partial(bench_run.bench_attention_run, alone), len(alone.rivals) + len(alone.presets) + 1
    reporter = Reporter(quiet, as_json)
    with stoppable() as stopped:
        with reporter.stage("benchmark"):
            report = run(reporter.counted((len(chosen) or _USUAL_LENGTHS) * (contenders + 1)), stopped)
        written = write(report, output)
    _say(report, written, reporter)
    if not report["interrupted"]:
        bench_run.check_ours(report)
    reporter.answer({**report, "files": [path.name for path in written]})
    if report["interrupted"]:
        raise typer.Exit(INTERRUPTED)


def _refuse(attention: bool, alone: dict[str, Any], model: dict[str, Any]) -> None:
    """Raises UsageError for options of the other benchmark."""
    other, what = (model, "OUT") if attention else (alone, "--attention")
    wrong = [f"--{name.replace('_', '-')}" for name, value in other.items() if value is not None]
    if wrong:
        raise UsageError(f"{', '.join(wrong)} belong to bench with {what}; leave them out")


def _check_profile(attention: bool, rivals: dict[str, Any]) -> None:
    """Raises UsageError for what --profile does not go with."""
    if not attention:
        raise UsageError("--profile times the stages of the op alone; give it with --attention")
    wrong = [f"--{name}" for name, value in rivals.items() if value is not None]
    if wrong:
        raise UsageError(f"--profile times no rivals; leave {', '.join(wrong)} out")


def _presets(text: str, tuned: dict[str, Any]) -> dict[str, Config]:
    """The configurations named, each with the attributes given. Raises UsageError."""
    names = [part.strip() for part in text.split(",") if part.strip()]
    allowed = [name for name in PRESETS if name != "exact"]
    if not names or not set(names) <= set(allowed):
        raise UsageError(f"--preset is {text!r}; it takes {' or '.join(allowed)}, or several with commas (the exact path is always timed)")
    return {name: replace(PRESETS[name], **tuned) for name in dict.fromkeys(names)}


def _rivals(text: str) -> tuple[str, ...]:
    from hyperattention.validate.bench_attention import rival_names

    if text in ("all", "none"):
        return rival_names() if text == "all" else ()
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    unknown = [name for name in names if name not in rival_names()]
    if unknown or not names:
        raise UsageError(f"--rivals is {text!r}; it takes all, none, or some of {', '.join(rival_names())}")
    return names


def _say(report: dict[str, Any], written: list[Path], reporter: Any) -> None:
    """The table, what is left out and why, and from which length on ours is faster."""
    from hyperattention.validate import bench_profile_page
    from hyperattention.validate.bench_record import growth_lines, left_out_lines, summary, table

    if reporter.quiet:
        return
    reporter.out.print(report["problem"]["text"], markup=False)
    if report["rows"]:
        reporter.out.print(table(report))
    lines = [*left_out_lines(report), *(f"note: {note}" for note in report["notes"]), *summary(report), *growth_lines(report)]
    if report["kind"] == "profile":
        reporter.out.print(bench_profile_page.table(report))
        lines = [*bench_profile_page.lines(report), *lines]
    lines += ["interrupted: what was measured until then was kept"] if report["interrupted"] else []
    for line in [*lines, f"Written: {', '.join(str(path) for path in written)}"]:
        reporter.out.print(line, markup=False)
