"""export-model that is interrupted, killed or out of disk at each of its stages, and two at once: OUT is whole or visibly not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from export_runs import HANGS, STAGES, Run
from tiny import save

from hyperattention.export import disk, folder
from hyperattention.export.bundle import Bundle

ROOT = Path(__file__).resolve().parents[1]
# What is finished when a run comes to the stage.
FINISHED = {"engine": ["ONNX", "side files"]}
FINISHED |= {"validation": [*FINISHED["engine"], "engine"], "manifest": [*FINISHED["engine"], "engine", "validation"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("interrupt") / "model")


def entries(parent: Path) -> dict[str, bytes]:
    """Everything below `parent`, by name."""
    return {path.relative_to(parent).as_posix(): path.read_bytes() if path.is_file() else b"" for path in parent.rglob("*")}


def left(parent: Path) -> list[str]:
    return sorted(path.name for path in parent.iterdir())


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


def is_whole(out: Path) -> bool:
    return Bundle.open(out).changed_files() == []


@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c_at_a_stage(stage: str, model: Path, tmp_path: Path, place: Path) -> None:
    out = place / "out"
    assert Run(tmp_path, model, out, "--seed", 1).end() == 0
    before = entries(place)

    run = Run(tmp_path, model, out, "--seed", 2, pause=stage)
    run.wait_for_pause()
    assert run.send(signal.SIGINT) == 130
    assert run.said().endswith("interrupted; nothing was left behind") and "Traceback" not in run.said()
    assert entries(place) == before, "something was left behind, or OUT was touched"

    run = Run(tmp_path, model, out, "--seed", 2, "--resume", "--json", pause=stage)
    run.wait_for_pause()
    assert run.send(signal.SIGINT) == 130
    kept = FINISHED.get(stage, [])
    assert run.answer()["exit_code"] == 130 and "Traceback" not in run.said()
    assert (f"kept in {place}/.out.partial: {', '.join(kept)}; run the same command again" in run.said()) == bool(kept)
    assert left(place) == ([".out.partial", "out"] if kept else ["out"])
    assert {name: data for name, data in entries(place).items() if name.split("/")[0] == "out"} == before

    run = Run(tmp_path, model, out, "--seed", 2, "--resume", "--json")
    assert run.end() == 0, run.said()
    assert [name for name in run.answer()["reused"] if name in kept] == kept
    assert left(place) == ["out"] and is_whole(out) and Bundle.open(out).plan.seed == 2


@pytest.mark.parametrize("stage", ["ONNX", "validation"])
def test_a_killed_run_is_visible_and_the_next_one_clears_it(stage: str, model: Path, tmp_path: Path, place: Path) -> None:
    out = place / "out"
    run = Run(tmp_path, model, out, pause=stage)
    waiting = run.wait_for_pause()
    assert run.send(signal.SIGKILL) == -signal.SIGKILL
    assert left(place) == [".out.lock", ".out.partial"], "OUT must not be there"
    deadline = time.monotonic() + HANGS
    while waiting != run.pid and Path(f"/proc/{waiting}").exists() and "Z" not in _state(waiting):
        assert time.monotonic() < deadline, "the validation outlived the export, and would write into the next one's folder"
        time.sleep(0.01)
    assert Run(tmp_path, model, out).end() == 0
    assert left(place) == ["out"] and is_whole(out)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "Z"


def test_a_killed_run_is_gone_on_from(model: Path, tmp_path: Path, place: Path) -> None:
    out = place / "out"
    run = Run(tmp_path, model, out, pause="validation")
    run.wait_for_pause()
    run.send(signal.SIGKILL)
    run = Run(tmp_path, model, out, "--resume", "--json")
    assert run.end() == 0 and run.answer()["reused"] == FINISHED["validation"]
    assert left(place) == ["out"] and is_whole(out) and not (out / "report" / "half").exists()


def test_two_exports_into_one_out(model: Path, tmp_path: Path, place: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    out = place / "out"
    first = Run(tmp_path / "a", model, out, pause="engine")
    first.wait_for_pause()
    before = entries(place)
    second = Run(tmp_path / "b", model, place / "." / "out", "--resume")
    assert second.end() == 2
    assert f"another export-model (process {first.pid}) is writing OUT {out}" in second.said()
    assert entries(place) == before, "the second run touched the folder of the first"
    assert first.send(signal.SIGTERM) == 130 and left(place) == []


def test_a_closed_terminal_leaves_nothing_behind(model: Path, tmp_path: Path, place: Path) -> None:
    run = Run(tmp_path, model, place / "out", pause="engine")
    run.wait_for_pause()
    assert run.send(signal.SIGHUP) == 130 and left(place) == []


def test_an_export_that_nohup_started_outlives_its_terminal(model: Path, tmp_path: Path, place: Path) -> None:
    run = Run(tmp_path, model, place / "out", pause="engine", nohup=True)
    run.wait_for_pause()
    os.kill(run.pid, signal.SIGHUP)
    run.process.join(0.5)
    assert run.process.is_alive()
    assert run.send(signal.SIGTERM) == 130 and left(place) == []


# --- full disk -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["ONNX", "engine", "manifest"])
def test_a_full_disk(stage: str, model: Path, tmp_path: Path, place: Path) -> None:
    out = place / "out"
    assert Run(tmp_path, model, out, "--seed", 1).end() == 0
    before = entries(place)
    run = Run(tmp_path, model, out, "--seed", 2, "--json", full=stage)
    assert run.end() == run.answer()["exit_code"] == 3
    assert "the disk of OUT is full (No space left on device)" in run.said() and "free some" in run.said() and "Traceback" not in run.said()
    assert entries(place) == before
    assert Run(tmp_path, model, out, "--seed", 2).end() == 0
    assert left(place) == ["out"] and is_whole(out) and Bundle.open(out).plan.seed == 2


def test_a_full_disk_with_resume_keeps_what_is_finished(model: Path, tmp_path: Path, place: Path) -> None:
    run = Run(tmp_path, model, place / "out", "--resume", full="engine")
    assert run.end() == 3 and "kept in" in run.said() and "ONNX, side files" in run.said()
    run = Run(tmp_path, model, place / "out", "--resume", "--json")
    assert run.end() == 0 and run.answer()["reused"] == FINISHED["engine"] and left(place) == ["out"]


@pytest.mark.parametrize("limit", [2_000, 100_000], ids=["first-onnx-file", "library"])
def test_no_stand_in_may_write_more_than_there_is_room(limit: int, model: Path, tmp_path: Path, place: Path) -> None:
    """The real stages, where the kernel refuses what goes past `limit`."""
    run = Run(tmp_path, model, place / "new" / "out", "--no-validate", limit=limit)
    assert run.end() == 3, run.said()
    assert "the disk of OUT is full (File too large)" in run.said() and left(place) == []


def test_too_little_room_is_said_before_any_work(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = os.statvfs_result((4096, 4096, 100, 100, 10, 100, 100, 100, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: free)
    disk.check(place / "not" / "there", 40960)
    disk.check(place, 50000, there=9040)
    with pytest.raises(disk.EnvironmentFault, match=r"has 40.0 KiB free, the export needs about 40.0 KiB \(40961 bytes\)"):
        disk.check(place / "not" / "there", 40961)


# --- the command itself ----------------------------------------------------------------------------------------------


def test_sigterm_to_the_command(model: Path, tmp_path: Path) -> None:
    """With its own start, no stand-ins, and folders that have to be made."""
    out = tmp_path / "new" / "out"
    command = [sys.executable, "-m", "hyperattention.export", str(model), str(out), "--no-validate", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + HANGS
    while not list(tmp_path.glob("new/.out.partial")):
        assert process.poll() is None and time.monotonic() < deadline, "the work folder never appeared"
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said, error = process.communicate(timeout=HANGS)
    assert process.returncode == json.loads(said)["exit_code"] == 130, error
    assert "interrupted" in error and "Traceback" not in error
    assert left(tmp_path) == []


def test_a_swap_that_the_file_system_cannot_do(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Path) -> None:
        raise OSError(folder.errno.EINVAL, "no exchange")

    monkeypatch.setattr(folder, "_exchange", refuse)
    for text in ("first", "second"):
        with folder.output_folder(place / "out") as work:
            (work / "file").write_text(text)
            (work / "manifest.json").write_text(json.dumps(dict(schema=2, plan={}, versions={}, files={"file": {}, "stages.json": {}})))
        assert (place / "out" / "file").read_text() == text and left(place) == ["out"]
    # Killed between the two renames.
    (place / "out").rename(place / ".out.old")
    with pytest.raises(ZeroDivisionError), folder.output_folder(place / "out"):
        raise ZeroDivisionError
    assert (place / "out" / "file").read_text() == "second" and left(place) == ["out"]
