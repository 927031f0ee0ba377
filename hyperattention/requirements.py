"""The Python packages that this one needs: which of them cannot be imported, and what to install."""

from __future__ import annotations

import importlib.util
import re
from importlib import metadata


def install(module: str) -> str:
    """What to do where `module` is missing or of another version: it names the release that this package asks for."""
    try:
        asked = metadata.requires("hyperattention") or []
    except metadata.PackageNotFoundError:  # a checkout that was never installed
        asked = []
    found = next((line for line in asked if re.match(rf"{module}(?![\w.-])", line)), module)
    return f"pip install '{found.partition(';')[0].strip()}'"


def lacking(module: str) -> str | None:
    """Why `module` cannot be used and what to do; None where it is there. It is not imported."""
    return None if importlib.util.find_spec(module) else f"the Python package {module} is not installed; {install(module)}"


def of_import(error: ImportError) -> str | None:
    """The same for a failed import; None where the module is one of ours, or where the error names none: that is a bug."""
    module = (error.name or "").partition(".")[0]
    if not module or module == "hyperattention":
        return None
    if (isinstance(error, ModuleNotFoundError) and error.name == module) or importlib.util.find_spec(module) is None:
        return f"the Python package {module} is not installed; {install(module)}"
    return f"the Python package {module} cannot be used ({error}); {install(module)}"
