"""What the commands do, once it is clear that torch is needed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torch_otprune import demo
from torch_otprune.attach import attach, observe
from torch_otprune.cli import names
from torch_otprune.cli.files import check_directory, check_file, read_plan, write
from torch_otprune.cli.reload import reload, saved_in
from torch_otprune.cli.screen import Bars, Screen
from torch_otprune.errors import OTPruneError, PolicyError, VerificationError
from torch_otprune.pipeline import apply_
from torch_otprune.plan import Plan
from torch_otprune.policy import Policy, policy_of
from torch_otprune.report import agreement, count_macs, count_params
from torch_otprune.report.table import depth_sections, plan_costs
from torch_otprune.report.words import error
from torch_otprune.statistics import collect
from torch_otprune.store import plan_of, save
from torch_otprune.structure import evaluating, flat_tensors, run

__all__ = ["carry_out", "check", "make_plan", "print_schema", "run_demo"]

_CHECKED = 256  # samples that `verify` runs


def make_plan(
    show: Screen,
    model: str,
    data: str,
    *,
    policy: Path | None,
    weights: Path | None,
    out: Path | None,
) -> None:
    """Decide what to remove, print it, and write it.

    Args:
        show: where to print.
        model: name of the factory.
        data: name of the loader.
        policy: YAML file; None takes the one on the model's class.
        weights: safetensors file.
        out: file for the plan's JSON.
    """
    declared = None if policy is None else Policy.from_yaml(policy)
    if out is not None:
        check_file(out)
    net = names.model(model, weights)
    with show.bars() as bars:
        plan, _ = _decide(net, declared, names.data(data), bars)
    if out is not None:
        write(out, plan.to_json() + "\n")
    show.data(plan.to_json())
    _show_plan(show, plan)
    if out is not None:
        show.text("", f"written to {out}")


def _decide(net: nn.Module, policy: Policy | None, data: Any, bars: Bars) -> tuple[Plan, list[Any]]:
    if policy is None and policy_of(net) is None:
        raise PolicyError(
            f"there is no policy for this {type(net).__name__}.",
            where="--policy",
            fix="pass a YAML file, or declare a policy with @otp.prunable on the class.",
        )
    with attach(net, policy) as attached:
        bars("load", 0, 1)
        batches = collect(net, data, attached.policy.calibration.samples)
        bars("load", 1, 1)
        bars.each("observe", batches, lambda batch: observe(attached, [batch]))
        bars("plan", 0, 1)
        plan = attached.plan()
        bars("plan", 1, 1)
    return plan, batches


def _show_plan(show: Screen, plan: Plan) -> None:
    if plan.cuts:
        rows = [
            (c.group, str(c.units), str(len(c.keep)), error(c.error), c.reason) for c in plan.cuts
        ]
        show.table(("group", "units", "keep", "error", "reason"), rows, numbers=(1, 2, 3))
    for section in depth_sections(plan):
        show.table(section.head, section.rows, numbers=section.numbers)
    for name, cost in plan_costs(plan):
        show.text(f"{name}: {cost.before:,} -> {cost.after:,} ({cost.ratio:.1%} kept)")
    if plan.compacted:
        show.text(f"out of their lists, so that later layers move up: {', '.join(plan.compacted)}")
    if plan.refused:
        show.text("")
        refused = [(r.group, r.reason, r.fix) for r in plan.refused]
        show.table(("stays", "because", "fix"), refused)
    for note in plan.notes:
        show.text(f"note: {note}")


def carry_out(
    show: Screen,
    model: str,
    data: str,
    *,
    plan: Path | None,
    policy: Path | None,
    weights: Path | None,
    out: Path,
) -> None:
    """Prune by a stored plan or by a policy; write the model and the report.

    Args:
        show: where to print.
        model: name of the factory.
        data: name of the loader.
        plan: file that `plan` wrote.
        policy: YAML file; without either, the policy on the model's class.
        weights: safetensors file.
        out: directory for `model/` and `report/`.

    Raises:
        OTPruneError: if both a plan and a policy are given, or a file is missing.
    """
    if plan is not None and policy is not None:
        raise OTPruneError(
            "a plan and a policy were given.",
            where=f"--plan {plan}, --policy {policy}",
            fix="drop --policy: the plan holds the policy it was made with.",
        )
    stored = None if plan is None else read_plan(plan)
    declared = None if policy is None else Policy.from_yaml(policy)
    check_directory(out)
    net = names.model(model, weights)
    batches: Any = names.data(data)
    with show.bars() as bars:
        if stored is None:
            stored, batches = _decide(net, declared, batches, bars)
        report = apply_(net, stored, batches, progress=bars)
    save(net, out / "model")
    report.write(out / "report")
    show.data(report.to_json())
    show.text(str(report), "", f"model in {out / 'model'}, report in {out / 'report'}")


def check(
    show: Screen,
    directory: Path,
    factory: str,
    *,
    data: str | None,
    weights: Path | None,
    strict: bool,
) -> None:
    """Reload a saved model, check it against its plan, and run it.

    Args:
        show: where to print.
        directory: what `apply` or `otp.save` wrote.
        factory: name of what builds the dense model.
        data: name of batches to run.
        weights: the dense model's weights, to compare answers with.
        strict: as for `otp.load`.

    Raises:
        OTPruneError: if weights come without data, or the model is not what its plan says.
    """
    if weights is not None and data is None:
        raise OTPruneError(
            "there is nothing to compare answers on.",
            where=f"--weights {weights}",
            fix="pass --data as well.",
        )
    root = saved_in(directory)
    net = reload(root, factory, strict=strict)
    plan = plan_of(net)
    _expect("params", count_params(net), plan.params.after)
    facts: dict[str, Any] = {"model": str(root), "plan": plan.hash, "params": count_params(net)}
    if data is not None:
        facts |= _run(net, plan, names.data(data))
    if weights is not None and data is not None:
        dense = names.model(factory, weights)
        batches = collect(net, names.data(data), _CHECKED)
        facts["agreement"] = agreement(_outputs(dense, batches), _outputs(net, batches)).value
    show.data(json.dumps(facts, indent=2))
    show.table(("verified", ""), [(key, _spell(value)) for key, value in facts.items()])


def _run(net: nn.Module, plan: Plan, data: Any) -> Mapping[str, Any]:
    batches = collect(net, data, _CHECKED)
    outputs = _outputs(net, batches)
    tensors = [t for t in flat_tensors(outputs) if t.is_floating_point()]
    if not all(bool(torch.isfinite(t).all()) for t in tensors):
        raise VerificationError(
            "the model's output holds NaN or infinity.",
            where="verify, on the batches of --data",
            fix="compare with the dense model, and prune again.",
        )
    macs = count_macs(net, batches[0])
    _expect("macs", macs, plan.macs.after)
    return {"macs": macs, "batches": len(batches)}


def _outputs(net: nn.Module, batches: list[Any]) -> list[Any]:
    try:
        with evaluating(net), torch.no_grad():
            return [run(net, batch) for batch in batches]
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise VerificationError(
            f"the model does not run: {next(iter(str(error).splitlines()), '').rstrip('.')}.",
            where="verify, on the batches of --data",
            fix="pass batches as the dense model takes them.",
        ) from error


def _expect(name: str, found: int, promised: int) -> None:
    if found != promised:
        raise VerificationError(
            f"{name} are {found:,}; the plan says {promised:,}.",
            where=f"Plan.{name}",
            fix="pass batches of the shape that the plan was made with, or save the model again.",
        )


def _spell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.1%}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def print_schema(show: Screen) -> None:
    """Print the JSON schema of a policy file."""
    show.data(json.dumps(Policy.json_schema(), indent=2))


def run_demo(show: Screen, out: Path, *, seed: int, quick: bool) -> None:
    """Run the whole path on the digits, and print what came out.

    Args:
        show: where to print.
        out: directory to write.
        seed: fixes every random choice.
        quick: train less.
    """
    check_directory(out, report=".")
    with show.bars() as bars:
        outcome = demo.run(out, seed=seed, quick=quick, progress=bars)
    _show_plan(show, outcome.report.plan)
    show.text("", str(outcome.report), "")
    show.table(("network", "test accuracy", "MACs"), outcome.rows(), numbers=(1, 2))
    show.text(*(f"- {sentence}" for sentence in outcome.verdicts()))
    show.text("", f"open {out / 'report.html'}")
    show.data(outcome.to_json())
