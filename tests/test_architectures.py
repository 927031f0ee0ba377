"""Every kind of architecture, randomly initialised and run on long inputs: plan, load, replace, run, export, ONNX Runtime.

Nothing in the package knows one of these by name; the untouched transformers model and the dense oracle are the judges.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import oracle
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from hyperattention import reference
from hyperattention.config import Config
from hyperattention.export.memory import predict
from hyperattention.export.onnx_graph import MODEL, export_onnx, hyper_nodes
from hyperattention.export.patch import Patched, padding_mask
from hyperattention.export.plan import make_plan
from hyperattention.export.source import Source, open_source
from hyperattention.export.switched import Captured
from hyperattention.library import ort_library_path

ROWS, SHORT, LONGEST, WINDOW = 301, 177, 512, 24
# Under these 301 keys approximate.
SMALL = dict(exact_below=64, block_size=16, num_blocks=2, sample_size=16, local_size=48, local_overlap=1, sinks=5)

_DECODER = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=2)
_DECODER |= dict(vocab_size=67, max_position_embeddings=LONGEST, pad_token_id=2, bos_token_id=0, eos_token_id=1, head_dim=8)
_ENCODER = {name: value for name, value in _DECODER.items() if name not in ("num_key_value_heads", "head_dim")}
_IMAGE = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=2, image_size=68, patch_size=4)
_AUDIO = dict(d_model=16, encoder_ffn_dim=24, decoder_ffn_dim=24, encoder_attention_heads=2, decoder_attention_heads=2, encoder_layers=2)
_AUDIO |= dict(decoder_layers=1, vocab_size=67, num_mel_bins=10, max_source_positions=ROWS, pad_token_id=2, decoder_start_token_id=0)


@dataclass(frozen=True)
class Architecture:
    """A model type with its configuration, and what must be found: kind, and the problem of each layer (None: it is replaced)."""

    name: str
    model_type: str
    kind: str
    config: dict[str, Any] = field(hash=False)
    problems: tuple[str | None, ...] = (None, None)
    task: str | None = None
    image_size: tuple[int, int] | None = None
    onnx: bool = False

    @property
    def causal(self) -> bool:
        return self.kind == "language" or self.name == "llama-features"

    def __str__(self) -> str:
        return self.name


CASES = [
    Architecture("llama", "llama", "language", _DECODER, onnx=True),
    Architecture("llama-features", "llama", "encoder", _DECODER, task="features"),
    Architecture("mistral", "mistral", "language", {**_DECODER, "sliding_window": None}),
    Architecture("mistral-window", "mistral", "language", {**_DECODER, "sliding_window": WINDOW}, ("sliding window of 24 keys",) * 2),
    Architecture("qwen2", "qwen2", "language", _DECODER),
    Architecture("qwen3", "qwen3", "language", _DECODER),
    Architecture("phi3", "phi3", "language", _DECODER),
    Architecture("gemma", "gemma", "language", _DECODER),
    Architecture(
        "gemma2-softcap",
        "gemma2",
        "language",
        {**_DECODER, "sliding_window": WINDOW},
        ("sliding window of 24 keys", "softcap 50.0 on the logits"),
    ),
    Architecture("gpt-neox", "gpt_neox", "language", {**_ENCODER, "rotary_pct": 0.25}, onnx=True),
    Architecture("glm4", "glm4", "language", {**_DECODER, "partial_rotary_factor": 0.5}),
    Architecture("bert", "bert", "encoder", _ENCODER, onnx=True),
    Architecture("roberta", "roberta", "encoder", {**_ENCODER, "max_position_embeddings": LONGEST + 3}),
    Architecture(
        "modernbert",
        "modernbert",
        "encoder",
        {**_ENCODER, "num_hidden_layers": 3, "global_attn_every_n_layers": 2, "local_attention": WINDOW},
        (None, "sliding window of 13 keys", None),
        onnx=True,
    ),
    Architecture("vit", "vit", "image", _IMAGE, onnx=True),
    Architecture("vit-other-size", "vit", "image", {**_IMAGE, "image_size": 32}, image_size=(68, 76), onnx=True),
    Architecture("dinov2", "dinov2", "image", {**_IMAGE, "mlp_ratio": 2}, onnx=True),
    Architecture("dinov2-other-size", "dinov2", "image", {**_IMAGE, "mlp_ratio": 2, "image_size": 32}, image_size=(76, 68)),
    Architecture("whisper-encoder", "whisper", "audio", _AUDIO, onnx=True),
]


def save(folder: Path, case: Architecture) -> PreTrainedModel:
    """Writes a random model and returns it: weights large enough that attention is not uniform, no two of a vector alike."""
    torch.manual_seed(7)
    config = AutoConfig.for_model(case.model_type, **case.config)
    model = (AutoModelForCausalLM if case.kind == "language" else AutoModel).from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    model.set_attn_implementation("eager")
    return model


def feed(source: Source) -> dict[str, Tensor]:
    """Random inputs: two rows, the second of text shorter than the first."""
    generator = torch.Generator().manual_seed(3)
    if source.kind in ("language", "encoder"):
        ids = torch.randint(3, 67, (2, ROWS), generator=generator)
        return {"input_ids": ids, "lengths": torch.tensor([ROWS, SHORT], dtype=torch.int32)}
    (entry,) = source.inputs
    return {entry.name: torch.randn(tuple(2 if size == "batch" else int(size) for size in entry.shape), generator=generator)}


def untouched(model: PreTrainedModel, case: Architecture, given: dict[str, Tensor]) -> Tensor:
    """The model as transformers runs it."""
    if case.kind == "audio":
        return model.get_encoder()(**given).last_hidden_state
    if case.kind == "image":
        return model(**given, **({"interpolate_pos_encoding": True} if case.name == "vit-other-size" else {})).last_hidden_state
    mask = padding_mask(given["lengths"], ROWS).long()
    options = {} if case.model_type in ("bert", "roberta", "modernbert") else {"use_cache": False}
    out = model(input_ids=given["input_ids"], attention_mask=mask, **options)
    return out.logits if case.kind == "language" else out.last_hidden_state


def live(values: Tensor, given: dict[str, Tensor]) -> Tensor:
    """The rows that are no padding, one after the other."""
    lengths = given["lengths"].tolist() if "lengths" in given else [values.shape[1]] * 2
    return torch.cat([values[row, :length] for row, length in enumerate(lengths)])


@dataclass(frozen=True)
class Replaced:
    case: Architecture
    own: PreTrainedModel
    source: Source
    patched: Patched
    given: dict[str, Tensor]
    found: dict[str, Tensor]
    captured: list[Captured]


_MADE: dict[str, Replaced] = {}


@pytest.fixture(scope="module", params=CASES, ids=str)
def replaced(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Replaced:
    """Each case once, whichever of its tests comes first."""
    case: Architecture = request.param
    if case.name not in _MADE:
        _MADE[case.name] = make(case, tmp_path_factory.mktemp(case.name))
    return _MADE[case.name]


def make(case: Architecture, folder: Path) -> Replaced:
    """Saved, opened, planned with every layer approximate, loaded and run once."""
    own = save(folder, case)
    source = open_source(str(folder), task=case.task, image_size=case.image_size)
    plan = make_plan(source, layers="all", attributes=SMALL, batch=(1, 2, 3))
    patched = source.load(plan)
    assert isinstance(patched, Patched)
    given = feed(source)
    with patched.capture() as captured:
        found = patched.run(given)
    return Replaced(case, own, source, patched, given, found, captured)


def test_the_plan_says_what_each_layer_is(replaced: Replaced) -> None:
    case, source, plan = replaced.case, replaced.source, replaced.patched.plan
    assert (source.kind, source.task) == (case.kind, "logits" if case.kind == "language" else "features")
    assert tuple(layer.problem for layer in source.layers) == case.problems
    assert [layer.mode for layer in plan.layers] == ["native" if problem else "approximate" for problem in case.problems]
    assert {layer.causal for layer in source.layers} == {case.causal}
    assert {bool(layer.config.causal) for layer in plan.planned if layer.config} <= {case.causal}
    assert all(layer.heads_q == 2 and layer.head_dim == 8 for layer in source.layers)
    assert plan.dims["batch"] == (1, 2, 3) and plan.batch == (1, 2, 3)
    if source.kind in ("language", "encoder"):
        assert plan.dims["sequence"] == plan.seq == (1, LONGEST // 4, LONGEST)
    else:
        keys = replaced.found["features"].shape[1]
        assert plan.seq == (keys,) * 3 and keys > SMALL["exact_below"] and "sequence" not in plan.dims


def test_memory_is_predicted(replaced: Replaced) -> None:
    items = {item.name: item.bytes for item in predict(replaced.source, replaced.patched.plan)}
    assert items["weights"] == 4 * sum(weights.numel() for weights in replaced.patched.model.parameters())
    output = next(iter(replaced.found.values()))
    wanted = 4 * 3 * replaced.patched.plan.seq[2] * output.shape[-1]
    assert items["logits" if replaced.case.kind == "language" else "features"] == wanted
    assert all(value is not None and value > 0 for name, value in items.items() if name != "workspace")


def test_exact_is_the_untouched_model(replaced: Replaced) -> None:
    with replaced.patched.mode("exact"):
        (exact,) = replaced.patched.run(replaced.given).values()
    with torch.no_grad():
        own = untouched(replaced.own, replaced.case, replaced.given)
    torch.testing.assert_close(live(exact, replaced.given), live(own, replaced.given), atol=1e-4, rtol=1e-4)
    (ours,) = replaced.found.values()
    assert ours.isfinite().all()
    distance = float((live(ours, replaced.given) - live(own, replaced.given)).norm() / live(own, replaced.given).norm())
    # Not the same, so it approximates; but no layer is confused with another.
    assert distance == pytest.approx(0, abs=1e-4) if not replaced.patched.plan.planned else 1e-4 < distance < 0.8


def test_layers_are_the_operators(replaced: Replaced) -> None:
    """By the reference under the attributes that the case asks for, and for one of each kind by the dense oracle."""
    captured = replaced.captured
    assert [c.layer for c in captured] == [layer.index for layer in replaced.patched.plan.planned]
    lengths = replaced.given.get("lengths")
    for c in captured[-1:]:
        # Whisper scales its queries itself.
        scale = 1.0 if replaced.case.kind == "audio" else 0.0
        wanted = Config.from_attributes({**SMALL, "causal": int(replaced.case.causal), "seed": c.layer, "scale": scale})
        torch.testing.assert_close(c.o, reference.attention(c.q, c.k, c.v, wanted, lengths).o, atol=1e-5, rtol=1e-5)
    if replaced.case.onnx and captured:
        c, rows = captured[0], SHORT if lengths is not None else captured[0].q.shape[2]
        q, k, v = (x[1:, :1].numpy() for x in (c.q, c.k, c.v))
        valid = None if lengths is None else lengths[1:].numpy()
        o, _ = oracle.attention(q, k, v, c.config, valid, oracle.make_plan(q, k, c.config, valid))
        np.testing.assert_allclose(c.o[1:, :1, :rows].numpy(), o[:, :, :rows], atol=1e-4, rtol=1e-4)


@pytest.mark.ort
@pytest.mark.parametrize("replaced", [case for case in CASES if case.onnx], ids=str, indirect=True)
def test_onnx_runtime_computes_the_same(replaced: Replaced, tmp_path: Path) -> None:
    plan = replaced.patched.plan
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        export_onnx(replaced.patched, plan, tmp_path, lambda text: None)
    assert len(hyper_nodes(onnx.load(tmp_path / MODEL))) == len(plan.planned)
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(ort_library_path()))
    session = onnxruntime.InferenceSession(tmp_path / MODEL, options, providers=["CPUExecutionProvider"])
    assert [entry.name for entry in session.get_inputs()] == [entry.name for entry in plan.inputs]
    assert [entry.shape for entry in session.get_inputs()] == [list(entry.shape) for entry in plan.inputs]
    (found,) = session.run(list(plan.outputs), {name: tensor.numpy() for name, tensor in replaced.given.items()})
    (ours,) = replaced.found.values()
    torch.testing.assert_close(live(torch.as_tensor(found), replaced.given), live(ours, replaced.given), atol=2e-3, rtol=2e-3)
