"""Chooses what a model reads while it is measured, and at which lengths: text, arrays, the function's own examples, or random inputs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hyperattention.errors import UsageError
from hyperattention.export.function import FunctionSource
from hyperattention.export.gate_options import LANGUAGE, kind_of
from hyperattention.export.held_out import default_lengths
from hyperattention.export.plan import ExportPlan
from hyperattention.export.source import Source
from hyperattention.export.validation import check_material, reads_text
from hyperattention.validate.arrays import load_arrays, load_examples
from hyperattention.validate.feeds import Material, RandomMaterial, TextMaterial
from hyperattention.validate.inputs import load_corpus
from hyperattention.validate.policy.calibration import unseen_part
from hyperattention.validate.signature import length_range


def choose_material(
    source: Source, plan: ExportPlan, text: Path | None, inputs: Path | None, lengths: Sequence[int], seed: int
) -> tuple[Material, tuple[int, ...]]:
    """What the model reads and the lengths to measure, in the given order; `lengths` empty: as many as the export and the model hold.

    Raises UsageError for a text or arrays that the model does not read, that are broken or too short, and for a length that was not
    exported.
    """
    check_material(source, plan, text, inputs)
    of_text = reads_text(source, plan)
    low, high = length_range(plan)
    top = min(high, source.max_positions or high) if of_text else high
    if inputs is not None:
        arrays = load_arrays(inputs, plan, source.vocab_size if of_text else 0)
        return arrays, check_lengths(plan, lengths or default_lengths(low, min(top, max(low, arrays.longest or top))))
    if of_text:
        chosen = check_lengths(plan, lengths or default_lengths(low, top, several=kind_of(plan.task) != LANGUAGE))
        corpus = load_corpus(text, plan.input_ids, Path(source.model), source.vocab_size, seed, max(chosen))
        return TextMaterial(unseen_part(corpus, plan.policy, max(chosen))), chosen
    if isinstance(source, FunctionSource):
        material = load_examples(plan, source.examples(), f"example inputs of {source.name}")
    else:
        material = RandomMaterial(seed, source.vocab_size)
    return material, check_lengths(plan, lengths or default_lengths(low, top))


def check_lengths(plan: ExportPlan, lengths: Sequence[int]) -> tuple[int, ...]:
    """The lengths. Raises UsageError for one that was not exported."""
    low, high = length_range(plan)
    for length in lengths:
        if not low <= length <= high:
            allowed = f"{low} alone" if low == high else f"{low} to {high} (--min-seq, --max-seq of the export)"
            raise UsageError(f"length {length} was not exported; the folder takes {allowed}")
    return tuple(lengths)
