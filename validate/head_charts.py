"""Figures of single heads: where the error sits, and how well the spread of the sampled row sums is predicted."""

from __future__ import annotations

from hyperattention.validate.plot_heat import heat_chart
from hyperattention.validate.plot_scatter import Group, Point, scatter_chart
from hyperattention.validate.plots import Chart

# A head is marked where every one of its seeds gives more than so many times the predicted spread. Squared, a right prediction is the mean
# of what a seed gives, so that each of them is past it with a chance of at most 1 / FACTOR**2 (Markov), all five with 1 in 1,024, however
# the logits lie. Nothing of the kind holds below: where a few heavy keys decide, seeds that draw none of them show too little.
FACTOR = 2.0
ROUNDED = 1e-4  # kernels in fp32 differ by a tenth of it in their row sums


def longest_heads(report: dict) -> tuple[int, dict[int, list[dict]]]:
    """The longest length at which a layer approximates (0: none), and the rows of `heads` of each such layer by its number."""
    longest = max((row["length"] for row in report["layers"]), default=0)
    return longest, {row["layer"]: row["heads"] for row in report["layers"] if row["length"] == longest}


def heat(report: dict) -> Chart | None:
    """Relative L2 of every head of every approximate layer."""
    length, layers = longest_heads(report)
    columns = sorted({head["head"] for heads in layers.values() for head in heads})
    errors = {(layer, head["head"]): head["relative_l2"] for layer, heads in layers.items() for head in heads}
    values = [[errors.get((layer, head)) for head in columns] for layer in sorted(layers)]
    title = f"Error of every head at {length:,} tokens"
    return heat_chart(title, [str(n) for n in sorted(layers)], [str(n) for n in columns], values, "head", "layer", "relative L2")


def hardness(report: dict) -> Chart | None:
    """Measured against predicted coefficient of variation of the sampled row sums, a point a head; heads without samples have none."""
    length, layers = longest_heads(report)
    near: list[Point] = []
    far: list[Point] = []
    for layer, heads in sorted(layers.items()):
        for head in heads:
            predicted, measured = head["cv_predicted"], head["cv_measured"]
            if predicted is None or measured is None:
                continue
            tip = f"layer {layer}, head {head['head']}: predicted {predicted:.3g}, measured {measured:.3g}, error {head['relative_l2']:.3g}"
            (far if _is_off(head) else near).append(Point(predicted, measured, tip))
    groups = [Group("heads", near, 1), Group(f"under every seed more than {FACTOR:g} times the predicted", far, 2)]
    title = f"Row sums off by, measured and predicted, at {length:,} tokens"
    return scatter_chart(title, groups, "predicted", "measured", diagonal="as predicted")


def _is_off(head: dict) -> bool:
    """Whether chance does not explain how much more the seeds show than is predicted; a report that tells no single seed says nothing."""
    return min(head.get("cv_seeds") or [0.0]) > max(FACTOR * head["cv_predicted"], ROUNDED)
