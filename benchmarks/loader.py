"""Source pictures per second and core that the loader makes ready for training at 224 px, against plain torchvision.

    python benchmarks/loader.py                      # ImageNet-sized JPEGs made here; --pictures FOLDER for your own
    python benchmarks/loader.py --gpu 1500           # and how many cores feed a GPU that trains on 1,500 pictures per second

Ours: one decoding, one crop per view in the loader, all else on the device; SimCLR has two views, CARE four. torchvision: ImageFolder
and SimCLR's usual transforms, two views per picture. One process, one thread, all ways in turn; medians.
"""

import json
import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path

import click
import datasets
import torch
import torchvision.transforms as T
from embedding import make_pictures
from PIL import features
from torchvision.datasets import ImageFolder

from care_hub.config import Plan, TrainConfig
from care_hub.data import sources
from care_hub.views import recipe_of, training_batches

SIZE, BATCH = 224, 32


def ours(root: Path, weight: float):
    config = TrainConfig(dataset_name="imagefolder", batch_size=BATCH, weight=weight, image_size=SIZE, crop_scale=0.08, epochs=1000)
    held, sources.HELD_BYTES = sources.HELD_BYTES, 0  # so that a small folder streams as a large one would
    images = sources.load("imagefolder", "train", str(root), size=SIZE, workers=0, progress=False)
    sources.HELD_BYTES = held
    return training_batches(config, Plan.of(config, len(images)), images, recipe_of(config, images), 0, 0, 1)


def plain(root: Path, crops_alone: bool = False):
    jitter = T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
    blur = T.RandomApply([T.GaussianBlur(23, (0.1, 2.0))], p=0.5)
    colour = [] if crops_alone else [jitter, T.RandomGrayscale(0.2), blur]
    last = [T.PILToTensor()] if crops_alone else [T.ToTensor(), T.Normalize((0.5,) * 3, (0.25,) * 3)]
    view = T.Compose([T.RandomResizedCrop(SIZE), T.RandomHorizontalFlip(), *colour, *last])
    data = ImageFolder(str(root), transform=lambda picture: (view(picture), view(picture)))
    while True:
        yield from torch.utils.data.DataLoader(data, batch_size=BATCH, shuffle=True, drop_last=True)


@click.command()
@click.option("--pictures", type=click.Path(exists=True, file_okay=False, path_type=Path), help="class folders")
@click.option("--count", default=256, show_default=True, help="pictures that are made, 500 x 375")
@click.option("--batches", default=6, show_default=True, help="of 32 that are timed at a time")
@click.option("--repeats", default=5, show_default=True)
@click.option("--gpu", type=float, help="source pictures per second on which a GPU trains")
def main(pictures, count, batches, repeats, gpu) -> None:
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as name:
        root = pictures or Path(name)
        if pictures is None:
            (root / "a class").mkdir()
            make_pictures(root / "a class", count, 375)
        ways = {"SimCLR (2 views)": ours(root, 0.0), "CARE (4 views)": ours(root, 1.0), "torchvision (2 views)": plain(root)}
        ways["torchvision, crops and flips alone"] = plain(root, crops_alone=True)
        speeds = {name: [] for name in ways}
        for k in range(repeats + 1):
            for name, loader in ways.items():
                began = time.perf_counter()
                list(islice(loader, batches))
                if k:
                    speeds[name].append(batches * BATCH / (time.perf_counter() - began))
    medians = {name: statistics.median(found) for name, found in speeds.items()}
    row = {"size": SIZE, "libjpeg_turbo": features.check("libjpeg_turbo"), "images_per_second_and_core": medians}
    row["of_torchvision"] = {name: v / medians["torchvision (2 views)"] for name, v in medians.items()}
    if gpu:
        row["cores_for_the_gpu"] = {name: gpu / v for name, v in medians.items()}
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
