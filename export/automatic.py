"""`--layers auto`: the policy of an export, read from --policy FILE, or measured by `hyperattention policy` as a process of its own."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyperattention.errors import AccuracyFailed, UsageError
from hyperattention.export import child, interrupt
from hyperattention.export.budget import BOTH, Budget, parse_budget
from hyperattention.export.plan import AUTO, ExportPlan
from hyperattention.export.policy import FILE, Policy, read_policy
from hyperattention.export.shape_options import MAX_SEQUENCE

if TYPE_CHECKING:
    from hyperattention.export.console import Reporter
    from hyperattention.export.source import Source

POLICY = (sys.executable, "-m", "hyperattention.validate", "policy")


@dataclass(frozen=True)
class Request:
    """What the command line says of the policy; `further` are options that `hyperattention policy` takes as they are."""

    budget: Budget
    given: tuple[str, ...]
    file: Path | None
    text: Path | None
    length: int | None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    further: tuple[str, ...] = ()

    @property
    def measures(self) -> bool:
        """Whether the model has to be measured: no finished policy was given."""
        return self.file is None

    def command(self, model: str, out: Path) -> list[str]:
        """The arguments behind `hyperattention policy`."""
        budget = [part for limit in self.given for part in ("--budget", limit)]
        fixed = [part for name, value in self.fixed.items() for part in ("--fix", f"{name}={value}")]
        length = [] if self.length is None else ["--length", str(self.length)]
        text = ["--text", str(self.text), "--out", str(out), "--budget-regime", self.budget.regime]
        text += ["--budget-cost", self.budget.cost]
        return [model, *text, *budget, *length, *fixed, *self.further]


def request(
    layers: str,
    preset: str,
    budget: list[str],
    regime: str,
    cost: str,
    file: Path | None,
    text: Path | None,
    length: int | None,
    **others: Any,
) -> Request | None:
    """The request, None where the layers are chosen by hand. Raises UsageError for options that do not go together."""
    options = {
        "--budget": bool(budget),
        "--budget-regime": regime != BOTH,
        "--budget-cost": cost != "auto",
        "--policy": file is not None,
        "--calibration-length": length is not None,
    }
    given = [option for option, value in options.items() if value]
    if layers != AUTO:
        if given:
            raise UsageError(f"{' and '.join(given)}: the layers are chosen by --layers {layers}; give --layers auto, or leave it out")
        return None
    if preset != "blocks":
        raise UsageError(
            f"--layers auto chooses the settings of each layer itself; leave --preset {preset} out, or fix one (--selector sortlsh)"
        )
    if file is not None and given != ["--policy"]:
        raise UsageError(f"--policy is a choice already made; leave {' and '.join(g for g in given if g != '--policy')} out")
    if file is not None and others.get("fixed"):
        options = " and ".join(f"--{name.replace('_', '-')}" for name in others["fixed"])
        raise UsageError(
            f"--policy holds every attribute of its layers; leave {options} out, or measure with it: --budget in place of --policy"
        )
    if length is not None and not 2 <= length <= MAX_SEQUENCE:
        raise UsageError(f"--calibration-length is {length}; it takes 2 to {MAX_SEQUENCE}")
    if file is None and text is None:
        raise UsageError("--layers auto measures the model on text: give --text FILE, or a finished policy with --policy FILE")
    return Request(parse_budget(budget, regime, cost), tuple(budget), file, text, length, **others)


def searched_dtype(dtype: str | None, device: str) -> tuple[str, ...]:
    """What of the export's --dtype the search is told: nothing on a processor, where it computes in fp32 whatever is exported."""
    import torch

    return ("--dtype", dtype) if dtype is not None and device != "cpu" and torch.cuda.is_available() else ()


def choose(asked: Request, source: "Source", out: Path, resume: bool, reporter: "Reporter") -> Policy:
    """The policy. With `resume` measurements of a stopped run are taken over, and this one's kept beside OUT when it stops.

    Raises UsageError for a policy of another model, AccuracyFailed where the budget is not reached, and what the search ended in.
    """
    if asked.file is not None:
        policy = read_policy(asked.file)
    else:
        with _work_folder(out, resume) as folder, reporter.stage("policy"):
            policy = _measure(asked, source, folder / FILE, resume, reporter)
    policy.check(source)
    return policy


def dry_run(asked: Request, source: "Source", reporter: "Reporter") -> dict[str, Any]:
    """What a measurement would do: {"budget", "calibration", "settings"}; nothing is written."""
    ended = child.run([*POLICY, *asked.command(source.model, Path(FILE)), "--dry-run", "--json"], reporter, "the policy's dry run")
    if ended.code:
        raise ended.crash()
    return ended.found


def undecided(plan: ExportPlan) -> ExportPlan:
    """A plan that approximates every layer, said to be what a dry run shows in the place of the policy."""
    layers = (replace(layer, reason="not decided yet: --layers auto") if layer.mode == "approximate" else layer for layer in plan.layers)
    return replace(plan, layers=tuple(layers))


def _measure(asked: Request, source: "Source", file: Path, resume: bool, reporter: "Reporter") -> Policy:
    command = [*POLICY, *asked.command(source.model, file), "--json", *["--resume"] * resume]
    ended = child.run(command, reporter, "the policy's search")
    if ended.code == AccuracyFailed.exit_code and "best" in ended.found:
        raise AccuracyFailed(ended.message, ended.found)
    if ended.code or not file.is_file():
        raise ended.crash()
    return read_policy(file)


@contextmanager
def _work_folder(out: Path, resume: bool) -> Iterator[Path]:
    """Where the search writes: a temporary folder, or with `resume` .OUT.policy beside OUT, which stays until the policy is chosen.

    A finished OUT's own policy lies there too, to be taken over where nothing that it was measured on changed.
    """
    if not resume:
        with tempfile.TemporaryDirectory(prefix="hyperattention-policy-") as name:
            with interrupt.undoing(lambda: shutil.rmtree(name, ignore_errors=True)):
                yield Path(name)
        return
    folder = work_folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    if (out / FILE).is_file() and not (folder / FILE).is_file():
        with suppress(OSError):
            shutil.copyfile(out / FILE, folder / FILE)
    with interrupt.undoing(lambda: f"kept in {folder}: what the policy measured; run the same command again to go on from there"):
        yield folder


def work_folder(out: Path) -> Path:
    """Beside `out`, of a search that --resume can go on with."""
    whole = out.absolute()
    return whole.with_name(f".{whole.name}.policy")


def forget(out: Path) -> None:
    """Removes the measurements kept beside a finished OUT, which holds the policy itself."""
    shutil.rmtree(work_folder(out), ignore_errors=True)
