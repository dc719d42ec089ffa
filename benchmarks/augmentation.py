"""Milliseconds to augment a batch, and what of a step's augmentation is left to the CPU beside a GPU.

    python benchmarks/augmentation.py --batch 1024 --size 32

Parameters are sampled per image, and per each of 8 groups. "host": a CARE step with 16 groups whose images
are on the device "meta", which computes nothing: milliseconds of what the CPU computes itself (not of what
it launches), and the tensors that it sends. Waiting for the device would be an error there. Medians.
"""

import json
import statistics
import time
from typing import Any

import click
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from care_hub import augment
from care_hub.config import TrainConfig
from care_hub.data.images import InMemoryImages
from care_hub.training.batches import make_views


class HostWork(TorchDispatchMode):
    """Of the operations in it: seconds of those on the CPU alone, bytes of each tensor that leaves it."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds, self.sent = 0.0, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        began = time.perf_counter()
        answer = func(*args, **(kwargs or {}))
        spent = time.perf_counter() - began
        tensors = [x for x in tree_leaves((args, kwargs, answer)) if isinstance(x, Tensor)]
        on_cpu = [x for x in tensors if x.device.type == "cpu"]
        if len(on_cpu) == len(tensors):
            self.seconds += spent
        else:
            self.sent += [x.nbytes for x in on_cpu]
        return answer


def host_work(config: TrainConfig, size: int, step: int) -> HostWork:
    """Of choosing a batch and making its views, on the device "meta"."""
    pixels = torch.zeros(4 * config.batch_size, 3, size, size, dtype=torch.uint8, device="meta")
    images, index = InMemoryImages(size, None, None, pixels), torch.arange(config.batch_size)
    with HostWork() as work:
        (batch,) = images.batches([index])
        make_views(batch, config, augment.AugmentationConfig(size), step, 0, 1)
    return work


def host_row(batch: int, size: int, repeats: int) -> dict[str, float]:
    config = TrainConfig(batch_size=batch, equiv_splits=16, weight=0.3, weight_start_epochs=0)
    works = [host_work(config, size, step) for step in range(repeats)]
    return {
        "ms": round(statistics.median(1000 * work.seconds for work in works), 2),
        "tensors_sent": max(len(work.sent) for work in works),
        "kib_sent": round(statistics.median(sum(work.sent) for work in works) / 1024),
    }


def augmentation_ms(images: Tensor, draws: int, repeats: int) -> float:
    """Median time for a view of `images`, each of `draws` random augmentations serving equally many."""
    batch, _, height, width = images.shape
    config, times = augment.AugmentationConfig(size=height), []
    for step in range(repeats):
        began = time.perf_counter()
        params = augment.sample(config, draws, height, width, augment.seeded_generator(0, step))
        augment.apply(images, params.repeat(batch // draws), config)
        if images.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - began))
    return round(statistics.median(times), 2)


@click.command()
@click.option("--batch", default=256, show_default=True)
@click.option("--size", default=32, show_default=True, help="pixels")
@click.option("--repeats", default=40, show_default=True)
def main(batch: int, size: int, repeats: int) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=device)
    # As after any step of a network: glibc keeps freed blocks once it has freed a large one.
    torch.ones(7 << 20)
    about = {"device": str(device), "threads": torch.get_num_threads(), "batch": batch, "size": size}
    times = {
        "per_image_ms": augmentation_ms(images, batch, repeats),
        "per_group_ms": augmentation_ms(images, 8, repeats),
        "host": host_row(batch, size, repeats),
    }
    print(json.dumps(about | times))


if __name__ == "__main__":
    main()
