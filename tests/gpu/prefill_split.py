"""Which part of an engine's run was the plugin's, from what the device launched. Needs no GPU."""

from __future__ import annotations

from collections.abc import Sequence

from hyperattention.errors import EnvironmentFault
from hyperattention.validate.bench_profile import Launch


def split(launches: Sequence[Launch], modes: Sequence[str]) -> dict[str, float]:
    """Milliseconds: plugin_ms, of which approximate_ms and exact_ms are of the layers of either mode; profiled_ms from the first launch to
    the end of the last.

    `launches` are of one run, in order of their start; `modes` has "approximate" or "exact" for each layer of the plugin, in the model's
    order. A layer is a row of our kernels without others between them, the gaps between them included. Raises EnvironmentFault where
    there are not as many rows as layers.
    """
    rows: list[list[Launch]] = []
    inside = False
    for launch in launches:
        if launch.ours:
            if not inside:
                rows.append([])
            rows[-1].append(launch)
        inside = launch.ours or (inside and launch.moves)
    if not launches or len(rows) != len(modes):
        seen = f"{len(launches)} launches, with {len(rows)} rows of kernels of the plugin"
        raise EnvironmentFault(f"the profiler saw {seen}; the engine has {len(modes)} layers of it: no other profiler may be attached")
    sums = {"approximate_ms": 0.0, "exact_ms": 0.0}
    for row, mode in zip(rows, modes, strict=True):
        sums[f"{mode}_ms"] += 1000 * (row[-1].stop - row[0].start)
    whole = 1000 * (max(launch.stop for launch in launches) - launches[0].start)
    return {"plugin_ms": sum(sums.values()), **sums, "profiled_ms": whole}
