"""What `otprune doctor` does, once it is clear that torch is needed."""

from __future__ import annotations

from pathlib import Path

from torch_otprune.cli import names
from torch_otprune.cli.files import check_file, write
from torch_otprune.cli.screen import Screen
from torch_otprune.doctor import Diagnosis, doctor
from torch_otprune.doctor.text import HEADS, tables
from torch_otprune.errors import OTPruneError, StructureError
from torch_otprune.policy import Policy
from torch_otprune.report import draw_groups
from torch_otprune.statistics import collect

__all__ = ["diagnose"]

_NUMBERS = {"groups": (1, 3, 4, 5), "blocks": (3, 4, 5), "activations": (1, 3), "segments": (1,)}


def diagnose(
    show: Screen,
    model: str,
    example: str,
    *,
    policy: Path | None,
    every: bool,
    tree: bool,
    picture: Path | None,
) -> None:
    """Explain what can go from a model, and what keeps the rest.

    Args:
        show: where to print.
        model: name of the factory.
        example: name of batches, of which the first is used.
        policy: YAML file to hold against the model.
        every: print a row for every module, not one for all that are alike.
        tree: print the modules as a tree, not the tables.
        picture: PNG file for a picture of the groups.

    Raises:
        OTPruneError: if the picture cannot be written, or two options contradict each other.
        StructureError: after printing, if nothing could go.
    """
    declared = None if policy is None else Policy.from_yaml(policy)
    if picture is not None:
        _check_picture(picture)
    if tree and show.json:
        raise OTPruneError(
            "--tree and --json each say what is printed.",
            where="otprune doctor",
            fix="give one of them; the JSON names every parameter, as the tree does.",
        )
    net = names.model(model)
    batch = collect(net, names.data(example, "--example"), 2)[0]
    with show.bars() as bars:
        found = doctor(net, batch, policy=declared, progress=bars)
    if picture is not None:
        write(picture, draw_groups(found), option="--picture")
    show.data(found.to_json())
    _print(show, found, every=every, tree=tree)
    if picture is not None:
        show.text(f"picture in {picture}")
    if not (found.groups or found.blocks or found.segments):
        raise StructureError(
            "nothing could be pruned: no group of channels can be cut, no layer can go, and "
            "nothing folds.",
            where=f"MODEL {model}",
            fix="change the model as the diagnosis says, or prune another one.",
        )


def _check_picture(picture: Path) -> None:
    """Object to a file that could not be written, or not in the format that its name says."""
    check_file(picture, option="--picture", what="picture.png")
    if picture.suffix.lower() != ".png":
        ending = f"'{picture.suffix}'" if picture.suffix else "no ending"
        raise OTPruneError(
            f"the picture is a PNG, and this name has {ending}.",
            where=f"--picture {picture}",
            fix=f"name it {picture.with_suffix('.png').name}.",
        )


def _print(show: Screen, found: Diagnosis, *, every: bool, tree: bool) -> None:
    show.text(f"{found.model}: {found.params:,} parameters, {found.macs:,} MACs per sample", "")
    show.table(("parameters", "elements", "share", ""), found.totals(), numbers=(1, 2))
    for note in found.notes:
        show.text(f"note: {note}", "")
    if tree:
        show.text(found.tree(every=every), "")
        return
    for title, rows in tables(found, every=every).items():
        if rows:
            show.table(HEADS[title], rows, numbers=_NUMBERS.get(title, (1,)))
