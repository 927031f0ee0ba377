"""Ctrl-C, SIGTERM and a terminal that is closed: undo what is half done, then leave at once with 130.

An exception raised by a signal handler can surface inside a destructor or a native callback, where Python drops it and the
export would run on to its end, or worse. So the handler itself undoes, says so and ends the process.
"""

from __future__ import annotations

import json
import os
import signal
from contextlib import contextmanager, suppress
from typing import Callable, Iterator

EXIT_CODE = 130
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_undo: list[Callable[[], str | None]] = []


@contextmanager
def undoing(action: Callable[[], str | None]) -> Iterator[None]:
    """Inside: an interruption runs `action`, after those of the blocks within. What it returns tells the user what was kept."""
    _undo.append(action)
    try:
        yield
    finally:
        _undo.remove(action)


@contextmanager
def handled(as_json: bool) -> Iterator[None]:
    """Inside: the signals end the process this way, with an object on stdout too when `as_json`. For a command's main thread."""
    outlives = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # started by nohup
    taken = [number for number in _SIGNALS if not (outlives and number == signal.SIGHUP)]
    before = {number: signal.signal(number, lambda *_: _leave(as_json)) for number in taken}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def deferred() -> Iterator[None]:
    """Inside: the signals wait until the block has ended. For the few file operations that belong together."""
    waiting: list[int] = []
    before = {number: signal.signal(number, lambda received, _: waiting.append(received)) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if waiting:
            signal.raise_signal(waiting[0])


def _leave(as_json: bool) -> None:
    for number in _SIGNALS:  # a second Ctrl-C must not stop the undoing
        signal.signal(number, signal.SIG_IGN)
    kept = []
    for action in reversed(_undo):
        try:
            kept.append(action())
        except Exception as error:  # the others have to be undone all the same
            kept.append(f"not everything was undone ({type(error).__name__}: {error})")
    message = "interrupted; " + ("; ".join(filter(None, kept)) or "nothing was left behind")
    with suppress(OSError):  # whoever read this may be gone, as a closed terminal is
        if as_json:
            os.write(1, (json.dumps({"error": message, "exit_code": EXIT_CODE}) + "\n").encode())
        os.write(2, f"{message}\n".encode())
    os._exit(EXIT_CODE)
