"""CPU seconds of the measures of `care-hub equivariance`, by part, on the embedded shapes.

    OMP_NUM_THREADS=1 python benchmarks/equivariance.py
    OMP_NUM_THREADS=1 PYTHONPATH=../other python benchmarks/equivariance.py  # another checkout, the same way

Time of this process on its processor, so that others on a busy machine hardly count. "rest" are the metrics
and their bootstrap. Parts that a checkout does not have yet are left out.
"""

import json
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import click
import torch

from care_hub import augment
from care_hub.config import DataConfig
from care_hub.data.sources import load_splits
from care_hub.encoder import Encoder
from care_hub.evaluate import commands, equivariance
from care_hub.evaluate.features import random_subset
from care_hub.factory import load_encoder

PARTS = {
    "forward passes": [(Encoder, "embed")],
    "augmentation": [(augment, "apply"), (augment, "rotate")],
    "fits": [(equivariance, name) for name in ("procrustes", "least_squares", "fit_mlp", "predict_numbers")],
}


def timed(function: Callable[..., Any], part: str, seconds: dict[str, float]) -> Callable[..., Any]:
    """`function`, which adds the time that it takes to that of its part."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        began = time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[part] += time.process_time() - began

    return wrapped


@click.command()
@click.option("--encoder", default="resnet10_w16_small.care_shapes", show_default=True)
@click.option("--images", default=2000, show_default=True)
@click.option("--draws", default=16, show_default=True)
@click.option("--save", type=click.Path(), help="a file for the figures, to compare those of two checkouts")
def main(encoder: str, images: int, draws: int, save: str | None) -> None:
    model = load_encoder(encoder).eval()
    _, test = load_splits(DataConfig("shapes"), model.config.image_size, False)
    pixels = test.take(random_subset(len(test), images)).pixels
    seconds: dict[str, float] = defaultdict(float)
    for part, functions in PARTS.items():
        for owner, name in functions:
            if hasattr(owner, name):
                setattr(owner, name, timed(getattr(owner, name), part, seconds))
    config = commands.recorded_augmentation(model.config)
    began = time.process_time()
    found = equivariance.measure_equivariance(model, pixels, config, draws)
    total = time.process_time() - began
    seconds["rest"] = total - sum(seconds.values())
    if save:
        with open(save, "w") as file:
            json.dump(found, file)
    seconds["total"] = total
    row = {"images": len(pixels), "draws": draws, "threads": torch.get_num_threads()}
    print(json.dumps(row | {name: round(value, 1) for name, value in seconds.items()}))


if __name__ == "__main__":
    main()
