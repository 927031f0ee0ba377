"""`hyperattention sweep MODEL`: loss against the number of replaced layers, the paper's own experiment."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from hyperattention.export.choices import DEVICES, DTYPES, INPUT_IDS
from hyperattention.export.entry import AsJson, Quiet, numbers, one_of
from hyperattention.export.interrupt import EXIT_CODE as INTERRUPTED
from hyperattention.validate.sweep_plan import METHODS, ORDERS, method_configs, names

if TYPE_CHECKING:
    from hyperattention.export.console import Reporter

EXAMPLE = "hyperattention sweep models/byte-lm-4m --text held-out.txt --input-ids bytes --lengths 8192 --orders last,error"


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A causal language model as transformers saves it.")],
    text: Annotated[Path, typer.Option(help="Held-out plain text.")],
    lengths: Annotated[str, typer.Option(help="Window lengths.")] = "8192,16384,32768",
    methods: Annotated[
        str, typer.Option(help=f"Of {', '.join(METHODS)}: window has sinks, and as many keys a query as blocks.")
    ] = ",".join(METHODS),
    orders: Annotated[
        str, typer.Option(help="Which layers go first: the last (the paper's order), the first, or those of the least error.")
    ] = ",".join(ORDERS),
    replaced: Annotated[str, typer.Option(help="Numbers of replaced layers, e.g. 1,4,8. (default: up to ten, from 1 to all)")] = "",
    windows: Annotated[int, typer.Option(help="Windows of each length that are judged, 1 to 4096; one more ranks the layers.")] = 2,
    tail: Annotated[
        Optional[int],
        typer.Option(help="Positions, 1 to half of the shortest length, that decode exactly. (default: at most 512)"),
    ] = None,
    attribute: Annotated[
        Optional[list[str]],
        typer.Option("--set", metavar="[METHOD.]NAME=VALUE", help="An attribute of the op in place of the preset's, repeatable."),
    ] = None,
    input_ids: Annotated[
        str, typer.Option(autocompletion=one_of(*INPUT_IDS), help="tokens (of the tokenizer in MODEL) or bytes.")
    ] = "tokens",
    device: Annotated[str, typer.Option(autocompletion=one_of(*DEVICES), help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[
        str, typer.Option(autocompletion=one_of(*DTYPES), help="fp32, fp16 or bf16. (default: fp32, on a GPU the model's half type)")
    ] = "",
    threads: Annotated[int, typer.Option(help="Threads of PyTorch on the processor, 0 to 1024; 0 = all.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the op's draws, 0 to 2147483647.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder for sweep.json, sweep.md and sweep.png.")] = Path("hyperattention-sweep"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the sweep in --output, if there is one: what it holds is not measured again.")
    ] = False,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Load pickled weights (.bin).")] = False,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code of MODEL's directory.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Nats, KL and top-1 against the number of replaced layers, in both regimes, with the attention's speed at each point.

    sweep.json is written after every point. Ctrl-C ends after the point in progress (exit 130); --resume goes on, also with further
    lengths, methods and orders. Without it a sweep that is in --output already is replaced.
    """
    from hyperattention.export.console import Reporter
    from hyperattention.export.source import Trust
    from hyperattention.validate.bench_timing import stoppable
    from hyperattention.validate.regimes import TAIL
    from hyperattention.validate.sweep import sweep
    from hyperattention.validate.sweep_record import RECORD, check_output, open_record
    from hyperattention.validate.sweep_subject import Options, open_subject

    measured = tuple(dict.fromkeys(numbers("--lengths", lengths)))
    options = Options(
        model=model,
        text=text,
        configs=method_configs(names("--methods", methods, METHODS), attribute or []),
        orders=names("--orders", orders, ORDERS),
        lengths=measured,
        windows=windows,
        replaced=numbers("--replaced", replaced),
        tail=min([TAIL, *(length // 2 for length in measured)]) if tail is None else tail,
        device=device,
        dtype=dtype,
        input_ids=input_ids,
        seed=seed,
        threads=threads,
        trust=Trust(pickle=allow_pickle, code=trust_remote_code),
    )
    check_output(output)
    reporter = Reporter(quiet, as_json)
    if resume and not (output / RECORD).is_file():
        reporter.warn(f"--resume: {output} holds no {RECORD} to go on from; a new sweep begins there")
        resume = False
    with reporter.stage("sweep"):
        reporter.step("loading the model")
        subject = open_subject(options)
        record = open_record(subject, options, output, resume)
        with stoppable() as stopped:
            sweep(subject, options, record, reporter.counted, stopped)
            record.data["interrupted"] = stopped()
    written = record.finish()
    _say(record.data, written, reporter)
    if record.data["interrupted"]:
        raise typer.Exit(INTERRUPTED)


def _say(data: dict[str, Any], written: list[Path], reporter: "Reporter") -> None:
    """The last point of every line of the figure, and where everything is."""
    from rich.table import Table

    from hyperattention.validate.sweep_page import SUMMARY_HEADS, heading, summary

    if not reporter.quiet:
        reporter.out.print(heading(data), markup=False)
        shown = Table(*SUMMARY_HEADS, box=None, header_style="bold", pad_edge=False)
        for row in summary(data):
            shown.add_row(*row)
        reporter.out.print(shown)
        if data["interrupted"]:
            reporter.out.print(f"interrupted: {len(data['points'])} points were kept; --resume goes on", markup=False)
        reporter.out.print(f"Written: {', '.join(str(path) for path in written)}", markup=False)
    reporter.answer({**data, "files": [path.name for path in written]})
