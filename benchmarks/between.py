"""Rotations of strengths in between, and of two changes one after the other, against a rotation fitted there.

    python benchmarks/between.py --dataset-name cifar10 --data-root CIFAR10
    python benchmarks/between.py resnet10_w16_small.care_shapes --dataset-name shapes

Each seed divides 2,000 images of the test split anew: one half fits, the other is measured. Mean cosines
with the embeddings f(ax) of images that were really changed, of f(x) itself, of the rotation that was
fitted to a, and of what stands in for it:

- between two neighboring strengths, half-way on their scale, the geodesic from one fit to the other
  (`RotationSet`). The unchanged image is a strength too, whose rotation is I;
- for two changes one after the other, the product of the rotations fitted to each.

Lost is the second cosine less the third; a row says whether it is within 0.02 (mean over the seeds).

Writes results/between_<data set>_<encoder>.json and the tables in docs/results.md.
"""

import math
import statistics
from dataclasses import dataclass
from functools import cache, partial, reduce
from itertools import pairwise

import click
import torch
import torch.nn.functional as F
from result_tables import Arms, hardware, write_results
from torch import Tensor

from care_hub import __version__
from care_hub.config import DataConfig, source_name
from care_hub.encoder import Encoder
from care_hub.evaluate.features import embed_view, random_subset
from care_hub.factory import load_encoder
from care_hub.hub.rotation_set import FittedTransformation, RotationSet
from care_hub.rotation import Rotation
from care_hub.steering.fitting import chosen_images
from care_hub.transformations import parse

BOUND = 0.02
# The strengths that are fitted by default, some that are further from each other.
STRENGTHS = ("brightness", "contrast", "saturation", "hue", "gamma", "white_balance", "blur", "rotation")
STRENGTHS += ("saturation=0,0.5", "hue=-0.15,0.15", "hue=-0.3,0.3", "white_balance=-0.5,0.5")
CHAINS = ("brightness=1.4+hue=0.15", "brightness=0.7+rotation=15", "saturation=0.5+crop=1.2")
CHAINS += ("blur=4+brightness=0.7", "gamma=1.4+white_balance=0.5", "saturation=1.5+brightness=0.7")
CHAINS += ("hue=0.3+saturation=0.5", "hue=0.15+white_balance=0.25", "contrast=0.7+brightness=1.4")
TRANSFORMS = (*STRENGTHS, *CHAINS)
Row = dict[str, float]


class Images:
    """N images, their embeddings `z` (N, d), and those after changes."""

    def __init__(self, encoder: Encoder, pixels: Tensor) -> None:
        space = "backbone" if encoder.projection is None else "projection"
        self.embed = partial(embed_view, encoder, pixels, space=space)
        self.z = F.normalize(self.embed(), dim=1)
        self.changed = cache(self._changed)

    def _changed(self, text: str) -> Tensor:
        """(N, d): after a change of one strength or a chain, as `parse` takes it."""
        a, (strength,) = parse(text)
        return F.normalize(self.embed(partial(a, strength=strength)), dim=1)


@dataclass(frozen=True)
class Split:
    images: Images
    fitting: Tensor  # indices
    measured: Tensor

    def fit(self, text: str) -> Rotation:
        changed = self.images.changed(text)
        return Rotation.fit(self.images.z[self.fitting], changed[self.fitting], special=True)

    def row(self, text: str, combined: Rotation) -> Row:
        """How near to the changed images f(x), the rotation fitted to them, and `combined` lead."""
        before, after = self.images.z[self.measured], self.images.changed(text)[self.measured]
        turned = {"itself": before, "fitted": self.fit(text)(before), "combined": combined(before)}
        row = {f"of_{key}": F.cosine_similarity(z, after).mean().item() for key, z in turned.items()}
        row["of_lost"] = row["of_fitted"] - row["of_combined"]
        return {key: float(f"{value:.5g}") for key, value in row.items()}


def between(split: Split, text: str) -> dict[str, Row]:
    """Rows of the strengths half-way between those of `text`, as `parse` takes it."""
    a, strengths = parse(text)
    matrices = torch.stack([split.fit(f"{a.name}={strength}").matrix for strength in strengths])
    about = (a.name, a.meaning, a.scale, a.neutral, list(strengths), [], {}, 0, "", 0, __version__)
    found = RotationSet({a.name: FittedTransformation(*about)}, {a.name: matrices})
    rows = {}
    for low, high in pairwise(sorted([*strengths, a.neutral])):
        middle = math.sqrt(low * high) if a.scale == "log" else (low + high) / 2
        title = f"{a.name} {middle:.3g}, between {low:g} and {high:g}"
        rows[title] = split.row(f"{a.name}={middle}", found[a.name, middle])
    return rows


def one_after_the_other(split: Split, text: str) -> dict[str, Row]:
    """The row of a chain, as `parse` takes it."""
    parts = text.split("+")
    product = reduce(lambda done, then: then @ done, map(split.fit, parts))
    return {", then ".join(parts).replace("=", " "): split.row(text, product)}


def with_verdict(title: str, rows: list[Row]) -> str:
    within = statistics.mean(row["of_lost"] for row in rows) <= BOUND
    return f"{title}: {'within' if within else 'beyond'} {BOUND}"


@click.command()
@click.argument("encoder", default="resnet10_w16_small.care_cifar10_color")
@click.option("--dataset-name", default="imagefolder", show_default=True)
@click.option("--data-root")
@click.option("--images", default=1000, show_default=True, help="that fit, and as many that are measured")
@click.option("--seeds", default=10, show_default=True)
@click.option("--transform", "texts", multiple=True, default=TRANSFORMS, help="as of `care-hub rotations`")
def main(
    encoder: str,
    dataset_name: str,
    data_root: str | None,
    images: int,
    seeds: int,
    texts: tuple[str, ...],
) -> None:
    data, loaded = DataConfig(dataset_name=dataset_name, data_root=data_root), load_encoder(encoder)
    chosen = Images(loaded, chosen_images(loaded, data, 2 * images, seed=0))
    found: dict[str, list[Row]] = {}
    for seed in range(seeds):
        split = Split(chosen, *random_subset(len(chosen.z), len(chosen.z), seed).tensor_split(2))
        rows: dict[str, Row] = {}
        for text in texts:
            rows |= one_after_the_other(split, text) if "+" in text else between(split, text)
        for title, row in rows.items():
            found.setdefault(title, []).append(row)
    arms: Arms = {with_verdict(title, rows): rows for title, rows in found.items()}
    label, source = data.data_label, source_name(encoder)
    halves = f"fitted to {len(split.fitting):,} images, on {len(split.measured):,} others"
    name, heading = f"between_{label}_{source}", f"in between, and one after the other, {label}"
    settings = f"{source}, {halves}, {hardware()}"
    click.echo(write_results(name.replace("/", "--"), heading, settings, arms, arms_are_lines=True))


if __name__ == "__main__":
    main()
