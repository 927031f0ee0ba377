"""What `strict_causal` costs on a GPU, and how far each selector looks ahead, with every layer of a model of bytes replaced.

    PYTHONPATH=. python tests/gpu/strict_run.py MODEL TEXT --out OUT.json [--length 32768] [--windows 16] [--prompts 2]

The kernels run in PyTorch, in bf16 (on a processor fp32); both regimes, then the look-ahead test and planted keys. OUT.json is written anew
after every window.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from hyperattention.export.load import TransformersSource, load_model
from hyperattention.export.patch import install
from hyperattention.export.plan import make_plan
from hyperattention.export.source import open_source, torch_dtype
from hyperattention.library import load_cpu, load_cuda
from hyperattention.validate.approximation import every_position
from hyperattention.validate.inputs import load_corpus, windows
from hyperattention.validate.look_ahead_runs import measure_look_ahead
from hyperattention.validate.needle import Grid, measure_needle
from hyperattention.validate.operators import Operator, native_operator
from hyperattention.validate.regimes import both_regimes, token_feed
from hyperattention.validate.runners import TorchRunner
from hyperattention.validate.strict_cost import StrictCost, twin
from hyperattention.validate.workbench import Workbench

TAIL = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=2, help="of each kind and depth; 0: no planted keys")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    device, dtype, kernels = torch.device("cuda" if cuda else "cpu"), "bf16" if cuda else "fp32", load_cuda() if cuda else load_cpu()
    source = open_source(str(options.model), task="logits")
    assert isinstance(source, TransformersSource)
    plan = make_plan(source, layers="all", dtype=dtype, seq=(1, options.length, options.length), input_ids="bytes")
    patched, operator = install(load_model(source, torch_dtype(dtype), device), plan), native_operator(kernels)
    strict = Operator(f"strict, {operator.name}", lambda q, k, v, config, lengths: operator(q, k, v, twin(config), lengths))
    corpus, forward = load_corpus(options.text, "bytes", options.model, source.vocab_size, 0, options.length), every_position(patched)
    found: dict[str, Any] = {"model": source.name, "length": options.length, "dtype": dtype, "kernels": kernels.path.name}

    def bench(op: Operator) -> Workbench:
        ours = TorchRunner(patched, op, op.name, forward, device)
        exact = TorchRunner(patched, None, "exact", forward, device)
        return Workbench(patched, plan, exact, ours, None, ours, op, kernels, TAIL, 0, lambda text: None)

    def keep(name: str, value: object) -> None:
        found[name] = value
        options.out.write_text(json.dumps(found, indent=1) + "\n")
        print(name, json.dumps(value)[:400], flush=True)

    plain = bench(operator)
    cost, everywhere, tails = StrictCost(plain, options.length), [], []
    chosen = windows(corpus, options.length, options.windows)
    with plain.exact, plain.backend:
        for window in chosen:
            exact = plain.exact.infer(token_feed(plain, window.inputs))["logits"][0]
            for rows, metrics in zip((everywhere, tails), both_regimes(plain, window, exact, operator), strict=True):
                rows.append(metrics)
            cost.add(window, exact)
            keep("strict", cost.row(everywhere, tails))
        with patched.capture() as captured:
            plain.exact.infer(token_feed(plain, chosen[0].inputs))
        keep("look_ahead", measure_look_ahead(plain, captured, chosen[0].inputs))
    for name, op in (("blocks", operator), ("strict", strict)):
        one = bench(op)
        with one.exact, one.backend:
            keep(f"needle {name}", measure_needle(one, Grid(corpus, (options.length,) * (options.prompts > 0), options.prompts), 0))


if __name__ == "__main__":
    main()
