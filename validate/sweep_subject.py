"""What a sweep works with: its options, and the loaded model with its text and its kernels."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel

from hyperattention.config import INT32_MAX, Config
from hyperattention.errors import UsageError
from hyperattention.export.choices import DTYPES, INPUT_IDS, check_device, choice
from hyperattention.export.load import TransformersSource, load_model
from hyperattention.export.plan import ExportPlan, make_plan
from hyperattention.export.source import Trust, default_dtype, open_source, torch_dtype
from hyperattention.library import load_cpu, load_cuda
from hyperattention.native import Library
from hyperattention.validate.inputs import Corpus, load_corpus
from hyperattention.validate.operators import Operator, native_operator
from hyperattention.validate.regimes import TAIL
from hyperattention.validate.sweep_plan import check_approximates, counts

LENGTHS = (8192, 16384, 32768)


@dataclass(frozen=True)
class Options:
    """What to measure. `replaced`: numbers of replaced layers, empty for up to ten of them."""

    model: str
    text: Path
    configs: dict[str, Config]
    orders: tuple[str, ...]
    lengths: tuple[int, ...] = LENGTHS
    windows: int = 2
    replaced: tuple[int, ...] = ()
    tail: int = TAIL
    device: str = "auto"
    dtype: str = ""
    input_ids: str = "tokens"
    seed: int = 0
    threads: int = 0
    trust: Trust = field(default_factory=Trust)

    def __post_init__(self) -> None:
        check_device(self.device)
        choice("--input-ids", self.input_ids, INPUT_IDS)
        if self.dtype:
            choice("--dtype", self.dtype, DTYPES)
        ranges = (("--windows", self.windows, 1, 4096), ("--threads", self.threads, 0, 1024), ("--seed", self.seed, 0, INT32_MAX))
        for name, value, low, high in ranges:
            if not low <= value <= high:
                raise UsageError(f"{name} is {value}; it takes {low} to {high}")
        if min(self.lengths, default=0) < 2:
            raise UsageError(f"--lengths is {','.join(map(str, self.lengths)) or 'empty'}; it takes numbers of at least 2")
        check_approximates(self.configs, self.lengths)
        if not 1 <= self.tail <= min(self.lengths) // 2:
            raise UsageError(f"--tail is {self.tail}; it takes 1 to {min(self.lengths) // 2}, half of the shortest length")


@dataclass(frozen=True)
class Subject:
    """The loaded model, what it reads and who computes its attention."""

    source: TransformersSource
    model: PreTrainedModel
    plan: ExportPlan
    corpus: Corpus
    kernels: Library
    operator: Operator
    device: torch.device

    @property
    def configs(self) -> dict[int, Config]:
        """Of every layer that can be replaced, by index: what the layer sets for itself, in a config that is exact."""
        return {layer.index: layer.config for layer in self.plan.layers if layer.config is not None}


def open_subject(options: Options) -> Subject:
    """Loads model, text and kernels.

    Raises UsageError for a model that is no causal language model of a transformers directory or a text that is too short, and
    EnvironmentFault where the kernels are not built or the device is not there.
    """
    device = torch.device(options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    kernels = load_cuda() if device.type == "cuda" else load_cpu()
    source = open_source(options.model, task="logits", trust=options.trust)
    if not isinstance(source, TransformersSource):
        raise UsageError(f"MODEL is {options.model}; a sweep takes a causal language model as a directory of transformers")
    dtype = options.dtype or (default_dtype(source) if device.type == "cuda" else "fp32")
    if device.type == "cpu" and dtype != "fp32":
        raise UsageError(f"--dtype {dtype}: the CPU kernels compute in fp32; give --dtype fp32, or --device cuda")
    longest = max(options.lengths)
    corpus = load_corpus(options.text, options.input_ids, Path(source.model), source.vocab_size, options.seed, longest)
    plan = make_plan(source, layers="none", dtype=dtype, seq=(1, longest, longest), seed=options.seed, input_ids=options.input_ids)
    counts(len(plan.planned), options.replaced)
    model = load_model(source, torch_dtype(dtype), device)
    return Subject(source, model, plan, corpus, kernels, native_operator(kernels), device)
