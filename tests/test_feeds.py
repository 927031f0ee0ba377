"""What a runner is fed: refusals before any runtime, and inputs cut, tiled, drawn or read from a file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import validation_bench as vb
from torch import Tensor

from hyperattention.errors import UsageError
from hyperattention.export.held_out import default_lengths
from hyperattention.export.plan import ExportPlan
from hyperattention.export.source import Input
from hyperattention.validate.arrays import load_arrays
from hyperattention.validate.feeds import ArrayMaterial, RandomMaterial, TextMaterial, without_padding
from hyperattention.validate.runner_trt import TensorRTRunner
from hyperattention.validate.runners import ModelRunner, OrtRunner, TorchRunner
from hyperattention.validate.signature import check_feed, length_dimension, length_range

TEXT = (Input("input_ids", "int64", ("batch", "sequence")), Input("lengths", "int32", ("batch",)))
MIXED = (Input("x", "float", (2, "n", 3)), Input("mask", "bool", ("n",)), Input("gain", "float32", ()))


def plan(inputs: tuple[Input, ...] = TEXT, dims: dict | None = None, seq: tuple = (5, 20, 40), dtype: str = "fp32") -> ExportPlan:
    """A plan without layers: inputs and ranges are all that a feed is held against."""
    dims = {"batch": (1, 2, 3), "sequence": seq} if dims is None else dims
    rows = dims.get("batch", (2, 2, 2))
    return ExportPlan("features", dtype, (), inputs, ("y",), dims, seq, rows, "tokens", 0, "blocks", "op")


MIXED_PLAN = plan(MIXED, {"n": (4, 9, 30)}, (4, 9, 30), "bf16")


def ids(rows: int, length: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.zeros(rows, length, dtype=dtype)


def full(rows: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.full((rows,), 7, dtype=dtype)


REFUSED = {
    "over the profile": ({"input_ids": ids(1, 41), "lengths": full(1)}, "sequence of 41 was not exported", "sequence 5 to 40"),
    "under the profile": ({"input_ids": ids(1, 4), "lengths": full(1)}, "sequence of 4 was not exported", "sequence 5 to 40"),
    "zero length": ({"input_ids": ids(1, 0), "lengths": full(1)}, "sequence of 0 was not exported", "sequence 5 to 40"),
    "no rows": ({"input_ids": ids(0, 20), "lengths": full(0)}, "batch of 0 was not exported", "batch 1 to 3"),
    "too many rows": ({"input_ids": ids(4, 20), "lengths": full(4)}, "batch of 4", "batch 1 to 3"),
    "rows that differ": ({"input_ids": ids(2, 20), "lengths": full(3)}, "batch is 2 in input input_ids and 3 in input lengths", "one size"),
    "wrong dtype": ({"input_ids": ids(1, 20, torch.int32), "lengths": full(1)}, "input_ids is int32", "takes int64"),
    "wrong rank": ({"input_ids": full(20, torch.int64), "lengths": full(1)}, r"input_ids has shape \[20\]", "batch 1 to 3, sequence 5"),
    "missing": ({"input_ids": ids(1, 20)}, "has the inputs input_ids;", "input_ids, lengths"),
    "unknown": ({"input_ids": ids(1, 20), "length": full(1)}, "has the inputs input_ids, length;", "input_ids, lengths"),
    "nothing": ({}, r"has the inputs \(none\)", "input_ids, lengths"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_feed_that_was_not_exported_is_refused(name: str) -> None:
    given, found, allowed = REFUSED[name]
    with pytest.raises(UsageError, match=f"{found}.*{allowed}|{allowed}.*{found}"):
        check_feed(plan(), given)


def test_fixed_sizes_and_the_plans_own_dtype() -> None:
    good = {"x": torch.zeros(2, 9, 3, dtype=torch.bfloat16), "mask": torch.ones(9, dtype=torch.bool), "gain": torch.tensor(1.0)}
    check_feed(MIXED_PLAN, good)
    for changed, says in (
        ({"x": good["x"].float()}, "x is float32.*takes bfloat16"),
        ({"x": good["x"][:1]}, r"takes \[2, n 4 to 30, 3\]: a size of 1"),
        ({"mask": good["mask"][:8]}, "n is 9 in input x and 8 in input mask"),
        ({"gain": torch.ones(1)}, r"gain has shape \[1\]; the exported model takes \[\]"),
    ):
        with pytest.raises(UsageError, match=says):
            check_feed(MIXED_PLAN, {**good, **changed})


def runners() -> list[ModelRunner]:
    """One of each; none is active, so that reaching the runtime would be an error of another kind."""
    patched = vb.model()
    folder = Path("no such folder")
    return [
        TorchRunner(patched, None, "torch exact"),
        OrtRunner(patched.plan, folder / "model.onnx", None, [], "ONNX Runtime"),
        TensorRTRunner(patched.plan, folder / "model.engine", folder / "plugin.so", "TensorRT"),
    ]


@pytest.mark.parametrize("number", range(3), ids=["torch", "onnxruntime", "tensorrt"])
def test_every_runner_refuses_before_its_runtime(number: int) -> None:
    with pytest.raises(UsageError, match="sequence of 2049 was not exported.*1 to 2048|1 to 2048.*sequence of 2049"):
        runners()[number].infer({"input_ids": ids(1, 2049), "lengths": full(1)})


# --- lengths -----------------------------------------------------------------------------------------------------------


def test_the_dimension_that_makes_an_input_longer() -> None:
    image = (Input("pixels", "float", ("batch", 3, "height", "width")),)
    assert length_dimension(plan()) == "sequence" and length_range(plan()) == (5, 40)
    wide = plan(image, {"batch": (1, 1, 900), "height": (8, 16, 32), "width": (8, 16, 64)}, seq=(5, 20, 129))
    assert length_dimension(wide) == "width" and length_range(wide) == (8, 64)
    same = replace(wide, seq=(8, 16, 32))  # the attention's own range decides
    assert length_dimension(same) == "height"
    fixed = plan(image, {"batch": (1, 1, 9), "height": (8, 8, 8), "width": (8, 8, 8)}, seq=(65, 65, 65))
    assert length_dimension(fixed) is None and length_range(fixed) == (65, 65)


@pytest.mark.parametrize(
    ("low", "top", "lengths"),
    [(1, 32768, (8192, 16384, 32768)), (9000, 20000, (16384,)), (1, 512, (128, 256, 512)), (200, 512, (200, 256, 512)), (65, 65, (65,))],
)
def test_default_lengths(low: int, top: int, lengths: tuple[int, ...]) -> None:
    assert default_lengths(low, top) == lengths


# --- material ----------------------------------------------------------------------------------------------------------


def test_arrays_are_cut_and_tiled_along_the_dimension_that_varies() -> None:
    x = torch.arange(4 * 10 * 3).view(4, 10, 3).float()
    material = ArrayMaterial({"x": x, "mask": torch.arange(10) % 2 == 0, "gain": torch.tensor(0.5)}, "file", "arrays", 10, 4)
    short = material.feeds(MIXED_PLAN, 5, 9)
    assert len(short) == 4  # two pairs of rows, two halves of the length
    for given, (row, start) in zip(short, ((0, 0), (2, 0), (0, 5), (2, 5)), strict=True):
        check_feed(MIXED_PLAN, given)
        assert torch.equal(given["x"].float(), x[row : row + 2, start : start + 5].bfloat16().float())
        assert given["mask"].tolist() == [(start + i) % 2 == 0 for i in range(5)] and float(given["gain"]) == 0.5
    (long, _) = material.feeds(MIXED_PLAN, 23, 9)
    assert torch.equal(long["x"].float(), torch.cat([x, x, x], 1)[:2, :23].bfloat16().float())
    assert len(material.feeds(MIXED_PLAN, 5, 3)) == 3


def test_fewer_rows_than_a_feed_takes_are_repeated() -> None:
    inputs = (Input("x", "float", ("batch", 3)),)
    material = ArrayMaterial({"x": torch.arange(6.0).view(2, 3)}, "file", "arrays", None, 2)
    (given,) = material.feeds(plan(inputs, {"batch": (3, 3, 5)}, (9, 9, 9)), 9, 4)
    assert given["x"].tolist() == [[0, 1, 2], [3, 4, 5], [0, 1, 2]]


def test_random_inputs_have_every_dtype_and_follow_the_seed() -> None:
    (first, second), (again, _) = RandomMaterial(3, 50).feeds(MIXED_PLAN, 11, 2), RandomMaterial(3, 50).feeds(MIXED_PLAN, 11, 2)
    check_feed(MIXED_PLAN, first)
    assert torch.equal(first["x"], again["x"]) and not torch.equal(first["x"], second["x"]) and bool(first["mask"].all())
    (text,) = RandomMaterial(3, 50).feeds(plan(), 11, 1)
    check_feed(plan(), text)
    assert int(text["input_ids"].max()) < 50 and text["lengths"].tolist() == [11]
    assert RandomMaterial(3, 50).kind == "random" and "never clear" in RandomMaterial(3, 50).describe()["note"]


def test_text_is_repeated_to_the_fewest_rows() -> None:
    rows = plan(dims={"batch": (2, 2, 4), "sequence": (5, 20, 700)}, seq=(5, 20, 700))
    (given,) = TextMaterial(vb.corpus()).feeds(rows, 601, 1)
    check_feed(rows, given)
    assert given["input_ids"].shape == (2, 601) and torch.equal(given["input_ids"][0], given["input_ids"][1])


def test_padding_is_not_compared() -> None:
    given = {"input_ids": ids(2, 5), "lengths": torch.tensor([5, 2])}
    hidden = torch.arange(2 * 5 * 3.0).view(2, 5, 3)
    assert without_padding(hidden, given).tolist() == [*hidden[0].tolist(), *hidden[1, :2].tolist()]
    pooled = torch.zeros(2, 3)
    assert without_padding(pooled, given) is pooled


# --- --inputs FILE.npz -------------------------------------------------------------------------------------------------


def saved(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)
    return path


def mixed(rows: int = 4, length: int = 10, **changed: np.ndarray) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    x = generator.standard_normal((rows, length, 3)).astype(np.float64)
    return {"x": x, "mask": np.ones(length, bool), "gain": np.float32(2), **changed}


def test_a_file_of_arrays(tmp_path: Path) -> None:
    arrays = mixed()
    material = load_arrays(saved(tmp_path / "real.npz", **arrays), MIXED_PLAN)
    assert (material.kind, material.longest, material.describe()["size"]) == ("arrays", 10, 4)
    first, second = material.feeds(MIXED_PLAN, 10, 9)
    check_feed(MIXED_PLAN, first)
    assert torch.equal(second["x"], torch.from_numpy(arrays["x"][2:]).bfloat16())
    assert str(tmp_path) not in str(material.describe())
    other = load_arrays(saved(tmp_path / "real.npz", **mixed(gain=np.float32(3))), MIXED_PLAN)
    assert other.describe()["sha256"] != material.describe()["sha256"]


def test_lengths_of_text_may_be_left_out(tmp_path: Path) -> None:
    material = load_arrays(saved(tmp_path / "ids.npz", input_ids=np.arange(60, dtype=np.int32).reshape(2, 30)), plan(), 60)
    first, second = material.feeds(plan(), 30, 2)
    assert first["lengths"].tolist() == [30] and int(second["input_ids"][0, 0]) == 30
    (cut, *_) = material.feeds(plan(), 12, 1)
    assert cut["lengths"].tolist() == [12]
    given = saved(tmp_path / "padded.npz", input_ids=np.zeros((1, 30), np.int64), lengths=np.array([17]))
    assert [load_arrays(given, plan()).feeds(plan(), n, 1)[0]["lengths"].tolist() for n in (30, 12)] == [[17], [12]]


BAD = {
    "name": (dict(mixed(), y=np.ones(1)), "holds x, mask, gain, y; the exported model takes x, mask, gain"),
    "missing": ({"x": mixed()["x"]}, "holds x; the exported model takes x, mask, gain"),
    "empty": ({}, "holds no array"),
    "dtype": (mixed(x=np.ones((2, 10, 3), np.int64)), "x is int64; the exported model takes bfloat16"),
    "bool as number": (mixed(mask=np.ones(10, np.int64)), "mask is int64; the exported model takes bool"),
    "text": (mixed(mask=np.array(["a"] * 10)), "mask is <U1; it takes float16"),
    "unsigned": (mixed(mask=np.ones(10, np.uint32)), "mask is uint32; it takes float16"),
    "rank": (mixed(gain=np.ones(1, np.float32)), r"gain has shape \[1\]; the exported model takes \[\]"),
    "size": (mixed(x=np.ones((2, 10, 4), np.float32)), r"x has shape \[2, 10, 4\]; the exported model takes \[2, n 4 to 30, 3\]"),
    "rows": (mixed(rows=3), "3 rows; the exported model reads 2 at a time"),
    "zero": (mixed(length=0), r"x has shape \[4, 0, 3\]"),
    "unequal": (mixed(mask=np.ones(9, bool)), "n is 10 in x and 9 in mask; it takes one size"),
    "NaN": (mixed(x=np.full((2, 10, 3), np.nan)), "x holds 60 numbers that are NaN"),
    "too large": (mixed(x=np.full((2, 10, 3), 1e39)), "x holds 60 numbers that are .* too large for bf16"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_arrays_are_refused(name: str, tmp_path: Path) -> None:
    arrays, says = BAD[name]
    with pytest.raises(UsageError, match=f"--inputs.*{says}"):
        load_arrays(saved(tmp_path / "bad.npz", **arrays), MIXED_PLAN)


@pytest.mark.parametrize("name", ["missing.npz", "text.npz", "one.npy", "half.npz", "pickled.npz"])
def test_files_that_are_no_arrays_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "text.npz":
        path.write_text("no zip")
    elif name == "one.npy":
        np.save(path, np.ones(3))
    elif name == "half.npz":
        whole = saved(tmp_path / "whole.npz", **mixed()).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif name == "pickled.npz":
        np.savez(path, x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(UsageError, match=rf"--inputs .*{name} (does not exist|cannot be read).*x \[2, n 4 to 30, 3\], mask"):
        load_arrays(path, MIXED_PLAN)


def test_ids_the_model_does_not_know_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="input_ids holds 0 to 67; the model knows the tokens 0 to 66"):
        load_arrays(saved(tmp_path / "ids.npz", input_ids=np.arange(68)[None, 30:].repeat(2, 0) * [[0], [1]]), plan(), 67)
    with pytest.raises(UsageError, match="numbers that int32 cannot"):
        load_arrays(saved(tmp_path / "ids.npz", input_ids=np.ones((1, 20), int), lengths=np.array([2**40])), plan())
