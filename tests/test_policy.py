"""`hyperattention policy` and `export-model --layers auto` on a tiny model: what is chosen holds, comes back the same, and is exported."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest
import tiny
from commands import Runner, contents, run

from hyperattention.config import Config
from hyperattention.errors import UsageError
from hyperattention.export import automatic
from hyperattention.export.bundle import Bundle
from hyperattention.export.files import digest
from hyperattention.export.load import inspect_source
from hyperattention.export.onnx_graph import hyper_nodes
from hyperattention.export.plan import make_plan
from hyperattention.export.policy import FILE, Policy, read_policy
from hyperattention.validate.cost import keys_per_query

pytestmark = pytest.mark.native
# Few settings, of which some approximate 250 tokens much and some little.
FIXED = ("exact_below=32", "local_size=32", "block_size=16", "pool_size=4", "sinks=4", "selector=blocks")
FIX = tuple(part for text in FIXED for part in ("--fix", text))
LENGTH = 1155
SHORT = ("--input-ids", "bytes", "--length", str(LENGTH), "--tail", "32", "--windows", "1", *FIX)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that reads bytes, another with a layer more, and a text."""
    folder = tmp_path_factory.mktemp("policy")
    tiny.save(folder / "model", vocab_size=256, max_position_embeddings=1200)
    tiny.save(folder / "deeper", vocab_size=256, max_position_embeddings=1200, num_hidden_layers=3)
    text = (Path(__file__).parent / "data" / "heldout.txt").read_bytes()[:12000]
    (folder / "text.txt").write_bytes(text)
    return folder


@pytest.fixture
def policy(capfd: pytest.CaptureFixture[str], place: Path) -> Runner:
    """Runs `hyperattention policy` on the model with few settings."""
    return functools.partial(run, capfd, "hyperattention", "policy", place / "model", "--text", place / "text.txt", *SHORT)


@pytest.fixture
def export(capfd: pytest.CaptureFixture[str], place: Path) -> Runner:
    """Runs export-model on the model."""
    return functools.partial(run, capfd, "export-model", place / "model")


@pytest.mark.parametrize(
    "budget",
    ["keys=250", "nats=0.02", "kl=0.05,top1=0.9", "kl=0", "speedup=1,kl=5", "keys=300,prefill.needle=0", "needle=0,nats=0.1"],
    ids=str,
)
def test_the_choice_holds_its_budget_by_what_was_measured(budget: str, policy: Runner, tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    result = policy("--budget", budget, "--out", file)
    assert result.code == 0, result.err
    found = read_policy(file)
    limits = found.budget
    for regime in ("all_positions", "prefill_exact_decode"):
        row = found.verified[regime]
        assert row["delta_nats"]["mean"] <= limits.get("nats", 9) and row["kl"]["mean"] <= limits.get("kl", 9)
        assert row["top1"]["mean"] >= limits.get("top1", 0)
    assert (found.verified["needle"] is not None) == ("needle" in budget)
    configs = [Config.from_attributes({**(layer.attributes or Config().exact().attributes()), "causal": 1}) for layer in found.layers]
    keys = [keys_per_query(config, LENGTH) for config in configs]
    assert found.keys == pytest.approx(sum(keys) / len(keys)) and [layer.keys for layer in found.layers] == pytest.approx(keys)
    assert found.exact_keys == (LENGTH + 1) / 2 and found.keys <= limits.get("keys", 9e9) and found.rounding is None
    assert (found.times is not None) == ("speedup" in limits)
    assert found.times is None or found.times["exact_ms"] >= limits["speedup"] * found.times["ms"] > 0
    costs = [point["keys"] for point in found.pareto]
    assert costs == sorted(costs) and costs[-1] <= found.exact_keys + 1e-6 and found.pareto[-1]["predicted_kl"] == 0
    assert all(rival["keys"] <= found.keys or {"keys", "speedup"} & set(limits) for rival in found.fixed)


def test_a_policy_is_deterministic_and_an_interrupted_search_goes_on(policy: Runner, tmp_path: Path) -> None:
    once, again = tmp_path / "once.json", tmp_path / "again.json"
    foreign = {"key": "of another model", "kind": "op", "what": 0, "found": 0, "digest": digest(["of another model", 0])}
    Path(f"{once}.jsonl").write_text(json.dumps(foreign) + "\n")
    anew = policy("--budget", "keys=250", "--out", once, "--json", "--resume")
    assert "its measurements (1) are of another model" in anew.err and "none was taken over" in anew.err
    first, lines = json.loads(anew.out), Path(f"{once}.jsonl").read_text().splitlines()[1:]
    assert first["measured"] == len(lines) > 6 and first["taken_over"] == 0
    half = "\n".join([*lines[:5], lines[5][:40]])
    Path(f"{again}.jsonl").write_text(half)
    second = json.loads(policy("--budget", "keys=250", "--out", again, "--json", "--resume").out)
    assert second["taken_over"] == 5 and second["measured"] == len(lines) - 5
    assert once.read_bytes() == again.read_bytes()
    third = json.loads(policy("--budget", "keys=250", "--out", again, "--json", "--resume").out)
    assert third["measured"] == 0 and third["policy"] == second["policy"]
    other = json.loads(policy("--budget", "keys=235", "--out", again, "--json", "--resume").out)
    assert other["policy"]["keys"] <= 235 and other["taken_over"] > 5
    fewer = json.loads(policy("--budget", "keys=235", "--probes", "1", "--out", again, "--json", "--resume").out)
    assert fewer["taken_over"] > 3 and fewer["policy"]["fingerprint"] != other["policy"]["fingerprint"]
    moved = policy("--budget", "keys=235", "--tail", "33", "--out", again, "--json", "--resume")
    assert json.loads(moved.out)["taken_over"] == 0 and "another model, text, calibration (length, windows, tail" in moved.err


def test_a_budget_out_of_reach_says_the_best_that_was_found(policy: Runner, tmp_path: Path) -> None:
    result = policy("--budget", "nats=0,kl=0,keys=289", "--out", tmp_path / "p.json", "--json")
    found = json.loads(result.out)
    assert result.code == found["exit_code"] == 1 and not (tmp_path / "p.json").exists()
    assert "is not reached: the best found has" in found["error"] and f"{found['keys']:,.0f} keys" in found["error"]
    assert found["best"]["all_positions"]["kl"]["mean"] > 0


def test_keys_that_the_model_itself_forgets_end_a_search_before_it_begins(policy: Runner, tmp_path: Path) -> None:
    budget = ("--budget", "keys=300,prefill.needle=0.9", "--out", tmp_path / "p.json")
    result = policy(*budget, "--json")
    found = json.loads(result.out)
    assert result.code == found["exit_code"] == 1 and not (tmp_path / "p.json").exists()
    assert found["best"]["needle"]["exact"] < 0.9 and found["keys"] == (LENGTH + 1) / 2
    assert "exact attention itself recalls 0.000 of the digits planted in 4 windows of 1,155 tokens" in found["error"]
    (line,) = (tmp_path / "p.json.jsonl").read_text().splitlines()
    assert json.loads(line)["found"] == found["best"]["needle"]["exact"]
    assert policy(*budget, "--resume").code == 1 and (tmp_path / "p.json.jsonl").read_text() == line + "\n"


def test_a_cost_below_every_setting_is_refused(policy: Runner, tmp_path: Path) -> None:
    result = policy("--budget", "keys=2", "--out", tmp_path / "p.json")
    assert result.code == 2 and "the cheapest setting has" in result.err


def test_a_dry_run_says_what_would_be_measured_and_writes_nothing(policy: Runner, tmp_path: Path) -> None:
    result = policy("--out", tmp_path / "p.json", "--dry-run", "--json")
    found = json.loads(result.out)
    assert result.code == 0 and list(tmp_path.iterdir()) == []
    assert found["budget"] == {"nats": 0.005, "regime": "both"} and found["calibration"]["length"] == LENGTH
    assert found["calibration"]["to"] == 3000 and found["settings"] > 5


@dataclass(frozen=True)
class Refused:
    """Options, and words of the error."""

    name: str
    options: tuple[str, ...]
    words: str

    def __str__(self) -> str:
        return self.name


@pytest.mark.parametrize(
    "case",
    [
        Refused("budget", ("--budget", "loss=1"), "--budget names 'loss'"),
        Refused("fix", ("--fix", "seed=1"), "--fix names 'seed'"),
        Refused("no-folder", ("--out", "nowhere/p.json"), "a folder that exists"),
        Refused("too-long", ("--length", "13000"), "longest window needs 13001"),
        Refused("over-half", ("--windows", "9"), "may have half of them"),
        Refused("windows", ("--windows", "0"), "--windows is 0"),
        Refused("needle-without-tail", ("--budget", "needle=1", "--tail", "28"), "takes more than 28"),
        Refused("needle-of-tokens", ("--budget", "needle=1", "--input-ids", "tokens"), "--input-ids bytes"),
    ],
    ids=str,
)
def test_what_cannot_be_searched_is_refused(case: Refused, policy: Runner, tmp_path: Path) -> None:
    result = policy("--out", tmp_path / "p.json", *case.options)
    assert result.code == 2 and case.words in result.said, result.err
    assert list(tmp_path.iterdir()) == []


# --- export ------------------------------------------------------------------------------------------------------------

ATTRIBUTES = ("--exact-below", "32", "--local-size", "32", "--block-size", "16", "--pool-size", "4", "--sinks", "4", "--selector", "blocks")
AUTO = ("--layers", "auto", "--no-validate", "--input-ids", "bytes", "--calibration-length", str(LENGTH), *ATTRIBUTES)


def test_export_measures_a_policy_and_every_node_carries_it(place: Path, export: Runner, tmp_path: Path) -> None:
    out = tmp_path / "out"
    auto = (out, *AUTO, "--text", place / "text.txt", "--budget", "keys=250")
    result = export(*auto, "--json")
    assert result.code == 0, result.err
    plan, policy = Bundle.open(out).plan, read_policy(out / FILE)
    assert plan.policy == policy.to_json() and not Bundle.open(out).changed_files()
    nodes = hyper_nodes(onnx.load(str(out / "model.onnx"), load_external_data=False))
    assert len(nodes) == len(policy.layers) == 2
    for node, layer, planned in zip(nodes, policy.layers, plan.layers, strict=True):
        carried = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        wanted = layer.attributes if layer.attributes is not None else {"exact_below": 2**31 - 1}
        for name, value in wanted.items():
            assert carried[name] == (value.encode() if isinstance(value, str) else value), name
        assert planned.reason == layer.reason and layer.reason in result.err
    assert [p.name for p in tmp_path.iterdir()] == ["out"]

    before = contents(out)
    again = json.loads(export(*auto, "--resume", "--json").out)
    assert "ONNX" in again["reused"] and contents(out)["model.onnx"] == before["model.onnx"]
    assert (out / FILE).is_file() and [p.name for p in tmp_path.iterdir()] == ["out"]

    given = tmp_path / "given"
    result = export(given, "--layers", "auto", "--policy", out / FILE, "--no-validate", "--input-ids", "bytes", "--json")
    assert result.code == 0 and contents(given)["model.onnx"] == before["model.onnx"]


def test_a_policy_of_another_model_is_refused(place: Path, policy: Runner, tmp_path: Path) -> None:
    assert policy("--budget", "keys=300", "--out", tmp_path / "p.json").code == 0
    found, other = read_policy(tmp_path / "p.json"), inspect_source(place / "deeper")
    with pytest.raises(UsageError, match="2 attention layers"):
        found.check(other)
    with pytest.raises(UsageError, match="takes a policy"):
        make_plan(other, layers="auto")
    with pytest.raises(UsageError, match="is of schema 0"):
        Policy.from_json({**found.to_json(), "schema": 0})
    with pytest.raises(UsageError, match="is no policy"):
        Policy.from_json({name: value for name, value in found.to_json().items() if name != "layers"})


def test_a_dry_run_of_the_export_measures_nothing(place: Path, export: Runner, tmp_path: Path) -> None:
    result = export(tmp_path / "out", *AUTO, "--text", place / "text.txt", "--dry-run", "--json")
    found = json.loads(result.out)
    assert result.code == 0 and list(tmp_path.iterdir()) == []
    assert found["policy"]["budget"] == {"nats": 0.005, "regime": "both"} and found["policy"]["calibration"]["length"] == LENGTH
    assert {layer["reason"] for layer in found["plan"]["layers"]} == {"not decided yet: --layers auto"}


def test_a_budget_out_of_reach_ends_the_export_with_its_words(place: Path, export: Runner, tmp_path: Path) -> None:
    impossible = ("--text", place / "text.txt", "--budget", "kl=0,keys=289")
    result = export(tmp_path / "out", *AUTO, *impossible, "--json")
    assert result.code == 1 and "is not reached" in json.loads(result.out)["error"] and list(tmp_path.iterdir()) == []
    kept = export(tmp_path / "out", *AUTO, *impossible, "--resume")
    assert kept.code == 1 and [p.name for p in tmp_path.iterdir()] == [".out.policy"]
    assert automatic.work_folder(tmp_path / "out").is_dir()


@pytest.mark.parametrize(
    "case",
    [
        Refused("budget-by-hand", ("--layers", "odd", "--budget", "nats=1"), "--budget: the layers are chosen by --layers odd"),
        Refused("policy-by-hand", ("--policy", "p.json"), "--policy: the layers are chosen by --layers odd"),
        Refused("no-text", ("--layers", "auto"), "give --text FILE"),
        Refused("preset", ("--layers", "auto", "--preset", "paper"), "leave --preset paper out"),
        Refused("both", ("--layers", "auto", "--policy", "p.json", "--budget", "kl=1"), "leave --budget out"),
        Refused(
            "attributes",
            ("--layers", "auto", "--policy", "p.json", "--strict-causal", "--sinks", "8"),
            "leave --sinks and --strict-causal out",
        ),
        Refused("no-file", ("--layers", "auto", "--policy", "nowhere.json"), "nowhere.json cannot be read"),
        Refused("wrong-budget", ("--layers", "auto", "--text", __file__, "--budget", "kl"), "takes NAME=VALUE"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together_are_named(case: Refused, export: Runner, tmp_path: Path) -> None:
    result = export(tmp_path / "out", *case.options)
    assert result.code == 2 and case.words in result.said, result.err
    assert list(tmp_path.iterdir()) == []
