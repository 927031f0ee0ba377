"""The rounds of `hyperattention bench`: statistics against NumPy, whose turn it is, what is left out, memory, growth, Ctrl-C."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hyperattention.errors import UsageError
from hyperattention.validate.bench_record import growth_lines, table
from hyperattention.validate.bench_statistics import Statistics, add_ratios, growth
from hyperattention.validate.bench_timing import Settings, measure, stoppable


class FakeRun:
    """Takes the seconds it is told to, and notes when it was its turn."""

    reserved: int | None = None

    def __init__(self, name: str, seconds: float, log: list[str], fails_at: int | None = None) -> None:
        self.name, self.seconds, self.log, self.fails_at, self.runs = name, seconds, log, fails_at, 0
        self.output: str | None = None

    def time(self) -> float:
        assert self.output is None, "an output is held while the next is made"
        self.runs += 1
        self.log.append(self.name)
        if self.runs == self.fails_at:
            raise RuntimeError("out of luck")
        self.output = f"{self.name}'s"
        return self.seconds

    def take(self) -> str | None:
        taken, self.output = self.output, None
        return taken


class Fake:
    """A contender without work; `error` is raised as it prepares."""

    memory = "process"
    power = 1  # of the length that the time grows with

    def __init__(
        self, name: str, seconds: float, log: list[str], ours: bool = False, error: Exception | None = None, fails_at: int | None = None
    ) -> None:
        self.name = self.title = name
        self.seconds, self.log, self.ours, self.exact, self.error, self.fails_at = seconds, log, ours, not ours, error, fails_at

    @property
    def quadratic(self) -> bool:
        return self.power == 2

    def prepare(self, length: int) -> FakeRun:
        if self.error:
            raise self.error
        return FakeRun(self.name, self.seconds * length**self.power, self.log, self.fails_at)


class FakeExact(Fake):
    """Its time grows with the square of the length."""

    power = 2


def run_all(contenders: list[Fake], lengths: list[int] = [1], stopped: Callable[[], bool] = lambda: False, **settings: Any):
    return measure(contenders, lengths, Settings(**settings), lambda text: None, stopped)


@pytest.mark.parametrize("runs", [1, 2, 9, 10, 11, 99, 100, 357])
def test_statistics_equal_numpys(runs: int) -> None:
    times = np.random.default_rng(runs).exponential(size=runs) + 1e-6
    found = Statistics.of(times.tolist())
    assert found.runs == runs
    assert (found.median_s, found.mean_s) == pytest.approx((np.quantile(times, 0.5), np.mean(times)), rel=1e-12)
    assert (found.min_s, found.max_s) == (min(times), max(times))
    for value, share, needed in ((found.p10_s, 0.1, 10), (found.p90_s, 0.9, 10), (found.p99_s, 0.99, 100)):
        assert value == (pytest.approx(np.quantile(times, share), rel=1e-12) if runs >= needed else None)


@pytest.mark.parametrize("times", [[], [0.0], [1.0, -1.0], [float("nan")], [float("inf")]], ids=str)
def test_statistics_refuse_what_is_no_time(times: list[float]) -> None:
    with pytest.raises(ValueError, match="positive numbers"):
        Statistics.of(times)


def row(contender: str, length: int, *seconds: float) -> dict[str, Any]:
    return {"contender": contender, "length": length, "median_s": float(np.median(seconds)), "seconds": seconds}


def test_ratios_are_against_the_fastest_rival_or_the_one_named() -> None:
    rows = [row("ours", 8, 2.0), row("a", 8, 3.0), row("b", 8, 5.0), row("ours", 16, 4.0), row("b", 16, 6.0), row("ours", 32, 1.0)]
    of_a, of_b = ({"name": name, "ratio": 1.5, "rounds": 1} for name in "ab")
    add_ratios(rows, ["a", "b"], None)
    assert [r["against"] for r in rows if r["contender"] == "ours"] == [of_a, of_b, None]
    assert rows[2]["against"] == {"name": "a", "ratio": 0.6, "rounds": 1}
    add_ratios(rows, ["a", "b"], "a")
    assert [r["against"] for r in rows if r["contender"] == "ours"] == [of_a, None, None]


def test_ratios_are_over_the_rounds_that_both_ran_in() -> None:
    """What the others gain while one sits out counts neither in a ratio nor in which rival is the fastest."""
    rows = [row("slow", 8, 50.0, 50.0, 50.0), row("rival", 8, *[60.0] * 3, *[20.0] * 6), row("ours", 8, *[4.0] * 3, *[1.0] * 7)]
    add_ratios(rows, ["slow", "rival"], None)
    of_slow = {"name": "slow", "rounds": 3}
    assert [r["against"] for r in rows] == [of_slow | {"ratio": ratio} for ratio in (1.0, 50.0 / 60.0, 50.0 / 4.0)]
    add_ratios(rows, ["slow", "rival"], "rival")
    of_rival = {"name": "rival", "ratio": 20.0, "rounds": 9}
    assert rows[2]["against"] == of_rival
    columns = dict.fromkeys(("p10_s", "p90_s", "p99_s", "memory")) | {"exact": False}
    shown = table({"rows": [columns | r | {"ours": True, "runs": len(r["seconds"])} for r in rows]})
    cells = dict(zip([c.header for c in shown.columns], [list(c.cells) for c in shown.columns], strict=True))
    assert cells["contender"] == ["ours", "rival", "slow"]
    assert (cells["against"], cells["rounds"]) == (["20.00x", "rival", "1.20x"], ["9", "", "3"])


def test_contenders_run_in_turn_and_each_begins_a_round() -> None:
    log: list[str] = []
    found = run_all([Fake(name, 1e-3, log) for name in "abc"], repeats=3)
    warm_up, rounds = log[:6], log[6:]
    assert warm_up == ["a", "a", "b", "b", "c", "c"]
    assert rounds == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert [(r["contender"], r["runs"]) for r in found.rows] == [("a", 3), ("b", 3), ("c", 3)]
    assert not found.left_out and not found.interrupted


def test_slow_contenders_sit_out_after_their_time_but_run_three_times() -> None:
    log: list[str] = []
    found = run_all([Fake("slow", 50.0, log), Fake("middle", 2.0, log), Fake("fast", 1e-3, log)], repeats=9, max_seconds=10)
    assert {r["contender"]: r["runs"] for r in found.rows} == {"slow": 3, "middle": 5, "fast": 9}
    assert log[:4] == ["slow", "middle", "fast", "fast"]  # a second warm-up only where the first was short


def test_exact_attention_that_would_take_too_long_is_not_tried() -> None:
    log: list[str] = []
    found = run_all([FakeExact("exact", 1e-3, log), Fake("near", 1.0, log)], lengths=[1, 8, 64, 512], repeats=3, max_seconds=10)
    assert {(r["contender"], r["length"]) for r in found.rows} == {
        *(("exact", n) for n in (1, 8, 64)),
        *(("near", n) for n in (1, 8, 64, 512)),
    }
    (left,) = found.left_out
    assert (left.contender, left.length) == ("exact", 512)
    assert left.reason.startswith("one run would take about 262 s (4.1 s at 64 tokens") and "--max-seconds 10" in left.reason
    assert run_all([FakeExact("exact", 1e-3, log)], lengths=[512], repeats=3, max_seconds=10).rows  # nothing is known of it


def test_outputs_are_handed_over_and_not_held() -> None:
    class Look:
        kept: list[str] = []

        def keep(self, output: str) -> str:
            self.kept.append(output)
            return output

        def wrong(self, kept: dict[str, str]) -> dict[str, str]:
            assert kept == {"a": "a's", "b": "b's"}
            return {"b": "it is b"}

    log: list[str] = []
    found = measure([Fake("a", 1e-3, log), Fake("b", 1e-3, log)], [1], Settings(repeats=3), lambda text: None, lambda: False, Look())
    assert [(r["contender"], r["runs"]) for r in found.rows] == [("a", 3)] and found.left_out[0].reason == "it is b"
    assert Look.kept == ["a's", "b's"]  # FakeRun itself refuses to run while its output is held


def test_growth_is_over_the_longest_factor_of_eight() -> None:
    rows = [row("ours", n, t) for n, t in ((2**14, 1.0), (2**17, 2.0), (2**20, 19.0))]
    rows += [row("exact", 2**14, 1.0), row("exact", 2**17, 60.0), row("short", 100, 1.0), row("odd", 10, 1.0), row("odd", 81, 9.0)]
    wanted = [
        {"contender": "ours", "from": 2**17, "to": 2**20, "ratio": 9.5},
        {"contender": "exact", "from": 2**14, "to": 2**17, "ratio": 60.0},
    ]
    assert growth(rows) == wanted
    report = {"contenders": [{"name": name, "title": name.title()} for name in ("ours", "exact")], "growth": wanted}
    assert growth_lines(report)[0] == "Ours: 9.5x the time at 8x the tokens, 131,072 to 1,048,576"


def test_what_raises_is_listed_with_its_reason_and_the_others_go_on() -> None:
    log: list[str] = []
    contenders = [
        Fake("absent", 1e-3, log, error=ImportError("no such package")),
        Fake("late", 1e-3, log, fails_at=4),
        Fake("ours", 1e-3, log, ours=True, error=UsageError("head size 7 is not taken")),
        Fake("good", 1e-3, log),
    ]
    found = run_all(contenders, lengths=[1, 2], repeats=5)
    assert {(r["contender"], r["length"], r["runs"]) for r in found.rows} == {("good", 1, 5), ("good", 2, 5)}
    reasons = {(left.contender, left.length): left.reason for left in found.left_out}
    assert set(reasons) == {(name, length) for name in ("absent", "late", "ours") for length in (1, 2)}
    assert reasons["absent", 1] == "ImportError: no such package"
    assert reasons["late", 2] == "failed in round 2: RuntimeError: out of luck"
    assert reasons["ours", 1] == "head size 7 is not taken"


def test_a_stop_keeps_what_was_measured() -> None:
    log: list[str] = []
    contenders = [Fake("a", 1e-3, log), Fake("b", 1e-3, log)]
    found = run_all(contenders, lengths=[1, 2, 4], stopped=lambda: len(log) >= 4 + 4 * 2 + 4 + 3, repeats=4)
    assert found.interrupted
    assert [(r["length"], r["contender"], r["runs"]) for r in found.rows] == [(1, "a", 4), (1, "b", 4), (2, "a", 1), (2, "b", 2)]


def test_the_first_ctrl_c_asks_and_the_second_is_the_usual_one() -> None:
    usual: list[int] = []
    before = signal.signal(signal.SIGINT, lambda *_: usual.append(1))
    try:
        with stoppable() as stopped:
            assert not stopped()
            signal.raise_signal(signal.SIGINT)
            assert stopped() and not usual
            signal.raise_signal(signal.SIGINT)
            assert usual == [1]
        signal.raise_signal(signal.SIGINT)
        assert usual == [1, 1]
    finally:
        signal.signal(signal.SIGINT, before)


PEAK_OF_A_CALL = """
from hyperattention.validate.bench_timing import measured
size, held = 256 * 2**20, []
def call():
    held.append(bytearray(size))  # zeroed: every page is touched
    held[0][::4096] = b"x" * len(held[0][::4096])
    held.clear()
print(size, *(measured("process", call)["bytes"] for _ in range(5)))
"""


def test_peak_memory_of_a_call_is_what_it_held() -> None:
    # Young, and the largest of five: the kernel may take back idle pages during a call, and its peak is that less.
    done = subprocess.run([sys.executable, "-c", PEAK_OF_A_CALL], capture_output=True, text=True, check=True)
    size, *found = map(int, done.stdout.split())
    assert 0.9 * size <= max(found) <= 1.2 * size, found  # the kernel counts pages in batches
