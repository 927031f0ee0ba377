"""The table of test_bad_input.py: mistakes that people make, the exit code of each, and what its message says.

A row's arguments are words, or functions of `Place` that prepare a path first. Each is run with --json too.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from mistakes import (
    TOWER,
    Argument,
    Bad,
    Patch,
    Place,
    all_parts,
    arrays,
    at,
    broken,
    changed_policy,
    check,
    code,
    cuda_without_a_runtime,
    cut,
    damaged_engine,
    edit,
    engine_without_plugin,
    export,
    file,
    finished,
    foreign,
    library,
    link,
    made,
    no_cuda,
    no_libraries,
    no_polygraphy,
    not_a_number,
    of_bytes,
    old_onnxruntime,
    other_engine,
    other_export,
    other_gpu,
    other_interface,
    pickled,
    remote_code,
    spoilt,
    tool,
    tower,
    whole,
    word_tokenizer,
    write,
)

from hyperattention.export.bundle import MANIFEST, REPORT
from hyperattention.library import ABI_VERSION

_HEADS_OF_12 = made("llama", head_dim=12)
_TOWER = code("def build" + TOWER.partition("def build")[2])


def _linked(place: Place) -> Path:
    """OUT in MODEL, reached through a link elsewhere."""
    (place.scratch / "link").symlink_to(place.whole)
    return place.scratch / "link" / "out"


def _feed(name: str, code: int, words: str, *options: Argument) -> Bad:
    """A row of hyperattention validate on the function's output."""
    return tool(name, code, words, "validate", tower, "--model", _TOWER, *options)


def _inputs(name: str, words: str, x: np.ndarray) -> Bad:
    """Such a row with --inputs."""
    return _feed(name, 2, words, "--inputs", arrays(x=x), "--lengths", str(x.shape[1] or 24))


def _words(name: str, words: str, text: str) -> Bad:
    """A row of export-model on a text whose words are its tokens."""
    model = broken(word_tokenizer)
    return export(name, 2, words, "--validate", "--lengths", "64", "--text", file("text", text.encode()), model=model)


_MODELS = [
    export("no-such-directory", 2, "there is no", model=at("nowhere")),
    export("model-is-a-file", 2, "is a file; MODEL is a directory", model=file("model")),
    export("model-name-in-brackets", 2, "there is no [red]model[/]", model="[red]model[/]"),
    export("model-name-of-two-lines", 2, "there is no", model=at("two\nlines")),
    export("model-is-empty", 2, "MODEL is ''; it is a directory", model=""),
    export("empty-directory", 2, "holds no config.json", model=broken(lambda folder: [path.unlink() for path in folder.iterdir()])),
    export("config-broken", 2, "is not valid JSON", model=broken(write("config.json", '{"model_type": "llama",'))),
    export("config-not-text", 2, "is not valid JSON", model=broken(write("config.json", b"\xff\xfe\x00"))),
    export("config-nested-too-deep", 2, "is not valid JSON", model=broken(write("config.json", "[" * 100_000))),
    export("architecture-unknown", 2, "is unknown to transformers", model=broken(edit("config.json", model_type="hyperion"))),
    export("layers-absurd", 2, "num_hidden_layers is 1000000000; export", model=broken(edit("config.json", num_hidden_layers=10**9))),
    export("layers-absurd-in-a-part", 2, "text.n_layer is 10001", model=broken(edit("config.json", text={"n_layer": 10001}))),
    export("vocabulary-absurd", 2, "vocab_size is 1000000000000", model=broken(edit("config.json", vocab_size=10**12))),
    export("weights-truncated", 2, "truncated or broken", model=broken(cut("model.safetensors"))),
    export("weights-index-empty", 2, "found no weight_map", model=broken(write("model.safetensors.index.json", "{}"))),
    export("weights-index-a-list", 2, "found a list", model=broken(write("model.safetensors.index.json", "[]"))),
    export(
        "weights-index-of-numbers", 2, "no object of file", model=broken(write("model.safetensors.index.json", '{"weight_map": {"a": 3}}'))
    ),
    export("weights-missing", 2, "holds no weights", model=broken(lambda folder: (folder / "model.safetensors").unlink())),
    export("weights-pickled", 2, "pytorch_model.bin", model=broken(pickled)),
    export("weights-not-a-number", 2, "NaN", model=broken(not_a_number)),
    export("weights-of-another-shape", 2, "another shape than config.json says", model=broken(edit("config.json", intermediate_size=50))),
    export("remote-code", 2, "or give --trust-remote-code to run the model's own", model=broken(remote_code)),
    export("quantised", 2, "quantised weights", model=broken(edit("config.json", quantization_config={"quant_method": "gptq"}))),
    export("query-heads-no-multiple", 2, "4 query heads over 3 key heads", "--layers", "1", model=made("llama", num_key_value_heads=3)),
    export("heads-none", 2, "cannot", model=broken(edit("config.json", num_attention_heads=0, head_dim=None))),
    export("head-size-out-of-range", 2, "heads of size 514 and 514", "--layers", "1", model=made("llama", head_dim=514)),
    export("alibi", 2, "BloomForCausalLM does not go through", model=made("bloom")),
    export("softcap", 2, "softcap", "--layers", "1", model=made("gemma2")),
    export("sliding-window", 2, "sliding", "--layers", "1", model=made("mistral")),
    export("attention-sinks", 2, "sink", "--layers", "1", model=made("gpt_oss")),
    export("mask-of-its-own", 2, "chunked attention", "--layers", "1", model=made("llama4_text")),
]

_OUT = [
    export("out-is-a-file", 2, "is a file; give a folder", to=file("out")),
    export("out-is-a-link", 2, "is a link; give a folder", to=link),
    export("out-is-the-root", 2, "the root of the file system", to="/"),
    export("out-is-empty", 2, "OUT", to=""),
    export("out-is-the-model", 2, "is the directory MODEL", to=whole),
    export("out-in-the-model", 2, "lies in the directory MODEL", to=lambda place: place.whole / "out"),
    export("out-in-the-model-dry-run", 2, "lies in the directory MODEL", "--dry-run", to=lambda place: place.whole / "new" / "out"),
    export("out-in-the-model-by-a-link", 2, "lies in the directory MODEL", "--dry-run", to=_linked),
    export("out-holds-other-files-dry-run", 2, "which export-model did not write", "--dry-run", to=foreign("notes.txt")),
    export("out-holds-other-files", 2, "holds notes.txt, which export-model did not write", to=foreign("notes.txt")),
    export("out-holds-another-manifest", 2, "holds manifest.json, which export-model did not", to=foreign(MANIFEST)),
    export("out-is-being-written", 2, "another export-model (process 4711) is writing", patch=other_export),
    export("out-below-a-file", 2, "cannot be written", to=lambda place: file("file")(place) / "out"),
    export("out-in-a-system-folder", 2, "cannot be written", to="/proc/out"),
    export("out-name-too-long", 2, "cannot be written: File name too long", to=at("x" * 300)),
]

_OPTIONS = [
    export("range-reversed", 2, "1 <= min <= opt <= max", "--min-seq", "100", "--max-seq", "50"),
    export("opt-above-max", 2, "1 <= min <= opt <= max", "--opt-seq", "100", "--max-seq", "50"),
    export("sequence-zero", 2, "min 0", "--min-seq", "0"),
    export("sequence-huge", 2, "it takes 1 <= min <= opt <= max <=", "--max-seq", "99999999999999999999999"),
    export("batch-reversed", 2, "--batch is min 3", "--batch", "3,2,1"),
    export("batch-words", 2, "--batch is 'many'", "--batch", "many"),
    export("batch-superscript", 2, "--batch is '²'", "--batch", "²"),
    export("batch-negative", 2, "--batch is '-1'", "--batch=-1"),
    export("batch-empty", 2, "--batch is ''", "--batch", ""),
    export("block-size-out-of-range", 2, "block_size is 5; it takes an integer from 16 to 256", "--block-size", "5"),
    export("block-size-wrong-type", 2, "Invalid value for '--block-size' (given: 'big')", "--block-size", "big"),
    export("local-not-a-multiple", 2, "local_size 100 is not a multiple", "--local-size", "100"),
    export("stratified-two", 2, "stratified is 2", "--stratified", "2"),
    export("seed-negative", 2, "--seed is -1", "--seed", "-1"),
    export("seed-huge", 2, "--seed is", "--seed", "9" * 30),
    export("layers-too-high", 2, "there is no layer 7", "--layers", "0-7"),
    export("layers-far-too-high", 2, "there is no layer 99999999999", "--layers", "0-99999999999"),
    export("layers-backwards", 2, "runs backwards", "--layers", "1-0"),
    export("layers-words", 2, "--layers is 'most'", "--layers", "most"),
    export("layers-of-two-lines", 2, "--layers is '0\\n1'", "--layers", "0\n1"),
    export("preset-unknown", 2, "--preset is 'fast'", "--preset", "fast"),
    export("preset-in-brackets", 2, "--preset is '[bold]fast[/]'", "--preset", "[bold]fast[/]"),
    export("strict-sorted", 2, "strict_causal is 1 with selector sortlsh", "--strict-causal", "--selector", "sortlsh"),
    export("selector-unknown", 2, "selector is 'topk'", "--selector", "topk"),
    export("dtype-unknown", 2, "--dtype is 'int8'", "--dtype", "int8"),
    export("task-unknown", 2, "--task is 'embed'", "--task", "embed"),
    export("keep-exact-unknown", 2, "--keep-exact is 'torch'", "--keep-exact", "torch"),
    export("input-ids-unknown", 2, "--input-ids is 'words'", "--input-ids", "words"),
    export("option-unknown", 2, "No such option: --fast", "--fast"),
    export("option-misspelt", 2, "--max-seq", "--max-sek", "5"),
    Bad("argument-missing", 2, "Missing argument 'OUT'", "export-model", (whole,)),
]

_BYTES = ("--input-ids", "bytes", "--lengths", "64,20")
_CHECKS = [
    export("bytes-without-text", 2, "needs held-out text", "--input-ids", "bytes", "--validate"),
    export("timing-cache-missing", 2, "there is no file", "--timing-cache", "/nowhere.cache"),
    export("text-missing", 2, "there is no file", "--text", "/nowhere.txt"),
    export("text-empty", 2, "is empty; give held-out plain text", "--validate", "--text", file("text", b" \n"), *_BYTES),
    export("text-too-short", 2, "text has 5 tokens; the longest window needs 65", "--validate", "--text", file("text", b"words"), *_BYTES),
    export("text-too-short-for-the-usual-lengths", 2, "longest window needs", "--validate", "--text", file("text", b"words"), *_BYTES[:2]),
    _words("text-of-few-tokens", "text has 3 tokens; the longest window needs 65", "one two three" + " " * 99),
    _words("text-of-another-vocabulary", "text gives token 9999, the model knows", "other " * 99),
    export("text-without-a-tokenizer", 2, "holds no tokenizer files", "--validate", "--text", file("text")),
    export("lengths-words", 2, "--lengths is 'abc'", "--lengths", "abc"),
    export("lengths-superscript", 2, "--lengths is '64²'", "--lengths", "64²"),
    export("lengths-one-comma", 2, "--lengths is ','", "--lengths", ","),
    export("lengths-above-the-plan", 2, "--lengths names 513; the plan takes 2 to 512", "--lengths", "64,513"),
    export("lengths-below-the-plan", 2, "--lengths names 64; the plan takes 65 to 512", "--lengths", "64", "--min-seq", "65"),
    export("gate-unknown", 2, "--gate names 'speed'; the gates are", "--gate", "speed=2"),
    export("gate-without-a-number", 2, "it takes NAME=VALUE", "--gate", "kl"),
    export("gate-not-finite", 2, "--gate kl is nan", "--gate", "kl=nan"),
    export("gate-negative", 2, "--gate top1 is -1.0; it takes a number from 0 to 1", "--gate", "top1=-1"),
    export("gate-twice", 2, "--gate kl is given twice", "--gate", "kl=1", "--gate", "kl=2"),
    export("gate-of-another-kind", 2, "does not judge a report of kind language", "--gate", "cosine=0.9"),
    export("text-for-a-model-of-arrays", 2, "--text is for models that read text", "--text", file("text"), model=_TOWER),
    export("inputs-for-a-model-of-text", 2, "is judged on --text FILE", "--inputs", arrays(x=np.zeros(3))),
    export("device-unknown", 2, "--device is 'gpu'; it takes one of auto, cpu, cuda", "--device", "gpu"),
    export("device-cuda-without-one", 3, "PyTorch sees no CUDA device", "--device", "cuda", patch=no_cuda),
    export("engine-required-without-a-gpu", 3, "run it on a GPU host", "--require-engine", patch=no_cuda),
    export(
        "engine-of-heads-it-cannot-take", 2, "head_dim is 12", "--require-engine", "--dtype", "bf16", model=_HEADS_OF_12, patch=all_parts
    ),
    export(
        "cuda-for-heads-it-cannot-take",
        2,
        "head_dim is 12",
        "--device",
        "cuda",
        "--dtype",
        "bf16",
        "--validate",
        model=_HEADS_OF_12,
        patch=other_gpu,
    ),
    export("cuda-without-a-runtime", 3, "which is not installed either", "--device", "cuda", "--validate", patch=cuda_without_a_runtime),
    export("polygraphy-missing", 3, "polygraphy is not installed; pip install", "--validate", patch=no_polygraphy),
    export("library-missing", 3, "the result cannot be validated", "--validate", patch=no_libraries),
    export("library-not-a-library", 3, "cannot be loaded", "--validate", patch=library(lambda: b"not a library")),
    export("library-of-another-build", 3, f"has interface {ABI_VERSION + 1}", "--validate", patch=library(other_interface)),
]

_FOLDERS = [
    tool("inspect-nowhere", 2, "there is no folder", "inspect", at("nowhere")),
    tool("inspect-an-empty-folder", 2, "holds no manifest.json", "inspect", at("")),
    tool("inspect-no-onnx-file", 2, "no ONNX file", "inspect", file("model.onnx", b"\x0a\x03abc")),
    tool("inspect-an-empty-file", 2, "no ONNX file", "inspect", file("model.onnx", b"")),
    tool("manifest-broken", 2, "is broken", "inspect", spoilt(write(MANIFEST, '{"schema":'))),
    tool("manifest-newer", 2, "is of schema 99", "inspect", spoilt(edit(MANIFEST, schema=99))),
    tool("manifest-without-a-plan", 2, "does not fit this version", "inspect", spoilt(edit(MANIFEST, plan=None))),
    tool("manifest-outside-its-folder", 2, "is broken", "inspect", spoilt(edit(MANIFEST, files={"../x": {"sha256": ""}}))),
    tool("manifest-does-not-match", 3, "config.json; run `export-model` again", "inspect", spoilt(write("config.json", "{}"))),
    tool("report-missing", 2, "cannot be read", "report", finished),
    tool("report-damaged", 2, "is not a report", "report", spoilt(write(REPORT, '{"schema": 4'))),
    tool("report-newer", 2, "has report schema 99", "report", spoilt(write(REPORT, '{"schema": 99}'))),
    tool("report-older", 2, "has report schema 3", "report", spoilt(write(REPORT, '{"schema": 3}'))),
    tool("report-incomplete", 2, "is incomplete: it lacks", "report", spoilt(write(REPORT, '{"schema": 4}'))),
    tool("command-unknown", 2, "No such command 'valdate'. Did you mean 'validate'?", "valdate"),
    tool("doctor-with-an-argument", 2, "unexpected extra argument", "doctor", "now"),
]

_VALIDATE = [
    check("validate-nowhere", 2, "there is no folder", of=at("nowhere")),
    check("validate-changed-files", 2, "changed or missing since the export", of=spoilt(write("model.onnx", b""))),
    check("validate-another-model", 2, "has number of parameters", "--model", made("llama", num_hidden_layers=3)),
    check("validate-model-missing", 2, "there is no", "--model", at("nowhere")),
    check("validate-text-missing", 2, "does not exist", "--text", "/nowhere.txt"),
    check("validate-text-empty", 2, "is empty", "--text", file("text", b" \n")),
    check("validate-without-a-tokenizer", 2, "holds no tokenizer files", "--text", file("text", b"words " * 99)),
    check("validate-text-too-short", 2, "the longest window needs", "--text", file("text", b"\x03" * 30), of=spoilt(of_bytes)),
    check("validate-length-over-the-profile", 2, "was not exported; the folder takes 1 to 512", "--lengths", "513"),
    check("validate-length-zero", 2, "--lengths holds 0; it takes numbers of at least 2", "--lengths", "0"),
    check("validate-windows-do-not-fit", 2, "--windows has 2 numbers", "--lengths", "64", "--windows", "1,2"),
    check("validate-windows-words", 2, "--windows is 'one'", "--windows", "one"),
    check("validate-tail-zero", 2, "--tail holds 0; it takes numbers of at least 1", "--tail", "0"),
    check("validate-threads-negative", 2, "--threads is -1", "--threads", "-1"),
    check("validate-seed-huge", 2, "--seed is", "--seed", "9" * 30),
    check("validate-backend-unknown", 2, "--backend is 'cpu'", "--backend", "cpu"),
    check("validate-tensorrt-without-an-engine", 2, "holds no model.engine", "--backend", "tensorrt"),
    check("validate-on-cuda-without-one", 3, "PyTorch sees no CUDA device", "--device", "cuda", patch=no_cuda),
    check("validate-exact-engine-of-no-tensorrt", 2, "is for --backend tensorrt", "--exact-engine", at("engine"), "--lengths", "64"),
    check("validate-needle-of-tokens", 2, "--needle plants a prompt of bytes", "--needle", "--lengths", "64"),
    check("validate-needle-too-short", 2, "512 is too short", "--needle", "--text", file("text", b"\x03" * 600), of=spoilt(of_bytes)),
    check("validate-gate-needle-without-it", 2, "--gate needle judges what --no-needle leaves out", "--no-needle", "--gate", "needle=1"),
    check("engine-of-another-gpu", 3, "model.engine cannot run here", "--backend", "tensorrt", of=spoilt(other_engine), patch=other_gpu),
    check("engine-damaged", 2, "model.engine changed or missing", "--backend", "tensorrt", of=spoilt(damaged_engine)),
    check("engine-without-the-plugin", 3, "plugin", "--backend", "tensorrt", of=spoilt(engine_without_plugin), patch=other_gpu),
    check("onnxruntime-too-old", 3, "does not take libhyperattention_ort.so", "--lengths", "64", patch=old_onnxruntime),
]

_FUNCTIONS = [
    export("function-file-missing", 2, "there is no file", model=at("nowhere.py:build")),
    export("function-not-named", 2, "which names no function", model=file("tower.py")),
    export("function-not-there", 2, "has no 'build'; it defines built", model=code("def built(): ...")),
    export("function-not-a-function", 2, "is an int; it must be a function", model=code("build = 3")),
    export("function-with-arguments", 2, "cannot be called without arguments", model=code("def build(size): ...")),
    export("function-of-broken-code", 2, "SyntaxError at tower.py, line", model=code("def build(:")),
    export("function-raises", 2, "tower.py, line 17, in build: ZeroDivisionError", model=code("def build():\n    return 1 // 0")),
    export("function-ends-the-process", 2, "failed at tower.py", model=code("def build():\n    raise SystemExit(0)")),
    export("function-returns-nothing", 2, "returned None; it returns (module, example inputs)", model=code("def build(): ...")),
    export("function-returns-a-module-alone", 2, "returned a module alone", model=code("def build(): return Tower()")),
    export("function-returns-no-module", 2, "is a str; it takes a torch.nn.Module", model=code("def build(): return 'Tower', (1,)")),
    export("function-examples-no-tuple", 2, "are a tensor", model=code("def build(): return Tower(), torch.randn(1, 24, 16)")),
    export("function-examples-no-tensors", 2, "is an int; every example is a tensor", model=code("def build(): return Tower(), (3,)")),
    export(
        "function-examples-do-not-fit", 2, "fails on its example inputs", model=code("def build(): return Tower(), (torch.ones(1, 4, 5),)")
    ),
    export(
        "function-without-attention",
        2,
        "scaled_dot_product_attention",
        model=code("def build(): return nn.Linear(4, 4), (torch.ones(2, 4),)"),
    ),
    export("function-with-a-task", 2, "leave --task out", "--task", "features", model=_TOWER),
    export("dim-unknown", 2, "has no dimension 'width'", "--dim", "width=1,2,3", model=_TOWER),
    export("dim-without-numbers", 2, "--dim", "--dim", "sequence=wide", model=_TOWER),
    export("dim-over-its-range", 2, "is asked from 3 to 65", "--dim", "sequence=3,24,65", model=_TOWER),
    export("dim-of-a-directory", 2, "--dim", "--dim", "sequence=1,2,3"),
    export("image-size-of-a-language-model", 2, "--image-size", "--image-size", "224"),
    export("image-size-words", 2, "--image-size", "--image-size", "big"),
]

_FEEDS = [
    _inputs("inputs-over-the-profile", "length 65 was not exported", np.zeros((1, 65, 16), np.float32)),
    _inputs("inputs-empty", "has shape [1, 0, 16]", np.zeros((1, 0, 16), np.float32)),
    _inputs("inputs-of-another-shape", "has shape [1, 24, 17]", np.zeros((1, 24, 17), np.float32)),
    _inputs("inputs-not-a-number", "NaN", np.full((1, 24, 16), np.nan, np.float32)),
    _inputs("inputs-of-words", "array x is", np.full((1, 24, 16), "word")),
    _feed("inputs-of-another-name", 2, "holds y; the exported model takes x", "--inputs", arrays(y=np.zeros((1, 24, 16), np.float32))),
    _feed("inputs-missing", 2, "does not exist", "--inputs", at("inputs.npz")),
    _feed("inputs-no-npz", 2, "cannot be read as an .npz file", "--inputs", file("inputs.npz")),
    _feed("inputs-beside-text", 2, "are given together", "--inputs", arrays(x=np.zeros((1, 24, 16), np.float32)), "--text", file("text")),
    _feed("text-for-no-text-model", 2, "--text is for models that read text", "--text", file("text")),
    check("inputs-for-a-language-model", 2, "a language model (logits) is judged on --text FILE", "--inputs", at("inputs.npz")),
]

_BENCH = [
    tool("bench-of-nothing", 2, "neither was given", "bench"),
    tool("bench-of-both", 2, "both were given", "bench", finished, "--attention"),
    tool("bench-nowhere", 2, "there is no folder", "bench", at("nowhere")),
    tool("bench-options-of-the-other", 2, "belong to bench with", "bench", finished, "--heads", "4"),
    tool("bench-heads-do-not-divide", 2, "is not a multiple of --kv-heads", "bench", "--attention", "--heads", "4", "--kv-heads", "3"),
    tool("bench-head-size-out-of-range", 2, "--head-dim", "bench", "--attention", "--head-dim", "514"),
    tool("bench-length-zero", 2, "--lengths names 0", "bench", "--attention", "--lengths", "0"),
    tool("bench-repeats-zero", 2, "--repeats is 0", "bench", "--attention", "--repeats", "0"),
    tool("bench-strict-full", 2, "strict_causal is 1 with causal 0", "bench", "--attention", "--strict-causal", "--full"),
    tool("bench-preset-unknown", 2, "--preset is 'fast'", "bench", "--attention", "--preset", "fast"),
    tool("bench-rival-unknown", 2, "--rivals is 'flash'", "bench", "--attention", "--rivals", "flash"),
    tool("bench-rival-to-divide-by-unknown", 2, "--against is", "bench", "--attention", "--against", "flash", "--lengths", "64"),
    tool("bench-dtype-unknown", 2, "--dtype", "bench", "--attention", "--dtype", "int8"),
    tool("bench-over-the-profile", 2, "513", "bench", finished, "--lengths", "513"),
    tool("bench-into-the-output", 2, "is an output of export-model", "bench", finished, "--output", finished),
    tool("bench-into-a-folder-of-the-output", 2, "give a folder outside it", "bench", finished, "--output", lambda p: p.finished / "bench"),
    tool("bench-alone-into-an-output", 2, "is an output of export-model", "bench", "--attention", "--output", finished),
    tool("bench-output-a-file", 2, "is no folder; it takes one", "bench", "--attention", "--output", file("made")),
    tool("bench-output-below-a-file", 2, "is no folder", "bench", finished, "--output", lambda p: file("made")(p) / "bench"),
    tool("compare-with-nowhere", 2, "there is no folder", "compare", finished, at("nowhere")),
    tool("compare-with-no-output", 2, "holds no manifest.json", "compare", at(""), finished),
    tool("compare-one", 2, "Missing argument 'OUT2'", "compare", finished),
    tool("compare-page-in-an-export", 2, "which holds only", "compare", finished, finished, "--html", lambda p: p.finished / "page.html"),
    tool("compare-page-nowhere", 2, "cannot be written", "compare", finished, finished, "--html", at("nowhere/page.html")),
    tool("report-gate-without-recheck", 2, "add --recheck", "report", finished, "--gate", "kl=1"),
]

_TEXT = file("text.txt", b"2 + 3 = 5\n" * 2000)
_SMALL = ("--fix", "exact_below=32", "--fix", "local_size=32", "--fix", "block_size=16", "--fix", "sinks=4", "--length", "500")


def _policy(name: str, words: str, *options: Argument, model: Argument = whole, code: int = 2, patch: Patch | None = None) -> Bad:
    """A row of hyperattention policy on the tiny model, whose text is text.txt."""
    given = ("--text", _TEXT, "--input-ids", "bytes", "--out", at("p.json"), *_SMALL, *options)
    return Bad(f"policy-{name}", code, words, "hyperattention", ("policy", model, *given), patch)


_POLICY = [
    _policy("length-zero", "--length is 0; it takes 2 to 16777216", "--length", "0"),
    _policy("length-negative", "--length is -5", "--length", "-5"),
    _policy("length-where-nothing-approximates", "no setting approximates at 33 tokens", "--length", "33"),
    _policy("text-shorter-than-the-calibration", "calibration needs 24,048, and may have half", "--windows", "48"),
    _policy("windows-zero", "--windows is 0; it takes 1 to 1024", "--windows", "0"),
    _policy("tail-zero", "--tail is 0", "--tail", "0"),
    _policy("tail-over-half", "--tail is 251; it takes 1 to 250, half of a window of 500", "--tail", "251"),
    _policy("probes-zero", "--probes is 0; it takes 1 to 64", "--probes", "0"),
    _policy("seed-negative", "--seed is -1", "--seed", "-1"),
    _policy("dtype-unknown", "--dtype is 'int8'", "--dtype", "int8"),
    _policy("dtype-of-a-gpu", "--dtype bf16: the CPU kernels compute in fp32", "--dtype", "bf16", "--device", "cpu"),
    _policy("device-unknown", "--device is 'gpu'", "--device", "gpu"),
    _policy("cuda-without-one", "PyTorch sees no CUDA device", "--device", "cuda", code=3, patch=no_cuda),
    _policy("keys-out-of-reach", "--budget keys=9: the cheapest setting has", "--budget", "keys=9"),
    _policy("budget-unknown", "--budget names 'loss'", "--budget", "loss=1"),
    _policy("needle-too-short", "plants prompts of at least 1", "--budget", "needle=1"),
    _policy("needle-of-tokens", "--budget needle plants a prompt of bytes", "--budget", "needle=1", "--input-ids", "tokens"),
    _policy("fix-of-the-model", "--fix names 'causal'", "--fix", "causal=0"),
    _policy("text-missing", "does not exist", "--text", at("nowhere.txt")),
    _policy("text-empty", "is empty", "--text", file("empty.txt", b" ")),
    _policy("text-a-folder", "does not exist", "--text", at("")),
    _policy("model-of-a-function", "is chosen by the next token", model=_TOWER),
    _policy("out-in-the-model", "lies in the directory MODEL", "--out", lambda place: place.whole / "p.json"),
    _policy("out-in-an-export", "an output of export-model", "--out", lambda place: place.finished / "p.json"),
    _policy("out-a-folder", "is no place for a file", "--out", at("")),
    _policy("out-nowhere", "a folder that exists", "--out", at("nowhere/p.json")),
    _policy("out-read-only", "cannot be written", "--out", "/proc/p.json"),
    _policy("out-name-too-long", "too long", "--out", at("x" * 252)),
    _policy("out-another-file", "that `hyperattention policy` did not write", "--out", file("notes", b"{}")),
    _policy("out-beside-another-file", "writes notes.jsonl", "--out", lambda place: file("notes.jsonl")(place).with_name("notes")),
    _policy("out-the-text", "which is the --text", "--out", at("text.txt")),
    _policy("text-where-it-measures", "which is the --text", "--out", at("data"), "--text", file("data.jsonl", b"2 + 3 = 5\n" * 999)),
    export(
        "policy-calibration-length-zero", 2, "--calibration-length is 0", "--layers", "auto", "--text", _TEXT, "--calibration-length", "0"
    ),
    export("policy-length-by-hand", 2, "--calibration-length: the layers are chosen by", "--calibration-length", "0"),
    export("policy-truncated", 2, "is no JSON", "--layers", "auto", "--policy", file("p.json", b'{"schema": 2, "layers": [')),
    export("policy-of-a-list", 2, "is no policy of this version", "--layers", "auto", "--policy", file("p.json", b"[1]")),
    export("policy-newer", 2, "is of schema 99", "--layers", "auto", "--policy", file("p.json", b'{"schema": 99}')),
    export("policy-not-text", 2, "is no JSON", "--layers", "auto", "--policy", file("p.json", b"\xff\xfe\x00")),
    export("policy-a-folder", 2, "cannot be read", "--layers", "auto", "--policy", at("")),
    export("policy-changed-by-hand", 2, "changed after it was measured", "--layers", "auto", "--policy", changed_policy),
]

BAD = [*_MODELS, *_OUT, *_OPTIONS, *_CHECKS, *_FOLDERS, *_VALIDATE, *_FUNCTIONS, *_FEEDS, *_BENCH, *_POLICY]
