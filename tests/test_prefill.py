"""The prefill benchmark of whole models (tests/gpu/bench_prefill.py): its arithmetic, its tied ONNX files, a run with engines made up."""

from __future__ import annotations

import itertools
import json
import shutil
from concurrent.futures import Executor, Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_prefill
import onnx
import prefill_table
import pytest
import torch
from prefill_model import VARIANTS, Model, Shape, prepare, write_variant
from prefill_split import split
from tiny import SMALL

from hyperattention.errors import EnvironmentFault
from hyperattention.export.files import MODEL, TWIN
from hyperattention.export.onnx_graph import hyper_nodes
from hyperattention.export.patch import install
from hyperattention.export.plan import ExportPlan
from hyperattention.library import ort_library_path
from hyperattention.validate.bench_profile import Launch
from hyperattention.validate.ort_session import open_session, run_bound, session_options

# Matrices above the size up to which the exporter folds a transposition into a copy of the weight.
TINY = Shape(hidden=160, intermediate=192, heads=4, heads_kv=2, head_dim=40, layers=3, vocabulary=67)
CPU = torch.device("cpu")


def engine_row(depth: int, variant: str, tokens: int, layer: float) -> dict[str, Any]:
    """An engine that takes 3 ms once, 10 ms a layer beside attention, `layer` ms for the attention of a layer, half of them approximate."""
    approximate = {"exact": 0, "half": depth // 2, "all": depth}[variant]
    place = {"depth": depth, "variant": variant, "approximate": approximate, "tokens": tokens}
    return {**place, "ms": 3 + depth * (10 + layer), "plugin_ms": depth * layer}


def test_a_line_goes_through_its_points_and_needs_two() -> None:
    assert prefill_table.line([(4, 11.0), (8, 19.0)]) == pytest.approx((3, 2))
    assert prefill_table.line([(0, 0.0), (1, 2.0), (2, 2.0)]) == pytest.approx((1 / 3, 1))
    for points in ([], [(4, 1.0)], [(4, 1.0), (4, 2.0)]):
        with pytest.raises(ValueError, match="two different depths"):
            prefill_table.line(points)


def test_two_depths_give_the_third() -> None:
    rows = [engine_row(depth, "half", 32768, 5.0) for depth in (4, 8)]
    found = prefill_table.extrapolated(rows)
    assert len(found) == 1 and found[0] == {**engine_row(32, "half", 32768, 5.0), "from": [4, 8], "residual": pytest.approx(0, abs=1e-12)}
    rows.append({**engine_row(16, "half", 32768, 5.0), "ms": 300.0})
    assert prefill_table.extrapolated(rows)[0]["residual"] > 0.05
    assert prefill_table.extrapolated([*rows, engine_row(32, "half", 32768, 5.0)]) == [], "what was measured is not guessed"
    assert prefill_table.extrapolated(rows[:1]) == []


def test_rivals_limit_and_share() -> None:
    """10 layers of 10 ms beside attention; exact attention takes 20 ms, FA4 15 ms, approximate attention 5 ms a layer."""
    rows = [
        {**engine_row(10, variant, 8, layer), "ms": 10 * (10 + layer)} for variant, layer in (("exact", 20.0), ("all", 5.0), ("half", 12.5))
    ]
    every, half = prefill_table.compare(rows, {8: 15.0}, alone={8: 12.0})
    assert every["rest_ms"] == 100 and every["exact_fa4_ms"] == 250
    assert every["over_exact_engine"] == 2.0 and every["over_fa4"] == pytest.approx(250 / 150)
    assert every["speedup"] == every["over_fa4"], "the lower of the two"
    assert every["limit"] == 2.5 and every["share"] == pytest.approx(2 / 3)
    assert every["exact_fa4_ms_alone"] == 220 and every["speedup_alone"] == pytest.approx(220 / 150) and every["limit_alone"] == 2.2
    assert half["limit"] == pytest.approx(250 / 175)
    faster = prefill_table.compare(rows, {8: 30.0}, alone={})[0]
    assert faster["speedup"] == faster["over_exact_engine"] == 2.0 and faster["speedup_alone"] is None
    assert prefill_table.compare(rows, {}, alone={8: 15.0})[0]["speedup"] is None, "without FA4 within the model there is no headline"


def test_the_limits_of_the_targets_shape() -> None:
    """Attention of 13.4 and 216 ms a layer beside 18.3 and 73.3 ms of the rest: the limits that the targets were set by."""
    for tokens, layer, rest, half, every in ((32768, 13.4, 18.3, 1.27, 1.73), (131072, 216.1, 73.3, 1.60, 3.95)):
        rows = [
            {"depth": 32, "variant": name, "approximate": count, "tokens": tokens, "ms": 32 * (rest + layer), "plugin_ms": 32 * layer}
            for name, count in (("exact", 0), ("half", 16), ("all", 32))
        ]
        found = prefill_table.compare(rows, {tokens: layer}, alone={})
        assert [round(row["limit"], 2) for row in found] == [half, every]


def launches(*names: str) -> list[Launch]:
    """Each takes 2 ms and begins 1 ms after the one before has ended; "ours" and "product" stand for kernels' names."""
    full = {"ours": "void ha::hopper_attend_kernel<int>(ha::Args)", "product": "sm90_xmma_gemm_bf16bf16_bf16f32"}
    return [Launch(full.get(name, name), 0.003 * i, 0.003 * i + 0.002) for i, name in enumerate(names)]


def test_a_run_is_split_by_its_launches() -> None:
    """A layer is what lies between two products: its gaps count, and a fill inside; a copy behind it does not."""
    run = launches("product", "ours", "Memset (Device)", "ours", "Memcpy DtoD", "product", "product", "ours", "ours")
    found = split(run, ["approximate", "exact"])
    assert found == pytest.approx({"plugin_ms": 13.0, "approximate_ms": 8.0, "exact_ms": 5.0, "profiled_ms": 26.0})


@pytest.mark.parametrize("seen", [(), ("product",), ("product", "ours", "product"), ("ours", "product", "ours", "product", "ours")])
def test_a_profiler_that_saw_other_layers_is_an_error(seen: tuple[str, ...]) -> None:
    with pytest.raises(EnvironmentFault, match=f"saw {len(seen)} launches.* 2 layers"):
        split(launches(*seen), ["exact", "exact"])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Model]:
    """The tiny shape's directory, tied model and ONNX files of the exact plan."""
    folder = tmp_path_factory.mktemp("prefill")
    model = Model(TINY, (1, 150, 300), "fp32", SMALL)
    prepare(model, folder)
    return folder, model


def test_layers_share_the_parameters_of_the_first() -> None:
    loaded: Any = Model(TINY, (1, 150, 300)).tied()
    layers = loaded.model.layers
    assert len(layers) == TINY.layers and len({id(layer.self_attn) for layer in layers}) == TINY.layers
    for layer in layers:
        assert [id(p) for p in layer.parameters()] == [id(p) for p in layers[0].parameters()]
    assert [layer.self_attn.layer_idx for layer in layers] == [0, 1, 2]


def test_the_file_is_as_large_as_one_layer(exported: tuple[Path, Model]) -> None:
    graph = onnx.load(exported[0] / "onnx" / TWIN).graph
    stored = sum(len(tensor.raw_data) for tensor in graph.initializer)
    one = 4 * (TINY.layer_parameters() + 2 * TINY.vocabulary * TINY.hidden)
    assert one < stored < 1.05 * one, f"{stored} bytes of weights, a layer with both embeddings has {one}"
    assert sum(node.op_type == "HyperAttention" for node in graph.node) == TINY.layers


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_has_the_attributes_of_its_plan(exported: tuple[Path, Model], tmp_path: Path, variant: str) -> None:
    folder, model = exported
    plan = model.plan(folder / "model", variant)
    assert len(write_variant(folder / "onnx" / TWIN, plan, tmp_path)) == TINY.layers, "check_graph, inside, compares every attribute"
    assert len(plan.approximate) == {"exact": 0, "half": 1, "all": 3, "paper": 3}[variant]
    kept = {a.name for node in hyper_nodes(onnx.load(tmp_path / TWIN)) for a in node.attribute}
    assert {"plugin_version", "plugin_namespace"} <= kept


@pytest.mark.ort
@pytest.mark.parametrize("variant", ["exact", "half", "all"])
def test_the_tied_file_computes_what_the_model_does(exported: tuple[Path, Model], tmp_path: Path, variant: str) -> None:
    """In ONNX Runtime, approximate layers included; an odd length and row lengths below it."""
    folder, model = exported
    plan = model.plan(folder / "model", variant)
    write_variant(folder / "onnx" / MODEL, plan, tmp_path)
    session = open_session((tmp_path / TWIN).read_bytes(), session_options(ort_library_path(), tmp_path), CPU, TWIN)
    feed = {"input_ids": bench_prefill.token_ids(TINY, 151), "lengths": torch.tensor([151], dtype=torch.int32)}
    found, _ = run_bound(session, feed, CPU)
    wanted = install(model.tied(), plan).run(feed)["logits"]
    assert bench_prefill.relative(found["logits"], wanted) < 1e-4
    if variant != "exact":
        exact = install(model.tied(), model.plan(folder / "model", "exact")).run(feed)["logits"]
        assert bench_prefill.relative(wanted, exact) > 1e-3, "nothing approximates: the comparison would see no wrong attribute"


def test_pytorch_answers_at_every_length_and_in_fp32(exported: tuple[Path, Model]) -> None:
    model = replace(exported[1], dtype="bf16")
    found = bench_prefill.torch_logits(model.tied(), model.plan(exported[0] / "model", "exact"), TINY, [41])
    assert {tokens: logits.shape for tokens, logits in found.logits.items()} == {bench_prefill.CHECKED: (67,), 41: (67,)}
    assert 1e-4 < bench_prefill.relative(found.logits[bench_prefill.CHECKED], found.twin) < 0.1, "rounding to bf16 and nothing else"


class MadeUp:
    """An engine of known times, whose logits are PyTorch's."""

    problems: dict[str, Any] = {}

    def __init__(self, folder: Path, plan: ExportPlan) -> None:
        assert (folder / TWIN).is_file()
        self.plan, self.depth = plan, len(plan.layers)
        self.build = {"build_seconds": 1.0, "load_seconds": 0.1, "engine_bytes": 2**20, "device_memory": 0, "tensorrt": "none"}

    def __enter__(self) -> "MadeUp":
        if len(self.plan.approximate) == self.depth and "build" in self.problems:
            raise RuntimeError("no tactic")
        return self

    def __exit__(self, *_: object) -> None: ...

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        self.tokens = ids.shape[1]
        return self.problems.get("logits", LOGITS)[self.tokens]

    def time(self, budget_ms: float) -> float:
        return self.depth * (20 + self._layer() * self.tokens / 1000)

    def split(self, ids: torch.Tensor) -> dict[str, float]:
        self.tokens = ids.shape[1]
        if self.tokens == self.problems.get("stop"):
            raise KeyboardInterrupt
        parts = {"approximate_ms": len(self.plan.approximate) * 0.1, "exact_ms": (self.depth - len(self.plan.approximate)) * 1.0}
        scaled = {name: value * self.tokens / 1000 for name, value in parts.items()}
        return {"plugin_ms": sum(scaled.values()), **scaled, "profiled_ms": self.time(0)}

    def _layer(self) -> float:
        return 1.0 - 0.9 * len(self.plan.approximate) / self.depth


class Later(Executor):
    """Does the work in the caller's thread, when its result is asked for."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future:
        future: Any = Future()
        future.result = lambda: fn(*args, **kwargs)
        return future


LOGITS = {tokens: torch.tensor([1.0, 2.0]) for tokens in (bench_prefill.CHECKED, 32768, 131072)}


@pytest.fixture(scope="module")
def prepare_once(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`prepare`, which copies what it made of the same depth before."""
    made: dict[int, Path] = {}

    def call(model: Model, folder: Path) -> None:
        depth = model.shape.layers
        if depth not in made:
            made[depth] = tmp_path_factory.mktemp("made")
            prepare(model, made[depth])
        shutil.copytree(made[depth], folder)

    return call


def made_up_rival() -> Any:
    """FA4, which no machine without a GPU has, unless the test says that this one has not either."""
    if "no_fa4" in MadeUp.problems:
        raise ImportError("flash-attn-4 is not installed (gone)")


def made_up_attention(model: Any, plan: ExportPlan, ids: torch.Tensor, *_: object) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """FA4 takes 30 and 130 ms a layer, ours a tenth more; both have PyTorch's logits, unless the test says otherwise."""
    tokens = ids.shape[1]
    if error := MadeUp.problems.get("within", {}).get(tokens):
        raise error
    ms = {32768: 30.0, 131072: 130.0}[tokens]
    found = {"tokens": tokens, "layers": len(plan.layers), "warm_ups": 1, "runs": 2, "fa4_ms_in_model": ms, "ours_ms_in_model": 1.1 * ms}
    return found, {"fa4": MadeUp.problems.get("of_fa4", LOGITS[tokens]), "ours": LOGITS[tokens]}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepare_once: Any) -> Any:
    """Runs the benchmark with made-up engines and PyTorch's logits; the report as it was written."""

    def call(*arguments: str, **problems: Any) -> dict[str, Any]:
        twin = torch.tensor([1.0, 2.1])
        monkeypatch.setattr(MadeUp, "problems", problems)
        monkeypatch.setattr(bench_prefill, "prepare", prepare_once)
        monkeypatch.setattr(bench_prefill, "flash_attention_4", made_up_rival)
        monkeypatch.setattr(bench_prefill, "load_cuda", lambda: None)
        monkeypatch.setattr(bench_prefill, "times_alone", lambda *_: {32768: 25.0, 131072: 110.0})
        monkeypatch.setattr(bench_prefill, "attention_times", made_up_attention)
        monkeypatch.setattr(bench_prefill, "torch_logits", lambda *_: bench_prefill.Expected(LOGITS, twin))
        options = bench_prefill.parse(["--out", str(tmp_path / "out"), *arguments])
        options.shape = TINY
        bench = bench_prefill.Bench(options, MadeUp, "cpu", Later())
        bench.run()
        assert not (tmp_path / "out" / "work").exists(), "gigabytes are left"
        return json.loads((tmp_path / "out" / "prefill.json").read_text()) | {"text": (tmp_path / "out" / "prefill.md").read_text()}

    return call


def test_a_run_with_made_up_engines(run: Any) -> None:
    report = run("--depths", "2", "4")
    assert report["failed"] == {} and len(report["engines"]) == 6 and len(report["results"]) == 12
    best = {(row["variant"], row["tokens"]): row for row in report["results"] if row["depth"] == 32}
    row = best["all", 131072]
    assert row["from"] == [2, 4] and row["ms"] == pytest.approx(32 * (20 + 13.1072))
    assert row["exact_fa4_ms"] == pytest.approx(32 * 150) and row["limit"] == pytest.approx(150 / 20)
    assert [result["met"] for result in report["targets"]] == [True, True, True, True]
    assert row["speedup_alone"] == report["targets"][3]["least_alone"] == pytest.approx(32 * 130 / row["ms"])
    assert row["speedup_alone"] < row["speedup"] == report["targets"][3]["least"], "the verdict is by the time within the model"
    assert "| 131,072 | 110.00 | 130.00 | 143.00 | 131.07 | 3 | 2 | 0 |" in report["text"]
    assert "from 2 and 4" in report["text"] and "| 4 | 131,072 | all |" in report["text"] and "Met: all, 131,072 tokens" in report["text"]


def test_a_failure_costs_its_own_numbers_only(run: Any) -> None:
    report = run("--depths", "2", build=True)
    assert set(report["failed"]) == {"all, 2 layers"} and "no tactic" in report["failed"]["all, 2 layers"]
    assert {row["variant"] for row in report["results"]} == {"half"}
    assert "Not measured: all" in report["text"] and "FAILED: all, 2 layers" in report["text"]


def test_without_fa4_the_engines_are_measured_and_no_target_is_judged(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    report = run("--depths", "2", "4", no_fa4=True)
    assert report["failed"] == {} and len(report["engines"]) == 6
    assert all(result["least"] is None and result["least_alone"] is None and not result["met"] for result in report["targets"])
    assert "Left out: FA4: flash-attn-4 is not installed (gone): no target is judged." in report["text"]
    assert "left out: FA4: flash-attn-4 is not installed" in capsys.readouterr().out


def test_a_length_that_fails_within_the_model_is_not_judged(run: Any) -> None:
    """FA4's time alone does not take its place, and stands beside it; the length before keeps its verdict."""
    report = run("--depths", "2", "4", within={131072: RuntimeError("out of memory")})
    assert list(report["failed"]) == ["FA4"] and len(report["engines"]) == 6 and len(report["in_model"]) == 1
    assert [result["met"] for result in report["targets"]] == [True, True, False, False]
    words = "Not measured: all, 131,072 tokens: at least 3.2x exact attention (by FA4's time alone, the harder figure: 3.93x)."
    assert words in report["text"] and "| 131,072 | 110.00 | – | – | 131.07 | – | – | – |" in report["text"]


def test_fa4_that_computes_something_else_is_a_failure(run: Any) -> None:
    report = run("--depths", "2", "--variants", "exact", of_fa4=torch.tensor([2.0, 1.0]))
    assert set(report["failed"]) == {f"FA4, {tokens} tokens" for tokens in (32768, 131072)}


def test_wrong_logits_are_failures(run: Any) -> None:
    """Noisy at the short length, not finite, far from PyTorch's."""
    wrong = [torch.tensor(values) for values in ([1.0, 1.7], [1.0, float("nan")], [1.5, 2.0])]
    report = run("--depths", "2", "--variants", "exact", logits=dict(zip(LOGITS, wrong, strict=True)))
    assert set(report["failed"]) == {f"exact, 2 layers, {tokens} tokens" for tokens in LOGITS}


def test_a_stop_costs_the_number_under_way(run: Any, tmp_path: Path) -> None:
    """All times are saved, and the profile of the last length, which is made first, for its shapes are still bound."""
    with pytest.raises(KeyboardInterrupt):
        run("--depths", "2", "--variants", "exact", stop=32768)
    short, long = json.loads((tmp_path / "out" / "prefill.json").read_text())["engines"][0]["rows"]
    assert short == {"tokens": 32768, "ms": short["ms"], "from_torch": 0.0}
    assert long["tokens"] == 131072 and long["plugin_ms"] > 0


def test_a_stop_within_the_model_keeps_what_was_measured(run: Any, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run("--depths", "2", within={131072: KeyboardInterrupt()})
    report = json.loads((tmp_path / "out" / "prefill.json").read_text())
    assert set(report["fa4_ms_alone"]) == {"32768", "131072"} and [found["tokens"] for found in report["in_model"]] == [32768]


def test_no_depth_begins_that_would_end_too_late(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the clock finds it ten seconds later, so that two layers take some hundreds."""
    monkeypatch.setattr(bench_prefill, "time", SimpleNamespace(perf_counter=itertools.count(0.0, 10.0).__next__))
    report = run("--depths", "2", "40", "--seconds", "1000")
    assert set(report["missing"]) == {"40 layers"} and "of 1000 s" in report["missing"]["40 layers"] and len(report["engines"]) == 3
    assert all(result["least"] is None for result in report["targets"]), "one depth gives no slope"
