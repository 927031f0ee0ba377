"""Plan and load: decisions, refusals by name, and every architecture's exact twin against transformers' own attention."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers

from hyperattention.config import INT32_MAX
from hyperattention.errors import HyperAttentionError, UnsupportedModel, UsageError
from hyperattention.export.load import TransformersSource, inspect_source, load_model
from hyperattention.export.memory import predict
from hyperattention.export.patch import install, padding_mask
from hyperattention.export.plan import ExportPlan, make_plan, parse_layers, warnings
from hyperattention.export.shape_options import parse_batch

ROWS = 150


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def source(folder: Path) -> TransformersSource:
    return inspect_source(folder)


# --- plan ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("all", range(8)),
        ("none", ()),
        ("odd", (1, 3, 5, 7)),
        ("even", (0, 2, 4, 6)),
        ("first:3", (0, 1, 2)),
        ("last:1", (7,)),
        ("0-3,7", (0, 1, 2, 3, 7)),
        ("5", (5,)),
        ("2-2,2", (2,)),
    ],
)
def test_layer_spec(spec: str, expected: Any) -> None:
    assert parse_layers(spec, 8) == frozenset(expected)


REFUSED_LAYERS = ["", "some", "8", "0-8", "3-1", "first:0", "last:9", "first:", "1,,2", "-1", "1-", "first:x", "ODD", "٣", "0-99999999999"]


@pytest.mark.parametrize("spec", REFUSED_LAYERS)
def test_layer_spec_refused(spec: str) -> None:
    with pytest.raises(UsageError, match="--layers"):
        parse_layers(spec, 8)


@pytest.mark.parametrize(("text", "expected"), [("3", (3, 3, 3)), ("1,4,8", (1, 4, 8)), ("1, 2, 2", (1, 2, 2))])
def test_batch(text: str, expected: tuple[int, int, int]) -> None:
    assert parse_batch(text) == expected


@pytest.mark.parametrize("text", ["", "²", "٣", "1,2", "-1", "9" * 5000], ids=["empty", "superscript", "arabic", "two", "negative", "long"])
def test_batch_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--batch is"):
        parse_batch(text)


def test_plan_round_trips_through_json(source: TransformersSource) -> None:
    shape = dict(seq=(1, 100, 200), batch=(1, 2, 3))
    source = inspect_source(source.path, "prefill")
    plan = make_plan(source, layers="odd", dtype="bf16", seed=INT32_MAX, attributes=tiny.SMALL, **shape)
    assert ExportPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_plan_of_another_version_is_refused(source: TransformersSource) -> None:
    data = make_plan(source).to_json()
    with pytest.raises(UsageError, match="export the model again"):
        ExportPlan.from_json({**data, "unknown": 1})


def test_every_layer_is_decided(source: TransformersSource) -> None:
    plan = make_plan(source, layers="odd", seed=40)
    first, second = plan.layers
    assert (first.mode, second.mode) == ("exact", "approximate")
    assert first.config is not None and first.config.exact_below == INT32_MAX
    assert second.config is not None and second.config.exact_below == 4096
    assert (first.config.seed, second.config.seed) == (40, 41)
    assert plan.planned == plan.layers and plan.approximate == (second,)


def test_seeds_wrap_below_two_to_the_31(source: TransformersSource) -> None:
    plan = make_plan(source, layers="all", seed=INT32_MAX)
    assert [layer.config.seed for layer in plan.planned if layer.config] == [INT32_MAX, 0]


def test_other_layers_may_keep_pytorchs_attention(source: TransformersSource) -> None:
    plan = make_plan(source, layers="odd", keep_exact="onnx")
    assert [(layer.mode, layer.config is None) for layer in plan.layers] == [("native", True), ("approximate", False)]


@pytest.mark.parametrize("model_type", ["gemma2", "mistral", "llama4_text", "gpt_oss"])
def test_prefill_that_would_lose_keys_is_refused(model_type: str, tmp_path: Path) -> None:
    overrides = {"sliding_window": 16} if model_type == "gpt_oss" else {}
    tiny.save(tmp_path, model_type, **overrides)
    source = inspect_source(tmp_path, "prefill")
    with pytest.raises(UnsupportedModel, match=r"--task prefill: the cache of layers 0 \(model.layers.0.self_attn\).* --task logits"):
        make_plan(source, seq=(1, 8, 16))
    assert make_plan(inspect_source(tmp_path, "logits"), seq=(1, 8, 16)).task == "logits"
    assert make_plan(source, seq=(1, 8, 15)).task == "prefill", "nothing is lost below the window"


def test_positions_of_zero_are_unknown(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    _edit(copy, max_position_embeddings=0)
    assert inspect_source(copy).max_positions is None


def test_no_function_body_is_predicted_without_a_node(source: TransformersSource) -> None:
    for keep, expected in (("op", True), ("onnx", False)):
        items = predict(source, make_plan(source, layers="none", keep_exact=keep, seq=(1, 8, 64)))
        assert any(item.name == "function body" for item in items) == expected


@pytest.mark.parametrize("model_type", ["gpt_oss", "mixtral"])
def test_experts_are_plain_matmuls_and_compute_the_same(model_type: str, tmp_path: Path) -> None:
    source = inspect_source(tiny.save(tmp_path, model_type))
    model = install(load_model(source, torch.float32), make_plan(source, layers="none", keep_exact="onnx")).model
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager").eval()
    ids = tiny.token_ids(2, 37)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, theirs(ids).logits, atol=2e-5, rtol=2e-5)
        shapes = {"input_ids": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}, "use_cache": None}
        program = torch.export.export(model, (), {"input_ids": ids, "use_cache": False}, dynamic_shapes=shapes)
    assert not [str(node.target) for node in program.graph.nodes if "grouped_mm" in str(node.target)], "ONNX has no such operator"


def test_preset_paper_brings_its_own_selector(source: TransformersSource) -> None:
    plan = make_plan(source, layers="all", preset="paper")
    assert {layer.config.selector for layer in plan.approximate if layer.config} == {"sortlsh"}
    plan = make_plan(source, layers="all", preset="paper", attributes={"selector": "blocks", "block_size": 128})
    assert {(c.selector, c.block_size, c.local_size) for c in (layer.config for layer in plan.approximate) if c} == {("blocks", 128, 4096)}


def test_preset_exact_never_approximates(source: TransformersSource) -> None:
    plan = make_plan(source, layers="all", preset="exact", attributes={"exact_below": 5})
    assert {layer.mode for layer in plan.layers} == {"exact"}
    assert all(layer.config is not None and layer.config.is_exact(10**6, 10**6) for layer in plan.layers)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(preset="fast"), "--preset is 'fast'"),
        (dict(dtype="fp8"), "--dtype"),
        (dict(input_ids="words"), "--input-ids"),
        (dict(keep_exact="both"), "--keep-exact"),
        (dict(seed=-1), "--seed is -1"),
        (dict(seed=INT32_MAX + 1), "--seed"),
        (dict(seq=(9, 8, 10)), "min <= opt <= max"),
        (dict(seq=(0, 8, 10)), "1 <= min"),
        (dict(seq=(1, 8, 2**25)), "max 33554432"),
        (dict(batch=(2, 1, 2)), "--batch"),
        (dict(attributes={"block_size": 8}), "block_size is 8; it takes an integer from 16 to 256"),
        (dict(attributes={"pool_size": 7}), "pool_size"),
        (dict(attributes={"selector": "lsh"}), "selector is 'lsh'"),
        (dict(attributes={"causal": 0}), "causal is no option"),
    ],
    ids=lambda value: next(iter(value)) + str(next(iter(value.values()))) if isinstance(value, dict) else "",
)
def test_plan_refuses(source: TransformersSource, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make_plan(source, **options)


def test_plan_warns_of_lengths_that_mean_nothing(source: TransformersSource) -> None:
    plan = make_plan(source, layers="odd", seq=(1, 100, 1000))
    found = warnings(plan, source.max_positions)
    assert len(found) == 2 and "trained for 512" in found[0] and "never approximate" in found[1]
    assert warnings(make_plan(source, layers="odd", seq=(1, 100, 512), attributes=tiny.SMALL), source.max_positions) == []


def test_memory_prediction_names_its_parts(source: TransformersSource) -> None:
    source = inspect_source(source.path, "prefill")
    plan = make_plan(source, layers="odd", dtype="bf16", seq=(1, 100, 512), batch=(1, 2, 3))
    items = {item.name: item.bytes for item in predict(source, plan)}
    assert items["weights"] == 2 * source.num_parameters
    assert items["keys and values"] == 2 * 3 * 512 * (2 * 2 * (8 + 8))
    assert items["logits"] == 2 * 3 * tiny.VOCABULARY
    assert items["function body"] == 3 * 3 * 4 * 512 * 512 * 4


# --- load ------------------------------------------------------------------------------------------------------------


def test_inspection_finds_sizes_without_loading(source: TransformersSource) -> None:
    assert source.architecture == "LlamaForCausalLM" and len(source.layers) == 2
    layer = source.layers[1]
    assert (layer.index, layer.name, layer.problem) == (1, "model.layers.1.self_attn", None)
    assert (layer.heads_q, layer.heads_kv, layer.head_dim, layer.head_dim_v) == (4, 2, 8, 8)
    assert source.num_parameters == sum(p.numel() for p in load_model(source, torch.float32).parameters())


@dataclass(frozen=True)
class Architecture:
    """A model type, the problem of each layer, and configuration to change."""

    model_type: str
    problems: tuple[str | None, ...]
    overrides: dict[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return self.model_type


@pytest.mark.parametrize(
    "case",
    [
        Architecture("llama", (None, None)),
        Architecture("gpt2", (None, None)),
        Architecture("opt", (None, None)),
        Architecture("mistral", ("sliding window of 16 keys", "sliding window of 16 keys")),
        Architecture("gemma2", ("sliding window of 16 keys", "softcap 50.0 on the logits")),
        Architecture("gpt_oss", ("attention sinks (s_aux) in the softmax",) * 2),
        Architecture("llama4_text", ("chunked attention",) * 3 + (None,)),
    ],
    ids=str,
)
def test_layers_are_judged_by_what_they_ask_for(case: Architecture, tmp_path: Path) -> None:
    """And the patched model, exact, is the model as transformers runs it, padding included."""
    source = inspect_source(tiny.save(tmp_path, case.model_type, **case.overrides))
    assert tuple(layer.problem for layer in source.layers) == case.problems
    model = load_model(source, torch.float32)
    model.set_attn_implementation("eager")
    ids, lengths = tiny.token_ids(2, ROWS), torch.tensor([ROWS, 101])
    with torch.no_grad():
        own = model(input_ids=ids, attention_mask=padding_mask(lengths, ROWS).long(), use_cache=False).logits
    ours = install(model, make_plan(source, layers="all", attributes=tiny.SMALL))
    with ours.mode("exact"):
        exact = ours.forward(ids, lengths).logits
    for row, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(exact[row, :length], own[row, :length], atol=2e-5, rtol=2e-5)
    modes = {layer.mode for layer in ours.plan.layers}
    assert modes == {"native" if problem else "approximate" for problem in case.problems}


def test_a_layer_that_cannot_be_replaced_is_refused_by_number(tmp_path: Path) -> None:
    source = inspect_source(tiny.save(tmp_path, "gemma2"))
    with pytest.raises(UnsupportedModel, match=r"layer 1 \(model.layers.1.self_attn\) cannot be replaced: softcap 50.0"):
        make_plan(source, layers="1")
    assert {layer.mode for layer in make_plan(source, layers="odd").layers} == {"native"}


def _truncate(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def _edit(path: Path, **values: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def _drop_tensor(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def _spoil(path: Path, value: float) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def _break_pickle(path: Path) -> None:
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(b"not a pickle")


BROKEN = {
    "truncated-weights": (_truncate, "truncated or broken"),
    "empty-weights": (lambda p: (p / "model.safetensors").write_bytes(b""), "truncated or broken"),
    "no-weights": (lambda p: (p / "model.safetensors").unlink(), "holds no weights"),
    "no-config": (lambda p: (p / "config.json").unlink(), "holds no config.json"),
    "config-not-json": (lambda p: (p / "config.json").write_text("{"), "is not valid JSON"),
    "config-a-list": (lambda p: (p / "config.json").write_text("[]"), "names no model_type"),
    "config-binary": (lambda p: (p / "config.json").write_bytes(b"\xff\xfe\x00"), "is not valid JSON"),
    "unknown-architecture": (lambda p: _edit(p, model_type="hyperion"), "architecture 'hyperion' is unknown"),
    "wrong-type": (lambda p: _edit(p, hidden_size="big"), "cannot be read as a llama configuration"),
    "heads-do-not-divide": (lambda p: _edit(p, num_attention_heads=3, head_dim=None), "cannot"),
    "other-size": (lambda p: _edit(p, intermediate_size=50), "another shape than config.json says"),
    "tensor-missing": (_drop_tensor, "q_proj.weight are missing from the weight files"),
    "index-names-missing-file": (
        lambda p: (p / "model.safetensors.index.json").write_text('{"weight_map": {"a": "part-1.safetensors"}}'),
        "part-1.safetensors, which is missing",
    ),
    "index-a-list": (lambda p: (p / "model.safetensors.index.json").write_text("[]"), "is broken"),
    "index-of-numbers": (lambda p: (p / "model.safetensors.index.json").write_text('{"weight_map": {"a": 3}}'), "is broken"),
    "pickle": (_break_pickle, r"pytorch_model.bin, a pickle, which can run code .* --allow-pickle"),
    "tokenizer-broken": (lambda p: (p / "tokenizer.json").write_text("{}"), "tokenizer.json is broken"),
    "not-a-number": (lambda p: _spoil(p, float("nan")), r"layers.1.mlp.up_proj.weight hold values that are NaN or infinite in float32"),
    "infinite": (lambda p: _spoil(p, float("-inf")), "layers.1.mlp.up_proj.weight hold values that are NaN or infinite in float32"),
    "code-of-its-own": (lambda p: _edit(p, model_type="hyperion", auto_map={"AutoConfig": "h.H"}), "give --trust-remote-code"),
    "no-layers": (lambda p: _edit(p, num_hidden_layers=0), "has no attention layer; is its number of layers 0"),
    "no-heads": (lambda p: _edit(p, num_attention_heads=0, head_dim=None), "cannot"),
    "quantised": (lambda p: _edit(p, quantization_config={"quant_method": "gptq", "bits": 4}), "quantised weights .*gptq"),
    "generation-config-broken": (lambda p: (p / "generation_config.json").write_text("{"), "generation_config.json is not valid JSON"),
    "tokenizer-config-a-list": (lambda p: (p / "tokenizer_config.json").write_text("[]"), "tokenizer_config.json holds no JSON object"),
    "index-broken": (lambda p: (p / "model.safetensors.index.json").write_text("{}"), "is broken"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_directory_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    breaks, words = BROKEN[name]
    breaks(copy)
    with pytest.raises(HyperAttentionError, match=words) as raised:
        load_model(inspect_source(copy), torch.float32)
    assert raised.value.exit_code == 2


def test_model_outside_the_interface_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="BloomForCausalLM does not go through transformers' AttentionInterface"):
        inspect_source(tiny.save(tmp_path, "bloom"))


class OwnAttention(torch.nn.Module):
    """Attention that asks transformers' interface for nothing."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.values = torch.nn.Linear(size, size)

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        return self.values(hidden_states.cumsum(1)), None


def test_a_layer_with_attention_of_its_own_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = transformers.AutoModelForCausalLM.from_config

    def with_own_attention(*arguments: Any, **options: Any) -> Any:
        model = build(*arguments, **options)
        model.model.layers[0].self_attn = OwnAttention(32)
        return model

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_config", with_own_attention)
    source = inspect_source(folder)
    assert [(layer.name, layer.problem) for layer in source.layers] == [
        ("model.layers.1.self_attn", None),
        ("model.layers.0.self_attn", "attention of its own, outside transformers' AttentionInterface"),
    ]
