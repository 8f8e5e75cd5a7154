"""Claims about the one table: it picks as it always did, it says so, and it can be overruled."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from torch_otprune import transport
from torch_otprune.errors import TransportError
from torch_otprune.transport.dispatch import TABLE, Problem, Purpose, choose

D = torch.float64
SIZES = [
    (1, 1), (64, 64), (512, 512), (2048, 2048), (2049, 2049), (4096, 4096), (4097, 4097),
    (8192, 8192), (8193, 8193), (10000, 10000), (10001, 10001), (100000, 100000), (64, 512),
    (512, 8192), (8192, 16384), (1000, 1001), (3000, 4000), (600, 100000), (20000, 1000),
]  # fmt: skip
DIMS = (1, 4, 16, 96, 97, 4096)
# Written down from three separate rules before they became one table: for each verb, device, equal
# weights and temperature, one word for each of SIZES and in it one letter for each of DIMS.
BEFORE = """
plan cpu equal cold: leeeee leeeee leeeee leeeee leeeee leeeee leeeee leeeee leeeee leeeee
    lbbbbb lbbbbb leeeee leeeee lbbbbb leeeee lsssss lsssss lsssss
plan cpu other cold: leeeee leeeee leeeee leeeee lsssss lsssss lsssss lsssss lbbbbb lbbbbb
    lbbbbb lbbbbb leeeee lsssss lbbbbb leeeee lsssss lsssss lsssss
plan cpu equal warm: ssssss ssssss ssssss ssssss ssssss ssssss ssssss ssssss bbbbbb bbbbbb
    bbbbbb bbbbbb ssssss ssssss bbbbbb ssssss ssssss ssssss ssssss
distance cpu equal cold: leeeee leeeee leeeee leeeee leeeee leeeee leeeee leeeee leeeee leeeee
    lbbbbb lbbbbb leeeee leeeee lbbbbb leeeee lsssss lbbbbb lbbbbb
distance cpu other cold: leeeee leeeee leeeee leeeee lsssss lsssss lsssss lsssss lbbbbb lbbbbb
    lbbbbb lbbbbb leeeee lsssss lbbbbb leeeee lsssss lbbbbb lbbbbb
distance cpu equal warm: ssssss ssssss ssssss ssssss ssssss ssssss ssssss ssssss bbbbbb bbbbbb
    bbbbbb bbbbbb ssssss ssssss bbbbbb ssssss ssssss bbbbbb bbbbbb
plan cuda equal cold: leeeee leeeee leeeee leeeee leeeee leeeee lsssss lsssss lkkkbb lkkkbb
    lkkkbb lkkkbb leeeee lsssss lkkkbb leeeee lsssss lsssss lsssss
plan cuda other cold: leeeee leeeee leeeee leeeee lsssss lsssss lsssss lsssss lkkkbb lkkkbb
    lkkkbb lkkkbb leeeee lsssss lkkkbb leeeee lsssss lsssss lsssss
plan cuda equal warm: ssssss ssssss ssssss ssssss ssssss ssssss ssssss ssssss kkkkbb kkkkbb
    kkkkbb kkkkbb ssssss ssssss kkkkbb ssssss ssssss ssssss ssssss
distance cuda equal cold: leeeee leeeee leeeee leeeee leeeee leeeee lsssss lsssss lbbbbb lbbbbb
    lbbbbb lbbbbb leeeee lsssss lbbbbb leeeee lsssss lbbbbb lbbbbb
distance cuda other cold: leeeee leeeee leeeee leeeee lsssss lsssss lsssss lsssss lbbbbb lbbbbb
    lbbbbb lbbbbb leeeee lsssss lbbbbb leeeee lsssss lbbbbb lbbbbb
distance cuda equal warm: ssssss ssssss ssssss ssssss ssssss ssssss ssssss ssssss ggggbb ggggbb
    ggggbb ggggbb ssssss ssssss ggggbb ssssss ssssss ggggbb ggggbb
"""
LINES = {
    name.strip(): words.split()
    for name, words in (part.split(":") for part in re.split(r"\n(?=\w)", BEFORE.strip()))
}


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=D, generator=torch.Generator().manual_seed(seed))


def picked(purpose: Purpose, device: str, weights: str, heat: str) -> list[str]:
    return [
        "".join(
            choose(
                Problem(
                    n, m, d, device, purpose,
                    uniform=weights == "equal", entropic=heat == "warm", keops=lambda: True,
                )
            ).solver[0]
            for d in DIMS
        )
        for n, m in SIZES
    ]  # fmt: skip


@pytest.mark.parametrize("name", sorted(LINES))
def test_the_table_picks_what_three_rules_picked_before(name: str) -> None:
    verb, *rest = name.split()
    purposes: tuple[Purpose, ...] = ("plan",) if verb == "plan" else ("value", "gradient")
    for purpose in purposes:
        assert picked(purpose, *rest) == LINES[name]


def wide_clouds(n: int, m: int, d: int) -> tuple[Tensor, Tensor]:
    """Make clouds of any size out of two points."""
    return torch.zeros(1, d).expand(n, d), torch.ones(1, d).expand(m, d)


@pytest.mark.parametrize(("n", "m"), SIZES)
def test_the_verbs_ask_the_table_what_it_was_asked_before(n: int, m: int) -> None:
    from torch_otprune.transport.ask import HARD, Ask
    from torch_otprune.transport.couplings import _choice as plan
    from torch_otprune.transport.distance import _choice as distance
    from torch_otprune.transport.divergence import _choice as divergence
    from torch_otprune.transport.geometry import Cloud

    def asked(eps: float | None) -> Ask:
        return Ask(eps, HARD, "auto", 1e-3, 9, explain=False)

    place = SIZES.index((n, m))
    verbs: dict[str, Callable[[Tensor, Tensor], str]] = {
        "plan cpu equal cold": lambda x, y: plan(Cloud(x, y, 2.0), True, asked(None)).solver,
        "plan cpu other cold": lambda x, y: plan(Cloud(x, y, 2.0), False, asked(None)).solver,
        "plan cpu equal warm": lambda x, y: plan(Cloud(x, y, 2.0), True, asked(0.1)).solver,
        "distance cpu equal cold": lambda x, y: distance(x, y, True, "auto").solver,
        "distance cpu other cold": lambda x, y: distance(x, y, False, "auto").solver,
        "distance cpu equal warm": lambda x, y: divergence(x, y, 2.0, "auto").solver,
    }
    for name, verb in verbs.items():
        got = "".join(verb(*wide_clouds(n, m, d))[0] for d in DIMS)
        assert got == LINES[name][place], name


@pytest.mark.parametrize("purpose", ["plan", "value", "gradient"])
def test_the_last_line_for_a_purpose_applies_to_everything(purpose: Purpose) -> None:
    last = [row for row in TABLE if purpose in row.purposes][-1]
    assert last.applies(Problem(10**9, 10**9, 10**6, "cuda", purpose, False, False, True))


def test_each_purpose_names_a_solver_once() -> None:
    for purpose in ("plan", "value", "gradient"):
        names = [name for row in TABLE if purpose in row.purposes for name in row.names]
        assert len(names) == len(set(names))


VERBS: dict[str, Callable[..., tuple[str, str]]] = {
    "coupling": lambda **asked: _told(transport.coupling(transport.sqdist(X, Y), **asked)),
    "coupling_points": lambda **asked: _told(transport.coupling_points(X, Y, **asked)),
    "couplings": lambda **asked: _told(
        transport.couplings(transport.sqdist(X, Y).expand(2, -1, -1), **asked)[1]
    ),
    "divergence": lambda **asked: _told(transport.divergence(X, Y, **asked)),
    "divergence_report": lambda **asked: _told(transport.divergence_report(X, Y, **asked)),
    "divergence of layers": lambda **asked: _told(
        transport.divergence(X.expand(2, -1, -1), Y.expand(2, -1, -1), **asked)
    ),
    "wasserstein": lambda **asked: _told(transport.wasserstein(X, Y, **asked)),
}
X, Y = draw(0, 20, 2), draw(1, 15, 2) + 1


def _told(found: transport.Coupling | transport.Divergence) -> tuple[str, str]:
    return found.solver, found.why


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_can_be_forced_to_blocks_and_names_each_line_before(verb: str) -> None:
    solver, why = VERBS[verb](solver="blocks", explain=True)
    first, *passed = why.splitlines()
    purpose = "plan" if verb.startswith("coupling") else "value"
    before = [row.solver for row in TABLE if purpose in row.purposes][:-1]
    assert (solver, first) == ("blocks", "forced by the caller")
    assert [line.split(":")[0] for line in passed] == [f"  not {name}" for name in before]


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_explains_what_it_picked_itself(verb: str) -> None:
    solver, why = VERBS[verb](explain=True)
    want = "scaling" if verb.startswith("divergence") else "exact"
    assert solver == want
    assert [line.split(":")[0] for line in why.splitlines()[1:]] == [
        f"  not {name}" for name in ("line", "exact")[: 2 if want == "scaling" else 1]
    ]


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_refuses_a_solver_that_there_is_not_and_lists_those_there_are(verb: str) -> None:
    with pytest.raises(TransportError, match="there is no solver 'magic'") as caught:
        VERBS[verb](solver="magic")
    assert "scaling" in caught.value.fix


def test_geomloss_goes_by_the_name_of_its_engine_too() -> None:
    for verb in (transport.wasserstein, transport.divergence):
        one, two = (verb(X, Y, solver=name, explain=True) for name in ("keops", "geomloss"))
        assert (one.solver, float(one.distance)) == ("geomloss", float(two.distance))


def test_an_explained_distance_is_the_distance() -> None:
    for solver in ("auto", "exact", "scaling"):
        found = transport.wasserstein(X, Y, solver=solver, explain=True)
        assert float(found.distance) == float(transport.wasserstein(X, Y, solver=solver))
        assert (found.eps == 0) == (solver != "scaling")


def test_explained_layers_say_what_is_worst_among_them() -> None:
    x, y = torch.stack([X, 3 * X]), torch.stack([Y, 3 * Y])
    found = transport.divergence(x, y, explain=True)
    torch.testing.assert_close(found.distance, transport.divergence(x, y))
    each = [transport.divergence_report(s, t) for s, t in zip(x, y, strict=True)]
    assert found.eps == pytest.approx(max(one.eps for one in each), rel=1e-9)
    assert found.why == "2 small pairs of clouds share every product" + "".join(
        f"\n  not {row.solver}: needs {row.when}" for row in TABLE[:2]
    )


@pytest.mark.parametrize("solver", ["exact", "scaling", "blocks"])
def test_a_batch_of_problems_can_be_forced_to_a_solver(solver: str) -> None:
    costs = torch.stack([transport.sqdist(X, Y), transport.sqdist(2 * X, Y)])
    for one, cost in zip(transport.couplings(costs, solver=solver, tol=1e-9), costs, strict=True):
        want = transport.coupling(cost, solver=solver, tol=1e-9)
        assert (one.solver, want.solver) == (solver, solver)
        torch.testing.assert_close(one.plan(), want.plan(), atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("solver", ["line", "keops"])
def test_a_batch_of_costs_is_refused_by_what_needs_points(solver: str) -> None:
    with pytest.raises(TransportError, match="points"):
        transport.couplings(torch.rand(2, 3, 4), eps=None, solver=solver)


def test_a_batch_at_a_temperature_is_refused_by_what_is_exact() -> None:
    with pytest.raises(TransportError, match="solver='exact' is exact and has hard marginals"):
        transport.couplings(torch.rand(2, 3, 4), eps=0.1, solver="exact")


@pytest.mark.parametrize("eps", [-1.0, 0.0, math.inf, math.nan])
@pytest.mark.parametrize("solver", ["auto", "exact", "scaling"])
def test_a_distance_refuses_a_temperature_even_where_it_would_not_be_used(
    eps: float, solver: str
) -> None:
    with pytest.raises(TransportError, match=f"eps is {eps}"):
        transport.wasserstein(X, Y, eps=eps, solver=solver)


# Shapes and types are checked while testing: what a user would see is asked in a fresh process.
WRONG = {
    "transport.coupling_points(x, y, relax=1.0)": "relax is 1.0, which is no pair of prices",
    "transport.couplings(x[None], relax=('1', 2), eps=0.1)": "which is no pair of prices",
    "transport.wasserstein(x, y, p='2')": "W_p needs 1 <= p < infinity, not '2'",
    "transport.sliced(x, y, p=None)": "W_p needs 1 <= p < infinity, not None",
    "transport.wasserstein(x, y, eps='0.1')": "eps is '0.1'",
    "transport.coupling_points(x, y, eps='0.1')": "eps is 0.1",
    "transport.sliced(x, y, count='8')": "count is '8'",
    "transport.improve(x, None, [0, 1], rounds=1)": "keep is no list of indices in a tensor, but l",
    "transport.improve(x, None, x[0], rounds=1)": "keep is no list of indices in a tensor, but tor",
    "transport.improve([[1.0]], None, torch.tensor([0]), rounds=1)": "cost is no tensor of real",
    "transport.improve(x[0], None, torch.tensor([0]), rounds=1)": "moves nothing",
    "transport.facility_location([[1.0]])": "cost is no tensor of real numbers, but list",
    "transport.facility_location(x, sizes=['2'])": "a set of '2' is asked of 3 candidates",
}


def test_what_is_no_number_and_no_tensor_is_refused_in_three_lines() -> None:
    code = (
        "import torch\nfrom torch_otprune import transport\nx, y = torch.eye(3), torch.ones(3, 3)"
    )
    for question in WRONG:
        code += (
            f"\ntry:\n    {question}\nexcept Exception as e:\n    print(type(e).__name__, e, '~')"
        )
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(root)}, check=True,
    )  # fmt: skip
    answers = done.stdout.split("~\n")[:-1]
    assert len(answers) == len(WRONG)
    for answer, want in zip(answers, WRONG.values(), strict=True):
        assert want in answer
        assert re.fullmatch(r"TransportError \S.*\.\n  where: \S.*\n  fix:   \S.*\. ", answer)
