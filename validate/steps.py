"""How many steps a validation will report, counted before it begins from what will be measured: for the progress bar.

Where keys do not follow the input's length one to one, which layers approximate at a length is an estimate.
"""

from __future__ import annotations

from hyperattention.config import Config
from hyperattention.export.gate_options import LANGUAGE, kind_of
from hyperattention.export.plan import ExportPlan
from hyperattention.validate.configs import configs
from hyperattention.validate.distributions import approximates
from hyperattention.validate.feeds import Material, is_padded
from hyperattention.validate.hard_inputs import CPU, hard_steps
from hyperattention.validate.implementation import padded_length
from hyperattention.validate.look_ahead_runs import look_ahead_steps
from hyperattention.validate.measure import Extent, implementation_lengths
from hyperattention.validate.needle import choose_grid
from hyperattention.validate.signature import length_range
from hyperattention.validate.strict_cost import has_twin

TWIN_STEPS = 4  # exporting one: that it is done, and the three of export_onnx


def count_steps(plan: ExportPlan, material: Material, extent: Extent, twin: bool, rival: bool, cuda: bool) -> int:
    """Steps of `validate` from the loading of the model on; `twin`: its fp32 twin is exported, `rival`: an exact backend runs too."""
    lengths = tuple(extent.windows)
    count = 3 + TWIN_STEPS * twin  # loading, the first proof, the last
    count += _implementation(plan, lengths)
    for length, wanted in extent.windows.items():
        count += _at_length(plan, length, len(material.feeds(plan, length, wanted)), rival, hard=length == max(lengths))
    return count + (2 + rival) * len(extent.time_lengths) + choose_grid(plan, material, lengths, extent.needle, cuda).steps


def keys_at(plan: ExportPlan, length: int) -> int:
    """Keys of the attention for an input of `length`: the same share of both exported ranges; exact where they are one range."""
    (low, high), (fewest, _, most) = length_range(plan), plan.seq
    return most if low == high else round(fewest + (length - low) * (most - fewest) / (high - low))


def _approximating(plan: ExportPlan, length: int) -> int:
    """Layers that approximate at this length."""
    keys = keys_at(plan, length)
    return sum(not config.is_exact(keys, keys) for config in configs(plan.approximate))


def _implementation(plan: ExportPlan, lengths: tuple[int, ...]) -> int:
    """Q, K, V at each length tried; the cases of the op and the seeds; the backend and the reference on each whole model."""
    lengths = implementation_lengths(plan, lengths)
    tried = next((i for i, length in enumerate(lengths) if _approximating(plan, length)), None)
    length = lengths[tried or 0]
    count = len(lengths) if tried is None else tried + 1
    if plan.planned:
        count += 3 + max(1, _approximating(plan, length) - 1) + 1
    return count + 3 + 2 * (is_padded(plan) and padded_length(length) > 0)


def _at_length(plan: ExportPlan, length: int, feeds: int, rival: bool, hard: bool) -> int:
    """Every feed by exact attention and by ours, the layers alone, and what reads the first feed only."""
    language = kind_of(plan.task) == LANGUAGE
    layers, keys = _approximating(plan, length), keys_at(plan, length)
    each = 2 if not language else 3 if plan.task == "logits" else 4
    far = any(not config.is_exact(keys, keys) and approximates(config, keys) for config in configs(plan.approximate))
    count = each * feeds + rival + layers + (language and layers > 0)
    if hard and far:
        count += hard_steps()
    if hard and any(_looks_ahead(config, keys) for config in configs(plan.approximate)):
        count += look_ahead_steps(language)
    return count + feeds * (hard and language and has_twin(plan, keys))


def _looks_ahead(config: Config, keys: int) -> bool:
    """Whether the look-ahead test takes such a layer: it approximates within the rows that are looked at."""
    keys = min(keys, max(CPU.length, 2 * config.exact_below))
    return bool(config.causal) and not config.is_exact(keys, keys) and approximates(config, keys)
