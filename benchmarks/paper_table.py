"""CARE, with one head or two and λ from the start or late, against λ = 0: numbers in results/<recipe>.json,
and all tables in docs/results.md.

    python benchmarks/paper_table.py                                         # shapes, three seeds
    python benchmarks/paper_table.py --recipe cifar10_small --seed 0 --seed 1 --data-root CIFAR10
    python benchmarks/paper_table.py --recipe shapes --arm late --arm plain  # a part, beside another process

Trains and evaluates every arm of a recipe, with every seed; resumes where it was interrupted, since nothing
that is recorded is done again. An arm is the recipe but for its options. All arms are measured under the same
augmentations, whatever they were trained with: changes of color, and the recipe's own as a whole. The table
shows all that is there, also what other processes have measured, and arms whose runs are gone as they were.
"""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
from result_tables import ROOT, ROWS, Arms, hardware, recorded, write_results

from care_hub import cli
from care_hub.augment import AugmentationConfig
from care_hub.config import AUGMENTATION, DataConfig, EvalConfig, TrainConfig, read_yaml
from care_hub.data.images import Images
from care_hub.data.sources import load_splits
from care_hub.evaluate import commands
from care_hub.evaluate.attributes import probe_attributes
from care_hub.evaluate.commands import PROBE_IMAGES
from care_hub.evaluate.equivariance import composed_cosines, measure_equivariance
from care_hub.evaluate.features import random_subset
from care_hub.factory import load_encoder
from care_hub.files import write_text
from care_hub.hub.evaluation_record import read_record
from care_hub.schedule import Plan
from care_hub.training import trainer
from care_hub.training.batches import training_augmentation

LABEL_FRACTIONS = (1, 0.01, 0.1)
FAMILIES = {"recipe": "full recipe", "color": "color", "hue": "hue", "crop": "crop"}  # names in results
IMAGES = 2000  # test images: half to fit rotations, half to measure them


@dataclass(frozen=True)
class Arm:
    """One column of the table."""

    title: str
    options: dict[str, Any] = field(default_factory=dict)  # beside those of the recipe
    as_long_as: str = ""  # the arm whose price in steps of λ = 0 gives the epochs


LATE: dict[str, Any] = {"weight_start_epochs": None, "weight_warmup_epochs": None}  # by default
ONE_HEAD: dict[str, Any] = {"steering_head": False, "equivariant_batch_size": None, "equiv_splits": 8}
SAME: dict[str, Any] = {f"equivariance_{name}": None for name in AUGMENTATION} | {"equivariance_crop": True}
MOCO = read_yaml("shapes_moco")
# Best on a validation fifth with seed 3 among those in results/tried/settings.json (experiments/settings.py).
TUNED: dict[str, dict[str, Any]] = {"shapes": {"lr": 0.4}, "cifar10_small": {"temperature": 0.1}}
STEERING = {"steering_head": True, "steering_uniformity": 0.1, "weight": 4.0}
ARMS = {
    "shapes": {
        "care": Arm(
            "CARE from the start",
            {"weight": 1.5, "weight_start_epochs": 0, "weight_warmup_epochs": 12, "epochs": 12},
        ),
        "late": Arm("CARE late", LATE | {"weight": 4.0, "epochs": 20}),
        "steering-head": Arm(
            "CARE with a steering head",
            STEERING | {"weight_start_epochs": 16, "weight_warmup_epochs": 1, "epochs": 20},
        ),
        "plain": Arm("λ = 0", {"weight": 0.0}),
        "longer": Arm("λ = 0, as long", {"weight": 0.0}, as_long_as="steering-head"),
        "tuned": Arm("λ = 0, tuned", {"weight": 0.0} | TUNED["shapes"], as_long_as="steering-head"),
        "moco": Arm("CARE on MoCo", MOCO),
    },
    "cifar10_small": {
        "steering-head": Arm("steering head"),
        "steering-first": Arm(
            "steering first", {"jitter_p": 0.0, "grayscale": 0.0, "weight": 1.5, "projection_hidden": 512}
        ),
        "composing": Arm("steering head, temperature 0.15", {"steering_temperature": 0.15}),
        "care": Arm("CARE from the start", ONE_HEAD | SAME | {"weight": 1.5}),
        "late": Arm("CARE late", ONE_HEAD | SAME | LATE | {"weight": 1.5}),
        "plain": Arm("λ = 0", {"weight": 0.0}),
        "longer": Arm("λ = 0, as long", {"weight": 0.0}, as_long_as="steering-head"),
        "tuned": Arm("λ = 0, tuned", {"weight": 0.0} | TUNED["cifar10_small"], as_long_as="steering-head"),
    },
}
OTHERS = {  # of any other recipe
    "care": Arm("CARE"),
    "plain": Arm("λ = 0", {"weight": 0.0}),
    "longer": Arm("λ = 0, as long", {"weight": 0.0}, as_long_as="care"),
}


def options_of(arm: Arm, arms: Mapping[str, Arm], recipe: str, images: int) -> dict[str, Any]:
    """The options of an arm, its epochs among them if they follow from another arm's, for so many images."""
    if not arm.as_long_as:
        return arm.options
    other = cli.resolve(options_of(arms[arm.as_long_as], arms, recipe, images), recipe)
    plan = Plan.of(other, images)
    return arm.options | {"epochs": math.ceil(round(plan.price(other) / plan.steps_per_epoch, 2))}


def run_command(*words: object) -> None:
    click.echo("+ " + " ".join(map(str, words)), err=True)
    command = [sys.executable, *map(str, words)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def train(run: Path, options: dict[str, Any], recipe: str, splits: tuple[Images, Images]) -> None:
    """Train `run`, or resume it, unless it is finished. Raises CareHubError if it had other options."""
    place = {"save_root": str(run.parent), "run_name": run.name, "resume": "auto"}
    with patch.object(trainer, "load_splits", lambda *_, **__: splits):  # read once for all
        trainer.train(cli.resolve(options | place, recipe))


def measure_accuracy(run: Path, data: dict[str, Any], splits: tuple[Images, Images]) -> dict[str, Any]:
    """Protocol -> results of `run`; those that are not recorded are measured."""
    (label, common), tuned = (data["dataset_name"], data | {"encoder": str(run)}), run / "finetuned"

    def found(folder: Path) -> dict[str, Any]:
        return read_record(folder).get("accuracy", {}).get(label, {})

    with patch.object(commands, "open_splits", lambda *_: splits):
        for fraction in LABEL_FRACTIONS:
            probe = EvalConfig(**common, label_fraction=fraction, seeds=1 if fraction == 1 else 3)
            if probe.protocol_name not in found(run / "export"):
                commands.evaluate(probe)
        if "kNN" not in found(run / "export"):
            commands.evaluate_knn(str(run), DataConfig(**data))
        if not tuned.is_dir() or "fine-tuned" not in found(tuned):
            shutil.rmtree(tuned, ignore_errors=True)
            commands.evaluate(EvalConfig(**common, protocol="finetune", output_dir=str(tuned)))
    return found(run / "export") | found(tuned)


def few_labels(fraction: float) -> str:
    """The name under which a linear probe on `fraction` of the labels is recorded."""
    return f"linear probe, {100 * fraction:g} % of the labels"


def measure(
    run: Path, splits: tuple[Images, Images], augmentation: AugmentationConfig, data: dict[str, Any]
) -> None:
    """Write the figures of a trained run, by the names of rows, into its figures.json if there is none."""
    if (run / "figures.json").is_file():
        return
    accuracy, results = measure_accuracy(run, data, splits), json.loads((run / "results.json").read_text())
    config = TrainConfig(**read_yaml(run / "config.yaml"))
    figures = {
        "label_probe": accuracy["linear probe"]["top1"],
        "label_knn": accuracy["kNN"]["top1"],
        "label_finetuned": accuracy["fine-tuned"]["top1"],
        "price": Plan.of(config, len(splits[0])).price(config),
        "training_minutes": results["training_seconds"] / 60,
        "images_per_second": results["images_per_second"],
    }
    for fraction in LABEL_FRACTIONS[1:]:
        figures[f"label_probe_{100 * fraction:g}"] = accuracy[few_labels(fraction)]["top1"]
    counts, encoder = (PROBE_IMAGES, IMAGES), load_encoder(run)
    few, test = (s.take(random_subset(len(s), count)) for s, count in zip(splits, counts, strict=True))
    families = measure_equivariance(encoder, test.pixels, augmentation, families=FAMILIES.values())
    for name, family in FAMILIES.items():
        figures |= {f"{name}_{metric}": x for metric, (x, *_) in families[family].items()}
    recipe = families["full recipe"]
    names = {"ratio": "rotation_invariance_ratio", "gram": "gram_deviation", "hit": "hit_at_1"}
    figures |= {name: recipe[metric][0] for name, metric in names.items()}
    figures["hit_unrotated"] = recipe["hit_at_1_unrotated"][0]
    figures |= composed_cosines(encoder, test.pixels, augmentation)
    for space, attributes in probe_attributes(encoder, few, test).items():
        figures |= {f"{name}_{space}": value for name, value in attributes.items()}
    figures = {name: float(f"{value:.5g}") for name, value in figures.items() if value == value}
    write_text(run / "figures.json", json.dumps(figures, indent=2) + "\n")


@click.command()
@click.option("--recipe", default="shapes", show_default=True, help="by name: `care-hub recipes`")
@click.option("--arm", "chosen", multiple=True, help="train and measure these arms alone (default: all)")
@click.option("--seed", "seeds", multiple=True, type=int, default=(0, 1, 2), show_default=True)
@click.option("--root", default="runs/paper", show_default=True, help="where the runs are saved")
@click.option("--data-root")
def main(
    recipe: str, chosen: tuple[str, ...], seeds: tuple[int, ...], root: str, data_root: str | None
) -> None:
    arms = ARMS.get(recipe, OTHERS)
    if unknown := {*chosen} - {*arms}:
        raise click.ClickException(f"there is no arm '{min(unknown)}'; the arms are {', '.join(arms)}.")
    data_root = str(Path(data_root).absolute()) if data_root else None
    config = cli.resolve({"data_root": data_root}, recipe)
    splits, augmentation = load_splits(config, config.image_size), training_augmentation(config)
    data = {"dataset_name": config.dataset_name, "data_root": data_root}
    settings = f"{config.model}, batch {config.batch_size}, {hardware()}, precision {config.mixed_precision}"
    before = recorded(recipe, settings)
    measured: Arms = {}
    for name, arm in arms.items():
        options = options_of(arm, arms, recipe, len(splits[0])) | {"data_root": config.data_root}
        runs = {seed: Path(root).absolute() / f"{recipe}-{name}-{seed}" for seed in seeds}
        if not chosen or name in chosen:
            for seed, run in runs.items():
                train(run, options | {"seed": seed}, recipe, splits)
                measure(run, splits, augmentation, data)
        files = [run / "figures.json" for run in runs.values()]
        title = f"{arm.title}, {cli.resolve(options, recipe).epochs} epochs"
        if found := [json.loads(file.read_text()) for file in files if file.is_file()]:
            rows = [{row.name: run[row.name] for row in ROWS if row.name in run} for run in found]
            measured[title] = rows
        elif title in before:
            measured[title] = before[title]
    click.echo(write_results(recipe, recipe, settings, measured))


if __name__ == "__main__":
    main()
