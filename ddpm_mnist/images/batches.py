"""Decoded images to batches of x_0 in [-1, 1].

The images of global batch n are a function of the seed and n alone: batches are cut from an endless sequence of epochs,
each a fresh permutation, and every process takes its share. No epoch has a last, smaller batch: it is filled from the
next epoch.
"""

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from torch import Tensor

from ..randomness import seeded_generator


@dataclass
class Images:
    """`images`: `[N, C, H, W]` uint8; `labels`: `[N]` int64, or None."""

    images: Tensor
    labels: Tensor | None
    device: torch.device = torch.device("cpu")

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device) -> "Images":
        """Make batches on `device`. The whole set moves there if it takes less than half of a GPU's free memory, or, on
        other devices, less than 1 GB."""
        self.device = device
        room = torch.cuda.mem_get_info(device)[0] / 2 if device.type == "cuda" else 2**30
        if self.images.nbytes < room:
            self.images = self.images.to(device)
            self.labels = None if self.labels is None else self.labels.to(device)
        return self

    def batches(self, index_batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor | None]]:
        """x_0 `[B, C, H, W]` float32 in [-1, 1], and labels `[B]` or None, for each tensor of indices `[B]`."""
        for indices in index_batches:
            if self.images.is_cuda:  # from pinned memory, so that the host need not wait for the GPU
                indices = indices.pin_memory().to(self.images.device, non_blocking=True)
            labels = None if self.labels is None else self.labels[indices].to(self.device)
            yield scale(self.images[indices].to(self.device)), labels


def scale(pixels: Tensor) -> Tensor:
    """uint8 0 ... 255 -> float32 -1 ... 1, the range in which x_T ~ N(0, I) has about the scale of the data."""
    return pixels.float() / 127.5 - 1


def memory_mapped(rows: datasets.Dataset, shape: tuple[int, ...]) -> Tensor:
    """`[N, *shape]` uint8 from N rows of bytes; in a temporary file, since a set may be larger than the memory."""
    folder = next((Path(file["filename"]).parent for file in rows.cache_files), None)
    with tempfile.TemporaryFile(dir=folder) as file:
        for batch in rows.select_columns("pixels").iter(1000):
            file.write(b"".join(batch["pixels"]))
        file.flush()
        return torch.from_numpy(np.memmap(file, np.uint8, mode="c", shape=(len(rows), *shape)))


def index_batches(
    num_images: int, seed: int, first: int, batch_size: int, accumulation=1, rank=0, num_processes=1
) -> Iterator[Tensor]:
    """This process's indices `[batch_size]`, micro-batch after micro-batch, from global batch number `first` on."""
    permutations: dict[int, Tensor] = {}
    position = first * batch_size * accumulation * num_processes
    while True:
        for micro_step in range(accumulation):
            start = position + (micro_step * num_processes + rank) * batch_size
            positions = torch.arange(start, start + batch_size)
            indices = torch.empty_like(positions)
            for epoch in (positions // num_images).unique().tolist():
                if epoch not in permutations:
                    permutations = {e: p for e, p in permutations.items() if e == epoch - 1}  # forget the past
                    generator = seeded_generator(seed, "epoch", epoch)
                    permutations[epoch] = torch.randperm(num_images, generator=generator)
                here = positions // num_images == epoch
                indices[here] = permutations[epoch][positions[here] - epoch * num_images]
            yield indices
        position += batch_size * accumulation * num_processes
