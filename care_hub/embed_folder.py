"""Embeddings of a folder of images as one file: by any number of processes, in constant memory, resumable.

Each process embeds every so-many-th part of the sorted images into a file of its own, named by a hash of the
names, sizes and times of the images in it; the main process joins the parts. Only the names, one per image,
grow with the number of images.
"""

import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from .data.decode import list_images
from .distributed import inference_accelerator
from .encoder import Encoder
from .errors import CareHubError, printable
from .hub.registry import locate

PART = 4096  # images
Arrays = Iterator[np.ndarray]  # (n, d), one after the other

logger = logging.getLogger(__name__)


def embed_folder(
    source: str, encoder: str, output: str, space: str, batch_size: int, skip_broken_images: bool
) -> str:
    """Embed an image, or a folder of them, into the file `output`; the main process says what was written.

    The suffix of `output` (.parquet, .safetensors or .npy) is its format. The same call resumes one that was
    interrupted; parts with images that have changed in between are made again. Raises CareHubError for an
    output that can't be written, and for a broken image (unless `skip_broken_images`: it is named and left
    out).
    """
    path = Path(output)
    if path.suffix not in WRITERS:
        raise CareHubError(f"'{output}' must end in {', '.join(WRITERS)}.")
    if not path.absolute().parent.is_dir():
        raise CareHubError(f"the folder '{path.parent}' for the output does not exist.")
    files, names = list_images(source)
    accelerator = inference_accelerator()
    loaded = Encoder.from_folder(locate(encoder)).to(accelerator.device)
    about = {"encoder": loaded.fingerprint, "space": space}
    folder = path.with_name(f"{path.name}.parts")
    # The main process says for all which images there are: one of them may change at this moment.
    [keys] = broadcast_object_list([part_keys(files, names, about) if accelerator.is_main_process else None])
    parts = PartialEmbeddings(folder, names, about, keys)
    try:
        parts.folder.mkdir(exist_ok=True)
        if accelerator.is_main_process and (resumed := parts.resumed()):
            logger.info(resumed)
        mine = parts.missing(accelerator.process_index, accelerator.num_processes)
        todo = [file for k in mine for file in files[parts.rows(k)]]
        broken = partial(logger.warning, "left out: %s") if skip_broken_images else None
        stream = loaded.stream(todo, batch_size, space, broken=broken)
        hidden = not (accelerator.is_main_process and sys.stderr.isatty())
        processes = accelerator.num_processes
        title = "embedding" if processes == 1 else f"embedding, process 1 of {processes}"
        with tqdm(total=len(todo), unit="image", desc=title, disable=hidden) as bar:
            parts.save(mine, _counted(stream, bar))
        accelerator.wait_for_everyone()
        return parts.join(path) if accelerator.is_main_process else ""
    except OSError as error:
        advice = "once that is mended, the same command resumes"
        raise CareHubError(f"'{output}' can't be written ({error.strerror or error}); {advice}.") from error


def fingerprint_of(path: str | Path) -> str | None:
    """The fingerprint of the encoder that made a file of embeddings; None if it does not say (as .npy never).

    Raises CareHubError for any other file.
    """
    try:
        return _read_metadata(Path(path)).get("encoder")
    except (OSError, EOFError, ValueError, SafetensorError) as error:  # pyarrow's own errors are ValueErrors
        raise CareHubError(f"'{path}' is not a file of embeddings ({error}).") from error


def _read_metadata(path: Path) -> dict[str, str]:
    if path.suffix == ".npy":
        np.load(path, mmap_mode="r", allow_pickle=False)
        return {}
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        return {key.decode(): value.decode() for key, value in (pq.read_schema(path).metadata or {}).items()}
    with safe_open(path, "np") as file:
        return file.metadata() or {}


def _counted(stream: Arrays, bar: tqdm) -> Arrays:
    for z in stream:
        yield z
        bar.update(len(z))


def part_keys(files: list[str], names: list[str], about: dict[str, str]) -> list[str]:
    """For each part a hash of `about` and of its images' names, sizes and times.

    One image more or less changes the keys of its part and of those that follow, a changed image that of
    its part.
    """
    keys = []
    for start in range(0, len(names), PART):
        images = zip(names[start : start + PART], files[start : start + PART], strict=True)
        content = json.dumps([about, [(name, _version(file)) for name, file in images]])
        keys.append(hashlib.sha256(content.encode()).hexdigest()[:32])
    return keys


def _version(file: str) -> tuple[int, int] | None:
    """Size in bytes and time of the last change in ns; None for what decoding will say is missing."""
    try:
        found = os.stat(file)
        return found.st_size, found.st_mtime_ns
    except OSError:
        return None


@dataclass
class PartialEmbeddings:
    """A folder of arrays, part k with the embeddings of images `rows(k)`; NaN for an image left out."""

    folder: Path
    names: list[str]  # of all images
    about: dict[str, str]  # metadata of the finished file
    keys: list[str]  # of all parts, see `part_keys`

    @property
    def numbers(self) -> range:
        """All k."""
        return range(len(self.keys))

    def rows(self, k: int) -> slice:
        """The images of part k."""
        return slice(k * PART, (k + 1) * PART)

    def file(self, k: int) -> Path:
        """Where part k is."""
        return self.folder / f"{self.keys[k]}.npy"

    def resumed(self) -> str:
        """What is there of a call that was interrupted, in a sentence; empty if there is nothing."""
        found = {path.stem for path in self.folder.glob("*.npy")}
        there = [len(self.names[self.rows(k)]) for k in self.numbers if self.keys[k] in found]
        sentences = []
        if there:
            sentences.append(f"{sum(there):,} of {len(self.names):,} images were embedded before.")
        if others := found.difference(self.keys):
            parts = "1 part is" if len(others) == 1 else f"{len(others):,} parts are"
            changed = f"{parts} made again: images, encoder or space have changed since"
            sentences.append(f"{changed} (a part is {PART:,} images).")
        return " ".join(sentences)

    def missing(self, rank: int, processes: int) -> list[int]:
        """Parts that process `rank` has to make and that are not there yet."""
        return [k for k in self.numbers[rank::processes] if not self.file(k).is_file()]

    def save(self, parts: list[int], stream: Arrays) -> None:
        """Write `parts` from the batches of `stream`, whatever their length, each whole or not at all."""
        waiting: list[np.ndarray] = []
        for k in parts:
            size = len(self.names[self.rows(k)])
            while sum(map(len, waiting)) < size:
                waiting.append(next(stream))
            z = np.concatenate(waiting)
            waiting = [z[size:]]
            with self._whole(self.file(k)) as temporary, open(temporary, "wb") as file:
                np.save(file, z[:size], allow_pickle=False)

    def join(self, path: Path) -> str:
        """Write all parts as the file `path` and remove their folder; says what was written."""
        good = [~np.isnan(self._read(k)[:, 0]) for k in self.numbers]
        names = [name for name, is_good in zip(self.names, np.concatenate(good), strict=True) if is_good]
        dim = self._read(0).shape[1]
        arrays = (self._read(k)[rows] for k, rows in enumerate(good))
        with self._whole(path) as temporary:
            WRITERS[path.suffix](temporary, names, dim, arrays, self.about)
        shutil.rmtree(self.folder)
        broken = len(self.names) - len(names)
        left_out = f", {broken:,} broken images left out" if broken else ""
        return printable(f"{len(names):,} embeddings of {dim} numbers in {path}{left_out}")

    @contextmanager
    def _whole(self, path: Path) -> Iterator[Path]:
        """A file of this process to write, which becomes `path` unless something fails."""
        temporary = self.folder / f"writing-{os.getpid()}"
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def _read(self, k: int) -> np.ndarray:
        try:
            return np.load(self.file(k), allow_pickle=False)
        except (ValueError, EOFError) as error:
            advice = "remove it and type the same command again"
            raise CareHubError(f"the part '{self.file(k)}' is damaged; {advice}.") from error


def _write_parquet(path: Path, names: list[str], dim: int, arrays: Arrays, about: dict[str, str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema({"path": pa.string(), "embedding": pa.list_(pa.float32(), dim)}, about)
    with open(path, "wb") as file, pq.ParquetWriter(file, schema) as writer:
        start = 0
        for z in arrays:
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(z.reshape(-1)), dim)
            # Parquet's text is UTF-8: other bytes of a name become escape sequences, as Python writes them.
            some = names[start : start + len(z)]
            paths = [name.encode(errors="backslashreplace").decode() for name in some]
            rows = {"path": paths, "embedding": vectors}
            writer.write_table(pa.table(rows, schema=schema))
            start += len(z)


def _write_safetensors(path: Path, names: list[str], dim: int, arrays: Arrays, about: dict[str, str]) -> None:
    """By hand, since the library's writer wants the whole array: length of the header, header, numbers."""
    tensor = {"dtype": "F32", "shape": [len(names), dim], "data_offsets": [0, 4 * len(names) * dim]}
    header = json.dumps({"__metadata__": about | {"paths": json.dumps(names)}, "embeddings": tensor}).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for z in arrays:
            file.write(z.astype("<f4").tobytes())


def _write_npy(path: Path, names: list[str], dim: int, arrays: Arrays, about: dict[str, str]) -> None:
    """Numbers alone: the format has no place for `names` and `about`."""
    table = np.lib.format.open_memmap(path, "w+", np.dtype("<f4"), (len(names), dim))
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            # OSError if the disk has no room for the (sparse) file: the memory map would end the process.
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    start = 0
    for z in arrays:
        table[start : start + len(z)] = z
        start += len(z)
    table.flush()


Writer = Callable[[Path, list[str], int, Arrays, dict[str, str]], None]
WRITERS: dict[str, Writer] = {
    ".parquet": _write_parquet,
    ".safetensors": _write_safetensors,
    ".npy": _write_npy,
}
