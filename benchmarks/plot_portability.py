"""Turn the results of `portability.py` into tables; nothing is measured here."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import markdown, read_json

RESULTS = Path(__file__).resolve().parent / "results" / "portability.json"
SIGNS = {"passes": "passes", "cannot": "–", "fails": "**fails**"}


def _places(payload: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["place"] for row in payload["rows"]))


def grid(payload: Mapping[str, Any]) -> str:
    """Show every cell: one line per network and kind of cut.

    Args:
        payload: what `portability.py` wrote.

    Returns:
        a markdown table; a number behind a sign is that of the reason below.
    """
    places, told = _places(payload), reasons(payload)
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in payload["rows"]:
        sign = SIGNS[row["status"]]
        if row["said"]:
            sign += f" {told.index(row['said']) + 1}"
        cells.setdefault((row["net"], row["kind"]), {})[row["place"]] = sign
    rows = [
        [net, kind, *(found.get(place, "not run") for place in places)]
        for (net, kind), found in cells.items()
    ]
    return markdown(["network", "cut", *places], rows)


def reasons(payload: Mapping[str, Any]) -> list[str]:
    """List why cells do not pass, or what had to stay, each reason once.

    Args:
        payload: what `portability.py` wrote.

    Returns:
        texts, in order of appearance.
    """
    return list(dict.fromkeys(r["said"] for r in payload["rows"] if r["said"]))


def summary(payload: Mapping[str, Any]) -> str:
    """Count the cells of each place.

    Args:
        payload: what `portability.py` wrote.

    Returns:
        a markdown table.
    """
    counts = Counter((row["place"], row["status"]) for row in payload["rows"])
    rows = [[place, *(counts[place, sign] for sign in SIGNS)] for place in _places(payload)]
    total = [sum(counts[place, sign] for place in _places(payload)) for sign in SIGNS]
    return markdown(["place", "passes", "cannot", "fails"], [*rows, ["all", *total]])


def page(payload: Mapping[str, Any]) -> str:
    """Write all of it.

    Args:
        payload: what `portability.py` wrote.

    Returns:
        markdown: counts, cells, reasons, and what it was measured with.
    """
    listed = "\n".join(f"{i + 1}. {text}" for i, text in enumerate(reasons(payload)))
    about = payload["environment"]
    commits = ", ".join(sorted({str(row["commit"]) for row in payload["rows"]}))
    names = ("torch", "transformers", "onnx", "onnxruntime")
    versions = ", ".join(f"{name} {about['packages'][name]}" for name in names)
    note = (
        f"Made by `benchmarks/portability.py` at {commits} with seed {about['seed']} on "
        f"{about['threads']} thread of {about['cpu']}: {versions}."
    )
    parts = [summary(payload), grid(payload), listed, note]
    return "\n\n".join(part for part in parts if part) + "\n"


def main(words: list[str] | None = None) -> None:
    """Write the tables beside the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args(words)
    payload = read_json(args.json)
    if not payload.get("rows"):
        raise SystemExit(f"{args.json.name} has no rows: run portability.py first.")
    args.json.with_suffix(".md").write_text(page(payload))


if __name__ == "__main__":
    main()
