"""Takes one model of every kind but causal language models to a validated TensorRT engine on a GPU host.

    python tests/gpu/kinds_run.py --out DIR [--only NAME,NAME]

Random weights from the configuration classes, long inputs: this proves the path (export, engine, what ran, the backend against
the reference), not the quality, which random weights say nothing about. DIR/kinds.json holds the numbers; the exit code is 1 if
any kind failed. Needs a CUDA device, TensorRT with its builder, and both libraries.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent.parent
SIZES = dict(hidden_size=512, num_hidden_layers=2, num_attention_heads=8, intermediate_size=1024)


def encoder(folder: Path) -> list[str]:
    """A text encoder with padding; lengths up to 16,384."""
    config = transformers.BertConfig(vocab_size=256, max_position_embeddings=16384, **SIZES)
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return [str(folder), "--input-ids", "bytes", "--text", str(ROOT / "tests/data/heldout.txt"), "--lengths", "5001,16384"]


def image(folder: Path) -> list[str]:
    """A vision transformer of 1,536 x 1,536 pixels: 9,217 tokens."""
    transformers.ViTModel(transformers.ViTConfig(image_size=1536, patch_size=16, **SIZES), add_pooling_layer=False).save_pretrained(folder)
    return [str(folder)]


def audio(folder: Path) -> list[str]:
    """Whisper's encoder with 6,000 positions, four times its own."""
    shape = dict(d_model=512, encoder_layers=2, decoder_layers=1, encoder_attention_heads=8, decoder_attention_heads=8)
    config = transformers.WhisperConfig(max_source_positions=6000, encoder_ffn_dim=1024, decoder_ffn_dim=1024, **shape)
    transformers.WhisperModel(config).save_pretrained(folder)
    return [str(folder)]


def function(_: Path) -> list[str]:
    """The example of a user's own module: 5,184 tokens, two outputs."""
    return [f"{ROOT / 'examples/vision_tower.py'}:tower"]


KINDS: dict[str, Callable[[Path], list[str]]] = {"encoder": encoder, "image": image, "audio": audio, "function": function}


def command(module: str, *arguments: str, accepted: tuple[int, ...] = (0,)) -> str:
    """What `python -m module` printed. Raises RuntimeError with its last words where it ends otherwise than accepted."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True)
    if done.returncode not in accepted:
        raise RuntimeError(f"{module} {' '.join(arguments)} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def run(name: str, out: Path) -> dict[str, Any]:
    """One kind through export, engine and validation; raises where a backend gate is not met or something else ran."""
    torch.manual_seed(0)
    model, *options = KINDS[name](out / "models" / name)
    folder = out / name
    exporting, validating = (options[:2], options[2:]) if "--input-ids" in options else ([], options)
    exporting += ["--layers", "all", "--dtype", "bf16", "--require-engine", "--no-validate"]
    command("hyperattention.export", model, str(folder), *exporting)
    # 1: the gates on quality may fail with random weights.
    command("hyperattention.validate", "validate", str(folder), "--model", model, *validating, accepted=(0, 1))
    report = json.loads((folder / "report" / "report.json").read_text())
    if not report["backend"].startswith("TensorRT"):
        raise RuntimeError(f"validated on {report['backend']}, not on TensorRT")
    judging = [gate for gate in report["gates"] if gate["group"] == "implementation"]
    gates = {gate["name"]: {key: gate[key] for key in ("value", "limit", "passed")} for gate in judging}
    failed = [gate for gate, row in gates.items() if not row["passed"]]
    if failed or not gates:
        raise RuntimeError(f"gates not met: {failed or 'none was measured'}: {gates}")
    return {"gates": gates, "plugin_layers": [len(row["found"]) for row in report["provenance"]], "time": report["time"]}


def attempt(name: str, out: Path) -> dict[str, Any]:
    """What `run` measured, or the error: one failure must not cost the other kinds."""
    start = time.perf_counter()
    try:
        row: dict[str, Any] = {"passed": True, **run(name, out)}
    except Exception as error:
        row = {"passed": False, "error": f"{type(error).__name__}: {error}"}
    return {**row, "seconds": round(time.perf_counter() - start, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for kinds.json, the models and the exports")
    parser.add_argument("--only", default=",".join(KINDS), help="kinds to run, by name: " + ", ".join(KINDS))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {}
    names = arguments.only.split(",")
    with ThreadPoolExecutor(len(names)) as pool:  # an engine's build is bound by one core
        for name, row in zip(names, pool.map(lambda name: attempt(name, arguments.out), names), strict=True):
            report[name] = row
            print(f"{'PASS' if row['passed'] else 'FAIL'} {name} ({row['seconds']} s) {row.get('error', '')}", flush=True)
    (arguments.out / "kinds.json").write_text(json.dumps(report, indent=1))
    return 0 if all(row["passed"] for row in report.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
