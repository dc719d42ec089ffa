"""Pictures per second of `encode` and of `care-hub embed`'s stream against a bare timm loop over the same files, in turn; medians.

    python benchmarks/embedding.py                                                     # resnet18, 224 px, photo-sized JPEGs
    python benchmarks/embedding.py --model resnet10_w16_small --size 32 --side 32 --count 4000

The bare loop: timm's transform and dataset, a DataLoader with one worker per core, `model(x)` in float32. "tensors" is the same
without files: encode on a tensor in memory against `model` on its batches.
"""

import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import click
import numpy as np
import timm
import torch
from PIL import Image

from care_hub import models  # noqa: F401 - registers our architectures
from care_hub.encoder import Encoder


def make_pictures(folder: Path, count: int, side: int) -> None:
    """JPEGs of `side` x 4/3 `side` pixels with the spectrum of photos, roughly."""
    draw = np.random.RandomState(0)
    for k in range(min(count, 64)):
        layers = [draw.randint(0, 256, (max(2, side // f), max(2, side * 4 // 3 // f), 3)).astype(np.uint8) for f in (32, 8, 2)]
        sized = [np.asarray(Image.fromarray(a).resize((side * 4 // 3, side), Image.Resampling.BICUBIC), dtype=np.float32) for a in layers]
        picture = (0.6 * sized[0] + 0.3 * sized[1] + 0.1 * sized[2]).astype(np.uint8)
        Image.fromarray(picture).save(folder / f"{k:06d}.jpg", quality=90)
    for k in range(64, count):
        os.link(folder / f"{k % 64:06d}.jpg", folder / f"{k:06d}.jpg")


def bare_loop(backbone, folder: Path, size: int, batch: int) -> int:
    transform = timm.data.create_transform((3, size, size), is_training=False, crop_pct=1.0, mean=(0.5,) * 3, std=(0.25,) * 3)
    data = timm.data.ImageDataset(str(folder), transform=transform)
    loader = torch.utils.data.DataLoader(data, batch_size=batch, num_workers=os.cpu_count())
    device, done = next(backbone.parameters()).device, 0
    with torch.no_grad():
        for x, _ in loader:
            done += len(backbone(x.to(device, non_blocking=True)).cpu())
    return done


@torch.no_grad()
def bare_tensors(backbone, pictures: torch.Tensor, batch: int) -> int:
    device, done = next(backbone.parameters()).device, 0
    for x in pictures.split(batch):
        x = (x.to(device).float() / 255 - 0.5) / 0.25
        done += len(backbone(x.contiguous(memory_format=torch.channels_last)).cpu())
    return done


@click.command()
@click.option("--model", default="resnet18", show_default=True)
@click.option("--size", default=224, show_default=True, help="pixels the network sees")
@click.option("--side", default=375, show_default=True, help="short side of the files")
@click.option("--count", default=512, show_default=True)
@click.option("--batch", default=64, show_default=True)
@click.option("--repeats", default=3, show_default=True)
def main(model, size, side, count, batch, repeats) -> None:
    torch.manual_seed(0)
    encoder = Encoder.new(model, size).eval().to("cuda" if torch.cuda.is_available() else "cpu")
    pictures = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "a class"
        folder.mkdir()
        make_pictures(folder, count, side)
        ways = {
            "bare timm loop, files": lambda: bare_loop(encoder.backbone, folder.parent, size, batch),
            "encode, files": lambda: len(encoder.encode(folder, batch, "backbone")),
            "stream, files": lambda: sum(map(len, encoder.stream(str(folder), batch, "backbone"))),
            "bare timm loop, tensors": lambda: bare_tensors(encoder.backbone, pictures, batch),
            "encode, tensors": lambda: len(encoder.encode(pictures, batch, "backbone")),
        }
        speeds = {name: [] for name in ways}
        for k in range(repeats + 1):
            for name, way in ways.items():
                began = time.perf_counter()
                done = way()
                if k:
                    speeds[name].append(done / (time.perf_counter() - began))
    row = {"model": model, "size": size, "side": side, "count": count, "threads": torch.get_num_threads(), "device": str(encoder.device)}
    row |= {name: round(statistics.median(found), 1) for name, found in speeds.items()}
    for kind in ("files", "tensors"):
        pairs = zip(speeds[f"encode, {kind}"], speeds[f"bare timm loop, {kind}"], strict=True)
        row[f"ratio, {kind}"] = round(statistics.median(a / b for a, b in pairs), 3)
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
