"""The timing of the GPU benchmarks (tests/gpu/gpu_timing.py), and the table's columns that take turns, on a clock made up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import bench_attention
import pytest
import torch
from gpu_timing import Turn, median_ms, medians_ms

from hyperattention.config import PRESETS


class Device:
    """A device whose work takes as long as it is told; remembers what ran, on which stream."""

    def __init__(self) -> None:
        self.now, self.streams, self.ran = 0.0, [None], list[tuple[str, Any]]()

    def work(self, name: str, ms: float) -> None:
        self.now += ms
        self.ran.append((name, self.streams[-1]))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()

    class Event:
        def __init__(self, enable_timing: bool) -> None: ...
        def record(self) -> None:
            self.at = made.now

        def synchronize(self) -> None: ...
        def elapsed_time(self, other: Any) -> float:
            return other.at - self.at

    class Stream:
        def __init__(self, stream: Any) -> None:
            self.stream = stream

        def __enter__(self) -> None:
            made.streams.append(self.stream)

        def __exit__(self, *_: object) -> None:
            made.streams.pop()

    for name, value in {"Event": Event, "stream": Stream, "synchronize": lambda: None}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr("hyperattention.validate.bench_timing.l2_scratch", lambda: SimpleNamespace(zero_=lambda: None))
    return made


@pytest.mark.parametrize("warm_ups", [0, 1, 2])
@pytest.mark.parametrize("ms, counted", [(200.0, 2), (40.0, 3), (0.5, 20), (0.01, 30)])
def test_a_median_counts_no_warm_up(device: Device, warm_ups: int, ms: float, counted: int) -> None:
    """A warm-up takes ten times as long; as many runs count as fit 10 ms, with the bounds on their number."""
    found = median_ms(lambda: device.work("run", ms * (10 if len(device.ran) < warm_ups else 1)), 10.0, warm_ups)
    assert found == pytest.approx(ms, abs=1e-6) and len(device.ran) == warm_ups + counted


def test_runs_take_turns_on_their_streams(device: Device) -> None:
    """A clock that slows down all the while changes no ratio by more than a turn does."""
    stream: Any = object()

    def slowing(name: str, ms: float) -> Turn:
        return Turn(lambda: device.work(name, ms * (1 + len(device.ran) / 40)), stream if name == "b" else None)

    found = medians_ms({"a": slowing("a", 1.0), "b": slowing("b", 2.0)}, 15.0)
    assert device.ran[:4] == [("a", None), ("b", stream), ("a", None), ("b", stream)]
    assert found["b"] / found["a"] == pytest.approx(2.0, rel=0.03)


def test_the_tables_columns_take_turns(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels, stages and runtimes; a runtime with another output is an error and has no time."""
    monkeypatch.setattr(bench_attention, "load_cuda", lambda: library)
    monkeypatch.setattr(bench_attention, "peak_bytes", lambda run: 7)
    q = torch.zeros(1, 2, 5000, 4)

    def kernels(name: str, ms: float) -> Any:
        return lambda *_: (device.work(name, ms), (q, q))[1]

    library: Any = SimpleNamespace(workspace_size=lambda *_: 11)
    library.forward, library.select, library.attend = kernels("forward", 3.0), kernels("select", 1.0), kernels("attend", 2.0)

    def runtime(name: str, output: torch.Tensor) -> Any:
        return SimpleNamespace(
            stream=name, bind=lambda *_: None, launch=lambda: device.work(name, 4.0), output=output, workspace=lambda: 13
        )

    bench = bench_attention.Bench(2, 9.0, {})
    row = bench.approximate(q, q, q, PRESETS["blocks"], {"plugin": runtime("plugin", q), "ort": runtime("ort", q + 1)})
    assert row["ms"] == pytest.approx({"forward": 3.0, "select": 1.0, "attend": 2.0, "plugin": 4.0})
    assert row["peak"] == {"forward": 7, "select": 7, "attend": 7} and row["workspace"] == 11 and row["engine_memory"] == {"plugin": 13}
    assert set(row["errors"]) == {"ort"} and "not the kernels'" in row["errors"]["ort"]
    assert device.ran[-4:] == [("forward", None), ("select", None), ("attend", None), ("plugin", "plugin")]
