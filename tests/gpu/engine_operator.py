"""Engines of one node against the reference: types, head sizes, selectors, lengths, masks, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import tensorrt as trt
import torch
from engine_parts import Heads, Runner, compare, random_inputs
from engine_session import BF16, FP16, FP32, LENGTHS, SELECTORS, SMALL, SORTED, Session, check

from hyperattention.config import PRESETS, Config
from hyperattention.export.engine import layer_names
from hyperattention.library import load_cuda


def _both_selectors(session: Session, dtype: torch.dtype) -> dict[str, Any]:
    return {name: session.at_lengths(dtype, Heads(), LENGTHS, config) for name, config in SELECTORS.items()}


@check
def bf16(session: Session) -> dict[str, Any]:
    return _both_selectors(session, BF16)


@check
def fp16(session: Session) -> dict[str, Any]:
    return _both_selectors(session, FP16)


@check
def fp32(session: Session) -> dict[str, Any]:
    return _both_selectors(session, FP32)


@check
def head_sizes(session: Session) -> dict[str, Any]:
    """Padded to a kernel's size, the largest, and values of another size than keys."""
    cases = (
        (SMALL, BF16, Heads(6, 3, 40, 40)),
        (SORTED, FP16, Heads(4, 4, 96, 96)),
        (SMALL, FP32, Heads(4, 1, 192, 128)),
        (SORTED, BF16, Heads(4, 2, 192, 128)),
        (SMALL, FP16, Heads(4, 2, 256, 256)),
    )
    rows = {}
    for config, dtype, heads in cases:
        rows[f"{config.selector} {dtype} {heads.dim}/{heads.dim_v}"] = session.at_lengths(dtype, heads, (333, 4097), config)
    return rows


@check
def inspector(session: Session) -> dict[str, Any]:
    """What the engine says of its layers: the proof that the plugin runs rests on it."""
    engine = session.engine(SMALL, BF16)
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    assert len(layer_names(engine)) == 1, f"one plugin layer, not {layer_names(engine)}: {text}"
    return {"information": json.loads(text)}


@check
def same_bits_as_the_kernels(session: Session) -> dict[str, Any]:
    """The engine runs the library's kernels and nothing else: what they give when they are called without TensorRT."""
    rows = {}
    for name, config in SELECTORS.items():
        inputs = random_inputs(Heads(), 1, 4097, BF16, None, seed=11)
        found = Runner(trt, session.engine(config, BF16))(**inputs)["o"]
        alone, _ = load_cuda().forward(inputs["q"], inputs["k"], inputs["v"], config, inputs["lengths"])
        torch.cuda.synchronize()
        rows[name] = int((found != alone).sum())
    assert not any(rows.values()), f"values that differ: {rows}"
    return rows


@check
def single_rows(session: Session) -> dict[str, Any]:
    return session.at_lengths(BF16, Heads(), (1, 2, 63, 64, 65))


@check
def batch_with_lengths(session: Session) -> dict[str, Any]:
    """Two rows, one of them padded with NaN; and a row without any key."""
    rows = {}
    for name, config in SELECTORS.items():
        runner = Runner(trt, session.engine(config, BF16))
        for seq, lengths in ((4097, [4097, 1500]), (600, [0, 599])):
            inputs = random_inputs(Heads(), 2, seq, BF16, lengths)
            rows[f"{name}, {seq}: {lengths}"] = compare(inputs, config, runner(**inputs)["o"])
    return rows


@check
def without_lengths(session: Session) -> dict[str, Any]:
    inputs = random_inputs(Heads(), 1, 3001, BF16, None)
    runner = Runner(trt, session.engine(SMALL, BF16, lengths=False))
    return compare(inputs, SMALL, runner(**{n: inputs[n] for n in "qkv"})["o"])


@check
def log_sum_exp(session: Session) -> dict[str, Any]:
    rows, inputs = {}, random_inputs(Heads(), 1, 3001, BF16, None)
    for name, config in SELECTORS.items():
        found = Runner(trt, session.engine(config, BF16, lse=True))(**inputs)
        rows[name] = compare(inputs, config, found["o"], found["lse"])
    return rows


@check
def not_causal(session: Session) -> dict[str, Any]:
    return {name: session.at_lengths(BF16, Heads(), (1023, 4097), replace(config, causal=0)) for name, config in SELECTORS.items()}


@check
def presets(session: Session) -> dict[str, Any]:
    """Their own attributes, long enough for both levels of `blocks` (rule 23) and for two levels of the tree of `sortlsh`."""
    rows, heads = {}, Heads(4, 2)
    for name in ("blocks", "paper"):
        config: Config = PRESETS[name]
        inputs = random_inputs(heads, 1, 12289, BF16, None)
        rows[name] = compare(inputs, config, Runner(trt, session.engine(config, BF16, heads, longest=16384))(**inputs)["o"])
    return rows


@check
def refusals(session: Session) -> dict[str, Any]:
    """What cannot run does not build, and the log says why."""
    cases = {
        "5 heads over 2": (Heads(5, 2), "5 query heads over 2 key heads"),
        "head size 44": (Heads(4, 2, 44, 44), "head_dim is 44"),
        "values of 264": (Heads(4, 2, 64, 264), "head_dim_v is 264"),
    }
    told = {}
    for name, (heads, reason) in cases.items():
        start = session.log.path.stat().st_size
        try:
            session.engine(SMALL, BF16, heads)
        except RuntimeError:
            text = session.log.path.read_text()[start:]
            own = [line for line in text.splitlines() if "HyperAttention[" in line]
            assert any(reason in line for line in own), f"{name}: the log does not say '{reason}': {text[-500:]}"
            told[name] = own[-1]
        else:
            raise AssertionError(f"{name}: an engine was built")
    return told
