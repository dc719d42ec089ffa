"""Milliseconds to augment a batch, parameters sampled per image and per each of 8 groups; median of many.

python benchmarks/augmentation.py --batch 256 --size 32
"""

import json
import statistics
import time

import click
import torch

from care_hub import augment


def augmentation_ms(images: torch.Tensor, draws: int, repeats: int) -> float:
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
    }
    print(json.dumps(about | times))


if __name__ == "__main__":
    main()
