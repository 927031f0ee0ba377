"""What the strict choice of keys costs: the plan with and without `strict_causal`, on the same window, in both regimes (issue 7)."""

from __future__ import annotations

from dataclasses import asdict, replace

from torch import Tensor

from hyperattention.config import Config
from hyperattention.export.plan import ExportPlan
from hyperattention.validate.configs import configs
from hyperattention.validate.inputs import Window
from hyperattention.validate.look_ahead import BLOCKS, STRICT, name_of
from hyperattention.validate.metrics import TokenMetrics, estimate, summarise
from hyperattention.validate.operators import Operator
from hyperattention.validate.regimes import ALL_BLOCK, TAIL_BLOCK, both_regimes
from hyperattention.validate.workbench import Workbench


def twin(config: Config) -> Config:
    """A causal node of `blocks` with the other value of `strict_causal`; any other node as it is."""
    if config.selector != "blocks" or not config.causal:
        return config
    return replace(config, strict_causal=1 - config.strict_causal)


def has_twin(plan: ExportPlan, length: int) -> bool:
    """Whether some layer that approximates at `length` has one, and all of them the same `strict_causal`."""
    found = _with_twin(plan, length)
    return len({c.strict_causal for c in found}) == 1


def _with_twin(plan: ExportPlan, length: int) -> list[Config]:
    return [c for c in configs(plan.approximate) if twin(c) != c and not c.is_exact(length, length)]


def strict_cost(bench: Workbench, window: Window, exact: Tensor, own: tuple[TokenMetrics, TokenMetrics]) -> dict:
    """report.json's `look_ahead.strict` from one window whose exact logits are [S, vocabulary]; `own`: both regimes of the plan itself.

    `cost` is strict less plain, in nats of the target token, token by token. The twin runs in PyTorch by the plan's operator. Only
    where `has_twin`.
    """
    length = window.inputs.shape[1]
    name = name_of(_with_twin(bench.plan, length)[0])
    other = STRICT if name == BLOCKS else BLOCKS
    operator = Operator(f"{other}, {bench.operator.name}", lambda q, k, v, config, lengths: bench.operator(q, k, v, twin(config), lengths))
    bench.step(f"{length:,} tokens: {operator.name}")
    found = dict(zip((name, other), (own, both_regimes(bench, window, exact, operator)), strict=True))
    regimes = {"all_positions": ALL_BLOCK, "prefill_exact_decode": TAIL_BLOCK}
    result: dict = {"length": length, "own": name}
    for number, (regime, block) in enumerate(regimes.items()):
        plain, strict = found[BLOCKS][number], found[STRICT][number]
        result[regime] = {
            "blocks": summarise([plain], block),
            "strict": summarise([strict], block),
            "cost": asdict(estimate([strict.nll_ours - plain.nll_ours], block)),
        }
    return result
