"""The torch op: same numbers as the reference, and every promise that torch's tracers rely on."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from hyperattention import Config, UsageError, op, reference


@dataclass(frozen=True)
class Case:
    batch: int
    heads_q: int
    heads_kv: int
    rows: int
    keys: int
    head_dim: int = 8
    head_dim_v: int = 8
    dtype: torch.dtype = torch.float32
    lengths: tuple[int, ...] | None = None

    def __str__(self) -> str:
        padded = "-padded" if self.lengths else ""
        return (
            f"{self.batch}x{self.heads_q}over{self.heads_kv}-{self.rows}of{self.keys}-{self.head_dim}to{self.head_dim_v}"
            f"-{str(self.dtype).removeprefix('torch.')}{padded}"
        )

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        generator = torch.Generator().manual_seed(5)
        sizes = (
            (self.heads_q, self.rows, self.head_dim),
            (self.heads_kv, self.keys, self.head_dim),
            (self.heads_kv, self.keys, self.head_dim_v),
        )
        q, k, v = (torch.randn(self.batch, *size, generator=generator).to(self.dtype) for size in sizes)
        return q, k, v, None if self.lengths is None else torch.tensor(self.lengths, dtype=torch.int32)


CONFIG = Config(exact_below=64, block_size=16, num_blocks=2, sample_size=9, local_size=32, sinks=3, seed=11)
CASES = [
    Case(2, 4, 2, 150, 150, lengths=(150, 101)),
    Case(1, 3, 1, 131, 131, head_dim_v=5),
    Case(1, 2, 2, 70, 173, dtype=torch.float64),
    Case(2, 2, 1, 1, 99),
    Case(1, 2, 1, 97, 97, dtype=torch.bfloat16),
    Case(1, 2, 1, 33, 33, dtype=torch.float16),
    Case(1, 1, 1, 1, 1, head_dim=1, head_dim_v=1),
]


def arguments(case: Case) -> tuple:
    return (*case.tensors(), *CONFIG.attributes().values())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_op_is_the_reference(case: Case) -> None:
    q, k, v, lengths = case.tensors()
    expected = reference.attention(q, k, v, CONFIG, lengths)
    o, lse = op.attention(q, k, v, CONFIG, lengths)
    assert torch.equal(o, expected.o) and torch.equal(lse, expected.lse)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fake_kernel_tells_shapes_and_dtypes(case: Case) -> None:
    q, k, v, lengths = case.tensors()
    real = op.attention(q, k, v, CONFIG, lengths)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = op.attention(*(mode.from_tensor(x) for x in (q, k, v)), CONFIG, None if lengths is None else mode.from_tensor(lengths))
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[4]], ids=str)
def test_opcheck(case: Case) -> None:
    result = torch.library.opcheck(torch.ops.hyperattention.attention.default, arguments(case))
    assert set(result.values()) == {"SUCCESS"}


class Twice(nn.Module):
    """The op between other arithmetic, as in a model."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        return 2 * op.attention(q, k, v, CONFIG, lengths)[0] + 1


def test_compiles_in_one_graph_for_every_length() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(Twice(), fullgraph=True, dynamic=True, backend="aot_eager")
    for case in (CASES[0], Case(3, 4, 2, 97, 97, lengths=(97, 1, 50))):
        q, k, v, lengths = case.tensors()
        assert torch.equal(compiled(q, k, v, lengths), Twice()(q, k, v, lengths))


def test_exports_with_dynamic_batch_and_sequence() -> None:
    q, k, v, lengths = CASES[0].tensors()
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence")
    shapes = ({0: batch, 2: sequence},) * 3 + ({0: batch},)
    program = torch.export.export(Twice(), (q, k, v, lengths), dynamic_shapes=shapes)
    nodes = [n for n in program.graph.nodes if n.target is torch.ops.hyperattention.attention.default]
    assert len(nodes) == 1
    other = Case(3, 4, 2, 77, 77, lengths=(77, 5, 60)).tensors()
    assert torch.equal(program.module()(*other), Twice()(*other))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_autocast_lowers_like_pytorchs_attention(given: torch.dtype, dtype: torch.dtype) -> None:
    q, k, v, _ = Case(1, 2, 1, 97, 97, dtype=given).tensors()
    with torch.autocast("cpu", dtype):
        o, lse = op.attention(q, k, v, CONFIG)
    lowered = given if given == torch.float64 else dtype
    expected = reference.attention(q.to(lowered), k.to(lowered), v.to(lowered), CONFIG)
    assert o.dtype == lowered
    assert torch.equal(o, expected.o) and torch.equal(lse, expected.lse)


def test_autocast_holds_under_compile() -> None:
    torch._dynamo.reset()
    q, k, v, lengths = CASES[0].tensors()
    compiled = torch.compile(Twice(), fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = compiled(q, k, v, lengths), Twice()(q, k, v, lengths)
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)


def test_inputs_that_are_not_dense() -> None:
    q, k, v, lengths = CASES[0].tensors()
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(op.attention(*turned, CONFIG, lengths)[0], op.attention(q, k, v, CONFIG, lengths)[0])


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("heads", lambda q, k, v: (q[:, :3], k, v), "3 query heads over 2 key heads"),
        ("head-size", lambda q, k, v: (q[..., :7], k, v), "head size of Q is 7, of K 8"),
        ("batch", lambda q, k, v: (q[:1], k, v), "batch sizes of Q, K, V are 1, 2, 2"),
        ("keys", lambda q, k, v: (q, k, v[:, :, 1:]), "150 keys"),
    ],
    ids=lambda value: value if isinstance(value, str) and "-" not in value else None,
)
def test_shapes_that_do_not_fit_are_named(name: str, change, words: str) -> None:
    q, k, v, _ = CASES[0].tensors()
    with pytest.raises(UsageError, match=words):
        op.attention(*change(q, k, v), CONFIG)


def test_there_is_no_silent_gradient() -> None:
    q, k, v, _ = (x.requires_grad_() if x is not None and x.is_floating_point() else x for x in CASES[1].tensors())
    o, _ = op.attention(q, k, v, CONFIG)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        o.sum().backward()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_cuda_runs_the_kernels_on_the_current_stream(dtype: torch.dtype) -> None:
    case = Case(2, 4, 2, 300, 300, head_dim=64, head_dim_v=64, dtype=dtype, lengths=(300, 201))
    q, k, v, lengths = case.tensors()
    expected = reference.attention(q, k, v, CONFIG, lengths)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        o, lse = op.attention(q.cuda(), k.cuda(), v.cuda(), CONFIG, lengths.cuda() if lengths is not None else None)
    stream.synchronize()
    assert o.dtype == dtype
    torch.testing.assert_close(lse.cpu()[1, :, :201], expected.lse[1, :, :201], atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(o.cpu().float(), expected.o.float(), atol=2e-2, rtol=2e-2)
