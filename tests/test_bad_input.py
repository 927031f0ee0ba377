"""Bad input of both commands: the message, the exit code, no traceback, and nothing left behind or changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import commands
import pytest
import tiny
from bad_inputs import BAD
from commands import contents, run
from mistakes import TOWER, Bad, Place

ROOT = Path(__file__).resolve().parents[1]
# A message ends with what to do: after a semicolon, or as a whole clause of its own.
ADVICE = ("; ", "give ", "takes ", "run ", "export again", "read it", "use ")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("bad") / "whole")


@pytest.fixture(scope="module")
def finished(whole: Path) -> Path:
    return commands.finished(whole, whole.parent / "finished")


@pytest.fixture(scope="module")
def tower(whole: Path) -> Path:
    (whole.parent / "tower.py").write_text(TOWER)
    return commands.finished(f"{whole.parent / 'tower.py'}:build", whole.parent / "tower", "--layers", "0")


def test_each_case_has_a_name_of_its_own() -> None:
    names = [case.name for case in BAD]
    assert len(set(names)) == len(names) >= 60


@pytest.mark.parametrize("case", BAD, ids=str)
def test_bad_input(
    case: Bad, whole: Path, finished: Path, tower: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path, whole, finished, tower)
    arguments = [argument if isinstance(argument, str) else argument(place) for argument in case.arguments]
    if case.patch is not None:
        case.patch(monkeypatch, place)
    before = contents(tmp_path), contents(whole.parent)
    result = run(capfd, case.command, *arguments, "--json")
    assert result.code == case.code, result.err
    message = json.loads(result.out)["error"]
    assert json.loads(result.out)["exit_code"] == case.code
    assert case.words in message
    assert any(words in message for words in ADVICE), f"what to do next? {message}"
    assert "Traceback" not in result.err and " ".join(message.split()) in result.said
    assert (contents(tmp_path), contents(whole.parent)) == before, "something was left behind, or changed"


@pytest.mark.parametrize("command, words", [
    (("hyperattention.export", "nowhere", "out"), "there is no nowhere"),
    (("hyperattention.validate", "report", "nowhere"), "cannot be read"),
], ids=lambda value: value[0] if isinstance(value, tuple) else None)  # fmt: skip
def test_a_process_of_its_own_ends_without_a_traceback(command: tuple[str, ...], words: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and words in done.stderr and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_validation_without_polygraphy_says_what_to_install(finished: Path, whole: Path) -> None:
    # A process of its own: in this one the modules that import it are loaded already.
    hidden = "import sys; sys.modules['polygraphy'] = None; from hyperattention.validate.cli import main; main(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", hidden, "validate", finished, "--model", whole], env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 3 and "Traceback" not in done.stderr
    assert "polygraphy is not installed; pip install 'polygraphy" in " ".join(done.stderr.split())
