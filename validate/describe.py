"""The plan in the report's words."""

from __future__ import annotations

from hyperattention.config import INT32_MAX, Config, shared
from hyperattention.export.gate_options import LANGUAGE, kind_of
from hyperattention.export.plan import ExportPlan
from hyperattention.geometry import Geometry
from hyperattention.validate.configs import configs

# Whose rows take part in the choice of a row's keys.
_LOOK_AHEAD = {"blocks": "of its query block", "sortlsh": "of its node of the tree, which are up to half of the sequence"}


def _look_ahead(config: Config, length: int) -> int:
    """How many later rows may take part in the choice of a row's keys (rules 22 and 29); a row that sees them anyway has none."""
    if not config.causal:
        return 0
    if config.selector == "blocks":
        return 0 if config.strict_causal else config.block_size - 1
    if config.hash_centre:
        return max(length - 1, 0)  # through the means
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
        "attributes": shared([config.attributes() for config in found]),
        "seeds": {layer.index: c.seed for layer, c in zip(plan.approximate, found, strict=True)},
    }


def plan_notes(plan: ExportPlan, note: str) -> list[str]:
    """What must be said beside the numbers: odd inputs, look-ahead."""
    notes = [note] if note else []
    if plan.approximate and kind_of(plan.task) == LANGUAGE and all(c.strict_causal for c in configs(plan.approximate)):
        notes.append("Look-ahead: none. The keys that a row meets are chosen by rows before its query block (strict_causal).")
    elif plan.approximate and kind_of(plan.task) == LANGUAGE:
        farthest = max(configs(plan.approximate), key=lambda config: _look_ahead(config, plan.seq[2]))
        through = "through Q and the mean of K (hash_centre)" if farthest.hash_centre else "through Q only"
        notes.append(
            f"Look-ahead: the keys that a row meets are chosen for all rows {_LOOK_AHEAD[farthest.selector]}, so later "
            f"rows take part in the choice, {through}. All-position numbers can profit from it; in the regime of the gates the judged "
            f"rows attend exactly."
        )
    return notes


def result_notes(plan: ExportPlan, measured: dict) -> list[str]:
    """What the numbers themselves ask to be said: lengths that are exact, outputs that are no numbers."""
    rows, notes = measured["approximation"], []
    below = [row["length"] for row in rows if row["exact"]]
    if below and plan.approximate:
        lengths = ", ".join(f"{n:,}" for n in below)
        notes.append(f"At {lengths} tokens the op takes its exact path (exact_below): those rows are exact attention.")
    for row in rows:
        for name, count in row["not_finite"].items():
            notes.append(f"Output {name} holds {count} NaN or infinite numbers at {row['length']:,} tokens; exact attention's holds none.")
    asked = {row["length"] for row in measured["needle"]["rows"]} if measured["needle"] else set()
    short = [f"{row['length']:,}" for row in rows if asked and row["length"] not in asked]
    if short:
        notes.append(f"No planted key was asked for at {', '.join(short)} tokens: a prompt is longer than that.")
    return notes
