"""The validation as a process of its own: its verdict, its steps, and its whole message whatever it ends in."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import tiny

from hyperattention.errors import BuildFailed, EnvironmentFault, ExportFailed, UsageError
from hyperattention.export import validation
from hyperattention.export.console import Reporter
from hyperattention.export.held_out import read_text
from hyperattention.export.load import inspect_source
from hyperattention.export.plan import make_plan

TABLE = "model.engine cannot run here:\n  TensorRT  built with 10.6  found 11.0\n  what to do: build it again"
VERDICT = {"verdict": {"headline": "The verdict."}, "gates": [{"name": "kl"}]}


class Steps(Reporter):
    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.seen: list[tuple[str, int | None, int | None]] = []

    def step(self, text: str, done: int | None = None, total: int | None = None) -> None:
        self.seen.append((text, done, total))


@dataclass(frozen=True)
class Ending:
    """What the process prints on standard output and ends with, and what the stage makes of it."""

    name: str
    code: int
    output: str
    error: type[Exception] | None
    message: str = ""

    def __str__(self) -> str:
        return self.name


ENDINGS = [
    Ending("passed", 0, json.dumps(VERDICT), None),
    Ending("gate", 1, json.dumps({**VERDICT, "error": "gates not met: kl", "exit_code": 1}), None, "gates not met: kl"),
    Ending("usage", 2, json.dumps({"error": "no text", "exit_code": 2}), UsageError, "no text"),
    Ending("table", 3, json.dumps({"error": TABLE, "exit_code": 3}), EnvironmentFault, TABLE),
    Ending("export", 4, json.dumps({"error": "no", "exit_code": 4}), ExportFailed, "no"),
    Ending("build", 5, json.dumps({"error": "no", "exit_code": 5}), BuildFailed, "no"),
    Ending("no-object", 3, "", EnvironmentFault, "the last line"),
    Ending("traceback", 1, "", RuntimeError, "the validation crashed:\nthe first line\nerror: the last line"),
    Ending("bug", 70, json.dumps({"error": "bug", "exit_code": 70}), RuntimeError, "the validation crashed:\nthe first line"),
    Ending("killed", -9, json.dumps(VERDICT), RuntimeError, "the validation crashed:"),
    Ending("another-object", 0, "[1]", RuntimeError, "the validation crashed:"),
]

PROGRAM = """
import os, pathlib, signal, sys
folder = pathlib.Path(sys.argv[1])
(folder / "report").mkdir()
(folder / "report" / "report.json").write_text(" ".join(sys.argv[2:]))
print("the first line\\n[  3/9    0.1 s] measuring\\nerror: the last line", file=sys.stderr)
sys.stdout.write({output!r})
sys.stdout.flush()
if {code} < 0:
    os.kill(os.getpid(), -{code})
sys.exit({code})
"""


@pytest.mark.parametrize("ending", ENDINGS, ids=str)
def test_endings(ending: Ending, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = PROGRAM.format(code=ending.code, output=ending.output)
    monkeypatch.setattr(validation, "VALIDATE", (sys.executable, "-S", "-c", program))
    steps = Steps()

    def run() -> dict[str, Any]:
        return validation.validate("the model", tmp_path, ("--lengths", "64"), steps)

    if ending.error is None:
        assert run() == {**VERDICT, "failed": ending.message or None}
    else:
        with pytest.raises(ending.error) as caught:
            run()
        assert str(caught.value).startswith(ending.message)
    assert (tmp_path / "report" / "report.json").read_text() == "--model the model --lengths 64 --json"
    assert steps.seen == [("measuring", 2, 9)]


def test_a_verdict_without_a_report_is_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "VALIDATE", (sys.executable, "-S", "-c", f"print({json.dumps(VERDICT)!r})"))
    with pytest.raises(RuntimeError, match="the validation crashed"):
        validation.validate("model", tmp_path, (), Steps())


def test_what_a_policy_was_not_chosen_on_has_to_hold_a_window(tmp_path: Path) -> None:
    source, text = inspect_source(tiny.save(tmp_path / "model")), tmp_path / "text.txt"
    text.write_bytes(bytes(n % source.vocab_size for n in range(999)))
    plan = make_plan(source, layers="odd", seq=(1, 512, 512), input_ids="bytes")
    sha256 = read_text(text, "bytes", tmp_path, source.vocab_size, 998).sha256
    for seen, longest in ((734, 264), (600, 398)):
        chosen, other = (replace(plan, policy={"calibration": {"sha256": told, "to": seen}}) for told in (sha256, "0" * 64))
        validation.Request(text=text, lengths=f"64,{longest}").check(source, chosen)
        more = validation.Request(text=text, lengths=f"64,{longest + 1}")
        with pytest.raises(UsageError, match=f"first {seen} tokens, and the {999 - seen} behind them hold no window of {longest + 1}"):
            more.check(source, chosen)
        more.check(source, other)
        replace(more, wanted=False).check(source, chosen)


def test_a_text_that_was_read_is_held_against_a_policy_unread(tmp_path: Path) -> None:
    source, text = inspect_source(tiny.save(tmp_path / "model")), tmp_path / "text.txt"
    text.write_bytes(bytes(n % source.vocab_size for n in range(999)))
    plan, asked = make_plan(source, seq=(1, 512, 512), input_ids="bytes"), validation.Request(text=text, lengths="512")
    read = asked.check(source, plan)
    assert read is not None and (read.name, read.tokens) == ("text.txt", 999)
    assert replace(asked, wanted=False).check(source, plan) is None and validation.Request(False).check(source, plan) is None
    text.unlink()
    enough, too_few = (replace(plan, policy={"calibration": {"sha256": read.sha256, "to": seen}}) for seen in (486, 487))
    assert asked.check(source, enough, read) is read
    with pytest.raises(UsageError, match="first 487 tokens, and the 512 behind them hold no window of 512"):
        asked.check(source, too_few, read)
    with pytest.raises(UsageError, match="does not exist"):
        asked.check(source, plan)


def test_without_lengths_the_text_has_to_hold_the_usual_one(tmp_path: Path) -> None:
    source, text = inspect_source(tiny.save(tmp_path / "model")), tmp_path / "text.txt"
    plan = make_plan(source, seq=(1, 1024, 1024), input_ids="bytes")  # the model itself holds 512
    text.write_bytes(b"!" * 513)
    validation.Request(text=text).check(source, plan)
    text.write_bytes(b"!" * 512)
    with pytest.raises(UsageError, match="text.txt has 512 tokens; the longest window needs 513"):
        validation.Request(text=text).check(source, plan)
