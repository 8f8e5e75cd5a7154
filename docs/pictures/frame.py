"""Draw docs/pictures/frame.svg: units as mass, and where it goes. Every mark is computed.

Twelve units speak on two calibration inputs, so each is a point in the plane. The cost of
moving one onto another is the design's: squared distance at the best scale, times how much
the consumer listens. Run `python docs/pictures/frame.py` to draw it again.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

INK, FAINT, KEPT, GONE, MOVED = "#1f2933", "#9aa5b1", "#00796b", "#c2410c", "#f2b38a"
KEEP = 4
SEED = 7
REST = (
    "then  cut: the kept units remain · repair: every consumer is refitted by least squares, "
    "front to back · verify: against the dense model"
)


def units() -> tuple[np.ndarray, np.ndarray]:
    """Place twelve units in four loose directions, with unequal weights."""
    rng = np.random.default_rng(SEED)
    angle = np.repeat([0.22, 0.62, 0.98, 1.36], 3) + rng.normal(0, 0.15, 12)
    radius = rng.uniform(0.35, 1.0, 12)
    points = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return points, rng.uniform(0.3, 1.0, 12)


def costs(points: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Compute c(i -> j) and, in the last column, c(i -> 0)."""
    gram = points @ points.T
    square = np.diag(gram)
    to_unit = np.maximum(square[:, None] - gram**2 / square[None, :], 0)
    return weight[:, None] * np.concatenate([to_unit, square[:, None]], axis=1)


def greedy(cost: np.ndarray) -> tuple[list[int], list[float]]:
    """Add the unit that lowers the total most, again and again."""
    chosen: list[int] = []
    best = cost[:, -1].copy()
    curve = [float(best.sum())]
    while len(chosen) < len(cost):
        gains = [np.minimum(best, cost[:, j]).sum() for j in range(len(cost))]
        chosen.append(min((j for j in range(len(cost)) if j not in chosen), key=gains.__getitem__))
        best = np.minimum(best, cost[:, chosen[-1]])
        curve.append(float(best.sum()))
    return chosen, curve


def dot(x: float, y: float, r: float, fill: str, **more: str) -> str:
    """Draw one unit."""
    extra = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in more.items())
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}" fill="{fill}"{extra}/>'


def line(a: tuple[float, float], b: tuple[float, float], stroke: str, **more: str) -> str:
    """Draw a straight line."""
    extra = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in more.items())
    return (
        f'<line x1="{a[0]:.1f}" y1="{a[1]:.1f}" x2="{b[0]:.1f}" y2="{b[1]:.1f}" '
        f'stroke="{stroke}"{extra}/>'
    )


def text(x: float, y: float, words: str, *, size: int = 13, fill: str = INK, **more: str) -> str:
    """Write a line of text."""
    extra = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in more.items())
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{fill}"{extra}>{words}</text>'


def plane(left: float, top: float, points: np.ndarray, weight: np.ndarray) -> list[str]:
    """Draw the axes of one panel; units are drawn by the caller."""
    origin = (left, top + 210)
    return [
        line(origin, (left + 230, top + 210), FAINT, stroke_width="1"),
        line(origin, (left, top - 6), FAINT, stroke_width="1"),
        text(left + 230, top + 228, "response to input 1", size=11, fill=FAINT, text_anchor="end"),
        text(left - 8, top - 6, "response to input 2", size=11, fill=FAINT, text_anchor="end",
             transform=f"rotate(-90 {left - 8} {top - 6})"),
    ]  # fmt: skip


def place(left: float, top: float, point: np.ndarray) -> tuple[float, float]:
    """Turn a response into a position on the page."""
    return left + 215 * float(point[0]), top + 210 - 215 * float(point[1])


def observed(left: float, top: float, points: np.ndarray, weight: np.ndarray) -> list[str]:
    """Draw the first panel: all units."""
    out = plane(left, top, points, weight)
    for point, w in zip(points, weight, strict=True):
        out.append(dot(*place(left, top, point), 3 + 6 * w, INK, fill_opacity="0.72"))
    return out


def moved(
    left: float, top: float, points: np.ndarray, weight: np.ndarray, kept: list[int]
) -> list[str]:
    """Draw the second panel: the kept units and where the mass of the others goes."""
    cost = costs(points, weight)
    out = plane(left, top, points, weight)
    for j in kept:
        reach = points[j] / np.linalg.norm(points[j])
        out.append(line((left, top + 210), place(left, top, reach * 1.02), KEPT,
                        stroke_opacity="0.35", stroke_width="1.5"))  # fmt: skip
    for i in (i for i in range(len(points)) if i not in kept):
        j = min([*kept, len(points)], key=lambda target: cost[i, target])
        end = np.zeros(2)
        if j < len(points):
            end = points[j] * (points[i] @ points[j]) / (points[j] @ points[j])
        here, there = place(left, top, points[i]), place(left, top, end)
        out.append(line(here, there, GONE, stroke_width="2", marker_end="url(#head)"))
        out.append(dot(*here, 3 + 6 * weight[i], MOVED, stroke=GONE, stroke_dasharray="2 2"))
    for j in kept:
        out.append(dot(*place(left, top, points[j]), 3 + 6 * weight[j], KEPT))
    return out


def curve_panel(left: float, top: float, moved_: list[float], dropped: list[float]) -> list[str]:
    """Draw the third panel: what keeping k units costs, moved or merely dropped."""

    def at(k: int, value: float) -> tuple[float, float]:
        return left + 225 * k / (len(moved_) - 1), top + 210 - 200 * value / dropped[0]

    out = [
        line((left, top + 210), (left + 230, top + 210), FAINT, stroke_width="1"),
        line((left, top + 210), (left, top - 6), FAINT, stroke_width="1"),
        text(left + 230, top + 228, "units kept, k", size=11, fill=FAINT, text_anchor="end"),
        text(left - 8, top - 6, "error at the consumer", size=11, fill=FAINT, text_anchor="end",
             transform=f"rotate(-90 {left - 8} {top - 6})"),
        line(at(KEEP, 0), at(KEEP, dropped[0]), FAINT, stroke_dasharray="3 3"),
    ]  # fmt: skip
    for values, colour in ((dropped, FAINT), (moved_, KEPT)):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(at, range(len(values)), values))
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.5"/>')
        out.append(dot(*at(KEEP, values[KEEP]), 5, colour))
    x, y = at(KEEP, dropped[KEEP])
    out.append(text(x + 10, y - 4, "dropped", size=12, fill="#616e7c"))
    x, y = at(1, moved_[1])
    out.append(text(x + 8, y + 4, "moved: E(k)", size=12, fill=KEPT))
    return out


def draw() -> str:
    """Compose the picture."""
    points, weight = units()
    cost = costs(points, weight)
    chosen, curve = greedy(cost)
    by_loss = np.sort(cost[:, -1])[::-1]
    dropped = [float(by_loss[k:].sum()) for k in range(len(points) + 1)]
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 385" role="img" '
        'font-family="system-ui, sans-serif">',
        "<title>Units as mass: observed, moved onto the kept ones, and what it costs</title>",
        f'<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="5" '
        f'markerHeight="5" orient="auto"><path d="M0 0L8 4L0 8z" fill="{GONE}"/></marker></defs>',
        '<rect width="960" height="385" rx="10" fill="#ffffff"/>',
    ]
    titles = (
        (
            "1  observe",
            "each unit is a mass at what it says;",
            "size: how much its consumer listens",
        ),
        (
            "2  choose",
            f"keep {KEEP}; the others move, rescaled,",
            "to where a kept one can speak",
        ),
        ("3  allocate", "one curve per group gives every k;", "one budget picks k in all of them"),
    )
    for n, (title, first, second) in enumerate(titles):
        x = 40 + 315 * n
        parts.append(text(x, 34, title, size=17, font_weight="600"))
        parts.append(text(x, 55, first) + text(x, 72, second))
    parts += observed(45, 104, points, weight)
    parts += moved(360, 104, points, weight, chosen[:KEEP])
    parts += curve_panel(675, 104, curve, dropped)
    parts.append(text(40, 366, REST, size=13))
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(draw(), encoding="utf-8")
