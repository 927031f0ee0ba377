"""What the model reads while it is measured: windows of held-out text, and prompts with a planted key to recall.

Attention on random tokens is the easiest case for any approximation, so text is the rule; random tokens, for a run
without a text, leave the verdict open.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from hyperattention.errors import UsageError
from hyperattention.export.held_out import read_text

NEEDLE_DIGITS = 8
DEPTHS = (0.1, 0.35, 0.6, 0.85)
EDGE_ROWS = 512  # a needle keeps this distance from the end, so that it is never inside the exact tail


def _planted(key: str, digits: str) -> bytes:
    return f"# key {key} = {digits}\n".encode()


def _question(key: str, digits: str) -> bytes:
    return f"# recall {key} = {digits}".encode()


QUESTION_ROWS = len(_question("0" * 8, "0" * NEEDLE_DIGITS))  # with its answer, at the end of a prompt


@dataclass(frozen=True)
class Corpus:
    """Token ids int64 [N] to cut windows from, and what to say about them in the report."""

    ids: Tensor
    name: str
    kind: str  # "text" or "random"
    tokens: str  # "bytes", "tokenizer" or "random"
    sha256: str
    note: str = ""

    def describe(self) -> dict:
        """For report.json; the file is named without its folder."""
        return {
            "name": self.name,
            "kind": self.kind,
            "tokens": self.tokens,
            "sha256": self.sha256,
            "size": len(self.ids),
            "note": self.note,
        }


@dataclass(frozen=True)
class Window:
    """ids int64 [1, length + 1]: the inputs are all but the last, the targets all but the first."""

    ids: Tensor
    length: int
    start: int = 0
    answer: tuple[int, ...] = field(default=())

    def __str__(self) -> str:
        return f"{self.length}@{self.start}"

    @property
    def asked(self) -> int:
        """Rows at its end that are a question and its answer, and no text."""
        return QUESTION_ROWS if self.answer else 0

    @property
    def inputs(self) -> Tensor:
        return self.ids[:, :-1]

    @property
    def targets(self) -> Tensor:
        """int64 [length]."""
        return self.ids[0, 1:]


def load_corpus(text: Path | None, input_ids: str, model: Path, vocabulary: int, seed: int, needed: int) -> Corpus:
    """Ids of `text`: its bytes, or the tokens of the tokenizer in `model`; random ones only where no text was given.

    `needed` is the longest window. Raises UsageError for a text that is missing, too short or cannot be made into tokens.
    """
    if text is not None:
        found = read_text(text, input_ids, model, vocabulary, needed)
        ids = torch.frombuffer(bytearray(found.ids), dtype=torch.uint8).long() if isinstance(found.ids, bytes) else torch.tensor(found.ids)
        return Corpus(ids, found.name, "text", "bytes" if input_ids == "bytes" else "tokenizer", found.sha256)
    if input_ids == "bytes":
        raise UsageError("a model that reads bytes is validated on text; give a plain text file with --text")
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (max(4 * needed, 4096) + 1,), generator=generator)
    note = (
        "Random tokens, because no text was given (--text FILE). They are the easiest input for any approximation: "
        "judge on text before deploying."
    )
    return Corpus(ids, "random tokens", "random", "random", hashlib.sha256(ids.numpy().tobytes()).hexdigest(), note)


def windows(corpus: Corpus, length: int, count: int) -> list[Window]:
    """`count` windows spread evenly over the corpus, none of which reads a token that another does; fewer where it is too short."""
    room = len(corpus.ids) - (length + 1)
    if room < 0:
        raise UsageError(f"{corpus.name} has {len(corpus.ids)} tokens; a window of {length} needs {length + 1}")
    count = max(1, min(count, room // length + 1))
    if room >= count * (length + 1):
        starts = [round(room * (2 * i + 1) / (2 * count)) for i in range(count)]
    else:  # with half a gap before the first and behind the last they would overlap
        starts = [room * i // max(1, count - 1) for i in range(count)]
    return [Window(corpus.ids[None, s : s + length + 1].clone(), length, s) for s in starts]


def needle_room(keys: int) -> int:
    """Bytes that the shortest prompt with `keys` planted pairs takes."""
    key, digits = "0" * 8, "0" * NEEDLE_DIGITS
    return 2 * EDGE_ROWS + keys * len(_planted(key, digits)) + len(_question(key, digits)) - 1


def needle(corpus: Corpus, length: int, depth: float, seed: int, keys: int = 1) -> Window:
    """A prompt of bytes with `# key <8 hex> = <8 digits>` at `depth` and `# recall <8 hex> = <8 digits>` at its end.

    With `keys` above 1 further pairs, none of them asked for, stand at equal distances from it around the text. The answer is part of the
    window: its digits are the last targets, so that one forward pass scores them all. Raises UsageError for too short a `length`.
    """
    if length < needle_room(keys):
        raise UsageError(f"a needle prompt with {keys} keys takes at least {needle_room(keys)} bytes; {length} is too short")
    draw = random.Random(f"{seed}/{length}/{depth}")
    pairs: dict[str, str] = {}
    while len(pairs) < keys:
        key = f"{draw.getrandbits(32):08x}"
        pairs[key] = "".join(draw.choice("0123456789") for _ in range(NEEDLE_DIGITS))
    planted = [_planted(key, digits) for key, digits in pairs.items()]
    question = _question(*next(iter(pairs.items())))
    room = length + 1 - len(question) - sum(map(len, planted))
    start = draw.randrange(max(1, len(corpus.ids) - room))
    text = bytes(corpus.ids[start : start + room].tolist())
    depths = [depth, *((depth + i / keys) % 1.0 for i in range(1, keys))]
    places = [text.rfind(b"\n", 0, min(int(at * room), room - EDGE_ROWS)) + 1 for at in depths]
    body, end = b"", 0
    for at, line in sorted(zip(places, planted, strict=True)):
        body, end = body + text[end:at] + line, at
    ids = torch.tensor(list(body + text[end:-1] + b"\n" + question), dtype=torch.int64)[None]
    return Window(ids, length, start, tuple(ids[0, -NEEDLE_DIGITS:].tolist()))


def recalled(logits: Tensor, window: Window) -> float:
    """Share of the answer's digits that are the top choice; logits [length, vocabulary] or its last rows."""
    count = len(window.answer)
    return float((logits[-count:].argmax(-1).cpu() == torch.tensor(window.answer)).double().mean())
