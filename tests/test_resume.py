"""--resume: a stage is taken over where all that it reads is as it was, and made anew, with the reason, where anything changed."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

import pytest
import tiny
from export_runs import stand_ins

from hyperattention.export import fingerprint, stages
from hyperattention.export.bundle import Bundle
from hyperattention.export.cli import main
from hyperattention.export.engine_check import EngineHost
from hyperattention.export.files import digest

ALL = ["ONNX", "side files", "engine", "validation"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("resume") / "model")


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "model"
    copy.mkdir()
    for file in saved.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (tmp_path / "text").write_bytes(b"!" * 513)  # the longest window, and the byte behind it
    return copy


@pytest.fixture
def export(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs the command in this process, quick stages stood in for; its JSON object, with what it said under "said"."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    for name, value in stand_ins(tmp_path).items():
        monkeypatch.setattr(name, value)

    def run(*options: object, code: int = 0) -> dict[str, Any]:
        found = 0
        try:
            read = ("--text", tmp_path / "text", "--input-ids", "bytes")
            main([str(a) for a in (model, tmp_path / "out", *read, "--json", *options)])
        except SystemExit as status:
            found = int(status.code or 0)
        out, err = capfd.readouterr()
        assert found == code, err
        return {**json.loads(out), "said": " ".join(err.split())}

    return run


@dataclass(frozen=True)
class Change:
    """What is different in the second run, the stages that are still taken over, and the words for the first that is not."""

    name: str
    reused: tuple[str, ...]
    words: str = ""
    options: tuple[str, ...] = ()
    edit: Callable[[Path], object] = lambda scratch: None

    def __str__(self) -> str:
        return self.name


def _append(name: str) -> Callable[[Path], object]:
    def edit(scratch: Path) -> None:
        with (scratch / name).open("ab") as file:
            file.write(b"\n ")

    return edit


def _reseed(scratch: Path) -> None:
    """Other weights of the same sizes, as an epoch more of training gives."""
    weights = scratch / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)


CHANGES = [
    Change("nothing", tuple(ALL)),
    Change("same-layers-in-other-words", tuple(ALL[:3]), "validation: made anew, the plan changed since", ("--layers", "1")),
    Change("gate", tuple(ALL[:3]), "validation: made anew, the options of the validation changed", ("--gate", "kl=0.5")),
    Change("text", tuple(ALL[:3]), "validation: made anew, the options of the validation", edit=_append("text")),
    Change("length-to-tune-for", tuple(ALL[:2]), "engine: made anew, the shapes changed since", ("--opt-seq", "77")),
    Change("longest-sequence", tuple(ALL[:2]), "engine: made anew, the shapes changed since", ("--max-seq", "99")),
    Change("one-length-only", ("side files",), "ONNX: made anew, the plan", ("--min-seq", "99", "--max-seq", "99")),
    Change("seed", ("side files",), "ONNX: made anew, the plan changed since", ("--seed", "5")),
    Change("layers", ("side files",), "ONNX: made anew, the plan changed since", ("--layers", "0")),
    Change("attribute", ("side files",), "ONNX: made anew, the plan changed since", ("--sinks", "7")),
    Change("weights", (), "ONNX: made anew, the model changed since", edit=_reseed),
    Change("configuration", (), "ONNX: made anew, the model changed since", edit=_append("model/config.json")),
    Change("page-for-people", tuple(ALL), edit=_append("model/README.md")),
    Change("library", ("ONNX", "engine"), "side files: made anew, a library changed", edit=_append("lib/libhyperattention_ort.so")),
    Change("plugin", ("ONNX",), "engine: made anew, the plugin changed since", edit=_append("lib/libhyperattention_trt.so")),
    Change("damaged-onnx", tuple(ALL[1:]), "ONNX: made anew, model.onnx changed since", edit=_append("out/model.onnx")),
    Change("damaged-engine", ("ONNX", "side files", "validation"), "engine: made anew, model.engine", edit=_append("out/model.engine")),
    Change("newer-report", tuple(ALL[:3]), "validation: made anew, report/report.json", edit=_append("out/report/report.json")),
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_what_a_finished_output_is_good_for(change: Change, export: Callable[..., Any], tmp_path: Path) -> None:
    first = export()
    assert first["reused"] == []
    change.edit(tmp_path)
    again = export("--resume", *change.options)
    assert again["reused"] == [name for name in ALL if name in change.reused]
    assert change.words in again["said"]
    assert all(f"{name}: taken over from an earlier run" in again["said"] for name in change.reused)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lib", "model", "out", "text"]
    kept = Bundle.open(tmp_path / "out")
    assert kept.changed_files() == []
    # Whatever was taken over: the folder is the one that a run from nothing makes.
    scratch = export(*change.options)
    for part in ("plan", "files", "validation", "engine", "seeds"):
        ours, fresh = (dict(found["manifest"])[part] for found in (again, scratch))
        if part == "files":
            del ours[stages.RECORDS], fresh[stages.RECORDS]
        assert ours == fresh, part


def test_a_failed_gate_is_not_forgotten(export: Callable[..., Any]) -> None:
    export("--gate", "kl=0.01", code=1)
    again = export("--resume", "--gate", "kl=0.01", code=1)
    assert again["reused"] == ALL and "gates not met: kl" in again["error"]
    assert export("--resume", "--gate", "kl=0.5")["reused"] == ALL[:3]


def test_a_stage_that_is_no_longer_wanted_leaves_no_files(
    export: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export("--gate", "kl=0.01", code=1)
    (tmp_path / "out").rename(tmp_path / ".out.partial")
    (tmp_path / ".out.partial" / "manifest.json").unlink()
    monkeypatch.setattr("hyperattention.export.pipeline.missing_parts", lambda: {"engine": "the GPU has gone"})
    again = export("--resume", "--no-validate")
    assert again["reused"] == ALL[:2] and "no engine: the GPU has gone" in again["said"]
    assert {"model.engine", "report/report.json"}.isdisjoint(again["manifest"]["files"]) and again["manifest"]["engine"] is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 99, "stages": {}}', '{"format": 1, "stages": {"ONNX": 3}}'], ids=repr)
def test_records_that_cannot_be_read_are_none(text: str, tmp_path: Path) -> None:
    (tmp_path / stages.RECORDS).write_text(text)
    assert stages.read(tmp_path) == {}


@pytest.mark.parametrize("name", ["../secret", "/etc/secret", "a/../../secret"])
def test_a_record_never_names_a_file_outside_its_folder(name: str, tmp_path: Path) -> None:
    record = {"inputs": {}, "files": {name: "0"}, "result": None}
    (tmp_path / stages.RECORDS).write_text(json.dumps({"format": 1, "stages": {"ONNX": record}}))
    assert stages.read(tmp_path) == {}


def test_nothing_of_this_machine_is_recorded(export: Callable[..., Any], tmp_path: Path) -> None:
    export()
    assert str(tmp_path) not in (tmp_path / "out" / stages.RECORDS).read_text()


def test_an_engine_belongs_to_its_machine_and_packages_to_their_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "library"
    library.write_bytes(b"library")

    class Plan:
        def to_json(self) -> dict[str, Any]:
            idle = dict.fromkeys(("input_ids", "preset", "keep_exact", "seed", "policy", "policy_notes"), 0)
            return {"layers": [], "batch": [1, 1, 1], "seq": [1, 2, 3], **idle}

    plan: Any = Plan()
    seen = []
    for gpu in ("A", "B"):
        monkeypatch.setattr(EngineHost, "here", staticmethod(lambda library, gpu=gpu: EngineHost(gpu=gpu)))
        seen.append({part: digest(value) for part, value in fingerprint.engine({}, plan, library).items()})
    assert {part for part in seen[0] if seen[0][part] != seen[1][part]} == {"the machine"}
    before = digest(fingerprint.onnx(plan, {})["a package's version"])
    monkeypatch.setattr("hyperattention.export.bundle.metadata.version", lambda name: "99")
    assert digest(fingerprint.onnx(plan, {})["a package's version"]) != before


def test_a_function_counts_by_its_file_and_name(tmp_path: Path) -> None:
    class Source:
        def __init__(self, model: str) -> None:
            self.model = model

        def content(self) -> dict[str, str]:
            return {"weights": "w"}

    file = tmp_path / "net.py"
    file.write_text("def make(): ...")
    one: Any = Source(f"{file}:make")
    first = fingerprint.model(one)
    assert set(first) == {"net.py", "function", "weights"}
    other: Any = Source(f"{file}:other")
    assert fingerprint.model(other) != first
    file.write_text("def make(): pass")
    assert fingerprint.model(one) != first


def test_the_templates_of_the_report_are_part_of_the_validation() -> None:
    def sources(parts: dict[str, Any]) -> set[str]:
        return set(parts["hyperattention itself"])

    class Plan:
        def to_json(self) -> dict[str, Any]:
            return {}

    plan: Any = Plan()
    read, templates = sources(fingerprint.validation({}, plan, {}, ())), (Path(stages.__file__).parents[1] / "validate/templates").iterdir()
    assert {f"validate/templates/{file.name}" for file in templates} <= read
    assert not read & sources(fingerprint.side_files({}, [])) & {name for name in read if name.startswith("validate/")}
