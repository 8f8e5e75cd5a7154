"""How analysis and plan of a Llama-style network grow with its layers, in forward passes.

Run:
    python -m benchmarks.growth --out benchmarks/results/growth.json
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import torch_otprune as otp
from benchmarks.common import environment, markdown, write_json
from torch_otprune.structure import trace

LAYERS = (8, 16, 32, 64)
WIDTH, HIDDEN, HEADS, GROUPS, WORDS = 256, 688, 8, 4, 1000


def llama(layers: int) -> nn.Module:
    """Build a Llama with random weights.

    Args:
        layers: how many.

    Returns:
        it, in evaluation mode.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
    )
    return LlamaForCausalLM(config).eval()


def seconds(work: Callable[[], object]) -> float:
    """Take the processor's time for one piece of work."""
    start = time.process_time()
    work()
    return time.process_time() - start


def plan(model: nn.Module, batch: Tensor) -> otp.Plan:
    """Attach, observe one batch, decide, and check every cut: all but the cutting.

    Args:
        model: the dense model.
        batch: tokens.

    Returns:
        the plan.
    """
    rules = [
        otp.Channels(keep=0.5, criterion="magnitude", repair="none"),
        otp.Heads(keep=0.5, criterion="magnitude", repair="none"),
    ]
    with otp.attach(model, otp.Policy(rules=rules)) as pruner:
        otp.observe(pruner, [batch])
        return pruner.plan()


def row(layers: int, tokens: int, *, repeats: int) -> dict[str, Any]:
    """Measure one depth.

    Args:
        layers: of the network.
        tokens: of the one text that it reads.
        repeats: of each time; the median counts.

    Returns:
        seconds on one core, and their ratios to a forward pass.
    """
    model, batch = llama(layers), torch.randint(0, WORDS, (1, tokens))
    works: dict[str, Callable[[], object]] = {
        "forward": lambda: model(batch),
        "analysis": lambda: trace(model, batch),
        "all": lambda: plan(model, batch),
    }
    found: dict[str, list[float]] = {name: [] for name in works}
    with torch.no_grad():
        for work in works.values():
            work()  # what is only done once is done
        for _ in range(repeats):  # in turn, so that all see the same load
            for name, work in works.items():
                found[name].append(seconds(work))
    medians = {name: statistics.median(times) for name, times in found.items()}
    ratios = {
        f"{name} per forward": round(medians[name] / medians["forward"], 2)
        for name in ("analysis", "all")
    }
    return {"layers": layers, "tokens": tokens, "seconds": medians} | ratios


def exponent(rows: Sequence[dict[str, Any]], name: str) -> float:
    """Fit the power of the number of layers that a time grows with.

    Args:
        rows: of one number of tokens, of at least two depths.
        name: of the time.

    Returns:
        1 where growth is linear.
    """
    points = [(math.log(r["layers"]), math.log(r["seconds"][name])) for r in rows]
    mean_x, mean_y = (statistics.fmean(axis) for axis in zip(*points, strict=True))
    above = sum((x - mean_x) * (y - mean_y) for x, y in points)
    return round(above / sum((x - mean_x) ** 2 for x, _ in points), 3)


def page(payload: Mapping[str, Any]) -> str:
    """Write the tables.

    Args:
        payload: what `main` wrote.

    Returns:
        markdown: forward passes by depth and length, then the powers of growth.
    """
    ratios = [
        [r["tokens"], r["layers"], f"{1e3 * r['seconds']['forward']:.0f}"]
        + [f"{r[f'{name} per forward']:.1f}" for name in ("analysis", "all")]
        for r in payload["rows"]
    ]
    head = ["tokens", "layers", "forward, ms", "analysis, forwards", "analysis and plan, forwards"]
    powers = [
        [tokens, *(f"{found[name]:.2f}" for name in ("forward", "analysis", "all"))]
        for tokens, found in payload["exponents"].items()
    ]
    grown = ["tokens", "forward", "analysis", "analysis and plan"]
    about = payload["environment"]
    note = f"Made by `benchmarks/growth.py` at {about['commit']} on one thread of {about['cpu']}."
    lead = "Time grows with this power of the number of layers:"
    return "\n\n".join([markdown(head, ratios), lead, markdown(grown, powers), note]) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every depth at every length, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=LAYERS)
    parser.add_argument("--tokens", type=int, nargs="+", default=(64, 128))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/growth.json"))
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = [row(n, t, repeats=asked.repeats) for t in asked.tokens for n in asked.layers]
    growth = {
        str(t): {
            name: exponent([r for r in rows if r["tokens"] == t], name)
            for name in ("forward", "analysis", "all")
        }
        for t in asked.tokens
    }
    shape = {"width": WIDTH, "hidden": HIDDEN, "heads": HEADS, "groups": GROUPS, "words": WORDS}
    payload = {
        "environment": environment(seed=0),
        "model": shape,
        "rows": rows,
        "exponents": growth,
    }
    write_json(asked.out, payload)
    asked.out.with_suffix(".md").write_text(page(payload))


if __name__ == "__main__":
    main()
