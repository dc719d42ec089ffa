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
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import compress, islice
from pathlib import Path
from uuid import uuid4

import numpy as np
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from .data.decode import list_images
from .distributed import from_main, inference_accelerator
from .encoder import Encoder
from .errors import CareHubError, printable
from .files import file_errors, make_folder
from .hub.export import folder_lock
from .hub.registry import locate

PART = 4096  # images
ROWS = 65536  # of a .parquet file that are read at once, or one row group of it
Arrays = Iterator[np.ndarray]  # (n, d), one after the other

logger = logging.getLogger(__name__)


def embed_folder(
    source: str, encoder: str, output: str, space: str, batch_size: int, skip_broken_images: bool
) -> str:
    """Embed an image, or a folder of them, into the file `output`; the main process says what was written.

    The suffix of `output` (.parquet, .safetensors or .npy) is its format. The same call resumes
    one that was interrupted; parts with images that have changed in between are made again. Raises
    CareHubError for an output that can't be written or that another call is writing, for images
    that change meanwhile, and for a broken image (unless `skip_broken_images`: it is named and
    left out).
    """
    path = Path(output)
    if path.suffix not in WRITERS:
        raise CareHubError(f"'{output}' must end in {', '.join(WRITERS)}.")
    if not os.path.isdir(path.absolute().parent):
        raise CareHubError(f"the folder '{path.parent}' for the output does not exist.")
    files, names = list_images(source)
    accelerator = inference_accelerator()
    located = locate(encoder)
    loaded = Encoder.from_folder(located).to(accelerator.device)
    about = {"encoder": loaded.fingerprint, "space": space}
    origin = {
        "encoder_name": os.path.abspath(encoder) if os.path.isdir(encoder) else encoder,
        "revision": located.name if located.parent.name == "snapshots" else "",  # of the Hub's cache
        "images": os.path.abspath(source if os.path.isdir(source) else os.path.dirname(source)),
    }
    main, rank, processes = accelerator.is_main_process, accelerator.process_index, accelerator.num_processes
    folder = path.with_name(f"{path.name}.parts")
    rows = [slice(start, start + PART) for start in range(0, len(names), PART)]
    lock = ExitStack()  # held by the main process

    def claim() -> list[str]:
        lock.enter_context(folder_lock(make_folder(folder), wait=False))
        return [part_key(files[own], names[own], about) for own in rows]

    try:
        with lock:
            keys = from_main(claim)  # said for all processes: an image may change at this moment
            parts = [
                Part(folder / f"{key}.npy", files[own], names[own])
                for key, own in zip(keys, rows, strict=True)
            ]
            embeddings = PartialEmbeddings(folder, about | origin, parts)
            if (resumed := from_main(lambda: embeddings.resume(skip_broken_images))) and main:
                logger.info(resumed)
            mine = [part for part in parts[rank::processes] if not part.path.is_file()]
            todo = [file for part in mine for file in part.files]
            broken = partial(logger.warning, "left out: %s") if skip_broken_images else None
            stream = loaded.stream(todo, batch_size, space, broken=broken)
            title = "embedding" if processes == 1 else f"embedding, process 1 of {processes}"
            # Shown by the main process, on a terminal.
            with tqdm(total=len(todo), unit="image", desc=title, disable=None if main else True) as bar:
                embeddings.save(mine, stream, bar)
            accelerator.wait_for_everyone()
            return embeddings.join(path) if main else ""
    except OSError as error:
        advice = "once that is mended, the same command resumes"
        raise CareHubError(f"'{output}' can't be written ({error.strerror or error}); {advice}.") from error


def fingerprint_of(path: str | Path) -> str | None:
    """The fingerprint of the encoder that made a file of embeddings; None if it does not say (as .npy never).

    Raises CareHubError for any other file.
    """
    return read_metadata(path).get("encoder")


def read_metadata(path: str | Path) -> dict[str, str]:
    """What a file of embeddings says of itself: encoder, space, ...; nothing in .npy.

    Raises CareHubError for any other file.
    """
    try:
        return _read_metadata(Path(path))
    except (OSError, EOFError, ValueError, SafetensorError) as error:  # pyarrow's own errors are ValueErrors
        raise CareHubError(f"'{path}' is not a file of embeddings ({error}).") from error


def read_embeddings(path: str | Path) -> tuple[list[str], np.ndarray, dict[str, str]]:
    """What `care-hub embed` wrote to .parquet or .safetensors: names, (N, d) float32, metadata.

    Raises CareHubError for any other file.
    """
    path = Path(path)
    try:
        about = _read_metadata(path)
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            table = pq.read_table(path, columns=["path", "embedding"])
            column = table["embedding"].combine_chunks()
            names, z = table["path"].to_pylist(), column.values.to_numpy().reshape(len(table), -1)
        else:
            with safe_open(path, "np") as file:
                names, z = json.loads(about["paths"]), file.get_tensor("embeddings")
        if z.shape[:1] != (len(names),) or z.ndim != 2 or z.dtype != np.float32 or not np.isfinite(z).all():
            raise ValueError(f"{len(names)} names and {z.dtype} of shape {z.shape}")
        return names, z, about
    except (OSError, EOFError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        raise CareHubError(f"'{path}' is not a file of embeddings with names ({error}).") from error


def parquet_files(sources: Sequence[str]) -> list[Path]:
    """The .parquet files among, and in, `sources`. Raises CareHubError where there are none."""
    files: list[Path] = []
    for source in sources:
        path = Path(source)
        if not os.path.exists(source):
            raise CareHubError(f"there is no file or folder '{source}'.")
        inside = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        if not inside or inside[0].suffix != ".parquet":
            raise CareHubError(f"'{source}' is, or has, no .parquet file of `care-hub embed`.")
        files += inside
    return files


def read_origins(files: Sequence[Path]) -> list[dict[str, str]]:
    """What each of some files of one encoder says of itself, see `read_metadata`.

    Raises CareHubError for files of several encoders, or that do not say which.
    """
    abouts = [read_metadata(file) for file in files]
    spaces = {(about.get("encoder"), about.get("space")) for about in abouts}
    if len(spaces) > 1:
        raise CareHubError("these files have embeddings of several encoders or spaces; take them apart.")
    ((fingerprint, space),) = spaces
    if not fingerprint or space not in ("projection", "backbone"):
        raise CareHubError(f"'{files[0]}' does not say which encoder made it; embed the images again.")
    return abouts


def dimensions(path: Path) -> int:
    """How many numbers an embedding in a .parquet file has. Raises CareHubError for a file without such."""
    import pyarrow.parquet as pq

    try:
        return pq.read_schema(path).field("embedding").type.list_size
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CareHubError(f"'{path}' has no embeddings of a fixed size ({error}).") from error


def stream_embeddings(path: Path, d: int) -> Iterator[np.ndarray]:
    """The embeddings (n, d) in a .parquet file, some ten thousand at a time.

    Raises CareHubError for a file without such.
    """
    for _, z in _stream(path, d, ["embedding"]):
        yield z


def stream_named_embeddings(path: Path, d: int) -> Iterator[tuple[list[str], np.ndarray]]:
    """`stream_embeddings`, with the names of the images. Raises CareHubError also where these are missing."""
    return _stream(path, d, ["embedding", "path"])


def _stream(path: Path, d: int, columns: list[str]) -> Iterator[tuple[list[str], np.ndarray]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            kind = file.schema_arrow.field("embedding").type
            fixed = pa.types.is_fixed_size_list(kind) and kind.list_size == d
            if not fixed or kind.value_type != pa.float32():
                raise ValueError(f"a column of {kind}")
            groups: list[int] = []
            for group in range(file.num_row_groups):
                groups.append(group)
                rows = sum(file.metadata.row_group(g).num_rows for g in groups)
                if rows >= ROWS or group == file.num_row_groups - 1:
                    for batch in file.read_row_groups(groups, columns=columns).to_batches():
                        z = batch["embedding"].flatten().to_numpy(zero_copy_only=False).reshape(-1, d)
                        yield batch["path"].to_pylist() if "path" in columns else [], z
                    groups = []
    except (OSError, ValueError, KeyError) as error:  # pyarrow's own errors are ValueErrors
        named = " with names" if "path" in columns else ""
        raise CareHubError(f"'{path}' has no embeddings of {d} numbers{named} ({error}).") from error


def _read_metadata(path: Path) -> dict[str, str]:
    if path.suffix == ".npy":
        np.load(path, mmap_mode="r", allow_pickle=False)
        return {}
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        return {key.decode(): value.decode() for key, value in (pq.read_schema(path).metadata or {}).items()}
    with safe_open(path, "np") as file:
        return file.metadata() or {}


@dataclass
class Part:
    """Some images, and the file of their embeddings: an array with NaN for an image left out."""

    path: Path
    files: list[str]
    names: list[str]

    def read(self) -> np.ndarray:
        """The embeddings. Raises CareHubError for a file that is damaged."""
        try:
            return np.load(self.path, allow_pickle=False)
        except (ValueError, EOFError) as error:
            advice = "remove it and type the same command again"
            raise CareHubError(f"the part '{self.path}' is damaged; {advice}.") from error


def part_key(files: list[str], names: list[str], about: dict[str, str]) -> str:
    """A hash of `about` and of the images' names, sizes and times.

    One image more or less changes the keys of its part and of those that follow, a changed image
    that of its part.
    """
    images = [(name, _version(file)) for name, file in zip(names, files, strict=True)]
    return hashlib.sha256(json.dumps([about, images]).encode()).hexdigest()[:32]


def _version(file: str) -> tuple[int, int] | None:
    """Size in bytes and time of the last change in ns; None for what decoding will say is missing."""
    try:
        found = os.stat(file)
        return found.st_size, found.st_mtime_ns
    except OSError:
        return None


@dataclass
class PartialEmbeddings:
    """A folder with the files of `parts`."""

    folder: Path
    about: dict[str, str]  # metadata of the finished file
    parts: list[Part]

    def resume(self, skip_broken_images: bool) -> str:
        """What is there of a call that was interrupted, in a sentence; empty if there is nothing.

        Removes what can't be gone on with: a file half written, and unless `skip_broken_images`
        parts that leave images out. Raises CareHubError for a damaged part.
        """
        with file_errors(self.folder, "read"):
            for half in self.folder.glob("writing-*"):
                half.unlink()
            for part in self.parts:
                if part.path.is_file() and np.isnan(part.read()).any() and not skip_broken_images:
                    part.path.unlink()
        found, count = set(self.folder.glob("*.npy")), sum(len(part.names) for part in self.parts)
        sentences = []
        if there := sum(len(part.names) for part in self.parts if part.path in found):
            sentences.append(f"{there:,} of {count:,} images were embedded before.")
        if others := found.difference(part.path for part in self.parts):
            parts = "1 part is" if len(others) == 1 else f"{len(others):,} parts are"
            changed = f"{parts} made again: images, encoder or space have changed since"
            sentences.append(f"{changed} (a part is {PART:,} images).")
        return " ".join(sentences)

    def save(self, parts: list[Part], stream: Arrays, bar: tqdm) -> None:
        """Write `parts` from the batches of `stream`, whatever their length, each whole or not at all.

        Raises CareHubError where an image has changed meanwhile: what was embedded may be neither.
        """
        waiting: list[np.ndarray] = []
        before = [part_key(part.files, part.names, self.about) for part in parts]
        for part, key in zip(parts, before, strict=True):
            size = len(part.names)
            while sum(map(len, waiting)) < size:
                waiting.append(next(stream))
                bar.update(len(waiting[-1]))
            z = np.concatenate(waiting)
            waiting = [z[size:]]
            if part_key(part.files, part.names, self.about) != key:
                some = f"among those from '{part.names[0]}' to '{part.names[-1]}'"
                raise CareHubError(f"images {some} changed meanwhile; the same command embeds them again.")
            with self._whole(part.path) as temporary:
                _write_npy(temporary, part.names, z.shape[1], iter([z[:size]]), self.about)

    def join(self, path: Path) -> str:
        """Write all parts as the file `path` and remove their folder; says what was written.

        Raises CareHubError where no image could be decoded.
        """
        good = [~np.isnan(part.read()[:, 0]) for part in self.parts]
        names = [
            name for part, rows in zip(self.parts, good, strict=True) for name in compress(part.names, rows)
        ]
        if not names:
            raise CareHubError("none of the images can be decoded; nothing was written.")
        dim = self.parts[0].read().shape[1]
        arrays = (part.read()[rows] for part, rows in zip(self.parts, good, strict=True))
        with self._whole(path) as temporary:
            WRITERS[path.suffix](temporary, names, dim, arrays, self.about)
        for file in self.folder.glob("*.npy"):
            file.unlink()
        shutil.rmtree(self.folder, ignore_errors=True)  # with its lock: another call may have come in
        broken = sum(map(len, good)) - len(names)
        left_out = f", {broken:,} broken images left out" if broken else ""
        return printable(f"{len(names):,} embeddings of {dim} numbers in {path}{left_out}")

    @contextmanager
    def _whole(self, path: Path) -> Iterator[Path]:
        """A file of this process to write, which becomes `path` unless something fails."""
        temporary = self.folder / f"writing-{uuid4().hex}"  # other machines may have the same process ids
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_named_embeddings(
    path: Path, dim: int, rows: Iterator[tuple[list[str], np.ndarray]], about: dict[str, str]
) -> None:
    """Write names and embeddings (n, dim) float32, as they come, to a .parquet file with metadata `about`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema({"path": pa.string(), "embedding": pa.list_(pa.float32(), dim)}, about)
    with open(path, "wb") as file, pq.ParquetWriter(file, schema) as writer:
        for names, z in rows:
            # Parquet's text is UTF-8: other bytes of a name become escape sequences, as Python writes them.
            paths = [name.encode(errors="backslashreplace").decode() for name in names]
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(z.reshape(-1)), dim)
            writer.write_table(pa.table({"path": paths, "embedding": vectors}, schema=schema))


def _write_parquet(path: Path, names: list[str], dim: int, arrays: Arrays, about: dict[str, str]) -> None:
    left = iter(names)
    write_named_embeddings(path, dim, ((list(islice(left, len(z))), z) for z in arrays), about)


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
    header = {"descr": "<f4", "fortran_order": False, "shape": (len(names), dim)}
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for z in arrays:
            file.write(z.astype("<f4").tobytes())


Writer = Callable[[Path, list[str], int, Arrays, dict[str, str]], None]
WRITERS: dict[str, Writer] = {
    ".parquet": _write_parquet,
    ".safetensors": _write_safetensors,
    ".npy": _write_npy,
}
