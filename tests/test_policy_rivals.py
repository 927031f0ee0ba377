"""What a policy is held against at equal cost: which settings, in which order, at what keys, and on which text."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from commands import run

from hyperattention.config import PRESETS, Config
from hyperattention.export.policy import read_policy
from hyperattention.validate.cost import keys_per_query
from hyperattention.validate.policy.candidates import Candidate, candidates
from hyperattention.validate.policy.choose import Option
from hyperattention.validate.policy.rivals import FAMILIES, NEAR, Field

LENGTH = 8192
LAYERS = 5


@functools.cache
def settings() -> list[Candidate]:
    return candidates(LENGTH, True, {})


def keys(candidate: Candidate) -> float:
    """Of a causal layer."""
    return keys_per_query(candidate.config(Config(causal=1).exact()), LENGTH)


def field(chosen: tuple[int, ...]) -> Field:
    """Of a search that chose these candidates; the loss predicted for a candidate is a number of its own in every layer."""
    layers = [(2 * number, Config(causal=1, seed=number).exact()) for number in range(LAYERS)]
    options = [[Option(c, 1.0, (c * 37 % 101) * (1 + number)) for c in range(len(settings()))] for number in range(LAYERS)]
    search: Any = SimpleNamespace(
        candidates=settings(), layers=layers, weights=[1 / LAYERS] * LAYERS, length=LENGTH, exact_keys=keys(settings()[-1])
    )
    found: Any = SimpleNamespace(trial=SimpleNamespace(choice=SimpleNamespace(candidates=chosen)), options=options)
    return Field(search, found, {})


def mean(chosen: tuple[int, ...]) -> float:
    return sum(keys(settings()[c]) for c in chosen) / LAYERS


EXACT = -1
MIXED = (47, 21, 42, 54, 7)


@pytest.mark.parametrize("exact", [(), (1,), (0, 3)], ids=["none-exact", "one-exact", "two-exact"])
def test_every_setting_of_equal_keys_competes_and_the_best_predicted_run(exact: tuple[int, ...]) -> None:
    last = len(settings()) - 1
    chosen = tuple(last if number in exact else c for number, c in enumerate(MIXED))
    ranked = field(chosen).ranked(3)
    for family, kept in zip(FAMILIES, ((), exact), strict=True):
        if family == FAMILIES[1] and not exact:
            assert family not in ranked.settings
            continue
        expected = []
        for number in range(last):
            joint = tuple(last if place in kept else number for place in range(LAYERS))
            if (1 - NEAR) * mean(chosen) <= mean(joint) <= (1 + NEAR) * mean(chosen):
                loss = sum((c * 37 % 101) * (1 + place) for place, c in enumerate(joint))
                expected.append((loss, mean(joint), settings()[number].attributes))
        expected.sort(key=lambda row: row[:2])
        rows = [rival for rival in ranked.rivals if rival.name == family]
        assert ranked.settings[family] == len(expected) > 0
        assert [(r.predicted_kl, pytest.approx(r.keys), r.attributes) for r in rows] == expected[:3]
        assert {r.exact for r in rows} <= {tuple(2 * place for place in kept)}


def test_the_window_has_the_policys_keys_with_its_exact_layers_and_without() -> None:
    chosen = (len(settings()) - 1, *MIXED[1:])
    of = field(chosen)
    windows = [rival for rival in of.ranked(1).rivals if rival.name.startswith("window")]
    assert [rival.exact for rival in windows] == [(), (0,)]
    for rival in windows:
        configs = of.configs(rival)
        counted = [keys_per_query(config, LENGTH) for config in configs.values()]
        assert rival.keys == pytest.approx(sum(counted) / LAYERS) and 0.97 * mean(chosen) < rival.keys <= mean(chosen) * (1 + 1e-9)
        approximate = [config for index, config in configs.items() if index not in rival.exact]
        assert {(c.num_blocks, c.sample_size, c.local_overlap) for c in approximate} == {(0, 0, 1)}
        assert [config.seed for config in configs.values()] == list(range(LAYERS))
        assert all(configs[index].is_exact(LENGTH, LENGTH) for index in rival.exact)


def test_the_preset_of_the_paper_runs_at_its_own_keys_and_the_policy_not_against_itself() -> None:
    shared = (20,) * LAYERS
    ranked = field(shared).ranked(64)
    (paper,) = [rival for rival in ranked.rivals if rival.name == "paper"]
    assert paper.keys == pytest.approx(keys_per_query(PRESETS["paper"], LENGTH)) and paper.predicted_kl is None
    assert settings()[20].attributes not in [rival.attributes for rival in ranked.rivals]


def test_where_no_setting_has_as_many_keys_the_nearest_run() -> None:
    chosen = (0,) * LAYERS
    of = field(chosen)
    of.keys = 1.5 * max(keys(candidate) for candidate in settings()[:-1])
    ranked = of.ranked(2)
    assert ranked.settings[FAMILIES[0]] == 0
    nearest = sorted((keys(candidate) for candidate in settings()[:-1]), reverse=True)[:2]
    assert [rival.keys for rival in ranked.rivals if rival.name == FAMILIES[0]] == pytest.approx(nearest)


@pytest.mark.native
def test_rivals_are_run_on_text_that_the_search_has_not_read(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = tiny.save(tmp_path / "model", vocab_size=256, max_position_embeddings=1200)
    text = tmp_path / "text.txt"
    text.write_bytes((Path(__file__).parent / "data" / "heldout.txt").read_bytes()[:12000])
    fixed = [part for name in ("exact_below=32", "local_size=32", "block_size=16", "pool_size=4", "sinks=4") for part in ("--fix", name)]
    given = ("--text", text, "--input-ids", "bytes", "--length", "1155", "--tail", "32", "--windows", "1", "--budget", "keys=250", *fixed)
    policy = functools.partial(run, capfd, "hyperattention", "policy", model, *given, "--fix", "selector=blocks", "--json")
    out = tmp_path / "p.json"
    plain = json.loads(policy("--out", out).out)
    assert plain["policy"]["rivals"] is None
    result = policy("--out", out, "--resume", "--rivals", "2")
    found = json.loads(result.out)
    judged = read_policy(out).rivals
    assert judged is not None and judged == found["policy"]["rivals"] and found["taken_over"] == plain["measured"]
    assert judged["text"]["from"] == found["policy"]["calibration"]["to"] == 3000 and judged["text"]["to"] == 12000
    families = [row["name"] for row in judged["rows"]]
    assert families.count(FAMILIES[0]) == min(2, judged["settings"][FAMILIES[0]] or 2) and "window + sinks, all layers" in families
    for row in judged["rows"]:
        assert 0 < row["keys"] < found["policy"]["exact_keys"] and set(row["verified"]["needle"]) >= {"exact", "all_positions"}
    kl = [of["all_positions"]["kl"]["mean"] for of in (judged["policy"], *(row["verified"] for row in judged["rows"]))]
    assert min(kl) > 0 and judged["policy"] != found["policy"]["verified"]
    beaten = sum(value > kl[0] for value in kl[1:])
    assert f"all positions: it beats {beaten} of {len(kl) - 1} rivals in KL" in " ".join(result.err.split())
    again = json.loads(policy("--out", out, "--resume", "--rivals", "2").out)
    assert again["measured"] == 0 and again["policy"] == found["policy"]
