"""What the checks of engine_run.py share: their list, the problems, and engines that are built once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Callable

import tensorrt as trt
import torch
from engine_parts import Heads, Runner, build, compare, op_model, random_inputs

from hyperattention.config import PRESETS, Config
from hyperattention.export.engine import layer_names
from hyperattention.export.engine_log import BuildLog, make_logger

# Small tiles, so that short sequences reach every part of the operator.
SMALL = Config(block_size=32, num_blocks=4, sample_size=64, local_size=256, sinks=16, exact_below=512, seed=7)
SORTED = replace(PRESETS["paper"], block_size=48, num_blocks=2, sample_size=64, local_size=256, sinks=16, exact_below=512, seed=7)
SELECTORS = {"blocks": SMALL, "sortlsh": SORTED}
MIN, OPT, MAX = 1, 2048, 6000
LENGTHS = (333, 1023, 4097, 5555)  # below exact_below, and odd ones on both sides of opt
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

CHECKS: dict[str, Callable[["Session"], dict[str, Any]]] = {}


class NotRun(Exception):
    """What a check lacks on this machine."""


def check(function: Callable[["Session"], dict[str, Any]]) -> Callable[["Session"], dict[str, Any]]:
    """Puts a function into the list of checks: it returns what it measured and raises for a failure."""
    CHECKS[function.__name__] = function
    return function


class Session:
    """Logger, folder and the engines built so far."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.log = BuildLog(out / "engine_run.log")
        self.logger = make_logger(trt, self.log)
        self.engines: dict[str, Any] = {}

    def engine(self, config: Config, dtype: torch.dtype, heads: Heads = Heads(), batch: int = 2, longest: int = MAX, **shape: bool) -> Any:
        """The engine of op_model, built once."""
        key = repr((config, dtype, heads, batch, longest, shape))
        if key not in self.engines:
            sizes = {"q": (heads.q, heads.dim), "k": (heads.kv, heads.dim), "v": (heads.kv, heads.dim_v)}
            profile: dict[str, tuple] = {n: tuple((b, h, s, d) for b, s in self.bounds(batch, longest)) for n, (h, d) in sizes.items()}
            if shape.get("lengths", True):
                profile["lengths"] = tuple((b,) for b, _ in self.bounds(batch, longest))
            self.engines[key] = build(trt, self.logger, op_model(config, dtype, heads, **shape), profile)
        return self.engines[key]

    @staticmethod
    def bounds(batch: int, longest: int) -> tuple[tuple[int, int], ...]:
        """(batch, sequence) at the profile's min, opt and max."""
        return ((1, MIN), (1, OPT), (batch, longest))

    def at_lengths(self, dtype: torch.dtype, heads: Heads, lengths: tuple[int, ...], config: Config = SMALL) -> dict[str, Any]:
        """Errors of one engine against the reference at each length."""
        engine = self.engine(config, dtype, heads)
        runner, rows = Runner(trt, engine), {}
        for seq in lengths:
            inputs = random_inputs(heads, 1, seq, dtype, None, seed=seq)
            rows[str(seq)] = compare(inputs, config, runner(**inputs)["o"])
        return {"layers": layer_names(engine), **rows}
