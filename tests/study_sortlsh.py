"""`sortlsh` as it is and as it could be, beside `blocks` and a window with sinks, at equal keys a query.

    PYTHONPATH=. python tests/study_sortlsh.py [--lengths 8192] [--model MODEL --text TEXT --layers 0 4 9] [--rows 128] [--json FILE]

On some rows of each problem every key's weight is spelled out (sortlsh_variants.py, oracle_rows.py), so the numbers are those of the rules,
whoever runs them: relative L2 against exact attention, the share of the rows' attention that exact keys hold, and the share of
their 16 largest logits. Problems: Q, K, V of a model of bytes that reads text, causal and with all keys in sight; and keys that are
looked up at random, in sight of all queries (`look_ups`). On a GPU where there is one.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import oracle_rows
import torch
from oracle_rows import HeadPlan
from sortlsh_variants import BY_CENTROID, BY_HASH, Variant, far_of, local_and_sinks, visible, weights
from torch import Tensor

from hyperattention.config import Config
from hyperattention.export.load import inspect_source
from hyperattention.export.plan import make_plan as make_export_plan
from hyperattention.geometry import Geometry
from hyperattention.selection import make_plan
from hyperattention.validate.inputs import load_corpus, windows
from hyperattention.validate.metrics import tensor_error

VARIANTS = (
    Variant("sortlsh"),
    Variant("keys less their mean", "keys"),
    Variant("both less their means", "both"),
    Variant("hash_centre", "operator"),
    Variant("hash_centre, 12 bits", "operator", bits=12),
    Variant("10 bits", bits=10),
    Variant("both, 14 bits", "both", bits=14),
    Variant("both, blocks by hash", "both", match=BY_HASH),
    Variant("both, 14 bits, blocks by hash", "both", bits=14, match=BY_HASH),
    Variant("both, 14 bits, blocks by centroid", "both", bits=14, match=BY_CENTROID),
    Variant("both, Simple-LSH, 14 bits, by hash", "both", angle=True, bits=14, match=BY_HASH),
    Variant("both, 14 bits, two rounds, by hash", "both", bits=14, match=BY_HASH, rounds=2),
    Variant("both, 14 bits, four rounds", "both", bits=14, rounds=4),
    Variant("both, 14 bits, four rounds, by hash", "both", bits=14, match=BY_HASH, rounds=4),
    Variant("both, Simple-LSH, four rounds, by hash", "both", angle=True, bits=14, match=BY_HASH, rounds=4),
    Variant("both, 16 bits, 16 rounds, by hash", "both", bits=16, match=BY_HASH, rounds=16),
)
TOP = 16
Found = tuple[Tensor, Tensor]  # exact keys, bool, and weights of all keys, fp32: [Hq, R, S]
CAUSAL = Config(selector="sortlsh", block_size=256, num_blocks=1, sample_size=128, stratified=1, local_size=1024, sinks=64, exact_below=0)


@dataclass(frozen=True)
class Problem:
    """One self-attention: q [Hq, S, D], k and v [Hkv, S, D] in fp32; `rows` int64 [R] are looked at."""

    name: str
    config: Config
    q: Tensor
    k: Tensor
    v: Tensor
    rows: Tensor


def look_ups(length: int, rows: int, cosine: float, shift: float, spread: float, device: torch.device) -> Problem:
    """Every query seeks one key at a random place, which holds 95% of its attention; no two neighbours seek the same.

    cosine: between a query and its key. shift: length of a vector that all keys share, in units of a key's own length.
    spread: standard deviation of the log of the keys' lengths.
    """
    rng = torch.Generator(device=device).manual_seed(length)
    heads, dim = 2, 64
    k, v, noise = (torch.randn(heads, length, dim, generator=rng, device=device) for _ in range(3))
    k *= (spread * torch.randn(heads, length, 1, generator=rng, device=device)).exp()
    at = torch.rand(heads, length, generator=rng, device=device).argsort(-1)
    sought = k.gather(1, at[..., None].expand_as(k))
    own = sought / sought.norm(dim=-1, keepdim=True)
    aside = noise - (noise * own).sum(-1, keepdim=True) * own
    q = cosine * own + math.sqrt(1 - cosine**2) * aside / aside.norm(dim=-1, keepdim=True)
    # The length a query needs: own logit over the log of the sum of the others', which weigh exp(variance / 2) each.
    logit = cosine * sought.norm(dim=-1, keepdim=True) / math.sqrt(dim)
    variance = k.square().sum(-1).mean() / dim / dim
    root = (logit.square() - 2 * variance * (math.log(length) + math.log(19))).clamp(min=0).sqrt()
    q = q * (logit - root) / variance
    mean = torch.randn(heads, 1, dim, generator=rng, device=device)
    k = k + shift * math.sqrt(dim) * mean / mean.norm(dim=-1, keepdim=True)
    config = replace(CAUSAL, causal=0)
    return Problem(
        f"look-ups, cosine {cosine:g}, shift {shift:g}, spread {spread:g}", config, q, k, v, some_rows(config, length, rows, rng)
    )


def some_rows(config: Config, length: int, count: int, rng: torch.Generator) -> Tensor:
    """Rows with keys to find, at random, ascending."""
    first = 2 * config.local_size * config.causal + config.block_size
    return (first + torch.randperm(length - first, generator=rng, device=rng.device)[:count]).sort().values


def text_problems(options: argparse.Namespace, length: int, device: torch.device) -> Iterator[Problem]:
    """Q, K, V of the model's layers: causal, and with all keys in sight of all queries."""
    source = inspect_source(options.model)
    plan = make_export_plan(source, layers="all", preset="blocks", dtype="fp32", input_ids="bytes")
    model = source.load(plan, device)
    corpus = load_corpus(options.text, "bytes", options.model, source.vocab_size, 0, length)
    with model.capture(frozenset(options.layers)) as captured, model.mode("exact"), torch.inference_mode():
        model.forward(windows(corpus, length, 1)[0].inputs.to(device))
    for call in captured:
        q, k, v = (x[0].float() for x in (call.q, call.k, call.v))
        for config, name in ((CAUSAL, "causal"), (replace(CAUSAL, causal=0), "all keys in sight")):
            config = replace(config, seed=call.layer, scale=call.config.scale)
            rng = torch.Generator(device=device).manual_seed(call.layer)
            yield Problem(f"layer {call.layer}, {name}", config, q, k, v, some_rows(config, length, options.rows, rng))


def spent(p: Problem) -> tuple[int, int]:
    """Heavy keys and samples of a mean row by the attributes: so many in each node that holds it."""
    size = p.q.shape[1]
    g = Geometry(p.config, 1, len(p.q), len(p.k), size, size, p.q.shape[2], p.v.shape[2])
    nodes = [g.node(level, m, size).rows for level, m in g.nodes]
    each = sum(((p.rows >= rows.start) & (p.rows < rows.stop)).double().mean().item() for rows in nodes)
    return round(each * p.config.num_blocks * p.config.block_size), round(each * p.config.sample_size)


def blocks_weights(p: Problem) -> Found:
    """Selector `blocks` with as many heavy keys and samples."""
    size, heads = p.q.shape[1], len(p.q)
    heavy, samples = spent(p)
    shared = {name: getattr(p.config, name) for name in ("causal", "scale", "local_size", "sinks", "exact_below", "seed")}
    c = Config(**shared, num_blocks=round(heavy / Config.block_size), sample_size=samples)
    plan = make_plan(p.q[None], p.k[None], Geometry(c, 1, heads, len(p.k), size, size, p.q.shape[2], p.v.shape[2]))
    plans = (HeadPlan((plan.selection[0, h],), plan.sample_index[0, h], plan.sample_weight[0, h]) for h in range(heads))
    weight = torch.stack([oracle_rows.weights(c, of_head, p.rows, size).float() for of_head in plans])
    return weight == 1, weight  # a sample's weight is its slice's length, longer than 1 here


def window_weights(p: Problem) -> Found:
    """The local part made longer by all of these keys; where all keys are in sight, so many around the row."""
    size, reach = p.q.shape[1], sum(spent(p))
    row, key = p.rows[:, None], torch.arange(size, device=p.rows.device)
    start = far_of(p.config, p.rows, size)[:, None] - reach if p.config.causal else (row - reach // 2).clamp(0, max(0, size - reach))
    near = (key >= start) & (visible(p.config, p.rows, size) if p.config.causal else key < start + reach)
    seen = (near | local_and_sinks(p.config, p.rows, size)).expand(len(p.q), -1, -1)
    return seen, seen.float()


def of_variant(variant: Variant) -> Callable[[Problem], Found]:
    return lambda p: weights(variant, p.config, p.q, p.k, p.rows)


METHODS: dict[str, Callable[[Problem], Found]] = {v.name: of_variant(v) for v in VARIANTS}
METHODS |= {"blocks": blocks_weights, "window + sinks": window_weights}


def logits_of(p: Problem) -> Tensor:
    """Of the chosen rows over all keys, [Hq, R, S]; -inf where they may not look."""
    keys = p.k.repeat_interleave(len(p.q) // len(p.k), 0)
    logits = p.q[:, p.rows] @ keys.transpose(1, 2) * p.config.resolved_scale(p.q.shape[2])
    return logits.masked_fill(~visible(p.config, p.rows, p.q.shape[1]), -torch.inf)


def rows_of(p: Problem) -> Iterator[dict]:
    """A row of the table for each method."""
    logits, value = logits_of(p), p.v.repeat_interleave(len(p.q) // len(p.k), 0)
    share = logits.softmax(-1)
    exact, top = share @ value, logits.topk(TOP, -1).indices
    for name, method in METHODS.items():
        seen, weight = method(p)
        keys, exact_keys = (x.float().sum(-1).mean().item() for x in (weight > 0, seen))
        yield {
            "problem": p.name,
            "length": p.q.shape[1],
            "method": name,
            "keys": keys,
            "exact_keys": exact_keys,
            "relative_l2": tensor_error((logits + weight.log()).softmax(-1) @ value, exact).relative_l2,
            "mass": (share * seen).sum(-1).mean().item(),
            "top16_recall": seen.gather(2, top).float().mean().item(),
        }


def problems(options: argparse.Namespace, device: torch.device) -> Iterator[Problem]:
    for n in options.lengths:
        if options.model:
            yield from text_problems(options, n, device)
        for cosine, shift, spread in ((0.95, 0.0, 0.0), (0.8, 0.0, 0.0), (0.95, 2.0, 0.0), (0.95, 0.0, 0.5)):
            yield look_ups(n, options.rows, cosine, shift, spread, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192])
    parser.add_argument("--model", type=Path, help="a model of bytes; without it the look-ups alone")
    parser.add_argument("--text", type=Path, default=Path(__file__).parent / "data" / "heldout.txt")
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 4, 9])
    parser.add_argument("--rows", type=int, default=128, help="of each problem that are looked at")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = False
    rows = []
    print("| tokens | problem | method | keys a query | exact | relative L2 | mass | 16 largest |\n|" + "---|" * 8, flush=True)
    for problem in problems(options, device):
        for row in rows_of(problem):
            rows.append(row)
            print(
                f"| {row['length']:,} | {row['problem']} | {row['method']} | {row['keys']:.0f} | {row['exact_keys']:.0f} "
                f"| {row['relative_l2']:.4f} | {row['mass']:.4f} | {row['top16_recall']:.4f} |",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
