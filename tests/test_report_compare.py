"""How far two models are apart: zero for equals, one for silence, by name for each layer."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from torch_otprune.errors import VerificationError
from torch_otprune.report import agreement, layer_errors, output_error, per_layer_error

LOGITS = torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 1.0], [0.0, 1.0, 5.0], [4.0, 0.0, 0.0]])


class Net(nn.Module):
    """Two layers with an in-place activation right behind each."""

    def __init__(self, hidden: int = 6) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, hidden), nn.Linear(hidden, 3)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.down(self.act(self.up(x))))
        return out


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: (x, x.sum()),
        lambda x: [x, x],
        lambda x: {"logits": x, "ids": x.argmax(1)},
        lambda x: OrderedDict(logits=x, hidden=(x, x)),
    ],
)
def test_a_scaled_output_errs_by_the_scale_in_every_wrapping(
    wrap: Callable[[Tensor], Any],
) -> None:
    assert output_error(wrap(LOGITS), wrap(1.25 * LOGITS)) == pytest.approx(0.25)


@given(st.floats(0, 3), st.floats(1e-3, 1e3))
def test_the_output_error_is_free_of_units(shift: float, unit: float) -> None:
    dense = torch.randn(5, 4, dtype=torch.float64)
    moved = dense + shift * torch.randn(5, 4, dtype=torch.float64)
    expected = (moved - dense).norm() / dense.norm()
    assert output_error(unit * dense, unit * moved) == pytest.approx(expected.item())


def test_equal_outputs_have_no_error() -> None:
    assert output_error(LOGITS, LOGITS.clone()) == 0


def test_silence_has_error_one() -> None:
    assert output_error(LOGITS, torch.zeros_like(LOGITS)) == 1


def test_a_dead_dense_output_is_told_from_a_wrong_one() -> None:
    dead = torch.zeros(2, 2)
    assert (output_error(dead, dead), output_error(dead, dead + 1)) == (0, float("inf"))


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_an_output_that_is_no_longer_finite_has_infinite_error(broken: float) -> None:
    pruned = LOGITS.clone()
    pruned[1, 1] = broken
    assert output_error(LOGITS, pruned) == float("inf")


def test_masks_of_the_dense_model_are_left_out() -> None:
    dense = LOGITS.clone()
    dense[0, 2] = -float("inf")
    assert output_error(dense, dense.clone()) == 0


def test_complex_outputs_are_compared() -> None:
    dense = torch.complex(LOGITS, LOGITS)
    assert output_error(dense, 1.5 * dense) == pytest.approx(0.5)


def test_half_precision_does_not_overflow() -> None:
    dense = torch.full((400, 400), 300.0, dtype=torch.float16)
    assert output_error(dense, 1.5 * dense) == pytest.approx(0.5)


def test_a_cache_that_became_smaller_is_left_out() -> None:
    dense, pruned = (LOGITS, torch.ones(2, 8)), (LOGITS, torch.ones(2, 4))
    assert output_error(dense, pruned) == 0


@pytest.mark.parametrize("pruned", [torch.ones(4, 2), None, torch.ones(4, 3, dtype=torch.int64)])
def test_outputs_without_a_common_tensor_are_an_error(pruned: Any) -> None:
    with pytest.raises(VerificationError) as error:
        output_error(LOGITS.long() if isinstance(pruned, Tensor) else LOGITS, pruned)
    assert "no floating tensor of one shape in common" in str(error.value)
    assert "dense output (4, 3)" in str(error.value)


def test_top1_agreement_counts_equal_answers() -> None:
    pruned = LOGITS.clone()
    pruned[0] = torch.tensor([0.0, 9.0, 0.0])
    found = agreement(LOGITS, pruned)
    assert (found.kind, found.value, found.samples) == ("top1", 0.75, 4)


def test_batches_are_taken_together() -> None:
    parts = list(LOGITS.split(2))
    assert agreement(parts, parts) == agreement(LOGITS, LOGITS)


def test_named_logits_are_compared_token_by_token() -> None:
    tokens = LOGITS.view(2, 2, 3)
    found = agreement({"logits": tokens, "x": LOGITS}, {"logits": -tokens, "x": LOGITS})
    assert (found.kind, found.value, found.samples) == ("top1", 0, 4)


def test_a_constant_answer_reaches_chance_and_no_more() -> None:
    found = agreement(LOGITS, torch.tensor([[1.0, 0.0, 0.0]]).expand(4, 3))
    assert found.value == found.chance == 0.5
    assert found.above_chance == 0


def test_full_agreement_is_one_above_any_chance() -> None:
    assert agreement(LOGITS, LOGITS).above_chance == 1


def test_a_dense_model_with_one_answer_leaves_nothing_to_chance() -> None:
    same = torch.tensor([[1.0, 0.0]]).expand(3, 2)
    assert agreement(same, same).above_chance == 1
    assert agreement(same, same.flip(1)).above_chance == 0


def test_other_outputs_are_compared_by_their_cosine() -> None:
    images = torch.randn(3, 2, 4, 4)
    found = agreement(images, torch.cat([images[:2], -images[2:]]))
    assert (found.kind, found.samples) == ("cosine", 3)
    assert found.value == pytest.approx(1 / 3)


def test_a_regression_is_compared_over_the_batch() -> None:
    assert agreement(LOGITS[:, :1], -LOGITS[:, :1]).value == pytest.approx(-1)


def test_two_silent_outputs_agree() -> None:
    assert agreement(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)).value == 1


def test_equal_models_have_no_layer_error() -> None:
    model = Net()
    errors = per_layer_error(model, copy.deepcopy(model), [torch.randn(5, 4)], ["up", "down"])
    assert errors == {"up": 0, "down": 0}


def test_a_layers_error_is_that_of_its_own_output_not_of_what_follows() -> None:
    dense, pruned = Net(), Net()
    pruned.load_state_dict(dense.state_dict())
    with torch.no_grad():
        pruned.down.weight.mul_(1.5)
        pruned.down.bias.mul_(1.5)
    batches = [torch.randn(5, 4), torch.randn(3, 4)]
    errors = per_layer_error(dense, pruned, batches, ["up", "down"])
    assert errors["up"] == 0
    assert errors["down"] == pytest.approx(0.5)


def test_layer_errors_do_not_depend_on_the_batch_split() -> None:
    dense, pruned, x = Net(), Net(), torch.randn(8, 4)
    whole = per_layer_error(dense, pruned, [x], ["up", "down"])
    split = per_layer_error(dense, pruned, x.split(3), ["up", "down"])
    assert split == pytest.approx(whole)


def test_layers_that_became_narrower_are_left_out() -> None:
    errors = per_layer_error(Net(6), Net(4), [torch.randn(5, 4)], ["up", "down"])
    assert errors.keys() == {"down"}


def test_a_shared_layer_is_compared_call_by_call() -> None:
    layer = nn.Linear(3, 3)
    dense, pruned = nn.Sequential(layer, nn.ReLU(), layer), None
    pruned = copy.deepcopy(dense)
    assert per_layer_error(dense, pruned, [torch.randn(2, 3)], ["0"]) == {"0": 0}


@pytest.mark.parametrize("shape", [(5, 4), (5, 9)])
def test_comparing_leaves_no_hooks_even_on_failure(shape: tuple[int, int]) -> None:
    dense, pruned = Net(), Net()
    try:
        per_layer_error(dense, pruned, [torch.randn(*shape)], ["up", "down"])
    except RuntimeError:
        assert shape == (5, 9)
    modules = [*dense.modules(), *pruned.modules()]
    assert not any(module._forward_hooks for module in modules)
    assert all(module.training for module in modules)


def test_layer_errors_are_paired_by_path() -> None:
    (only,) = layer_errors({"a": 1.0, "b": 2.0}, {"b": 0.5, "c": 0.1})
    assert (only.path, only.before_repair, only.after_repair) == ("b", 2.0, 0.5)
