"""Seconds of an exact search: of `nearest` over a file that was read before, and of the whole command.

    python benchmarks/search_speed.py                      # a million embeddings of 128 numbers
    python benchmarks/search_speed.py --count 100000

The file is written as `care-hub embed` writes it. The command starts Python, loads the encoder and embeds the
query besides. Medians of three.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image

from care_hub.embed_folder import PART, write_named_embeddings
from care_hub.factory import load_encoder
from care_hub.steering.search import nearest

ENCODER = "resnet10_w16_small.care_cifar10_color"
REPEATS = 3


def rows(count: int, d: int) -> Iterator[tuple[list[str], np.ndarray]]:
    """Random unit vectors, with names."""
    random = np.random.RandomState(0)
    for start in range(0, count, PART):
        names = [f"{k:09d}.jpg" for k in range(start, min(start + PART, count))]
        z = random.standard_normal((len(names), d)).astype(np.float32)
        yield names, z / np.linalg.norm(z, axis=1, keepdims=True)


def median_seconds(work: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return round(statistics.median(times), 2)


@click.command()
@click.option("--count", default=1_000_000, show_default=True)
@click.option("--encoder", default=ENCODER, show_default=True)
def main(count: int, encoder: str) -> None:
    loaded = load_encoder(encoder)
    query = Image.radial_gradient("L").convert("RGB")
    (z,) = loaded.encode(query)
    with tempfile.TemporaryDirectory() as name:
        file, image = Path(name) / "z.parquet", Path(name) / "query.png"
        query.save(image)
        about = {"encoder": loaded.fingerprint, "space": "projection", "encoder_name": encoder}
        write_named_embeddings(file, len(z), rows(count, len(z)), about)
        command = [sys.executable, "-m", "care_hub", "search", str(file), "--query", str(image)]
        nearest([file], z, 10)  # so that the file is in memory
        row = {
            "count": count,
            "dim": len(z),
            "threads": torch.get_num_threads(),
            "search_seconds": median_seconds(lambda: nearest([file], z, 10)),
            "command_seconds": median_seconds(
                lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            ),
        }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
