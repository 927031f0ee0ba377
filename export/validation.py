"""The stage validation: `hyperattention validate` as a process of its own, because imports go one way."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyperattention.errors import UsageError
from hyperattention.export import child
from hyperattention.export.bundle import REPORT
from hyperattention.export.choices import check_device
from hyperattention.export.console import Reporter
from hyperattention.export.entry import numbers
from hyperattention.export.gate_options import LANGUAGE, kind_of, parse_gates
from hyperattention.export.held_out import Extent, default_lengths, read_text, seen_tokens
from hyperattention.export.plan import ExportPlan
from hyperattention.export.source import Source

VALIDATE = (sys.executable, "-m", "hyperattention.validate", "run")


@dataclass(frozen=True)
class Request:
    """What the command line says of the validation; `further` are options that `hyperattention validate` takes as they are."""

    wanted: bool = True
    text: Path | None = None
    inputs: Path | None = None
    lengths: str = ""
    device: str = "auto"
    gates: tuple[str, ...] = ()
    further: tuple[str, ...] = ()

    def arguments(self) -> tuple[str, ...]:
        """The arguments behind `hyperattention validate OUT --model MODEL`."""
        return tuple(part for option in self._given() for part in option) + self.further

    def check(self, source: Source, plan: ExportPlan, read: Extent | None = None) -> Extent | None:
        """Before any work, what the validation would refuse only after the whole export. Raises UsageError and EnvironmentFault.

        Returns what it read of the text, None where it reads none. Given as `read` to the check of a plan that differs in its layers
        alone, that spares reading the text again.
        """
        if self.wanted and plan.input_ids == "bytes" and self.text is None and self.inputs is None:
            raise UsageError("--input-ids bytes: the validation needs held-out text; give --text FILE, or --no-validate")
        check_material(source, plan, self.text, self.inputs)
        parse_gates(self.gates, kind_of(plan.task))
        low, high, lengths = max(2, plan.seq[0]), plan.seq[2], numbers("--lengths", self.lengths)
        for length in lengths:
            if not low <= length <= high:
                raise UsageError(f"--lengths names {length}; the plan takes {low} to {high} (--min-seq, --max-seq)")
        if self.wanted and self.text is not None:
            longest = max(lengths or default_lengths(low, min(high, source.max_positions or high)))
            read = read or read_text(self.text, plan.input_ids, Path(source.model), source.vocab_size, longest).extent
            seen_tokens(read, plan.policy, longest)
        check_device(self.device)
        return read

    def idle_options(self, searched: bool) -> list[str]:
        """One sentence for each option given that nothing reads; where a policy is `searched`, that reads the text and the device."""
        read = ("--text", "--device") if searched else ()
        idle = dict.fromkeys(option for option, value in self._given() if value != "auto" and option not in read)
        return [f"{option} has no effect: --no-validate measures nothing" for option in idle] if not self.wanted else []

    def _given(self) -> list[tuple[str, str]]:
        """The options and their values."""
        values = (("--text", self.text), ("--inputs", self.inputs), ("--lengths", self.lengths or None), ("--device", self.device))
        return [(option, str(value)) for option, value in values if value is not None] + [("--gate", limit) for limit in self.gates]


def reads_text(source: Source, plan: ExportPlan) -> bool:
    """Whether the model is measured on token ids made of text."""
    return "input_ids" in (entry.name for entry in plan.inputs) and source.kind in ("language", "encoder")


def check_material(source: Source, plan: ExportPlan, text: Path | None, inputs: Path | None) -> None:
    """Raises UsageError where --text or --inputs is not what the model reads."""
    if inputs is not None and kind_of(plan.task) == LANGUAGE:
        raise UsageError(f"--inputs is for --task features and for functions; a language model ({plan.task}) is judged on --text FILE")
    if inputs is not None and text is not None:
        raise UsageError("--text and --inputs are given together; give the one that holds what the model reads")
    if text is not None and not reads_text(source, plan):
        names = ", ".join(entry.name for entry in plan.inputs)
        raise UsageError(f"--text is for models that read text; {source.name} reads {names}: give real ones with --inputs FILE.npz")


def validate(model: str, folder: Path, options: tuple[str, ...], reporter: Reporter) -> dict[str, Any]:
    """Measures `folder` and writes its report: {"verdict", "gates", "failed": the message of the gates that failed, or None}.

    Raises what the validation ended in, with its whole message.
    """
    ended = child.run([*VALIDATE, str(folder), "--model", model, *options, "--json"], reporter, "the validation")
    found = ended.found
    # Python ends with 1 after a traceback too; only the verdict tells a failed gate from that.
    if ended.code not in (0, 1) or "verdict" not in found or not (folder / REPORT).is_file():
        raise ended.crash()
    return {"verdict": found["verdict"], "gates": found.get("gates", []), "failed": ended.message if ended.code == 1 else None}
