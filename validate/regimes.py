"""The two regimes in which a language model is held against exact attention.

All positions: every position attends approximately, as in scoring. Prefill, exact decode: the prompt is read approximately and
the last positions attend exactly over the keys and values that this left behind, as a deployed model runs. The second carries
the gates; the first shows the selector looking ahead, which can make it better than exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hyperattention.config import Config
from hyperattention.export.patch import Patched
from hyperattention.validate.feeds import Feed, feed
from hyperattention.validate.inputs import Window
from hyperattention.validate.metrics import TokenMetrics, token_metrics
from hyperattention.validate.operators import Operator
from hyperattention.validate.signature import batch_rows
from hyperattention.validate.workbench import Workbench

TAIL = 512  # last positions, which decode exactly, where nobody asks for another number
TAIL_BLOCK = 64  # neighbouring tokens of the exact tail that count as one observation
ALL_BLOCK = 256


def token_feed(bench: Workbench, ids: Tensor) -> Feed:
    """The feed of ids int [1, S], in as many equal rows as the export takes at least."""
    return feed(ids, rows=batch_rows(bench.plan))


def language_model(bench: Workbench) -> Patched:
    """The model of a language task, which runs on token ids and a cache."""
    assert isinstance(bench.patched, Patched)
    return bench.patched


def prefill_exact_decode(bench: Workbench, window: Window, operator: Operator | None = None) -> Tensor:
    """Logits [tail, vocabulary] of the last positions, which attend exactly over the approximate prefill's keys and values.

    The prompt is read by the backend where it answers a cache, else in PyTorch; in PyTorch by `operator` where one is given.
    """
    ids = window.inputs.to(bench.device)
    split, model = ids.shape[1] - bench.tail, language_model(bench)
    if bench.plan.task == "prefill" and operator is None:
        cache = _cache(bench.backend.infer(token_feed(bench, window.inputs[:, :split])), bench.device)
    else:
        cache = prefill(model, ids[:, :split], operator or bench.operator)
    return exact_decode(model, ids[:, split:], cache)


@torch.inference_mode()
def prefill(model: Patched, ids: Tensor, operator: Operator) -> Any:
    """transformers' cache after ids int64 [B, S], read as the plan says by `operator`."""
    with model.mode("plan", attention=operator):
        return model.forward(ids, use_cache=True).past_key_values


@torch.inference_mode()
def exact_decode(model: Patched, ids: Tensor, cache: Any) -> Tensor:
    """Logits [S, vocabulary] of ids int64 [1, S], which attend exactly over themselves and `cache`, which is extended."""
    with model.mode("exact"):
        return model.forward(ids, past_key_values=cache, use_cache=True).logits[0]


def one_pass_serves(config: Config, split: int, length: int) -> bool:
    """Whether a node does to the first `split` of `length` tokens what it would do to them alone, so that one pass is also the prefill.

    Causal exact attention does. Selector `blocks` does where no query block lies across the split, or plans look at no later row.
    """
    exact = config.is_exact(length, length)
    if not config.causal or config.is_exact(split, split) != exact:
        return False
    return exact or (config.selector == "blocks" and (bool(config.strict_causal) or split % config.block_size == 0))


def both_regimes(bench: Workbench, window: Window, exact: Tensor, operator: Operator) -> tuple[TokenMetrics, TokenMetrics]:
    """All positions, and prefill with exact decode, of the plan by another operator in PyTorch, against exact logits [S, vocabulary]."""
    ids, model = window.inputs.to(bench.device), language_model(bench)
    with torch.inference_mode(), model.mode("plan", attention=operator):
        logits = model.forward(ids).logits[0]
    everywhere = token_metrics(exact, logits, window.targets)
    del logits
    logits = prefill_exact_decode(bench, window, operator)
    return everywhere, token_metrics(exact[-bench.tail :], logits, window.targets[-bench.tail :])


def _cache(answer: dict, device: torch.device):
    """transformers' cache out of a backend's present.{i}.key and present.{i}.value."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for i in range(sum(name.endswith(".key") for name in answer)):
        cache.update(answer[f"present.{i}.key"][:1].to(device), answer[f"present.{i}.value"][:1].to(device), i)
    return cache


def prefill_backend(bench: Workbench) -> str:
    """Who reads the prompt in the regime prefill, exact decode."""
    return bench.backend.backend if bench.plan.task == "prefill" else f"PyTorch, op by {bench.operator.name}"
