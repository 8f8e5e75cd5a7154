"""Input-convex nets are prunable: pruned equals masked, and hidden widths go."""

from __future__ import annotations

import pytest
import torch

import torch_otprune as otp
from tests.zoo.convex import ENTRIES
from tests.zoo.oracle import RATIOS, alive, case_of, differences, doubled

TOLERANCE = 1e-9
WIDTHS = {
    "ficnn": [9, 8, 7],
    "ficnn_softplus": [9],
    "picnn": [9, 9, 8, 8],
    "icrnn": [8, 8, 8, 8],
    "icrnn_monotone": [8, 8, 8, 8],
    "iclrnn": [8, 8],
    "iclstm": [8, 8],
    "iclstm_log_convex": [8, 8],
}


def test_every_net_is_known() -> None:
    assert set(WIDTHS) == set(ENTRIES)


@pytest.mark.parametrize("name", ENTRIES)
def test_every_hidden_width_can_go(name: str) -> None:
    assert [g.units for g in case_of(ENTRIES[name]).graph.groups] == WIDTHS[name]


@pytest.mark.parametrize("name", ENTRIES)
def test_pruned_equals_masked_at_every_ratio(name: str) -> None:
    case = case_of(ENTRIES[name])
    found = list(differences(case, list(case.graph.groups)))
    assert len(found) == len(RATIOS)
    assert not [(what, far, said) for what, far, said in found if not far < TOLERANCE]


def test_the_skip_of_an_lstm_locks_the_width_of_its_input() -> None:
    blocked = {path for b in case_of(ENTRIES["iclstm"]).graph.blocked for path in b.modules}
    assert {"cells.0.v", "cells.1.v"} <= blocked


@pytest.mark.parametrize("name", ENTRIES)
def test_a_pruned_net_saves_and_loads(name: str, tmp_path: object) -> None:
    torch.manual_seed(0)
    model, example = alive(ENTRIES[name].build().double().eval()), doubled(ENTRIES[name].example())
    policy = otp.Policy(rules=otp.Channels(keep="50%", criterion="magnitude", repair="none"))
    otp.prune_(model, policy, [example], timing=0)
    otp.save(model, f"{tmp_path}/small")
    again = otp.load(f"{tmp_path}/small", factory=lambda: ENTRIES[name].build().double())
    pair = example if isinstance(example, tuple) else (example,)
    assert torch.equal(again.eval()(*pair), model(*pair))
