"""Rows of report.json's `layers[].heads[]`: each head of a layer against exact attention, and how hard it is for the method."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hyperattention import reference
from hyperattention.config import Config
from hyperattention.export.switched import Captured
from hyperattention.geometry import Geometry
from hyperattention.native import Library
from hyperattention.selection import Plan, make_plan
from hyperattention.validate.hardness import Hardness, measure_hardness, measured_cv
from hyperattention.validate.hardness_columns import ExactLse
from hyperattention.validate.metrics import TensorError


def exact_lse(kernels: Library | None) -> ExactLse:
    """Exact attention's LSE by the kernels, or by the reference where there are none."""

    def run(q: Tensor, k: Tensor, v: Tensor, config: Config) -> Tensor:
        if kernels is None:
            return reference.attention(q, k, v, config.exact()).lse
        return kernels.forward(q, k, v, config.exact())[1]

    return run


def plan_of(call: Captured, kernels: Library | None) -> Plan:
    """The plan of one captured call, as the kernels (or the reference) choose it."""
    if kernels is None:
        return make_plan(call.q, call.k, Geometry.of(call.q, call.k, call.v, call.config))
    problem = call.q, call.k, call.v, call.config
    return Plan(kernels.select(*problem), *kernels.samples(*problem))


def layer_hardness(call: Captured, kernels: Library | None, lse: Tensor) -> Hardness:
    """Hardness of a captured call that approximates, without padding; lse [B,Hq,Sq]: exact attention's. Where it is NaN, so is alpha."""
    return measure_hardness(call.q, call.k, call.v, call.config, plan_of(call, kernels), lse, exact_lse(kernels))


def head_rows(errors: Sequence[TensorError], hardness: Hardness, exact: Tensor, lses: Sequence[Tensor]) -> list[dict]:
    """A row for each query head: errors of its whole output and LSE under the layer's own seed, then its hardness.

    exact [B,Hq,Sq]: LSE of exact attention; lses: ours, under each seed, the layer's own first. Rows whose exact LSE is not finite
    are left out of the LSE numbers.
    """
    rows = []
    for head, error in enumerate(errors):
        true = exact[:, head].double()
        difference = (lses[0][:, head].double() - true)[torch.isfinite(true)]
        rows.append(
            {
                "head": head,
                "relative_l2": error.relative_l2,
                "cosine": error.cosine,
                "norm_ratio": error.norm_ratio,
                "lse_bias": float(difference.mean()),
                "lse_std": float(difference.std()) if difference.numel() > 1 else 0.0,
                **hardness.head(head),
                "cv_measured": measured_cv(hardness, lses, exact, head),
            }
        )
    return rows
