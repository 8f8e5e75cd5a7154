"""When a map that knows laws alone leaves its closed form, and when it does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_otprune.errors import TransportError
from torch_otprune.maps import AffineMap, MongeMap
from torch_otprune.maps.monge_map import Descent
from torch_otprune.maps.samples import Samples
from torch_otprune.maps.trial import Trial

DOUBLE = torch.float64


def cloud(rows: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator, dtype=DOUBLE)


def bent(z: Tensor) -> Tensor:
    return torch.where(z > 0, 2 * z + 1, 0.5 * z - 1)


def split(z: Tensor) -> Tensor:
    return z + 3 * z.sign()


def error(found: Callable[[Tensor], Tensor], law: Callable[[Tensor], Tensor], width: int) -> float:
    """Compare with the optimal map, which is the law's own, on fresh points."""
    x = cloud(1000, width, seed=7)
    return float((found(x) - law(x)).square().sum(1).mean() / law(x).var(0).sum())


@given(st.integers(1, 12), st.integers(0, 100), st.sampled_from(["affine", "mlp"]))
@settings(max_examples=8)
def test_between_gaussians_the_exact_bures_map_stays(width: int, seed: int, form: str) -> None:
    root = cloud(width, width, seed=seed) / width**0.5
    x, y = cloud(240, width, seed=seed + 1), cloud(240, width, seed=seed + 2) @ root + 2
    found, start = MongeMap(form=form, steps=20).fit(x, y), AffineMap().fit(x, y)  # type: ignore[arg-type]
    assert torch.equal(found(x), start(x))
    assert "closed form" in found.notes[0] and "closed form" in str(found.report)


def test_a_shift_that_truly_bends_is_followed_and_fits_better_on_fresh_points() -> None:
    x, y = cloud(1500, 2), bent(cloud(1500, 2, seed=1))
    found, start = MongeMap(form="mlp", steps=80, rate=0.02).fit(x, y), AffineMap().fit(x, y)
    assert found.notes[0].startswith("left the closed form: the distance on a held-out half")
    assert error(found, bent, 2) < 0.6 * error(start, bent, 2)
    report = found.report
    assert report.gap_after is not None and report.gap_before is not None
    assert report.gap_after <= report.gap_before + 0.05


def cubed(z: Tensor) -> Tensor:
    return z**3


@pytest.mark.parametrize(
    ("law", "width", "form"),
    [(cubed, 3, "mlp"), (split, 8, "mlp"), (split, 4, "affine")],
    ids=["nearer by turning", "nearer by lost spread", "nearer by a fold"],
)
def test_a_map_by_laws_is_never_further_from_the_optimal_one_than_its_start(
    law: Callable[[Tensor], Tensor], width: int, form: str
) -> None:
    x, y = cloud(600, width), law(cloud(600, width, seed=1))
    setting = MongeMap(form=form, weight=0.1, steps=30, rate=0.02)  # type: ignore[arg-type]
    start = AffineMap().fit(x, y)
    assert error(setting.fit(x, y), law, width) <= error(start, law, width) * (1 + 1e-9)


def judged(width: int = 2) -> tuple[Trial, Callable[[Tensor], Tensor], Samples]:
    samples = Samples(cloud(800, width), bent(cloud(800, width, seed=1)))
    return Trial.of(samples), AffineMap().fitted(samples), samples


def test_the_optimal_map_passes_the_trial() -> None:
    trial, start, _ = judged()
    counts, why = trial.verdict(start, bent, "squared")
    assert counts and "gains more than chance" in why


def test_a_map_that_only_loses_spread_does_not_pass() -> None:
    x = cloud(300, 24)
    trial = Trial.of(Samples(x, cloud(300, 24, seed=1)))
    assert trial.far(lambda z: 0.6 * z) < trial.far(lambda z: z)
    counts, why = trial.verdict(lambda z: z, lambda z: 0.6 * z, "squared")
    assert not counts and "gains less than chance" in why
    assert trial.settled(lambda z: z)


def test_a_map_that_reaches_the_law_by_a_turn_does_not_pass() -> None:
    trial, start, _ = judged()

    def turned(z: Tensor) -> Tensor:
        return bent(z.flip(1) * torch.tensor([1.0, -1.0], dtype=DOUBLE))

    counts, why = trial.verdict(start, turned, "squared")
    assert not counts and "Monge gap there" in why and "would grow" in why


def test_the_rows_that_judge_are_not_those_that_teach() -> None:
    trial, _, samples = judged()
    for part, learned in ((trial.x, trial.learn.x), (trial.y, trial.learn.y)):
        assert not (part[:, None] == learned[None]).all(2).any()
    # where row i of both is the same input, the judge must not see the pair
    both = Samples(samples.x, samples.x)
    crossed = Trial.of(both)
    assert not (crossed.x[:, None] == crossed.y[None]).all(2).any()


def test_nothing_is_fitted_where_no_step_could_count(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_otprune.maps import monge_map

    monkeypatch.setattr(monge_map.Descent, "run", None)  # calling it would raise
    x = cloud(300, 8)
    assert "as near as chance can tell" in MongeMap().fit(x, cloud(300, 8, seed=1) * 2).notes[0]


def test_a_handful_of_rows_judges_nothing() -> None:
    x, y = cloud(6, 2), cloud(6, 2, seed=1) + 50
    found, start = MongeMap().fit(x, y), AffineMap().fit(x, y)
    assert torch.equal(found(x), start(x))


def test_a_distance_that_does_not_settle_leaves_the_closed_form(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unsettled(self: Descent) -> str:
        raise TransportError("the potentials are off.", where="here", fix="wait.")

    monkeypatch.setattr(Descent, "run", unsettled)
    x, y = cloud(1500, 2), bent(cloud(1500, 2, seed=1))  # a case that is left otherwise
    found = MongeMap(form="mlp").fit(x, y)
    assert torch.equal(found(x), AffineMap().fit(x, y)(x))
    assert found.notes == ("the closed form stays: the potentials are off.",)
