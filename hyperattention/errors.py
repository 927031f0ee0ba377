"""Every error the tool raises on purpose, and the exit code each one ends in.

    HyperAttentionError              exit code
    ├── UsageError                   2   an option or input that cannot be accepted
    │   └── UnsupportedModel         2   the model, or one of its layers, cannot be exported as asked
    ├── EnvironmentFault             3   a library, driver or device is missing, or something else ran than was built
    ├── ExportFailed                 4   the model could not be turned into ONNX
    ├── BuildFailed                  5   TensorRT could not build the engine
    └── AccuracyFailed               1   a gate of the report was not met

A message says what was found, what is allowed and what to do next. Only the
command line turns these into exit codes; any other exception is a bug, keeps
its traceback and ends in 70.
"""

from __future__ import annotations

from typing import Any


class HyperAttentionError(Exception):
    """Base class; `exit_code` is what the command line returns, `found` what its JSON object says beside the error."""

    exit_code = 1

    def __init__(self, message: str, found: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.found = found or {}


class AccuracyFailed(HyperAttentionError):
    """A gate of the report was not met."""

    exit_code = 1


class UsageError(HyperAttentionError, ValueError):
    """An option or an input that cannot be accepted."""

    exit_code = 2


class UnsupportedModel(UsageError):
    """The model, or a layer the user asked for, cannot be exported as asked."""


class EnvironmentFault(HyperAttentionError):
    """A library, driver or device is missing, or something else ran than was built."""

    exit_code = 3


class ExportFailed(HyperAttentionError):
    """The model could not be turned into ONNX."""

    exit_code = 4


class BuildFailed(HyperAttentionError):
    """TensorRT could not build the engine."""

    exit_code = 5


def one_line(error: BaseException, limit: int = 300) -> str:
    """What `error` says on one line of at most `limit` characters, or its class where it says nothing."""
    return " ".join(str(error).split())[:limit] or type(error).__name__
