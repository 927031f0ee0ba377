"""A whole model with a config for each layer, held against itself with exact attention: what a joint choice really costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
from hyperattention.validate.metrics import TokenMetrics, summarise, token_metrics
from hyperattention.validate.operators import Operator, exact_by_torch
from hyperattention.validate.regimes import ALL_BLOCK, TAIL_BLOCK, exact_decode, one_pass_serves, prefill

ALL, PREFILL = REGIMES
KEPT_BYTES = 2**31  # exact logits that are kept for the next trial; those past it are computed again


@dataclass
class Laboratory:
    """A loaded model whose plan leaves every layer exact, its calibration windows, and the operator that approximates.

    `windows` are text, in which keys may be planted and asked for at the end; the last `tail` positions of a window are those that
    attend exactly in prefill, exact decode.
    """

    patched: Patched
    operator: Operator
    windows: Sequence[Window]
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

    def recall(self) -> float:
        """Share of the digits planted in `windows`, all of which ask for a key, that exact attention recalls."""
        return mean(recalled(self.exact_logits(window), window) for window in self.windows)

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
    ) -> dict[str, Any]:
        """The model with `configs` by layer index, all others exact: {regime: nats, KL, top-1 as in report.json, of the text in `windows`;
        "needle": recall by regime and of exact attention, "needle_kl": KL of the answer's digits by regime, both of the prompts among
        `windows` and of `needles`, None without any}.
        """
        self.configure(configs)
        text: dict[str, list[TokenMetrics]] = {regime: [] for regime in regimes}
        recall: dict[str, list[float]] = {name: [] for name in ("exact", *regimes)}
        kl: dict[str, list[float]] = {regime: [] for regime in regimes}
        for number, window in enumerate((*windows, *needles)):
            exact = self.exact_logits(window)
            if window.answer:
                recall["exact"].append(recalled(exact, window))
            for regime, ours in self._logits(window, regimes):
                if number < len(windows):
                    text[regime].append(text_metrics(window, exact, ours))
                if window.answer:
                    recall[regime].append(recalled(ours, window))
                    kl[regime].append(digits_kl(window, exact, ours))
                del ours  # before the next are made: of a long window with many tokens they are gigabytes
        planted = bool(recall["exact"])
        return {
            **{r: summarise(rows, ALL_BLOCK if r == ALL else TAIL_BLOCK) for r, rows in text.items() if rows},
            "needle": {name: mean(values) for name, values in recall.items()} if planted else None,
            "needle_kl": {regime: mean(values) for regime, values in kl.items()} if planted else None,
        }

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

    def decoded(self, ids: Tensor, part: slice, cache: Any) -> Tensor:
        """Logits [rows, vocabulary] of `part` of ids int64 [1, S], which attend exactly over what `cache`, of all of ids, holds before it.

        A cache that holds windows does not hold that any more: then a pass of its own reads what is before `part`.
        """
        return exact_decode(self.patched, ids[:, part], self._prefix(cache, ids, part.start))

    def _logits(self, window: Window, regimes: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Logits of all positions, and of the last `tail` of them in prefill, exact decode."""
        ids, split, cache = window.inputs.to(self.device), window.length - self.tail, None
        one_pass = PREFILL in regimes and self._one_pass_serves(split, window.length)
        if ALL in regimes:
            logits, cache = self.approximate(ids, one_pass)
            yield ALL, logits
            del logits
        if PREFILL in regimes and cache is not None:
            yield PREFILL, self.decoded(ids, slice(split, None), cache)
        elif PREFILL in regimes:
            yield PREFILL, exact_decode(self.patched, ids[:, split:], self._prefill(ids[:, :split]))

    def approximate(self, ids: Tensor, use_cache: bool) -> tuple[Tensor, Any]:
        """Logits [S, vocabulary] of ids int64 [1, S] by the plan, and transformers' cache where one is asked for, else None."""
        with torch.inference_mode(), self.patched.mode("plan", attention=exact_by_torch(self.operator)):
            out = self.patched.forward(ids, use_cache=use_cache)
        return out.logits[0], out.past_key_values if use_cache else None

    def _one_pass_serves(self, split: int, length: int) -> bool:
        return all(one_pass_serves(layer.config, split, length) for layer in self.patched.plan.planned if layer.config)

    def _prefill(self, ids: Tensor) -> Any:
        return prefill(self.patched, ids, exact_by_torch(self.operator))

    def _prefix(self, cache: Any, ids: Tensor, split: int) -> Any:
        """transformers' cache of the first `split` positions: a part of `cache`, which stays as it is."""
        from transformers import DynamicCache

        if any(layer.keys is None or layer.keys.shape[2] != ids.shape[1] for layer in cache.layers):
            return self._prefill(ids[:, :split])
        part = DynamicCache()
        for number, layer in enumerate(cache.layers):
            part.update(layer.keys[:, :, :split], layer.values[:, :, :split], number)
        return part


def text_metrics(window: Window, exact: Tensor, ours: Tensor, first: int | None = None) -> TokenMetrics:
    """Of the text in a window, without a question at its end: exact logits of all its rows against `ours` [rows, vocabulary], of those
    from `first` on (None: the last ones)."""
    first = len(exact) - len(ours) if first is None else first
    stop = min(first + len(ours), len(exact) - window.asked)
    return token_metrics(exact[first:stop], ours[: stop - first], window.targets[first:stop])


def digits_kl(window: Window, exact: Tensor, ours: Tensor) -> float:
    """Mean KL from exact logits of the digits that answer a window's question; `ours` [rows, vocabulary] are of its last rows."""
    digits = len(window.answer)
    return float(token_metrics(exact[-digits:], ours[-digits:], window.targets[-digits:]).kl.mean())
