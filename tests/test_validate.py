"""Validation: metrics against closed forms, and what the model reads."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import validation_bench as vb
from polygraphy.comparator.struct import IterationResult
from torch import Tensor

from hyperattention.config import Config
from hyperattention.errors import UsageError
from hyperattention.reference import exact_attention
from hyperattention.validate.inputs import Corpus, load_corpus, windows
from hyperattention.validate.metrics import (
    attention_error,
    by_position,
    estimate,
    head_errors,
    quantile,
    summarise,
    tensor_error,
    token_metrics,
)
from hyperattention.validate.perplexity import perplexity
from hyperattention.validate.polygraphy_metrics import compare_functions

# --- metrics -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", [2, 67, 2**23 + 1], ids=str)  # the last takes one row a chunk
def test_token_metrics_against_closed_forms(vocabulary: int) -> None:
    rows = 3 if vocabulary < 100 else 2
    exact, ours = torch.randn(rows, vocabulary), torch.randn(rows, vocabulary)
    targets = torch.randint(0, vocabulary, (rows,))
    m = token_metrics(exact, ours, targets)
    p, r = torch.softmax(exact.double(), -1), torch.softmax(ours.double(), -1)
    torch.testing.assert_close(m.kl, (p * (p / r).log()).sum(-1), rtol=1e-9, atol=1e-12)
    at = torch.arange(rows)
    torch.testing.assert_close(m.delta, p[at, targets].log() - r[at, targets].log(), rtol=1e-9, atol=1e-12)
    assert m.top1.tolist() == (exact.argmax(-1) == ours.argmax(-1)).double().tolist()
    assert [len(x) for x in (m.tail(2).kl, m.tail(2).nll_exact)] == [2, 2]


def test_equal_logits_have_no_error() -> None:
    logits = torch.randn(5, 9)
    summary = summarise([token_metrics(logits, logits, torch.zeros(5, dtype=torch.long))], 2)
    assert (summary["delta_nats"]["mean"], summary["kl"]["mean"], summary["top1"]["mean"], summary["kl_max"]) == (0, 0, 1, 0)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("count", [1, 2, 101, 4096])
def test_quantile_is_torchs_own(count: int, kind: torch.dtype) -> None:
    values = torch.randn(count, generator=torch.Generator().manual_seed(count), dtype=kind)
    for share in (0.0, 0.01, 0.5, 0.99, 1.0):
        assert quantile(values, share) == pytest.approx(float(torch.quantile(values, share)), rel=1e-5 if kind == torch.float32 else 1e-12)
    values[count // 2] = torch.nan
    assert math.isnan(quantile(values, 0.5)) and math.isnan(float(torch.quantile(values, 0.5)))


def test_quantile_of_more_tokens_than_torchs_own_takes_everywhere() -> None:
    """Up to 2**24 in some releases."""
    tokens = torch.arange(2**24 + 1, dtype=torch.float32).flip(0)
    assert quantile(tokens, 0.99) == 0.99 * 2**24


def test_perplexity_is_the_inverse_of_the_mean_probability_of_a_token() -> None:
    """The geometric mean, over the tokens of all windows."""
    g, targets = torch.Generator().manual_seed(7), torch.tensor([3, 0, 8, 1, 8, 2, 5])
    exact, ours = torch.randn(2, 7, 9, generator=g), torch.randn(2, 7, 9, generator=g)
    found = summarise([token_metrics(a, b, targets) for a, b in zip(exact, ours, strict=True)], 3)["perplexity"]
    for name, logits in (("exact", exact), ("ours", ours)):
        chosen = torch.softmax(logits.double(), -1)[:, torch.arange(7), targets]
        assert found[name] == pytest.approx(1 / float(chosen.prod() ** (1 / 14)), rel=1e-12)
    nats = {"exact_nats": {"mean": 700.0}, "delta_nats": {"mean": 100.0}}
    assert perplexity(nats) == {"exact": pytest.approx(1.01423e304, rel=1e-5), "ours": math.inf}


def test_standard_error_counts_blocks_not_tokens() -> None:
    values = torch.randn(40, dtype=torch.float64).repeat_interleave(16)  # 16 tokens that say the same thing
    e = estimate([values], 16)
    assert e.blocks == 40
    assert e.se == pytest.approx(float(values.view(40, 16).mean(1).std()) / math.sqrt(40))
    assert estimate([values[:16]], 16).se is None


def test_by_position_finds_the_bad_place() -> None:
    exact, ours = torch.zeros(160, 4), torch.zeros(160, 4)
    ours[120:130, 0] = 3
    rows = by_position([token_metrics(exact, ours, torch.zeros(160, dtype=torch.long))])
    assert len(rows) == 16 and rows[0]["from"] == 0 and rows[-1]["to"] == 160
    bad = max(rows, key=lambda row: row["kl"])
    assert bad["from"] == 120 and bad["delta_nats"] == min(row["delta_nats"] for row in rows) < 0


@pytest.mark.parametrize(("tokens", "sizes"), [(1, [1]), (7, [1] * 7), (16, [1] * 16), (35, [3] * 11 + [2])], ids=str)
def test_buckets_of_position_are_means_of_their_tokens(tokens: int, sizes: list[int]) -> None:
    exact, ours = torch.randn(2, 2, tokens, 5, generator=torch.Generator().manual_seed(tokens))
    targets = torch.arange(tokens) % 5
    windows = [token_metrics(a, b, targets) for a, b in zip(exact, ours, strict=True)]
    rows = by_position(windows, first=100)
    assert [row["to"] - row["from"] for row in rows] == sizes and rows[0]["from"] == 100 and rows[-1]["to"] == 100 + tokens
    assert all(a["to"] == b["from"] for a, b in zip(rows, rows[1:]))
    p, r = (x.double().log_softmax(-1) for x in (exact, ours))
    for row in rows:
        part = slice(row["from"] - 100, row["to"] - 100)
        same = (exact.argmax(-1) == ours.argmax(-1)).double()[:, part].mean()
        kl = (p.exp() * (p - r)).sum(-1)[:, part].mean()
        loss = (p - r).gather(-1, targets.expand(2, -1)[..., None])[..., 0][:, part].mean()
        assert [row["top1"], row["kl"], row["delta_nats"]] == pytest.approx([float(same), float(kl), float(loss)], abs=1e-12)


def test_tensor_error_tells_size_from_direction() -> None:
    x = torch.randn(2, 3, 40, 8)
    scaled = tensor_error(1.1 * x, x)
    assert scaled.cosine == pytest.approx(1) and scaled.norm_ratio == pytest.approx(1.1) and scaled.relative_l2 == pytest.approx(0.1)
    turned = tensor_error(-x, x)
    assert turned.norm_ratio == pytest.approx(1) and turned.cosine == pytest.approx(-1)
    zero = torch.zeros(2, 2)
    assert tensor_error(zero, zero).relative_l2 == 0 and tensor_error(zero + 1, zero).relative_l2 == math.inf


def test_attention_error_names_worst_head_and_position_and_splits_lse() -> None:
    o, lse = torch.randn(1, 4, 160, 8), torch.randn(1, 4, 160)
    lse[0, 0, 0] = -math.inf  # a row that sees nothing
    ours = o.clone()
    ours[0, 2, 100:110] *= 1.5
    row = attention_error(ours, lse + 0.25, o, lse, head_errors(ours, o))
    assert (row["worst_head"], row["worst_position"]) == (2, 100)
    assert row["lse_bias"] == pytest.approx(0.25) and row["lse_std"] == pytest.approx(0, abs=1e-6)


def test_polygraphy_functions_pass_and_fail_by_their_own_number() -> None:
    x = torch.randn(6, 7)

    def verdicts(ours: Tensor) -> list[bool]:
        pair = [IterationResult({"logits": value}, runner_name=name) for name, value in (("ours", ours), ("reference", x))]
        return [bool(function(*pair)["logits"]) for function in compare_functions(0.05, 0.01, 0.999)]

    assert verdicts(x * 1.001) == [True, True, True]
    assert verdicts(x * 1.03) == [True, False, True]
    assert verdicts(x.roll(1)) == [False, True, False]
    assert verdicts(x * math.nan) == [False, False, False]


# --- inputs ------------------------------------------------------------------------------------------------------------


def test_windows_are_distinct_and_targets_follow_inputs() -> None:
    found = windows(vb.corpus(), 100, 4)
    assert len({w.start for w in found}) == 4
    for w in found:
        assert w.inputs.shape == (1, 100) and torch.equal(w.inputs[0, 1:], w.targets[:-1])
        assert torch.equal(w.ids[0], vb.corpus().ids[w.start : w.start + 101])


@pytest.mark.parametrize("length", [1, 2, 7, 10], ids=str)
@pytest.mark.parametrize("size", [12, 21, 40], ids=str)
def test_no_two_windows_read_one_token(size: int, length: int) -> None:
    corpus = replace(vb.corpus(), ids=vb.corpus().ids[:size])
    for count in range(1, 30):
        starts = [w.start for w in windows(corpus, length, count)]
        assert len(starts) == min(count, (size - 1) // length) and starts[0] >= 0 and starts[-1] + length < size
        assert all(b - a >= length for a, b in itertools.pairwise(starts))


def test_no_more_windows_than_the_text_holds() -> None:
    short = replace(vb.corpus(), ids=vb.corpus().ids[:250])
    assert [w.start for w in windows(short, 100, 9)] == [0, 149]
    assert [w.start for w in windows(short, 30, 2)] == [55, 164]
    assert len(windows(short, 249, 3)) == 1
    with pytest.raises(UsageError, match="250 tokens.*needs 251"):
        windows(short, 250, 1)


@pytest.mark.parametrize(
    ("text", "input_ids", "vocabulary", "needed", "says"),
    [
        (None, "bytes", 256, 10, "--text"),
        (Path("missing.txt"), "bytes", 256, 10, "does not exist"),
        (Path("/dev/null"), "bytes", 256, 10, "does not exist"),
        (vb.TEXT, "bytes", 256, 10**7, "needs 10000001"),
        (vb.TEXT, "bytes", 67, 10, "does --input-ids fit"),
    ],
    ids=["no-text", "missing", "no file", "short", "vocabulary"],
)
def test_text_refused(text: Path | None, input_ids: str, vocabulary: int, needed: int, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        load_corpus(text, input_ids, vb.MODEL, vocabulary, 0, needed)


def test_random_tokens_are_marked(tmp_path: Path) -> None:
    corpus = load_corpus(None, "tokens", tmp_path, 67, 0, 100)
    assert corpus.kind == "random" and "no text" in corpus.note and int(corpus.ids.max()) < 67
    assert torch.equal(corpus.ids, load_corpus(None, "tokens", tmp_path, 67, 0, 100).ids)


def test_a_text_without_a_usable_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no tokenizer files"):
        load_corpus(vb.TEXT, "tokens", tmp_path, 67, 0, 100)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UsageError, match="cannot be loaded"):
        load_corpus(vb.TEXT, "tokens", tmp_path, 67, 0, 100)


def test_exact_config_is_what_the_definition_leaves_to_pytorch() -> None:
    from hyperattention.validate.operators import reference_operator

    q, k = torch.randn(2, 4, 70, 8), torch.randn(2, 2, 90, 8)
    o, lse = reference_operator()(q, k, k, Config().exact())
    torch.testing.assert_close(o, exact_attention(q, k, k, True).o)
    assert bool(torch.isnan(lse).all())


def test_corpus_is_described_without_its_folder() -> None:
    described = vb.corpus().describe()
    assert isinstance(vb.corpus(), Corpus) and described["name"] == "heldout.txt" and str(vb.ROOT) not in json.dumps(described)
