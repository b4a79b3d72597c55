"""A feed serves what its loader serves, finished on the device, and tells for how long the GPU waited."""

from __future__ import annotations

import time

import pytest
import torch
from torch.utils.data import DataLoader

from data.feed import Feed


def loader(count: int = 6) -> DataLoader:
    return DataLoader([(torch.full((3, 2, 2), float(i)), i) for i in range(count)], batch_size=2)


def test_a_feed_serves_the_batches_on_the_device(device):
    feed = Feed(loader(), device, lambda images: images * 2)
    assert len(feed) == 3 and feed.dataset is feed.loader.dataset and Feed.of(feed, device) is feed
    served = list(feed)
    assert torch.cat([labels for _, labels in served]).tolist() == [0, 1, 2, 3, 4, 5]
    assert [images.amax().item() for images, _ in served] == [2, 6, 10]
    assert all(images.device.type == labels.device.type == device.type for images, labels in served)


def test_without_a_gpu_nothing_is_measured():
    feed = Feed.of(loader(), torch.device("cpu"))
    assert len(list(feed)) == 3 and feed.take_waited() == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="measures by the GPU's clock")
def test_waiting_for_a_slow_loader_is_measured(device):
    class Slow(list):
        def __getitem__(self, index):
            time.sleep(0.02)
            return super().__getitem__(index)

    slow = Slow((torch.zeros(3, 2, 2), i) for i in range(10))
    feed = Feed(DataLoader(slow, batch_size=1), device)
    for _ in feed:
        pass
    torch.cuda.synchronize()
    assert 0.15 < feed.take_waited() < 1 and feed.take_waited() == 0
    quick = Feed(loader(20), device)
    for _ in quick:
        torch.cuda._sleep(20_000_000)  # a step of ten milliseconds, in whose shadow the next batch comes
    torch.cuda.synchronize()
    assert quick.take_waited() < 0.02
