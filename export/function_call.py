"""The user's own function: its file is loaded, it is called without arguments, and what it returned is checked.

This runs the user's code with all rights of this process; a model directory never comes here. Random numbers are seeded
first, so that a module built from random weights is the same one when the validation calls the function again.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import random
import re
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from hyperattention.errors import UsageError, one_line

_FORM = "MODEL is a model directory, or FILE.py:FUNCTION"
_RETURNS = "it returns (module, example inputs) or (module, example inputs, dynamic shapes)"
_DTYPES = (
    torch.float32, torch.float16, torch.bfloat16, torch.float64,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip
_SEED = 0


@dataclass(frozen=True)
class Definition:
    """What the user's function returned, checked. `by_name`: the module takes its inputs by keyword."""

    name: str  # "vision_tower.py:build": no path
    module: nn.Module
    examples: dict[str, Tensor]
    by_name: bool
    dynamic_shapes: Any


def is_function(model: str) -> bool:
    """Whether MODEL names Python code, to be run, and no directory."""
    return re.search(r"\.py(:|$)", model) is not None and not Path(model).is_dir()


def split(model: str) -> tuple[Path, str]:
    """The file and the function's name of `FILE.py:FUNCTION`. Raises UsageError."""
    text, _, function = model.rpartition(":") if not model.endswith(".py") else (model, "", "")
    if not function.isidentifier():
        raise UsageError(f"MODEL is {model!r}, which names no function; {_FORM}: write {text or model}:NAME, the function's name")
    file = Path(text)
    if not file.is_file():
        raise UsageError(f"there is no file {file}; {_FORM}")
    return file, function


def define(model: str) -> Definition:
    """Runs FILE.py and calls FUNCTION of it. Raises UsageError for code that fails, by its own file and line, and for a wrong return."""
    file, function = split(model)
    torch.manual_seed(_SEED)
    random.seed(_SEED)
    np.random.seed(_SEED)
    # The user's prints are no part of our answer (--json).
    with _imports_beside(file), contextlib.redirect_stdout(sys.stderr):
        namespace = _guarded(file, f"{file} cannot be loaded", lambda: _load(file))
        found = namespace.get(function)
        if found is None:
            own = [name for name, value in namespace.items() if inspect.isfunction(value) and value.__module__ == namespace["__name__"]]
            raise UsageError(f"{file} has no {function!r}; it defines {', '.join(own) or 'no function'}")
        if not callable(found):
            raise UsageError(f"{function} of {file} is {kind(found)}; it must be a function without arguments: {_RETURNS}")
        _check_arguments(file, function, found)
        returned = _guarded(file, f"{file}:{function} failed", found)
    return _checked(f"{file.name}:{function}", returned)


def code_place(error: BaseException, file: Path | None = None) -> str:
    """Where in the user's code `error` arose: "file.py, line 12, in build"; the deepest line of `file`, else of code outside torch."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if file is not None and Path(f.filename).resolve() == file.resolve()]
    outside = [f for f in frames if not re.search(r"[\\/](torch|hyperattention|export|validate)[\\/]|<", f.filename)]
    frame = (own or outside or list(frames))[-1]
    return f"{Path(frame.filename).name}, line {frame.lineno}, in {frame.name}"


def named(error: BaseException) -> str:
    """The error's class and words on one line: an error of foreign code is known by both."""
    kind, words = type(error).__name__, one_line(error)
    return kind if words == kind else f"{kind}: {words}"


def _guarded(file: Path, what: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except SyntaxError as error:
        name = Path(error.filename or file).name
        raise UsageError(f"{what}: {type(error).__name__} at {name}, line {error.lineno}: {error.msg}; mend the file") from error
    except (Exception, SystemExit) as error:
        raise UsageError(f"{what} at {code_place(error, file)}: {named(error)}; it must run by itself, without arguments") from error


@contextlib.contextmanager
def _imports_beside(file: Path) -> Iterator[None]:
    """Inside, the file's folder is searched for imports first, as `python FILE.py` does; afterwards last, where it hides nothing."""
    folder = str(file.resolve().parent)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
        if folder not in sys.path:
            sys.path.append(folder)


def _load(file: Path) -> dict[str, Any]:
    """The file as a module of its own name."""
    # Dataclasses and pickles look their module up by name; no installed package has this one.
    name = f"hyperattention_model_{re.sub(r'[^0-9A-Za-z_]', '_', file.stem)}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return vars(module)


def _check_arguments(file: Path, name: str, function: Callable[..., Any]) -> None:
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise UsageError(
            f"{file}:{name} cannot be called without arguments ({error}); give its parameters defaults, or write a function that calls it"
        ) from error
    except ValueError:
        return  # a callable that shows no signature


def _checked(name: str, returned: Any) -> Definition:
    if isinstance(returned, nn.Module):
        raise UsageError(f"{name} returned a module alone; {_RETURNS}")
    if not isinstance(returned, tuple) or len(returned) not in (2, 3):
        count = f" of {len(returned)}" if isinstance(returned, (tuple, list)) else ""
        raise UsageError(f"{name} returned {kind(returned)}{count}; {_RETURNS}")
    module, inputs, *rest = returned
    _check_module(name, module)
    by_name = isinstance(inputs, dict)
    examples = _named(name, module, inputs)
    for key, value in examples.items():
        _check_tensor(name, key, value)
    return Definition(name, module, examples, by_name, rest[0] if rest else None)


def _check_module(name: str, module: Any) -> None:
    if not isinstance(module, nn.Module):
        raise UsageError(f"the first value that {name} returned is {kind(module)}; it takes a torch.nn.Module")
    if isinstance(module, torch.jit.ScriptModule):
        raise UsageError(f"{name} returned a TorchScript module, which torch.export cannot trace; return the module it was made from")
    if hasattr(module, "_orig_mod"):
        raise UsageError(f"{name} returned a module of torch.compile; return the module itself, before torch.compile")
    meta = [key for key, value in module.state_dict().items() if isinstance(value, Tensor) and value.is_meta]
    if meta:
        raise UsageError(f"{meta[0]} of the module that {name} returned lies on the meta device, without values; load its weights first")


def _named(name: str, module: nn.Module, inputs: Any) -> dict[str, Any]:
    """The examples by input name; those of a tuple are named as the parameters of the module's forward are."""
    if isinstance(inputs, Tensor):
        raise UsageError(f"the example inputs of {name} are a tensor; give a tuple: (tensor,)")
    if not isinstance(inputs, (tuple, dict)) or not inputs:
        what = "empty" if isinstance(inputs, (tuple, dict)) else kind(inputs)
        raise UsageError(f"the example inputs of {name} are {what}; they take a tuple of tensors, or a dict of tensors by argument name")
    signature = inspect.signature(module.forward)
    try:
        bound = signature.bind(**inputs) if isinstance(inputs, dict) else signature.bind(*inputs)
    except TypeError as error:
        raise UsageError(
            f"the example inputs of {name} do not fit forward{signature} of {type(module).__name__}: {error}; give one tensor an argument"
        ) from error
    if isinstance(inputs, dict):
        return {str(key): value for key, value in inputs.items()}
    named: dict[str, Any] = {}
    for key, value in bound.arguments.items():
        several = signature.parameters[key].kind is inspect.Parameter.VAR_POSITIONAL
        named |= {f"{key}_{i}": one for i, one in enumerate(value)} if several else {key: value}
    return named


def _check_tensor(name: str, key: str, value: Any) -> None:
    what = f"example input {key!r} of {name}"
    if not isinstance(value, Tensor):
        raise UsageError(
            f"{what} is {kind(value)}; every example is a tensor: bind other arguments in the module, and take nested tensors apart"
        )
    if value.layout != torch.strided or value.is_quantized or value.dtype not in _DTYPES:
        raise UsageError(f"{what} is a {value.layout} tensor of {value.dtype}; it takes a dense one of floats, integers or booleans")
    if value.is_meta:
        raise UsageError(f"{what} lies on the meta device; it takes a tensor with values")
    if 0 in value.shape:
        raise UsageError(f"{what} has shape {tuple(value.shape)}, which is empty; give an example with at least one element")


def kind(value: Any) -> str:
    """A value's class, with an article: "a dict", "an int", "None"."""
    if value is None:
        return "None"
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"
