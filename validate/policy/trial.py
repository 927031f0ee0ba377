"""A whole model with a config for each layer, held against itself with exact attention: what a joint choice really costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from hyperattention.config import INT32_MAX, Config
from hyperattention.errors import UsageError
from hyperattention.export.budget import REGIMES
from hyperattention.export.patch import Patched, install
from hyperattention.export.switched import Captured
from hyperattention.validate.inputs import Window, recalled
from hyperattention.validate.metrics import summarise, token_metrics
from hyperattention.validate.operators import Operator, exact_by_torch
from hyperattention.validate.regimes import ALL_BLOCK, TAIL_BLOCK, exact_decode, prefill

ALL, PREFILL = REGIMES
KEPT_BYTES = 2**31  # exact logits that are kept for the next trial; those past it are computed again


@dataclass
class Laboratory:
    """A loaded model whose plan leaves every layer exact, its calibration windows, and the operator that approximates.

    `windows` are text, `needles` prompts with a planted key; the last `tail` positions of a window are those that attend exactly
    in prefill, exact decode.
    """

    patched: Patched
    operator: Operator
    windows: Sequence[Window]
    needles: Sequence[Window]
    tail: int
    device: torch.device
    # By the id of a window that is held, so that no other has it, and the type of the weights.
    kept: dict[tuple[int, torch.dtype], tuple[Window, Tensor]] = field(default_factory=dict)

    def exact_logits(self, window: Window) -> Tensor:
        """Logits [S, vocabulary] of exact attention. Raises UsageError where they are not finite."""
        at = id(window), next(self.patched.model.parameters()).dtype
        if at in self.kept:
            return self.kept[at][1]
        with torch.inference_mode(), self.patched.mode("exact"):
            logits = self.patched.forward(window.inputs.to(self.device)).logits[0]
        if not bool(torch.isfinite(logits).all()):
            raise UsageError(
                "the model itself, with exact attention, answers NaN or infinity on the calibration text; its weights are broken"
            )
        if sum(kept.nbytes for _, kept in self.kept.values()) + logits.nbytes <= KEPT_BYTES:
            self.kept[at] = window, logits
        return logits

    def captured(self, window: Window) -> list[Captured]:
        """The attention calls of the exact model on `window`, one a layer that the operator can replace."""
        with torch.inference_mode(), self.patched.mode("exact"), self.patched.capture() as calls:
            self.patched.forward(window.inputs.to(self.device))
        return calls

    def measure(
        self,
        configs: Mapping[int, Config],
        regimes: Sequence[str],
        windows: Sequence[Window],
        needles: Sequence[Window] = (),
        step: Callable[[str], None] = lambda text: None,
    ) -> dict[str, Any]:
        """The model with `configs` by layer index, all others exact: {regime: nats, KL, top-1 as in report.json; "needle": recall by regime
        and of exact attention, "needle_kl": KL of the answer's digits by regime, both None without needles}. `step` is told what is run.
        """
        self.configure(configs)
        found: dict[str, list] = {regime: [] for regime in regimes}
        for number, window in enumerate(windows):
            exact = self.exact_logits(window)
            for regime in regimes:
                step(f"window {number + 1} of {len(windows)}, {regime.replace('_', ' ')}")
                ours = self._logits(window, regime)
                rows = ours.shape[0]
                found[regime].append(token_metrics(exact[-rows:], ours, window.targets[-rows:]))
        answer: dict[str, Any] = {
            regime: summarise(rows, ALL_BLOCK if regime == ALL else TAIL_BLOCK) for regime, rows in found.items() if rows
        }
        return {**answer, **(self._needle(regimes, needles, step) if needles else {"needle": None, "needle_kl": None})}

    def rounding(self, regimes: Sequence[str]) -> dict[str, Any]:
        """Exact attention by the operator's own kernels in every layer, on all windows: what rounding alone makes of `measure`."""
        exact = {
            layer.index: replace(layer.config.exact(), exact_below=INT32_MAX - 1) for layer in self.patched.plan.planned if layer.config
        }
        return self.measure(exact, regimes, self.windows)

    def configure(self, configs: Mapping[int, Config]) -> None:
        """From now on the plan has `configs` by layer index, and leaves all other layers exact.

        A module follows the plan that was installed last, in the mode exact too: `patched` is always that one.
        """
        planned = self.patched.plan.layers
        layers = [replace(layer, config=configs.get(layer.index, layer.config.exact())) if layer.config else layer for layer in planned]
        self.patched = install(self.patched.model, replace(self.patched.plan, layers=tuple(layers)))

    def _needle(self, regimes: Sequence[str], needles: Sequence[Window], step: Callable[[str], None]) -> dict[str, dict[str, float]]:
        scores: dict[str, list[float]] = {regime: [] for regime in ("exact", *regimes)}
        kl: dict[str, list[float]] = {regime: [] for regime in regimes}
        for number, window in enumerate(needles):
            step(f"needle {number + 1} of {len(needles)}")
            exact, digits = self.exact_logits(window), len(window.answer)
            scores["exact"].append(recalled(exact, window))
            for regime in regimes:
                ours = self._logits(window, regime)
                scores[regime].append(recalled(ours, window))
                kl[regime].append(float(token_metrics(exact[-digits:], ours[-digits:], window.targets[-digits:]).kl.mean()))
        return {name: {regime: mean(values) for regime, values in found.items()} for name, found in (("needle", scores), ("needle_kl", kl))}

    def _logits(self, window: Window, regime: str) -> Tensor:
        """Logits of all positions, or of the last `tail` of them in prefill, exact decode."""
        model, operator, ids = self.patched, exact_by_torch(self.operator), window.inputs.to(self.device)
        if regime == PREFILL:
            split = ids.shape[1] - self.tail
            return exact_decode(model, ids[:, split:], prefill(model, ids[:, :split], operator))
        with torch.inference_mode(), model.mode("plan", attention=operator):
            return model.forward(ids).logits[0]
