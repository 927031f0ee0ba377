"""`hyperattention validate OUT`: measure, judge, write OUT/report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.markup import escape

from hyperattention.export.choices import DEVICES
from hyperattention.export.entry import AsJson, Quiet, numbers, one_of
from hyperattention.export.gate_options import check_kind, kind_of, parse_gates, with_gates
from hyperattention.validate.commands.options import Folder, Gates, save, say

EXAMPLE = "hyperattention validate out --model models/byte-lm-4m --text held-out.txt --gate kl=0.01"


def command(
    folder: Folder,
    model: Annotated[Optional[str], typer.Option(help="What was exported: a transformers directory, or FILE.py:FUNCTION. Needed.")] = None,
    text: Annotated[Optional[Path], typer.Option(help="Held-out plain text. A model that reads bytes needs one.")] = None,
    inputs: Annotated[
        Optional[Path], typer.Option(metavar="FILE.npz", help="Real inputs for any other model: one array for each input, by name.")
    ] = None,
    lengths: Annotated[str, typer.Option(help="Window lengths, e.g. 8192,32768. (default: 8192,16384,32768 as exported)")] = "",
    windows: Annotated[str, typer.Option(help="Windows of each length. (default: 4,2,1)")] = "",
    time_lengths: Annotated[str, typer.Option(help="Further lengths to time only.")] = "",
    device: Annotated[str, typer.Option(autocompletion=one_of(*DEVICES), help="auto, cpu or cuda.")] = "auto",
    backend: Annotated[
        str, typer.Option(autocompletion=one_of("auto", "ort", "tensorrt"), help="auto (the engine where it can run), ort or tensorrt.")
    ] = "auto",
    exact_engine: Annotated[Optional[Path], typer.Option(help="model.engine of an export with --preset exact, to time against.")] = None,
    tail: Annotated[int, typer.Option(help="Positions, at least 1, that attend exactly after an approximate prefill.")] = 512,
    needle: Annotated[
        Optional[bool], typer.Option(help="Recall of planted keys, by length and depth. (default: on with CUDA, off without)")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of prompts, perturbations and extra draws, 0 to 2147483643.")] = 0,
    threads: Annotated[int, typer.Option(help="Threads of ONNX Runtime, 0 to 1024; 0 = all.")] = 0,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Load pickled weights of --model (.bin).")] = False,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code of --model's directory.")] = False,
    gate: Gates = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure OUT against exact attention, prove what ran, and write OUT/report. Exit 1: a gate was not met."""
    from hyperattention.export.bundle import Bundle
    from hyperattention.export.console import Reporter
    from hyperattention.export.source import Trust
    from hyperattention.validate.run import Options, validate

    gates = parse_gates(gate or [])
    options = Options(
        folder=folder,
        model=model,
        text=text,
        inputs=inputs,
        lengths=numbers("--lengths", lengths),
        windows=numbers("--windows", windows),
        time_lengths=numbers("--time-lengths", time_lengths),
        device=device,
        backend=backend,
        exact_engine=exact_engine,
        tail=tail,
        needle=needle,
        seed=seed,
        threads=threads,
        limits=with_gates(gates),
        trust=Trust(pickle=allow_pickle, code=trust_remote_code),
    )
    check_kind(gates, kind_of(Bundle.open(folder).plan.task))
    reporter = Reporter(quiet, as_json)
    with reporter.stage("validation"):
        report = validate(options, reporter.counted, lambda text: reporter.say(escape(text)))
    say(report, save(report, folder / "report", folder), reporter)
