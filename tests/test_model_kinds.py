"""What a directory is taken for: its task, its inputs, its limits, which layers are left exact, and what of it may run code."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, dynamic_module_utils

from hyperattention.errors import UnsupportedModel, UsageError
from hyperattention.export.attention_rules import find_problem
from hyperattention.export.load import default_task, inspect_source
from hyperattention.export.masks import attention_mask_function, given_lengths
from hyperattention.export.onnx_graph import MODEL, export_onnx, hyper_nodes
from hyperattention.export.plan import make_plan
from hyperattention.export.source import Input, Trust, open_source, parse_image_size, reopen

_TEXT = dict(vocab_size=67, pad_token_id=2, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=2)
_IMAGE = dict(image_size=36, patch_size=4, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=1)


def save(folder: Path, model_type: str, **config: Any) -> Path:
    torch.manual_seed(5)
    AutoModel.from_config(AutoConfig.for_model(model_type, **config)).save_pretrained(folder)
    return folder


# --- tasks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "architecture", "task"),
    [
        ("llama", "LlamaForCausalLM", "logits"),
        ("llama", None, "logits"),
        ("llama", "LlamaModel", "features"),
        ("bert", "BertForMaskedLM", "features"),
        ("bert", "BertLMHeadModel", "logits"),
        ("bert", None, "features"),
        ("vit", "ViTForImageClassification", "features"),
        ("whisper", "WhisperForConditionalGeneration", "features"),
    ],
    ids=str,
)
def test_the_task_is_what_the_model_is_made_for(model_type: str, architecture: str | None, task: str) -> None:
    config = AutoConfig.for_model(model_type, architectures=[architecture] if architecture else None)
    assert default_task(config) == task


@pytest.mark.parametrize(
    ("model_type", "task", "words"),
    [
        ("vit", "logits", "is no causal language model; give --task features"),
        ("whisper", "prefill", "has an encoder and a decoder; give --task features"),
        ("vit", "module", "--task module is for FILE.py:FUNCTION"),
        ("vit", "classes", "--task is 'classes'"),
    ],
    ids=lambda value: value if " " not in str(value) else "",
)
def test_a_task_that_a_directory_has_not_is_refused(model_type: str, task: str, words: str, tmp_path: Path) -> None:
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(UsageError, match=words):
        open_source(str(tmp_path), task=task)


# --- inputs and limits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "size"), [("224", (224, 224)), ("448x392", (448, 392)), ("36X4", (36, 4))])
def test_image_size(text: str, size: tuple[int, int]) -> None:
    assert parse_image_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "0", "3x", "1x2x3", "-4", "4.5", "٣", "1" * 6])
def test_image_size_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--image-size is"):
        parse_image_size(text)


def test_an_image_model_is_of_one_size(tmp_path: Path) -> None:
    folder = str(save(tmp_path, "vit", **_IMAGE))
    source = open_source(folder, image_size=(20, 44))
    assert source.inputs == (Input("pixel_values", "float", ("batch", 3, 20, 44)),) and source.keys == (56, 56, 56)
    plan = make_plan(source, layers="all", batch=(1, 2, 4))
    assert plan.shapes(plan.inputs[0]) == ((1, 3, 20, 44), (2, 3, 20, 44), (4, 3, 20, 44))
    assert reopen(folder, plan).inputs == source.inputs, "the validation opens it as the export did"
    assert open_source(folder).inputs[0].shape == ("batch", 3, 36, 36)
    with pytest.raises(UsageError, match="the image is 20x45; ViTModel takes multiples of its patch, 4x4"):
        open_source(folder, image_size=(20, 45))


def test_an_image_model_exports_in_bf16(tmp_path: Path) -> None:
    source = open_source(str(save(tmp_path, "vit", **_IMAGE)))
    plan = make_plan(source, layers="all", attributes={**tiny.SMALL}, dtype="bf16")
    export_onnx(source.load(plan), plan, tmp_path, lambda text: None)
    graph = onnx.load(tmp_path / MODEL).graph
    assert {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)} == {onnx.TensorProto.BFLOAT16}
    assert len(hyper_nodes(onnx.load(tmp_path / MODEL))) == 1


def test_an_image_size_for_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--image-size: LlamaForCausalLM reads input_ids, no image"):
        open_source(str(tiny.save(tmp_path)), image_size=(32, 32))


def test_audio_that_says_no_size_is_refused(tmp_path: Path) -> None:
    small = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=1)
    with pytest.raises(UnsupportedModel, match="reads input_values; .* write FILE.py:FUNCTION"):
        open_source(str(save(tmp_path, "audio-spectrogram-transformer", **small)))


@pytest.mark.parametrize(
    ("model_type", "table", "limit"), [("bert", 70, 70), ("roberta", 70, 67), ("gpt2", 70, 70), ("opt", 70, 70), ("llama", 70, None)]
)
def test_learned_positions_end(model_type: str, table: int, limit: int | None, tmp_path: Path) -> None:
    name = "n_positions" if model_type == "gpt2" else "max_position_embeddings"
    folder = tiny.save(tmp_path, model_type, **{name: table}) if limit != 67 and model_type != "bert" else None
    source = inspect_source(folder or save(tmp_path, model_type, **_TEXT, **{name: table}))
    assert source.position_limit == limit and source.max_positions == (limit or table)
    if limit is not None:
        assert make_plan(source).seq == (1, limit // 4, limit)
        with pytest.raises(UsageError, match=f"--max-seq is {limit + 1}; .* positions for {limit} tokens and no more"):
            make_plan(source, seq=(1, 2, limit + 1))
        ids = torch.full((1, limit), 3)
        source.load(make_plan(source)).run({"input_ids": ids, "lengths": torch.tensor([limit], dtype=torch.int32)})
    else:
        assert make_plan(source, seq=(1, 2, 1000)).seq[2] == 1000


# --- layers that are left exact ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Odd:
    """A model whose layers have `problem`."""

    model_type: str
    config: dict[str, Any]
    problem: str

    def __str__(self) -> str:
        return self.model_type


_T5 = dict(vocab_size=67, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=2, decoder_start_token_id=0)
_SWIN = dict(image_size=32, patch_size=4, embed_dim=16, depths=[1], num_heads=[2], window_size=4)
ODD = [
    Odd("t5", _T5, "position bias on the logits"),
    Odd("swin", _SWIN, "a mask that is neither plain causal nor full (packed positions or a position bias)"),
    Odd("albert", {**_TEXT, "embedding_size": 32}, "weights that several layers share: it is called more than once"),
]


@pytest.mark.parametrize("case", ODD, ids=str)
def test_odd_attention_is_named_and_left_exact(case: Odd, tmp_path: Path) -> None:
    source = inspect_source(save(tmp_path, case.model_type, **case.config))
    assert {layer.problem for layer in source.layers} == {case.problem}
    plan = make_plan(source, layers="all", attributes={**tiny.SMALL})
    assert {layer.mode for layer in plan.layers} == {"native"}
    if source.kind == "image":
        feed = {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))}
        given: dict[str, torch.Tensor] = feed
    else:
        feed = {"input_ids": tiny.token_ids(2, 90), "lengths": torch.tensor([90, 37], dtype=torch.int32)}
        given = {"input_ids": feed["input_ids"], "attention_mask": (torch.arange(90)[None] < feed["lengths"][:, None]).long()}
    ours = source.load(plan).run(feed)["features"]
    own: Any = AutoModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        wanted = (own.get_encoder() if own.config.is_encoder_decoder else own)(**given).last_hidden_state
    torch.testing.assert_close(ours[0], wanted[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours[1, :37], wanted[1, :37], atol=1e-5, rtol=1e-5)


def test_a_mask_against_its_modules_word_is_named() -> None:
    module = torch.nn.Identity()
    masks = transformers.masking_utils
    with given_lengths(torch.tensor([9, 4])):
        causal, full = (
            attention_mask_function(2, 9, 9, mask_function=function, attention_mask=torch.ones(2, 9))
            for function in (masks.causal_mask_function, masks.bidirectional_mask_function)
        )
    assert causal is not None and full is not None and torch.equal(causal, full)
    for says, right, wrong in ((True, causal, full), (False, full, causal)):
        module.is_causal = says  # type: ignore[assignment]
        assert find_problem(module, right, None, 0.0, {}) is None
        assert find_problem(module, wrong, None, 0.0, {}) == "a mask of another direction than its module's is_causal says"
        assert find_problem(module, right, None, 0.0, {"is_causal": says}) is None


# --- what may run code ---------------------------------------------------------------------------------------------------


def test_pickled_weights_are_read_only_where_they_are_trusted(tmp_path: Path) -> None:
    tensors = load_file(tiny.save(tmp_path) / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(UsageError, match="a pickle, which can run code .* --allow-pickle"):
        open_source(str(tmp_path))
    source = inspect_source(tmp_path, trust=Trust(pickle=True))
    loaded = source.load(make_plan(source)).model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())
    (tmp_path / "pytorch_model.bin").write_bytes(b"not a pickle")
    with pytest.raises(UsageError, match="cannot be loaded"):
        source.load(make_plan(source))


_CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path({marker!r}).write_text("ran")

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def _with_code(folder: Path, marker: Path, model_type: str) -> None:
    tiny.save(folder)
    (folder / "own.py").write_text(_CODE.format(marker=str(marker)))
    file = folder / "config.json"
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_type": model_type, "auto_map": names}))


def test_code_beside_the_weights_runs_only_where_it_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in (dynamic_module_utils, transformers.utils, transformers.utils.hub):
        monkeypatch.setattr(place, "HF_MODULES_CACHE", str(tmp_path / "cache"), raising=False)
    folder, marker, said = tmp_path / "model", tmp_path / "marker", list[str]()
    _with_code(folder, marker, "own")
    with pytest.raises(UnsupportedModel, match="'own' is unknown to transformers .* --trust-remote-code to run the model's own"):
        open_source(str(folder), say=said.append)
    assert not marker.exists() and not said
    source = open_source(str(folder), trust=Trust(code=True), say=said.append)
    assert marker.exists() and said == ["--trust-remote-code: code of the model's own runs (own.py in model)"]
    assert source.architecture == "OwnForCausalLM" and [layer.problem for layer in source.layers] == [None, None]
    source.load(make_plan(source, layers="all", attributes={**tiny.SMALL}))


def test_an_architecture_that_transformers_knows_runs_no_code(tmp_path: Path) -> None:
    _with_code(tmp_path / "model", tmp_path / "marker", "llama")
    source = open_source(str(tmp_path / "model"))
    source.load(make_plan(source))
    assert source.architecture == "LlamaForCausalLM" and not (tmp_path / "marker").exists()
