"""Whole reports made by hand, of both kinds, for tests of what is done with a report: judged, rendered, checked, compared."""

from __future__ import annotations

from typing import Any

from hyperattention.config import Config
from hyperattention.export import policy as policies
from hyperattention.export.files import digest
from hyperattention.export.gate_options import Limits
from hyperattention.validate.report import SCHEMA
from hyperattention.validate.verdict import judge

LENGTHS = (8192, 12345, 32768)
EDGES = [10.0 ** (n / 4) for n in range(-16, 5)]


def estimate(mean: float, se: float | None = 0.00021) -> dict:
    return {"mean": mean, "se": se, "blocks": 7 if se is not None else 1}


def span(mean: float) -> dict:
    return {"mean": mean, "min": mean * 0.75, "max": mean * 1.5}


def _tokens(delta: float, kl: float) -> dict:
    tokens = dict(exact_nats=estimate(0.7571), delta_nats=estimate(delta), kl=estimate(kl, kl / 9), top1=estimate(0.9961))
    return {"tokens": 2048, "windows": 2, **tokens, "kl_p99": 10 * kl, "kl_max": 100 * kl}


def _language_row(i: int, length: int) -> dict:
    half = length // 2
    return {
        "length": length,
        "exact": False,
        "tail": 512,
        "starts": [0, 7],
        "all_positions": _tokens(0.00123 * (i + 1), 0.00097),
        "all_positions_backend": "ONNX Runtime, CPU",
        "by_position": {
            "all_positions": [
                {"from": 0, "to": half, "delta_nats": -0.0001, "kl": 1e-9, "top1": 1.0},
                {"from": half, "to": length, "delta_nats": 0.0031, "kl": 0.002, "top1": 0.9714},
            ],
            "prefill_exact_decode": [
                {"from": length - 512, "to": length - 256, "delta_nats": 0.0007, "kl": 0.0004, "top1": 0.9921},
                {"from": length - 256, "to": length, "delta_nats": -0.0002, "kl": 0.0003, "top1": 0.9882},
            ],
        },
        "prefill_exact_decode": _tokens(0.00031 * (i + 1), 0.00017 * (i + 1)),
        "prefill_backend": "PyTorch, op by native CPU kernels",
        "exact_twin": None,
    }


def _features_row(i: int, length: int) -> dict:
    outputs = [
        {
            "name": name,
            "relative_l2": estimate(0.011 * (i + 1) * scale),
            "cosine": estimate(0.9983 - 0.0004 * i),
            "norm_ratio": estimate(1.0021 + 0.001 * i),
            "cosine_worst": 0.9712,
        }
        for name, scale in (("features", 1.0), ("pooled", 0.3))
    ]
    return {"length": length, "exact": False, "windows": 2, "outputs": outputs, "not_finite": {}, "exact_twin": None}


def _layer_row(layer: int, length: int) -> dict:
    error = 0.0137 * layer * length / LENGTHS[0]
    return {
        "layer": layer,
        "length": length,
        "plan_differences": 0 if layer == 1 else None,
        "relative_l2": error,
        "cosine": 0.99917,
        "norm_ratio": 1.0023,
        "max_abs": 0.3,
        "worst_head": 3,
        "worst_head_relative_l2": 2 * error,
        "worst_position": 7680,
        "worst_position_relative_l2": 3 * error,
        "row_p99": 4 * error,
        "lse_bias": -0.00061,
        "lse_std": 0.0129,
        "mass": 0.9125,
        "mass_worst_head": 0.8668,
        "window_relative_l2": 5 * error,
        "seeds": {"relative_l2": [error, 0.9 * error, 1.2 * error, 1.1 * error, 0.95 * error]},
        "row_errors": {"edges": EDGES, "counts": [(i * i * layer) % 37 for i in range(len(EDGES) - 1)]},
        "heads": [_head_row(head, layer, error) for head in range(4)],
    }


def _head_row(head: int, layer: int, error: float) -> dict:
    own = error * (0.5 + head / 2)
    return {
        "head": head,
        "relative_l2": own,
        "seeds": {"relative_l2": [own, 0.8 * own, 1.1 * own, 1.3 * own, 0.9 * own]},
        "cosine": 0.99917,
        "norm_ratio": 1.0023,
        "lse_bias": -0.00061,
        "lse_std": 0.0129,
        "mass": 0.9125 - head / 100,
        "top16_recall": 0.971 - head / 50,
        "alpha": 8123.0,
        "alpha_without_first_32": 2345.6 + head,
        "alpha_blocks": 345.6 + 10 * head + layer,
        "log_kappa": 9.87 + head,
        "log_kappa_p1_p99": 5.43 + head,
        **dict.fromkeys(("cv_stratified", "cv_predicted"), 0.0123 * (1 + head)),
        "cv_uniform": 0.0234 * (1 + head),
        "cv_measured": 0.0119 * (1 + head),
        "cv_seeds": [share * 0.0119 * (1 + head) for share in (1.0, 0.6, 1.2, 1.1, 1.0)],
    }


def _hard_row(distribution: str, ours: float, window: float, limit: float) -> dict:
    def numbers(error: float) -> dict:
        return {"relative_l2": span(error), "cosine": 0.981, "norm_ratio": 1.013, "lse_bias": 0.0021, "lse_spread": 0.034}

    return {
        "distribution": distribution,
        "length": LENGTHS[-1],
        "seeds": [0, 1, 2],
        "ours": numbers(ours),
        "window": numbers(window),
        "value": ours,
        "limit": limit,
        "sense": "<=",
        "passed": ours <= limit,
        "meaning": "relative L2 of what was made to hurt",
    }


def needle(prompts: int = 4) -> dict:
    """A grid in which approximate attention loses a little more of each later cell, most of it where every position approximates."""
    rows = []
    for kind, keys, base in (("single", 1, 0.0), ("multi-key", 4, 0.02)):
        for i, length in enumerate(LENGTHS):
            lost = [base + 0.01 * i + 0.001 * j for j in range(3)]
            depths = [{"depth": depth, **_recall(loss)} for depth, loss in zip((0.1, 0.5, 0.85), lost, strict=True)]
            rows.append({"kind": kind, "keys": keys, "length": length, **_recall(sum(lost) / 3), "depths": depths})
    return {"prompts": prompts, "rows": rows}


def _recall(lost: float) -> dict:
    return {
        "exact": estimate(1.0, 0.0),
        "all_positions": estimate(0.9871 - 3 * lost, 0.0123),
        "prefill_exact_decode": estimate(0.9992 - lost, 0.0017),
    }


def policy() -> dict:
    """What --layers auto wrote: a choice in which layer 2 stays exact, beside one setting for all layers."""
    blocks = {name: value for name, value in Config().attributes().items() if name not in policies.DECIDED}

    def verified(kl: float) -> dict:
        regimes = {"all_positions": _tokens(2 * kl, kl), "prefill_exact_decode": _tokens(kl, kl / 3)}
        return {**regimes, "needle": {"exact": 1.0, "all_positions": 0.9844, "prefill_exact_decode": 0.9961}}

    found = {
        "model": "byte-lm-4m",
        "architecture": "LlamaForCausalLM",
        "identity": {"weights": "a" * 64, "config.json": "c" * 64},
        "budget": {"nats": 0.005, "needle": 0.98, "regime": "both"},
        "calibration": {
            **{"name": "heldout.txt", "sha256": "0123456789abcdef" * 4, "tokens": "bytes", "from": 0, "to": 196607, "seed": 0},
            **{"length": 8192, "windows": 2, "tail": 512, "needle_prompts": 8, "dtype": "fp32", "device": "cpu"},
        },
        "layers": [
            {"index": i, "name": f"model.layers.{i}.self_attn", "attributes": None, "keys": 4096.5, "predicted_kl": 0.0}
            if i == 2
            else {
                "index": i,
                "name": f"model.layers.{i}.self_attn",
                "attributes": dict(blocks),
                "keys": 901.5 + i,
                "predicted_kl": 0.00011 * i,
            }
            for i in range(4)
        ],
        "keys": 1700.75,
        "exact_keys": 4096.5,
        "predicted_kl": 0.00044,
        "verified": verified(0.00039),
        "pareto": [{"keys": 700.0 + 300 * i, "predicted_kl": 0.0093 / 4**i} for i in range(12)],
        "fixed": [{"attributes": blocks, "keys": 1690.25, "predicted_kl": 0.0012, "verified": verified(0.0011)}],
        "rounding": {**verified(0.00002), "needle": None},
        "times": {"exact_ms": 96.0, "ms": 31.5},
        "fingerprint": "f" * 64,
        "rivals": {
            "text": {"name": "heldout.txt", "sha256": "0123456789abcdef" * 4, "tokens": "bytes", "from": 196607, "to": 786432},
            **{"windows": 2, "needle_prompts": 4, "settings": {"all layers": 17, "all but its exact layers": 21}},
            "policy": verified(0.00041),
            "rows": [
                {
                    "name": "all layers",
                    "attributes": blocks,
                    "exact": [],
                    "keys": 1695.5,
                    "predicted_kl": 0.0012,
                    "verified": verified(0.0013),
                },
                {
                    "name": "window + sinks",
                    "attributes": blocks,
                    "exact": [2],
                    "keys": 1699.5,
                    "predicted_kl": None,
                    "verified": verified(0.01),
                },
            ],
        },
    }
    return {"schema": policies.SCHEMA, **found, "digest": digest(found)}


def _layers_of_plan() -> list[dict]:
    config = Config.from_attributes({"causal": 1}).attributes()
    return [
        {
            "index": i,
            "name": f"model.layers.{i}.self_attn",
            "mode": "approximate" if i % 2 else "exact",
            "reason": "chosen by --layers odd" if i % 2 else "not chosen by --layers odd",
            "config": config,
        }
        for i in range(4)
    ]


def with_policy() -> dict:
    """The report of a language model whose layers a policy chose."""
    whole = report()
    notes = ["the policy was measured with --dtype bf16, the export has fp32"]
    return {**whole, "plan": {**whole["plan"], "policy": policy(), "policy_notes": notes}}


def report(kind: str = "language", limits: Limits | None = None, **changes: Any) -> dict:
    """A judged report in which every part is present and every gate passes; `changes` replace parts before it is judged."""
    language = kind == "language"
    baseline = [
        {
            "length": n,
            "name": "window + sinks",
            "keys_per_query": 1903.5 + n / 100,
            "keys_per_query_ours": 1898.25 + n / 100,
            "keys_per_query_exact": (n + 1) / 2,
            "attributes": {"local_size": 1839, "sinks": 64},
            "layers_relative_l2": span(0.31),
            "ours_layers_relative_l2": span(0.0411),
            "windows": 1 if language else 0,
            "delta_nats": estimate(0.0057) if language else None,
            "kl": estimate(0.0043) if language else None,
            "top1": estimate(0.9871) if language else None,
            "all_positions": _tokens(0.0123, 0.0097) if language else None,
        }
        for n in LENGTHS
    ]
    whole = {
        "schema": SCHEMA,
        "kind": kind,
        "created": "2026-01-01T00:00:00+00:00",
        "seconds": 101.5,
        "model": {"name": "byte-lm-4m", "architecture": "LlamaForCausalLM", "parameters": 4558080, "layers": 4, "max_positions": 32768},
        "plan": {
            "task": "logits" if language else "features",
            "dtype": "fp32",
            "seq": [1, 8192, 32768],
            "batch": [1, 1, 1],
            "seed": 5,
            "preset": "blocks",
            "layers": _layers_of_plan(),
            "policy": None,
            "policy_notes": [],
        },
        "target_dtype": "bf16",
        "plan_summary": {
            "layers": 4,
            "op_layers": [0, 1, 2, 3],
            "approximate_layers": [1, 3],
            "native_layers": [],
            "exact_below": 4096,
            "look_ahead": 63,
            "attributes": {"causal": 1, "selector": "blocks", "block_size": 64, "seed": 6},
            "seeds": {"1": 6, "3": 8},
        },
        "inputs": {
            "name": "heldout.txt",
            "kind": "text" if language else "examples",
            "tokens": "bytes" if language else "",
            "sha256": "0123456789abcdef" * 4,
            "size": 786430,
            "note": "",
            "seed": 0,
            "lengths": list(LENGTHS),
            "windows": [4, 2, 1],
            "tail": 512 if language else 0,
        },
        "backend": "ONNX Runtime, CPU",
        "provenance": [{"runner": "ONNX Runtime", "source": "profile", "planned": 4, "found": ["a", "b", "c", "d"], "runs": 9}],
        "implementation": {
            "length": 5123,
            "per_op": [
                {
                    "case": "layer 1, whole window",
                    "layer": 1,
                    "kind": "whole window",
                    "plan_differences": 0,
                    "o_max": 9.1e-06,
                    "o_naive_max": 9.6e-06,
                    "lse_max": 8.7e-06,
                    "lse_naive_max": 9.2e-06,
                    "ratio": 0.9479,
                }
            ],
            "seeds": [{"layer": 1, "seeds": [1, 2], "relative_l2": [0.0097, 0.0094]}],
            "whole_model": [
                {
                    "case": "whole window",
                    "relative_l2": 4.7e-07,
                    "cosine": 0.9999999,
                    "norm_ratio": 1.0,
                    "max_abs": 5e-05,
                    "noise": 3.4e-07,
                    "ratio": 1.3703,
                    "polygraphy": True,
                }
            ],
        },
        "approximation": [(_language_row if language else _features_row)(i, n) for i, n in enumerate(LENGTHS)],
        "time": [
            {
                "length": n,
                "backend": "ONNX Runtime, CPU",
                "ours_s": 0.0013 * n / 8192,
                "exact_s": 2e-11 * n**2,
                "torch_exact_s": 4e-11 * n**2,
                "runs": 3,
                "time_only": False,
            }
            for n in LENGTHS
        ],  # fmt: skip
        "layers": [_layer_row(layer, n) for n in LENGTHS for layer in (1, 3)],
        "baseline": baseline,
        "hard_inputs": [
            _hard_row("text", 0.021, 0.052, 0.1),
            _hard_row("needle", 0.043, 0.91, 0.1),
            _hard_row("clustered", 0.031, 0.32, 0.1),
            _hard_row("heavy columns", 0.083, 0.22, 0.1),
            _hard_row("gaussian", 0.099, 0.61, 0.1),
        ],
        "look_ahead": _look_ahead(language),
        "needle": needle() if language else None,
        "environment": {
            "machine": {"processor": "processor", "cores": 2, "memory_gb": 23.5, "gpu": None, "cuda": None},
            "versions": {"torch": "2.15.0", "onnx": "1.23.2"},
            "libraries": [{"file": "libhyperattention_ort.so", "version": "0.1.0", "build_id": "a871ef9c7649ad01"}],
        },
        "notes": ["A note."],
        **changes,
    }
    return judge(whole, limits or Limits())


def _look_ahead(language: bool) -> dict:
    def row(selector: str, farthest: int, change: float) -> dict:
        rows = [{"row": 8191 - farthest, "change": change}] if farthest else []
        place = {"row": 8191, "place": "end of a query block and of a local block", "moved": len(rows)}
        sizes = {"farthest": farthest, "largest_change": change}
        return {"selector": selector, "approximates": selector != "exact", **sizes, "places": [{**place, **sizes, "rows": rows}]}

    def rows(size: float) -> list[dict]:
        return [row("exact", 0, 0.0), row("blocks", 61, 0.31 * size), row("blocks, strict", 0, 0.0), row("sortlsh", 4093, 0.77 * size)]

    def cost(delta: float) -> dict:
        return {"blocks": _tokens(0.0012, 0.00097), "strict": _tokens(0.0012 + delta, 0.00099), "cost": estimate(delta)}

    strict = {"length": 32768, "own": "blocks", "all_positions": cost(0.0021), "prefill_exact_decode": cost(0.00011)}
    whole = {"model": rows(0.1), "strict": strict} if language else {"model": None, "strict": None}
    return {"layer": 1, "length": 8192, "own": "blocks", "op": rows(1.0), **whole}


def exact_report(op_layers: list[int], kind: str = "language") -> dict:
    """A report of an export in which no layer approximates; `op_layers` are those that the op's exact path computes."""
    whole = report(kind)
    summary = {
        **whole["plan_summary"],
        "approximate_layers": [],
        "op_layers": op_layers,
        "exact_below": 2**31 - 1,
        "attributes": {},
        "seeds": {},
    }
    rows = [{**row, "exact": True} for row in whole["approximation"]]
    return report(kind, plan_summary=summary, approximation=rows, layers=[], baseline=[], hard_inputs=[], look_ahead=None)
