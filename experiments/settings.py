"""Settings of a recipe, chosen between on a validation fifth of its training images.

    python experiments/settings.py cifar10_long weight=0,lr=0.3 weight=0,lr=0.6 --data-root CIFAR10
    python experiments/settings.py shapes weight=0,temperature=0.1 weight=0,temperature=0.5

Trains the recipe, but for the options of each setting, on four fifths of the training images; kNN and a
linear probe are measured on the other fifth, so no test image is looked at. What is in `--root` is not
repeated; other processes may take other settings. Prints all that is there as a Markdown table, the best
probe first. What was found is recorded in results/tried/settings.json.
"""

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import yaml

from care_hub import cli
from care_hub.config import EvalConfig, TrainConfig
from care_hub.data.images import Images
from care_hub.data.sources import load_splits
from care_hub.distributed import inference_accelerator
from care_hub.encoder import Encoder
from care_hub.evaluate.features import labeled
from care_hub.evaluate.linear import linear_probe, validation_split
from care_hub.files import write_text
from care_hub.training import trainer


def options_of(setting: str) -> dict[str, Any]:
    """'lr=0.3,temperature=0.1' -> options."""
    return {key: yaml.safe_load(value) for key, value in (part.split("=") for part in setting.split(","))}


def run(config: TrainConfig, splits: tuple[Images, Images]) -> dict[str, float]:
    """Train, and measure on the second of `splits`; a training that was killed goes on."""
    with patch.object(trainer, "load_splits", lambda *_, **__: splits):
        results = trainer.train(config)
    accelerator, folder = inference_accelerator(), Path(config.save_root) / str(config.run_name)
    encoder = Encoder.from_pretrained(folder).to(accelerator.device)
    probe = EvalConfig(encoder=str(folder), dataset_name=config.dataset_name)
    (head,) = linear_probe(encoder, *labeled(config.dataset_name, *splits), accelerator, probe)
    minutes = round(results["training_seconds"] / 60, 2)
    return {"probe": head.metrics["top1"], "kNN": results["knn_top1"], "minutes": minutes}


@click.command()
@click.argument("recipe")
@click.argument("settings", nargs=-1, required=True)
@click.option("--epochs", type=int, help="default: those of the recipe")
@click.option("--seed", default=3, show_default=True)
@click.option("--data-root")
@click.option("--root", default="runs/settings", show_default=True, type=click.Path(path_type=Path))
def main(
    recipe: str, settings: tuple[str, ...], epochs: int | None, seed: int, data_root: str | None, root: Path
) -> None:
    common = {"seed": seed, "data_root": data_root, "save_root": str(root), "resume": "auto", "knn_every": 0}
    common |= {"epochs": epochs} if epochs else {}
    config = cli.resolve(common | {"run_name": "all"}, recipe)
    train, _ = load_splits(config, config.image_size, progress=False)
    rest, held_out = validation_split(len(train), seed=0)
    splits = train.take(rest), train.take(held_out)
    for setting in settings:
        name = f"{recipe}-{config.epochs}-{setting}-{seed}".replace("=", "_").replace(",", "-")
        path = root / f"{name}.json"
        if not path.is_file():
            found = run(cli.resolve(common | options_of(setting) | {"run_name": name}, recipe), splits)
            about = {"recipe": recipe, "setting": setting, "epochs": config.epochs, "seed": seed}
            write_text(path, json.dumps(about | found, indent=2) + "\n")
    rows = sorted(
        (json.loads(path.read_text()) for path in root.glob("*.json")), key=lambda row: -row["probe"]
    )
    click.echo("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
    for row in rows:
        click.echo("| " + " | ".join(map(str, row.values())) + " |")


if __name__ == "__main__":
    main()
