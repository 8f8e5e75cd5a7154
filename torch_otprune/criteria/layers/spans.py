"""What is lost when a cheap map takes the place of a span of blocks, on samples held out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from torch_otprune.criteria.layers.stream import finite, folds_of, stream
from torch_otprune.statistics.depth import ChainEvidence
from torch_otprune.statistics.moments import add_gram_, ridge_factor

__all__ = ["Replace", "ridge_regression", "span_costs"]

Replace = Literal["identity", "scale", "affine"]
RIDGES = (1e-6, 1e-3, 1e-1)  # shares of the mean variance of a feature


def span_costs(
    evidence: ChainEvidence, *, replace: Replace, longest: int, folds: int
) -> Float[Tensor, "blocks blocks"]:
    """Price every span up to a length.

    Args:
        evidence: what is known about the chain.
        replace: the map that takes the span's place.
        longest: blocks of the longest span.
        folds: parts of the samples; each is predicted by a map fitted on the others.

    Returns:
        at [i, j] the cost of replacing blocks i to j, as a share of the network's squared output;
        infinite where there is no such span, or it is too long.
    """
    points = stream(evidence)
    blocks = len(evidence.blocks)
    fold = None if replace == "identity" else folds_of(evidence, folds)
    cost = points.new_full((blocks, blocks), torch.inf)
    for i in range(blocks):
        ends = slice(i + 1, i + 1 + longest)
        change = points[ends] - points[i]
        if fold is None:
            error = change.square().mean(1)[None]
        elif replace == "affine" and (writer := evidence.writers[i]) is not None:
            error = _affine(finite(writer, "a layer's input", evidence.name), change, fold)
        else:
            error = _scale(points[i], change, fold)
        noticed = (error * evidence.feel[ends]).sum(2).amin(0)
        cost[i, i : i + longest] = noticed / max(evidence.power, 1e-300)
    return cost


def _scale(
    x: Float[Tensor, "rows channels"],
    change: Float[Tensor, "spans rows channels"],
    fold: Int[Tensor, " rows"],
) -> Float[Tensor, "1 spans channels"]:
    """Predict the change of each channel from the channel itself."""
    total = change.new_zeros(len(change), x.shape[1])
    for k in range(int(fold.max()) + 1):
        held = fold == k
        fit, aim = x[~held], change[:, ~held]
        centre, middle = fit.mean(0), aim.mean(1, keepdim=True)
        fit = fit - centre
        spread = fit.square().sum(0)
        # A channel that hardly varies learns no slope from its rounding errors.
        lifted = spread + 1e-9 * spread.mean() + 1e-300
        slope = ((aim - middle) * fit).sum(1, keepdim=True) / lifted
        left = change[:, held] - middle - slope * (x[held] - centre)
        total += left.square().sum(1)
    return (total / len(x))[None]


def _affine(
    features: Float[Tensor, "rows features"],
    change: Float[Tensor, "spans rows channels"],
    fold: Int[Tensor, " rows"],
) -> Float[Tensor, "choices spans channels"]:
    """Predict the change of all channels from features, by each ridge and by the mean alone."""
    spans, rows, channels = change.shape
    aim = change.transpose(0, 1).reshape(rows, -1)
    total = aim.new_zeros(1 + len(RIDGES), spans * channels)
    for k in range(int(fold.max()) + 1):
        held = fold == k
        centre, middle = features[~held].mean(0), aim[~held].mean(0)
        left = aim[held] - middle
        total[0] += left.square().sum(0)
        fitted = ridge_regression(
            features[~held] - centre, aim[~held] - middle, features[held] - centre
        )
        for choice, predicted in enumerate(fitted, start=1):
            total[choice] += (left - predicted).square().sum(0)
    return (total / rows).view(-1, spans, channels)


def ridge_regression(
    fit: Float[Tensor, "rows features"],
    aim: Float[Tensor, "rows out"],
    held: Float[Tensor, "held features"],
) -> Iterator[Float[Tensor, "held out"]]:
    """Predict held-out rows by ridge regression, in whichever of its two forms is smaller.

    Args:
        fit: centred features to learn from.
        aim: centred targets.
        held: features to predict from, centred alike.

    Yields:
        the predictions for each of `RIDGES`.
    """
    rows, features = fit.shape
    if rows < features:
        gram, right, left = fit @ fit.T, aim, held @ fit.T
        ratio = rows / features  # the mean diagonal is over rows here, over features there
    else:
        gram, right, left, ratio = fit.new_zeros(features, features), fit.T @ aim, held, 1.0
        add_gram_(gram, fit)
    for ridge in RIDGES:
        factor = ridge_factor(gram, ridge * ratio)
        if len(left) < right.shape[1]:  # solve for the fewer columns
            yield torch.cholesky_solve(left.T, factor).T @ right
        else:
            yield left @ torch.cholesky_solve(right, factor)
