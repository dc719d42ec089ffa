"""Milliseconds to augment a batch, and what of a step's augmentation is left to the CPU beside a GPU.

    python benchmarks/augmentation.py --batch 1024 --size 32

Parameters are sampled per image, and per each of 8 groups; medians. "sampling_ms": the CPU's part of a CARE
step with 16 groups. "tensors_sent": to the device, in such a step, and "operations", all that torch is asked
for; counted on the device "meta", which computes nothing, and where waiting for the device would be an error.
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


class Sent(TorchDispatchMode):
    """The bytes of each tensor that leaves the CPU meanwhile, and how many operations there are."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        answer = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, answer)) if isinstance(x, Tensor)]
        if any(x.device.type != "cpu" for x in tensors):
            self.bytes += [x.nbytes for x in tensors if x.device.type == "cpu"]
        return answer


def sent_by_a_step(config: TrainConfig, size: int) -> Sent:
    """By choosing a batch and making its views, to a device."""
    pixels = torch.zeros(4 * config.batch_size, 3, size, size, dtype=torch.uint8, device="meta")
    images, index = InMemoryImages(size, None, None, pixels), torch.arange(config.batch_size)
    with Sent() as sent:
        (batch,) = images.batches([index])
        make_views(batch, config, augment.AugmentationConfig(size), 0, 0, 1)
    return sent


def sampling_ms(batch: int, size: int, repeats: int) -> float:
    """Median time to sample the parameters of a CARE step."""
    config, times = augment.AugmentationConfig(size), []
    for step in range(repeats):
        began = time.perf_counter()
        augment.sample_two_views(config, batch, size, size, 0, step, "contrastive", batch)
        augment.sample_two_views(config, batch, size, size, 0, step, "equivariance", 16)
        times.append(1000 * (time.perf_counter() - began))
    return round(statistics.median(times), 2)


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
    sent = sent_by_a_step(TrainConfig(batch_size=batch, equiv_splits=16, weight_start_epochs=0), size)
    times = {
        "per_image_ms": augmentation_ms(images, batch, repeats),
        "per_group_ms": augmentation_ms(images, 8, repeats),
        "sampling_ms": sampling_ms(batch, size, repeats),
        "tensors_sent": len(sent.bytes),
        "kib_sent": round(sum(sent.bytes) / 1024),
        "operations": sent.operations,
    }
    print(json.dumps(about | times))


if __name__ == "__main__":
    main()
