"""FILE.py:FUNCTION itself: loading the file, calling the function, and everything that it may wrongly return."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from hyperattention.errors import UsageError
from hyperattention.export.function_call import define, is_function
from hyperattention.export.function_dims import fit, read_axes
from hyperattention.export.source import open_source

HEAD = "import torch\nfrom torch import nn\nfrom torch.export import Dim\nM = nn.Linear(3, 4)\nX = torch.ones(2, 3)\n"


@dataclass(frozen=True)
class Wrong:
    """What `build` returns, and words of the message."""

    name: str
    returns: str
    words: str

    def __str__(self) -> str:
        return self.name


RETURNS = [
    Wrong("module alone", "M", r"returned a module alone; it returns \(module, example inputs\)"),
    Wrong("nothing", "None", "returned None; it returns"),
    Wrong("list", "[M, (X,)]", "returned a list of 2; it returns"),
    Wrong("four values", "M, (X,), None, 3", "returned a tuple of 4; it returns"),
    Wrong("no module", "torch.relu, (X,)", "the first value .* is a builtin_function_or_method; it takes a torch.nn.Module"),
    Wrong("TorchScript", "torch.jit.script(M), (X,)", "a TorchScript module, which torch.export cannot trace"),
    Wrong("compiled", "torch.compile(M), (X,)", "a module of torch.compile; return the module itself"),
    Wrong("meta weights", "nn.Linear(3, 4, device='meta'), (X,)", "weight of the module .* lies on the meta device"),
    Wrong("one tensor", "M, X", r"are a tensor; give a tuple: \(tensor,\)"),
    Wrong("no inputs", "M, ()", "the example inputs of .* are empty"),
    Wrong("list of inputs", "M, [X]", "the example inputs of .* are a list; they take a tuple of tensors, or a dict"),
    Wrong("too many inputs", "M, (X, X)", r"do not fit forward\(input: .*\) .*of Linear: too many positional arguments"),
    Wrong("wrong name", "M, {'x': X}", r"do not fit forward\(input: .*missing a required argument: 'input'"),
    Wrong("a number", "M, (3,)", "example input 'input' of wrong.py:build is an int; every example is a tensor"),
    Wrong("nested", "M, ((X, X),)", "example input 'input' of .* is a tuple; every example is a tensor: .*take nested tensors apart"),
    Wrong("sparse", "M, (X.to_sparse(),)", "is a torch.sparse_coo tensor of torch.float32; it takes a dense one"),
    Wrong("complex", "M, (X * 1j,)", "of torch.complex64; it takes a dense one of floats, integers or booleans"),
    Wrong("meta example", "M, (X.to('meta'),)", "lies on the meta device; it takes a tensor with values"),
    Wrong("empty example", "M, (X[:0],)", r"has shape \(0, 3\), which is empty"),
]
SHAPES = [
    Wrong("a name alone", "'batch'", "the dynamic shapes are a str; they take a tuple, one an input, or a dict by input name"),
    Wrong("too many", "(None, None)", r"2 dynamic shapes for 1 inputs \(input\)"),
    Wrong("unknown input", "{'x': None}", "the dynamic shapes name 'x'; the inputs are input"),
    Wrong("a name for an input", "('batch',)", r"the dynamic shape of 'input' is a str; it takes a dict by axis"),
    Wrong("too few axes", "((None,),)", "has 1 entries, the example 2 axes"),
    Wrong("axis out of range", "({2: 'batch'},)", "names axis 2; the example has axes 0 to 1"),
    Wrong("negative axis", "({-1: 'batch'},)", "names axis -1; the example has axes 0 to 1"),
    Wrong("axis by name", "({'batch': 0},)", "names axis 'batch'; the example has axes 0 to 1"),
    Wrong("no identifier", "({0: 'my batch'},)", "axis 0 of 'input' is given as .*; an axis takes a name in quotes"),
    Wrong("a float", "({0: 2.5},)", "axis 0 of 'input' is given as 2.5; an axis takes a name in quotes"),
    Wrong("derived", "({0: 2 * Dim('half')},)", "axis 0 of 'input' is 2[*]half, derived from another dimension"),
    Wrong("another size", "({0: 5},)", "axis 0 of 'input' is fixed to 5, and 2 in the example"),
    Wrong("outside its Dim", "({0: Dim('batch', min=3)},)", "axis 0 of 'input' is 2 in the example, outside 3 and above"),
    Wrong("above its Dim", "({1: Dim('width', max=2)},)", "axis 1 of 'input' is 3 in the example, outside 1 to 2"),
    Wrong("one name, two sizes", "({0: 'n', 1: 'n'},)", "dimension 'n' is 2 in axis 0 of 'input' and 3 in axis 1 of 'input'"),
    Wrong("one name, two ranges", "({0: Dim('n', max=9), 1: Dim('n', max=8)},)", "dimension 'n' has another range here than before"),
]
CODE = [
    Wrong("syntax", "def build(:\n    pass\n", "wrong.py cannot be loaded: SyntaxError at wrong.py, line 1: "),
    Wrong("import", "x = 1\nimport no_such_package_at_all\n", "cannot be loaded at wrong.py, line 2, in <module>: ModuleNotFoundError"),
    Wrong("exit", "raise SystemExit(3)\n", "cannot be loaded at wrong.py, line 1, in <module>: SystemExit: 3"),
    Wrong("another name", "def other():\n    pass\n", "has no 'build'; it defines other"),
    Wrong("no function", "build = 3\n", "build of .* is an int; it must be a function without arguments"),
    Wrong("arguments", "def build(path):\n    pass\n", "cannot be called without arguments .*'path'.*; give its parameters defaults"),
    Wrong("raises", "def f():\n    return {}['w']\ndef build():\n    return f()\n", "build failed at wrong.py, line 2, in f: KeyError"),
]


def written(folder: Path, text: str) -> str:
    (folder / "wrong.py").write_text(text)
    return f"{folder / 'wrong.py'}:build"


@pytest.mark.parametrize("case", RETURNS, ids=str)
def test_a_wrong_return_says_what_was_found_and_what_is_allowed(case: Wrong, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=case.words):
        define(written(tmp_path, f"{HEAD}def build():\n    return {case.returns}\n"))


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_wrong_dynamic_shapes_say_which_axis(case: Wrong, tmp_path: Path) -> None:
    found = define(written(tmp_path, f"{HEAD}def build():\n    return M, (X,), {case.returns}\n"))
    with pytest.raises(UsageError, match=case.words) as caught:
        read_axes(found.name, found.dynamic_shapes, found.examples)
    assert str(caught.value).startswith("wrong.py:build: ")


@pytest.mark.parametrize("case", CODE, ids=str)
def test_code_that_fails_is_told_by_its_own_file_and_line(case: Wrong, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=case.words) as caught:
        define(written(tmp_path, case.returns))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("nowhere/tower.py:build", "there is no file nowhere/tower.py; MODEL is a model directory, or FILE.py:FUNCTION"),
        ("tower.py", "names no function; .*: write tower.py:NAME"),
        ("tower.py:", "names no function"),
        ("tower.py:a b", "names no function"),
    ],
)
def test_a_model_that_names_no_function_is_refused_before_anything_runs(model: str, words: str) -> None:
    said: list[str] = []
    with pytest.raises(UsageError, match=words):
        open_source(model, say=said.append)
    assert said == []


def test_only_python_files_are_run(tmp_path: Path) -> None:
    (tmp_path / "model.py").mkdir()
    assert is_function("tower.py:build") and is_function("a/b.py") and not is_function("models/byte-lm") and not is_function("x.pyc")
    assert not is_function(str(tmp_path / "model.py"))


def test_task_is_the_functions_own(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--task features: .* leave --task out"):
        open_source(written(tmp_path, HEAD), task="features")


def test_the_function_is_called_once_with_seeded_numbers_and_its_folder_for_imports(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "beside_the_model.py").write_text("WIDTH = 3\n")
    text = (
        "from __future__ import annotations\n"
        "import random, numpy, torch\nfrom dataclasses import dataclass\nfrom beside_the_model import WIDTH\n"
        "@dataclass\nclass Sizes:\n    width: int = WIDTH\n"
        "def build(width=None):\n    print('a word of the user')\n"
        "    x = torch.full((2, Sizes().width), random.random() + numpy.random.rand())\n"
        "    return torch.nn.Linear(Sizes().width, 4), {'input': x}, {'input': {0: 'batch'}}\n"
    )
    before = list(sys.path)
    try:
        random.seed(1)
        first = define(written(tmp_path, text))
        torch.manual_seed(9)
        np.random.seed(9)
        second = define(written(tmp_path, text))
    finally:
        sys.path[:] = before
    weights = [found.module.state_dict()["weight"] for found in (first, second)]
    assert torch.equal(*weights) and torch.equal(first.examples["input"], second.examples["input"])
    assert (first.name, first.by_name, list(first.examples)) == ("wrong.py:build", True, ["input"])
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("a word of the user") == 2


def test_examples_are_cut_and_repeated_along_named_axes() -> None:
    x = torch.arange(6).view(2, 3)
    assert fit(x, ("batch", 3), {"batch": 5})[:, 0].tolist() == [0, 3, 0, 3, 0]
    assert fit(x, ("batch", "width"), {"width": 1, "other": 9}).tolist() == [[0], [3]]
