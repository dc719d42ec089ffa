"""Images per second of `encode` and of `care-hub embed`'s stream against a bare timm loop, on the same files.

    python benchmarks/embedding.py                      # resnet18, 224 px, JPEGs as large as photos
    python benchmarks/embedding.py --model resnet10_w16_small --size 32 --side 32 --count 4000

The bare loop: timm's transform and dataset, a DataLoader with one worker per core, `model(x)` in float32.
"tensors" is the same without files: encode on a tensor in memory against `model` on its batches. All in turn;
medians.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import timm
import torch
from photos import make_photos
from torch import Tensor, nn

from care_hub.encoder import Encoder


@torch.no_grad()
def bare_loop(backbone: nn.Module, folder: Path, size: int, batch: int) -> int:
    """Embed the class folders in `folder`; returns the number of images."""
    transform = timm.data.create_transform(
        (3, size, size), is_training=False, crop_pct=1.0, mean=(0.5,) * 3, std=(0.25,) * 3
    )
    data = timm.data.ImageDataset(str(folder), transform=transform)
    loader = torch.utils.data.DataLoader(data, batch_size=batch, num_workers=os.cpu_count() or 1)
    device = next(backbone.parameters()).device
    return sum(len(backbone(x.to(device, non_blocking=True)).cpu()) for x, _ in loader)


@torch.no_grad()
def bare_tensors(backbone: nn.Module, images: Tensor, batch: int) -> int:
    """Embed (N, 3, S, S) uint8 `images`; returns the number of images."""
    device, done = next(backbone.parameters()).device, 0
    for x in images.split(batch):
        x = (x.to(device).float() / 255 - 0.5) / 0.25
        done += len(backbone(x.contiguous(memory_format=torch.channels_last)).cpu())
    return done


def speeds_in_turn(ways: dict[str, Callable[[], int]], repeats: int) -> dict[str, list[float]]:
    """Images per second of each of `ways`, `repeats` times after one that does not count."""
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for k in range(repeats + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            done = way()
            if k > 0:
                speeds[name].append(done / (time.perf_counter() - began))
    return speeds


@click.command()
@click.option("--model", default="resnet18", show_default=True)
@click.option("--size", default=224, show_default=True, help="pixels that the network sees")
@click.option("--side", default=375, show_default=True, help="short side of the files")
@click.option("--count", default=512, show_default=True)
@click.option("--batch", default=64, show_default=True)
@click.option("--repeats", default=3, show_default=True)
def main(model: str, size: int, side: int, count: int, batch: int, repeats: int) -> None:
    torch.manual_seed(0)
    encoder = Encoder.new(model, size).eval().to("cuda" if torch.cuda.is_available() else "cpu")
    backbone = encoder.backbone
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "a class"
        folder.mkdir()
        make_photos(folder, count, side)
        ways = {
            "bare timm loop, files": lambda: bare_loop(backbone, folder.parent, size, batch),
            "encode, files": lambda: len(encoder.encode(folder, batch, "backbone")),
            "stream, files": lambda: sum(map(len, encoder.stream(folder, batch, "backbone"))),
            "bare timm loop, tensors": lambda: bare_tensors(backbone, images, batch),
            "encode, tensors": lambda: len(encoder.encode(images, batch, "backbone")),
        }
        speeds = speeds_in_turn(ways, repeats)
    row = {"model": model, "size": size, "side": side, "count": count}
    row |= {"threads": torch.get_num_threads(), "device": str(encoder.device)}
    row |= {name: round(statistics.median(values), 1) for name, values in speeds.items()}
    for kind in ("files", "tensors"):
        pairs = zip(speeds[f"encode, {kind}"], speeds[f"bare timm loop, {kind}"], strict=True)
        row[f"ratio, {kind}"] = round(statistics.median(ours / bare for ours, bare in pairs), 3)
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
