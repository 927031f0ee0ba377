"""What the operator refuses, and by which words; its random words against published answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from operator_cases import BASE, Case
from oracle_rules import philox4x32

from hyperattention.config import INT32_MAX, RANGES, Config, layer_seed
from hyperattention.draws import philox
from hyperattention.errors import UsageError
from hyperattention.reference import attention

# Known answers of Random123 1.14, kat_vectors, philox4x32-10.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN, ids=["zeros", "ones", "pi"])
def test_oracle_philox_gives_published_answers(counter: tuple, key: tuple, answer: tuple) -> None:
    assert philox4x32(counter, key) == answer


def test_philox_equals_oracle() -> None:
    rng = np.random.default_rng(0)
    counters = np.concatenate([rng.integers(0, 2**32, (4, 200)), np.zeros((4, 1), np.int64), np.full((4, 1), 2**32 - 1)], 1)
    for key in (0, 1, 12345, INT32_MAX):
        c0, c1, c2, c3 = torch.from_numpy(counters)
        words = philox(c0, c1, c2, c3, key)
        assert words.tolist() == [philox4x32((a, b, c, d), (key, 0))[0] for a, b, c, d in counters.T.tolist()]


OUT_OF_RANGE = [(name, bad) for name, (low, high) in RANGES.items() for bad in (low - 1, high + 1)]


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE, ids=str)
def test_config_refuses_values_out_of_range(name: str, value: int) -> None:
    low, high = RANGES[name]
    with pytest.raises(UsageError, match=rf"^{name} is {value}; .* from {low} to {high}$"):
        Config.from_attributes({name: value})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"num_blocks": 2.0}, r"num_blocks is 2.0 \(float\); it takes an integer from 0 to 64"),
        ({"seed": "1"}, r"seed is '1' \(str\)"),
        ({"sinks": None}, r"sinks is None"),
        ({"scale": -1.0}, r"scale is -1.0; it takes 0 .* or a number from 1e-20 to 1e\+20"),
        ({"scale": float("nan")}, r"scale is nan"),
        ({"scale": float("inf")}, r"scale is inf"),
        ({"scale": 1e-60}, r"scale is 1e-60"),
        ({"scale": "1"}, r"scale is '1'"),
        ({"scale": True}, r"scale is True"),
        ({"selector": "lsh"}, r"selector is 'lsh'; it takes one of blocks, sortlsh"),
        ({"block_size": 48, "local_size": 96, "pool_size": 32}, r"block_size 48 .*pool_size 32"),
        ({"local_size": 96}, r"local_size 96 .*block_size 64"),
        ({"strict_causal": 1, "selector": "sortlsh"}, r"strict_causal is 1 with selector sortlsh, .*; take selector blocks"),
        ({"strict_causal": True, "causal": 0}, r"strict_causal is 1 with causal 0, .*; take causal 1, or strict_causal 0"),
    ],
    ids=str,
)
def test_config_refuses(changes: dict, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        Config(**changes)


def test_config_round_trip_and_seeds() -> None:
    c = Config(causal=False, local_size=17, scale=1)  # local_size is ignored without causal
    assert Config.from_attributes(c.attributes()) == c and c.causal == 0 and type(c.causal) is int and type(c.scale) is float
    with pytest.raises(UsageError, match="unknown attribute window; known: .*block_size"):
        Config.from_attributes({"window": 3})
    assert Config().exact().is_exact(INT32_MAX, INT32_MAX) and Config().is_exact(64, 10**6) and not Config().is_exact(65, 4097)
    assert layer_seed(INT32_MAX, 1) == 0 and layer_seed(5, 3) == 8


@pytest.mark.parametrize(
    ("q", "k", "v", "lengths", "text"),
    [
        ((1, 2, 9), (1, 2, 9, 4), (1, 2, 9, 4), None, "3, 4, 4 dimensions"),
        ((2, 2, 9, 4), (1, 2, 9, 4), (1, 2, 9, 4), None, "batch sizes of Q, K, V are 2, 1, 1"),
        ((1, 2, 9, 4), (1, 2, 9, 8), (1, 2, 9, 8), None, "head size of Q is 4, of K 8"),
        ((1, 2, 9, 4), (1, 2, 9, 4), (1, 2, 8, 4), None, "K has 2 heads of 9 keys, V 2 heads of 8"),
        ((1, 3, 9, 4), (1, 2, 9, 4), (1, 2, 9, 4), None, "3 query heads over 2 key heads"),
        ((1, 2, 9, 4), (1, 2, 9, 4), (1, 2, 9, 4), (3, 4), r"lengths has shape \(2,\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(q: tuple, k: tuple, v: tuple, lengths: tuple | None, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        attention(torch.zeros(q), torch.zeros(k), torch.zeros(v), BASE, None if lengths is None else torch.tensor(lengths))


def test_a_plan_of_another_problem_is_refused() -> None:
    q, k, v = Case("plan").inputs()
    plan = attention(q, k, v, BASE).plan
    with pytest.raises(UsageError, match=r"plan's selection has shape \(1, 2, 13, 3\); these inputs take \(1, 2, 7, 3\)"):
        attention(q[:, :, :100], k[:, :, :100], v[:, :, :100], BASE, plan=plan)
