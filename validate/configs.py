"""The attributes of planned layers, in order."""

from __future__ import annotations

from collections.abc import Iterable

from hyperattention.config import Config
from hyperattention.export.plan import LayerPlan


def configs(layers: Iterable[LayerPlan]) -> list[Config]:
    """The config of each layer that has one: `plan.approximate` and `plan.planned` always do."""
    return [layer.config for layer in layers if layer.config is not None]
