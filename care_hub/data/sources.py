"""Data sets by name, from the Hub or a local copy, as uint8 images of one size.

Small ones are decoded once, into memory; large ones are streamed through loader processes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch
from PIL import Image

from ..config import DataConfig
from ..errors import CareHubError, suggest
from . import shapes
from .decode import square_tensor
from .images import Images, InMemoryImages, StreamedImages, decode_into_memory

if TYPE_CHECKING:
    import datasets

Statistics: TypeAlias = tuple[tuple[float, float, float], tuple[float, float, float]]  # mean, std

# Of the channels, as in the public CARE code.
IMAGENET: Statistics = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR10 = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
CIFAR100 = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
STL10 = (0.4406, 0.4273, 0.3858), (0.2312, 0.2265, 0.2237)

IN_MEMORY_BYTES = 4 << 30  # larger data sets are streamed


@dataclass(frozen=True)
class DatasetSpec:
    """Where a data set is and how it is laid out."""

    hub_id: str | None = None
    image: str | None = None  # the column; None: the first image column
    label: str | None = None  # the column; None: "label", or the first column of class labels
    train: str = "train"  # splits, joined by +
    test: tuple[str, ...] = ("test", "validation", "val", "valid")  # the first that exists
    size: int = 224
    statistics: Statistics = IMAGENET


SPECS = {
    "shapes": DatasetSpec(size=32, statistics=((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))),
    "cifar10": DatasetSpec("uoft-cs/cifar10", "img", "label", size=32, statistics=CIFAR10),
    "cifar100": DatasetSpec("uoft-cs/cifar100", "img", "fine_label", size=32, statistics=CIFAR100),
    "stl10": DatasetSpec("jxie/stl10", "image", "label", "train+unlabeled", size=32, statistics=STL10),
    "imagenet100": DatasetSpec("clane9/imagenet-100", "image", "label"),
    "imagefolder": DatasetSpec(image="image", label="label"),
}


def dataset_spec(name: str) -> DatasetSpec:
    """The layout of a data set, by name or Hub id. Raises CareHubError for an unknown name.

    >>> dataset_spec("cifar10").size
    32
    """
    if name in SPECS:
        return SPECS[name]
    if "/" in name:
        return DatasetSpec(name)
    known = f"{', '.join(SPECS)} or a Hub id like org/name"
    raise CareHubError(f"there is no data set '{name}'{suggest(name, SPECS)}; choose from {known}.")


def load_split(data: DataConfig, split: str, size: int | None = None, progress: bool = True) -> Images | None:
    """The "train" or the "test" split of a data set; None if it has no test split.

    In memory the images have the side `size` (the data set's own by default); streamed, 8/7 of it, the usual
    256 for 224. Raises CareHubError for unknown names, folders or columns, an unreachable Hub, and an image
    that can't be decoded (with `skip_broken_images` its error is in `skipped` instead).

    >>> load_split(DataConfig("shapes"), "test", progress=False).class_names[:3]
    ['circle', 'ring', 'crescent']
    """
    return next(_load(data, [split], size, progress), None)


def load_splits(
    data: DataConfig, size: int | None = None, progress: bool = True
) -> tuple[Images, Images | None]:
    """The training and the test split, as `load_split` gives them.

    A folder is listed once, since that can take minutes.
    """
    images = _load(data, ["train", "test"], size, progress)
    return next(images), next(images, None)


def _load(data: DataConfig, wanted: list[str], size: int | None, progress: bool) -> Iterator[Images]:
    """Those of the `wanted` splits that exist."""
    spec = dataset_spec(data.dataset_name)
    spec = replace(spec, size=size or spec.size)
    if data.dataset_name == "shapes":
        yield from (_render_shapes(split, spec.size) for split in wanted)
        return
    splits = _read_splits(data, spec)
    tests = [name for name in spec.test if name in splits]
    for split in wanted:
        names = spec.train.split("+") if split == "train" else tests[:1]
        if missing := [name for name in names if name not in splits]:
            known = ", ".join(splits)
            raise CareHubError(f"data set '{data.dataset_name}' has no split '{missing[0]}'; it has {known}.")
        if names:
            yield _make_images([splits[name] for name in names], split, data, spec, progress)


def _render_shapes(split: str, size: int) -> InMemoryImages:
    """The embedded data set, without files (`shapes.make` is for users who want it as a table)."""
    factors = shapes.split_factors(split)
    images = [square_tensor(Image.fromarray(image), size) for image in shapes.render(factors)]
    columns = {name: torch.from_numpy(values) for name, values in factors.items()}
    return InMemoryImages(
        size, columns.pop("label"), list(shapes.SHAPES), torch.stack(images), columns=columns
    )


def _read_splits(data: DataConfig, spec: DatasetSpec) -> "datasets.DatasetDict":
    """All splits of a data set that is not embedded, nothing decoded."""
    import datasets

    name, root = data.dataset_name, data.data_root
    if root is None and spec.hub_id is None:
        raise CareHubError(f"`dataset_name='{name}'` needs `data_root`, the folder of the class folders.")
    if root is not None and not Path(root).is_dir():
        raise CareHubError(f"`data_root` '{root}' is not a folder.")
    verbosity = datasets.utils.logging.get_verbosity()
    datasets.utils.logging.set_verbosity_error()
    try:
        if root is None or any(Path(root).rglob("*.parquet")):
            return datasets.load_dataset(str(root or spec.hub_id))
        if name == "imagenet100":
            return datasets.load_dataset("imagefolder", data_files=_imagenet100_files(Path(root)))
        return datasets.load_dataset("imagefolder", data_dir=str(root))
    except CareHubError:
        raise
    except Exception as error:  # the client's many kinds of failure, each with a message
        where = root or f"the Hub ({spec.hub_id}); without a network give a local copy with `data_root`"
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CareHubError(f"data set '{name}' can't be read from {where}: {reason}") from error
    finally:
        datasets.utils.logging.set_verbosity(verbosity)


def _imagenet100_files(root: Path) -> dict[str, list[str]]:
    """The files of ImageNet-100, by split, in class folders named by WordNet ids (of all ImageNet, say)."""
    wanted = Path(__file__).with_name("imagenet100.txt").read_text().split()
    if missing := [synset for synset in wanted if not (root / "train" / synset).is_dir()]:
        lacking = f"{len(missing)} of the 100 class folders of ImageNet-100, e.g. {missing[0]}"
        raise CareHubError(f"'{root / 'train'}' lacks {lacking}.")
    files = {"train": [f"{root}/train/{synset}/*" for synset in wanted]}
    folders = [root / name / synset for name in ("val", "validation") for synset in wanted]
    if validation := [f"{folder}/*" for folder in folders if folder.is_dir()]:
        files["validation"] = validation
    return files


def _make_images(
    parts: list["datasets.Dataset"], split: str, data: DataConfig, spec: DatasetSpec, progress: bool
) -> Images:
    """All parts together, in memory if they fit, else streamed."""
    import datasets

    rows = datasets.concatenate_datasets(parts)
    features = rows.features
    pixels = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    default = "label" if "label" in features else next(iter(classes), None)
    image = data.image_column or spec.image or next(iter(pixels), None)
    label = data.label_column or spec.label or default
    if label not in features and not data.label_column and split == "train":
        label = None
    for kind, column, known in (("image", image, pixels), ("label", label, [None, *features])):
        if column not in known:
            lacking = f"data set '{data.dataset_name}' has no {kind} column '{column}'"
            raise CareHubError(f"{lacking} (its columns: {', '.join(features)}); use `{kind}_column`.")

    labels = class_names = None
    if label is not None:
        labels = torch.as_tensor([-1 if value is None else int(value) for value in rows[label]])
        class_names = features[label].names if label in classes else None

    rows = rows.select_columns([image]).rename_columns({image: "image"})
    rows = rows.cast_column("image", datasets.Image(decode=False))
    fits = len(rows) * 3 * spec.size**2 <= IN_MEMORY_BYTES
    size = spec.size if fits else round(spec.size * 8 / 7)
    images = StreamedImages(size, labels, class_names, rows, data.num_workers, data.skip_broken_images)
    return decode_into_memory(images, f"{data.dataset_name} {split}", progress) if fits else images
