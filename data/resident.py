"""Small data sets in the memory of the device that trains: no loader processes, and no copies of images.

Shapes: N images of C channels (1 or 3) and S x S pixels in the data set, B in a batch; P pixels of padding.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from data.augmentation.draws import Drawer
from data.host_part import HostBatch
from data.in_memory import ArrayImages


class Resident(Dataset):
    """A split whose images are on a device. Its batches hold the places of images, which `take` turns into images.

    Single images are as the split serves them.
    """

    def __init__(self, dataset: ArrayImages, device: torch.device, padding: int, drawer: Drawer | None) -> None:
        """`padding`: the most pixels by which an image is shifted; black follows it."""
        self.dataset, self.drawer, self.padding = dataset, drawer, padding
        images = torch.from_numpy(dataset.images)
        images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
        self._size = images.shape[-1]
        self._images = F.pad(images, [padding] * 4).contiguous().to(device)
        self._labels = torch.from_numpy(dataset.labels.astype(np.int64))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.dataset[index]

    def __getitems__(self, indices: list[int]) -> HostBatch:
        """In place of images: each one's index, and top and left of its window, int64 [B, 3]."""
        count, which = len(indices), torch.tensor(indices)
        shifts = np.random.randint(2 * self.padding + 1, size=(count, 2)) if self.padding else np.zeros((count, 2), int)
        draws = None if self.drawer is None else self.drawer(count)
        places = torch.cat((which[:, None], torch.from_numpy(shifts)), 1)
        return HostBatch(places, self._labels[which], (), draws)

    def take(self, places: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] on the device, for places on the device; grey images have their channel three times."""
        side = torch.arange(self._size, device=places.device)
        which, top, left = (column.view(-1, 1, 1, 1) for column in places.unbind(1))
        channels = torch.arange(self._images.shape[1], device=places.device).view(1, -1, 1, 1)
        images = self._images[which, channels, top + side.view(-1, 1), left + side]
        return images.expand(-1, 3, -1, -1)
