"""Two plans, one after the other, as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch_otprune.plan.model import Cost, Cut, Drop, Plan, Slice
from torch_otprune.policy import Policy

__all__ = ["composed", "relabelled"]

_Side = tuple[str, str]


def relabelled(plan: Plan, policy: Policy, origins: Sequence[int]) -> Plan:
    """Let a plan name the rules of another policy.

    Args:
        plan: made under a policy that was derived from the other one.
        policy: the other one.
        origins: which of its rules each rule of the plan's own policy stands for.

    Returns:
        the same decisions.
    """

    def moved(entries: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(e.model_copy(update={"rule": origins[e.rule]}) for e in entries)

    update = {"cuts": moved(plan.cuts), "drops": moved(plan.drops), "lines": moved(plan.lines)}
    return plan.model_copy(update={"policy": policy, **update})


def composed(first: Plan, second: Plan) -> Plan:
    """Write down as one plan what two plans did in turn, so that one replay does both.

    Args:
        first: for the dense model; without lines, folds and compacted lists, so that every path
            is what it was.
        second: for what the first one left, under the same policy.

    Returns:
        a plan from the dense model to what the second one left.
    """
    stays = _stays(first.cuts)
    heads = tuple(swap.path for drop in first.drops for swap in drop.swaps)
    cuts = list(first.cuts)
    for cut in second.cuts:
        mapped = [_mapped(p, stays) for p in cut.slices if not _within(p.path, heads)]
        same = (c for c in cuts if c.group == cut.group and len(c.keep) == cut.units)
        earlier = next(same, None)
        if earlier is None:  # its units are others now: a side keeps what all its cuts keep
            cuts.append(cut.model_copy(update={"slices": tuple(mapped)}))
        else:
            cuts[cuts.index(earlier)] = _joined(earlier, cut, mapped)
    drops: tuple[Drop, ...] = (*first.drops, *second.drops)
    layers = first.layers.before or second.layers.before
    update = {
        "fingerprint": first.fingerprint,
        "samples": max(first.samples, second.samples),
        "cuts": tuple(cuts),
        "drops": drops,
        "params": Cost(before=first.params.before, after=second.params.after),
        "macs": Cost(before=first.macs.before, after=second.macs.after),
        "layers": Cost(before=layers, after=max(0, layers - len(drops))),
        "notes": tuple(dict.fromkeys((*first.notes, *second.notes))),
    }
    return second.model_copy(update=update)


def _stays(cuts: Sequence[Cut]) -> dict[_Side, Slice]:
    """List what is left along every side: several groups may lie along one."""
    found: dict[_Side, Slice] = {}
    for piece in (piece for cut in cuts for piece in cut.slices):
        key = piece.path, piece.side
        keep = set(piece.keep) & set(found[key].keep) if key in found else piece.keep
        found[key] = piece.model_copy(update={"keep": tuple(sorted(keep))})
    return found


def _mapped(piece: Slice, stays: Mapping[_Side, Slice]) -> Slice:
    """Number what a later slice keeps as the dense model does."""
    earlier = stays.get((piece.path, piece.side))
    if earlier is None:
        return piece
    keep = tuple(earlier.keep[i] for i in piece.keep)
    return piece.model_copy(update={"size": earlier.size, "keep": keep})


def _within(path: str, heads: Sequence[str]) -> bool:
    """Tell what belongs to a stand-in: it is made as wide as what it stands beside."""
    return any(path == head or path.startswith(f"{head}.") for head in heads)


def _joined(earlier: Cut, later: Cut, mapped: Sequence[Slice]) -> Cut:
    spoken = {(piece.path, piece.side) for piece in mapped}
    errors = earlier.error, later.error
    rest = [piece for piece in earlier.slices if (piece.path, piece.side) not in spoken]
    return later.model_copy(
        update={
            "units": earlier.units,
            "keep": tuple(earlier.keep[i] for i in later.keep),
            "error": None if None in errors else sum(e for e in errors if e is not None),
            "slices": (*mapped, *rest),
        }
    )
