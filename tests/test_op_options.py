"""The attributes of the op as options: what the user names reaches the op, 0 too, and nothing else does."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
import tiny
from commands import run

from hyperattention.config import Config

# Every attribute that is an option, with a value that no preset has by default.
GIVEN = dict(
    selector="blocks", block_size=32, num_blocks=0, pool_size=8, sample_size=0, stratified=0, local_size=96, local_overlap=0,
    sinks=0, exact_below=0, num_projections=9, strict_causal=1,
)  # fmt: skip
DECIDED = {"causal", "scale", "seed"}  # by the model and the export


def options(**given: object) -> list[str]:
    switches = {"strict_causal", "hash_centre"}
    named = [(f"--{name.replace('_', '-')}", [] if name in switches else [str(value)]) for name, value in given.items()]
    return [part for option, value in named for part in (option, *value)]


def in_plan(capfd: pytest.CaptureFixture[str], folder: Path, *words: str) -> dict[str, object]:
    model = tiny.save(folder / "model", num_hidden_layers=1)
    result = run(capfd, "export-model", model, folder / "out", "--layers", "all", "--dry-run", "--json", *words)
    assert result.code == 0, result.err
    return json.loads(result.out)["plan"]["layers"][0]["config"]


def in_bench(capfd: pytest.CaptureFixture[str], folder: Path, *words: str) -> dict[str, object]:
    shape = ("--lengths", "64", "--heads", "1", "--head-dim", "8", "--repeats", "1", "--rivals", "none", "--device", "cpu")
    result = run(capfd, "hyperattention", "bench", "--attention", "--output", folder / "bench", "--json", *shape, *words)
    assert result.code == 0, result.err
    return json.loads(result.out)["presets"]["blocks"]


READS = [in_plan, pytest.param(in_bench, marks=pytest.mark.native)]


def test_every_attribute_is_given_or_decided() -> None:
    assert {field.name for field in fields(Config)} == {*GIVEN, "hash_centre", *DECIDED}


@pytest.mark.parametrize("read", READS)
def test_what_is_given_reaches_the_op(read, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = read(capfd, tmp_path, *options(**GIVEN))
    assert {name: found[name] for name in GIVEN} == GIVEN
    assert found["hash_centre"] == 0


@pytest.mark.parametrize("read", READS)
def test_a_switch_is_one_and_the_rest_stays_the_presets(read, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = read(capfd, tmp_path, "--hash-centre", "--selector", "sortlsh")
    expected = Config(selector="sortlsh", hash_centre=1).attributes()
    assert {name: found[name] for name in expected.keys() - DECIDED} == {name: expected[name] for name in expected.keys() - DECIDED}
