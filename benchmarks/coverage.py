"""On how many architectures does a cut compute what the masked network computes, by default?

Every net of `tests/zoo`, in float64 and with random weights, through us and through Torch-Pruning
side by side. Expected before measuring: of ours at least nine rows in ten are exact, all others
are refused with a reason, none is wrong and none hangs.

    python benchmarks/coverage.py
    python benchmarks/coverage.py --only 'llama|resnet' --out /tmp/coverage.json
    python benchmarks/plot_coverage.py

- *ours, at random*: random units of every group that passes its own trial, kind by kind and all
  at once, at every ratio. *ours, planned*: a plan by the default criterion, repaired by least
  squares, at one half.
- *Torch-Pruning*: its pruner at one half with its defaults; the layers that write the model's
  output are named to it, as its manual asks. No other hint is given, as none is given to us.
- The oracle is the same for both: the dense network whose consumers' weights on the removed
  channels are zero; a layer-norm sees only what is kept.

Each net runs in a process of its own and is stopped at the limit. Rows are written one by one and
skipped when they are there already.
"""

from __future__ import annotations

import argparse
import copy
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch_otprune as otp
from benchmarks.common import environment, in_a_child, read_json, write_json
from tests.zoo import ENTRIES
from tests.zoo.oracle import Case, case_of, differences
from torch_otprune.errors import OTPruneError
from torch_otprune.structure.forward import evaluating, flat_tensors, run
from torch_otprune.structure.layers import TokenNorm
from torch_otprune.surgery import disagreement
from torch_otprune.surgery.oracle import gap

OUT = Path(__file__).resolve().parent / "results" / "coverage.json"
EXACT, RATIO = 1e-5, 0.5
WARM = "conv1d_causal", "bert"
KINDS = ("channels", "heads", "hidden")  # of experts, the tests
Row = dict[str, Any]


def ours_at_random(case: Case) -> Row:
    """Cut random units of all groups that pass their trial."""
    kept, refused = [], {b.name: b.reason for b in case.graph.blocked}
    for group in (g for g in case.graph.groups if g.kind in KINDS):
        far, said = case.compared([group], RATIO)
        if far < EXACT:
            kept.append(group)
        else:
            refused[group.name] = said
    worst = max((far for _, far, _ in differences(case, kept)), default=0.0)
    status = "exact" if worst < EXACT else "wrong"
    row = {"groups": {k: sum(g.kind == k for g in kept) for k in KINDS}, "worst": worst}
    return row | {"status": status if kept else "refused", "refused": refused}


def ours_planned(case: Case) -> Row:
    """Plan by default, repair by least squares, on a copy."""
    model = copy.deepcopy(case.model)
    found = {g.kind for g in case.graph.groups}
    rules = {"channels": otp.Channels, "heads": otp.Heads, "hidden": otp.Hidden}
    chosen = [make(keep=RATIO) for kind, make in rules.items() if kind in found]
    if not chosen:
        return {"status": "refused", "said": "no group can be cut"}
    try:
        with otp.attach(model, otp.Policy(rules=chosen)) as attached:
            plan = otp.observe(attached, [case.example]).plan()
        far = disagreement(case.model, plan.cuts, case.example)
        report = otp.apply_(model, plan, [case.example])
    except OTPruneError as error:
        return {"status": "refused", "said": str(error)}
    kept = report.plan.params.after / report.plan.params.before
    return {"status": "exact" if far < EXACT else "wrong", "worst": far, "params_kept": kept}


class _Peer:
    """One run of Torch-Pruning's pruner, with a note of what it removed from where."""

    def __init__(self, case: Case) -> None:
        self.case, self.model = case, copy.deepcopy(case.model)
        self.names = {module: name for name, module in self.model.named_modules()}
        self.holders = {
            id(parameter): name
            for name, module in self.model.named_modules()
            for parameter in module.parameters(recurse=False)
        }
        self.alive: dict[tuple[str, str], list[int]] = {}
        self.gone: dict[tuple[str, str], set[int]] = defaultdict(set)

    def prune(self) -> None:
        """Remove half of everything, group by group."""
        import torch_pruning as tp

        wanted = {b.name for b in self.case.graph.blocked if "model's output" in b.reason}
        ignored = [module for module, name in self.names.items() if name in wanted]
        pruner = tp.pruner.BasePruner(
            self.model,
            self.case.example,
            importance=tp.importance.MagnitudeImportance(p=2),
            pruning_ratio=RATIO,
            ignored_layers=ignored,
            forward_fn=lambda model, batch: flat_tensors(run(model, batch)),
            num_heads={},
            out_channel_groups={},
            in_channel_groups={},
            root_module_types=[nn.modules.conv._ConvNd, nn.Linear],
        )
        for group in pruner.step(interactive=True):
            for dependency, indices in group:
                self._note(pruner.DG, dependency, indices)
            group.prune()

    def _note(self, graph: Any, dependency: Any, indices: list[int]) -> None:
        module = dependency.target.module
        by = graph.get_pruner_of_module(module)
        if isinstance(module, nn.Parameter):  # the scale of a home-made norm, say
            name = self.holders.get(id(module))
        else:
            name = self.names.get(module)
        if name is None:
            return
        same = by.prune_out_channels == by.prune_in_channels
        side = "through" if same else "in" if dependency.handler == by.prune_in_channels else "out"
        count = by.get_in_channels if side == "in" else by.get_out_channels
        if (name, side) not in self.alive:
            self.alive[name, side] = list(range(count(module) or 0))
        left = self.alive[name, side]
        self.gone[name, side] |= {left[i] for i in indices if i < len(left)}
        self.alive[name, side] = [c for i, c in enumerate(left) if i not in set(indices)]

    def expected(self) -> list[Tensor]:
        """Run the dense model with the consumers' weights on what is gone at zero."""
        masked = copy.deepcopy(self.case.model)
        for (name, side), channels in self.gone.items():
            module, at = masked.get_submodule(name), sorted(channels)
            if side == "in":
                _silence(module, at)
            elif side == "through" and _is_norm(module):
                size = _width(module)
                keep = torch.tensor([i for i in range(size) if i not in channels])
                module.register_forward_hook(_kept_norm(self.model.get_submodule(name), keep))
        return _outputs(masked, self.case.example)


def _width(norm: nn.Module) -> int:
    if isinstance(norm, TokenNorm):
        return int(norm.normalized_shape[-1])
    return len(next(norm.parameters()))


def _is_norm(module: nn.Module) -> bool:
    own = "norm" in type(module).__name__.lower() and "batch" not in type(module).__name__.lower()
    return isinstance(module, TokenNorm) or (own and len(list(module.parameters())) == 1)


@torch.no_grad()
def _silence(module: Any, at: list[int]) -> None:
    if getattr(module, "transposed", False):
        module.weight[at] = 0
    elif getattr(module, "groups", 1) > 1:
        each = module.in_channels // module.groups
        per = module.out_channels // module.groups
        for channel in at:
            group = channel // each
            module.weight[group * per : (group + 1) * per, channel % each] = 0
    else:
        module.weight[:, at] = 0


def _kept_norm(small: nn.Module, keep: Tensor) -> Callable[..., Tensor]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return torch.zeros_like(out).index_copy(-1, keep, small(args[0].index_select(-1, keep)))

    return hook


def _outputs(model: nn.Module, example: Any) -> list[Tensor]:
    with evaluating(model), torch.no_grad():
        return flat_tensors(run(model, example))


def peer(case: Case) -> Row:
    """Say what Torch-Pruning makes of a net."""
    cut = _Peer(case)
    before = sum(p.numel() for p in cut.model.parameters())
    try:
        cut.prune()
    except Exception as error:  # it may raise anything
        return {"status": "crashes", "said": f"{type(error).__name__}: {error}"[:200]}
    if sum(p.numel() for p in cut.model.parameters()) == before:
        return {"status": "prunes nothing"}
    try:
        got = _outputs(cut.model, case.example)
    except Exception as error:  # a cut net may fail in any way
        return {"status": "fails in forward", "said": f"{type(error).__name__}: {error}"[:200]}
    far = gap(cut.expected(), got)
    return {"status": "exact" if far < EXACT else "wrong", "worst": far}


TOOLS: dict[str, Callable[[Case], Row]] = {
    "ours, at random": ours_at_random,
    "ours, planned": ours_planned,
    "Torch-Pruning": peer,
}


def measure(name: str, tool: str, limit: float) -> Row:
    """Run one tool on one net in a process of its own.

    Args:
        name: of the net.
        tool: one of `TOOLS`.
        limit: seconds of processor time after which it is stopped.

    Returns:
        its row; `hangs` where it was stopped, `crashes` where the process died.
    """
    found = in_a_child(lambda: TOOLS[tool](case_of(ENTRIES[name])), limit)
    if found is None:
        return {"status": "hangs", "said": f"stopped after {limit:g} s of processor time"}
    return found or {"status": "crashes", "said": "the process died"}


def main(words: list[str] | None = None) -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="regular expression on names")
    parser.add_argument("--tools", default=",".join(TOOLS).replace(", ", "; "), help="which")
    parser.add_argument(
        "--limit", type=float, default=120.0, help="seconds of processor time a net may take"
    )
    parser.add_argument("--every", type=int, default=1, help="take one net in so many")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(words)
    rows = read_json(args.out)["rows"] if args.out.exists() else []
    known = {(row["name"], row["tool"]) for row in rows}
    tools = [t for t in TOOLS if t.replace(", ", "; ") in args.tools.split(",")]
    names = [n for n in sorted(ENTRIES) if re.search(args.only, n)][:: args.every]
    for tool in tools:  # what is imported and set up on first use is not timed, and done once
        for name in WARM:
            TOOLS[tool](case_of(ENTRIES[name]))
    about = environment(seed=0)
    for name in names:
        for tool in (t for t in tools if (name, t) not in known):
            row = {"name": name, "family": ENTRIES[name].family, "tool": tool}
            row["commit"] = about["commit"]
            rows.append(row | measure(name, tool, args.limit))
            write_json(args.out, {"environment": about, "rows": rows})
            print(name, tool, rows[-1]["status"], rows[-1].get("seconds", ""), flush=True)


if __name__ == "__main__":
    main()
