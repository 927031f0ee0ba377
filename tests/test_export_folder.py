"""The output folder: whole, kept with a failed gate's report, or gone."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest

from hyperattention.config import Config
from hyperattention.errors import AccuracyFailed, EnvironmentFault, UsageError
from hyperattention.export.bundle import MANIFEST, Bundle, finish, write_draft
from hyperattention.export.folder import output_folder
from hyperattention.export.lock import Lock
from hyperattention.export.plan import ExportPlan, LayerPlan
from hyperattention.export.stages import RECORDS, Stages


def left_behind(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_output_folder_keeps_what_a_failed_gate_left(tmp_path: Path) -> None:
    with pytest.raises(AccuracyFailed), output_folder(tmp_path / "out") as work:
        (work / "file").write_text("x")
        raise AccuracyFailed("gate")
    assert left_behind(tmp_path) == ["out"] and left_behind(tmp_path / "out") == ["file", RECORDS]


@pytest.mark.parametrize("error", [EnvironmentFault("x"), KeyboardInterrupt(), ZeroDivisionError()], ids=lambda e: type(e).__name__)
def test_output_folder_vanishes_otherwise(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)), output_folder(tmp_path / "a" / "b" / "out") as work:
        (work / "file").write_text("x")
        raise error
    assert left_behind(tmp_path) == []


def finished(folder: Path, **changes: Any) -> Path:
    """A finished output without model files; `changes` are edits of its manifest, None leaves an entry out."""
    folder.mkdir(exist_ok=True)
    (folder / "model.onnx").write_text("model")
    layers = (LayerPlan(0, "attention", "exact", "", Config().exact()),)
    plan = ExportPlan("logits", "fp32", layers, (), (), {}, (1, 8, 8), (1, 1, 1), "tokens", 0, "blocks", "op")
    write_draft(folder, plan, {}, None, {})
    manifest = {**finish(folder), **changes}
    (folder / MANIFEST).write_text(json.dumps({name: value for name, value in manifest.items() if value is not None}))
    return folder


@pytest.mark.parametrize("name", ["thesis.txt", "notes/thesis.txt", "model.onnx.bak"])
def test_a_finished_output_with_a_users_file_is_not_replaced(name: str, tmp_path: Path) -> None:
    out = finished(tmp_path / "out")
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("mine")
    with pytest.raises(UsageError, match=f"holds {name}, which export-model did not write"), output_folder(out):
        pytest.fail("work was begun")
    assert left_behind(tmp_path) == ["out"] and (out / name).read_text() == "mine"


def test_a_file_that_arrives_during_the_run_is_kept(tmp_path: Path) -> None:
    out = finished(tmp_path / "out")
    with pytest.raises(UsageError, match="holds late.txt"), output_folder(out) as work:
        (work / "file").write_text("x")
        (out / "late.txt").write_text("mine")
    assert left_behind(tmp_path) == ["out"] and (out / "late.txt").read_text() == "mine"


def test_a_finished_output_with_a_newer_report_is_replaced(tmp_path: Path) -> None:
    out = finished(tmp_path / "out")
    (out / "report").mkdir()
    (out / "report" / "report.html").write_text("newer")
    with output_folder(out) as work:
        (work / "file").write_text("x")
    assert left_behind(tmp_path) == ["out"] and left_behind(out) == ["file", RECORDS]


@pytest.mark.parametrize("schema", [0, 1, 99])
def test_an_output_of_another_version_is_replaced(schema: int, tmp_path: Path) -> None:
    out = finished(tmp_path / "out", schema=schema)
    with output_folder(out) as work:
        (work / "file").write_text("x")
    assert left_behind(out) == ["file", RECORDS]


@pytest.mark.parametrize("kind", ["a-file", "a-users-folder", "a-link"])
def test_a_users_file_with_the_name_of_the_work_folder_is_kept(kind: str, tmp_path: Path) -> None:
    theirs, elsewhere = tmp_path / ".out.partial", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "thesis.txt").write_text("mine")
    if kind == "a-file":
        theirs.write_text("mine")
    elif kind == "a-link":
        theirs.symlink_to(elsewhere)
    else:
        elsewhere.rename(theirs)
    before = left_behind(tmp_path)
    with pytest.raises(UsageError, match="which export-model did not write|is a file|is a link"), output_folder(tmp_path / "out"):
        pytest.fail("work was begun")
    assert left_behind(tmp_path) == before
    assert (theirs if kind == "a-file" else theirs / "thesis.txt").read_text() == "mine"


def test_what_a_killed_process_left_is_cleared(tmp_path: Path) -> None:
    """Its lock file with the number of a process that is long gone, or is another one by now; its work folder, begun or empty."""
    for begun in (True, False):
        (tmp_path / ".out.partial").mkdir()
        (tmp_path / ".out.partial" / "half").write_text("half") if begun else None
        (tmp_path / ".out.partial" / RECORDS).write_text("{") if begun else None
        (tmp_path / ".out.lock").write_text("1\n")
        with output_folder(tmp_path / "out") as work:
            assert left_behind(work) == [RECORDS]
            assert (tmp_path / ".out.lock").read_text() == f"{os.getpid()}\n"
        assert left_behind(tmp_path) == ["out"]


def test_resume_keeps_finished_stages_alone(tmp_path: Path) -> None:
    said: list[str] = []

    def work(folder: Path) -> None:
        (folder / "part").mkdir()
        (folder / "part" / "file").write_text("whole")

    with pytest.raises(ZeroDivisionError), output_folder(tmp_path / "out", resume=True, say=said.append) as folder:
        Stages(folder, None, said.append).run("one", {"a": 1}, lambda: work(folder))
        (folder / "part" / "half").write_text("half")
        raise ZeroDivisionError
    kept = tmp_path / ".out.partial"
    assert said == [f"kept in {kept}: one; run the same command again to go on from there"]
    assert left_behind(tmp_path) == [".out.partial"] and left_behind(kept / "part") == ["file"]
    with output_folder(tmp_path / "out", resume=True) as folder:
        Stages(folder, None, said.append).run("one", {"a": 1}, lambda: pytest.fail("it was finished"))
    assert left_behind(tmp_path) == ["out"] and (tmp_path / "out" / "part" / "file").read_text() == "whole"


def test_resume_without_a_finished_stage_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), output_folder(tmp_path / "new" / "out", resume=True) as folder:
        (folder / "half").write_text("half")
        raise ZeroDivisionError
    assert left_behind(tmp_path) == []


def test_a_lock_is_held_once_and_by_no_dead_file(tmp_path: Path) -> None:
    first, second = Lock(tmp_path / "lock"), Lock(tmp_path / "lock")
    first.acquire("OUT")
    with pytest.raises(UsageError, match=rf"another export-model \(process {os.getpid()}\) is writing OUT; wait until it is done"):
        second.acquire("OUT")
    second.release()
    assert (tmp_path / "lock").is_file(), "only the holder removes it"
    first.release()
    assert left_behind(tmp_path) == [] and not first.held
    second.acquire("OUT")
    assert second.held
    second.release()


def test_a_lock_on_a_file_that_its_holder_removes_meanwhile_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = (Lock(tmp_path / "lock") for _ in range(3))
    first.acquire("OUT")
    real = fcntl.flock

    def flock(file: int, how: int) -> None:
        first.release()  # between the second's opening and its locking
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    second.acquire("OUT")
    assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"
    with pytest.raises(UsageError, match="another export-model"):
        third.acquire("OUT")
    second.release()


def _plan(**changes: Any) -> dict[str, Any]:
    graph = dict(task="logits", dtype="fp32", layers=[], inputs=[], outputs=[], dims={})
    plan = {**graph, "seq": [1, 8, 8], "batch": [1, 1, 1], "input_ids": "tokens", "seed": 0}
    return {**plan, "preset": "blocks", "keep_exact": "op", **changes}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(files=None), "files does not give"),
        (dict(files=["model.onnx"]), "files does not give"),
        (dict(files={"model.onnx": "abc"}), "files does not give"),
        (dict(files={"model.onnx": {"sha256": 3}}), "files does not give"),
        (dict(files={"../model.onnx": {"sha256": "0"}}), "files does not give"),
        (dict(plan=None), "export the model again"),
        (dict(plan=[1]), "export the model again"),
        (dict(plan=_plan(seq=[1, 2])), "export the model again"),
        (dict(plan=_plan(seq=[1, "8", 8])), "export the model again"),
        (dict(plan=_plan(seq=3)), "export the model again"),
        (dict(plan=_plan(task="dance")), "task is 'dance'"),
        (dict(plan=_plan(layers=["a"])), "export the model again"),
        (dict(plan=_plan(layers=[dict(index=0, name="a", mode="exact", reason="", config=[3])])), "export the model again"),
    ],
    ids=str,
)
def test_bundle_refuses_a_manifest_edited_by_hand(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    Bundle.open(finished(tmp_path, plan=_plan()))
    with pytest.raises(UsageError, match=words):
        Bundle.open(finished(tmp_path, **changes))


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "holds no manifest.json"), ("{", "is broken"), ("[]", "is broken"), ('{"schema": 99}', "of schema 99"), ("{}", "is broken")],
)
def test_bundle_refuses_what_is_not_whole(content: str | None, words: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(UsageError, match=words):
        Bundle.open(tmp_path)
    with pytest.raises(UsageError, match="there is no folder"):
        Bundle.open(tmp_path / "nowhere")
