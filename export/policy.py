"""policy.json: which layers approximate and how, what that was measured to cost, and on which part of which text.

`hyperattention policy` writes it (validate/policy), `export-model --layers auto` puts it into the plan and so into the manifest and the
ONNX nodes. What was measured holds for one model and for what was written: the policy of another model, of other weights (identity.py),
and one that was changed since are refused. Where it is used otherwise than it was measured, `Policy.notes` says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyperattention.config import Config
from hyperattention.errors import UsageError
from hyperattention.export.files import digest, write_whole
from hyperattention.export.identity import identity

if TYPE_CHECKING:
    from hyperattention.export.plan import ExportPlan
    from hyperattention.export.source import Source

FILE = "policy.json"
SCHEMA = 2
DECIDED = ("causal", "scale", "seed")  # attributes that the model and the export decide, never a policy
_AGAIN = "run `hyperattention policy` again"


@dataclass(frozen=True)
class LayerPolicy:
    """One attention layer: attributes on top of its own mask, scale and seed (None: exact), and why.

    keys: keys per query at the calibration length. predicted_kl: what this layer alone adds, nats a token, in the first regime that
    the budget limits.
    """

    index: int
    name: str
    attributes: dict[str, Any] | None
    keys: float
    predicted_kl: float

    @property
    def reason(self) -> str:
        """For the plan."""
        at = f"{self.keys:,.0f} keys a query"
        return f"policy: exact, {at}" if self.attributes is None else f"policy: {at}, predicted KL {self.predicted_kl:.2g} nats"


@dataclass(frozen=True)
class Policy:
    """The choice for every layer that the operator can replace, and what it rests on.

    identity: `identity` of the model. budget: `Budget.to_json`. calibration: text (name, sha256, from, to in tokens), length, windows,
    dtype, device. verified: the joint choice, measured by whole forward passes. pareto: joint choices by rising cost, {"keys",
    "predicted_kl"}. fixed: settings that all layers share, as far as they were measured whole. rounding: as verified, of exact attention
    by other kernels; None in fp32. times: {"exact_ms", "ms"} of all layers' attention where time was the cost. rivals: settings of
    equal keys beside the policy on text that the search has not read (validate/policy/rivals.py). All JSON values.
    """

    model: str
    architecture: str
    identity: dict[str, str]
    budget: dict[str, Any]
    calibration: dict[str, Any]
    layers: tuple[LayerPolicy, ...]
    keys: float
    exact_keys: float
    predicted_kl: float
    verified: dict[str, Any]
    pareto: tuple[dict[str, Any], ...]
    fixed: tuple[dict[str, Any], ...]
    rounding: dict[str, Any] | None
    times: dict[str, float] | None
    rivals: dict[str, Any] | None
    fingerprint: str

    def to_json(self) -> dict[str, Any]:
        """The policy as JSON values, with a digest of them all."""
        found = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return {"schema": SCHEMA, **found, "digest": digest(found)}

    @classmethod
    def from_json(cls, data: Any, name: str = FILE) -> "Policy":
        """The inverse of `to_json`. Raises UsageError, calling it `name`, where it was not written by this version's `to_json`, or was
        changed since."""
        try:
            if data["schema"] != SCHEMA:
                raise UsageError(f"{name} is of schema {data['schema']}, this version reads {SCHEMA}; {_AGAIN}")
            found = {key: value for key, value in data.items() if key not in ("schema", "digest")}
            written = digest(found)
            layers = tuple(LayerPolicy(**layer) for layer in found.pop("layers"))
            for layer in layers:
                _check_attributes(layer, name)
            if data["digest"] != written:
                raise UsageError(
                    f"{name} was changed after it was measured (digest {data['digest']!r:.15}, of what it holds {written!r:.15}); its "
                    f"losses and costs hold as it was written: take the file as it was, {_AGAIN}, or choose by hand (--layers 0-3,7)"
                )
            return cls(**{**found, "layers": layers, "pareto": tuple(found["pareto"]), "fixed": tuple(found["fixed"])})
        except (KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{name} is no policy of this version ({error}); {_AGAIN}") from error

    def check(self, source: "Source") -> None:
        """Raises UsageError where `source` is another model than the one that was measured; reads all its weights."""
        wanted = [(layer.index, layer.name) for layer in source.layers if layer.problem is None]
        found = [(layer.index, layer.name) for layer in self.layers]
        if self.architecture != source.architecture or wanted != found:
            raise UsageError(
                f"the policy was measured on {self.model} ({self.architecture}, {len(found)} attention layers), not on {source.name} "
                f"({source.architecture}, {len(wanted)}); run `hyperattention policy` on this model, or leave --task as it was measured"
            )
        here = identity(source)
        other = [part for part in dict.fromkeys((*self.identity, *here)) if self.identity.get(part) != here.get(part)]
        if other:
            told = ", ".join(f"{part} {_short(self.identity.get(part))} measured, {_short(here.get(part))} here" for part in other)
            raise UsageError(
                f"the policy was measured on another model of this shape: {told} (sha256). It takes the very model it was measured on, "
                f"{self.model}; give that, or run `hyperattention policy` on {source.name}"
            )

    def notes(self, plan: "ExportPlan") -> tuple[str, ...]:
        """How `plan` uses the policy otherwise than it was measured, one sentence each; allowed, but nobody measured it."""
        at, found = self.calibration, []
        length, (shortest, _, longest) = at["length"], plan.seq
        if longest > length:
            found.append(
                f"sequences up to {longest:,} tokens are exported and the policy was measured at {length:,}, {longest / length:.3g} times "
                f"fewer: its error grows with the length, its figures hold at {length:,}; measure longer windows, or lower --max-seq"
            )
        elif longest < length:
            found.append(
                f"sequences of {shortest:,} to {longest:,} tokens are exported and the policy was measured at {length:,}: keys and losses "
                f"are those at {length:,}"
            )
        tokens = {"bytes": "bytes", "tokenizer": "tokens"}.get(at["tokens"], at["tokens"])
        pairs = (("--dtype", at["dtype"], plan.dtype), ("--seed", at["seed"], plan.seed), ("--input-ids", tokens, plan.input_ids))
        found += [f"the policy was measured with {name} {was}, the export has {now}" for name, was, now in pairs if was != now]
        return tuple(found)

    def places(self, source: "Source") -> frozenset[int]:
        """Places in `source.layers` of the layers that approximate."""
        chosen = {layer.index for layer in self.layers if layer.attributes is not None}
        return frozenset(place for place, layer in enumerate(source.layers) if layer.index in chosen and layer.problem is None)

    def summary(self) -> str:
        """One line for people."""
        approximate = sum(layer.attributes is not None for layer in self.layers)
        return (
            f"{approximate} of {len(self.layers)} layers approximate, {self.keys:,.0f} keys a query where exact attention has "
            f"{self.exact_keys:,.0f} ({self.exact_keys / self.keys:.2f}x fewer)"
        )


def read_policy(path: Path) -> Policy:
    """policy.json at `path`. Raises UsageError where it cannot be read or is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--policy: {path} cannot be read ({error.strerror}); give a file that `hyperattention policy` wrote") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--policy: {path} is no JSON ({error}); give a file that `hyperattention policy` wrote") from error
    return Policy.from_json(data, str(path))


def write_policy(policy: Policy | Mapping[str, Any], path: Path) -> None:
    """Writes policy.json in one step. Raises OSError."""
    data = policy.to_json() if isinstance(policy, Policy) else dict(policy)
    write_whole(path, json.dumps(data, indent=1) + "\n")


def _check_attributes(layer: LayerPolicy, name: str) -> None:
    """Raises UsageError for attributes that no search writes."""
    attributes = layer.attributes or {}
    decided = [attribute for attribute in DECIDED if attribute in attributes]
    if decided:
        raise UsageError(f"{name}: layer {layer.index} sets {', '.join(decided)}, which the model and the export decide; {_AGAIN}")
    Config.from_attributes(attributes)


def _short(value: str | None) -> str:
    return "none" if value is None else f"{value[:12]}..."
