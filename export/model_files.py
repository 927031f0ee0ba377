"""The files of a transformers directory, checked before anything is built from them: config.json, weights, tokenizer.

Nothing in here runs code of the model's: pickled weights and code beside them are refused unless they were asked for.
"""

from __future__ import annotations

import json
import re
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterator

import transformers
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from transformers import AutoConfig

from hyperattention.errors import UnsupportedModel, UsageError, one_line
from hyperattention.export.source import Trust

# Far above every real model. What lies beyond is a slip of the pen, and building it, even without memory, takes minutes or fails in a
# way that names nothing. Fields by what transformers' configurations call them: num_hidden_layers, n_layer, encoder_layers, n_embd.
_MOST = {r"(num|n)_\w*layers?|\w*_layers|n_layer": 10_000, r"(hidden|vocab|intermediate|embedding)\w*_size|d_model|n_embd": 2**31}
_INDEX = "model.safetensors.index.json"


@contextmanager
def quiet() -> Iterator[None]:
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


def read_config(path: Path, trust: Trust, say: Callable[[str], None]) -> Any:
    """transformers' configuration of the directory, with its weights, tokenizer and side files checked for being whole.

    `say` gets one sentence before code of the model's own runs, which `trust` must allow. Raises UsageError for files that are
    missing, broken or not trusted, and UnsupportedModel for an architecture that is unknown, and for quantised weights.
    """
    config = _read(path, trust, say)
    _check_unquantised(path, config)
    _check_side_files(path)
    _check_tokenizer(path)
    _check_weights(path, trust)
    return config


def _read(path: Path, trust: Trust, say: Callable[[str], None]) -> Any:
    if not path.exists():
        raise UsageError(f"there is no {path}; MODEL is a directory with config.json and weights, as transformers saves it")
    if not path.is_dir():
        raise UsageError(f"{path} is a file; MODEL is a directory with config.json and weights, as transformers saves it")
    file = path / "config.json"
    if not file.is_file():
        found = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "nothing"
        raise UsageError(f"{path} holds no config.json (found: {found}); MODEL is a directory as transformers saves it")
    data = _json(file)
    if not isinstance(data, dict) or not isinstance(data.get("model_type"), str):
        raise UsageError(f"{file} names no model_type; it must be the config.json that transformers saved")
    _check_sizes(file, data)
    code = isinstance(data.get("auto_map"), dict)
    if data["model_type"] not in transformers.CONFIG_MAPPING and not (code and trust.code):
        runs = "or give --trust-remote-code to run the model's own (auto_map in config.json)" if code else "nothing in the directory is run"
        raise UnsupportedModel(
            f"architecture {data['model_type']!r} is unknown to transformers {transformers.__version__}; install a version that knows it, "
            f"{runs}"
        )
    if code and trust.code:
        names = ", ".join(sorted({str(name).partition(".")[0] + ".py" for name in data["auto_map"].values()}))
        say(f"--trust-remote-code: code of the model's own runs ({names} in {path.name})")
    problem = f"{file} cannot be read as a {data['model_type']} configuration"
    try:
        with quiet():
            return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=trust.code)
    except (ValueError, TypeError, AttributeError, KeyError, OSError, ArithmeticError) as error:
        raise UsageError(f"{problem}: {one_line(error)}; check its values") from error
    except Exception as error:
        # huggingface_hub's strict dataclasses raise classes of their own for a field of the wrong type.
        if type(error).__module__.startswith("huggingface_hub"):
            raise UsageError(f"{problem}: {one_line(error)}; check its values") from error
        raise


def _check_sizes(file: Path, data: dict[str, Any], part: str = "") -> None:
    """Raises UsageError for a size above _MOST, in the configuration or in one of its parts (text_config, encoder)."""
    for name, value in data.items():
        if isinstance(value, dict):
            _check_sizes(file, value, f"{part}{name}.")
        for pattern, most in _MOST.items():
            if isinstance(value, (int, float)) and value > most and re.fullmatch(pattern, name):
                raise UsageError(f"{file}: {part}{name} is {value}; export-model takes at most {most}: check its values")


def _json(file: Path) -> Any:
    """A JSON file's values. Raises UsageError."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file} is not valid JSON ({one_line(error)}); copy the model's directory again") from error


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
    for name in ("generation_config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
        file = path / name
        if not file.is_file():
            continue
        if not isinstance(_json(file), dict):
            raise UsageError(f"{file} holds no JSON object; copy the model's directory again")


def _check_tokenizer(path: Path) -> None:
    """The validation reads it after the whole export."""
    file = path / "tokenizer.json"
    if not file.is_file():
        return
    try:
        Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing more exact
        raise UsageError(f"{file} is broken ({one_line(error)}); copy the model's directory again") from error


def _indexed(index: Path) -> list[str]:
    """The weight files that an index names. Raises UsageError."""
    found = _json(index)
    names = found.get("weight_map") if isinstance(found, dict) else None
    files = list(names.values()) if isinstance(names, dict) else []
    if files and all(isinstance(name, str) for name in files):
        return sorted(set(files))
    if not isinstance(found, dict):
        what = f"a {type(found).__name__} in place of an object"
    elif "weight_map" not in found:
        what = f"no weight_map (it holds {', '.join(map(str, found)) or 'nothing'})"
    else:
        what = "a weight_map that names no file" if names == {} else "a weight_map that is no object of file names"
    raise UsageError(
        f'{index} is broken: found {what}; it takes {{"weight_map": {{"TENSOR": "FILE.safetensors", ...}}}}: copy the model\'s directory '
        f"again, or remove the index where model.safetensors holds all weights"
    )


def weight_files(path: Path) -> list[Path]:
    """The files that transformers loads weights from: those of the index, else all safetensors, else pickled ones. Raises UsageError."""
    index = path / _INDEX
    if index.is_file():
        return [path / name for name in _indexed(index)]
    return sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))


def _check_weights(path: Path, trust: Trust) -> None:
    files = weight_files(path)
    if not files:
        raise UsageError(f"{path} holds no weights; it takes model.safetensors, or its index and parts")
    pickled = [file.name for file in files if file.suffix == ".bin"]
    if pickled and not trust.pickle:
        raise UsageError(
            f"{path} holds its weights as {pickled[0]}, a pickle, which can run code when it is read; save them as safetensors "
            f"(save_pretrained does), or give --allow-pickle where you trust whoever made the file"
        )
    for file in files:
        if not file.is_file():
            raise UsageError(f"{_INDEX} names {file.name}, which is missing; copy the model's directory again")
        if file.name in pickled:
            continue
        try:
            with safe_open(str(file), framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UsageError(f"{file} is truncated or broken ({one_line(error)}); copy it again") from error
