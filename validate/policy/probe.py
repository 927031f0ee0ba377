"""One layer approximated, all others exact: what that does to the model in each regime, in fp32, so that rounding hides nothing.

In bf16 two exact kernels of another order of sums already differ by more than most single layers add after a prefill; a probe in the
model's own half type would measure that. What a choice really costs in the type of the export is said by whole trials (trial.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import mean

import torch
from torch import nn

from hyperattention.config import Config
from hyperattention.validate.inputs import Window
from hyperattention.validate.policy.trial import ALL, PREFILL, Laboratory, digits_kl, text_metrics

TEXT, PLANTED = "text", "needle"


@contextmanager
def in_fp32(model: nn.Module) -> Iterator[None]:
    """Inside, every weight of a half type is fp32; it is what it was afterwards, bit for bit."""
    halves = [(t, t.dtype) for t in (*model.parameters(), *model.buffers()) if t.dtype in (torch.float16, torch.bfloat16)]
    try:
        for tensor, _ in halves:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, dtype in halves:
            tensor.data = tensor.data.to(dtype)


def probe(
    lab: Laboratory, configs: Mapping[int, Config], regimes: Sequence[str], windows: Sequence[Window], tails: int
) -> dict[str, dict[str, float]]:
    """KL from the exact model, mean nats a token, with `configs` by layer index and all other layers exact, by regime: that of the text
    in `windows` (TEXT), and where keys are planted in them that of the answers' digits (PLANTED), means over the windows.

    Prefill, exact decode is the mean over `tails` tails of `lab.tail` positions, evenly spread over the window's second half; all read the
    keys and values of one approximate pass. Rows before a split hardly depend on those behind it (`regimes.one_pass_serves`: mostly not
    at all), so that one pass stands for all prefills.
    """
    text: dict[str, list[float]] = {regime: [] for regime in regimes}
    digits: dict[str, list[float]] = {regime: [] for regime in regimes}
    for window in windows:
        ids, exact = window.inputs.to(lab.device), lab.exact_logits(window)
        lab.configure(configs)
        ours, cache = lab.approximate(ids, PREFILL in regimes)
        if ALL in regimes:
            text[ALL].append(float(text_metrics(window, exact, ours).kl.mean()))
            if window.answer:
                digits[ALL].append(digits_kl(window, exact, ours))
        del ours  # of a long window with many tokens they are gigabytes
        if PREFILL in regimes:
            rows = []
            for split in splits(ids.shape[1], lab.tail, tails):
                ours = lab.decoded(ids, slice(split, split + lab.tail), cache)
                rows.append(float(text_metrics(window, exact, ours, split).kl.mean()))
                if window.answer and split + lab.tail == len(exact):  # the last tail, which ends the window
                    digits[PREFILL].append(digits_kl(window, exact, ours))
            text[PREFILL].append(mean(rows))
    return {what: {r: mean(kl) for r, kl in found.items()} for what, found in ((TEXT, text), (PLANTED, digits)) if all(found.values())}


def splits(length: int, tail: int, count: int) -> list[int]:
    """Where `count` tails begin, the last one at the end of `length` positions; fewer where the second half has no room for them."""
    last, first = length - tail, min(length // 2, length - tail)
    count = max(1, min(count, (last - first) // tail + 1))
    return [last - (last - first) * i // max(1, count - 1) for i in range(count)][::-1]
