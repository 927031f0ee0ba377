"""The look-ahead test on one layer's own Q, K, V and on a whole language model: what `look_ahead` of report.json holds (issue 7)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hyperattention.config import Config
from hyperattention.export.patch import Patched
from hyperattention.export.switched import Captured
from hyperattention.validate.distributions import approximates
from hyperattention.validate.hard_inputs import CPU, Bounds, first_row
from hyperattention.validate.look_ahead import BLOCK_END, VARIANTS, name_of, places, summary, variants
from hyperattention.validate.operators import Operator
from hyperattention.validate.regimes import language_model
from hyperattention.validate.workbench import Workbench

GPU = Bounds(length=32768, heads=2**31)  # what a GPU is given at most
MODEL_PLACES = {"cpu": 1, "cuda": 4}  # tokens of the whole model that are changed, one at a time


def measure_look_ahead(bench: Workbench, captured: Sequence[Captured], ids: Tensor | None) -> dict | None:
    """report.json's `look_ahead`: the operator on the layer of `captured` that `judged_layer` takes, and, where ids int [1, S]
    are given, the whole model on as many of them as that layer has rows. None where no causal layer approximates.
    """
    layer = judged_layer(captured)
    if layer is None:
        return None
    n, count = layer.k.shape[2], MODEL_PLACES[bench.device.type]
    return {
        "layer": layer.layer,
        "length": n,
        "own": name_of(layer.config),
        "op": op_rows(bench.operator, layer, bench.step),
        "model": None
        if ids is None
        else model_rows(language_model(bench), bench.operator, layer.config, ids[:, :n].to(bench.device), bench.step, count),
        "strict": None,
    }


def look_ahead_steps(whole_model: bool) -> int:
    """Steps that `measure_look_ahead` reports."""
    return len(VARIANTS) * (1 + whole_model)


def judged_layer(captured: Sequence[Captured]) -> Captured | None:
    """The first captured causal call of as many rows as keys that approximates, its first batch row without padding and not more
    heads and tokens than its device is given (`hard_inputs.CPU`, `GPU`); None where there is none. Layers that choose blocks come
    before those of samples alone, which a policy may give and which cannot look ahead."""
    for c in sorted(captured, key=lambda call: call.config.num_blocks == 0):
        if c.config.causal and c.q.shape[2] == c.k.shape[2] and not c.is_exact:
            c = first_row(c, GPU if c.q.is_cuda else CPU)
            if not c.is_exact and approximates(c.config, c.k.shape[2]):
                return c
    return None


def _another(x: Tensor, row: int) -> Tensor:
    """x [..., S, D] whose row is the one half of the sequence away."""
    changed = x.clone()
    changed[..., row, :] = x[..., (row + x.shape[-2] // 2) % x.shape[-2], :]
    return changed


def op_rows(operator: Operator, c: Captured, step: Callable[[str], None]) -> list[dict]:
    """The operator alone on one layer's Q, K, V: a row of `summary` for each variant."""
    n, rows = c.k.shape[2], []
    for name, config in variants(c.config, n).items():
        step(f"{n:,} tokens, look-ahead of layer {c.layer}: {name}")

        def output(row: int | None, config: Config = config) -> Tensor:
            q, k, v = (x if row is None else _another(x, row) for x in (c.q, c.k, c.v))
            return operator(q, k, v, config)[0]

        rows.append(summary(name, config, n, output, places(c.config, n)))
    return rows


def variant_operator(operator: Operator, name: str) -> Operator:
    """`operator` with the config of every causal layer replaced by one of its `variants`; a layer that is exact stays so."""

    def run(q: Tensor, k: Tensor, v: Tensor, config: Config, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        exact = not config.causal or config.is_exact(q.shape[2], k.shape[2])
        return operator(q, k, v, config if exact else variants(config, k.shape[2])[name], lengths)

    return Operator(f"{name}, {operator.name}", run)


def model_rows(
    model: Patched, operator: Operator, config: Config, ids: Tensor, step: Callable[[str], None], count: int | None = None
) -> list[dict]:
    """The whole model on ids int [1, S], every approximate layer under each variant in turn: logits, one token changed at a time.

    `config` is the layer's that the places are taken from; of `count` of them, those at a block's end are the first.
    """
    n = ids.shape[1]
    where = sorted(places(config, n), key=lambda place: place.name != BLOCK_END)[:count]
    rows = []
    for name, variant in variants(config, n).items():
        step(f"{n:,} tokens, look-ahead of the model: {name}")

        def output(row: int | None, name: str = name) -> Tensor:
            with torch.inference_mode(), model.mode("plan", attention=variant_operator(operator, name)):
                return model.forward(_other_token(ids, row)).logits[0]

        rows.append(summary(name, variant, n, output, where))
    return rows


def _other_token(ids: Tensor, row: int | None) -> Tensor:
    """ids [1, S] with another token at `row`: the first different one from half of the sequence away on."""
    if row is None:
        return ids
    line = ids[0]
    onward = line.roll(-((row + len(line) // 2) % len(line)))
    different = onward[onward != line[row]]
    changed = ids.clone()
    changed[0, row] = different[0] if len(different) else (line[row] + 1) % max(2, int(line.max()) + 1)
    return changed
