"""Window + sinks at equal keys per query in the place of the operator: what a sceptic compares an approximation with first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import mean

from torch import Tensor

from hyperattention.config import Config, shared
from hyperattention.export.patch import Captured
from hyperattention.validate.cost import keys_per_query, window_keys
from hyperattention.validate.inputs import Window
from hyperattention.validate.metrics import TokenMetrics, estimate, spread, summarise
from hyperattention.validate.regimes import ALL_BLOCK, TAIL_BLOCK, both_regimes
from hyperattention.validate.window import NAME, window_config, window_operator
from hyperattention.validate.workbench import Workbench


@dataclass
class Baseline:
    """The baseline at one length; a language model's windows are added one by one."""

    bench: Workbench
    length: int
    everywhere: list[TokenMetrics] = field(default_factory=list)
    tails: list[TokenMetrics] = field(default_factory=list)

    def add(self, window: Window, exact: Tensor) -> None:
        """Both regimes on one window, against the exact model's logits [S, vocabulary]."""
        operator = window_operator(self.bench.operator, self.length)
        self.bench.step(f"{self.length:,} tokens: {operator.name}")
        everywhere, tail = both_regimes(self.bench, window, exact, operator)
        self.everywhere.append(everywhere)
        self.tails.append(tail)

    def row(self, layers: Sequence[dict], captured: Sequence[tuple[Config, int]]) -> dict:
        """A row of report.json's `baseline`, beside the rows `layers` of the same layers.

        `captured` has the config and the number of keys of each of them. Tokens' numbers are those of prefill, exact decode, as
        in the gates; None where no window was added.
        """
        windows = [window_config(config, keys) for config, keys in captured]
        costs = [window_keys(window, keys) for window, (_, keys) in zip(windows, captured, strict=True)]
        names = ("local_size", "local_overlap", "sinks") if windows[0].causal else ("local_size", "sinks")
        tails = self.tails
        return {
            "length": self.length,
            "name": NAME,
            "keys_per_query": mean(costs),
            "keys_per_query_exact": mean(keys_per_query(config.exact(), keys) for config, keys in captured),
            "keys_per_query_ours": mean(keys_per_query(config, keys) for config, keys in captured),
            "attributes": shared([{name: getattr(window, name) for name in names} for window in windows]),
            "layers_relative_l2": spread([row["window_relative_l2"] for row in layers]),
            "ours_layers_relative_l2": spread([row["relative_l2"] for row in layers]),
            "windows": len(tails),
            "delta_nats": asdict(estimate([t.delta for t in tails], TAIL_BLOCK)) if tails else None,
            "kl": asdict(estimate([t.kl for t in tails], TAIL_BLOCK)) if tails else None,
            "top1": asdict(estimate([t.top1 for t in tails], TAIL_BLOCK)) if tails else None,
            "all_positions": summarise(self.everywhere, ALL_BLOCK) if self.everywhere else None,
        }


def approximating(captured: Sequence[Captured]) -> list[tuple[Config, int]]:
    """Config and number of keys of the captured calls that approximate, in order: those of `layer_rows`."""
    return [(c.config, c.k.shape[2]) for c in captured if not c.is_exact]
