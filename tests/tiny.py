"""Tiny random models as transformers saves them, for the tests of load, patch and export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 67
# Attributes under which 150 tokens approximate.
SMALL = dict(exact_below=32, block_size=16, num_blocks=1, sample_size=8, local_size=32, local_overlap=0, sinks=4)

_LLAMA = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_hidden_layers=2)
_SIZES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=512),
    "gemma2": {**_LLAMA, "sliding_window": 16},
    "mistral": {**_LLAMA, "sliding_window": 16},
    "gpt_oss": {**_LLAMA, "num_local_experts": 2, "num_experts_per_tok": 1},
    "mixtral": {**_LLAMA, "num_local_experts": 3, "num_experts_per_tok": 2},
    "llama4_text": {**_LLAMA, "num_hidden_layers": 4, "intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 16},
    "bloom": dict(hidden_size=32, n_layer=2, n_head=4),
    "opt": dict(
        hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=512
    ),
}


def config(model_type: str = "llama", **overrides: Any) -> Any:
    """The configuration of a tiny model of `model_type`."""
    common = dict(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    if model_type not in ("gpt2", "bloom", "opt"):
        common["max_position_embeddings"] = 512
    return AutoConfig.for_model(model_type, **{**common, **_SIZES[model_type], **overrides})


def save(folder: Path, model_type: str = "llama", **overrides: Any) -> Path:
    """Writes a random model of `model_type` into `folder`; weights are large enough that attention is not uniform."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config(model_type, **overrides))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
            else:  # no two alike: the exporter stores equal tensors once
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def token_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random ids int64 [rows, length]."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
