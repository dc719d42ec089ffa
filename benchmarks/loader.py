"""Source images per second and core that the loader prepares for training at 224 px, against torchvision.

    python benchmarks/loader.py               # JPEGs of ImageNet's size made here; --images FOLDER for yours
    python benchmarks/loader.py --gpu 1500    # how many cores feed a GPU that trains on 1,500 images/s

Ours: one decoding, one crop per view in the loader, all else on the device; SimCLR has two views, CARE four.
torchvision: ImageFolder and SimCLR's usual transforms, two views per image. One process, one thread, all in
turn; medians.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import click
import datasets
import torch
import torchvision.transforms as T
from photos import make_photos
from PIL import Image, features
from torchvision.datasets import ImageFolder

from care_hub.config import TrainConfig
from care_hub.data import sources
from care_hub.schedule import Plan
from care_hub.training.batches import training_augmentation, training_batches

SIZE, BATCH = 224, 32


def our_loader(root: Path, weight: float) -> Iterator[Any]:
    """What `make_views` takes, batch by batch."""
    config = TrainConfig(
        dataset_name="imagefolder",
        data_root=str(root),
        num_workers=0,
        batch_size=BATCH,
        weight=weight,
        image_size=SIZE,
        crop_scale=0.08,
        epochs=1000,
    )
    images = sources.load_split(config, "train", SIZE, progress=False)
    plan = Plan.of(config, len(images))
    return training_batches(config, plan, images, training_augmentation(config), start=0, rank=0, processes=1)


class TwoViews:
    """SimCLR's transforms of an image, twice; or the crops and flips of them alone."""

    def __init__(self, crops_alone: bool):
        jitter = T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
        blur = T.RandomApply([T.GaussianBlur(23, (0.1, 2.0))], p=0.5)
        normalize = T.Normalize((0.5,) * 3, (0.25,) * 3)
        color = [jitter, T.RandomGrayscale(0.2), blur, T.ToTensor(), normalize]
        rest = [T.PILToTensor()] if crops_alone else color
        self.view = T.Compose([T.RandomResizedCrop(SIZE), T.RandomHorizontalFlip(), *rest])

    def __call__(self, image: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
        return self.view(image), self.view(image)


def torchvision_loader(root: Path, crops_alone: bool = False) -> Iterator[Any]:
    """Batches without end."""
    data = ImageFolder(str(root), transform=TwoViews(crops_alone))
    while True:
        yield from torch.utils.data.DataLoader(data, batch_size=BATCH, shuffle=True, drop_last=True)


def measure(root: Path, batches: int, repeats: int) -> dict[str, float]:
    """Median images per second of every way."""
    ways = {
        "SimCLR (2 views)": our_loader(root, weight=0.0),
        "CARE (4 views)": our_loader(root, weight=1.0),
        "torchvision (2 views)": torchvision_loader(root),
        "torchvision, crops and flips alone": torchvision_loader(root, crops_alone=True),
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for k in range(repeats + 1):
        for name, loader in ways.items():
            began = time.perf_counter()
            for _ in islice(loader, batches):
                pass
            if k > 0:
                speeds[name].append(batches * BATCH / (time.perf_counter() - began))
    return {name: statistics.median(values) for name, values in speeds.items()}


@click.command()
@click.option(
    "--images", type=click.Path(exists=True, file_okay=False, path_type=Path), help="class folders of yours"
)
@click.option("--count", default=256, show_default=True, help="images made here, 500 x 375")
@click.option("--batches", default=6, show_default=True, help="of 32 that are timed at a time")
@click.option("--repeats", default=5, show_default=True)
@click.option("--gpu", type=float, help="source images per second on which a GPU trains")
def main(images: Path | None, count: int, batches: int, repeats: int, gpu: float | None) -> None:
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    sources.IN_MEMORY_BYTES = 0  # so that a small folder is streamed as a large one is
    with tempfile.TemporaryDirectory() as name:
        root = images or Path(name)
        if images is None:
            (root / "a class").mkdir()
            make_photos(root / "a class", count, 375)
        speeds = measure(root, batches, repeats)
    row: dict[str, Any] = {"size": SIZE, "libjpeg_turbo": features.check("libjpeg_turbo")}
    row["images_per_second_and_core"] = speeds
    plain = speeds["torchvision (2 views)"]
    row["of_torchvision"] = {name: speed / plain for name, speed in speeds.items()}
    if gpu:
        row["cores_for_the_gpu"] = {name: gpu / speed for name, speed in speeds.items()}
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
