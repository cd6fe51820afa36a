"""Statistics of feature vectors, `[N, D]` float, one for each image, and their 95% intervals.

Compare results only for the same features and the same number of images.
"""

from collections.abc import Callable

import numpy as np
import torch
from scipy.linalg import eigvals
from scipy.stats import binomtest
from torch import Tensor


def gaussian_of(features: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean `[D]` and covariance `[D, D]` of a set, float64."""
    features = features.double().numpy()
    return features.mean(0), np.cov(features, rowvar=False)


def frechet_distance(features: Tensor, reference: tuple[np.ndarray, np.ndarray]) -> float:
    """|mu_1 - mu_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)) (Heusel et al. 2017, eq. 6). Reference: see `gaussian_of`."""
    (mean_1, cov_1), (mean_2, cov_2) = gaussian_of(features), reference
    root_trace = np.sqrt(eigvals(cov_1 @ cov_2).astype(complex)).real.sum()  # trace of (C_1 C_2)^(1/2)
    return float(((mean_1 - mean_2) ** 2).sum() + np.trace(cov_1) + np.trace(cov_2) - 2 * root_trace)


def in_balls(points: Tensor, centers: Tensor, k: int = 3) -> Tensor:
    """Whether each point lies in a ball: around a center, out to its k-th nearest other center; `[N]`.

    The share of samples in the balls of real images is their precision, and the share of real images in the balls of
    samples their recall (Kynkäänniemi et al. 2019, eq. 1 and 2).
    """
    # the first of the k + 1 nearest is the center itself
    radii = in_blocks(lambda block: torch.cdist(block, centers).kthvalue(k + 1, dim=1).values, centers)
    return in_blocks(lambda block: (torch.cdist(block, centers) <= radii).any(dim=1), points)


def in_blocks(function: Callable, rows: Tensor) -> Tensor:
    """`function` of some rows at a time: all distances at once would take memory that grows with the square."""
    return torch.cat([function(block) for block in rows.split(500)])


def nearest(images: Tensor, reference: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """Distances (of pixels in [0, 1]) and indices, `[N, k]`, of the k nearest in `reference`; `[N, C, H, W]` uint8."""
    if len(images) > 500:
        return tuple(map(torch.cat, zip(*(nearest(block, reference, k) for block in images.split(500)))))
    images = images.flatten(1).float() / 255
    values, indices = torch.empty(len(images), 0), torch.empty(len(images), 0, dtype=torch.int64)
    for start, part in zip(range(0, len(reference), 2000), reference.split(2000)):  # all as float may fill memory
        distances = torch.cdist(images, part.flatten(1).float() / 255)
        numbers = torch.arange(start, start + len(part)).expand_as(distances)
        values, indices = torch.cat([values, distances], 1), torch.cat([indices, numbers], 1)
        values, places = values.topk(min(k, values.shape[1]), largest=False)
        indices = indices.gather(1, places)
    return values, indices


# ---- each returns a value and half its 95% interval ------------------------------------------------------------------


def share_and_ci(hits: Tensor) -> tuple[float, float]:
    """The share of true values among `[N]` booleans, and the larger side of its interval (Wilson 1927).

    The usual interval, from the standard deviation, would say that 20 hits of 20 leave no doubt.
    """
    share = hits.double().mean().item()
    interval = binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
    return share, max(share - interval.low, interval.high - share)


def jackknife(statistic: Callable, rows: Tensor, groups: int = 20, block: int = 1) -> tuple[float, float]:
    """A statistic of `[N, ...]` rows without the bias of a finite N (Quenouille and Tukey's jackknife).

    Leaving out one group of rows at a time shows how the statistic changes with N, and how much it varies. The Fréchet
    distance of N samples is too large by about a constant over N, which at N = 500 is more than the difference
    between good models. Each `block` consecutive rows stay in one group: for samples of all classes in turn, give the
    number of classes, since groups of a single class would inflate the interval.
    """
    if len(rows) < 4 * block:  # too few for two groups of two blocks each
        block = 1
    groups = min(groups, len(rows) // (1 if block == 1 else 2 * block))
    group = torch.arange(len(rows)) // block % groups
    without = np.array([statistic(rows[group != g]) for g in range(groups)])
    value = groups * statistic(rows) - (groups - 1) * without.mean()
    return float(value), float(1.96 * np.sqrt((groups - 1) * without.var()))
