"""`hyperattention policy MODEL`: choose layers and settings under a budget, prove the choice, write policy.json."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.markup import escape

from hyperattention.export import budget as budgets
from hyperattention.export.choices import DEVICES, DTYPES, INPUT_IDS
from hyperattention.export.entry import AsJson, Quiet, one_of

EXAMPLE = "hyperattention policy models/byte-lm-4m --input-ids bytes --text held-out.txt --budget nats=0.005 --out policy.json"


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A directory as transformers saves it: a language model.")],
    text: Annotated[Path, typer.Option(help="Plain text; its first part is measured, the rest is left for the report to judge on.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="What to write, for export-model --policy.")] = Path("policy.json"),
    budget: Annotated[
        Optional[list[str]], typer.Option(metavar="NAME=VALUE", help=budgets.help_text() + f" (default: {budgets.DEFAULT})")
    ] = None,
    budget_regime: Annotated[
        str, typer.Option(autocompletion=one_of(*budgets.JUDGED), help="Where it holds: both, all_positions or prefill_exact_decode.")
    ] = budgets.BOTH,
    budget_cost: Annotated[
        str,
        typer.Option(autocompletion=one_of(*budgets.COSTS), help="What is saved: keys, time of the op here, or auto (time with speedup=)."),
    ] = "auto",
    length: Annotated[
        Optional[int],
        typer.Option(help="Tokens of a window, 2 to 16777216. (default: the model's own, at most 32768 with CUDA, 8192 without)"),
    ] = None,
    windows: Annotated[int, typer.Option(help="Windows that the joint choice is run on, 1 to 1024.")] = 2,
    tail: Annotated[
        Optional[int],
        typer.Option(help="Positions that attend exactly after an approximate prefill, 1 to half of --length. (default: at most 512)"),
    ] = None,
    probes: Annotated[
        Optional[int],
        typer.Option(help="Settings that each layer alone is run through the whole model with, 1 to 64. (default: 4 with CUDA, 2 without)"),
    ] = None,
    rivals: Annotated[
        int,
        typer.Option(
            help="Settings of equal keys that are run beside the policy on text it was not chosen on: as many of a family, 0 to 64."
        ),
    ] = 0,
    fix: Annotated[
        Optional[list[str]], typer.Option(metavar="NAME=VALUE", help="An attribute of the op that is not searched, repeatable.")
    ] = None,
    input_ids: Annotated[
        str, typer.Option("--input-ids", autocompletion=one_of(*INPUT_IDS), help="tokens, or bytes for a model that reads bytes.")
    ] = "tokens",
    dtype: Annotated[
        Optional[str],
        typer.Option(
            autocompletion=one_of(*DTYPES), help="fp32, fp16 or bf16; without CUDA fp32. (default: with CUDA the model's half type)"
        ),
    ] = None,
    device: Annotated[str, typer.Option(autocompletion=one_of(*DEVICES), help="auto, cpu or cuda.")] = "auto",
    seed: Annotated[int, typer.Option(help="Base seed of the export that will follow, 0 to 2146435071.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Take over what an earlier run measured (FILE with .jsonl behind it).")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be measured; write nothing.")] = False,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Load pickled weights (.bin), which can run code.")] = False,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code that lies in the model's directory.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Choose layers and settings under a budget, prove the choice by whole forward passes, write FILE. Exit 1: not reached."""
    from hyperattention.export import interrupt
    from hyperattention.export.console import Reporter
    from hyperattention.export.policy import write_policy
    from hyperattention.export.source import Trust
    from hyperattention.validate.policy.fixed import parse_fixed
    from hyperattention.validate.policy.place import check_out, measurements
    from hyperattention.validate.policy.prepare import Options, prepare
    from hyperattention.validate.policy.store import Store
    from hyperattention.validate.policy.write import as_policy, finished, lines

    reporter = Reporter(quiet, as_json)
    check_out(out, text, model)
    options = Options(
        model=model,
        text=text,
        budget=budgets.parse_budget(budget or [], budget_regime, budget_cost),
        length=length,
        windows=windows,
        tail=tail,
        probes=probes,
        input_ids=input_ids,
        dtype=dtype,
        device=device,
        seed=seed,
        fixed=parse_fixed(fix or []),
        rivals=rivals,
        trust=Trust(pickle=allow_pickle, code=trust_remote_code),
    )
    prepared = prepare(options, lambda text: reporter.say(escape(text)))
    planned = {"budget": options.budget.to_json(), "calibration": prepared.describe(), "settings": len(prepared.candidates)}
    for line in prepared.lines():
        reporter.say(escape(line))
    for warning in prepared.warnings():
        reporter.warn(warning)
    if dry_run:
        reporter.answer(planned)
        return
    if resume and (found := finished(prepared, out)) is not None:
        reporter.say(f"{escape(str(out))}: taken over, nothing that it was measured on changed")
        reporter.answer({**planned, "policy": found.to_json(), "measured": 0, "taken_over": 1})
        return
    measured = measurements(out)
    store = Store(measured, prepared.fingerprint(), resume)
    held = len(store.found)
    kept = f"what was measured is kept in {measured}; --resume goes on from there"
    with reporter.stage("policy"), interrupt.undoing(lambda: kept if store.made else None):
        search = prepared.search(store, reporter.step)
        search.step = reporter.counted(search.count_steps() + prepared.count_rivals())
        policy = as_policy(prepared, search, search.run())
    write_policy(policy, out)
    if held and not store.reused:
        reporter.warn(
            f"{measured}: its measurements ({held}) are of another model, text, calibration (length, windows, tail, type, seed, planted "
            f"keys), build or kind of machine; none was taken over"
        )
    for line in lines(policy):
        reporter.say(escape(line))
    reporter.say(f"{escape(str(out))}: {store.made} measurements made, {store.reused} taken over")
    reporter.answer({**planned, "policy": policy.to_json(), "measured": store.made, "taken_over": store.reused})
