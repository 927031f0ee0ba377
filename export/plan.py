"""Every decision of an export, made before any work starts: which layers, which attributes, which shapes.

The stages read one frozen `ExportPlan`; it round-trips through JSON, so that the manifest holds it.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from typing import Any, Mapping, Sequence

from hyperattention.config import INT32_MAX, PRESETS, Config, layer_seed
from hyperattention.errors import UnsupportedModel, UsageError
from hyperattention.export.choices import DTYPES, INPUT_IDS, KEEP_EXACT, TASKS, choice
from hyperattention.export.policy import Policy
from hyperattention.export.shape_options import MAX_BATCH, MAX_SEQUENCE, SEQUENCE, check_range, sequence_range
from hyperattention.export.source import AttentionLayer, Input, Range, Source

AUTO = "auto"  # of --layers: a policy chooses
MODES = ("approximate", "exact", "native")
_CHOICES = {"task": TASKS, "dtype": DTYPES, "input_ids": INPUT_IDS, "keep_exact": KEEP_EXACT}
_READ_BY = {"pool_size": "blocks", "num_projections": "sortlsh"}  # attributes that only one selector reads
# Python's \d and isdigit take digits of every script, and superscripts.
_SPAN = "[0-9]{1,18}(-[0-9]{1,18})?"


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one attention layer; `config` is set unless the layer keeps PyTorch's own attention."""

    index: int
    name: str
    mode: str  # "approximate", "exact" (the op as exact attention) or "native" (the model's own attention)
    reason: str
    config: Config | None


@dataclass(frozen=True)
class ExportPlan:
    """The whole export. seq (keys of the attention) and batch (rows) are (min, opt, max), and so is every dimension of `dims`.

    `inputs` and `outputs` are the graph's, in order; `dims` ranges the named dimensions of the inputs. `policy` is policy.json's content
    where the layers were chosen by one, `policy_notes` how the plan uses it otherwise than it was measured.
    """

    task: str
    dtype: str
    layers: tuple[LayerPlan, ...]
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    dims: dict[str, Range]
    seq: Range
    batch: Range
    input_ids: str
    seed: int
    preset: str
    keep_exact: str
    policy: dict[str, Any] | None = None
    policy_notes: tuple[str, ...] = ()

    @property
    def planned(self) -> tuple[LayerPlan, ...]:
        """Layers that become a HyperAttention node."""
        return tuple(layer for layer in self.layers if layer.config is not None)

    @property
    def approximate(self) -> tuple[LayerPlan, ...]:
        """Layers that approximate."""
        return tuple(layer for layer in self.layers if layer.mode == "approximate")

    def shapes(self, entry: Input) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Smallest, usual and largest shape of one of `inputs`."""
        ranges = [self.dims[size] if isinstance(size, str) else (size,) * 3 for size in entry.shape]
        low, opt, high = (tuple(size[i] for size in ranges) for i in range(3))
        return low, opt, high

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> "ExportPlan":
        """The inverse of `to_json`. Raises UsageError when it was not written by this version's `to_json`."""
        try:
            layers = tuple(
                LayerPlan(**{**layer, "config": Config.from_attributes(layer["config"]) if layer["config"] else None})
                for layer in data["layers"]
            )
            for layer in layers:
                choice("mode", layer.mode, MODES)
            shapes = {"seq": check_range("seq", data["seq"], MAX_SEQUENCE), "batch": check_range("batch", data["batch"], MAX_BATCH)}
            for option, allowed in _CHOICES.items():
                choice(option, data[option], allowed)
            inputs = tuple(Input(entry["name"], entry["dtype"], tuple(entry["shape"])) for entry in data["inputs"])
            dims = {name: check_range(name, values, MAX_SEQUENCE) for name, values in data["dims"].items()}
            unknown = {size for entry in inputs for size in entry.shape if not isinstance(size, int) and size not in dims}
            if unknown:
                raise ValueError(f"no range for {', '.join(sorted(map(str, unknown)))}")
            if data.get("policy") is not None:
                Policy.from_json(data["policy"], "the policy in the manifest")
            lists = {"outputs": tuple(data["outputs"]), "policy_notes": tuple(data.get("policy_notes", ()))}
            return cls(**{**data, "layers": layers, "inputs": inputs, "dims": dims, **lists, **shapes})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(f"the plan in the manifest does not fit this version ({error}); export the model again") from error


def parse_layers(spec: str, count: int) -> frozenset[int]:
    """Layer numbers named by all | none | odd | even | first:N | last:N | a list such as 0-3,7, of `count` layers.

    "auto" names none: a policy does.
    """
    named = {"all": range(count), "none": range(0), "odd": range(1, count, 2), "even": range(0, count, 2)}
    if spec in named:
        return frozenset(named[spec])
    if match := re.fullmatch(r"(first|last):([0-9]{1,18})", spec):
        size = int(match[2])
        if not 1 <= size <= count:
            raise UsageError(f"--layers {spec}: {match[1]} takes 1 to {count}, the number of attention layers of this model")
        return frozenset(range(size) if match[1] == "first" else range(count - size, count))
    if re.fullmatch(rf"{_SPAN}(,{_SPAN})*", spec):
        chosen: set[int] = set()
        for part in spec.split(","):
            low, _, high = part.partition("-")
            first, last = int(low), int(high or low)
            if last < first:
                raise UsageError(f"--layers {spec}: range {part} runs backwards; write {last}-{first}")
            if last >= count:
                raise UsageError(f"--layers {spec}: there is no layer {last}; the attention layers are 0 to {count - 1}")
            chosen.update(range(first, last + 1))
        return frozenset(chosen)
    raise UsageError(f"--layers is {spec!r}; it takes auto, all, none, odd, even, first:N, last:N, or numbers such as 0-3,7")


def warnings(plan: ExportPlan, max_positions: int | None) -> list[str]:
    """What is allowed and probably not meant."""
    found = list(plan.policy_notes)
    if max_positions is not None and plan.seq[2] > max_positions:
        trained = f"the model was trained for {max_positions}: beyond that only time means anything"
        found.append(f"sequences up to {plan.seq[2]} are exported, {trained}")
    below = [layer.index for layer in plan.approximate if layer.config is not None and plan.seq[2] <= layer.config.exact_below]
    if below:
        found.append(f"no sequence is longer than exact_below in layers {', '.join(map(str, below))}: they never approximate")
    if not plan.approximate and plan.preset != "exact":
        found.append("no layer approximates; every layer of the result is exact")
    return found


def idle_attributes(preset: str, attributes: Mapping[str, int | float | str]) -> list[str]:
    """One sentence for each attribute given that the preset or the selector does not read (docs/operator.md, attributes)."""
    selector = attributes.get("selector", PRESETS[preset].selector)
    found = []
    for name in attributes:
        option = f"--{name.replace('_', '-')}"
        if preset == "exact":
            found.append(f"{option} has no effect: --preset exact approximates nothing")
        elif _READ_BY.get(name, selector) != selector:
            found.append(f"{option} has no effect: the selector {selector} does not read it, {_READ_BY[name]} does")
    return found


def _check_cache(source: Source, longest: int) -> None:
    """Raises UnsupportedModel where present.* would lose keys without a word."""
    dropped = source.dropped_keys(longest)
    if dropped:
        names = dict(enumerate(layer.name for layer in source.layers))
        listed = ", ".join(f"{number} ({names.get(number, 'no attention layer')})" for number in dropped)
        raise UnsupportedModel(
            f"--task prefill: the cache of layers {listed} keeps fewer than {longest} keys (sliding window or chunks), so present.* would "
            f"lack the others; use --task logits or last-logits, or a --max-seq below the window"
        )


def _ranges(source: Source, decided: dict[str, Range]) -> dict[str, Range]:
    """A range for each named dimension of the inputs: the model's own, else the one that the options decided."""
    names = dict.fromkeys(size for entry in source.inputs for size in entry.shape if isinstance(size, str))
    ranges = {**decided, **source.dims}
    missing = [name for name in names if name not in ranges]
    if missing:
        raise UsageError(f"dimension {', '.join(missing)} of {source.name} has no range; give its smallest and largest size")
    return {name: ranges[name] for name in names}


def _base_config(preset: str, attributes: Mapping[str, int | float | str]) -> Config:
    """The preset with the attributes given, before any layer's own mask, scale and seed. Raises UsageError."""
    base = Config.from_attributes({**PRESETS[preset].attributes(), **attributes})
    if "causal" in attributes:
        raise UsageError("causal is no option: whether a layer is causal, the model itself says")
    return base.exact() if preset == "exact" else base


def _unreplaced(layer: AttentionLayer, by_number: bool) -> LayerPlan:
    """A layer that the operator cannot stand in for. Raises UnsupportedModel where it was asked for `by_number`."""
    if by_number:
        raise UnsupportedModel(f"layer {layer.index} ({layer.name}) cannot be replaced: {layer.problem}; leave it out of --layers")
    return LayerPlan(layer.index, layer.name, "native", str(layer.problem), None)


def _node_config(base: Config, layer: AttentionLayer, taken: bool, seed: int) -> Config:
    """`base` with the layer's own mask, scale and seed. Raises UsageError for a strict plan of a layer that is not causal and `taken`."""
    if base.strict_causal and not layer.causal and taken:
        raise UsageError(
            f"--strict-causal: layer {layer.index} ({layer.name}) is not causal: all rows see all keys; leave out option or layer"
        )
    scale = 0.0 if abs(layer.scale * layer.head_dim**0.5 - 1) < 1e-6 else layer.scale
    return replace(
        base,
        causal=int(layer.causal),
        scale=base.scale or scale,
        seed=layer_seed(seed, layer.index),
        strict_causal=base.strict_causal and int(layer.causal),
    )


def make_plan(
    source: Source,
    *,
    layers: str = "odd",
    preset: str = "blocks",
    attributes: Mapping[str, int | float | str] | None = None,
    dtype: str = "fp32",
    seq: Sequence[int] | None = None,
    batch: Sequence[int] = (1, 1, 1),
    input_ids: str = "tokens",
    seed: int = 0,
    keep_exact: str = "op",
    policy: "Policy | None" = None,
) -> ExportPlan:
    """Decides for every attention layer of `source`; `attributes` override the preset's. `seq` is by default
    `sequence_range`'s. Where the source fixes its key lengths or rows, `seq` or `batch` are not looked at. A `policy`, which goes with
    `layers` "auto" and was measured on this model, decides each layer in their place.

    Raises UsageError for a value out of range and UnsupportedModel where a layer was asked for by number and cannot use the op.
    """
    choice("--preset", preset, tuple(PRESETS))
    if not 0 <= seed <= INT32_MAX:
        raise UsageError(f"--seed is {seed}; it takes 0 to {INT32_MAX}")
    base = _base_config(preset, attributes or {})
    if (layers == AUTO) != (policy is not None):
        raise UsageError(f"--layers {layers}: auto, and only auto, takes a policy, which `hyperattention policy` measures")
    settings = {layer.index: layer for layer in policy.layers} if policy is not None else {}
    chosen = parse_layers(layers, len(source.layers)) if policy is None else policy.places(source)
    lengths = source.keys or check_range(SEQUENCE, seq or sequence_range(source, None, None, None), MAX_SEQUENCE)
    if source.position_limit is not None and lengths[2] > source.position_limit:
        raise UsageError(f"--max-seq is {lengths[2]}; {source.name} has learned positions for {source.position_limit} tokens and no more")
    rows = source.rows or check_range("--batch", batch, MAX_BATCH)
    if source.task == "prefill":
        _check_cache(source, lengths[2])
    decided = []
    for order, layer in enumerate(source.layers):
        taken = order in chosen
        if layer.problem is not None:
            decided.append(_unreplaced(layer, by_number=taken and layers[0].isdigit()))
            continue  # its sizes and scale may be none that a Config takes
        setting = settings.get(layer.index)
        why = setting.reason if setting is not None else f"{'' if taken else 'not '}chosen by --layers {layers}"
        config = _node_config(base, layer, taken, seed)
        if taken:
            own = replace(config, **setting.attributes) if setting is not None and setting.attributes is not None else config
            decided.append(LayerPlan(layer.index, layer.name, "exact" if preset == "exact" else "approximate", why, own))
        elif keep_exact == "op":
            decided.append(LayerPlan(layer.index, layer.name, "exact", why, config.exact()))
        else:
            decided.append(LayerPlan(layer.index, layer.name, "native", f"{why}; --keep-exact onnx", None))
    plan = ExportPlan(
        task=source.task,
        dtype=choice("--dtype", dtype, DTYPES),
        layers=tuple(decided),
        inputs=source.inputs,
        outputs=source.outputs,
        dims=_ranges(source, {"sequence": lengths, "batch": rows}),
        seq=lengths,
        batch=rows,
        input_ids=choice("--input-ids", input_ids, INPUT_IDS),
        seed=seed,
        preset=preset,
        keep_exact=choice("--keep-exact", keep_exact, KEEP_EXACT),
        policy=policy.to_json() if policy is not None else None,
    )
    return plan if policy is None else replace(plan, policy_notes=policy.notes(plan))
