"""Builds engines of one node on a GPU host, runs them at lengths other than opt and holds them against the reference.

    python tests/gpu/engine_run.py --out DIR [--only NAME,NAME]

Needs a CUDA device, TensorRT with its builder, and libhyperattention_trt.so. Every check stands alone: a failure is
recorded and the next one runs. DIR/engine_run.json holds the numbers; the exit code is 1 if any check failed.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable

import onnx
import tensorrt as trt
import torch
from engine_parts import Heads, Runner, build, compare, op_model, random_inputs, token_model

from hyperattention.config import Config
from hyperattention.export.engine import build_engine, layer_names, read_engine
from hyperattention.export.engine_log import BuildLog, make_logger
from hyperattention.export.engine_plugin import register_plugin
from hyperattention.export.plan import ExportPlan
from hyperattention.library import build_info, trt_library_path

# Small tiles, so that short sequences reach every part of the operator.
SMALL = Config(block_size=32, num_blocks=4, sample_size=64, local_size=256, sinks=16, exact_below=512, seed=7)
MIN, OPT, MAX = 1, 2048, 6000
LENGTHS = (333, 1023, 4097, 5555)  # below exact_below, and odd ones on both sides of opt
BF16, FP16 = torch.bfloat16, torch.float16
CHECKS: dict[str, Callable[["Session"], dict[str, Any]]] = {}


def check(function: Callable[["Session"], dict[str, Any]]) -> Callable[["Session"], dict[str, Any]]:
    CHECKS[function.__name__] = function
    return function


class Session:
    """Logger, folder and the engines built so far."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.log = BuildLog(out / "engine_run.log")
        self.logger = make_logger(trt, self.log)
        self.engines: dict[str, Any] = {}

    def engine(self, config: Config, dtype: torch.dtype, heads: Heads = Heads(), batch: int = 2, longest: int = MAX, **shape: bool) -> Any:
        """The engine of op_model, built once."""
        key = repr((config, dtype, heads, batch, longest, shape))
        if key not in self.engines:
            sizes = {"q": (heads.q, heads.dim), "k": (heads.kv, heads.dim), "v": (heads.kv, heads.dim_v)}
            profile: dict[str, tuple] = {n: tuple((b, h, s, d) for b, s in self.bounds(batch, longest)) for n, (h, d) in sizes.items()}
            if shape.get("lengths", True):
                profile["lengths"] = tuple((b,) for b, _ in self.bounds(batch, longest))
            self.engines[key] = build(trt, self.logger, op_model(config, dtype, heads, **shape), profile)
        return self.engines[key]

    @staticmethod
    def bounds(batch: int, longest: int) -> tuple[tuple[int, int], ...]:
        return ((1, MIN), (1, OPT), (batch, longest))


def at_lengths(session: Session, dtype: torch.dtype, heads: Heads, lengths: tuple[int, ...], config: Config = SMALL) -> dict[str, Any]:
    engine = session.engine(config, dtype, heads)
    runner, rows = Runner(trt, engine), {}
    for seq in lengths:
        inputs = random_inputs(heads, 1, seq, dtype, None, seed=seq)
        rows[str(seq)] = compare(inputs, config, runner(**inputs)["o"])
    return {"layers": layer_names(engine), **rows}


@check
def registry(session: Session) -> dict[str, Any]:
    """The library is registered, twice over, under its name."""
    library = trt_library_path()
    register_plugin(library)
    register_plugin(library)
    return build_info(library)


@check
def bf16(session: Session) -> dict[str, Any]:
    return at_lengths(session, BF16, Heads(), LENGTHS)


@check
def inspector(session: Session) -> dict[str, Any]:
    """What the engine says of its layers: the proof that the plugin runs rests on it."""
    engine = session.engine(SMALL, BF16)
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    assert len(layer_names(engine)) == 1, f"one plugin layer, not {layer_names(engine)}: {text}"
    return {"information": json.loads(text)}


@check
def single_rows(session: Session) -> dict[str, Any]:
    return at_lengths(session, BF16, Heads(), (1, 2, 63, 64, 65))


@check
def fp16_wide_heads(session: Session) -> dict[str, Any]:
    return at_lengths(session, FP16, Heads(6, 3, 128, 128), LENGTHS[:3])


@check
def batch_with_lengths(session: Session) -> dict[str, Any]:
    """Two rows, one of them padded with NaN; and a row without any key."""
    runner, rows = Runner(trt, session.engine(SMALL, BF16)), {}
    for seq, lengths in ((4097, [4097, 1500]), (600, [0, 599])):
        inputs = random_inputs(Heads(), 2, seq, BF16, lengths)
        rows[f"{seq}: {lengths}"] = compare(inputs, SMALL, runner(**inputs)["o"])
    return rows


@check
def without_lengths(session: Session) -> dict[str, Any]:
    inputs = random_inputs(Heads(), 1, 3001, BF16, None)
    runner = Runner(trt, session.engine(SMALL, BF16, lengths=False))
    return compare(inputs, SMALL, runner(**{n: inputs[n] for n in "qkv"})["o"])


@check
def log_sum_exp(session: Session) -> dict[str, Any]:
    inputs = random_inputs(Heads(), 1, 3001, BF16, None)
    found = Runner(trt, session.engine(SMALL, BF16, lse=True))(**inputs)
    return compare(inputs, SMALL, found["o"], found["lse"])


@check
def not_causal(session: Session) -> dict[str, Any]:
    return at_lengths(session, BF16, Heads(), (1023, 4097), replace(SMALL, causal=0))


@check
def defaults(session: Session) -> dict[str, Any]:
    """The default attributes, long enough for both levels of the selector (rule 23)."""
    config, heads = Config(), Heads(4, 2)
    inputs = random_inputs(heads, 1, 12289, BF16, None)
    return compare(inputs, config, Runner(trt, session.engine(config, BF16, heads, longest=16384))(**inputs)["o"])


@check
def two_streams(session: Session) -> dict[str, Any]:
    """Two contexts of one engine, two threads, two streams: each gives what it gave alone."""
    engine = session.engine(SMALL, BF16)
    runners = [Runner(trt, engine), Runner(trt, engine)]
    feeds = [random_inputs(Heads(), 1, seq, BF16, None, seed=seq) for seq in (5555, 2777)]
    alone = [runner(**feed)["o"].clone() for runner, feed in zip(runners, feeds, strict=True)]
    differing = [0, 0]

    def work(i: int) -> None:
        for _ in range(20):
            runners[i].outputs["o"].fill_(float("nan"))
            torch.cuda.current_stream().synchronize()
            runners[i].launch()
            runners[i].stream.synchronize()
            differing[i] += not torch.equal(runners[i].outputs["o"], alone[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert differing == [0, 0], f"runs of 20 that differ from the one alone: {differing}"
    return {"runs": 40}


@check
def cuda_graph(session: Session) -> dict[str, Any]:
    """Captured at two lengths, replayed on other contents."""
    runner, rows = Runner(trt, session.engine(SMALL, BF16)), {}
    for seq in (401, 4097):
        feed = random_inputs(Heads(), 1, seq, BF16, None, seed=1)
        runner(**feed)  # shape-dependent set-up is not part of a graph
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=runner.stream, capture_error_mode="thread_local"):
            runner.launch()
        other = random_inputs(Heads(), 1, seq, BF16, None, seed=2)
        for name, tensor in other.items():
            feed[name].copy_(tensor)
        runner.outputs["o"].fill_(float("nan"))
        torch.cuda.synchronize()
        graph.replay()
        torch.cuda.synchronize()
        rows[str(seq)] = compare(feed, SMALL, runner.outputs["o"])
    return rows


@check
def refusals(session: Session) -> dict[str, Any]:
    """What cannot run does not build, and the log says why."""
    cases = {
        "float32": (dict(dtype=torch.float32), "float16 or bfloat16"),
        "5 heads over 2": (dict(dtype=BF16, heads=Heads(5, 2)), "5 query heads over 2 key heads"),
        "head size 48": (dict(dtype=BF16, heads=Heads(4, 2, 48, 48)), "48"),
    }
    told = {}
    for name, (arguments, reason) in cases.items():
        start = session.log.path.stat().st_size
        try:
            session.engine(SMALL, **arguments)
        except RuntimeError:
            text = session.log.path.read_text()[start:]
            own = [line for line in text.splitlines() if "HyperAttention[" in line]
            assert any(reason in line for line in own), f"{name}: the log does not say '{reason}': {text[-500:]}"
            told[name] = own[-1]
        else:
            raise AssertionError(f"{name}: an engine was built")
    return told


@check
def engine_stage(session: Session) -> dict[str, Any]:
    """The export's own stage: Polygraphy, profile, timing cache, progress, build log; then the engine against the reference."""
    heads, config, generator = Heads(), SMALL, torch.Generator().manual_seed(3)
    widths = {"q": heads.q * heads.dim, "k": heads.kv * heads.dim, "v": heads.kv * heads.dim_v}
    tables = {n: torch.randn(256, width, generator=generator).to(BF16) for n, width in widths.items()}
    folder = session.out / "stage"
    folder.mkdir(exist_ok=True)
    onnx.save(token_model(config, BF16, heads, tables), folder / "model.trt.onnx")
    plan = ExportPlan("logits", "bf16", (), (MIN, OPT, MAX), (1, 1, 2), "bytes", 0, "blocks", "op")
    steps: list[str] = []
    info = build_engine(folder, plan, trt_library_path(), steps.append)
    again = build_engine(folder, plan, trt_library_path())
    assert len(info.plugin_layers) == 1 and steps, f"one plugin layer and some progress: {info}, {steps}"
    text = (folder / "build.log").read_text()
    assert str(session.out.resolve()) not in text and str(Path.cwd()) not in text, "a path of this machine is in build.log"
    assert sorted(p.name for p in folder.iterdir()) == ["build.log", "model.engine", "model.trt.onnx", "timing.cache"]
    ids = torch.randint(0, 256, (2, 3333), generator=generator)
    lengths = torch.tensor([3333, 2001], dtype=torch.int32, device="cuda")
    logits = Runner(trt, read_engine(folder / "model.engine", trt_library_path()))(input_ids=ids.cuda(), lengths=lengths)["logits"]
    counts = {"q": heads.q, "k": heads.kv, "v": heads.kv}
    made = {n: t[ids].unflatten(-1, (counts[n], -1)).transpose(1, 2).contiguous().cuda() for n, t in tables.items()}
    return {"first": info.to_json(), "again_s": again.seconds, "steps": steps, **compare(made | {"lengths": lengths}, config, logits)}


@check
def workspace(session: Session) -> dict[str, Any]:
    """Device memory of the engines, by the key that built them."""
    return {key: int(engine.device_memory_size_v2) for key, engine in session.engines.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for engine_run.json and the logs")
    parser.add_argument("--only", default=",".join(CHECKS), help="checks to run, by name: " + ", ".join(CHECKS))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    register_plugin(trt_library_path())
    session = Session(arguments.out)
    report: dict[str, Any] = {"tensorrt": trt.__version__, "torch": torch.__version__, "device": torch.cuda.get_device_name(), "checks": {}}
    for name in arguments.only.split(","):
        start = time.perf_counter()
        try:
            row = {"passed": True, **CHECKS[name](session)}
        except Exception as error:  # one failure must not cost the other checks
            row = {"passed": False, "error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc(limit=-3)}
        row["seconds"] = round(time.perf_counter() - start, 1)
        report["checks"][name] = row
        print(f"{'PASS' if row['passed'] else 'FAIL'} {name} ({row['seconds']} s) {row.get('error', '')}", flush=True)
        (arguments.out / "engine_run.json").write_text(json.dumps(report, indent=1, default=str))
    failed = sum(not row["passed"] for row in report["checks"].values())
    print(f"{len(report['checks']) - failed} passed, {failed} failed; TensorRT's errors: {session.log.errors[-5:]}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
