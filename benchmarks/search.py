"""How well search is steered, and told what to ignore or match, by each of several transformations.

    python benchmarks/search.py --dataset-name cifar10 --data-root CIFAR10
    python benchmarks/search.py --dataset-label clothing --data-root CLOTHING/train
    python benchmarks/search.py resnet10_w16_small.care_shapes --dataset-label clothing \\
        --data-root CLOTHING/train

Rotations are those of `care-hub rotations`, fitted to 1,000 images. On others, up to 2,001 of
them:

- "this, brighter": the query is one image, turned by R; to be found is its brighter version,
  among 2,000 other images, itself, and four versions of it. Each of the four is asked for;
  chance among its own is 20 %;
- ignored: how often an image finds its version, changed by a random strength, among the changed
  versions of all; the control leaves out as many directions, those in which embeddings differ
  most;
- matched: how much the five nearest neighbors agree in what the transformation changes;
- the price of both: kNN for the label (20 neighbors, one half of the images for the other).

Writes results/search_<data set>_<encoder>.json and the tables in docs/results.md.
"""

from functools import partial
from tempfile import TemporaryDirectory

import click
import torch
import torch.nn.functional as F
from result_tables import Arms, hardware, write_results
from torch import Tensor

from care_hub.augment import permutation
from care_hub.config import DataConfig, source_name
from care_hub.data.images import InMemoryImages
from care_hub.data.sources import load_split
from care_hub.encoder import Encoder
from care_hub.errors import CareHubError
from care_hub.evaluate.attributes import attribute_targets
from care_hub.evaluate.features import embed_view, random_subset
from care_hub.factory import load_encoder
from care_hub.hub.rotation_set import RotationSet
from care_hub.metrics import knn_top1, r_squared, retrieval
from care_hub.steering.fitting import rotations
from care_hub.transformations import TRANSFORMATIONS, Transformation, position

COLORS = ("brightness", "contrast", "saturation", "hue", "gamma", "white_balance")
ATTRIBUTES = {name: name for name in ("brightness", "contrast", "saturation", "hue")}
ATTRIBUTES |= {"gamma": "brightness", "white_balance": "hue"}
FITTED, OTHERS, QUERIES = 1000, 2000, 500
VERSIONS = 4
VOTES, NEAREST = 20, 5
MEASURES = ("motion", "cosine", "cosine_unrotated", "same_image_hit_at_1", "same_image_hit_at_1_linear")
Row = dict[str, float | None]


def versions(transformation: Transformation) -> list[float]:
    """The default strengths that are nearest to the unchanged image, at most four."""

    def distance(strength: float) -> float:
        scale, neutral = transformation.scale, transformation.neutral
        return abs(position(scale, strength) - position(scale, neutral))

    return sorted(transformation.strengths, key=distance)[:VERSIONS]


def steered(found: RotationSet, name: str, z: Tensor, changed: dict[float, Tensor]) -> Row:
    """In percent: the version that was asked for on top, and any version of the query on top.

    `z` (N, d): all images; `changed`: strength -> (Q, d), the first Q of them changed by it.
    """
    rows: dict[str, list[Tensor]] = {}
    count = len(next(iter(changed.values())))
    own = torch.stack([z[:count], *changed.values()], dim=1)  # (Q, 1 + K, d)
    for k, strength in enumerate(changed, 1):
        for key, query in {"": found[name, strength](z[:count]), "_unsteered": z[:count]}.items():
            others = query @ z.T
            others[torch.arange(count), torch.arange(count)] = -1  # the query is one of its own versions
            similarity = (own @ query[:, :, None])[:, :, 0]
            first = similarity.max(dim=1)
            above = first.values > others.max(dim=1).values
            rows.setdefault(f"search_exact{key}", []).append(above & (first.indices == k))
            rows.setdefault(f"search_version{key}", []).append(above)
    return {key: 100 * torch.stack(hits).float().mean().item() for key, hits in rows.items()}


def without_control(z: Tensor, count: int) -> Tensor:
    """(d, d): leaves out the `count` directions in which `z` (N, d) varies most."""
    *_, directions = torch.linalg.svd(z - z.mean(dim=0), full_matrices=False)
    return torch.eye(z.shape[1]) - directions[:count].T @ directions[:count]


def found_changed(z: Tensor, changed: Tensor) -> float:
    """In percent: z[i] finds changed[i] among all `changed` (N, d)."""
    return 100 * retrieval(z, changed)["hit_at_1"].mean().item()


def agreement(z: Tensor, values: Tensor) -> tuple[float, float]:
    """How well the mean of the nearest neighbors predicts `values` (N, k): R²; and their squared distance,
    relative to that of any two images.
    """
    similarity = z @ z.T
    near = values[similarity.fill_diagonal_(-2).topk(NEAREST, dim=1).indices]  # (N, NEAREST, k)
    distance = (near - values[:, None]).square().sum(dim=2).mean()
    return r_squared(near.mean(dim=1), values), (distance / (2 * values.var(dim=0).sum())).item()


def half_knn(z: Tensor, labels: Tensor) -> float:
    """Top-1 in percent of kNN, the first half of the images being the neighbors of the second."""
    half = len(z) // 2
    return knn_top1(z[:half], labels[:half], z[half:], labels[half:], VOTES)


def randomly_changed(encoder: Encoder, pixels: Tensor, transformation: Transformation) -> Tensor:
    """(N, d): embeddings of the images, each changed by a strength of its own out of the whole range."""
    grid = transformation.grid()
    turn = permutation(len(pixels), 0, "strengths") % len(grid)
    z = torch.empty(len(pixels), encoder.embed(pixels[:1]).shape[1])
    for k, strength in enumerate(grid):
        z[turn == k] = embed_view(encoder, pixels[turn == k], partial(transformation, strength=strength))
    return z


def measure(
    encoder: Encoder, found: RotationSet, name: str, fitted: Tensor, images: InMemoryImages, z: Tensor
) -> Row:
    """The rows of one transformation; `z` (N, d) are of `images`, `fitted` (F, d) of those that fitted it."""
    transformation, about = TRANSFORMATIONS[name], found.fitted[name]
    row: Row = {key: about.overall[key][0] for key in MEASURES}
    changed = {
        strength: embed_view(encoder, images.pixels[:QUERIES], partial(transformation, strength=strength))
        for strength in versions(transformation)
    }
    row |= steered(found, name, z, changed)
    directions = found.moved[name].shape[1]
    kept = {
        "": torch.eye(z.shape[1]),
        "_ignored": found.projector(ignore=[name]).float(),
        "_control": without_control(fitted, directions),
        "_matched": found.projector(match=[name]).float(),
    }
    spaces = {key: F.normalize(z @ p, dim=1) for key, p in kept.items()}
    other = randomly_changed(encoder, images.pixels, transformation)
    row["directions"] = directions
    for key in ("", "_ignored", "_control"):
        row[f"found{key}"] = found_changed(spaces[key], F.normalize(other @ kept[key], dim=1))
    _, numbers = attribute_targets(images)
    for key in ("", "_matched"):
        values = numbers.get(ATTRIBUTES.get(name, ""))
        r2, distance = (None, None) if values is None else agreement(spaces[key], values)
        row |= {f"agreement{key}": r2, f"distance{key}": distance}
    assert images.labels is not None
    row |= {f"knn{key}": half_knn(spaces[key], images.labels) for key in ("", "_ignored", "_matched")}
    return {key: value if value is None else float(f"{value:.5g}") for key, value in row.items()}


@click.command()
@click.argument("encoder", default="resnet10_w16_small.care_cifar10_color")
@click.option("--dataset-name", default="imagefolder", show_default=True)
@click.option("--data-root")
@click.option("--dataset-label", help="a name for the data set; default: that of its folder")
@click.option("--transform", "names", multiple=True, type=click.Choice([*TRANSFORMATIONS]), default=COLORS)
def main(
    encoder: str,
    dataset_name: str,
    data_root: str | None,
    dataset_label: str | None,
    names: tuple[str, ...],
) -> None:
    data = DataConfig(dataset_name=dataset_name, data_root=data_root, dataset_label=dataset_label)
    loaded = load_encoder(encoder)
    size = loaded.config.image_size
    split = load_split(data, "test", size) or load_split(data, "train", size)
    if split is None or split.labels is None:
        raise CareHubError(f"'{data.dataset_name}' has no labels, which this needs.")
    fitted = min(FITTED, len(split) // 3)
    with TemporaryDirectory() as folder:
        found = rotations(encoder, data=data, transforms=names, limit=2 * fitted, output_dir=folder)
    assert found is not None
    # In the order in which `rotations` takes them, the first half of `limit` being for fitting.
    rows = random_subset(len(split), fitted + OTHERS + 1)
    images = split.take(rows[fitted:])
    z_fit, z = (embed_view(loaded, x) for x in (split.take(rows[:fitted]).pixels, images.pixels))
    arms: Arms = {}
    for name in names:
        verdict = "steerable" if found.fitted[name].steerable else "not steerable"
        arms[f"{name}, {verdict}"] = [measure(loaded, found, name, z_fit, images, z)]
    label, source = data.data_label, source_name(encoder)
    settings = f"{source}, fitted to {fitted:,} images, on {len(images):,} others, {hardware()}"
    name = f"search_{label}_{source}".replace("/", "--")
    click.echo(write_results(name, f"search, {label}", settings, arms))


if __name__ == "__main__":
    main()
