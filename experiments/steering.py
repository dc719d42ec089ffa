"""Ways to train a steering head, chosen between on a validation fifth of CIFAR-10's training images.

    nice python experiments/steering.py path/to/cifar10             # all; minutes for each arm and seed
    nice python experiments/steering.py path/to/cifar10 --only twin --only C --seed 3

Trains the recipe cifar10_small, but for the options of each arm, on four fifths of the training images;
kNN, linear probe and the same-image retrieval of colors are measured on the other fifth. An arm and seed
that is in the JSON is not repeated. Prints means over the seeds as a Markdown table. What was found is
recorded in results/tried/cifar10_steering.json (runs on a GPU without their probe, which was faulty then).
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import torch
import torch.nn.functional as F
from torch import Tensor

from care_hub import losses
from care_hub.augment import AugmentationConfig
from care_hub.config import EvalConfig, TrainConfig, read_yaml
from care_hub.data.images import Images
from care_hub.data.sources import load_splits
from care_hub.distributed import gather, inference_accelerator
from care_hub.encoder import Encoder
from care_hub.evaluate.equivariance import composed_cosines, measure_equivariance
from care_hub.evaluate.features import labeled
from care_hub.evaluate.linear import linear_probe, validation_split
from care_hub.files import write_text
from care_hub.training import trainer
from care_hub.training.methods import SimCLR

COLOR = (0.4, 0.4, 0.4, 0.5)
IMAGES = 4000  # half to fit rotations, half to measure them
MEASURES = ("same_image_hit_at_1", "same_image_mrr", "cosine", "cosine_unrotated", "motion")
COLUMNS = {
    "knn_top1": "kNN, %",
    "probe": "linear probe, %",
    "color same_image_hit_at_1": "colors, same image: H@1, %",
    "color same_image_mrr": "MRR",
    "color cosine": "cos(R f(x), f(ax))",
    "color cosine_unrotated": "cos(f(x), f(ax))",
    "color motion": "motion",
    "hue same_image_hit_at_1": "hue alone: H@1, %",
    "hue same_image_mrr": "MRR of hue",
    "color_composed": "cosine of two colors composed",
    "color_fitted": "of both fitted",
    "training_seconds": "seconds",
}


class OthersOnly(SimCLR):
    """The own other view is no negative: a head that ignores the augmentation is not pushed off it."""

    def forward(self, views: Tensor, group_views: Tensor | None = None) -> dict[str, Tensor]:
        uniformity = losses.uniformity
        with patch.object(losses, "uniformity", lambda a, b, t, own_view: uniformity(a, b, t)):
            return super().forward(views, group_views)


class Detached(SimCLR):
    """What the steering head learns does not reach the backbone."""

    def embed(self, views: Tensor, contrastive: bool = False) -> Sequence[Tensor]:
        if contrastive or self.encoder.projection is None:
            return super().embed(views, contrastive)
        z = self.encoder.projection(self.encoder.features(views).detach())
        return [gather(half) for half in F.normalize(z, dim=1).chunk(2)]


class Slowed(SimCLR):
    """A tenth of what the steering head learns reaches the backbone."""

    def embed(self, views: Tensor, contrastive: bool = False) -> Sequence[Tensor]:
        if contrastive or self.encoder.projection is None:
            return super().embed(views, contrastive)
        features = self.encoder.features(views)
        z = self.encoder.projection(features.detach().lerp(features, 0.1))
        return [gather(half) for half in F.normalize(z, dim=1).chunk(2)]


@dataclass(frozen=True)
class Arm:
    """Options beside those of the recipe, and the method if it isn't that of the package."""

    options: dict[str, Any] = field(default_factory=dict)
    method: type[SimCLR] = SimCLR
    shared: bool = False  # one pair of views, sampled per group, for all terms


VIEWS: dict[str, Any] = {
    "equivariance_jitter": COLOR,
    "equivariance_jitter_p": 1.0,
    "equivariance_crop": False,
    "equivariance_grayscale": 0.0,
    "equivariance_blur": 0.0,
    "equivariance_flip": 0.0,
}
FIRST = {  # of what was tried, before the recipe was what came of it
    "steering_head": False,
    "projection_hidden": 512,
    "equiv_splits": 4,
}
ONE_HEAD = VIEWS | {"weight": 1.5, "weight_warmup_epochs": 1}
C = ONE_HEAD | {"steering_head": True, "steering_uniformity": 1 / 3, "steering_temperature": 0.2}
ALL_IMAGES: dict[str, Any] = {"equivariant_batch_size": None, "equiv_splits": 8}
WEAK = {"jitter": (0.1, 0.1, 0.1, 0.02), "grayscale": 0.0}
MEDIUM = {"jitter": (0.2, 0.2, 0.2, 0.05), "grayscale": 0.1}
HUE = {"equivariance_jitter": (0.2, 0.2, 0.2, 0.5)}
T = C | {"steering_temperature": 0.1}
NO_COLOR = {"jitter_p": 0.0, "grayscale": 0.0}
WIDE = {"projection_hidden": 1024}
RECIPE = {key: read_yaml("cifar10_small")[key] for key in FIRST}
WIDE_COLORS = {"equivariance_jitter": (0.6, 0.6, 0.6, 0.5)}  # two changes of color within their range
ARMS = {
    "twin": Arm({"weight": 0.0}),
    "A": Arm(ONE_HEAD | WEAK),
    "C": Arm(C),
    "weight 0.5, uniformity as in C": Arm(C | {"weight": 0.5, "steering_uniformity": 1.0}),
    "weight 4": Arm(C | {"weight": 4.0}),
    "uniformity 0.1": Arm(C | {"steering_uniformity": 0.1}),
    "uniformity 1": Arm(C | {"steering_uniformity": 1.0}),
    "uniformity 3": Arm(C | {"steering_uniformity": 3.0}),
    "temperature 0.1": Arm(C | {"steering_temperature": 0.1}),
    "temperature 0.5": Arm(C | {"steering_temperature": 0.5}),
    "2 groups of 16": Arm(C | {"equiv_splits": 2}),
    "8 groups of 4": Arm(C | {"equiv_splits": 8}),
    "all images, 8 groups of 8": Arm(C | ALL_IMAGES),
    "heads 512-32": Arm(C | {"projection_dim": 32}),
    "heads 512-256": Arm(C | {"projection_dim": 256}),
    "heads 1024-128": Arm(C | {"projection_hidden": 1024}),
    "own view no negative": Arm(C, OthersOnly),
    "crops shared": Arm(C | {"equivariance_crop": "shared"}),
    "one pair for all terms": Arm(
        {"jitter": COLOR, **{k: v for k, v in C.items() if k not in VIEWS}}, shared=True
    ),
    "stop-gradient": Arm(C, Detached),
    "lambda in the last third": Arm(C | {"weight_start_epochs": 2, "weight_warmup_epochs": 0.25}),
    "weak contrastive color": Arm(C | WEAK),
    # On from the temperature, which did most.
    "t": Arm(T),
    "t 0.05": Arm(T | {"steering_temperature": 0.05}),
    "t, weight 0.5": Arm(T | {"weight": 0.5}),
    "t, weight 4": Arm(T | {"weight": 4.0}),
    "t, uniformity 1": Arm(T | {"steering_uniformity": 1.0}),
    "t, uniformity 0.1": Arm(T | {"steering_uniformity": 0.1}),
    "t, weight 0.5, uniformity 1": Arm(T | {"weight": 0.5, "steering_uniformity": 1.0}),
    "t 0.05, weight 0.5": Arm(T | {"weight": 0.5, "steering_temperature": 0.05}),
    "t, hue first": Arm(T | HUE),
    "t, hue alone": Arm(T | {"equivariance_jitter": (0.0, 0.0, 0.0, 0.5)}),
    "t, hue first, all images": Arm(T | HUE | ALL_IMAGES),
    "t, all images, 4 groups of 16": Arm(T | ALL_IMAGES | {"equiv_splits": 4}),
    "t, all images": Arm(T | ALL_IMAGES),
    "t, heads 512-256": Arm(T | {"projection_dim": 256}),
    "t, heads 512-32": Arm(T | {"projection_dim": 32}),
    "t, heads 1024-128": Arm(T | {"projection_hidden": 1024}),
    "t, 2 groups of 16": Arm(T | {"equiv_splits": 2}),
    "t, 8 groups of 4": Arm(T | {"equiv_splits": 8}),
    "t, crops shared": Arm(T | {"equivariance_crop": "shared"}),
    "t, stop-gradient": Arm(T, Detached),
    "t 0.05, stop-gradient, heads 1024-128": Arm(
        T | {"steering_temperature": 0.05, "projection_hidden": 1024}, Detached
    ),
    "t, a tenth of the gradient": Arm(T, Slowed),
    "t 0.05, a tenth of the gradient": Arm(T | {"steering_temperature": 0.05}, Slowed),
    "t, lambda in the last half": Arm(T | {"weight_start_epochs": 1.5, "weight_warmup_epochs": 0.25}),
    "t, weight 4, lambda in the last third": Arm(
        T | {"weight": 4.0, "weight_start_epochs": 2, "weight_warmup_epochs": 0.25}
    ),
    "t, weight 0.5, 2 groups of 16, heads 1024-128": Arm(T | WIDE | {"weight": 0.5, "equiv_splits": 2}),
    "weight 0.5, 2 groups of 16, heads 1024-128": Arm(C | WIDE | {"weight": 0.5, "equiv_splits": 2}),
    "t, weight 1, 2 groups of 16, heads 1024-128": Arm(T | WIDE | {"weight": 1.0, "equiv_splits": 2}),
    "t, weight 0.5, 1 group of 32, heads 1024-128": Arm(T | WIDE | {"weight": 0.5, "equiv_splits": 1}),
    "t, weight 0.5, all images, 2 groups of 32, heads 1024-128": Arm(
        T | WIDE | ALL_IMAGES | {"weight": 0.5, "equiv_splits": 2}
    ),
    "A, all images, 4 groups of 16": Arm(ONE_HEAD | WEAK | ALL_IMAGES | {"equiv_splits": 4}),
    "A, all images, 2 groups of 32, heads 1024-128": Arm(
        ONE_HEAD | WEAK | ALL_IMAGES | WIDE | {"equiv_splits": 2}
    ),
    "t, weak contrastive color, 2 groups of 16, heads 1024-128": Arm(T | WEAK | WIDE | {"equiv_splits": 2}),
    "t, no contrastive color, 2 groups of 16, heads 1024-128": Arm(T | NO_COLOR | WIDE | {"equiv_splits": 2}),
    "t, no contrastive color, all images, 4 groups of 16, heads 1024-128": Arm(
        T | NO_COLOR | WIDE | ALL_IMAGES | {"equiv_splits": 4}
    ),
    "t, no contrastive color, hue first, all images, 4 groups of 16, heads 1024-128": Arm(
        T | NO_COLOR | HUE | WIDE | ALL_IMAGES | {"equiv_splits": 4}
    ),
    "A, hue first": Arm(ONE_HEAD | WEAK | HUE),
    "A, weight 4": Arm(ONE_HEAD | WEAK | {"weight": 4.0}),
    "A, all images": Arm(ONE_HEAD | WEAK | ALL_IMAGES),
    "D": Arm(ONE_HEAD | MEDIUM),
    "t, medium contrastive color": Arm(T | MEDIUM),
    "t, weak contrastive color": Arm(T | WEAK),
    # What composes better? The recipe that came of it, and first changes of it.
    "recipe": Arm(RECIPE),
    "recipe, wide colors": Arm(RECIPE | WIDE_COLORS),
    "recipe, temperature 0.15": Arm(RECIPE | {"steering_temperature": 0.15}),
    "recipe, wide colors, temperature 0.15": Arm(RECIPE | WIDE_COLORS | {"steering_temperature": 0.15}),
    "recipe, weight 1, temperature 0.15": Arm(RECIPE | {"steering_temperature": 0.15, "weight": 1.0}),
    "recipe, heads 1024-32": Arm(RECIPE | {"projection_dim": 32}),
    "recipe, narrow colors": Arm(RECIPE | {"equivariance_jitter": (0.3, 0.3, 0.3, 0.5)}),
}


def steering(encoder: Encoder, images: Tensor) -> dict[str, float]:
    """What `care-hub equivariance` says of colors as a whole and of hue alone."""
    config = AugmentationConfig(encoder.config.image_size)
    found = measure_equivariance(encoder, images, config, families=("color", "hue"))
    named = {f"{family} {name}": round(found[family][name][0], 4) for family in found for name in MEASURES}
    return named | {k: round(v, 4) for k, v in composed_cosines(encoder, images, config).items()}


def run(arm: Arm, folder: Path, splits: tuple[Images, Images], options: dict[str, Any]) -> dict[str, float]:
    """Train and measure one arm; a training that was killed goes on."""
    place = {"save_root": str(folder.parent), "run_name": folder.name, "resume": "auto", "knn_every": 0}
    config = TrainConfig(**read_yaml("cifar10_small") | FIRST | arm.options | options | place)
    if arm.shared:
        config.views = "shared"  # which TrainConfig refuses
    with patch.multiple(trainer, load_splits=lambda *_, **__: splits, SimCLR=arm.method):
        results = trainer.train(config)
    accelerator = inference_accelerator()
    encoder = Encoder.from_pretrained(folder).to(accelerator.device)
    probe = EvalConfig(encoder=str(folder), dataset_name="cifar10")
    (head,) = linear_probe(encoder, *labeled("cifar10", *splits), accelerator, probe)
    pixels = splits[1].take(torch.arange(IMAGES)).pixels
    return results | {"probe": head.metrics["top1"]} | steering(encoder, pixels)


def cell(values: list[float | None]) -> str:
    if None in values:
        return "–"
    mean = f"{statistics.mean(values):.3g}"
    return f"{mean} ± {statistics.stdev(values):.2g}" if len(values) > 1 else mean


@click.command()
@click.argument("data_root", type=click.Path(exists=True))
@click.option("--only", multiple=True, type=click.Choice(list(ARMS)), help="default: all")
@click.option("--seed", "seeds", multiple=True, type=int, default=(3,), show_default=True)
@click.option("--epochs", default=3, show_default=True)
@click.option("--root", default="runs/steering", show_default=True, type=click.Path(path_type=Path))
def main(data_root: str, only: tuple[str, ...], seeds: tuple[int, ...], epochs: int, root: Path) -> None:
    data = {"dataset_name": "cifar10", "data_root": data_root, "epochs": epochs}
    train, _ = load_splits(TrainConfig(**data), progress=False)
    rest, held_out = validation_split(len(train), seed=0)
    splits, path = (train.take(rest), train.take(held_out)), root / "steering.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    for name in only or ARMS:
        for seed in seeds:
            key = f"{name}, {epochs} epochs, seed {seed}"
            if key not in found:
                folder = root / key.replace(",", "").replace(" ", "-")
                found[key] = run(ARMS[name], folder, splits, data | {"seed": seed})
                write_text(path, json.dumps(found, indent=2) + "\n")
    click.echo("| | " + " | ".join(COLUMNS.values()) + " |\n" + "|---" * (1 + len(COLUMNS)) + "|")
    for name in only or ARMS:
        rows = [found[f"{name}, {epochs} epochs, seed {seed}"] for seed in seeds]
        click.echo(
            f"| {name} | " + " | ".join(cell([row.get(key) for row in rows]) for key in COLUMNS) + " |"
        )


if __name__ == "__main__":
    main()
