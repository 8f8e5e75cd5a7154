"""The comparison of channel methods runs, resumes, shares calibration and judges right."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import torch_otprune as otp
from benchmarks import cifar, common, methods_cifar10, plot_methods
from benchmarks.methods import FLAGSHIP, OURS, methods
from torch_otprune.policy.registry import CRITERIA

Case = methods_cifar10.Case


@pytest.fixture(scope="module")
def lab() -> methods_cifar10.Lab:
    return methods_cifar10.Lab(methods_cifar10.quick_bench(), images=64)


def test_every_registered_criterion_that_needs_no_training_takes_part() -> None:
    found = {method.criterion["kind"] for method in methods().values()}
    assert found == {kind for kind in CRITERIA if kind != "dtp"}
    assert {"cpot", "cpot, taps", "cpot, activations", "cpot, gaussian"} <= set(methods())
    for method in methods().values():
        CRITERIA.resolve(method.criterion)
        for repairs in method.repairs.values():
            otp.Channels(keep="50%", criterion=method.criterion, repair=repairs)


@pytest.mark.parametrize("name", ["transport", "magnitude", "cpot, activations", "taylor"])
@pytest.mark.parametrize("repair", ["none", OURS])
def test_shared_calibration_gives_the_network_that_prune_gives(
    lab: methods_cifar10.Lab, name: str, repair: str
) -> None:
    case = Case(methods()[name], repair, "budget", 60, 0)
    small, _ = lab.prune(case)
    other = copy.deepcopy(lab.bench.model)
    otp.prune_(other, lab.policy(case), lab.batches(0), timing=0)
    assert small.state_dict().keys() == other.state_dict().keys()
    for key, value in other.state_dict().items():
        torch.testing.assert_close(small.state_dict()[key], value)


@pytest.mark.parametrize("widths", ["uniform", FLAGSHIP])
def test_given_widths_are_the_same_for_every_method(lab: methods_cifar10.Lab, widths: str) -> None:
    found = []
    for name in ("transport", "random", "fpgm"):
        plan = lab.plan(Case(methods()[name], "none", widths, 50, 0))[0]
        found.append({cut.group: len(cut.keep) for cut in plan.cuts})
    assert found[0] == found[1] == found[2]


def test_widths_of_one_are_one_and_not_everything(lab: methods_cifar10.Lab) -> None:
    case = Case(methods()["random"], "none", FLAGSHIP, 50, 0)
    group = next(g.name for g in lab.observed(case)[1].groups)
    narrow = {(group,): 1}
    lab.given, whole = (lambda case: narrow), lab.given  # type: ignore[method-assign]
    try:
        assert [rule.keep.of(16) for rule in lab.policy(case).rules] == [1]
    finally:
        lab.given = whole  # type: ignore[method-assign]


def test_only_a_refit_is_priced_as_one(lab: methods_cifar10.Lab) -> None:
    for name in ("obs", "magnitude"):
        none, ours = (lab.plan(Case(methods()[name], r, "budget", 50, 0)) for r in ("none", OURS))
        assert none[0].cuts[0].error != ours[0].cuts[0].error
    own = lab.plan(Case(methods()["obs"], "own", "budget", 50, 0))[0]
    assert own.cuts == lab.plan(Case(methods()["obs"], OURS, "budget", 50, 0))[0].cuts


def test_a_case_costs_no_more_than_its_budget(lab: methods_cifar10.Lab) -> None:
    for case in methods_cifar10.cases(seeds=[0], budgets=[50], widths=["budget"], only="/none$"):
        row = lab.measure(case, 0)["test"]
        assert row["macs_kept"] <= 0.5 and 0 <= row["error"] <= 100


def test_what_reads_no_images_has_one_seed() -> None:
    def names(seed: int) -> set[str]:
        found = methods_cifar10.cases(seeds=[0, 1], budgets=[50], widths=["uniform"])
        return {f"{c.method.name}/{c.repair}" for c in found if c.seed == seed}

    assert {"magnitude/none", "intra_fusion, published/none"} <= names(0) - names(1)
    assert {"random/none", "magnitude/own", "transport/none"} <= names(1)


def test_a_run_writes_rows_resumes_and_is_told_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="pictures are drawn by matplotlib")
    out = tmp_path / "methods_cifar10.json"
    words = ["--quick", "--out", str(out), "--seeds", "0", "--budgets", "50", "--widths", "budget"]
    words += ["--only", "^(transport|magnitude)/"]
    methods_cifar10.main(words)
    rows = common.read_json(out)["rows"]
    assert len(rows) == 14 and all({"error", "loss", "cpu_seconds"} <= row.keys() for row in rows)
    known = common.read_json(out)["environments"]
    assert all(row["environment"] in known for row in rows)

    def again(*_: Any) -> None:
        raise AssertionError("a known row was measured again")

    monkeypatch.setattr(methods_cifar10.Lab, "measure", again)
    methods_cifar10.main(words)
    assert common.read_json(out)["rows"] == rows
    plot_methods.main(["--json", str(out)])
    assert "| transport |" in capsys.readouterr().out
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_what_fails_is_a_row_that_is_tried_again(
    tmp_path: Path, lab: methods_cifar10.Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "rows.json"
    cases = [Case(methods()["fpgm"], "none", "budget", 50, 0)]

    def broken(*_: Any) -> None:
        raise ValueError("no luck")

    with monkeypatch.context() as patch:
        patch.setattr(methods_cifar10.Lab, "measure", broken)
        methods_cifar10.run(lab, cases, out)
    assert [row["failed"] for row in common.read_json(out)["rows"]] == ["ValueError: no luck"] * 2
    methods_cifar10.run(lab, cases, out)
    assert all("error" in row for row in common.read_json(out)["rows"])


def rows(**errors: float) -> dict[str, Any]:
    """Write results: `method__widths__repair` to error, at one budget."""
    made = []
    for index, (name, error) in enumerate(errors.items()):
        method, widths, repair = name.split("__")
        made.append({
            "split": "test", "images": 2500, "method": method, "widths": widths, "repair": repair,
            "budget": 50, "seed": 0, "error": error, "loss": 1.0, "cpu_seconds": 1.0 + index,
            "macs_kept": 0.5,
        })  # fmt: skip
    return {"rows": made}


def test_the_sentences_name_where_the_flagship_loses() -> None:
    cells = plot_methods.summarise(
        rows(transport__budget__least_squares=20.0, obs__budget__least_squares=15.0)
    )
    assert plot_methods.standing(cells, 50) == (
        "At 50 % `obs` is the best, 5.0 points before `transport`: beyond one standard error of "
        "0.8."
    )
    cells = plot_methods.summarise(
        rows(transport__budget__least_squares=14.5, obs__budget__least_squares=15.0)
    )
    assert "`transport` is the best, 0.5 points before `obs`" in plot_methods.standing(cells, 50)


def test_the_sentences_name_where_least_squares_and_our_budget_do_not_help() -> None:
    cells = plot_methods.summarise(
        rows(
            fpgm__budget__own=10.0,
            fpgm__budget__least_squares=12.0,
            fpgm__uniform__none=11.0,
            obs__budget__least_squares=9.0,
            obs__uniform__none=30.0,
        )
    )
    assert plot_methods.unhelped(cells) == ["`fpgm` at 50 % (budget, own: 2.0 points)"]
    assert plot_methods.unbeaten(cells) == ["`fpgm` at 50 % (none)"]


def test_methods_are_compared_on_the_draws_that_both_have_seen() -> None:
    payload = rows(transport__budget__least_squares=20.0, obs__budget__least_squares=15.0)
    lucky = payload["rows"][0] | {"seed": 1, "error": 2.0}
    payload["rows"].append(lucky)
    cells = plot_methods.summarise(payload)
    assert cells[50, "budget", "transport", OURS].error == 11.0
    assert "`obs` is the best, 5.0 points" in plot_methods.standing(cells, 50)
    payload["rows"][1]["seed"] = 2
    assert plot_methods.standing(plot_methods.summarise(payload), 50) == ""


def test_what_foreseeing_gains_is_said_per_method() -> None:
    cells = plot_methods.summarise(
        rows(obs__budget__least_squares=15.0, obs__foreseen__least_squares=12.5)
    )
    assert plot_methods.foresight(cells) == "`obs` at 50 % +2.5"


def test_what_is_chosen_without_labels_is_judged_on_other_images() -> None:
    payload = rows(fpgm__budget__least_squares=20.0, transport__foreseen__least_squares=18.0)
    moved = {"fpgm": 0.3, "transport": 0.4}  # the choice by outputs is not the best by labels
    payload["rows"] += [
        row | {"split": "validation", "moved": moved[row["method"]], "error": 1.0}
        for row in payload["rows"]
    ]
    (text,) = plot_methods.choosing(payload)
    assert "picks `fpgm` (budget): 20.0 %" in text
    assert "themselves 18.0 %" in text


def test_accuracy_and_loss_are_those_of_the_formulas() -> None:
    class Fixed(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tensor([[0.0, 0.0], [3.0, 0.0]]).repeat(len(x), 1)[: len(x)]

    images = cifar.Split(torch.zeros(4, 3, 2, 2, dtype=torch.uint8), torch.tensor([0, 0, 0, 1]))
    accuracy, loss = cifar.judged(Fixed(), images)
    sure = torch.tensor(3.0, dtype=torch.float64)
    wanted = (2 * torch.tensor(2.0).log() + (1 + (-sure).exp()).log() + (1 + sure.exp()).log()) / 4
    assert accuracy == 75.0 and loss == pytest.approx(float(wanted))
    assert cifar.accuracy(Fixed(), images) == 75.0
