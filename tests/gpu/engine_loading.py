"""Loads the plugin in one way, runs a saved engine of one node and prints a digest of what it gives. Run by engine_lifecycle.py.

    python tests/gpu/engine_loading.py static+runtime ENGINE LIBRARY

static: the library is opened. dynamic: TensorRT's registry loads it. runtime: the registry of the runtime that reads the engine
loads it, as trtexec --dynamicPlugins does.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import sys
from pathlib import Path

import tensorrt as trt
import torch
from engine_parts import Heads, Runner, random_inputs

from hyperattention.config import OP_TYPE


def main() -> None:
    how, engine, library = sys.argv[1:4]
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    registry = trt.get_plugin_registry()
    loaded = {}
    for way in how.split("+"):
        if way == "static":
            loaded[way] = bool(ctypes.CDLL(library))
        else:
            loaded[way] = (registry if way == "dynamic" else runtime.get_plugin_registry()).load_library(library) is not None
    made = runtime.deserialize_cuda_engine(Path(engine).read_bytes())
    assert made is not None, f"{how}: the engine was not read; loaded: {loaded}"
    found = Runner(trt, made)(**random_inputs(Heads(), 1, 3001, torch.bfloat16, None, seed=5))["o"]
    digest = hashlib.sha256(found.view(torch.int16).cpu().numpy().tobytes()).hexdigest()
    creators = [creator.name for creator in registry.all_creators].count(OP_TYPE)
    print(json.dumps({"digest": digest, "creators": creators, "loaded": loaded}))


if __name__ == "__main__":
    main()
