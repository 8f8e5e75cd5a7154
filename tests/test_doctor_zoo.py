"""Every parameter of every net of the zoo is accounted for, with a reason and a fix if it stays."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

import torch_otprune as otp
from tests.zoo import ENTRIES, patterns, recurrent, vision
from torch_otprune.structure.doctor import FATES
from torch_otprune.structure.forward import map_tensors

QUICK = {**patterns.ENTRIES, **recurrent.ENTRIES, **vision.ENTRIES}
NAMES = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.zoo) for name in sorted(ENTRIES)
]


@pytest.mark.parametrize("name", NAMES)
def test_the_fates_are_all_parameters_and_what_stays_has_reason_and_fix(name: str) -> None:
    entry = ENTRIES[name]
    if entry.needs and find_spec(entry.needs) is None:
        pytest.skip(f"needs {entry.needs}")
    torch.manual_seed(0)
    model = entry.build()
    dtype = next(model.parameters()).dtype
    example = map_tensors(entry.example(), lambda t: t.to(dtype) if t.is_floating_point() else t)
    found = otp.doctor(model, example)
    total = sum(p.numel() for p in model.parameters())
    assert sum(found.elements(fate) for fate in FATES) == found.params == total
    for finding in found.findings:
        assert bool(finding.reason) == bool(finding.fix) == (finding.fate != "prunable")
        assert bool(finding.groups) == (finding.fate == "prunable")
