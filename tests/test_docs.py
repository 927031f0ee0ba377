"""The documentation: its commands run, its links lead somewhere, options.md is current, quoted messages are in the code.

Fenced blocks of the pages are run on a tiny model, with the placeholders MODEL, OUT, OTHER and held-out.txt filled in and lengths made
short. A block that is not run has a comment before it, `<!-- not run: REASON -->`.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import tiny
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hyperattention.export import cli as export_cli
from hyperattention.validate import cli as validate_cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
RUN = ["README.md", "docs/quickstart.md", "docs/howto.md"]
BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>[^>]+) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)\n```", re.S)
NOT_HERE = r"GPU|needs real inputs|trtexec|Triton|installs the package|the tests run on|test_(architectures|policy)\.py runs this"
# Values that make a command short; everything else runs as it is written.
SHORT = {"--lengths": "150,200", "--max-seq": "300", "--heads": "2", "--head-dim": "8", "--windows": "1"}
SIZE, ROUNDS = ["--max-seq", "300"], ["--repeats", "2"]
SWEPT = ["--set", "exact_below=100", "--set", "blocks.local_size=64", "--tail", "50", "--replaced", "1"]


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    number: int
    language: str
    code: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page} block {self.number}"


def blocks(page: str) -> list[Block]:
    found = BLOCK.finditer((ROOT / page).read_text())
    return [Block(page, number, m["language"], m["code"], m["reason"]) for number, m in enumerate(found, 1)]


def commands(code: str) -> list[list[str]]:
    """The words of each command of a block, without comments."""
    lines = code.replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


@functools.cache
def make_options() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_options", ROOT / "docs/make_options.py")
    assert spec and spec.loader
    module = sys.modules["make_options"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the commands name: a model with its tokenizer, held-out text."""
    folder = tmp_path_factory.mktemp("docs")
    tiny.save(folder / "MODEL")
    letters = "abcdefghijklmnopqrstuvwxyz .,\n"
    tokenizer = Tokenizer(models.WordLevel({letter: i + 3 for i, letter in enumerate(letters)}, unk_token="."))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / "MODEL")
    drawn = np.random.default_rng(4).integers(0, len(letters), 1500)
    (folder / "held-out.txt").write_text("".join(letters[i] for i in drawn))
    return folder


@pytest.fixture(scope="module")
def ran() -> list[list[str]]:
    """Commands that have succeeded."""
    return []


def run(words: list[str]) -> int:
    """A command's exit code, in this process."""
    main = {"export-model": export_cli.main, "hyperattention": validate_cli.main}[words[0]]
    try:
        main(words[1:])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def shortened(words: list[str]) -> list[str]:
    """The command with small values in place of large ones, and small sequences for an export."""
    words = [SHORT.get(before, word) for before, word in zip(["", *words], words)]
    sized = words[0] == "export-model" and "--max-seq" not in words and ".py:" not in words[1]
    return words + SIZE * sized + ROUNDS * ("bench" in words) + SWEPT * ("sweep" in words)


@pytest.mark.ort
@pytest.mark.parametrize("page", RUN)
def test_commands_run(
    page: str, place: Path, ran: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    if page != RUN[0]:  # the commands of a page build on each other, and README.md's come first
        assert (place / "OUT/manifest.json").is_file(), "README.md exports no OUT"
    namespace: dict = {"ids": np.ones((1, 90), np.int64), "lengths": np.array([90], np.int32)}
    for block in blocks(page):
        if block.reason is not None:
            continue
        if block.language == "python":
            source = block.code.replace("out/demo", "OUT")
            if source.startswith("# ") and source.splitlines()[0].endswith(".py"):
                Path(source.splitlines()[0][2:]).write_text(source)
            else:
                exec(compile(source, str(block), "exec"), namespace)
            continue
        assert block.language == "", f"{block} is {block.language}; mark it as not run, with the reason"
        for words in map(shortened, commands(block.code)):
            if words not in ran:  # another page gives some of them too
                ran.append(words)
                # doctor says by its code whether the machine lacks something, and some machines do
                assert run(words) in ((0, 3) if "doctor" in words else (0,)), (words, capsys.readouterr().err[-2000:])
    assert page != RUN[0] or namespace["logits"].shape == (1, 90, tiny.VOCABULARY)


def test_what_is_not_run_says_why() -> None:
    left_out = [block for page in RUN for block in blocks(page) if block.reason is not None]
    assert left_out
    for block in left_out:
        assert re.search(NOT_HERE, block.reason or ""), f"{block}: {block.reason}"
    assert sum(len(commands(b.code)) for page in RUN for b in blocks(page) if b.reason is None and b.language == "") >= 20


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = BLOCK.sub("", (ROOT / page).read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https://", target):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), f"{page} links {target}"
        if anchor:
            assert anchor in anchors(path), f"{page} links {target}, which {path.name} has no heading for"


def anchors(path: Path) -> set[str]:
    """The anchors that a page's headings get: lower case, punctuation gone, spaces as hyphens."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ["docs/howto.md", "docs/accuracy.md"])
def test_a_page_lists_its_sections(page: str) -> None:
    """All of them, in their order."""
    text = (ROOT / page).read_text()
    assert re.findall(r"^- \[(.+)\]\(#", text.split("\n## ")[0], re.M) == re.findall(r"^## (.+)$", text, re.M)


def test_every_page_is_reached_from_the_readme() -> None:
    seen, ahead = set(), ["README.md"]
    while ahead:
        page = ahead.pop()
        seen.add(page)
        for target in re.findall(r"\]\(([^)\s#]+\.md)(?:#[^)]*)?\)", (ROOT / page).read_text()):
            if not target.startswith("https:"):
                path = ((ROOT / page).parent / target).resolve().relative_to(ROOT).as_posix()
                ahead += [path] if path not in seen else []
    assert seen >= set(PAGES)


def test_options_page_is_current() -> None:
    assert (ROOT / "docs/options.md").read_text() == make_options().page(), "run PYTHONPATH=. python docs/make_options.py"


def test_every_number_has_its_range() -> None:
    module, without = make_options(), []
    for name, function in module.commands():
        for row in module.rows(function):
            if row.takes in ("integer", "number") and not re.search(r"\d[\d.,]* (to|or more)|at least \d", row.meaning):
                without.append(f"{name} {row.option}: {row.meaning}")
    assert not without, without


def test_options_named_in_the_pages_exist() -> None:
    module = make_options()
    known = {option for _, function in module.commands() for row in module.rows(function) for option in re.findall(r"--[\w-]+", row.option)}
    foreign = {"--install-completion", "--help"}
    for page in [*RUN, "docs/troubleshooting.md"]:
        text = "\n".join(re.findall(r"`([^`\n]+)`", (ROOT / page).read_text()))
        text += "\n" + "\n".join(block.code for block in blocks(page) if not re.search("trtexec|polygraphy|tritonserver|pip ", block.code))
        used = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", text))
        named = {"--staticPlugins", "--dynamicPlugins"}
        assert used - named <= known | foreign, f"{page} names {sorted(used - named - known - foreign)}"


def test_quoted_messages_are_in_the_code() -> None:
    """Every piece of a message between its dots stands in the sources; an f-string's values are dots there too."""
    sources = "\n".join(
        path.read_text() for folder in ("hyperattention", "export", "validate") for path in sorted((ROOT / folder).glob("**/*.py"))
    )
    joined = re.sub(r'"\s*\n\s*(?:\+ )?f?"', "", sources)  # strings that go over several lines
    joined = re.sub(r"\{[^{}]*\}", "\0", joined)
    rows = re.findall(r"^\| `(.+?)` \|", (ROOT / "docs/troubleshooting.md").read_text(), re.M)
    assert len(rows) >= 30
    for row in rows:
        for piece in (part.strip(" ,;:()") for part in row.split("...")):
            names = {"libhyperattention_ort.so", "model.engine", "CUDAExecutionProvider"}
            for name in names:
                piece = piece.replace(name, "\0")
            assert all(part.strip() in joined for part in piece.split("\0")), f"no source says {piece!r} ({row})"
