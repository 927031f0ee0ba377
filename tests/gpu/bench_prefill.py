"""Prefill of a Llama shape of the 6 B class through TensorRT engines: approximate attention against exact attention, whole models.

    PYTHONPATH=. python tests/gpu/bench_prefill.py --out OUT [--depths 4 32] [--lengths 32768 131072] [--variants exact half all paper]

Random weights, one layer's tied over all layers; bf16, batch 1, the last token's logits. One engine for each depth and variant, with
one profile over all lengths; TensorRT's timings are shared through OUT/timing.cache, which may lie there from an earlier run.

The exact rivals are `--preset exact` in the same engine, and that engine with FA4's time in place of the plugin's (prefill_table.py):
measured within this model as the plugin's is (prefill_attention.py). The speed-up by its time alone stands beside the verdict.
Where 32 layers were not measured (--depths 4 8, or --seconds), they follow from time(L) = a + b L of two other depths. Every engine
is held against PyTorch at a short length, the first depth's exact one at all lengths. OUT/prefill.json and OUT/prefill.md are
written anew after each number. Exit code 1 when something failed or a target was missed. About six minutes on an H200.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import prefill_table
import torch
from gpu_timing import median_ms
from prefill_attention import attention_times, contenders
from prefill_model import VARIANTS, Model, Shape, prepare, write_variant
from torch import Tensor
from transformers import PreTrainedModel

from hyperattention.errors import EnvironmentFault
from hyperattention.export.engine import CACHE_FILE, LOG_FILE
from hyperattention.export.files import TWIN
from hyperattention.export.patch import install
from hyperattention.export.plan import ExportPlan
from hyperattention.library import load_cuda
from hyperattention.validate.bench_rivals import Rival, flash_attention_4

CHECKED = 1024  # tokens at which every engine is exact, and is held against PyTorch in fp32
NOISE = 2.0  # times the error of PyTorch in bf16
DIFFERENCE = 0.1  # relative, from PyTorch in bf16 at the timed lengths: rounding gives some hundredths, a wrong product about 1


def token_ids(shape: Shape, length: int) -> Tensor:
    """Random ids int64 [1, length], always the same."""
    return torch.randint(shape.vocabulary, (1, length), generator=torch.Generator().manual_seed(length))


def relative(found: Tensor, wanted: Tensor) -> float:
    """Relative L2 distance of two tensors of one shape."""
    return float((found - wanted).norm() / wanted.norm())


@dataclass(frozen=True)
class Expected:
    """The last token's logits of exact attention in PyTorch, fp32 [vocabulary]: of the model by length, and of its fp32 twin at CHECKED."""

    logits: dict[int, Tensor]
    twin: Tensor


def torch_logits(model: PreTrainedModel, plan: ExportPlan, shape: Shape, lengths: Sequence[int]) -> Expected:
    """PyTorch's answers at CHECKED and at `lengths`. Turns the model into its fp32 twin."""
    device = next(model.parameters()).device
    patched = install(model, plan)

    def run(length: int) -> Tensor:
        feed = {"input_ids": token_ids(shape, length).to(device), "lengths": torch.tensor([length], dtype=torch.int32, device=device)}
        with patched.mode("exact"):
            return patched.run(feed)["logits"].float().flatten()

    found = {length: run(length) for length in (CHECKED, *lengths)}
    model.float()
    return Expected(found, run(CHECKED))


def times_alone(rival: Rival, shape: Shape, lengths: Sequence[int], budget_ms: float) -> dict[int, float]:
    """Milliseconds of `rival` for one layer's causal attention and nothing else, by length."""
    found = {}
    for length in lengths:
        q, k, v = (
            torch.randn(1, heads, length, shape.head_dim, device="cuda", dtype=torch.bfloat16)
            for heads in (shape.heads, shape.heads_kv, shape.heads_kv)
        )
        found[length] = median_ms(rival(q, k, v, True), budget_ms)
    return found


class Bench:
    """One run: `engine` makes a context manager of (folder, plan) as prefill_engine.PrefillEngine is one; `pool` makes ONNX files;
    `report` grows.
    """

    def __init__(self, options: argparse.Namespace, engine: Callable[[Path, ExportPlan], Any], device: str, pool: Executor) -> None:
        self.options, self.engine, self.device, self.pool, self.start = options, engine, device, pool, time.perf_counter()
        self.cache, self.work, self.files = options.out / CACHE_FILE, options.out / "work", dict[int, Future[None]]()
        self.report: dict[str, Any] = {"shape": asdict(options.shape), "lengths": options.lengths}
        self.report |= {"fa4_ms_alone": {}, "in_model": [], "engines": [], "missing": {}, "failed": {}}

    def say(self, text: str) -> None:
        print(f"{time.perf_counter() - self.start:6.1f} s  {text}", flush=True)

    def save(self) -> None:
        """Writes what there is: a stop loses nothing but the engine under way."""
        self.report["results"] = prefill_table.results(self.report)
        self.report["targets"] = prefill_table.check_targets(self.report["results"])
        self.report["seconds"] = round(time.perf_counter() - self.start, 1)
        (self.options.out / "prefill.json").write_text(json.dumps(self.report, indent=1))
        (self.options.out / "prefill.md").write_text(prefill_table.markdown(self.report))

    def run(self) -> None:
        """Exact attention, while the ONNX files are made, then all depths that the time allows."""
        self.prepare()
        try:
            self.attention()
        except ImportError as error:
            self.report["missing"]["FA4"] = f"{error}: no target is judged"
            self.say(f"left out: FA4: {self.report['missing']['FA4']}")
        except Exception as error:  # the engines are worth their time without it
            self.fail("FA4", error)
        spent, before = 0.0, 1
        for depth in self.options.depths:
            began = time.perf_counter()
            # Half of what a depth takes (the first builds, PyTorch) is taken to be the same at every depth.
            ahead = began - self.start + spent * (1 + depth / before) / 2
            if self.options.seconds and ahead > self.options.seconds:
                self.report["missing"][f"{depth} layers"] = f"they would have ended after {ahead:.0f} of {self.options.seconds:.0f} s"
            else:
                try:
                    self.depth(depth, first=not self.report["engines"])
                except Exception as error:  # what other depths gave, or give, is worth its time
                    self.fail(f"{depth} layers", error)
                spent, before = time.perf_counter() - began, depth
            self.save()
        for files in self.files.values():
            files.cancel()
        shutil.rmtree(self.work, ignore_errors=True)

    def prepare(self) -> None:
        """Begins to make the ONNX files of every depth, once: tracing takes seconds a layer, and no GPU."""
        for depth in self.options.depths:
            if depth not in self.files:
                self.files[depth] = self.pool.submit(prepare, self.model(depth), self.work / str(depth))

    def model(self, depth: int) -> Model:
        seq = (CHECKED, min(self.options.lengths), max(self.options.lengths))
        return Model(replace(self.options.shape, layers=depth), seq, attributes=self.options.attributes)

    def fail(self, what: str, reason: Exception | str) -> None:
        """Notes a failure; the exit code will be 1."""
        text = reason if isinstance(reason, str) else f"{type(reason).__name__}: {reason}"
        self.report["failed"][what] = text[:1000]
        self.say(f"FAILED: {what}: {text[:1000]}")

    def attention(self) -> None:
        """One layer's exact attention: FA4's alone on a chip that rested, then FA4's and ours in turns within the model.

        Raises ImportError without FA4.
        """
        rival, lengths, budget = flash_attention_4(), self.options.lengths, self.options.budget_ms
        self.report["fa4_ms_alone"] = times_alone(rival, self.options.shape, lengths, budget)
        self.say(f"FA4, one layer, alone: {self.report['fa4_ms_alone']}")
        self.save()
        model, given = self.model(self.options.shape.layers), contenders(rival, load_cuda())
        with tempfile.TemporaryDirectory() as folder:
            loaded: Any = model.save(Path(folder))  # transformers wraps `to` so that its first argument reads as the model
            plan = model.plan(Path(folder), "exact")
        loaded = loaded.to(self.device)
        for tokens in lengths:
            found, logits = attention_times(loaded, plan, token_ids(model.shape, tokens).to(self.device), given, budget)
            found["difference"] = relative(logits["fa4"], logits["ours"])
            self.report["in_model"].append(found)
            self.say("one layer within the model: " + ", ".join(f"{key} {value:,.5g}" for key, value in found.items()))
            if not found["difference"] <= DIFFERENCE:  # another result may take another time
                self.fail(f"FA4, {tokens} tokens", f"{found['difference']:.3g} from our exact path's logits, allowed is {DIFFERENCE}")
            self.save()

    def depth(self, depth: int, first: bool) -> None:
        """Every variant at one depth. `first`: PyTorch runs the timed lengths too."""
        options, folder, model = self.options, self.work / str(depth), self.model(depth)
        self.files[depth].result()
        self.say(f"{depth} layers: ONNX of {(folder / 'onnx' / TWIN).stat().st_size / 2**20:,.0f} MiB")
        plans = {variant: model.plan(folder / "model", variant) for variant in ("exact", *options.variants)}
        loaded: Any = model.tied()  # transformers wraps `to` so that its first argument reads as the model
        expected = torch_logits(loaded.to(self.device), plans["exact"], model.shape, options.lengths if first else [])
        del loaded
        self.say(f"{depth} layers: PyTorch's logits")
        of_exact: dict[int, Tensor] = {}
        for variant in options.variants:
            try:
                write_variant(folder / "onnx" / TWIN, plans[variant], folder / variant)
                self.measure(variant, model.shape, plans[variant], folder / variant, expected, of_exact)
            except Exception as error:  # the other variants are still worth their time
                self.fail(f"{variant}, {depth} layers", error)
            self.save()
            if (folder / variant / LOG_FILE).is_file():
                shutil.copyfile(folder / variant / LOG_FILE, options.out / f"{variant}-{depth}.{LOG_FILE}")
            shutil.rmtree(folder / variant, ignore_errors=True)

    def measure(self, variant: str, shape: Shape, plan: ExportPlan, folder: Path, expected: Expected, of_exact: dict[int, Tensor]) -> None:
        """Builds and times one engine into the report. `of_exact`: the exact engine's logits by length, which it fills."""
        name = f"{variant}, {shape.layers} layers"
        if self.cache.is_file():
            shutil.copyfile(self.cache, folder / CACHE_FILE)
        with self.engine(folder, plan) as engine:
            if (folder / CACHE_FILE).is_file():
                shutil.copyfile(folder / CACHE_FILE, self.cache)
            found = {"depth": shape.layers, "variant": variant, "approximate": len(plan.approximate), **engine.build, "rows": []}
            self.report["engines"].append(found)
            self.say(f"{name}: built in {found['build_seconds']} s, {found['engine_bytes'] / 2**20:,.0f} MiB")
            error = relative(self.logits(engine, shape, CHECKED, name), expected.twin)
            found["noise_ratio"] = error / relative(expected.logits[CHECKED], expected.twin)
            if not found["noise_ratio"] <= NOISE:
                of = f"{found['noise_ratio']:.3g} of PyTorch's in {plan.dtype}"
                self.fail(f"{name}, {CHECKED} tokens", f"its error is {of}, allowed is {NOISE}")
            for tokens in self.options.lengths:
                logits = self.logits(engine, shape, tokens, name)
                row = {"tokens": tokens, "ms": engine.time(self.options.budget_ms)}
                found["rows"].append(row)
                self.say(f"{name}: {tokens:,} tokens in {row['ms']:,.5g} ms")
                self.save()
                if variant == "exact":
                    of_exact[tokens] = logits
                elif tokens in of_exact:
                    row["difference"] = relative(logits, of_exact[tokens])
                if variant == "exact" and tokens in expected.logits:
                    row["from_torch"] = relative(logits, expected.logits[tokens])
                    if not row["from_torch"] <= DIFFERENCE:
                        self.fail(f"{name}, {tokens} tokens", f"{row['from_torch']:.3g} from PyTorch's logits, allowed is {DIFFERENCE}")
            for row in reversed(found["rows"]):  # after all times, for the profiler may slow runs; the last length is still bound
                ids = token_ids(shape, row["tokens"]).to(self.device)
                try:
                    row |= engine.split(ids)
                except (EnvironmentFault, RuntimeError) as error:  # the time stands without it
                    self.fail(f"{name}, {row['tokens']} tokens, profile", error)
                self.say(f"{name}: " + ", ".join(f"{key} {value:,.5g}" for key, value in row.items()))
                self.save()

    def logits(self, engine: Any, shape: Shape, tokens: int, name: str) -> Tensor:
        """The engine's logits of the ids of that length, fp32 [vocabulary]; one that is not finite is a failure."""
        found = engine.logits(token_ids(shape, tokens).to(self.device))
        if not found.isfinite().all():
            self.fail(f"{name}, {tokens} tokens", f"{int((~found.isfinite()).sum())} of {len(found)} logits are not finite")
        return found


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 32], help="numbers of layers, in this order")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--variants", nargs="+", default=["exact", "half", "all"], choices=list(VARIANTS))
    parser.add_argument("--intermediate", type=int, default=Shape.intermediate)
    parser.add_argument("--seconds", type=float, default=0, help="begin no depth that would probably end after them (0: no limit)")
    parser.add_argument("--budget-ms", type=float, default=1000, help="time spent on each number")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    options.shape, options.attributes = Shape(intermediate=options.intermediate), None
    return options


def main() -> int:
    options = parse()
    import tensorrt as trt
    from prefill_engine import PrefillEngine

    from hyperattention.library import build_info, trt_library_path

    machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "tensorrt": trt.__version__}
    with ProcessPoolExecutor(len(options.depths), multiprocessing.get_context("spawn")) as pool:
        bench = Bench(options, PrefillEngine, "cuda", pool)
        bench.prepare()
        bench.report = {**machine, "build_id": build_info(trt_library_path())["build_id"], **bench.report}
        bench.say(", ".join(map(str, machine.values())))
        bench.run()
    targets = bench.report["targets"]
    print(prefill_table.speedup_table(bench.report["results"]))
    print("; ".join(prefill_table.verdict(result) for result in targets))
    return 1 if bench.report["failed"] or any(result["least"] and not result["met"] for result in targets) else 0


if __name__ == "__main__":
    sys.exit(main())
