"""Polygraphy's compare functions by the numbers of `tensor_error`. Metrics themselves do without Polygraphy (validate/metrics.py)."""

from __future__ import annotations

from collections import OrderedDict

import torch
from polygraphy.comparator import BaseCompareFunc, CosineSimilarityCompareFunc
from polygraphy.comparator.compare import CompareResult, Threshold

from hyperattention.validate.metrics import TensorError, tensor_error


class _OneNumber(Threshold):
    """A limit on one metric; subclasses name the metric."""

    FIELD = ""

    def __init__(self, limit: float) -> None:
        self.limit = limit

    @classmethod
    def metric_fields(cls) -> list[str]:
        return [cls.FIELD]

    def passed(self, metric_values: dict) -> bool:
        return bool(metric_values[self.FIELD] <= self.limit)

    # Polygraphy's own has no annotation, and a body that returns None alone.
    def describe(self, metric_values: dict) -> tuple[str, bool]:  # pyright: ignore[reportIncompatibleMethodOverride]
        passed = self.passed(metric_values)
        return f"{self.FIELD}: {metric_values[self.FIELD]:.4g} (limit {self.limit:.4g}) | {'PASSED' if passed else 'FAILED'}", passed


class RelativeL2Threshold(_OneNumber):
    FIELD = "relative_l2"


class NormRatioThreshold(_OneNumber):
    """The norm ratio's distance from 1."""

    FIELD = "norm_ratio_off"


class RelativeL2Result(CompareResult):
    _THRESHOLD_CLASS = RelativeL2Threshold

    def __init__(self, relative_l2: float, thresholds: Threshold | None = None) -> None:
        super().__init__(thresholds=thresholds)
        self.relative_l2 = relative_l2


class NormRatioResult(CompareResult):
    _THRESHOLD_CLASS = NormRatioThreshold

    def __init__(self, norm_ratio_off: float, thresholds: Threshold | None = None) -> None:
        super().__init__(thresholds=thresholds)
        self.norm_ratio_off = norm_ratio_off


class _ErrorCompareFunc(BaseCompareFunc):
    """Compares the outputs both runners have, by one number of `tensor_error`; the first runner is ours. Subclasses name the result."""

    _RESULT_CLASS: type[RelativeL2Result | NormRatioResult]

    def __init__(self, limit: float) -> None:
        self.limit = limit

    def thresholds_for(self, output_name: str) -> Threshold:
        return self._RESULT_CLASS._THRESHOLD_CLASS(self.limit)

    def _number(self, error: TensorError) -> float:
        raise NotImplementedError

    def __call__(self, iter_result0, iter_result1) -> OrderedDict:
        results = OrderedDict()
        for name in iter_result0.keys():
            if name in iter_result1:
                error = tensor_error(torch.as_tensor(iter_result0[name]), torch.as_tensor(iter_result1[name]))
                results[name] = self._RESULT_CLASS(self._number(error), thresholds=self.thresholds_for(name))
        return results


class RelativeL2CompareFunc(_ErrorCompareFunc):
    """Polygraphy compare function: |ours - other| / |other| at most `limit`."""

    _RESULT_CLASS = RelativeL2Result

    def _number(self, error: TensorError) -> float:
        return error.relative_l2


class NormRatioCompareFunc(_ErrorCompareFunc):
    """Polygraphy compare function: | |ours| / |other| - 1 | at most `limit`."""

    _RESULT_CLASS = NormRatioResult

    def _number(self, error: TensorError) -> float:
        return abs(error.norm_ratio - 1)


def compare_functions(relative_l2: float, norm_ratio: float, cosine: float) -> list[BaseCompareFunc]:
    """The three that belong together, for `polygraphy.comparator.Comparator.compare_accuracy`."""
    return [RelativeL2CompareFunc(relative_l2), NormRatioCompareFunc(norm_ratio), CosineSimilarityCompareFunc(cosine)]
