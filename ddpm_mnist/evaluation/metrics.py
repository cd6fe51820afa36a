"""How near are samples to real images? Distances between two sets of feature vectors, each row one image.

All take `[N, D]` float tensors. What they are features of, the caller knows: a figure means nothing without its
extractor and its number of images.
"""

import numpy as np
import torch
from scipy.linalg import eigvals
from torch import Tensor


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """|mu_1 - mu_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)) of Gaussians fitted to both (Heusel et al. 2017, eq. 6)."""
    (mean_1, cov_1), (mean_2, cov_2) = (
        (x.double().mean(0).numpy(), np.cov(x.double().numpy(), rowvar=False)) for x in (features, reference)
    )
    root_trace = np.sqrt(eigvals(cov_1 @ cov_2).astype(complex)).real.sum()  # of (C_1 C_2)^(1/2), by its eigenvalues
    return float(((mean_1 - mean_2) ** 2).sum() + np.trace(cov_1) + np.trace(cov_2) - 2 * root_trace)


def bootstrap_ci(statistic, features: Tensor, seed: int = 0, resamples: int = 20) -> float:
    """Half the 95% interval of `statistic(features)`: 1.96 standard deviations over sets drawn with replacement."""
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.randint(0, len(features), (len(features),), generator=generator) for _ in range(resamples))
    return float(1.96 * np.std([statistic(features[rows]) for rows in draws], ddof=1))


def mean_and_ci(values: Tensor) -> tuple[float, float]:
    """Mean, and half its 95% interval."""
    values = values.double()
    return values.mean().item(), 1.96 * (values.std() / len(values) ** 0.5).item()


def precision_recall(features: Tensor, real: Tensor, k: int = 3) -> tuple[Tensor, Tensor]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, eq. 1 and 2); means of the booleans returned.

    A sample is precise if it lies in the ball of some real image, out to that one's k-th neighbour among the real; a
    real image is recalled if it lies in the ball of some sample. `[N]` of samples, `[M]` of real images.
    """
    distance = torch.cdist(features, real)
    precise = (distance <= kth_neighbour(real, k)[None, :]).any(dim=1)
    recalled = (distance <= kth_neighbour(features, k)[:, None]).any(dim=0)
    return precise, recalled


def density_coverage(features: Tensor, real: Tensor, k: int = 5) -> tuple[Tensor, Tensor]:
    """Density and coverage (Naeem et al. 2020, eq. 3 and 4), less easily led by outliers; means of what is returned.

    For each sample how many of the real images' balls it lies in, over k; for each real image whether a sample lies in
    its ball. `[N]` of samples, `[M]` of real images.
    """
    inside = torch.cdist(features, real) <= kth_neighbour(real, k)[None, :]
    return inside.sum(dim=1) / k, inside.any(dim=0)


def kth_neighbour(points: Tensor, k: int) -> Tensor:
    """Distance of each point to its k-th nearest among the others, `[N]`."""
    return torch.cdist(points, points).kthvalue(k + 1, dim=1).values  # the nearest is the point itself


def nearest(points: Tensor, reference: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """Distances to the k nearest of `reference`, and which they are: `[N, k]` each."""
    parts = [torch.cdist(part, reference).topk(k, dim=1, largest=False) for part in points.split(500)]
    return torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts])
