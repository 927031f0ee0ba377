"""What the table of bad_inputs.py is made of: a row, folders to give to the commands, and ways to break them."""

from __future__ import annotations

import fcntl
import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import commands
import numpy as np
import onnxruntime
import pytest
import report_samples as samples
import tiny
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hyperattention.export.bundle import MANIFEST
from hyperattention.library import ABI_VERSION, ORT_LIBRARY, TRT_LIBRARY, ort_library_path

# One layer of full attention over rows of 3 to 64 vectors.
TOWER = """
import torch
from torch import nn


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(16, 48)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in self.mix(x).chunk(3, -1))
        return nn.functional.scaled_dot_product_attention(q, k, v)


def build():
    return Tower(), (torch.randn(1, 24, 16),), ({1: torch.export.Dim("sequence", min=3, max=64)},)
"""

Argument = str | Callable[["Place"], Path | str]
Patch = Callable[[pytest.MonkeyPatch, "Place"], None]


@dataclass(frozen=True)
class Place:
    """`scratch` is the case's own folder; no case may touch the others, and `held` keeps open what one needs open.

    `whole` is a good model and `finished` its export; `tower` is the export of TOWER.
    """

    scratch: Path
    whole: Path
    finished: Path
    tower: Path
    held: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Bad:
    """One mistake: the command with its arguments, the exit code, words of the message, and what to break beforehand."""

    name: str
    code: int
    words: str
    command: str
    arguments: tuple[Argument, ...]
    patch: Patch | None = None

    def __str__(self) -> str:
        return self.name


# --- what to give the commands -----------------------------------------------------------------------------------------


def whole(place: Place) -> Path:
    """A model with nothing wrong."""
    return place.whole


def out(place: Place) -> Path:
    """A folder that does not exist."""
    return place.scratch / "out"


def finished(place: Place) -> Path:
    """An output with nothing wrong."""
    return place.finished


def _changed(name: str, original: Callable[[Place], Path], change: Callable[[Path], object]) -> Callable[[Place], Path]:
    def prepare(place: Place) -> Path:
        copy = commands.copy(original(place), place.scratch / name)
        change(copy)
        return copy

    return prepare


def broken(change: Callable[[Path], object]) -> Callable[[Place], Path]:
    """A copy of the model after `change`."""
    return _changed("model", lambda place: place.whole, change)


def spoilt(change: Callable[[Path], object]) -> Callable[[Place], Path]:
    """A copy of the output after `change`."""
    return _changed("done", lambda place: place.finished, change)


def made(model_type: str, **overrides: Any) -> Callable[[Place], Path]:
    """A tiny random model of another architecture."""
    return lambda place: tiny.save(place.scratch / "model", model_type, **overrides)


def tower(place: Place) -> Path:
    """An output of a function, with nothing wrong."""
    return place.tower


def code(body: str) -> Callable[[Place], str]:
    """FILE.py:build of a file that begins as TOWER does."""

    def prepare(place: Place) -> str:
        (place.scratch / "tower.py").write_text(TOWER.partition("def build")[0] + body)
        return f"{place.scratch / 'tower.py'}:build"

    return prepare


def arrays(**values: np.ndarray) -> Callable[[Place], Path]:
    """An .npz file."""

    def prepare(place: Place) -> Path:
        np.savez(place.scratch / "inputs.npz", allow_pickle=True, **values)
        return place.scratch / "inputs.npz"

    return prepare


def file(name: str, content: bytes = b"mine") -> Callable[[Place], Path]:
    """A file in the scratch folder."""

    def prepare(place: Place) -> Path:
        (place.scratch / name).write_bytes(content)
        return place.scratch / name

    return prepare


def changed_policy(place: Place) -> Path:
    """A policy with another loss than was measured."""
    return file("changed.json", json.dumps({**samples.policy(), "predicted_kl": 0.0}).encode())(place)


def at(name: str) -> Callable[[Place], Path]:
    """A name in the scratch folder that nothing has."""
    return lambda place: place.scratch / name


def foreign(name: str) -> Callable[[Place], Path]:
    """OUT holding somebody else's file."""

    def prepare(place: Place) -> Path:
        (place.scratch / "out").mkdir()
        (place.scratch / "out" / name).write_text('{"name": "a web page", "icons": []}')
        return place.scratch / "out"

    return prepare


def link(place: Place) -> Path:
    """OUT that is a link."""
    out(place).symlink_to(place.scratch)
    return out(place)


# --- how to break them -------------------------------------------------------------------------------------------------


def edit(name: str, **values: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        data = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**data, **values}))

    return change


def write(name: str, content: str | bytes) -> Callable[[Path], object]:
    data = content.encode() if isinstance(content, str) else content

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)

    return change


def word_tokenizer(folder: Path) -> None:
    """A tokenizer of words: "other" is past what any model here knows, all the others are 1."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 1, "other": 9999}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def cut(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100])


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def not_a_number(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def remote_code(folder: Path) -> None:
    edit("config.json", model_type="hyperion", auto_map={"AutoModelForCausalLM": "modeling_x.X"})(folder)
    (folder / "modeling_x.py").write_text("raise SystemExit('the code of the model ran')")


def of_bytes(folder: Path) -> None:
    """As if it had been exported with --input-ids bytes."""
    plan = json.loads((folder / MANIFEST).read_text())["plan"]
    edit(MANIFEST, plan={**plan, "input_ids": "bytes"})(folder)


def other_engine(folder: Path) -> None:
    """An engine as another GPU and TensorRT built it."""
    (folder / "model.engine").write_bytes(b"engine")
    host = {"tensorrt": "10.6.0", "compute_capability": "9.0", "gpu": "NVIDIA H200", "driver": "580.65.06", "plugin_build": "0"}
    edit(MANIFEST, engine={"tensorrt": "10.6.0", "host": host, "layers": 9, "plugin_layers": ["attention"]})(folder)


def damaged_engine(folder: Path) -> None:
    """An engine of which the end was lost on its way here."""
    other_engine(folder)
    files = json.loads((folder / MANIFEST).read_text())["files"]
    edit(MANIFEST, files={**files, "model.engine": {"bytes": 12, "sha256": hashlib.sha256(b"engine whole").hexdigest()}})(folder)


def engine_without_plugin(folder: Path) -> None:
    """An engine that was moved without the plugin's library."""
    other_engine(folder)
    (folder / TRT_LIBRARY).unlink(missing_ok=True)
    files = json.loads((folder / MANIFEST).read_text())["files"]
    edit(MANIFEST, files={name: entry for name, entry in files.items() if name != TRT_LIBRARY})(folder)


def no_libraries(patch: pytest.MonkeyPatch, place: Place) -> None:
    patch.setenv("HYPERATTENTION_LIBRARY_DIR", str(place.scratch))


def library(content: Callable[[], bytes]) -> Patch:
    def apply(patch: pytest.MonkeyPatch, place: Place) -> None:
        folder = place.scratch / "lib"
        folder.mkdir()
        (folder / ORT_LIBRARY).write_bytes(content())
        patch.setenv("HYPERATTENTION_LIBRARY_DIR", str(folder))

    return apply


def other_interface() -> bytes:
    data = ort_library_path().read_bytes()
    now, other = f'"abi": {ABI_VERSION}'.encode(), f'"abi": {ABI_VERSION + 1}'.encode()
    assert now in data, "the library's build info is written in another way"
    return data.replace(now, other)


def no_polygraphy(patch: pytest.MonkeyPatch, place: Place) -> None:
    patch.setitem(sys.modules, "polygraphy", None)


def old_onnxruntime(patch: pytest.MonkeyPatch, place: Place) -> None:
    """What ONNX Runtime says of a library that asks for a newer interface than it has."""

    def register(self: object, path: str) -> None:
        raise RuntimeError("[ONNXRuntimeError] : 1 : FAIL : the requested API version is not available")

    patch.setattr(onnxruntime.SessionOptions, "register_custom_ops_library", register)


def other_export(patch: pytest.MonkeyPatch, place: Place) -> None:
    """Another process that writes OUT."""
    held = (place.scratch / ".out.lock").open("w")
    held.write("4711\n")
    held.flush()
    fcntl.flock(held, fcntl.LOCK_EX)
    place.held.append(held)


def all_parts(patch: pytest.MonkeyPatch, place: Place) -> None:
    """A machine that lacks nothing."""
    patch.setattr("hyperattention.export.pipeline.missing_parts", dict)


def cuda_without_a_runtime(patch: pytest.MonkeyPatch, place: Place) -> None:
    """A GPU, but neither TensorRT nor ONNX Runtime's CUDA provider."""
    other_gpu(patch, place)
    patch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    patch.setattr("hyperattention.export.pipeline.missing_parts", lambda: {"engine": "no engine here"})


def no_cuda(patch: pytest.MonkeyPatch, place: Place) -> None:
    patch.setattr("torch.cuda.is_available", lambda: False)


def other_gpu(patch: pytest.MonkeyPatch, place: Place) -> None:
    """A machine with another GPU than `other_engine` says."""
    patch.setattr("torch.cuda.is_available", lambda: True)
    patch.setattr("torch.cuda.get_device_capability", lambda: (8, 9))
    patch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA L40S")


def export(
    name: str, code: int, words: str, *options: Argument, model: Argument = whole, to: Argument = out, patch: Patch | None = None
) -> Bad:
    """A row of export-model; without a validation unless the options ask for one."""
    return Bad(name, code, words, "export-model", (model, to, "--no-validate", *options), patch)


def tool(name: str, code: int, words: str, *arguments: Argument, patch: Patch | None = None) -> Bad:
    """A row of hyperattention."""
    return Bad(name, code, words, "hyperattention", arguments, patch)


def check(name: str, code: int, words: str, *options: Argument, of: Argument = finished, patch: Patch | None = None) -> Bad:
    """A row of hyperattention validate."""
    return Bad(name, code, words, "hyperattention", ("validate", of, "--model", whole, *options), patch)
