"""Data sets by name, from the Hub or a local copy, as uint8 pictures of one size.

Small sets are decoded once and held as one tensor; large ones stream through loader processes. Both offer
`len()`, `labels` and `batches(index_batches)`.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import CareHubError, suggest
from . import pictures, shapes

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HELD_BYTES = 4 << 30  # larger data sets stream
MEND = "Mend or remove it, or pass --skip-broken-images."


@dataclass(frozen=True)
class Spec:
    """Where a data set is and how it is laid out. Normalisations are those of the public CARE code."""

    hub_id: str | None = None
    image: str | None = None  # None: the only image column
    label: str | None = None
    train: str = "train"
    test: tuple[str, ...] = ("test", "validation", "val", "valid")  # the first that exists
    size: int = 224
    statistics: tuple = IMAGENET


SPECS = {
    "shapes": Spec(image="image", label="label", size=32, statistics=((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))),
    "cifar10": Spec("uoft-cs/cifar10", "img", "label", size=32, statistics=((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))),
    "cifar100": Spec(
        "uoft-cs/cifar100", "img", "fine_label", size=32, statistics=((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
    ),
    "stl10": Spec(
        "jxie/stl10", "image", "label", train="train+unlabeled", size=32,
        statistics=((0.4406, 0.4273, 0.3858), (0.2312, 0.2265, 0.2237)),
    ),
    "imagenet100": Spec("clane9/imagenet-100", "image", "label"),
    "imagefolder": Spec(image="image", label="label"),
}  # fmt: skip


def spec(name: str) -> Spec:
    if name in SPECS:
        return SPECS[name]
    if "/" in name:
        return Spec(hub_id=name)
    raise CareHubError(
        f"there is no data set '{name}'{suggest(name, SPECS)}; choose from {', '.join(SPECS)} or give a Hub id like org/name."
    )


@dataclass
class Images:
    """Pictures of one split. Exactly one of `held` (N, 3, S, S) uint8 and `rows` (a datasets.Dataset) is set."""

    size: int
    labels: Tensor | None  # (N,) int64
    class_names: list[str] | None
    held: Tensor | None = None
    rows: object = None
    columns: dict[str, Tensor] = field(default_factory=dict)  # further factors, e.g. color of `shapes`
    skipped: list[str] = field(default_factory=list)  # broken pictures, named
    skip_broken: bool = False
    workers: int = 0

    def __len__(self) -> int:
        return len(self.held) if self.held is not None else len(self.rows)

    def to(self, device) -> "Images":
        if self.held is not None:
            self.held = self.held.to(device)
        return self

    def batches(self, index_batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """One (b, 3, S, S) uint8 tensor for each 1-d tensor of indices."""
        if self.held is not None:
            yield from (self.held[index.to(self.held.device)] for index in index_batches)
        else:
            yield from self._stream(index_batches, partial(_fitted, size=self.size), torch.stack)

    def cut_batches(self, batches: Iterable[tuple[Tensor, int, int]], cutter: Callable) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Streamed pictures with every view cut out in the loader processes, from the full picture.

        `batches`: (indices, micro-step, place of the first in the global batch). `cutter(picture, step, place)` gives a
        list of PIL crops for the contrastive pair and one, maybe empty, for the pair drawn per group; they come out
        stacked, (b, V, 3, S, S) uint8 each, None where there are none.
        """
        jobs = ([(i, step, first + k) for k, i in enumerate(index.tolist())] for index, step, first in batches)
        yield from self._stream(jobs, cutter, _stack_views)

    def _stream(self, batches: Iterable, use: Callable, stack: Callable) -> Iterator:
        loader = torch.utils.data.DataLoader(
            _Rows(self.rows, use, self.skip_broken), batch_sampler=_Lazy(batches), num_workers=self.workers,
            collate_fn=partial(_collate, stack=stack), pin_memory=torch.cuda.is_available(),
        )  # fmt: skip
        for problems, batch in loader:
            if problems and not self.skip_broken:
                raise CareHubError(f"{problems[0]} {MEND}")
            self.skipped += [p for p in problems if p not in self.skipped]
            yield batch

    def take(self, index: Tensor) -> "Images":
        """The pictures `index`, decoded and held."""
        held = torch.cat(list(self.batches(index.split(256))))
        pick = lambda t: None if t is None else t[index]  # noqa: E731
        columns = {k: v[index] for k, v in self.columns.items()}
        return Images(self.size, pick(self.labels), self.class_names, held, columns=columns)


def center(x: Tensor, size: int) -> Tensor:
    """The central `size` x `size` square of (..., S, S)."""
    top = (x.shape[-1] - size) // 2
    return x[..., top : top + size, top : top + size]


class _Lazy:
    """A sampler over an iterator, so that a long run's order is never a list in memory."""

    def __init__(self, batches: Iterable):
        self.batches = batches

    def __iter__(self):
        return (b.tolist() if isinstance(b, Tensor) else b for b in self.batches)


class _Rows(torch.utils.data.Dataset):
    """Decodes rows of a data set in loader processes: (what was wrong or None, what `use` makes of the picture).

    A job is an index, or an index and arguments for `use`. With `skip_broken` the next picture that can be decoded
    takes a broken one's place.
    """

    def __init__(self, rows, use: Callable, skip_broken: bool):
        self.rows, self.use, self.skip_broken = rows, use, skip_broken

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, job) -> tuple[str | None, object]:
        index, *arguments = job if isinstance(job, tuple) else (job,)
        problem = None
        for other in range(index, index + (len(self) if self.skip_broken else 1)):
            row = other % len(self)
            try:
                return problem, self.use(_picture(self.rows[row]["image"], f"row {row}"), *arguments)
            except CareHubError as error:
                problem = problem or str(error)
        return problem, None


def _collate(items: list, stack: Callable) -> tuple[list[str], object]:
    problems = [problem for problem, _ in items if problem]
    values = [value for _, value in items]
    return problems, None if any(v is None for v in values) else stack(values)


def _stack_views(items: list[tuple[list, list]]) -> tuple[Tensor, Tensor | None]:
    stacks = [[torch.stack([_tensor(p) for p in views]) for item in items if (views := item[kind])] for kind in (0, 1)]
    return torch.stack(stacks[0]), torch.stack(stacks[1]) if stacks[1] else None


def _picture(cell: dict, where: str):
    name = f"the picture '{cell['path']}' ({where})" if cell.get("path") else f"the picture in {where}"
    return pictures.rgb(cell["bytes"] or cell["path"], name)


def _fitted(picture, size: int) -> Tensor:
    return _tensor(pictures.fit(picture, size))


def _tensor(picture) -> Tensor:
    return torch.from_numpy(pictures.pixels(picture).copy())


def load(
    name: str,
    split: str,
    root: str | None = None,
    size: int | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    workers: int = 0,
    skip_broken: bool = False,
    progress: bool = True,
    splits: dict | None = None,
) -> Images | None:
    """The `train` or `test` split of a data set; None where it has no test split.

    Held pictures have the side `size` (the data set's own by default); streamed ones 8/7 of it, the usual 256 for 224.
    Raises CareHubError for unknown names, folders or columns, an unreachable Hub, and a picture that can't be decoded
    (unless `skip_broken`: then `skipped` names it). `splits`: what `_read` has given, where it was called already.
    """
    about = spec(name)
    size = size or about.size
    if name == "shapes":
        return _shapes(split, size)
    splits = splits or _read(name, about, root)
    wanted = about.train.split("+") if split == "train" else [s for s in about.test if s in splits][:1]
    if split == "test" and not wanted:
        return None
    missing = [s for s in wanted if s not in splits]
    if missing:
        raise CareHubError(f"data set '{name}' has no split '{missing[0]}'; it has {', '.join(splits)}.")
    from datasets import concatenate_datasets

    rows = splits[wanted[0]] if len(wanted) == 1 else concatenate_datasets([splits[s] for s in wanted])
    return _images(rows, name, split, about, size, image_column, label_column, workers, skip_broken, progress)


def load_both(name: str, root: str | None = None, **options) -> tuple[Images, Images | None]:
    """The training and the test split, as `load` gives them; a large folder is listed once, which can take minutes."""
    splits = None if name == "shapes" else _read(name, spec(name), root)
    train, test = (load(name, split, root, splits=splits, **options) for split in ("train", "test"))
    return train, test


def _shapes(split: str, size: int) -> Images:
    """The embedded set without the detour through files (`shapes.make` is for people who want it as a table)."""
    drawn = shapes.split_factors(split)
    rendered = shapes.render(drawn)
    if size != shapes.SIDE:
        rendered = np.stack([np.asarray(pictures.fit(pictures.rgb(p), size)) for p in rendered])
    columns = {k: torch.from_numpy(v) for k, v in drawn.items()}
    return Images(
        size, columns.pop("label"), list(shapes.SHAPES), torch.from_numpy(rendered).permute(0, 3, 1, 2).contiguous(), columns=columns
    )


def _read(name: str, about: Spec, root: str | None):
    import datasets

    if root is None and about.hub_id is None:
        raise CareHubError(f"--dataset-name {name} needs --data-root, the folder that holds one sub-folder of pictures per class.")
    if root is not None and not Path(root).is_dir():
        raise CareHubError(f"--data-root '{root}' is not a folder.")
    noisy = datasets.utils.logging.get_verbosity()
    datasets.utils.logging.set_verbosity_error()
    try:
        if root is None:
            return datasets.load_dataset(about.hub_id)
        if any(Path(root).rglob("*.parquet")):
            return datasets.load_dataset(str(root))
        folders = _imagenet100_folders(Path(root)) if name == "imagenet100" else None
        return datasets.load_dataset("imagefolder", data_dir=None if folders else str(root), data_files=folders)
    except CareHubError:
        raise
    except Exception as error:  # the client's many kinds of failure, each with a message
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        where = root or f"the Hub ({about.hub_id}); without a network give a local copy with --data-root"
        raise CareHubError(f"data set '{name}' can't be read from {where}: {reason}") from error
    finally:
        datasets.utils.logging.set_verbosity(noisy)


def _imagenet100_folders(root: Path) -> dict[str, list[str]]:
    """Of class folders named by WordNet ids (those of the full ImageNet, say) the hundred of ImageNet-100."""
    wanted = (Path(__file__).parent / "imagenet100.txt").read_text().split()
    splits = {"train": ("train",), "validation": ("val", "validation")}
    found = {split: [root / name / w for name in names for w in wanted if (root / name / w).is_dir()] for split, names in splits.items()}
    missing = [w for w in wanted if not any(folder.name == w for folder in found["train"])]
    if missing:
        raise CareHubError(f"'{root / 'train'}' lacks {len(missing)} of the 100 class folders of ImageNet-100, e.g. {missing[0]}.")
    return {split: [str(folder / "*") for folder in folders] for split, folders in found.items() if folders}


def _images(rows, name, split, about, size, image_column, label_column, workers, skip_broken, progress) -> Images:
    from datasets import ClassLabel, Image

    features = rows.features
    kinds = [k for k, v in features.items() if isinstance(v, Image)]
    image = image_column or about.image or (kinds[0] if kinds else None)
    if image not in kinds:
        raise CareHubError(f"data set '{name}' has no image column '{image}' (its columns: {', '.join(features)}); use --image-column.")
    labels = [k for k, v in features.items() if isinstance(v, ClassLabel)]
    label = label_column or about.label or ("label" if "label" in features else labels[0] if labels else None)
    if label is not None and label not in features:
        if label_column or split == "test":
            raise CareHubError(f"data set '{name}' has no label column '{label}' (its columns: {', '.join(features)}); use --label-column.")
        label = None
    y = torch.as_tensor([-1 if v is None else int(v) for v in rows[label]]) if label else None
    names = features[label].names if label and isinstance(features[label], ClassLabel) else None
    cells = rows.select_columns([image]).rename_columns({image: "image"}).cast_column("image", Image(decode=False))
    images = Images(size, y, names, rows=cells, skip_broken=skip_broken, workers=workers)
    if len(cells) * 3 * size * size > HELD_BYTES:
        images.size = round(size * 8 / 7)
        return images
    return _hold(images, f"{name} {split}", progress)


def _hold(images: Images, title: str, progress: bool) -> Images:
    """Decode everything once, in threads (Pillow releases the interpreter while it decodes)."""
    count = len(images)
    held = torch.empty(count, 3, images.size, images.size, dtype=torch.uint8)
    good = torch.ones(count, dtype=torch.bool)

    def decode(index: int, cell: dict) -> None:
        try:
            held[index] = _tensor(pictures.fit(_picture(cell, f"row {index} of {title}"), images.size))
        except CareHubError as error:
            if not images.skip_broken:
                raise CareHubError(f"{error} {MEND}") from error
            good[index] = False
            images.skipped.append(str(error))

    bar = tqdm(total=count, desc=f"decoding {title}", unit="image", disable=not progress or count < 10000, leave=False)
    with bar, ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, count, 1000):
            cells = images.rows[start : start + 1000]["image"]
            list(pool.map(decode, range(start, start + len(cells)), cells))
            bar.update(len(cells))
    if not good.all():
        images.skipped.sort()
        images.labels = None if images.labels is None else images.labels[good]
        held = held[good]
    images.held, images.rows = held, None
    return images
