"""Polygraphy runners that share one contract: a tensor for each of plan.inputs in, one for each of plan.outputs out, by name.

Polygraphy's own runners cannot load a custom-op library into ONNX Runtime and prove of neither runtime what ran, so ours
exist beside its base class. Feeds and answers are torch tensors. The TensorRT runner is in runner_trt.py.
"""

from __future__ import annotations

import gc
import shutil
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path

import torch
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from torch import Tensor, nn

from hyperattention.config import INT32_MAX
from hyperattention.errors import EnvironmentFault
from hyperattention.export.onnx_graph import hyper_nodes
from hyperattention.export.plan import ExportPlan
from hyperattention.export.source import ReplacedModel
from hyperattention.validate.operators import Operator
from hyperattention.validate.ort_session import open_session, provider_of, run_bound, session_options
from hyperattention.validate.provenance import Proof, ort_proof
from hyperattention.validate.signature import check_feed, input_dtype


class ModelRunner(BaseRunner):
    """Refuses a feed that was not exported, before the runtime sees it; subclasses answer `infer_impl` and set `inference_time`."""

    backend = ""

    def __init__(self, plan: ExportPlan, name: str) -> None:
        super().__init__(name=name)
        self.plan = plan

    def infer(self, feed_dict: Mapping[str, Tensor], check_inputs: bool = True, *args, **kwargs) -> OrderedDict:
        """The outputs by name. Raises UsageError for a feed that `check_feed` refuses, EnvironmentFault where the runtime fails."""
        if check_inputs:
            check_feed(self.plan, feed_dict)
        return super().infer(feed_dict, False, *args, **kwargs)

    @property
    def seconds(self) -> float:
        """Wall time of the last run, without moving inputs to the device."""
        if self.inference_time is None:
            raise RuntimeError(f"{self.name} has not run")
        return self.inference_time

    def get_input_metadata_impl(self) -> TensorMetadata:
        metadata = TensorMetadata()
        for entry in self.plan.inputs:
            shape = [None if isinstance(size, str) else size for size in entry.shape]
            metadata.add(entry.name, str(input_dtype(self.plan, entry)).removeprefix("torch."), shape)
        return metadata

    def prove(self) -> Proof | None:
        """What ran since activation; None where there is nothing to mistake. Raises EnvironmentFault for a wrong thing."""
        return None

    def _by_plan(self, answer: Mapping[str, Tensor]) -> OrderedDict:
        """The outputs in the plan's order. Raises EnvironmentFault where they are others."""
        if set(answer) != set(self.plan.outputs):
            raise EnvironmentFault(f"{self.name} answers {', '.join(answer)}, the plan says {', '.join(self.plan.outputs)}; export again")
        return OrderedDict((name, answer[name]) for name in self.plan.outputs)


# What a model answers to a feed on its device, by name.
Forward = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


class TorchRunner(ModelRunner):
    """The model in PyTorch: exact attention in every layer (operator None), or the plan's layers through `operator`.

    `forward` answers in place of the task's own outputs (`replaced.run`), for what the exported graph leaves out.
    """

    def __init__(
        self,
        replaced: ReplacedModel,
        operator: Operator | None,
        name: str,
        forward: Forward | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(replaced.plan, name)
        self.replaced, self.operator, self.forward = replaced, operator, forward
        self.device = device or device_of(replaced.model)
        self.backend = "PyTorch SDPA, exact" if operator is None else f"PyTorch, op by {operator.name}"

    def infer_impl(self, feed_dict: Mapping[str, Tensor]) -> OrderedDict:
        given = {name: value.to(self.device) for name, value in feed_dict.items()}
        synchronise(self.device)
        start = time.perf_counter()
        with torch.inference_mode(), self.replaced.mode("exact" if self.operator is None else "plan", attention=self.operator):
            answer = OrderedDict((self.forward or self.replaced.run)(given))
        synchronise(self.device)
        self.inference_time = time.perf_counter() - start
        return answer if self.forward else self._by_plan(answer)


class OrtRunner(ModelRunner):
    """ONNX Runtime with our library on the processor or a GPU, profiled from start to end so that `prove` can say what ran.

    `exact` = the same file with exact_below raised in memory: the rival on equal terms. `library` None loads no library,
    which is what a careless deployment does; `prove` then raises.
    """

    def __init__(
        self,
        plan: ExportPlan,
        model: Path,
        library: Path | None,
        nodes: list[str],
        name: str,
        exact: bool = False,
        threads: int = 0,
        device: torch.device = torch.device("cpu"),
    ) -> None:
        super().__init__(plan, name)
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
            for node in hyper_nodes(proto):
                kept = [a for a in node.attribute if a.name != "exact_below"]
                del node.attribute[:]
                node.attribute.extend([*kept, onnx.helper.make_attribute("exact_below", INT32_MAX)])
        return proto.SerializeToString()

    def infer_impl(self, feed_dict: Mapping[str, Tensor]) -> OrderedDict:
        answer, self.inference_time = run_bound(self.session, feed_dict, self.device)
        self.runs += 1
        return self._by_plan(answer)

    def prove(self) -> Proof:
        profile = Path(self.session.end_profiling())
        return ort_proof(self.name, profile, self.nodes, self.runs, provider_of(self.device))

    def deactivate_impl(self) -> None:
        del self.session
        shutil.rmtree(self.folder, ignore_errors=True)
        del self.folder, self.runs
        gc.collect()


def device_of(module: nn.Module) -> torch.device:
    """Where the module's first parameter or buffer lies; the processor where it has none."""
    return next((tensor.device for tensor in chain(module.parameters(), module.buffers())), torch.device("cpu"))


def synchronise(device: torch.device) -> None:
    """Waits for the device's work, so that wall time means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
