"""What every command has: help with an example, completion, version, quiet, JSON, colours, progress, Ctrl-C, and its exit codes."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from commands import MAIN, contents, finished, run
from rich.console import Console

from hyperattention.errors import AccuracyFailed
from hyperattention.export import choices, entry, interrupt
from hyperattention.export.console import Reporter, duration, numbered
from hyperattention.validate import cli
from hyperattention.validate.backends import BACKENDS
from hyperattention.validate.report import write

ROOT = Path(__file__).resolve().parents[1]
MODULE = {"export-model": "hyperattention.export", "hyperattention": "hyperattention.validate"}
HANGS = 600  # seconds; on a busy machine with a cold disk the imports alone take many
COMMANDS = [("export-model",), *(("hyperattention", name) for name in cli.COMMANDS)]


def environment(**more: str) -> dict[str, str]:
    plain = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS")}
    return {**plain, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "200", **more}


def call(command: str, *arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
    """A command as a process of its own."""
    words = [sys.executable, "-m", MODULE[command], *map(str, arguments)]
    return subprocess.run(words, env=environment(**more), capture_output=True, text=True, timeout=HANGS, check=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("cli") / "model")


@pytest.fixture(scope="module")
def out(model: Path) -> Path:
    return finished(model, model.parent / "out")


# --- help, version, completion ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_ends_with_an_example_and_the_exit_codes(command: tuple[str, ...], capfd: pytest.CaptureFixture[str]) -> None:
    result = run(capfd, *command, "--help")
    text = " ".join(result.out.split())
    assert result.code == 0 and f"Example: {' '.join(command)}" in text
    assert "Exit codes: 0 done, 1 an accuracy gate was not met, 2 usage, 3 environment, 4 export, 5 engine build, 70" in text
    assert "--json" in text and "--quiet" in text and "-q" in text


def test_help_names_every_exit_code_there_is() -> None:
    codes = {int(code) for code in re.findall(r"(\d+) [a-z]", entry.EXIT_CODES)}
    errors = {kind.exit_code for kind in vars(sys.modules["hyperattention.errors"]).values() if hasattr(kind, "exit_code")}
    assert codes == {0, *errors, entry.INTERNAL_ERROR, interrupt.EXIT_CODE}


def test_options_in_examples_exist(capfd: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        shown = run(capfd, *command, "--help").out
        example = shown.partition("Example:")[2].partition("Exit codes:")[0]
        assert all(option in shown.partition("Example:")[0] for option in re.findall(r"--[a-z-]+", example)), command


@pytest.mark.parametrize("command", MAIN)
def test_version(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(capfd, command, "--version").out == f"{command} {importlib.metadata.version('hyperattention')}\n"


@pytest.mark.parametrize("command", MAIN)
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(shell: str, command: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shellingham.detect_shell", lambda: (shell, f"/bin/{shell}"))
    result = run(capfd, command, "--show-completion")
    variable = f"_{command.replace('-', '_').upper()}_COMPLETE"
    assert result.code == 0 and variable in result.out and command in result.out
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=result.out, text=True, check=True)


@pytest.mark.parametrize("words, found", [
    (("export-model", "--keep"), "--keep-exact"),
    (("export-model", "m", "out", "--preset", "pa"), "paper"),
    (("export-model", "m", "out", "--dtype", "b"), "bf16"),
    (("hyperattention", "ins"), "inspect"),
    (("hyperattention", "validate", "--back"), "--backend"),
    (("hyperattention", "validate", "out", "--backend", "t"), "tensorrt"),
], ids=lambda value: value if isinstance(value, str) else value[-1])  # fmt: skip
def test_completion_completes(
    words: tuple[str, ...], found: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"_{words[0].replace('-', '_').upper()}_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", " ".join(words))
    monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
    assert run(capfd, words[0]).out.split() == [found]


@pytest.mark.parametrize("line, values", [
    ("export-model m out --dtype", choices.DTYPES),
    ("export-model m out --keep-exact", choices.KEEP_EXACT),
    ("export-model m out --input-ids", choices.INPUT_IDS),
    ("export-model m out --device", choices.DEVICES),
    ("export-model m out --task", (*choices.LANGUAGE_TASKS, choices.FEATURES)),
    ("hyperattention validate out --device", choices.DEVICES),
    ("hyperattention validate out --backend", BACKENDS),
    ("hyperattention bench --dtype", choices.DTYPES),
    ("hyperattention sweep m --input-ids", choices.INPUT_IDS),
])  # fmt: skip
def test_completion_knows_every_value(
    line: str, values: tuple[str, ...], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = line.split()[0]
    monkeypatch.setenv(f"_{command.replace('-', '_').upper()}_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line + " ")
    monkeypatch.setenv("COMP_CWORD", str(len(line.split())))
    assert run(capfd, command).out.split() == list(values)


def test_no_command_names_them_all(capfd: pytest.CaptureFixture[str]) -> None:
    result = run(capfd, "hyperattention")
    assert result.code == 2 and all(name in result.err for name in cli.COMMANDS)


# --- quiet, JSON, colours -----------------------------------------------------------------------------------------------


def test_quiet_leaves_the_exit_code_alone_to_tell(out: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for arguments in (("inspect", out), ("compare", out, out), ("doctor",)):
        result = run(capfd, "hyperattention", *arguments, "--quiet")
        assert result.out == "" and "Traceback" not in result.err and result.code in (0, 3), arguments


def test_json_is_one_object_alone_on_standard_output(out: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for arguments, key in ((("inspect", out), "policy"), (("compare", out, out), "names"), (("doctor",), "checks")):
        result = run(capfd, "hyperattention", *arguments, "--json")
        found = json.loads(result.out)
        assert isinstance(found, dict) and result.out.count("\n") == 1 and key in found, arguments


def test_an_error_adds_to_what_was_found(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise AccuracyFailed("gates not met: kl", {"verdict": {"safe": False}, "worst": float("nan")})

    monkeypatch.setattr("hyperattention.validate.cli.app", fails)
    result = run(capfd, "hyperattention", "--json")
    assert result.code == 1 and result.err == "error: gates not met: kl\n"
    assert json.loads(result.out) == {"verdict": {"safe": False}, "worst": "nan", "error": "gates not met: kl", "exit_code": 1}


@pytest.mark.parametrize(
    "error, code, words",
    [
        (OSError(28, "No space left on device", "out/model.onnx"), 3, "No space left on device (out/model.onnx)"),
        (PermissionError(13, "Permission denied", "out"), 3, "Permission denied (out)"),
        (OSError(36, "File name too long", "xxx"), 2, "xxx is too long for the file system"),
        (MemoryError(), 3, "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 3, "out of memory"),
        (ModuleNotFoundError("No module named 'onnxscript'", name="onnxscript"), 3, "onnxscript is not installed; pip install 'onnxscript"),
        (ImportError("cannot import name 'x' from 'onnx.y'", name="onnx.y"), 3, "onnx cannot be used (cannot import name 'x' from"),
        (ModuleNotFoundError("No module", name="hyperattention.x"), 70, "internal error, a bug: ModuleNotFoundError: No module"),
        (RuntimeError("something else"), 70, "internal error, a bug: RuntimeError: something else"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_what_the_machine_refuses_is_no_bug(
    error: Exception, code: int, words: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("hyperattention.validate.cli.app", fails)
    result = run(capfd, "hyperattention")
    assert result.code == code and words in result.said and ("Traceback" in result.err) == (code == 70)


def on_a_terminal(*words: str, **more: str) -> str:
    """What a command shows on a terminal, control characters and all."""
    terminal, end = pty.openpty()
    process = subprocess.Popen([sys.executable, "-m", *words], env=environment(**more), stdin=end, stdout=end, stderr=end)
    os.close(end)
    shown = b""
    while True:
        try:
            part = os.read(terminal, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(terminal)
    process.wait(HANGS)
    return shown.decode()


def test_colours_only_on_a_terminal_and_not_with_no_color() -> None:
    words = ("hyperattention.validate", "valdate")
    colour = re.compile(r"\x1b\[[0-9;]*3[0-9]")
    assert colour.search(on_a_terminal(*words))
    assert not colour.search(on_a_terminal(*words, NO_COLOR="1"))
    assert "\x1b" not in call("hyperattention", "valdate").stderr
    assert "\x1b" not in call("hyperattention", "--help").stdout


def test_a_reader_that_goes_away_is_no_failed_gate() -> None:
    words = [sys.executable, "-m", "hyperattention.validate", "--help"]
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.Popen(words, env=environment(), stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    _, said = process.communicate(timeout=HANGS)
    assert process.returncode == 141 and said == ""


# --- progress -----------------------------------------------------------------------------------------------------------


def test_without_a_terminal_a_step_is_a_line(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("hyperattention.export.console.time.perf_counter", lambda: now[0])
    reporter = Reporter()
    with reporter.stage("validation"):
        step = reporter.counted(3)
        for name in ("one", "two [x]", "three", "one more"):
            step(name)
            now[0] += 60
    lines = capfd.readouterr().err.splitlines()
    assert lines[1:] == [
        "[  1/3    0.0 s] one",
        "[  2/3   60.0 s, about 2 min 0 s left] two [x]",
        "[  3/3  120.0 s, about 1 min 0 s left] three",
        "[  4/4  180.0 s, about 1 min 0 s left] one more",
    ]
    assert [numbered(line) for line in lines] == [None, ("one", 0, 3), ("two [x]", 1, 3), ("three", 2, 3), ("one more", 3, 4)]


def test_on_a_terminal_a_bar_with_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("hyperattention.export.console.time.perf_counter", lambda: now[0])
    reporter = Reporter()
    reporter.errors = Console(force_terminal=True, width=120, record=True, file=open(os.devnull, "w"))
    with reporter.stage("validation"):
        step = reporter.counted(4)
        step("first")
        now[0] += 30
        step("second")
        assert reporter._progress is not None
        reporter.errors.print(reporter._progress.get_renderable())
    shown = reporter.errors.export_text()
    assert "second" in shown and "about 1 min 30 s left" in shown


@pytest.mark.parametrize("seconds, text", [(0.2, "1 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7530, "2 h 5 min")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# --- Ctrl-C and half-written files --------------------------------------------------------------------------------------

# What each command calls once it has read its options.
PLACES = {
    "validate": "hyperattention.validate.run.check_model_fits",
    "report": "hyperattention.validate.report.read",
    "compare": "hyperattention.validate.compare_folders.compare",
    "inspect": "hyperattention.validate.inspect_folder.describe",
    "doctor": "hyperattention.doctor.collect",
    "bench": "hyperattention.validate.bench_outcome.open_subject",
    "sweep": "hyperattention.validate.sweep_subject.open_subject",
    "policy": "hyperattention.validate.policy.prepare.open_source",
}


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_interrupted(command: str, model: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a copy of this process, which has everything imported."""
    asleep, begun = os.pipe()

    def sleep(*_: object, **__: object) -> None:
        usual = signal.getsignal(signal.SIGINT)
        os.write(begun, b"asleep")
        while signal.getsignal(signal.SIGINT) is usual:
            time.sleep(0.01)
        os.write(begun, b"asleep")  # a Ctrl-C was heard, and asked bench to end after the run in progress
        time.sleep(HANGS)

    monkeypatch.setattr(PLACES[command], sleep)
    monkeypatch.chdir(tmp_path)
    measured = [model, "--text", model]
    arguments = {"validate": [out, "--model", model], "compare": [out, out], "sweep": measured, "policy": measured, "doctor": []}
    given = arguments.get(command, [out])
    before = contents(out)
    answer, said = (tmp_path.parent / f"{tmp_path.name}.{name}" for name in ("answer", "said"))
    child = os.fork()
    if child == 0:
        gc.freeze()  # what others left behind may wait, when it is freed, for threads that the copy lacks
        signal.alarm(HANGS)  # ends a copy that hangs
        for number, file in ((1, answer), (2, said)):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        try:
            cli.main([command, *map(str, given), "--json"])
        finally:
            os._exit(99)
    os.close(begun)  # the copy alone has it, so that its end is seen
    for _ in range(2 if command == "bench" else 1):
        assert os.read(asleep, 6) == b"asleep", said.read_text()
        os.kill(child, signal.SIGINT)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(asleep)
    assert code == 130, said.read_text()
    assert said.read_text().splitlines()[-1].startswith("interrupted") and "Traceback" not in said.read_text()
    assert json.loads(answer.read_text())["exit_code"] == 130
    assert contents(out) == before and list(tmp_path.iterdir()) == []


def test_a_signal_waits_for_what_belongs_together() -> None:
    done: list[str] = []
    before = signal.signal(signal.SIGINT, lambda *_: done.append("interrupted"))
    try:
        with interrupt.deferred():
            signal.raise_signal(signal.SIGINT)
            done.append("written")
        assert done == ["written", "interrupted"]
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_undoing_that_fails_is_said_and_the_others_happen(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    done: list[object] = []
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(os, "_exit", done.append)
    with interrupt.undoing(lambda: done.append("undone")), interrupt.undoing(lambda: str(1 // 0)):
        interrupt._leave(False)
    said = capfd.readouterr().err
    assert done == ["undone", 130] and "not everything was undone (ZeroDivisionError" in said and "nothing was left" not in said


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyperattention.validate.report.render", lambda report, template: "new")
    (tmp_path / "report.json").write_text("old")
    real, written = Path.write_text, []

    def full(self: Path, *arguments: object, **options: object) -> int:
        written.append(self)
        if len(written) == 3:
            real(self, "ha")
            raise OSError(28, "No space left on device", str(self))
        return real(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write({"kind": "language"}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"] and (tmp_path / "report.json").read_text() == "old"
