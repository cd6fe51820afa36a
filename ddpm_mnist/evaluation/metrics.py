"""Distances between two sets of feature vectors, such as those of samples and of real images.

All functions take `[N, D]` float tensors, one row per image. Results are comparable only with the same feature
extractor and the same number of images.
"""

import numpy as np
import torch
from scipy.linalg import eigvals
from scipy.stats import binomtest
from torch import Tensor


def gaussian_of(features: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean `[D]` and covariance `[D, D]` of a set, float64."""
    features = features.double().numpy()
    return features.mean(0), np.cov(features, rowvar=False)


def frechet_distance(features: Tensor, reference: Tensor | tuple[np.ndarray, np.ndarray]) -> float:
    """Fréchet distance of Gaussians fitted to both sets (Heusel et al. 2017, eq. 6).

    |mu_1 - mu_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)). The reference may be given by its `gaussian_of`.
    """
    mean_1, cov_1 = gaussian_of(features)
    mean_2, cov_2 = reference if isinstance(reference, tuple) else gaussian_of(reference)
    root_trace = np.sqrt(eigvals(cov_1 @ cov_2).astype(complex)).real.sum()  # trace of (C_1 C_2)^(1/2)
    return float(((mean_1 - mean_2) ** 2).sum() + np.trace(cov_1) + np.trace(cov_2) - 2 * root_trace)


def jackknife(statistic, rows: Tensor, groups: int = 20, block: int = 1) -> tuple[float, float]:
    """A statistic of `[N, ...]` rows without the bias of a finite N, and half its 95% interval.

    Quenouille and Tukey's jackknife: the statistic of all rows but one group of them, for each group, tells how it
    moves with N, and how much it varies. The Fréchet distance of N samples is too large by about a constant over N,
    which at N = 500 is more than good models differ by.

    Args:
        statistic: maps some of the rows to a number.
        groups: how many; N / block at most.
        block: so many rows in turn stay together: where samples count through the classes, one of each. A group of one
            class alone would look like a difference between samples.
    """
    group = torch.arange(len(rows)) // block % groups
    groups = int(group.max()) + 1
    without = np.array([statistic(rows[group != g]) for g in range(groups)])
    value = groups * statistic(rows) - (groups - 1) * without.mean()
    return float(value), float(1.96 * np.sqrt((groups - 1) * without.var()))


def share_and_ci(hits: Tensor) -> tuple[float, float]:
    """The share of true values among `[N]` booleans, and the larger side of its 95% interval (Wilson 1927).

    The usual interval, from the standard deviation, would say that 20 hits of 20 leave no doubt.
    """
    share = hits.double().mean().item()
    interval = binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
    return share, max(share - interval.low, interval.high - share)


def bootstrap_ci(statistic, features: Tensor, seed: int = 0, resamples: int = 20) -> float:
    """Half the 95% interval of `statistic(features)`: 1.96 standard deviations over bootstrap resamples."""
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.randint(0, len(features), (len(features),), generator=generator) for _ in range(resamples))
    return float(1.96 * np.std([statistic(features[rows]) for rows in draws], ddof=1))


def mean_and_ci(values: Tensor) -> tuple[float, float]:
    """The mean of `[N]` values, and half its 95% interval."""
    values = values.double()
    return values.mean().item(), 1.96 * (values.std() / len(values) ** 0.5).item()


def precision_recall(features: Tensor, real: Tensor, k: int = 3) -> tuple[Tensor, Tensor]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, eq. 1 and 2): the means of the booleans returned.

    The ball of a point reaches to its k-th nearest neighbour in its own set.

    Returns:
        `[N]`, whether each sample lies in the ball of a real image; `[M]`, whether each real image lies in the ball of
        a sample.
    """
    distance = torch.cdist(features, real)
    precise = (distance <= kth_neighbour(real, k)[None, :]).any(dim=1)
    recalled = (distance <= kth_neighbour(features, k)[:, None]).any(dim=0)
    return precise, recalled


def density_coverage(features: Tensor, real: Tensor, k: int = 5) -> tuple[Tensor, Tensor]:
    """Density and coverage (Naeem et al. 2020, eq. 3 and 4), more robust to outliers: the means of what is returned.

    Returns:
        `[N]`, for each sample the number of real images' balls that it lies in, over k; `[M]`, for each real image
        whether a sample lies in its ball.
    """
    inside = torch.cdist(features, real) <= kth_neighbour(real, k)[None, :]
    return inside.sum(dim=1) / k, inside.any(dim=0)


def kth_neighbour(points: Tensor, k: int) -> Tensor:
    """Distance of each point to its k-th nearest neighbour, `[N]`."""
    return torch.cdist(points, points).kthvalue(k + 1, dim=1).values  # the first is the point itself


def nearest(points: Tensor, reference: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """The k nearest neighbours of each point in `reference`: distances and indices, `[N, k]` each."""
    parts = [torch.cdist(part, reference).topk(k, dim=1, largest=False) for part in points.split(500)]
    return torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts])
