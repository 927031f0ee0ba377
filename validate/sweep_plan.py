"""Which layers a sweep replaces, in which order, and so which models it measures. Knows no model and no tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from hyperattention.config import PRESETS, Config
from hyperattention.errors import UsageError

WINDOW = "window"  # window + sinks at the keys per query of `blocks`
METHODS = ("paper", "blocks", WINDOW)
ORDERS = ("last", "first", "error")
_MOST_COUNTS = 10  # numbers of replaced layers, where none are given


@dataclass(frozen=True)
class Point:
    """One model: `layers` replaced by `method`, in the order in which `order` takes them."""

    length: int
    method: str
    order: str
    layers: tuple[int, ...]

    @property
    def key(self) -> tuple[int, str, tuple[int, ...]]:
        """Orders that arrive at the same layers are the same model."""
        return self.length, self.method, tuple(sorted(self.layers))


def names(option: str, text: str, allowed: Sequence[str]) -> tuple[str, ...]:
    """Names with commas between them, each once. Raises UsageError."""
    found = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not found or not set(found) <= set(allowed):
        raise UsageError(f"{option} is {text!r}; it takes {', '.join(allowed)}, or some of them with commas between them")
    return found


def method_configs(methods: Sequence[str], given: Sequence[str]) -> dict[str, Config]:
    """The attributes of each method: its preset's (of `window`: those of `blocks`, whose cost it gets), with `given` on top.

    `given` are NAME=VALUE, for every method, or METHOD.NAME=VALUE. Raises UsageError for what is no attribute or out of range.
    """
    changes: dict[str, dict[str, int | float | str]] = {method: {} for method in METHODS}
    for text in given:
        name, equals, value = text.partition("=")
        method, _, attribute = name.strip().rpartition(".")
        known = set(Config().attributes()) - {"seed", "scale", "causal"}
        if not equals or attribute not in known or method not in ("", *METHODS):
            raise UsageError(f"--set is {text!r}; it takes NAME=VALUE or METHOD.NAME=VALUE, with a name of {', '.join(sorted(known))}")
        try:
            parsed: int | str = value.strip() if attribute == "selector" else int(value)
        except ValueError:
            raise UsageError(f"--set is {text!r}; {attribute} takes a whole number") from None
        for one in [method] if method else METHODS:
            changes[one][attribute] = parsed
    changes[WINDOW] = changes["blocks"] | changes[WINDOW]
    return {method: replace(PRESETS["blocks" if method == WINDOW else method], **changes[method]) for method in methods}  # type: ignore[arg-type]


def check_approximates(configs: Mapping[str, Config], lengths: Iterable[int]) -> None:
    """Raises UsageError for a length at which a method is exact attention."""
    for length in lengths:
        for method, config in configs.items():
            if config.is_exact(length, length):
                raise UsageError(
                    f"--lengths names {length:,}, where {method} takes its exact path (exact_below {config.exact_below}); "
                    f"give a longer one, or --set exact_below=N"
                )


def counts(layers: int, given: Sequence[int]) -> tuple[int, ...]:
    """Numbers of replaced layers, ascending: those `given`, else up to ten from 1 to all. Raises UsageError."""
    wrong = [n for n in given if not 1 <= n <= layers]
    if wrong:
        raise UsageError(f"--replaced names {wrong[0]}; this model has 1 to {layers} layers to replace")
    steps = min(layers, _MOST_COUNTS)
    return tuple(sorted(set(given))) or tuple(sorted({1 + round(i * (layers - 1) / max(1, steps - 1)) for i in range(steps)}))


def urgent(numbers: Sequence[int]) -> list[int]:
    """Of ascending numbers of replaced layers the two that say most, in this order: the last, and the one in the middle."""
    return list(dict.fromkeys((numbers[-1], numbers[(len(numbers) - 1) // 2])))


def ordered(order: str, layers: Sequence[int], errors: Mapping[int, float]) -> list[int]:
    """`layers` in the order in which they are replaced: from the last (the paper's), from the first, or the smallest error first.

    `errors` are each layer's own; equal ones go from the first.
    """
    if order == "error":
        return sorted(layers, key=lambda layer: (errors[layer], layer))
    return sorted(layers, reverse=order == "last")


def points(
    length: int, orders: Sequence[str], layers: Sequence[int], errors: Mapping[str, Mapping[int, float]], numbers: Sequence[int]
) -> list[Point]:
    """Every point of one length, number by number, and of each number method by method (the keys of `errors`) and order by order."""
    queues = {(method, order): ordered(order, layers, own) for method, own in errors.items() for order in orders}
    return [Point(length, method, order, tuple(queue[:number])) for number in numbers for (method, order), queue in queues.items()]
