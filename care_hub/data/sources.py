"""Data sets by name, from the Hub or a local copy, as uint8 images of one size.

Small ones are decoded once, into memory; large ones are streamed through loader processes.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..config import DataConfig
from ..errors import CareHubError, suggest
from . import shapes
from .decode import resize_and_center_crop, to_rgb
from .images import Images, InMemoryImages, StreamedImages, decode_into_memory

if TYPE_CHECKING:
    import datasets

Statistics: TypeAlias = tuple[tuple[float, float, float], tuple[float, float, float]]  # mean, std

IMAGENET: Statistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
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


# Statistics are those of the public CARE code.
SPECS = {
    "shapes": DatasetSpec(
        image="image",
        label="label",
        size=32,
        statistics=((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
    ),
    "cifar10": DatasetSpec(
        hub_id="uoft-cs/cifar10",
        image="img",
        label="label",
        size=32,
        statistics=((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    ),
    "cifar100": DatasetSpec(
        hub_id="uoft-cs/cifar100",
        image="img",
        label="fine_label",
        size=32,
        statistics=((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    ),
    "stl10": DatasetSpec(
        hub_id="jxie/stl10",
        image="image",
        label="label",
        train="train+unlabeled",
        size=32,
        statistics=((0.4406, 0.4273, 0.3858), (0.2312, 0.2265, 0.2237)),
    ),
    "imagenet100": DatasetSpec(hub_id="clane9/imagenet-100", image="image", label="label"),
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
        return DatasetSpec(hub_id=name)
    raise CareHubError(
        f"there is no data set '{name}'{suggest(name, SPECS)}; choose from {', '.join(SPECS)} "
        "or give a Hub id like org/name."
    )


def load_split(data: DataConfig, split: str, size: int | None = None, progress: bool = True) -> Images | None:
    """The "train" or the "test" split of a data set; None if it has no test split.

    In memory the images have the side `size` (the data set's own by default); streamed, 8/7 of it, the usual
    256 for 224. Raises CareHubError for unknown names, folders or columns, an unreachable Hub, and an image
    that can't be decoded (with `skip_broken_images` its error is in `skipped` instead).

    >>> load_split(DataConfig("shapes"), "test", progress=False).class_names[:3]
    ['circle', 'ring', 'crescent']
    """
    spec = _spec_of_size(data, size)
    if data.dataset_name == "shapes":
        return _render_shapes(split, spec.size)
    splits = _read_splits(data, spec)
    rows = _train_rows(splits, data, spec) if split == "train" else _test_rows(splits, spec)
    return None if rows is None else _make_images(rows, split, data, spec, progress)


def load_splits(
    data: DataConfig, size: int | None = None, progress: bool = True
) -> tuple[Images, Images | None]:
    """The training and the test split, as `load_split` gives them.

    A folder is listed once, since that can take minutes.
    """
    spec = _spec_of_size(data, size)
    if data.dataset_name == "shapes":
        return _render_shapes("train", spec.size), _render_shapes("test", spec.size)
    splits = _read_splits(data, spec)
    train = _make_images(_train_rows(splits, data, spec), "train", data, spec, progress)
    rows = _test_rows(splits, spec)
    return train, None if rows is None else _make_images(rows, "test", data, spec, progress)


def _spec_of_size(data: DataConfig, size: int | None) -> DatasetSpec:
    spec = dataset_spec(data.dataset_name)
    return replace(spec, size=size or spec.size)


def _render_shapes(split: str, size: int) -> InMemoryImages:
    """The embedded data set, without files (`shapes.make` is for users who want it as a table)."""
    factors = shapes.split_factors(split)
    rendered = shapes.render(factors)
    if size != shapes.SIDE:
        resized = [resize_and_center_crop(to_rgb(image), size) for image in rendered]
        rendered = np.stack([np.asarray(image) for image in resized])
    pixels = torch.from_numpy(rendered).permute(0, 3, 1, 2).contiguous()
    columns = {name: torch.from_numpy(values) for name, values in factors.items()}
    return InMemoryImages(size, columns.pop("label"), list(shapes.SHAPES), pixels, columns=columns)


def _read_splits(data: DataConfig, spec: DatasetSpec) -> "datasets.DatasetDict":
    """All splits of a data set that is not embedded, nothing decoded."""
    import datasets

    _check_place(data, spec)
    verbosity = datasets.utils.logging.get_verbosity()
    datasets.utils.logging.set_verbosity_error()
    try:
        return _load_dataset(data, spec)
    except CareHubError:
        raise
    except Exception as error:  # the client's many kinds of failure, each with a message
        hub = f"the Hub ({spec.hub_id}); without a network give a local copy with `data_root`"
        raise CareHubError(
            f"data set '{data.dataset_name}' can't be read from {data.data_root or hub}: {_first_line(error)}"
        ) from error
    finally:
        datasets.utils.logging.set_verbosity(verbosity)


def _check_place(data: DataConfig, spec: DatasetSpec) -> None:
    if data.data_root is None and spec.hub_id is None:
        raise CareHubError(
            f"`dataset_name='{data.dataset_name}'` needs `data_root`, the folder that holds one sub-folder "
            "of images per class."
        )
    if data.data_root is not None and not Path(data.data_root).is_dir():
        raise CareHubError(f"`data_root` '{data.data_root}' is not a folder.")


def _load_dataset(data: DataConfig, spec: DatasetSpec) -> "datasets.DatasetDict":
    """From the Hub, from a folder in the Hub's parquet layout, or from class folders."""
    from datasets import load_dataset

    if data.data_root is None:
        return load_dataset(spec.hub_id)
    root = Path(data.data_root)
    if any(root.rglob("*.parquet")):
        return load_dataset(str(root))
    if data.dataset_name == "imagenet100":
        return load_dataset("imagefolder", data_files=_imagenet100_files(root))
    return load_dataset("imagefolder", data_dir=str(root))


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _imagenet100_files(root: Path) -> dict[str, list[str]]:
    """The files of ImageNet-100, by split, in class folders named by WordNet ids (of all ImageNet, say)."""
    wanted = (Path(__file__).parent / "imagenet100.txt").read_text().split()

    def folders(*names: str) -> list[Path]:
        candidates = [root / name / synset for name in names for synset in wanted]
        return [folder for folder in candidates if folder.is_dir()]

    train, validation = folders("train"), folders("val", "validation")
    present = {folder.name for folder in train}
    missing = [synset for synset in wanted if synset not in present]
    if missing:
        raise CareHubError(
            f"'{root / 'train'}' lacks {len(missing)} of the 100 class folders of ImageNet-100, "
            f"e.g. {missing[0]}."
        )
    found = {"train": train, "validation": validation}
    return {split: [str(folder / "*") for folder in some] for split, some in found.items() if some}


def _train_rows(splits: "datasets.DatasetDict", data: DataConfig, spec: DatasetSpec) -> "datasets.Dataset":
    from datasets import concatenate_datasets

    names = spec.train.split("+")
    for name in names:
        if name not in splits:
            raise CareHubError(
                f"data set '{data.dataset_name}' has no split '{name}'; it has {', '.join(splits)}."
            )
    return splits[names[0]] if len(names) == 1 else concatenate_datasets([splits[name] for name in names])


def _test_rows(splits: "datasets.DatasetDict", spec: DatasetSpec) -> "datasets.Dataset | None":
    names = [name for name in spec.test if name in splits]
    return splits[names[0]] if names else None


def _make_images(
    rows: "datasets.Dataset", split: str, data: DataConfig, spec: DatasetSpec, progress: bool
) -> Images:
    """In memory if they fit, else streamed."""
    from datasets import Image

    image = _image_column(rows.features, data, spec)
    label = _label_column(rows.features, data, spec, required=split == "test")
    labels, class_names = _labels(rows, label)
    cells = rows.select_columns([image]).rename_columns({image: "image"})
    images = StreamedImages(
        size=spec.size,
        labels=labels,
        class_names=class_names,
        rows=cells.cast_column("image", Image(decode=False)),
        workers=data.num_workers,
        skip_broken=data.skip_broken_images,
    )
    if len(images) * 3 * spec.size**2 > IN_MEMORY_BYTES:
        images.size = round(spec.size * 8 / 7)
        return images
    return decode_into_memory(images, f"{data.dataset_name} {split}", progress)


def _image_column(features: "datasets.Features", data: DataConfig, spec: DatasetSpec) -> str:
    from datasets import Image

    found = [name for name, feature in features.items() if isinstance(feature, Image)]
    column = data.image_column or spec.image or next(iter(found), None)
    if column is None or column not in found:
        raise CareHubError(
            f"data set '{data.dataset_name}' has no image column '{column}' "
            f"(its columns: {', '.join(features)}); use `image_column`."
        )
    return column


def _label_column(
    features: "datasets.Features", data: DataConfig, spec: DatasetSpec, required: bool
) -> str | None:
    """None if there is no label column, and it was neither asked for nor `required`."""
    from datasets import ClassLabel

    found = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    default = "label" if "label" in features else next(iter(found), None)
    column = data.label_column or spec.label or default
    if column is None or column in features:
        return column
    if data.label_column or required:
        raise CareHubError(
            f"data set '{data.dataset_name}' has no label column '{column}' "
            f"(its columns: {', '.join(features)}); use `label_column`."
        )
    return None


def _labels(rows: "datasets.Dataset", column: str | None) -> tuple[Tensor | None, list[str] | None]:
    """The class of each image, -1 where it has none, and the names of the classes."""
    from datasets import ClassLabel

    if column is None:
        return None, None
    feature = rows.features[column]
    labels = torch.as_tensor([-1 if label is None else int(label) for label in rows[column]])
    return labels, feature.names if isinstance(feature, ClassLabel) else None
