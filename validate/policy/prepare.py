"""Everything a search works with, from the options of the command: the model, calibration windows, candidates, kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from hyperattention.config import INT32_MAX
from hyperattention.errors import UnsupportedModel, UsageError
from hyperattention.export import fingerprint
from hyperattention.export.budget import Budget
from hyperattention.export.choices import DEVICES, DTYPES, check_device, choice
from hyperattention.export.gate_options import LANGUAGE, kind_of
from hyperattention.export.patch import Patched
from hyperattention.export.plan import ExportPlan, make_plan
from hyperattention.export.shape_options import MAX_SEQUENCE
from hyperattention.export.source import AttentionLayer, Source, Trust, default_dtype, open_source
from hyperattention.library import ort_library_path, trt_library_path
from hyperattention.native import Library
from hyperattention.validate.inputs import DEPTHS, QUESTION_ROWS, Corpus, Window, load_corpus, needle, needle_room, windows
from hyperattention.validate.operators import native_operator
from hyperattention.validate.policy.calibration import calibration_part, describe_part, unseen_part
from hyperattention.validate.policy.candidates import Candidate, candidates
from hyperattention.validate.policy.interpolate import with_interpolation
from hyperattention.validate.policy.rivals import FAMILIES, Field, judged
from hyperattention.validate.policy.search import Found, Search
from hyperattention.validate.policy.store import Store
from hyperattention.validate.policy.trial import Laboratory
from hyperattention.validate.regimes import TAIL

LONGEST = {"cuda": 32768, "cpu": 8192}  # of a calibration window, unless --length says otherwise
PROBES = {"cuda": 4, "cpu": 2}  # with 2 the layer that loses most was misjudged (byte-lm-30m, 32k); more take minutes on a processor
JUDGED = {"cuda": 8, "cpu": 1}  # rivals are run on so many times as many windows as the search reads, where the text holds them
WINDOWS = 2
ASKING = {"cuda": 8, "cpu": 4}  # windows at least, where keys are planted: one a depth, and again
NEEDLE_SEED = 2**20  # prompts of a seed that no validation uses by default


@dataclass(frozen=True)
class Options:
    """What to search; paths are read, never written into the policy.

    `length` None: as long as the model and the device allow. `tail` None: TAIL, at most half of the length. `probes` None: PROBES.
    Raises UsageError for a value out of range.
    """

    model: str
    text: Path
    budget: Budget
    length: int | None = None
    windows: int = WINDOWS
    tail: int | None = None
    probes: int | None = None
    input_ids: str = "tokens"
    dtype: str | None = None
    device: str = "auto"
    seed: int = 0
    fixed: Mapping[str, Any] = field(default_factory=dict)
    rivals: int = 0  # settings of each family that are run beside the policy on the rest of the text
    trust: Trust = Trust()

    def __post_init__(self) -> None:
        choice("--device", self.device, DEVICES)
        if self.dtype is not None:
            choice("--dtype", self.dtype, DTYPES)
        sizes = (
            ("--rivals", self.rivals, 0, 64),
            ("--length", self.length, 2, MAX_SEQUENCE),
            ("--windows", self.windows, 1, 1024),
            ("--tail", self.tail, 1, 2**20),
        )
        for name, value, low, high in (*sizes, ("--probes", self.probes, 1, 64), ("--seed", self.seed, 0, INT32_MAX - NEEDLE_SEED)):
            if value is not None and not low <= value <= high:
                raise UsageError(f"{name} is {value}; it takes {low} to {high}")


@dataclass(frozen=True)
class Prepared:
    """A search that nothing was measured for yet; no weight is loaded."""

    options: Options
    source: Source
    plan: ExportPlan  # every layer exact
    length: int
    device: torch.device
    part: Corpus
    rest: Corpus  # of the same text, behind `part`
    candidates: list[Candidate]
    tail: int
    probes: int
    windows: int  # as many as were asked for, and where keys are planted enough to tell a recall by

    def describe(self) -> dict[str, Any]:
        """The calibration, for policy.json."""
        return {
            **describe_part(self.part),
            "length": self.length,
            "windows": self.windows,
            "tail": self.tail,
            "needle_prompts": self.windows if self.options.budget.plants else 0,
            "dtype": self.plan.dtype,
            "device": self.device.type,
            "seed": self.options.seed,
        }

    def lines(self) -> list[str]:
        """What will be measured, for people."""
        o, layers = self.options, len(self.plan.planned)
        settings, part, asked = len(self.candidates) - 1, self.part, _asked(self.candidates)
        planted = ", each with a planted key to recall" if o.budget.plants else ""
        return [
            f"{self.source.architecture}, {layers} layers, {self.plan.dtype} on {self.device.type}; budget: {o.budget}",
            f"calibration: tokens 0 to {len(part.ids):,} of {part.name}, {self.windows} windows of {self.length:,}{planted}",
            f"in each layer {settings} settings of the op: the error of {asked} is measured, of the others it lies between; then the "
            f"whole model with one layer approximate, at least {layers * self.probes} times, and with joint choices",
            *([f"then the policy and rivals of equal keys, {o.rivals} of a family, on text behind that"] if o.rivals else []),
        ]

    def warnings(self) -> list[str]:
        """What is allowed and probably not meant."""
        trained = self.source.max_positions
        if trained is None or self.length <= trained:
            return []
        return [f"windows of {self.length:,} tokens: the model was trained for {trained:,}, and what is lost beyond that means little"]

    @property
    def library(self) -> Path:
        """The kernels. Raises EnvironmentFault where they are not built."""
        return trt_library_path() if self.device.type == "cuda" else ort_library_path()

    def fingerprint(self) -> dict[str, Any]:
        """Everything that a measurement reads."""
        return fingerprint.policy(self.source, self.describe(), self.library, self.device.type)

    def search(self, store: Store, step: Callable[[str], None]) -> Search:
        """Loads the model and the kernels; nothing is measured before `run`."""
        patched = self.source.load(self.plan, self.device)
        assert isinstance(patched, Patched)
        cuda = self.device.type == "cuda"
        operator = native_operator(Library(self.library, "ha_cuda_" if cuda else "ha_cpu_", self.device.type))
        lab = Laboratory(patched, operator, self._calibration(), self.tail, self.device)
        return Search(lab, self.options.budget, self.candidates, self.probes, self._weights(), store, step)

    def judged(self, search: Search, found: Found) -> dict[str, Any] | None:
        """The policy beside rivals of equal cost on text that the search did not read (rivals.py); None where none were asked for."""
        count, first = self.options.rivals, len(self.part.ids)
        if not count:
            return None
        told = {**describe_part(self.part), "from": first, "to": first + len(self.rest.ids)}
        prompts = self.options.input_ids == "bytes" and self.length >= needle_room(1)
        seed = NEEDLE_SEED + self.options.seed + max(2, -(-self.windows // len(DEPTHS)))  # behind those of the search's own prompts
        needles = [needle(self.rest, self.length, depth, seed) for depth in DEPTHS] if prompts else []
        texts = windows(self.rest, self.length, JUDGED[self.device.type] * self.options.windows)
        return judged(Field(search, found, self.options.fixed), count, texts, needles, told)

    def count_rivals(self) -> int:
        """About how many steps `judged` reports."""
        return len(FAMILIES) * (self.options.rivals + 1) + 2 if self.options.rivals else 0

    def _calibration(self) -> list[Window]:
        """Windows of text; where the budget limits what is recalled each has a key planted, at one depth after the other."""
        cut = windows(self.part, self.length, self.windows)
        return [self._planted(window, number) for number, window in enumerate(cut)] if self.options.budget.plants else cut

    def _planted(self, window: Window, number: int) -> Window:
        turn, at = divmod(number, len(DEPTHS))
        text = replace(self.part, ids=window.ids[0])
        return replace(needle(text, self.length, DEPTHS[at], NEEDLE_SEED + self.options.seed + turn), start=window.start)

    def _weights(self) -> list[float]:
        """What a key costs in each layer, as a share of all: products of head dimensions and query heads."""
        by_name = {layer.name: layer for layer in self.source.layers}
        found = [_work(by_name[layer.name]) for layer in self.plan.planned]
        return [work / sum(found) for work in found]


def _work(layer: AttentionLayer) -> int:
    return layer.heads_q * (layer.head_dim + layer.head_dim_v)


def prepare(options: Options, say: Callable[[str], None] = lambda text: None) -> Prepared:
    """Opens the model's files and the text. Raises UsageError and UnsupportedModel for what cannot be searched."""
    check_device(options.device)
    device = torch.device("cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu")
    source = open_source(options.model, trust=options.trust, say=say)
    if kind_of(source.task) != LANGUAGE:
        raise UnsupportedModel(
            f"a policy is chosen by the next token, and {source.name} ({source.architecture}) has none; give export-model its layers "
            f"(--layers 0-3,7), and judge them by its validation"
        )
    length = options.length or min(source.max_positions or LONGEST[device.type], LONGEST[device.type])
    tail = min(TAIL, length // 2) if options.tail is None else options.tail
    if tail > length // 2:
        raise UsageError(f"--tail is {tail}; it takes 1 to {length // 2}, half of a window of {length} (--length)")
    dtype = options.dtype or ("fp32" if device.type == "cpu" else default_dtype(source))
    if device.type == "cpu" and dtype != "fp32":
        raise UsageError(f"--dtype {dtype}: the CPU kernels compute in fp32; give --dtype fp32, or run it on a GPU")
    plan = make_plan(
        source, layers="none", dtype=dtype, seq=(1, length, length), input_ids=options.input_ids, seed=options.seed, keep_exact="op"
    )
    if not plan.planned:
        raise UnsupportedModel(
            f"the operator can replace no layer of {source.name}: {source.layers[0].problem if source.layers else 'none'}"
        )
    causal = {layer.config.causal for layer in plan.planned if layer.config is not None}
    if len(causal) > 1:
        raise UnsupportedModel(f"{source.name} has causal and other layers; choose its layers yourself (--layers 0-3,7)")
    settings = candidates(length, bool(causal.pop()), options.fixed)
    if options.budget.plants and options.input_ids != "bytes":
        raise UsageError("--budget needle plants a prompt of bytes; it needs a model that reads them (--input-ids bytes)")
    if options.budget.plants and tail <= QUESTION_ROWS:
        raise UsageError(
            f"--tail is {tail}; with --budget needle it takes more than {QUESTION_ROWS}: a question is asked and answered in the tail, "
            f"behind text"
        )
    if options.budget.plants and length < needle_room(1):
        raise UsageError(f"--budget needle plants prompts of at least {needle_room(1)} bytes; --length is {length}: give a longer one")
    _check_keys(options.budget, settings, plan, length)
    count = max(options.windows, ASKING[device.type] if options.budget.plants else 0)
    needed = count * (length + 1)
    corpus = load_corpus(options.text, options.input_ids, Path(source.model), source.vocab_size, options.seed, length)
    part = calibration_part(corpus, needed)
    rest = unseen_part(corpus, {"calibration": describe_part(part)}, length)
    probes = PROBES[device.type] if options.probes is None else options.probes
    return Prepared(options, source, plan, length, device, part, rest, settings, tail, probes, count)


def _check_keys(budget: Budget, settings: list[Candidate], plan: ExportPlan, length: int) -> None:
    """Raises UsageError where not even the cheapest setting has as few keys as the budget wants; all layers share mask and length."""
    layer = plan.planned[0].config
    assert layer is not None
    least = min(setting.keys(layer, length) for setting in settings)
    if budget.keys is not None and least > budget.keys:
        raise UsageError(
            f"--budget keys={budget.keys:g}: the cheapest setting has {least:,.0f} keys a query at {length:,} tokens; allow as many, or "
            f"fix cheaper attributes (--fix)"
        )


def _asked(settings: list[Candidate]) -> int:
    """Of how many settings the error of the op is measured; nothing is."""
    asked: list[int] = []

    def count(numbers: list[int]) -> list[float]:
        asked.extend(number for number in numbers if settings[number].attributes is not None)
        return [1.0] * len(numbers)

    with_interpolation(settings, count)
    return len(asked)
