"""Folding in place: exact, or refused with the reason."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.cases import CASES, outputs
from torch_otprune.errors import CalibrationError, PolicyError, StructureError
from torch_otprune.fold import Fold, fold_
from torch_otprune.report import count_macs, count_params


def example(*shape: int) -> Tensor:
    """Draw a batch."""
    return torch.randn(shape, dtype=torch.float64)


def row(*layers: nn.Module) -> nn.Sequential:
    """Put layers in a row, in float64, their norms alive."""
    model = nn.Sequential(*layers).double().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for tensor in (*module.parameters(), module.running_mean, module.running_var):
                    tensor.uniform_(0.5, 2)
    return model


def folded(model: nn.Module, x: Any, **options: Any) -> tuple[Fold, ...]:
    """Fold, and hold the model's output to where it was."""
    before = outputs(model, x)
    records = fold_(model, x, **options)
    for a, b in zip(before, outputs(model, x), strict=True):
        torch.testing.assert_close(a, b)
    return records


def accepted(records: tuple[Fold, ...]) -> list[tuple[str, ...]]:
    """List what was folded."""
    return [record.layers for record in records if record.accepted]


@pytest.mark.parametrize("name", sorted(CASES))
@pytest.mark.parametrize("gate", ["macs", "params", "none"])
def test_folding_leaves_every_output_where_it_was(name: str, gate: Any) -> None:
    model, batch = CASES[name].model(), CASES[name].batch()
    macs, params = count_macs(model, batch), count_params(model)
    records = [r for r in folded(model, batch, gate=gate) if r.accepted]
    costs = [r.certificate for r in records if r.certificate]
    assert macs - count_macs(model, batch) == sum(c.macs.before - c.macs.after for c in costs)
    assert params - count_params(model) == sum(c.params.before - c.params.after for c in costs)


def test_a_folded_model_does_not_fold_again() -> None:
    model = row(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1))
    x = example(2, 3, 9, 9)
    assert accepted(folded(model, x)) == [("0", "1")]
    state = copy.deepcopy(model.state_dict())
    assert folded(model, x) == ()
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)


def test_the_folded_layer_takes_the_first_place_and_identities_the_others() -> None:
    model = row(nn.Conv2d(3, 6, 3, bias=False), nn.Dropout(0.1), nn.BatchNorm2d(6), nn.Dropout(0.2))
    folded(model, example(2, 3, 9, 9))
    assert [type(m) for m in model] == [nn.Conv2d, nn.Identity, nn.Identity, nn.Dropout]
    assert set(model.state_dict()) == {"0.weight", "0.bias"}


def test_a_folded_state_loads_into_a_model_folded_alike() -> None:
    models = [row(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1)) for _ in range(2)]
    x = example(2, 3, 9, 9)
    for model in models:
        fold_(model, x)
    models[0].load_state_dict(models[1].state_dict())
    torch.testing.assert_close(models[0](x), models[1](x), rtol=0, atol=0)


def test_two_wide_kernels_would_cost_39_percent_more_and_are_refused_with_both_numbers() -> None:
    model = row(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1))
    (record,) = folded(model, example(2, 8, 16, 16), interior=True)
    assert not record.accepted
    before, after = 2 * 9 * 64 * 256, 25 * 64 * 256
    assert record.reason == f"it would raise macs from {before:,} to {after:,}"
    assert record.certificate.macs.ratio == pytest.approx(1.39, abs=0.005)


def test_without_a_gate_dear_folds_are_made() -> None:
    model = row(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    assert accepted(folded(model, example(1, 8, 20, 20))) == []
    assert accepted(folded(model, example(1, 8, 20, 20), gate="none")) == [("0", "1")]


def test_one_tap_and_a_kernel_fold_when_the_middle_is_wider() -> None:
    wide = row(nn.Conv2d(4, 8, 1, bias=False), nn.Conv2d(8, 4, 3, padding=1))
    narrow = row(nn.Conv2d(8, 2, 1, bias=False), nn.Conv2d(2, 8, 3, padding=1))
    assert accepted(folded(wide, example(2, 4, 9, 9))) == [("0", "1")]
    assert accepted(folded(narrow, example(2, 8, 9, 9))) == []


def test_the_dearer_half_of_a_row_stays_apart() -> None:
    model = row(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1))
    first, second = folded(model, example(2, 8, 32, 32))
    assert (second.layers, second.accepted) == (("1", "2"), True)
    assert (first.layers, first.accepted) == (("0", "1", "2"), False)


def test_a_dense_pair_folds_only_where_the_middle_is_wide() -> None:
    assert accepted(folded(row(nn.Linear(6, 9), nn.Linear(9, 6)), example(3, 6)))
    assert not accepted(folded(row(nn.Linear(6, 2), nn.Linear(2, 6)), example(3, 6)))


@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.RMSNorm(6)])
def test_a_norms_line_goes_into_the_layer_behind_and_the_norm_stays(norm: nn.Module) -> None:
    model = row(nn.Linear(5, 6), norm, nn.Dropout(0.1), nn.Linear(6, 4), nn.ReLU())
    nn.init.normal_(norm.weight)
    assert accepted(folded(model, example(3, 2, 5))) == [("1", "3")]
    assert [type(m) for m in model][1:] == [type(norm), nn.Dropout, nn.Linear, nn.ReLU]
    assert set(model.state_dict()) == {"0.weight", "0.bias", "3.weight", "3.bias"}
    assert accepted(folded(model, example(3, 2, 5))) == []


def test_a_linearised_segment_becomes_one_layer() -> None:
    model = row(
        nn.Conv2d(4, 24, 1, padding=1, bias=False),
        nn.BatchNorm2d(24),
        nn.Identity(),
        nn.Conv2d(24, 24, 3, groups=24, bias=False),
        nn.BatchNorm2d(24),
        nn.Identity(),
        nn.Conv2d(24, 4, 1),
    )
    (record,) = folded(model, example(2, 4, 8, 8))
    assert record.layers == ("0", "1", "3", "4", "6")
    assert model[0].weight.shape == (4, 4, 3, 3)
    assert record.certificate.error < 1e-12


def test_a_border_that_would_differ_is_refused_unless_asked_for() -> None:
    model = row(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 3, padding=1))
    x = example(2, 4, 9, 9)
    (record,) = folded(model, x)
    assert record.reason.startswith("only the interior would be right")
    before = model(x)
    (record,) = fold_(model, x, interior=True)
    assert (record.accepted, record.certificate.kind) == (True, "interior")
    assert record.certificate.error > 1e-6
    torch.testing.assert_close(model(x)[:, :, 1:-1, 1:-1], before[:, :, 1:-1, 1:-1])


def refusals(records: tuple[Fold, ...]) -> dict[tuple[str, ...], str]:
    """List what was refused."""
    return {record.layers: record.reason for record in records if not record.accepted}


class Twice(nn.Module):
    """Runs its norm on two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.a(x)) + self.norm(self.b(x))


def test_a_module_that_runs_twice_is_refused() -> None:
    records = folded(row(Twice()), example(5, 4))
    assert set(refusals(records).values()) == {"it runs 2 times"}


def test_a_module_in_two_places_and_tied_weights_are_refused() -> None:
    shared = nn.Linear(4, 4)
    model = row(nn.Linear(4, 4), shared)
    model.alias = shared
    model.forward = lambda x: nn.functional.relu(model[1](model[0](x)))
    assert refusals(folded(model, example(3, 4))) == {("1",): "it stands in several places"}
    tied = row(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    assert refusals(folded(tied, example(3, 4)))[("0",)] == "it shares a tensor with another module"


def test_hooks_and_parametrisations_are_refused_and_left_on() -> None:
    hooked = row(nn.Linear(4, 4), nn.Linear(4, 4))
    hooked[0].register_forward_hook(lambda *_: None)
    assert refusals(folded(hooked, example(3, 4))) == {("0",): "it carries hooks"}
    normed = row(nn.Linear(4, 4), nn.Linear(4, 4))
    nn.utils.parametrizations.weight_norm(normed[1])
    assert refusals(folded(normed, example(3, 4))) == {("1",): "its weights are parametrised"}


def test_a_subclass_with_a_forward_of_its_own_is_refused() -> None:
    class Mine(nn.Linear):
        """Doubles."""

        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    records = folded(row(nn.Linear(4, 4), Mine(4, 4)), example(3, 4))
    assert refusals(records) == {("1",): "Mine has a forward of its own"}


class Nosy(nn.Module):
    """Looks at what a layer is."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.d(self.c(x)))
        return self.b(self.a(y)) * self.b.in_features


def test_a_model_that_misses_a_folded_layer_gets_it_back_and_keeps_the_rest() -> None:
    model = row(Nosy())
    (first, second) = folded(model, example(3, 4))
    assert (first.layers, first.accepted) == (("0.c", "0.d"), True)
    assert (second.layers, second.accepted) == (("0.a", "0.b"), False)
    assert "once folded, the model does not run" in second.reason
    assert "in_features" in second.reason
    assert isinstance(model[0].b, nn.Linear)


class Peeking(nn.Module):
    """Keeps an activation where no op is seen to read it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y) * float(y.numpy().mean())


def test_an_output_that_moves_is_put_back() -> None:
    model = row(Peeking())
    before = [model[0].a, model[0].b]
    x = example(3, 4)
    (record,) = folded(model, x)
    assert record.reason.startswith("the model's output moved by")
    assert [model[0].a, model[0].b] == before


def test_a_tolerance_that_rounding_exceeds_refuses() -> None:
    model = row(nn.Linear(64, 64), nn.BatchNorm1d(64)).float()
    (record,) = fold_(model, torch.randn(8, 64), tolerance=0.0)
    assert not record.accepted
    assert "more than 0.0e+00" in record.reason
    assert isinstance(model[1], nn.BatchNorm1d)


def test_training_flags_and_gradients_survive() -> None:
    model = row(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    x = example(6, 4)
    with torch.inference_mode():
        fold_(model, x)
    assert model.training and model[0].training and model[1].training
    model(x).sum().backward()
    assert model[0].weight.grad is not None


def test_layers_of_different_dtypes_stay_apart() -> None:
    class Mixed(nn.Sequential):
        """Casts in a hook-free way: the norm takes both."""

        def forward(self, x: Tensor) -> Tensor:
            return self[1](self[0](x))

    model = Mixed(nn.Conv2d(3, 4, 1).bfloat16(), nn.BatchNorm2d(4)).eval()
    assert accepted(fold_(model, torch.randn(2, 3, 4, 4).bfloat16())) == []


kinds = st.sampled_from(["conv", "strided", "depthwise", "tap", "norm", "pool", "none", "relu"])


@given(names=st.lists(kinds, min_size=2, max_size=6), gate=st.sampled_from(["macs", "none"]))
def test_no_row_moves_its_output(names: list[str], gate: Any) -> None:
    make = {
        "conv": lambda: nn.Conv2d(4, 4, 3, bias=False),
        "strided": lambda: nn.Conv2d(4, 4, 2, stride=2, padding=1),
        "depthwise": lambda: nn.Conv2d(4, 4, 3, padding=2, groups=4, bias=False),
        "tap": lambda: nn.Conv2d(4, 4, 1),
        "norm": lambda: nn.BatchNorm2d(4),
        "pool": lambda: nn.AvgPool2d(2, 1),
        "none": nn.Identity,
        "relu": nn.ReLU,
    }
    model, x = row(nn.Conv2d(4, 4, 1), *(make[name]() for name in names)), example(2, 4, 41, 39)
    before = count_macs(model, x)
    records = folded(model, x, gate=gate)
    assert all(record.certificate.error < 1e-12 for record in records if record.accepted)
    assert gate == "none" or count_macs(model, x) <= before
    assert not accepted(folded(model, x, gate=gate))


def test_a_record_survives_json() -> None:
    model = row(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3), nn.ReLU())
    for record in fold_(model, example(3, 4), gate="params"):
        assert Fold.model_validate_json(record.model_dump_json()) == record


def test_errors_read() -> None:
    model = row(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(PolicyError, match="gate is 'flops'") as error:
        fold_(model, example(3, 4), gate="flops")  # type: ignore[arg-type]
    assert "'macs', 'params' or 'none'" in str(error.value)
    with pytest.raises(CalibrationError, match="does not run on batch 0"):
        fold_(model, example(3, 5))
    with pytest.raises(StructureError, match="has no parameters"):
        fold_(nn.Sequential(nn.ReLU()), example(3, 5))
