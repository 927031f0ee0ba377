"""Each approximate layer alone, on the Q, K, V of the exact model: error of output and LSE, its spread over seeds and rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hyperattention.config import Config
from hyperattention.export.switched import Captured
from hyperattention.native import Library
from hyperattention.validate.hardness_layers import layers_hardness
from hyperattention.validate.head_metrics import head_rows
from hyperattention.validate.implementation import check_plan
from hyperattention.validate.metrics import TensorError, attention_error, head_errors, row_errors, tensor_error
from hyperattention.validate.operators import Operator
from hyperattention.validate.window import window_operator

SEEDS = 5  # the layer's own seed and the four after it
# Quarter decades from 1e-4 to 10, as a histogram of row errors takes them.
EDGES = tuple(10.0 ** (n / 4) for n in range(-16, 5))


def seeds_of(config: Config, count: int = SEEDS) -> list[Config]:
    """The config under its own seed and the `count` - 1 after it."""
    return [replace(config, seed=(config.seed + i) % 2**31) for i in range(count)]


def histogram(errors: Tensor, edges: Sequence[float] = EDGES) -> dict:
    """Counts of `errors` (any shape, >= 0) between neighbouring `edges`, for report.json.

    What lies below the first edge counts in the first bin, what lies above the last, NaN too, in the last: no row is lost.
    """
    inner = torch.tensor(edges[1:-1], dtype=torch.float64, device=errors.device)
    bins = torch.bucketize(errors.double().flatten().nan_to_num(math.inf, math.inf), inner, right=True)
    return {"edges": list(edges), "counts": torch.bincount(bins, minlength=len(edges) - 1).tolist()}


def layer_rows(
    operator: Operator, kernels: Library | None, captured: Sequence[Captured], length: int, step: Callable[[str], None]
) -> list[dict]:
    """One row of report.json's `layers` for each captured layer that approximates at its own length.

    `kernels` (None: nothing to compare) are held against the reference's choices in the first such layer. `seeds` are whole
    outputs under the layer's own seed and the next four; `row_errors` counts the relative L2 error of every row of every head;
    `window_relative_l2` is the error of window + sinks at equal keys per query; `heads` has a row of head_metrics.py for each head.
    """
    rows, window, calls = [], window_operator(operator), [c for c in captured if not c.is_exact]
    told: list[tuple[list[list[TensorError]], Tensor, list[Tensor]]] = []  # of each layer: errors of its heads by seed, LSE, exact and ours
    for c in calls:
        step(f"{length:,} tokens, layer {c.layer} alone")
        differences = check_plan(c, kernels) if kernels and not rows else None
        own, *others = seeds_of(c.config)
        o, lse = operator(c.q, c.k, c.v, own)
        exact_o, exact_lse = operator(c.q, c.k, c.v, c.config.exact())
        errors = [head_errors(o, exact_o)]
        whole = attention_error(o, lse, exact_o, exact_lse, errors[0])
        row = {"layer": c.layer, "length": length, "plan_differences": differences, **whole}
        row["row_errors"] = histogram(row_errors(o, exact_o))
        del o
        spread, lses = [row["relative_l2"]], [lse]
        for other in others:
            other_o, other_lse = operator(c.q, c.k, c.v, other)
            spread.append(tensor_error(other_o, exact_o).relative_l2)
            errors.append(head_errors(other_o, exact_o))
            lses.append(other_lse)
        row["seeds"] = {"relative_l2": spread}
        row["window_relative_l2"] = tensor_error(window(c.q, c.k, c.v, own)[0], exact_o).relative_l2
        _, kept = operator(c.q, c.k, c.v, replace(c.config, sample_size=0))
        mass = torch.exp((kept.double() - exact_lse.double()).clamp(max=0.0))
        row["mass"], row["mass_worst_head"] = float(mass.mean()), float(mass.mean(dim=(0, 2)).min())
        told.append((errors, exact_lse, lses))
        rows.append(row)
    hardness = layers_hardness(calls, kernels, [exact_lse for _, exact_lse, _ in told])
    for row, hard, (errors, exact_lse, lses) in zip(rows, hardness, told, strict=True):
        row["heads"] = head_rows(errors, hard, exact_lse, lses)
    return rows
