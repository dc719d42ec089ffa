"""One split of a data set: uint8 RGB images of one size, in memory or streamed through loader processes."""

import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..augment import beside
from ..config import PREEMPT_SIGNALS
from ..cores import cores
from ..errors import CareHubError
from .decode import square_tensor, to_rgb, to_square, to_tensor

SAVING_SECONDS = 30  # which torchrun allows
ADVICE = "Mend or remove it, or pass `skip_broken_images=True`."

Views: TypeAlias = list[Image.Image]
Batch = TypeVar("Batch")


@dataclass
class Images(ABC):
    """The images of one split, `size` x `size` pixels each, with labels where there are any."""

    size: int
    labels: Tensor | None  # (N,) int64, -1 for an image without a label
    class_names: list[str] | None
    columns: dict[str, Tensor] = field(default_factory=dict, kw_only=True)  # further labels, e.g. color
    skipped: list[str] = field(default_factory=list, kw_only=True)  # what was wrong with broken images

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def description(self) -> str:
        """Where the images are, in words."""

    @abstractmethod
    def batches(self, index_batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """One (b, 3, S, S) uint8 tensor for each 1-d tensor of indices."""

    def take(self, index: Tensor) -> "InMemoryImages":
        """The images `index`, decoded and in memory."""
        pixels = torch.cat(list(self.batches(index.split(256))))
        labels = None if self.labels is None else self.labels[index]
        columns = {name: values[index] for name, values in self.columns.items()}
        return InMemoryImages(self.size, labels, self.class_names, pixels, columns=columns)


@dataclass
class InMemoryImages(Images):
    """Images as one tensor.

    >>> pixels = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    >>> InMemoryImages(8, torch.tensor([0, 1, 0]), ["cat", "dog"], pixels).take(torch.tensor([2, 1])).labels
    tensor([0, 1])
    """

    pixels: Tensor  # (N, 3, S, S) uint8

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def description(self) -> str:
        return "in memory"

    def to(self, device: torch.device | str) -> "InMemoryImages":
        """Move the pixels to `device`, in place."""
        self.pixels = self.pixels.to(device)
        return self

    def batches(self, index_batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """One (b, 3, S, S) uint8 tensor, where the pixels are, for each 1-d tensor of indices."""
        return (self.pixels[beside(self.pixels, index)] for index in index_batches)


@dataclass
class StreamedImages(Images):
    """Images that loader processes decode each time they are asked for.

    With `skip_broken` the next image that can be decoded takes a broken one's place, and `skipped` names it;
    else a broken image raises CareHubError. `labels` and the indices count broken images too.
    """

    rows: Any  # a datasets.Dataset whose column `image` has undecoded cells {"bytes", "path"}
    workers: int = 0
    skip_broken: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def description(self) -> str:
        return f"decoded by {self.workers} loader processes"

    def batches(self, index_batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """One (b, 3, S, S) uint8 tensor for each 1-d tensor of indices."""
        jobs = ([(row, self.size) for row in index.tolist()] for index in index_batches)
        return self._stream(jobs, square_tensor, torch.stack)

    def cut_batches(
        self,
        batches: Iterable[tuple[Tensor, int, int]],
        cutter: Callable[[Image.Image, int, int], tuple[Views, Views]],
    ) -> Iterator[tuple[Tensor | None, Tensor | None]]:
        """The views of each image, cut out of the full image in the loader processes.

        `batches`: (indices, micro-step, place of the first in the global batch). `cutter(image, step, place)`
        gives a list of crops for the contrastive pair and one for the pair sampled per group, maybe empty;
        they come out stacked, (b, V, 3, S, S) uint8 each, None where there are none.
        """
        jobs = (
            [(row, step, place) for place, row in enumerate(index.tolist(), first)]
            for index, step, first in batches
        )
        return self._stream(jobs, cutter, _stack_views)

    def _stream(
        self, jobs: Iterable[list[Any]], use: Callable[..., Any], stack: Callable[[list[Any]], Batch]
    ) -> Iterator[Batch]:
        """`stack` of what `use(image, *arguments)` gives for the (row, *arguments) of each list of jobs."""
        loader: DataLoader = DataLoader(
            _DecodedBatches(self.rows, use, stack, self.skip_broken),
            batch_size=None,
            sampler=jobs,  # an iterator: the order of a long run is never a list in memory
            collate_fn=tuple,  # which they are
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_outlive_signals,
        )
        for problems, batch in loader:
            if batch is None:
                raise CareHubError(f"{problems[0]} {ADVICE}")
            self.skipped += [problem for problem in problems if problem not in self.skipped]
            yield batch


def _outlive_signals(worker: int) -> None:
    """Loader processes go on while their parent saves, to which such signals were sent as well."""
    for number in {signal.SIGINT, signal.SIGHUP, *(signal.Signals[name.upper()] for name in PREEMPT_SIGNALS)}:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(SAVING_SECONDS))  # its parent, too, ends it by that


@dataclass
class _DecodedBatches(Dataset):
    """For a list of jobs: what was wrong with images, and the batch (None if an image is missing in it)."""

    rows: Any
    use: Callable[..., Any]
    stack: Callable[[list[Any]], Any]
    skip_broken: bool

    def __getitem__(self, jobs: list[tuple[int, ...]]) -> tuple[list[str], Any]:
        problems, values = [], []
        for first, *arguments in jobs:
            for k in range(len(self.rows) if self.skip_broken else 1):
                row = (first + k) % len(self.rows)
                try:
                    cell = self.rows[row]["image"]
                    values.append(self.use(to_rgb(cell, _name(cell, f"row {row}")), *arguments))
                    break
                except CareHubError as error:
                    problems.append(str(error))
        return problems, self.stack(values) if len(values) == len(jobs) else None


def _stack_views(items: list[tuple[Views, Views]]) -> tuple[Tensor | None, Tensor | None]:
    pairs = [
        [torch.stack([to_tensor(view) for view in views]) for views in kind if views]
        for kind in zip(*items, strict=True)
    ]
    first, second = (torch.stack(pair) if pair else None for pair in pairs)
    return first, second


def _name(cell: dict[str, Any] | None, where: str) -> str:
    path = cell and cell.get("path")
    return f"the image '{path}' ({where})" if path else f"the image in {where}"


def decode_into_memory(images: StreamedImages, title: str, progress: bool) -> InMemoryImages:
    """Decode everything once, in threads (Pillow releases the interpreter while it decodes).

    With `skip_broken` broken images are left out. `title` is for the progress bar and for messages.
    """
    count, size, labels = len(images), images.size, images.labels
    pixels = torch.empty(count, 3, size, size, dtype=torch.uint8)
    problems: dict[int, str] = {}

    def decode(row: int, cell: dict[str, Any]) -> None:
        try:
            pixels[row] = to_square(cell, _name(cell, f"row {row} of {title}"), size)
        except CareHubError as error:
            if not images.skip_broken:
                raise CareHubError(f"{error} {ADVICE}") from error
            problems[row] = str(error)

    hidden = not progress or count < 10000 or None  # None: only on a terminal
    bar = tqdm(total=count, desc=f"decoding {title}", unit="image", disable=hidden, leave=False)
    with bar, ThreadPoolExecutor(cores()) as pool:
        for start in range(0, count, 1000):
            cells = images.rows[start : start + 1000]["image"]
            for _ in pool.map(decode, range(start, count), cells):
                bar.update()
    if problems:
        good = torch.tensor([row not in problems for row in range(count)])
        pixels, labels = pixels[good], None if labels is None else labels[good]
    return InMemoryImages(size, labels, images.class_names, pixels, skipped=sorted(problems.values()))
