"""Proof of what ran: every planned layer went through our library, not through the exact body that the file also carries.

ONNX Runtime quietly inlines the node's function body when the library is missing, and TensorRT parsers may prefer the
body to the plugin. Both give right-looking, exact and slow results, so a run counts only with this proof.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from hyperattention.config import OP_TYPE, Config
from hyperattention.errors import EnvironmentFault
from hyperattention.export.onnx_graph import hyper_nodes
from hyperattention.export.onnx_schema import attribute_values
from hyperattention.export.plan import ExportPlan
from hyperattention.validate.configs import configs
from hyperattention.validate.onnx_file import read_onnx

_MEND = "run `hyperattention doctor`, rebuild the library it names and export again"


@dataclass(frozen=True)
class Proof:
    """What one backend ran: how many layers were planned as the op, which nodes of ours ran, and how often each."""

    runner: str
    source: str
    planned: int
    found: tuple[str, ...]
    runs: int

    def to_json(self) -> dict:
        return asdict(self)


def check_graph(model: Path, plan: ExportPlan) -> list[str]:
    """Names of the HyperAttention nodes of an ONNX file, whose attributes must be the plan's, layer by layer.

    Raises EnvironmentFault where the count or an attribute differs, UsageError where the file is missing or broken.
    """
    nodes = hyper_nodes(read_onnx(model))
    planned = configs(plan.planned)
    if len(nodes) != len(planned):
        raise EnvironmentFault(f"{model.name} holds {len(nodes)} {OP_TYPE} nodes, the plan {len(planned)}; export again")
    for node, layer, config in zip(nodes, plan.planned, planned, strict=True):
        # An attribute that is not there has the operator's default.
        given, expected = {**Config().attributes(), **attribute_values(node)}, config.attributes()
        # The scale is stored as float32.
        wrong = {name: (given[name], value) for name, value in expected.items() if not _same(given[name], value)}
        if wrong:
            name, (found, wanted) = next(iter(wrong.items()))
            raise EnvironmentFault(f"{node.name} (layer {layer.index}) has {name} {found}, the plan says {wanted}; export again")
    return [node.name for node in nodes]


def _same(a: object, b: object) -> bool:
    return abs(a - b) <= 1e-6 * abs(b) if isinstance(b, float) and isinstance(a, float) else a == b


def ort_proof(runner: str, profile: Path, nodes: list[str], runs: int, provider: str = "CPUExecutionProvider") -> Proof:
    """Reads ONNX Runtime's profile of a session: each of `nodes` must have run as our kernel for `provider` in each of `runs` runs.

    Raises EnvironmentFault otherwise, telling an inlined function body apart from a node that ran elsewhere or is missing.
    """
    events = json.loads(profile.read_text())
    kernels = [e for e in events if e.get("cat") == "Node" and e.get("name", "").endswith("_kernel_time")]
    ours = [e for e in kernels if e.get("args", {}).get("op_name") == OP_TYPE]
    counted = Counter(e["name"].removesuffix("_kernel_time") for e in ours)
    elsewhere = sorted({str(e["args"].get("provider")) for e in ours} - {provider})
    if elsewhere:
        raise EnvironmentFault(f"{runner} ran {OP_TYPE} nodes on {', '.join(elsewhere)}, planned was {provider}; {_MEND}")
    if counted != Counter({name: runs for name in nodes}):
        others = sorted({e["args"].get("op_name", "?") for e in kernels if e.get("args", {}).get("op_name") != OP_TYPE})
        raise EnvironmentFault(
            f"{runner} ran {len(counted)} {OP_TYPE} nodes {len(ours)} times, planned were {len(nodes)} nodes in {runs} runs. "
            f"Where a node is missing, ONNX Runtime ran its exact function body instead (operators seen: {', '.join(others) or 'none'}); "
            f"{_MEND}"
        )
    return Proof(runner, f"ONNX Runtime profile, {provider}", len(nodes), tuple(sorted(counted)), runs)


def engine_proof(runner: str, layers: list[str], planned: int, runs: int) -> Proof:
    """`layers`: names of the engine's HyperAttention plugin layers. Raises EnvironmentFault unless they are as many as planned."""
    if len(layers) != planned:
        raise EnvironmentFault(
            f"the TensorRT engine holds {len(layers)} {OP_TYPE} plugin layers ({', '.join(layers) or 'none'}), planned were {planned}: "
            f"it would run something else than was built; {_MEND}"
        )
    return Proof(runner, "TensorRT engine inspector", planned, tuple(layers), runs)
