"""What the strict choice of keys costs: the plan with and without `strict_causal`, on the same windows, in both regimes (issue 7)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace

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


@dataclass
class StrictCost:
    """The plan's twin on some windows of one length, in both regimes; it runs in PyTorch by the plan's operator. Only where `has_twin`."""

    bench: Workbench
    length: int
    twins: list[tuple[TokenMetrics, TokenMetrics]] = field(default_factory=list)

    def add(self, window: Window, exact: Tensor) -> None:
        """The next window, whose exact logits are [S, vocabulary]."""
        operator = self.bench.operator
        other = Operator(f"{self._names[1]}, {operator.name}", lambda q, k, v, config, lengths: operator(q, k, v, twin(config), lengths))
        self.bench.step(f"{self.length:,} tokens: {other.name}")
        self.twins.append(both_regimes(self.bench, window, exact, other))

    @property
    def _names(self) -> tuple[str, str]:
        """What the plan is, and what its twin."""
        own = name_of(_with_twin(self.bench.plan, self.length)[0])
        return own, STRICT if own == BLOCKS else BLOCKS

    def row(self, everywhere: Sequence[TokenMetrics], tails: Sequence[TokenMetrics]) -> dict:
        """report.json's `look_ahead.strict`, beside the plan's own metrics of the same windows.

        `cost` is strict less plain, in nats of the target token, token by token.
        """
        result: dict = {"length": self.length, "own": self._names[0]}
        regimes = {"all_positions": ALL_BLOCK, "prefill_exact_decode": TAIL_BLOCK}
        for (regime, block), own, other in zip(regimes.items(), (everywhere, tails), zip(*self.twins, strict=True), strict=True):
            found = dict(zip(self._names, (list(own), list(other)), strict=True))
            pairs = zip(found[STRICT], found[BLOCKS], strict=True)
            result[regime] = {
                "blocks": summarise(found[BLOCKS], block),
                "strict": summarise(found[STRICT], block),
                "cost": asdict(estimate([strict.nll_ours - plain.nll_ours for strict, plain in pairs], block)),
            }
        return result
