"""The tables of kinds."""

from __future__ import annotations

from typing import Literal

import pytest
from pydantic import Field

from torch_otprune.errors import PolicyError
from torch_otprune.policy import Setting, Table


class Sharp(Setting):
    kind: Literal["sharp"] = "sharp"
    p: float = Field(default=2.0, ge=1)


class Blunt(Setting):
    kind: Literal["blunt"] = "blunt"


@pytest.fixture
def table() -> Table[Setting]:
    knives: Table[Setting] = Table("tool")
    knives.register(Sharp)
    knives.register(Blunt)
    return knives


def test_a_table_lists_its_kinds_in_alphabetical_order(table: Table[Setting]) -> None:
    assert (list(table), len(table), "sharp" in table, "spoon" in table) == (
        ["blunt", "sharp"], 2, True, False,
    )  # fmt: skip


def test_a_table_hands_out_the_class(table: Table[Setting]) -> None:
    assert table["sharp"] is Sharp


@pytest.mark.parametrize("value", ["sharp", {"kind": "sharp"}, {"kind": "sharp", "p": 2}, Sharp()])
def test_a_name_a_table_and_an_instance_mean_the_same(table: Table[Setting], value: str) -> None:
    assert table.resolve(value) == Sharp(p=2.0)


def test_an_instance_comes_back_as_it_is(table: Table[Setting]) -> None:
    knife = Sharp(p=3)
    assert table.resolve(knife) is knife


def test_an_unknown_kind_is_refused_with_the_nearest_names(table: Table[Setting]) -> None:
    for ask in (table.resolve, table.__getitem__, table.remove):
        with pytest.raises(PolicyError) as caught:
            ask("shrap")
        assert str(caught.value) == (
            "'shrap' is no known tool.\n"
            "  where: tool; closest: sharp; known tools: blunt, sharp\n"
            "  fix:   use a known tool, or import the module that registers this one."
        )


def test_an_empty_table_says_that_nothing_is_known() -> None:
    with pytest.raises(PolicyError, match="known criteria: none"):
        Table[Setting]("criterion").resolve("transport")


def test_a_wrong_setting_is_refused_with_its_path(table: Table[Setting]) -> None:
    with pytest.raises(PolicyError) as caught:
        table.resolve({"kind": "sharp", "p": 0.5})
    assert str(caught.value) == (
        "0.5 is no valid p: it should be greater than or equal to 1.\n"
        "  where: tool.p\n"
        "  fix:   make it greater than or equal to 1."
    )


def test_a_setting_built_by_hand_is_refused_in_the_same_words() -> None:
    with pytest.raises(PolicyError, match=r"where: Sharp\.p\n"):
        Sharp(p=0.5)


def test_settings_without_a_kind_are_refused(table: Table[Setting]) -> None:
    with pytest.raises(PolicyError, match="does not say its kind"):
        table.resolve({"p": 2})


@pytest.mark.parametrize("value", [3, None, ["sharp"]])
def test_what_is_no_setting_is_refused(table: Table[Setting], value: object) -> None:
    with pytest.raises(PolicyError, match="is no tool"):
        table.resolve(value)  # type: ignore[arg-type]


def test_a_second_class_of_the_same_kind_is_refused(table: Table[Setting]) -> None:
    class Imposter(Setting):
        kind: Literal["sharp"] = "sharp"

    with pytest.raises(PolicyError, match="'sharp' is already registered") as caught:
        table.register(Imposter)
    assert "Imposter" in caught.value.where
    assert f"{__name__}.Sharp" in caught.value.where


def test_running_a_definition_again_replaces_it(table: Table[Setting]) -> None:
    def define() -> type[Setting]:
        class Again(Setting):
            kind: Literal["again"] = "again"

        return Again

    table.register(define())
    latest = table.register(define())
    assert table["again"] is latest


def test_a_class_without_a_default_kind_is_refused(table: Table[Setting]) -> None:
    class Nameless(Setting):
        pass

    with pytest.raises(PolicyError, match="Nameless names no kind"):
        table.register(Nameless)


def test_an_unregistered_instance_is_refused_because_yaml_could_not_bring_it_back(
    table: Table[Setting],
) -> None:
    class Sharper(Sharp):
        pass

    with pytest.raises(PolicyError, match="Sharper is not the registered tool 'sharp'"):
        table.resolve(Sharper())


def test_a_removed_kind_is_gone(table: Table[Setting]) -> None:
    table.remove("sharp")
    assert "sharp" not in table


def test_a_setting_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Sharp().p = 3.0
