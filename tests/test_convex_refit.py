"""A rectified pair by convex programs: exact answers, bounds that hold, and what is refused."""

from __future__ import annotations

import copy
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_otprune as otp
from torch_otprune.errors import CalibrationError, RepairError
from torch_otprune.repair.convex import LOSSES, ConvexHead, Program, solve
from torch_otprune.repair.convex.program import Pair, answers, objective
from torch_otprune.repair.convex.robust import robust_objective, toughen
from torch_otprune.repair.convex.seen import Seen

NAMES = sorted(LOSSES)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Draw numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(name: Any, *, rows: int = 24, units: int = 4, penalty: float = 0.02) -> Program:
    """Build a tiny program."""
    x = torch.cat([drawn(rows, 2), torch.ones(rows, 1, dtype=torch.float64)], 1)
    ways = torch.nn.functional.normalize(drawn(units, 2, seed=1), dim=1)
    target = drawn(rows, 2, seed=2)
    if LOSSES[name].labelled:
        target = torch.nn.functional.one_hot((x[:, 0] * x[:, 1] > 0).long(), 2).double()
    on = x @ drawn(3, units, seed=3) >= 0
    return Program(x, target, on, ways, LOSSES[name], penalty)


def nothing(program: Program) -> Pair:
    """Start from no unit."""
    outputs, columns = program.target.shape[1], program.x.shape[1]
    none = program.x.new_zeros
    return Pair(none(columns, 0), none(0, outputs), none(outputs))


def least(program: Program) -> float:
    """Solve the same program by sequential quadratic programming."""
    from scipy.optimize import minimize

    _, units, columns = *program.on.shape, program.x.shape[1]
    flip, count = 2 * program.on.double() - 1, columns * units

    def total(flat: Any) -> tuple[float, Any]:
        z = torch.tensor(flat, requires_grad=True)
        v, b = z[:count].reshape(columns, units), z[count:]
        answer = (program.on * (program.x @ v)) @ program.ways + b
        size = (v.square().sum(0) + 1e-18).sqrt().sum() + (b.square().sum() + 1e-18).sqrt()
        value = program.loss.each(answer, program.target).mean() + program.penalty * size
        value.backward()
        return float(value.detach()), z.grad.numpy()

    def inside(flat: Any) -> Any:
        v = torch.tensor(flat[:count]).reshape(columns, units)
        return (flip * (program.x @ v)).flatten().numpy()

    begin = torch.cat([1e-2 * drawn(columns, units, seed=3).flatten(), torch.full((2,), 1e-2)])
    found = minimize(total, begin.numpy(), jac=True, method="SLSQP",
                     constraints=[{"type": "ineq", "fun": inside}],
                     options={"maxiter": 500, "ftol": 1e-12})  # fmt: skip
    return float(found.fun)


@pytest.mark.parametrize("name", NAMES)
def test_the_bound_is_below_the_least_value_that_another_solver_finds(name: str) -> None:
    program = problem(name)
    # hinge has a kink, where the other solver stops a little early
    other, found = least(program), solve(program, nothing(program), rounds=400, tolerance=1e-6)
    assert found.bound <= other * (1 + 1e-5)
    assert found.bound >= other * (0.999 if name != "hinge" else 0.9)
    assert found.objective <= other * (1.005 if name != "hinge" else 1.05)


@pytest.mark.parametrize("name", NAMES)
def test_idle_slopes_are_slopes_of_the_best_constant(name: Any) -> None:
    program = problem(name)
    loss, target, share = program.loss, program.target, program.target.mean(0)
    best = {"squared": share, "logistic": share.log(), "hinge": 0 * share}[name].expand_as(target)
    both = loss.each(best, target) + loss.conjugate(loss.idle(target), target)
    torch.testing.assert_close(both, (loss.idle(target) * best).sum(1))


@pytest.mark.parametrize("name", NAMES)
def test_a_penalty_below_the_one_that_leaves_no_unit_leaves_some(name: Any) -> None:
    x, y = data(name, rows=80)
    made = ConvexHead(loss=name, penalty=0.3, patterns=16, rounds=100).fit(x, y)
    assert made.units > 0
    assert made.objective < ConvexHead(loss=name, penalty=0.99, rounds=20).fit(x, y).objective


def test_a_pair_without_units_is_a_module_and_no_warning(recwarn: Any) -> None:
    x, y = data("hinge")
    made = ConvexHead(loss="hinge", penalty=0.999, patterns=0, rounds=40).fit(x, y)
    assert made.units == 0
    assert made.to_module()(x.float()).shape == (60, 2)
    assert not recwarn.list


@pytest.mark.parametrize("name", NAMES)
def test_a_proximal_step_solves_its_equation(name: str) -> None:
    loss, program = LOSSES[name], problem(name)
    root = drawn(24, 2, 2, seed=5)
    metric = root @ root.mT + torch.eye(2, dtype=torch.float64)
    start, slope = 2 * drawn(24, 2, seed=6), loss.slope(program.target * 0, program.target)
    for _ in range(40):
        slope = loss.near(start, metric, program.target, slope)
    answer = start - (metric @ slope[:, :, None])[:, :, 0]
    # Fenchel: equality holds where the slope is one of the loss at the answer
    both = loss.each(answer, program.target) + loss.conjugate(slope, program.target)
    torch.testing.assert_close(both, (slope * answer).sum(1), atol=1e-6, rtol=1e-6)


def layers(columns: int, units: int, outputs: int, *, seed: int = 0) -> tuple[nn.Linear, nn.Linear]:
    """Build a pair in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(columns, units).double(), nn.Linear(units, outputs).double()


def data(name: str, *, rows: int = 60) -> tuple[Tensor, Tensor]:
    """Draw features, and answers or labels."""
    x = drawn(rows, 4)
    y = torch.stack([(x[:, 0] * x[:, 1]).sin(), x[:, 2].abs()], 1)
    return x, y.argmax(1) if LOSSES[name].labelled else y  # type: ignore[index]


@pytest.mark.parametrize("name", NAMES)
def test_a_refit_is_never_above_its_start_and_its_layers_compute_the_same(name: Any) -> None:
    x, y = data(name)
    pair = layers(4, 6, 2)
    made = ConvexHead(loss=name, patterns=12, rounds=60).fit(x, y, start=pair)
    assert made.objective <= made.before
    columns = torch.cat([x / made.scale, torch.ones(len(x), 1, dtype=torch.float64)], 1)
    torch.testing.assert_close(made.to_module(torch.float64)(x), answers(made.pair, columns))
    weight, bias, out, _ = made.weights()
    scaled = torch.cat([weight * made.scale, bias[:, None]], 1)
    torch.testing.assert_close(scaled.norm(dim=1), out.norm(dim=0))


def test_one_round_from_a_good_start_keeps_the_start() -> None:
    """What comes out is the start itself where nothing better is met."""
    x, _ = data("squared")
    pair = layers(4, 6, 2)
    y = pair[1](pair[0](x).relu()).detach()
    made = ConvexHead(penalty=1e-9, rounds=1, sweeps=1).fit(x, y, start=pair)
    assert made.objective <= made.before
    torch.testing.assert_close(made.to_module(torch.float64)(x), y, rtol=1e-4, atol=1e-4)


def test_a_larger_penalty_leaves_fewer_units_and_a_width_is_kept() -> None:
    x, y = data("squared")
    counts = [ConvexHead(penalty=p, patterns=16, rounds=100).fit(x, y).units for p in (0.003, 0.5)]
    assert counts[1] < counts[0]
    assert ConvexHead(penalty=0.003, patterns=16, rounds=60).fit(x, y, width=3).units <= 3


@pytest.mark.parametrize("name", NAMES)
def test_the_worst_case_bounds_every_move_within_the_radii(name: Any) -> None:
    program = problem(name)
    pair = Pair(drawn(3, 4, seed=7), program.ways, drawn(2, seed=8))
    radii = torch.tensor([0.2, 0.1, 0.0], dtype=torch.float64)
    bound = robust_objective(program, pair, radii)
    for seed in range(30):
        move = radii * drawn(24, 3, seed=seed).sign()
        moved = Program(program.x + move, program.target, program.on, program.ways,
                        program.loss, program.penalty)  # fmt: skip
        assert objective(moved, pair) <= bound + 1e-9
    still = robust_objective(program, pair, 0 * radii)
    assert still == pytest.approx(objective(program, pair), rel=1e-9)


def test_one_unit_has_exactly_the_worst_case_that_a_corner_attains() -> None:
    program = problem("logistic", units=1)
    pair = Pair(drawn(3, 1, seed=7), program.ways, drawn(2, seed=8))
    radii = torch.tensor([0.2, 0.1, 0.0], dtype=torch.float64)
    corners = [
        program.loss.each(
            answers(pair, program.x + radii * s * pair.units[:, 0].sign()), program.target
        )
        for s in (-1, 1)
    ]
    worst = torch.maximum(*corners).mean()
    size = pair.units.norm(dim=0).sum() + pair.offset.norm()
    bound = robust_objective(program, pair, radii)
    assert bound == pytest.approx(float(worst + program.penalty * size), rel=1e-9)


def test_toughening_lowers_the_worst_case() -> None:
    program = problem("logistic")
    pair = Pair(drawn(3, 4, seed=7), program.ways, drawn(2, seed=8))
    radii = torch.tensor([0.3, 0.3, 0.0], dtype=torch.float64)
    _, after = toughen(program, pair, radii, steps=50)
    assert after < robust_objective(program, pair, radii) - 1e-3


# -- as a repair -----------------------------------------------------------------------------


def net(middle: nn.Module | None = None) -> nn.Sequential:
    """Build a small net in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 16), middle or nn.ReLU(), nn.Linear(16, 3)).eval()


def batches(*, labels: bool = False, rows: int = 32) -> list[Any]:
    """Draw batches."""
    xs = [drawn(rows, 6, seed=s).float() for s in range(3)]
    return [(x, (x[:, 0] > 0).long()) for x in xs] if labels else xs


def pruned(given: list[Any], middle: nn.Module | None = None, **settings: Any) -> Any:
    """Prune to half the units with this repair."""
    repair = {"kind": "convex_refit", "rounds": 40, "patterns": 16, **settings}
    policy = otp.Policy(rules=[otp.Channels(keep="50%", repair=repair)])
    return otp.prune_(net(middle), policy, given, timing=0)


def test_the_repair_brings_outputs_closer_and_says_gap_and_units() -> None:
    report = pruned(batches())
    [note] = report.repairs
    assert note.accepted and note.site == "0, 2"
    assert "above the best over" in note.note and "of 8 units carry weight" in note.note
    assert report.output_error.after_repair < report.output_error.before_repair


@pytest.mark.parametrize("settings", [{"loss": "logistic"}, {"loss": "hinge"}, {"robust": 0.9}])
def test_labels_and_radii_are_judged_on_rows_held_out(settings: dict[str, Any]) -> None:
    [note] = pruned(batches(labels=True), **settings).repairs
    assert note.after <= note.before and (note.accepted or "the error would be" in note.note)


def test_a_net_without_a_rectified_pair_is_left_alone_and_says_so() -> None:
    [note] = pruned(batches(), nn.Tanh()).repairs
    assert not note.accepted and "what lies between them is a tanh and no ReLU" in note.note


def test_a_named_pair_without_a_rectifier_is_refused() -> None:
    with pytest.raises(RepairError) as caught:
        pruned(batches(), nn.Tanh(), pair=("0", "2"))
    assert "what lies between them is a tanh and no ReLU" in caught.value.problem
    assert caught.value.fix.startswith("name two nn.Linear")


LABELS = {
    "it has no class 5": ({}, [(x, 5 + 0 * y) for x, y in batches(labels=True)], "from 5 to 5"),
    "negative": ({}, [(x, y - 100) for x, y in batches(labels=True)], "from -100 to -99"),
    "too few": ({}, [(x, y[:-1]) for x, y in batches(labels=True)], "not one for each of 96 rows"),
    "no numbers": ({}, [(x, y.float()) for x, y in batches(labels=True)], "the batches hold none"),
}


@pytest.mark.parametrize("case", LABELS)
def test_labels_that_do_not_fit_are_refused(case: str) -> None:
    settings, given, words = LABELS[case]
    with pytest.raises(CalibrationError) as caught:
        pruned(given, loss="logistic", **settings)
    assert "needs one label per row, below 3" in caught.value.problem
    assert words in caught.value.problem
    assert "'2'" in (caught.value.where or "") and caught.value.fix


@pytest.mark.parametrize("labels", ["given", "dense"])
def test_one_output_has_no_classes(labels: str) -> None:
    rule = otp.Channels(
        keep="50%", repair={"kind": "convex_refit", "loss": "hinge", "labels": labels}
    )
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1)).eval()
    with pytest.raises(RepairError) as caught:
        otp.prune_(model, otp.Policy(rules=[rule]), batches(labels=True), timing=0)
    assert "needs one output per class, and '2' has 1" in caught.value.problem
    assert "loss='squared'" in caught.value.fix


def test_labels_are_not_about_a_pair_inside_of_the_model() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [m for a, b in ((6, 16), (16, 8)) for m in (nn.Linear(a, b), nn.ReLU())]
        model = nn.Sequential(*layers, nn.Linear(8, 3)).eval()
    repair = {"kind": "convex_refit", "loss": "hinge", "pair": ("0", "2")}
    rule = otp.Channels(keep="50%", repair=repair)
    with pytest.raises(CalibrationError) as caught:
        otp.prune_(model, otp.Policy(rules=[rule]), batches(labels=True), timing=0)
    assert "'2' does not write the model's answer" in caught.value.problem
    assert "loss='squared'" in caught.value.fix


def test_labels_of_tokens_are_read_by_name() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
            return self.down(self.up(x).relu())

    tokens = drawn(12, 8, 6).float()
    given = [{"x": tokens, "labels": (tokens[..., 0] > 0).long()}]
    rule = otp.Channels(keep="50%", repair={"kind": "convex_refit", "loss": "hinge", "rounds": 20})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        report = otp.prune_(Tagger().eval(), otp.Policy(rules=[rule]), given, timing=0)
    assert report.repairs[0].accepted


@pytest.mark.parametrize("middle", [nn.ReLU6(), nn.LeakyReLU()])
def test_a_pair_that_is_passed_over_is_named_with_the_reason(middle: nn.Module) -> None:
    [note] = pruned(batches(), middle).repairs
    assert not note.accepted
    kind = type(middle).__name__.lower()
    assert f"'0' and '2': what lies between them is a {kind} and no ReLU" in note.note


@pytest.mark.parametrize("pair", [None, ("0", "2")])
def test_a_program_too_large_for_memory_is_not_started(monkeypatch: Any, pair: Any) -> None:
    monkeypatch.setattr("torch_otprune.repair.convex_refit._ROOM", 1000)
    if pair is None:
        [note] = pruned(batches()).repairs
        assert not note.accepted
        assert "the program would hold" in note.note and "lower `samples`" in note.note
        return
    with pytest.raises(CalibrationError) as caught:
        pruned(batches(), pair=pair)
    assert "GiB" in caught.value.problem and "lower `samples`" in caught.value.fix


@pytest.mark.parametrize("between", ["pairs", "laws"])
def test_a_shift_of_all_rows_is_the_radius(between: Any) -> None:
    home, by = drawn(50, 3), torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
    moved = Seen(home + by, home, home, None).moved(0.9, between)
    torch.testing.assert_close(moved, by)


def test_rows_that_change_places_move_no_law() -> None:
    home = drawn(50, 3)
    both = Seen(home.flip(0), home, home, None)
    assert float(both.moved(1.0, "laws").max()) == 0
    assert float(both.moved(1.0, "pairs").min()) > 0.5


def test_the_farthest_move_of_the_laws_is_their_distance_of_infinite_order() -> None:
    """No coupling has a smaller farthest move than that by rank (checked over all of six rows)."""
    home, small = drawn(6, 1), drawn(6, 1, seed=1)
    least = min(
        float((small[list(order)] - home).abs().max()) for order in itertools.permutations(range(6))
    )
    assert float(Seen(small, home, home, None).moved(1.0, "laws")) == pytest.approx(least)


def test_the_note_tells_the_radii_and_laws_move_less_than_pairs() -> None:
    found = {}
    for between in ("pairs", "laws"):
        rule = otp.Channels(
            keep="50%",
            repair={"kind": "convex_refit", "rounds": 20, "robust": 1.0, "radii": between},
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            deep = nn.Sequential(
                *(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU()),
                *(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)),
            ).eval()
        [note] = otp.prune_(deep, otp.Policy(rules=[rule]), batches(), timing=0).repairs
        found[between] = float(re.search(r"median ([\d.e-]+),", note.note)[1])  # type: ignore[index]
    assert 0 < found["laws"] < found["pairs"]


def test_it_can_be_undone_saved_and_read_back(tmp_path: Path) -> None:
    model, x = net(), torch.cat(batches())
    before, policy = (
        copy.deepcopy(model.state_dict()),
        otp.Policy(rules=[otp.Channels(keep="50%", repair={"kind": "convex_refit", "rounds": 20})]),
    )
    assert otp.Policy.from_yaml(policy.to_yaml()) == policy
    report = otp.prune_(model, policy, batches(), timing=0)
    assert otp.Plan.model_validate_json(report.plan.model_dump_json()) == report.plan
    answer = model(x)
    otp.save(model, tmp_path / "small")
    assert torch.equal(otp.load(tmp_path / "small", factory=net)(x), answer)
    report.undo_()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_how_rows_come_in_batches_does_not_matter() -> None:
    rows, made = torch.cat(batches()), []
    for parts in (rows.split(32), rows.split(41)):
        model = net()
        repair = {"kind": "convex_refit", "rounds": 20, "patterns": 8}
        policy = otp.Policy(rules=[otp.Channels(keep="50%", repair=repair)])
        otp.prune_(model, policy, list(parts), timing=0)
        made.append(model(rows))
    torch.testing.assert_close(*made, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_refitted_in_float64_and_cast_back(dtype: torch.dtype) -> None:
    model = net().to(dtype)
    repair = {"kind": "convex_refit", "rounds": 20, "patterns": 8}
    policy = otp.Policy(rules=[otp.Channels(keep="50%", repair=repair)])
    report = otp.prune_(model, policy, [b.to(dtype) for b in batches()], timing=0)
    assert report.repairs[0].accepted
    assert all(p.dtype == dtype for p in model.parameters())


def test_hinge_without_labels_is_refused() -> None:
    with pytest.raises(CalibrationError) as caught:
        pruned(batches(), loss="hinge")
    assert "needs one label per row" in caught.value.problem
    assert "labels='dense'" in caught.value.fix


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(CalibrationError) as caught:
        pruned(batches(rows=2), pair=("0", "2"))
    assert "6 rows cannot tell 6 features apart" in caught.value.problem
    assert "two rows per feature" in caught.value.fix


BAD: dict[str, tuple[Any, ...]] = {
    "no answers": ("squared", drawn(8, 3), torch.zeros(8, dtype=torch.int64), {}),
    "no labels": ("hinge", drawn(8, 3), drawn(8, 2), {}),
    "differ in rows": ("squared", drawn(8, 3), drawn(7, 2), {}),
    "not finite": ("squared", drawn(8, 3) / 0, drawn(8, 2), {}),
    "another number of features": ("squared", drawn(8, 3), drawn(8, 2), {"start": layers(4, 5, 2)}),
    "a label 4": ("hinge", drawn(8, 3), torch.full((8,), 4), {"start": layers(3, 5, 2)}),
    "radii are not": ("squared", drawn(8, 3), drawn(8, 2), {"radii": -torch.ones(3)}),
    "width is below 1": ("squared", drawn(8, 3), drawn(8, 2), {"width": 0}),
}


@pytest.mark.parametrize("words", BAD)
def test_data_that_do_not_fit_are_refused(words: str) -> None:
    loss, x, y, more = BAD[words]
    with pytest.raises(RepairError) as caught:
        ConvexHead(loss=loss).fit(x, y, **more)
    assert words in caught.value.problem and caught.value.fix


def test_the_model_is_as_it_was_after_an_error() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    rule = otp.Channels(keep="50%", repair={"kind": "convex_refit", "loss": "hinge"})
    with pytest.raises(CalibrationError):
        otp.prune_(model, otp.Policy(rules=[rule]), batches(), timing=0)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
