"""Recall of a planted key as a grid, lengths x depths, for two kinds of prompt, by exact attention and in both regimes.

`single` plants one pair; `multi-key` plants several with different names and asks for one, as RULER's "multi-key" needle task does
(Hsieh et al. 2024), so that it is not enough to notice that something was planted. Answers are teacher forced: one forward pass scores
all eight digits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch

from hyperattention.errors import UsageError
from hyperattention.export.gate_options import LANGUAGE, kind_of
from hyperattention.export.plan import ExportPlan
from hyperattention.validate.feeds import Material, TextMaterial
from hyperattention.validate.inputs import DEPTHS, Corpus, Window, needle, needle_room, recalled
from hyperattention.validate.metrics import estimate
from hyperattention.validate.regimes import prefill_exact_decode, token_feed
from hyperattention.validate.workbench import Workbench

PROMPTS_CUDA, PROMPTS_CPU = 4, 1  # of each cell
REGIMES = ("exact", "all_positions", "prefill_exact_decode")


@dataclass(frozen=True)
class Kind:
    """One kind of prompt: `keys` pairs planted, the first asked for."""

    name: str
    keys: int


KINDS = (Kind("single", 1), Kind("multi-key", 4))
_MOST_KEYS = max(kind.keys for kind in KINDS)


@dataclass(frozen=True)
class Grid:
    """What will be asked: prompts of every kind and depth at each of `lengths`; empty where nothing is."""

    corpus: Corpus | None = None
    lengths: tuple[int, ...] = ()
    prompts: int = 0

    @property
    def steps(self) -> int:
        """Steps that `measure_needle` reports."""
        return len(KINDS) * len(self.lengths) * len(DEPTHS) * self.prompts


def choose_grid(plan: ExportPlan, material: Material, lengths: Iterable[int], wanted: bool | None, cuda: bool) -> Grid:
    """The grid of a run, of every length that holds a prompt, where it is `wanted` (None: with CUDA, which makes it cheap).

    Raises UsageError where it was asked for and the model cannot read the prompts, or no length can hold one.
    """
    if not (cuda if wanted is None else wanted):
        return Grid()
    corpus = material.corpus if isinstance(material, TextMaterial) and kind_of(plan.task) == LANGUAGE else None
    if corpus is None or corpus.tokens != "bytes":
        if wanted:
            raise UsageError("--needle plants a prompt of bytes; it needs a language model exported with --input-ids bytes")
        return Grid()
    fitting = tuple(sorted(n for n in lengths if n >= needle_room(_MOST_KEYS)))
    if wanted and not fitting:
        found, least = max(lengths), needle_room(_MOST_KEYS)
        raise UsageError(f"--needle: a prompt takes at least {least:,} bytes, {found:,} is too short; give a longer one with --lengths")
    return Grid(corpus, fitting, (PROMPTS_CUDA if cuda else PROMPTS_CPU) if fitting else 0)


def measure_needle(bench: Workbench, grid: Grid, seed: int) -> dict | None:
    """report.json's `needle`: for each kind and length the share of digits recalled, a mean over depths, and each depth's own.

    A number is the share of the eight digits that are the first choice, digits before them given; its standard error is over prompts.
    """
    if not grid.steps or grid.corpus is None:
        return None
    rows = []
    for kind in KINDS:
        for length in grid.lengths:
            cells = {depth: _cell(bench, grid, seed, kind, length, depth) for depth in DEPTHS}
            every = {name: [score for cell in cells.values() for score in cell[name]] for name in REGIMES}
            depths = [{"depth": depth, **_estimates(cell)} for depth, cell in cells.items()]
            rows.append({"kind": kind.name, "keys": kind.keys, "length": length, **_estimates(every), "depths": depths})
    return {"prompts": grid.prompts, "rows": rows}


def _cell(bench: Workbench, grid: Grid, seed: int, kind: Kind, length: int, depth: float) -> dict[str, list[float]]:
    """Share recalled of each prompt of one cell, by regime."""
    assert grid.corpus is not None
    scores: dict[str, list[float]] = {name: [] for name in REGIMES}
    for number in range(grid.prompts):
        bench.step(f"{length:,} tokens, {kind.name} needle at depth {depth}, prompt {number + 1} of {grid.prompts}")
        window = needle(grid.corpus, length, depth, seed + number, kind.keys)
        for name, score in _recall(bench, window).items():
            scores[name].append(score)
    return scores


def _recall(bench: Workbench, window: Window) -> dict[str, float]:
    given = token_feed(bench, window.inputs)
    scorer = bench.backend if bench.plan.task == "logits" else bench.scorer
    return {
        "exact": recalled(bench.exact.infer(given)["logits"][0], window),
        "all_positions": recalled(scorer.infer(given)["logits"][0], window),
        "prefill_exact_decode": recalled(prefill_exact_decode(bench, window), window),
    }


def _estimates(scores: dict[str, list[float]]) -> dict[str, dict]:
    return {name: asdict(estimate([torch.tensor(values, dtype=torch.float64)], 1)) for name, values in scores.items()}
