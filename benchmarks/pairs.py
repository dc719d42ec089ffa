"""How many pairs of images a rotation needs: the table "How many images" of docs/rotations.md.

    python benchmarks/pairs.py resnet10_w16_small.care_shapes --dataset-name shapes

Mean cosine of R f(x) with f(ax) on 400 images that were not used for fitting, by the number of pairs that
were, and that of f(x) itself. The images are those of the test split, in random order.
"""

import click
import torch.nn.functional as F
from between import Images

from care_hub.config import DataConfig
from care_hub.factory import load_encoder
from care_hub.rotation import Rotation
from care_hub.steering.fitting import chosen_images

CHANGES = ("brightness=1.4", "brightness=0.5", "crop=1.5", "rotation=15", "hue=0.15")
MEASURED, PAIRS = 400, (16, 48, 128, 512, 1600)


@click.command()
@click.argument("encoder")
@click.option("--dataset-name", default="imagefolder", show_default=True)
@click.option("--data-root")
def main(encoder: str, dataset_name: str, data_root: str | None) -> None:
    loaded, data = load_encoder(encoder), DataConfig(dataset_name=dataset_name, data_root=data_root)
    images = Images(loaded, chosen_images(loaded, data, MEASURED + max(PAIRS), seed=0))
    click.echo("| transformation | f(x) itself | " + " | ".join(f"{n:,} pairs" for n in PAIRS) + " |")
    click.echo("|---" * (len(PAIRS) + 2) + "|")
    for text in CHANGES:
        after = images.changed(text)
        queries = [images.z]
        queries += [Rotation.fit(images.z[-n:], after[-n:], special=True)(images.z) for n in PAIRS]
        cosines = [F.cosine_similarity(z[:MEASURED], after[:MEASURED]).mean().item() for z in queries]
        click.echo(f"| {text.replace('=', ' ')} | " + " | ".join(f"{c:.4f}" for c in cosines) + " |")


if __name__ == "__main__":
    main()
