"""`hyperattention sweep`: which models it measures, what they are held against, its record, --resume and Ctrl-C."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import tiny
import torch
import validation_bench as vb
from commands import Result, run
from torch import Tensor

from hyperattention.config import Config
from hyperattention.errors import UsageError
from hyperattention.export.load import inspect_source, load_model
from hyperattention.export.patch import install
from hyperattention.export.plan import make_plan
from hyperattention.validate import sweep as sweep_module
from hyperattention.validate.inputs import load_corpus, windows
from hyperattention.validate.operators import reference_operator
from hyperattention.validate.sweep_page import markdown, summary
from hyperattention.validate.sweep_plan import METHODS, ORDERS, Point, check_approximates, counts, method_configs, ordered, points, urgent
from hyperattention.validate.sweep_plot import figure

LAYERS, TAIL, LENGTHS = 3, 20, (97, 150)
SET = ["exact_below=32", "block_size=16", "num_blocks=1", "sample_size=8", "local_size=32", "blocks.sinks=4", "paper.num_projections=3"]
Sweep = Callable[..., Result]


# --- which models ------------------------------------------------------------------------------------------------------


def test_orders() -> None:
    errors = {2: 0.3, 5: 0.1, 7: 0.3, 8: 0.2}
    assert ordered("last", list(errors), errors) == [8, 7, 5, 2]
    assert ordered("first", list(errors), errors) == [2, 5, 7, 8]
    assert ordered("error", list(errors), errors) == [5, 8, 2, 7]


@pytest.mark.parametrize("layers", [1, 2, 9, 10, 11, 32], ids=str)
def test_default_counts_run_from_one_to_all(layers: int) -> None:
    found = counts(layers, ())
    assert found[0] == 1 and found[-1] == layers and len(found) == min(layers, 10) and list(found) == sorted(set(found))


def test_points_and_how_many_of_them_are_models_of_their_own() -> None:
    errors = {"blocks": {0: 0.3, 1: 0.1, 2: 0.2}, "window": {0: 0.1, 1: 0.2, 2: 0.3}}
    found = points(97, ORDERS, [0, 1, 2], errors, [1, 3])
    assert [(p.method, p.order, p.layers) for p in found[:6]] == [
        ("blocks", "last", (2,)), ("blocks", "first", (0,)), ("blocks", "error", (1,)),
        ("window", "last", (2,)), ("window", "first", (0,)), ("window", "error", (0,)),
    ]  # fmt: skip
    keys = {point.key for point in found}
    assert len(keys) == 7  # the window's least error is its first layer's
    with pytest.raises(UsageError, match="names 4; this model has 1 to 3"):
        counts(3, (1, 4))


@pytest.mark.parametrize(("layers", "first"), [(1, [1]), (2, [2, 1]), (6, [6, 3]), (10, [10, 5]), (60, [60, 27])], ids=str)
def test_all_layers_and_half_of_them_come_first(layers: int, first: list[int]) -> None:
    assert urgent(counts(layers, ())) == first


def test_attributes_by_method() -> None:
    found = method_configs(METHODS, ["exact_below=7", "paper.local_size=64", "blocks.local_size = 128", "window.num_blocks=3"])
    assert {config.exact_below for config in found.values()} == {7}
    assert (found["paper"].local_size, found["blocks"].local_size, found["window"].local_size) == (64, 128, 128)
    assert (found["paper"].selector, found["window"].selector, found["window"].num_blocks) == ("sortlsh", "blocks", 3)
    assert found["blocks"] == replace(Config(), exact_below=7, local_size=128)


@pytest.mark.parametrize("given", ["seed=3", "exact_below", "poem=1", "dense.sinks=1", "causal=0"], ids=str)
def test_what_is_no_attribute_is_refused(given: str) -> None:
    with pytest.raises(UsageError, match="it takes NAME=VALUE or METHOD.NAME=VALUE"):
        method_configs(METHODS, [given])


def test_values_out_of_range_and_exact_lengths_are_refused() -> None:
    with pytest.raises(UsageError, match="sinks is 5000"):
        method_configs(["blocks"], ["sinks=5000"])
    with pytest.raises(UsageError, match="sinks takes a whole number"):
        method_configs(["blocks"], ["sinks=few"])
    with pytest.raises(UsageError, match="4,096, where paper takes its exact path"):
        check_approximates(method_configs(["paper"], []), [8192, 4096])


# --- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers that read bytes."""
    return tiny.save(tmp_path_factory.mktemp("model") / "tiny", vocab_size=256, num_hidden_layers=LAYERS)


@pytest.fixture
def sweep(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Sweep:
    """Runs the command on the tiny model, its record in tmp_path/sweep unless told otherwise."""

    def call(*arguments: object, lengths: tuple[int, ...] = LENGTHS, text: Path = vb.TEXT) -> Result:
        given = [part for value in SET for part in ("--set", value)]
        given += ["--lengths", ",".join(map(str, lengths)), "--tail", str(TAIL), "--windows", "2", "--threads", "1", "--device", "cpu"]
        return run(capfd, "hyperattention", "sweep", model, "--text", text, "--input-ids", "bytes", *given, "--output",
                   tmp_path / "sweep", *arguments)  # fmt: skip

    return call


def record(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "sweep" / "sweep.json").read_text())
    jsonschema.validate(found, json.loads((vb.ROOT / "docs" / "sweep.schema.json").read_text()))
    return found


def timeless(points: list[dict]) -> list[dict]:
    return [
        {key: value for key, value in point.items() if key not in ("attention_s", "exact_attention_s", "exact_by", "speedup")}
        for point in points
    ]


@pytest.mark.native
def test_every_point_is_a_model_measured_in_both_regimes(sweep: Sweep, model: Path, tmp_path: Path) -> None:
    result = sweep("--json")
    found = record(tmp_path)
    assert result.code == 0, result.err
    assert json.loads(result.out)["points"] == found["points"] and json.loads(result.out)["files"] == [
        "sweep.json",
        "sweep.md",
        "sweep.png",
    ]
    told = [(p["length"], p["method"], p["order"], p["replaced"]) for p in found["points"]]
    assert told == [(n, m, o, k) for n in LENGTHS for m in METHODS for o in ORDERS for k in (1, 2, 3)]
    vb.check_steps(result.err)
    assert len(found["layers"]) == len(LENGTHS) * LAYERS
    errors = {(row["length"], row["layer"]): row["methods"] for row in found["layers"]}
    for point in found["points"]:
        n, own = point["length"], {layer: errors[point["length"], layer][point["method"]]["relative_l2"] for layer in range(LAYERS)}
        assert point["layers"] == ordered(point["order"], range(LAYERS), own)[: point["replaced"]]
        # Nothing reads what the last layer answers in a prefill: alone it changes nothing there.
        assert (point["prefill_exact_decode"]["kl"]["mean"] < 1e-9) == (point["layers"] == [LAYERS - 1])
        assert point["all_positions"]["kl"]["mean"] > 1e-7
        assert point["all_positions"]["tokens"] == 2 * n and point["prefill_exact_decode"]["tokens"] == 2 * TAIL
        rows = [row for row in found["layers"] if row["length"] == n]
        exact = {row["layer"]: row["exact_s"][point["exact_by"]] for row in rows}
        ours = {row["layer"]: row["methods"][point["method"]]["seconds"] for row in rows}
        spent = sum(ours[layer] if layer in point["layers"] else exact[layer] for layer in range(LAYERS))
        assert point["attention_s"] == pytest.approx(spent) and point["speedup"] == pytest.approx(sum(exact.values()) / spent)
    keys = {(p["length"], p["method"]): p["keys_per_query"] for p in found["points"] if p["replaced"] == LAYERS}
    assert all(keys[n, "window"] <= keys[n, "blocks"] < (n + 1) / 2 for n in LENGTHS)
    whole = [p for p in found["points"] if p["replaced"] == LAYERS]
    assert len({json.dumps([p["length"], p["method"], p["all_positions"], p["prefill_exact_decode"]]) for p in whole}) == len(whole) // 3
    assert all(row["ranking"] not in row["judged"] and len(row["judged"]) == 2 for row in found["windows"])


@pytest.mark.native
@pytest.mark.parametrize("method", ["paper", "blocks"])
def test_a_point_against_the_definition(method: str, sweep: Sweep, model: Path, tmp_path: Path) -> None:
    """Losses written out here, over a plan of its own whose layer 1 runs by the reference."""
    assert sweep("--methods", method, "--orders", "last", "--replaced", "2", "--windows", "1", lengths=(150,)).code == 0
    (point,) = record(tmp_path)["points"]
    config, source = method_configs([method], SET)[method], inspect_source(model)
    attributes = {name: value for name, value in config.attributes().items() if name not in ("causal", "seed", "scale")}
    plan = make_plan(source, layers="1-2", attributes=attributes, seq=(1, 150, 150), input_ids="bytes")
    patched = install(load_model(source, torch.float32), plan)
    (window,) = windows(load_corpus(vb.TEXT, "bytes", model, 256, 0, 150), 150, 2)[1:]

    def loss(logits: Tensor, count: int) -> float:
        return float(torch.nn.functional.cross_entropy(logits[0, -count:].double(), window.targets[-count:]))

    with torch.inference_mode():
        with patched.mode("exact"):
            exact = patched.forward(window.inputs).logits
        with patched.mode("plan", reference_operator()):
            ours = patched.forward(window.inputs).logits
            cache = patched.forward(window.inputs[:, :-TAIL], use_cache=True).past_key_values
        with patched.mode("exact"):
            decoded = patched.forward(window.inputs[:, -TAIL:], past_key_values=cache, use_cache=True).logits
    for regime, logits, count in (("all_positions", ours, 150), ("prefill_exact_decode", decoded, TAIL)):
        told = point[regime]
        assert told["exact_nats"]["mean"] == pytest.approx(loss(exact, count), abs=1e-5)
        assert told["delta_nats"]["mean"] == pytest.approx(loss(logits, count) - loss(exact, count), abs=2e-4), regime
        assert abs(told["delta_nats"]["mean"]) > 1e-3  # there is something to compare


@pytest.mark.native
def test_resume_measures_what_is_missing_alone(sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sweep("--methods", "blocks", "--orders", "last,error", lengths=(150,)).code == 0
    first, asked = record(tmp_path), []
    real = sweep_module._Length._numbers

    def counting(self: Any, point: Point) -> dict:
        asked.append(point.key)
        return real(self, point)

    monkeypatch.setattr(sweep_module._Length, "_numbers", counting)
    assert sweep("--methods", "blocks", "--orders", "last,error", "--resume", lengths=(150,)).code == 0
    assert asked == [] and record(tmp_path)["points"] == first["points"]
    assert sweep("--methods", "blocks,window", "--orders", "last,first", "--resume", lengths=(97, 150)).code == 0
    final = record(tmp_path)
    assert [point for point in timeless(final["points"]) if point in timeless(first["points"])] == timeless(first["points"])
    assert len(asked) == len(set(asked)) and final["settings"]["lengths"] == [97, 150] and len(final["points"]) == len(first["points"]) + 21
    assert {(key[0], key[1]) for key in asked} == {(97, "blocks"), (97, "window"), (150, "blocks"), (150, "window")}
    assert (150, "blocks", (0, 1, 2)) not in asked


@pytest.mark.native
def test_ctrl_c_keeps_the_points_and_resume_goes_on(sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, done = sweep_module._Length._numbers, []

    def interrupted(self: Any, point: Point) -> dict:
        done.append(point)
        if len(done) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, point)

    monkeypatch.setattr(sweep_module._Length, "_numbers", interrupted)
    result = sweep("--methods", "blocks", lengths=(150,))
    found = record(tmp_path)
    assert result.code == 130 and "interrupted: 5 points were kept; --resume goes on" in result.out
    assert found["interrupted"] and [point["replaced"] for point in found["points"]] == [2, 3, 2, 3, 3]  # all three are one model
    assert "Interrupted" in (tmp_path / "sweep" / "sweep.md").read_text() and (tmp_path / "sweep" / "sweep.png").is_file()
    assert sweep("--methods", "blocks", "--resume", lengths=(150,)).code == 0
    resumed = record(tmp_path)
    assert not resumed["interrupted"] and len(done) == len({p.key for p in done}) and len(resumed["points"]) == 9
    assert sweep("--methods", "blocks", lengths=(150,)).code == 0
    assert timeless(record(tmp_path)["points"]) == timeless(resumed["points"])


@pytest.mark.native
@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (["--seed", "3"], "another seed"),
        (["--tail", "21"], "another tail"),
        (["--set", "sinks=5"], "another blocks (--set)"),
    ],
    ids=["seed", "tail", "attribute"],
)
def test_resume_under_other_settings_is_refused(changed: list[str], says: str, sweep: Sweep, tmp_path: Path) -> None:
    few = ["--methods", "blocks", "--orders", "last", "--replaced", "1", "--windows", "1"]
    assert sweep(*few, lengths=(97,)).code == 0
    before = record(tmp_path)
    result = sweep(*few, "--resume", *changed, lengths=(97,))
    assert result.code == 2 and says in result.said and record(tmp_path) == before
    (tmp_path / "sweep" / "sweep.json").write_text("{")
    assert sweep(*few, "--resume", lengths=(97,)).said.endswith("leave --resume out to start anew")


@pytest.mark.native
def test_resume_without_an_earlier_sweep_begins_one_and_says_so(sweep: Sweep, tmp_path: Path) -> None:
    """A job that may be stopped at any time gives --resume from its first run on."""
    few = ["--methods", "blocks", "--orders", "last", "--replaced", "1", "--windows", "1", "--resume"]
    first, again = (sweep(*few, lengths=(97,)) for _ in range(2))
    said = "holds no sweep.json to go on from; a new sweep begins there"
    assert first.code == again.code == 0 and said in first.said and said not in again.said and len(record(tmp_path)["points"]) == 1


@pytest.mark.native
def test_the_tail_is_at_most_half_of_the_shortest_length(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Nobody who asks for short lengths has to know of a tail."""
    given = [part for value in SET for part in ("--set", value)]
    few = ["--methods", "blocks", "--orders", "last", "--replaced", "1", "--windows", "1", "--threads", "1", "--device", "cpu"]
    result = run(capfd, "hyperattention", "sweep", model, "--text", vb.TEXT, "--input-ids", "bytes", *given, "--lengths", "150,97", *few,
                 "--output", tmp_path / "sweep")  # fmt: skip
    assert result.code == 0, result.said
    assert record(tmp_path)["settings"]["tail"] == 48


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--methods", "blocks,poem"], "--methods is 'blocks,poem'; it takes paper, blocks, window"),
        (["--orders", ""], "--orders is ''"),
        (["--lengths", "16"], "16, where paper takes its exact path"),
        (["--tail", "49"], "--tail is 49; it takes 1 to 48"),
        (["--windows", "0"], "--windows is 0"),
        (["--replaced", "0"], "--replaced names 0; this model has 1 to 3"),
        (["--dtype", "bf16"], "the CPU kernels compute in fp32"),
        (["--lengths", "99999999"], "the longest window needs"),
        (["--output", vb.TEXT], "is no folder"),
    ],
    ids=["methods", "orders", "exact", "tail", "windows", "replaced", "dtype", "long", "output"],
)
@pytest.mark.native
def test_refused_before_any_work(arguments: list[object], says: str, sweep: Sweep, tmp_path: Path) -> None:
    result = sweep(*arguments)
    assert result.code == 2 and says in result.said and not (tmp_path / "sweep").exists()


# --- the pages ---------------------------------------------------------------------------------------------------------


def made() -> dict[str, Any]:
    """A record by hand: losses grow by a thousandth of a nat with every layer."""

    def tokens(replaced: int) -> dict:
        def of(mean: float) -> dict:
            return {"mean": mean, "se": 0.0005, "blocks": 8}

        numbers = dict(exact_nats=of(0.75), delta_nats=of(0.001 * replaced), kl=of(0.0001 * replaced), top1=of(1 - 0.001 * replaced))
        return {"tokens": 640, "windows": 2, **numbers}

    rows = [
        {"length": n, "method": m, "order": o, "replaced": k, "layers": list(range(k)), "keys_per_query": 100.0, "attention_s": 2.0,
         "exact_attention_s": 3.0, "exact_by": "PyTorch SDPA", "speedup": 1.5,
         "all_positions": tokens(k), "prefill_exact_decode": tokens(k)}
        for n in LENGTHS for m in METHODS for o in ORDERS for k in (1, 2, 3)
    ]  # fmt: skip
    layers = [
        {"length": n, "layer": layer, "exact_s": {"PyTorch SDPA": 1.0, "our exact path": 2.0},
         "methods": {m: {"relative_l2": 0.1, "seconds": 0.5} for m in METHODS[:2]}}
        for n in LENGTHS for layer in range(LAYERS)
    ]  # fmt: skip
    return {
        "interrupted": False,
        "model": {"name": "tiny", "layers": 4, "replaceable": 3},
        "settings": {"dtype": "fp32", "windows": 2, "tail": TAIL, "text": {"name": "heldout.txt"}, "methods": dict.fromkeys(METHODS, {})},
        "environment": {"machine": {"gpu": None, "processor": "processor"}},
        "notes": ["A note."],
        "windows": [{"length": n, "ranking": 0, "judged": [7] if n == 150 else [0]} for n in LENGTHS],
        "layers": layers,
        "points": rows,
    }


def test_the_markdown_has_every_point_and_every_layer() -> None:
    found = made()
    text = markdown(found)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]
    assert all(len(row) in (5, 17, 10) for row in rows)
    shown = [row for row in rows if len(row) == 17][1:]
    assert len(shown) == len(found["points"])
    for row, point in zip(shown, found["points"], strict=True):
        assert row[0] == str(point["length"]) and int(row[3]) == point["replaced"]
        nats = 0.75 + 0.001 * point["replaced"]
        assert row[7:9] == [f"{nats:.4f}", f"{math.exp(nats):.4f}"] and row[9].startswith(f"+{0.001 * point['replaced']:.5f}")
    assert len([row for row in rows if len(row) == 10]) == 1 + len(found["layers"])
    assert "At 97 tokens the text holds one window" in text and "- A note." in text and "nterrupted" not in text


def test_the_summary_has_the_middle_and_the_end_of_every_line() -> None:
    rows = summary(made())
    assert [(row[0], row[1], row[2], row[3]) for row in rows] == [
        (f"{n}", m, o, k) for n in LENGTHS for m in METHODS for o in ORDERS for k in ("2", "3")
    ]


def test_the_figure_draws_every_line() -> None:
    found = made()
    axes = figure(found).axes
    assert len(axes) == 3 * len(LENGTHS)
    drawn = {text.get_text() for text in figure(found).legends[0].get_texts()}
    assert len(drawn) == len(METHODS) * len(ORDERS) and "blocks, least error first" in drawn
    lines = [line for line in axes[0].get_lines() if len(line.get_xdata()) == 3]
    assert len(lines) == 9 and all(list(line.get_ydata()) == pytest.approx([0.001, 0.002, 0.003]) for line in lines)
