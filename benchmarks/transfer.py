"""What encoders are worth on images that they were not trained on: probes of the frozen backbone.

    python benchmarks/transfer.py runs/paper/cifar10_small-* --data-root CLOTHING
    python benchmarks/transfer.py resnet10_w16_small.care_shapes --dataset-name org/name

Linear probes for the label (also with 10 % and 1 % of the labels of each class, means over three subsets),
for the color of what is in the middle, and for the mean hue, saturation and brightness of the image. Images
are prepared at the size that the encoder was trained on. Runs of one arm are named alike but for the seed
behind the last hyphen. Writes results/transfer_<data set>.json and the tables in docs/results.md.

The color is a label that follows from the pixels alone. Of the central half of the image (half its height,
half its width) each channel's median is taken. That color is black if its value (HSV) is below 0.25; else, if
its saturation is below 0.15, white from a value of 0.7 on and gray below; else it has the nearest of eight
hues, 45° apart, beginning with red at 0°.

The digits of scikit-learn (1,797 of them, of 8 x 8 pixels) as a folder, every fourth to test:

    python -c "
    from pathlib import Path
    from PIL import Image
    from sklearn.datasets import load_digits
    digits = load_digits()
    for k, (image, label) in enumerate(zip(digits.images, digits.target)):
        folder = Path('digits', 'train' if k % 4 else 'test', str(label))
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((255 - image * 15.9).astype('uint8')).convert('RGB').save(folder / f'{k}.png')"
"""

import re
import statistics

import click
import torch
from paper_table import ARMS
from result_tables import Arms, hardware, recorded, write_results
from torch import Tensor

from care_hub.config import DataConfig, source_name
from care_hub.data.images import InMemoryImages
from care_hub.data.sources import load_splits
from care_hub.encoder import Encoder
from care_hub.errors import CareHubError
from care_hub.evaluate.attributes import attribute_targets, probe_classes, probe_numbers
from care_hub.evaluate.features import embed_view, label_subset, labeled
from care_hub.factory import load_encoder

HUES = ("red", "orange", "lime", "green", "cyan", "blue", "violet", "pink")
COLORS = ("black", "gray", "white", *HUES)


def central_colors(pixels: Tensor) -> Tensor:
    """(N,) indices into COLORS of (N, 3, S, S) uint8 images, by the median of their central half.

    >>> images = torch.tensor([[0, 0, 0], [250, 250, 250], [200, 20, 10], [10, 20, 200]], dtype=torch.uint8)
    >>> [COLORS[k] for k in central_colors(images[:, :, None, None].expand(-1, -1, 8, 8))]
    ['black', 'white', 'red', 'blue']
    """
    margin = pixels.shape[2] // 4
    middle = pixels[:, :, margin : pixels.shape[2] - margin, margin : pixels.shape[3] - margin]
    red, green, blue = rgb = (middle.flatten(2).float() / 255).median(dim=2).values.T
    value, chroma = rgb.amax(dim=0), rgb.amax(dim=0) - rgb.amin(dim=0)
    hue = torch.atan2(3**0.5 * (green - blue), 2 * red - green - blue) / (2 * torch.pi)  # turns
    found = len(COLORS) - len(HUES) + (hue * len(HUES)).round().long() % len(HUES)
    pale = chroma < 0.15 * value
    found[pale] = torch.where(value[pale] < 0.7, COLORS.index("gray"), COLORS.index("white"))
    found[value < 0.25] = COLORS.index("black")
    return found


def measure(encoder: Encoder, train: InMemoryImages, test: InMemoryImages) -> dict[str, float]:
    """Of the probes of the backbone: top-1 in percent for label and color, R² for numbers."""
    x, x_test = (embed_view(encoder, split.pixels, space="backbone") for split in (train, test))
    (labels, numbers), (true_labels, true_numbers) = attribute_targets(train), attribute_targets(test)
    colors, true_colors = central_colors(train.pixels), central_colors(test.pixels)
    label, true_label = labels["label"], true_labels["label"]
    figures = {
        "label_probe": probe_classes(x, label, x_test, true_label),
        "color_backbone": probe_classes(x, colors, x_test, true_colors),
    }
    for percent in (10, 1):
        subsets = [label_subset(label, percent / 100, seed) for seed in range(3)]
        found = [probe_classes(x[few], label[few], x_test, true_label, k) for k, few in enumerate(subsets)]
        figures[f"label_probe_{percent}"] = statistics.mean(found)
    for name in ("hue", "saturation", "brightness"):
        if true_numbers[name].std() < 1e-6:  # as of gray images
            continue
        figures[f"{name}_backbone"] = probe_numbers(x, numbers[name], x_test, true_numbers[name])
    return {name: round(value, 4) for name, value in figures.items()}


def open_images(data: DataConfig, size: int) -> list[InMemoryImages]:
    """Training and test images with labels, in memory. Raises CareHubError where there are none."""
    train, test = load_splits(data, size)
    if test is None:
        raise CareHubError(f"'{data.dataset_name}' has no test split to measure on.")
    return [s.images.take(torch.arange(len(s))) for s in labeled(data.dataset_name, train, test)]


@click.command()
@click.argument("encoders", nargs=-1, required=True)
@click.option("--dataset-name", default="imagefolder", show_default=True)
@click.option("--data-root")
def main(encoders: tuple[str, ...], dataset_name: str, data_root: str | None) -> None:
    data = DataConfig(dataset_name=dataset_name, data_root=data_root)
    titles = {f"{recipe}-{name}": arm.title for recipe, arms in ARMS.items() for name, arm in arms.items()}
    splits: dict[int, list[InMemoryImages]] = {}
    arms: Arms = {}
    for source in encoders:
        encoder = load_encoder(source)
        if (size := encoder.config.image_size) not in splits:
            splits[size] = open_images(data, size)
        name = re.sub(r"-\d+$", "", source_name(source))
        arms.setdefault(titles.get(name, name), []).append(measure(encoder, *splits[size]))
    train, test = splits[size]
    settings = f"{len(train):,} images to train the probes, {len(test):,} to test them, {hardware()}"
    name = f"transfer_{data.data_label.replace('/', '--')}"
    arms = recorded(name, settings) | arms  # those whose runs are gone stay as they were
    click.echo(write_results(name, f"probes on {data.data_label}", settings, arms))


if __name__ == "__main__":
    main()
