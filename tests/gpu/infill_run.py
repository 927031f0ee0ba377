"""Ground truth for non-causal attention: a small model is trained on a task that needs it, and its attention replaced.

    PYTHONPATH=. python tests/gpu/infill_run.py --task copies --out OUT.json [--seconds 60] [--lengths 4096 8192 16384] [--text HELD_OUT]

Tasks (infill_task.py): `copies` in Python sources (of torch and transformers for the training, held-out text for the judging), where
neighbours look for the same place, and `recall`, where each row looks for a place of its own. Trained on windows up to the longest of
--lengths. All layers are replaced by `blocks`, by `sortlsh` as it is and with the keys per query of `blocks`, by both with more, and
by a window with sinks: nats of the hidden bytes, the share of those to be found that are restored, and each layer's own error. --out is
written after each length. Exit code 1 where exact attention itself does not restore them: then there is no ground truth.
On one processor core: --seconds 600 --lengths 1024 2048 --tokens 1024 --hidden 96 --layers 2 --heads 2 --rate 3e-3.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from infill_model import Attend, Infill, Shape, exact, train
from infill_task import Batch, as_tensor, copies, recall, training_text
from torch import Tensor
from torch.nn.functional import log_softmax

from hyperattention.config import PRESETS, Config, layer_seed
from hyperattention.library import load_cpu, load_cuda
from hyperattention.validate.cost import keys_per_query, window_keys
from hyperattention.validate.metrics import tensor_error
from hyperattention.validate.operators import Operator, native_operator
from hyperattention.validate.window import window_config, window_operator

RESTORED = 0.7  # hidden bytes to be found that exact attention has to restore; of those guessed 0.02 are right
SEED = 0
TEXT = Path(__file__).parents[1] / "data" / "heldout.txt"
TASKS = ("copies", "recall")


def methods(operator: Operator, length: int) -> dict[str, tuple[Config, Operator, float]]:
    """Of each method its attributes, who computes it, and its keys a query."""
    blocks = replace(PRESETS["blocks"], causal=0, exact_below=256)
    lsh = replace(PRESETS["paper"], causal=0, exact_below=256)
    budget = keys_per_query(blocks, length)
    more = max((replace(lsh, num_blocks=n) for n in range(1, 9)), key=lambda c: (k := keys_per_query(c, length)) * (k <= budget))
    found = {
        "blocks": blocks,
        "blocks, strided samples only": replace(blocks, num_blocks=0),
        "blocks, pool_size 2": replace(blocks, pool_size=2),
        "sortlsh (paper)": lsh,
        "sortlsh, hash_centre": replace(lsh, hash_centre=1),
        "sortlsh, 1024 samples": replace(lsh, sample_size=1024),
        "sortlsh, keys of blocks": more,
        "sortlsh, keys of blocks, hash_centre": replace(more, hash_centre=1),
        "sortlsh, keys of blocks, hash_centre, 14 bits": replace(more, hash_centre=1, num_projections=14),
    }
    found |= {f"blocks, {n} blocks": replace(blocks, num_blocks=n) for n in (16, 32, 64)}
    found |= {
        f"sortlsh, {n} blocks, hash_centre, 14 bits": replace(lsh, num_blocks=n, hash_centre=1, num_projections=14) for n in (2, 8, 16)
    }
    rows = {name: (config, operator, keys_per_query(config, length)) for name, config in found.items()}
    return rows | {"window + sinks": (blocks, window_operator(operator), window_keys(window_config(blocks, length), length))}


def answers(model: Infill, inputs: Tensor, attend: Attend) -> Tensor:
    """Logits as in training, in bf16 on a GPU; `attend` itself computes in what it is given."""
    device, bf16 = inputs.device.type, inputs.device.type == "cuda"

    def as_given(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        with torch.autocast(device, enabled=False):
            return attend(q, k, v, layer)

    with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=bf16):
        return model(inputs, as_given)


def judge(model: Infill, given: list[Batch], attend: Attend) -> dict[str, float]:
    """Over all batches: nats of the hidden bytes to be found and, where there are any, of the others; and the share of the first restored.

    restored_error: the standard error of that share, from one batch to the next; 0 of a single one.
    """
    nats: dict[str, list[Tensor]] = {"nats_found": [], "nats_text": []}
    right = []
    for one in given:
        logits = answers(model, one.inputs, attend)[one.hidden].float()
        target, found = one.targets[one.hidden], one.found[one.hidden]
        loss = -log_softmax(logits, -1).gather(-1, target[:, None])[:, 0].double()
        nats["nats_found"].append(loss[found])
        nats["nats_text"].append(loss[~found])
        right.append((logits.argmax(-1) == target)[found].double())
    told = {name: torch.cat(losses) for name, losses in nats.items()}
    spread = torch.stack([one.mean() for one in right if len(one)]).std(correction=0) / math.sqrt(max(1, len(right) - 1))
    restored = {"restored": float(torch.cat(right).mean()), "restored_error": float(spread)}
    return {name: float(loss.mean()) for name, loss in told.items() if len(loss)} | restored


def measure(model: Infill, given: list[Batch], operator: Operator) -> dict[str, Any]:
    """Windows of one length: exact attention and every method with all layers replaced; and each layer's own error on the exact Q, K, V."""
    length = given[0].inputs.shape[1]
    found: dict[str, Any] = {"length": length, "rows": len(given), "exact": judge(model, given, exact), "methods": {}}
    captured: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def keep(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        o = exact(q, k, v, layer)
        captured.append((q, k, v, o))
        return o

    answers(model, given[0].inputs, keep)
    for name, (config, run, keys) in methods(operator, length).items():
        configs = [replace(config, seed=layer_seed(SEED, layer)) for layer in range(len(model.blocks))]
        with torch.inference_mode():
            errors = [tensor_error(run(q, k, v, configs[n])[0], o).relative_l2 for n, (q, k, v, o) in enumerate(captured)]
        answer = judge(model, given, lambda q, k, v, layer: run(q, k, v, configs[layer])[0])
        found["methods"][name] = {**answer, "keys_per_query": keys, "layers_relative_l2": errors}
    return found


def add_training(parser: argparse.ArgumentParser, seconds: float) -> None:
    """The options of `trained` and `held_out`, and where the answer goes."""
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--task", choices=TASKS, default="copies")
    parser.add_argument("--seconds", type=float, default=seconds, help="of training")
    parser.add_argument("--steps", type=int, default=100_000, help="of training, at most")
    parser.add_argument("--tokens", type=int, default=2**16, help="of a training step")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--rate", type=float, default=2e-3, help="of learning")
    parser.add_argument("--text", type=Path, default=TEXT, help="held-out")
    parser.add_argument("--weights", type=Path, help="where the trained model is written to, in bf16")
    parser.add_argument("--trained", action="store_true", help="read --weights in the place of training")


def batches(task: str, text: Callable[[], bytes], rng: torch.Generator) -> Callable[[int, int], Batch]:
    """(length, rows) to a batch of `task`, made where `rng` draws; `text` is read where the task has one."""
    if task == "recall":
        return lambda length, rows: recall(length, rows, rng)
    source = as_tensor(text()).to(rng.device)
    return lambda length, rows: copies(source, length, rows, rng)


def trained(options: argparse.Namespace, longest: int) -> tuple[Infill, int]:
    """A model trained on windows of up to `longest` tokens, on a GPU where there is one, and its steps; `options` of `add_training`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(SEED)
    text = options.task == "copies"
    model = Infill(Shape(options.hidden, options.layers, options.heads, reach=4 if text else 0, keys=not text)).to(device)
    if options.trained:
        model.load_state_dict(torch.load(options.weights, map_location=device))
        return model.eval(), 0
    folders = [Path(str(package.__file__)).parent for package in (torch, transformers)]
    make = batches(options.task, lambda: training_text(folders, 2**24), torch.Generator(device).manual_seed(SEED))

    def take(length: int) -> Batch:
        return make(length, max(1, options.tokens // length))

    steps = train(model, take, longest, options.seconds, options.steps, options.rate, lambda told: print(told, flush=True))
    if options.weights:
        torch.save({name: value.bfloat16() for name, value in model.state_dict().items()}, options.weights)
    return model.eval(), steps


def held_out(model: Infill, options: argparse.Namespace, length: int, rows: int) -> list[Batch]:
    """`rows` windows of `length` tokens that are judged, always the same, where the model is."""
    make = batches(options.task, options.text.read_bytes, torch.Generator().manual_seed(10**9 + length))
    return [make(length, 1).to(next(model.parameters()).device) for _ in range(rows)]


def table(row: dict[str, Any]) -> str:
    """What was measured at one length, a line each method."""
    lines = []
    for name, told in {"exact": row["exact"], **row["methods"]}.items():
        errors = " ".join(f"{e:.3f}" for e in told.get("layers_relative_l2", []))
        nats = ", ".join(f"{told[key]:.4f}" for key in ("nats_found", "nats_text") if key in told)
        keys, share = told.get("keys_per_query", row["length"]), f"{told['restored']:.4f} +- {told['restored_error']:.4f}"
        lines.append(f"{row['length']} {name}: restored {share}, nats {nats}, keys a query {keys:.0f}, errors {errors}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_training(parser, 60.0)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--rows", type=int, default=16, help="judged at each length")
    options = parser.parse_args()
    begun = time.monotonic()
    model, steps = trained(options, max(options.lengths))
    cuda = next(model.parameters()).is_cuda
    operator = native_operator(load_cuda() if cuda else load_cpu())
    record = {"task": options.task, "steps": steps, "training_s": round(time.monotonic() - begun, 1)}
    record |= {"parameters": sum(p.numel() for p in model.parameters()), "dtype": "bf16" if cuda else "fp32"}
    record |= {"device": torch.cuda.get_device_name() if cuda else "cpu", "lengths": []}
    for length in options.lengths:
        record["lengths"].append(measure(model, held_out(model, options, length, options.rows), operator))
        options.out.write_text(json.dumps(record, indent=1) + "\n")
        print(table(record["lengths"][-1]), flush=True)
    return int(min(row["exact"]["restored"] for row in record["lengths"]) < RESTORED)


if __name__ == "__main__":
    sys.exit(main())
