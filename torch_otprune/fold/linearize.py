"""Decide which activations become linear, and prove on a copy what folds then."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from torch_otprune.errors import BudgetError
from torch_otprune.fold.apply import Fold, fold_
from torch_otprune.fold.chains import Layer, chains
from torch_otprune.fold.choose import Option, Row, best_sets, inner, objection, rows
from torch_otprune.fold.fronts import Front, fronts
from torch_otprune.fold.linear import TOKEN_NORMS, count
from torch_otprune.fold.lines import linearize_, lines_of
from torch_otprune.plan.linearize import amount, linear_rules, owned_sites, prices, refuse_all
from torch_otprune.plan.model import Cost, Folding, Line, Plan, Refusal
from torch_otprune.policy import Linearize
from torch_otprune.statistics.depth import SiteEvidence
from torch_otprune.statistics.reduce import ranks
from torch_otprune.structure.flow import flow
from torch_otprune.structure.forward import batch_size
from torch_otprune.structure.graph import Graph, Site
from torch_otprune.surgery.copied import copied
from torch_otprune.surgery.cut import cut_
from torch_otprune.surgery.exchange import exchange_, gone

__all__ = ["linearized"]


def linearized(
    model: nn.Module,
    plan: Plan,
    graph: Graph,
    evidence: Mapping[str, SiteEvidence],
    *,
    example: Any,
) -> Plan:
    """Complete a plan by what its policy's rules about activations ask for.

    Everything is tried on a copy that is cut and shortened as the plan says, because what folds
    and what it saves depends on the widths that are left. An activation whose fold does not hold
    there is refused, and the choice is made anew without it.

    Args:
        model: the dense model; left as it was.
        plan: what goes besides.
        graph: the model's analysis.
        evidence: what was seen of each activation, by name.
        example: one batch.

    Returns:
        the plan with lines, folds and what they cost; the same plan where no rule asks.

    Raises:
        BudgetError: if a rule's number of activations cannot go, or nothing would be removed.
        PolicyError: if a rule does not say how many.
        StructureError: if a rule reaches no activation that can become linear.
    """
    if not linear_rules(plan.policy):
        return plan
    with torch.no_grad():
        work = _Work(model, plan, graph, evidence, example)
        while True:
            chosen = _choose(work)
            done = _carry_out(work, chosen)
            if not done.failed:
                break
            work.refused |= done.failed
    if not (plan.cuts or plan.drops or done.lines):
        raise BudgetError(
            "nothing would be removed.",
            where=f"Policy, {len(linear_rules(plan.policy))} rules about activations",
            fix="lower the keep of a rule, or give it a drop.",
        )
    return _completed(work, done)


@dataclass
class _Work:
    """One model, what it loses besides, and what is refused so far."""

    model: nn.Module
    plan: Plan
    graph: Graph
    evidence: Mapping[str, SiteEvidence]
    example: Any
    refused: dict[str, Refusal] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @cached_property
    def rules(self) -> dict[int, Linearize]:
        return linear_rules(self.plan.policy)

    @cached_property
    def sites(self) -> dict[int, list[Site]]:
        """Leave out what goes with a block."""
        owned = owned_sites(self.model, self.plan.policy, self.graph)
        drops = self.plan.drops
        return {i: [s for s in found if not gone(drops, s.module)] for i, found in owned.items()}

    @cached_property
    def chains(self) -> tuple[tuple[Layer, ...], ...]:
        """Read the rows of layers off the cut copy, activations of any make included."""
        bends = [s.module for found in self.sites.values() for s in found if not s.reason]
        small = self.small()
        return chains(small, flow(small, self.example), batch_size(self.example), bends=bends)

    @cached_property
    def fronts(self) -> dict[str, Front]:
        """Find the layer in front of every activation."""
        kinds = {s.name: self.rules[i].surrogate for i, found in self.sites.items() for s in found}
        return fronts(self.chains, kinds)

    def small(self) -> nn.Module:
        """Copy the model as it will be before its activations go."""
        small = copied(self.model)
        for module in small.modules():  # hooks that watch the original stand for nothing here
            for table in (module._forward_pre_hooks, module._forward_hooks):
                for key, hook in list(table.items()):
                    if type(hook).__module__.startswith("torch_otprune."):
                        del table[key]
        cut_(small, self.plan.cuts)
        exchange_(small, self.plan.drops)
        return small

    def refuse(self, site: str, reason: str, fix: str) -> None:
        self.refused.setdefault(site, Refusal(group=site, reason=reason, fix=fix))


@dataclass(frozen=True)
class _Chosen:
    """An activation that is to go."""

    rule: int
    score: float


def _choose(work: _Work) -> dict[str, _Chosen]:
    """Let every rule choose, one after the other, around what is gone already."""
    chosen: dict[str, _Chosen] = {}
    for index, rule in work.rules.items():
        offered = [site for site in work.sites[index] if _may_go(work, rule, site)]
        price = prices(rule, offered, work.evidence)
        if rule.unfolded == "allow":
            ordered = sorted(price, key=lambda name: (price[name], name))
            sets = {n: Option(names=tuple(ordered[:n])) for n in range(len(price) + 1)}
        else:
            sets = _folding(work, rule, price, chosen)
        if max(sets) == 0:
            names = [site.name for site in work.sites[index]]
            refuse_all(index, rule, [work.refused[n] for n in names if n in work.refused])
        size = amount(index, work.plan.policy, sorted(sets))
        _note(work, index, size, max(sets))
        chosen |= {name: _Chosen(index, price[name]) for name in sets[size].names}
    return chosen


def _may_go(work: _Work, rule: Linearize, site: Site) -> bool:
    """Refuse what cannot become linear whatever folds."""
    if site.reason:
        work.refuse(site.name, site.reason, site.fix)
    elif site.name not in work.refused and not (front := work.fronts[site.name]).ready:
        free = rule.surrogate == "identity" and rule.unfolded == "allow"
        if front.stuck or not free:
            fix = "leave it in" if front.stuck else "use surrogate='identity', unfolded='allow'"
            work.refuse(site.name, front.reason, f"{fix}, or put a linear layer in front of it.")
    return site.name not in work.refused


def _folding(
    work: _Work, rule: Linearize, price: Mapping[str, float], chosen: Mapping[str, _Chosen]
) -> dict[int, Option]:
    """Find the sets that disappear inside folds, and refuse what never does."""
    strict = {n for n, c in chosen.items() if work.rules[c.rule].unfolded == "refuse"}
    shifting = {n for n, c in chosen.items() if work.rules[c.rule].surrogate == "affine"}
    shifting |= set(price) if rule.surrogate == "affine" else set()
    linear = {*price, *chosen}
    found = [row for chain in work.chains for row in rows(chain, linear, shifting)]
    gate, interior = rule.gate, rule.interior
    sets, usable = best_sets(found, price, strict, gate=gate, interior=interior)
    for name in set(price) - usable:
        _refuse_alone(work, rule, name, found)
    return sets


def _refuse_alone(work: _Work, rule: Linearize, name: str, found: Sequence[Row]) -> None:
    row = next((row for row in found if any(name in gap for gap in row.gaps)), None)
    reason = "no layer that could fold reads its output alone"
    if row is not None:
        reason = objection(row, name, gate=rule.gate, interior=rule.interior)
    work.refuse(name, f"0 MACs saved: {reason}", _fix(reason, "unfolded='allow'"))


def _fix(reason: str, other: str) -> str:
    if "only the interior" in reason:
        return f"set interior=True on the rule to accept another border, or {other}."
    if "would raise" in reason:
        return f"set gate='none' on the rule to fold all the same, or {other}."
    return f"set {other} on the rule if it is to go all the same."


def _note(work: _Work, index: int, size: int, most: int) -> None:
    wanted = work.rules[index].dropped(most)
    if wanted != size:
        said = f"rules[{index}] makes {size} of {most} activations linear, not {wanted}: "
        work.notes.append(f"{said}the others fold in groups only")


@dataclass
class _Done:
    """What came of a choice on the copy."""

    lines: list[Line] = field(default_factory=list)
    foldings: list[Folding] = field(default_factory=list)
    joined: dict[str, Folding] = field(default_factory=dict)  # by activation without which it is
    refused: dict[str, Refusal] = field(default_factory=dict)
    failed: dict[str, Refusal] = field(default_factory=dict)


def _carry_out(work: _Work, chosen: Mapping[str, _Chosen]) -> _Done:
    """Make activations linear on a copy, and fold what folds."""
    small, done = work.small(), _Done()
    order = [site.name for site in work.graph.sites if site.name in chosen]
    lines = [_line(work, name, chosen[name]) for name in order]
    values = lines_of(work.plan.model_copy(update={"lines": tuple(lines)}), work.evidence)
    seen = all(work.evidence[line.site].count for line in lines)
    before = {x.into: count(small.get_submodule(x.into)) for x in lines if x.into is not None}
    linearize_(small, lines, values if seen else None)
    found = chains(small, flow(small, work.example), batch_size(work.example))
    layers = {x.path: x for chain in found for x in chain}
    gained = {path: count(small.get_submodule(path)) - n for path, n in before.items()}
    lines = [x.model_copy(update={"params": gained.get(x.into or "", 0)}) for x in lines]
    records = [r for index in work.rules for r in _fold(work, small, lines, index)]
    done.foldings = [_folded(r, layers, lines) for r in records if r.accepted]
    done.joined = _joined(done.foldings, layers, lines)
    for record in (r for r in records if not r.accepted):
        name = " + ".join(record.layers)
        fix = _fix(record.reason, "leave it as it is")
        done.refused[name] = Refusal(group=name, reason=record.reason, fix=fix)
    done.lines = [_explained(work, line, done, records) for line in lines]
    return done


def _line(work: _Work, name: str, chosen: _Chosen) -> Line:
    rule = work.rules[chosen.rule]
    return Line(
        site=name,
        rule=chosen.rule,
        criterion=rule.criterion.kind,
        surrogate=rule.surrogate,
        into=work.fronts[name].path,
        reason="",
        error=float(f"{chosen.score:.3e}"),
        params=0,
    )


def _fold(work: _Work, small: nn.Module, lines: Iterable[Line], index: int) -> tuple[Fold, ...]:
    rule = work.rules[index]
    own = {line.into for line in lines if line.rule == index and line.into is not None}
    shifted = {x.into for x in lines if x.surrogate == "affine" and x.into is not None}
    return fold_(
        small,
        work.example,
        gate=rule.gate,
        interior=rule.interior,
        around=own,
        shifted=shifted,
    )


def _folded(record: Fold, layers: Mapping[str, Layer], lines: Sequence[Line]) -> Folding:
    certificate, last = record.certificate, record.layers[-1]
    assert certificate is not None
    assert certificate.macs is not None
    assert certificate.kind != "approximate"
    slot = 1 if isinstance(layers[record.layers[0]].module, TOKEN_NORMS) else 0
    interior = certificate.kind == "interior" and certificate.error is not None
    # Each rank measures on samples of its own, and all must write the same plan.
    error = float(f"{certificate.error:.1e}") if interior and ranks() == 1 else None
    return Folding(
        layers=record.layers,
        into=record.layers[slot],
        idle=tuple(path for x in record.layers[slot + 1 :] for path in layers[x].passed),
        lines=tuple(x.site for x in lines if x.into in record.layers[:-1]),
        writes=next((x.site for x in lines if x.into == last), last),
        kind=certificate.kind,
        border=certificate.border,
        error=error,
        reason=certificate.reason,
        params=certificate.params,
        macs=certificate.macs,
    )


def _joined(
    foldings: Sequence[Folding], layers: Mapping[str, Layer], lines: Sequence[Line]
) -> dict[str, Folding]:
    """Find the activations whose end makes a fold shorter."""
    intos = {x.into: x.site for x in lines if x.into is not None}
    found = {}
    for folding in foldings:
        for place in inner([layers[path] for path in folding.layers]):
            site = intos.get(folding.layers[place - 1])
            if site is not None:
                found[site] = folding
    return found


def _explained(work: _Work, line: Line, done: _Done, records: Sequence[Fold]) -> Line:
    """Say what an activation's end saves; refuse it where it should have folded and did not."""
    score = f"{line.criterion}: {line.error:.3g}"
    inside = done.joined.get(line.site)
    if inside is not None:
        said = f"{len(inside.layers)} layers fold into '{inside.into}', {_saved(inside)}"
        return line.model_copy(update={"reason": f"{score}; {said}"})
    near = [r for r in records if not r.accepted and line.into in r.layers[:-1]]
    reason = near[0].reason if near else "no layer that could fold reads its output alone"
    said = f"0 MACs saved: {reason.rstrip('.')}"
    if work.rules[line.rule].unfolded == "refuse":
        fix = _fix(reason, "unfolded='allow'")
        done.failed[line.site] = Refusal(group=line.site, reason=said, fix=fix)
    return line.model_copy(update={"reason": f"{score}; {said}"})


def _saved(folding: Folding) -> str:
    macs = folding.macs
    if macs.before == macs.after:
        return "0 MACs saved"
    return f"macs {macs.before:,} -> {macs.after:,}"


def _completed(work: _Work, done: _Done) -> Plan:
    plan, idle = work.plan, [x.site for x in done.lines if "; 0 MACs saved: " in x.reason]
    notes = list(dict.fromkeys(work.notes))
    if idle:
        many = f"{len(idle)} of {len(done.lines)} linear activations"
        notes.append(f"{many} fold nothing and save no MACs: {', '.join(idle)}")
    params = plan.params.after + sum(line.params for line in done.lines)
    params += sum(f.params.after - f.params.before for f in done.foldings)
    macs = plan.macs.after + sum(f.macs.after - f.macs.before for f in done.foldings)
    order = [site.name for site in work.graph.sites]
    refused = sorted(work.refused.values(), key=lambda refusal: order.index(refusal.group))
    return plan.model_copy(
        update={
            "lines": tuple(done.lines),
            "foldings": tuple(done.foldings),
            "refused": (*plan.refused, *refused, *done.refused.values()),
            "params": Cost(before=plan.params.before, after=params),
            "macs": Cost(before=plan.macs.before, after=macs),
            "notes": (*plan.notes, *notes),
        }
    )
