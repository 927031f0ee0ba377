"""The output folder: whole, kept with a failed gate's report, or gone."""

from __future__ import annotations

from pathlib import Path

import pytest

from hyperattention.errors import AccuracyFailed, EnvironmentFault, UsageError
from hyperattention.export import pipeline
from hyperattention.export.bundle import MANIFEST, Bundle


def left_behind(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_output_folder_keeps_what_a_failed_gate_left(tmp_path: Path) -> None:
    with pytest.raises(AccuracyFailed), pipeline.output_folder(tmp_path / "out") as work:
        (work / "file").write_text("x")
        raise AccuracyFailed("gate")
    assert left_behind(tmp_path) == ["out"] and left_behind(tmp_path / "out") == ["file"]


@pytest.mark.parametrize("error", [EnvironmentFault("x"), KeyboardInterrupt(), ZeroDivisionError()], ids=lambda e: type(e).__name__)
def test_output_folder_vanishes_otherwise(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)), pipeline.output_folder(tmp_path / "a" / "b" / "out") as work:
        (work / "file").write_text("x")
        raise error
    assert left_behind(tmp_path) == []


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
