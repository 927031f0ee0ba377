"""Every layer alone, on the Q, K, V of the exact model: its error under each method, and what it takes, beside exact attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from torch import Tensor

from hyperattention.config import Config
from hyperattention.export.patch import exact_attention
from hyperattention.export.switched import Captured
from hyperattention.validate.bench_timing import clock_for
from hyperattention.validate.cost import keys_per_query, window_keys
from hyperattention.validate.metrics import tensor_error
from hyperattention.validate.operators import Operator
from hyperattention.validate.sweep_plan import WINDOW
from hyperattention.validate.window import window_config, window_operator

SDPA, OWN = "PyTorch SDPA", "our exact path"
_RUNS = {"cuda": 5, "cpu": 2}  # timed, after the run whose output is judged


@dataclass(frozen=True)
class Method:
    """A way to replace a layer's attention: the op's attributes, and who computes it at one length."""

    name: str
    config: Config
    operator: Operator

    @classmethod
    def of(cls, name: str, config: Config, operator: Operator, length: int) -> "Method":
        """The method over `length` keys; the window is that of `length`, also in a prefill of fewer."""
        return cls(name, config, window_operator(operator, length) if name == WINDOW else operator)

    def keys(self, length: int) -> float:
        """Keys of a mean query row (validate/cost.py)."""
        if self.name == WINDOW:
            return window_keys(window_config(self.config, length), length)
        return keys_per_query(self.config, length)


def layer_row(c: Captured, length: int, methods: Mapping[str, Method], configs: Mapping[str, Config], operator: Operator) -> dict:
    """A row of sweep.json's `layers` for one captured call of exact attention; `configs` are the layer's own by method.

    `exact_s` has the seconds of PyTorch's exact attention and of the op's exact path on the same inputs; `methods` has for each the
    relative L2 error of the layer's output and the seconds of one call.
    """
    scale = c.config.resolved_scale(c.q.shape[-1])
    exact = {
        SDPA: _timed(c, lambda: exact_attention(c.q, c.k, c.v, scale, bool(c.config.causal)))[1],
        OWN: _timed(c, lambda: operator(c.q, c.k, c.v, c.config.exact())[0])[1],
    }
    found = {}
    for name, method in methods.items():
        o, seconds = _timed(c, lambda: method.operator(c.q, c.k, c.v, configs[name])[0])
        found[name] = {"relative_l2": tensor_error(o, c.o).relative_l2, "seconds": seconds}
    return {"length": length, "layer": c.layer, "exact_s": exact, "methods": found}


def _timed(c: Captured, call: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """The output of a first call, and the median seconds of those after it."""
    o, clock = call(), clock_for(c.q.device.type)
    return o, median(clock(call)[0] for _ in range(_RUNS[c.q.device.type]))


def exact_seconds(rows: Sequence[dict]) -> tuple[str, dict[int, float]]:
    """The faster exact attention over all layers of one length, by name, and its seconds by layer."""
    name = min((SDPA, OWN), key=lambda which: sum(row["exact_s"][which] for row in rows))
    return name, {row["layer"]: row["exact_s"][name] for row in rows}


def cost(rows: Sequence[dict], method: str, layers: Sequence[int]) -> dict:
    """Seconds of the attention of all layers with `layers` replaced, of exact attention alone, and the ratio."""
    name, exact = exact_seconds(rows)
    ours = {row["layer"]: row["methods"][method]["seconds"] for row in rows}
    seconds = sum(ours[layer] if layer in layers else exact[layer] for layer in exact)
    whole = sum(exact.values())
    return {"attention_s": seconds, "exact_attention_s": whole, "exact_by": name, "speedup": whole / seconds}


def errors(rows: Sequence[dict], methods: Sequence[str]) -> Mapping[str, Mapping[int, float]]:
    """Each method's error by layer."""
    return {method: {row["layer"]: row["methods"][method]["relative_l2"] for row in rows} for method in methods}
