"""Which model it is: a digest of every weight, and one of what config.json says, so that a policy is known to be of this model.

The weights are read from the files as they are stored, whole: a fine-tuned copy may differ in a few rows of one tensor, which a sample of
the bytes would miss, and an export reads the files whole in any case. Names, shapes, stored types and bytes count; how tensors are split
over files, in which order they stand, the dtype that a run loads them in, and the machine do not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyperattention.export.files import digest, sha256
from hyperattention.export.model_files import weight_files

if TYPE_CHECKING:
    from hyperattention.export.source import Source

_CHUNK = 2**24
# Of config.json: who saved it, and what a run decides itself.
_NOT_THE_MODEL = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")
WEIGHTS, CONFIG, CODE = "weights", "config.json", "the code beside it"


def identity(source: "Source") -> dict[str, str]:
    """sha256 by part: WEIGHTS, CONFIG, and CODE where there is some. Of a function's model `Source.content`."""
    folder = source.directory
    if folder is None:
        return source.content()
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    code = {file.name: sha256(file) for file in sorted(folder.glob("*.py"))}
    return {
        WEIGHTS: digest(_weights(folder)),
        CONFIG: digest({name: value for name, value in config.items() if name not in _NOT_THE_MODEL}),
        **({CODE: digest(code)} if code else {}),
    }


def _weights(folder: Path) -> dict[str, Any]:
    """By tensor: stored type, shape, sha256 of its bytes. A pickled file, whose tensors only code can tell, counts as one."""
    found: dict[str, Any] = {}
    for file in weight_files(folder):
        found |= dict(_tensors(file)) if file.suffix == ".safetensors" else {file.name: sha256(file)}
    return found


def _tensors(path: Path) -> Iterator[tuple[str, Any]]:
    """Of a safetensors file: 8 bytes with the size of a JSON header, the header, and the bytes at the offsets it names."""
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start - 8))
        for name, tensor in header.items():
            if name == "__metadata__":
                continue
            low, high = tensor["data_offsets"]
            file.seek(start + low)
            told = hashlib.sha256()
            for at in range(low, high, _CHUNK):
                told.update(file.read(min(_CHUNK, high - at)))
            yield name, [tensor["dtype"], tensor["shape"], told.hexdigest()]
