"""A transformers directory, first looked at without its weights, then loaded.

`inspect_source` runs the architecture once on the meta device with an attention function that only looks: that tells each
layer's sizes, scale and peculiarities for any architecture that goes through transformers' AttentionInterface.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Iterator

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from hyperattention.errors import UnsupportedModel, UsageError
from hyperattention.export.attention_rules import find_problem
from hyperattention.export.masks import attention_mask_function
from hyperattention.export.patch import Patched, install
from hyperattention.export.plan import ExportPlan
from hyperattention.export.source import LANGUAGE_TASKS, TEXT, AttentionLayer, Source, torch_dtype

_PROBE = "hyperattention_probe"
# Odd and distinct, so that sizes tell the dimensions apart.
_PROBE_SHAPE = (2, 7)


@dataclass(frozen=True)
class TransformersSource(Source):
    """A transformers directory. `path` holds it; `config` is transformers' own object."""

    path: Path
    config: Any

    @property
    def directory(self) -> Path:
        """The model's directory."""
        return self.path

    @property
    def half(self) -> str:
        """fp16 for weights that config.json says are fp16, else bf16."""
        return "fp16" if getattr(self.config, "dtype", None) == torch.float16 else "bf16"

    def dropped_keys(self, length: int) -> tuple[int, ...]:
        """Numbers of the cache layers that keep fewer than `length` keys (sliding window, chunks), in calling order."""
        layers = enumerate(DynamicCache(config=self.config).layers)
        # Such a layer stores its window less the key that the next token pushes out.
        return tuple(number for number, layer in layers if length >= (getattr(layer, "sliding_window", None) or length + 1))

    def load(self, plan: ExportPlan, device: torch.device | str = "cpu") -> Patched:
        """The patched model on `device`. Raises UsageError for weights that are unreadable or do not fit the configuration."""
        return install(load_model(self, torch_dtype(plan.dtype), device), plan)


def inspect_source(path: Path, task: str | None = None) -> TransformersSource:
    """Reads the configuration and the weight files' headers; loads no weights.

    Raises UsageError for a directory that is missing, empty or broken and UnsupportedModel for an architecture that is unknown
    or does not go through the AttentionInterface.
    """
    config = _read_config(path)
    _check_unquantised(path, config)
    _check_side_files(path)
    _check_weights(path)
    try:
        with _quiet(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    except (ValueError, TypeError, AttributeError, KeyError, RuntimeError, AssertionError, ImportError, ZeroDivisionError) as error:
        raise UnsupportedModel(
            f"{path.name}: transformers {transformers.__version__} cannot build a causal language model of type "
            f"{config.model_type!r} from this configuration ({_one_line(error)}); check config.json"
        ) from error
    layers = _probe(model)
    text = config.get_text_config()
    task = task or "logits"
    if task not in LANGUAGE_TASKS:
        raise UsageError(f"--task {task}: {path.name} is a language model; it takes one of {', '.join(LANGUAGE_TASKS)}")
    return TransformersSource(
        model=str(path),
        name=path.resolve().name,
        kind="language",
        task=task,
        inputs=TEXT,
        outputs=_outputs(task, len(layers)),
        dims={},
        keys=None,
        rows=None,
        path=path,
        config=config,
        architecture=type(model).__name__,
        layers=layers,
        num_parameters=sum(p.numel() for p in model.parameters()),
        hidden_size=int(getattr(text, "hidden_size", 0) or 0),
        intermediate_size=int(getattr(text, "intermediate_size", 0) or 4 * (getattr(text, "hidden_size", 0) or 0)),
        vocab_size=int(text.vocab_size),
        max_positions=getattr(text, "max_position_embeddings", None) or None,
    )


def _outputs(task: str, layers: int) -> tuple[str, ...]:
    """logits, and for the task prefill present.{i}.key and present.{i}.value of each cache layer."""
    cache = range(layers) if task == "prefill" else ()
    return ("logits", *(f"present.{i}.{part}" for i in cache for part in ("key", "value")))


def load_model(source: TransformersSource, dtype: torch.dtype, device: torch.device | str = "cpu") -> PreTrainedModel:
    """The model with its weights, in eval mode. Raises UsageError for weights that are unreadable or do not fit the config."""
    try:
        with _quiet():
            # Tensors of another shape are reported below, by name, and never replaced by random ones.
            options = dict(local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True)
            loaded: Any = AutoModelForCausalLM.from_pretrained(source.path, config=source.config, dtype=dtype, **options)
    except (OSError, ValueError, RuntimeError, KeyError, EOFError, SafetensorError, UnpicklingError) as error:
        raise UsageError(f"the weights of {source.path.name} cannot be loaded: {_one_line(error)}; copy the directory again") from error
    model, info = loaded
    complaints = {"missing_keys": "are missing from the weight files", "mismatched_keys": "have another shape than config.json says"}
    for key, what in complaints.items():
        names = sorted(str(name[0] if isinstance(name, tuple) else name) for name in info[key])
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UsageError(f"{', '.join(names[:3])}{more} {what}; copy the directory of {source.path.name} again")
    if hasattr(model, "set_experts_implementation"):
        # The default is a grouped matmul, an operator of transformers' own that ONNX has no translation for; "batched_mm" computes
        # the same from plain matmuls.
        with _quiet():
            model.set_experts_implementation("batched_mm")
    return model.to(device).eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers' warnings and progress bars off; what they say is raised as errors of ours."""
    logging = transformers.utils.logging
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _read_config(path: Path) -> Any:
    if not path.exists():
        raise UsageError(f"there is no {path}; MODEL is a directory with config.json and weights, as transformers saves it")
    if not path.is_dir():
        raise UsageError(f"{path} is a file; MODEL is a directory with config.json and weights, as transformers saves it")
    file = path / "config.json"
    if not file.is_file():
        found = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "nothing"
        raise UsageError(f"{path} holds no config.json (found: {found}); MODEL is a directory as transformers saves it")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} is not valid JSON ({_one_line(error)}); copy the model's directory again") from error
    if not isinstance(data, dict) or not isinstance(data.get("model_type"), str):
        raise UsageError(f"{file} names no model_type; it must be the config.json that transformers saved")
    if data["model_type"] not in transformers.CONFIG_MAPPING:
        raise UnsupportedModel(
            f"architecture {data['model_type']!r} is unknown to transformers {transformers.__version__}; install a version that knows it "
            f"(code inside the model's directory is never run)"
        )
    try:
        with _quiet():
            return AutoConfig.from_pretrained(path, local_files_only=True)
    except (ValueError, TypeError, AttributeError, KeyError, OSError, ArithmeticError) as error:
        raise UsageError(f"{file} cannot be read as a {data['model_type']} configuration: {_one_line(error)}") from error
    except Exception as error:
        # huggingface_hub's strict dataclasses raise classes of their own for a field of the wrong type.
        if type(error).__module__.startswith("huggingface_hub"):
            raise UsageError(f"{file} cannot be read as a {data['model_type']} configuration: {_one_line(error)}") from error
        raise


def _check_unquantised(path: Path, config: Any) -> None:
    found = getattr(config, "quantization_config", None) or getattr(config.get_text_config(), "quantization_config", None)
    if found:
        values = found if isinstance(found, dict) else vars(found)
        method = values.get("quant_method", "unnamed")
        raise UnsupportedModel(
            f"{path.name} holds quantised weights (quantization_config: {getattr(method, 'value', method)}); export-model takes fp32, fp16 "
            f"or bf16 weights: use the model's unquantised directory"
        )


def _check_side_files(path: Path) -> None:
    """transformers and the validation read these late, after most of the work."""
    for name in ("generation_config.json", "tokenizer_config.json"):
        file = path / name
        if not file.is_file():
            continue
        try:
            whole = isinstance(json.loads(file.read_text(encoding="utf-8")), dict)
        except ValueError as error:
            raise UsageError(f"{file} is not valid JSON ({_one_line(error)}); copy the model's directory again") from error
        if not whole:
            raise UsageError(f"{file} holds no JSON object; copy the model's directory again")


def _check_weights(path: Path) -> None:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            files = [path / name for name in names]
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UsageError(f"{index} is broken ({_one_line(error)}); copy the model's directory again") from error
    else:
        files = sorted(path.glob("*.safetensors"))
        if not files and not list(path.glob("pytorch_model*.bin")):
            raise UsageError(f"{path} holds no weights; it takes model.safetensors (or its index and parts) or pytorch_model.bin")
    for file in files:
        if not file.is_file():
            raise UsageError(f"{index.name} names {file.name}, which is missing; copy the model's directory again")
        try:
            with safe_open(str(file), framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UsageError(f"{file} is truncated or broken ({_one_line(error)}); copy it again") from error


def _probe(model: PreTrainedModel) -> tuple[AttentionLayer, ...]:
    """Runs the model on the meta device and records what every attention module asks for."""
    names = {id(module): name for name, module in model.named_modules()}
    found: dict[str, AttentionLayer] = {}

    def look(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        name = names[id(module)]
        scale, dropout = kwargs.pop("scaling", None), kwargs.pop("dropout", 0.0)
        problem = find_problem(module, attention_mask, scale, dropout, kwargs)
        if query.shape[2] != key.shape[2]:
            problem = "cross-attention"
        found[name] = AttentionLayer(
            index=len(found),
            name=name,
            heads_q=query.shape[1],
            heads_kv=key.shape[1],
            head_dim=query.shape[3],
            head_dim_v=value.shape[3],
            scale=scale if scale is not None else query.shape[3] ** -0.5,
            problem=problem,
        )
        return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None

    AttentionInterface.register(_PROBE, look)
    AttentionMaskInterface.register(_PROBE, attention_mask_function)
    architecture = type(model).__name__
    if not getattr(model, "_supports_attention_backend", False):
        raise UnsupportedModel(
            f"{architecture} does not go through transformers' AttentionInterface, so its attention cannot be replaced; "
            f"see the models with _supports_attention_backend in transformers"
        )
    try:
        model.set_attn_implementation(_PROBE)
        ids = torch.zeros(_PROBE_SHAPE, dtype=torch.long, device="meta")
        with _quiet(), torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones(_PROBE_SHAPE, dtype=torch.bool, device="meta"), use_cache=False)
    except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError, KeyError, IndexError, ArithmeticError) as error:
        raise UnsupportedModel(
            f"{architecture} does not run on the meta device ({_one_line(error)}), so its layers cannot be planned"
        ) from error
    if not found:
        raise UnsupportedModel(f"{architecture} never called the attention function given through transformers' AttentionInterface")
    return (*found.values(), *_unseen(model, found))


def _unseen(model: nn.Module, found: dict[str, AttentionLayer]) -> list[AttentionLayer]:
    """Modules named Attention that computed something of their own."""
    layers = []
    for name, module in model.named_modules():
        related = any(seen == name or seen.startswith(name + ".") or name.startswith(seen + ".") for seen in found)
        if type(module).__name__.endswith("Attention") and not related:
            problem = "attention of its own, outside transformers' AttentionInterface"
            layers.append(AttentionLayer(len(found) + len(layers), name, 0, 0, 1, 1, 1.0, problem))
    return layers
