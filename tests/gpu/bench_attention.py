"""Times the op against exact attention on one GPU: ours (kernels, and the plugin inside a TensorRT engine; preset blocks, and
our exact path), cuDNN, flash, FA4.

    PYTHONPATH=. python tests/gpu/bench_attention.py --json OUT/attention.json [--lengths 8192 32768 131072] [--dims 64 128]

Every time is the median of CUDA events after a warm-up, in milliseconds; inputs are bf16, batch 1, causal.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hyperattention.config import PRESETS, Config
from hyperattention.library import build_info, load_cuda, trt_library_path

COLUMNS = ("plugin", "forward", "select", "attend", "exact", "cudnn", "flash", "fa4")
OURS = COLUMNS[:5]


def median_ms(run: Callable[[], object], budget_ms: float) -> float:
    """Median of as many runs as fit the budget, 3 to 50."""
    run()
    torch.cuda.synchronize()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < budget_ms and len(times) < 50):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def inputs(n: int, heads: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device="cuda").manual_seed(n + dim)
    q, k, v = (torch.randn(1, heads, n, dim, generator=generator, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    return q, k, v


def flash_attention_4() -> Callable[..., Tensor] | None:
    """FA4's function over [B,S,H,D], where its package is installed."""
    try:
        from flash_attn.cute import flash_attn_func  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        print(f"fa4 is left out: {error}")
        return None
    return flash_attn_func


def plugin_engine(config: Config, heads: int, dim: int, longest: int) -> Any | None:
    """A runner of an engine of this one node, where TensorRT is installed."""
    try:
        import tensorrt as trt  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        print(f"plugin is left out: {error}")
        return None
    from engine_parts import Heads, Runner, build, op_model

    from hyperattention.export.engine import register_plugin

    register_plugin(trt_library_path())
    shapes = tuple((1, heads, n, dim) for n in (1, min(8192, longest), longest))
    profile = {name: shapes for name in ("q", "k", "v")}
    model = op_model(config, torch.bfloat16, Heads(heads, heads, dim, dim), lengths=False)
    return Runner(trt, build(trt, trt.Logger(trt.Logger.ERROR), model, profile))


def rivals(q: Tensor, k: Tensor, v: Tensor, fa4: Callable[..., Tensor] | None) -> dict[str, Callable[[], object]]:
    def sdpa(backend: SDPBackend) -> Callable[[], object]:
        def run() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        return run

    found = {"cudnn": sdpa(SDPBackend.CUDNN_ATTENTION), "flash": sdpa(SDPBackend.FLASH_ATTENTION)}
    if fa4:
        swapped = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
        found["fa4"] = lambda: fa4(*swapped, causal=True)
    return found


def measure(
    n: int, heads: int, dim: int, config: Config, skip_exact: bool, budget_ms: float, fa4: Callable[..., Tensor] | None, plugin: Any | None
) -> dict:
    """One row: times in ms and the relative L2 distance of our outputs from exact attention."""
    library = load_cuda()
    q, k, v = inputs(n, heads, dim)
    exact = config.exact()
    row: dict = {"n": n, "heads": heads, "head_dim": dim, "errors": {}}
    o, _ = library.forward(q, k, v, config)
    blocks = library.select(q, k, v, config) if not config.is_exact(n, n) else torch.empty(1, heads, 0, config.num_blocks, device="cuda")
    runs = {
        "forward": lambda: library.forward(q, k, v, config),
        "select": lambda: library.select(q, k, v, config),
        "attend": lambda: library.attend(q, k, v, config, blocks),
        **({} if skip_exact else {"exact": lambda: library.forward(q, k, v, exact)}),
        **rivals(q, k, v, fa4),
    }
    if plugin:
        plugin.bind(q=q, k=k, v=v)
        with torch.cuda.stream(plugin.stream):
            row["plugin"] = median_ms(plugin.launch, budget_ms)
        assert torch.equal(plugin.outputs["o"], o), "the engine's output is not the kernels'"
    for name, run in runs.items():
        try:
            row[name] = median_ms(run, budget_ms)
        except Exception as error:  # a rival may lack a kernel for this shape; ours may not
            if name in OURS:
                raise
            row["errors"][name] = f"{type(error).__name__}: {error}"[:300]
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]):
        wanted = F.scaled_dot_product_attention(q, k, v, is_causal=True).float()
    row["distance_forward"] = ((o.float() - wanted).norm() / wanted.norm()).item()
    if not skip_exact:
        row["distance_exact"] = ((library.forward(q, k, v, exact)[0].float() - wanted).norm() / wanted.norm()).item()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384, 32768, 65536, 131072])
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--budget-ms", type=float, default=400, help="time spent on each number")
    parser.add_argument("--skip-exact-above", type=int, default=131072, help="leave our exact path out of longer inputs")
    parser.add_argument("--exact-below", type=int, default=PRESETS["blocks"].exact_below)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()

    config, fa4 = replace(PRESETS["blocks"], exact_below=options.exact_below), flash_attention_4()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, library {build_info(trt_library_path())['build_id']}")
    print("   D       n " + "".join(f"{name:>9}" for name in COLUMNS) + "  vs fa4  vs best  distance")
    rows = []
    for dim in options.dims:
        plugin = plugin_engine(config, options.heads, dim, max(options.lengths))
        for n in options.lengths:
            row = measure(n, options.heads, dim, config, n > options.skip_exact_above, options.budget_ms, fa4, plugin)
            rows.append(row)
            times = "".join(f"{row[name]:9.3f}" if name in row else f"{'-':>9}" for name in COLUMNS)
            best = min(row[name] for name in ("cudnn", "flash", "fa4") if name in row)
            against = f"{row['fa4'] / row['forward']:7.2f}x" if "fa4" in row else f"{'-':>8}"
            print(f"{dim:4d} {n:7d} {times}{against} {best / row['forward']:7.2f}x  {row['distance_forward']:.4f}", flush=True)
    options.json.write_text(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
