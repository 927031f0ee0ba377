"""Which attention calls of a user's module the operator takes, and the reason that is given for each one that stays."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import function_models
import pytest
import torch

from hyperattention.errors import ExportFailed, UnsupportedModel, UsageError
from hyperattention.export.function import FunctionSource
from hyperattention.export.plan import make_plan
from hyperattention.export.shape_options import named_ranges
from hyperattention.export.source import Input, open_source

FILE = Path(function_models.__file__)
NONE = (None, None, None)


@functools.cache
def opened(name: str) -> FunctionSource:
    source = open_source(f"{FILE}:{name}")
    assert isinstance(source, FunctionSource)
    return source


def test_every_kind_of_call_is_taken_or_listed_with_its_reason() -> None:
    reasons = [
        None,
        "a mask given",
        "dropout_p 0.25",
        "scale -0.5 on the logits; the operator takes one above 0",
        "is_causal with sequence rows and keys keys, not proved equal: PyTorch's mask is aligned upper-left, the operator's bottom-right",
        "tensors of 3, 3 and 3 axes",
        "batches that are not proved equal",
        "4 heads of queries over 1 of keys, broadcast without enable_gqa",
        "attention in float64",
        "inside torch.cond",
        "inside an autocast region",
        r"softmax\(QK\^T\)V written out; call scaled_dot_product_attention",
        r"written out by nn.MultiheadAttention; call it with need_weights=False",
        "attention of its own .*flash_attention_for_cpu",
    ]
    wanted = [reasons[10], *reasons[:10], *reasons[11:]]  # the autocast region is called first
    layers = opened("every_kind").layers
    assert [layer.index for layer in layers] == list(range(14))
    for layer, reason in zip(layers, wanted, strict=True):
        assert layer.problem is None if reason is None else re.search(reason, layer.problem or "nothing"), layer
    names = [layer.name for layer in layers]
    assert len(set(names)) == 14 and names[0] == "EveryKind" and names[1] == "EveryKind#2" and "weights" in names


def test_what_is_out_of_the_operators_range_stays_and_the_rest_is_planned() -> None:
    plan = make_plan(opened("out_of_range").ranged({}, NONE), layers="all")
    assert [layer.mode for layer in plan.layers] == ["native", "native", "approximate", "native"]
    reasons = [layer.reason for layer in plan.layers if layer.config is None]
    sizes = "heads of size {} and {}; the operator takes 1 to 256"
    assert reasons == [sizes.format(258, 6), sizes.format(6, 258), "scale -0.5 on the logits; the operator takes one above 0"]


def test_a_causal_call_is_taken_only_where_rows_and_keys_are_proved_equal() -> None:
    own, cross, unproved = opened("decoder").layers
    assert (own.name, own.causal, own.problem, own.heads_q, own.heads_kv) == ("own", True, None, 4, 2)
    assert (cross.name, cross.causal, cross.problem, cross.heads_kv) == ("cross", False, None, 1)
    assert unproved.causal and unproved.problem is not None and "upper-left" in unproved.problem


def test_a_module_called_twice_is_two_layers() -> None:
    layers = opened("encoder").layers
    assert [layer.name for layer in layers] == ["first", "second", "second#2"]
    assert [layer.scale for layer in layers] == [pytest.approx(6**-0.5), 0.3, 0.3]
    assert [(layer.heads_q, layer.heads_kv, layer.head_dim, layer.head_dim_v) for layer in layers] == [(4, 4, 6, 6), *[(4, 2, 6, 6)] * 2]


def test_pytorchs_own_encoder_layers_are_taken() -> None:
    layers = opened("layers").layers
    assert [layer.problem for layer in layers] == [None, None]
    assert [layer.name for layer in layers] == [f"encoder.layers.{i}.self_attn" for i in range(2)]
    assert torch.backends.mha.get_fastpath_enabled()


def test_inputs_outputs_and_dimensions_are_named_by_the_function() -> None:
    source = opened("decoder")
    assert source.inputs == (
        Input("x", "float", ("batch", "sequence", 24)),
        Input("memory", "float", ("batch", "keys", 24)),
        Input("scale", "float", (1,)),
    )
    assert source.outputs == ("hidden", "parts_0", "parts_1")
    assert source.bounds == {"batch": (1, None), "sequence": (1, 300), "keys": (3, 200)}
    assert opened("vit").outputs == ("output_0", "output_1")
    # An output must not have an input's name.
    assert opened("layers").inputs == (Input("x", "float", (2, "x_dim1", 24)),) and opened("layers").outputs == ("x_out",)
    assert opened("encoder").inputs == (Input("ids", "int64", ("batch", "sequence")),)


def test_ranges_come_from_the_options_and_else_from_the_dims() -> None:
    source = opened("decoder").ranged(named_ranges(["keys=5,7,90"], "1,2,3"), (2, None, 128))
    assert source.dims == {"batch": (1, 2, 3), "sequence": (2, 32, 128), "keys": (5, 7, 90)}
    plan = make_plan(source, layers="all")
    # own: 2 to 128 keys, cross: 5 to 90.
    assert (plan.seq, plan.batch, plan.task, plan.dims) == ((2, 32, 128), (1, 2, 3), "module", source.dims)
    assert opened("decoder").ranged({}, NONE).dims == {"batch": (1, 1, 1), "sequence": (1, 75, 300), "keys": (3, 11, 200)}
    assert opened("vit").ranged({}, NONE).keys == (100, 100, 100)
    assert opened("fixed").ranged({}, NONE).rows == (1, 1, 1)


@pytest.mark.parametrize(
    ("name", "dims", "sequence", "words"),
    [
        ("decoder", ["frames=1,2,3"], NONE, "has no dimension 'frames'; its dynamic shapes name: batch, sequence, keys"),
        ("decoder", ["keys=1,7,90"], NONE, "'keys' is asked from 1 to 90; .* takes 3 to 200"),
        ("decoder", [], (None, None, 301), "'sequence' is asked from 1 to 301; .* takes 1 to 300"),
        ("decoder", [], (9, 5, None), "'sequence' is min 9, opt 5, max 300; it takes 1 <= min <= opt <= max"),
        ("vit", [], (None, None, 64), "has no dimension 'sequence' for --min-seq.*it names: batch"),
        ("fixed", ["batch=2"], NONE, "has no dimension 'batch'; its dynamic shapes name: none"),
        ("layers", [], NONE, "'x_dim1' of .* has no largest size; give --dim x_dim1=min,opt,max"),
    ],
)
def test_a_range_that_does_not_fit_is_refused(name: str, dims: list[str], sequence: tuple, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        opened(name).ranged(named_ranges(dims, None), sequence)


@pytest.mark.parametrize("text", ["keys", "keys=", "keys=1,2", "keys=a", "1x=3", "=3", "keys=1,2,3,4", "keys=-1", "keys=3,2,1"])
def test_dim_takes_a_name_and_a_range(text: str) -> None:
    with pytest.raises(UsageError, match="--dim"):
        named_ranges([text], None)


def test_a_dimension_takes_one_range() -> None:
    assert named_ranges(["a=3", " b = 1, 2, 9 "], "4") == {"batch": (4, 4, 4), "a": (3, 3, 3), "b": (1, 2, 9)}
    for dims, batch in ((["a=1", "a=2"], None), (["batch=2"], "1")):
        with pytest.raises(UsageError, match="has a range already"):
            named_ranges(dims, batch)


def test_a_graph_without_attention_says_what_was_looked_for(tmp_path: Path) -> None:
    file = tmp_path / "plain.py"
    file.write_text("import torch\ndef build():\n    return torch.nn.Linear(3, 4), (torch.randn(2, 3),)\n")
    with pytest.raises(UnsupportedModel, match=r"no attention was found in the graph of Linear: .*scaled_dot_product_attention\(q, k, v\)"):
        open_source(f"{file}:build")


_HEAD = "import torch\nfrom torch import nn\nfrom torch.nn.functional import scaled_dot_product_attention as attend\n"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("torch.softmax(x @ x.mT, -1) @ x", r"none of the 1 attention calls of Own can be replaced: Own: softmax\(QK\^T\)V written out"),
        ("attend(*[x[:, :, x[0, 0, :, 0].nonzero()[:, 0]]] * 3)", "replaced: Own: a number of keys or rows that depends on the data"),
    ],
)
def test_attention_of_unknown_size_alone_is_refused_with_the_reasons(tmp_path: Path, body: str, words: str) -> None:
    file = tmp_path / "own.py"
    text = f"class Own(nn.Module):\n    def forward(self, x):\n        return {body}\n"
    file.write_text(f"{_HEAD}{text}def build():\n    return Own(), (torch.randn(2, 4, 7, 6),)\n")
    with pytest.raises(UnsupportedModel, match=words):
        open_source(f"{file}:build")


@pytest.mark.parametrize(
    ("body", "shapes", "error", "words"),
    [
        ("attend(x, x, x) + torch.ones(7, 6)", "{2: 'sequence'}", ExportFailed, "dimension 'sequence' is fixed to 7 by the module"),
        ("attend(*[x.view(2, 4, -1, 12)] * 3)", "{2: 'even'}", ExportFailed, "torch.export suggests: .*even = 2"),
        ("attend(x, x, x) + (0 if x.shape[2] < 9 else 1)", "{2: 'n'}", ExportFailed, "range satisfy the generated guard .*axis 2 of 'x'"),
        ("attend(x, x, x) if x.sum() > 0 else x", "{}", ExportFailed, "cannot trace .* at own.py, line 6, in forward: .*data-dependent"),
        ("attend(x, x, x) @ x", "{}", UsageError, r"fails on its example inputs at own.py, line 6, in forward: RuntimeError"),
        ("attend(x, x, x), 3", "{}", UsageError, "output_1 of the module's outputs is an int; return tensors alone"),
        ("None", "{}", UsageError, "returns no tensor"),
    ],
)
def test_a_module_that_cannot_be_exported_is_told_why(tmp_path: Path, body: str, shapes: str, error: type, words: str) -> None:
    file = tmp_path / "own.py"
    size = 8 if "even" in shapes else 7
    text = f"class Own(nn.Module):\n    def forward(self, x):\n        return {body}\n"
    file.write_text(f"{_HEAD}{text}def build():\n    return Own(), (torch.randn(2, 4, {size}, 6),), ({shapes},)\n")
    with pytest.raises(error, match=words) as caught:
        open_source(f"{file}:build")
    assert "\n" not in str(caught.value) and str(tmp_path) not in str(caught.value)
