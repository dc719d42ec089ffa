"""Make a run an encoder of the package: half as many bytes, no head but the one that rotates, measured anew.

    python benchmarks/ship.py runs/paper/cifar10_small-steering-first-0 \
        resnet10_w32_small.care_cifar10_color --dataset-name cifar10 --data-root CIFAR10

Writes care_hub/pretrained/NAME, without pictures and without what SentenceTransformer reads, which is another
copy of the head: saving and pushing make it. With --transform there are rotations, too, of the test images
or of --images. Every figure of its card is measured on weights and rotations as they are stored there, as
`care-hub verify NAME` does again. With NAME for the run, too, its weights stay as they are, and of the rest
only the figures of the end of training and rotations are measured.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import click
import torch
from paper_table import run_command
from result_tables import ROOT

from care_hub.config import DataConfig
from care_hub.distributed import inference_accelerator
from care_hub.encoder import Encoder
from care_hub.files import write_text
from care_hub.hub import sentence_transformer
from care_hub.hub.card import write_card
from care_hub.hub.registry import SHIPPED
from care_hub.hub.rotation_set import FILE_NAME, RotationSet
from care_hub.steering.fitting import chosen_images, measure_rotations
from care_hub.verify import FINAL_KEYS, Site, measure_final


@click.command()
@click.argument("run")
@click.argument("name")
@click.option("--dataset-name", required=True)
@click.option("--data-root")
@click.option("--transform", "transforms", multiple=True, help="as of `care-hub rotations`")
@click.option("--images", type=click.Path(exists=True), help="as of `care-hub rotations`")
def main(
    run: str,
    name: str,
    dataset_name: str,
    data_root: str | None,
    transforms: tuple[str, ...],
    images: str | None,
) -> None:
    folder = SHIPPED / name
    if run != name:
        store(run, folder)
    record_final(folder, DataConfig(dataset_name, data_root))
    data = ["--dataset-name", dataset_name]
    data += ["--data-root", str(Path(data_root).absolute())] if data_root else []
    if run != name:
        run_command(ROOT / "eval_linear.py", "--encoder", folder, *data)
        run_command("-m", "care_hub", "knn", folder, *data)
        run_command("-m", "care_hub", "equivariance", folder, *data)
    if transforms:
        words = [word for text in transforms for word in ("--transform", text)]
        source = ["--images", Path(images).absolute()] if images else data
        run_command("-m", "care_hub", "rotations", folder, *source, *words)
        halve_rotations(folder, images or DataConfig(dataset_name, data_root))
        (folder / "rotations.png").unlink()
    if run != name:
        for file in (*folder.glob("*.png"), *folder.glob(".*")):  # pictures of photographs are large
            file.unlink()
        for part in sentence_transformer.NAMES:
            (folder / part).unlink()
        for part in sentence_transformer.DENSE:
            (folder / part).rmdir()
    write_card(folder, name)
    size = sum(file.stat().st_size for file in folder.iterdir())
    click.echo(f"{folder.name}: {size / 1e6:.2f} MB")


def store(run: str, folder: Path) -> None:
    encoder = Encoder.from_pretrained(run)
    shutil.rmtree(folder, ignore_errors=True)
    encoder.set_contrastive_head(False)
    encoder.save_pretrained(folder, torch.float16)


def halve_rotations(folder: Path, source: DataConfig | str) -> None:
    """Store the rotations in half precision, and measure them so."""
    RotationSet.load(folder / FILE_NAME).save(folder, half=True)
    rotations, encoder = RotationSet.load(folder / FILE_NAME), Encoder.from_folder(folder)
    for name, fitted in rotations.fitted.items():
        pixels = chosen_images(encoder, source, fitted.images, fitted.seed)
        found, *_ = measure_rotations(encoder, rotations, name, pixels)
        rotations.fitted[name] = replace(fitted, measured=found.measured, overall=found.overall)
    rotations.save(folder, half=True)


def record_final(folder: Path, data: DataConfig) -> None:
    """Measure the figures of the end of training on the weights in `folder`; those of training stay."""
    found = measure_final(Site(Encoder.from_folder(folder), inference_accelerator(), data))
    path = folder / "config.json"
    whole = json.loads(path.read_text(encoding="utf-8"))
    training = {k: v for k, v in whole["care"]["results"].items() if k not in FINAL_KEYS}
    whole["care"]["results"] = found | training
    write_text(path, json.dumps(whole, indent=2) + "\n")


if __name__ == "__main__":
    main()
