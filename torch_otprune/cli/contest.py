"""The `compare` command: several policies, one table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch_otprune.cli import names
from torch_otprune.cli.screen import Screen
from torch_otprune.compare import compare
from torch_otprune.errors import PolicyError
from torch_otprune.policy import Policy

__all__ = ["run_compare"]


def run_compare(
    show: Screen,
    model: str,
    policies: Sequence[Path],
    *,
    data: str,
    held: str,
    weights: Path | None,
) -> None:
    """Carry out every policy, print the table or its JSON.

    Args:
        show: where to print.
        model: name of the factory.
        policies: YAML files; their names without the ending name the policies.
        data: name of the loader of calibration batches.
        held: name of the loader of what judges.
        weights: safetensors file.

    Raises:
        PolicyError: if two files have the same name.
    """
    declared = {path.stem: Policy.from_yaml(path) for path in policies}
    if len(declared) < len(policies):
        raise PolicyError(
            "two policies have the same name.",
            where=f"POLICY {' '.join(map(str, policies))}",
            fix="give the files different names; folders and endings do not count.",
        )
    net = names.model(model, weights)
    judges = names.data(held, "--held")
    with show.bars() as bars:
        found = compare(net, declared, names.data(data), held=judges, progress=bars)
    show.data(found.model_dump_json(indent=2))
    show.text(*str(found).splitlines())
