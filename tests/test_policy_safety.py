"""A policy is used for the model, the text and the settings it was measured with, or says so; what else a hostile user tries is refused."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import report_samples as samples
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hyperattention.errors import UsageError
from hyperattention.export.budget import Budget
from hyperattention.export.files import digest
from hyperattention.export.identity import identity
from hyperattention.export.load import inspect_source
from hyperattention.export.plan import ExportPlan, make_plan, warnings
from hyperattention.export.policy import Policy, read_policy
from hyperattention.validate.inputs import Window
from hyperattention.validate.policy import prepare as prepare_module
from hyperattention.validate.policy.interpolate import with_interpolation
from hyperattention.validate.policy.prepare import Options, prepare
from hyperattention.validate.policy.store import Store, is_store

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that reads bytes."""
    return tiny.save(tmp_path_factory.mktemp("safety") / "model", vocab_size=256)


def policy_of(folder: Path, **changes: Any) -> Policy:
    """The sample's policy, as if it were measured on the model in `folder`."""
    source = inspect_source(folder)
    sample = Policy.from_json(samples.policy())
    layers = tuple(replace(layer, name=of.name) for layer, of in zip(sample.layers, source.layers))
    return replace(sample, architecture=source.architecture, layers=layers, identity=identity(source), **changes)


# --- which model ---------------------------------------------------------------------------------------------------------


def one_value(folder: Path) -> None:
    """One value of one tensor, by its smallest step."""
    tensors = load_file(folder / WEIGHTS)
    last = tensors[max(tensors)].view(-1)
    last[-1] = torch.nextafter(last[-1], torch.tensor(torch.inf))
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def two_swapped(folder: Path) -> None:
    """Two tensors of one shape change places: the same bytes under other names."""
    tensors = load_file(folder / WEIGHTS)
    a, b = (f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1))
    save_file({**tensors, a: tensors[b].clone(), b: tensors[a].clone()}, folder / WEIGHTS, {"format": "pt"})


def half(folder: Path) -> None:
    """The weights rounded to bfloat16."""
    save_file({name: tensor.bfloat16() for name, tensor in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS, {"format": "pt"})


def with_code(folder: Path) -> None:
    """A module of Python beside the weights."""
    (folder / "modeling.py").write_text("1")


def config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def in_parts(folder: Path) -> None:
    """The same weights in several files with an index, as a larger model is saved."""
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    (folder / WEIGHTS).unlink()
    loaded.save_pretrained(folder, max_shard_size="20KB")
    assert (folder / "model.safetensors.index.json").is_file()


def with_metadata(folder: Path) -> None:
    """The tensors in another order, and a note in the file."""
    tensors = load_file(folder / WEIGHTS)
    save_file(dict(reversed(tensors.items())), folder / WEIGHTS, {"format": "pt", "note": "copied"})


@dataclass(frozen=True)
class Changed:
    """What is done to a copy of the model, and the part that is then another."""

    name: str
    change: Callable[[Path], None]
    part: str

    def __str__(self) -> str:
        return self.name


@pytest.mark.parametrize(
    "case",
    [
        Changed("one-value", one_value, "weights"),
        Changed("tensors-swapped", two_swapped, "weights"),
        Changed("weights-rounded", half, "weights"),
        Changed("rope", config(rope_parameters={"rope_type": "default", "rope_theta": 5e5}), "config.json"),
        Changed("code", with_code, "the code beside it"),
    ],
    ids=str,
)
def test_the_policy_of_another_model_of_the_same_shape_is_refused(case: Changed, model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    found = policy_of(copy)
    found.check(inspect_source(copy))
    case.change(copy)
    with pytest.raises(UsageError, match=f"another model of this shape: {case.part} .* measured, .* here .*run `hyperattention policy`"):
        found.check(inspect_source(copy))


@pytest.mark.parametrize("change", [in_parts, with_metadata, config(use_cache=False, dtype="bfloat16")], ids=["parts", "order", "loading"])
def test_the_same_weights_otherwise_stored_are_the_same_model(change: Callable[[Path], None], model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "renamed"))
    change(copy)
    policy_of(model).check(inspect_source(copy))


# --- what was measured, taken over ----------------------------------------------------------------------------------------


def changed_value(line: str) -> str:
    data = json.loads(line)
    return json.dumps({**data, "found": 0.0})


@pytest.mark.parametrize(
    "change",
    [
        changed_value,
        lambda line: line[:-9],
        lambda line: "[1, 2]",
        lambda line: "\x00\xff",
        lambda line: '{"key": 3}',
        lambda line: "[" * 9999,
    ],
    ids=["changed", "truncated", "list", "bytes", "half", "deep"],
)
def test_a_measurement_that_is_not_as_it_was_written_is_made_anew(change: Callable[[str], str], tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    first = Store(file, {"model": "a"})
    for number in range(3):
        first.get("op", number, lambda number=number: 0.1 * number)
    lines = file.read_text().splitlines()
    file.write_bytes("\n".join([lines[0], change(lines[1]), lines[2]]).encode("latin-1"))
    again = Store(file, {"model": "a"}, resume=True)
    assert is_store(file)
    assert [again.get("op", number, lambda number=number: 10.0 + number) for number in range(3)] == [0.0, 11.0, 0.2]
    assert (again.made, again.reused) == (1, 2)
    assert Store(file, {"model": "a"}, resume=True).get("op", 1, lambda: 0.0) == 11.0


def test_a_search_says_how_much_it_measures_before_it_begins(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(b"2 + 3 = 5\n" * 3000)
    fixed = dict(exact_below=32, local_size=32, block_size=16, sinks=4)
    prepared = prepare(Options(str(model), text, Budget(nats=0.1), length=1155, input_ids="bytes", fixed=fixed))
    asked: list[int] = []

    def measure(numbers: list[int]) -> list[float]:
        asked.extend(numbers)
        return [1.0] * len(numbers)

    with_interpolation(prepared.candidates, measure)
    settings = len(prepared.candidates) - 1
    assert f"in each layer {settings} settings of the op: the error of {len(asked) - 1} is measured" in prepared.lines()[2]
    assert 0 < len(asked) - 1 < settings and prepared.tail == 512 == prepared.describe()["tail"]
    assert [w for w in prepared.warnings() if "trained for 512" in w and "1,155" in w]


@pytest.mark.parametrize("count", [1, 8, 12], ids=lambda count: f"{count}-windows")
def test_no_key_that_was_asked_for_in_the_search_is_asked_for_on_unseen_text(
    count: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text"
    text.write_bytes(b"2 + 3 = 5\n" * 3000)
    fixed = dict(exact_below=32, local_size=32, block_size=16, sinks=4)
    budget = Budget(needle=0.0)
    prepared = prepare(Options(str(model), text, budget, length=1155, input_ids="bytes", windows=count, fixed=fixed, rivals=1))
    seen: list[list[Window]] = []
    monkeypatch.setattr(prepare_module, "native_operator", lambda library: None)
    monkeypatch.setattr(prepare_module, "Library", lambda *_: None)
    monkeypatch.setattr(prepare_module, "Field", lambda *_: None)
    monkeypatch.setattr(prepare_module, "judged", lambda field, rivals, texts, needles, told: seen.append(needles))
    search = prepared.search(Store(None, {}), lambda step: None)
    prepared.judged(search, None)  # type: ignore[arg-type]
    asked, unseen = ({window.answer for window in windows} for windows in (search.lab.windows, seen[0]))
    assert len(asked) == max(count, 4) and len(unseen) == 4 and not asked & unseen
    starts = [window.start for window in search.lab.windows]
    assert all(b - a >= prepared.length for a, b in itertools.pairwise(starts)), "a token is read twice"


# --- as it was measured ---------------------------------------------------------------------------------------------------


def edited(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    data = samples.policy()
    change(data)
    return data


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda p: p["layers"][0]["attributes"].update(sample_size=64), "changed after it was measured"),
        (lambda p: p["layers"][0]["attributes"].update(seed=3), "layer 0 sets seed, which the model and the export decide"),
        (lambda p: p["layers"][1]["attributes"].update(causal=0), "layer 1 sets causal"),
        (lambda p: p["layers"][1]["attributes"].update(sinks=-1), "sinks"),
        (lambda p: p["verified"]["all_positions"]["kl"].update(mean=0.0), "changed after it was measured"),
        (lambda p: p["calibration"].update(length=32768), "changed after it was measured"),
        (lambda p: p["identity"].update(weights="b" * 64), "changed after it was measured"),
        (lambda p: p.pop("digest"), "no policy of this version"),
        (lambda p: p.update(digest=None), "changed after it was measured"),
        (lambda p: p.update(schema=1), "is of schema 1"),
        (lambda p: p.update(layers=[3]), "no policy of this version"),
    ],
    ids=["samples", "seed", "causal", "range", "verified", "length", "identity", "no-digest", "digest", "schema", "layers"],
)
def test_a_policy_changed_by_hand_is_refused(change: Callable[[dict[str, Any]], Any], words: str, tmp_path: Path) -> None:
    file = tmp_path / "policy.json"
    file.write_text(json.dumps(samples.policy(), sort_keys=True, indent=3))
    assert read_policy(file).to_json() == samples.policy()  # written otherwise, it is the same
    file.write_text(json.dumps(edited(change)))
    with pytest.raises(UsageError, match=words):
        read_policy(file)


def test_the_digest_is_of_what_is_written() -> None:
    told = samples.policy()
    assert told.pop("digest") == digest({name: value for name, value in told.items() if name != "schema"})


@pytest.mark.parametrize(
    "options, notes",
    [
        (dict(seq=(1, 8192, 8192)), []),
        (dict(seq=(1, 8192, 131072)), ["up to 131,072 tokens are exported and the policy was measured at 8,192, 16 times fewer"]),
        (dict(seq=(1, 64, 512)), ["1 to 512 tokens are exported and the policy was measured at 8,192"]),
        (
            dict(seq=(1, 8192, 8192), dtype="bf16", seed=7),
            ["with --dtype fp32, the export has bf16", "with --seed 0, the export has 7"],
        ),
        (dict(seq=(1, 8192, 8192), input_ids="tokens"), ["with --input-ids bytes, the export has tokens"]),
    ],
    ids=["as-measured", "longer", "shorter", "dtype-and-seed", "tokens"],
)
def test_a_plan_tells_how_it_differs_from_what_was_measured(options: dict[str, Any], notes: list[str], model: Path) -> None:
    plan = make_plan(inspect_source(model), layers="auto", policy=policy_of(model), **{"input_ids": "bytes", **options})
    assert len(plan.policy_notes) == len(notes) and all(words in note for words, note in zip(notes, plan.policy_notes, strict=True))
    assert set(plan.policy_notes) <= set(warnings(plan, None))
    assert ExportPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
