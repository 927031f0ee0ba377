"""What happens to an engine: contexts in parallel, CUDA graphs, refit, saving and moving, loading the plugin; ONNX Runtime beside it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import onnx
import tensorrt as trt
import torch
from engine_parts import Heads, Runner, build, compare, op_model, random_inputs, random_tables, table_inputs, token_model
from engine_session import BF16, FP16, FP32, MAX, MIN, OPT, SELECTORS, SMALL, SORTED, NotRun, Session, check

from hyperattention.errors import EnvironmentFault
from hyperattention.export.bundle import MANIFEST, finish, write_draft
from hyperattention.export.engine import build_engine, load_engine
from hyperattention.export.engine_plugin import register_plugin
from hyperattention.export.plan import ExportPlan
from hyperattention.export.source import TEXT
from hyperattention.library import TRT_LIBRARY, build_info, ort_library_path, trt_library_path

TOKENS = {"input_ids": ((1, MIN), (1, OPT), (2, MAX)), "lengths": ((1,), (1,), (2,))}


@check
def registry(session: Session) -> dict[str, Any]:
    """The library is registered, twice over, under its name."""
    library = trt_library_path()
    register_plugin(library)
    register_plugin(library)
    return build_info(library)


@check
def parallel_contexts(session: Session) -> dict[str, Any]:
    """Contexts of one engine in a thread and on a stream each, at lengths of their own: each gives what it gave alone."""
    rows = {}
    for name, config in SELECTORS.items():
        engine = session.engine(config, BF16)
        feeds = [random_inputs(Heads(), 1, seq, BF16, None, seed=seq) for seq in (5555, 2777, 4097, 333)]
        runners = [Runner(trt, engine) for _ in feeds]
        alone = [runner(**feed)["o"].clone() for runner, feed in zip(runners, feeds, strict=True)]
        torch.cuda.synchronize()  # the last clone runs on another stream than the threads, which overwrite what it reads
        differing = [0] * len(feeds)

        def work(i: int) -> None:
            for _ in range(20):
                with torch.cuda.stream(runners[i].stream):
                    runners[i].outputs["o"].fill_(float("nan"))
                runners[i].launch()
                runners[i].stream.synchronize()
                differing[i] += not torch.equal(runners[i].outputs["o"], alone[i])

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(feeds))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not any(differing), f"{name}: runs of 20 that differ from the one alone: {differing}"
        rows[name] = 20 * len(feeds)
    return {"runs": rows}


@check
def cuda_graph(session: Session) -> dict[str, Any]:
    """Captured at several lengths, a context each, and replayed in turn on other contents: the bits of an ordinary run."""
    rows = {}
    for name, config in SELECTORS.items():
        captured = []
        for seq in (401, 1023, 4097, 5555):
            runner, feed = Runner(trt, session.engine(config, BF16)), random_inputs(Heads(), 1, seq, BF16, None, seed=1)
            runner(**feed)  # shape-dependent set-up is not part of a graph
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=runner.stream, capture_error_mode="thread_local"):
                runner.launch()
            captured.append((runner, feed, graph))
        for seed in (2, 3, 4):
            for runner, feed, graph in captured:
                seq, out = feed["q"].shape[2], runner.outputs["o"]
                for tensor, other in zip(feed.values(), random_inputs(Heads(), 1, seq, BF16, None, seed=seed).values(), strict=True):
                    tensor.copy_(other)
                torch.cuda.synchronize()
                runner.launch()
                runner.stream.synchronize()
                wanted = out.clone()
                out.fill_(float("nan"))
                torch.cuda.synchronize()
                graph.replay()
                torch.cuda.synchronize()
                assert torch.equal(out, wanted), f"{name}, {seq}, contents {seed}: {int((out != wanted).sum())} values differ"
                rows[f"{name}, {seq}"] = seed - 1
    return {"replays": rows}


@check
def refit(session: Session) -> dict[str, Any]:
    """Weights around the plugin are refitted; the plugin has none, and goes on with what it then is given."""
    heads = Heads()
    old, new = (random_tables(heads, FP16, seed) for seed in (3, 4))
    engine = build(trt, session.logger, token_model(SMALL, FP16, heads, old).SerializeToString(), TOKENS, refit=True)
    runner = Runner(trt, engine)
    ids = torch.randint(0, 256, (1, 3333), generator=torch.Generator().manual_seed(5))
    lengths = torch.tensor([3333], dtype=torch.int32, device="cuda")

    def errors(tables: dict[str, torch.Tensor]) -> dict[str, float]:
        logits = runner(input_ids=ids.cuda(), lengths=lengths)["logits"]
        return compare(table_inputs(heads, tables, ids) | {"lengths": lengths}, SMALL, logits)

    rows = {"before": errors(old)}
    refitter = trt.Refitter(engine, session.logger)
    known = refitter.get_all_weights()
    arrays = {f"{name}_table": table.numpy() for name, table in new.items()}  # held until the engine has taken them
    for name, array in arrays.items():
        assert refitter.set_named_weights(name, trt.Weights(array)), f"{name} was not taken; the engine knows {known}"
    missing = refitter.get_missing_weights()
    assert refitter.refit_cuda_engine(), f"not refitted; missing {missing} of {known}"
    rows["after"] = errors(new)
    return {"weights": known, **rows}


@check
def engine_stage(session: Session) -> dict[str, Any]:
    """The export's own stage: Polygraphy, profile, timing cache, progress, build log. Then it is moved, checked, loaded and run."""
    heads, library = Heads(), trt_library_path()
    tables = random_tables(heads, BF16, 3)
    folder, moved = session.out / "stage", session.out / "moved"
    for path in (folder, moved):
        shutil.rmtree(path, ignore_errors=True)
    folder.mkdir()
    onnx.save(token_model(SMALL, BF16, heads, tables), folder / "model.trt.onnx")
    seq, batch = (MIN, OPT, MAX), (1, 1, 2)
    plan = ExportPlan("logits", "bf16", (), TEXT, ("logits",), {"batch": batch, "sequence": seq}, seq, batch, "bytes", 0, "blocks", "op")
    steps: list[str] = []
    info = build_engine(folder, plan, library, steps.append)
    again = build_engine(folder, plan, library)
    assert len(info.plugin_layers) == 1 and steps, f"one plugin layer and some progress: {info}, {steps}"
    text = (folder / "build.log").read_text()
    assert str(session.out.resolve()) not in text and str(Path.cwd()) not in text, "a path of this machine is in build.log"
    assert sorted(p.name for p in folder.iterdir()) == ["build.log", "model.engine", "model.trt.onnx", "timing.cache"]
    shutil.copyfile(library, folder / TRT_LIBRARY)
    write_draft(folder, plan, {}, again.to_json(), {TRT_LIBRARY: build_info(library)})
    finish(folder)
    folder.rename(moved)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # nothing has changed
        engine = load_engine(moved)
    ids = torch.randint(0, 256, (2, 3333), generator=torch.Generator().manual_seed(5))
    lengths = torch.tensor([3333, 2001], dtype=torch.int32, device="cuda")
    logits = Runner(trt, engine)(input_ids=ids.cuda(), lengths=lengths)["logits"]
    errors = compare(table_inputs(heads, tables, ids) | {"lengths": lengths}, SMALL, logits)
    return {"first": info.to_json(), "again_s": again.seconds, "steps": steps, "refused": _refusals(moved), **errors}


def _refusals(folder: Path) -> dict[str, str]:
    """What is said of the same engine where its manifest has it from elsewhere."""
    file, said = folder / MANIFEST, {}
    manifest = json.loads(file.read_text())
    for part, value in {"tensorrt": "10.99.0", "compute_capability": "1.2", "plugin_build": "0" * 16}.items():
        file.write_text(json.dumps({**manifest, "engine": {**manifest["engine"], "host": {**manifest["engine"]["host"], part: value}}}))
        try:
            load_engine(folder)
        except EnvironmentFault as fault:
            said[part] = str(fault)
        assert value in said.get(part, ""), f"{part} {value} is not refused: {said}"
    file.write_text(json.dumps(manifest))
    return said


@check
def loading(session: Session) -> dict[str, Any]:
    """A saved engine with the plugin loaded in every way, each in a process of its own: one creator, the same bits."""
    saved = session.out / "loading.engine"
    saved.write_bytes(bytes(session.engine(SORTED, BF16).serialize()))
    program = str(Path(__file__).with_name("engine_loading.py"))
    running = {
        how: subprocess.Popen(
            [sys.executable, program, how, str(saved), str(trt_library_path())], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for how in ("static", "dynamic", "runtime", "static+dynamic", "static+runtime", "dynamic+runtime")
    }
    rows, failed = {}, {}
    for how, process in running.items():
        output, error = process.communicate(timeout=120)
        if process.returncode == 0:
            rows[how] = json.loads(output.splitlines()[-1])
        else:
            failed[how] = f"ended with {process.returncode}: {error[-500:]}"
    assert not failed, failed
    assert len({row["digest"] for row in rows.values()}) == 1 and all(row["creators"] <= 1 for row in rows.values()), rows
    return rows


@check
def onnxruntime_cuda(session: Session) -> dict[str, Any]:
    """The same node in ONNX Runtime's CUDA provider: within the twin's error of the reference, as the engine is."""
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise NotRun(f"onnxruntime-gpu: {error}") from error
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise NotRun(f"onnxruntime {ort.__version__} has no CUDAExecutionProvider; install onnxruntime-gpu")
    rows = {}
    for dtype in (FP16, FP32):
        for name, config in SELECTORS.items():
            inputs = random_inputs(Heads(), 1, 4097, dtype, None, seed=9)
            engine = Runner(trt, session.engine(config, dtype))(**inputs)["o"]
            options = ort.SessionOptions()
            options.register_custom_ops_library(str(ort_library_path()))
            provider = ("CUDAExecutionProvider", {"device_id": 0})
            runner = ort.InferenceSession(op_model(config, dtype), options, providers=[provider])
            assert runner.get_providers()[0] == provider[0], f"the session runs on {runner.get_providers()}"
            found = _bound_run(runner, inputs, torch.full_like(engine, float("nan")))
            rows[f"{name} {dtype}"] = {**compare(inputs, config, found), "differing_from_the_engine": int((found != engine).sum())}
    return rows


def _bound_run(runner: Any, inputs: dict[str, torch.Tensor], out: torch.Tensor) -> torch.Tensor:
    binding = runner.io_binding()
    names = {torch.float16: "float16", torch.float32: "float32", torch.int32: "int32"}
    for name, tensor in inputs.items():
        binding.bind_input(name, "cuda", 0, names[tensor.dtype], list(tensor.shape), tensor.data_ptr())
    binding.bind_output("o", "cuda", 0, names[out.dtype], list(out.shape), out.data_ptr())
    torch.cuda.synchronize()
    runner.run_with_iobinding(binding)
    binding.synchronize_outputs()
    return out
