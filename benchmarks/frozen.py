"""How well a head on a frozen backbone steers, beside the backbone itself.

    python benchmarks/frozen.py runs/paper/shapes-longer-*
    python benchmarks/frozen.py runs/paper/cifar10_small-longer-* --recipe cifar10_small --data-root CIFAR10

For each run: R fitted on its backbone's own features, on its own head, and on a head that is trained on the
frozen backbone to turn by color, with the options of the CIFAR-10 recipe. Changes of color, measured as in
benchmarks/paper_table.py. Writes results/frozen_<recipe>.json and the tables in docs/results.md.
"""

import json
from pathlib import Path

import click
from paper_table import FAMILIES, IMAGES, train
from result_tables import Arms, hardware, write_results
from torch import Tensor

from care_hub import cli
from care_hub.augment import AugmentationConfig
from care_hub.config import AUGMENTATION
from care_hub.data.sources import load_splits
from care_hub.encoder import Encoder
from care_hub.evaluate.equivariance import measure_equivariance
from care_hub.evaluate.features import random_subset
from care_hub.factory import load_encoder
from care_hub.training.batches import training_augmentation

STEERING = ("steering_head", "steering_uniformity", "steering_temperature", "weight", "equivariance_crop")
STEERING += tuple(f"equivariance_{name}" for name in AUGMENTATION)  # options of the CIFAR-10 recipe
OPTIONS = {"freeze_backbone": True, "weight_start_epochs": 0, "weight_warmup_epochs": 0}
OPTIONS |= {"equivariant_batch_size": None, "equiv_splits": 4}  # groups of 16
METRICS = ("motion", "same_image_hit_at_1", "same_image_mrr", "same_image_hit_at_1_linear")


def color_figures(
    encoder: Encoder, pixels: Tensor, augmentation: AugmentationConfig, space: str
) -> dict[str, float]:
    """METRICS of R in `space`, by the names of rows, for color as a whole and for hue."""
    families = {name: FAMILIES[name] for name in ("color", "hue")}
    found = measure_equivariance(encoder, pixels, augmentation, families=families.values(), space=space)
    rows = {f"{name}_{key}": found[family][key][0] for name, family in families.items() for key in METRICS}
    return {name: float(f"{value:.5g}") for name, value in rows.items()}


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--recipe", default="shapes", show_default=True)
@click.option("--epochs", default=6, show_default=True)
@click.option("--data-root")
def main(runs: tuple[Path, ...], recipe: str, epochs: int, data_root: str | None) -> None:
    turned = cli.resolve({}, "cifar10_small")
    steering = OPTIONS | {name: getattr(turned, name) for name in STEERING}
    config = cli.resolve({"data_root": str(Path(data_root).absolute()) if data_root else None}, recipe)
    _, test = splits = load_splits(config, config.image_size)
    pixels, augmentation = test.take(random_subset(len(test), IMAGES)).pixels, training_augmentation(config)
    arms: Arms = {}
    for run in runs:
        trained = run.absolute().with_name(f"{run.name}-frozen")
        options = {"init": str(run.absolute()), "epochs": epochs, "data_root": config.data_root}
        train(trained, steering | options, recipe, splits)
        seconds = {
            path: json.loads((path / "results.json").read_text())["training_seconds"]
            for path in (run, trained)
        }
        for title, path, space in (
            ("the backbone itself", run, "backbone"),
            ("its own head", run, "projection"),
            (f"a steering head on it, {epochs} epochs", trained, "projection"),
        ):
            figures = color_figures(load_encoder(path), pixels, augmentation, space)
            arms.setdefault(title, []).append(figures | {"training_minutes": round(seconds[path] / 60, 2)})
    settings = f"{config.model}, {hardware()}"
    click.echo(write_results(f"frozen_{recipe}", f"frozen backbones, {recipe}", settings, arms))


if __name__ == "__main__":
    main()
