"""The plugin in TensorRT's registry: put there once a process, and asked there which build of it answers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hyperattention.config import DOMAIN, OP_TYPE, VERSION
from hyperattention.errors import EnvironmentFault
from hyperattention.library import build_info

_KEY = (OP_TYPE, str(VERSION), DOMAIN)


def register_plugin(library: Path) -> None:
    """Puts the library's creator into TensorRT's plugin registry; once a process, however often it is called.

    Raises EnvironmentFault where it cannot be loaded, or where a different build of it is registered, by whomever.
    """
    import tensorrt as trt  # pyright: ignore[reportMissingImports]

    # Opening the library registers it where TensorRT is in the process and the name is free (static loading).
    build = str(build_info(library)["build_id"])
    registry = trt.get_plugin_registry()
    # It may have been open before TensorRT was. TensorRT's own messages go to standard error: load_library takes no logger.
    if registry.get_creator(*_KEY) is None and (registry.load_library(str(library)) is None or registry.get_creator(*_KEY) is None):
        raise EnvironmentFault(
            f"TensorRT {trt.__version__} did not take the plugin library {library.name}; "
            f"rebuild it with `make native`; `hyperattention doctor` says more"
        )
    found = registered_build(trt)
    if found != build:
        raise EnvironmentFault(
            f"this process has registered build {found} of the plugin, {library.name} is build {build}; use one of them, or another process"
        )


def registered_build(trt: Any) -> str | None:
    """Build id of the plugin that TensorRT's registry gives, as the plugin itself says it; None where none is registered."""
    creator = trt.get_plugin_registry().get_creator(*_KEY)
    if creator is None:
        return None
    plugin = creator.create_plugin("", trt.PluginFieldCollection([]), trt.TensorRTPhase.BUILD)
    said = plugin.get_capability_interface(trt.PluginCapabilityType.BUILD).metadata_string
    match = re.search(r" build=(\S+)", said)
    return match[1] if match else "unknown"  # libraries before this field
