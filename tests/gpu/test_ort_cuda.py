"""The op in ONNX Runtime's CUDA provider: the bits of the torch op, on the session's own stream, with scratch from its arena.

Run as a program it is one run whose arena is too small (`test_a_full_arena_is_an_error`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from cuda_checks import DTYPES
from native import Inputs, assert_attention, assert_equal_bits, expected, inputs
from operator_cases import Case, config, sorted_config
from ort_models import CPU, CUDA, one_node, options, session

from hyperattention import op
from hyperattention.config import OP_TYPE, PRESETS, Config
from hyperattention.errors import EnvironmentFault
from hyperattention.export.load import inspect_source, load_model
from hyperattention.export.onnx_graph import MODEL, export_onnx
from hyperattention.export.patch import install
from hyperattention.export.plan import make_plan
from hyperattention.library import load_cuda, ort_library_path
from hyperattention.validate.feeds import feed
from hyperattention.validate.operators import native_operator
from hyperattention.validate.ort_session import bind, open_session, run_bound
from hyperattention.validate.provenance import check_graph
from hyperattention.validate.runners import OrtRunner, TorchRunner

pytestmark = [pytest.mark.gpu, pytest.mark.ort, pytest.mark.usefixtures("one_thread")]
ort = pytest.importorskip("onnxruntime")
DEVICE = torch.device("cuda", 0)
CASES = [
    Case("square", 203, 203, config(), (4, 2), (64, 64)),
    Case("chunk-lengths", 70, 259, config(), (4, 1), (64, 64), lengths=(259, 200, 7)),
    Case("value-size", 130, 259, config(), (2, 1), (40, 72), lengths=(231,)),
    Case("non-causal", 130, 259, config(causal=0), (2, 2), (128, 128), lengths=(259, 140)),
    Case("sorted", 259, 259, sorted_config(), (4, 2), (64, 64)),
    Case("sorted-overlap-lengths", 130, 300, sorted_config(local_overlap=1), (2, 1), (72, 40), lengths=(300, 177)),
    Case("sorted-non-causal", 130, 300, sorted_config(causal=0), (2, 1), (256, 256)),
    Case("exact", 130, 203, Config().exact(), (4, 2), (96, 96), lengths=(203, 90)),
    Case("no-keys", 70, 0, config(), (2, 1), (64, 64)),
]
LONG = Case("long", 9001, 9001, PRESETS["blocks"], (4, 2), (64, 64), lengths=(9001, 8700))
LONG_SORTED = Case("long-sorted", 9001, 9001, PRESETS["paper"], (2, 1), (128, 128))


@pytest.fixture(scope="module", autouse=True)
def provider() -> None:
    if CUDA not in ort.get_available_providers():
        pytest.skip(f"onnxruntime {ort.__version__} has no {CUDA}; install onnxruntime-gpu")
    ort.preload_dlls()


def on_device(case: Case, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The case's inputs by their names in the model."""
    x: Inputs = inputs(case, dtype)
    named = {"q": x.q, "k": x.k, "v": x.v, "lengths": x.lengths}
    return {name: value.to(DEVICE) for name, value in named.items() if value is not None}


def cuda_session(case: Case, dtype: torch.dtype, profile: Path | None = None, **provider_options: str) -> Any:
    model = one_node(case.config.attributes(), dtype=dtype, lengths="lengths" if case.lengths else None, declared=True)
    made = session(model, profile=profile, providers=[(CUDA, {"device_id": "0", **provider_options}), CPU])
    assert made.get_providers()[0] == CUDA, f"the provider did not load; the session has {made.get_providers()}"
    return made


def torch_op(case: Case, given: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return op.attention(given["q"], given["k"], given["v"], case.config, given.get("lengths"))


def assert_outputs(found: dict[str, torch.Tensor], wanted: tuple[torch.Tensor, torch.Tensor], what: str = "") -> None:
    for (name, mine), theirs in zip(found.items(), wanted, strict=True):
        assert_equal_bits(mine, theirs, f"{name} {what}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_torch_op_and_the_reference(case: Case, dtype: str) -> None:
    given = on_device(case, DTYPES[dtype])
    found, _ = run_bound(cuda_session(case, DTYPES[dtype]), given, DEVICE)
    assert_outputs(found, torch_op(case, given))
    assert_attention(found.values(), expected(case, DTYPES[dtype]))


@pytest.mark.parametrize("case", [LONG, LONG_SORTED], ids=str)
def test_long_problems_equal_the_torch_op(case: Case) -> None:
    given = on_device(case, torch.bfloat16)
    made = cuda_session(case, torch.bfloat16)
    for _ in range(3):  # the arena's memory is another one's each time
        assert_outputs(run_bound(made, given, DEVICE)[0], torch_op(case, given))


def test_the_node_alone_ran_and_on_cuda(tmp_path: Path) -> None:
    case = CASES[1]
    profiled = cuda_session(case, torch.bfloat16, tmp_path / "run")
    run_bound(profiled, on_device(case, torch.bfloat16), DEVICE)
    events = json.loads(Path(profiled.end_profiling()).read_text())
    nodes = [e["args"] for e in events if e.get("cat") == "Node" and e["name"].endswith("kernel_time")]
    assert [(n["op_name"], n["provider"]) for n in nodes] == [(OP_TYPE, CUDA)]  # no copies to or from the host


@pytest.mark.parametrize("case", [LONG, LONG_SORTED], ids=str)
def test_runs_on_the_sessions_stream(case: Case) -> None:
    """Q is written on that stream, late: kernels on any other would have read what was there before."""
    stream = torch.cuda.Stream(DEVICE)
    made = cuda_session(case, torch.bfloat16, user_compute_stream=str(stream.cuda_stream))
    given = on_device(case, torch.bfloat16)
    source = given["q"].clone()
    run_options = ort.RunOptions()
    run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    given["q"].fill_(float("nan"))
    bound = bind(made, given, DEVICE)
    assert bound.inputs["q"] is given["q"]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        given["q"].copy_(source)
        made.run_with_iobinding(bound.binding, run_options)
    stream.synchronize()
    assert_outputs(bound.outputs, torch_op(case, given))


def test_sessions_and_runs_in_parallel() -> None:
    """Sessions of both providers at once, and one session in two threads, each with streams and scratch of its own."""
    small = Case("processor", 203, 203, config(), (2, 1), (16, 16))
    work: list[tuple[Any, dict[str, torch.Tensor], torch.device, dict[str, torch.Tensor]]] = []
    for case, dtype, threads in ((LONG, torch.bfloat16, 2), (LONG_SORTED, torch.float16, 2), (LONG, torch.float32, 1)):
        made, given = cuda_session(case, dtype), on_device(case, dtype)
        work += [(made, given, DEVICE, run_bound(made, given, DEVICE)[0])] * threads
    processor, x = session(one_node(small.config.attributes(), lengths=None, declared=True)), inputs(small, torch.float32)
    host, given = torch.device("cpu"), {"q": x.q, "k": x.k, "v": x.v}
    work.append((processor, given, host, run_bound(processor, given, host)[0]))
    failures: list[str] = []

    def repeat(made: Any, given: dict[str, torch.Tensor], device: torch.device, wanted: dict[str, torch.Tensor]) -> None:
        try:
            for _ in range(10):
                found = run_bound(made, given, device)[0]
                assert_outputs(found, tuple(wanted.values()), "beside others")  # type: ignore[arg-type]
        except Exception as error:  # a thread's own are lost otherwise
            failures.append(f"{type(error).__name__}: {error}")

    workers = [threading.Thread(target=repeat, args=item) for item in work]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


def test_a_head_size_without_kernel_is_refused() -> None:
    case = Case("odd", 70, 70, config(), (2, 1), (20, 20))
    made = cuda_session(case, torch.float16)
    with pytest.raises(Exception, match="HyperAttention: head_dim is 20"):
        run_bound(made, on_device(case, torch.float16), DEVICE)


def run_out_of_memory() -> None:
    made = cuda_session(LONG, torch.bfloat16, gpu_mem_limit="1024", arena_extend_strategy="kSameAsRequested")
    try:
        run_bound(made, on_device(LONG, torch.bfloat16), DEVICE)
    except Exception as error:
        print(f"refused: {error}")


def test_a_full_arena_is_an_error() -> None:
    """In a process of its own: where this goes wrong, the process ends."""
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "refused: " in done.stdout and "HyperAttention" in done.stdout, done.stdout + done.stderr


# --- whole models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_model(dtype: str, tmp_path: Path) -> None:
    """Most logits are PyTorch's with the same kernels (rounding elsewhere moves a choice here and there), and both nodes ran on CUDA."""
    source = inspect_source(tiny.save(tmp_path / "model"))
    plan = make_plan(source, layers="0", attributes={**tiny.SMALL}, dtype=dtype, seq=(1, 150, 512), batch=(1, 2, 2))
    patched = install(load_model(source, DTYPES[dtype], DEVICE), plan)
    (tmp_path / "out").mkdir()
    export_onnx(patched, plan, tmp_path / "out", lambda text: None)
    nodes = check_graph(tmp_path / "out" / MODEL, plan)
    given = feed(tiny.token_ids(2, 150), torch.tensor([150, 131]))
    try:
        with OrtRunner(plan, tmp_path / "out" / MODEL, ort_library_path(), nodes, "ours", device=DEVICE) as ours:
            found = ours.infer(given)["logits"]
            proof = ours.prove()
    except EnvironmentFault as error:
        # The provider has no bfloat16 kernel for some operators of ONNX; ours it must have.
        assert dtype == "bf16" and "Could not find an implementation for" in str(error) and OP_TYPE not in str(error), error
        return
    assert proof.found == tuple(sorted(nodes)) and CUDA in proof.source
    with TorchRunner(patched, native_operator(load_cuda()), "torch") as definition:
        wanted = definition.infer(given)["logits"]
    live = torch.arange(150, device=DEVICE) < torch.tensor([[150], [131]], device=DEVICE)
    error, scale = (found.float() - wanted.float())[live].abs().median(), wanted.float()[live].abs().median()
    assert found.dtype == wanted.dtype and error < 0.02 * scale, (float(error), float(scale))


def test_no_quiet_fall_back_to_the_processor() -> None:
    """A device that is not there: ONNX Runtime refuses, or goes on without the provider, and then we refuse."""
    with pytest.raises(EnvironmentFault, match="ONNX Runtime"):
        open_session(one_node({}, dtype=torch.float16), options(), torch.device("cuda", 99), "model.onnx")


if __name__ == "__main__":
    ort.preload_dlls()
    run_out_of_memory()
