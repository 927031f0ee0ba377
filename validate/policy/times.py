"""Milliseconds of the op under each setting, on the device and on a layer's own Q, K, V: what a policy saves where time is its cost."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median

import torch
from torch import Tensor

from hyperattention.config import Config
from hyperattention.export.switched import Captured
from hyperattention.validate.operators import Operator, exact_by_torch
from hyperattention.validate.runners import synchronise

ROUNDS = {"cuda": 5, "cpu": 3}
CALLS = {"cuda": 3, "cpu": 1}  # in a row for one time


def op_times(operator: Operator, call: Captured, configs: Sequence[Config]) -> list[float]:
    """Milliseconds of one layer's attention under each config; one planned as exact is PyTorch's own exact attention.

    Every round begins with exact attention and every time is told as a multiple of it, so that a clock that drifts moves all of them
    alike; the median of the rounds counts. On a processor one key/value head and its query heads stand for all.
    """
    device = call.q.device.type
    group = call.q.shape[1] // call.k.shape[1]
    heads = call.k.shape[1] if device == "cuda" else 1
    q, k, v = call.q[:1, : heads * group].contiguous(), call.k[:1, :heads].contiguous(), call.v[:1, :heads].contiguous()
    run, exact = exact_by_torch(operator), call.config.exact()
    _milliseconds(run, q, k, v, exact)  # what is loaded at a first call
    rounds, exacts = [], []
    for _ in range(ROUNDS[device]):
        exacts.append(_milliseconds(run, q, k, v, exact))
        rounds.append([_milliseconds(run, q, k, v, config) / exacts[-1] for config in configs])
    unit = median(exacts) * call.k.shape[1] / heads
    return [unit * median(each) for each in zip(*rounds, strict=True)]


def _milliseconds(run: Operator, q: Tensor, k: Tensor, v: Tensor, config: Config) -> float:
    calls = CALLS[q.device.type]
    with torch.inference_mode():
        synchronise(q.device)
        start = time.perf_counter()
        for _ in range(calls):
            run(q, k, v, config)
        synchronise(q.device)
    return (time.perf_counter() - start) * 1000 / calls
