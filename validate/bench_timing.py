"""Times contenders in turn, in one run: clocks, memory, warm-up, rounds, and a Ctrl-C that keeps what was measured.

On a GPU a clock is a pair of CUDA events on the contender's stream, after its L2 cache was overwritten; on the processor it is
the wall clock.
"""

from __future__ import annotations

import gc
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from hyperattention.validate.bench_statistics import Statistics

LEAST_RUNS = 3  # however slow
SECOND_WARM_UP_BELOW = 1.0  # seconds of the first


class Run(Protocol):
    """A contender at one length, inputs in place. `time` runs it once and gives seconds; `take` gives what that run computed, and
    holds it no longer: at a million tokens an output is gigabytes.
    `reserved`: device memory in bytes that its runtime took before any run, None where a run takes it."""

    reserved: int | None

    def time(self) -> float: ...
    def take(self) -> Any: ...


class Contender(Protocol):
    """Something to time. `memory` names the meter: "torch", "device" or "process" (see `measured`). `quadratic`: its time grows with
    the square of the length, so that a shorter length tells whether a longer one is worth trying."""

    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def ours(self) -> bool: ...
    @property
    def exact(self) -> bool: ...
    @property
    def memory(self) -> str: ...
    @property
    def quadratic(self) -> bool: ...

    def prepare(self, length: int) -> Run:
        """Inputs and kernels for `length` tokens. May raise anything: the contender is then listed with that reason."""
        ...


@dataclass(frozen=True)
class LeftOut:
    """A contender that was not timed: at `length`, or at all (None), and why."""

    contender: str
    length: int | None
    reason: str


@dataclass(frozen=True)
class Settings:
    """`repeats` rounds, of which a contender sits out those after `max_seconds` of its own at a length (but the first three)."""

    repeats: int = 30
    max_seconds: float = 10.0


@dataclass
class Timings:
    """The rows so far, what was left out, and whether the user stopped it."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    interrupted: bool = False


class WallClock:
    """Seconds of a call that returns when it is done."""

    name = "wall clock"

    def __call__(self, call: Callable[[], Any], stream: Any = None) -> tuple[float, Any]:
        start = time.perf_counter()
        result = call()
        return time.perf_counter() - start, result


class CudaClock:
    """Seconds between two CUDA events around a call that enqueues on `stream` (None: the current one); L2 is overwritten before."""

    name = "CUDA events, L2 cache overwritten before each run"

    def __init__(self) -> None:
        self.scratch = l2_scratch()

    def __call__(self, call: Callable[[], Any], stream: Any = None) -> tuple[float, Any]:
        with torch.cuda.stream(stream):
            # Half a millisecond of work, during which the call is already being enqueued: launch time does not count.
            for _ in range(20):
                self.scratch.zero_()
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            result = call()
            stop.record()
            stop.synchronize()
        return start.elapsed_time(stop) / 1000, result


def l2_scratch() -> torch.Tensor:
    """Device memory whose overwriting leaves nothing else in the L2 cache: twice its size."""
    return torch.empty(2 * torch.cuda.get_device_properties().L2_cache_size, dtype=torch.uint8, device="cuda")


def clock_for(device: str) -> WallClock | CudaClock:
    """The clock of "cpu" or "cuda"."""
    return CudaClock() if device == "cuda" else WallClock()


class Call:
    """A Run out of a function: `call` does or enqueues one run on `stream` and returns its output."""

    def __init__(self, clock: WallClock | CudaClock, call: Callable[[], Any], stream: Any = None, reserved: int | None = None) -> None:
        self.clock, self.call, self.stream, self.reserved, self.output = clock, call, stream, reserved, None

    def time(self) -> float:
        self.output = None  # before the next is made: two outputs at once are not what a user has
        seconds, self.output = self.clock(self.call, self.stream)
        return seconds

    def take(self) -> Any:
        taken, self.output = self.output, None
        return taken


class Check(Protocol):
    """A look at the warm-up's outputs. `keep` takes from each output what `wrong` needs, little enough to hold it for all contenders;
    `wrong` gives the names of wrong ones with what is wrong."""

    def keep(self, output: Any) -> Any: ...
    def wrong(self, kept: dict[str, Any]) -> dict[str, str]: ...


class NoCheck:
    """Takes every output for right."""

    def keep(self, output: Any) -> None:
        return None

    def wrong(self, kept: dict[str, Any]) -> dict[str, str]:
        return {}


def measured(kind: str, call: Callable[[], Any]) -> dict[str, Any] | None:
    """Bytes of memory that a call took over what was held before it, and how that was found; None where it cannot be had.

    "torch": the peak of torch's own CUDA allocations. "device": what the call left the device short of, for runtimes with an
    allocator of their own. "process": the peak of resident memory, which the kernel resets on request (Linux); pages held before that
    the kernel takes back during the call make it less.
    """
    if kind == "torch":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return {"bytes": torch.cuda.max_memory_allocated() - before, "how": "peak of PyTorch's CUDA allocations, first run"}
    if kind == "device":
        torch.cuda.synchronize()
        before = torch.cuda.mem_get_info()[0]
        call()
        torch.cuda.synchronize()
        return {"bytes": max(0, before - torch.cuda.mem_get_info()[0]), "how": "device memory taken by the first run"}
    gc.collect()  # what nobody holds any more could be freed during the call, and the peak be that less
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
    except OSError:
        call()
        return None
    call()
    return {"bytes": max(0, _resident("VmHWM") - before), "how": "peak of the process's resident memory, first run"}


def _resident(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024


@contextmanager
def stoppable() -> Iterator[Callable[[], bool]]:
    """Inside: the first Ctrl-C makes the function given true, so that the run in progress ends and its times are kept; a second
    one ends the process as usual. For a command's main thread."""
    stopped: list[int] = []
    before = signal.getsignal(signal.SIGINT)

    def handler(number: int, frame: Any) -> None:
        stopped.append(number)
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: bool(stopped)
    finally:
        signal.signal(signal.SIGINT, before)


def reason_of(error: BaseException, warned: Sequence[Any] = ()) -> str:
    """One line on why a contender is left out; PyTorch says why it has no kernel in warnings."""
    text = " ".join(str(error).split()) or "no message"
    said = [" ".join(str(w.message).split()) for w in warned]
    # An error of ours is a whole sentence; of others the class belongs to what is known.
    ours = type(error).__module__.startswith("hyperattention")
    return ("" if ours else f"{type(error).__name__}: ") + "; ".join([text[:300], *(s[:200] for s in dict.fromkeys(said))])[:700]


def measure(
    contenders: Sequence[Contender],
    lengths: Sequence[int],
    settings: Settings,
    step: Callable[[str], None],
    stopped: Callable[[], bool],
    check: Check = NoCheck(),
) -> Timings:
    """Every contender at every length (ascending), in rounds in which each runs once, beginning with another one each time.

    What `check` finds wrong is left out, and so is what would take longer than `settings.max_seconds` for a single run.
    """
    found = Timings()
    for length in lengths:
        slow = {c.name: reason for c in contenders if (reason := _too_slow(c, length, settings, found))}
        found.left_out += [LeftOut(name, length, reason) for name, reason in slow.items()]
        runs, memory = _warm_up([c for c in contenders if c.name not in slow], length, step, stopped, found, check)
        step(f"{length:,} tokens: {len(runs)} in turn, up to {settings.repeats} rounds")
        seconds = _rounds(runs, length, settings, stopped, found)
        by_name = {c.name: c for c in contenders}
        for name, times in seconds.items():
            row = {"length": length, "contender": name, "ours": by_name[name].ours, "exact": by_name[name].exact}
            found.rows.append({**row, **asdict(Statistics.of(times)), "memory": memory[name], "seconds": times})
        del runs  # and with it what the contenders hold for this length
        if stopped():
            found.interrupted = True
            break
    return found


def _too_slow(contender: Contender, length: int, settings: Settings, found: Timings) -> str:
    """Why a quadratic contender is not tried at `length`, by the longest length that it was timed at; empty where it is."""
    rows = [row for row in found.rows if row["contender"] == contender.name]
    if not contender.quadratic or not rows:
        return ""
    known = max(rows, key=lambda row: row["length"])
    expected = known["median_s"] * (length / known["length"]) ** 2
    if expected <= settings.max_seconds:
        return ""
    return (
        f"one run would take about {expected:.3g} s ({known['median_s']:.3g} s at {known['length']:,} tokens, times the square of the "
        f"length), more than --max-seconds {settings.max_seconds:g}"
    )


def _warm_up(
    contenders: Sequence[Contender],
    length: int,
    step: Callable[[str], None],
    stopped: Callable[[], bool],
    found: Timings,
    check: Check,
) -> tuple[dict[str, Run], dict[str, dict | None]]:
    """The contenders that run at `length`, each run once or twice, and what memory the first run took; the others go to `found`."""
    runs: dict[str, Run] = {}
    memory: dict[str, dict | None] = {}
    kept: dict[str, Any] = {}
    for contender in contenders:
        if stopped():
            break
        step(f"{length:,} tokens: {contender.title}, warm-up")
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                run = contender.prepare(length)
                first: list[float] = []
                taken = measured(contender.memory, lambda: first.append(run.time()))
                reserved = {"bytes": run.reserved, "how": "device memory of the engine's context, for its longest input"}
                memory[contender.name] = taken if run.reserved is None else reserved
                if first[0] < SECOND_WARM_UP_BELOW:
                    run.take()
                    run.time()
                kept[contender.name] = check.keep(run.take())
                runs[contender.name] = run
            except Exception as error:  # a rival may lack anything; the others are still worth their time
                found.left_out.append(LeftOut(contender.name, length, reason_of(error, warned)))
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
    for name, problem in check.wrong(kept).items():
        found.left_out.append(LeftOut(name, length, problem))
        del runs[name]
    return runs, memory


def _rounds(runs: dict[str, Run], length: int, settings: Settings, stopped: Callable[[], bool], found: Timings) -> dict[str, list[float]]:
    """Seconds of every timed run by contender; one that fails on the way goes to `found` and loses its times."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(settings.repeats):
        names = list(runs)
        turn = number % max(1, len(names))
        for name in names[turn:] + names[:turn]:
            if stopped():
                return {name: times for name, times in seconds.items() if times}
            if len(seconds[name]) >= LEAST_RUNS and sum(seconds[name]) >= settings.max_seconds:
                continue
            try:
                seconds[name].append(runs[name].time())
                runs[name].take()
            except Exception as error:
                found.left_out.append(LeftOut(name, length, f"failed in round {number + 1}: {reason_of(error)}"))
                del runs[name], seconds[name]
    return {name: times for name, times in seconds.items() if times}
