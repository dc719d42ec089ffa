"""Data sets by name, from the Hub or a local copy, as uint8 images of one size.

Small ones are decoded once, into memory; large ones are streamed through loader processes.
"""

import glob
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from PIL import Image

from ..config import LARGEST_IMAGE, DataConfig
from ..errors import CareHubError, suggest
from . import shapes
from .decode import find_images, say_once, square_tensor
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
CLASS_TYPES = ("string", "large_string", "int", "uint", "float", "bool", "decimal", "null")  # of columns
MANY_CLASSES = 100_000  # labels from here on are ids, whose classes are counted


@dataclass(frozen=True)
class DatasetSpec:
    """Where a data set is and how it is laid out."""

    hub_id: str | None = None
    image: str | None = None  # the column; None: the first column of images
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
    "imagefolder": DatasetSpec(),
}

SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_OF = {word: split for split, words in SPLIT_WORDS.items() for word in words}


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


def recorded_options(data: DataConfig) -> dict[str, Any]:
    """`{"data": ...}` with what `data_of` takes beside the label to read the same images; often nothing.

    >>> recorded_options(DataConfig("cifar10")), recorded_options(DataConfig("a/pets", label_column="kind"))
    ({}, {'data': {'label_column': 'kind'}})
    """
    published = [f for f in fields(DataConfig) if f.metadata["published"]]
    found = {f.name: value for f in published if (value := getattr(data, f.name)) != f.default}
    if found["dataset_name"] == _name_of(data.data_label):
        del found["dataset_name"]
    return {"data": found} if found else {}


def data_of(label: str, options: Mapping[str, Any], root: str | None = None) -> DataConfig:
    """The data set that heads, records and cards call `label`; `root`: where a copy of it is.

    `options`: the "data" of `recorded_options`, maybe a stranger's. Raises CareHubError for those that
    can't be.

    >>> data_of("birds", {}).dataset_name, data_of("cifar10", {"label_column": "fine"}).label_column
    ('imagefolder', 'fine')
    """
    known = {f.name for f in fields(DataConfig) if f.metadata["published"]}
    given = {"dataset_name": _name_of(label)} | {k: v for k, v in options.items() if k in known}
    return DataConfig(**given, data_root=root, dataset_label=label)


def _name_of(label: str) -> str:
    """The name of the data set called `label`, where nothing else is recorded."""
    return label if label in SPECS or "/" in label else "imagefolder"


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
    data: DataConfig, size: int | None = None, progress: bool = True, decode: bool = True
) -> tuple[Images, Images | None]:
    """The training and the test split, as `load_split` gives them.

    A folder is listed once, since that can take minutes. Without `decode` no image is read: those in
    memory are black.
    """
    images = _load(data, ["train", "test"], size, progress, decode)
    return next(images), next(images, None)


def _load(
    data: DataConfig, wanted: list[str], size: int | None, progress: bool, decode: bool = True
) -> Iterator[Images]:
    """Those of the `wanted` splits that exist."""
    spec = dataset_spec(data.dataset_name)
    spec = replace(spec, size=size or spec.size)
    if not 1 <= spec.size <= LARGEST_IMAGE:
        raise CareHubError(f"`image_size` must lie in [1, {LARGEST_IMAGE}], got {spec.size}.")
    if odd := {*wanted} - {"train", "test"}:
        raise CareHubError(f"there is no split '{min(odd)}'; choose 'train' or 'test'.")
    if data.dataset_name == "shapes":
        yield from (_render_shapes(split, spec.size, decode) for split in wanted)
        return
    splits = _read_splits(data, spec)
    image, label = _choose_columns(splits, data, spec)
    classes = _find_classes(splits, label, data)
    tests = [name for name in spec.test if name in splits][:1]
    unused = splits.keys() - {*spec.train.split("+"), *tests}
    if unused and len(wanted) > 1:
        counts = ", ".join(f"{name} ({len(splits[name])} images)" for name in sorted(unused))
        say_once(f"splits of '{data.dataset_name}' that are not used: {counts}")
    for split in wanted:
        names = spec.train.split("+") if split == "train" else tests
        if missing := [name for name in names if name not in splits]:
            known = ", ".join(splits)
            raise CareHubError(f"data set '{data.dataset_name}' has no split '{missing[0]}'; it has {known}.")
        if names:
            parts = [splits[name] for name in names]
            yield _make_images(parts, image, classes, split, data, spec, progress, decode)


def _render_shapes(split: str, size: int, decode: bool) -> InMemoryImages:
    """The embedded data set, without files (`shapes.make` is for users who want it as a table)."""
    factors = shapes.split_factors(split)
    columns = {name: torch.from_numpy(values) for name, values in factors.items()}
    labels, names = columns.pop("label"), list(shapes.SHAPES)
    if not decode:
        return InMemoryImages(size, labels, names, _black(len(labels), size), columns=columns)
    images = [square_tensor(Image.fromarray(image), size) for image in shapes.render(factors)]
    return InMemoryImages(size, labels, names, torch.stack(images), columns=columns)


def _black(count: int, size: int) -> torch.Tensor:
    """(count, 3, size, size) uint8, all of them the same byte of memory."""
    return torch.zeros(1, dtype=torch.uint8).expand(count, 3, size, size)


def _read_splits(data: DataConfig, spec: DatasetSpec) -> "datasets.DatasetDict":
    """All splits of a data set that is not embedded, nothing decoded."""
    import datasets

    name, root = data.dataset_name, data.data_root
    if root is None and spec.hub_id is None:
        raise CareHubError(f"`dataset_name='{name}'` needs `data_root`, the folder of the class folders.")
    if root is not None:
        if not os.path.isdir(root):
            raise CareHubError(f"`data_root` '{root}' is not a folder.")
        root = os.path.abspath(root)  # libraries take ".", "parquet" or "~" for something else
    verbosity = datasets.utils.logging.get_verbosity()
    datasets.utils.logging.set_verbosity(logging.CRITICAL)
    try:
        if root is None:
            return datasets.load_dataset(spec.hub_id)
        if any(_has_images(path) for path in Path(root).rglob("*.parquet") if path.is_file()):
            return _read_parquet(root)
        below = _imagenet100_folders(root) if name == "imagenet100" else ("",)
        return _read_class_folders(root, below)
    except CareHubError:
        raise
    except Exception as error:  # the client's many kinds of failure, each with a message
        where = root or f"the Hub ({spec.hub_id}); without a network give a local copy with `data_root`"
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CareHubError(f"data set '{name}' can't be read from {where}: {reason}") from error
    finally:
        datasets.utils.logging.set_verbosity(verbosity)


def _has_images(table: Path) -> bool:
    """Whether a parquet file has images in it, unlike one of embeddings, say, in a folder of images."""
    import datasets
    import pyarrow.parquet as pq

    features = datasets.Features.from_arrow_schema(pq.read_schema(table)).values()
    return any(isinstance(feature, datasets.Image) or _holds_files(feature) for feature in features)


def _read_parquet(root: str) -> "datasets.DatasetDict":
    """A local copy in parquet files; splits with unlike columns are read one by one."""
    import datasets

    pattern = glob.escape(root)
    if pattern == root:  # else the client takes the path for a pattern
        try:
            return datasets.load_dataset(root)
        except datasets.exceptions.DatasetGenerationError:
            pass
    splits = datasets.load_dataset_builder("parquet", data_dir=pattern).config.data_files
    read = partial(datasets.load_dataset, "parquet", split="train")
    return datasets.DatasetDict(
        {split: read(data_files=[glob.escape(file) for file in files]) for split, files in splits.items()}
    )


def _read_class_folders(root: str, below: Sequence[str] = ("",)) -> "datasets.DatasetDict":
    """The images of class folders as tables of paths and labels; `below` as in `find_images`.

    If every folder with images in `root` has the name of a split, these are the splits; else all is one.
    The folders directly in a split are the classes, also of what is in folders below them. An image beside
    them has no label, and one folder alone is no class.
    """
    import datasets
    import pyarrow as pa

    paths, prefix = find_images(root, below), os.path.join(root, "")
    folders = [path.removeprefix(prefix).split(os.sep)[:-1] for path in paths]
    tops = {names[0] for names in folders if names}
    others = sorted(top for top in tops if top.lower() not in SPLIT_OF)
    depth = 1 if tops and not others else 0
    if others and len(others) < len(tops):
        splits = ", ".join(sorted(tops.difference(others)))
        say_once(f"'{root}' is one split, for its folder '{others[0]}' is none; classes too: {splits}")

    found: dict[str, tuple[list[str], list[str | None]]] = {split: ([], []) for split in SPLIT_WORDS}
    for path, names in zip(paths, folders, strict=True):
        if len(names) >= depth:
            files, classes = found[SPLIT_OF[names[0].lower()] if depth else "train"]
            files.append(path)
            classes.append(names[depth] if len(names) > depth else None)
    if outside := sum(len(names) < depth for names in folders):
        say_once(f"left out of '{root}': {outside} images beside the folders of the splits")

    known = sorted({name for _, classes in found.values() for name in classes if name is not None})
    number, features = {name: k for k, name in enumerate(known)}, {"image": datasets.Image(decode=False)}
    if len(known) > 1:
        features["label"] = datasets.ClassLabel(names=known)
    tables = {}
    for split, (files, classes) in found.items():
        if files:
            try:
                columns = {"image": pa.array(files, pa.string())}
            except UnicodeEncodeError as error:
                file = os.fsencode(error.object)
                raise CareHubError(f"the file name {file!r} is not UTF-8; rename the file.") from None
            if "label" in features:
                columns["label"] = pa.array([number.get(name or "") for name in classes], pa.int64())
            tables[split] = datasets.Dataset.from_dict(columns, datasets.Features(features))
    return datasets.DatasetDict(tables)


def _imagenet100_folders(root: str) -> list[str]:
    """The folders of ImageNet-100, named by WordNet ids (in all ImageNet, say)."""
    wanted = Path(__file__).with_name("imagenet100.txt").read_text().split()
    train = Path(root, "train")
    if missing := [synset for synset in wanted if not (train / synset).is_dir()]:
        lacking = f"{len(missing)} of the 100 class folders of ImageNet-100, e.g. {missing[0]}"
        raise CareHubError(f"'{train}' lacks {lacking}.")
    folders = [os.path.join(split, synset) for split in ("train", "val", "validation") for synset in wanted]
    return [folder for folder in folders if Path(root, folder).is_dir()]


def _choose_columns(
    splits: "datasets.DatasetDict", data: DataConfig, spec: DatasetSpec
) -> tuple[str, str | None]:
    """The columns of images and of labels, None if there are none."""
    import datasets

    features = {name: feature for rows in splits.values() for name, feature in rows.features.items()}
    decoded = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    files = [name for name, feature in features.items() if _holds_files(feature)]
    classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    default = "label" if "label" in features else next(iter(classes), None)
    image = data.image_column or spec.image or next(iter(decoded + files), None)
    label = data.label_column or spec.label or default
    if label not in features and not data.label_column:
        label = None
    for kind, column, known in (("image", image, decoded + files), ("label", label, [None, *features])):
        if column not in known:
            lacking = f"data set '{data.dataset_name}' has no {kind} column '{column}'"
            raise CareHubError(f"{lacking} (its columns: {', '.join(features)}); use `{kind}_column`.")
    return str(image), label


def _holds_files(feature: Any) -> bool:
    """Whether a column without the Hub's metadata holds files: their bytes, or a struct with "bytes"."""
    content = feature.get("bytes") if isinstance(feature, dict) else feature
    return getattr(content, "dtype", None) in ("binary", "large_binary")


@dataclass(frozen=True)
class Classes:
    """The column of labels, the class of each value in it, and the names of classes that have one."""

    column: str | None = None
    numbers: dict[Any, int] = field(default_factory=dict)
    names: list[str] | None = None

    def labels(self, part: "datasets.Dataset") -> list[int]:
        """The labels of all rows, -1 for none."""
        if self.column not in part.features:
            return [-1] * len(part)
        return [self.numbers.get(value, -1) for value in part.select_columns([self.column])[:][self.column]]


def _find_classes(splits: "datasets.DatasetDict", column: str | None, data: DataConfig) -> Classes:
    """The classes of all splits together: the data set's own, else of whole numbers or strings.

    Raises CareHubError for numbers that are not whole. Other things have no classes, and that is logged.
    """
    import datasets

    holders = [rows for rows in splits.values() if column in rows.features]
    if column is None or not holders:
        return Classes()
    features = [rows.features[column] for rows in holders]
    if own := [feature for feature in features if isinstance(feature, datasets.ClassLabel)]:
        return Classes(column, {k: k for k in range(own[0].num_classes)}, own[0].names)
    about = f"the labels of data set '{data.dataset_name}' (column '{column}')"
    for feature in features:
        kind = feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__
        if not kind.startswith(CLASS_TYPES):
            say_once(f"{about} are left out: {kind} is no kind of class")
            return Classes()
    values = {value for rows in holders for value in rows.unique(column)} - {None}
    known = [value for value in values if value == value]  # which a missing float is not
    if any(isinstance(value, str) for value in known):
        names = sorted({str(value) for value in known})
        return Classes(column, {name: k for k, name in enumerate(names)}, names)
    if odd := [value for value in known if value % 1]:
        raise CareHubError(f"{about} are no classes, e.g. {odd[0]:.3g}; name another with `label_column`.")
    numbers = sorted(value for value in known if value >= 0)
    if numbers and numbers[-1] >= MANY_CLASSES:  # ids rather than numbers from 0
        names = [str(int(value)) for value in numbers]
        return Classes(column, {value: k for k, value in enumerate(numbers)}, names)
    return Classes(column, {value: int(value) for value in numbers})


def _make_images(
    parts: list["datasets.Dataset"],
    image: str,
    classes: Classes,
    split: str,
    data: DataConfig,
    spec: DatasetSpec,
    progress: bool,
    decode: bool,
) -> Images:
    """All parts together, in memory if they fit, else streamed."""
    import datasets

    cells = [part.select_columns([image]).rename_columns({image: "image"}) for part in parts]
    large = datasets.Value("large_binary")  # which older `datasets` do not take for images
    cells = [
        part.cast_column("image", datasets.Value("binary")) if part.features["image"] == large else part
        for part in cells
    ]
    rows = datasets.concatenate_datasets(
        [part.cast_column("image", datasets.Image(decode=False)) for part in cells]
    )
    numbers = torch.tensor([label for part in parts for label in classes.labels(part)], dtype=torch.int64)
    labels, names = (numbers, classes.names) if (numbers >= 0).any() else (None, None)
    fits = len(rows) * 3 * spec.size**2 <= IN_MEMORY_BYTES
    size = spec.size if fits else round(spec.size * 8 / 7)
    if fits and not decode:
        return InMemoryImages(size, labels, names, _black(len(rows), size))
    images = StreamedImages(size, labels, names, rows, data.num_workers, data.skip_broken_images)
    return decode_into_memory(images, f"{data.dataset_name} {split}", progress) if fits else images
