"""Ways to sample one pair of views for both losses: two passes of the encoder instead of four.

    python experiments/shared_views.py                      # all, two seeds: over half an hour on two cores
    python experiments/shared_views.py --only separate --only shared --seed 0

Trains each on `shapes`, by the default recipe but for the options below, and prints means over the seeds as a
Markdown table. A run that is complete is not repeated. What was found is in shared_views.md.
"""

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import torch
from torch import Tensor

from care_hub import augment
from care_hub.augment import AugmentationConfig, AugmentationParams
from care_hub.config import EvalConfig, TrainConfig
from care_hub.evaluate.commands import evaluate
from care_hub.hub.evaluation_record import read_record
from care_hub.training import trainer

COLUMNS = {
    "knn_top1": "kNN, shape, %",
    "probe": "linear probe, %",
    "knn_color_top1": "kNN, color, %",
    "rotation_invariance_ratio": "rotation / invariance error",
    "gram_deviation": "Gram deviation",
    "training_seconds": "seconds",
}
Sample = Callable[[int, str], AugmentationParams]  # (how many, for whom) -> parameters of one view
ViewParams = Callable[[TrainConfig, Sample, int], AugmentationParams]


def own_fields(config: TrainConfig, sample: Sample, view: int, fields: tuple[str, ...]) -> AugmentationParams:
    """Sampled per group, but for `fields`, which every image has of its own."""
    group = sample(config.equiv_splits, "group").repeat(config.batch_size // config.equiv_splits)
    own = sample(config.batch_size, "own")
    return replace(group, **{name: getattr(own, name) for name in fields})


def crossed(config: TrainConfig, sample: Sample, view: int) -> AugmentationParams:
    """Half as many samples as groups in each view, combined so that no two groups share both."""
    group = torch.arange(config.batch_size) // (config.batch_size // config.equiv_splits)
    half = config.equiv_splits // 2
    rows = group // 2 if view == 0 else group % 2 * (half // 2) + group // half
    return sample(half, "group").rows(rows)


@dataclass(frozen=True)
class Way:
    """Options, and how the parameters of a view are sampled if not as the package does."""

    options: dict[str, Any] = field(default_factory=dict)
    view_params: ViewParams | None = None


SHARED: dict[str, Any] = {"views": "shared"}
HALF = SHARED | {"equivariant_batch_size": 32, "equiv_splits": 4}
WAYS = {
    "plain SimCLR": Way({"weight": 0.0}),
    "separate": Way(),
    "shared": Way(SHARED),
    "shared, 16 groups of 4": Way(SHARED | {"equiv_splits": 16, "weight": 3.5}),
    "shared, 32 groups of 2": Way(SHARED | {"equiv_splits": 32, "weight": 10.5}),
    "crop and flip per image": Way(SHARED, partial(own_fields, fields=("box", "flip"))),
    "jitter alone shared": Way(SHARED, partial(own_fields, fields=("box", "flip", "gray", "sigma"))),
    "groups re-sampled per view": Way(SHARED, crossed),
    "half of the batch": Way(HALF),
    "weight 0.3": Way(SHARED | {"weight": 0.3}),
    "weight 0.001": Way(SHARED | {"weight": 0.001}),
    "plain SimCLR, 24 epochs": Way({"weight": 0.0, "epochs": 24}),
    "shared, 24 epochs": Way(SHARED | {"epochs": 24}),
    "half of the batch, 24 epochs": Way(HALF | {"epochs": 24}),
    "half of the batch, weight 4, 24 epochs": Way(HALF | {"epochs": 24, "weight": 4.0}),
}


@dataclass(frozen=True)
class SharedViews:
    """In place of `make_views`: one pair of views, its parameters from `view_params`."""

    view_params: ViewParams

    def __call__(
        self,
        images: Tensor,
        config: TrainConfig,
        augmentation: AugmentationConfig,
        step: int,
        rank: int,
        processes: int,
        start: int = 0,
    ) -> tuple[Tensor]:
        def sample(view: int, n: int, what: str) -> AugmentationParams:
            generator = augment.seeded_generator(config.seed, what, step, view)
            return augment.sample(augmentation, n, *images.shape[2:], generator)

        params = [self.view_params(config, partial(sample, view), view) for view in (0, 1)]
        both = AugmentationParams.cat(params)
        return (augment.apply(images.repeat(2, 1, 1, 1), both, augmentation),)


def run(name: str, seed: int, root: Path, epochs: int) -> dict[str, float]:
    """Train and evaluate, unless that is done; returns the figures by the names in COLUMNS."""
    folder, way = root / f"{name.replace(' ', '-').replace(',', '')}-{seed}", WAYS[name]
    if not (folder / "results.json").is_file():
        options = {"epochs": epochs, "weight": 1.5, "weight_start_epochs": 0} | way.options
        options |= {"weight_warmup_epochs": options["epochs"], "knn_every": 0}
        config = TrainConfig(seed=seed, save_root=str(root), run_name=folder.name, **options)
        make_views = SharedViews(way.view_params) if way.view_params else trainer.make_views
        with patch.object(trainer, "make_views", make_views):
            trainer.train(config)
    accuracies = read_record(folder / "export").get("accuracy", {}).get("shapes", {})
    probe = accuracies.get("linear probe")
    probe = probe or evaluate(EvalConfig(encoder=str(folder), dataset_name="shapes"))
    return json.loads((folder / "results.json").read_text()) | {"probe": probe["top1"]}


def cell(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.3g}"
    return f"{mean} ± {statistics.stdev(values):.2g}" if len(values) > 1 else mean


@click.command()
@click.option("--only", multiple=True, type=click.Choice(list(WAYS)), help="default: all")
@click.option("--seed", "seeds", multiple=True, type=int, default=(3, 4), show_default=True)
@click.option("--epochs", default=12, show_default=True)
@click.option("--root", default="runs/shared", show_default=True, type=click.Path(path_type=Path))
def main(only: tuple[str, ...], seeds: tuple[int, ...], epochs: int, root: Path) -> None:
    table = {name: [run(name, seed, root, epochs) for seed in seeds] for name in only or WAYS}
    click.echo("| | " + " | ".join(COLUMNS.values()) + " |\n" + "|---" * (1 + len(COLUMNS)) + "|")
    for name, rows in table.items():
        cells = [cell([row[key] for row in rows]) for key in COLUMNS]
        click.echo(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
