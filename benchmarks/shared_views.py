"""Ways to draw one pair of views that serves InfoNCE and the Gram matrices at once: two passes of the encoder instead of four.

    python benchmarks/shared_views.py                                      # every way, two seeds: over half an hour on two cores
    python benchmarks/shared_views.py --only separate --only shared --seed 0

Trains each on `shapes`, by the default recipe but for the options below, and prints means over the seeds as a Markdown table. A run
that is complete is not repeated. What was found is in the README.
"""

import json
import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path

import click
import torch

from care_hub import augment, trainer
from care_hub.augment import Draw
from care_hub.config import EvalConfig, TrainConfig
from care_hub.evaluate.commands import evaluate

SHOWN = {
    "knn_top1": "kNN, shape, %",
    "probe": "linear probe, %",
    "knn_color_top1": "kNN, colour, %",
    "rotation_invariance_ratio": "rotation / invariance error",
    "gram_deviation": "Gram deviation",
    "training_seconds": "seconds",
}
MAKE_VIEWS = trainer.make_views


def own(fields, config, draw, view):
    """Drawn per group, but for `fields`, which every image has of its own."""
    group, single = draw(config.equiv_splits, "group").repeat(config.batch_size // config.equiv_splits), draw(config.batch_size, "own")
    return replace(group, **{name: getattr(single, name) for name in fields})


def crossed(config, draw, view):
    """Half as many draws as groups in each view, combined so that no two groups share both."""
    group = torch.arange(config.batch_size) // (config.batch_size // config.equiv_splits)
    half = config.equiv_splits // 2
    return draw(half, "group").rows(group // 2 if view == 0 else group % 2 * (half // 2) + group // half)


SHARED = {"views": "shared"}
HALF = SHARED | {"equivariant_batch_size": 32, "equiv_splits": 4}
WAYS = {  # name -> (options, how the parameters of a view are drawn if not as the package does)
    "plain SimCLR": ({"weight": 0.0}, None),
    "separate": ({}, None),
    "shared": (SHARED, None),
    "shared, 16 groups of 4": (SHARED | {"equiv_splits": 16, "weight": 3.5}, None),
    "shared, 32 groups of 2": (SHARED | {"equiv_splits": 32, "weight": 10.5}, None),
    "crop and flip per image": (SHARED, partial(own, ("box", "flip"))),
    "jitter alone shared": (SHARED, partial(own, ("box", "flip", "grey", "sigma"))),
    "groups re-drawn per view": (SHARED, crossed),
    "half of the batch": (HALF, None),
    "weight 0.3": (SHARED | {"weight": 0.3}, None),
    "weight 0.001": (SHARED | {"weight": 0.001}, None),
    "plain SimCLR, 24 epochs": ({"weight": 0.0, "epochs": 24}, None),
    "shared, 24 epochs": (SHARED | {"epochs": 24}, None),
    "half of the batch, 24 epochs": (HALF | {"epochs": 24}, None),
    "half of the batch, weight 4, 24 epochs": (HALF | {"epochs": 24, "weight": 4.0}, None),
}


def run(name: str, seed: int, root: Path, epochs: int) -> dict:
    folder = root / f"{name.replace(' ', '-').replace(',', '')}-{seed}"
    changes, draws = WAYS[name]

    def make_views(images, config, recipe, step, *_):
        def draw(n, what, view):
            return augment.draw(recipe, n, *images.shape[2:], augment.generator(config.seed, what, step, view))

        views = [draws(config, partial(draw, view=view), view) for view in (0, 1)]
        return (augment.apply(images.repeat(2, 1, 1, 1), Draw.join(views), recipe),)

    if not (folder / "results.json").is_file():
        trainer.make_views = make_views if draws else MAKE_VIEWS
        options = {"epochs": epochs} | changes
        options["weight_warmup_epochs"] = options["epochs"]
        trainer.train(TrainConfig(seed=seed, save_root=str(root), run_name=folder.name, knn_every=0, **options))
    results = json.loads((folder / "results.json").read_text())
    if "probe" not in results:
        results["probe"] = evaluate(EvalConfig(encoder=str(folder), dataset_name="shapes"))["top1"]
        (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    return results


@click.command()
@click.option("--only", multiple=True, type=click.Choice(list(WAYS)), help="default: all")
@click.option("--seed", "seeds", multiple=True, type=int, default=(3, 4), show_default=True)
@click.option("--epochs", default=12, show_default=True)
@click.option("--root", default="runs/shared", show_default=True, type=click.Path(path_type=Path))
def main(only, seeds, epochs, root) -> None:
    table = {name: [run(name, seed, root, epochs) for seed in seeds] for name in only or WAYS}
    click.echo("| | " + " | ".join(SHOWN.values()) + " |\n" + "|---" * (1 + len(SHOWN)) + "|")
    for name, rows in table.items():
        cells = ([row[key] for row in rows] for key in SHOWN)
        texts = [f"{statistics.mean(v):.3g}" + (f" ± {statistics.stdev(v):.2g}" if len(v) > 1 else "") for v in cells]
        click.echo(f"| {name} | " + " | ".join(texts) + " |")


if __name__ == "__main__":
    main()
