"""`hyperattention inspect`: the graph against onnx's own reading, the policy against the plan, files against their hashes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import commands
import numpy as np
import onnx
import pytest
import tiny
from commands import run
from onnx import numpy_helper

from hyperattention.config import Config
from hyperattention.export.bundle import MANIFEST, REPORT


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny.save(tmp_path_factory.mktemp("inspect") / "model")
    return commands.finished(model, model.parent / "out", "--layers", "1", "--seed", "5")


def test_the_graph_is_what_onnx_reads(out: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = json.loads(run(capfd, "hyperattention", "inspect", out, "--json").out)
    proto = onnx.load(out / "model.onnx")
    weights = [numpy_helper.to_array(tensor) for tensor in proto.graph.initializer]
    graph = found["graph"]
    assert graph["parameters"] == sum(array.size for array in weights) and graph["weight_bytes"] == sum(array.nbytes for array in weights)
    assert graph["inputs"] == [
        {"name": "input_ids", "dtype": "int64", "dims": ["batch", "sequence"]},
        {"name": "lengths", "dtype": "int32", "dims": ["batch"]},
    ]
    assert graph["outputs"] == [{"name": "logits", "dtype": "float", "dims": ["batch", "sequence", tiny.VOCABULARY]}]
    assert graph["opset"] == {"ai.onnx": 18, "hyperattention": 1} and graph["function_body"] is True
    assert sum(graph["operators"].values()) == len(proto.graph.node)
    assert graph["operators"]["hyperattention::HyperAttention"] == len(graph["nodes"]) == 2
    assert [node["attributes"]["exact_below"] == tiny.SMALL["exact_below"] for node in graph["nodes"]] == [False, True]
    twin = found["twin"]
    assert twin["function_body"] is False and {node["attributes"]["plugin_namespace"] for node in twin["nodes"]} == {"hyperattention"}


def test_the_policy_says_how_each_layer_attends_and_why(out: Path, capfd: pytest.CaptureFixture[str]) -> None:
    policy = json.loads(run(capfd, "hyperattention", "inspect", out, "--json").out)["policy"]
    rows = [(row["mode"], row["selector"], row["seed"], row["reason"]) for row in policy["layers"]]
    assert rows == [("exact", None, None, "not chosen by --layers 1"), ("approximate", "blocks", 6, "chosen by --layers 1")]
    assert Config.from_attributes(policy["layers"][1]["attributes"]) == Config.from_attributes({**tiny.SMALL, "seed": 6})
    assert policy["task"] == "logits" and policy["dims"] == {"batch": [1, 1, 1], "sequence": [1, 128, 512]}


def test_every_file_is_listed_with_its_hash_and_state(out: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    copy = commands.copy(out, tmp_path / "out")
    (copy / "config.json").write_text("{}")
    (copy / "notes.txt").write_text("mine")
    (copy / "generation_config.json").unlink()
    result = run(capfd, "hyperattention", "inspect", copy, "--json")
    files = json.loads(result.out)["files"]
    states = {name: row["state"] for name, row in files.items() if row["state"] != "ok"}
    assert result.code == 3 and "run `export-model` again" in result.said
    assert states == {"config.json": "changed", "generation_config.json": "missing", "notes.txt": "not in the manifest"}
    assert files["model.onnx"]["sha256"] == hashlib.sha256((copy / "model.onnx").read_bytes()).hexdigest()
    text = run(capfd, "hyperattention", "inspect", copy).out
    assert "config.json  CHANGED" in text and "generation_config.json  MISSING" in text and "notes.txt  NOT IN THE MANIFEST" in text


def test_a_report_that_changed_asks_for_a_validation(out: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    copy = commands.copy(out, tmp_path / "out")
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["files"][REPORT] = {"bytes": 2, "sha256": "0" * 64}
    (copy / MANIFEST).write_text(json.dumps(manifest))
    assert run(capfd, "hyperattention", "inspect", copy).said.endswith(f"since the export: {REPORT}; run `hyperattention validate` again")


def test_text_for_people(out: Path, capfd: pytest.CaptureFixture[str]) -> None:
    result = run(capfd, "hyperattention", "inspect", out)
    assert result.code == 0 and result.err == ""
    for words in (
        "LlamaForCausalLM",
        "layer   1  approximate  model.layers.1.self_attn, blocks, seed 6  (chosen by --layers 1)",
        "input   input_ids: int64 [batch, sequence]",
        "2 of them hyperattention::HyperAttention, with the exact function body",
        "the same graph for TensorRT, its nodes name the plugin",
        "No engine in this folder.",
        "No report; run `hyperattention validate`.",
    ):
        assert words in result.out


def test_a_twin_that_differs_and_a_graph_that_is_broken_are_said(out: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    copy = commands.copy(out, tmp_path / "out")
    proto = onnx.load(copy / "model.trt.onnx")
    proto.graph.output[0].name = "other"
    onnx.save(proto, copy / "model.trt.onnx")
    assert "model.trt.onnx is NOT the same graph" in run(capfd, "hyperattention", "inspect", copy).out
    (copy / "model.onnx").write_bytes(b"\xff" * 99)
    result = run(capfd, "hyperattention", "inspect", copy)
    assert result.code == 3 and "model.onnx: model.onnx is truncated or no ONNX file" in result.out


def test_one_onnx_file_of_another_tool(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Add", ["x", "w"], ["y"])],
        "sum",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT16, ["n", 3])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT16, ["n", 3])],
        [numpy_helper.from_array(np.ones(3, np.float16), "w")],
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)]), tmp_path / "sum.onnx")
    found = json.loads(run(capfd, "hyperattention", "inspect", tmp_path / "sum.onnx", "--json").out)
    assert found["kind"] == "onnx" and (found["graph"]["parameters"], found["graph"]["weight_bytes"]) == (3, 6)
    text = run(capfd, "hyperattention", "inspect", tmp_path / "sum.onnx").out
    assert "input   x: float16 [n, 3]" in text and "1 nodes, 0 of them hyperattention::HyperAttention, without" in text
