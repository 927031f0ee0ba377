"""The variants of tests/study_sortlsh.py on a model that attends in both directions: what they restore, at equal keys a query.

    PYTHONPATH=. python tests/gpu/infill_sortlsh.py --out OUT.json [--task recall] [--seconds 30] [--length 4096] [--rows 4]

The model of infill_run.py, trained for so many seconds or read (--weights FILE --trained); all of its layers are replaced by each
variant, by `blocks` and by a window with sinks. Beside them what exact attention restores: where that is little, the rest says little.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from infill_model import Infill, exact
from infill_run import SEED, add_training, held_out, judge, trained
from infill_task import Batch
from study_sortlsh import CAUSAL, METHODS, Problem, logits_of
from torch import Tensor

from hyperattention.config import layer_seed

CONFIG = replace(CAUSAL, causal=0, sample_size=256)


def restored(model: Infill, given: list[Batch], name: str) -> dict:
    """What the model says with every layer's attention replaced by one method, and the keys that a query met."""
    keys: list[float] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        everything = torch.arange(q.shape[2], device=q.device)
        p = Problem("infill", replace(CONFIG, seed=layer_seed(SEED, layer)), q[0].float(), k[0].float(), v[0].float(), everything)
        weight = METHODS[name](p)[1]
        keys.append((weight > 0).float().sum(-1).mean().item())
        return ((logits_of(p) + weight.log()).softmax(-1) @ p.v)[None].to(q.dtype)

    return {"method": name, **judge(model, given, attend), "keys": sum(keys) / len(keys)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_training(parser, 30.0)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=4, help="of held-out text that are judged")
    options = parser.parse_args()
    model, steps = trained(options, options.length)
    given = held_out(model, options, options.length, options.rows)
    rows = [{"method": "exact", **judge(model, given, exact), "keys": options.length}]
    for name in METHODS:
        rows.append(restored(model, given, name))
    for row in rows:
        told = " | ".join(f"{row[name]:.3f}" for name in ("restored", "nats_found", "nats_text") if name in row)
        print(f"| {row['method']} | {row['keys']:.0f} | {told} |", flush=True)
    options.out.write_text(json.dumps({"steps": steps, "length": options.length, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
