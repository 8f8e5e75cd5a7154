"""The grammar of targets: what matches, what is more specific, and what is refused."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import torch_otprune.criteria  # noqa: F401 (fills the table)
from torch_otprune.errors import PolicyError, TargetError
from torch_otprune.policy import Channels, match, module_classes, owner
from torch_otprune.policy.targets import selects, specificity


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3)
        self.conv2 = nn.Conv2d(4, 4, 3)


class Special(Block):
    pass


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3)
        self.layer1 = nn.Sequential(Block(), Special())
        self.layer2 = nn.Sequential(Block())
        self.fc = nn.Linear(4, 4)


NAMES = module_classes(Net())
BELOW = {
    "layer1": ["layer1", "layer1.0", "layer1.0.conv1", "layer1.0.conv2", "layer1.1",
               "layer1.1.conv1", "layer1.1.conv2"],
    "layer2": ["layer2", "layer2.0", "layer2.0.conv1", "layer2.0.conv2"],
}  # fmt: skip
CONVS = [path for path in NAMES if "conv" in path]


def rule(*targets: str, ignore: tuple[str, ...] = ()) -> Channels:
    return Channels.model_construct(targets=targets, ignore=ignore)


@pytest.mark.parametrize(
    ("pattern", "paths"),
    [
        ("auto", list(NAMES)),
        ("fc", ["fc"]),
        ("layer1", BELOW["layer1"]),
        ("layer1.0.conv1", ["layer1.0.conv1"]),
        ("layer*", BELOW["layer1"] + BELOW["layer2"]),
        ("layer?", BELOW["layer1"] + BELOW["layer2"]),
        ("layer[!1]", BELOW["layer2"]),
        ("layer[2-3]", BELOW["layer2"]),
        ("layer*.conv1", None),
        ("layer*.*.conv1", ["layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1"]),
        ("layer**conv1", ["layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1"]),
        ("**.conv1", ["conv1", "layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1"]),
        ("layer1.**", BELOW["layer1"][1:]),
        ("layer1.**.conv2", ["layer1.0.conv2", "layer1.1.conv2"]),
        ("*", list(NAMES)[1:]),
        ("re:layer[12]\\.0\\.conv1", ["layer1.0.conv1", "layer2.0.conv1"]),
        ("re:.*conv1", ["conv1", "layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1"]),
        ("re:conv", None),
        ("Conv2d", CONVS),
        ("_ConvNd", CONVS),
        ("Special", BELOW["layer1"][4:]),
        ("Block", [p for layer in BELOW.values() for p in layer[1:]]),
        ("Net", list(NAMES)),
        ("Module", None),
        ("object", None),
        ("layer1.", None),
        (".", None),
    ],
)
def test_a_pattern_selects_these_modules(pattern: str, paths: list[str] | None) -> None:
    assert [path for path in NAMES if selects([pattern], path, NAMES)] == (paths or [])


def test_ignore_reaches_below_containers_as_well() -> None:
    assert match(["layer*"], ["layer1", "**.conv2"], NAMES) == [
        "layer2", "layer2.0", "layer2.0.conv1",
    ]  # fmt: skip


def test_a_path_is_taken_literally_even_if_it_looks_like_a_glob_or_a_class() -> None:
    model = nn.ModuleDict({"a[b]": nn.ReLU(), "b": nn.ReLU(), "Linear": nn.ReLU()})
    model["x"] = nn.Linear(1, 1)
    names = module_classes(model)
    assert match(["a[b]"], [], names) == ["a[b]"]
    assert match(["Linear"], [], names) == ["Linear"]


def test_module_and_object_are_no_class_names() -> None:
    assert NAMES["layer1.1"] == ("Special", "Block")


def test_an_unmatched_target_is_refused_with_the_closest_names() -> None:
    with pytest.raises(TargetError) as caught:
        match(["layr1.0.conv1"], [], NAMES, where="Policy.rules[0]")
    assert str(caught.value) == (
        "'layr1.0.conv1' matches no module of this model.\n"
        "  where: Policy.rules[0].targets; closest names: layer1.0.conv1, layer2.0.conv1, "
        "layer1.1.conv1\n"
        "  fix:   use a full module path or a glob such as 'layer1.*.conv1'."
    )


def test_an_unmatched_class_is_refused_with_the_closest_class() -> None:
    with pytest.raises(TargetError, match=r"targets; closest names: .*Conv2d"):
        match(["Conv3d"], [], NAMES)


def test_one_unmatched_target_among_good_ones_is_refused() -> None:
    with pytest.raises(TargetError, match="'layer3' matches no module"):
        match(["layer1", "layer3"], [], NAMES)


def test_an_unmatched_ignore_is_refused() -> None:
    with pytest.raises(TargetError, match=r"where: Policy\.ignore; closest names: fc"):
        match(["auto"], ["fcc"], NAMES)


def test_a_model_without_submodules_is_refused_in_readable_words() -> None:
    with pytest.raises(TargetError, match="closest names: none, the model has no submodules"):
        match(["q.x"], [], module_classes(nn.ReLU()))


def test_ignoring_everything_that_is_targeted_is_refused() -> None:
    with pytest.raises(TargetError) as caught:
        match(["layer2.0"], ["layer2"], NAMES)
    assert str(caught.value) == (
        "all 3 modules that 'layer2.0' selects are ignored.\n"
        "  where: Policy.ignore = 'layer2'\n"
        "  fix:   ignore less, or target more."
    )


LADDER = [
    "layer1.0.conv1", "layer1.*.conv1", "layer1.0", "layer1.?", "layer1", "layer?", "lay*",
    "re:layer1.*", "Conv2d", "_ConvNd", "Block", "Net", "auto",
]  # fmt: skip


def test_the_ladder_of_specificity() -> None:
    fits = [specificity(pattern, "layer1.0.conv1", NAMES) for pattern in LADDER]
    assert None not in fits
    assert fits == sorted(fits, reverse=True)  # type: ignore[type-var]
    assert len(set(fits)) == len(fits)


@pytest.mark.parametrize("reverse", [False, True])
def test_the_more_specific_rule_owns_whatever_the_order(reverse: bool) -> None:
    for high, low in pairwise(LADDER):
        rules = [rule(high), rule(low)][:: -1 if reverse else 1]
        assert owner(rules, "layer1.0.conv1", NAMES) == int(reverse)


def test_the_most_specific_target_of_a_rule_counts() -> None:
    rules = [rule("layer1"), rule("auto", "layer1.0.conv1")]
    assert owner(rules, "layer1.0.conv1", NAMES) == 1
    assert owner(rules, "layer1.0.conv2", NAMES) == 0


def test_a_rule_loses_what_it_ignores() -> None:
    rules = [rule("auto"), rule("layer1", ignore=("**.conv2",))]
    assert owner(rules, "layer1.0.conv2", NAMES) == 0
    assert owner(rules, "layer1.0.conv1", NAMES) == 1


def test_nobody_owns_what_the_policy_ignores_or_no_rule_reaches() -> None:
    assert owner([rule("layer1")], "fc", NAMES) is None
    assert owner([rule("auto")], "layer1.0.conv1", NAMES, ignore=["layer1"]) is None


def test_a_tie_is_refused_naming_both_rules() -> None:
    with pytest.raises(TargetError) as caught:
        owner([rule("fc"), rule("layer*"), rule("Conv2d", "*ayer1")], "layer1.0.conv1", NAMES)
    assert str(caught.value) == (
        "two rules fit 'layer1.0.conv1' equally closely: 'layer*' and '*ayer1'.\n"
        "  where: Policy.rules[1].targets and Policy.rules[2].targets\n"
        "  fix:   name 'layer1.0.conv1' in the targets of one, or in the ignore of the other."
    )


def test_a_tie_below_a_clear_winner_does_not_matter() -> None:
    rules = [rule("layer1"), rule("layer1"), rule("layer1.0")]
    assert owner(rules, "layer1.0.conv1", NAMES) == 2
    assert owner(rules[::-1], "layer1.0.conv1", NAMES) == 0


segments = st.text("abc01_", min_size=1, max_size=4)
paths = st.lists(segments, min_size=1, max_size=4).map(".".join)


def tree(*leaves: str) -> dict[str, tuple[str, ...]]:
    """Build the classes of a model that has these modules."""
    parts = [leaf.split(".") for leaf in leaves]
    every = {"": ("Net",)}
    return every | {".".join(p[:n]): ("Leaf",) for p in parts for n in range(1, len(p) + 1)}


@given(paths, paths)
def test_a_path_selects_itself_and_exactly_what_is_below(path: str, other: str) -> None:
    names = tree(path, other)
    expected = [name for name in names if name == path or name.startswith(f"{path}.")]
    assert match([path], [], names) == expected


@given(paths, st.data())
def test_a_star_stands_for_any_piece_of_one_segment(path: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(path) - 1))
    stop = data.draw(st.integers(start, len(path)))
    piece, names = path[start:stop], tree(path)
    single = specificity(f"{path[:start]}*{path[stop:]}", path, names) is not None
    double = specificity(f"{path[:start]}**{path[stop:]}", path, names) is not None
    assert single or "." in piece
    assert double or path[stop : stop + 1] == "."  # `**.` stands for whole segments


@given(paths, st.data())
def test_a_glob_never_beats_the_path_that_it_fits(path: str, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(path)))
    glob, names = path[:at] + "*" + path[at + 1 :], tree(path)
    fit = specificity(glob, path, names)
    exact = specificity(path, path, names)
    assert fit is None or (exact is not None and fit < exact)


@given(paths, paths)
def test_more_targets_never_select_less_and_more_ignores_never_select_more(
    one: str, other: str
) -> None:
    names = tree(one, other)
    both = set(match([one, other], [], names))
    assert set(match([one], [], names)) <= both
    assert {p for p in both if not selects([other], p, names)} <= set(match([one], [], names))


@given(st.text(max_size=12), paths)
def test_any_text_either_is_refused_or_matches_without_crashing(text: str, path: str) -> None:
    try:
        pattern = Channels(targets=text, criterion="magnitude", repair=[], keep=0.5).targets[0]
    except PolicyError:
        return
    assert isinstance(specificity(pattern, path, tree(path)), tuple | None)
