"""Make a run an encoder of the package: half as many bytes, no head but the one that rotates, measured anew.

    python benchmarks/ship.py runs/zoo/color resnet10_w16_small.care_cifar10_color \
        --dataset-name cifar10 --data-root CIFAR10 --transform hue --transform white_balance

Writes care_hub/pretrained/NAME, without pictures and without what SentenceTransformer reads, which is another
copy of the head: saving and pushing make it. With --transform there are rotations, too, of the test images
or of --images. Every figure of its card is measured on weights and rotations as they are stored there, as
`care-hub verify NAME` does again. With --hidden the projection head is a smaller one that was fitted to give
the same embeddings of views of the training images. With NAME for the run, too, its weights stay as they are,
and of the rest only the figures of the end of training and rotations are measured.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from paper_table import run_command
from result_tables import ROOT

from care_hub.augment import AugmentationConfig, apply, center_crop, sample, seeded_generator
from care_hub.config import DataConfig
from care_hub.data.sources import load_splits
from care_hub.distributed import inference_accelerator
from care_hub.encoder import Encoder, projection_head
from care_hub.evaluate.features import CHUNK, embed_spaces, recorded_augmentation
from care_hub.files import write_text
from care_hub.hub import sentence_transformer
from care_hub.hub.card import write_card
from care_hub.hub.registry import SHIPPED
from care_hub.hub.rotation_set import FILE_NAME, RotationSet
from care_hub.steering.fitting import chosen_images, measure_rotations
from care_hub.verify import FINAL_KEYS, Site, measure_final

FITTING_EPOCHS, FITTING_BATCH = 30, 1000  # of a smaller head


@click.command()
@click.argument("run")
@click.argument("name")
@click.option("--dataset-name", required=True)
@click.option("--data-root")
@click.option("--transform", "transforms", multiple=True, help="as of `care-hub rotations`")
@click.option("--images", type=click.Path(exists=True), help="as of `care-hub rotations`")
@click.option("--limit", default=2000, show_default=True, help="as of `care-hub rotations`")
@click.option("--hidden", type=int, help="units of a smaller projection head")
def main(
    run: str,
    name: str,
    dataset_name: str,
    data_root: str | None,
    transforms: tuple[str, ...],
    images: str | None,
    limit: int,
    hidden: int | None,
) -> None:
    folder, training = SHIPPED / name, DataConfig(dataset_name, data_root)
    if run != name:
        encoder = Encoder.from_pretrained(run)
        store(with_smaller_head(encoder, training, hidden) if hidden else encoder, folder)
    record_final(folder, training)
    data = ["--dataset-name", dataset_name]
    data += ["--data-root", str(Path(data_root).absolute())] if data_root else []
    if run != name:
        run_command(ROOT / "eval_linear.py", "--encoder", folder, *data)
        run_command("-m", "care_hub", "knn", folder, *data)
        run_command("-m", "care_hub", "equivariance", folder, *data)
    if transforms:
        words = [word for text in transforms for word in ("--transform", text)]
        source = ["--images", Path(images).absolute()] if images else data
        run_command("-m", "care_hub", "rotations", folder, *source, *words, "--limit", limit)
        halve_rotations(folder, images or training)
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


def with_smaller_head(encoder: Encoder, data: DataConfig, hidden: int) -> Encoder:
    """The encoder with a head of `hidden` units, fitted to the embeddings that its own gives.

    Of all training images: as they are, and under random changes of color and the contrastive
    augmentation, two of each.
    """
    size = encoder.config.image_size
    train, _ = load_splits(data, size)
    recipe = recorded_augmentation(encoder.config)
    colors = AugmentationConfig(
        size, (1, 1), (1, 1), flip=0, jitter=(0.4, 0.4, 0.4, 0.5), jitter_p=1, grayscale=0, blur=0
    )
    found = []
    for k, kind in enumerate((None, colors, colors, recipe, recipe)):
        for chunk, index in enumerate(torch.arange(len(train)).split(CHUNK)):
            x = train.take(index).pixels
            if kind:
                params = sample(kind, len(x), *x.shape[2:], seeded_generator(0, "head", k, chunk))
            x = apply(x, params, kind) if kind else center_crop(x, size)
            spaces = embed_spaces(encoder, x)
            found.append((spaces["backbone"], spaces["projection"]))
    h, z = map(torch.cat, zip(*found, strict=True))
    torch.manual_seed(0)
    shape = replace(encoder.config.projection, hidden=hidden)
    head = projection_head(shape)
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-3)
    steps = FITTING_EPOCHS * (len(h) // FITTING_BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        index = torch.randint(len(h), (FITTING_BATCH,))
        loss = 1 - F.cosine_similarity(head(h[index]), z[index]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 1000 == 0:
            click.echo(
                f"head of {hidden}, step {step:,} of {steps:,}: 1 - cosine {loss.item():.4f}", err=True
            )
    encoder.config, encoder.projection = replace(encoder.config, projection=shape), head.eval()
    return encoder


def store(encoder: Encoder, folder: Path) -> None:
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
