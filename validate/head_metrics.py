"""Rows of report.json's `layers[].heads[]`: each head of a layer against exact attention, and how hard it is for the method."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hyperattention.validate.hardness import Hardness, measured_cv
from hyperattention.validate.metrics import TensorError


def head_rows(errors: Sequence[Sequence[TensorError]], hardness: Hardness, exact: Tensor, lses: Sequence[Tensor]) -> list[dict]:
    """A row for each query head: errors of its whole output and LSE under the layer's own seed, its error under each, then its hardness.

    errors: of each head, under each seed, the layer's own first, as are lses, our LSE [B,Hq,Sq]; exact: that of exact attention. Rows
    whose exact LSE is not finite are left out of the LSE numbers.
    """
    rows = []
    for head, each in enumerate(zip(*errors, strict=True)):
        error = each[0]
        true = exact[:, head].double()
        difference = (lses[0][:, head].double() - true)[torch.isfinite(true)]
        rows.append(
            {
                "head": head,
                "relative_l2": error.relative_l2,
                "seeds": {"relative_l2": [one.relative_l2 for one in each]},
                "cosine": error.cosine,
                "norm_ratio": error.norm_ratio,
                "lse_bias": float(difference.mean()),
                "lse_std": float(difference.std()) if difference.numel() > 1 else 0.0,
                **hardness.head(head),
                "cv_measured": measured_cv(hardness, lses, exact, head),
                "cv_seeds": [measured_cv(hardness, [lse], exact, head) for lse in lses] if hardness.config.sample_size else None,
            }
        )
    return rows
