"""A saved engine that was moved: what its manifest says it was built with, against a machine. No GPU, no TensorRT."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from hyperattention.config import Config
from hyperattention.errors import EnvironmentFault, UsageError
from hyperattention.export import engine, engine_check
from hyperattention.export.bundle import MANIFEST, Bundle, finish, write_draft
from hyperattention.export.engine_check import EngineHost, check_engine, findings
from hyperattention.export.plan import ExportPlan, LayerPlan
from hyperattention.library import TRT_LIBRARY
from hyperattention.validate import inspect_folder
from hyperattention.validate.backends import check_engines

BUILT = EngineHost("10.6.0", "9.0", "NVIDIA H200", "580.65.06", "0123456789abcdef")


@dataclass(frozen=True)
class Case:
    """What differs here from BUILT, and what is said of it: nothing, a warning, or a refusal."""

    name: str
    differs: dict[str, str | None] = field(hash=False, default_factory=dict)
    warns: str = ""
    refuses: str = ""

    def __str__(self) -> str:
        return self.name


CASES = (
    Case("the-same-machine"),
    Case("newer-driver", {"driver": "595.10"}),
    Case("another-wheel-of-the-release", {"tensorrt": "10.6.0.post1"}),
    Case("older-driver", {"driver": "580.9.100"}, warns="driver: built with 580.65.06, here 580.9.100: install 580.65.06 or newer"),
    Case("another-gpu-of-the-kind", {"gpu": "NVIDIA H100"}, warns="GPU: built with NVIDIA H200, here NVIDIA H100: it runs, tuned"),
    Case("patch-release", {"tensorrt": "10.6.1"}, refuses="10.6.1            run export-model again here, or install TensorRT 10.6.0"),
    Case("next-release", {"tensorrt": "11.2.1"}, refuses="or install TensorRT 10.6.0"),
    Case("no-tensorrt", {"tensorrt": None}, refuses="install hyperattention[tensorrt]"),
    Case("another-kind-of-gpu", {"gpu": "NVIDIA L40S", "compute_capability": "8.9"}, refuses="an engine is code for one kind of GPU"),
    Case("no-gpu", {"gpu": None, "compute_capability": None, "driver": None}, refuses="use a machine with a CUDA device"),
    Case("another-plugin", {"plugin_build": "fedcba9876543210"}, refuses=f"put the {TRT_LIBRARY} of build 0123456789abcdef beside"),
    Case("no-plugin", {"plugin_build": None}, refuses=f"put the {TRT_LIBRARY} of build 0123456789abcdef beside"),
)


def folder(at: Path, **engine_changes: Any) -> Path:
    """A finished output with an engine; `engine_changes` are edits of what its manifest records of that, None leaves an entry out."""
    at.mkdir()
    (at / "model.engine").write_bytes(b"engine")
    layers = (LayerPlan(0, "attention", "approximate", "", Config()),)
    plan = ExportPlan("logits", "bf16", layers, (), (), {}, (1, 8, 8), (1, 1, 1), "tokens", 0, "blocks", "op")
    made = engine.EngineInfo("10.6.0", BUILT, 1.0, 6, 0, 9, ("attention",)).to_json() | engine_changes
    recorded = {name: value for name, value in made.items() if value is not None}
    write_draft(at, plan, {}, recorded, {TRT_LIBRARY: {"build_id": BUILT.plugin_build}})
    finish(at)
    return at


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_moved_engine(case: Case, tmp_path: Path) -> None:
    moved = folder(tmp_path / "made").rename(tmp_path / "moved")
    here = replace(BUILT, **case.differs)
    if case.refuses:
        with pytest.raises(EnvironmentFault) as caught:
            check_engine(Bundle.open(moved), here=here)
        heading, *rows = str(caught.value).splitlines()
        assert heading == "model.engine cannot run here:" and len(rows) == 6 and case.refuses in str(caught.value)
        assert str(tmp_path) not in str(caught.value)
    else:
        warnings = check_engine(Bundle.open(moved), here=here)
        assert len(warnings) == (1 if case.warns else 0) and case.warns in "".join(warnings)


def test_every_part_that_is_not_the_same_is_in_the_table(tmp_path: Path) -> None:
    rows = findings(Bundle.open(folder(tmp_path / "out")), here=EngineHost("11.4.0", "12.0", "other", "1", "x"))
    assert [(row.part, row.state) for row in rows] == [
        ("TensorRT", "fatal"), ("compute capability", "fatal"), ("GPU", "warning"), ("driver", "warning"), ("plugin build", "fatal"),
    ]  # fmt: skip
    assert all(row.mend for row in rows)


def test_an_engine_without_plugin_layers_needs_no_plugin(tmp_path: Path) -> None:
    out = folder(tmp_path / "out", plugin_layers=[])
    assert check_engine(Bundle.open(out), here=replace(BUILT, plugin_build=None)) == []


def test_an_older_manifest(tmp_path: Path) -> None:
    """It records the release and the plugin's build, which still decide; the rest is said to be unknown."""
    bundle = Bundle.open(folder(tmp_path / "out", host=None))
    assert [warning.partition(",")[0] for warning in check_engine(bundle, here=BUILT)] == [
        f"Engine: {part}: built with not recorded" for part in ("compute capability", "GPU", "driver")
    ]
    for change in ({"tensorrt": "11.2.1"}, {"plugin_build": "fedcba9876543210"}):
        with pytest.raises(EnvironmentFault, match=next(iter(change.values()))):
            check_engine(bundle, here=replace(BUILT, **change))


def test_no_engine(tmp_path: Path) -> None:
    out = folder(tmp_path / "out")
    manifest = json.loads((out / MANIFEST).read_text())
    (out / MANIFEST).write_text(json.dumps({**manifest, "engine": None}))
    with pytest.raises(UsageError, match="records no engine; run export-model again on a machine with a GPU"):
        engine.load_engine(out)


def test_load_engine_asks_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the file is read: TensorRT's own message names neither machine."""
    monkeypatch.setattr(engine_check.EngineHost, "here", classmethod(lambda cls, library: replace(BUILT, tensorrt="11.2.1")))
    monkeypatch.setattr(engine, "read_engine", lambda *_: pytest.fail("the engine was read"))
    with pytest.raises(EnvironmentFault, match="TensorRT +10.6.0 +11.2.1"):
        engine.load_engine(folder(tmp_path / "out"))


def test_load_engine_warns_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_check.EngineHost, "here", classmethod(lambda cls, library: replace(BUILT, gpu="NVIDIA H100")))
    monkeypatch.setattr(engine, "read_engine", lambda path, library, logger: (path.name, library.name))
    out = folder(tmp_path / "out")
    with pytest.raises(UsageError, match=f"lacks model.engine or {TRT_LIBRARY}"), pytest.warns(RuntimeWarning, match="tuned for the other"):
        engine.load_engine(out)
    (out / TRT_LIBRARY).write_bytes(b"library")
    with pytest.warns(RuntimeWarning, match="tuned for the other"):
        assert engine.load_engine(out) == ("model.engine", TRT_LIBRARY)


def test_validation_checks_both_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_check.EngineHost, "here", classmethod(lambda cls, library: BUILT))
    ours = Bundle.open(folder(tmp_path / "ours"))
    exact = folder(tmp_path / "exact", host=replace(BUILT, compute_capability="8.0").__dict__) / "model.engine"
    assert check_engines(ours, None) == []
    with pytest.raises(EnvironmentFault, match="compute capability +8.0 +9.0"):
        check_engines(ours, exact)
    (exact.parent / MANIFEST).unlink()  # an engine alone: nothing is known of it
    assert check_engines(ours, exact) == []


def test_inspect_says_whether_it_can_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = folder(tmp_path / "out")
    for here, said in ((BUILT, "model.engine can run here:"), (replace(BUILT, driver=None), "can run"), (EngineHost(), "cannot run here:")):
        monkeypatch.setattr(engine_check.EngineHost, "here", classmethod(lambda cls, library, here=here: here))
        text = "\n".join(inspect_folder.lines(inspect_folder.describe(out)))
        assert said in text and "NVIDIA H200" in text


def test_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """This machine without a GPU and without the library."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found = EngineHost.here(tmp_path / TRT_LIBRARY)
    assert (found.compute_capability, found.gpu, found.plugin_build) == (None, None, None)
