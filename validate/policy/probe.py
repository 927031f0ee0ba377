"""One layer approximated, all others exact: what that does to the model in each regime, in fp32, so that rounding hides nothing.

In bf16 two exact kernels of another order of sums already differ by more than most single layers add after a prefill; a probe in the
model's own half type would measure that. What a choice really costs in the type of the export is said by whole trials (trial.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hyperattention.config import Config
from hyperattention.validate.inputs import Window
from hyperattention.validate.metrics import token_metrics
from hyperattention.validate.operators import exact_by_torch
from hyperattention.validate.policy.trial import ALL, PREFILL, Laboratory
from hyperattention.validate.regimes import exact_decode, prefill


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


def probe(lab: Laboratory, configs: Mapping[int, Config], regimes: Sequence[str], window: Window, tails: int) -> dict[str, float]:
    """KL from the exact model, mean nats a token, with `configs` by layer index and all other layers exact, by regime.

    Prefill, exact decode is the mean over `tails` tails of `lab.tail` positions, evenly spread over the window's second half; all read the
    keys and values of one approximate pass. Rows before a split hardly depend on those behind it (`strict_causal`: not at all), so that
    one pass stands for all prefills.
    """
    ids = window.inputs.to(lab.device)
    exact = lab.exact_logits(window)
    lab.configure(configs)
    with torch.inference_mode(), lab.patched.mode("plan", attention=exact_by_torch(lab.operator)):
        out = lab.patched.forward(ids, use_cache=PREFILL in regimes)
    found = {}
    if ALL in regimes:
        found[ALL] = float(token_metrics(exact, out.logits[0], window.targets).kl.mean())
    if PREFILL in regimes:
        cache = out.past_key_values
        del out
        rows = []
        for split in splits(ids.shape[1], lab.tail, tails):
            part = slice(split, split + lab.tail)
            ours = exact_decode(lab.patched, ids[:, part], _prefix(lab, cache, ids, split))
            rows.append(float(token_metrics(exact[part], ours, window.targets[part]).kl.mean()))
        found[PREFILL] = sum(rows) / len(rows)
    return found


def splits(length: int, tail: int, count: int) -> list[int]:
    """Where `count` tails begin, the last one at the end of `length` positions; fewer where the second half has no room for them."""
    last, first = length - tail, min(length // 2, length - tail)
    count = max(1, min(count, (last - first) // tail + 1))
    return [last - (last - first) * i // max(1, count - 1) for i in range(count)][::-1]


def _prefix(lab: Laboratory, cache: Any, ids: Tensor, split: int) -> Any:
    """transformers' cache of the first `split` positions: a part of `cache`, or where that holds windows, of a pass of its own."""
    from transformers import DynamicCache

    if any(layer.keys is None or layer.keys.shape[2] != ids.shape[1] for layer in cache.layers):
        return prefill(lab.patched, ids[:, :split], exact_by_torch(lab.operator))
    part = DynamicCache()
    for number, layer in enumerate(cache.layers):
        part.update(layer.keys[:, :, :split], layer.values[:, :, :split], number)
    return part
