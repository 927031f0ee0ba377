"""A finished search as a policy: what is written to policy.json, and what of it a reader is told."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from hyperattention.errors import UsageError
from hyperattention.export.budget import REGIMES, budget_from_json
from hyperattention.export.files import digest
from hyperattention.export.identity import identity
from hyperattention.export.policy import LayerPolicy, Policy, read_policy
from hyperattention.validate.policy.prepare import Prepared
from hyperattention.validate.policy.readings import of_text
from hyperattention.validate.policy.search import Found, Search


def as_policy(prepared: Prepared, search: Search, found: Found) -> Policy:
    """The policy of a search that ran, beside its rivals where they were asked for, which are run now."""
    source, chosen = prepared.source, found.trial.choice
    names = {layer.index: layer.name for layer in prepared.plan.planned}
    layers = []
    for (index, _), option, keys in zip(search.layers, chosen.options, search.layer_keys, strict=True):
        candidate = option.candidate
        layers.append(LayerPolicy(index, names[index], search.candidates[candidate].attributes, keys[candidate], option.loss))
    return Policy(
        model=source.name,
        architecture=source.architecture,
        identity=identity(source),
        budget=prepared.options.budget.to_json(),
        calibration=prepared.describe(),
        layers=tuple(layers),
        keys=search.keys(chosen),
        exact_keys=search.exact_keys,
        predicted_kl=chosen.loss,
        verified=found.trial.measured,
        pareto=tuple({"keys": search.keys(point), "predicted_kl": point.loss} for point in found.points),
        fixed=tuple(
            {
                "attributes": search.candidates[c].attributes,
                "keys": search.keys(trial.choice),
                "predicted_kl": trial.choice.loss,
                "verified": trial.measured,
            }
            for c, trial in found.fixed
        ),
        fingerprint=_fingerprint(prepared),
        rounding=found.rounding,
        times=found.times,
        rivals=prepared.judged(search, found),
    )


def _fingerprint(prepared: Prepared) -> str:
    options = prepared.options
    return digest([prepared.fingerprint(), options.budget.to_json(), dict(options.fixed), prepared.probes, options.rivals])


def finished(prepared: Prepared, file: Path) -> Policy | None:
    """The policy in `file`, where it answers the same question about the same model, text, code and machine."""
    try:
        policy = read_policy(file)
    except UsageError:  # none, or one of another version: measured anew
        return None
    return policy if policy.fingerprint == _fingerprint(prepared) else None


def lines(policy: Policy) -> list[str]:
    """What a console shows of a policy: its sum, then a line for each regime, then the settings it was compared with."""
    found = [policy.summary(), *_regimes("this policy", policy.verified), *_unproven(policy)]
    if policy.times is not None:
        exact, ours = policy.times["exact_ms"], policy.times["ms"]
        found.append(f"  attention of all layers: {ours:.3g} ms, exact {exact:.3g} ms ({exact / ours:.2f}x)")
    if policy.rounding is not None:
        found += _regimes(f"exact attention by other kernels, the rounding of {policy.calibration['dtype']}", policy.rounding)
    for rival in policy.fixed:
        found += _regimes(f"all layers {_shown(rival['attributes'])}: {rival['keys']:,.0f} keys", rival["verified"])
    return [*found, *(_rivals(policy.rivals) if policy.rivals is not None else [])]


def _unproven(policy: Policy) -> list[str]:
    """Limits of loss and KL that the means keep and two standard errors above them do not."""
    return [
        f"  {held.name} {held.sense} {held.limit:g} {held.regime.replace('_', ' ')}: kept by the mean alone, the limit lies within two "
        f"standard errors; more --windows prove it"
        for held in of_text(budget_from_json(policy.budget), policy.verified)
        if held.sense == "<=" and held.kept and held.se is not None and held.value + 2 * held.se > held.limit
    ]


def _rivals(judged: dict[str, Any]) -> list[str]:
    """The policy and its rivals on text that the search has not read, and whether it beats them."""
    text = judged["text"]
    ranked = ", ".join(f"{count} for {family}" for family, count in judged["settings"].items())
    found = [f"on tokens {text['from']:,} to {text['to']:,}, which the search has not read; of settings of as many keys ranked: {ranked}"]
    found += _regimes("this policy", judged["policy"])
    for row in judged["rows"]:
        found += _regimes(f"{row['name']}, {_shown(row['attributes'])}: {row['keys']:,.0f} keys", row["verified"])
    for regime in REGIMES:
        ours = judged["policy"][regime]["kl"]["mean"]
        best = min((row["verified"][regime]["kl"]["mean"] for row in judged["rows"]), default=math.nan)
        beaten = sum(row["verified"][regime]["kl"]["mean"] > ours for row in judged["rows"])
        said = f"KL {ours:.5f}, the best rival's {best:.5f}"
        found.append(f"  {regime.replace('_', ' ')}: it beats {beaten} of {len(judged['rows'])} rivals in KL ({said})")
    return found


def _shown(attributes: dict[str, Any]) -> str:
    return ", ".join(f"{name} {attributes[name]}" for name in ("selector", "local_size", "num_blocks", "sample_size", "pool_size"))


def _regimes(name: str, measured: dict[str, Any]) -> list[str]:
    rows = []
    for regime in (regime for regime in REGIMES if regime in measured):
        row = measured[regime]
        nats, error = row["delta_nats"]["mean"], row["delta_nats"]["se"]
        spread = f" ± {error:.5f}" if error is not None else ""
        rows.append(
            f"  {name}, {regime.replace('_', ' ')}: {nats:+.5f}{spread} nats, KL {row['kl']['mean']:.5f}, top-1 {row['top1']['mean']:.4f}"
        )
    if measured["needle"]:
        recall = ", ".join(f"{where.replace('_', ' ')} {value:.3f}" for where, value in measured["needle"].items())
        rows.append(f"  {name}, needle: {recall}")
    return rows
