"""Transport and least squares through the front door, on nets of the zoo, a little and a lot.

`-m zoo` asks for every net at every ratio; without it, for those that between them hold every kind
of consumer, at both ends.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch

import torch_otprune as otp
from tests.zoo import ENTRIES
from tests.zoo.oracle import RATIOS, alive, doubled
from torch_otprune.structure.forward import map_tensors

FAST = (
    "resnet",
    "csp_chunk_residual",
    "depthwise_multiplier",
    "matmul_with_own_weights",
    "experts_by_weight",
    "multihead_attention",
    "lstm_two_layers",
    "gru",
    "mixtral",
    "llama-grouped",
)
ENDS = (0.1, 0.8)
WIDE = 24  # samples: several of each example, so that there is something to fit


def batches(example: Any) -> list[Any]:
    """Repeat an example with a little noise."""
    generator = torch.Generator().manual_seed(7)

    def stirred(t: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(t.shape, generator=generator, dtype=torch.float64)
        return t + noise.to(t) * 0.5 if t.is_floating_point() else t

    return [map_tensors(example, stirred) for _ in range(WIDE // 2)]


def rules(model: Any, example: Any, ratio: float) -> list[Any]:
    """Ask for whatever kinds of units the net has."""
    kinds = {ward.kind for ward in otp.doctor(model, example).groups}
    found = {"channels": otp.Channels, "heads": otp.Heads}
    keep = f"{100 - round(100 * ratio)}%"
    return [rule(keep=keep, criterion="transport") for kind, rule in found.items() if kind in kinds]


def hold(name: str, ratio: float) -> otp.OTPruneError | None:
    """Prune and repair: every cut is exact before the repair, and the repair does no harm.

    Returns:
        what it was refused with; None where it was pruned.
    """
    entry = ENTRIES[name]
    if entry.needs and find_spec(entry.needs) is None:
        pytest.skip(f"needs {entry.needs}")
    torch.manual_seed(0)
    model, example = alive(entry.build().double().eval()), doubled(entry.example())
    asked = rules(model, example, ratio)
    if not asked:
        pytest.skip("no channels and no heads")
    before = sum(p.numel() for p in model.parameters())
    try:
        report = otp.prune_(model, otp.Policy(rules=asked), batches(example), timing=0)
    except otp.OTPruneError as refusal:
        return refusal
    assert sum(p.numel() for p in model.parameters()) < before
    error = report.output_error
    assert error.after_repair <= error.before_repair * (1 + 1e-9)
    assert all(note.note for note in report.repairs if not note.accepted)
    return None


@pytest.mark.parametrize("ratio", ENDS)
@pytest.mark.parametrize("name", FAST)
def test_transport_and_least_squares_hold_at_both_ends(name: str, ratio: float) -> None:
    assert hold(name, ratio) is None


@pytest.mark.zoo
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("name", sorted(n for n, e in ENTRIES.items() if not e.refused))
def test_they_hold_on_every_net_at_every_ratio(name: str, ratio: float) -> None:
    refusal = hold(name, ratio)
    assert refusal is None or all((refusal.problem, refusal.where, refusal.fix))
