"""The TensorRT plugin held against the real libraries (`make test-tensorrt`), and what of the engine stage needs no GPU."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from tensorrt_builds import HEADERS, OWN, native_checks, plugin_library

from hyperattention.config import DOMAIN, OP_TYPE, Config
from hyperattention.errors import BuildFailed, EnvironmentFault, UsageError
from hyperattention.export import engine
from hyperattention.export.engine_log import BuildLog, Share, make_logger, make_monitor
from hyperattention.export.engine_plugin import register_plugin, registered_build
from hyperattention.export.plan import ExportPlan
from hyperattention.library import build_info, trt_library_path

KEY = (OP_TYPE, "1", DOMAIN)
# The checks of tests/trt_fields_test.cpp; it lists them itself.
NATIVE_CHECKS = (
    "accepted_shapes cache_id contexts field_forms formats layouts output_shapes random_workspace refused_fields refused_shapes "
    "serialised_fields workspace"
).split()


@dataclass(frozen=True)
class Bad:
    """Fields that the plugin has to refuse, and what it has to say."""

    name: str
    fields: dict[str, int | float | str] = field(hash=False)
    reason: str

    def __str__(self) -> str:
        return self.name


BAD = (
    Bad("below", {"block_size": 7}, "block_size is 7; it takes an integer from 16 to 256"),
    Bad("above", {"num_blocks": 65}, "num_blocks is 65; it takes an integer from 0 to 64"),
    Bad("negative-seed", {"seed": -1}, "seed is -1; it takes an integer from 0 to 2147483647"),
    Bad("flag", {"causal": 2}, "causal is 2; it takes an integer from 0 to 1"),
    Bad("scale", {"scale": -0.5}, "scale is -0.5"),
    Bad("nan-scale", {"scale": float("nan")}, "scale is nan; it takes 0 for 1/sqrt(head size), or a number from 1e-20 to 1e+20"),
    Bad("selector", {"selector": "nearest"}, "selector is 'nearest'; it takes one of blocks, sortlsh"),
    Bad("pools", {"pool_size": 3}, "block_size 64 is not a multiple of pool_size 3"),
    Bad("strict", {"strict_causal": 1, "selector": "sortlsh"}, "strict_causal is 1 with selector sortlsh"),
    Bad("local", {"local_size": 1000}, "local_size 1000 is not a multiple of block_size 64"),
)

GOOD = {
    "defaults": Config(),
    "strict": Config(strict_causal=1),
    "changed": Config(causal=0, scale=0.25, block_size=32, pool_size=8, seed=2**31 - 1).exact(),
    "sortlsh": Config(selector="sortlsh", block_size=48, pool_size=5, local_size=1000, num_projections=16),
    "centred": Config(selector="sortlsh", hash_centre=1),
}


@pytest.fixture(scope="module")
def trt():
    return pytest.importorskip("tensorrt", reason="TensorRT's Python bindings")


@pytest.fixture(scope="module")
def creator(trt):
    register_plugin(trt_library_path())
    return trt.get_plugin_registry().get_creator(*KEY)


def _create(trt, creator, fields: dict[str, int | float | str]):
    kinds = {int: (np.int32, trt.PluginFieldType.INT32), float: (np.float32, trt.PluginFieldType.FLOAT32)}
    made = []
    for name, value in fields.items():
        if isinstance(value, str):
            made.append(trt.PluginField(name, np.frombuffer(value.encode(), np.int8), trt.PluginFieldType.CHAR))
        else:
            dtype, kind = kinds[type(value)]
            made.append(trt.PluginField(name, np.array([value], dtype), kind))
    return creator.create_plugin("layer", trt.PluginFieldCollection(made), trt.TensorRTPhase.BUILD)


def _metadata(trt, plugin) -> dict[str, str]:
    text = plugin.get_capability_interface(trt.PluginCapabilityType.BUILD).metadata_string
    name, *items = text.split()
    assert name == OP_TYPE
    return dict(item.split("=") for item in items)


# --- the plugin in TensorRT's registry -------------------------------------------------------------------------------


@pytest.mark.tensorrt
def test_version(trt) -> None:
    wanted = os.environ.get("HYPERATTENTION_TENSORRT_VERSION")
    assert wanted is None or trt.__version__.startswith(wanted + ".")


@pytest.mark.tensorrt
def test_declared_fields(trt, creator) -> None:
    """Config's attributes, in its order; with_lse tells the plugin what ONNX does not: how many outputs its node has."""
    kinds = {int: trt.PluginFieldType.INT32, float: trt.PluginFieldType.FLOAT32, str: trt.PluginFieldType.CHAR}
    wanted = [(name, kinds[type(value)]) for name, value in Config().attributes().items()]
    assert [(f.name, f.type) for f in creator.field_names] == [*wanted, ("with_lse", trt.PluginFieldType.INT32)]
    assert (creator.name, creator.plugin_version, creator.plugin_namespace) == KEY


@pytest.mark.tensorrt
@pytest.mark.parametrize("config", GOOD.values(), ids=GOOD)
def test_good_fields(trt, creator, config: Config) -> None:
    """All fields, or the defaults for those left out, give the plugin that Config describes."""
    changed = {k: v for k, v in config.attributes().items() if v != Config().attributes()[k]}
    for fields in (config.attributes(), changed):
        found = _metadata(trt, _create(trt, creator, fields))
        assert {k: type(v)(found[k]) for k, v in config.attributes().items()} == config.attributes()
        assert found["with_lse"] == "0"


@pytest.mark.tensorrt
@pytest.mark.parametrize("bad", BAD, ids=str)
def test_refused_fields(trt, creator, bad: Bad, capfd: pytest.CaptureFixture[str]) -> None:
    """The reason is logged, and it is the one that Config gives. (Without a builder TensorRT has no logger: standard error.)"""
    assert _create(trt, creator, bad.fields) is None
    said = capfd.readouterr().err
    assert "HyperAttention[layer]: " in said and bad.reason in said
    with pytest.raises(UsageError, match=re.escape(bad.reason)):
        Config(**bad.fields)  # type: ignore[arg-type]


@pytest.mark.tensorrt
def test_registered_build(trt, creator) -> None:
    """The plugin says which library it is from."""
    assert registered_build(trt) == build_info(trt_library_path())["build_id"]


@pytest.mark.tensorrt
def test_loading_another_build(trt, creator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyperattention.export.engine_plugin.registered_build", lambda trt: "another")
    with pytest.raises(EnvironmentFault, match="has registered build another"):
        register_plugin(trt_library_path())


@pytest.mark.tensorrt
def test_loading_no_library(trt, tmp_path: Path) -> None:
    (tmp_path / "lib.so").write_bytes(b"not a library")
    with pytest.raises(EnvironmentFault, match="cannot be loaded"):
        register_plugin(tmp_path / "lib.so")


# --- the plugin without TensorRT -------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=HEADERS, ids=lambda headers: f"headers-{headers}")
def native_test(request: pytest.FixtureRequest) -> list[str]:
    """The native checks and the library under test, both against the same headers."""
    return [str(native_checks(request.param)), str(plugin_library(request.param))]


@pytest.mark.parametrize("check", NATIVE_CHECKS)
def test_native(native_test: list[str], check: str) -> None:
    done = subprocess.run([*native_test, check], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


def test_native_checks_are_all_run(native_test: list[str]) -> None:
    listed = subprocess.run(native_test, capture_output=True, text=True, timeout=600).stdout.split()
    assert listed == NATIVE_CHECKS


def test_linkage() -> None:
    """TensorRT's two entry points and the C interface are exported, nothing of ours else; TensorRT is not linked."""
    library = plugin_library(OWN)
    needed = subprocess.run(["readelf", "-dW", library], capture_output=True, text=True, check=True).stdout
    assert "NEEDED" in needed and "nvinfer" not in needed and "libcuda" not in needed
    symbols = subprocess.run(["readelf", "--dyn-syms", "-W", library], capture_output=True, text=True, check=True).stdout
    exported = {row.split()[7] for row in symbols.splitlines() if " GLOBAL " in row and " UND " not in row}
    assert {"getCreators", "setLoggerFinder", "ha_cuda_forward", "ha_check"} <= exported
    assert all(name.startswith("ha_") or name in ("getCreators", "setLoggerFinder") for name in exported), exported


# --- the engine stage ------------------------------------------------------------------------------------------------


def test_no_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU the stage says so before it touches TensorRT, whose builder would end the process."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    plan = ExportPlan("logits", "bf16", (), (), (), {}, (1, 8, 16), (1, 1, 2), "bytes", 0, "blocks", "op")
    with pytest.raises(EnvironmentFault, match="no CUDA device"):
        engine.build_engine(tmp_path, plan, tmp_path / "library.so")
    with pytest.raises(EnvironmentFault, match="no CUDA device"):
        engine.read_engine(tmp_path / "model.engine", tmp_path / "library.so")
    assert list(tmp_path.iterdir()) == []


def test_build_log(tmp_path: Path) -> None:
    """Folders of this machine are left out, node names that look like paths are not."""
    log = BuildLog(tmp_path / "build.log", tmp_path)
    log.write("INFO", f"loading {tmp_path}/model.trt.onnx from {Path.cwd()}")
    for i in range(5):
        log.write("ERROR", f"/model/layers.{i}/attention: bad shape")
    assert log.path.read_text().splitlines()[:2] == [
        "[INFO] loading model.trt.onnx from .",
        "[ERROR] /model/layers.0/attention: bad shape",
    ]
    failure = log.failure("TensorRT cannot parse model.trt.onnx")
    assert isinstance(failure, BuildFailed) and failure.exit_code == 5
    assert "layers.4" in str(failure) and "layers.2" in str(failure) and "layers.1/" not in str(failure)


def test_progress() -> None:
    """Nested phases give one share that only grows."""
    said: list[str] = []
    share = Share(said.append)
    share.start("all", 2)
    for outer in range(2):
        share.start("part", 10)
        for step in range(10):
            share.step("part", step + 1)
        share.finish("part")
        share.step("all", outer + 1)
    percent = [int(re.search(r"(\d+)%", line)[1]) for line in said]  # type: ignore[index]
    assert percent == sorted(set(percent)) and percent[0] == 0 and percent[-1] == 100 and len(percent) == 21


@pytest.mark.tensorrt
def test_logger_and_monitor(trt, tmp_path: Path) -> None:
    log, said = BuildLog(tmp_path / "build.log"), []
    logger = make_logger(trt, log)
    logger.log(trt.ILogger.Severity.VERBOSE, "detail")
    logger.log(trt.ILogger.Severity.INTERNAL_ERROR, "fault")
    assert log.path.read_text() == "[INTERNAL_ERROR] fault\n" and log.errors == ["fault"]
    share = Share(said.append)
    monitor = make_monitor(trt, share)
    monitor.phase_start("Building", None, 4)
    assert monitor.step_complete("Building", 0)
    share.cancelled = True
    assert not monitor.step_complete("Building", 1)
    monitor.phase_finish("Building")
    assert said == [f"building the engine, {p}%: Building" for p in (0, 25, 50)]


@pytest.mark.tensorrt
def test_names_of_this_release(trt) -> None:
    """TensorRT 11 renamed and dropped much of 10; what the engine stage uses is in both."""
    names = (
        "NetworkDefinitionCreationFlag.STRONGLY_TYPED MemoryPoolType.WORKSPACE ProfilingVerbosity.DETAILED LayerInformationFormat.JSON "
        "ICudaEngine.num_layers ICudaEngine.create_engine_inspector ICudaEngine.device_memory_size_v2 OnnxParser.parse_from_file "
        "ParserError.node_name ParserError.node_operator ParserError.desc Runtime.deserialize_cuda_engine IBuilderConfig.progress_monitor"
    )
    for name in names.split():
        owner, attribute = name.split(".")
        assert hasattr(getattr(trt, owner), attribute), name


@pytest.mark.tensorrt
def test_layer_names(trt) -> None:
    """Plugin layers are told from others, and an engine without details is not taken for one without plugins."""

    class Engine:
        def __init__(self, text: str) -> None:
            self.text = text

        def create_engine_inspector(self) -> "Engine":
            return self

        def get_engine_information(self, _: object) -> str:
            return self.text

    rows = (
        '{"Name": "a", "LayerType": "PluginV3", "PluginType": "HyperAttention"}, {"Name": "b", "LayerType": "gemm"},'
        '{"Name": "c", "LayerType": "PluginV3", "PluginType": "Other"}'
    )
    assert engine.layer_names(Engine(f'{{"Layers": [{rows}]}}')) == ["a"]
    with pytest.raises(EnvironmentFault, match="only its layers' names"):
        engine.layer_names(Engine('{"Layers": ["a", "b"]}'))
