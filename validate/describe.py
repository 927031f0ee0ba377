"""The plan in the report's words."""

from __future__ import annotations

from hyperattention.config import INT32_MAX, Config
from hyperattention.export.plan import ExportPlan
from hyperattention.geometry import Geometry
from hyperattention.validate.approximation import is_exact
from hyperattention.validate.configs import configs
from hyperattention.validate.inputs import Corpus

# Whose rows take part in the choice of a row's keys.
_LOOK_AHEAD = {"blocks": "of its query block", "sortlsh": "of its node of the tree, which are up to half of the sequence"}


def _look_ahead(config: Config, length: int) -> int:
    """How many later rows may take part in the choice of a row's keys (rules 22 and 29)."""
    if config.selector == "blocks":
        return config.block_size - 1
    if not config.causal:
        return length - 1
    levels = Geometry(config, 1, 1, 1, length, length, 1, 1).levels
    return (config.local_size << (levels - 1)) - 1 if levels else 0


def plan_summary(plan: ExportPlan) -> dict:
    """What a reader wants to know of the plan, without reading it."""
    found = configs(plan.approximate)
    return {
        "layers": len(plan.layers),
        "op_layers": [layer.index for layer in plan.planned],
        "approximate_layers": [layer.index for layer in plan.approximate],
        "native_layers": [layer.index for layer in plan.layers if layer.config is None],
        "exact_below": min((c.exact_below for c in found), default=INT32_MAX),
        "look_ahead": max((_look_ahead(c, plan.seq[2]) for c in found), default=0),
        "attributes": found[0].attributes() if found else {},
        "seeds": {layer.index: c.seed for layer, c in zip(plan.approximate, found, strict=True)},
    }


def plan_notes(plan: ExportPlan, corpus: Corpus, lengths: tuple[int, ...]) -> list[str]:
    """What must be said beside the numbers: odd inputs, exact lengths, look-ahead."""
    notes = [corpus.note] if corpus.note else []
    below = [n for n in lengths if is_exact(plan, n)]
    if below and plan.approximate:
        notes.append(
            f"At {', '.join(f'{n:,}' for n in below)} tokens the op takes its exact path (exact_below): those rows are exact attention."
        )
    if plan.approximate:
        notes.append(
            f"Look-ahead: the keys that a row meets are chosen for all rows {_LOOK_AHEAD[configs(plan.approximate)[0].selector]}, so later "
            f"rows take part in the choice, through Q only. All-position numbers can profit from it; in the regime of the gates the judged "
            f"rows attend exactly."
        )
    return notes
