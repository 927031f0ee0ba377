"""A transformers directory, first looked at without its weights, then loaded.

Which class builds it follows from the task and from what its configuration says it is, never from a model's name: a causal
language model with its head for the tasks of LANGUAGE_TASKS, else the bare model, or its encoder where it has a decoder too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Callable, cast

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.models.auto import modeling_auto

from hyperattention.errors import UnsupportedModel, UsageError, one_line
from hyperattention.export.choices import FEATURES, LANGUAGE_TASKS
from hyperattention.export.model_files import quiet, read_config
from hyperattention.export.model_inputs import Reads, what_it_reads
from hyperattention.export.patch import Patched, install
from hyperattention.export.plan import ExportPlan
from hyperattention.export.probe import Probed, probe
from hyperattention.export.source import Source, Trust, torch_dtype

_BUILD_ERRORS = (ValueError, TypeError, AttributeError, KeyError, RuntimeError, AssertionError, ImportError, ZeroDivisionError)


@dataclass(frozen=True)
class TransformersSource(Source):
    """A transformers directory. `path` holds it, `config` is transformers' own object, `positions` where a learned table ends."""

    path: Path
    config: Any
    trust: Trust
    positions: int | None

    @property
    def directory(self) -> Path:
        """The model's directory."""
        return self.path

    @property
    def half(self) -> str:
        """fp16 for weights that config.json says are fp16, else bf16."""
        return "fp16" if getattr(self.config, "dtype", None) == torch.float16 else "bf16"

    @property
    def position_limit(self) -> int | None:
        """Tokens that its learned positions end at, None for a model without any."""
        return self.positions

    def dropped_keys(self, length: int) -> tuple[int, ...]:
        """Numbers of the cache layers that keep fewer than `length` keys (sliding window, chunks), in calling order."""
        layers = enumerate(DynamicCache(config=self.config).layers)
        # Such a layer stores its window less the key that the next token pushes out.
        return tuple(number for number, layer in layers if length >= (getattr(layer, "sliding_window", None) or length + 1))

    def load(self, plan: ExportPlan, device: torch.device | str = "cpu") -> Patched:
        """The patched model on `device`. Raises UsageError for weights that are unreadable, not finite, or do not fit."""
        return install(load_model(self, torch_dtype(plan.dtype), device), plan)


def inspect_source(
    path: Path,
    task: str | None = None,
    *,
    image_size: tuple[int, int] | None = None,
    trust: Trust = Trust(),
    say: Callable[[str], None] = lambda text: None,
) -> TransformersSource:
    """Reads the configuration and the weight files' headers; loads no weights. Arguments as `open_source`'s.

    Raises UsageError for a directory that is missing, empty, broken or not trusted or a task it does not have, and
    UnsupportedModel for an architecture that is unknown or does not go through the AttentionInterface.
    """
    config = read_config(path, trust, say)
    task = _task(config, task, path.name)
    try:
        with quiet(), torch.device("meta"):
            factory = AutoModelForCausalLM if task in LANGUAGE_TASKS else AutoModel
            model = _encoder(factory.from_config(config, dtype=torch.float32, trust_remote_code=trust.code), task).eval()
    except _BUILD_ERRORS as error:
        raise UnsupportedModel(
            f"{path.name}: transformers {transformers.__version__} cannot build a {'causal language ' * (task != FEATURES)}model of type "
            f"{config.model_type!r} from this configuration ({one_line(error)}); check config.json"
        ) from error
    reads = what_it_reads(model, task, image_size)
    return _describe(path, config, trust, task, model, reads, probe(model, reads.feed()))


def _describe(path: Path, config: Any, trust: Trust, task: str, model: PreTrainedModel, reads: Reads, probed: Probed) -> TransformersSource:
    text = config.get_text_config()
    hidden = int(getattr(text, "hidden_size", 0) or 0)
    wide = getattr(text, "intermediate_size", 0) or getattr(text, "encoder_ffn_dim", 0) or 4 * hidden
    limits = (getattr(text, "max_position_embeddings", None), probed.positions) if reads.text else ()
    layers = probed.layers
    # One pair a layer of the cache.
    cache = tuple(f"present.{i}.{part}" for i in range(len(layers) if task == "prefill" else 0) for part in ("key", "value"))
    return TransformersSource(
        model=str(path),
        name=path.resolve().name,
        kind=reads.kind,
        task=task,
        architecture=type(model).__name__,
        layers=layers,
        num_parameters=sum(p.numel() for p in model.parameters()),
        hidden_size=hidden,
        intermediate_size=int(wide),
        vocab_size=int(getattr(text, "vocab_size", 0) or 0) if reads.text else 0,
        max_positions=min((limit for limit in limits if limit), default=None),
        inputs=reads.inputs,
        outputs=("features",) if task == FEATURES else ("logits", *cache),
        dims={},
        keys=None if reads.text else (probed.keys, probed.keys, probed.keys),
        rows=None,
        path=path,
        config=config,
        trust=trust,
        positions=probed.positions if reads.text else None,
    )


def load_model(source: TransformersSource, dtype: torch.dtype, device: torch.device | str = "cpu") -> PreTrainedModel:
    """The model with its weights, in eval mode. Raises UsageError for weights that are unreadable, not finite, or do not fit."""
    factory = AutoModelForCausalLM if source.task in LANGUAGE_TASKS else AutoModel
    options = dict(
        local_files_only=True,
        output_loading_info=True,
        # Tensors of another shape are reported below, by name, and never replaced by random ones.
        ignore_mismatched_sizes=True,
        trust_remote_code=source.trust.code,
        use_safetensors=None if source.trust.pickle else True,
    )
    try:
        with quiet():
            loaded: Any = factory.from_pretrained(source.path, config=source.config, dtype=dtype, **options)
    except (OSError, ValueError, RuntimeError, KeyError, EOFError, SafetensorError, UnpicklingError) as error:
        raise UsageError(f"the weights of {source.path.name} cannot be loaded: {one_line(error)}; copy the directory again") from error
    model, info = loaded
    model = _encoder(model, source.task)
    complaints = {"missing_keys": "are missing from the weight files", "mismatched_keys": "have another shape than config.json says"}
    for key, what in complaints.items():
        names = {str(name[0] if isinstance(name, tuple) else name) for name in info[key]}
        _refuse(sorted(name for name in names if not name.startswith("pooler.")), what, source)
    broken = [name for name, weights in model.named_parameters() if not _is_finite(weights)]
    _refuse(broken, f"hold values that are NaN or infinite in {str(dtype).removeprefix('torch.')}", source)
    if hasattr(model, "set_experts_implementation"):
        # The default is a grouped matmul, an operator of transformers' own that ONNX has no translation for; "batched_mm" computes
        # the same from plain matmuls.
        with quiet():
            model.set_experts_implementation("batched_mm")
    return cast(Any, model).to(device).eval()  # transformers wraps `to` so that its first argument reads as the model


def _refuse(names: list[str], what: str, source: Source) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise UsageError(f"{', '.join(names[:3])}{more} {what}; copy the directory of {source.name} again")


def _is_finite(weights: nn.Parameter) -> bool:
    """One pass and no copy: a NaN goes through both ends, an infinity is one of them."""
    if not weights.numel() or not weights.is_floating_point():
        return True
    low, high = weights.detach().aminmax()
    return bool(low.isfinite() and high.isfinite())


def _task(config: Any, task: str | None, name: str) -> str:
    """The task that was asked for, checked, or the architecture's own."""
    allowed = (*LANGUAGE_TASKS, FEATURES)
    if task is None:
        return default_task(config)
    if task not in allowed:
        raise UsageError(f"--task {task} is for FILE.py:FUNCTION; {name} is a directory, which takes one of {', '.join(allowed)}")
    if task in LANGUAGE_TASKS and (config.is_encoder_decoder or not _language_models(config)):
        what = "has an encoder and a decoder" if config.is_encoder_decoder else "is no causal language model"
        raise UsageError(f"--task {task}: {name} (model_type {config.model_type!r}) {what}; give --task features")
    return task


def default_task(config: Any) -> str:
    """What an architecture is made for: logits of a language model, else features."""
    causal = _language_models(config)
    if config.is_encoder_decoder or not causal:
        return FEATURES
    saved = (config.architectures or [""])[0]
    bare = _names(modeling_auto.MODEL_MAPPING_NAMES.get(config.model_type))
    # An encoder that can serve as a decoder is one only where it was saved so.
    encoder = config.model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return FEATURES if saved not in causal and (encoder or saved in bare) else "logits"


def _language_models(config: Any) -> set[str]:
    """Classes of causal language models that a configuration can be built as, its own code's included."""
    own = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    known = _names(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type))
    return known | ({str(own).rpartition(".")[2]} if own else set())


def _names(found: str | tuple[str, ...] | None) -> set[str]:
    return {found} if isinstance(found, str) else set(found or ())


def _encoder(model: PreTrainedModel, task: str) -> PreTrainedModel:
    """The part of a bare model that gives the features: its encoder, without a pooling head."""
    if task in LANGUAGE_TASKS:
        return model
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    if isinstance(getattr(model, "pooler", None), nn.Module):
        setattr(model, "pooler", None)  # weights of a masked language model have none
    return model
