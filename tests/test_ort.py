"""The op inside ONNX Runtime: one-node models against the reference, refusals, several sessions, and the profile."""

from __future__ import annotations

import json
import os
import shutil
import threading
from ctypes import CDLL, CFUNCTYPE, addressof, c_char_p, c_int, c_uint32, c_void_p, cast, create_string_buffer
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from native import assert_attention, assert_equal_bits, expected, inputs
from onnx import TensorProto
from operator_cases import CASES, Case, config
from ort_models import has_cuda_kernels, one_node, session

from hyperattention.config import OP_TYPE, RANGES, Config
from hyperattention.library import load_cpu, ort_library_path

pytestmark = [pytest.mark.ort, pytest.mark.usefixtures("one_thread")]
ort = pytest.importorskip("onnxruntime")
F32 = torch.float32
VERSION = tuple(int(part) for part in ort.__version__.split(".")[:2])


def feed(case: Case) -> dict[str, np.ndarray]:
    x = inputs(case, F32)
    lengths = {} if x.lengths is None else {"lengths": x.lengths.numpy()}
    return {"q": x.q.numpy(), "k": x.k.numpy(), "v": x.v.numpy(), **lengths}


def run(case: Case, threads: int = 1) -> list[torch.Tensor]:
    model = one_node(case.config.attributes(), lengths="lengths" if case.lengths else None)
    return [torch.from_numpy(x) for x in session(model, threads).run(None, feed(case))]


@pytest.mark.parametrize("case", CASES[::5], ids=str)
def test_equals_the_reference_and_the_library(case: Case) -> None:
    x, wanted = inputs(case, F32), expected(case, F32)
    found = run(case)
    library = load_cpu().forward(x.q, x.k, x.v, case.config, x.lengths)
    assert_attention(found, wanted)
    for name, mine, same in zip(("o", "lse"), found, library, strict=True):
        assert_equal_bits(mine, same, f"{name} of the C interface")


@pytest.mark.parametrize("threads", [2, 3])
def test_thread_count_changes_no_bit(threads: int) -> None:
    case = Case("threads", 203, 203, heads=(6, 2))
    for name, one, many in zip(("o", "lse"), run(case, 1), run(case, threads), strict=True):
        assert_equal_bits(many, one, name)


def test_attributes_have_configs_defaults() -> None:
    case = Case("defaults", 700, 4200, Config(), dims=(16, 16))  # above exact_below: every attribute tells
    (o,) = session(one_node({}, lengths=None, lse=False)).run(None, feed(case))
    assert_equal_bits(torch.from_numpy(o), run(case)[0], "o")


@pytest.mark.parametrize("lengths", [None, "", "lengths"], ids=["absent", "empty-name", "given"])
@pytest.mark.parametrize("lse", [False, True], ids=["o", "o-lse"])
def test_optional_input_and_output(lengths: str | None, lse: bool) -> None:
    case = Case("optional", 70, 203, lengths=(203, 203))
    given = feed(case)
    if not lengths:
        del given["lengths"]
    found = session(one_node(case.config.attributes(), lengths=lengths, lse=lse)).run(None, given)
    assert len(found) == 1 + lse
    for mine, wanted in zip(found, run(case), strict=False):
        assert_equal_bits(torch.from_numpy(mine), wanted, "output")


def test_one_session_takes_any_shape() -> None:
    shared = session(one_node(config().attributes()))
    for rows, keys, batch in ((70, 203, 1), (203, 70, 2), (1, 5, 1), (300, 300, 3), (0, 9, 1), (66, 0, 1)):
        case = Case("shapes", rows, keys, lengths=tuple(range(keys, keys - batch, -1)), dims=(9, 5))
        assert_attention(map(torch.from_numpy, shared.run(None, feed(case))), expected(case, F32), f"of {case}")


def test_sessions_in_parallel_threads() -> None:
    cases = [Case("parallel", rows, rows, config(seed=rows), heads=(4, 2)) for rows in (203, 211)]
    alone = [run(case) for case in cases]
    sessions = [session(one_node(case.config.attributes(), lengths=None), threads=2) for case in cases]
    found: list[list] = [[], []]

    def repeat(i: int) -> None:
        for _ in range(10):
            found[i].append(sessions[i].run(None, feed(cases[i])))

    workers = [threading.Thread(target=repeat, args=(i,)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for outputs, wanted in zip(found, alone, strict=True):
        assert len(outputs) == 10
        for output in outputs:
            for mine, theirs in zip(output, wanted, strict=True):
                assert_equal_bits(torch.from_numpy(mine), theirs, "output beside another session")


def test_onnxruntime_is_the_one_asked_for() -> None:
    """`make test-onnxruntime` puts other releases before the environment's own."""
    assert ort.__version__.startswith(os.environ.get("HYPERATTENTION_ONNXRUNTIME_VERSION", ort.__version__))


@pytest.mark.parametrize(("version", "newest"), [("1.17.3", None), ("1.19.2", 19), ("1.45.0", 45), ("2.3.0", 99)])
def test_interface_is_negotiated(version: str, newest: int | None, tmp_path: Path) -> None:
    """A host that has none of the interfaces: it is asked for its own or an older one, and the refusal names both releases."""
    seen: list[int] = []
    texts: list[bytes] = []

    @CFUNCTYPE(c_void_p, c_int, c_char_p)
    def create_status(_code: int, text: bytes) -> int:
        texts.append(text)
        return 1

    @CFUNCTYPE(c_void_p, c_uint32)
    def get_api(number: int) -> int | None:
        seen.append(number)
        return addressof(oldest) if number == 1 else None

    text = create_string_buffer(version.encode())
    get_version = CFUNCTYPE(c_void_p)(lambda: addressof(text))
    oldest = (c_void_p * 1)(cast(create_status, c_void_p))  # OrtApi begins with CreateStatus
    base = (c_void_p * 2)(cast(get_api, c_void_p), cast(get_version, c_void_p))
    library = CDLL(str(shutil.copy(ort_library_path(), tmp_path)))  # an instance of its own: the process's has its host already
    library.RegisterCustomOps.restype, library.RegisterCustomOps.argtypes = c_void_p, [c_void_p, c_void_p]
    assert library.RegisterCustomOps(None, base) == 1
    *asked, last = seen
    assert last == 1 and len(asked) == (newest is not None) and all(18 <= number <= (newest or 0) for number in asked)
    assert texts == [f"HyperAttention: this is ONNX Runtime {version}; the op takes 1.18 or newer".encode()]


def test_inferred_shapes() -> None:
    if VERSION < (1, 24):  # there inference crashes on an empty input's name, so the op has none
        assert [(o.type, o.shape) for o in session(one_node({})).get_outputs()] == [("tensor(float)", [])] * 2
        return
    o, lse = session(one_node({})).get_outputs()
    assert (o.type, o.shape) == ("tensor(float)", ["batch", "heads", "rows", "out"]) and lse.type == "tensor(float)"
    model = onnx.load_from_string(one_node({}))
    for value, shape in zip(model.graph.input, ((2, 4, 70, 8), (2, 2, 90, 8), (2, 2, 90, 5), (2,)), strict=True):
        for dim, size in zip(value.type.tensor_type.shape.dim, shape, strict=True):
            dim.dim_value = size
    assert session(model.SerializeToString()).get_outputs()[0].shape == [2, 4, 70, 5]
    assert session(one_node({}, rank=None)).get_outputs()[0].shape in ([], None)


@pytest.mark.parametrize("lengths", [None, "", "lengths"], ids=["absent", "empty-name", "given"])
def test_type_of_the_output_is_the_queries(lengths: str | None) -> None:
    """Nothing but the op tells the type between the node and the next. The processor runs float16 through casts to float32."""
    if not has_cuda_kernels():
        pytest.skip("the library was built without CUDA kernels: it takes float32 alone")
    case = Case("types", 70, 203, lengths=(203, 203))
    given = feed(case) if lengths else {name: x for name, x in feed(case).items() if name != "lengths"}
    for dtype, type_name in ((torch.float32, "tensor(float)"), (torch.float16, "tensor(float16)")):
        made = session(one_node(case.config.attributes(), dtype=dtype, lengths=lengths, lse=False, then="Identity"))
        assert made.get_outputs()[0].type == type_name
        x = {name: value.astype(np.float16) if dtype == torch.float16 and name != "lengths" else value for name, value in given.items()}
        (found,) = made.run(None, x)
        wide = {name: value.astype(np.float32) if name != "lengths" else value for name, value in x.items()}
        (wanted,) = session(one_node(case.config.attributes(), lengths=lengths, lse=False)).run(None, wide)
        assert_equal_bits(torch.from_numpy(found), torch.from_numpy(wanted.astype(found.dtype)), type_name)
    with pytest.raises(Exception, match="Could not find an implementation for HyperAttention"):
        session(one_node({}, dtype=torch.bfloat16, lengths=lengths, then="Identity"))


def test_profile_shows_the_node(tmp_path: Path) -> None:
    case = Case("profile")
    profiled = session(one_node(case.config.attributes(), lengths=None), profile=tmp_path / "run")
    profiled.run(None, feed(case))
    events = json.loads(Path(profiled.end_profiling()).read_text())
    nodes = [e["args"] for e in events if e.get("cat") == "Node" and e["name"].endswith("kernel_time")]
    assert [(n["op_name"], n["provider"]) for n in nodes] == [(OP_TYPE, "CPUExecutionProvider")]


# --- refusals --------------------------------------------------------------------------------------------------------


OUT_OF_RANGE = [(name, value, f"{name} is {value}; it takes an integer from {low} to {high}")
                for name, (low, high) in RANGES.items() for value in (low - 1, high + 1)]  # fmt: skip
REFUSED = [
    *OUT_OF_RANGE,
    ("seed", 2**40, "seed is 1099511627776; it takes an integer from 0 to"),
    ("causal", 1.0, "causal is a float; it takes an integer"),
    ("block_size", [64, 64], "block_size is of another type; it takes an integer"),
    ("scale", 1, "scale is an integer; it takes a float"),
    ("scale", -0.5, "scale is -0.5.*; it takes 0 for 1/sqrt"),
    ("scale", float("nan"), "scale is .*nan; it takes 0 for 1/sqrt"),
    ("selector", "other", "selector is 'other'; it takes one of blocks, sortlsh"),
    ("selector", 0, "selector is an integer; it takes a string"),
    ("strict_causal", 1.0, "strict_causal is a float; it takes an integer"),
    ("hash_centre", 1.0, "hash_centre is a float; it takes an integer"),
    ("pool_size", 3, "block_size 64 is not a multiple of pool_size 3"),
    ("local_size", 100, "local_size 100 is not a multiple of block_size 64"),
]


@pytest.mark.parametrize(("name", "value", "text"), REFUSED, ids=[f"{name}-{value}" for name, value, _ in REFUSED])
def test_session_refuses_attribute(name: str, value: object, text: str) -> None:
    with pytest.raises(Exception, match="HyperAttention: " + text):
        session(one_node({name: value}))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"q": (2, 3, 70, 8)}, "3 query heads over 2 key heads; the first must be a multiple of the second"),
        ({"q": (1, 2, 70, 8)}, r"Q, K, V have shapes \(1, 2, 70, 8\), .*must agree in batch"),
        ({"k": (2, 2, 90, 9)}, r"Q, K, V have shapes .*\(2, 2, 90, 9\).*Q and K in head size"),
        ({"v": (2, 2, 91, 8)}, r"Q, K, V have shapes .*K and V in heads and sequence"),
        ({"v": (2, 1, 90, 8)}, r"Q, K, V have shapes .*K and V in heads and sequence"),
        ({"q": (2, 70, 8)}, r"Q, K, V have shapes \(2, 70, 8\), .*each takes 4 dimensions"),
        ({"q": (2, 2, 70, 257), "k": (2, 2, 90, 257)}, "head_dim is 257; it takes an integer from 1 to 256"),
        ({"lengths": (3,)}, r"lengths has shape \(3\); it takes one length a batch row: \(2\)"),
        ({"lengths": (2, 1)}, r"lengths has shape \(2, 1\); it takes one length a batch row"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_run_refuses_shapes(changes: dict, text: str) -> None:
    shapes = {"q": (2, 2, 70, 8), "k": (2, 2, 90, 8), "v": (2, 2, 90, 8), "lengths": (2,), **changes}
    model = onnx.load_from_string(one_node({}))
    for value in model.graph.input:
        value.type.tensor_type.ClearField("shape")
    given = {name: np.ones(shape, np.int32 if name == "lengths" else np.float32) for name, shape in shapes.items()}
    with pytest.raises(Exception, match="HyperAttention: " + text):
        session(model.SerializeToString()).run(None, given)


def test_other_types_are_refused_when_the_session_is_made() -> None:
    model = onnx.load_from_string(one_node(replace(config(), seed=1).attributes(), lengths=None))
    for value in model.graph.input:
        value.type.tensor_type.elem_type = TensorProto.DOUBLE
    with pytest.raises(Exception, match="tensor\\(double\\)"):
        session(model.SerializeToString())
