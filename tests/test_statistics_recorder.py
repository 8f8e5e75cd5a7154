"""Statistics: exact, of a quoted size, the same for every split into batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.cases import CASES, plain
from torch_otprune.errors import CalibrationError
from torch_otprune.statistics import Moments, Recorder, collect, consumers, quote, sense
from torch_otprune.statistics.moments import add_gram_
from torch_otprune.statistics.patches import rows, supported
from torch_otprune.statistics.sensitivity import Sensitivity
from torch_otprune.structure import evaluating, run, trace


def recorded(model: nn.Module, paths: tuple[str, ...], batches: list[Any]) -> dict[str, Moments]:
    """Observe batches."""
    recorder = Recorder(model, paths, samples=24, rows_per_column=8, seed=0)
    with evaluating(model), torch.no_grad():
        for batch in batches:
            run(model, batch)
    recorder.remove()
    return recorder.moments


def sums(found: Sensitivity) -> list[Tensor]:
    """List all that adds up."""
    return [value for table in found.tables() for value in table.values()]


def split(x: Tensor, sizes: list[int]) -> list[Tensor]:
    """Cut samples into batches."""
    return list(x.split(sizes))


def test_moments_are_sums_of_products() -> None:
    x = torch.randn(50, 7, dtype=torch.float64) + 3
    moments = Moments.empty(7)
    for part in x.split(13):
        moments.update(part)
    torch.testing.assert_close(moments.mean, x.mean(0))
    torch.testing.assert_close(moments.second(centred=False), x.T @ x / 50)
    torch.testing.assert_close(moments.second(centred=True), torch.cov(x.T, correction=0))


def test_moments_are_summed_in_float64_whatever_comes() -> None:
    moments = Moments.empty(2)
    moments.update(torch.full((1000, 2), 4096.25))
    assert moments.product.dtype == torch.float64
    assert moments.second(centred=True).abs().max() < 1e-6


@pytest.mark.parametrize("name", CASES)
def test_the_split_into_batches_does_not_matter(name: str) -> None:
    case, model = CASES[name], CASES[name].model()
    paths = consumers(trace(model, case.batch()))
    x = CASES[name].batch(24)
    pieces = {
        k: _pieces(x, sizes) for k, sizes in {"a": [24], "b": [8, 8, 8], "c": [1, 23]}.items()
    }
    if name == "pair":  # its second input is the first one reversed: pieces of both
        assert all(len(p) for p in pieces.values())
    first, *others = (recorded(model, paths, batches) for batches in pieces.values())
    for other in others:
        for path, moments in first.items():
            assert other[path].count == moments.count
            torch.testing.assert_close(other[path].product, moments.product, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(other[path].total, moments.total, rtol=1e-12, atol=1e-12)


def _pieces(batch: Any, sizes: list[int]) -> list[Any]:
    from torch_otprune.structure import map_tensors

    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [
        map_tensors(batch, lambda t, a=end - size, b=end: t[a:b])
        for size, end in zip(sizes, ends, strict=True)
    ]


@pytest.mark.parametrize("name", CASES)
def test_quoted_bytes_are_real_bytes(name: str) -> None:
    model = CASES[name].model()
    paths = consumers(trace(model, CASES[name].batch()))
    quoted = quote(model, paths)
    for samples in (2, 24):
        moments = recorded(model, paths, [CASES[name].batch(samples)]).values()
        real = [t.untyped_storage().nbytes() for m in moments for t in (m.total, m.product)]
        assert sum(real) == quoted


def test_a_consumer_sees_what_really_enters_it() -> None:
    model, x = plain().double().eval(), torch.randn(24, 3, 8, 8, dtype=torch.float64)
    moments = recorded(model, ("10",), [x])["10"]
    with torch.no_grad():
        inputs = model[:10](x)
    torch.testing.assert_close(moments.second(centred=False), inputs.T @ inputs / 24)


def test_positions_of_a_convolution_are_sampled_alike_for_every_image() -> None:
    model, x = plain().double().eval(), torch.randn(24, 3, 8, 8, dtype=torch.float64)
    moments = recorded(model, ("3",), [x])["3"]
    assert moments.count % 24 == 0
    recorder = Recorder(model, ("3",), samples=24, rows_per_column=8, seed=0)
    with torch.no_grad():
        model(x)
        recorder.remove()
        design = rows(model[3], model[:3](x), recorder.at["3", 9])
    torch.testing.assert_close(moments.product, design.T @ design)


def test_nan_inside_the_model_is_blamed_on_the_first_layer_that_sees_it() -> None:
    model = plain().double().eval()
    with torch.no_grad():
        model[3].bias.fill_(float("nan"))
    with pytest.raises(CalibrationError) as error:
        recorded(model, ("3", "6", "10"), [torch.randn(4, 3, 8, 8, dtype=torch.float64)])
    assert error.value.problem == "the input of '6' holds NaN or infinity."
    assert "(4, 8, 3, 3)" in error.value.where


@pytest.mark.parametrize(("name", "path"), [("transposed", "up1"), ("conv3d", "3")])
def test_a_layer_that_is_not_unfolded_is_seen_by_channels(name: str, path: str) -> None:
    model, batch = CASES[name].model(), CASES[name].batch()
    assert not supported(model.get_submodule(path))
    moments = recorded(model, consumers(trace(model, batch)), [batch])[path]
    inputs: list[Tensor] = []
    model.get_submodule(path).register_forward_pre_hook(lambda m, x: inputs.append(x[0]))
    with torch.no_grad():
        model(batch)
    flat = inputs[0].movedim(1, -1).flatten(0, -2)
    if len(flat) == moments.count:
        torch.testing.assert_close(moments.product, flat.T @ flat)
    assert len(moments.total) == inputs[0].shape[1]


def test_half_precision_does_not_overflow_in_the_check() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).to(torch.bfloat16)
    big = torch.full((8, 4), 3e38, dtype=torch.bfloat16)
    recorder = Recorder(model, ("1",), samples=8, rows_per_column=1, seed=0)
    recorder.see("1", model[1], big.to(torch.bfloat16) / 1e30)
    recorder.see("1", model[1], torch.full((8, 4), 6e4).half())
    assert recorder.moments["1"].count == 16


def test_sensitivity_leaves_the_model_as_it_was() -> None:
    model, batch = CASES["frozen"].model(), CASES["frozen"].batch()
    flags = [(p.requires_grad, p.grad) for p in model.parameters()]
    paths = consumers(trace(model, batch))
    sense(model, dict.fromkeys(paths), [batch], draws=2, seed=0)
    assert [(p.requires_grad, p.grad) for p in model.parameters()] == flags
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("name", CASES)
def test_sensitivity_does_not_depend_on_the_split_into_batches(name: str) -> None:
    model, x = CASES[name].model(), CASES[name].batch(20)
    centres = dict.fromkeys(consumers(trace(model, x)))
    found = [sense(model, centres, _pieces(x, sizes), draws=2, seed=0) for sizes in ([20], [3, 17])]
    assert found[0].samples == found[1].samples == 20
    torch.testing.assert_close(found[0].power, found[1].power)
    assert set(found[0].inputs) == set(found[1].inputs)
    for a, b in zip(sums(found[0]), sums(found[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


DATA: dict[str, tuple[Any, str, str]] = {
    "empty": ([], "the data yielded no batch.", "data of type list"),
    "spent": (iter([]), "the data yielded no batch.", "iterator"),
    "nan": ([torch.tensor([[0.0, 1.0], [float("nan"), 0.0]])], "the input holds NaN.", "[1, 0]"),
    "nothing": (None, "the data is of type NoneType, not batches.", "data"),
    "number": (5, "the data is of type int, not batches.", "data"),
    "one mapping": ({"input": torch.zeros(4, 2)}, "the data is of type dict", "data"),
    "no sample": ([torch.zeros(0, 2)], "batch 0 holds no sample.", "(0, 2)"),
    "a silent function": (lambda model: None, "the data yielded no batch.", "function"),
}


@pytest.mark.parametrize("name", DATA)
def test_bad_data_is_refused(name: str) -> None:
    data, problem, where = DATA[name]
    with pytest.raises(CalibrationError) as error:
        collect(nn.Linear(2, 2), data, 10)
    assert problem in error.value.problem and where in error.value.where


def test_no_more_samples_are_taken_than_asked_for() -> None:
    batches = collect(nn.Linear(2, 2), [torch.zeros(4, 2)] * 9, 10)
    assert [len(b) for b in batches] == [4, 4, 2]


def test_an_endless_loader_is_fine() -> None:
    def forever() -> Any:
        while True:
            yield torch.zeros(4, 2)

    assert sum(len(b) for b in collect(nn.Linear(2, 2), forever(), 10)) == 10


def test_labels_travel_along() -> None:
    [batch] = collect(nn.Linear(2, 2), [(torch.zeros(4, 2), torch.arange(4))], 3)
    assert [len(t) for t in batch] == [3, 3]


def test_a_function_may_run_the_model() -> None:
    def feed(model: nn.Module) -> None:
        for _ in range(3):
            model(torch.zeros(4, 2))

    model = nn.Linear(2, 2)
    assert len(collect(model, feed, 8)) == 2
    assert not model._forward_pre_hooks


def test_a_function_that_fails_leaves_no_hook() -> None:
    def feed(model: nn.Module) -> None:
        raise KeyError("no data")

    model = nn.Linear(2, 2)
    with pytest.raises(KeyError, match="no data"):
        collect(model, feed, 8)
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("width", [3, 513, 1100])
def test_a_wide_gram_is_the_product_of_the_rows(width: int) -> None:
    rows = torch.randn(40, width, dtype=torch.float64)
    total = torch.zeros(width, width, dtype=torch.float64)
    add_gram_(total, rows)
    torch.testing.assert_close(total, rows.T @ rows)
    torch.testing.assert_close(total, total.T, rtol=0, atol=1e-12)
