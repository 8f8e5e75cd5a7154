"""A report says what the numbers mean, survives JSON, and undoes once."""

from __future__ import annotations

import base64
import itertools
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

import torch_otprune.criteria  # noqa: F401  (fills the table that policies name)
from torch_otprune.errors import OTPruneError
from torch_otprune.plan.model import Cost, Cut, Plan, Refusal
from torch_otprune.policy import Budget, Channels, Policy
from torch_otprune.report import (
    Agreement,
    Interval,
    Latency,
    LayerError,
    OutputError,
    RepairNote,
    Report,
    environment,
    images_of,
)
from torch_otprune.report.pictures import draw
from torch_otprune.report.words import count, error, short_names

PARAMS, MACS = Cost(before=1000, after=600), Cost(before=40_000, after=19_900)

HOLDS = "the output holds on the calibration data: "
COLLAPSED = "the output has collapsed on the calibration data: "


def a_plan(groups: int = 3) -> Plan:
    cuts = tuple(
        Cut(
            group=f"layer{i}.conv<1>",
            rule=0,
            units=16,
            keep=tuple(range(4 + i % 8)),
            criterion="magnitude",
            reason="the smallest & the least",
            error=0.1,
            slices=(),
        )
        for i in range(groups)
    )
    rule = Channels(criterion="magnitude", repair=())
    return Plan(
        policy=Policy(rules=rule, budget=Budget(macs="50%")),
        fingerprint="f",
        calibration="none",
        samples=64,
        cuts=cuts,
        refused=(Refusal(group="head", reason="it is the output", fix="none"),),
        params=PARAMS,
        macs=MACS,
        notes=("a note",),
    )


def speed(median: float, low: float, high: float) -> Latency:
    time = Interval(median=2.0, low=1.9, high=2.1)
    ratio = Interval(median=median, low=low, high=high)
    return Latency(before=time, after=time, speedup=ratio, pairs=20, samples=8)


def a_report(groups: int = 3, **changes: Any) -> Report:
    layers = tuple(
        LayerError(path=f"layer{i}.conv2", before_repair=0.5, after_repair=0.01 * i)
        for i in range(groups)
    )
    fields: dict[str, Any] = {
        "plan": a_plan(groups),
        "params": PARAMS,
        "macs": MACS,
        "latency": speed(1.5, 1.4, 1.6),
        "layers": layers,
        "output_error": OutputError(before_repair=0.7, after_repair=0.2),
        "agreement": Agreement(kind="top1", value=0.95, chance=0.1, samples=64),
        "repairs": (
            RepairNote(kind="bias", site="layer0.conv2", before=0.2, after=0.1, accepted=True),
        ),
        "seconds": {"plan": 0.5},
        "environment": environment(),
    }
    return Report(**{**fields, **changes})


def lines(text: str) -> str:
    """The text of an error, which has three lines."""
    assert [line[:9] for line in text.splitlines()[1:]] == ["  where: ", "  fix:   "]
    return text


# JSON


@pytest.mark.parametrize("changes", [{}, {"latency": None}, {"layers": ()}])
def test_json_in_and_out_loses_nothing(changes: dict[str, Any]) -> None:
    report = a_report(**changes)
    assert Report.from_json(report.to_json()) == report


def test_an_infinite_error_survives_json() -> None:
    layer = LayerError(path="a", before_repair=float("inf"), after_repair=0.1)
    report = a_report(layers=(layer,))
    assert Report.from_json(report.to_json()) == report


def test_json_holds_the_verdicts_and_the_plans_hash_for_readers() -> None:
    report = a_report()
    assert report.verdicts[0] in report.to_json()
    assert report.plan.hash in report.to_json()


@pytest.mark.parametrize("text", ["", "{}", '{"version": 1', "[1]"])
def test_text_that_is_no_report_is_an_error(text: str) -> None:
    with pytest.raises(OTPruneError) as found:
        Report.from_json(text)
    assert "this is no report" in lines(str(found.value))


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(ValidationError):
        a_report(extra=1)


def test_a_report_is_frozen() -> None:
    with pytest.raises(ValidationError):
        a_report().seconds = {}  # type: ignore[misc]


# Undo


class Undo:
    """Counts its calls, and fails as often as it is told to."""

    def __init__(self, failures: int = 0) -> None:
        self.calls, self.failures = 0, failures

    def __call__(self) -> None:
        self.calls += 1
        if self.calls <= self.failures:
            raise RuntimeError("no")


def test_undo_is_called_once() -> None:
    undo = Undo()
    a_report().bind_undo_(undo).undo_()
    assert undo.calls == 1


def test_a_report_that_can_undo_equals_its_copy_on_disk() -> None:
    report = a_report().bind_undo_(Undo())
    assert Report.from_json(report.to_json()) == report
    assert a_report(4) != report


def test_a_second_undo_says_that_it_is_done() -> None:
    undo = Undo()
    report = a_report().bind_undo_(undo)
    report.undo_()
    with pytest.raises(OTPruneError) as found:
        report.undo_()
    assert "already undone: the model is dense again." in lines(str(found.value))
    assert undo.calls == 1


def test_a_report_from_a_file_cannot_undo() -> None:
    report = Report.from_json(a_report().bind_undo_(Undo()).to_json())
    with pytest.raises(OTPruneError) as found:
        report.undo_()
    assert "read from a file" in lines(str(found.value))


def test_an_undo_that_failed_can_be_tried_again() -> None:
    undo = Undo(failures=1)
    report = a_report().bind_undo_(undo)
    with pytest.raises(RuntimeError):
        report.undo_()
    report.undo_()
    assert undo.calls == 2


# Verdicts


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({"latency": speed(1.5, 1.4, 1.6)}, "faster: measured speed-up 1.5 [1.4, 1.6]"),
        (
            {"latency": speed(1.02, 0.97, 1.06)},
            "not faster: measured speed-up 1.02 [0.97, 1.06] contains 1",
        ),
        (
            {"latency": speed(0.9, 0.8, 0.95)},
            "not faster but slower: measured speed-up 0.9 [0.8, 0.95] lies below 1",
        ),
        (
            {},
            f"{HOLDS}95.0% top-1 agreement with the dense model, relative error 0.200",
        ),
        (
            {"output_error": OutputError(before_repair=2, after_repair=0.97)},
            f"{COLLAPSED}relative output error 0.970 (a silent model has 1)",
        ),
        (
            {"agreement": Agreement(kind="top1", value=0.12, chance=0.1, samples=64)},
            f"{COLLAPSED}12.0% top-1 agreement where chance gives 10.0%",
        ),
        (
            {"agreement": Agreement(kind="cosine", value=0.02, chance=0.0, samples=64)},
            f"{COLLAPSED}cosine 0.020 where chance gives 0.000",
        ),
        ({}, "within budget: 19,900 macs kept (49.8%), 20,000 allowed (50.0%)"),
        (
            {"macs": Cost(before=40_000, after=20_001)},
            "over budget: 20,001 macs kept (50.0%), 20,000 allowed (50.0%)",
        ),
        (
            {"params": Cost(before=1000, after=601)},
            "the plan was wrong about params: it promised 1,000 -> 600, measured are 1,000 -> 601",
        ),
        (
            {
                "repairs": (
                    RepairNote(kind="bias", site="a.b", before=1, after=2, accepted=False),
                    RepairNote(kind="norm", site="c", before=2, after=1, accepted=True),
                )
            },
            "1 of 2 repairs refused, the first at 'a.b': no gain",
        ),
    ],
)
def test_the_verdict_is_plain(changes: dict[str, Any], verdict: str) -> None:
    assert verdict in a_report(**changes).verdicts


def test_what_was_not_timed_is_not_judged() -> None:
    assert not any("speed-up" in verdict for verdict in a_report(latency=None).verdicts)


# The table


def test_the_table_shows_verdicts_totals_and_the_worst_layers() -> None:
    text = str(a_report(30))
    assert text.startswith("- the output holds")
    for words in ("parameters", "1k", "60.0%", "49.8%", "layer29.conv2", "and 20 layers"):
        assert words in text
    assert "layer3.conv2" not in text


def test_the_table_is_plain_text_that_fits() -> None:
    long = LayerError(path="block." * 40 + "conv", before_repair=1, after_repair=1)
    text = str(a_report(layers=(long,)))
    assert max(map(len, text.splitlines())) <= 100
    assert "\x1b" not in text


def test_square_brackets_are_not_markup() -> None:
    layer = LayerError(path="blocks[0].conv", before_repair=1, after_repair=1)
    assert "blocks[0].conv" in str(a_report(layers=(layer,)))


def test_counts_are_rounded_to_three_digits() -> None:
    values = (7, 999, 1000, 1_234_567, 40_813_184, 9_999_999_999)
    assert [count(v) for v in values] == ["7", "999", "1k", "1.23M", "40.8M", "10G"]


def test_errors_are_short_however_large() -> None:
    assert [error(v) for v in (0.1234, 123456.0, float("inf"))] == ["0.123", "1.2e+05", "infinite"]


def test_long_names_keep_the_numbers_that_tell_them_apart() -> None:
    names = [f"backbone.encoder.layers.{i}.feed_forward.dense_projection" for i in range(12)]
    short = short_names(names, most=30)
    assert len(set(short)) == 12
    assert max(map(len, short)) <= 30


# Files


class Links(HTMLParser):
    """Collects everything a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for key, value in attrs if key in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_writing_leaves_json_a_page_and_pictures(tmp_path: Path) -> None:
    page = a_report().write(tmp_path / "a" / "b")
    names = ["layers.png", "report.html", "report.json", "totals.png", "widths.png"]
    assert sorted(path.name for path in page.parent.iterdir()) == names
    assert Report.from_json((page.parent / "report.json").read_text()) == a_report()


def test_the_page_is_well_formed_and_fetches_nothing(tmp_path: Path) -> None:
    reader = Links()
    reader.feed(a_report().write(tmp_path).read_text())
    assert reader.open == []
    assert len(reader.links) == 3
    assert all(link.startswith("data:image/png;base64,") for link in reader.links)


def test_names_are_escaped_in_the_page(tmp_path: Path) -> None:
    text = a_report().write(tmp_path).read_text()
    assert "layer0.conv&lt;1&gt;" in text
    assert "the smallest &amp; the least" in text


def test_the_page_tells_what_was_not_cut_and_why(tmp_path: Path) -> None:
    text = a_report().write(tmp_path).read_text()
    assert "head: it is the output" in text
    assert "a note" in text


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    a_report().write(tmp_path)
    a_report().write(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 6


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OTPruneError) as found:
        a_report().write(tmp_path / "file")
    assert "the report cannot be written: File exists." in lines(str(found.value))


def empty(report: Report) -> Report:
    return report.model_copy(update={"layers": (), "latency": None})


@pytest.mark.parametrize("change", [lambda report: report, empty])
@pytest.mark.parametrize("groups", [1, 30, 150])
def test_pictures_of_any_size_can_be_drawn(groups: int, change: Callable[[Report], Report]) -> None:
    for png in draw(change(a_report(groups))).values():
        width, height = (int.from_bytes(png[i : i + 4], "big") for i in (16, 20))
        assert png.startswith(b"\x89PNG")
        assert width < 1200
        assert height < 2200


def test_pictures_are_the_same_every_time() -> None:
    assert [base64.b64encode(p) for p in draw(a_report()).values()] == [
        base64.b64encode(p) for p in draw(a_report()).values()
    ]


def test_drawing_leaves_pyplot_alone(tmp_path: Path) -> None:
    code = (
        "import sys; from test_report_model import a_report; import pathlib;"
        "assert 'matplotlib' not in sys.modules and 'rich' not in sys.modules;"
        "a_report().write(pathlib.Path(sys.argv[1]));"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    root = Path(__file__).parent
    command = [sys.executable, "-c", code, str(tmp_path)]
    environment = {"PYTHONPATH": f"{root}:{root.parent}", "PATH": ""}
    subprocess.run(command, env=environment, check=True, timeout=120)


# Outputs that are images


def pictured(*shape: int, batches: int = 1, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(shape, generator=generator) for _ in range(batches)]


def test_pixels_are_shares_of_the_dense_outputs_range() -> None:
    dense = torch.zeros(2, 1, 8, 8)
    dense[0, 0, 0, 0], dense[1, 0, 7, 7] = -1.0, 3.0
    found = images_of({"dense": [dense], "cut": [dense * 10], "repaired": [dense / 2]})
    assert found is not None and found.shape == (2, 8, 8, 1)
    assert found.pixels("dense")[0, 0, 0, 0] == 0 and found.pixels("dense")[1, 7, 7, 0] == 255
    assert found.pixels("dense")[0, 1, 1, 0] == 64  # nothing lies at a quarter of the range
    assert found.pixels("cut")[1, 7, 7, 0] == 255  # beyond the range is its end
    assert found.pixels("repaired")[1, 7, 7, 0] == 159


def test_colours_stand_last_and_large_images_are_averaged_down() -> None:
    image = torch.zeros(12, 3, 64, 128)
    image[:, 2, :, :64] = 1.0
    found = images_of({"dense": [image], "cut": [image]})
    assert found is not None and found.shape == (8, 32, 64, 3)
    assert found.pixels("cut")[0, 5, 31].tolist() == [0, 0, 255]
    assert found.pixels("cut")[0, 5, 32].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "shape", [(4, 10), (4, 2, 16, 16), (4, 1, 7, 16), (0, 1, 16, 16), (4, 1, 16, 16, 16)]
)
def test_what_does_not_look_like_an_image_is_not_shown(shape: tuple[int, ...]) -> None:
    found = torch.zeros(shape)
    assert images_of({"dense": [found], "cut": [found]}) is None
    assert images_of({"dense": [(found, found)], "cut": [(found, found)]}) is None
    assert images_of({"dense": [], "cut": []}) is None


def test_an_image_of_one_shade_or_of_no_numbers_is_no_division_by_zero() -> None:
    grey = torch.full((2, 1, 8, 8), 5.0)
    found = images_of({"dense": [grey], "cut": [grey * torch.nan]})
    assert found is not None
    assert not found.pixels("dense").any() and not found.pixels("cut").any()
    assert images_of({"dense": [grey * torch.nan], "cut": [grey]}) is None


class Opened(HTMLParser):
    """Collects the images inside a page."""

    def __init__(self) -> None:
        super().__init__()
        self.images: dict[str, bytes] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = dict(attrs)
        if tag == "img":
            data = (told["src"] or "").removeprefix("data:image/png;base64,")
            self.images[told["alt"] or ""] = base64.b64decode(data)


@pytest.mark.parametrize("colours", [1, 3])
def test_the_page_shows_outputs_before_and_after(tmp_path: Path, colours: int) -> None:
    pillow = pytest.importorskip("PIL.Image", reason="pillow comes with matplotlib")
    [dense] = pictured(4, colours, 16, 16)
    images = images_of({"dense": [dense], "cut": [dense * 0], "repaired": [dense]})
    report = a_report().model_copy(update={"images": images})
    assert Report.from_json(report.to_json()) == report
    reader = Opened()
    reader.feed(report.write(tmp_path).read_text())
    assert list(reader.images)[:2] == ["totals", "outputs"]
    assert (tmp_path / "outputs.png").read_bytes() == reader.images["outputs"]
    picture = pillow.open(tmp_path / "outputs.png").convert("L")
    width, height = picture.size
    rows = [[picture.getpixel((x, y)) for x in range(width // 2)] for y in range(height)]
    black = [sum(shade == 0 for shade in row) > width // 4 for row in rows]
    # between two rows of random shades the cut model's row is black from edge to edge
    runs = [len(list(same)) for dark, same in itertools.groupby(black) if dark]
    assert max(runs) > height / 8 and sorted(runs)[-2] < 10


def test_a_report_without_images_has_no_such_picture() -> None:
    assert a_report().images is None and "outputs" not in draw(a_report())
