"""The processor's kernels, stage by stage against the reference, in every instruction set that this machine has."""

from __future__ import annotations

import ctypes
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from native import (
    KERNEL_CASES,
    SORTED_KERNEL_CASES,
    Inputs,
    Stages,
    assert_attention,
    assert_equal_bits,
    expected,
    expected_plan,
    expected_pools,
    inputs,
    pool_sizes,
)
from operator_cases import PLAN_ONLY, SORTED_PLAN_ONLY, Case, config, sorted_config

from hyperattention.config import PRESETS, Config
from hyperattention.errors import UsageError
from hyperattention.library import HaAttributes, HaParams, ort_library_path
from hyperattention.native import Library, _Call

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("one_thread")]
F32 = torch.float32
PLAIN = Case("plain", 130, 203, config(), dims=(9, 7))
SORTED = replace(PLAIN, config=sorted_config())


def instruction_sets() -> list[str]:
    """What HYPERATTENTION_CPU takes on this processor."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    flags = set(next((line for line in cpuinfo.splitlines() if line.startswith("flags")), "").split())
    found = ["generic"]
    if {"avx2", "fma"} <= flags:
        found.append("avx2")
        if {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"} <= flags:
            found.append("avx512")
    return found


def load_copy(folder: Path, isa: str) -> Library:
    """The library once more: each copy chooses its instruction set at its own first call."""
    copy = folder / ort_library_path().name
    shutil.copyfile(ort_library_path(), copy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYPERATTENTION_CPU", isa)
        library = Library(copy, "ha_cpu_", "cpu")
        Stages(library, inputs(PLAIN, F32), PLAIN.config).forward()
    return library


@pytest.fixture(scope="module", params=instruction_sets())
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Library:
    return load_copy(tmp_path_factory.mktemp(request.param), request.param)


# --- stage by stage --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", KERNEL_CASES + PLAN_ONLY, ids=str)
def test_pools_equal_the_references(library: Library, case: Case) -> None:
    stages = Stages(library, inputs(case, F32), case.config, threads=1)
    for side in ("queries", "keys"):
        for rows in pool_sizes(case):
            found = stages.pool(side, rows)
            for name, mine, theirs in zip(("values", "factors"), found, expected_pools(case, F32, side, rows), strict=True):
                assert_equal_bits(mine, theirs, f"{name} of {side} in pools of {rows}")


@pytest.mark.parametrize("case", KERNEL_CASES + PLAN_ONLY + SORTED_KERNEL_CASES + SORTED_PLAN_ONLY, ids=str)
def test_plan_equals_the_references(library: Library, case: Case) -> None:
    stages = Stages(library, inputs(case, F32), case.config, threads=1)
    plan = expected_plan(case, F32)
    assert_equal_bits(stages.select(), plan.selection, "selection")
    index, weight = stages.samples()
    assert_equal_bits(index, plan.sample_index, "sample index")
    assert_equal_bits(weight, plan.sample_weight, "sample weight")


def test_problems_selected_together_are_selected_as_alone(library: Library) -> None:
    for case in (PLAIN, SORTED):
        x = inputs(case, F32)
        q, k = (torch.stack([y, y.flip(0, 2), -y]) for y in (x.q, x.k))
        found = library.select_each(q, k, case.config, seeds := (0, 1, 2**31 - 1))
        for n, seed in enumerate(seeds):
            alone = library.select(q[n], k[n], k[n], replace(case.config, seed=seed))
            assert_equal_bits(found[n], alone, f"selection of problem {n}")


@pytest.mark.parametrize("case", KERNEL_CASES + SORTED_KERNEL_CASES, ids=str)
def test_attention_under_the_references_plan(library: Library, case: Case) -> None:
    wanted = expected(case, F32)
    stages = Stages(library, inputs(case, F32), case.config, threads=1)
    found = stages.attend(wanted.plan.selection)
    assert_attention(found, wanted)
    for name, mine, again in zip(("o", "lse"), found, stages.forward(), strict=True):
        assert_equal_bits(again, mine, f"{name} of forward")


# --- what may not matter ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", [PLAIN, Case("exact", 200, 200, Config().exact(), heads=(3, 1)), KERNEL_CASES[-1], *SORTED_KERNEL_CASES[-4:]], ids=str
)
def test_thread_count_changes_no_bit(library: Library, case: Case) -> None:
    first = Stages(library, inputs(case, F32), case.config, threads=1).forward()
    for threads in (0, 2, 3):
        for name, one, many in zip(("o", "lse"), first, Stages(library, inputs(case, F32), case.config, threads).forward(), strict=True):
            assert_equal_bits(many, one, f"{name} with {threads} threads")


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e4], ids=str)
@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("path", ["blocks", "sortlsh", "exact"])
def test_padding_reaches_no_live_row(library: Library, causal: int, path: str, poison: float) -> None:
    made = sorted_config(causal=causal) if path == "sortlsh" else config(causal=causal, exact_below=4096 if path == "exact" else 0)
    case = Case("padding", 203, 203, made, lengths=(150, 203, 1))
    clean = inputs(case, F32)
    q, k, v = clean.q.clone(), clean.k.clone(), clean.v.clone()
    live = torch.arange(203) < torch.tensor(case.lengths)[:, None]
    for x in (q, k, v):
        x.transpose(1, 2)[~live] = poison
    dirty = replace(clean, q=q, k=k, v=v)
    for name, mine, wanted in zip(
        ("o", "lse"), Stages(library, dirty, case.config).forward(), Stages(library, clean, case.config).forward(), strict=True
    ):
        assert_equal_bits(mine.transpose(1, 2)[live], wanted.transpose(1, 2)[live], name)


@pytest.mark.parametrize("case", [PLAIN, SORTED], ids=["blocks", "sortlsh"])
def test_nan_of_a_row_stays_in_that_row(library: Library, case: Case) -> None:
    x = inputs(case, F32)
    q = x.q.clone()
    q[0, 0, 5] = float("nan")
    plan = expected_plan(case, F32).selection
    o, lse = Stages(library, replace(x, q=q), case.config).attend(plan)
    clean, _ = Stages(library, x, case.config).attend(plan)
    assert o[0, 0, 5].isnan().all() and lse[0, 0, 5].isnan()
    o[0, 0, 5] = clean[0, 0, 5]
    assert_equal_bits(o, clean, "other rows")


@pytest.mark.parametrize("index", [-1, 2**31 - 1], ids=["none", "largest"])
@pytest.mark.parametrize("side", ["rows", "keys"])
def test_a_sorted_plan_never_leads_outside_the_tensors(library: Library, side: str, index: int) -> None:
    """Rows and keys that are not there are passed over, which leaves the local part and the sinks."""
    x = inputs(SORTED, F32)
    plan = expected_plan(SORTED, F32)
    foreign = replace(plan, selection=plan.selection.clone())
    foreign.orders(x.geometry)[("rows", "keys").index(side)].fill_(index)
    found = Stages(library, x, SORTED.config).attend(foreign.selection)
    nothing = sorted_config(num_blocks=0, sample_size=0)
    for name, mine, wanted in zip(("o", "lse"), found, Stages(library, x, nothing).forward(), strict=True):
        assert_equal_bits(mine, wanted, name)


def test_even_attention_over_many_keys_rounds_like_pytorch(library: Library) -> None:
    """Nearly equal weights and values of one sign, as of an untrained model: sums over all keys in a row would lose digits."""
    made = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, rows, 64, generator=made) * 0.05 for rows in (33, 8191, 8191))
    v += 0.5
    o, _ = library.forward(q, k, v, Config(causal=0).exact(), None)
    truth = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    ulp = torch.finfo(F32).eps * truth.abs().max()
    assert (o - truth).abs().max() <= 2 * (plain - truth).abs().max() + ulp


def test_lse_is_optional(library: Library) -> None:
    x = inputs(PLAIN, F32)
    call = _Call(library, x.q, x.k, x.v, PLAIN.config, x.lengths)
    o = torch.empty(call.o_shape)
    call.params.out = o.data_ptr()
    call.run(library._forward)
    assert_equal_bits(o, Stages(library, x, PLAIN.config).forward()[0], "o")


@pytest.mark.parametrize("shape", [(0, 2, 70, 80), (1, 2, 0, 80), (1, 2, 70, 0), (2, 2, 3, 0)], ids=str)
@pytest.mark.parametrize("made", [config(), sorted_config()], ids=["blocks", "sortlsh"])
def test_empty_problems(library: Library, made: Config, shape: tuple[int, int, int, int]) -> None:
    b, h, sq, sk = shape
    o, lse = library.forward(torch.randn(b, h, sq, 8), torch.randn(b, h, sk, 8), torch.randn(b, h, sk, 4), made)
    assert o.shape == (b, h, sq, 4) and lse.shape == (b, h, sq)
    if sk == 0:
        assert (o == 0).all() and (lse == -torch.inf).all()


# --- refusals --------------------------------------------------------------------------------------------------------


def problem(x: Inputs, **changes) -> HaParams:
    g = x.geometry
    sizes = {name: getattr(g, name) for name in "batch heads_q heads_kv seq_q seq_k head_dim head_dim_v".split()}
    pointers = {name: getattr(x, name).data_ptr() for name in "qkv"}
    attributes = HaAttributes.of(g.config)
    for name in set(changes) & {field[0] for field in HaAttributes._fields_}:
        setattr(attributes, name, changes.pop(name))
    return HaParams(**{"struct_size": ctypes.sizeof(HaParams), "attributes": attributes, **sizes, **pointers, **changes})


REFUSALS = {
    "float16": ({"dtype": 1}, "dtype is float16; the processor's kernels take float32"),
    "bfloat16": ({"dtype": 2}, "dtype is bfloat16; the processor's kernels take float32"),
    "unknown-dtype": ({"dtype": 7}, "dtype is 7; it takes 0 (float32), 1 (float16) or 2 (bfloat16)"),
    "other-build": ({"struct_size": 8}, "HaParams has 8 bytes"),
    "head-size": ({"head_dim": 257}, "head_dim is 257; it takes an integer from 1 to 256"),
    "value-size": ({"head_dim_v": 0}, "head_dim_v is 0; it takes an integer from 1 to 256"),
    "heads": ({"heads_q": 3, "heads_kv": 2}, "3 query heads over 2 key heads"),
    "attribute": ({"block_size": 257}, "block_size is 257; it takes an integer from 16 to 256"),
    "strict-full": ({"strict_causal": 1, "selector": 0, "causal": 0}, "strict_causal is 1 with causal 0"),
    "strict-sorted": ({"strict_causal": 1, "selector": 1}, "strict_causal is 1 with selector sortlsh"),
    "no-keys": ({"k": None}, "k is a null pointer"),
    "no-values": ({"v": None}, "v is a null pointer"),
    "no-output": ({"out": None}, "out is a null pointer"),
    "no-workspace": ({"workspace": None}, "workspace is a null pointer"),
    "small-workspace": ({"workspace_size": 3}, "workspace has 3 bytes; this problem takes "),
    "workspace-off-by-8": ({"workspace": 8}, "workspace is not aligned to 256 bytes"),
}


@pytest.mark.parametrize("name", REFUSALS)
@pytest.mark.parametrize("case", [PLAIN, SORTED], ids=["blocks", "sortlsh"])
def test_refusals_say_what_is_allowed(library: Library, case: Case, name: str) -> None:
    changes, text = REFUSALS[name]
    out = torch.zeros(130 * 7 * 2)
    params = problem(inputs(case, F32), **{"out": out.data_ptr(), "workspace": 256, "workspace_size": 1 << 40, **changes})
    with pytest.raises(UsageError, match="(?s).*" + text.replace("(", r"\(").replace(")", r"\)")):
        library.check(library._forward, ctypes.byref(params))
    assert (out == 0).all()


@pytest.mark.parametrize("case", [PLAIN, SORTED], ids=["blocks", "sortlsh"])
def test_attend_needs_a_plan(library: Library, case: Case) -> None:
    with pytest.raises(UsageError, match="plan is a null pointer"):
        Stages(library, inputs(case, F32), case.config)._attention(library._attend, None)


def test_attention_under_a_sorted_plan_needs_its_workspace(library: Library) -> None:
    x, out = inputs(SORTED, F32), torch.zeros(2 * 130 * 7)
    plan = expected_plan(SORTED, F32).selection
    for function in (library._attend, library._forward):
        with pytest.raises(UsageError, match="workspace is a null pointer"):
            library.check(function, ctypes.byref(problem(x, out=out.data_ptr(), plan=plan.data_ptr())))
    assert (out == 0).all()


@pytest.mark.parametrize(("side", "rows", "text"), [(2, 4, "side is 2; it takes 0"), (0, 0, "rows is 0; it takes an integer")])
def test_pool_refuses(library: Library, side: int, rows: int, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        library.check(library._pool, ctypes.byref(problem(inputs(PLAIN, F32))), side, rows, None, None)


def test_unknown_instruction_set_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="HYPERATTENTION_CPU is 'sse9'; this processor takes one of .*generic") as error:
        load_copy(tmp_path, "sse9")
    assert all(isa in str(error.value) for isa in instruction_sets())


@pytest.mark.parametrize("case", [PLAIN, SORTED], ids=["blocks", "sortlsh"])
def test_workspace_is_a_function_of_shapes(library: Library, case: Case) -> None:
    x = inputs(case, F32)
    sizes = {library.workspace_size(f * x.q, f * x.k, x.v, case.config) for f in (0, 1, float("nan"))}
    assert len(sizes) == 1 and sizes.pop() > 0
    assert library.workspace_size(x.q, x.k, x.v, case.config.exact()) == 0


@pytest.mark.parametrize(("preset", "bytes_a_row"), [("blocks", 3 * 64), ("paper", 6 * 4 + 2 * 2 + 2 * 4)])
def test_workspace_of_the_presets(library: Library, preset: str, bytes_a_row: int) -> None:
    """`blocks`: pools of 4 rows in int8 take a sixteenth of Q and K. `paper`: three levels of two orders, ranks, two sums a row."""
    tall = torch.empty(1, 4, 32768, 64)
    assert library.workspace_size(tall, tall, tall, PRESETS[preset]) <= 4 * 32768 * bytes_a_row
