"""Turn the results of `coverage.py` into tables; nothing is measured here."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import markdown, read_json

RESULTS = Path(__file__).resolve().parent / "results" / "coverage.json"
STATUSES = (
    "exact",
    "refused",
    "prunes nothing",
    "wrong",
    "fails in forward",
    "crashes",
    "hangs",
)


def summary(payload: Mapping[str, Any]) -> str:
    """Count what became of the nets, by family and tool.

    Args:
        payload: what `coverage.py` wrote.

    Returns:
        a markdown table.
    """
    counts: dict[tuple[str, str], Counter[str]] = {}
    for row in payload["rows"]:
        for family in (row["family"], "all"):
            counts.setdefault((family, row["tool"]), Counter())[row["status"]] += 1
    shown = [s for s in STATUSES if any(c[s] for c in counts.values())]
    order = sorted(counts, key=lambda key: (key[0] == "all", key))
    rows = [
        [family, tool, sum(counts[family, tool].values())]
        + [counts[family, tool][status] or "" for status in shown]
        for family, tool in order
    ]
    return markdown(["family", "tool", "nets", *shown], rows)


def details(payload: Mapping[str, Any]) -> str:
    """List every net with what each tool made of it.

    Args:
        payload: what `coverage.py` wrote.

    Returns:
        a markdown table.
    """
    tools = list(dict.fromkeys(row["tool"] for row in payload["rows"]))
    nets: dict[str, dict[str, Any]] = {}
    for row in payload["rows"]:
        nets.setdefault(row["name"], {"family": row["family"]})[row["tool"]] = row
    rows = []
    for name, found in sorted(nets.items(), key=lambda item: (item[1]["family"], item[0])):
        groups = found.get("ours, at random", {}).get("groups", {})
        widths = ", ".join(f"{count} {kind}" for kind, count in groups.items() if count)
        said = [found.get(tool, {}).get("status", "–") for tool in tools]
        rows.append([found["family"], name, widths or "–", *said])
    return markdown(["family", "net", "groups that go", *tools], rows)


def main(words: list[str] | None = None) -> None:
    """Write the tables beside the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args(words)
    payload = read_json(args.json)
    if not payload.get("rows"):
        raise SystemExit(f"{args.json.name} has no rows: run coverage.py first.")
    args.json.with_suffix(".md").write_text(f"{summary(payload)}\n\n{details(payload)}\n")


if __name__ == "__main__":
    main()
