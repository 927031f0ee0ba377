"""Polygraphy runners that share one contract: feed {"input_ids" [B, S], "lengths" [B]}, answer {"logits" [B, S or 1, vocabulary]}.

Polygraphy's own runners cannot load a custom-op library into ONNX Runtime and prove of neither runtime what ran, so ours
exist beside its base class. Feeds and answers are torch tensors. The TensorRT runner is in runner_trt.py.
"""

from __future__ import annotations

import gc
import shutil
import tempfile
import time
from collections import OrderedDict
from pathlib import Path

import torch
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from torch import Tensor

from hyperattention.config import DOMAIN, INT32_MAX, OP_TYPE
from hyperattention.export.patch import Patched
from hyperattention.validate.operators import Operator
from hyperattention.validate.ort_session import open_session, provider_of, run_bound, session_options
from hyperattention.validate.provenance import Proof, ort_proof

INPUTS = (("input_ids", "int64", (None, None)), ("lengths", "int32", (None,)))


def feed(input_ids: Tensor, lengths: Tensor | None = None) -> OrderedDict:
    """The feed of `input_ids` int [B, S]; `lengths` int [B] defaults to S."""
    full = torch.full((input_ids.shape[0],), input_ids.shape[1], dtype=torch.int32)
    return OrderedDict(input_ids=input_ids.long(), lengths=full if lengths is None else lengths.to(torch.int32))


class ModelRunner(BaseRunner):
    """Inputs that every runner takes; subclasses answer `infer_impl` and set `inference_time` in seconds."""

    backend = ""

    @property
    def seconds(self) -> float:
        """Wall time of the last run, without moving inputs to the device."""
        if self.inference_time is None:
            raise RuntimeError(f"{self.name} has not run")
        return self.inference_time

    def get_input_metadata_impl(self) -> TensorMetadata:
        metadata = TensorMetadata()
        for name, dtype, shape in INPUTS:
            metadata.add(name, dtype, shape)
        return metadata

    def prove(self) -> Proof | None:
        """What ran since activation; None where there is nothing to mistake. Raises EnvironmentFault for a wrong thing."""
        return None


class TorchRunner(ModelRunner):
    """The model in PyTorch: exact attention in every layer (operator None), or the plan's layers through `operator`."""

    def __init__(self, patched: Patched, operator: Operator | None, name: str) -> None:
        super().__init__(name=name)
        self.patched, self.operator = patched, operator
        self.backend = "PyTorch SDPA, exact" if operator is None else f"PyTorch, op by {operator.name}"

    def infer_impl(self, feed_dict: dict) -> OrderedDict:
        device = next(self.patched.model.parameters()).device
        ids, lengths = feed_dict["input_ids"].to(device), feed_dict["lengths"].to(device)
        lengths = None if bool((lengths == ids.shape[1]).all()) else lengths
        synchronise(device)
        start = time.perf_counter()
        with torch.inference_mode(), self.patched.mode("exact" if self.operator is None else "plan", attention=self.operator):
            logits = self.patched.forward(ids, lengths).logits
        synchronise(device)
        self.inference_time = time.perf_counter() - start
        return OrderedDict(logits=logits)


class OrtRunner(ModelRunner):
    """ONNX Runtime with our library on the processor or a GPU, profiled from start to end so that `prove` can say what ran.

    `exact` = the same file with exact_below raised in memory: the rival on equal terms. `library` None loads no library,
    which is what a careless deployment does; `prove` then raises.
    """

    def __init__(
        self,
        model: Path,
        library: Path | None,
        nodes: list[str],
        name: str,
        exact: bool = False,
        threads: int = 0,
        device: torch.device = torch.device("cpu"),
    ) -> None:
        super().__init__(name=name)
        self.model, self.library, self.nodes, self.exact, self.threads, self.device = model, library, nodes, exact, threads, device
        self.backend = f"ONNX Runtime, {device.type.upper()}"

    def activate_impl(self) -> None:
        self.runs, self.folder = 0, Path(tempfile.mkdtemp(prefix="hyperattention-"))
        options = session_options(self.library, self.model.parent)
        options.enable_profiling = True
        options.profile_file_prefix = str(self.folder / "profile")
        options.intra_op_num_threads = self.threads
        self.session = open_session(self._bytes(), options, self.device, self.model.name)

    def _bytes(self) -> bytes:
        import onnx

        proto = onnx.load(str(self.model), load_external_data=False)
        if self.exact:
            for node in proto.graph.node:
                if node.op_type == OP_TYPE and node.domain == DOMAIN:
                    kept = [a for a in node.attribute if a.name != "exact_below"]
                    del node.attribute[:]
                    node.attribute.extend([*kept, onnx.helper.make_attribute("exact_below", INT32_MAX)])
        return proto.SerializeToString()

    def infer_impl(self, feed_dict: dict) -> OrderedDict:
        answer, self.inference_time = run_bound(self.session, feed_dict, self.device)
        self.runs += 1
        return answer

    def prove(self) -> Proof:
        profile = Path(self.session.end_profiling())
        return ort_proof(self.name, profile, self.nodes, self.runs, provider_of(self.device))

    def deactivate_impl(self) -> None:
        del self.session
        shutil.rmtree(self.folder, ignore_errors=True)
        del self.folder, self.runs
        gc.collect()


def synchronise(device: torch.device) -> None:
    """Waits for the device's work, so that wall time means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
